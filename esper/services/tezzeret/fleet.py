"""The workers of a fleet: processes that compile what Urza has, one blueprint at a time each."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager, closing, nullcontext

from esper.child_processes import describe_exit, end_with_parent, kill_family, start_child
from esper.configs import EsperConfig, load_config
from esper.errors import EsperError
from esper.logs import set_up_service_log
from esper.services.oona_client import OonaClient
from esper.services.parts import open_bus, open_store, signing_key
from esper.services.tezzeret.limits import ChildLimits
from esper.services.tezzeret.queue import CompilationQueue
from esper.services.tezzeret.watchers import StopSignal
from esper.services.tezzeret.worker import Worker

__all__ = ["FleetWorker", "main", "run_fleet"]

_MODULE = "esper.services.tezzeret.fleet"
_log = logging.getLogger(_MODULE)  # a worker runs it as __main__
_RESTART_AFTER = 2.0  # seconds, at most
_MOST_PATIENCE = 60.0  # seconds between two attempts of a worker that cannot work
_STOP_SECONDS = 20.0


class FleetWorker:
    """One worker: does what the queue's messages say, and asks for work by itself now and then."""

    def __init__(self, worker: Worker, messages: CompilationQueue | None, poll_seconds: float) -> None:
        self._worker = worker
        self._messages = messages
        self._poll_seconds = poll_seconds
        self._one_at_a_time = threading.Lock()
        self._stop = StopSignal()
        self._ended = threading.Event()
        self._failures = 0

    def stop(self) -> None:
        """Have :meth:`run` return soon: what is being compiled is given back. From any thread or signal handler."""
        self._ended.set()
        threading.Thread(target=self._stop.set, name="esper-stop", daemon=True).start()

    def run(self) -> None:
        """Work until :meth:`stop`."""
        messages: AbstractContextManager[None] = (
            nullcontext() if self._messages is None else self._messages.consumed_by(self._told)
        )
        with messages:
            while not self._ended.is_set():
                with self._one_at_a_time:
                    found = self._attempt(None)
                if not found:
                    self._ended.wait(self._pause())
        self._stop.set()

    def _told(self, blueprint_id: str) -> None:
        with self._one_at_a_time:
            if not self._ended.is_set():
                self._attempt(blueprint_id)

    def _attempt(self, blueprint_id: str | None) -> bool:
        """Whether there was something to do."""
        try:
            found = self._worker.compile_next(self._stop, blueprint_id) is not None
        except Exception as error:  # noqa: BLE001  # not the blueprint's: the store is away, the disk is full
            self._failures += 1
            unexpected = None if isinstance(error, EsperError) else error
            _log.error("this worker cannot work; it tries again in a while: %s", error, exc_info=unexpected)
            return False
        self._failures = 0
        return found

    def _pause(self) -> float:
        """Longer after failures; and never the same, so that a fleet does not ask in step."""
        patience = min(self._poll_seconds * 2.0 ** min(self._failures, 10), max(_MOST_PATIENCE, self._poll_seconds))
        return patience * random.uniform(0.5, 1.0)


def main() -> None:
    """The program of one worker; started by :func:`run_fleet`."""
    end_with_parent(int(sys.argv[1]))
    config = load_config()
    set_up_service_log(config.logging.level, config.logging.format)
    messages = None if config.redis.url is None else CompilationQueue(config.redis)
    settings = config.tezzeret
    with closing(OonaClient(open_bus(config), name=f"{config.name}-tezzeret")) as oona:
        worker = Worker(
            open_store(config), signing_key(config), oona, settings.pipeline, ChildLimits.of(settings),
            settings.lease_seconds,
        )  # fmt: skip
        fleet_worker = FleetWorker(worker, messages, settings.poll_seconds)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: fleet_worker.stop())
        _log.info("worker %d is ready; pipeline %s", os.getpid(), settings.pipeline)
        fleet_worker.run()


def run_fleet(config: EsperConfig, stop: threading.Event) -> None:
    """Run `config.tezzeret.workers` workers until `stop` is set. One that dies is soon started again.

    Workers read the settings as this process did: from the file that `ESPER_CONFIG` names and from the environment.
    """
    workers = [_start_worker() for _ in range(config.tezzeret.workers)]
    try:
        while not stop.wait(_RESTART_AFTER):
            for index, worker in enumerate(workers):
                if worker.poll() is not None:
                    _log.warning("worker %d %s", worker.pid, describe_exit(worker.returncode))
                    workers[index] = _start_worker()
    finally:
        for worker in workers:
            worker.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for worker in workers:
            try:
                worker.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _log.warning("worker %d does not stop; it is killed", worker.pid)
                kill_family(worker.pid)
                worker.wait()


def _start_worker() -> subprocess.Popen[bytes]:
    return start_child(_MODULE, [str(os.getpid())], log=sys.stderr.buffer)


if __name__ == "__main__":
    main()
