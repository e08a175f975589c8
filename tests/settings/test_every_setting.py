"""Law 14: every setting has a reader. The walk fails for a setting that no experiment or named test shows at work."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

import esper
from esper.configs import EsperConfig
from tests.settings.experiments import EXPERIMENTS, Experiment

pytestmark = [pytest.mark.xdist_group("settings"), pytest.mark.slow]
_ROOT = Path(esper.__file__).parents[1]

ELSEWHERE = {  # what takes a fleet of processes is shown by its tests
    "tezzeret.workers": "test_a_worker_that_is_killed_at_its_work_loses_nothing_and_is_replaced",
    "urza.sweep_seconds": "test_urza_tells_again_what_an_emptied_server_lost",
}


def leaves(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """The dotted names of all settings; of a tuple of sections its own as well."""
    for name, field in model.model_fields.items():
        sections = [each for each in (field.annotation, *get_args(field.annotation)) if _is_section(each)]
        if not sections or field.annotation not in sections:
            yield f"{above}{name}"
        for section in sections:
            yield from leaves(section, f"{above}{name}.")


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def test_every_setting_has_an_experiment_and_no_experiment_is_about_nothing() -> None:
    assert set(leaves(EsperConfig)) == EXPERIMENTS.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("experiment", dict.fromkeys(EXPERIMENTS.values()), ids=lambda each: each.__name__[1:])
def test_a_setting_changes_what_happens(experiment: Experiment, tmp_path: Path) -> None:
    experiment(tmp_path)


@pytest.mark.parametrize("setting", ELSEWHERE)
def test_what_is_shown_elsewhere_is_there(setting: str) -> None:
    tree = ast.parse((_ROOT / "tests/services/test_tezzeret_fleet.py").read_text(encoding="utf-8"))
    assert ELSEWHERE[setting] in {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef)}


def test_every_setting_is_read_somewhere_besides_where_it_is_declared() -> None:
    read = {
        each.attr
        for path in (_ROOT / "esper").rglob("*.py")
        if path.name != "configs.py"
        for each in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Load)
    }
    assert [name for name in leaves(EsperConfig) if name.rpartition(".")[2] not in read] == []
