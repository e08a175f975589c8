"""A sequence of passes with one callback, from which verification, dumps and timings are built."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from esper_passes._agreement import check_metadata
from esper_passes._subgraphs import bodies
from esper_passes.base import GraphPass, PassError, PassResult

__all__ = ["Callback", "DumpGraphs", "PassEvent", "Pipeline", "Timings", "chain", "verify"]


@dataclass(frozen=True)
class PassEvent:
    """One pass has run. `before` is the graph before it as Python code, or None if the callback did not ask for it.

    A callback asks by having a true attribute `wants_before`. `seconds` is what the pass alone took.
    """

    index: int
    graph_pass: GraphPass
    before: str | None
    graph_module: fx.GraphModule
    modified: bool
    seconds: float


Callback = Callable[[PassEvent], None]


@dataclass(frozen=True)
class Pipeline:
    """Run `passes` in order; after each, `callback`. A pipeline is itself a pass.

    Raises :class:`PassError` if a pass or the callback raises.
    """

    passes: tuple[GraphPass, ...]
    callback: Callback | None = None

    @property
    def name(self) -> str:
        return f"pipeline({', '.join(graph_pass.name for graph_pass in self.passes)})"

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        wants_before = _wants_before(self.callback)
        modified = False
        for index, graph_pass in enumerate(self.passes):
            before = readable(graph_module) if wants_before else None
            try:
                started = time.perf_counter()
                result = graph_pass(graph_module)
                seconds = time.perf_counter() - started
                graph_module = result.graph_module
                modified = modified or result.modified
                if self.callback is not None:
                    self.callback(PassEvent(index, graph_pass, before, graph_module, result.modified, seconds))
            except Exception as error:
                ran_before = [earlier.name for earlier in self.passes[:index]]
                raise PassError(graph_pass.name, ran_before, error) from error
        return PassResult(graph_module, modified)


def verify(event: PassEvent) -> None:
    """Check the graph that a pass left.

    It passes `graph.lint()`, as do the graphs nested in it, and the fake values recorded at its nodes are those that
    they compute. For tests and debugging: it runs the graph on fake tensors. Raises what `lint` raises, or
    `ValueError`.
    """
    _lint(event.graph_module)
    check_metadata(event.graph_module)


def _lint(module: fx.GraphModule) -> None:
    module.graph.lint()
    for body in bodies(module).values():
        _lint(body)


@dataclass(frozen=True)
class DumpGraphs:
    """Write the graph before and after each pass to `directory`, as numbered Python files: `00_name.before.py` ..."""

    directory: Path
    wants_before: bool = field(default=True, init=False, repr=False)

    def __call__(self, event: PassEvent) -> None:
        directory = Path(self.directory)
        directory.mkdir(parents=True, exist_ok=True)
        stem = f"{event.index:02d}_{re.sub(r'[^0-9A-Za-z_]+', '_', event.graph_pass.name).strip('_')}"
        (directory / f"{stem}.before.py").write_text(event.before or "", encoding="utf-8")
        (directory / f"{stem}.after.py").write_text(readable(event.graph_module), encoding="utf-8")


@dataclass
class Timings:
    """Add up the seconds that each pass takes, by name. `str()` is a table. For one thread at a time."""

    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self, event: PassEvent) -> None:
        name = event.graph_pass.name
        self.seconds[name] = self.seconds.get(name, 0.0) + event.seconds

    def __str__(self) -> str:
        width = max(map(len, self.seconds), default=0)
        return "\n".join(f"{name:<{width}}  {seconds * 1e3:9.3f} ms" for name, seconds in self.seconds.items())


@dataclass(frozen=True)
class _Chain:
    callbacks: tuple[Callback, ...]

    @property
    def wants_before(self) -> bool:
        return any(map(_wants_before, self.callbacks))

    def __call__(self, event: PassEvent) -> None:
        for callback in self.callbacks:
            callback(event)


def chain(*callbacks: Callback) -> Callback:
    """One callback that calls `callbacks` in order."""
    return _Chain(callbacks)


def readable(graph_module: fx.GraphModule) -> str:
    """The graph, and those nested in it, as Python code with the shapes that are known."""
    code: str = graph_module.print_readable(print_output=False)
    return code


def _wants_before(callback: Callback | None) -> bool:
    return bool(getattr(callback, "wants_before", False))
