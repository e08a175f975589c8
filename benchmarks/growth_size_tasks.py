"""The tasks of `growth_size`: sets that come with packages, and teachers of several widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.growth_skill_data import SETS, Digits

__all__ = ["BATCH", "TASKS", "TEACHERS", "Task"]

BATCH = 64
NOISE = 0.1
"""Of a teacher's outputs, beside their unit spread: what no student can learn."""
TEACHERS = {"teacher 8": 8, "teacher 24": 24, "teacher 64": 64}


@dataclass(frozen=True)
class Task:
    """Inputs with features of about unit size, and classes or targets; what is judged on is not trained on."""

    train: tuple[Tensor, Tensor]
    judged: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    outputs: int

    @property
    def features(self) -> int:
        return self.train[0].shape[1]

    @property
    def classifies(self) -> bool:
        return not self.train[1].is_floating_point()

    def loss(self, model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy, or the mean squared error."""
        x, y = batch
        return F.cross_entropy(model(x), y) if self.classifies else F.mse_loss(model(x), y)

    def points(self, model: Callable[[Tensor], Tensor]) -> float:
        """Of the test: per cent that are right, or per cent of the variance that is explained."""
        x, y = self.test
        with torch.no_grad():
            outputs = model(x)
        if self.classifies:
            return 100.0 * float((outputs.argmax(1) == y).float().mean())
        return 100.0 * (1.0 - float((outputs - y).square().mean() / y.var(0, correction=0).mean()))

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random batches without end; the same for the same seed."""
        x, y = self.train
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(x), (BATCH,), generator=generator)
            yield x[chosen], y[chosen]


def _split(x: Tensor, y: Tensor, outputs: int, seed: int) -> Task:
    """56 % to train on, 14 % to judge on, 30 % to test on."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, second = len(x) * 56 // 100, len(x) * 70 // 100
    train, judged, test = ((x[part], y[part]) for part in (order[:first], order[first:second], order[second:]))
    return Task(train, judged, test, outputs)


def _table(name: str, seed: int) -> Task:
    from sklearn import datasets

    images, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    return _split((x - x.mean(0)) / x.std(0), y, int(y.max()) + 1, seed)


def _moons(seed: int) -> Task:
    from sklearn.datasets import make_moons

    points, labels = make_moons(2000, noise=0.2, random_state=seed)
    return _split(torch.tensor(points, dtype=torch.float32), torch.tensor(labels), 2, seed)


def _digits(name: str, seed: int) -> Task:
    digits = Digits.load(name, seed)
    x, y = torch.cat([digits.train_x, digits.test_x]), torch.cat([digits.train_y, digits.test_y])
    return _split((x - x.mean()) / x.std(), y, 10, seed)


def _teacher(width: int, seed: int) -> Task:
    generator = torch.Generator().manual_seed(1000 + seed)
    first, last = (torch.rand(shape, generator=generator) * 2 - 1 for shape in ((width, 10), (5, width)))
    x = torch.randn(4000, 10, generator=generator)
    y = F.relu(x @ first.T) @ last.T
    y = (y - y.mean(0)) / y.std(0)
    return _split(x, y + NOISE * torch.randn(y.shape, generator=generator), 5, seed)


TASKS: Mapping[str, Callable[[int], Task]] = {
    **{name: partial(_digits, name) for name in SETS},
    **{name: partial(_table, name) for name in ("breast_cancer", "wine")},
    "moons": _moons,
    **{name: partial(_teacher, width) for name, width in TEACHERS.items()},
}
"""By name, of a seed."""
