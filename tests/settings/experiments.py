"""For each setting a small experiment: the same is done under two values, and goes differently."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import esper
from esper import EsperConfig, Platform
from esper.artifacts import Artifact, SigningKey, TrustStore
from esper.configs import ConfigError
from esper.contracts.messages import OonaMessage
from esper.logs import set_up_service_log
from esper.services.contracts import BlueprintStatus
from esper.services.errors import CompilationFailedError, ForbiddenError, StoreError, UnauthorisedError
from esper.services.oona import InMemoryBus
from esper.services.oona.errors import BusUnavailableError
from esper.services.parts import open_bus, open_local_store
from esper.services.tezzeret.fleet import FleetWorker
from esper.services.urza import UrzaStore
from esper.services.urza.app import create_app
from esper.services.urza_client import RemoteKernelSource, RemoteStore
from tests.services.broken_server import GOOD, BrokenServer, ask, problem, silence
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import RunningUrza
from tests.services.valkey_bus import SUBMITTED, message, received, submitted
from tests.services.valkey_server import ValkeyProcess

__all__ = ["EXPERIMENTS", "Experiment"]

Experiment = Callable[[Path], None]
"""Gets an empty folder, and fails if a setting has no effect."""

EXPERIMENTS: dict[str, Experiment] = {}


def shows(*settings: str) -> Callable[[Experiment], Experiment]:
    def note(experiment: Experiment) -> Experiment:
        EXPERIMENTS.update(dict.fromkeys(settings, experiment))
        return experiment

    return note


def config(**sections: Any) -> EsperConfig:
    return EsperConfig.model_validate(sections)


def outwaits(impatient: Callable[[], object], patient: Callable[[], object]) -> None:
    """`impatient` gives up while `patient`, which has begun before it, still waits."""
    waiting = threading.Thread(target=patient, daemon=True)
    waiting.start()
    impatient()
    assert waiting.is_alive()


# -- the program, and the embedded platform ----------------------------------------------------------------------------


@shows("name")
def _name(folder: Path) -> None:
    for name in ("lab", "home"):
        with Platform.embedded(folder, config=config(name=name)) as platform:
            heard: queue.Queue[OonaMessage] = queue.Queue()
            with platform.oona.subscribe(SUBMITTED, heard.put):
                platform.oona.publish(SUBMITTED, submitted(1))
                assert heard.get(timeout=20).sender_id.startswith(name)


@shows("environment")
def _environment(folder: Path) -> None:
    with UrzaStore.in_folder(folder) as store:
        create_app(store, config(environment="development"))
        with pytest.raises(ConfigError, match="production"):
            create_app(store, config(environment="production"))


@shows("platform.root", "platform.trusted_keys")
def _platform(folder: Path) -> None:
    stranger = SigningKey.generate()
    for number, keys in enumerate(((), (stranger.public_bytes.hex(),))):
        root = folder / str(number)
        with Platform.embedded(config=config(platform={"root": root, "trusted_keys": keys})) as platform:
            assert (stranger.key_id in platform.trust) is bool(keys)
            assert (root / "signing.pem").exists()


@shows("database.url", "store.url")
def _places(folder: Path) -> None:
    for number in range(2):
        there = folder / f"tables{number}.db", folder / f"blobs{number}"
        settings = config(database={"url": f"sqlite:///{there[0]}"}, store={"url": f"file://{there[1]}"})
        with open_local_store(settings, folder) as store:
            add_kernel(store, blueprint())
        assert there[0].exists()
        assert any(each.is_file() for each in there[1].rglob("*"))


@shows("telemetry.enabled", "execution.cache_size_mb")
def _wrapping(folder: Path) -> None:
    for enabled, size in ((True, 2), (False, 3)):
        settings = config(telemetry={"enabled": enabled}, execution={"cache_size_mb": size})
        with Platform.embedded(folder, config=settings) as platform:
            model = esper.wrap(nn.Sequential(nn.Linear(2, 2)), platform=platform)
            model(torch.zeros(1, 2))
            layer = model.kasmina_layers["0"]
            assert layer.get_layer_stats()["execution_count"] == int(enabled)
            assert layer.kernel_cache.max_cache_size_mb == size


@shows("execution.compile_workers", "execution.compile_timeout", "execution.compile_niceness")
def _compile_workers(folder: Path) -> None:
    for count, seconds, niceness in (("1", "600", "0"), ("2", "0.001", "7")):
        settings = {
            "ESPER_EXECUTION__COMPILE_WORKERS": count,
            "ESPER_EXECUTION__COMPILE_TIMEOUT": seconds,
            "ESPER_EXECUTION__COMPILE_NICENESS": niceness,
        }
        done = subprocess.run(
            [sys.executable, "-c", _POOL, count], capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, **settings},
        )  # fmt: skip
        assert done.stdout.split() == [niceness, count, str(seconds != "600")], done.stderr


_POOL = """
import psutil, sys, time
from esper.compiler.workers import default_workers
pool = default_workers()
pool.warm()
end = time.monotonic() + 120
while (count := len(psutil.Process().children())) < int(sys.argv[1]) and time.monotonic() < end:
    time.sleep(0.01)
print(psutil.Process().children()[0].nice() - psutil.Process().nice())
try:
    pool.submit(b"no job").result(240)
except Exception as error:
    print(count, "execution.compile_timeout" in str(error))
"""
"""In a process of its own, where the pool is made anew: its priority, its processes, whether a job ran out of time."""


@shows("logging.level", "logging.format")
def _logging(folder: Path) -> None:
    root, before = logging.getLogger("esper"), logging.getLogger("esper").handlers[:]
    level = root.level
    try:
        for settings in (config(logging={"level": "info", "format": "json"}), config(logging={"level": "error"})):
            with contextlib.redirect_stderr(io.StringIO()) as told:
                set_up_service_log(settings.logging.level, settings.logging.format)
                logging.getLogger("esper.services").warning("something")
            lines = told.getvalue().splitlines()
            root.handlers[:] = before
            if settings.logging.level == "error":
                assert not lines
            else:
                assert json.loads(lines[0])["message"] == "something"
    finally:
        root.handlers[:] = before
        root.setLevel(level)


# -- the bus -----------------------------------------------------------------------------------------------------------


class _Gate(InMemoryBus):
    """Lets nothing through until it is opened, and knows how large batches were."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()
        self.sizes: list[int] = []

    def send(self, messages: Any) -> Any:
        self.opened.wait(30)
        self.sizes.append(len(messages))
        return super().send(messages)


@shows("oona.queue_size", "oona.batch_size")
def _queue(folder: Path) -> None:
    for size, batch in ((20, 5), (10, 2)):
        bus = _Gate()
        with Platform(folder, config(oona={"queue_size": size, "batch_size": batch}), bus) as platform:
            for number in range(60):
                platform.oona.publish(SUBMITTED, submitted(number))
            dropped = platform.oona.stats().dropped
            bus.opened.set()
            platform.oona.flush()
            assert 60 - size - batch <= dropped <= 60 - size
            assert max(bus.sizes) == batch


@shows("redis.url", "redis.prefix", "oona.max_length")
def _streams(folder: Path) -> None:
    assert isinstance(open_bus(config()), InMemoryBus)
    with ValkeyProcess() as server, server.client() as client:
        for prefix, most in (("lab", 100), ("home", 10_000)):
            settings = config(redis={"url": server.url, "prefix": prefix}, oona={"max_length": most})
            with contextlib.closing(open_bus(settings)) as bus:
                bus.send([message(number) for number in range(1000)])
            assert (client.xlen(f"{prefix}:oona:{SUBMITTED}") == 1000) is (most > 1000)


@shows("redis.connect_timeout", "redis.socket_timeout")
def _redis_patience(folder: Path) -> None:
    with ValkeyProcess() as server:
        server.freeze()

        def ping(seconds: float) -> None:
            patience = {"connect_timeout": seconds, "socket_timeout": seconds}
            bus: Any = open_bus(config(redis={"url": server.url, **patience}))
            with pytest.raises(BusUnavailableError):
                bus.ping()

        outwaits(lambda: ping(0.1), lambda: ping(120.0))


@shows("oona.max_deliveries", "oona.claim_idle_seconds")
def _deliveries(folder: Path) -> None:
    """Of a message whose consumers all take it and are never heard of again."""
    with ValkeyProcess() as server, server.client() as client:
        for prefix, most, idle in (("lab", 2, 0.1), ("home", 50, 0.1), ("shop", 2, 600.0)):
            section = {"max_deliveries": most, "claim_idle_seconds": idle}
            bus = open_bus(config(redis={"url": server.url, "prefix": prefix}, oona=section))
            bus.subscribe([SUBMITTED], group="g").close()
            bus.send([message(1)])
            taken = 0
            for _ in range(4):
                taken += len(received(bus.subscribe([SUBMITTED], group="g"), 1, seconds=2 if taken else 20))
                time.sleep(0.15)
            assert (taken, client.xlen(f"{prefix}:oona:dead")) == {"lab": (2, 1), "home": (4, 0), "shop": (1, 0)}[
                prefix
            ]
            bus.close()


# -- Urza, and who asks it ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _served(folder: Path, **urza: Any) -> Iterator[RunningUrza]:
    with UrzaStore.in_folder(folder) as store, RunningUrza(store, config(urza={"port": 0, **urza})) as running:
        yield running


@shows("urza.url", "urza.token", "urza.tokens.name", "urza.tokens.token", "urza.tokens.scopes", "urza.tokens")
def _access(folder: Path) -> None:
    tokens = [
        {"name": "reader", "token": "r" * 16, "scopes": ["read"]},
        {"name": "submitter", "token": "s" * 16, "scopes": ["read", "submit"]},
    ]
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]  # a handler in one line
    log = logging.getLogger("esper.services.urza.http.request_log")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    with _served(folder, tokens=tokens) as urza:
        for token, may in (("s" * 16, True), ("r" * 16, False), ("x" * 16, False), (None, False)):
            with contextlib.closing(RemoteStore(config(urza={"url": urza.url, "token": token}).urza)) as store:
                if may:
                    store.blueprints.submit(blueprint())
                else:
                    with pytest.raises((UnauthorisedError, ForbiddenError)):
                        store.blueprints.submit(blueprint())
    log.removeHandler(handler)
    log.setLevel(logging.NOTSET)
    told = " ".join(str({**vars(each)}) for each in records)
    assert "submitter" in told
    assert "s" * 16 not in told


@shows("urza.host", "urza.port")
def _address(folder: Path) -> None:
    with _served(folder, host="127.0.0.1") as urza:
        assert urza.url == f"http://127.0.0.1:{urza.port}"
        with pytest.raises(ConfigError, match=f"{urza.port}.*urza.port"), _served(folder, port=urza.port):
            raise AssertionError("two at one port")
    with _served(folder, host="127.0.0.2") as urza:
        assert urza.url.startswith("http://127.0.0.2:")


@shows("urza.max_body_mb", "urza.rate_per_second", "urza.rate_burst", "urza.request_timeout")
def _limits(folder: Path) -> None:
    body = json.dumps({"blueprint": json.loads(blueprint().to_json())})
    for urza, status in (({}, 201), ({"max_body_mb": 1e-5}, 413), ({"request_timeout": 1e-9}, 503)):
        with _served(folder / str(status), **urza) as running, running.client() as client:
            sent = client.post("/api/v1/blueprints", content=body, headers={"content-type": "application/json"})
            assert sent.status_code == status, sent.text
    for rate, burst, most in ((0, 1, 20), (0.001, 3, 3), (0.001, 5, 5)):
        with (
            _served(folder / f"{burst}", rate_per_second=rate, rate_burst=burst) as running,
            running.client() as client,
        ):
            answers = [client.get("/api/v1/blueprints").status_code for _ in range(20)]
            assert answers.count(200) == most


@shows("urza.client.timeout", "urza.client.retry_seconds", "urza.client.retries", "urza.client.offline")
def _patience(folder: Path) -> None:
    def asked(server: BrokenServer, **client: Any) -> None:
        store = RemoteStore(config(urza={"url": server.url, "client": client}).urza)
        with contextlib.closing(store), pytest.raises(StoreError):
            ask(store)

    with BrokenServer(silence) as server:
        outwaits(lambda: asked(server, timeout=0.1, retries=0), lambda: asked(server, timeout=120, retries=0))
    with BrokenServer(problem(503, "store-busy")) as server:
        for retries in (0, 2):
            before = len(server.requests)
            asked(server, retries=retries, retry_seconds=0.01)
            assert len(server.requests) - before == retries + 1
    with BrokenServer(GOOD) as server:
        asked(server, offline=True)
        assert not server.requests


@shows("urza.client.cache_folder", "urza.client.cache_mb")
def _disk(folder: Path) -> None:
    key = SigningKey.generate()
    with UrzaStore.in_folder(folder / "urza") as store:
        artifact: Artifact = add_kernel(store, blueprint(), key=key)[0]
        with RunningUrza(store, config(urza={"port": 0})) as urza:
            for size in (10.0, 1e-4):
                there = folder / f"cache{size}"
                client = {"cache_folder": there, "cache_mb": size}
                with contextlib.closing(RemoteStore(config(urza={"url": urza.url, "client": client}).urza)) as remote:
                    RemoteKernelSource(remote, lambda: TrustStore([key.public_bytes])).fetch(artifact.id)
                kept = [
                    each for each in there.rglob("*") if each.is_file() and each.stat().st_size >= len(artifact.data)
                ]
                assert bool(kept) is (size > 1)


# -- Tezzeret ----------------------------------------------------------------------------------------------------------


@shows("tezzeret.pipeline", "tezzeret.wall_seconds", "tezzeret.memory_mb")
def _compilation(folder: Path) -> None:
    for tezzeret, told in (
        ({"pipeline": "fast", "wall_seconds": 0.01}, "within 0.01 s"),
        ({"pipeline": "aggressive", "memory_mb": 1}, "more than 1 MiB"),
    ):
        with Platform.embedded(folder / str(tezzeret["pipeline"]), config=config(tezzeret=tezzeret)) as platform:
            with pytest.raises(CompilationFailedError, match=told) as failed:
                platform.compile_sync(blueprint(), timeout=120)
            assert failed.value.report is not None
            assert failed.value.report.pipeline == tezzeret["pipeline"]


@shows("tezzeret.niceness")
def _niceness(folder: Path) -> None:
    for niceness in (1, 6):
        with Platform.embedded(folder / str(niceness), config=config(tezzeret={"niceness": niceness})) as platform:
            before = set(psutil.Process().children())
            platform.submit(blueprint())
            while not (children := set(psutil.Process().children()) - before):
                time.sleep(0.01)
            time.sleep(0.1)  # it is started before its priority is lowered
            assert {child.nice() - os.nice(0) for child in children} == {niceness}


@shows("tezzeret.lease_seconds")
def _lease(folder: Path) -> None:
    for seconds in (1000.0, 5000.0):
        with Platform.embedded(folder / str(seconds), config=config(tezzeret={"lease_seconds": seconds})) as platform:
            blueprint_id = platform.submit(blueprint())
            while (record := platform.store.blueprints.get(blueprint_id)).status is not BlueprintStatus.COMPILING:
                assert not record.status.is_final
            assert record.lease_expires_at is not None
            assert abs((record.lease_expires_at - record.updated_at).total_seconds() - seconds) < 900


@shows("tezzeret.poll_seconds")
def _poll(folder: Path) -> None:
    """Of two workers that found nothing, the one that asks again soon takes what comes."""
    taken: queue.Queue[str] = queue.Queue()

    class Idle:
        def __init__(self, name: str) -> None:
            self.name, self.asked = name, 0

        def compile_next(self, stop: object, blueprint_id: str | None) -> None:
            del stop, blueprint_id
            taken.put(self.name)

    settings = [config(tezzeret={"poll_seconds": seconds}).tezzeret for seconds in (600.0, 0.01)]
    workers = [FleetWorker(Idle(n), None, s.poll_seconds) for n, s in zip("ab", settings, strict=True)]  # type: ignore[arg-type]  # all that it needs of one
    threads = [threading.Thread(target=worker.run, daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    asked = [taken.get(timeout=20) for _ in range(10)]
    for worker in workers:
        worker.stop()
    assert asked.count("a") <= 1
