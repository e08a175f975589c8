"""A worker that is killed between any two steps of its work, or whose store fails: the work ends with one artifact."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esper.artifacts import Attachment, SigningKey, Target, TrustStore, load_artifact
from esper.services.contracts import BlueprintStatus, KernelQuery
from esper.services.errors import StoreBusyError
from esper.services.oona_client import OonaClient
from esper.services.tezzeret.limits import ChildLimits
from esper.services.tezzeret.watchers import StopSignal
from esper.services.tezzeret.worker import Worker
from esper.services.urza import UrzaStore
from tests.services.shelf import blueprint
from tests.services.urza_server import locked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch"),
]

LEASE = 1.0
DEATHS = [
    ("after claim", "before add", "after set_status"),  # it has the blueprint; a sound kernel; all is done
    ("after add", "after add_attachment"),  # its kernel is stored; its attachment too
]


class _Deadly:
    """A part of the store, except that `stage` is the last thing that this process does."""

    def __init__(self, part: Any, stage: str) -> None:
        self._part, self._stage = part, stage

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._part, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if self._stage == f"before {name}":
                os.kill(os.getpid(), signal.SIGKILL)
            result = method(*arguments, **options)
            if self._stage == f"after {name}":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call


def _work(store: Any, key: SigningKey) -> str | None:
    limits = ChildLimits(wall_seconds=120, memory_bytes=2**40)
    return Worker(store, key, OonaClient(), "fast", limits, LEASE).compile_next(StopSignal())


def _work_when_it_is_free(store: Any, key: SigningKey) -> None:
    deadline = time.monotonic() + 60
    while _work(store, key) is None:
        assert time.monotonic() < deadline, "the lease of the dead does not run out"
        time.sleep(0.1)


def _work_until(stage: str, folder: Path, key: SigningKey) -> None:
    store = UrzaStore.in_folder(folder)
    blueprints, kernels = _Deadly(store.blueprints, stage), _Deadly(store.kernels, stage)
    _work_when_it_is_free(SimpleNamespace(blueprints=blueprints, kernels=kernels), key)


@pytest.mark.parametrize("deaths", DEATHS, ids="; ".join)
def test_what_killed_workers_began_is_finished_with_one_artifact(
    store: UrzaStore, folder: Path, deaths: tuple[str, ...]
) -> None:
    key, wanted = SigningKey.generate(), blueprint()
    store.blueprints.submit(wanted, "wanted")
    for stage in deaths:
        victim = multiprocessing.get_context("fork").Process(target=_work_until, args=(stage, folder, key))
        victim.start()
        victim.join(120)
        assert victim.exitcode == -signal.SIGKILL, f"it has to die {stage}"
    if deaths[-1] != "after set_status":
        assert store.blueprints.get(wanted.id).status is BlueprintStatus.COMPILING
        _work_when_it_is_free(store, key)
    record = store.blueprints.get(wanted.id)
    assert record.status is BlueprintStatus.VALIDATED, record
    assert record.attempts == 3
    (kernel,) = store.kernels.query(KernelQuery(status=None))
    assert (kernel.id, kernel.name) == (record.artifact_id, "wanted")
    data, (signature,) = store.kernels.content(kernel.id)
    trust = TrustStore([key.public_bytes])
    assert load_artifact(data, expected_id=kernel.id, trust=trust, signature=signature).graph == wanted.graph
    packed = store.kernels.attachment(kernel.id, Target.current().key)
    assert packed is not None
    Attachment.unpack(packed).verify(trust)
    assert store.blueprints.claim("anybody") is None


def test_work_that_a_locked_database_did_not_take_is_done_again_with_one_artifact(
    store: UrzaStore, folder: Path
) -> None:
    key, wanted = SigningKey.generate(), blueprint()
    store.blueprints.submit(wanted)
    hasty = UrzaStore(f"sqlite:///{folder / 'esper.db'}", folder / "blobs", busy_seconds=0.2)
    with hasty, ThreadPoolExecutor(1) as thread:
        working = thread.submit(_work, hasty, key)
        while store.blueprints.get(wanted.id).status is not BlueprintStatus.COMPILING:
            time.sleep(0.01)
        with locked(folder):
            assert isinstance(working.exception(timeout=120), StoreBusyError)
        assert store.kernels.query(KernelQuery(status=None)) == ()
        _work_when_it_is_free(hasty, key)
    record = store.blueprints.get(wanted.id)
    assert (record.status, record.attempts) == (BlueprintStatus.VALIDATED, 2)
    (kernel,) = store.kernels.query(KernelQuery(status=None))
    assert kernel.id == record.artifact_id
