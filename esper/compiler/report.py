"""The compile report of a model: its graphs, their variants, where each came from, and what that took."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from esper.compiler.variant_store import StoreStatistics
from esper.notebook import html_table

__all__ = ["CompileReport", "GraphReport", "Origin", "VariantReport", "WorkerCounters"]

Origin = Literal["host compile", "worker", "store", "in process", "uncompiled"]
"""How a variant came about: by Dynamo's own call of the backend, as for any backend; by a compile worker; from the
store on disk; by a compilation in the training process; not at all, so that the graph runs as it is."""

_WIDTH = 100
_PLAN_WIDTH = 44
_COLUMNS = f"{{:<2}}{{:<{_PLAN_WIDTH}}}  {{:<12}}  {{:>9}}  {{:>9}}  "
_NOTE_INDENT = 6
_SHOWN_SITES = 12
_PLAN_LINES = 4


@dataclass(frozen=True, slots=True)
class VariantReport:
    """One variant of a graph."""

    plan: str
    """"dormant", or for each site the digests of its active kernels' graphs: "fc1[3fa9c1d2e4b5]; head[...]"."""
    origin: Origin
    seconds: float | None
    """What making it took: compiling, or loading from the store. None if that was not measured."""
    size_bytes: int | None
    """Bytes of its compiled code as stored or sent; None if it was never serialised."""
    reason: str
    """Why it came about in another way than usual, or ""."""
    in_force: bool
    """Whether the next call runs it."""


@dataclass(frozen=True, slots=True)
class GraphReport:
    """One graph that Dynamo captured, and its variants."""

    name: str
    sites: tuple[str, ...]
    """Dotted names of the sites in it, in the order of the calls."""
    inner: str
    """The inner compiler."""
    variants: tuple[VariantReport, ...]
    waiting: int
    """Variants that are being compiled or wait for it."""


@dataclass(frozen=True, slots=True)
class WorkerCounters:
    """What the compile workers of this process have done, for all models together."""

    done: int = 0
    failed: int = 0
    crashes: int = 0
    restarts: int = 0
    timeouts: int = 0


@dataclass(frozen=True, slots=True)
class CompileReport:
    """What the compiler did. `str()` is a table, `*` marking the variants in force; `to_dict()` is for JSON.

    The table names the first sites of a graph and the first seeds of a long plan, and shows blocks that share a graph
    once, with the plan of the first, where they fare alike; `to_dict()` has all.

    `workers` is None if no compile worker was needed, `store` if compiled variants are not kept on disk; both count for
    the whole process.
    """

    graphs: tuple[GraphReport, ...]
    workers: WorkerCounters | None = None
    store: StoreStatistics | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same as dictionaries, lists, texts and numbers."""
        return {
            "graphs": [
                {**asdict(graph), "sites": list(graph.sites), "variants": [asdict(each) for each in graph.variants]}
                for graph in self.graphs
            ],
            "workers": None if self.workers is None else asdict(self.workers),
            "store": None if self.store is None else asdict(self.store),
        }

    def __str__(self) -> str:
        lines: list[str] = []
        for note in _no_graphs(self.graphs):
            lines += [note, ""]
        for alike in _alike(self.graphs):
            lines += [*_graph_lines(alike), ""]
        return "\n".join([*lines, *_counter_lines(self.workers, self.store)]).rstrip()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        tables = [
            html_table(
                _title(alike),
                ("in force", "plan", "origin", "seconds", "KiB", "note"),
                [("*" if each.in_force else "", *_figures(each), each.reason) for each in alike[0].variants],
            )
            for alike in _alike(self.graphs)
        ]
        notes = [*_no_graphs(self.graphs), *_counter_lines(self.workers, self.store)]
        return "".join([*tables, *(f"<p>{html.escape(note)}</p>" for note in notes)])


def _no_graphs(graphs: tuple[GraphReport, ...]) -> list[str]:
    return [] if graphs else ['no graph was compiled with backend="esper"']


def _alike(graphs: Iterable[GraphReport]) -> list[list[GraphReport]]:
    """Reports of one graph that say the same but for the names of the sites, together."""
    found: dict[object, list[GraphReport]] = {}
    for graph in graphs:
        variants = tuple(replace(each, plan=_without_names(each.plan, graph.sites)) for each in graph.variants)
        found.setdefault(replace(graph, sites=(), variants=variants), []).append(graph)
    return list(found.values())


def _without_names(plan: str, sites: tuple[str, ...]) -> str:
    """A plan with the places of sites in their graph for their names."""
    parts = [part.rpartition("[") for part in plan.split("; ")]
    return "; ".join(f"{sites.index(name)}[{seeds}" if name in sites else name + seeds for name, _, seeds in parts)


def _title(alike: Sequence[GraphReport]) -> str:
    graph, sites = alike[0], [site for each in alike for site in each.sites]
    times = f"{len(alike)} times " if len(alike) > 1 else ""
    title = f"{graph.name}, inner compiler {graph.inner}, {times}{_numbered(len(graph.sites), 'site')}"
    if sites:
        others = len(sites) - _SHOWN_SITES
        title += f": {', '.join(sites[:_SHOWN_SITES])}{f' and {others} more' if others > 0 else ''}"
    return title


def _figures(variant: VariantReport) -> tuple[str, str, str, str]:
    """Plan, origin, seconds and KiB."""
    seconds = "" if variant.seconds is None else f"{variant.seconds:.2f}"
    size = "" if variant.size_bytes is None else f"{variant.size_bytes / 1024:.0f}"
    return variant.plan, variant.origin, seconds, size


def _graph_lines(alike: Sequence[GraphReport]) -> list[str]:
    graph, lines = alike[0], _wrapped(_title(alike), indent=2)
    if graph.variants:
        lines.append(_COLUMNS.format("", "plan", "origin", "seconds", "KiB").rstrip())
    for variant in graph.variants:
        lines += _variant_lines(variant)
    if not graph.variants and not graph.waiting:
        lines.append("  no variant yet")
    if graph.waiting:
        lines.append(f"  {_numbered(graph.waiting, 'variant')} being compiled")
    return lines


def _variant_lines(variant: VariantReport) -> list[str]:
    first, *others = _wrapped(variant.plan, width=_PLAN_WIDTH, lines=_PLAN_LINES) or [""]
    mark = "*" if variant.in_force else ""
    lines = [_COLUMNS.format(mark, first, *_figures(variant)[1:]).rstrip()]
    lines += [f"  {other}" for other in others]
    if variant.reason:
        lines += _wrapped(variant.reason, indent=_NOTE_INDENT, first=_NOTE_INDENT)
    return lines


def _counter_lines(workers: WorkerCounters | None, store: StoreStatistics | None) -> list[str]:
    lines = []
    if workers is not None:
        lines.append(f"workers: {_counted(asdict(workers).items())}")
    if store is not None:
        lines.append(f"store:   {_counted(asdict(store).items())}")
    return lines


def _counted(counters: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counters)


def _numbered(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _wrapped(text: str, *, width: int = _WIDTH, indent: int = 0, first: int = 0, lines: int | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=" " * first,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
        max_lines=lines,
        placeholder=" ...",
    )
