"""`esper doctor`: what this machine has that Esper needs, what is wrong, and what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import httpx
import typer
from rich.console import Console
from rich.text import Text

import esper
from esper.commands.output import AsJson, print_json
from esper.configs import ConfigError, EsperConfig, load_config
from esper.errors import EsperError
from esper.ownership import UnsafePathError, check_own
from esper.services.parts import data_folder, open_local_store, signing_key

__all__ = [
    "Finding",
    "doctor",
]

State = Literal["ok", "note", "wrong"]
_STYLES = {"ok": "green", "note": "yellow", "wrong": "red"}
_OLDEST_TORCH, _NEWEST_TORCH = (2, 11), (2, 13)
_FREE_MIB = 1024
_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it is, and what to do if it is not well."""

    part: str
    state: State
    found: str
    remedy: str = ""


def _examine() -> Iterator[Finding]:
    """All findings, one after the other."""
    yield _torch()
    yield _compiler()
    yield _cache_folder()
    try:
        config = load_config()
    except ConfigError as error:
        yield Finding("settings", "wrong", str(error), "correct it; `esper config check` looks again")
        return
    source = os.environ.get("ESPER_CONFIG") or "the environment and defaults"
    yield Finding("settings", "ok", f"from {source}, for {config.environment}")
    for look in (_data, _redis, _urza):
        yield look(config)


def _torch() -> Finding:
    import torch

    devices = "CPU" if not torch.cuda.is_available() else ", ".join(
        torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
    )  # fmt: skip
    found = f"esper {esper.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}, {devices}"
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if not _OLDEST_TORCH <= release <= _NEWEST_TORCH:
        return Finding("torch", "wrong", found, "install torch 2.11, 2.12 or 2.13")
    return Finding("torch", "ok", found)


def _compiler() -> Finding:
    """Compiles and links a program with the compiler that Inductor takes."""
    name = os.environ.get("CXX") or "g++"
    remedy = "install g++ (Debian: apt install g++), or name a compiler in CXX"
    path = shutil.which(name)
    if path is None:
        return Finding("C++ compiler", "wrong", f"{name} is not found on PATH", remedy)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.cpp"
        source.write_text('#include <cmath>\nextern "C" double f(double x) { return std::tanh(x); }\n')
        command = [path, "-shared", "-fPIC", "-O1", str(source), "-o", str(Path(folder) / "try.so")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Finding("C++ compiler", "wrong", f"{path} cannot be run: {error}", remedy)
    if done.returncode != 0:
        return Finding("C++ compiler", "wrong", f"{path} cannot compile: {done.stderr.strip()[:300]}", remedy)
    return Finding("C++ compiler", "ok", path)


def _cache_folder() -> Finding:
    from esper.torch_internals import compiler_cache_dir

    folder, remedy = compiler_cache_dir(), "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
    if folder is None:
        return Finding("compiled code", "note", "this torch does not say where it keeps compiled code", remedy)
    try:
        check_own(folder, "the folder of compiled code")
    except UnsafePathError as error:
        return Finding("compiled code", "wrong", str(error), "set TORCHINDUCTOR_CACHE_DIR to a folder of your own")
    return _folder("compiled code", Path(folder), remedy)


def _folder(part: str, folder: Path, remedy: str) -> Finding:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        return Finding(part, "wrong", f"{folder} cannot be written: {error.strerror}", remedy)
    free = shutil.disk_usage(folder).free / 2**20
    if free < _FREE_MIB:
        return Finding(part, "note", f"{folder}, {free:.0f} MiB free", "free some space")
    return Finding(part, "ok", f"{folder}, {free / 1024:.0f} GiB free")


def _guarded(part: str, remedy: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(part, "ok", look())
    except EsperError as error:
        return Finding(part, "wrong", str(error), remedy)


def _data(config: EsperConfig) -> Finding:
    def look() -> str:
        signing_key(config)
        if config.urza.url is not None:
            return f"{data_folder(config)}; the store is Urza's"
        with open_local_store(config) as store:
            stats = store.stats()
        return f"{data_folder(config)}, {stats.kernels} kernels, schema {stats.schema_version}"

    return _guarded("data folder", "choose another platform.root, or make the folder writable", look)


def _redis(config: EsperConfig) -> Finding:
    if config.redis.url is None:
        return Finding("Redis", "note", "not set: messages stay within one process", "set redis.url for a fleet")
    from esper.services.oona.redis_bus import RedisBus

    def look() -> str:
        bus = RedisBus(config.redis, config.oona)
        try:
            bus.ping()
        finally:
            bus.close()
        return "answers"

    return _guarded("Redis", "start it, or correct redis.url", look)


def _urza(config: EsperConfig) -> Finding:
    if config.urza.url is None:
        return Finding("Urza", "note", "not set: the store is this data folder", "set urza.url for a shared store")
    url = config.urza.url.rstrip("/")
    token = config.urza.token
    headers = {} if token is None else {"Authorization": f"Bearer {token.get_secret_value()}"}
    try:
        ready = httpx.get(f"{url}/health/ready", timeout=_TIMEOUT)
        listed = httpx.get(f"{url}/api/v1/blueprints", params={"limit": 1}, headers=headers, timeout=_TIMEOUT)
    except httpx.HTTPError as error:
        return Finding("Urza", "wrong", f"{url} cannot be reached: {error}", "start `esper urza`, or correct urza.url")
    if ready.status_code != httpx.codes.OK:
        return Finding("Urza", "wrong", f"{url} is not ready: {ready.text[:300]}", "look at its log")
    if listed.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return Finding("Urza", "wrong", f"{url} refuses the token", "set urza.token to one of scope read")
    if listed.status_code != httpx.codes.OK:
        return Finding("Urza", "wrong", f"{url} answers {listed.status_code}", "look at its log; is it Urza?")
    return Finding("Urza", "ok", f"{url} is ready, and lets this machine read")


def doctor(as_json: AsJson = False) -> None:
    """Look at compiler, torch, folders, settings, Redis and Urza. Ends with 1 if something is wrong."""
    findings = []
    console = Console()
    for finding in _examine():
        findings.append(finding)
        if not as_json:
            console.print(Text.assemble((f"{finding.state:>5}  ", _STYLES[finding.state]), (finding.part, "bold"), ": ",
                                        finding.found))  # fmt: skip
            if finding.remedy:
                console.print(Text(f"       {finding.remedy}", style="dim"))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    if any(finding.state == "wrong" for finding in findings):
        raise typer.Exit(1)
