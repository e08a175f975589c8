"""A process that unpacks one attachment: `python -m esper.compiler.attachment_trial PARENT FILE`.

What has to be compiled for it is compiled here, at the lowest priority, and lies in Inductor's cache then; and machine
code that kills the process kills this one.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

from esper.artifacts import AttachmentError
from esper.child_processes import describe_exit, end_with_parent, read_tail, start_child, wait_for_family
from esper.compiler.attachment_code import load_attachment

__all__ = ["main", "try_attachment"]

_NICENESS = 19


def try_attachment(compiled: bytes) -> None:
    """Unpack verified `compiled` code in a process of its own, and wait for it. For background threads.

    Raises `AttachmentError` if it cannot be unpacked, and `ChildStartError`.
    """
    with tempfile.TemporaryDirectory(prefix="esper-attachment-") as folder, tempfile.TemporaryFile() as log:
        path = Path(folder) / "compiled"
        path.write_bytes(compiled)
        arguments = [str(os.getpid()), str(path)]
        child = start_child("esper.compiler.attachment_trial", arguments, log=log, nice=_NICENESS, secrets=False)
        wait_for_family(child)
        if child.stdin is not None:
            child.stdin.close()
        if child.returncode:
            lines = read_tail(log).splitlines() or [""]
            raise AttachmentError(f"a process that unpacked it {describe_exit(child.returncode)}: {lines[-1]}")


def main() -> NoReturn:
    """Unpack the attachment of the file and end."""
    parent, path = int(sys.argv[1]), Path(sys.argv[2])
    end_with_parent(parent)
    load_attachment(path.read_bytes())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: shutting torch down takes time


if __name__ == "__main__":
    main()
