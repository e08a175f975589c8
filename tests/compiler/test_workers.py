"""Compile workers: what they do, and what becomes of a job when things go wrong. All processes are real."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # psutil ships no types
import pytest

from esper.compiler.errors import (
    WorkerCrashedError,
    WorkerJobError,
    WorkersClosedError,
    WorkerStartError,
    WorkerTimeoutError,
)
from esper.compiler.workers import CompileWorkers
from tests.services.children import wait_until_gone
from tests.services.programs import Program

pytestmark = pytest.mark.xdist_group("compile workers")  # they share two workers, which take seconds to start

ROOT = Path(__file__).parents[2]
TARGET = "tests.compiler.worker_jobs:run"
AMPLE = 120.0


@pytest.fixture(scope="module", autouse=True)
def _tests_can_be_imported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture(scope="module")
def pool(_tests_can_be_imported: None) -> Iterator[CompileWorkers]:
    """One worker, for tests that leave it usable; it may be a new one."""
    with CompileWorkers(target=TARGET, timeout=AMPLE) as pool:
        yield pool
    assert processes() == [], "a worker was left behind"


def processes(pid: int | None = None) -> list[psutil.Process]:
    """The workers of a process, or of this one."""
    found = []
    for each in psutil.Process(pid).children():
        try:
            if "esper.compiler.worker_process" in each.cmdline() and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found


def pids_in(folder: Path, count: int = 1) -> list[int]:
    """What processes have left in `folder`, once there are `count`."""
    deadline = time.monotonic() + AMPLE
    while len(found := sorted(int(each.name) for each in folder.iterdir() if each.name.isdigit())) < count:
        assert time.monotonic() < deadline, "no job began"
        time.sleep(0.01)
    return found


def assert_gone(pid: int) -> None:
    """Fails if the process is there after ten seconds."""
    with suppress(psutil.NoSuchProcess):
        wait_until_gone(psutil.Process(pid), 10)


def settled(future: Future[bytes]) -> bytes:
    return future.result(AMPLE)


def failure(future: Future[bytes]) -> BaseException:
    error = future.exception(AMPLE)
    assert error is not None
    return error


# -- what they do ------------------------------------------------------------------------------------------------------


def test_results_come_back_each_to_its_own_future_in_the_order_of_submission(pool: CompileWorkers) -> None:
    finished: list[int] = []
    futures = []
    for number in range(20):
        futures.append(pool.submit(b"echo %d" % number))
        futures[-1].add_done_callback(lambda future: finished.append(int(future.result())))
    assert [settled(future) for future in futures] == [b"%d" % number for number in range(20)]
    assert finished == list(range(20))


def test_a_worker_is_a_process_of_its_own_that_gives_way_and_knows_nothing_of_the_program(pool: CompileWorkers) -> None:
    about = json.loads(settled(pool.submit(b"about")))
    assert about["pid"] == about["group"] == processes()[0].pid
    assert about["nice"] == min(19, os.nice(0) + 15)
    assert about["threads"] == 1
    cores = len(os.sched_getaffinity(0))
    assert about["compile_threads"] == ("1" if cores < 4 else str(min(8, cores // 2)))
    assert about["main"] == "esper.compiler.worker_process"
    assert "" not in about["path"]
    assert about["read"] == "", "there is nothing on its standard input"


def test_two_workers_work_at_the_same_time(tmp_path: Path) -> None:
    with CompileWorkers(2, target=TARGET) as pool:
        futures = [pool.submit(b"attend " + bytes(tmp_path)) for _ in range(2)]
        both = pids_in(tmp_path, 2)
        (tmp_path / "go").touch()
        assert sorted(int(settled(future)) for future in futures) == both


def test_warm_workers_are_there_before_the_first_job(pool: CompileWorkers) -> None:
    with CompileWorkers(2, target=TARGET) as warmed:
        before = [each.pid for each in processes()]
        assert len(before) <= 1
        warmed.warm()
        deadline = time.monotonic() + AMPLE
        while len(there := [each.pid for each in processes() if each.pid not in before]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert json.loads(settled(warmed.submit(b"about")))["pid"] in there
        warmed.warm()
        settled(warmed.submit(b"echo"))
        assert warmed.statistics.restarts == 0, "those that live are warm already"


@pytest.mark.slow
def test_payloads_and_results_may_be_large(pool: CompileWorkers) -> None:
    large = random.Random(0).randbytes(64 * 2**20)
    assert settled(pool.submit(b"echo " + large)) == large
    assert settled(pool.submit(b"echo ")) == b""


def test_what_a_job_prints_stays_out_of_its_result_and_can_be_read(
    pool: CompileWorkers, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "esper.compiler.workers"):
        assert settled(pool.submit(b"print something")) == b"something"
        assert settled(pool.submit(b"echo something else")) == b"something else"
    (record,) = caplog.records
    for line in ("raw output", "from a compiler", "and its errors"):
        assert line in record.getMessage()


def test_a_job_that_waits_can_be_cancelled_and_one_that_runs_goes_on(pool: CompileWorkers, tmp_path: Path) -> None:
    running = pool.submit(b"attend " + bytes(tmp_path))
    pids_in(tmp_path)
    cancelled = pool.submit(b"once " + bytes(tmp_path / "was begun"))
    after = pool.submit(b"echo after")
    assert cancelled.cancel()
    assert not running.cancel()
    (tmp_path / "go").touch()
    assert settled(running).isdigit()
    assert settled(after) == b"after"
    assert not (tmp_path / "was begun").exists()


# -- what goes wrong in a job ------------------------------------------------------------------------------------------


def test_an_exception_comes_back_as_text_and_the_worker_lives_on(pool: CompileWorkers) -> None:
    before = json.loads(settled(pool.submit(b"about")))["pid"]
    error = failure(pool.submit(b"raise pepper"))
    assert isinstance(error, WorkerJobError)
    assert (error.type_name, error.message) == ("UnpicklableError", "salt and pepper")
    assert str(error) == "UnpicklableError: salt and pepper"
    assert 'raise UnpicklableError("salt", argument.decode())' in error.traceback
    assert json.loads(settled(pool.submit(b"about")))["pid"] == before


@pytest.mark.parametrize(
    ("job", "type_name", "message"),
    [
        (b"leave 3", "SystemExit", "3"),
        (b"nothing", "TypeError", "must return bytes"),
        (b"long", "ValueError", "xxx"),
        (b"silent", "SilentError", ""),
        (b"undefined", "KeyError", "undefined"),
    ],
)
def test_so_does_whatever_else_is_raised(pool: CompileWorkers, job: bytes, type_name: str, message: str) -> None:
    error = failure(pool.submit(job))
    assert isinstance(error, WorkerJobError)
    assert error.type_name == type_name
    assert message in error.message
    assert len(error.traceback) <= 100_000, "an error fits into a log"


def test_a_job_whose_worker_dies_is_done_by_the_next_worker(pool: CompileWorkers, tmp_path: Path) -> None:
    before = pool.statistics
    assert settled(pool.submit(b"once " + bytes(tmp_path / "first"))) == b"the second time"
    after = pool.statistics
    assert after.crashes - before.crashes == 1
    assert after.done - before.done == 1
    assert after.failed == before.failed


def test_so_is_one_whose_worker_is_killed_from_outside(pool: CompileWorkers, tmp_path: Path) -> None:
    future = pool.submit(b"attend " + bytes(tmp_path))
    (first,) = pids_in(tmp_path)
    os.kill(first, signal.SIGKILL)
    (second,) = set(pids_in(tmp_path, 2)) - {first}
    (tmp_path / "go").touch()
    assert settled(future) == b"%d" % second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "how", "words"),
    [
        (b"signal %d" % signal.SIGSEGV, "was killed by SIGSEGV", "_signal"),  # where it was, says faulthandler
        (b"signal %d" % signal.SIGKILL, "was killed by SIGKILL", ""),
        (b"exit 3", "ended with exit status 3", "these were my last words"),
    ],
    ids=["segmentation fault", "kill", "exit"],
)
def test_a_job_that_kills_two_workers_fails_and_the_next_one_gets_a_third(
    pool: CompileWorkers, job: bytes, how: str, words: str
) -> None:
    before = pool.statistics
    error = failure(pool.submit(job))
    assert isinstance(error, WorkerCrashedError)
    assert error.exit == how
    assert how in str(error)
    assert words in error.log_tail
    assert error.log_tail in str(error)
    assert pool.statistics.crashes - before.crashes == 2
    assert pool.statistics.failed - before.failed == 1
    assert settled(pool.submit(b"echo on we go")) == b"on we go"


@pytest.mark.skipif(sys.platform != "linux", reason="needs pidfds")
def test_a_death_is_noticed_while_somebody_else_holds_the_connection_open(pool: CompileWorkers, tmp_path: Path) -> None:
    error = failure(pool.submit(b"orphan " + bytes(tmp_path)))
    for orphan in pids_in(tmp_path):
        os.kill(orphan, signal.SIGKILL)
    assert isinstance(error, WorkerCrashedError)
    assert error.exit == "ended with exit status 4"


def test_compilers_that_a_dead_worker_has_left_behind_are_ended(pool: CompileWorkers, tmp_path: Path) -> None:
    error = failure(pool.submit(b"abandon " + bytes(tmp_path)))
    assert isinstance(error, WorkerCrashedError)
    for each in pids_in(tmp_path, 2):  # there were two attempts
        assert_gone(each)


def test_a_job_that_takes_too_long_ends_with_everything_that_it_started(pool: CompileWorkers, tmp_path: Path) -> None:
    before = pool.statistics
    settled(pool.submit(b"echo"))  # the worker is there
    future = pool.submit(b"hang " + bytes(tmp_path), timeout=3.0)
    family = pids_in(tmp_path, 3)
    error = failure(future)
    assert isinstance(error, WorkerTimeoutError)
    assert isinstance(error, TimeoutError)
    assert "longer than 3 s; raise the setting execution.compile_timeout" in str(error)
    for each in family:
        assert_gone(each)
    assert settled(pool.submit(b"echo on we go")) == b"on we go"
    assert pool.statistics.timeouts - before.timeouts == 1
    assert pool.statistics.crashes == before.crashes


def test_the_pools_own_time_limit_holds_for_jobs_that_bring_none() -> None:
    with CompileWorkers(target=TARGET, timeout=0.2) as pool:
        assert isinstance(failure(pool.submit(b"sleep 300")), WorkerTimeoutError)
        assert settled(pool.submit(b"sleep 0.4", timeout=AMPLE)) == b"0.4"


def test_a_worker_that_stops_reading_is_one_that_takes_too_long(pool: CompileWorkers) -> None:
    settled(pool.submit(b"echo"))
    (process,) = processes()
    process.suspend()
    assert isinstance(failure(pool.submit(b"echo " + bytes(2**22), timeout=0.5)), WorkerTimeoutError)
    wait_until_gone(process, 10)


# -- workers that come and go ------------------------------------------------------------------------------------------


def test_a_worker_that_died_while_it_had_nothing_to_do_is_replaced_for_the_next_job(pool: CompileWorkers) -> None:
    settled(pool.submit(b"echo"))
    before = pool.statistics
    (process,) = processes()
    process.kill()
    wait_until_gone(process, 10)
    assert settled(pool.submit(b"echo on we go")) == b"on we go"
    after = pool.statistics
    assert (after.crashes - before.crashes, after.restarts - before.restarts) == (1, 1)


@pytest.mark.slow
def test_a_pool_that_is_closed_kills_what_runs_and_fails_what_waits(tmp_path: Path) -> None:
    pool = CompileWorkers(target=TARGET)
    running = pool.submit(b"hang " + bytes(tmp_path))
    waiting = [pool.submit(b"echo") for _ in range(3)]
    assert waiting[0].cancel()
    family = pids_in(tmp_path, 3)
    pool.close()
    for each in family:
        assert_gone(each)
    for future in (running, *waiting[1:]):
        assert isinstance(failure(future), WorkersClosedError)
    pool.close()
    pool.warm()
    assert isinstance(failure(pool.submit(b"echo")), WorkersClosedError)


def test_a_pool_may_be_closed_by_a_callback_and_while_its_worker_starts() -> None:
    pool = CompileWorkers(target=TARGET)
    first, second = pool.submit(b"echo first"), pool.submit(b"echo second")
    first.add_done_callback(lambda _: pool.close())
    assert settled(first) == b"first"
    assert isinstance(failure(second), WorkersClosedError)
    pool = CompileWorkers(target=TARGET)
    pool.warm()
    starting = pool.submit(b"echo")
    pool.close()
    assert isinstance(failure(starting), WorkersClosedError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # which is the point
def test_a_callback_that_ends_its_thread_does_not_end_the_pool(pool: CompileWorkers) -> None:
    def leave(_: Future[bytes]) -> None:
        raise SystemExit

    first, second = pool.submit(b"sleep 0.1"), pool.submit(b"echo second")
    first.add_done_callback(leave)
    assert settled(second) == b"second"


def test_limits_that_mean_nothing_are_refused(pool: CompileWorkers) -> None:
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        CompileWorkers(0)
    for timeout in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="timeout must be more than 0 seconds"):
            CompileWorkers(timeout=timeout)
        with pytest.raises(ValueError, match="timeout must be more than 0 seconds"):
            pool.submit(b"echo", timeout=timeout)
    assert settled(pool.submit(b"echo", timeout=float("inf"))) == b""


# -- workers that cannot start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("executable", "reason"), [("", "sys.executable, is not set"), ("/nowhere/python", "No such file")]
)
def test_without_an_interpreter_every_job_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, executable: str, reason: str
) -> None:
    with CompileWorkers(target=TARGET) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", executable)
            pool.warm()
            deadline = time.monotonic() + AMPLE
            while reason not in caplog.text:
                assert time.monotonic() < deadline, "what went wrong with warming is not logged"
                time.sleep(0.01)
            for _ in range(2):
                error = failure(pool.submit(b"echo"))
                assert isinstance(error, WorkerStartError)
                assert reason in str(error)
        assert settled(pool.submit(b"echo back again")) == b"back again"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("tests.compiler.worker_jobs:missing", "has no attribute 'missing'"),
        ("tests.compiler.no_such_module:run", "No module named 'tests.compiler.no_such_module'"),
    ],
)
def test_a_target_that_cannot_be_imported_is_named_with_the_reason(target: str, reason: str) -> None:
    with CompileWorkers(target=target) as pool:
        error = failure(pool.submit(b"echo"))
    assert isinstance(error, WorkerStartError)
    assert target in str(error)
    assert reason in str(error)


def test_an_installation_that_is_broken_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with CompileWorkers(target=TARGET) as pool:
        error = failure(pool.submit(b"echo"))
    assert isinstance(error, WorkerStartError)
    assert "die while they start; the last one ended with exit status 1" in str(error)
    assert "a broken installation" in str(error)


@pytest.mark.slow
def test_without_files_or_threads_to_spare_a_job_says_so_and_the_next_one_works() -> None:
    with CompileWorkers(target=TARGET) as threadless:
        before = threading.stack_size(2**46)
        try:
            error = failure(threadless.submit(b"echo"))
        finally:
            threading.stack_size(before)
        assert isinstance(error, WorkerStartError)
        assert "no thread can be started" in str(error)
        assert settled(threadless.submit(b"echo back again")) == b"back again"
    lines = program(
        """
import resource
most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")), hard))
error = pool.submit(b"echo").exception()
resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
say(type(error).__name__, error)
say(pool.submit(b"echo back again").result())
"""
    ).finish()
    assert lines[0].startswith("WorkerStartError no compile worker can be started: ")
    assert lines[0].endswith("Too many open files")
    assert lines[1] == "b'back again'"


# -- processes that end, and processes that fork -----------------------------------------------------------------------

PROGRAM = """
import ctypes, json, os, sys, time
from pathlib import Path
from esper.compiler.workers import CompileWorkers, default_workers
pool = CompileWorkers(target="tests.compiler.worker_jobs:run")
def say(*what):
    print(*what, flush=True)
"""


def program(source: str, *arguments: object, **environment: str) -> Program:
    return Program(PROGRAM + source, *arguments, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_under_random_kills_every_job_ends_with_its_own_result_or_an_error_that_says_why() -> None:
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
