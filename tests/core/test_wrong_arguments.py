"""Arguments of the wrong kind: an error that names the value and the remedy, with nothing begun."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import esper
from esper import EsperConfig, Platform
from esper.core.errors import TargetError
from tests.kernel_shelf import KernelShelf

WRAPPING: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "an address": ({"platform": "http://urza:8321"}, TypeError, r"connect\(\) returns, not 'http://urza:8321', which"),
    "settings as platform": ({"platform": EsperConfig()}, TypeError, "EsperConfig.*config=..."),
    "the class": ({"platform": Platform}, TypeError, r"Platform\.embedded\(\)"),
    "a model": ({"platform": nn.Linear(2, 2)}, TypeError, "Linear.*no `kernel_source`"),
    "half a platform": ({"platform": SimpleNamespace(kernel_source=None)}, TypeError, "no `oona`"),
    "a path as settings": ({"config": "esper.yaml"}, TypeError, "not a str: esper.load_config"),
    "a dict as settings": ({"config": {"name": "me"}}, TypeError, r"not a dict.*model_validate"),
    "telemetry": ({"telemetry_enabled": "no"}, ValueError, "telemetry_enabled must be True, False or None, not 'no'"),
    "commit": ({"commit": "later"}, ValueError, "commit must be"),
    "a number as target": ({"target_layers": 3}, TargetError, "not 3"),
    "a module as target": ({"target_layers": nn.Linear(3, 3)}, TargetError, "names and patterns, not Linear"),
    "modules as target": ({"target_layers": nn.Sequential(nn.Linear(3, 3))}, TargetError, "patterns, not a Sequential"),
}


@pytest.mark.parametrize("case", WRAPPING)
def test_what_wrap_cannot_take_is_named_with_the_remedy(case: str) -> None:
    arguments, kind, message = WRAPPING[case]
    host = nn.Sequential(nn.Linear(3, 3))
    before = dict(vars(host))
    with pytest.raises(kind, match=message):
        esper.wrap(host, **arguments)
    assert vars(host) == before


def test_a_platform_in_the_place_of_the_targets_is_named_with_the_remedy(shelf: KernelShelf) -> None:
    with pytest.raises(TargetError, match="pass it as platform="):
        esper.wrap(nn.Sequential(nn.Linear(3, 3)), shelf.platform)  # type: ignore[arg-type]  # the wrong place


@pytest.mark.parametrize("flag", ["trainable", "isolate"])
@pytest.mark.parametrize("value", ["no", 1, None])
def test_a_flag_of_a_load_is_true_or_false(model: esper.MorphableModel, kernel: str, flag: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{flag} must be True or False, not {value!r}"):
        model.request_kernel("0", 0, kernel, **{flag: value})
    assert model.kasmina_layers["0"].state.lifecycle(0) is esper.SeedLifecycleState.DORMANT


def test_a_platform_without_messages_is_enough_without_telemetry() -> None:
    silent: Any = SimpleNamespace(kernel_source=None)
    esper.wrap(nn.Sequential(nn.Linear(3, 3)), telemetry_enabled=False, platform=silent)


PLATFORMS: dict[str, tuple[Callable[[], Any], str]] = {
    "connect to an address": (lambda: Platform.connect("http://urza:8321"), "not a str: esper.load_config"),  # type: ignore[arg-type]  # the wrong kind
    "connect with a dict": (lambda: Platform.connect({"urza": {}}), "not a dict"),  # type: ignore[arg-type]  # as above
    "embed with a path": (lambda: Platform.embedded(config="esper.yaml"), "not a str"),  # type: ignore[arg-type]  # as above
    "embed in settings": (lambda: Platform.embedded(EsperConfig()), "folder, not an EsperConfig.*config=..."),  # type: ignore[arg-type]  # as above
    "settings of a dict": (lambda: esper.load_config({"name": "me"}), "path of a YAML file, not {'name'"),  # type: ignore[arg-type]  # as above
}


@pytest.mark.parametrize("case", PLATFORMS)
def test_what_a_platform_cannot_be_made_of_is_named_with_the_remedy(case: str) -> None:
    make, message = PLATFORMS[case]
    with pytest.raises(TypeError, match=message):
        make()


def test_a_model_listens_to_a_platform_by_a_name(shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(3, 3)), platform=shelf.platform)
    with pytest.raises(TypeError, match="not 'redis://bus', which has no `oona`"):
        model.listen("redis://bus")  # type: ignore[arg-type]  # the wrong kind
    with pytest.raises(TypeError, match="not 3"):
        model.listen(name=3)  # type: ignore[arg-type]  # as above
