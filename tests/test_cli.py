"""The command line, run as people run it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path

import pytest
import yaml

import esper
from esper import Blueprint
from esper.artifacts import SigningKey
from esper.cli import main
from esper.services.contracts import BlueprintStatus
from esper.services.urza import UrzaStore
from tests.services.shelf import add_kernel, blueprint

_ROOT = Path(__file__).parents[1]


class CommandLine:
    """`esper` with its data in `folder`, and nothing else of the environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.errors = ""
        """What it has printed on its standard error the last time."""

    def run(self, *arguments: str, status: int = 0, stdin: bytes = b"", **settings: str) -> str:
        """What it prints; on its standard error too, if it is to fail."""
        own = {"ESPER_PLATFORM__ROOT": str(self.folder), "COLUMNS": "160", "NO_COLOR": "1", **settings}
        with (
            pytest.MonkeyPatch.context() as patch,
            redirect_stdout(StringIO()) as out,
            redirect_stderr(StringIO()) as err,
        ):
            for name in [each for each in os.environ if each.startswith("ESPER_")]:
                patch.delenv(name)
            for name, value in own.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["esper", *arguments])
            patch.setattr(sys, "stdin", TextIOWrapper(BytesIO(stdin)))
            patch.setenv("ESPER_CONFIG", "")  # so that --config does not outlive the call
            with pytest.raises(SystemExit) as ended:
                main()
        self.errors = err.getvalue()
        told = out.getvalue() + (self.errors if status else "")
        assert (ended.value.code or 0) == status, out.getvalue() + err.getvalue()
        assert "Traceback" not in told
        return told


@pytest.mark.slow
def test_it_is_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "esper.cli", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"esper {esper.__version__}\n"


@pytest.fixture
def line(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "data")


@pytest.fixture
def kernel(line: CommandLine) -> str:
    """The id of a signed kernel called "growth"."""
    key = SigningKey.load_or_create(_folder(line) / "signing.pem")
    with UrzaStore.in_folder(line.folder) as store:
        _, kernel = add_kernel(store, blueprint(), "growth", key=key)
    return kernel.id


def _folder(line: CommandLine) -> Path:
    line.folder.mkdir(exist_ok=True)
    return line.folder


def test_a_blueprint_is_submitted_from_a_file_and_from_standard_input(line: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "blueprint.json"
    file.write_text(blueprint().to_json())
    assert line.run("submit", str(file), "--name", "growth").strip() == blueprint().id
    again = json.loads(line.run("submit", "-", "--json", stdin=blueprint(seed=1).to_json().encode()))
    assert (again["id"], again["status"]) == (blueprint(seed=1).id, "unvalidated")
    listed = json.loads(line.run("blueprints", "list", "--json"))
    assert {each["id"] for each in listed} == {blueprint().id, blueprint(seed=1).id}
    assert "growth" in line.run("blueprints", "list")
    assert "unvalidated" in line.run("blueprints", "show", blueprint().id)
    assert Blueprint.from_json(line.run("blueprints", "pull", blueprint().id)).id == blueprint().id


def test_kernels_are_listed_shown_pulled_and_verified(line: CommandLine, kernel: str, tmp_path: Path) -> None:
    assert kernel[:12] in line.run("kernels", "list")
    assert [each["id"] for each in json.loads(line.run("kernels", "list", "--json", "--in-features", "4"))] == [kernel]
    assert json.loads(line.run("kernels", "list", "--json", "--in-features", "5")) == []
    assert "4 -> 4, float32" in line.run("kernels", "show", "growth")
    out = tmp_path / "growth.safetensors"
    pulled = json.loads(line.run("kernels", "pull", kernel[:14], "--out", str(out), "--json"))
    assert (pulled["id"], pulled["bytes"]) == (kernel, out.stat().st_size)
    assert out.with_name("growth.safetensors.sig").exists()
    assert json.loads(line.run("kernels", "verify", "growth", "--json"))["id"] == kernel


def test_a_kernel_of_a_stranger_is_not_verified(line: CommandLine) -> None:
    with UrzaStore.in_folder(_folder(line)) as store:
        _, kernel = add_kernel(store, blueprint(), key=SigningKey.generate())
    told = line.run("kernels", "verify", kernel.id, status=1).replace("\n", " ")
    assert "not trusted; to trust it, add its public key" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("kernels", "show", "nothing"), "no kernel is called 'nothing'"),
        (("blueprints", "show", "abc"), "there is no blueprint 'abc'"),
        (("submit", "missing.json"), "missing.json cannot be read"),
        (("watch",), "set redis.url"),
        (("config", "check", "missing.yaml"), "cannot be read"),
        (("urza", "--port", "99999"), "less than or equal to 65535"),
        (("--config", "missing.yaml", "config", "show"), "cannot be read"),
    ],
)
def test_mistakes_are_named(line: CommandLine, arguments: tuple[str, ...], told: str) -> None:
    status = 2 if arguments[0] in ("submit", "urza") else 1
    assert told in " ".join(line.run(*arguments, status=status).replace("│", " ").split())


def test_a_broken_blueprint_is_refused_before_anything_is_stored(line: CommandLine) -> None:
    line.run("submit", "-", stdin=b'{"schema": 1}', status=1)
    assert json.loads(line.run("blueprints", "list", "--json")) == []


def test_settings_are_shown_without_secrets(line: CommandLine, tmp_path: Path) -> None:
    file = tmp_path / "esper.yaml"
    file.write_text("name: lab\nredis: {url: 'redis://:hunter2@localhost'}\n")
    told = line.run("--config", str(file), "config", "show")
    assert yaml.safe_load(told)["name"] == "lab"
    assert "hunter2" not in told
    assert json.loads(line.run("--config", str(file), "config", "show", "--json"))["name"] == "lab"
    file.write_text("name: lab\ntezzeret:\n  pipelin: fast\n")
    assert f"{file}:3: tezzeret.pipelin" in line.run("config", "check", str(file), status=1).replace("\n", "")


@pytest.mark.parametrize("file", ["esper.yaml", "workstation.yaml", "trainer.yaml"])
def test_sample_settings_can_be_used(line: CommandLine, file: str) -> None:
    assert "can be used" in line.run("config", "check", str(_ROOT / "deploy" / file))


def _settings_in(lines: Iterable[str]) -> dict[str, str]:
    pairs = (each.removeprefix("Environment=").partition("=") for each in lines)
    return {name: value for name, _, value in pairs if name.startswith("ESPER_") and name != "ESPER_CONFIG"}


@pytest.mark.parametrize("part", ["compose urza", "compose tezzeret", "esper-urza.service", "esper-tezzeret.service"])
def test_sample_deployments_set_what_there_is_to_set(line: CommandLine, part: str) -> None:
    secrets = _settings_in((_ROOT / "deploy" / "esper.env.example").read_text().splitlines())
    if part.startswith("compose"):
        services = yaml.safe_load((_ROOT / "deploy" / "compose.yaml").read_text())["services"]
        service = services[part.split()[1]]
        assert set(service["depends_on"]) <= set(services)
        settings = _settings_in(f"{name}={value}" for name, value in service["environment"].items())
    else:
        settings = _settings_in((_ROOT / "deploy" / part).read_text().splitlines())
    assert secrets
    assert settings
    sample = str(_ROOT / "deploy" / "esper.yaml")
    assert "can be used" in line.run("config", "check", sample, **secrets, **settings)


def test_keys(line: CommandLine, tmp_path: Path) -> None:
    shown = json.loads(line.run("keys", "show", "--json"))
    assert SigningKey.load(line.folder / "signing.pem").public_bytes.hex() == shown["public_key"]
    made = json.loads(line.run("keys", "new", str(tmp_path / "other"), "--json"))
    assert made["public_key"] != shown["public_key"]
    assert "remove it first" in line.run("keys", "new", str(tmp_path / "other"), status=2)


def test_the_doctor_finds_nothing_wrong_here(line: CommandLine) -> None:
    findings = {each["part"]: each["state"] for each in json.loads(line.run("doctor", "--json"))}
    assert findings == {
        "torch": "ok", "C++ compiler": "ok", "compiled code": "ok", "settings": "ok", "data folder": "ok",
        "Redis": "note", "Urza": "note",
    }  # fmt: skip


def test_the_doctor_says_what_is_wrong_and_what_to_do(line: CommandLine) -> None:
    told = line.run(
        "doctor", status=1, CXX="/nowhere/g++", ESPER_REDIS__URL="redis://127.0.0.1:1",
        ESPER_URZA__URL="http://127.0.0.1:1",
    )  # fmt: skip
    for part, remedy in (
        ("C++ compiler: /nowhere/g++ is not found", "apt install g++"),
        ("Redis: ", "correct redis.url"),
        ("Urza: http://127.0.0.1:1 cannot be reached", "start `esper urza`"),
    ):
        assert part in told
        assert remedy in told


def test_a_port_that_is_taken_is_refused_before_anything_starts(line: CommandLine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        for arguments in (("up", "--port", port), ("up",)):
            told = line.run(*arguments, status=1, ESPER_URZA__PORT=port).replace("\n", " ")
            assert f"port {port} of 127.0.0.1 cannot be had" in told
            assert "choose another with --port" in told
    assert not line.folder.exists()


def test_counts_are_said_to_be_of_this_folder_where_another_store_is_in_use(line: CommandLine) -> None:
    told = line.run("urza", "stats", ESPER_URZA__URL="http://127.0.0.1:1").replace("\n", " ")
    assert f"of the data in {line.folder}, not of the store at http://127.0.0.1:1" in told


def test_counts_and_collection(line: CommandLine, kernel: str) -> None:
    stats = json.loads(line.run("urza", "stats", "--json"))
    assert (stats["kernels"], stats["blueprints"][BlueprintStatus.VALIDATED]) == (1, 1)
    line.run("urza", "gc", "--keep-days", "0", "--json")
    assert json.loads(line.run("kernels", "verify", kernel, "--json"))["id"] == kernel


def test_whoever_waits_for_a_kernel_that_is_there_gets_it(line: CommandLine, kernel: str) -> None:
    told = line.run("submit", "-", "--wait", "--json", stdin=blueprint().to_json().encode())
    assert json.loads(told)["id"] == kernel  # and nothing else is on standard output
    assert line.errors.splitlines()[-1] == f"blueprint {blueprint().id[:12]} is compiled"


def test_whoever_waits_is_told_how_far_it_is_line_by_line(line: CommandLine) -> None:
    _claimed_elsewhere(line)
    given = ("submit", "-", "--wait", "--name", "growth", "--timeout", "1")
    told = line.run(*given, status=1, stdin=blueprint().to_json().encode())
    assert "it goes on, wait for it again" in told.replace("\n", " ")
    what = f"blueprint {blueprint().id[:12]} (growth)"
    lines = [each for each in line.errors.splitlines() if each.startswith(what)]
    assert lines[-2:] == [f"{what} is compiled and validated", f"{what} has no kernel"]
    assert "\x1b" not in line.errors


def test_on_a_terminal_one_line_moves(line: CommandLine) -> None:
    _claimed_elsewhere(line)
    given = ("submit", "-", "--wait", "--timeout", "1")
    line.run(*given, status=1, stdin=blueprint().to_json().encode(), FORCE_COLOR="1", TERM="xterm")
    assert f"blueprint {blueprint().id[:12]} is compiled and validated 0:00:0" in line.errors
    assert "\x1b[2K" in line.errors  # the line is written anew


def _claimed_elsewhere(line: CommandLine) -> None:
    """A worker of another machine has the blueprint."""
    with UrzaStore.in_folder(_folder(line)) as store:
        store.blueprints.submit(blueprint())
        assert store.blueprints.claim("elsewhere", blueprint_id=blueprint().id)


@pytest.mark.slow
def test_a_submission_may_be_waited_for(line: CommandLine) -> None:
    told = line.run(
        "submit", "-", "--wait", "--json", stdin=blueprint().to_json().encode(), ESPER_TEZZERET__PIPELINE="fast"
    )
    assert json.loads(told)["blueprint_id"] == blueprint().id
    what = f"blueprint {blueprint().id[:12]}"
    assert line.errors.splitlines()[-2:] == [f"{what} is compiled and validated", f"{what} is compiled"]
