"""Attachments: a kernel's forward and backward as machine code for one toolchain and hardware.

The payload is one line of JSON, how fast the code was where it was compiled, and then what Inductor compiled, for any
number of rows, with gradients for the input, the host output (where the kernel reads it) and every parameter. Signing,
naming and storing are in `esper.artifacts.attachment`. Here a payload is made, and given to a kernel: it is read only
once its signature is verified, and unpacked, which loads machine code, only where it was measured to be of use.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

from esper import torch_internals
from esper.artifacts import Attachment, AttachmentError, Target
from esper.artifacts.document import canonical_json, parse_json
from esper.compiler.attachment_code import load_attachment
from esper.compiler.attachment_trial import try_attachment
from esper.execution.background import waiting
from esper.execution.kernels.loaded_kernel import CompiledAttachment, LoadedKernel
from esper.execution.sources import KernelSource
from esper.logs import SayOnce

__all__ = ["attach_from", "read_payload", "with_latencies"]

_LOG = logging.getLogger("esper.compiler")
_say_once = SayOnce(_LOG)
_in_use: WeakValueDictionary[str, CompiledAttachment] = WeakValueDictionary()
"""By the digest of a payload: kernels of one structure have the same code, which is unpacked once."""
_WORTH_WHILE = 0.95  # of the graph's time, at most: what decides whether compiled code runs takes time, too


def with_latencies(compiled_code: bytes, latencies: Sequence[tuple[int, float, float]]) -> bytes:
    """The payload of an attachment.

    `latencies` has, for ascending numbers of rows, the time of one forward without gradients: of the kernel's graph,
    and of the compiled code.
    """
    return canonical_json({"latencies": [list(each) for each in latencies]}).encode() + b"\n" + compiled_code


def read_payload(payload: bytes) -> tuple[list[tuple[int, bool]], bytes]:
    """For which numbers of rows the code of a payload is faster than the graph, and the code.

    Check the signature first. Raises `AttachmentError` for what an earlier version of Esper made.
    """
    line, end, compiled_code = payload.partition(b"\n")
    if not end or not line.startswith(b"{"):
        raise AttachmentError("it does not say how fast it is: it was made by an earlier version of Esper")
    fields: Any = parse_json(line, "the latencies", AttachmentError)
    measured = [(rows, compiled < _WORTH_WHILE * graph) for rows, graph, compiled in fields["latencies"]]
    return sorted(measured), compiled_code


def attach_from(source: KernelSource, kernel: LoadedKernel) -> None:
    """Give `kernel` its compiled attachment, if `source` has one of use for this toolchain and hardware.

    It is of use if a trusted key signed it and it was measured to be faster than the kernel's graph for some number of
    rows. Any other, and one that cannot be had or unpacked for whatever reason, is as good as none: the graph runs, and
    the log says why. For background threads: it may fetch. Code is not loaded before a forward could use it.
    """
    if kernel.attached or kernel.template.is_best_alone(kernel.device):
        return
    name = f"kernel {kernel.artifact_id[:12]}"
    try:
        target = Target.current(str(kernel.device.type))
        with waiting():
            packed = source.attachment(kernel.artifact_id, target.key)
        trust = source.trust()
        if packed is None or trust is None:
            _say_once(logging.INFO, f"{name} has no attachment for this machine: eager models run its graph")
            return
        attachment = Attachment.unpack(packed)
        if (attachment.artifact_id, attachment.target.key) != (kernel.artifact_id, target.key):
            raise AttachmentError("it was made for another kernel or another machine")
        attachment.verify(trust)
        measured, compiled_code = read_payload(attachment.payload)
    except Exception as error:  # noqa: BLE001  # the kernel's graph runs, which is never worse than slower
        _say_once(logging.WARNING, f"the attachment of {name} is not used, its graph runs: {error}")
        return
    made = CompiledAttachment(measured, unpack=lambda into: _unpack_soon(into, compiled_code, name))
    compiled = _in_use.setdefault(f"{target.key} {hashlib.sha256(attachment.payload).hexdigest()}", made)
    if compiled.gains:
        kernel.attach(compiled)
    else:
        kernel.template.leave_alone(kernel.device)
        _say_once(logging.INFO, f"the attachment of {name} is no faster than its graph: eager models run the graph")


def _unpack_soon(attachment: CompiledAttachment, compiled_code: bytes, name: str) -> None:
    """Have a thread set `attachment.call`, after another process has tried it."""

    def unpack() -> None:
        try:
            try_attachment(compiled_code)
            with torch_internals.without_collections():  # this imports Inductor
                attachment.call = load_attachment(compiled_code)
        except Exception as error:  # noqa: BLE001  # the kernel's graph runs, which is never worse than slower
            _say_once(logging.WARNING, f"the attachment of {name} is not used, its graph runs: {error}")

    try:
        threading.Thread(target=unpack, name="esper-attachment", daemon=True).start()
    except RuntimeError as error:  # no thread to be had
        _say_once(logging.WARNING, f"the attachment of {name} is not used, its graph runs: {error}")
