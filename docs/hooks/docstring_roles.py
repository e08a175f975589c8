"""Lets docstrings refer to other names in the way Sphinx does: ``:class:`~esper.configs.EsperConfig` ``.

The reference pages are Markdown, where such a role would stand as it is. Here it becomes a link to the name where a
page has it, and plain code where none does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

__all__ = ["DocstringRoles"]

_ROLE = re.compile(r":(?:class|meth|func|attr|data|mod|exc):`(~?)([\w.]+)`")


class DocstringRoles(griffe.Extension):
    """Rewrites the docstrings of every package that is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called by griffe once a package is loaded whole."""
        for each in _objects(pkg):
            if each.docstring is not None:
                each.docstring.value = _ROLE.sub(lambda match, each=each: _link(each, match), each.docstring.value)


def _objects(owner: griffe.Object) -> Iterator[griffe.Object]:
    yield owner
    for member in owner.members.values():
        if isinstance(member, griffe.Object):
            yield from _objects(member)


def _link(scope: griffe.Object, match: re.Match[str]) -> str:
    short, name = bool(match[1]), match[2]
    shown = name.rpartition(".")[2] if short else name
    target = _resolve(scope, name)
    return f"`{shown}`" if target is None else f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'


def _resolve(scope: griffe.Object, name: str) -> str | None:
    """The full name that `name` means where `scope` is defined: absolute, a sibling, or imported there."""
    if name.startswith(("esper.", "esper_passes.")):
        return name
    first, dot, rest = name.partition(".")
    if isinstance(scope, griffe.Function | griffe.Attribute) and scope.parent is not None:
        scope = scope.parent
    try:
        return scope.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        return None
