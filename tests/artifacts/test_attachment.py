"""Attachments and targets."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from esper.artifacts import (
    ArtifactError,
    Attachment,
    AttachmentError,
    SigningKey,
    Target,
    TrustStore,
    UntrustedArtifactError,
)

KEY = SigningKey.generate()
TRUST = TrustStore([KEY.public_bytes])
ID = "ab" * 32
TARGET = Target("2.13.0", "cpython3.11", "inductor", "cpu.linux.x86_64.avx2.00000000", '{"mode":"default"}')
PAYLOAD = bytes(range(256)) * 4
ATTACHMENT = Attachment.create(ID, TARGET, PAYLOAD, KEY)
PACKED = ATTACHMENT.pack()


def test_round_trip() -> None:
    unpacked = Attachment.unpack(PACKED)
    assert unpacked == ATTACHMENT
    assert unpacked.payload == PAYLOAD
    assert unpacked.target == TARGET
    unpacked.verify(TRUST)
    assert unpacked.pack() == PACKED
    empty = Attachment.create(ID, TARGET, b"", KEY)
    assert Attachment.unpack(empty.pack()) == empty
    assert "payload" not in repr(ATTACHMENT)


def test_signature_covers_artifact_target_and_payload() -> None:
    for changes in (
        {"artifact_id": "cd" * 32},
        {"payload": PAYLOAD + b"\0"},
        {"payload": b""},
        {"target": dataclasses.replace(TARGET, torch="2.13.1")},
        {"target": dataclasses.replace(TARGET, options="{}")},
        {"signature": KEY.sign(b"something else")},
    ):
        other = dataclasses.replace(ATTACHMENT, **changes)
        with pytest.raises(UntrustedArtifactError, match="does not fit the content"):
            other.verify(TRUST)
    with pytest.raises(UntrustedArtifactError, match="not trusted"):
        Attachment.create(ID, TARGET, PAYLOAD, SigningKey.generate()).verify(TRUST)
    with pytest.raises(UntrustedArtifactError, match="not trusted"):
        ATTACHMENT.verify(TrustStore())


def test_truncated_at_any_byte() -> None:
    for length in range(len(PACKED)):
        with pytest.raises(AttachmentError):
            Attachment.unpack(PACKED[:length])


def test_any_flipped_bit_is_noticed() -> None:
    for position in range(len(PACKED)):
        flipped = bytearray(PACKED)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(ArtifactError):
            Attachment.unpack(bytes(flipped)).verify(TRUST)


def repacked(change: Any, payload: bytes = PAYLOAD) -> bytes:
    start = PACKED.index(b"{") - 4
    length = int.from_bytes(PACKED[start : start + 4], "little")
    header = json.loads(PACKED[start + 4 : start + 4 + length])
    change(header)
    encoded = json.dumps(header).encode()
    return PACKED[:start] + len(encoded).to_bytes(4, "little") + encoded + payload


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an attachment of this version"),
        (b"ESPERATT\x02" + PACKED[9:], "not an attachment of this version; compile the kernel again"),
        (b"ESPERATT\x01" + b"\xff" * 4, "header claims 4294967295 bytes"),
        (repacked(lambda h: h.update(more=1)), "unknown key 'more'"),
        (repacked(lambda h: h.pop("target")), "attachment.target is missing"),
        (repacked(lambda h: h["target"].pop("device")), "attachment.target.device is missing"),
        (repacked(lambda h: h["target"].update(os="x")), "attachment.target has the unknown key 'os'"),
        (repacked(lambda h: h["target"].update(torch=2)), "attachment.target.torch must be a string"),
        (repacked(lambda h: h.update(artifact_id="../x")), "attachment.artifact_id must be a string that matches"),
        (repacked(lambda h: h.update(signature="{}")), "signature cannot be read: signature.key_id is missing"),
        (repacked(lambda h: h.update(payload_bytes=-1)), "attachment.payload_bytes must be"),
        (repacked(lambda h: None, PAYLOAD + b"\0"), "payload has 1025 of 1024 bytes"),
    ],
)
def test_refuses_what_is_no_attachment(data: bytes, message: str) -> None:
    with pytest.raises(AttachmentError, match=message):
        Attachment.unpack(data)


def test_size_is_capped() -> None:
    with pytest.raises(AttachmentError, match="more than 100"):
        Attachment.unpack(PACKED, max_bytes=100)


def test_target_keys_are_file_names_and_tell_targets_apart() -> None:
    fields = ("torch", "python", "compiler", "device", "options")
    hostile = [dataclasses.replace(TARGET, **{name: "../../a b\n\\:*?é" * 40}) for name in fields]
    keys = [target.key for target in (TARGET, *hostile)]
    assert len(set(keys)) == 6
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}", key) for key in keys)
    assert TARGET.key == "2.13.0_cpython3.11_inductor_cpu.linux.x86_64.avx2.00000000-" + TARGET.key[-16:]
    shifted = Target("a", "bc", "d", "e"), Target("ab", "c", "d", "e")
    assert shifted[0].key != shifted[1].key


def test_current_target_names_toolchain_hardware_and_options() -> None:
    target = Target.current()
    assert target == Target.current("cpu", {})
    assert target.device.startswith("cpu.")
    assert target.python.startswith(("cpython3", "pypy3"))
    assert target.options == "{}"
    options = Target.current(options={"b": 1, "a": True})
    assert options == Target.current(options={"a": True, "b": 1})
    assert options.options == '{"a":true,"b":1}'
    assert options.key != target.key
