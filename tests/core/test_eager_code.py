"""Generated code: the host's values bit for bit, its signature, its parameters wherever they go, tracebacks."""

from __future__ import annotations

import math
import random
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


def program(seed: int, statements: int = 25) -> str:
    """The text of a random forward on two `[4, 4]` tensors: pure, in-place and aliasing operations, module calls."""
    choose = random.Random(seed)
    names = ["x", "y"]
    lines = ["def forward(self, x, y):"]
    for number in range(statements):
        a, b = choose.choice(names), choose.choice(names)
        new = f"v{number}"
        lines.append(
            "    "
            + choose.choice(
                [
                    f"{new} = {a} + {b} * 0.5",
                    f"{new} = ({a} - {b}).tanh() * self.scale",
                    f"{new} = self.first({a})",
                    f"{new} = self.second(functional.relu({a}))",
                    f"{new} = {a}.transpose(0, 1)",
                    f"{new} = {a}[:, [0, 1, 2, 3]]",
                    f"{new} = torch.where({a} > {b}, {a}, self.shift)",
                    f"{new} = torch.stack([{a}, {b}]).mean(0)",
                    f"{new} = {a}",
                    f"{new}, _ = torch.cat([{a}, {b}]).chunk(2)",
                    f"{new} = {a}; {new} += {b} * 0.1",
                    f"{a}.mul_(0.9); {new} = {b}",
                    f"{a}[0] = {b}[1] * 0.5; {new} = {a}",
                    f"{a}[1:, ::2] -= 0.1; {new} = {a}.clone()",
                    f"self.shift.add_({a}.detach()[0], alpha=0.01); {new} = {a} + self.shift",
                    f"{new} = {a}.reshape(2, 8).view({a}.shape)",
                    f"{new} = self.pool({{'a': {a}}}['a'], ({b},)[0])",
                ]
            )
        )
        names.append(new)
    lines.append(f"    return {{'all': ({', '.join(names[-6:])}), 'x': x, 'y': [y]}}")
    return "\n".join(lines)


class Pool(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a + b) / 2


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed: int) -> None:
    text = program(seed)
    namespace: dict[str, Any] = {"torch": torch, "functional": functional}
    exec(text, namespace)

    class Program(nn.Module):
        forward = namespace["forward"]

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Sigmoid())
            self.pool = Pool()
            self.scale = nn.Parameter(torch.rand(4))
            self.register_buffer("shift", torch.zeros(4))

    host = Program()
    case = planted(host)
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    results = []
    for run in (host, case.run()):
        torch.manual_seed(3)
        with torch.no_grad():
            host.shift.zero_()
            results.append((run(x.clone(), y.clone()), host.shift.clone()))
    expected, actual = results
    flat = torch.utils._pytree.tree_leaves
    assert all(torch.equal(a, b) for a, b in zip(flat(actual), flat(expected), strict=True)), text
    aliases = [[id(a) == id(b) for a in flat(result[0]) for b in flat(result[0])] for result in results]
    assert aliases[0] == aliases[1], text


class Cell(nn.Module):
    """Replaces its own state at each call, and is no region: its forward sets attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("state", torch.zeros(4))
        self.note = torch.zeros(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = self.state + 1
        self.note = self.note + 2
        return self.fc(x) + self.state


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()
        self.out = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        before, note = self.cell.state, self.cell.note
        y = self.out(self.cell(x) + before)
        return y + self.cell.state + note + self.cell.note


def test_attributes_are_read_when_the_host_reads_them() -> None:
    host, other = Recurrent(), Recurrent()
    other.load_state_dict(host.state_dict())
    run = planted(host).run()
    assert "cell = module" in source(run)
    x = torch.randn(3, 4)
    for _ in range(3):
        assert torch.equal(run(x), other(x))
