"""Graph dumps for `ESPER_DEBUG_DIR`: every graph before and after every pass, as files.

Works alike in the process that trains and in a compile worker, which inherits the variable. Each run of a pipeline gets
a folder of its own: `<ESPER_DEBUG_DIR>/<process id>/<graph>/<number>/`.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from esper.logs import SayOnce
from esper.variables import DEBUG_DIR_VARIABLE
from esper_passes.pipeline import Callback, DumpGraphs, PassEvent, Timings, chain

__all__ = ["pass_callback"]

"""Names the folder for dumps; without it, or if it is empty, nothing is dumped."""

_LOG = logging.getLogger("esper.compiler")
_LONGEST_NAME = 100
_say_once = SayOnce(_LOG)


def pass_callback(graph_name: str) -> Callback | None:
    """A callback for one run of a :class:`esper_passes.Pipeline` on the graph called `graph_name`; None without dumps.

    It writes `00_<pass>.before.py` and `00_<pass>.after.py` for each pass, numbered in the order of the passes, and
    `timings.txt` with what each pass took. A folder that cannot be written is one warning, and no dump.
    """
    directory = os.environ.get(DEBUG_DIR_VARIABLE)
    if not directory:
        return None
    name = re.sub(r"[^\w.-]+", "_", graph_name).strip("._")[:_LONGEST_NAME] or "graph"
    parent = Path(directory).expanduser() / str(os.getpid()) / name
    try:
        folder = _next_numbered(parent)
    except OSError as error:
        _say_unwritable(parent, error)
        return None
    return _Dump(folder)


def _next_numbered(parent: Path) -> Path:
    """A new folder in `parent`, with the next free number; another thread may be looking for one at the same time."""
    parent.mkdir(parents=True, exist_ok=True)
    number = len(os.listdir(parent))
    while True:
        folder = parent / f"{number:03d}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


class _Dump:
    """Dumps and times the passes; one that fails must not fail the compilation."""

    wants_before = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._timings = Timings()
        self._record = chain(DumpGraphs(folder), self._timings)

    def __call__(self, event: PassEvent) -> None:
        try:
            self._record(event)
            (self._folder / "timings.txt").write_text(f"{self._timings}\n", encoding="utf-8")
        except OSError as error:
            _say_unwritable(self._folder, error)


def _say_unwritable(folder: Path, error: OSError) -> None:
    message = f"{DEBUG_DIR_VARIABLE}: graphs cannot be written to {os.environ.get(DEBUG_DIR_VARIABLE)}"
    where = f"{folder}: {error.strerror or error}"
    _say_once(logging.WARNING, f"{message} ({where}); name a folder that can be written", reason=message)
