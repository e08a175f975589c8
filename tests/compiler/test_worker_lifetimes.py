"""Compile workers that are killed, and those of processes that end or fork. All of them are real."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from concurrent.futures import wait
from pathlib import Path

import pytest

from esper.compiler.errors import WorkerCrashedError, WorkerStartError
from esper.compiler.workers import CompileWorkers
from tests.compiler.worker_processes import ROOT, TARGET, assert_gone, pids_in, processes, program, settled

pytestmark = pytest.mark.slow  # each starts interpreters that import torch


def forking(fork: str) -> str:
    return f"child = {fork}\nif child:\n    say(child)\n    os.kill(os.getpid(), 9)\ntime.sleep(200)\nos._exit(0)"


ENDINGS = {
    "exit": "sys.exit(0)",
    "os._exit": "os._exit(0)",
    "exec": "os.execv('/bin/sleep', ['sleep', '200'])",
    "SIGKILL": "os.kill(os.getpid(), 9)",
    "SIGKILL of a process that forked": forking("os.fork()"),
    "SIGKILL of a process of which C made a copy": forking("ctypes.CDLL(None).fork()"),
}


@pytest.mark.parametrize(("ending", "job"), [*((ending, "brood") for ending in ENDINGS), ("SIGKILL", "spin")])
def test_a_worker_ends_with_the_process_that_started_it(tmp_path: Path, ending: str, job: str) -> None:
    waiting = "while len(os.listdir(sys.argv[1])) < 2: time.sleep(0.01)\n"
    running = program(f"job = pool.submit(b'{job} ' + os.fsencode(sys.argv[1]))\n{waiting}{ENDINGS[ending]}", tmp_path)
    family = pids_in(tmp_path, 2)
    child = int(running.read_line()) if "child" in ENDINGS[ending] else None
    try:
        for each in family:
            assert_gone(each)
        if ending != "exec":
            running.process.wait(10)
    finally:
        if child is not None:
            os.kill(child, signal.SIGKILL)  # it has lived on, or this is an error
        running.process.kill()
        running.process.wait()
        assert running.process.stdout is not None
        running.process.stdout.close()


def test_a_forked_child_has_a_worker_of_its_own_and_the_parents_job_goes_on(tmp_path: Path) -> None:
    parents, childs = tmp_path / "parent", tmp_path / "child"
    parents.mkdir()
    childs.mkdir()
    source = """
parents, childs = sys.argv[1:]
job = pool.submit(b"attend " + os.fsencode(parents))
while not os.listdir(parents):
    time.sleep(0.01)
child = os.fork()
if child == 0:
    Path(childs, "go").touch()
    say(pool.submit(b"attend " + os.fsencode(childs)).result(100).decode(), pool.statistics.done)
    sys.exit(0)
say(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
Path(parents, "go").touch()
say(job.result(100).decode(), pool.statistics.done)
"""
    running = program(source, parents, childs)
    (mine,) = pids_in(parents)
    (its,) = pids_in(childs)
    assert running.finish() == [f"{its} 1", "0", f"{mine} 1"]
    assert mine != its
    for each in (mine, its):
        assert_gone(each)


def test_processes_that_are_forked_while_a_worker_starts_do_not_hide_its_end(tmp_path: Path) -> None:
    source = """
pool.warm()
children = []
for _ in range(30):
    child = os.fork()
    if child == 0:
        time.sleep(200)
        os._exit(0)
    children.append(child)
    time.sleep(0.001)
say(pool.submit(b"once " + os.fsencode(sys.argv[1])).result(100).decode())
say(pool.submit(b"about").result(100).decode())
for child in children:
    os.kill(child, 9)
"""
    first, about = program(source, tmp_path / "died").finish()
    assert first == "the second time"
    assert_gone(json.loads(about)["pid"])


def test_a_daemon_that_has_closed_its_standard_files_has_workers_too(tmp_path: Path) -> None:
    source = """
for descriptor in (0, 1, 2):
    os.close(descriptor)
answer = pool.submit(b"print into the log").result(100)
Path(sys.argv[1]).write_bytes(answer)
"""
    assert program(source, tmp_path / "answer").finish() == []
    assert (tmp_path / "answer").read_bytes() == b"into the log"


# -- the pool of a process ---------------------------------------------------------------------------------------------


def test_a_process_has_one_pool_as_its_settings_say_and_it_is_closed_at_the_end() -> None:
    source = """
import psutil, threading
found = []
threads = [threading.Thread(target=lambda: found.append(default_workers())) for _ in range(8)]
for each in threads: each.start()
for each in threads: each.join()
say(len({id(each) for each in found}))
default_workers().warm()
while len(workers := psutil.Process().children()) < 3: time.sleep(0.01)
say(*[each.pid for each in workers])
job = default_workers().submit(b"", timeout=0.000001)
say(type(job.exception(100)).__name__)
"""
    running = program(source, ESPER_EXECUTION__COMPILE_WORKERS="3")
    assert running.read_line() == "1"
    workers = running.read_line().split()
    assert len(workers) == 3
    assert running.finish() == ["WorkerTimeoutError"]
    for each in workers:
        assert_gone(int(each))


# -- everything at once ------------------------------------------------------------------------------------------------


def test_under_random_kills_every_job_ends_with_its_own_result_or_an_error_that_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    dice = random.Random(0)
    kills = 10
    finished = threading.Event()

    def kill_now_and_then() -> None:
        done = 0
        while done < kills and not finished.is_set():
            time.sleep(dice.uniform(0.0, 2.0))
            for victim in processes()[:1]:
                victim.kill()
                done += 1

    with CompileWorkers(2, target=TARGET) as pool:
        killer = threading.Thread(target=kill_now_and_then)
        killer.start()
        futures = [pool.submit(b"sleep %.4f%04d" % (dice.uniform(0.0, 0.1), number)) for number in range(200)]
        assert wait(futures, 250).not_done == set()
        finished.set()
        killer.join()
        errors = [error for future in futures if (error := future.exception()) is not None]
        for number, future in enumerate(futures):
            assert future.exception() is not None or future.result().endswith(b"%04d" % number)
        for error in errors:
            assert isinstance(error, (WorkerCrashedError, WorkerStartError))
            assert "was killed by SIGKILL" in str(error)
        assert len(errors) <= kills // 2, "it takes two deaths to fail a job"
        statistics = pool.statistics
        assert (statistics.done, statistics.failed) == (200 - len(errors), len(errors))
        assert 1 <= statistics.crashes <= kills
        assert settled(pool.submit(b"echo on we go")) == b"on we go"
