"""One compilation of one graph for one plan, as a value that travels to a compile worker, and what the worker does.

The graph travels with its site markers and the plan beside it, so that the process that trains does none of the work:
applying the plan, propagating shapes and compiling all happen here.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from esper import torch_internals
from esper.artifacts import KernelGraph
from esper.compiler.debug import pass_callback
from esper_passes import (
    AddKernels,
    BatchSeeds,
    ElideDormant,
    FoldFossils,
    GraphPass,
    InlineKernels,
    Pipeline,
    RecordValues,
    SeedGraph,
)

__all__ = ["InputSpec", "SeedSpec", "VariantJob", "run", "specialise"]

_LOG = logging.getLogger("esper.compiler")


@dataclass(frozen=True)
class InputSpec:
    """A tensor that a variant takes besides the graph's own inputs."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> InputSpec:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)


@dataclass(frozen=True)
class SeedSpec:
    """An active seed: its kernel's graph, what its parameters are like, and how it is attached.

    `constant_alpha` is the share of a fossil, which never changes any more.
    """

    graph: KernelGraph
    parameters: tuple[InputSpec, ...]
    isolate: bool
    constant_alpha: float | None = None

    def seed_graph(self) -> SeedGraph:
        """What the passes take."""
        return SeedGraph(self.graph.to_fx(), self.graph.parameter_names, self.graph.uses_host, self.isolate)


@dataclass(frozen=True)
class VariantJob:
    """Everything that a variant depends on.

    `graph` is a packed graph with markers; `seeds` the active ones at its sites, in index order; `shared` and `static`
    are positions of the graph's inputs, see :func:`esper.torch_internals.compile_graph`.
    """

    name: str
    graph: bytes
    seeds: Mapping[int, tuple[SeedSpec, ...]]
    device: torch.device
    shared: frozenset[int]
    static: frozenset[int]
    ambient: torch_internals.Ambient
    batch_seeds: bool

    def pack(self) -> bytes:
        """As bytes for :func:`run`."""
        return pickle.dumps(self)


def specialise(
    module: fx.GraphModule,
    seeds: Mapping[int, Sequence[SeedGraph]],
    constant_alphas: Mapping[int, float],
    added: Sequence[Tensor],
    batch_seeds: bool,
    name: str,
) -> fx.GraphModule:
    """The marked graph `module`, changed into what a variant computes: kernels where seeds are active, no markers.

    `constant_alphas` gives the alphas of fossils by their index among all active seeds; `added` are fake values of the
    inputs that the kernels bring.
    """
    active = {site: tuple(graphs) for site, graphs in seeds.items() if graphs}
    passes: list[GraphPass] = [ElideDormant(frozenset(active))]
    if active:
        passes = [InlineKernels(active, tuple(added)), *passes]
        if constant_alphas or batch_seeds:
            passes.append(RecordValues())
    if constant_alphas:
        passes.append(FoldFossils(constant_alphas))
    if active and batch_seeds:
        passes += [BatchSeeds(), AddKernels()]
    specialised: fx.GraphModule = Pipeline(tuple(passes), pass_callback(name))(module).graph_module
    return specialised


def run(payload: bytes) -> bytes:
    """Do a packed job; returns what :func:`esper.torch_internals.load_graph` loads. In a compile worker only.

    Raises `NotSendableError` for a graph that refers to what only the sender has, and what the compiler raises.
    """
    removed: set[Path] = set()
    while True:
        try:
            return _compiled(payload)
        except Exception as error:
            damaged = _damaged_library(error)
            if damaged is None or damaged in removed:
                raise
            _LOG.warning("a library in Inductor's cache is damaged and made anew: %s", error)
            damaged.unlink(missing_ok=True)
            removed.add(damaged)


def _compiled(payload: bytes) -> bytes:
    job, module = _unpack(payload)
    own = torch_internals.fake_inputs(module.graph)
    seeds = [seed for site in sorted(job.seeds) for seed in job.seeds[site]]
    graphs = {site: [seed.seed_graph() for seed in each] for site, each in job.seeds.items()}
    constants = {i: seed.constant_alpha for i, seed in enumerate(seeds) if seed.constant_alpha is not None}
    with job.ambient.restored():
        added = _fake_extras(seeds, job.device, own)
        module = specialise(module, graphs, constants, added, job.batch_seeds, job.name)
        return torch_internals.compile_graph(module, job.shared, job.static)


def _damaged_library(error: BaseException) -> Path | None:
    """The library in Inductor's cache that could not be loaded, if that is why `error` was raised.

    A compiler that is killed while it links, and a power cut, leave one that is empty or cut short, and Inductor does
    not make again what is there.
    """
    folder = torch_internals.compiler_cache_dir()
    if folder is None:
        return None
    for each in _causes(error):
        if isinstance(each, (ImportError, OSError)):
            named = Path(str(each).partition(":")[0]).resolve()  # the dynamic linker's messages begin with the file
            if named.suffix == ".so" and named.is_relative_to(Path(folder).resolve()):
                return named
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _unpack(payload: bytes) -> tuple[VariantJob, fx.GraphModule]:
    try:
        job: VariantJob = pickle.loads(payload)
        return job, torch_internals.unpack_graph(job.graph)
    except Exception as error:  # almost anything: an operator or a class that the sender's program defines
        raise torch_internals.NotSendableError(f"{type(error).__name__}: {error}") from error


def _fake_extras(seeds: Sequence[SeedSpec], device: torch.device, among: Sequence[Any]) -> list[Tensor]:
    if not seeds:
        return []
    alphas = InputSpec((len(seeds),), (1,), torch.float32, device, False)
    specs = [spec for seed in seeds for spec in seed.parameters] + [alphas]
    return torch_internals.fake_tensors(
        [(spec.shape, spec.stride, spec.dtype, spec.device, spec.requires_grad) for spec in specs], among
    )
