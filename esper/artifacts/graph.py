"""A kernel's graph: tensors, nodes and one output, as an immutable value."""

from __future__ import annotations

import builtins
import hashlib
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from esper.artifacts.document import Json, JsonReader, canonical_json
from esper.artifacts.errors import ArtifactGraphError
from esper.artifacts.limits import Limits
from esper.artifacts.operators import MAX_RANK, find_operator

__all__ = ["DTYPES", "HOST", "INPUT", "KernelGraph", "Node", "TensorSpec"]

INPUT = "x"
HOST = "host"
NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}"
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "float64": torch.float64,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
)


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or re.fullmatch(NAME_PATTERN, name) is None:
        raise ArtifactGraphError(f"{what} has the name {str(name)[:80]!r}; a name matches {NAME_PATTERN}")
    if name in (INPUT, HOST):
        raise ArtifactGraphError(f"{what} is called {name!r}, which means an input of the kernel; rename it")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One weight of a kernel: name, shape (no dimension is 0) and dtype (a key of :data:`DTYPES`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        _check_name(self.name, "a tensor")
        if self.dtype not in DTYPES:
            raise ArtifactGraphError(f"tensor {self.name!r} has dtype {self.dtype!r}; use one of {', '.join(DTYPES)}")
        if len(self.shape) > MAX_RANK or any(size < 1 for size in self.shape):
            raise ArtifactGraphError(
                f"tensor {self.name!r} has shape {self.shape}; use at most {MAX_RANK} dimensions, each at least 1"
            )

    @property
    def elements(self) -> int:
        """The number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class Node:
    """One call: an opcode of :data:`~esper.artifacts.operators.OPERATORS`, names of its inputs, and its attributes.

    Attributes are checked and completed with their defaults, so equal calls are equal values.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Json]

    def __post_init__(self) -> None:
        _check_name(self.name, "a node")
        operator = find_operator(self.op, f"node {self.name!r}")
        fewest, most = operator.inputs
        if not fewest <= len(self.inputs) <= most:
            wanted = str(fewest) if fewest == most else f"{fewest} to {most}"
            raise ArtifactGraphError(f"node {self.name!r}: {self.op} takes {wanted} inputs, not {len(self.inputs)}")
        attributes = operator.read_attributes(self.attributes, f"node {self.name!r}")
        object.__setattr__(self, "attributes", attributes)

    def __hash__(self) -> int:
        return hash((self.name, self.op, self.inputs))

    def __reduce__(self) -> tuple[Any, ...]:
        return Node, (self.name, self.op, self.inputs, dict(self.attributes))


@dataclass(frozen=True)
class KernelGraph:
    """A kernel ``[*, in_features] -> [*, out_features]``; nodes stand in the order of execution.

    Nodes read ``"x"`` (the site's input), ``"host"`` (what the site has computed so far, ``[*, out_features]``: its own
    linear output and what the seeds before this one have made of it), tensors, and earlier nodes, by name. Every tensor
    and node is needed for the output. All tensors have the kernel's `dtype`.
    Raises :class:`ArtifactGraphError` when built from anything else; shapes are checked by
    `esper.artifacts.shapes.check_shapes`.
    """

    in_features: int
    out_features: int
    dtype: str
    tensors: tuple[TensorSpec, ...]
    nodes: tuple[Node, ...]
    output: str

    def __post_init__(self) -> None:
        if min(self.in_features, self.out_features) < 1:
            raise ArtifactGraphError(f"features are {self.in_features} -> {self.out_features}; each is at least 1")
        if self.dtype not in DTYPES:
            raise ArtifactGraphError(f"the kernel's dtype is {self.dtype!r}; use one of {', '.join(DTYPES)}")
        for spec in self.tensors:
            if spec.dtype != self.dtype:
                raise ArtifactGraphError(
                    f"tensor {spec.name!r} is {spec.dtype} in a {self.dtype} kernel; use one dtype throughout"
                )
        largest = torch.finfo(DTYPES[self.dtype]).max
        for node in self.nodes:
            for key, value in node.attributes.items():
                if isinstance(value, float) and abs(value) > largest:
                    raise ArtifactGraphError(f"node {node.name!r}: {key} is {value}, more than a {self.dtype} can hold")
        _check_edges(self)

    @property
    def uses_host(self) -> bool:
        """Whether a node reads what the site has computed so far."""
        return any(HOST in node.inputs for node in self.nodes)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of :attr:`tensors`."""
        return tuple(spec.name for spec in self.tensors)

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """A unique Python identifier for each tensor, in their order: the placeholders' and parameters' names."""
        taken = {INPUT, HOST}
        result = []
        for spec in self.tensors:
            base = re.sub(r"\W", "_", spec.name, flags=re.ASCII)
            base = f"p_{base}" if base[0].isdigit() or base[0] == "_" else base
            name, count = base, 0
            while name in taken or name in _RESERVED or keyword.iskeyword(name) or hasattr(builtins, name):
                count += 1
                name = f"{base}_p{count}"
            taken.add(name)
            result.append(name)
        return tuple(result)

    def to_json(self) -> dict[str, Json]:
        """The graph as plain JSON; :meth:`from_json` reads it back."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": self.dtype,
            "tensors": [{"name": spec.name, "shape": spec.shape} for spec in self.tensors],
            "nodes": [
                {"name": node.name, "op": node.op, "inputs": node.inputs, "attributes": dict(node.attributes)}
                for node in self.nodes
            ],
            "output": self.output,
        }

    @classmethod
    def from_json(cls, value: object, path: str = "graph", limits: Limits | None = None) -> KernelGraph:
        """Reads what :meth:`to_json` wrote; raises :class:`ArtifactGraphError` or ``ArtifactLimitError``."""
        limits = limits or Limits()
        reader = JsonReader(value, path, ArtifactGraphError)
        in_features = reader.integer("in_features", 1, limits.max_dimension)
        out_features = reader.integer("out_features", 1, limits.max_dimension)
        dtype = reader.choice("dtype", DTYPES)
        output = reader.text("output")
        tensors = reader.array("tensors", 2**31)
        nodes = reader.array("nodes", 2**31)
        reader.finish()
        limits.check_count(f"the number of {path}.tensors", len(tensors), "max_tensors")
        limits.check_count(f"the number of {path}.nodes", len(nodes), "max_nodes")
        specs = tuple(_read_tensor(each, f"{path}.tensors[{index}]", dtype) for index, each in enumerate(tensors))
        limits.check_shapes({spec.name: spec.shape for spec in specs})
        steps = tuple(_read_node(each, f"{path}.nodes[{index}]") for index, each in enumerate(nodes))
        return cls(in_features, out_features, dtype, specs, steps, output)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the structure: equal for kernels that differ in weights and names only, in the same order."""
        renamed = {name: f"t{index}" for index, name in enumerate(self.tensor_names)}
        renamed |= {node.name: f"n{index}" for index, node in enumerate(self.nodes)}
        structure: Json = {
            "features": (self.in_features, self.out_features),
            "dtype": self.dtype,
            "tensors": tuple(spec.shape for spec in self.tensors),
            "nodes": tuple(
                (node.op, tuple(renamed.get(name, name) for name in node.inputs), dict(node.attributes))
                for node in self.nodes
            ),
            "output": renamed.get(self.output, self.output),
        }
        return hashlib.sha256(canonical_json(structure).encode()).hexdigest()

    def to_fx(self) -> fx.Graph:
        """An fx graph: placeholders ``x``[, ``host``], then :attr:`parameter_names`; one call per node; one output."""
        graph = fx.Graph()
        values = {INPUT: graph.placeholder(INPUT)}
        if self.uses_host:
            values[HOST] = graph.placeholder(HOST)
        for spec, name in zip(self.tensors, self.parameter_names, strict=True):
            values[spec.name] = graph.placeholder(name)
        return _emit(self, graph, values)

    def to_module(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A module of ``forward(x)`` or ``forward(x, host)`` whose parameters, named :attr:`parameter_names`, are
        `tensors`.

        A tensor that is an ``nn.Parameter`` is used itself; any other is detached and wrapped, sharing its memory.
        Raises :class:`ArtifactGraphError` if names or shapes are not exactly those of :attr:`tensors`.
        """
        self.check_tensors(tensors)
        root = nn.Module()
        graph = fx.Graph()
        values = {INPUT: graph.placeholder(INPUT)}
        if self.uses_host:
            values[HOST] = graph.placeholder(HOST)
        for spec, name in zip(self.tensors, self.parameter_names, strict=True):
            tensor = tensors[spec.name]
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
            root.register_parameter(name, parameter)
            values[spec.name] = graph.create_node("get_attr", name, name=name)
        return fx.GraphModule(root, _emit(self, graph, values), class_name="Kernel")

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises :class:`ArtifactGraphError` unless `tensors` has exactly the names and shapes of :attr:`tensors`."""
        missing = sorted(set(self.tensor_names) - set(tensors))
        extra = sorted(set(tensors) - set(self.tensor_names))
        if missing or extra:
            raise ArtifactGraphError(f"tensors do not fit the graph: missing {missing}, not used {extra}")
        for spec in self.tensors:
            if tuple(tensors[spec.name].shape) != spec.shape:
                raise ArtifactGraphError(
                    f"tensor {spec.name!r} has shape {tuple(tensors[spec.name].shape)}, the graph needs {spec.shape}"
                )


_RESERVED = frozenset(dir(fx.GraphModule)) | frozenset(vars(nn.Module())) | {"graph", "meta", "torch", "self"}


def _emit(kernel: KernelGraph, graph: fx.Graph, values: dict[str, fx.Node]) -> fx.Graph:
    """Appends `kernel`'s nodes and output to `graph`; `values` holds its inputs."""
    for node in kernel.nodes:
        operator = find_operator(node.op, f"node {node.name!r}")
        args, kwargs = operator.call(tuple(values[name] for name in node.inputs), node.attributes)
        values[node.name] = graph.call_function(operator.target, args, kwargs)
    graph.output(values[kernel.output])
    return graph


def _read_tensor(value: object, path: str, dtype: str) -> TensorSpec:
    reader = JsonReader(value, path, ArtifactGraphError)
    name, shape = reader.text("name", NAME_PATTERN), reader.integers("shape", 1, 2**63 - 1, MAX_RANK)
    reader.finish()
    return TensorSpec(name, shape, dtype)


def _read_node(value: object, path: str) -> Node:
    reader = JsonReader(value, path, ArtifactGraphError)
    name, op = reader.text("name", NAME_PATTERN), reader.text("op")
    inputs = reader.array("inputs", 256)
    for index, each in enumerate(inputs):
        if not isinstance(each, str) or len(each) > 128:
            raise reader.refuse(f"inputs[{index}]", "the name of an input, a tensor or a node", each)
    attributes = reader.object("attributes") if "attributes" in reader else JsonReader({}, path, ArtifactGraphError)
    reader.finish()
    plain: Any = {key: attributes.value(key) for key in attributes.keys}  # checked by Node
    try:
        return Node(name, op, tuple(str(each) for each in inputs), plain)
    except ArtifactGraphError as cause:
        raise ArtifactGraphError(f"{path}: {cause}") from cause


def _check_edges(graph: KernelGraph) -> None:
    """Unique names; edges only to what came before; everything needed for the output."""
    seen = {INPUT, HOST}
    for spec in graph.tensors:
        if spec.name in seen:
            raise ArtifactGraphError(f"tensor {spec.name!r} is declared twice; names are unique")
        seen.add(spec.name)
    nodes: dict[str, Node] = {}
    for node in graph.nodes:
        if node.name in seen or node.name in nodes:
            raise ArtifactGraphError(f"node {node.name!r} has the name of another value; names are unique")
        nodes[node.name] = node
    for node in graph.nodes:
        for name in node.inputs:
            if name not in seen:
                raise _bad_edge(node, name, nodes)
        seen.add(node.name)
    if graph.output not in nodes:
        raise ArtifactGraphError(f"the output {graph.output[:80]!r} is not a node; name the node that computes it")
    needed = {graph.output}
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(node.inputs)
    unused = [name for name in (*graph.tensor_names, *nodes) if name not in needed]
    if unused:
        raise ArtifactGraphError(f"{', '.join(map(repr, unused[:8]))} does not reach the output; leave it out")


def _bad_edge(node: Node, name: str, nodes: Mapping[str, Node]) -> ArtifactGraphError:
    if name not in nodes:
        return ArtifactGraphError(f"node {node.name!r} reads {name[:80]!r}, which nothing in the graph is called")
    reached, pending = set[str](), [name]
    while pending:
        current = pending.pop()
        if current not in reached and current in nodes:
            reached.add(current)
            pending.extend(nodes[current].inputs)
    if node.name in reached:
        return ArtifactGraphError(
            f"nodes {node.name!r} and {name!r} form a cycle; a kernel is a directed acyclic graph"
        )
    return ArtifactGraphError(f"node {node.name!r} reads {name!r}, which comes later; list nodes in execution order")
