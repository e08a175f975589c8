"""`ESPER_LOGS`: levels by part, a handler where the program has none, and never an error at import."""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

import esper
from esper.configs import load_config
from esper.logs import PARTS, configure_logs


def run(program: str, logs: str | None, *options: str) -> tuple[str, str]:
    """What `program` prints and what it writes to standard error in a new interpreter, which must end well."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ESPER_")}
    if logs is not None:
        environment["ESPER_LOGS"] = logs
    process = subprocess.run(
        [sys.executable, *options, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout, process.stderr


@pytest.fixture
def loggers() -> Iterator[None]:
    """Puts levels and handlers back."""
    named = [logging.getLogger(name) for name in PARTS.values()]
    before = [(logger, logger.level, list(logger.handlers)) for logger in named]
    for logger in named:
        logger.setLevel(logging.NOTSET)
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


def level(part: str) -> str:
    return logging.getLevelName(logging.getLogger(PARTS[part]).getEffectiveLevel())


LEVELS = """
import esper, logging
for name in ("esper.compiler", "esper.compiler.workers", "esper.execution", "esper.services.oona_client"):
    logger = logging.getLogger(name)
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
        logger.log(level, "from %s at %s", name, logging.getLevelName(level))
print(logging.getLogger("esper").handlers == [], logging.getLogger().handlers)
"""


def test_the_variable_is_read_at_import_and_records_go_to_standard_error() -> None:
    output, errors = run(LEVELS, "+compiler, execution,-oona")
    assert output == "False []\n"
    said = [line.partition(": ")[2] for line in errors.splitlines()]
    wanted = {
        "esper.compiler": ("DEBUG", "INFO", "WARNING", "ERROR"),
        "esper.compiler.workers": ("DEBUG", "INFO", "WARNING", "ERROR"),
        "esper.execution": ("INFO", "WARNING", "ERROR"),
        "esper.services.oona_client": ("ERROR",),
    }
    assert said == [f"from {name} at {level}" for name, levels in wanted.items() for level in levels]
    assert errors.startswith("D "), "the level is the first letter of a line"
    assert " esper.compiler: " in errors.splitlines()[0]


def test_without_the_variable_nothing_is_set_up() -> None:
    output, errors = run(LEVELS, None)
    assert output == "True []\n"
    assert "at WARNING" in errors
    assert "at INFO" not in errors


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_program_with_a_handler_of_its_own_gets_each_record_once(order: str) -> None:
    lines = [
        "import logging, sys",
        "import esper",
        "logging.basicConfig(format='own %(message)s', stream=sys.stdout)",
        "logging.getLogger('esper.compiler').debug('a record')",
    ]
    if order == "before":
        lines[1], lines[2] = lines[2], lines[1]
    assert run("\n".join(lines), "+compiler") == ("own a record\n", "")


def test_an_unknown_part_is_a_warning_even_where_warnings_are_errors() -> None:
    output, errors = run("import esper; print('imported')", "+compilr,,execution,+", "-W", "error::UserWarning")
    assert output == "imported\n"
    (line,) = errors.splitlines()
    assert "ESPER_LOGS: there is no part '+compilr', '+'" in line
    for part in PARTS:
        assert part in line


@pytest.mark.parametrize(
    ("setting", "levels"),
    [
        ("compiler", {"compiler": "INFO", "workers": "INFO", "store": "INFO", "execution": "WARNING"}),
        ("+all,-store", {"compiler": "DEBUG", "store": "ERROR", "oona": "DEBUG"}),
        ("-store,+all", {"compiler": "DEBUG", "store": "ERROR", "oona": "DEBUG"}),
        ("+compiler,workers", {"compiler": "DEBUG", "workers": "INFO", "store": "DEBUG"}),
        ("services,-oona", {"tezzeret": "INFO", "oona": "ERROR", "platform": "WARNING"}),
        (" +Compiler , EXECUTION ", {"compiler": "DEBUG", "execution": "INFO"}),
        ("compiler,-compiler", {"compiler": "ERROR"}),
        (",,", dict.fromkeys(PARTS, "WARNING")),
    ],
)
def test_levels(setting: str, levels: dict[str, str], loggers: None) -> None:
    configure_logs(setting)
    assert {part: level(part) for part in levels} == levels


def test_a_second_call_adds_no_second_handler(loggers: None) -> None:
    before = len(logging.getLogger("esper").handlers)
    configure_logs("compiler")
    once = len(logging.getLogger("esper").handlers)
    configure_logs("+execution")
    assert once <= before + 1
    assert len(logging.getLogger("esper").handlers) == once


def test_a_record_that_cannot_be_written_does_not_stop_the_program() -> None:
    program = """
import esper, logging, sys
log = logging.getLogger("esper.compiler")
log.info("%d", "text")
sys.stderr = None
log.info("said to nobody")
print("goes on")
"""
    output, errors = run(program, "compiler")
    assert output == "goes on\n"
    assert "Logging error" in errors
    assert "said to nobody" not in errors


def test_every_logger_belongs_to_a_part_and_every_part_has_a_logger() -> None:
    used: set[str] = set()
    for module in pkgutil.walk_packages(esper.__path__, "esper."):
        if ".migrations" in module.name:
            continue  # Alembic's own scripts, which only it can import
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, logging.Logger):
                used.add(value.name)
    parts = {part: name for part, name in PARTS.items() if part != "all"}

    def is_under(logger: str, name: str) -> bool:
        return logger == name or logger.startswith(f"{name}.")

    assert "esper.compiler.variant_store" in used
    for logger in used - {"esper"}:
        assert any(is_under(logger, name) for name in parts.values()), f"{logger} is in no part of ESPER_LOGS"
    for part, name in parts.items():
        assert any(is_under(logger, name) for logger in used), f"no logger is in the part {part}"


def test_the_variables_for_logs_and_dumps_are_no_misspelt_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_LOGS", "+compiler")
    monkeypatch.setenv("ESPER_DEBUG_DIR", "dumps")
    load_config()
