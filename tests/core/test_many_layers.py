"""Kernels of many layers in one call: they come together or not at all, and go together."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import Blueprint
from esper.core.errors import TargetError
from esper.execution.lifecycle import LifecycleError
from tests.core.seeds import GatedPlatform, blueprint, load, states
from tests.core.training import Picky
from tests.kernel_shelf import KernelShelf


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.out(self.q_proj(x) * self.k_proj(x))
        return result


QS = ["0.q_proj", "1.q_proj", "2.q_proj"]


def wrapped(platform: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return esper.wrap(nn.Sequential(*(Block() for _ in range(3))), seeds_per_layer=2, platform=platform, **options)


@pytest.fixture
def model(shelf: KernelShelf) -> Any:
    return wrapped(shelf.platform)


def loaded(model: Any) -> list[str]:
    """The layers with a kernel in force at seed 0."""
    return [name for name, layer in model.kasmina_layers.items() if layer.kernel_in_force(0) is not None]


# -- which layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("*.q_proj", QS),
        ("1.q_proj", ["1.q_proj"]),
        ("1", ["1.q_proj", "1.k_proj", "1.out"]),
        (["2.q_proj", "0.*"], ["0.q_proj", "0.k_proj", "0.out", "2.q_proj"]),
        (None, [f"{block}.{name}" for block in range(3) for name in ("q_proj", "k_proj", "out")]),
        (Block, [f"{block}.{name}" for block in range(3) for name in ("q_proj", "k_proj", "out")]),
    ],
)
def test_layers_are_named_as_targets_are(model: Any, layers: Any, expected: list[str]) -> None:
    assert list(model.select_layers(layers)) == expected


def test_layers_are_named_by_themselves(model: Any) -> None:
    assert list(model.select_layers(model[1].q_proj)) == ["1.q_proj"]
    assert list(model.select_layers([model[2], model.kasmina_layers["0.out"]])) == [
        "0.out",
        "2.q_proj",
        "2.k_proj",
        "2.out",
    ]


def test_layers_of_the_host_are_known(shelf: KernelShelf) -> None:
    host = nn.Sequential(Block(), Block())
    model = esper.wrap(host, platform=shelf.platform)
    assert list(model.select_layers(host[1].k_proj)) == ["1.k_proj"]


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("*.qproj", "no layer with seeds is selected by '\\*.qproj'; did you mean"),
        (nn.Conv2d, "type Conv2d"),
        (nn.Linear(2, 2), "this Linear"),
        ([], "no layers are named"),
        ([3], "not by 3"),
    ],
)
def test_what_selects_nothing(model: Any, layers: Any, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        model.request_kernels(layers, "kernel")


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_kernels_of_many_layers_come_into_force_at_one_forward(
    shelf: KernelShelf, x: torch.Tensor, compiled: bool
) -> None:
    model = wrapped(shelf.platform)
    run = torch.compile(model, backend="esper", options={"inner": "aot_eager"}) if compiled else model
    run(x)
    kernel, seen = shelf.put(blueprint()).id, set()
    request = model.request_kernels("*.q_proj", kernel, alpha=0.25, trainable=True)
    assert request.layers == tuple(QS)
    while not request.done():
        run(x)
        seen.add(tuple(loaded(model)))
    assert request.result() is True
    version = model.runtime.version
    run(x)
    seen.add(tuple(loaded(model)))
    assert seen <= {(), tuple(QS)}
    assert loaded(model) == QS
    assert model.runtime.version <= version + 1 <= 2
    assert [model.kasmina_layers[name].state.alpha(0) for name in QS] == [0.25] * 3
    assert len(list(model.seed_parameters())) == 3 * 4
    assert request.errors == {}


def test_each_layer_has_its_own_kernel_by_name_or_by_a_function(shelf: KernelShelf, model: Any, x: Any) -> None:
    kernels = {name: shelf.put(blueprint(seed=number)).id for number, name in enumerate(QS)}
    assert model.request_kernels("*.q_proj", kernels).result()
    model(x)
    assert {name: model.kasmina_layers[name].kernel_in_force(0) for name in QS} == kernels
    assert model.request_kernels(QS[:2], lambda site: kernels[QS[2]], seed_idx=1).result()
    model(x)
    assert [model.kasmina_layers[name].kernel_in_force(1) for name in QS] == [kernels[QS[2]]] * 2 + [None]


def test_awaited_they_are_in_force(shelf: KernelShelf, model: Any, x: torch.Tensor) -> None:
    model(x)
    assert asyncio.run(model.load_kernels(["0.q_proj", "1.k_proj"], shelf.put(blueprint()).id))
    assert loaded(model) == ["0.q_proj", "1.k_proj"]


@pytest.mark.slow  # it compiles
@pytest.mark.timeout(600)
def test_blueprints_are_compiled_once_each(shelf: KernelShelf, model: Any, x: torch.Tensor) -> None:
    request = model.request_kernels(
        ["*.q_proj", "0.out"], lambda site: Blueprint.low_rank(site.in_features, site.out_features, rank=2), alpha=0.5
    )
    assert request.result(280)  # from cold caches
    model(x)
    assert loaded(model) == [QS[0], "0.out", *QS[1:]]
    assert len({model.kasmina_layers[name].kernel_in_force(0) for name in QS}) == 1
    assert model.request_kernels("2.k_proj", Blueprint.low_rank(8, 6, rank=2)).result(120)


class _Refusing:
    """A platform whose compiler fails for kernels of eight outputs."""

    def __init__(self, shelf: KernelShelf) -> None:
        self._shelf = shelf
        self.kernel_source, self.oona = shelf.platform.kernel_source, shelf.platform.oona
        self.asked: list[Blueprint] = []

    def request(self, given: Blueprint) -> Any:
        from concurrent.futures import Future

        self.asked.append(given)
        future: Future[Any] = Future()
        if given.out_features == 8:
            future.set_exception(RuntimeError("no such instruction"))
        else:
            future.set_result(self._shelf.put(given))
        return future


def test_a_blueprint_that_cannot_be_compiled_keeps_all_out(shelf: KernelShelf, x: torch.Tensor) -> None:
    platform = _Refusing(shelf)
    model = wrapped(platform)
    request = model.request_kernels(
        "[01].*", lambda site: Blueprint.low_rank(site.in_features, site.out_features, rank=2)
    )
    assert request.result(30) is False
    assert sorted(request.errors) == ["0.out", "1.out"]
    assert "no such instruction" in request.errors["0.out"]
    assert len(platform.asked) == 2
    model(x)
    assert loaded(model) == []
    assert states(model)["0.out"] == ["ERROR_RECOVERY", "DORMANT"]
    assert states(model)["0.q_proj"] == ["DORMANT", "DORMANT"]
    assert model.request_kernels("*.q_proj", Blueprint.low_rank(8, 6, rank=2)).result(30)


def test_if_one_does_not_fit_none_comes(shelf: KernelShelf, model: Any, x: torch.Tensor, caplog: Any) -> None:
    expected = model(x)
    request = model.request_kernels("1", shelf.put(blueprint()).id)
    assert request.result() is False
    assert list(request.errors) == ["1.out"]
    assert "maps 8 to 6 features, but layer '1.out' maps 6 to 8" in request.errors["1.out"]
    assert any("none of the kernels for 3 layers was loaded: '1.out'" in each.message for each in caplog.records)
    assert torch.equal(model(x), expected)
    assert states(model)["1.out"] == ["ERROR_RECOVERY", "DORMANT"]
    assert states(model)["1.q_proj"] == ["DORMANT", "DORMANT"]
    layer = model.kasmina_layers["1.q_proj"]
    assert layer.state.errors(0) == 0
    load(model, "1.q_proj", 0, shelf.put(blueprint()).id)


def test_what_was_in_force_stays_if_its_successors_do_not_come(shelf: KernelShelf, model: Any, x: Any) -> None:
    first = shelf.put(blueprint()).id
    assert model.request_kernels("*.q_proj", first).result()
    expected = model(x)
    second = {**dict.fromkeys(QS[:2], shelf.put(blueprint(seed=2)).id), QS[2]: "no-such-kernel"}
    request = model.request_kernels("*.q_proj", second)
    assert request.result() is False
    assert list(request.errors) == [QS[2]]
    assert torch.equal(model(x), expected)
    assert [states(model)[name][0] for name in QS] == ["ACTIVE"] * 3
    assert model.kasmina_layers[QS[0]].kernel_cache.get_cache_stats()["cache_entries"] >= 1


def test_something_else_that_is_asked_of_one_calls_all_off(shelf: KernelShelf, gated: GatedPlatform, x: Any) -> None:
    model = wrapped(gated)
    kernels = {name: shelf.put(blueprint(seed=number)).id for number, name in enumerate(QS)}
    gate = gated.hold(kernels[QS[1]])
    request = model.request_kernels("*.q_proj", kernels)
    gated.wait_until_held()
    model(x)
    assert [states(model)[name][0] for name in QS] == ["LOADING"] * 3
    assert model.unload_kernel(QS[0], 0)
    gate.set()
    assert request.result(30) is False
    assert list(request.errors) == [QS[0]]
    model(x)
    assert loaded(model) == []
    assert [states(model)[name][0] for name in QS] == ["DORMANT"] * 3
    assert model.request_kernels("*.q_proj", kernels).result(30)
    model(x)
    assert loaded(model) == QS


def test_a_cancelled_task_cancels_all(shelf: KernelShelf, gated: GatedPlatform, x: torch.Tensor) -> None:
    model = wrapped(gated)
    kernel = shelf.put(blueprint()).id
    gate = gated.hold(kernel)

    async def main() -> None:
        task = asyncio.create_task(model.load_kernels("*.q_proj", kernel))
        await asyncio.to_thread(gated.wait_until_held)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert [states(model)[name][0] for name in QS] == ["DORMANT"] * 3
    gate.set()
    model(x)
    assert loaded(model) == []


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"kernel": 3}, TypeError, "layer '0.q_proj' is to have an id, a name or a Blueprint, not 3"),
        ({"kernel": lambda site: None}, TypeError, "layer '0.q_proj' is to have an id"),
        ({"kernel": {"0.q_proj": "a"}}, KeyError, "no kernel is named for layer '1.q_proj'"),
        ({"alpha": 2.0}, ValueError, "alpha"),
        ({"seed_idx": 2}, IndexError, "seed"),
        ({"trainable": "yes"}, TypeError, "trainable must be True or False"),
        ({"isolate": 1}, TypeError, "isolate must be True or False"),
    ],
)
def test_mistakes_raise_at_once_and_change_nothing(
    model: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        model.request_kernels("*.q_proj", **{"kernel": "kernel", **options})
    assert {each for seeds in states(model).values() for each in seeds} == {"DORMANT"}


# -- what is there already ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_kernels_of_many_layers_go_in_one_commit(shelf: KernelShelf, x: torch.Tensor, compiled: bool) -> None:
    model = wrapped(shelf.platform)
    run = torch.compile(model, backend="esper", options={"inner": "aot_eager"}) if compiled else model
    expected = run(x)
    assert model.request_kernels("*.q_proj", shelf.put(blueprint()).id).result()
    run(x)
    assert loaded(model) == QS
    assert model.unload_kernels("?.q_proj") == QS
    seen = set()
    while model.runtime.plan.sites:
        run(x)
        seen.add(len(loaded(model)))
    assert seen <= {0, 3}
    assert torch.equal(run(x), expected)
    assert model.unload_kernels() == []


def test_an_unload_goes_on_for_those_of_which_nothing_else_is_asked(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf.platform)
    run = torch.compile(model, backend="esper", options={"inner": "aot_eager"})
    run(x)
    kernel = shelf.put(blueprint()).id
    assert model.request_kernels("*.q_proj", kernel).result()
    run(x)
    model.unload_kernels("*.q_proj")
    future = model.request_kernel(QS[1], 0, shelf.put(blueprint(seed=5)).id)
    while not future.done() or loaded(model) != [QS[1]]:
        run(x)
    assert model.kasmina_layers[QS[1]].state.alpha(0) == 1.0


def test_a_fossil_among_them_refuses_all(shelf: KernelShelf, model: Any, x: torch.Tensor) -> None:
    assert model.request_kernels("*.q_proj", shelf.put(blueprint()).id).result()
    model(x)
    assert model.fossilize(QS[1], 0)
    before = states(model)
    for call in (
        lambda: model.unload_kernels("*.q_proj"),
        lambda: model.set_alphas("*.q_proj", 0.5),
        lambda: model.request_kernels("*.q_proj", "kernel"),
    ):
        with pytest.raises(LifecycleError, match=r"layer '1\.q_proj' is FOSSILIZED"):
            call()
    assert states(model) == before
    assert loaded(model) == QS
    assert model.kasmina_layers[QS[0]].state.alpha(0) == 1.0


def test_alphas_and_fossils_of_many_layers(shelf: KernelShelf, model: Any, x: torch.Tensor) -> None:
    assert model.request_kernels("*.q_proj", shelf.put(Blueprint.affine(8, 6)).id).result()
    model(x)
    model.set_alphas("*.q_proj", 0.5)
    expected = model(x)
    assert model.fossilize_kernels(None) == QS
    torch.testing.assert_close(model(x), expected)
    assert [states(model)[name][0] for name in QS] == ["FOSSILIZED"] * 3
    assert model.fossilize_kernels("*") == []


def test_many_kernels_are_one_group_of_an_attached_optimizer(shelf: KernelShelf, model: Any, x: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.attach_optimizer(optimizer)
    assert model.request_kernels("*.q_proj", shelf.put(blueprint()).id, trainable=True).result()
    model(x)
    assert [len(group["params"]) for group in optimizer.param_groups] == [18, 12]
    model.unload_kernels("*.q_proj")
    model(x)
    assert [len(group["params"]) for group in optimizer.param_groups] == [18]


def test_an_optimizer_that_refuses_them_keeps_all_out(shelf: KernelShelf, model: Any, x: torch.Tensor) -> None:
    optimizer = Picky(model.parameters(), lr=1e-2)
    model.attach_optimizer(optimizer)
    optimizer.full = True
    expected = model(x)
    request = model.request_kernels("*.q_proj", shelf.put(blueprint()).id, trainable=True)
    assert request.result()  # it was staged
    assert torch.equal(model(x), expected)
    assert loaded(model) == []
    assert [states(model)[name][0] for name in QS] == ["ERROR_RECOVERY"] * 3
    assert list(request.errors) == QS


def test_a_host_with_a_method_of_such_a_name_is_refused(shelf: KernelShelf) -> None:
    class Host(nn.Linear):
        def unload_kernels(self) -> None: ...

    with pytest.raises(TypeError, match="'unload_kernels'"):
        esper.wrap(nn.Sequential(Host(2, 2)).append(nn.Linear(2, 2))[0], platform=shelf.platform)
