"""Warnings that point to where the user's program called: not into this library, and not into torch, which calls it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

__all__ = ["warn_user"]

_PASSED_OVER = ("esper", "esper_passes", "torch")
_GENERATED = ("<eval_with_key>", "<frozen ")


def warn_user(message: str) -> None:
    """A `UserWarning` at the innermost call in the user's program; on a thread of this library's, where that began.

    What `skip_file_prefixes` does for `warnings.warn` from Python 3.12 on. Filters are asked as ever.
    """
    skipped = tuple(_files())
    frame: FrameType = sys._getframe(1)
    while frame.f_code.co_filename.startswith(skipped) and frame.f_back is not None:
        frame = frame.f_back
    names = frame.f_globals
    registry = names.setdefault("__warningregistry__", {})
    where = frame.f_code.co_filename, frame.f_lineno, names.get("__name__", "<string>")
    warnings.warn_explicit(message, UserWarning, *where, registry)


def _files() -> Iterator[str]:
    """How the names of files begin that are not the user's."""
    yield from _GENERATED
    for name in _PASSED_OVER:
        file = getattr(sys.modules.get(name), "__file__", None)  # not imported for this: settings do without torch
        if file is not None:
            yield f"{Path(file).parent}/"
