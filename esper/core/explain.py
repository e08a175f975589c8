"""What wrapping did with a model, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Explanation", "LinearRow"]


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One linear layer of the host."""

    name: str
    is_site: bool
    region: str
    """The traced part that runs it, "" for the model's own forward; or how else it runs."""
    reason: str
    """Why it is no site."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """`str()` is a table. `untraced` says for each module that could not be traced whole what stood in the way."""

    rows: tuple[LinearRow, ...]
    regions: tuple[str, ...]
    untraced: Mapping[str, str]

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.rows], default=5)
        lines = [f"{'layer':<{width}}  site  runs in"]
        for row in self.rows:
            note = row.region if row.is_site else row.reason
            lines.append(f"{row.name:<{width}}  {'yes ' if row.is_site else 'no  '}  {note}")
        if not self.rows:
            lines.append("the model has no linear layers")
        for name, reason in self.untraced.items():
            lines.append(f"{name or 'the model'} is not traced whole: {reason}")
        return "\n".join(lines)
