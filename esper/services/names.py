"""Names that people give to blueprints and kernels, and how to tell them from ids."""

from __future__ import annotations

import re

from esper.services.errors import InvalidNameError

__all__ = ["MIN_PREFIX", "check_name", "is_full_id", "is_id_prefix"]

MIN_PREFIX = 12
"""Fewest hex digits of an artifact id that may stand for it."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[._-][A-Za-z0-9]+)*")
_MAX_NAME = 100
_HEX = re.compile(rf"[0-9a-fA-F]{{{MIN_PREFIX},}}")


def check_name(name: str) -> str:
    """`name`, if it can be taken for neither an id nor a path.

    A name is at most 100 characters: a letter, then letters and digits, with single dots, dashes or underscores between
    them; and not 12 or more hex digits alone. Raises :class:`InvalidNameError`.
    """
    if not isinstance(name, str) or len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise InvalidNameError(
            f"{str(name)[:120]!r} cannot be a name: begin with an ASCII letter and go on with letters and digits, with "
            f"single '.', '-' or '_' between them, {_MAX_NAME} characters at most"
        )
    if _HEX.fullmatch(name):
        raise InvalidNameError(f"{name!r} cannot be a name: it looks like the start of an id; add a '-' or a word")
    return name


def is_full_id(reference: str) -> bool:
    """Whether `reference` is written like a whole id: 64 lower-case hex digits."""
    return re.fullmatch(r"[0-9a-f]{64}", reference) is not None


def is_id_prefix(reference: str) -> bool:
    """Whether `reference` is written like the start of an id: 12 to 63 hex digits."""
    return _HEX.fullmatch(reference) is not None and len(reference) < 64
