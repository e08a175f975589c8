"""What the tests of wrapped models share: kernels, a way to load them, and a kernel source that can be held up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel

import esper
from esper.artifacts import Blueprint
from esper.execution.sources import FetchedKernel, KernelSource
from tests.kernel_shelf import KernelShelf

__all__ = ["GatedPlatform", "RecordingSink", "blueprint", "load", "outputs", "states"]


def blueprint(in_features: int = 8, out_features: int = 6, seed: int = 1, **options: Any) -> Blueprint:
    """A kernel that changes the output, unless `start` says otherwise."""
    return Blueprint.bottleneck(in_features, out_features, rank=3, seed=seed, **{"start": "kaiming", **options})


def load(model: esper.MorphableModel, layer: str, seed: int, kernel: str, **options: Any) -> None:
    """Load a kernel and see that it is in force."""
    assert asyncio.run(model.load_kernel(layer, seed, kernel, **options)), model.kasmina_layers[layer].seed_errors


def states(model: esper.MorphableModel) -> dict[str, list[str]]:
    """The lifecycle state of every seed, by layer."""
    return {
        name: [layer.state.lifecycle(seed).name for seed in range(layer.num_seeds)]
        for name, layer in model.kasmina_layers.items()
    }


def outputs(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What the model computes, without moving any schedule."""
    with torch.no_grad():
        result: torch.Tensor = model(x)
    return result


class RecordingSink:
    """Keeps what is published."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, BaseModel]] = []

    def publish(self, topic: str, payload: BaseModel) -> None:
        self.messages.append((str(topic), payload))

    def of(self, topic: str) -> list[Any]:
        """The payloads of one topic."""
        return [payload for each, payload in self.messages if each == topic]


@dataclass
class _GatedSource:
    inner: KernelSource
    closed: dict[str, threading.Event] = field(default_factory=dict)
    waiting: threading.Event = field(default_factory=threading.Event)

    def resolve(self, reference: str) -> str:
        return self.inner.resolve(reference)

    def fetch(self, artifact_id: str) -> FetchedKernel:
        gate = self.closed.get(artifact_id)
        if gate is not None:
            self.waiting.set()
            assert gate.wait(30)
        return self.inner.fetch(artifact_id)

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        return self.inner.attachment(artifact_id, target_key)

    def trust(self) -> Any:
        return self.inner.trust()


class GatedPlatform:
    """The shelf's platform with a recording sink, and with a gate before every kernel that a test holds up."""

    def __init__(self, shelf: KernelShelf) -> None:
        self.kernel_source = _GatedSource(shelf.platform.kernel_source)
        self.oona = RecordingSink()

    def hold(self, artifact_id: str) -> threading.Event:
        """Hold up the fetch of a kernel until the returned event is set."""
        return self.kernel_source.closed.setdefault(artifact_id, threading.Event())

    def wait_until_held(self) -> None:
        """Wait until a fetch stands before a closed gate."""
        assert self.kernel_source.waiting.wait(30)
