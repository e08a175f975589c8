"""Options of `torch.compile(..., backend="esper")` that cannot be used: the error names the option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import esper
from esper.compiler.inner import BackendOptionError
from tests.kernel_shelf import KernelShelf

WRONG: dict[str, dict[str, Any]] = {
    "cold_start": {"cold_start": "fast"},
    "fallback": {"fallback": True},
    "batch_seeds": {"batch_seeds": 1},
    "variant_cache_mb": {"variant_cache_mb": -1},
    '"cold_start"': {"cold_start": "eager", "inner": "eager"},
    "no backend 'nope'": {"inner": "nope"},
    "call itself": {"inner": "esper"},
    "epilogue_fusion": {"inner": "eager", "epilogue_fusion": False},
}


@pytest.mark.parametrize("named", WRONG)
def test_an_option_that_cannot_be_used_is_named(named: str, shelf: KernelShelf, fresh_dynamo: None) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4)), platform=shelf.platform)
    x = torch.randn(2, 4)
    before = model(x)
    with pytest.raises(BackendCompilerFailed, match=named) as raised:  # Dynamo's, around what any backend raises
        torch.compile(model, backend="esper", options=WRONG[named])(x)
    assert isinstance(raised.value.inner_exception, BackendOptionError)
    assert torch.equal(model(x), before)
