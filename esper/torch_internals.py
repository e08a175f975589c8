"""Every private torch API that Esper uses, each behind one function.

Nothing else in the project imports a private name of torch. Each function has a test that fails by name when torch
changes under it. Supported: torch 2.11 to 2.13.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import gc
import hashlib
import inspect
import io
import marshal
import math
import operator
import os
import pickle
import platform
import struct
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import fx
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

__all__ = [
    "Ambient",
    "Assumption",
    "Flops",
    "NotSendableError",
    "OpOverload",
    "StaleVariantError",
    "after_accumulation",
    "ambient_state",
    "assumption_since",
    "at_the_end_of_the_backward",
    "backend_being_traced",
    "backward_id",
    "boxed",
    "cache_misses",
    "compile_graph",
    "compile_with_inductor",
    "compiler_cache_dir",
    "confine_fx_tracing",
    "constant_while_tracing",
    "copy_for_recompile",
    "copy_of_capture",
    "counting_flops",
    "describe_graph",
    "deserialise_compiled",
    "dimensions_of_fsdp",
    "fake_inputs",
    "fake_like",
    "fake_tensors",
    "find_backend",
    "goes_on_after_break",
    "guard_count",
    "held_elsewhere",
    "inductor_option_names",
    "inductor_options",
    "inject_parametrizations",
    "inside_backward",
    "is_compiled_in_place",
    "load_graph",
    "module_call_code",
    "nn_functions",
    "operators_being_traced",
    "pack_graph",
    "recompile_context",
    "recompile_limit",
    "reduces_gradients",
    "saved_tensor_hooks",
    "serialise_compiled",
    "share_fsdp_state",
    "shared_inputs",
    "static_inputs",
    "system_factors",
    "transforms_active",
    "unpack_graph",
    "without_collections",
    "write_count",
]

nn_functions = torch._C._nn
"""The functions that `torch.nn.functional` passes calls on to, and that graphs name: `linear`, `gelu`, `pad`, ..."""


_Function = TypeVar("_Function", bound=Callable[..., Any])


def inject_parametrizations(module: torch.nn.Module) -> None:
    """Give `module`, which has a child `parametrizations`, the class that computes these where they are read."""
    from torch.nn.utils.parametrize import _inject_new_class, _inject_property

    _inject_new_class(module)
    for name in module.get_submodule("parametrizations")._modules:
        _inject_property(module, name)


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
        backend = (
            getattr(backend, "_torchdynamo_orig_backend", None)
            or getattr(backend, "compiler_fn", None)
            or getattr(getattr(backend, "__self__", None), "backend_compile_fn", None)  # DDPOptimizer
        )
    return False


def changed_in_trace(containers: Iterable[object]) -> bool:
    """Whether the code that Dynamo traces on this thread has changed one of `containers`, dictionaries such as
    `_parameters`.

    `torch.func.functional_call` does so for the time of its call. Dynamo keeps changes to itself until the graph has
    run: a container is as it was before. Must be called as :func:`backend_being_traced` is.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    effects = InstructionTranslator.current_tx().output.side_effects
    variables = (effects.id_to_variable.get(id(container)) for container in containers)
    return any(variable is not None and effects.is_modified(variable) for variable in variables)


def argument_being_traced(code: types.CodeType, name: str) -> object | None:
    """What the argument `name` of the innermost call of `code` is, as Dynamo traces it on this thread.

    Without a guard, which there would be if the traced code passed it on. None if it cannot be told. Must be called as
    :func:`backend_being_traced` is.
    """
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        translator: Any = frame.f_locals.get("self")
        if getattr(translator, "f_code", None) is code:
            value: object | None = getattr(translator.symbolic_locals[name].realize(), "value", None)
            return value
        frame = frame.f_back
    return None


def operators_being_traced() -> list[str]:
    """The names of the higher-order operators whose bodies Dynamo is tracing on this thread, innermost first.

    Must be called as :func:`backend_being_traced` is.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    names: list[str] = []
    tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    while tracer is not None and tracer.parent is not None:
        names.append(str(getattr(tracer.source_target, "__name__", tracer.source_target)))
        tracer = tracer.parent
    return names


def constant_while_tracing(function: _Function) -> _Function:
    """As `torch.compiler.assume_constant_result`: Dynamo calls `function` while it traces and keeps the result.

    Without importing Dynamo, which takes a second that who compiles nothing need not spend.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what Dynamo looks for
    return function


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether `module` came out of `torch.compile`, or its `compile` method was called."""
    dynamo = sys.modules.get("torch._dynamo")  # not imported: then nothing was compiled
    return is_compiled_in_place(module) or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))


def is_compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether the `compile` method of `module` was called, so that its calls run compiled code."""
    return module._compiled_call_impl is not None


def recompile_limit(least: int) -> dict[str, int]:
    """The argument of `torch.compile` that lets one code be compiled `least` times, or more if Dynamo is set so.

    Empty where it takes none: torch 2.11 goes by the setting alone.
    """
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        return {}
    from torch._dynamo import config  # which compiling needs anyway

    return {"recompile_limit": max(least, config.recompile_limit)}


def goes_on_after_break(code: types.CodeType) -> bool:
    """Whether this is code that Dynamo made for what comes after a graph break."""
    return code.co_name.startswith("torch_dynamo_resume_in")


def module_call_code() -> tuple[str, int, str]:
    """File, first line and name of the code that runs whenever a module is called."""
    code = torch.nn.Module._wrapped_call_impl.__code__
    return code.co_filename, code.co_firstlineno, code.co_name


class _OnThisThread:
    """True on the thread that it was made on."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def __bool__(self) -> bool:
        return threading.get_ident() == self._thread


def confine_fx_tracing() -> None:
    """Let torch.fx's trace that this thread has begun be none to other threads, until it ends.

    Compiled functions refuse to run while "the process" traces, on whatever thread they are called.
    """
    from torch.fx import _symbolic_trace

    _symbolic_trace._is_fx_tracing_flag = _OnThisThread()  # type: ignore[assignment]  # is asked for its truth only


def saved_tensor_hooks() -> object:
    """The hooks for saved tensors that are in force on this thread, such as those of activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


backward_id: Callable[[], int] = torch._C._current_graph_task_id
"""The number of the backward pass that this thread is executing, -1 outside of any."""


def inside_backward() -> bool:
    """Whether this thread is executing a backward pass (activation recomputation included)."""
    return backward_id() != -1


def transforms_active() -> bool:
    """Whether this thread is under a functorch transform, forward-mode AD, jit tracing, or a function or dispatch mode.

    Compiled machine code is opaque to all of these: it would skip the mode, or fail inside the transform. The mode of
    `torch.set_default_device` does not count, since it only concerns factories of tensors.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or _function_modes_active()
    )


def _function_modes_active() -> bool:
    return any(
        not isinstance(torch._C._get_function_stack_at(index), DeviceContext)
        for index in range(torch._C._len_torch_function_stack())
    )


def write_count(tensor: torch.Tensor) -> int:
    """How often `tensor`, or an alias of it that autograd knows, has been written in place."""
    return tensor._version


def held_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether anything but `tensor`'s Python object may hold its memory: a view, an alias, a graph for a backward.

    Autograd holds a tensor that it saved, or a view of it, and what accumulates the gradient of a leaf holds that leaf.
    """
    holders: int = tensor._use_count()  # type: ignore[attr-defined]  # torch's stubs leave it out
    of_memory = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # counts the storage just asked for, too
    return holders > 1 or of_memory > 2


def after_accumulation(parameter: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> Any:
    """Have `hook` called with `parameter` whenever a gradient has been added to it; a handle that ends this."""
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch leaves it so


def at_the_end_of_the_backward(function: Callable[[], None]) -> None:
    """Have `function` called when the backward that is under way has computed everything. From one of its hooks."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _fsdp_groups(module: torch.nn.Module) -> list[Any]:
    state = module._get_fsdp_state()  # type: ignore[operator]  # it is an FSDPModule
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13 has several, earlier ones one
    return [state._fsdp_param_group] * bool(state._fsdp_param_group) if groups is None else list(groups)


def share_fsdp_state(module: torch.nn.Module, original: torch.nn.Module) -> None:
    """Let `module`, which has the hooks and parameters of `original`, an `FSDPModule`, answer as that does."""
    from torch.distributed._composable_state import _get_module_state, _insert_module_state

    state = _get_module_state(original)
    if state is not None and _get_module_state(module) is None:
        _insert_module_state(module, state)


def reduces_gradients(module: torch.nn.Module) -> bool:
    """Whether the backward of an `FSDPModule` reduces gradients, see its `set_requires_gradient_sync`."""
    return all(each.reduce_grads and each.all_reduce_grads for each in _fsdp_groups(module))


def dimensions_of_fsdp(module: torch.nn.Module) -> int:
    """Of how many dimensions the mesh is over which an `FSDPModule` shards, 0 if it has no parameters of its own."""
    return max((each.mesh_info.mesh.ndim for each in _fsdp_groups(module)), default=0)


def find_backend(name: str) -> Callable[..., Any]:
    """The backend that `torch.compile` has under this name; raises what torch raises if there is none."""
    import torch._dynamo

    found: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    return found


def compile_with_inductor(
    module: fx.GraphModule, inputs: Sequence[Any], config_patches: Mapping[str, Any] | None
) -> Callable[..., Any]:
    """Compile a Dynamo graph exactly as `backend="inductor"` would, forward and backward."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(module, list(inputs), config_patches=dict(config_patches or {}))
    return compiled  # type: ignore[no-any-return]  # its declared type has the results of other modes too


def cache_misses() -> int | None:
    """How many graphs Inductor has compiled that its cache did not have; None where it keeps none."""
    from torch._dynamo.utils import counters

    if compiler_cache_dir() is None:
        return None
    counted = counters["inductor"]
    return counted["fxgraph_cache_miss"] + counted["fxgraph_cache_bypass"]


def inductor_options(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's settings for `torch.compile`'s `mode` and `options`, checked by Inductor: it raises `RuntimeError`."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    config: dict[str, Any] = wrapper(mode, dict(options), None).config
    return config


def inductor_option_names() -> list[str]:
    """The names of the settings that Inductor takes as `torch.compile`'s `options`."""
    import torch._inductor

    names: list[str] = torch._inductor.list_options()
    return names


def copy_of_capture(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph in which nothing is missing that a compiler may look for.

    For a backend that changes inputs: Dynamo reads from its own graph what they are once the backend has returned.
    """
    copied = _copied(module)
    for name, value in vars(module).items():  # Dynamo keeps notes in attributes
        vars(copied).setdefault(name, value)
    return copied


def copy_for_recompile(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph that keeps what a later compilation needs and holds no real tensor of the inputs.

    Sources and static-input marks are kept, so that CUDA graphs go on treating parameters as static inputs.
    """
    copied = _copied(module)
    for node in copied.graph.nodes:
        node.meta.pop("grapharg", None)
    if hasattr(module, "_param_name_to_source"):
        copied._param_name_to_source = module._param_name_to_source
    return copied


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, mapping)
    if output is not None:
        graph.output(output)
        graph.output_node().meta = dict(module.graph.output_node().meta)
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # set by Dynamo on placeholders
    copied = fx.GraphModule(module, graph)
    copied.meta.update(module.meta)
    return copied


def fake_inputs(graph: fx.Graph) -> list[Any]:
    """The fake tensors and symbolic integers that Dynamo recorded for a graph's placeholders, in order."""
    return [node.meta["example_value"] for node in graph.nodes if node.op == "placeholder"]


def fake_like(tensors: Sequence[torch.Tensor], among: Sequence[Any]) -> list[torch.Tensor]:
    """Fake versions of `tensors`, static in shape, in the fake mode of the values `among` (or a new one)."""
    from torch._subclasses import FakeTensorMode

    mode = _fake_mode(among) or FakeTensorMode()

    def faked(tensor: torch.Tensor) -> torch.Tensor:
        alias = tensor.detach()  # the mode keeps a weak reference to it, which would stop `torch.utils.swap_tensors`
        fake: torch.Tensor = mode.from_tensor(alias, static_shapes=True).requires_grad_(tensor.requires_grad)
        return fake

    return [faked(tensor) for tensor in tensors]


def fake_tensors(
    described: Sequence[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device, bool]], among: Sequence[Any]
) -> list[torch.Tensor]:
    """Fake tensors of given shape, stride, dtype, device and requires-grad flag, in the fake mode of `among`."""
    from torch._subclasses import FakeTensorMode

    with _fake_mode(among) or FakeTensorMode():
        return [
            torch.empty_strided(shape, stride, dtype=dtype, device=device).requires_grad_(requires_grad)
            for shape, stride, dtype, device, requires_grad in described
        ]


def _fake_mode(values: Sequence[Any]) -> Any:
    return next((value.fake_mode for value in values if isinstance(value, torch._subclasses.FakeTensor)), None)


def guard_count(values: Sequence[Any]) -> int:
    """How many guards the shape environment of fake `values` has: a compilation that adds one assumed a shape."""
    mode = _fake_mode(values)
    return 0 if mode is None or mode.shape_env is None else len(mode.shape_env.guards)


@dataclass(frozen=True)
class Assumption:
    """What a compilation assumed about sizes: a Python expression over names, and where each name's value is read.

    A place is the position of an input and, for a tensor, the dimension. An expression of None never holds.
    """

    expression: str | None
    places: tuple[tuple[str, int, int | None], ...] = ()

    def check(self) -> Callable[[Sequence[Any]], bool]:
        """A function that takes the real inputs, in their order, and says whether the assumption holds for them."""
        if self.expression is None:
            return lambda _: False
        names = ", ".join(name for name, _, _ in self.places)
        holds: Callable[..., object] = eval(f"lambda {names}: {self.expression}", {"math": math, "torch": torch})
        places = [(position, dimension) for _, position, dimension in self.places]

        def check(inputs: Sequence[Any]) -> bool:
            return bool(holds(*[inputs[p] if d is None else inputs[p].shape[d] for p, d in places]))

        return check


def assumption_since(values: Sequence[Any], count: int) -> Assumption | None:
    """What a compilation assumed about sizes: the guards beyond the first `count`; None if there are none.

    `values` are the fake inputs of the graph. A size is read from an input that is this size, or from a dimension of
    a tensor; an assumption about anything else never holds.
    """
    from torch.utils._sympy.printers import PythonPrinter

    mode = _fake_mode(values)
    if mode is None or mode.shape_env is None or len(mode.shape_env.guards) == count:
        return None
    expressions = [guard.expr for guard in mode.shape_env.guards[count:]]
    places: dict[Any, tuple[int, int | None]] = {}
    for position, value in enumerate(values):
        sizes = [(None, value)] if isinstance(value, torch.SymInt) else list(enumerate(getattr(value, "shape", ())))
        for dimension, size in sizes:
            if isinstance(size, torch.SymInt):
                places.setdefault(size.node.expr, (position, dimension))
    needed = sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)
    if not all(symbol in places for symbol in needed):
        return Assumption(None)
    printer = PythonPrinter()
    text = " and ".join(f"({printer.doprint(expression)})" for expression in expressions)
    return Assumption(text, tuple((str(symbol), *places[symbol]) for symbol in needed))


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


def serialise_compiled(
    module: fx.GraphModule, inputs: Sequence[torch.Tensor], dynamic: Sequence[int], options: Mapping[str, Any]
) -> bytes:
    """Compile forward and backward with Inductor and return the result as bytes.

    `inputs` are real tensors with the requires-grad flags to compile for; those at the positions `dynamic` may vary in
    their first dimension, every other size is fixed. `options` are Inductor's settings by name. Slow, and it patches
    process-wide state: for a process of its own.
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
        compiled: Any = standalone_compile(module, fakes, dynamic_shapes="from_graph", options=dict(options), aot=True)
        data: bytes = compiled.serialize()
        return data


def deserialise_compiled(data: bytes) -> Callable[..., Any]:
    """The callable that :func:`serialise_compiled` wrote. Loads machine code: only for bytes from a trusted signer."""
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    loaded: Callable[..., Any] = AOTCompiledArtifact.deserialize(data)
    return loaded


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection in this process meanwhile, and none soon because of what was made meanwhile.

    For imports of much code, on any thread: what they make stays, and looking through it would stop every thread for
    some hundred milliseconds. It counts as old, so that only a full collection looks at it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # else what the program has frozen would be thawed
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()


class NotSendableError(Exception):
    """A Dynamo graph that no other process can be given; the message says why."""


class StaleVariantError(Exception):
    """Compiled code that cannot be loaded here: a library it needs is gone, or another torch or Python made it."""


def compiler_cache_dir() -> str | None:
    """Inductor's cache directory; None where compiled code is not to be kept."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    if config.force_disable_caches or not config.fx_graph_cache:
        return None
    directory: str = cache_dir()
    return directory


# -- a graph for another process ---------------------------------------------------------------------------------------


def pack_graph(module: fx.GraphModule) -> bytes:
    """A Dynamo graph as bytes that :func:`unpack_graph` reads in another process of the same torch.

    Nodes keep operator, arguments and name. Placeholders keep what their fake values are like, symbolic sizes included,
    but no longer share memory (:func:`shared_inputs` names those that did). Other fake values are left behind and
    computed anew where the graph is read. Raises :class:`NotSendableError` for a graph that holds parameters or
    buffers, for one with selective activation checkpointing, and for what pickle refuses.
    """
    from torch.fx._graph_pickler import GraphPickler, Options

    sent = copy_for_recompile(module)
    sent.meta.clear()
    held = [name for name, _ in (*sent.named_parameters(), *sent.named_buffers())]
    if held:
        raise NotSendableError(f"it holds tensors of its own: {', '.join(held[:3])}")
    if any("_checkpoint_context_fn" in each.meta for each in sent.modules() if isinstance(each, fx.GraphModule)):
        raise NotSendableError("an activation checkpoint in it has a policy, which is a function of the program's")
    _forget_values(sent)
    options = Options(ops_filter=None, node_metadata_key_filter=lambda key: key == "example_value")
    try:
        data: bytes = GraphPickler.dumps(sent, options)
    except Exception as error:  # pickle and the pickler of graphs raise almost anything
        raise NotSendableError(f"{type(error).__name__}: {error}") from error
    return data


def _forget_values(module: fx.GraphModule) -> None:
    from torch._subclasses import FakeTensor

    for node in module.graph.nodes:
        value = node.meta.get("example_value")
        node.meta = {}
        if node.op == "placeholder":
            node.meta["example_value"] = _alone(value) if type(value) is FakeTensor else value
    _forget_values_of_bodies(module)


def _forget_values_of_bodies(module: fx.GraphModule) -> None:
    """Replace the bodies of higher-order operators, which `module` shares with the original, and the bodies in them."""
    for name, child in list(module.named_children()):
        if isinstance(child, fx.GraphModule):
            body = copy_for_recompile(child)
            body.meta.clear()
            for node in body.graph.nodes:
                node.meta = {}
            _forget_values_of_bodies(body)
            module.add_submodule(name, body)


def _alone(value: Any) -> torch.Tensor:
    """A fake tensor like `value` that is no view of another and has no gradient."""
    with value.fake_mode:
        fresh = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    return fresh.requires_grad_(value.requires_grad)


def describe_graph(module: fx.GraphModule, rename: Callable[[fx.Node], fx.Node | str]) -> str:
    """What a graph computes, as text that is the same in every process: nodes, constants, and what inputs are like.

    `rename` may give a text of its own for a node.
    """
    lines: list[str] = []
    for node in module.graph.nodes:
        text = rename(node)
        lines.append(text if isinstance(text, str) else f"{node.op} {node.format_node()}")
        value = node.meta.get("example_value")
        if node.op == "placeholder":
            lines.append(_describe_input(value))
        elif node.op == "get_attr":
            lines.append(_describe_constant(module, str(node.target), rename))
    mode = _fake_mode(fake_inputs(module.graph))
    if mode is not None and mode.shape_env is not None:
        environment = mode.shape_env
        lines += sorted(f"{symbol} in {bounds}" for symbol, bounds in environment.var_to_range.items())
        lines += sorted(f"{symbol} is {other}" for symbol, other in environment.replacements.items())
        lines += sorted(str(guard.expr) for guard in environment.guards)
    return "\n".join(lines)


def _describe_input(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value}"
    sizes, strides = ([str(each) for each in group] for group in (value.shape, value.stride()))
    kind = type(value).__name__
    return f"{kind} {value.dtype} {value.device} {sizes} {strides} {value.storage_offset()} {value.requires_grad}"


def _describe_constant(module: fx.GraphModule, name: str, rename: Callable[[fx.Node], fx.Node | str]) -> str:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    if isinstance(value, fx.GraphModule):
        return f"{{{describe_graph(value, rename)}}}"
    if isinstance(value, torch.Tensor):
        data = io.BytesIO()
        torch.save(value.detach().cpu(), data)
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data.getvalue()).hexdigest()}"
    return repr(value)


def system_factors() -> dict[str, str]:
    """What machine code depends on besides the graph: versions of torch and Python, and the hardware."""
    from torch._inductor.codecache import CacheBase, torch_key

    return {
        "torch": torch.__version__,
        "torch sources": torch_key().hex(),
        "python": sys.version,
        "system": repr(sorted(CacheBase.get_system().items())),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def shared_inputs(values: Sequence[Any]) -> frozenset[int]:
    """The positions of fake inputs that share memory with another input."""
    owners: dict[int, list[int]] = {}
    for position, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            owners.setdefault(value.untyped_storage()._cdata, []).append(position)
    return frozenset(position for group in owners.values() if len(group) > 1 for position in group)


def static_inputs(graph: fx.Graph) -> frozenset[int]:
    """The positions of the inputs of a Dynamo graph whose address stays the same: parameters and buffers."""
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    key = "_dynamo_static_input_type"
    return frozenset(i for i, node in enumerate(nodes) if node.meta.get("tensor_dict", {}).get(key) is not None)


def unpack_graph(data: bytes) -> fx.GraphModule:
    """The graph that :func:`pack_graph` wrote, in a fake mode and a shape environment of its own."""
    from torch._subclasses import FakeTensorMode
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    try:
        module: Any = GraphPickler.loads(data, mode)
    except (AttributeError, ImportError) as error:  # an operator or a module that only the sender knows
        raise NotSendableError(f"a worker cannot read it: {error}") from error
    module.recompile()
    unpacked: fx.GraphModule = module
    return unpacked


@dataclass(frozen=True)
class Ambient:
    """The settings that the compilation of a graph depends on.

    Those up to `threads` are the ones under which it was captured: Dynamo guards on them, and captures a graph anew
    when they change. On the others it has no guard: :meth:`renewed` has what they have become.
    """

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    autocast_cache: bool
    deterministic: tuple[bool, bool]
    default_dtype: torch.dtype
    threads: int
    cache_dir: str | None
    flags: tuple[tuple[str, Any], ...]
    """Of `torch.backends`."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    functorch: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, Any] = field(default_factory=dict)
    caching: Mapping[str, Any] = field(default_factory=dict)

    def renewed(self, config_patches: Mapping[str, Any]) -> Ambient:
        """With the settings that are in force now where Dynamo has no guard; as for :func:`ambient_state`."""
        return replace(self, **_unguarded_settings(config_patches))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """These settings; for a process of its own, where nothing has to be put back but what is scoped anyway."""
        if self.cache_dir is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = self.cache_dir
        torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])
        torch.set_default_dtype(self.default_dtype)
        for name, value in self.flags:
            if _flag(name) != value:
                _set_flag(name, value)
        threads = {} if "cpp.threads" in self.inductor else {"cpp.threads": self.threads}
        with contextlib.ExitStack() as stack:
            for name, config in _configs().items():
                stack.enter_context(config.patch({**(threads if name == "inductor" else {}), **getattr(self, name)}))
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, enabled, dtype in self.autocast:
                stack.enter_context(
                    torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=self.autocast_cache)
                )
            yield


_LOCAL_TO_A_PROCESS = ("compile_threads", "worker_", "_", "trace.", "quiesce_async_compile")


def ambient_state(device_types: Sequence[str], config_patches: Mapping[str, Any]) -> Ambient:
    """The settings in force on this thread, with `config_patches` over Inductor's own.

    Raises :class:`NotSendableError` for a setting that is a function or anything else that pickle refuses.
    """
    return Ambient(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in device_types),
        torch.is_autocast_cache_enabled(),
        (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        **_unguarded_settings(config_patches),
    )


def _configs() -> dict[str, Any]:
    """Torch's modules of compiler settings, by the field of :class:`Ambient`."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch.compiler import config as caching
    from torch.fx.experimental import _config as shapes

    return {"inductor": inductor, "functorch": functorch, "shapes": shapes, "caching": caching}


def _unguarded_settings(config_patches: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of :class:`Ambient`; those of torch's compilers may be seen by this context alone, see `contextvars`."""
    configs = {field: _changed_settings(config) for field, config in _configs().items()}
    for name in [name for name in configs["inductor"] if name.startswith(_LOCAL_TO_A_PROCESS)]:
        del configs["inductor"][name]
    configs["caching"] = {name: value for name, value in configs["caching"].items() if name == "cache_key_tag"}
    configs["inductor"].update(config_patches)
    configs["functorch"].pop("donated_buffer", None)  # see compile_graph
    for name, value in (each for config in configs.values() for each in config.items()):
        try:
            pickle.dumps(value)
        except Exception as error:  # pickle raises almost anything
            raise NotSendableError(f"the compiler setting {name} cannot be sent: {error}") from error
    flags = tuple((name, _flag(name)) for name in _FLAGS)
    return {"cache_dir": os.environ.get("TORCHINDUCTOR_CACHE_DIR"), "flags": flags, **configs}


_PRECISIONS = [
    f"{backend}.{operator}" for backend in ("cuda", "mkldnn") for operator in ("all", "matmul", "conv", "rnn")
]
_ATTENTIONS = [f"{kind}_sdp" for kind in ("flash", "mem_efficient", "math", "cudnn")]
_FLAGS = (
    "generic.all",
    *_PRECISIONS,
    *_ATTENTIONS,
    "mkldnn.enabled",
    "mkldnn.deterministic",
    "cudnn.enabled",
    "cudnn.benchmark",
    "cudnn.deterministic",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "opt_einsum.enabled",
    "opt_einsum.strategy",
)
"""What AOTAutograd or Inductor reads of `torch.backends`: the precision of products of float32 numbers by backend and
operator (`set_float32_matmul_precision` sets some of them), which kinds of attention may be used, attributes."""


def _flag(name: str) -> Any:
    if name in _FLAGS[: 1 + len(_PRECISIONS)]:
        return torch._C._get_fp32_precision_getter(*name.split("."))
    if name in _ATTENTIONS:
        return getattr(torch.backends.cuda, f"{name}_enabled")()
    return operator.attrgetter(name)(torch.backends)


def _set_flag(name: str, value: Any) -> None:
    """For a process of its own."""
    if name in _FLAGS[: 1 + len(_PRECISIONS)]:
        bound: Any = torch._C
        bound._set_fp32_precision_setter(*name.split("."), value)
    elif name in _ATTENTIONS:
        getattr(torch.backends.cuda, f"enable_{name}")(value)
    else:
        owner, _, attribute = name.rpartition(".")
        setattr(operator.attrgetter(owner)(torch.backends), attribute, value)


def _changed_settings(config: Any) -> dict[str, Any]:
    """Settings that are not at their default.

    Torch itself counts a setting as changed for good once `patch` has set it, even to its default; Inductor does that
    while it compiles, so a process that has compiled something would differ from one that took it from the cache.
    """
    from torch.utils._config_module import _UNSET_SENTINEL

    def is_default(name: str, value: Any) -> bool:
        entry = config._config[name]
        from_environment = (entry.env_value_default, entry.env_value_force)
        return all(each is _UNSET_SENTINEL for each in from_environment) and bool(value == entry.default)

    changed = config._get_dict(skip_default=True)
    return {name: value for name, value in changed.items() if not is_default(name, value)}


# -- compiled code from another process --------------------------------------------------------------------------------


def compile_graph(module: fx.GraphModule, shared: frozenset[int], static: frozenset[int]) -> bytes:
    """Compile forward and backward with Inductor; returns what :func:`load_graph` loads with little Python.

    `module` is a graph whose placeholders have fake values. `shared` are the positions of inputs that share memory
    with another, which is fine unless the graph writes to one; `static` of those whose address stays the same. The
    backward leaves alone what the forward saved for it: whether a second backward will want it is not known here.
    (AOTAutograd compiles at the first backward, which tells, and calls what may be overwritten "donated buffers".)
    Slow, and it patches process-wide state: for a process of its own. Raises :class:`NotSendableError` if the graph
    writes to an input that shares memory, and what the compiler raises.
    """
    from torch._dynamo.source import ConstantSource
    from torch._functorch import config as functorch_config
    from torch._inductor import standalone_compile

    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["example_value"] for node in placeholders]
    known = guard_count(fakes)
    _propagate_values(module)  # AOTAutograd's cache asks for example_value, and gives up without it
    for position, node in enumerate(placeholders):
        node._dynamo_source = ConstantSource(f"esper_input_{position}")
        if position in static:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    module.meta["dynamo_compile_id"] = None
    module._param_name_to_source = {}  # type: ignore[assignment]  # with which AOTAutograd looks for static inputs
    from torch._inductor import config as inductor_config

    caching = _configs()["caching"]
    cacheable = {f"torch.amp.autocast_mode.{name}": "1" for name in ("_enter_autocast", "_exit_autocast")}
    cacheable.update(inductor_config.unsafe_marked_cacheable_functions)
    with (
        functorch_config.patch(
            force_non_lazy_backward_lowering=True,  # torch 2.11 compiles backwards on first use
            autograd_cache_allow_custom_autograd_functions=True,
            donated_buffer=False,
        ),
        # Inductor's cache takes a backward with donated buffers and one without for the same (torch 2.11 to 2.13)
        caching.patch(cache_key_tag=f"{caching.cache_key_tag} nothing donated"),
        inductor_config.patch(unsafe_marked_cacheable_functions=cacheable),
        _no_library_cut_short(),
    ):
        compiled: Any = standalone_compile(module, fakes, dynamic_shapes="from_graph", options={}, aot=True)
        try:
            serialised = compiled.serialize()
        except TypeError as error:  # there is no `serialize` where AOTAutograd's cache has refused the graph
            raise NotSendableError("AOTAutograd's cache does not take it") from error
        entry, *kernels = pickle.loads(serialised)
    entry.runtime_metadata.bw_donated_idxs = []  # as AOTAutograd has it where the first backward keeps the graph
    written = [
        i for i, each in enumerate(entry.runtime_metadata.input_info) if each.mutates_data or each.mutates_metadata
    ]
    if not shared.isdisjoint(written):
        raise NotSendableError("it writes to an input that shares memory with another input")
    code = [_loadable(part.result) for part in (entry.compiled_fw, entry.compiled_bw) if part is not None]
    assumption = assumption_since(fakes, known)
    return pickle.dumps((sys.version, torch.__version__, assumption, code, pickle.dumps((entry, *kernels))))


def _propagate_values(module: fx.GraphModule) -> None:
    """Compute a fake value for every node of a graph whose placeholders have theirs, as `example_value`."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["example_value"] for node in placeholders]
    mode = _fake_mode(fakes)
    if mode is None:
        return
    kept = {node: dict(node.meta) for node in module.graph.nodes}
    with enable_python_dispatcher():  # for operators that know symbolic sizes by their decomposition alone
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
    for node in module.graph.nodes:
        value = node.meta.get("val")
        node.meta = kept[node]
        if value is not None and node.op != "placeholder":
            node.meta["example_value"] = value


def _loadable(graph: Any) -> bytes:
    """The Python that Inductor wrote for `graph`, compiled, with its C++ kernels named by their files."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    tree = ast.parse(graph.source_code)

    def is_call(node: ast.AST, name: str) -> bool:
        return isinstance(node, ast.Call) and ast.unparse(node.func) == name

    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and is_call(node.value, "AsyncCompile"):
            node.value = ast.copy_location(ast.Name(_LIBRARIES, ast.Load()), node.value)
        elif isinstance(node, ast.Call) and is_call(node, "async_compile.cpp_pybinding"):
            arguments = [ast.literal_eval(each) for each in node.args]
            library: Any = CppPythonBindingsCodeCache.load_pybinding(*arguments).__self__
            if not os.path.exists(library.__file__):  # somebody has emptied the cache since this process loaded it
                CppPythonBindingsCodeCache.cache_clear()
                sys.modules.pop(library.__spec__.name, None)
                library = CppPythonBindingsCodeCache.load_pybinding(*arguments).__self__
            places = [library.__spec__.name, library.__file__]
            node.args = [ast.copy_location(ast.Constant(each), node) for each in places]
    graph.source_code = ""
    return marshal.dumps(
        compile(ast.fix_missing_locations(tree), f"<esper {graph.cache_key}>", "exec", dont_inherit=True)
    )


_LIBRARIES = "__esper_libraries__"


def load_graph(
    data: bytes, config_patches: Mapping[str, Any], pause: Callable[[], None]
) -> tuple[Callable[[list[Any]], Any], Assumption | None]:
    """What :func:`compile_graph` compiled, as a function of the list of inputs, and what it assumed about sizes.

    For a background thread: the work is done in small pieces, and `pause` is called between them, when the lock of the
    interpreter should be left to others for a moment. Loads machine code: only for bytes from this machine's own
    workers and cache. Raises :class:`StaleVariantError` for code that does not fit this process.
    """
    from torch._functorch import config as functorch_config
    from torch._guards import TracingContext, tracing
    from torch._inductor import config as inductor_config
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.utils import BoxedBool
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    python, version, assumption, code, packed = pickle.loads(data)
    if (python, version) != (sys.version, torch.__version__):
        raise StaleVariantError(f"it was made by torch {version} on Python {python}")
    pause()
    entry, triton_kernels, triton_arguments = pickle.loads(packed)
    _restore_triton_kernels(triton_kernels, triton_arguments)
    pause()
    for part, marshalled in zip((entry.compiled_fw, entry.compiled_bw), code, strict=False):
        _load_ahead(part.result, marshalled, pause)
    entry.guards_expr = None
    patches = {
        name: value for name, value in config_patches.items() if name.startswith(("triton.cudagraph", "graph_p"))
    }
    pause()
    context = TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
    pause()
    with (
        tracing(context),
        inductor_config.patch(patches),
        functorch_config.patch(bundled_autograd_cache=True),
    ):
        kwargs = {
            "cudagraphs": BoxedBool(inductor_config.triton.cudagraphs),
            "boxed_forward_device_index": BoxedDeviceIndex(None),
        }
        compiled: Callable[[list[Any]], Any] = entry.wrap_post_compile([], entry.sanitized_aot_config, kwargs)
    return compiled, assumption


def _restore_triton_kernels(kernels: Mapping[int, Any], arguments: Mapping[int, Any]) -> None:
    if kernels or arguments:
        from torch._dynamo.aot_compile_types import _deserialize_triton_kernel
        from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

        for index, where in kernels.items():
            kernel = _deserialize_triton_kernel(where)
            kernel_side_table.id_to_kernel[index] = kernel
            kernel_side_table.kernel_to_id[kernel] = index
        kernel_side_table.constant_args.update(arguments)


def _load_ahead(graph: Any, marshalled: bytes, pause: Callable[[], None]) -> None:
    """Execute the generated code of `graph` already, and have its own loading find that."""
    namespace = types.ModuleType(f"esper_variant_{graph.cache_key}")
    vars(namespace)[_LIBRARIES] = _Libraries(pause)
    exec(marshal.loads(marshalled), vars(namespace))
    pause()
    _settle_triton_kernels(vars(namespace).values())

    def after_deserialization(constants: Any) -> str:
        vars(namespace).update(constants.unwrap(graph))
        graph.current_callable = namespace.call
        graph.recursively_apply_fns = getattr(namespace, "recursively_apply_fns", None)
        graph.compiled_fn_runner = getattr(namespace, "runner", None)
        return namespace.__name__

    graph.after_deserialization = after_deserialization


def _settle_triton_kernels(values: Iterable[Any]) -> None:
    """Have Triton kernels run the first of their configurations, where none has been measured to be the best before.

    Else the first call, on the thread that trains, would time each of them: 0.4 s were seen on a GPU.
    """
    heuristics = sys.modules.get("torch._inductor.runtime.triton_heuristics")
    if heuristics is None:
        return
    for value in list(values):
        if isinstance(value, heuristics.CachingAutotuner):
            value.launchers = value.launchers[:1]


class _Libraries:
    """Stands for Inductor's `AsyncCompile` in generated code: loads C++ kernels by the path of their library."""

    def __init__(self, pause: Callable[[], None]) -> None:
        from torch._inductor.async_compile import AsyncCompile

        self._others = AsyncCompile()
        self._pause = pause

    def cpp_pybinding(self, name: str, path: str) -> Callable[..., Any]:
        from torch._inductor.codecache import CppPythonBindingsCodeCache

        if not os.path.exists(path):
            raise StaleVariantError(f"the library {path} is gone")
        if _is_cut_short(path):
            raise StaleVariantError(f"the library {path} is cut short")
        _open_library(path)
        library: Any = CppPythonBindingsCodeCache._load_library_inner(path, name.rsplit(".", 1)[0])
        kernel: Callable[..., Any] = library.kernel
        self._pause()
        return kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._others, name)


@contextlib.contextmanager
def _no_library_cut_short() -> Iterator[None]:
    """Have Inductor refuse, as it refuses one that is empty, a library to open which could kill this process."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    libraries: Any = CppPythonBindingsCodeCache
    own = vars(libraries)["_load_library_inner"]

    def checked(cls: Any, path: str, key: str) -> Any:
        if _is_cut_short(path):
            raise ImportError(f"{path}: file cut short", path=path)
        return own.__get__(None, cls)(path, key)

    libraries._load_library_inner = classmethod(checked)
    try:
        yield
    finally:
        libraries._load_library_inner = own


def _is_cut_short(path: str) -> bool:
    """Whether a library ends before its table of sections does, which linkers put last; see elf(5).

    A power cut or a full disk leaves such a file. What is missing of it would be mapped, and raise SIGBUS when read.
    """
    with open(path, "rb") as file:
        header = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if header[:5] != b"\x7fELF\x02":  # no ELF file of 64 bits: the system's loader has to know
        return False
    if len(header) < 64:
        return True
    order = "<" if header[5] == 1 else ">"
    (offset,) = struct.unpack_from(f"{order}Q", header, 40)
    entry, count = struct.unpack_from(f"{order}HH", header, 58)
    return bool(size < offset + entry * count)


def _open_library(path: str) -> None:
    """Have the system load a library without holding the interpreter's lock, as Python's import does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).dlopen(path.encode(), os.RTLD_NOW)


class Flops:
    """Floating-point operations so far, of matrix products, convolutions and attention, two for a product and a sum."""

    total = 0


@contextlib.contextmanager
def counting_flops() -> Iterator[Flops]:
    """Count what this thread computes within, forward and backward, by the formulas of `torch.utils.flop_counter`.

    What is run for its shapes alone, on the meta device, computes nothing.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    flops = Flops()

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # else each operation passes through a function of Dynamo's, which takes as long as it does

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            formula = flop_registry.get(func._overloadpacket)
            if formula is not None and not (isinstance(out, torch.Tensor) and out.is_meta):
                flops.total += formula(*args, **(kwargs or {}), out_val=out)
            return out

    with Counting():  # type: ignore[no-untyped-call]  # as above
        yield flops


def boxed(compiled: Callable[..., Any]) -> Callable[[list[Any]], Any]:
    """`compiled`, which takes inputs one by one, as a function of the list of inputs.

    What AOTAutograd returns puts its inputs into a list for the function inside: that function is taken out, which
    saves a call at each step.
    """
    from torch._dynamo.eval_frame import innermost_fn

    # Dynamo disables itself for what it calls, once for all: `compiled` need not do so again.
    inside = _inside_aot_wrapper(innermost_fn(compiled))
    return (lambda inputs: compiled(*inputs)) if inside is None else inside


def _inside_aot_wrapper(compiled: Callable[..., Any]) -> Callable[[list[Any]], Any] | None:
    code = getattr(compiled, "__code__", None)
    if code is None or code.co_qualname not in (
        "aot_module_simplified.<locals>.forward",
        "deserialize_bundled_cache_entry.<locals>.forward",
    ):
        return None
    cells = dict(zip(code.co_freevars, getattr(compiled, "__closure__", None) or (), strict=True))
    if "compiled_fn" not in cells or ((parameters := cells.get("params_buffers_flat")) and parameters.cell_contents):
        return None
    inside: Callable[[list[Any]], Any] = cells["compiled_fn"].cell_contents
    return inside
