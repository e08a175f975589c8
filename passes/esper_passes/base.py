"""The pass protocol: a value whose fields are its options, and a call from a graph module to a graph module.

A pass changes the graph module that it is given, recompiles it if it changed anything, and returns it. The graph is
valid (`graph.lint()`) before and after, not necessarily between. Graphs nested in it are replaced, not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

__all__ = ["GraphPass", "PassError", "PassResult"]


class GraphPass(Protocol):
    """A graph transformation."""

    @property
    def name(self) -> str:
        """Name for messages, dumps and timings, such as `"elide_dormant"`."""
        ...

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Transform `graph_module`; the result is it, and whether anything changed."""
        ...


class PassError(RuntimeError):
    """A pass, or the callback after it, failed. The cause is chained.

    `pass_name` is the pass, `ran_before` the names of those that had already run, in order.
    """

    def __init__(self, pass_name: str, ran_before: Sequence[str], cause: BaseException) -> None:
        self.pass_name = pass_name
        self.ran_before = tuple(ran_before)
        before = ", ".join(self.ran_before) if self.ran_before else "no other pass"
        super().__init__(f"pass {pass_name!r} failed after {before} had run: {type(cause).__name__}: {cause}")
