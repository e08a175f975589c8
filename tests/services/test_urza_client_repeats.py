"""The Urza client, again: what is asked once only, what is asked again, and how often a server that fails is asked."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from esper.artifacts import SigningKey, artifact_message, build_artifact
from esper.contracts.validation import ValidationReport
from esper.services.contracts import BlueprintStatus, Claim, KernelMetadata, KernelStatus
from esper.services.errors import (
    IllegalTransitionError,
    ServiceError,
    UrzaUnavailableError,
)
from esper.services.urza import UrzaStore
from esper.services.urza_client import RemoteStore
from tests.services.broken_server import (
    GOOD,
    Behaviour,
    BrokenServer,
    answer,
    ask,
    broken,
    client_settings,
    drip,
    free_port,
    hang_up,
    lose_answer_of,
    relay,
    reset,
    silence,
)
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import RunningUrza

ID = "a" * 64


# -- what is asked once only -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [silence, hang_up, reset, answer(503, b""), answer(500, b"{}"), answer(cut=1)])
def test_a_claim_that_may_have_been_received_is_not_made_again(trouble: Behaviour) -> None:
    with broken(trouble) as (server, store):
        with pytest.raises(UrzaUnavailableError):
            store.blueprints.claim("a test")
        assert len(server.requests) == 1


@pytest.mark.parametrize("trouble", [silence, hang_up])
def test_a_removal_that_may_have_been_received_is_not_made_again(trouble: Behaviour) -> None:
    with broken(trouble) as (server, store):
        with pytest.raises(UrzaUnavailableError):
            store.blueprints.forget(ID)
        assert len(server.requests) == 1


def test_a_claim_that_did_not_reach_the_server_is_made_again() -> None:
    port = free_port()
    store = RemoteStore(client_settings(f"http://127.0.0.1:{port}", retries=8, retry_seconds=0.2))
    claims: list[Claim | None] = []
    thread = threading.Thread(target=lambda: claims.append(store.blueprints.claim("a test")))
    thread.start()
    time.sleep(0.1)
    with BrokenServer(answer(204, b"", None), port=port) as server:
        thread.join(20)
        assert claims == [None]
        assert len(server.requests) == 1
    store.close()


# -- what is asked again although it was done --------------------------------------------------------------------------


def test_work_whose_answers_were_all_lost_is_done_once(store: UrzaStore, urza: RunningUrza) -> None:
    lost, through = lose_answer_of(urza.port), relay(urza.port)
    of = blueprint(1)
    artifact = build_artifact(of)
    report = ValidationReport(blueprint_id=of.id, pipeline="fast", passed=True, artifact_id=artifact.id)
    metadata = KernelMetadata.of(artifact.graph)
    signature = SigningKey.generate().sign(artifact_message(artifact.id))
    script = [
        lost, through,  # submit
        through,  # claim
        lost, through,  # renew
        lost, through,  # add
        lost, through, through,  # set_status, and a look at what became of it
        lost, through,  # retire
        lost, through,  # release
        through,  # set_status anew, of which no answer is lost
    ]  # fmt: skip
    with broken(*script, timeout=30) as (server, remote):
        record = remote.blueprints.submit(of, "twice")
        claim = remote.blueprints.claim("a test", blueprint_id=record.id)
        assert claim is not None
        renewed = remote.blueprints.renew(claim, lease_seconds=100)
        assert renewed.expires_at > claim.expires_at
        kernel = remote.kernels.add(artifact.data, signature, blueprint_id=of.id, metadata=metadata, report=report)
        ended = remote.blueprints.set_status(
            of.id, BlueprintStatus.VALIDATED, token=claim.token, report=report, artifact_id=kernel.id
        )
        assert ended == store.blueprints.get(of.id)
        assert ended.status is BlueprintStatus.VALIDATED
        assert remote.kernels.set_status(kernel.id, KernelStatus.RETIRED).status is KernelStatus.RETIRED
        remote.blueprints.release(claim)
        with pytest.raises(IllegalTransitionError, match="is validated"):
            remote.blueprints.set_status(
                of.id, BlueprintStatus.VALIDATED, token=claim.token, report=report, artifact_id=kernel.id
            )
        assert len(server.requests) == len(script)
    assert store.stats().kernels == 1
    assert store.blueprints.get(of.id) == ended


def test_a_status_that_somebody_else_set_is_an_error_also_after_a_lost_answer(
    store: UrzaStore, urza: RunningUrza
) -> None:
    artifact, _ = add_kernel(store, blueprint(1))
    with broken(hang_up, relay(urza.port), timeout=30) as (server, remote):
        with pytest.raises(IllegalTransitionError, match="is validated"):
            remote.blueprints.set_status(
                artifact.blueprint_id, BlueprintStatus.INVALID, token="0" * 32, reason="too slow"
            )
        assert len(server.requests) == 3


# -- a server that stays away ------------------------------------------------------------------------------------------


def test_a_server_that_fails_is_left_alone_and_asked_again_after_a_while() -> None:
    port = free_port()
    with BrokenServer(answer(500, b"{}"), port=port) as server:
        store = RemoteStore(client_settings(server.url, retries=0))
        for _ in range(7):
            with pytest.raises(UrzaUnavailableError, match="answers 500"):
                ask(store)
        began = time.monotonic()
        with pytest.raises(UrzaUnavailableError, match="answers 500"):
            ask(store)
        told = 0
        for _ in range(50):
            with pytest.raises(UrzaUnavailableError) as failure:
                ask(store)
            if time.monotonic() - began >= 1:
                break  # a busy machine: by now it may be asked again
            assert re.search(r"failed 8 times in a row and is asked again in 1 s.* answers 500", str(failure.value))
            assert len(server.requests) == 8
            told += 1
        assert told
    with BrokenServer(GOOD, port=port) as server:
        assert _eventually(lambda: ask(store)) == 2.5
        assert len(server.requests) == 1
        assert ask(store) == 2.5
    store.close()


def test_while_it_is_left_alone_one_request_at_a_time_tries_whether_it_is_back() -> None:
    with broken(*[answer(500, b"{}")] * 8, drip(b'{"seconds": 2.5}', 0.05), GOOD, retries=0, timeout=5) as (
        server,
        store,
    ):
        for _ in range(8):
            with pytest.raises(UrzaUnavailableError):
                ask(store)
        time.sleep(1.05)
        with ThreadPoolExecutor(10) as pool:
            outcomes = [each.result() for each in [pool.submit(_outcome, lambda: ask(store)) for _ in range(10)]]
        assert outcomes.count(2.5) == 1
        assert sum(isinstance(outcome, UrzaUnavailableError) for outcome in outcomes) == 9
        assert len(server.requests) == 9
        assert ask(store) == 2.5


def test_retries_have_a_budget() -> None:
    """Failures that are not in a row do not open the breaker, so that it is the budget alone that bounds retries."""
    with broken(*[hang_up, GOOD] * 40, retries=1) as (server, store):
        outcomes = [_outcome(lambda: ask(store)) for _ in range(40)]
        failed = sum(isinstance(outcome, UrzaUnavailableError) for outcome in outcomes)
        assert outcomes[:15] == [2.5] * 15
        assert failed >= 5, "after about 20 retries only one request in ten may be repeated"
        assert len(server.requests) < 80


def _outcome(work: Callable[[], object]) -> object:
    try:
        return work()
    except ServiceError as error:
        return error


def _eventually(work: Callable[[], object]) -> object:
    """What `work` returns as soon as it does not fail, within a few seconds."""
    deadline = time.monotonic() + 10
    while isinstance(outcome := _outcome(work), ServiceError):
        assert time.monotonic() < deadline, outcome
        time.sleep(0.05)
    return outcome
