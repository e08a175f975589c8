"""Ed25519 signatures (RFC 8032) over artifact ids and attachments, and the keys that are trusted.

Messages start with a domain of their own, so a signature made for one purpose never passes for another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from esper.artifacts.document import JsonReader, canonical_json, parse_json
from esper.artifacts.errors import SigningKeyError, UntrustedArtifactError
from esper.file_store import write_whole
from esper.ownership import UnsafePathError, check_own
from esper.regular_files import open_regular

__all__ = ["Signature", "SigningKey", "TrustStore", "artifact_message", "attachment_message", "key_id"]

_SIGNATURE_BYTES = 64
_PUBLIC_BYTES = 32
_MAX_SIGNATURE_JSON = 4096
_MAX_KEY_FILE = 65536


def key_id(public_bytes: bytes) -> str:
    """The name of a public key: the hex SHA-256 of its 32 raw bytes."""
    return hashlib.sha256(public_bytes).hexdigest()


def artifact_message(artifact_id: str) -> bytes:
    """What is signed for an artifact."""
    return b"esper.artifact.v1\0" + _digest(artifact_id)


def attachment_message(artifact_id: str, target_key: str, payload_sha256: str) -> bytes:
    """What is signed for an attachment: the artifact, the target and the payload together."""
    target = target_key.encode()
    return b"".join(
        [
            b"esper.attachment.v1\0",
            _digest(artifact_id),
            len(target).to_bytes(4, "little"),
            target,
            _digest(payload_sha256),
        ]
    )


def _digest(text: str) -> bytes:
    if re.fullmatch(r"[0-9a-f]{64}", text) is None:
        raise UntrustedArtifactError(f"{text[:80]!r} is not a SHA-256 in lower-case hex; pass the full id")
    return bytes.fromhex(text)


@dataclass(frozen=True, slots=True)
class Signature:
    """A detached signature: the signer's :func:`key_id`, and 64 bytes."""

    key_id: str
    value: bytes
    public_key: bytes | None = field(default=None, compare=False)
    """The signer's, for those who keep signatures and trust nobody, such as a store. Says nothing of whom to trust."""

    def to_json(self) -> str:
        """Canonical JSON; :meth:`from_json` reads it back."""
        return canonical_json(self.fields())

    def fields(self) -> dict[str, str]:
        """What :meth:`to_json` writes."""
        fields = {"key_id": self.key_id, "value": base64.b64encode(self.value).decode("ascii")}
        return fields if self.public_key is None else {**fields, "public_key": self.public_key.hex()}

    def fits(self, message: bytes) -> bool:
        """Whether the holder of the key `key_id` signed `message`, as far as can be seen by the public key that is
        given; False if none is."""
        if self.public_key is None or key_id(self.public_key) != self.key_id:
            return False
        try:
            TrustStore([self.public_key]).verify(message, self)
        except UntrustedArtifactError:
            return False
        return True

    @classmethod
    def from_json(cls, text: str | bytes) -> Signature:
        """Raises :class:`UntrustedArtifactError` if `text` is not a signature."""
        if len(text) > _MAX_SIGNATURE_JSON:
            raise UntrustedArtifactError(f"a signature of {len(text)} bytes; one has about 180")
        reader = JsonReader(
            parse_json(text, "the signature", UntrustedArtifactError), "signature", UntrustedArtifactError
        )
        signer, encoded = reader.text("key_id", r"[0-9a-f]{64}"), reader.text("value")
        public = reader.text("public_key", r"[0-9a-f]{64}") if "public_key" in reader.keys else None
        reader.finish()
        try:
            value = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as cause:
            raise UntrustedArtifactError(f"signature.value is not base64: {cause}") from cause
        if base64.b64encode(value).decode("ascii") != encoded:
            raise UntrustedArtifactError(
                "signature.value is not canonical base64; use the standard alphabet and padding"
            )
        if len(value) != _SIGNATURE_BYTES:
            raise UntrustedArtifactError(f"signature.value has {len(value)} bytes; an Ed25519 signature has 64")
        return cls(signer, value, None if public is None else bytes.fromhex(public))


class SigningKey:
    """An Ed25519 private key. Its repr shows the key id only."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id[:12]})"

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SigningKey:
        """Reads a PEM file that belongs to this user, that nobody else may read, and that nobody else can replace.

        Raises :class:`SigningKeyError`, before anything of it is read; see `esper.ownership`.
        """
        try:
            with open_regular(path, _MAX_KEY_FILE) as file:
                _check_private(path, os.fstat(file.fileno()))
                _check_place(path)
                data = file.read(_MAX_KEY_FILE)
        except OSError as cause:
            raise SigningKeyError(f"cannot read the signing key {os.fspath(path)}: {cause.strerror}") from cause
        try:
            key = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as cause:
            raise SigningKeyError(f"{os.fspath(path)} is not an unencrypted PEM private key: {cause}") from cause
        if not isinstance(key, Ed25519PrivateKey):
            raise SigningKeyError(f"{os.fspath(path)} holds a key that is not Ed25519; generate one with SigningKey")
        return cls(key)

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> SigningKey:
        """The key at `path`; a new one is put there if there is none. Processes that race agree on one key."""
        if not os.path.exists(path):
            _check_place(path)
            cls.generate()._write(Path(path), replace=False)
        return cls.load(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the key with mode 0600, whole or not at all, in place of what was there."""
        self._write(Path(path), replace=True)

    def _write(self, path: Path, *, replace: bool) -> None:
        data = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            write_whole(path, data, mode=0o600, durable=True, replace=replace)
        except OSError as cause:
            raise SigningKeyError(f"cannot write the signing key {path}: {cause.strerror}") from cause

    @property
    def public_bytes(self) -> bytes:
        """The raw public key, 32 bytes; what a :class:`TrustStore` takes."""
        return self._key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)

    @property
    def key_id(self) -> str:
        """The public key's :func:`key_id`."""
        return key_id(self.public_bytes)

    def sign(self, message: bytes) -> Signature:
        """A signature over `message`; make messages with :func:`artifact_message` or :func:`attachment_message`."""
        return Signature(self.key_id, self._key.sign(message), self.public_bytes)


def _check_place(path: str | os.PathLike[str]) -> None:
    try:
        check_own(path, f"the signing key {os.fspath(path)}")
    except UnsafePathError as cause:
        raise SigningKeyError(str(cause)) from cause


def _check_private(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if os.name != "posix":
        return
    if status.st_uid != os.geteuid():
        raise SigningKeyError(
            f"the signing key {os.fspath(path)} belongs to the user {status.st_uid}, and this process runs as "
            f"{os.geteuid()}; run as that user, or make a key of your own: esper keys new"
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        raise SigningKeyError(f"the signing key {os.fspath(path)} has mode {mode:04o}; make it private: chmod 600")


class TrustStore:
    """Public keys whose signatures count. Immutable."""

    def __init__(self, public_keys: Iterable[bytes] = ()) -> None:
        keys = {}
        for public in public_keys:
            if not isinstance(public, bytes) or len(public) != _PUBLIC_BYTES:
                raise SigningKeyError("a trusted key is the 32 raw bytes of an Ed25519 public key")
            keys[key_id(public)] = Ed25519PublicKey.from_public_bytes(public)
        self._keys = keys

    def __contains__(self, signer: str) -> bool:
        return signer in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"TrustStore({', '.join(signer[:12] for signer in sorted(self._keys))})"

    @property
    def key_ids(self) -> frozenset[str]:
        """The :func:`key_id` of every key."""
        return frozenset(self._keys)

    def choose(self, message: bytes, signatures: Iterable[Signature]) -> Signature | None:
        """The first of `signatures` over `message` that is by a trusted key and verifies; None if none does."""
        for signature in signatures:
            if signature.key_id in self._keys:
                with suppress(UntrustedArtifactError):
                    self.verify(message, signature)
                    return signature
        return None

    def verify(self, message: bytes, signature: Signature) -> None:
        """Raises :class:`UntrustedArtifactError` unless a trusted key signed `message`."""
        if signature.public_key is not None and key_id(signature.public_key) != signature.key_id:
            raise UntrustedArtifactError("the signature brings another public key than the one that it names")
        key = self._keys.get(signature.key_id)
        if key is None:
            raise UntrustedArtifactError(
                f"the signature is by key {signature.key_id[:12]}, which is not trusted; to trust it, add its "
                "public key (`esper keys show` tells it, where the key is) to platform.trusted_keys"
            )
        try:
            key.verify(signature.value, message)
        except InvalidSignature as cause:
            raise UntrustedArtifactError(
                f"the signature by key {signature.key_id[:12]} does not fit the content; fetch both again"
            ) from cause
