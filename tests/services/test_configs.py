"""Settings from defaults, a file and the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from torch import nn

import esper
from esper import Platform
from esper.cli import main
from esper.configs import ConfigError, EsperConfig, UrzaConfig, load_config


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("ESPER_"):
            monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "esper.yaml"
    path.write_text(
        """
name: lab
tezzeret:
  pipeline: fast
  memory_mb: 1024
database:
  url: postgresql://esper:hunter2@db/esper
"""
    )
    return path


def test_defaults_need_nothing() -> None:
    config = load_config()
    assert config == EsperConfig()
    assert (config.oona.queue_size, config.oona.batch_size) == (2048, 512)
    assert config.tezzeret.pipeline == "standard"
    assert config.platform.root is None
    assert (config.execution.compile_workers, config.execution.compile_timeout) == (1, 600)


def test_the_file_is_over_defaults_and_the_environment_over_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESPER_TEZZERET__PIPELINE", "aggressive")
    monkeypatch.setenv("ESPER_PLATFORM__ROOT", "~/kernels")
    monkeypatch.setenv("ESPER_EXECUTION__COMPILE_WORKERS", "2")
    config = load_config(file)
    assert config.name == "lab"
    assert config.tezzeret.pipeline == "aggressive"
    assert config.tezzeret.memory_mb == 1024
    assert config.tezzeret.wall_seconds is None
    assert config.platform.root == Path.home() / "kernels"
    assert config.execution.compile_workers == 2


def test_the_environment_may_name_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_CONFIG", str(file))
    assert load_config().name == "lab"


def test_secrets_do_not_show(file: Path) -> None:
    config = load_config(file)
    assert "hunter2" not in repr(config)
    assert "hunter2" not in str(config.model_dump())
    assert config.database.url is not None
    assert "hunter2" in config.database.url.get_secret_value()


def test_settings_do_not_change() -> None:
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("nmae: x", r":1: nmae: there is no such setting; did you mean name\?"),
        ("tezzeret: {pipelin: fast}", r"tezzeret\.pipelin: there is .* mean tezzeret\.pipeline\?"),
        ("pipeline: fast", r"pipeline: there is .* mean tezzeret\.pipeline\?"),
        ("tezzeret: {Pipeline: fast}", r"tezzeret\.Pipeline: there is .* mean tezzeret\.pipeline\?"),
        ("redis: {uri: 'redis://bus'}", r"redis\.uri: there is .* mean redis\.url\?"),
        ("urza: {tokens: [{nam: ci}]}", r"urza\.tokens\.0\.nam: there is .* mean urza\.tokens\.name\?"),
        ("colour: blue", "colour: there is no such setting; `esper config show` lists the settings"),
        ("tezzeret: {pipeline: slow}", "tezzeret.pipeline"),
        ("oona: {queue_size: 0}", "oona.queue_size"),
        ("oona: 3", "oona"),
        ("urza: {url: 'localhost:8321'}", "urza.url: .*begin with http://"),
        ("execution: {compile_workers: 0}", "execution.compile_workers"),
        ("execution: {compile_timeout: 0}", "execution.compile_timeout"),
        ("- a list", "does not hold settings"),
        ("1: 2", "does not hold settings"),
        ("a: [", "is not YAML"),
    ],
)
def test_what_a_file_gets_wrong_is_named(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "esper.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=named):
        load_config(path)


def test_a_secret_in_a_wrong_place_does_not_show_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "esper.yaml"
    path.write_text("name: lab\ndatabase:\n  url: [hunter2]\n  ur: hunter2")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert f"{path}:3: database.url" in str(caught.value)
    assert f"{path}:4: database.ur" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_errors_point_at_the_line_or_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "esper.yaml"
    path.write_text(
        "name: lab\nurza:\n  tokens:\n    - {name: ci, token: 0123456789abcdef, scopes: [read]}\n    - name: x\n"
        "      token: 0123456789abcdef\n      scopes: [reed]\nredis: {prefix: a b}\n"
    )
    with pytest.raises(ConfigError, match=rf"{path}:7: urza\.tokens\.1\.scopes"):
        load_config(path)
    monkeypatch.setenv("ESPER_REDIS__PREFIX", "c d")
    with pytest.raises(ConfigError, match=r"ESPER_REDIS__PREFIX: redis\.prefix"):
        load_config(path)


def test_tokens_of_urza(tmp_path: Path) -> None:
    path = tmp_path / "esper.yaml"
    path.write_text("urza: {tokens: [{name: ci, token: 0123456789abcdef, scopes: [read, submit]}]}")
    (token,) = load_config(path).urza.tokens
    assert token.scopes == {"read", "submit"}
    assert "0123456789abcdef" not in repr(token)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("name", ["ESPER_NMAE", "ESPER_TEZZERET__PIPELIN", "ESPER_TEZZERET_PIPELINE"])
def test_a_misspelt_variable_is_a_warning_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "fast")
    with pytest.warns(UserWarning, match=rf"{name}; did you mean ESPER_") as told:
        assert load_config() == load_config()
    assert len(told) == 1


OF_KUBERNETES = {  # makes these for services called esper-urza, esper, and esper-urza--client
    "ESPER_URZA_SERVICE_HOST": "10.0.0.7",
    "ESPER_URZA_SERVICE_PORT": "8321",
    "ESPER_URZA_SERVICE_PORT_HTTP": "8321",
    "ESPER_URZA_PORT": "tcp://10.0.0.7:8321",
    "ESPER_URZA_PORT_8321_TCP": "tcp://10.0.0.7:8321",
    "ESPER_URZA_PORT_8321_TCP_PROTO": "tcp",
    "ESPER_URZA_PORT_8321_TCP_ADDR": "10.0.0.7",
    "ESPER_SERVICE_HOST": "10.0.0.8",
    "ESPER_PORT": "tcp://10.0.0.8:80",
    "ESPER_URZA__CLIENT_SERVICE_HOST": "10.0.0.9",
    "ESPER_URZA__CLIENT_PORT_80_TCP_PORT": "80",
}


@pytest.mark.filterwarnings("ignore:there is no setting for")
def test_variables_of_others_break_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: Path) -> None:
    for name, value in OF_KUBERNETES.items():
        monkeypatch.setenv(name, value)
    assert load_config().urza == EsperConfig().urza == UrzaConfig()
    assert load_config(file).name == "lab"
    with Platform.embedded(tmp_path) as platform:
        model = esper.wrap(nn.Sequential(nn.Linear(3, 3)), platform=platform)
        assert model.request_kernel("0", 0, "nothing of this name").result(30) is False
        assert "UnknownKernelError" in model.kasmina_layers["0"].seed_errors[0]


@pytest.mark.filterwarnings("ignore:there is no setting for")
def test_the_command_that_checks_settings_fails_where_a_variable_is_unknown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["esper", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert run("config", "check") == 0
    monkeypatch.setenv("ESPER_TEZZERET__PIPELIN", "fast")
    capsys.readouterr()
    assert run("config", "check") == 1
    assert "ESPER_TEZZERET__PIPELIN; did you mean ESPER_TEZZERET__PIPELINE?" in " ".join(
        capsys.readouterr().err.split()
    )
    assert run("config", "show") == 0


def test_a_variable_of_the_wrong_type_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_TEZZERET__MEMORY_MB", "plenty")
    with pytest.raises(ConfigError, match=r"tezzeret\.memory_mb"):
        load_config()


def test_a_variable_for_a_whole_section_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_URZA", "tcp://secret")
    with pytest.raises(ConfigError, match=r"ESPER_URZA stands for a whole section.*ESPER_URZA__") as raised:
        load_config()
    assert "secret" not in str(raised.value)
