"""Keys, signatures and the trust store."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from esper.artifacts import (
    ArtifactError,
    Signature,
    SigningKey,
    SigningKeyError,
    TrustStore,
    UntrustedArtifactError,
    artifact_message,
    attachment_message,
    key_id,
)
from tests.services.programs import race

ID = "ab" * 32
OTHER = "cd" * 32


def test_sign_and_verify() -> None:
    key = SigningKey.generate()
    trust = TrustStore([key.public_bytes])
    signature = key.sign(b"message")
    trust.verify(b"message", signature)
    assert signature.key_id == key.key_id == key_id(key.public_bytes)
    assert key.key_id in trust
    assert len(trust) == 1
    assert key.sign(b"message") == signature
    for wrong in (b"massage", b"", b"message\0"):
        with pytest.raises(UntrustedArtifactError, match="does not fit the content"):
            trust.verify(wrong, signature)
    for value in (bytes(64), b"", signature.value[:-1], signature.value + b"\0"):
        with pytest.raises(UntrustedArtifactError, match="does not fit the content"):
            trust.verify(b"message", Signature(key.key_id, value))


def test_stranger_and_borrowed_key_id() -> None:
    key, stranger = SigningKey.generate(), SigningKey.generate()
    trust = TrustStore([key.public_bytes])
    with pytest.raises(UntrustedArtifactError, match=f"by key {stranger.key_id[:12]}, which is not trusted"):
        trust.verify(b"message", stranger.sign(b"message"))
    with pytest.raises(UntrustedArtifactError, match="does not fit the content"):
        trust.verify(b"message", Signature(key.key_id, stranger.sign(b"message").value))


def test_signature_json() -> None:
    signature = SigningKey.generate().sign(b"message")
    assert Signature.from_json(signature.to_json()) == signature
    assert Signature.from_json(signature.to_json().encode()) == signature


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{}", "signature.key_id is missing"),
        ("[]", "must be an object"),
        ('{"key_id": "abc", "value": ""}', "signature.key_id must be a string that matches"),
        (f'{{"key_id": "{ID}", "value": "AAAA"}}', "has 3 bytes; an Ed25519 signature has 64"),
        (f'{{"key_id": "{ID}", "value": "!!!!"}}', "is not base64"),
        (f'{{"key_id": "{ID}", "value": "", "algorithm": "none"}}', "unknown key 'algorithm'"),
        ("x" * 5000, "a signature of 5000 bytes"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_bad_signature_json(text: str | bytes, message: str) -> None:
    with pytest.raises(UntrustedArtifactError, match=message):
        Signature.from_json(text)


def test_messages_are_separated_by_purpose_and_fields() -> None:
    messages = {
        artifact_message(ID),
        artifact_message(OTHER),
        attachment_message(ID, "key", OTHER),
        attachment_message(OTHER, "key", ID),
        attachment_message(ID, "ke", OTHER),
        attachment_message(ID, "", OTHER),
    }
    assert len(messages) == 6
    for bad in ("", "ab", ID.upper(), ID + "00", "zz" * 32):
        with pytest.raises(UntrustedArtifactError, match="is not a SHA-256"):
            artifact_message(bad)
        with pytest.raises(UntrustedArtifactError, match="is not a SHA-256"):
            attachment_message(ID, "key", bad)


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "signing.pem"
    key = SigningKey.generate()
    key.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SigningKey.load(path).public_bytes == key.public_bytes
    assert SigningKey.load(str(path)).sign(b"m") == key.sign(b"m")
    other = SigningKey.generate()
    other.save(path)
    assert SigningKey.load(path).key_id == other.key_id
    assert os.listdir(tmp_path) == ["signing.pem"]


def test_mode_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        SigningKey.generate().save(tmp_path / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_failed_save_keeps_the_old_key_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "key"
    key = SigningKey.generate()
    key.save(path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SigningKeyError, match=r"cannot write the signing key .*No space left"):
        SigningKey.generate().save(path)
    assert os.listdir(tmp_path) == ["key"]
    assert SigningKey.load(path).key_id == key.key_id


@pytest.mark.skipif(os.name != "posix", reason="file modes")
@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o666])
def test_refuses_keys_that_others_reach(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    SigningKey.generate().save(path)
    path.chmod(mode)
    with pytest.raises(SigningKeyError, match=f"has mode {mode:04o}; make it private: chmod 600"):
        SigningKey.load(path)


def test_refuses_files_that_are_no_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(SigningKeyError, match="cannot read the signing key"):
        SigningKey.load(path)
    path.touch(0o600)
    for content in (b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"):
        path.write_bytes(content)
        with pytest.raises(SigningKeyError, match="is not an unencrypted PEM private key"):
            SigningKey.load(path)
    pem = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(pem)
    with pytest.raises(SigningKeyError, match="not Ed25519"):
        SigningKey.load(path)
    with pytest.raises(SigningKeyError, match="cannot write the signing key"):
        SigningKey.generate().save(tmp_path / "missing" / "key")


def test_load_or_create_keeps_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    first = SigningKey.load_or_create(path)
    assert SigningKey.load_or_create(path).key_id == first.key_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def key_at(barrier: threading.Barrier, path: Path) -> str:
    barrier.wait()
    return SigningKey.load_or_create(path).key_id


def test_processes_that_race_agree_on_one_key(tmp_path: Path) -> None:
    assert len(set(race(key_at, [(tmp_path / "key",)] * 3))) == 1
    assert os.listdir(tmp_path) == ["key"]


def test_private_key_is_not_shown() -> None:
    key = SigningKey.generate()
    assert repr(key) == f"SigningKey({key.key_id[:12]})"


def test_trust_store_refuses_what_is_no_key() -> None:
    for public in (b"", b"short", bytes(33), "a" * 32):
        with pytest.raises(SigningKeyError, match="32 raw bytes"):
            TrustStore([public])  # type: ignore[list-item]  # a string is one of the mistakes
    key = SigningKey.generate()
    assert repr(TrustStore([key.public_bytes])) == f"TrustStore({key.key_id[:12]})"
    assert issubclass(SigningKeyError, ArtifactError)
