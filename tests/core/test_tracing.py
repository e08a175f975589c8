"""Hazards of tracing: each is traced exactly, checked when the code runs, or refused with a reason."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
import random
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from esper.core.tracing import Traced, Untraceable, trace_region
from tests.core.planting import agrees, dormant, planted

Forward = Callable[..., Any]
HISTORY: list[Any] = []
COUNTS = {"calls": 0}
FACTOR = 2.0
SCALE = torch.tensor(3.0)


class Model(nn.Module):
    """A layer, some attributes, and a forward that a test supplies."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.weight = nn.Parameter(torch.randn(4))
        self.absent: nn.Parameter | None
        self.register_parameter("absent", None)
        self.register_buffer("steps", torch.zeros(4))
        self.plain = torch.randn(4)
        self.tensors = [torch.randn(4)]
        self.factor = 0.5
        self.history: list[Any] = []
        self.settings: dict[str, Any] = {"size": 3}


def model(forward: Forward) -> Model:
    """A model with that forward, taken from its class as usual."""
    return type("Case", (Model,), {"forward": forward})()


def outcome(host: nn.Module) -> Traced | Untraceable:
    case = planted(host)
    return trace_region(case.root, set(case.sites.values()))


def refusal(forward: Forward) -> str:
    """Why `forward` is not traced; also asserts that the model still computes what its host computes."""
    host = model(forward)
    result = outcome(host)
    assert isinstance(result, Untraceable), result
    return result.reason


def traced(forward: Forward, *args: Any, **kwargs: Any) -> None:
    """`forward` is traced as a whole, and the code does what the host does."""
    host = model(forward)
    result = outcome(host)
    assert isinstance(result, Traced), result
    agrees(host, planted(host).run(), *(args or (torch.randn(3, 4, requires_grad=True),)), **kwargs)


# -- arguments and results ---------------------------------------------------------------------------------------------


def test_optional_argument_is_at_its_default_or_checked() -> None:
    def forward(self: Model, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        x = self.layer(x)
        if mask is not None:
            x = x * mask
        return x

    x, mask = torch.randn(3, 4), torch.rand(3, 4)
    traced(forward, x)
    traced(forward, x, mask)
    traced(forward, x, mask=mask)


def test_optional_arguments_that_are_given_are_traced_at_the_next_refresh() -> None:
    def forward(self: Model, x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0) -> Any:
        x = self.layer(x) * scale
        if mask is not None:
            x = x + mask
        return self.inner(x)

    host = model(lambda self, x, mask=None: self.block(self.layer(x), mask))
    host.block = model(forward)
    case = planted(host)
    regions = case.regions()
    x, mask = torch.randn(3, 4), torch.randn(4)
    run = regions.build(dormant)
    agrees(host, run, x, mask)
    assert regions.refresh() is True
    assert [variant.given for variant in regions.regions.variants[case.root]] == [{"mask"}]
    run = regions.build(dormant)
    assert "mask is None" in run.__esper_source__
    plain, forwards = type(host).forward, []
    type(host).forward = lambda self, *args, **kwargs: (forwards.append(self), plain(self, *args, **kwargs))[1]
    agrees(host, run, x, mask)
    agrees(host, run, x, mask=mask)
    agrees(host, run, x)
    assert forwards == [host] * 3  # the shadow's was not run


def test_required_argument_given_as_none_runs_the_module() -> None:
    def forward(self: Model, x: torch.Tensor, mask: torch.Tensor | None) -> Any:
        if mask is None:
            return self.layer(x)
        return self.layer(x) * mask

    traced(forward, torch.randn(3, 4), None)
    traced(forward, torch.randn(3, 4), torch.rand(3, 4))


def test_rebound_argument_that_is_tested_for_none() -> None:
    def forward(self: Model, x: torch.Tensor, mask: torch.Tensor | None) -> Any:
        if mask is None:
            mask = torch.ones(4)
        return self.layer(x) * mask

    traced(forward, torch.randn(3, 4), None)
    traced(forward, torch.randn(3, 4), torch.rand(3, 4))


def test_result_of_a_call_that_is_tested_for_none_is_refused() -> None:
    class Maybe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: torch.Tensor) -> Any:
            y, weights = self.attention(x, x, x, need_weights=False)
            if weights is not None:
                y = y + weights.sum()
            return y

    host = nn.Sequential(Maybe(), nn.Linear(4, 4))
    case = planted(host)
    regions = case.regions()
    agrees(host, regions.build(dormant), torch.randn(3, 2, 4))
    assert not isinstance(trace_region(case.root[0], set(case.sites.values())), Traced)


def test_keyword_only_arguments_and_variadics() -> None:
    def forward(self: Model, x: torch.Tensor, /, *rest: Any, scale: float = 2.0, **options: Any) -> Any:
        y = self.layer(x) * scale
        for each in rest:
            y = y + each
        return y + len(options)

    x = torch.randn(3, 4)
    traced(forward, x)
    traced(forward, x, torch.randn(3, 4))
    traced(forward, x, scale=3.0)
    traced(forward, x, other=1)


def test_required_keyword_only_argument() -> None:
    def forward(self: Model, x: torch.Tensor, *, scale: float, shift: int = 0) -> Any:
        return self.layer(x) * scale + shift

    traced(forward, torch.randn(3, 4), scale=2.0)
    traced(forward, torch.randn(3, 4), scale=torch.tensor(2.0), shift=3)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Output:
    hidden: Any
    extra: Any = None


@dataclasses.dataclass
class Checked:
    hidden: Any

    def __post_init__(self) -> None:
        COUNTS["calls"] += 1


def test_structured_results() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        y = self.layer(x)
        ordered = OrderedDict([("a", y), ("b", 2)])
        return (y, [y + 1, None], {"z": y, 3: (y,)}, Pair(y, 1), ordered, (), slice(None), "text", 1.5, float("inf"))

    traced(forward)


def test_dataclass_results() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        return Output(self.layer(x), 1)

    host = model(forward)
    x = torch.randn(3, 4)
    result = planted(host).run()(x)
    assert type(result) is Output
    assert torch.equal(result.hidden, host(x).hidden)


def test_dataclass_with_side_effects_is_refused() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        return Checked(self.layer(x))

    assert "Checked" in refusal(forward)


def test_dictionary_with_changing_content_is_read_at_each_call() -> None:
    def forward(self: Model, batch: dict[str, torch.Tensor]) -> Any:
        return self.layer(batch["x"]) + batch["y"]

    traced(forward, {"x": torch.randn(3, 4), "y": torch.randn(4)})


# -- decisions ---------------------------------------------------------------------------------------------------------


def test_type_check_of_an_argument_is_checked_when_the_code_runs() -> None:
    def forward(self: Model, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return self.layer(x)
        return self.layer(x[0]) + x[1]

    traced(forward, torch.randn(3, 4))
    traced(forward, (torch.randn(3, 4), torch.randn(4)))


def test_type_check_of_a_tensor_that_was_computed() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        y = self.layer(x) + 1
        assert isinstance(y, torch.Tensor)
        return y if not isinstance(y, (tuple, list)) else y[0]

    traced(forward)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda self, x: self.layer(x) if x.sum() > 0 else x, "control flow depends on a value"),
        (lambda self, x: self.layer(x) if x.shape[0] > 2 else x, "control flow depends on a value"),
        (lambda self, x: self.layer(x) if x.requires_grad else x, "control flow depends on a value"),
        (lambda self, x: self.layer(x) if hasattr(x, "values") else x, "has the attribute 'values'"),
        (lambda self, x: self.layer(x) if type(x) is torch.Tensor else x, "type"),
        (lambda self, x, y: self.layer(x) if x is y else y, "identities"),
        (lambda self, x: self.layer(x) if x.grad is None else x, "None"),
        (lambda self, x: self.layer(x) * len(x), "length"),
        (lambda self, x: self.layer(x) * int(x.sum()), "int"),
        (lambda self, x: self.layer(x) * float(x.sum()), "float"),
        (lambda self, x: self.layer(x) * [1, 2, 3][x.size(0) - 1], "int"),
        (lambda self, x: [self.layer(row) for row in x], "iterates"),
        (lambda self, x: self.layer(x) * sum(range(x.size(0))), "int"),
        (lambda self, x: self.layer(x) * len(f"{x}"), "text"),
        (lambda self, x: self.layer(x) * len(str(x)), "text"),
        (lambda self, x: self.layer(x) * {x: 1}.get(x, 2), "key"),
        (lambda self, x: self.layer(x) * (1 if x in (1, 2) else 2), "control flow"),
        (lambda self, x: self.layer(x) * np.asarray(x).sum(), "."),
        (lambda self, x: self.layer(x) * id(x), "id"),
        (lambda self, x: self.layer(x) * (not x.sum()), "control flow"),
    ],
)
def test_decisions_that_depend_on_data_are_refused(forward: Forward, reason: str) -> None:
    named = functools.partial(forward)
    del named
    forward.__name__ = "forward"
    import re

    assert re.search(reason, refusal(forward))


def test_assertion_on_shapes_is_refused() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        assert x.shape[-1] == 4
        return self.layer(x)

    assert "control flow" in refusal(forward)


def test_caught_exceptions_are_refused() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        try:
            return self.layer(x) if x.sum() > 0 else x
        except Exception:  # noqa: BLE001  # what the test is about
            return x

    assert "try" in refusal(forward)


def test_unpacking_checks_the_length() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        batch, _ = x.shape
        return self.layer(x).view(batch, 2, 2)

    traced(forward)
    run = planted(model(forward)).run()
    with pytest.raises(ValueError, match="too many values"):
        run(torch.randn(2, 3, 4))


# -- constants ---------------------------------------------------------------------------------------------------------


def test_tensors_made_inside_are_made_at_every_call() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        return self.layer(x) + torch.arange(4) + torch.zeros(4) + torch.randn(4) + torch.tensor([1.0, 2.0, 3.0, 4.0])

    traced(forward)
    host = model(forward)
    run = planted(host).run()
    x = torch.randn(3, 4)
    assert not torch.equal(run(x), run(x))


def test_tensors_made_of_nothing_but_constants_are_refused_otherwise() -> None:
    table = torch.randn(4)
    for forward in (
        lambda self, x: self.layer(x) + SCALE,
        lambda self, x: self.layer(x) + table,
        lambda self, x: self.layer(x) + self.tensors[0],
        lambda self, x: self.layer(x) * SCALE.item(),
        lambda self, x: self.layer(x) + torch.FloatTensor([1, 2, 3, 4]),
        lambda self, x: self.layer(x) + torch.from_numpy(np.ones(4, dtype=np.float32)),
        lambda self, x: self.layer(x).to(list(self.parameters())[-1].dtype),
    ):
        assert "tensor" in refusal(forward)


def test_random_decisions_are_refused_and_leave_the_generators_alone() -> None:
    def python(self: Model, x: torch.Tensor) -> Any:
        return self.layer(x) if random.random() < 2 else x

    def numpy(self: Model, x: torch.Tensor) -> Any:
        return self.layer(x) if np.random.rand() < 2 else x

    def pytorch(self: Model, x: torch.Tensor) -> Any:
        return self.layer(x) if torch.rand([]) < 2 else x

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    hosts = [model(forward) for forward in (python, numpy, pytorch)]
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    for host in hosts:
        assert isinstance(outcome(host), Untraceable)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_generators_and_iterators_of_its_own_are_refused_and_left_alone() -> None:
    hosts = [
        (model(lambda self, x: self.layer(x) * self.source.random()), random.Random(1), lambda source: source.random()),
        (
            model(lambda self, x: self.layer(x) * self.source.random()),
            np.random.default_rng(1),
            lambda source: source.random(),
        ),
        (
            model(lambda self, x: self.layer(x) * self.source.rand()),
            np.random.RandomState(1),
            lambda source: source.rand(),
        ),
        (model(lambda self, x: self.layer(x) * next(self.source)), itertools.count(3), next),
    ]
    for host, source, draw in hosts:
        fresh = copy.deepcopy(source)
        host.source = source
        assert isinstance(outcome(host), Untraceable), source
        assert draw(source) == draw(fresh)


def test_random_tensors_of_values_are_drawn_at_every_call() -> None:
    traced(lambda self, x: self.layer(x) + torch.rand_like(x) + torch.bernoulli(torch.full((4,), 0.5)))


# -- modes -------------------------------------------------------------------------------------------------------------


def _with(context: Callable[[], Any]) -> Forward:
    def forward(self: Model, x: torch.Tensor) -> Any:
        with context():
            return self.layer(x)

    return forward


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        lambda: torch.autograd.profiler.record_function("part"),
        contextlib.nullcontext,
    ],
)
def test_settings_of_its_own_are_refused(context: Callable[[], Any]) -> None:
    assert refusal(_with(context))
    with torch.no_grad():
        assert refusal(_with(context))


@pytest.mark.parametrize("decorator", [torch.no_grad(), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)])
def test_decorated_methods_are_refused(decorator: Any) -> None:
    @decorator
    def helper(self: Model, x: torch.Tensor) -> Any:
        return self.layer(x)

    for ambient in (torch.enable_grad, torch.no_grad):
        with ambient():
            assert refusal(helper)
            assert refusal(lambda self, x: helper(self, x) + 1)


def test_set_grad_enabled_is_refused() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        torch.set_grad_enabled(torch.is_grad_enabled())
        return self.layer(x)

    assert "grad_enabled" in refusal(forward)


@pytest.mark.parametrize(
    "question",
    [
        torch.is_grad_enabled,
        torch.is_inference_mode_enabled,
        lambda: torch.is_autocast_enabled("cpu"),
        torch.compiler.is_compiling,
        torch.jit.is_tracing,
        torch.are_deterministic_algorithms_enabled,
        lambda: torch.backends.mha.get_fastpath_enabled(),
        torch.get_default_dtype,
        torch.cuda.is_available,
    ],
)
def test_questions_about_how_it_runs_are_refused(question: Callable[[], Any]) -> None:
    assert refusal(lambda self, x: self.layer(x) * 2 if question() else self.layer(x))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 7


def test_custom_autograd_functions_are_refused() -> None:
    assert "autograd" in refusal(lambda self, x: Doubled.apply(self.layer(x)))


def test_activation_checkpoints_are_refused() -> None:
    assert "checkpoint" in refusal(lambda self, x: checkpoint(self.layer, x, use_reentrant=False))


def test_compiled_functions_are_refused() -> None:
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    assert refusal(lambda self, x: compiled(self.layer(x)))


def test_calls_through_vmap_are_refused() -> None:
    assert refusal(lambda self, x: torch.vmap(self.layer)(x))


# -- effects -----------------------------------------------------------------------------------------------------------


def test_attributes_set_in_forward_are_refused_and_not_set() -> None:
    def plain(self: Model, x: torch.Tensor) -> Any:
        self.last = x
        return self.layer(x)

    def through_setattr(self: Model, x: torch.Tensor) -> Any:
        setattr(self, "la" + "st", x)
        return self.layer(x)

    def buffer(self: Model, x: torch.Tensor) -> Any:
        self.register_buffer("seen", x)
        return self.layer(x)

    def private(self: Model, x: torch.Tensor) -> Any:
        self._buffers["seen"] = x
        return self.layer(x)

    def dictionary(self: Model, x: torch.Tensor) -> Any:
        self.__dict__["last"] = x
        return self.layer(x)

    for forward in (plain, through_setattr, buffer, private, dictionary):
        host = model(forward)
        case = planted(host)
        result = trace_region(case.root, set(case.sites.values()))
        assert isinstance(result, Untraceable), forward
        for each in (host, case.root):
            assert "last" not in vars(each)
            assert "seen" not in each._buffers


def test_containers_changed_in_forward_are_refused_and_restored() -> None:
    closed_over: list[Any] = []

    def own(self: Model, x: torch.Tensor) -> Any:
        self.history.append(1)
        return self.layer(x)

    def nested(self: Model, x: torch.Tensor) -> Any:
        self.settings["seen"] = 1
        return self.layer(x)

    def module_level(self: Model, x: torch.Tensor) -> Any:
        HISTORY.append("call")
        COUNTS["calls"] += 1
        return self.layer(x)

    def closure(self: Model, x: torch.Tensor) -> Any:
        closed_over.append(x.shape)
        return self.layer(x)

    def counter(self: Model, x: torch.Tensor) -> Any:
        self.counter["calls"] += 1
        self.counter.update(other=2)
        return self.layer(x)

    for forward in (own, nested, module_level, closure, counter):
        host = model(forward)
        host.counter = collections.Counter()
        assert isinstance(outcome(host), Untraceable), forward
        assert host.history == []
        assert host.settings == {"size": 3}
        assert host.counter == {}
    assert HISTORY == []
    assert COUNTS == {"calls": 0}
    assert closed_over == []


def test_a_value_kept_in_an_object_is_noticed() -> None:
    class Keeper:
        def __init__(self) -> None:
            self.box: list[Any] = [None]

        def keep(self, value: Any) -> None:
            self.box[0] = value

    keeper = Keeper()
    assert refusal(lambda self, x: (keeper.keep(x), self.layer(x))[1])


def test_counters_are_refused() -> None:
    class Counter:
        calls = 0

        def tick(self) -> None:
            self.calls += 1

    counter = Counter()
    assert "calls" in refusal(lambda self, x: (counter.tick(), self.layer(x))[1])
    assert counter.calls == 0


@pytest.mark.parametrize(
    "effect",
    [
        lambda: print(end=""),
        lambda: logging.getLogger("esper.test").debug("forward"),
        lambda: warnings.warn("forward", stacklevel=1),
        lambda: sys.stdout.write(""),
        time.perf_counter,
        time.sleep,
        lambda: open("/dev/null").close(),
        threading.get_ident,
        lambda: __import__("os").environ.get("HOME"),
    ],
)
def test_side_effects_are_refused(effect: Callable[..., Any]) -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        effect()
        return self.layer(x)

    assert refusal(forward)


def test_in_place_operations_keep_their_meaning() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        y = self.layer(x)
        z = y
        z += 1
        y[:, 0] = 5
        x.add_(1)
        functional.relu(z, inplace=True)
        n = x.size(0)
        m = n
        n += 1
        return y, z, x, n, m

    with torch.no_grad():
        traced(forward, torch.randn(3, 4))


def test_buffers_are_updated_in_place_at_every_call() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        y = self.layer(x)
        self.steps.add_(1)
        self.steps.mul_(0.5)
        return y + self.steps

    host = model(forward)
    case = planted(host)
    assert isinstance(trace_region(case.root, set(case.sites.values())), Traced)
    run = case.run()
    with torch.no_grad():
        run(torch.randn(3, 4))
        run(torch.randn(3, 4))
    assert host.steps.tolist() == [0.75] * 4


def test_batch_norm_statistics_follow_the_training_flag() -> None:
    host = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    reference = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    reference.load_state_dict(host.state_dict())
    case = planted(host)
    run = case.run()
    for flag in (True, False, True):
        reference.train(flag)
        case.root.train(flag)
        x = torch.randn(8, 4)
        assert torch.equal(run(x), reference(x))
    assert torch.equal(host[1].running_mean, reference[1].running_mean)


# -- attributes of modules ---------------------------------------------------------------------------------------------


def test_parameters_are_read_wherever_they_live() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        y = functional.linear(x, self.layer.weight) * self.weight + self.plain
        if self.absent is not None:
            y = y + self.absent
        return self.inner(y) * self.factor * self.settings["size"] * FACTOR + self._parameters["weight"]

    traced(forward)
    host = model(forward)
    case = planted(host)
    run = case.run()
    host.weight = nn.Parameter(torch.randn(4))
    case.root.plain = host.plain = torch.randn(4)
    agrees(host, run, torch.randn(3, 4))


def test_branch_on_training_is_checked_and_traced_for_each() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        if self.training:
            return self.layer(x)
        return self.inner(x)

    host = model(forward)
    case = planted(host)
    regions = case.regions()
    run = regions.build(dormant)
    x = torch.randn(3, 4)
    for changed, flag in ((False, True), (True, False), (True, True)):
        host.train(flag)
        case.root.train(flag)
        agrees(host, run, x)  # the check sends the other state to the modules
        assert regions.refresh() is changed
        run = regions.build(dormant)
        assert ("tanh" in run.__esper_source__) is not flag
        agrees(host, run, x)


def test_a_changed_attribute_is_noticed_once_and_traced_again() -> None:
    host = model(lambda self, x: self.layer(x) * self.factor)
    case = planted(host)
    regions = case.regions()
    x = torch.randn(3, 4)
    assert regions.refresh() is False
    case.root.factor = host.factor = 3.0
    with pytest.warns(UserWarning, match=r"factor.*said once"):
        assert regions.refresh() is True
    agrees(host, regions.build(dormant), x)
    case.root.factor = host.factor = 4.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert regions.refresh() is True
    agrees(host, regions.build(dormant), x)


def test_changed_containers_settings_globals_and_layers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    host = model(lambda self, x: self.inner(self.layer(x)) * self.settings["size"] * FACTOR)
    host.norm = nn.LayerNorm(4)
    type(host).forward = lambda self, x: self.norm(self.layer(x)) * self.settings["size"] * FACTOR
    case = planted(host)
    regions = case.regions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host.settings["size"] = 5
        assert regions.refresh() is True
        case.root.norm.eps = host.norm.eps = 0.1
        assert regions.refresh() is True
        monkeypatch.setitem(globals(), "FACTOR", 9.0)
        assert regions.refresh() is True
        agrees(host, regions.build(dormant), torch.randn(3, 4))
        type(host).forward = lambda self, x: self.layer(x)
        assert regions.refresh() is True
        agrees(host, regions.build(dormant), torch.randn(3, 4))


def test_unset_parameter_that_is_set_later_is_noticed() -> None:
    host = model(lambda self, x: self.layer(x) if self.absent is None else self.layer(x) + self.absent)
    case = planted(host)
    regions = case.regions()
    case.root.absent = nn.Parameter(torch.ones(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert regions.refresh() is True
    agrees(host, regions.build(dormant), torch.randn(3, 4))


# -- modules -----------------------------------------------------------------------------------------------------------


def test_hooks_on_containers_run_and_registering_one_is_noticed_at_once() -> None:
    host = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    calls: list[str] = []
    host[0].register_forward_hook(lambda module, args, output: calls.append("host") or output * 2)
    case = planted(host)
    regions = case.regions()
    agrees(host, regions.build(dormant), torch.randn(3, 4))
    assert calls == ["host", "host"]
    changes: list[int] = []
    regions.on_change = lambda: changes.append(1)
    seen: list[nn.Module] = []
    handle = case.root[1].register_forward_pre_hook(lambda module, args: seen.append(module))
    assert changes == [1]
    assert regions.refresh() is True
    regions.build(dormant)(torch.randn(3, 4))
    assert seen == [case.root[1]]
    handle.remove()
    assert len(changes) == 2
    case.root[0] = nn.Identity()
    assert len(changes) == 3
    assert regions.refresh() is True
    x = torch.randn(3, 4)
    assert torch.equal(regions.build(dormant)(x), host[1](x))


def test_hooks_see_the_module_that_they_were_registered_on() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) if x.sum() > 0 else x

    case = planted(nn.Sequential(Branch(), nn.Linear(4, 4)))
    seen: list[nn.Module] = []
    case.root[0].register_forward_hook(lambda module, args, output: seen.append(module))
    case.root[0].register_full_backward_hook(lambda module, gi, go: seen.append(module))
    case.root[0].layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(module), with_kwargs=True)
    case.run()(torch.ones(1, 4, requires_grad=True)).sum().backward()
    assert seen == [case.root[0].layer, case.root[0], case.root[0]]


def test_hooks_for_all_modules_run() -> None:
    host = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    case = planted(host)
    run = case.run()
    calls: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: calls.append(type(module).__name__)
    )
    try:
        run(torch.randn(3, 4))
        assert calls == ["Site", "ReLU", "Sequential", "Site"]
        assert isinstance(trace_region(case.root, set(case.sites.values())), Untraceable)
    finally:
        handle.remove()


def test_a_module_called_twice_and_a_module_under_two_names() -> None:
    host = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    host.append(host[0])
    agrees(host, planted(host).run(), torch.randn(3, 4))
    traced(lambda self, x: self.layer(self.layer(x)) + self.inner(self.inner(x)))


def test_attention_and_encoder_layers_are_called_as_they_are() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    host = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))
    for flag in (True, False):
        host.train(flag)
        case = planted(host)
        assert sorted(case.sites) == ["0", "1.linear1", "1.linear2", "2"]
        run = case.run()
        agrees(host, run, torch.randn(2, 3, 8))
        with torch.no_grad():
            x = torch.randn(2, 3, 8)
            assert torch.equal(run(x), host(x))


def test_modules_that_are_no_submodules_are_refused() -> None:
    outside = nn.Linear(4, 4)
    assert "submodules" in refusal(lambda self, x: self.layer(outside(x)))


def test_module_lists_dictionaries_and_slices() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
            self.named = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Tanh()})
            self.plain = [self.blocks[1], {"x": self.named["a"]}]

        def forward(self, x: torch.Tensor) -> Any:
            for index, block in enumerate(self.blocks[1:]):
                x = block(x) * (index + 1)
            for name in self.named:
                x = self.named[name](x)
            return self.plain[0](x) + self.plain[1]["x"](x) + len(self.blocks)

    host = Lists()
    assert isinstance(outcome(host), Traced)
    agrees(host, planted(host).run(), torch.randn(3, 4))


def test_functions_and_partials_as_attributes() -> None:
    host = model(lambda self, x: self.shift(self.act(self.layer(x)), value=self.factor))
    host.act = lambda x: x * 2
    host.shift = functools.partial(lambda x, offset, value: x + offset + value, offset=1)
    assert isinstance(outcome(host), Traced)
    agrees(host, planted(host).run(), torch.randn(3, 4))


def test_forward_called_past_the_call_of_a_module() -> None:
    def forward(self: Model, x: torch.Tensor) -> Any:
        return self.inner.forward(self.layer.forward(x))

    traced(forward)
    case = planted(model(forward))
    result = trace_region(case.root, set(case.sites.values()))
    assert isinstance(result, Traced)
    assert result.leaves == ("layer", "inner.0", "inner.1")
    assert "inner" in result.inlined
    case.sites["layer"].register_forward_hook(lambda module, args, output: output * 2)
    assert isinstance(trace_region(case.root, set(case.sites.values())), Untraceable)


def test_a_call_of_its_own_around_the_forward() -> None:
    class Layer(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.scale = scale

        def __call__(self, x: torch.Tensor, *, double: bool = False) -> Any:
            y = super().__call__(x * self.scale)
            return y * 2 if double else y

        def forward(self, x: torch.Tensor) -> Any:
            return self.fc(x) if self.scale > 1 or x.sum() > 0 else x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layer(2.0), Layer(0.5)

        def forward(self, x: torch.Tensor) -> Any:
            return self.second(self.first(x, double=True))

    host = Model()
    regions = planted(host).regions()
    assert "" in map(regions.name_of, regions.regions.traced)
    agrees(host, regions.build(dormant), torch.randn(3, 4))


def test_decorated_forward_and_dictionary_results_run_as_modules() -> None:
    class Result(OrderedDict[str, Any]):
        """Like the results of Hugging Face's models."""

    def passing_on(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            return function(self, *args, **kwargs)

        return wrapper

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

        @passing_on
        def forward(self, x: torch.Tensor, **options: Any) -> Any:
            return Result(logits=self.body(x), options=len(options))

    host = Head()
    regions = planted(host).regions()
    assert list(map(regions.name_of, regions.regions.traced)) == ["body"]
    assert set(regions.regions.untraced.values()) == {"its forward is decorated"}
    x = torch.randn(3, 4)
    ours, theirs = regions.build(dormant)(x, a=1), host(x, a=1)
    assert type(ours) is Result
    assert torch.equal(ours["logits"], theirs["logits"])
    assert ours["options"] == 1


def test_failures_below_keep_the_rest_traced() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

        def forward(self, x: torch.Tensor) -> Any:
            return checkpoint(self.mlp, x, use_reentrant=False)

    host = nn.Sequential(nn.Linear(4, 4), Checkpointed(), nn.Tanh(), Checkpointed())
    case = planted(host)
    regions = case.regions()
    names = sorted(map(regions.name_of, regions.regions.traced))
    assert names == ["", "1.mlp", "3.mlp"]
    assert all("checkpoint" in reason for reason in regions.regions.untraced.values())
    agrees(host, regions.build(dormant), torch.randn(3, 4, requires_grad=True))


# -- the process -------------------------------------------------------------------------------------------------------


def test_tracing_leaves_nothing_patched_and_other_threads_alone() -> None:
    import math

    originals = (nn.Module.__call__, nn.Module.__getattr__, math.sqrt, sys.getprofile())
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    expected = other(torch.ones(1, 4))
    stop = threading.Event()
    wrong: list[Any] = []

    def work() -> None:
        while not stop.is_set():
            if not torch.equal(other(torch.ones(1, 4)), expected) or math.sqrt(4.0) != 2.0:
                wrong.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(5):
            outcome(model(lambda self, x: self.layer(x) * math.sqrt(x.size(0))))
            outcome(model(lambda self, x: self.layer(x) / 0))
            outcome(model(lambda self, x: self.layer(x) if x.sum() else 1 / 0))
    finally:
        stop.set()
        thread.join()
    assert wrong == []
    assert (nn.Module.__call__, nn.Module.__getattr__, math.sqrt, sys.getprofile()) == originals


def test_a_model_is_traced_under_the_callers_modes() -> None:
    host = model(lambda self, x: self.layer(x) * 2)
    for ambient in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        with ambient():
            run = planted(host).run()
            assert "linear(" in run.__esper_source__
        agrees(host, run, torch.randn(3, 4, requires_grad=True))
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3, 4)
        assert run(x).dtype == host(x).dtype == torch.bfloat16
