"""Urza's client among threads and forked children, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # psutil ships no types
import pytest

from esper.configs import UrzaConfig
from esper.services.contracts import KernelQuery
from esper.services.errors import UnknownBlueprintError, UrzaUnavailableError
from esper.services.urza import UrzaStore
from esper.services.urza_client import RemoteStore
from tests.services.broken_server import GOOD, BrokenServer, ask, broken, problem, silence
from tests.services.programs import forked
from tests.services.remote_stores import NOBODY, remote_of
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import RunningUrza, locked


@pytest.fixture
def remote(urza: RunningUrza) -> Iterator[RemoteStore]:
    opened = remote_of(urza)
    yield opened
    opened.close()


def connections_to(urza: RunningUrza) -> int:
    """How many this process has as a client."""
    found = psutil.Process().net_connections("tcp")
    return sum(1 for each in found if each.raddr and each.raddr.port == urza.port and each.status == "ESTABLISHED")


class TestThreads:
    @pytest.mark.slow
    def test_each_gets_its_own_answer(self, store: UrzaStore, remote: RemoteStore) -> None:
        kernels = [add_kernel(store, blueprint(seed), f"kernel-{seed}")[0] for seed in range(8)]

        def ask(number: int) -> None:
            artifact = kernels[number % 8]
            for _ in range(5):
                assert remote.kernels.resolve(f"kernel-{number % 8}") == artifact.id
                assert remote.kernels.content(artifact.id)[0] == artifact.data
                assert remote.blueprints.get(artifact.blueprint_id).artifact_id == artifact.id
                with pytest.raises(UnknownBlueprintError):
                    remote.blueprints.get(NOBODY)

        with ThreadPoolExecutor(24) as pool:
            for future in [pool.submit(ask, number) for number in range(24)]:
                future.result(60)

    def test_connections_are_used_again(self, urza: RunningUrza, remote: RemoteStore) -> None:
        for _ in range(10):
            remote.blueprints.list()
        assert connections_to(urza) == 1

    def test_one_that_waits_holds_up_nobody(self, folder: Path, remote: RemoteStore) -> None:
        with ThreadPoolExecutor(1) as pool, locked(folder) as release:
            waiting = pool.submit(remote.blueprints.submit, blueprint(1))
            assert remote.blueprints.list() == ()
            assert not waiting.done()
            release()
            assert waiting.result(60).id == blueprint(1).id


class TestClose:
    def test_ends_the_connections(self, urza: RunningUrza, remote: RemoteStore) -> None:
        remote.blueprints.list()
        assert connections_to(urza) == 1
        remote.close()
        assert connections_to(urza) == 0

    def test_may_come_at_any_time(self, store: UrzaStore, remote: RemoteStore) -> None:
        remote.close()
        for seed in range(3):
            remote.blueprints.submit(blueprint(seed))
            assert remote.blueprints.list() == store.blueprints.list()
            remote.close()
            remote.close()

    def test_who_waits_for_an_answer_is_told_and_held_up_nobody(self) -> None:
        with BrokenServer(*[silence] * 20, GOOD) as server, ThreadPoolExecutor(20) as pool:
            remote = RemoteStore(UrzaConfig.model_validate({"url": server.url, "client": {"timeout": 600}}))
            waiting = [pool.submit(remote.blueprints.get, NOBODY) for _ in range(20)]
            wait_for(lambda: len(server.requests) == 20)
            assert ask(remote) == 2.5
            remote.close()
            for each in waiting:
                with pytest.raises(UrzaUnavailableError, match="closed while it was asked"):
                    each.result(10)
            assert ask(remote) == 2.5
            remote.close()

    def test_who_waits_for_the_next_attempt_is_told(self) -> None:
        with broken(problem(503, "store-busy", Retry_After="29")) as (server, remote), ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask, remote)
            wait_for(lambda: server.requests)
            time.sleep(0.1)  # the answer is read by now
            remote.close()
            with pytest.raises(UrzaUnavailableError, match="closed while it was asked"):
                waiting.result(10)

    def test_who_asks_just_then_is_answered_or_told(self, remote: RemoteStore) -> None:
        ended = threading.Event()

        def ask() -> tuple[int, list[str]]:
            answers, refusals = 0, []
            while not ended.is_set():
                try:
                    answers += remote.blueprints.list() == ()
                except UrzaUnavailableError as error:
                    refusals.append(str(error))
            return answers, refusals

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask) for _ in range(4)]
            for _ in range(40):
                remote.close()
                time.sleep(0.02)
            ended.set()
            outcomes = [each.result(60) for each in asking]
        assert all(answers for answers, _ in outcomes)
        refused = [text for _, refusals in outcomes for text in refusals]
        assert refused, "nobody was asking when it was closed"
        assert all("closed while it was asked" in text for text in refused)
        assert remote.blueprints.list() == ()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


_PARENTS: list[RemoteStore] = []


def _ask_in_child(reference: str) -> tuple[str, int]:
    [remote] = _PARENTS
    found = remote.kernels.resolve(reference)
    remote.close()
    return found, len(remote.kernels.query(KernelQuery()))


class TestForks:
    @pytest.fixture(autouse=True)
    def parents(self, remote: RemoteStore) -> Iterator[None]:
        _PARENTS.append(remote)
        yield
        _PARENTS.clear()

    def test_child_and_parent_both_ask(self, store: UrzaStore, urza: RunningUrza, remote: RemoteStore) -> None:
        artifact, _ = add_kernel(store, blueprint(1), "mine")
        for _ in range(3):
            assert remote.kernels.resolve("mine") == artifact.id
            assert forked(_ask_in_child, "mine") == (artifact.id, 1)
        assert remote.kernels.content(artifact.id)[0] == artifact.data
        assert connections_to(urza) == 1, "the parent's connection was lost to a child"

    def test_while_another_thread_waits_for_an_answer(
        self, folder: Path, store: UrzaStore, remote: RemoteStore
    ) -> None:
        artifact, _ = add_kernel(store, blueprint(1), "mine")
        remote.blueprints.list()
        with ThreadPoolExecutor(1) as pool, locked(folder) as release:
            waiting = pool.submit(remote.blueprints.submit, blueprint(2))
            assert forked(_ask_in_child, "mine") == (artifact.id, 1)
            assert not waiting.done()
            release()
            assert waiting.result(60).id == blueprint(2).id


ASK_AND_END = """
import sys
from esper.configs import UrzaConfig
from esper.services.urza_client import RemoteStore

remote = RemoteStore(UrzaConfig(url=sys.argv[1]))
print(len(remote.blueprints.list()), flush=True)
"""

ASK_IN_VAIN = """
import signal, sys, threading
from esper.configs import UrzaConfig
from esper.services.urza_client import RemoteStore

signal.signal(signal.SIGINT, signal.default_int_handler)  # which the shell may have had ignored
remote = RemoteStore(UrzaConfig.model_validate({"url": sys.argv[1], "client": {"timeout": 600}}))
if sys.argv[2] == "elsewhere":
    threading.Thread(target=remote.blueprints.list, daemon=True).start()
    sys.stdin.readline()
else:
    remote.blueprints.list()
"""


def program(source: str, *arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", source, *arguments], stdin=pipe, stdout=pipe, stderr=pipe, text=True)


class TestTheEndOfTheProcess:
    @pytest.mark.slow
    def test_without_closing(self, urza: RunningUrza) -> None:
        process = program(ASK_AND_END, urza.url)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors) == (0, "0\n", "")

    @pytest.mark.slow
    def test_while_a_thread_waits_for_an_answer(self) -> None:
        with BrokenServer(silence) as server:
            process = program(ASK_IN_VAIN, server.url, "elsewhere")
            wait_for(lambda: server.requests)
            _, errors = process.communicate("\n", timeout=60)
            assert (process.returncode, errors) == (0, "")

    def test_by_ctrl_c(self) -> None:
        with BrokenServer(silence) as server:
            process = program(ASK_IN_VAIN, server.url, "here")
            wait_for(lambda: server.requests)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == -signal.SIGINT
            assert errors.rstrip().endswith("KeyboardInterrupt")
