"""`esper.compile_blocks`: the repeated blocks of a model, each compiled by itself, share what is compiled for one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import esper
from esper.core.errors import RegionError
from tests.compiler.agreement import agrees, load, outcome, put, unload
from tests.kernel_shelf import KernelShelf

pytestmark = pytest.mark.usefixtures("counted_dynamo")


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(self.norm(x)).relu())
        return y


class Stack(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


class TwoStacks(nn.Module):
    """Stages of blocks: the stages differ, the blocks of a stage do not."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(Block(8), Block(8)), nn.Sequential(Block(4), Block(4), Block(4))])
        self.between = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.stages[1](self.between(self.stages[0](x)))
        return y


class Checkpointed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        y: Tensor = self.head(x)
        return y


class Compiler:
    """An inner compiler that counts what it is given and runs it as it is."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.calls += 1
        return module.forward


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 8)


def traces() -> int:
    return int(counters["stats"]["unique_graphs"])


# -- which blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "found"),
    [
        (Stack(2), ["layers.0", "layers.1"]),
        (nn.Sequential(Block(), nn.Linear(8, 8), Block(), nn.ReLU()), ["0", "2"]),
        (TwoStacks(), ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1", "stages.1.2"]),
        (nn.Sequential(nn.ModuleDict({"body": Stack(2)})), ["0.body.layers.0", "0.body.layers.1"]),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2), ["layers.0", "layers.1"]),
    ],
)
def test_repeated_blocks_are_found(host: nn.Module, found: list[str]) -> None:
    model = esper.wrap(host)
    assert esper.compile_blocks(model) == found
    assert model.explain().compiled == tuple(found)
    assert f"compiled by itself: {', '.join(found)}" in str(model.explain())


@pytest.mark.parametrize(
    ("blocks", "found"),
    [
        ("layers", ["layers.0", "layers.1", "layers.2"]),
        ("layers.[02]", ["layers.0", "layers.2"]),
        ("layers.*", ["layers.0", "layers.1", "layers.2"]),
        (Block, ["layers.0", "layers.1", "layers.2"]),
        (["head", "layers.1"], ["layers.1", "head"]),
    ],
)
def test_blocks_are_named(blocks: Any, found: list[str]) -> None:
    assert esper.compile_blocks(esper.wrap(Stack()), blocks) == found


@pytest.mark.parametrize(
    ("host", "blocks", "told"),
    [
        (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), None, "no blocks with seeds are repeated.*blocks=..."),
        (Stack(), "layer", "nothing in the model is 'layer'; did you mean 'layers'"),
        (Stack(), nn.Conv1d, "nothing in the model is 'Conv1d'"),
        (Stack(), [3], "takes module types, names and patterns, not 3"),
        (Stack(), 3, "takes module types, names and patterns, not 3"),
        (Stack(), nn.Sequential(nn.ReLU()), "takes module types, names and patterns, not a Sequential"),
        (Stack(), [], "name them with blocks=..."),
    ],
)
def test_blocks_that_are_not_there_are_refused_and_nothing_is_compiled(host: nn.Module, blocks: Any, told: str) -> None:
    model = esper.wrap(host)
    with pytest.raises(RegionError, match=told):
        esper.compile_blocks(model, blocks)
    assert model.explain().compiled == ()


def test_a_model_that_is_not_wrapped_or_compiled_as_a_whole_is_refused() -> None:
    with pytest.raises(RegionError, match=r"what esper\.wrap\(\) returned, not a Stack"):
        esper.compile_blocks(Stack())  # type: ignore[arg-type]  # the wrong kind
    model = esper.wrap(Stack())
    with pytest.raises(RegionError, match=r"what torch\.compile made of it"):
        esper.compile_blocks(torch.compile(model, backend="esper"))  # type: ignore[arg-type]  # as above
    model.compile(backend="esper")
    with pytest.raises(RegionError, match="compiled as a whole"):
        esper.compile_blocks(model)


# -- what they compute ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["module", "fx"])
def test_forty_eight_blocks_compile_once_and_again_once_for_a_kernel_in_all(
    mode: Any, shelf: KernelShelf, x: Tensor
) -> None:
    model = esper.wrap(Stack(48), platform=shelf.platform, mode=mode)
    plain, inner = copy.deepcopy(model), Compiler()
    before = outcome(model, model, x)
    esper.compile_blocks(model, options={"inner": inner})
    assert _same(outcome(model, model, x), before)
    assert (traces(), inner.calls) == (1, 1)
    kernel = put(shelf, 8, 6)
    for each in (model, plain):
        loads = [each.request_kernel(f"layers.{i}.up", 0, kernel, alpha=0.5, trainable=True) for i in range(48)]
        assert all(future.result(100) for future in loads)
    assert _same(outcome(model, model, x), outcome(plain, plain, x))
    assert (traces(), inner.calls) == (1, 2)
    assert "48 times 2 sites" in " ".join(str(model.compile_report()).split())
    for i in range(48):
        unload(model, f"layers.{i}.up", 0)
    assert _same(outcome(model, model, x), before)
    assert (traces(), inner.calls) == (1, 2)


def _same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    """Whether outputs and gradients agree. Those of kernels that have left are in neither."""
    return len(one) == len(other) and all(
        a is b is None or (a is not None and b is not None and torch.allclose(a, b, atol=1e-5))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("host", [Stack(4), Checkpointed(4), TwoStacks()], ids=["stack", "checkpointed", "stages"])
@pytest.mark.parametrize("mode", ["module", "fx"])
def test_every_block_has_its_own_plan(mode: Any, host: nn.Module, shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(host, platform=shelf.platform, mode=mode)
    names = esper.compile_blocks(model, options={"inner": "eager"})
    plain = copy.deepcopy(model)
    assert plain.explain().compiled == ()
    width = model.get_submodule(names[-1]).up.in_features  # type: ignore[union-attr, operator]  # a Block's
    plans = [
        (f"{names[0]}.up", 0, put(shelf, 8, 6)),
        (f"{names[1]}.up", 1, put(shelf, 8, 6, rank=2, seed=2)),
        (f"{names[1]}.up", 3, put(shelf, 8, 6, seed=3)),
        (f"{names[-1]}.down", 0, put(shelf, 6, width)),
    ]
    for name, seed, kernel in plans:
        load(model, name, seed, kernel)
        load(plain, name, seed, kernel)
        assert _same(outcome(model, model, x), outcome(plain, plain, x))
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), plain.eval()(x), atol=1e-6)


def test_a_block_that_is_used_twice(shelf: KernelShelf, x: Tensor) -> None:
    shared = Block()
    model = esper.wrap(nn.Sequential(Block(), shared, Block(), shared), platform=shelf.platform)
    esper.compile_blocks(model, options={"inner": "aot_eager"})
    plain = copy.deepcopy(model)
    for each in (model, plain):
        load(each, "1.up", 0, put(shelf, 8, 6))
    assert _same(outcome(model, model, x), outcome(plain, plain, x))
    assert traces() == 1


def test_a_model_in_fx_mode_that_has_run_before(shelf: KernelShelf, x: Tensor) -> None:
    model, inner = esper.wrap(Stack(), platform=shelf.platform, mode="fx"), Compiler()
    before = outcome(model, model, x)
    esper.compile_blocks(model, options={"inner": inner})
    assert _same(outcome(model, model, x), before)
    assert inner.calls == 1


def test_all_blocks_change_between_the_same_two_forwards(shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(Stack(), platform=shelf.platform, commit="manual")
    esper.compile_blocks(model, options={"inner": "eager"})
    before, kernel = model(x), put(shelf, 8, 6)
    loads = [model.request_kernel(f"layers.{i}.up", 0, kernel) for i in range(3)]
    assert all(future.result(100) for future in loads)
    assert torch.equal(model(x), before)
    model.commit()
    assert [model.kasmina_layers[f"layers.{i}.up"].state.lifecycle(0).name for i in range(3)] == ["ACTIVE"] * 3
    assert not torch.allclose(model(x), before)


@pytest.mark.parametrize("mode", ["module", "fx"])
def test_a_commit_by_another_thread_between_two_blocks_waits_for_the_next_forward(
    mode: Any, shelf: KernelShelf, x: Tensor
) -> None:
    class Interrupted(Stack):
        between: Callable[[], None] = staticmethod(lambda: None)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](self.first(x))
            Interrupted.between()
            y: Tensor = self.head(self.layers[2](self.layers[1](x)))
            return y

    model = esper.wrap(Interrupted(), platform=shelf.platform, mode=mode, commit="manual")
    esper.compile_blocks(model, options={"inner": "eager"})
    before, kernel = model(x), put(shelf, 8, 6)
    loads = [model.request_kernel(f"layers.{i}.up", 0, kernel) for i in range(3)]
    assert all(future.result(100) for future in loads)

    def commit() -> None:
        thread = threading.Thread(target=model.commit)
        thread.start()
        thread.join()

    Interrupted.between = staticmethod(commit)
    if mode == "fx":
        model.retrace()
    assert torch.equal(model(x), before)
    Interrupted.between = staticmethod(lambda: None)
    assert not torch.allclose(model(x), before)


def test_sixteen_structures_are_no_recompile_limit(shelf: KernelShelf, x: Tensor) -> None:
    class Own(Block):
        """A block whose forward reads its number, on which Dynamo guards."""

        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (self.number + 1)

    model = esper.wrap(nn.Sequential(*(Own(number) for number in range(16))), platform=shelf.platform)
    esper.compile_blocks(model, fullgraph=True, options={"inner": "eager"})
    agrees(model, model, x)
    assert traces() >= 2
