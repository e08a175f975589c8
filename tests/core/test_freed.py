"""What is freed when a wrapped model's last reference goes: all of it, at once, without the cycle collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import esper
from tests.core.seeds import blueprint, load
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


@pytest.fixture
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("telemetry", [False, True])
def test_a_models_memory_is_free_when_it_is_deleted(
    shelf: KernelShelf, no_collections: None, telemetry: bool, loaded: bool
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, telemetry_enabled=telemetry)
    if loaded:
        load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    model(torch.randn(5, 8)).sum().backward()
    alive = weakref.ref(model)
    del model
    assert alive() is None


def test_wrapping_does_not_keep_what_its_callers_hold(no_collections: None) -> None:
    class Held:
        """Something that a caller has, such as a batch."""

    def wrapping() -> tuple[nn.Module, weakref.ref[Held]]:
        held = Held()
        return esper.wrap(mlp(8, 6, 4)), weakref.ref(held)

    _, reference = wrapping()
    assert reference() is None
