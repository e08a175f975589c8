"""Ids, names and targets as they stand in paths. What cannot be one is unknown, and reaches no database and no disk."""

from __future__ import annotations

import re

from esper.services.errors import (
    InvalidNameError,
    UnknownAttachmentError,
    UnknownBlueprintError,
    UnknownKernelReferenceError,
)
from esper.services.names import MIN_PREFIX, check_name, is_full_id, is_id_prefix

__all__ = ["blueprint_id", "kernel_id", "kernel_reference", "target_key"]

_TARGET = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


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
