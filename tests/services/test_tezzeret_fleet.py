"""A fleet of workers, as real processes over a real Urza and Valkey: killed, stopped, poisoned, untold."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # psutil ships no types
import pytest
import redis

from esper.artifacts import Blueprint
from esper.configs import RedisConfig
from esper.services.contracts import BlueprintRecord, BlueprintStatus, KernelQuery
from esper.services.errors import QueueUnavailableError
from esper.services.tezzeret.queue import CompilationQueue, Dispatch
from esper.services.urza import UrzaStore
from tests.golden.deployment import Deployment, deployment
from tests.services.children import wait_until_gone
from tests.services.shelf import blueprint, exponential
from tests.services.urza_server import http_client
from tests.services.valkey_bus import ends
from tests.services.valkey_server import ValkeyProcess

pytestmark = pytest.mark.xdist_group("fleet")
_CHILD = "esper.services.tezzeret.child"


@pytest.fixture
def valkey() -> Iterator[ValkeyProcess]:
    with ValkeyProcess() as server:
        yield server


class Fleet:
    """Urza and a fleet of two workers in `folder`, with short leases. They run between tests, unless one ends them."""

    def __init__(self, folder: Path, team: Deployment) -> None:
        self.team = team
        self.store = UrzaStore.in_folder(folder / "data")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """If it does not run."""
        if self._process is None or self._process.poll() is not None:
            self.team.start_urza()
            self._process = self.team.start_workers(2)

    def workers(self) -> list[psutil.Process]:
        return _descendants(self.pid, "esper.services.tezzeret.fleet")

    def compiling_child(self) -> psutil.Process:
        """Once there is one."""
        self.team.wait_for(lambda: bool(_descendants(self.pid, _CHILD)), "a child compiles")
        (child,) = _descendants(self.pid, _CHILD)
        return child


@pytest.fixture(scope="module")
def shared_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Nothing is started yet."""
    folder, settings = tmp_path_factory.mktemp("fleet"), {"ESPER_TEZZERET__LEASE_SECONDS": "3"}
    with ValkeyProcess() as server, deployment(folder, server.url, settings) as team:
        made = Fleet(folder, team)
        with made.store:
            yield made


@pytest.fixture
def fleet(shared_fleet: Fleet) -> Fleet:
    """It runs."""
    shared_fleet.start()
    return shared_fleet


def _final(team: Deployment, store: UrzaStore, *wanted: Blueprint, seconds: float = 120.0) -> list[BlueprintRecord]:
    ids = [each.id for each in wanted]
    team.wait_for(
        lambda: all(store.blueprints.get(each).status.is_final for each in ids), "everything is compiled", seconds
    )
    return [store.blueprints.get(each) for each in ids]


def _descendants(pid: int, module: str) -> list[psutil.Process]:
    found = []
    for each in psutil.Process(pid).children(recursive=True):
        try:
            if module in each.cmdline() and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found


# ---- the queue -------------------------------------------------------------------------------------------------------


def _settings(url: str) -> RedisConfig:
    return RedisConfig.model_validate({"url": url, "socket_timeout": 1.0})


def test_what_is_put_is_worked_on_once(valkey: ValkeyProcess) -> None:
    messages, done = CompilationQueue(_settings(valkey.url)), list[str]()
    ids = [letter * 64 for letter in "abc"]
    for each in ids:
        messages.put(each)
    assert len(messages) == 3
    with messages.consumed_by(done.append):
        deadline = time.monotonic() + 10
        while len(done) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert sorted(done) == ids
    assert len(messages) == 0


@pytest.mark.parametrize(
    ("url", "told"),
    [(None, "set redis.url"), ("http://x", "redis.url cannot be used"), ("redis://127.0.0.1:1", "cannot be reached")],
)
def test_a_queue_without_a_server_says_what_to_do(url: str | None, told: str) -> None:
    with pytest.raises(QueueUnavailableError, match=told):
        CompilationQueue(RedisConfig.model_validate({"url": url})).put("a")


def test_urza_tells_again_what_an_emptied_server_lost(store: UrzaStore, valkey: ValkeyProcess) -> None:
    messages = CompilationQueue(_settings(valkey.url))
    store.blueprints.submit(blueprint())
    with Dispatch(store.blueprints, messages, sweep_seconds=0.1) as dispatch:
        dispatch.submitted(blueprint().id)
        _until(lambda: len(messages) >= 1)
        valkey.restart_empty()
        _until(lambda: _length(messages) >= 1)


def test_a_worker_takes_messages_again_from_a_server_that_came_back_empty(valkey: ValkeyProcess) -> None:
    messages, done = CompilationQueue(_settings(valkey.url)), list[str]()
    with messages.consumed_by(done.append):
        messages.put("a" * 64)
        _until(lambda: done == ["a" * 64])
        valkey.restart_empty()
        messages.put("b" * 64)
        _until(lambda: done == ["a" * 64, "b" * 64], seconds=20)


def test_a_submission_does_not_wait_for_a_server_that_is_away(store: UrzaStore) -> None:
    messages = CompilationQueue(_settings("redis://127.0.0.1:1"))
    with Dispatch(store.blueprints, messages, sweep_seconds=0.1) as dispatch:
        ends(lambda: [dispatch.submitted(blueprint().id) for _ in range(1000)])


def test_what_a_server_that_was_away_missed_is_told_while_submissions_go_on(
    store: UrzaStore, valkey: ValkeyProcess, caplog: pytest.LogCaptureFixture
) -> None:
    missed, done, enough = store.blueprints.submit(blueprint()).id, list[str](), threading.Event()
    messages = CompilationQueue(_settings(valkey.url))
    valkey.stop()

    def go_on() -> None:
        while not enough.wait(0.05):
            dispatch.submitted("a" * 64)

    others = threading.Thread(target=go_on)
    with Dispatch(store.blueprints, messages, sweep_seconds=0.5) as dispatch:
        dispatch.submitted(missed)
        others.start()
        try:
            _until(lambda: "workers are not told" in caplog.text)
            valkey.start()
            with messages.consumed_by(done.append):
                _until(lambda: missed in done, seconds=20)
        finally:
            enough.set()
            others.join()


def _length(messages: CompilationQueue) -> int:
    try:
        return len(messages)
    except QueueUnavailableError:
        return 0


def _until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_that_is_killed_at_its_work_loses_nothing_and_is_replaced(fleet: Fleet) -> None:
    fleet.store.blueprints.submit(blueprint(1))
    child = fleet.compiling_child()
    (worker,) = (each for each in fleet.workers() if each == child.parent())
    log = fleet.team.log("tezzeret").read_text()
    assert f"esper.services.tezzeret.fleet: worker {worker.pid} is ready" in log
    worker.kill()
    wait_until_gone(child, 60)  # at a low priority, beside other tests
    (record,) = _final(fleet.team, fleet.store, blueprint(1))
    assert record.status is BlueprintStatus.VALIDATED, record.reason
    assert record.attempts == 2
    kernels = fleet.store.kernels.query(KernelQuery())
    assert [each.blueprint_id for each in kernels].count(record.id) == 1
    fleet.team.wait_for(lambda: len(fleet.workers()) == 2, "there are two workers again")
    assert worker not in fleet.workers()


@pytest.mark.slow
def test_a_poisonous_blueprint_ends_invalid_and_the_next_is_compiled(fleet: Fleet) -> None:
    fleet.store.blueprints.submit(exponential())
    fleet.store.blueprints.submit(blueprint(2))
    bad, good = _final(fleet.team, fleet.store, exponential(), blueprint(2))
    assert bad.status is BlueprintStatus.INVALID
    assert bad.report is not None
    assert bad.report.failures()
    assert good.status is BlueprintStatus.VALIDATED, good.reason


@pytest.mark.slow
def test_without_redis_and_with_urza_late_workers_come_to_it(tmp_path: Path) -> None:
    with deployment(tmp_path, "redis://127.0.0.1:1") as team:
        fleet = team.start_workers(1)
        team.wait_for(lambda: "tries again in a while" in team.log("tezzeret").read_text(), "the worker tries")
        team.start_urza()
        with UrzaStore.in_folder(team.folder / "data") as store:
            store.blueprints.submit(blueprint())
            (record,) = _final(team, store, blueprint())
        assert record.status is BlueprintStatus.VALIDATED, record.reason
        assert fleet.poll() is None


@pytest.mark.slow
def test_a_fleet_that_is_stopped_gives_back_what_it_works_on(fleet: Fleet) -> None:
    fleet.store.blueprints.submit(new := blueprint(3, width=6))  # of a structure that nobody has compiled here
    fleet.compiling_child()
    started = psutil.Process(fleet.pid).children(recursive=True)
    assert set(fleet.team.stop().values()) == {0}
    for each in started:
        wait_until_gone(each, 1)
    record = fleet.store.blueprints.get(new.id)
    assert (record.status, record.attempts) == (BlueprintStatus.UNVALIDATED, 0)


# ---- all of it on one machine ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_esper_up_says_where_things_are_and_takes_everything_down_at_ctrl_c(tmp_path: Path) -> None:
    with UrzaStore.in_folder(tmp_path / "data") as store:
        store.blueprints.submit(blueprint(3))
    with deployment(tmp_path, "") as team:
        environment = team.environment(ESPER_URZA__PORT="0")
        del environment["ESPER_REDIS__URL"]
        command = [sys.executable, "-m", "esper.cli", "up", "--json"]
        with open(team.log("up"), "ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        try:
            assert process.stdout is not None
            told = ""
            while not told.endswith("\n}\n") and (text := process.stdout.readline()):
                told += text
            where = json.loads(told)["environment"]
            with http_client(where["ESPER_URZA__URL"]) as client:
                assert client.get("/health/ready").status_code == 200
            redis.Redis.from_url(where["ESPER_REDIS__URL"]).ping()
            up = psutil.Process(process.pid)
            team.wait_for(lambda: bool(_descendants(process.pid, _CHILD)), "Valkey and Urza run, and a worker compiles")
            started = up.children(recursive=True)
            assert len(started) >= 3
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does
            assert process.wait(90) == 0
            assert "is killed" not in team.log("up").read_text()
        finally:
            process.kill()
        for each in started:
            wait_until_gone(each, 5)
    with UrzaStore.in_folder(tmp_path / "data") as store:
        record = store.blueprints.get(blueprint(3).id)
    assert (record.status, record.attempts) == (BlueprintStatus.UNVALIDATED, 0)  # given back
