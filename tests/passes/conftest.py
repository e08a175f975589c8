"""Graphs that tests show, compared with those in `expected/`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import fx

from tests.passes.graphs import code

_EXPECTED = Path(__file__).with_name("expected")
_ACCEPT = bool(os.environ.get("EXPECTTEST_ACCEPT"))
_SHARES = re.compile(
    r"""
    (\ +)(\w+)\ =\ torch.rsub\((\w+),\ 1\)\n
    \ +(\w+)\ =\ torch.broadcast_to\(\2,\ \((\d+),\ \5\)\)\n
    \ +(\w+)\ =\ torch.ones_like\(\4\)\n
    \ +(\w+)\ =\ torch.tril\(\6\)\n
    \ +(\w+)\ =\ torch.triu\(\4,\ 1\)\n
    \ +(\w+)\ =\ torch.add\(\8,\ \7\)\n
    \ +(\w+)\ =\ torch.prod\(\9,\ 1\)\n
    \ +(\w+)\ =\ torch.mul\(\3,\ \10\)\n
    """,
    re.VERBOSE,
)


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Iterator[Callable[[fx.GraphModule | str], None]]:
    """Compares a graph, or a text, with the next of this test in `expected/<file>.txt`.

    With `EXPECTTEST_ACCEPT=1` it is written there. `mul = shares(pad, 3)` stands for the eight nodes that compute the
    shares of 3 values in a blend; each of them is checked.
    """
    path = _EXPECTED / f"{request.path.stem}.txt"
    sections = _sections(path)
    name = request.node.name
    known = sections.pop(name, [])
    texts: list[str] = []

    def show(graph: fx.GraphModule | str) -> None:
        text = graph if isinstance(graph, str) else code(graph)
        texts.append(_SHARES.sub(r"\1\11 = shares(\3, \5)\n", text))
        if not _ACCEPT:
            expected = known[len(texts) - 1] if len(texts) <= len(known) else ""
            assert texts[-1] == expected, f"see {path.name}; EXPECTTEST_ACCEPT=1 takes what is shown now"

    yield show
    if _ACCEPT:
        sections[name] = texts
        path.write_text("".join(f"=== {each}\n{text}\n" for each in sections for text in sections[each]))
    else:
        assert len(texts) == len(known), f"{path.name} has graphs that {name} does not show"


def _sections(path: Path) -> dict[str, list[str]]:
    """By test, its graphs in order."""
    found: dict[str, list[str]] = {}
    if path.exists():
        parts = re.split(r"^=== (.*)\n", path.read_text(), flags=re.MULTILINE)
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            found.setdefault(name, []).append(text.removesuffix("\n"))
    return found
