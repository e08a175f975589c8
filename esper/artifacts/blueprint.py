"""Blueprints: descriptions of kernels before compilation, as canonical JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from esper.artifacts.document import Json, JsonReader, canonical_json, near_misses, parse_json
from esper.artifacts.errors import ArtifactError, BlueprintError
from esper.artifacts.families import FAMILIES, MAX_SEED, Norm, Start
from esper.artifacts.graph import KernelGraph
from esper.artifacts.initialisation import INITS, Init, initialise
from esper.artifacts.limits import Limits
from esper.artifacts.shapes import LEADING, check_shapes
from esper.artifacts.weights import check_finite, decode_base64, encode_base64, ordinary_tensors

__all__ = ["Blueprint"]

SCHEMA = 1
GRAPH = "graph"


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A kernel's description: a named family with its options, or (``family="graph"``) nodes of the operator table.

    As JSON, ``{"schema": 1, "family": "bottleneck", "in_features": 8, "out_features": 8, "rank": 2}``, or
    ``{"schema": 1, "family": "graph", "graph": {...}, "tensors": {name: {"init": "kaiming"} | {"base64": "..."}},
    "seed": 0}``. Options are checked and completed with their defaults, so equal content has an equal :attr:`id`.
    Every refusal is a :class:`BlueprintError` with the path of the field.
    """

    family: str
    options: Mapping[str, Json]
    limits: InitVar[Limits | None] = None
    graph: KernelGraph = field(init=False, repr=False)

    @ordinary_tensors()
    def __post_init__(self, limits: Limits | None) -> None:
        limits = limits or Limits()
        reader = JsonReader(self.options, "blueprint", BlueprintError)
        try:
            read = _read_graph(reader, limits) if self.family == GRAPH else _read_family(self.family, reader, limits)
        except BlueprintError:
            raise
        except ArtifactError as cause:
            raise BlueprintError(f"blueprint: {cause}") from cause
        object.__setattr__(self, "options", MappingProxyType(read[0]))
        object.__setattr__(self, "graph", read[1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blueprint) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"Blueprint({self.family}, {self.in_features} -> {self.out_features}, {self.dtype}, id={self.id[:12]})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Blueprint.from_json, (self.to_json(),)

    @classmethod
    def from_json(cls, source: str | bytes | Mapping[str, object], *, limits: Limits | None = None) -> Blueprint:
        """Reads a blueprint from JSON text or from what such text parses to."""
        limits = limits or Limits()
        if isinstance(source, str | bytes):
            most = limits.max_blueprint_bytes
            if len(source) > most:
                raise BlueprintError(f"the blueprint has {len(source)} bytes, but Limits.max_blueprint_bytes is {most}")
            source_object = parse_json(source, "the blueprint", BlueprintError)
        else:
            source_object = source
        reader = JsonReader(source_object, "blueprint", BlueprintError)
        reader.integer("schema", SCHEMA, SCHEMA, SCHEMA)
        family = reader.choice("family", (*FAMILIES, GRAPH))
        options: Any = {key: reader.value(key) for key in reader.keys if key not in ("schema", "family")}
        return cls(family, options, limits)

    @cached_property
    def _canonical(self) -> str:
        return canonical_json({"schema": SCHEMA, "family": self.family, **self.options})

    def to_json(self) -> str:
        """The canonical JSON."""
        return self._canonical

    @cached_property
    def id(self) -> str:
        """Hex SHA-256 of the canonical JSON."""
        return hashlib.sha256(self._canonical.encode("ascii")).hexdigest()

    @property
    def in_features(self) -> int:
        """The size of the kernel's input."""
        return self.graph.in_features

    @property
    def out_features(self) -> int:
        """The size of the kernel's output."""
        return self.graph.out_features

    @property
    def dtype(self) -> str:
        """The dtype of weights and computation, e.g. ``"float32"``."""
        return self.graph.dtype

    @ordinary_tensors()
    def build(self) -> tuple[KernelGraph, dict[str, Tensor]]:
        """The graph and its initial weights on the CPU: bit-identical in every process, whatever torch's own seed."""
        seed = self.options["seed"]
        assert isinstance(seed, int)
        if self.family == GRAPH:
            return self.graph, _graph_weights(self.graph, self.options["tensors"], seed)
        inits = FAMILIES[self.family].graph(self.options)[1]
        return self.graph, {spec.name: initialise(spec, inits[spec.name], seed) for spec in self.graph.tensors}

    @classmethod
    def low_rank(
        cls,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = False,
        start: Start = "identity",
        seed: int = 0,
        dtype: str = "float32",
    ) -> Blueprint:
        """``up(down(x))`` through `rank` features (LoRA; Hu et al. 2021, arXiv:2106.09685)."""
        return cls("low_rank", {name: value for name, value in locals().items() if name != "cls"})

    @classmethod
    def bottleneck(
        cls,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        start: Start = "identity",
        seed: int = 0,
        dtype: str = "float32",
    ) -> Blueprint:
        """``up(activation(down(x)))`` through `rank` features (adapters; Houlsby et al. 2019, arXiv:1902.00751)."""
        return cls("bottleneck", {name: value for name, value in locals().items() if name != "cls"})

    @classmethod
    def gated_mlp(
        cls,
        in_features: int,
        out_features: int,
        hidden: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        start: Start = "identity",
        seed: int = 0,
        dtype: str = "float32",
    ) -> Blueprint:
        """``down(activation(gate(x)) * up(x))`` with `hidden` features (GLU; Shazeer 2020, arXiv:2002.05202)."""
        return cls("gated_mlp", {name: value for name, value in locals().items() if name != "cls"})

    @classmethod
    def residual_mlp(
        cls,
        in_features: int,
        out_features: int,
        hidden: int,
        *,
        depth: int = 1,
        norm: Norm = "layer_norm",
        activation: str = "gelu",
        bias: bool = True,
        start: Start = "identity",
        seed: int = 0,
        dtype: str = "float32",
    ) -> Blueprint:
        """``tail(block(... head(x)))`` of width `hidden`, `depth` blocks ``h + down(activation(up(norm(h))))``."""
        return cls("residual_mlp", {name: value for name, value in locals().items() if name != "cls"})

    @classmethod
    def affine(
        cls,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        start: Start = "identity",
        seed: int = 0,
        dtype: str = "float32",
    ) -> Blueprint:
        """``x @ weight.T + bias``."""
        return cls("affine", {name: value for name, value in locals().items() if name != "cls"})

    @classmethod
    def deepen(
        cls,
        in_features: int,
        out_features: int,
        hidden: int,
        *,
        norm: Norm = "layer_norm",
        activation: str = "gelu",
        bias: bool = True,
        start: Start = "identity",
        seed: int = 0,
        dtype: str = "float32",
    ) -> Blueprint:
        """``down(activation(up(norm(y))))`` of what the site has computed so far, ``y``: a residual layer behind it."""
        return cls("deepen", {name: value for name, value in locals().items() if name != "cls"})

    @classmethod
    def widen(
        cls,
        in_features: int,
        out_features: int,
        hidden: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        start: Start = "identity",
        seed: int = 0,
        dtype: str = "float32",
    ) -> Blueprint:
        """``fan_out(activation(fan_in(x)))``: `hidden` neurons beside a feed-forward block, of its own activation."""
        return cls("widen", {name: value for name, value in locals().items() if name != "cls"})

    @classmethod
    def from_module(
        cls, module: nn.Module, in_features: int, *, dtype: str | None = None, limits: Limits | None = None
    ) -> Blueprint:
        """A blueprint of what `module` computes in its present mode for ``[*, in_features]``, with its weights.

        `dtype` defaults to the parameters' own. The module goes through ``torch.export`` and must return one tensor
        ``[*, out_features]``, each leading position on its own. Buffers and constants become weights, single numbers
        stay numbers. Raises :class:`BlueprintError` naming the operation that is not in the table. Exporting
        traces, which torch cannot do while another thread runs a model.
        """
        from esper.artifacts.module_translation import translate_module  # imports torch.export, which takes a second

        graph, tensors = translate_module(module, in_features, dtype)
        return cls.from_graph(graph, tensors, limits=limits)

    @classmethod
    def from_graph(
        cls, graph: KernelGraph, tensors: Mapping[str, Tensor | Init], *, seed: int = 0, limits: Limits | None = None
    ) -> Blueprint:
        """A blueprint of `graph` whose weights are given, or drawn by one of the initialisations."""
        weights: dict[str, Json] = {
            name: {"base64": encode_base64(value)} if isinstance(value, Tensor) else {"init": value}
            for name, value in tensors.items()
        }
        return cls(GRAPH, {"graph": graph.to_json(), "tensors": weights, "seed": seed}, limits)


def _read_family(name: str, reader: JsonReader, limits: Limits) -> tuple[dict[str, Json], KernelGraph]:
    family = FAMILIES.get(name)
    if family is None:
        raise BlueprintError(f"blueprint.family is {name[:80]!r}; {near_misses(name, (*FAMILIES, GRAPH))}")
    options = family.read_options(reader, limits)
    reader.finish()
    graph, _ = family.graph(options)
    limits.check_shapes({spec.name: spec.shape for spec in graph.tensors})
    return options, graph


def _read_graph(reader: JsonReader, limits: Limits) -> tuple[dict[str, Json], KernelGraph]:
    graph = KernelGraph.from_json(reader.value("graph"), "blueprint.graph", limits)
    weights = reader.object("tensors")
    seed = reader.integer("seed", 0, MAX_SEED, 0)
    reader.finish()
    tensors: dict[str, Json] = {}
    for spec in graph.tensors:
        source = weights.object(spec.name)
        if "base64" in source:
            text = source.text("base64", max_length=limits.max_blueprint_bytes)
            check_finite({spec.name: decode_base64(text, spec, f"{source.path}.base64", BlueprintError)})
            tensors[spec.name] = {"base64": text}
        else:
            tensors[spec.name] = {"init": source.choice("init", INITS)}
        source.finish()
    weights.finish()
    check_shapes(graph, LEADING, limits)
    return {"graph": graph.to_json(), "tensors": tensors, "seed": seed}, graph


def _graph_weights(graph: KernelGraph, sources: Json, seed: int) -> dict[str, Tensor]:
    weights = JsonReader(sources, "blueprint.tensors", BlueprintError)
    result = {}
    for spec in graph.tensors:
        source = weights.object(spec.name)
        if "base64" in source:
            text = source.text("base64", max_length=2**62)
            result[spec.name] = decode_base64(text, spec, f"{source.path}.base64", BlueprintError)
        else:
            init = next(each for each in INITS if each == source.value("init"))
            result[spec.name] = initialise(spec, init, seed)
    return result
