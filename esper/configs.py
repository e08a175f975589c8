"""Settings: defaults, then a YAML file, then `ESPER_*` environment variables, each over the one before.

Nested settings are reached with two underscores: `ESPER_TEZZERET__PIPELINE=fast`. Unknown keys of a file are refused.
An unknown variable is not read, since it may be another program's (Kubernetes makes `ESPER_URZA_PORT` for a service
called esper-urza): it is a warning, with the setting that may have been meant.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from esper.errors import shown
from esper.settings_file import ConfigError, Location, read_settings
from esper.user_warnings import warn_user
from esper.variables import CONFIG_VARIABLE, DEBUG_DIR_VARIABLE, LOGS_VARIABLE

__all__ = [
    "ConfigError",
    "DatabaseConfig",
    "EsperConfig",
    "ExecutionConfig",
    "LoggingConfig",
    "OonaConfig",
    "PlatformConfig",
    "RedisConfig",
    "StoreConfig",
    "TelemetryConfig",
    "TezzeretConfig",
    "UrzaClientConfig",
    "UrzaConfig",
    "UrzaToken",
    "checked_settings",
    "load_config",
    "unknown_variables",
]

_PREFIX = "ESPER_"
_DELIMITER = "__"
_WHERE_THEY_ARE = "`esper config show` lists the settings"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


def _without_user_shorthand(path: Path) -> Path:
    return path.expanduser()


def _http_address(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", text):
        raise ValueError("it is no address; begin with http:// or https://, as in http://localhost:8321")
    return text


_Folder = Annotated[Path, AfterValidator(_without_user_shorthand)]


class PlatformConfig(_Section):
    """Where the embedded platform keeps its data."""

    root: _Folder | None = None
    """Folder for the database, blobs and signing key; None is the user's data folder."""
    trusted_keys: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = ()
    """Public keys, as `esper keys` prints them, whose kernels are used besides those signed with this folder's key."""


class DatabaseConfig(_Section):
    """Urza's tables."""

    url: SecretStr | None = None
    """SQLAlchemy URL, which may hold a password; None is an SQLite file in `platform.root`."""


class StoreConfig(_Section):
    """Urza's blobs."""

    url: SecretStr | None = None
    """fsspec URL, which may hold a key; None is a folder in `platform.root`."""


class RedisConfig(_Section):
    """The server that carries messages and the queue of compilations."""

    url: SecretStr | None = None
    """`redis://`, `rediss://` (TLS) or `unix://`; may hold a password. None: messages stay within one process."""
    connect_timeout: float = Field(default=2.0, gt=0)
    """Seconds."""
    socket_timeout: float = Field(default=5.0, gt=0)
    """Seconds that an answer may take."""
    prefix: str = Field(default="esper", pattern=r"^[A-Za-z0-9._-]+$")
    """Begins every key, so that several installations can share a server."""


Scope = Literal["read", "submit", "worker"]


class UrzaToken(_Section):
    """Who may do what at Urza."""

    name: str = Field(min_length=1, max_length=100)
    """Stands in Urza's log in place of the token."""
    token: SecretStr = Field(min_length=16)
    scopes: frozenset[Scope] = Field(min_length=1)
    """`read` kernels and blueprints, `submit` blueprints, or do a `worker`'s part; one does not imply another."""


class UrzaClientConfig(_Section):
    """How Urza is asked."""

    timeout: float = Field(default=10.0, gt=0)
    """Seconds without a byte, after which an answer is given up."""
    retries: int = Field(default=4, ge=0)
    """Further attempts at a request that can be repeated."""
    retry_seconds: float = Field(default=0.2, gt=0)
    """Upper bound of the first wait; it doubles with every attempt, and a random part of it is waited."""
    cache_folder: _Folder | None = None
    """Folder of downloaded kernels, shared by processes; None is the user's cache folder."""
    cache_mb: float = Field(default=2048, gt=0)
    """MiB that the folder may hold."""
    offline: bool = False
    """Whether only what the folder holds is used, and Urza is not asked."""


class UrzaConfig(_Section):
    """The store's service, and where to find it."""

    url: Annotated[str, AfterValidator(_http_address)] | None = None
    """Where clients and workers reach Urza, such as `http://urza:8321`."""
    token: SecretStr | None = None
    """What clients and workers show there."""
    client: UrzaClientConfig = UrzaClientConfig()
    host: str = "127.0.0.1"
    """Address that the service listens at."""
    port: int = Field(default=8321, ge=0, le=65535)
    """0 takes a free one."""
    tokens: tuple[UrzaToken, ...] = ()
    """Without any, the service answers everybody: on a loopback address, outside of production."""
    max_body_mb: float = Field(default=256, gt=0)
    """MiB of the largest request."""
    rate_per_second: float = Field(default=0, ge=0)
    """Requests a second of one client on average; 0 for no limit."""
    rate_burst: int = Field(default=100, ge=1)
    """Requests of one client at once."""
    request_timeout: float = Field(default=60, gt=0)
    """Seconds."""
    sweep_seconds: float = Field(default=10, gt=0)
    """How often blueprints are looked for that wait although nobody was told, or whose worker is gone."""


class TezzeretConfig(_Section):
    """Limits of one compilation, which runs in a child process."""

    pipeline: Literal["fast", "standard", "aggressive"] = "standard"
    """How thoroughly kernels are checked and measured."""
    wall_seconds: float | None = Field(default=None, gt=0)
    """Seconds after which the child is killed; None is the pipeline's own limit: 60, 300 or 1200."""
    workers: int = Field(default=1, ge=1)
    """Processes of `esper tezzeret`; each compiles one blueprint at a time."""
    lease_seconds: float = Field(default=30, gt=0)
    """How long a blueprint stays a worker's after its last sign of life."""
    poll_seconds: float = Field(default=5, gt=0)
    """How often a worker asks for work by itself, should no message have told it."""
    memory_mb: int = Field(default=8192, gt=0)
    """MiB of resident memory, of the child and its own children together, above which they are killed."""
    niceness: int = Field(default=10, ge=0, le=19)
    """How far the child stands back from what else the machine does; it may take much longer on a busy one."""


class OonaConfig(_Section):
    """The queue between those who publish and the bus."""

    queue_size: int = Field(default=2048, ge=1)
    """Messages that wait at most; the oldest are dropped and counted."""
    batch_size: int = Field(default=512, ge=1)
    max_length: int = Field(default=100_000, ge=1)
    """Messages that Redis keeps of a topic, about; older ones are trimmed."""
    max_deliveries: int = Field(default=5, ge=1)
    """How often a message of a group is handed out before it goes to the dead letters."""
    claim_idle_seconds: float = Field(default=60, gt=0)
    """After how long a message that a consumer took and did not finish is handed to another one of its group."""


class ExecutionConfig(_Section):
    """How loaded kernels are kept, and compiled into the model."""

    cache_size_mb: float = Field(default=128, gt=0)
    """MiB of kernels kept in memory, per layer of a wrapped model; the argument of `wrap` outranks it."""
    compile_workers: int = Field(default=1, ge=1)
    """Processes that compile for this one, each on one core; read when the first of them is needed."""
    compile_timeout: float = Field(default=600, gt=0)
    """Seconds that one compilation may take; then its process is killed and started anew."""
    compile_niceness: int = Field(default=10, ge=0, le=19)
    """How far those processes stand back from what else the machine does, the training itself above all."""


class TelemetryConfig(_Section):
    """What models tell about themselves."""

    enabled: bool = True
    """Whether wrapped models count, time and report to the bus; the argument of `wrap` outranks it."""


class LoggingConfig(_Section):
    """What the services write to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


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
    database: DatabaseConfig = DatabaseConfig()
    store: StoreConfig = StoreConfig()
    redis: RedisConfig = RedisConfig()
    urza: UrzaConfig = UrzaConfig()
    tezzeret: TezzeretConfig = TezzeretConfig()
    oona: OonaConfig = OonaConfig()
    execution: ExecutionConfig = ExecutionConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    logging: LoggingConfig = LoggingConfig()

    @classmethod
    def settings_customise_sources(cls, *given: Any, **named: Any) -> tuple[PydanticBaseSettingsSource, ...]:
        """As pydantic has it: what is given, then the environment, without variables of no setting."""
        arguments, environment, *_ = super().settings_customise_sources(*given, **named)  # nor are there other sources
        return arguments, _known_only(environment)


def load_config(path: str | Path | None = None) -> EsperConfig:
    """Defaults, then the YAML file at `path` or named by `ESPER_CONFIG`, then `ESPER_*` variables.

    Raises :class:`ConfigError` naming the setting and the remedy; secrets do not appear in it. `TypeError` for a
    `path` that is none.
    """
    if path is None:
        path = os.environ.get(CONFIG_VARIABLE) or None
    elif not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            f"load_config takes the path of a YAML file, not {shown(path)}: EsperConfig.model_validate takes a dict"
        )
    _warn_of_unknown_variables()
    content, lines = ({}, {}) if path is None else read_settings(Path(path).expanduser())

    class _Layered(EsperConfig):
        @classmethod
        def settings_customise_sources(cls, *given: Any, **named: Any) -> tuple[PydanticBaseSettingsSource, ...]:
            environment = super().settings_customise_sources(*given, **named)[1]
            return environment, InitSettingsSource(cls, content)  # the first has the last word

    try:
        settings = _Layered()
    except ValidationError as cause:
        raise ConfigError(_explain(cause, path, lines)) from cause
    except SettingsError as cause:
        raise ConfigError(_explain_section(cause)) from cause
    return EsperConfig.model_construct(**{name: getattr(settings, name) for name in EsperConfig.model_fields})


def checked_settings(config: object) -> EsperConfig:
    """`config`, or a `TypeError` if it is anything else than settings."""
    if not isinstance(config, EsperConfig):
        raise TypeError(
            f"config must be an esper.EsperConfig, not a {type(config).__name__}: esper.load_config(path) reads a "
            "YAML file, EsperConfig.model_validate(...) a dict"
        )
    return config


def _explain_section(cause: SettingsError) -> str:
    """What is wrong with a variable for a whole section; its value, which may be a secret, is not told."""
    names = [_PREFIX + name.upper() for name in EsperConfig.model_fields if f'"{name}"' in str(cause)]
    named = names[0] if names else f"a variable {_PREFIX}..."
    return (
        f"{named} stands for a whole section of the settings and is not a JSON object: unset it, or set the settings "
        f"of the section one by one, as {named}{_DELIMITER}... ({_WHERE_THEY_ARE})"
    )


def _variables(fields: dict[str, Any], prefix: str) -> Iterator[str]:
    for name, field in fields.items():
        variable = f"{prefix}{name}".upper()
        yield variable
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _variables(field.annotation.model_fields, f"{variable}{_DELIMITER}")


def _variable(location: Location) -> str:
    return f"{_PREFIX}{_DELIMITER.join(location)}".upper()


def _known() -> frozenset[str]:
    own = (CONFIG_VARIABLE, LOGS_VARIABLE, DEBUG_DIR_VARIABLE)
    return frozenset((*own, *_variables(EsperConfig.model_fields, _PREFIX)))


def _known_only(environment: PydanticBaseSettingsSource) -> PydanticBaseSettingsSource:
    """What lies below a section and is no setting of it, such as `ESPER_URZA__PORT_80_TCP`, would be refused."""
    if isinstance(environment, EnvSettingsSource):
        known = _known()
        environment.env_vars = {name: value for name, value in environment.env_vars.items() if name.upper() in known}
    return environment


def unknown_variables() -> str:
    """One line about the `ESPER_*` variables that no setting reads, with what may have been meant; "" without any."""
    known = _known()
    unknown = sorted(name for name in os.environ if name.upper().startswith(_PREFIX) and name.upper() not in known)
    if not unknown:
        return ""
    near = [name for each in unknown for name in difflib.get_close_matches(each.upper(), known, n=1)]
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else _WHERE_THEY_ARE
    return f"there is no setting for {', '.join(unknown)}; {hint}"


def _no_such_setting(location: Location) -> str:
    """What to say of a key that no setting has, with the one that may have been meant."""
    known = [*_variables(EsperConfig.model_fields, ""), *_variables(UrzaToken.model_fields, "URZA__TOKENS__")]
    wish = _DELIMITER.join(each for each in location if not each.isdigit()).upper()
    near = difflib.get_close_matches(wish, known, n=1)
    hint = f"did you mean {near[0].lower().replace(_DELIMITER, '.')}?" if near else _WHERE_THEY_ARE
    return f"there is no such setting; {hint}"


_warned_of: set[str] = set()


def _warn_of_unknown_variables() -> None:
    """Once for the same variables. Other programs own some too, so nothing fails for their sake."""
    told = unknown_variables()
    if told and told not in _warned_of:
        _warned_of.add(told)
        warn_user(f"{told} (it is not read)")


def _explain(error: ValidationError, path: str | Path | None, lines: Mapping[Location, int]) -> str:
    problems = []
    for each in error.errors():
        location = tuple(map(str, each["loc"]))
        within = [location[:n] for n in range(len(location), 0, -1)]
        variable = next((name for each in within if (name := _variable(each)) in os.environ), None)
        line = next((lines[each] for each in within if each in lines), None)
        where = f"{variable}: " if variable else "" if line is None else f"{path}:{line}: "
        what = _no_such_setting(location) if each["type"] == "extra_forbidden" else each["msg"]
        problems.append(f"{where}{'.'.join(location) or 'settings'}: {what}")
    origin = "the environment" if path is None else f"{path} or the environment"
    return f"settings from {origin} cannot be used:\n  " + "\n  ".join(problems)
