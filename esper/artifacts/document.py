"""JSON documents: the canonical form, and reading one field by field with the path in every error."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TypeAlias

from esper.artifacts.errors import ArtifactError
from esper.errors import shown

__all__ = ["REQUIRED", "Json", "JsonReader", "canonical_json", "near_misses", "parse_json"]

Json: TypeAlias = "bool | int | float | str | list[Json] | tuple[Json, ...] | Mapping[str, Json] | None"


class _Required:
    """The default of a field that has none."""


REQUIRED = _Required()
_MAX_INTEGER_DIGITS = 20
_MAX_ITEMS = 2**18


def canonical_json(value: Json) -> str:
    """The one spelling of `value`: ASCII, sorted keys, no spaces, shortest floats. Tuples become arrays."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def parse_json(text: str | bytes, what: str, error: type[ArtifactError]) -> object:
    """Parses strict JSON: UTF-8, no duplicate keys, no NaN or infinity, no absurd numbers; raises `error`."""

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(items)
        if len(result) != len(items):
            twice = Counter(key for key, _ in items).most_common(1)[0][0]
            raise error(f"{what} has the key {_show(twice)} twice in one object; keep one of them")
        return result

    def integer(digits: str) -> int:
        if len(digits) > _MAX_INTEGER_DIGITS:
            raise error(f"{what} holds an integer of {len(digits)} digits; none needs more than {_MAX_INTEGER_DIGITS}")
        return int(digits)

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise error(f"{what} holds {digits[:40]}, which no float can hold; use a finite number")
        return value

    def constant(name: str) -> float:
        raise error(f"{what} holds {name}; JSON has only finite numbers")

    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        if sum(map(decoded.count, "{[,")) > _MAX_ITEMS:  # small values are large objects: 3 bytes can become 64
            raise error(f"{what} holds more than {_MAX_ITEMS} values; none needs that many")
        result: object = json.loads(
            decoded, object_pairs_hook=pairs, parse_int=integer, parse_float=number, parse_constant=constant
        )
    except UnicodeDecodeError as cause:
        raise error(f"{what} is not UTF-8 (byte {cause.start}); write it as UTF-8") from cause
    except json.JSONDecodeError as cause:
        raise error(f"{what} is not JSON: {cause}") from cause
    except RecursionError as cause:
        raise error(f"{what} is nested too deeply to be one") from cause
    return result


def near_misses(name: str, known: Collection[str]) -> str:
    """``"did you mean ...?"`` for names like `name`, else all of `known`."""
    close = difflib.get_close_matches(name[:80], sorted(known), n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"known: {', '.join(sorted(known)) or 'none'}"


def _show(value: object) -> str:
    """A short repr, whatever the value's size and depth."""
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'an array'} of {len(value)}"
    return shown(value)


class JsonReader:
    """Reads the fields of one JSON object; every refusal raises `error` with the field's path.

    Each method names the key, checks type and range, and returns the value or its default. :meth:`finish` then refuses
    the keys that nobody asked for.
    """

    def __init__(self, value: object, path: str, error: type[ArtifactError]) -> None:
        if not isinstance(value, Mapping):
            raise error(f"{path} must be an object, not {_show(value)}")
        for key in value:
            if not isinstance(key, str):
                raise error(f"{path} has the key {_show(key)}; keys are strings")
        self.path = path
        self.error = error
        self._fields: Mapping[str, object] = value
        self._known: set[str] = set()

    def __contains__(self, key: str) -> bool:
        self._known.add(key)
        return key in self._fields

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are there."""
        return tuple(self._fields)

    def refuse(self, key: str, wanted: str, value: object) -> ArtifactError:
        """The error for a field that should be `wanted`."""
        return self.error(f"{self.path}.{key[:80]} must be {wanted}, not {_show(value)}")

    def value(self, key: str, default: object = REQUIRED) -> object:
        """The raw value of `key`."""
        self._known.add(key)
        if key in self._fields:
            return self._fields[key]
        if default is REQUIRED:
            raise self.error(f"{self.path}.{key} is missing; add it")
        return default

    def integer(self, key: str, minimum: int = 0, maximum: int = 2**63 - 1, default: int | _Required = REQUIRED) -> int:
        """An integer in [minimum, maximum]; true, false and 1.0 are none."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.refuse(key, f"an integer from {minimum} to {maximum}", value)
        return value

    def number(self, key: str, default: float | _Required = REQUIRED) -> float:
        """A finite number, as a float."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(key, "a finite number", value)
        try:
            result = float(value)
        except OverflowError:
            result = math.inf
        if not math.isfinite(result):
            raise self.refuse(key, "a finite number", value)
        return result

    def boolean(self, key: str, default: bool | _Required = REQUIRED) -> bool:
        """true or false."""
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false", value)
        return value

    def text(
        self, key: str, pattern: str | None = None, max_length: int = 256, default: str | _Required = REQUIRED
    ) -> str:
        """A string of at most `max_length` characters that matches `pattern` as a whole."""
        value = self.value(key, default)
        if not isinstance(value, str) or len(value) > max_length:
            raise self.refuse(key, f"a string of at most {max_length} characters", value)
        if pattern is not None and re.fullmatch(pattern, value) is None:
            raise self.refuse(key, f"a string that matches {pattern}", value)
        return value

    def choice(self, key: str, options: Collection[str], default: str | _Required = REQUIRED) -> str:
        """One of `options`."""
        value = self.value(key, default)
        if not isinstance(value, str):
            raise self.refuse(key, f"one of {', '.join(sorted(options))}", value)
        if value not in options:
            raise self.error(f"{self.path}.{key} is {_show(value)}; {near_misses(value, options)}")
        return value

    def array(self, key: str, max_length: int, default: tuple[()] | _Required = REQUIRED) -> tuple[object, ...]:
        """An array of at most `max_length` items."""
        value = self.value(key, default)
        if not isinstance(value, list | tuple) or len(value) > max_length:
            raise self.refuse(key, f"an array of at most {max_length} items", value)
        return tuple(value)

    def integers(self, key: str, minimum: int, maximum: int, max_length: int) -> tuple[int, ...]:
        """An array of integers in [minimum, maximum]."""
        values = self.array(key, max_length)
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
                raise self.refuse(f"{key}[{index}]", f"an integer from {minimum} to {maximum}", value)
        return tuple(value for value in values if isinstance(value, int))

    def object(self, key: str) -> JsonReader:
        """A reader of the object at `key`."""
        return JsonReader(self.value(key), f"{self.path}.{key[:80]}", self.error)

    def finish(self) -> None:
        """Refuses keys that no method asked for."""
        for key in self._fields:
            if key not in self._known:
                raise self.error(f"{self.path} has the unknown key {_show(key)}; {near_misses(key, self._known)}")
