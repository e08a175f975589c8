"""Reading files that somebody else may have put there: looked at before they are read.

A named pipe would be waited for, and a file of gigabytes, which takes no room on the disk if it is sparse, would be
taken into memory.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

__all__ = ["open_regular", "read_regular"]

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)


def open_regular(path: str | os.PathLike[str], most_bytes: int) -> BinaryIO:
    """`path`, open for reading. Raises `OSError` if it is not a file of at most `most_bytes`, and waits for nothing.

    `errno` is ``EINVAL`` for what is no regular file, and ``EFBIG`` for one that is too large.
    """
    descriptor = os.open(path, _FLAGS)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size <= most_bytes:
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, more than {most_bytes}", os.fspath(path))
    raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))


def read_regular(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """All of the file. Raises as :func:`open_regular` does, also if it has grown to more than `most_bytes` since."""
    with open_regular(path, most_bytes) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes} bytes", os.fspath(path))
    return data
