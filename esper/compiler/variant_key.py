"""Cache keys of compiled variants: a digest of everything that the machine code depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["VariantKey"]

_DOMAIN = b"esper variant key 1"
_LONGEST_TEXT = 1000  # characters of a factor that are kept as they are; longer ones are kept as their digest


@dataclass(frozen=True, slots=True)
class VariantKey:
    """The key of one variant; make it with :meth:`of`.

    `digest` is 64 hexadecimal digits. `factors` has what went into it, for people: short texts as they are, anything
    else as the beginning of its SHA-256 and its length.
    """

    digest: str
    factors: Mapping[str, str]

    @classmethod
    def of(cls, factors: Mapping[str, str | bytes]) -> VariantKey:
        """The key made of named `factors`; their order does not matter, and a text is not the same as its bytes.

        What is digested is, for each factor in the order of names: the length of the name and the name, "s" or "b",
        the length of the value and the value; texts in UTF-8, lengths as eight bytes. So no two sets of factors
        are digested as the same bytes.
        """
        digest = hashlib.sha256(_DOMAIN)
        described = {}
        for name in sorted(factors):
            value = factors[name]
            content = _encoded(value)
            for part in (_encoded(name), b"s" if isinstance(value, str) else b"b", content):
                digest.update(len(part).to_bytes(8, "big"))
                digest.update(part)
            described[name] = _described(value, content)
        return cls(digest.hexdigest(), MappingProxyType(described))

    @property
    def short(self) -> str:
        """The first 12 digits, for messages."""
        return self.digest[:12]

    def __reduce__(self) -> tuple[object, ...]:  # a mapping proxy cannot be pickled
        return _restored, (self.digest, dict(self.factors))

    def __hash__(self) -> int:
        return hash(self.digest)


def _restored(digest: str, factors: dict[str, str]) -> VariantKey:
    return VariantKey(digest, MappingProxyType(factors))


def _encoded(value: str | bytes) -> bytes:
    return value.encode("utf-8", "surrogatepass") if isinstance(value, str) else bytes(value)


def _described(value: str | bytes, content: bytes) -> str:
    if isinstance(value, str) and len(value) <= _LONGEST_TEXT and value.isprintable():
        return value
    return f"sha256:{hashlib.sha256(content).hexdigest()[:12]} ({len(content)} bytes)"
