"""Translation of a PyTorch module into the operator table, by way of ``torch.export``."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from esper.artifacts.aten_rules import RULES
from esper.artifacts.errors import ArtifactError, BlueprintError
from esper.artifacts.graph import DTYPES, HOST, INPUT, KernelGraph
from esper.artifacts.graph_builder import GraphBuilder
from esper.artifacts.translation import Translation, Value
from esper.torch_internals import OpOverload

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["translate_module"]

_BATCHES = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97, 101, 103, 107, 109, 113)
_TOLERANCES = {"float64": 1e-8, "float32": 1e-3, "float16": 5e-2, "bfloat16": 1e-1}


def translate_module(module: nn.Module, in_features: int, dtype: str | None) -> tuple[KernelGraph, dict[str, Tensor]]:
    """The graph of `module`, called with ``[batch, in_features]`` in the mode it is in, and the weights it uses.

    The result is run against the module before it is returned. Raises :class:`BlueprintError` naming the first
    operation that is not in the table, or that reads across the leading dimension.
    """
    name = _dtype_of(module, dtype)
    if any(tensor.is_floating_point() and tensor.dtype != DTYPES[name] for tensor in _tensors(module)):
        module = copy.deepcopy(module).to(DTYPES[name])
    device = next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))
    sizes = {in_features, *(size for tensor in _tensors(module) for size in tensor.shape)}
    batch = next((prime for prime in _BATCHES if all(size % prime for size in sizes)), _BATCHES[-1])
    example = torch.zeros(batch, in_features, dtype=DTYPES[name], device=device)
    program = _in_table(_export(module, example))
    graph, tensors = _translate(program, in_features, name, batch)
    _verify(module, graph, tensors, device)
    return graph, tensors


def _tensors(module: nn.Module) -> itertools.chain[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _dtype_of(module: nn.Module, dtype: str | None) -> str:
    if dtype is not None:
        if dtype not in DTYPES:
            raise BlueprintError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
        return dtype
    found = {tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()} or {torch.float32}
    names = [name for name, value in DTYPES.items() if value in found]
    if len(names) != 1 or len(found) != 1:
        raise BlueprintError(
            f"the module's parameters are {', '.join(sorted(map(str, found)))}; pass dtype=, one of {', '.join(DTYPES)}"
        )
    return names[0]


def _export(module: nn.Module, example: Tensor) -> ExportedProgram:
    try:
        return torch.export.export(module, (example,))
    except Exception as cause:  # export runs the module's own code, which may raise anything
        raise BlueprintError(
            f"torch.export cannot trace {type(module).__name__} for {list(example.shape)}: {_first_line(cause)}"
        ) from cause


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _in_table(program: ExportedProgram) -> ExportedProgram:
    """`program` without mutation, and with operations that have no rule decomposed where torch knows how."""
    if any(_is_mutable(node) for node in program.graph.nodes):
        program = program.run_decompositions({})
    known = torch.export.default_decompositions()
    for _ in range(4):
        targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
        table = {target: known[target] for target in targets if target not in RULES and target in known}
        if not table:
            break
        program = program.run_decompositions(table)
    return program


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _translate(
    program: ExportedProgram, in_features: int, dtype: str, batch: int
) -> tuple[KernelGraph, dict[str, Tensor]]:
    output_node = next(node for node in program.graph.nodes if node.op == "output")
    results = output_node.args[0]
    if not isinstance(results, tuple | list) or len(results) != 1 or not isinstance(results[0], fx.Node):
        raise BlueprintError("the module must return one tensor and change no buffer; wrap it in one that does")
    shape = tuple(results[0].meta["val"].shape)
    if len(shape) != 2 or shape[0] != batch:
        raise BlueprintError(
            f"the module maps [{batch}, {in_features}] to {list(shape)}; a kernel maps [*, in] to [*, out]"
        )
    builder = GraphBuilder(in_features, int(shape[1]), dtype)
    translation = Translation(builder, batch, RULES)
    weights = _bind_inputs(program, translation)
    for node in program.graph.nodes:
        if node.op == "call_function":
            translation.step(node)
        elif node.op == "get_attr":
            raise BlueprintError(f"the module uses control flow or a subgraph ({node.target}); write it without")
    value = translation.values[results[0]]
    assert isinstance(value, Value)
    output = translation.name(value)
    if output in (INPUT, HOST) or output in builder.tensor_names:
        output = builder.call("mul_scalar", output, value=1.0)  # an output is a node
    try:
        graph = builder.finish(output)
    except ArtifactError as cause:
        raise BlueprintError(f"the module's graph is not a kernel's: {cause}") from cause
    weights |= translation.constants
    return graph, {name: weights[name].detach().cpu() for name in graph.tensor_names}


def _bind_inputs(program: ExportedProgram, translation: Translation) -> dict[str, Tensor]:
    """Gives every placeholder a value; returns the weights by the name that they get in the graph."""
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    state: Mapping[str, Any] = {**program.state_dict, **program.constants}
    weights: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind == InputKind.USER_INPUT:
            translation.values[node] = Value(tuple(node.meta["val"].shape), True, name=INPUT)
            continue
        if spec.target is None or not isinstance(state.get(spec.target), Tensor):
            raise BlueprintError(f"the module has the input {spec.arg.name!r}, which is not a tensor of its own")
        tensor = state[spec.target]
        if spec.kind == InputKind.PARAMETER:
            name = _unique(spec.target, weights)
            weights[name] = tensor
            translation.builder.tensor(name, tuple(tensor.shape))
            translation.values[node] = Value(tuple(tensor.shape), False, name=name)
        else:
            translation.values[node] = Value(
                tuple(tensor.shape), False, constant=tensor.detach(), hint=_safe(spec.target)
            )
    return weights


def _unique(target: str, taken: Mapping[str, object]) -> str:
    base = _safe(target)
    names = itertools.chain([base], (f"{base}_{count}" for count in itertools.count(1)))
    return next(name for name in names if name not in taken)


def _safe(target: str) -> str:
    """`target` as a tensor's name."""
    name = re.sub(r"[^A-Za-z0-9_.\-]", "_", target)[-112:].lstrip(".-")
    return f"{name}_" if name in (INPUT, HOST, "") else name


def _verify(module: nn.Module, graph: KernelGraph, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Raises unless kernel and module agree on a batch of another size than the one that was traced."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    drawn = torch.randn(3, graph.in_features, generator=generator, dtype=torch.float64, device="cpu")
    sample = drawn.to(DTYPES[graph.dtype])
    with torch.no_grad():
        try:
            expected = module(sample.to(device)).cpu()
        except Exception as cause:  # the module's own code may raise anything
            raise BlueprintError(f"the module fails for another batch size: {_first_line(cause)}") from cause
        kernel = graph.to_module({name: tensor.to(device) for name, tensor in tensors.items()})
        actual = kernel(sample.to(device)).cpu()
    tolerance = _TOLERANCES[graph.dtype]
    if expected.shape != actual.shape or not torch.allclose(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    ):
        raise BlueprintError(
            f"{type(module).__name__} computes something else for other batch sizes or at random; a kernel is a pure "
            "function of each leading position"
        )
