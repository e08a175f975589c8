"""Every private torch API that Esper uses, each behind one function.

Nothing else in the project imports a private name of torch. Each function has a test that fails by name when torch
changes under it. Supported: torch 2.11 to 2.13.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx

__all__ = [
    "assumptions_since",
    "backend_being_traced",
    "compile_with_inductor",
    "constant_while_tracing",
    "copy_for_recompile",
    "deserialise_compiled",
    "fake_inputs",
    "fake_like",
    "guard_count",
    "inductor_mode_options",
    "inside_backward",
    "recompile_context",
    "serialise_compiled",
]


_Function = TypeVar("_Function", bound=Callable[..., Any])


def backend_being_traced(is_ours: Callable[[object], bool]) -> bool:
    """Whether Dynamo, on this thread, is tracing for a backend that `is_ours` recognises.

    Must be called while Dynamo traces, from a function under `torch.compiler.assume_constant_result`. Dynamo wraps the
    user's backend in several layers; each keeps the next under one of two names. Where the look fails the answer is
    False, which is slower (a guard on the plan) but right.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        backend: object | None = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:
        return False
    while backend is not None:
        if is_ours(backend):
            return True
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
    return False


def constant_while_tracing(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, typed: Dynamo calls `function` while it traces and keeps the result."""
    marked: _Function = torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]  # torch's own
    return marked


def inside_backward() -> bool:
    """Whether this thread is executing a backward pass (activation recomputation included)."""
    return bool(torch._C._current_graph_task_id() != -1)


def compile_with_inductor(
    module: fx.GraphModule, inputs: Sequence[Any], config_patches: Mapping[str, Any] | None
) -> Callable[..., Any]:
    """Compile a Dynamo graph exactly as `backend="inductor"` would, forward and backward."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(module, list(inputs), config_patches=dict(config_patches or {}))
    return compiled  # type: ignore[no-any-return]  # its declared type has the results of other modes too


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """Inductor options that a `torch.compile` mode such as "reduce-overhead" stands for."""
    options: dict[str, Any] = torch._inductor.list_mode_options(mode)
    return options


def copy_for_recompile(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph that keeps what a later compilation needs and holds no real tensor of the inputs.

    Sources and static-input marks are kept, so that CUDA graphs go on treating parameters as static inputs.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    if output is not None:
        graph.output(output)
    for old, new in mapping.items():
        new.meta.pop("grapharg", None)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # set by Dynamo on placeholders
    copied = fx.GraphModule(module, graph)
    copied.meta.update(module.meta)
    if hasattr(module, "_param_name_to_source"):
        copied._param_name_to_source = module._param_name_to_source
    return copied


def fake_inputs(graph: fx.Graph) -> list[Any]:
    """The fake tensors and symbolic integers that Dynamo recorded for a graph's placeholders, in order."""
    return [node.meta["example_value"] for node in graph.nodes if node.op == "placeholder"]


def fake_like(tensors: Sequence[torch.Tensor], among: Sequence[Any]) -> list[torch.Tensor]:
    """Fake versions of `tensors`, static in shape, in the fake mode of the values `among` (or a new one)."""
    from torch._subclasses import FakeTensorMode

    mode = _fake_mode(among) or FakeTensorMode()

    def faked(tensor: torch.Tensor) -> torch.Tensor:
        fake: torch.Tensor = mode.from_tensor(tensor, static_shapes=True)
        if fake.requires_grad != tensor.requires_grad:  # the mode remembers the tensor as it was at an earlier time
            fake = mode.from_tensor(tensor.detach(), static_shapes=True).requires_grad_(tensor.requires_grad)
        return fake

    return [faked(tensor) for tensor in tensors]


def _fake_mode(values: Sequence[Any]) -> Any:
    return next((value.fake_mode for value in values if isinstance(value, torch._subclasses.FakeTensor)), None)


def guard_count(values: Sequence[Any]) -> int:
    """How many guards the shape environment of fake `values` has: a compilation that adds one assumed a shape."""
    mode = _fake_mode(values)
    return 0 if mode is None or mode.shape_env is None else len(mode.shape_env.guards)


def assumptions_since(values: Sequence[Any], count: int) -> Callable[..., bool] | None:
    """A check of what a compilation assumed about sizes: the guards beyond the first `count`; None if there are none.

    `values` are the fake inputs of the graph. The check takes the real inputs, in their order, and says whether every
    assumption holds for them. Dynamo hands each symbolic size over as an input of its own, and that is where it is
    read; an assumption about anything else never holds.
    """
    import sympy

    mode = _fake_mode(values)
    if mode is None or mode.shape_env is None or len(mode.shape_env.guards) == count:
        return None
    expressions = [guard.expr for guard in mode.shape_env.guards[count:]]
    symbols = {
        value.node.expr: position
        for position, value in enumerate(values)
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol)
    }
    needed = sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)
    if not all(symbol in symbols for symbol in needed):
        return lambda *_: False
    positions = [symbols[symbol] for symbol in needed]
    holds = sympy.lambdify(needed, sympy.And(*expressions), modules="math")

    def check(*inputs: Any) -> bool:
        return bool(holds(*[inputs[position] for position in positions]))

    return check


@contextlib.contextmanager
def recompile_context(inputs: Sequence[Any], module: fx.GraphModule) -> Iterator[None]:
    """What must surround the compilation of a Dynamo graph outside of Dynamo's own call of the backend."""
    from torch._dynamo.source import ConstantSource
    from torch._guards import TracingContext, tracing

    for node in module.graph.nodes:
        if node.op == "placeholder" and not hasattr(node, "_dynamo_source"):
            node._dynamo_source = ConstantSource(f"esper_{node.name}")
    with tracing(TracingContext(_fake_mode(inputs))):
        yield


def serialise_compiled(module: fx.GraphModule, inputs: Sequence[torch.Tensor], dynamic: Sequence[int]) -> bytes:
    """Compile forward and backward with Inductor and return the result as bytes.

    `inputs` are real tensors with the requires-grad flags to compile for; those at the positions `dynamic` may vary in
    their first dimension, every other size is fixed. Slow, and it patches process-wide state: for a process of its own.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import standalone_compile
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes: list[Any] = []
    for position, tensor in enumerate(inputs):
        if position in dynamic:
            sizes = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (tensor.dim() - 1)
            fakes.append(mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
        else:
            fakes.append(mode.from_tensor(tensor, static_shapes=True))
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
    for node in module.graph.nodes:  # AOTAutograd's cache asks for example_value, and gives up without it
        node.meta = {"example_value": node.meta["val"]} if "val" in node.meta else {}
    with functorch_config.patch(force_non_lazy_backward_lowering=True):  # torch 2.11 compiles backwards on first use
        compiled: Any = standalone_compile(module, fakes, dynamic_shapes="from_graph", options={}, aot=True)
        data: bytes = compiled.serialize()
        return data


def deserialise_compiled(data: bytes) -> Callable[..., Any]:
    """The callable that :func:`serialise_compiled` wrote. Loads machine code: only for bytes from a trusted signer."""
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    loaded: Callable[..., Any] = AOTCompiledArtifact.deserialize(data)
    return loaded
