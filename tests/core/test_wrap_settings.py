"""What `wrap` goes by: its arguments, else `config`, else the platform's settings, else the environment."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import EsperConfig, Platform
from esper.configs import ConfigError
from tests.core.seeds import RecordingSink, blueprint
from tests.kernel_shelf import KernelShelf


def settings(size: float, telemetry: bool = True, root: Path | None = None) -> EsperConfig:
    return EsperConfig.model_validate(
        {"execution": {"cache_size_mb": size}, "telemetry": {"enabled": telemetry}, "platform": {"root": root}}
    )


def in_use(model: esper.MorphableModel) -> tuple[float, bool]:
    """The cache's budget, and whether executions are counted."""
    model(torch.zeros(1, 3))
    stats = model.get_model_stats()["layers"]["0"]
    return model.kasmina_layers["0"].kernel_cache.max_cache_size_mb, stats["execution_count"] == 1


class Bare:
    """A platform of somebody's own, without settings."""

    def __init__(self) -> None:
        self.kernel_source: Any = None
        self.oona = RecordingSink()


@pytest.fixture
def host() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3))


def test_each_source_outranks_the_next(host: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare: Any = Bare()
    assert in_use(esper.wrap(host, platform=bare)) == (128, True)
    monkeypatch.setenv("ESPER_EXECUTION__CACHE_SIZE_MB", "1")
    monkeypatch.setenv("ESPER_TELEMETRY__ENABLED", "false")
    assert in_use(esper.wrap(host, platform=bare)) == (1, False)
    with Platform.embedded(tmp_path, config=settings(2, True)) as platform:
        assert platform.config.execution.cache_size_mb == 2
        assert in_use(esper.wrap(host, platform=platform)) == (2, True)
        assert in_use(esper.wrap(host, platform=platform, config=settings(3, False))) == (3, False)
        model = esper.wrap(host, None, 4, 5, True, platform=platform, config=settings(3, False))
        assert in_use(model) == (5, True)
        assert in_use(esper.wrap(host, cache_size_mb=128, config=settings(3, False), platform=platform)) == (128, False)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.kasmina_layers["0"].kernel_cache.max_cache_size_mb == 5


def test_without_telemetry_nothing_is_published(host: nn.Module) -> None:
    bare: Any = Bare()
    for told, config in ((False, settings(1, False)), (True, settings(1, True))):
        model = esper.wrap(host, platform=bare, config=config)
        model.request_kernel("0", 0, "ab" * 32).result(30)
        assert bool(bare.oona.messages) is told


def test_settings_name_the_platform_where_none_is_given(host: nn.Module, tmp_path: Path) -> None:
    config = settings(1, True, tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    with KernelShelf(tmp_path / "mine") as shelf:
        kernel = shelf.put(blueprint(3, 3)).id
        model = esper.wrap(host, config=config)
        assert model.request_kernel("0", 0, kernel).result(30), model.kasmina_layers["0"].seed_errors
    elsewhere = esper.wrap(host, config=settings(1, True, tmp_path / "other"))
    assert elsewhere.request_kernel("0", 0, kernel).result(30) is False


def test_a_setting_of_no_use_is_named_and_nothing_is_wrapped(host: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_EXECUTION__CACHE_SIZE_MB", "-1")
    with pytest.raises(ConfigError, match="ESPER_EXECUTION__CACHE_SIZE_MB"):
        esper.wrap(host)
    esper.wrap(host, cache_size_mb=1, telemetry_enabled=False)
