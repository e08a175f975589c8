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
    "'cold_strat', did you mean 'cold_start'.*'batch_seeds', 'cold_start', 'fallback'": {"cold_strat": "eager"},
    "'Fallback', did you mean 'fallback'": {"Fallback": "eager", "inner": "eager"},
    "'iner', did you mean 'inner'": {"iner": "eager"},
    "'epilog_fusion', did you mean 'epilogue_fusion'": {"epilog_fusion": True},
    r"no option 'nothing'; Esper's.*Inductor's, which torch\._inductor\.list_options\(\)": {"nothing": 1},
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


def test_inductors_own_options_are_taken_as_torch_takes_them(shelf: KernelShelf, fresh_dynamo: None) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(4, 4)), platform=shelf.platform)
    x = torch.randn(2, 4)
    options: Any = {"epilogue-fusion": False, "triton.cudagraphs": False}
    assert torch.allclose(torch.compile(model, backend="esper", options=options)(x), model(x))
