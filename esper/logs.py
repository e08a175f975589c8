"""`ESPER_LOGS`: what each part of Esper logs, set in the manner of `TORCH_LOGS`.

`ESPER_LOGS="+compiler,execution,-oona"` has the compiler log from DEBUG on, execution from INFO on, and Oona only
errors. "all" is every part. Parts that are not named log warnings, as without the variable.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from esper.variables import LOGS_VARIABLE

__all__ = ["PARTS", "SayOnce", "configure_logs", "set_up_service_log"]

PARTS = MappingProxyType(
    {
        "all": "esper",
        "compiler": "esper.compiler",
        "workers": "esper.compiler.workers",
        "store": "esper.compiler.variant_store",
        "core": "esper.core",
        "distributed": "esper.distributed",
        "execution": "esper.execution",
        "growth": "esper.growth",
        "platform": "esper.platform",
        "services": "esper.services",
        "tezzeret": "esper.services.tezzeret",
        "oona": "esper.services.oona_client",
    }
)
"""The parts and their loggers. A part includes what lies below it: "compiler" has "workers" and "store"."""

_ROOT = "esper"
_LEVELS = {"+": logging.DEBUG, "-": logging.ERROR}
_FORMAT = "%(levelname).1s %(asctime)s.%(msecs)03d %(process)d %(name)s: %(message)s"


def configure_logs(setting: str | None = None) -> None:
    """Set levels as `setting` says; None is the value of `ESPER_LOGS`. An empty setting changes nothing.

    Records go to standard error, unless the program gives the logger "esper" or the root logger a handler of its own,
    before or after. Never raises: an unknown part is a warning that lists what there is.
    """
    if setting is None:
        setting = os.environ.get(LOGS_VARIABLE, "")
    levels: dict[str, int] = {}
    unknown: list[str] = []
    for item in filter(None, map(str.strip, setting.split(","))):
        part = item.lstrip("+-").strip().lower()
        if part in PARTS:
            levels[PARTS[part]] = _LEVELS.get(item[0], logging.INFO)
        else:
            unknown.append(item)
    for logger, level in levels.items():
        logging.getLogger(logger).setLevel(level)
    root = logging.getLogger(_ROOT)
    if (levels or unknown) and not any(isinstance(handler, _StandardError) for handler in root.handlers):
        root.addHandler(_StandardError())
    if unknown:
        root.warning(
            '%s: there is no part %s; the parts are %s. "+" before a part is DEBUG, "-" is ERROR, nothing is INFO',
            LOGS_VARIABLE,
            ", ".join(map(repr, unknown)),
            ", ".join(PARTS),
        )


def set_up_service_log(level: str, style: str) -> None:
    """For a service's process: what Esper logs from `level` on goes to standard error, as "text" or "json" lines.

    A JSON line has time (UTC), level, logger, process, message, and under "error" a traceback if there is one; and what
    a record was given as `extra={"fields": {...}}`. `ESPER_LOGS` still decides for the parts that it names.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if style == "json" else logging.Formatter(_FORMAT, "%H:%M:%S"))
    root = logging.getLogger(_ROOT)
    root.handlers = [handler]
    root.propagate = False
    root.setLevel(level.upper())
    configure_logs()


class SayOnce:
    """Logs what goes on for long where it is noticed first, and after that at DEBUG. For any thread."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: dict[str, object] = {}

    def __call__(self, level: int, message: str, reason: str | None = None) -> None:
        """Log `message`, unless it was said before, or another for the same `reason`."""
        mine = object()
        is_new = self._said.setdefault(reason or message, mine) is mine
        self._logger.log(level if is_new else logging.DEBUG, "%s", message)


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _StandardError(logging.Handler):
    """Writes to what `sys.stderr` is at that moment, unless the program has a handler of its own for the record."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        if self._is_handled_elsewhere(record) or sys.stderr is None:
            return
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001  # a record that cannot be formatted or written is reported, as logging does
            self.handleError(record)

    def _is_handled_elsewhere(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False
