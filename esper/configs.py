"""Settings: defaults, then a YAML file, then `ESPER_*` environment variables, each over the one before.

Nested settings are reached with two underscores: `ESPER_TEZZERET__PIPELINE=fast`. Unknown keys are refused everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]  # PyYAML ships no types
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from esper.compiler.debug import DEBUG_DIR_VARIABLE
from esper.errors import EsperError
from esper.logs import LOGS_VARIABLE

__all__ = [
    "CONFIG_VARIABLE",
    "ConfigError",
    "EsperConfig",
    "ExecutionConfig",
    "OonaConfig",
    "PlatformConfig",
    "TelemetryConfig",
    "TezzeretConfig",
    "load_config",
]

CONFIG_VARIABLE = "ESPER_CONFIG"
"""Names the YAML file where `load_config` is given none."""

_PREFIX = "ESPER_"
_DELIMITER = "__"


class ConfigError(EsperError, ValueError):
    """A setting that cannot be used: unknown, of the wrong type or out of range, or a file that cannot be read."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _without_user_shorthand(path: Path) -> Path:
    return path.expanduser()


class PlatformConfig(_Section):
    """Where the embedded platform keeps its data."""

    root: Annotated[Path, AfterValidator(_without_user_shorthand)] | None = None
    """Folder for the database, blobs and signing key; None is the user's data folder."""
    database_url: SecretStr | None = None
    """SQLAlchemy URL, which may hold a password; None is an SQLite file in `root`."""
    store_url: SecretStr | None = None
    """fsspec URL for blobs, which may hold a key; None is a folder in `root`."""


class TezzeretConfig(_Section):
    """Limits of one compilation, which runs in a child process."""

    pipeline: Literal["fast", "standard", "aggressive"] = "standard"
    """How thoroughly kernels are checked and measured."""
    wall_seconds: float | None = Field(default=None, gt=0)
    """Seconds after which the child is killed; None is the pipeline's own limit: 60, 300 or 1200."""
    memory_mb: int = Field(default=8192, gt=0)
    """MiB of resident memory, of the child and its own children together, above which they are killed."""


class OonaConfig(_Section):
    """The queue between those who publish and the bus."""

    queue_size: int = Field(default=2048, ge=1)
    """Messages that wait at most; the oldest are dropped and counted."""
    batch_size: int = Field(default=512, ge=1)


class ExecutionConfig(_Section):
    """How loaded kernels are kept, and compiled into the model."""

    cache_size_mb: float = Field(default=128, gt=0)
    """MiB of kernels kept in memory, per layer."""
    compile_workers: int = Field(default=1, ge=1)
    """Processes that compile for this one, each on one core; read when the first of them is needed."""
    compile_timeout: float = Field(default=600, gt=0)
    """Seconds that one compilation may take; then its process is killed and started anew."""


class TelemetryConfig(_Section):
    """Health signals."""

    enabled: bool = True


class EsperConfig(BaseSettings):
    """All settings. `EsperConfig()` reads the environment; use :func:`load_config` to read a file too.

    Immutable. Raises pydantic's ``ValidationError``; `load_config` turns that into :class:`ConfigError`.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_nested_delimiter=_DELIMITER,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    name: str = Field(default="esper", min_length=1)
    """Stands in messages as part of the sender."""
    environment: Literal["development", "test", "production"] = "development"
    platform: PlatformConfig = PlatformConfig()
    tezzeret: TezzeretConfig = TezzeretConfig()
    oona: OonaConfig = OonaConfig()
    execution: ExecutionConfig = ExecutionConfig()
    telemetry: TelemetryConfig = TelemetryConfig()


def load_config(path: str | Path | None = None) -> EsperConfig:
    """Defaults, then the YAML file at `path` or named by `ESPER_CONFIG`, then `ESPER_*` variables.

    Raises :class:`ConfigError` naming the setting and the remedy; secrets do not appear in it.
    """
    if path is None:
        path = os.environ.get(CONFIG_VARIABLE) or None
    _refuse_unknown_variables()
    content = {} if path is None else _read_yaml(Path(path).expanduser())

    class _Layered(EsperConfig):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            del init_settings, dotenv_settings, file_secret_settings
            return env_settings, InitSettingsSource(settings_cls, content)  # the first has the last word

    try:
        settings = _Layered()
    except ValidationError as cause:
        raise ConfigError(_explain(cause, path)) from cause
    except SettingsError as cause:
        raise ConfigError(f"the settings cannot be read: {cause}") from cause
    return EsperConfig.model_construct(**{name: getattr(settings, name) for name in EsperConfig.model_fields})


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"the configuration file {path} cannot be read: {cause}") from cause
    except yaml.YAMLError as cause:
        raise ConfigError(f"the configuration file {path} is not YAML: {cause}") from cause
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"the configuration file {path} does not hold settings; write lines like `name: value`")
    return content


def _variables(fields: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, field in fields.items():
        variable = f"{prefix}{name}".upper()
        yield variable
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation.model_fields, f"{variable}{_DELIMITER}")


def _refuse_unknown_variables() -> None:
    """pydantic-settings overlooks variables that no field asks for; a misspelt one must not go unnoticed."""
    known = {CONFIG_VARIABLE, LOGS_VARIABLE, DEBUG_DIR_VARIABLE, *_variables(EsperConfig.model_fields, _PREFIX)}
    unknown = sorted(name for name in os.environ if name.upper().startswith(_PREFIX) and name.upper() not in known)
    if unknown:
        raise ConfigError(f"there is no setting for {', '.join(unknown)}; the variables are {', '.join(sorted(known))}")


def _explain(error: ValidationError, path: str | Path | None) -> str:
    lines = [f"{'.'.join(map(str, each['loc'])) or 'settings'}: {each['msg']}" for each in error.errors()]
    origin = "the environment" if path is None else f"{path} or the environment"
    return f"settings from {origin} cannot be used:\n  " + "\n  ".join(lines)
