"""Ids, prefixes and names of blueprints and kernels, and keys of targets: how they are written, and told apart.

What cannot be one is unknown, and reaches no database, no disk and no path of a URL.
"""

from __future__ import annotations

import re

from esper.services.errors import (
    InvalidNameError,
    UnknownAttachmentError,
    UnknownBlueprintError,
    UnknownKernelReferenceError,
)

__all__ = [
    "MIN_PREFIX",
    "blueprint_id",
    "check_name",
    "is_full_id",
    "is_id_prefix",
    "kernel_id",
    "kernel_reference",
    "target_key",
]

MIN_PREFIX = 12
"""Fewest hex digits of an artifact id that may stand for it."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:[._-][A-Za-z0-9]+)*")
_MAX_NAME = 100
_HEX = re.compile(rf"[0-9a-fA-F]{{{MIN_PREFIX},}}")
_TARGET = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


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


def blueprint_id(text: str) -> str:
    """Raises :class:`UnknownBlueprintError` unless `text` is written like a full id."""
    if not is_full_id(text):
        raise UnknownBlueprintError(f"there is no blueprint {text[:120]!r} in this store; submit it")
    return text


def kernel_id(text: str) -> str:
    """Raises :class:`UnknownKernelReferenceError` unless `text` is written like a full id."""
    if not is_full_id(text):
        raise UnknownKernelReferenceError(f"there is no kernel {text[:120]!r} in this store")
    return text


def kernel_reference(text: str) -> str:
    """Raises :class:`UnknownKernelReferenceError` unless `text` could be an id, the start of one, or a name."""
    if is_full_id(text) or is_id_prefix(text):
        return text
    try:
        return check_name(text)
    except InvalidNameError as cause:
        raise UnknownKernelReferenceError(
            f"no kernel is called {text[:120]!r}; a reference is a full id, its first {MIN_PREFIX} or more hex digits, "
            "or a name that was given at submission"
        ) from cause


def target_key(text: str) -> str:
    """Raises :class:`UnknownAttachmentError` unless `text` could be a target's key."""
    if not _TARGET.fullmatch(text):
        raise UnknownAttachmentError(f"{text[:120]!r} is not the key of a target")
    return text
