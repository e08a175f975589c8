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
from concurrent.futures import Future
from pathlib import Path

import pytest

from esper.compiler.errors import (
    WorkerCrashedError,
    WorkerJobError,
    WorkersClosedError,
    WorkerStartError,
    WorkerTimeoutError,
)
from esper.compiler.workers import CompileWorkers
from tests.compiler.worker_processes import (
    AMPLE,
    ROOT,
    TARGET,
    assert_gone,
    failure,
    pids_in,
    processes,
    program,
    settled,
)
from tests.services.children import wait_until_gone

pytestmark = pytest.mark.xdist_group("compile workers")  # they share two workers, which take seconds to start


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
    assert about["nice"] == min(19, os.nice(0) + 10)
    assert about["threads"] == 1
    cores = len(os.sched_getaffinity(0))
    assert about["compile_threads"] == ("1" if cores < 4 else str(min(8, cores // 2)))
    assert about["main"] == "esper.compiler.worker_process"
    assert "" not in about["path"]
    assert about["read"] == "", "there is nothing on its standard input"


@pytest.mark.slow
def test_two_workers_work_at_the_same_time(tmp_path: Path) -> None:
    with CompileWorkers(2, target=TARGET) as pool:
        futures = [pool.submit(b"attend " + bytes(tmp_path)) for _ in range(2)]
        both = pids_in(tmp_path, 2)
        (tmp_path / "go").touch()
        assert sorted(int(settled(future)) for future in futures) == both


@pytest.mark.slow
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


@pytest.mark.slow
def test_compilers_that_a_dead_worker_has_left_behind_are_ended(pool: CompileWorkers, tmp_path: Path) -> None:
    error = failure(pool.submit(b"abandon " + bytes(tmp_path)))
    assert isinstance(error, WorkerCrashedError)
    for each in pids_in(tmp_path, 2):  # there were two attempts
        assert_gone(each)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
