"""Several processes on one store at once."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from threading import Barrier

import pytest

from esper.services.contracts import BlueprintStatus
from esper.services.urza import UrzaStore
from tests.services.programs import race
from tests.services.shelf import blueprint

COUNT = 25


def submit_and_claim(barrier: Barrier, folder: Path, name: str) -> list[str]:
    barrier.wait()
    store = UrzaStore.in_folder(folder)
    for seed in range(COUNT):
        store.blueprints.submit(blueprint(seed), f"seed-{seed}")
    claimed = []
    for _ in range(COUNT):  # all three claim at the same moment, again and again
        barrier.wait()
        claim = store.blueprints.claim(name)
        if claim is not None:
            store.blueprints.set_status(claim.blueprint_id, BlueprintStatus.INVALID, token=claim.token, reason=name)
            claimed.append(claim.blueprint_id)
    return claimed


def test_processes_that_open_submit_and_claim_at_once_share_the_work(folder: Path) -> None:
    claimed = race(submit_and_claim, [(folder, "first"), (folder, "second"), (folder, "third")])
    everything = sorted(blueprint(seed).id for seed in range(COUNT))
    assert sorted(itertools.chain.from_iterable(claimed)) == everything, (
        "each blueprint is claimed once, by one process"
    )
    assert all(claimed), "a process got nothing: this was no race"
    with UrzaStore.in_folder(folder) as store:
        records = store.blueprints.list(BlueprintStatus.INVALID, limit=1000)
        assert sorted(each.id for each in records) == everything
        assert {each.attempts for each in records} == {1}
        assert {each.names for each in records} == {(f"seed-{seed}",) for seed in range(COUNT)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_parent_and_forked_child_go_on_with_connections_of_their_own(store: UrzaStore) -> None:
    store.blueprints.submit(blueprint(0))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            store.blueprints.submit(blueprint(1))
            status = 0 if blueprint(1).id in {each.id for each in store.blueprints.list()} else 2
        finally:
            os._exit(status)
    for seed in range(2, 12):
        store.blueprints.submit(blueprint(seed))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(store.blueprints.list()) == 12
