"""The protocol between a process and its compile workers, over a socket.

Every message is a byte that tells what it is, the length of its body in eight bytes, and the body. The process sends
jobs, one at a time; the worker says once that it is ready, and answers each job.
"""

from __future__ import annotations

import struct
from enum import IntEnum

__all__ = ["BUFFER_BYTES", "HEADER", "Kind"]

HEADER = struct.Struct("!BQ")
"""Kind, and length of the body."""

BUFFER_BYTES = 2**20
"""Asked for as the socket's buffer, so that a large body moves in few steps; the system may give less."""


class Kind(IntEnum):
    """What a message is."""

    JOB = 1
    """To the worker; the body is the target's argument."""
    READY = 2
    """From the worker: the target has been imported."""
    UNUSABLE = 3
    """From the worker: the target cannot be imported. The body is the traceback; the worker ends."""
    RESULT = 4
    """From the worker; the body is what the target returned."""
    ERROR = 5
    """From the worker: the target raised. The body is a JSON object of the strings `type`, `message`, `traceback`."""
