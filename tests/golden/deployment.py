"""Esper as a team runs it: Urza, workers, Redis, a database and blobs, each a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.services.urza_server import http_client
from tests.services.valkey_server import free_port

__all__ = ["TOKENS", "Deployment", "deployment"]

_ROOT = Path(__file__).parents[2]
TOKENS = {"submitter": "a-token-to-submit-with", "worker": "a-token-to-work-with"}


class Deployment:
    """Processes with one set of settings, in `folder`; their logs are files there. Stops what it has started."""

    def __init__(self, folder: Path, redis_url: str, settings: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.url = f"http://127.0.0.1:{free_port()}"
        self.redis_url = redis_url
        self._settings = dict(settings or {})
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def environment(self, **more: str) -> dict[str, str]:
        """Of a process that belongs to it."""
        own = {
            "ESPER_NAME": "golden",
            "ESPER_PLATFORM__ROOT": str(self.folder / "data"),
            "ESPER_REDIS__URL": self.redis_url,
            "ESPER_TEZZERET__PIPELINE": "fast",
            "ESPER_TEZZERET__POLL_SECONDS": "1",
            "ESPER_URZA__SWEEP_SECONDS": "1",
            "ESPER_URZA__CLIENT__CACHE_FOLDER": str(self.folder / "cache"),
        }
        outside = {name: value for name, value in os.environ.items() if not name.startswith("ESPER_")}
        return {**outside, **own, **self._settings, **more}

    def start(self, name: str, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
        """`esper arguments...`, as the process `name`."""
        with open(self.log(name), "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "esper.cli", *arguments],
                env=self.environment(**settings), stdout=log, stderr=log, cwd=_ROOT,
            )  # fmt: skip
        self._processes[name] = process
        return process

    def start_urza(self) -> None:
        """And wait until it is ready."""
        process = self.start("urza", "urza", "--port", self.url.rpartition(":")[2])
        self.wait_for(lambda: process.poll() is not None or self.is_ready(), "Urza is ready")
        assert process.poll() is None, self.log("urza").read_text()

    def start_workers(self, count: int) -> subprocess.Popen[bytes]:
        """A fleet."""
        return self.start(
            "tezzeret", "tezzeret", "--workers", str(count),
            ESPER_URZA__URL=self.url, ESPER_URZA__TOKEN=TOKENS["worker"],
        )  # fmt: skip

    def is_ready(self) -> bool:
        """Whether Urza says so."""
        try:
            return httpx.get(f"{self.url}/health/ready", timeout=2.0).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def client(self, token: str | None = None) -> httpx.Client:
        """Of Urza, to be closed by the caller."""
        return http_client(self.url, token)

    def log(self, name: str) -> Path:
        """The file with what the process has printed."""
        return self.folder / f"{name}.log"

    def wait_for(self, holds: Callable[[], bool], what: str, seconds: float = 200.0) -> None:
        """Until `holds()`; fails with the logs after `seconds`."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in self.folder.glob("*.log"))
                raise AssertionError(f"not within {seconds:g} s: {what}\n{logs}")
            time.sleep(0.1)

    def stop(self) -> dict[str, int]:
        """Have everything end, one after another, the workers before the Urza that they work for; statuses by name."""
        statuses = {}
        for name, process in reversed(self._processes.items()):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                statuses[name] = process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                statuses[name] = process.wait()
        self._processes.clear()
        return statuses


@contextmanager
def deployment(folder: Path, redis_url: str, settings: Mapping[str, str] | None = None) -> Iterator[Deployment]:
    """Stopped at the end of the block."""
    made = Deployment(folder, redis_url, settings)
    try:
        yield made
    finally:
        made.stop()
