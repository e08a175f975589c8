"""A file of settings: what it says, and on which line it says it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types

from esper.errors import EsperError
from esper.ownership import UnsafePathError, check_own
from esper.regular_files import read_regular

__all__ = ["ConfigError", "Location", "read_settings"]

_MOST_BYTES = 2**22
Location = tuple[str, ...]
"""Where a setting stands: its section, and so on down to its name."""


class ConfigError(EsperError, ValueError):
    """A setting that cannot be used: unknown, of the wrong type or out of range, or a file that cannot be read."""


def read_settings(path: Path) -> tuple[dict[str, Any], dict[Location, int]]:
    """What the file says, and the line of each setting in it."""
    try:
        text = read_regular(path, _MOST_BYTES).decode()
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"the configuration file {path} cannot be read: {cause}") from cause
    try:
        content, tree = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as cause:
        raise ConfigError(f"the configuration file {path} is not YAML: {cause}") from cause
    if content is None:
        return {}, {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"the configuration file {path} does not hold settings; write lines like `name: value`")
    _check_trust_list(path, content)
    return content, dict(_lines(tree, ()))


def _check_trust_list(path: Path, content: Mapping[str, Any]) -> None:
    """Whoever can write down which keys are trusted decides which machine code runs here."""
    platform = content.get("platform")
    if isinstance(platform, dict) and platform.get("trusted_keys"):
        try:
            check_own(path, f"the trust list platform.trusted_keys in {path}")
        except UnsafePathError as cause:
            raise ConfigError(str(cause)) from cause


def _lines(node: yaml.Node, location: Location) -> Iterator[tuple[Location, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            within = (*location, str(key.value))
            yield within, key.start_mark.line + 1
            yield from _lines(value, within)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            within = (*location, str(index))
            yield within, value.start_mark.line + 1
            yield from _lines(value, within)
