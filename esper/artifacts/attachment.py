"""Attachments: a kernel's compiled code for one toolchain and hardware, signed together with the artifact's id.

Only the format: nothing here runs or deserialises a payload. Layout: magic, 4 bytes little-endian header length,
canonical JSON header, payload. Attachments lie beside artifacts and are never part of an artifact's id.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import device as torch_device

from esper.artifacts.container import ID_PATTERN
from esper.artifacts.document import Json, JsonReader, canonical_json, parse_json
from esper.artifacts.errors import AttachmentError, UntrustedArtifactError
from esper.artifacts.signing import Signature, SigningKey, TrustStore, attachment_message

__all__ = ["Attachment", "Target"]

_MAX_ATTACHMENT_BYTES = 2**28
_MAGIC = b"ESPERATT\x01"
_MAX_HEADER = 65536
_FIELDS = ("torch", "python", "compiler", "device", "options")


@dataclass(frozen=True, slots=True)
class Target:
    """What machine code was compiled with and for; code runs only where all of it is equal.

    `options` is canonical JSON of the compiler's options.
    """

    torch: str
    python: str
    compiler: str
    device: str
    options: str = "{}"

    @property
    def key(self) -> str:
        """A file name: readable parts, then a digest of everything."""
        digest = hashlib.sha256(canonical_json(self.to_json()).encode()).hexdigest()[:16]
        readable = "-".join((self.torch, self.python, self.compiler, self.device))
        return f"{re.sub(r'[^A-Za-z0-9.]+', '_', readable)[:96].strip('._')}-{digest}"

    def to_json(self) -> dict[str, Json]:
        """The fields as plain JSON."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def current(
        cls, device: str | torch_device = "cpu", options: Mapping[str, Json] | None = None, compiler: str = "inductor"
    ) -> Target:
        """This process's toolchain, and the hardware behind `device`. For a GPU this initialises its runtime."""
        return cls(
            torch=torch.__version__,
            python=f"{sys.implementation.name}{sys.version_info.major}.{sys.version_info.minor}",
            compiler=compiler,
            device=_describe(torch.device(device)),
            options=canonical_json(dict(options or {})),
        )


def _describe(device: torch.device) -> str:
    """Names hardware as finely as compiled code depends on it."""
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability().lower()
        return f"cpu.{platform.system().lower()}.{platform.machine()}.{capability}.{_cpu_flags_digest()}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        runtime = torch.version.cuda or torch.version.hip
        return f"cuda{runtime}.sm{major}{minor}.{platform.system().lower()}.{platform.machine()}.{_cpu_flags_digest()}"
    return f"{device.type}.{platform.system().lower()}.{platform.machine()}"


@functools.cache
def _cpu_flags_digest() -> str:
    """Inductor compiles with -march=native: every instruction set of the processor counts, not just vectors."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            flags = next((line for line in file if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        flags = platform.processor()
    words = " ".join(sorted(flags.partition(":")[2].split())) or flags
    return hashlib.sha256(words.encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class Attachment:
    """Compiled code for one artifact and one target."""

    artifact_id: str
    target: Target
    payload: bytes = field(repr=False)
    signature: Signature = field(repr=False)

    @classmethod
    def create(cls, artifact_id: str, target: Target, payload: bytes, key: SigningKey) -> Attachment:
        """Signs `payload` for `artifact_id` and `target` with `key`."""
        message = attachment_message(artifact_id, target.key, hashlib.sha256(payload).hexdigest())
        return cls(artifact_id, target, payload, key.sign(message))

    def verify(self, trust: TrustStore) -> None:
        """Raises :class:`UntrustedArtifactError` unless a trusted key signed artifact, target and payload together."""
        trust.verify(self.message, self.signature)

    @property
    def message(self) -> bytes:
        """What is signed: artifact, target and payload together."""
        return attachment_message(self.artifact_id, self.target.key, hashlib.sha256(self.payload).hexdigest())

    def pack(self) -> bytes:
        """The attachment as bytes."""
        header = canonical_json(
            {
                "artifact_id": self.artifact_id,
                "target": self.target.to_json(),
                "payload_bytes": len(self.payload),
                "signature": self.signature.to_json(),
            }
        ).encode("ascii")
        return b"".join([_MAGIC, len(header).to_bytes(4, "little"), header, self.payload])

    @classmethod
    def unpack(cls, data: bytes, *, max_bytes: int = _MAX_ATTACHMENT_BYTES) -> Attachment:
        """Reads what :meth:`pack` wrote, without trusting it: call :meth:`verify` before using the payload.

        Raises :class:`AttachmentError`.
        """
        if len(data) > max_bytes:
            raise AttachmentError(f"the attachment has {len(data)} bytes, more than {max_bytes}")
        start = len(_MAGIC) + 4
        if not data.startswith(_MAGIC) or len(data) < start:
            raise AttachmentError("these bytes are not an attachment of this version; compile the kernel again")
        length = int.from_bytes(data[len(_MAGIC) : start], "little")
        if length > _MAX_HEADER or start + length > len(data):
            raise AttachmentError(f"the attachment's header claims {length} bytes; it is cut off or not one")
        fields = parse_json(data[start : start + length], "the attachment's header", AttachmentError)
        reader = JsonReader(fields, "attachment", AttachmentError)
        artifact_id = reader.text("artifact_id", ID_PATTERN)
        target = reader.object("target")
        size = reader.integer("payload_bytes")
        signature = reader.text("signature", max_length=4096)
        reader.finish()
        texts = {name: target.text(name, max_length=8192) for name in _FIELDS}
        target.finish()
        payload = data[start + length :]
        if len(payload) != size:
            raise AttachmentError(f"the attachment's payload has {len(payload)} of {size} bytes; fetch it again")
        try:
            return cls(artifact_id, Target(**texts), payload, Signature.from_json(signature))
        except UntrustedArtifactError as cause:
            raise AttachmentError(f"the attachment's signature cannot be read: {cause}") from cause
