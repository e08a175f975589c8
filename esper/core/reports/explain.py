"""The explanation of what wrapping did with a model, and why."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

from esper.notebook import html_table

__all__ = ["Explanation", "LinearRow"]

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One linear layer of the host."""

    name: str
    is_site: bool
    region: str | None
    """Dotted name of the traced part that runs the layer, "" for the whole model; None if none does."""
    note: str
    """Why the layer is no site, or how a site runs that is in no region."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which linear layers carry seeds and what runs them. `str()` is a table.

    `regions` are the dotted names of the parts that were traced and run as generated code; `untraced` says for each
    module that could not be traced whole what stood in the way. Both are empty in `mode="module"`.
    """

    rows: tuple[LinearRow, ...]
    regions: tuple[str, ...]
    untraced: Mapping[str, str]
    compiled: tuple[str, ...] = ()
    """Dotted names of the modules that were compiled by themselves, as by `esper.compile_blocks`; "" for the model."""

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.name) for row in self.rows), 0)
        lines = [f"{'layer':<{width}}  seeds  runs in"]
        for row in self.rows:
            lines.append(f"{row.name:<{width}}  {'yes' if row.is_site else 'no':<5}  {_where(row)}".rstrip())
        if not self.rows:
            lines = ["the model has no linear layers"]
        if self.untraced:
            lines += ["", "not traced whole:"]
            lines += [f"  {name or 'the model'}: {reason}" for name, reason in self.untraced.items()]
        if self.compiled:
            lines += ["", self._compiled()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rows = [(row.name, "yes" if row.is_site else "no", _where(row)) for row in self.rows]
        tables = [html_table("linear layers", ("layer", "seeds", "runs in"), rows)]
        if self.untraced:
            reasons = [(name or "the model", reason) for name, reason in self.untraced.items()]
            tables.append(html_table("not traced whole", ("part", "reason"), reasons))
        if self.compiled:
            tables.append(f"<p>{html.escape(self._compiled())}</p>")
        return "".join(tables)

    def _compiled(self) -> str:
        shown = ", ".join(name or "the model" for name in self.compiled[:_SHOWN])
        others = len(self.compiled) - _SHOWN
        return f"compiled by itself: {shown}{f' and {others} more' if others > 0 else ''}"


def _where(row: LinearRow) -> str:
    if row.region is None:
        return row.note
    return f"the region {row.region!r}" if row.region else "the model's generated code"
