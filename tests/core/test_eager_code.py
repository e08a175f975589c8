"""Generated code: the host's values bit for bit, its signature, its parameters wherever they go, tracebacks."""

from __future__ import annotations

import math
import traceback
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.core.planting import agrees, dormant, planted


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.heads = heads

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * scale / math.sqrt(k.size(-1))
        if mask is not None:
            scores = scores.masked_fill(mask == 0, float("-inf"))
        weights = functional.dropout(scores.softmax(-1), 0.25, self.training)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, width))
        self.scale = nn.Parameter(torch.randn(width))
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm(x))
        y = self.mlp(x) * self.scale
        y += x
        return y + self.shift


def source(run: Any) -> str:
    text: str = run.__esper_source__
    return text


def test_small_model_is_one_expression() -> None:
    run = planted(mlp()).run()
    assert source(run).splitlines()[-1] == (
        "    return linear(relu(linear(input, p['weight'], p['bias'])), p_1['weight'], p_1['bias'])"
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_values_and_gradients_are_the_hosts(training: bool, requires_grad: bool) -> None:
    host = nn.Sequential(Block(), Block()).train(training)
    agrees(host, planted(host).run(), torch.randn(2, 5, 16, requires_grad=requires_grad))


def test_training_flag_is_read_where_it_is_only_passed_on() -> None:
    host = Block()
    case = planted(host)
    run = case.run()
    for flag in (True, False, True):
        host.train(flag)
        case.root.train(flag)
        agrees(host, run, torch.randn(2, 5, 16))


def test_optional_arguments_away_from_their_defaults_run_the_modules() -> None:
    host = Attention().eval()
    run = planted(host).run()
    x = torch.randn(2, 5, 16)
    mask = torch.ones(5, 5).tril()
    agrees(host, run, x)
    agrees(host, run, x, mask)
    agrees(host, run, x, mask=mask, scale=2.0)
    agrees(host, run, x=x, scale=1.0)
    agrees(host, run, x, None, 0.5)


def test_wrong_arguments_raise_what_the_host_raises() -> None:
    run = planted(Attention()).run()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        run()
    with pytest.raises(TypeError, match="unexpected keyword argument 'masks'"):
        run(torch.randn(2, 5, 16), masks=None)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        run(torch.randn(5, 16))


def test_replaced_moved_and_loaded_parameters_are_seen() -> None:
    host = mlp()
    case = planted(host)
    run = case.run()
    x = torch.randn(4, 10)
    host[0].weight = nn.Parameter(torch.randn(20, 10))
    agrees(host, run, x)
    case.root.load_state_dict(mlp().state_dict())
    agrees(host, run, x)
    case.root.double()
    assert run(x.double()).dtype == torch.float64
    agrees(host, run, x.double())


def test_traceback_shows_the_generated_line() -> None:
    run = planted(mlp()).run()
    with pytest.raises(RuntimeError) as caught:
        run(torch.randn(4, 11))
    assert "return linear(relu(linear(input" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_tick_is_called_once_per_forward() -> None:
    for host in (mlp(), nn.Sequential(Untraceable(), nn.Linear(4, 4))):
        calls: list[int] = []
        regions = planted(host).regions()
        run = regions.build(dormant, tick=lambda calls=calls: calls.append(1))
        for _ in range(3):
            run(torch.randn(2, host[-1].in_features if len(host) == 2 else 10))
        assert len(calls) == 3


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_untraceable_parts_run_with_regions_in_them() -> None:
    host = nn.Sequential(Untraceable(), nn.ReLU(), Untraceable())
    case = planted(host)
    regions = case.regions()
    assert sorted(regions.name_of(module) for module in regions.regions.traced) == [
        "",
        "0.a",
        "0.b",
        "2.a",
        "2.b",
    ]
    run = regions.build(dormant)
    for sign in (1.0, -1.0):
        agrees(host, run, sign * torch.rand(3, 4))


def test_values_are_let_go_after_their_last_use() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.linear(x)
            b = a * a
            c = b + b
            return c / (c + 1)

    lines = [line.strip() for line in source(planted(Chain()).run()).splitlines()]
    names = {line.split(" = ")[1]: line.split(" = ")[0] for line in lines if " = " in line}
    first = next(name for value, name in names.items() if value.startswith("linear("))
    assert f"del {first}" in lines
    assert "del input" not in lines  # the argument is called x
    assert any(line.startswith("del ") and "x" in line.split(" ", 1)[1].split(", ") for line in lines)
