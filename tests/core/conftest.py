"""A small model, a kernel for its first layer, and a batch for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

import esper
from tests.core.seeds import GatedPlatform, blueprint
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 8)


@pytest.fixture
def kernel(shelf: KernelShelf) -> str:
    return shelf.put(blueprint()).id


@pytest.fixture
def model(shelf: KernelShelf) -> esper.MorphableModel:
    return esper.wrap(mlp(8, 6, 4), platform=shelf.platform)


@pytest.fixture
def gated(shelf: KernelShelf) -> Iterator[GatedPlatform]:
    """The shelf's platform with a gate before each kernel that a test holds up; all are open at the end."""
    platform = GatedPlatform(shelf)
    yield platform
    for gate in platform.kernel_source.closed.values():
        gate.set()


@pytest.fixture
def nothing_is_said() -> Iterator[None]:
    """A warning is an error, unless the test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
