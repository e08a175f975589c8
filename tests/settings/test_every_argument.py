"""Law 14 for arguments and options: each changes what happens, and none is only stored."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import esper
from esper import EsperConfig, distributed, growth
from esper.compiler.options import BackendOptions
from esper.integrations import lightning, peft, transformers
from tests.core.seeds import RecordingSink, blueprint, load
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

_ROOT = Path(esper.__file__).parents[1]

# -- esper.wrap --------------------------------------------------------------------------------------------------------


class Elsewhere:
    """A platform without kernels."""

    def __init__(self) -> None:
        self.kernel_source: Any = None
        self.oona = RecordingSink()


def seen(*, model: nn.Module | None = None, **arguments: Any) -> dict[str, Any]:
    """What can be told of a wrapped model from outside."""
    platform = arguments.pop("platform", None) or Elsewhere()
    wrapped = esper.wrap(model or mlp(8, 6, 4), platform=platform, **arguments)
    layers = wrapped.kasmina_layers
    first = next(iter(layers.values()))
    wrapped(torch.zeros(1, 8))
    wrapped.unload_kernel(next(iter(layers)), 0)
    wrapped.request_kernel(next(iter(layers)), 0, "nothing").result(30)
    return {
        "layers": list(layers),
        "seeds": first.num_seeds,
        "cache": first.kernel_cache.max_cache_size_mb,
        "counted": first.get_layer_stats()["execution_count"],
        "regions": wrapped.explain().regions,
        "commit": wrapped.runtime.commit_mode,
        "reason": first.seed_errors[0],
        "ranks": wrapped.ranks and wrapped.ranks.size,
    }


def group_of_one() -> dist.ProcessGroup:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


@pytest.fixture(autouse=True)
def _no_group_is_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


WRAP: dict[str, Callable[[KernelShelf], Any]] = {
    "model": lambda shelf: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)),
    "target_layers": lambda shelf: ["0"],
    "seeds_per_layer": lambda shelf: 2,
    "cache_size_mb": lambda shelf: 7,
    "telemetry_enabled": lambda shelf: False,
    "mode": lambda shelf: "fx" if inspect.signature(esper.wrap).parameters["mode"].default == "module" else "module",
    "commit": lambda shelf: "manual",
    "platform": lambda shelf: shelf.platform,
    "config": lambda shelf: EsperConfig.model_validate({"execution": {"cache_size_mb": 5}}),
    "process_group": lambda shelf: group_of_one(),
}


@pytest.mark.parametrize("argument", inspect.signature(esper.wrap).parameters)
def test_each_argument_of_wrap_changes_the_model(argument: str, shelf: KernelShelf) -> None:
    assert seen(**{argument: WRAP[argument](shelf)}) != seen()


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["alpha", "trainable", "isolate"])
def test_each_option_of_a_load_changes_what_is_loaded(option: str, shelf: KernelShelf) -> None:
    def grown(**options: Any) -> tuple[list[float], int, list[float]]:
        torch.manual_seed(0)
        model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
        load(model, "0", 0, shelf.put(blueprint()).id, **options)
        x = torch.ones(1, 8, requires_grad=True)
        y = model(x)
        y.sum().backward()
        assert x.grad is not None
        return y.flatten().tolist(), len(list(model.seed_parameters())), x.grad.flatten().tolist()

    parameters = set(inspect.signature(esper.MorphableModel.load_kernel).parameters)
    assert parameters - {"self", "layer_name", "seed_idx", "kernel_artifact_id"} == {"alpha", "trainable", "isolate"}
    assert grown(**{option: 0.25 if option == "alpha" else True}) != grown()


# -- options of the backend --------------------------------------------------------------------------------------------

OPTIONS = {  # shown by these tests
    "cold_start": "compiler/test_cold_start.py::test_a_kernel_loaded_during_a_cold_start",
    "fallback": (
        "compiler/test_process_faults.py"
        "::test_without_a_compiler_a_load_says_what_to_do_and_the_fallback_runs_uncompiled"
    ),
    "variant_cache_mb": (
        "compiler/test_active_plans.py::test_variants_that_were_used_least_recently_leave_when_the_budget_is_spent"
    ),
}
ONLY_READ = {"batch_seeds": "compiler/variant_job.py"}  # its pass has tests, the way from the option to it has none yet


def test_each_option_of_the_backend_is_shown_at_work() -> None:
    here = {"inner", "inner_name"}
    assert {each.name for each in dataclasses.fields(BackendOptions)} == OPTIONS.keys() | ONLY_READ.keys() | here
    for option, test in OPTIONS.items():
        file, _, name = test.partition("::")
        tree = ast.parse((_ROOT / "tests" / file).read_text(encoding="utf-8"))
        assert name in {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}, option


def test_the_inner_compiler_compiles_and_the_report_names_it(fresh_dynamo: None) -> None:
    compiled: list[torch.fx.GraphModule] = []

    def inner(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    model = esper.wrap(mlp(8, 6, 4))
    torch.compile(model, backend="esper", options={"inner": inner})(torch.zeros(1, 8))
    assert compiled
    assert "inner" in model.compile_report().graphs[0].inner


# -- every argument of what is public ----------------------------------------------------------------------------------

UNUSED = {  # parts of a protocol that this class has no use for
    "EsperConfig.settings_customise_sources",
    "KasminaLayer.ready",
    "KasminaLayer.prepare",
    "EsperCallback.on_train_batch_end",
    "EsperCallback.on_train_begin",
    "EsperCallback.on_log",
}


def public() -> Iterator[tuple[str, Any]]:
    for module in (esper, distributed, growth, lightning, peft, transformers):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value):
                yield name, value
            elif not issubclass(value, (enum.Enum, Exception)):
                parts = [kind for kind in value.__mro__ if kind.__module__.startswith("esper.")]  # its own, and bases
                for each in dict.fromkeys(each for kind in parts for each in vars(kind)):
                    if (each == "__init__" or not each.startswith("_")) and callable(getattr(value, each)):
                        yield f"{name}.{each}", getattr(value, each)


@pytest.mark.parametrize(("name", "function"), [pytest.param(*each, id=each[0]) for each in public()])
def test_no_argument_is_ignored(name: str, function: Any) -> None:
    if name in UNUSED or getattr(function, "__qualname__", "") == "__create_fn__.<locals>.__init__":
        return
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except OSError:  # made by `dataclass`: a field for each argument
        return
    (definition,) = (each for each in tree.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)))
    used = {
        each.id
        for statement in definition.body
        for each in ast.walk(statement)
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)
    }
    wanted = set(inspect.signature(function).parameters) - {"self", "cls"}
    assert wanted <= used or "locals" in used, "an argument is ignored"
