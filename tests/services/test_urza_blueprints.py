"""Submitting, naming, claiming and finishing blueprints, in the store itself and over HTTP."""

from __future__ import annotations

import time

import pytest

from esper.artifacts import Blueprint, build_artifact
from esper.contracts.validation import ValidationReport
from esper.services.contracts import BlueprintStatus
from esper.services.errors import (
    ClaimLostError,
    IllegalTransitionError,
    InvalidNameError,
    NameTakenError,
    UnknownBlueprintError,
    UnknownKernelReferenceError,
)
from esper.services.stores import Store
from tests.services.remote_stores import add, claimed, report_of
from tests.services.shelf import add_kernel, blueprint

NO_TOKEN = "0" * 32
AT_ONCE = 1e-6
"""Seconds that a lease holds which has run out by the next claim."""


@pytest.fixture
def store(either: Store) -> Store:
    return either


def make_invalid(store: Store, of: Blueprint, name: str | None = None) -> None:
    store.blueprints.submit(of, name)
    token = claimed(store, of.id).token
    store.blueprints.set_status(of.id, BlueprintStatus.INVALID, token=token, reason="it is no good")


class TestSubmission:
    def test_the_same_content_is_stored_once_under_every_name_it_was_given(self, store: Store) -> None:
        first = store.blueprints.submit(blueprint(), "one")
        again = store.blueprints.submit(Blueprint.from_json(blueprint().to_json()), "two")
        assert first.id == again.id == blueprint().id
        assert again.names == ("one", "two")
        assert store.blueprints.submit(blueprint()).names == ("one", "two")
        assert [each.id for each in store.blueprints.list()] == [first.id]

    def test_what_was_submitted_can_be_read_back(self, store: Store) -> None:
        record = store.blueprints.submit(blueprint())
        assert Blueprint.from_json(store.blueprints.document(record.id)) == blueprint()

    def test_a_taken_name_is_refused_and_nothing_is_submitted(self, store: Store) -> None:
        store.blueprints.submit(blueprint(0), "mine")
        with pytest.raises(NameTakenError, match="'mine' stands for blueprint"):
            store.blueprints.submit(blueprint(1), "mine")
        assert [each.id for each in store.blueprints.list()] == [blueprint(0).id]

    def test_the_name_of_an_invalid_blueprint_is_free_for_the_mended_one(self, store: Store) -> None:
        make_invalid(store, blueprint(0), "mine")
        assert store.blueprints.submit(blueprint(1), "mine").names == ("mine",)
        assert store.blueprints.get(blueprint(0).id).names == ()

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "a" * 101,
            "deadbeefcafe",
            "ABCDEFabcdef",
            "a" * 64,
            "../x",
            "a/b",
            "a\\b",
            "1st",
            "a..b",
            "a b",
            "a.",
            "-a",
            "é",
        ],
    )
    def test_a_name_cannot_look_like_an_id_or_a_path(self, store: Store, name: str) -> None:
        with pytest.raises(InvalidNameError, match="cannot be a name"):
            store.blueprints.submit(blueprint(), name)
        assert store.blueprints.list() == ()

    @pytest.mark.parametrize("name", ["a", "deadbeef", "deadbeefcafe-1", "low.rank_4-b", "x" * 100])
    def test_ordinary_names_are_accepted(self, store: Store, name: str) -> None:
        assert store.blueprints.submit(blueprint(), name).names == (name,)

    def test_an_unknown_id_is_an_error_that_names_it(self, store: Store) -> None:
        for ask in (store.blueprints.get, store.blueprints.document, store.blueprints.forget):
            with pytest.raises(UnknownBlueprintError, match="no blueprint 'xyz'"):
                ask("xyz")


class TestListing:
    def test_the_latest_come_first_up_to_the_limit(self, store: Store) -> None:
        ids = [store.blueprints.submit(blueprint(seed)).id for seed in range(4)]
        assert [each.id for each in store.blueprints.list(limit=3)] == ids[:0:-1]
        assert store.blueprints.list(limit=0) == ()

    def test_a_filter_keeps_one_status(self, store: Store) -> None:
        for seed in range(3):
            store.blueprints.submit(blueprint(seed))
        make_invalid(store, blueprint(1))
        listed = store.blueprints.list(BlueprintStatus.INVALID)
        assert [(each.id, each.reason) for each in listed] == [(blueprint(1).id, "it is no good")]
        assert len(store.blueprints.list(BlueprintStatus.UNVALIDATED)) == 2


class TestClaims:
    def test_the_one_that_waited_longest_is_claimed_first_and_none_twice(self, store: Store) -> None:
        ids = [store.blueprints.submit(blueprint(seed)).id for seed in range(3)]
        claims = [store.blueprints.claim("w") for _ in ids]
        assert [claim.blueprint_id for claim in claims if claim] == ids
        assert store.blueprints.claim("w") is None
        assert store.blueprints.get(ids[0]).status is BlueprintStatus.COMPILING

    def test_a_particular_one_can_be_claimed(self, store: Store) -> None:
        ids = [store.blueprints.submit(blueprint(seed)).id for seed in range(2)]
        claim = store.blueprints.claim("w", blueprint_id=ids[1])
        assert claim is not None
        assert claim.blueprint_id == ids[1]
        assert store.blueprints.claim("w", blueprint_id=ids[1]) is None
        assert store.blueprints.claim("w", blueprint_id="0" * 64) is None

    def test_after_the_lease_another_worker_has_it_and_the_first_has_not(self, store: Store) -> None:
        store.blueprints.submit(blueprint())
        slow = store.blueprints.claim("slow", lease_seconds=0.05)
        assert slow is not None
        time.sleep(0.06)
        quick = store.blueprints.claim("quick")
        assert quick is not None
        assert quick.attempt == 2
        with pytest.raises(ClaimLostError):
            store.blueprints.renew(slow)
        with pytest.raises(ClaimLostError):
            store.blueprints.set_status(blueprint().id, BlueprintStatus.INVALID, token=slow.token)
        store.blueprints.release(slow)  # does nothing
        assert store.blueprints.get(blueprint().id).status is BlueprintStatus.COMPILING
        store.blueprints.set_status(blueprint().id, BlueprintStatus.INVALID, token=quick.token)

    def test_a_renewed_lease_holds(self, store: Store) -> None:
        store.blueprints.submit(blueprint())
        claim = store.blueprints.claim("w", lease_seconds=0.05)
        assert claim is not None
        renewed = store.blueprints.renew(claim, lease_seconds=60)
        time.sleep(0.06)
        assert store.blueprints.claim("other") is None
        assert renewed.expires_at > claim.expires_at
        assert 50 < (store.blueprints.next_lease_end() or 0) <= 60

    def test_a_released_one_is_as_if_never_claimed(self, store: Store) -> None:
        store.blueprints.submit(blueprint())
        for _ in range(5):  # more often than it may vanish with a worker
            claim = claimed(store, blueprint().id)
            store.blueprints.release(claim)
        record = store.blueprints.get(blueprint().id)
        assert (record.status, record.attempts, record.lease_expires_at) == (BlueprintStatus.UNVALIDATED, 0, None)
        assert store.blueprints.next_lease_end() is None

    def test_one_that_takes_every_worker_down_becomes_invalid_and_the_next_is_claimed(self, store: Store) -> None:
        store.blueprints.submit(blueprint(0))
        for _ in range(3):
            assert store.blueprints.claim("w", lease_seconds=AT_ONCE) is not None
        store.blueprints.submit(blueprint(1))
        claim = store.blueprints.claim("w")
        assert claim is not None
        assert claim.blueprint_id == blueprint(1).id
        record = store.blueprints.get(blueprint(0).id)
        assert record.status is BlueprintStatus.INVALID
        assert "vanished 3 times" in record.reason

    def test_one_whose_workers_vanished_after_its_kernel_was_stored_is_validated(self, store: Store) -> None:
        of = blueprint(0)
        store.blueprints.submit(of)
        for _ in range(3):
            assert store.blueprints.claim("w", lease_seconds=AT_ONCE) is not None
        artifact = build_artifact(of)
        report = report_of(artifact)
        add(store, artifact, None, report)
        assert store.blueprints.claim("w") is None
        record = store.blueprints.get(of.id)
        assert (record.status, record.artifact_id) == (BlueprintStatus.VALIDATED, artifact.id)
        assert record.report == report


class TestTransitions:
    def test_an_unclaimed_blueprint_cannot_be_finished(self, store: Store) -> None:
        store.blueprints.submit(blueprint())
        for status in (BlueprintStatus.VALIDATED, BlueprintStatus.INVALID, BlueprintStatus.UNVALIDATED):
            with pytest.raises(IllegalTransitionError, match=f"is unvalidated; it cannot become {status}"):
                store.blueprints.set_status(blueprint().id, status, token=NO_TOKEN)
        with pytest.raises(IllegalTransitionError, match="by a claim"):
            store.blueprints.set_status(blueprint().id, BlueprintStatus.COMPILING, token=NO_TOKEN)

    def test_a_claimed_one_only_ends_validated_or_invalid(self, store: Store) -> None:
        store.blueprints.submit(blueprint())
        claim = claimed(store, blueprint().id)
        for status in (BlueprintStatus.COMPILING, BlueprintStatus.UNVALIDATED):
            with pytest.raises(IllegalTransitionError, match=f"is compiling; it cannot become {status}"):
                store.blueprints.set_status(blueprint().id, status, token=claim.token)
        with pytest.raises(ClaimLostError):
            store.blueprints.set_status(blueprint().id, BlueprintStatus.INVALID, token=NO_TOKEN)

    def test_validated_needs_a_stored_kernel(self, store: Store) -> None:
        store.blueprints.submit(blueprint())
        claim = claimed(store, blueprint().id)
        for missing in (None, "0" * 64):
            with pytest.raises(IllegalTransitionError, match="without its kernel"):
                store.blueprints.set_status(
                    blueprint().id, BlueprintStatus.VALIDATED, token=claim.token, artifact_id=missing
                )

    def test_what_is_final_stays(self, store: Store) -> None:
        add_kernel(store, blueprint(0))
        make_invalid(store, blueprint(1))
        for seed in (0, 1):
            before = store.blueprints.get(blueprint(seed).id)
            for status in BlueprintStatus:
                with pytest.raises(IllegalTransitionError):
                    store.blueprints.set_status(before.id, status, token=NO_TOKEN)
            assert store.blueprints.submit(blueprint(seed)) == before
        assert store.blueprints.claim("w") is None

    def test_report_and_reason_are_kept(self, store: Store) -> None:
        store.blueprints.submit(blueprint())
        claim = claimed(store, blueprint().id)
        report = ValidationReport(blueprint_id=blueprint().id, pipeline="fast", passed=False, reason="bad", seconds=1.5)
        store.blueprints.set_status(
            blueprint().id, BlueprintStatus.INVALID, token=claim.token, reason="bad", report=report
        )
        record = store.blueprints.get(blueprint().id)
        assert (record.reason, record.report) == ("bad", report)


class TestForgetting:
    def test_an_invalid_one_can_be_submitted_anew(self, store: Store) -> None:
        make_invalid(store, blueprint(), "mine")
        store.blueprints.forget(blueprint().id)
        with pytest.raises(UnknownBlueprintError):
            store.blueprints.get(blueprint().id)
        record = store.blueprints.submit(blueprint(), "mine")
        assert (record.status, record.attempts) == (BlueprintStatus.UNVALIDATED, 0)

    def test_a_kernel_whose_worker_vanished_goes_too(self, store: Store) -> None:
        store.blueprints.submit(blueprint())
        token = claimed(store, blueprint().id).token
        lost = build_artifact(blueprint())
        add(store, lost, None, report_of(lost))
        store.blueprints.set_status(blueprint().id, BlueprintStatus.INVALID, token=token)
        store.blueprints.forget(blueprint().id)
        with pytest.raises(UnknownKernelReferenceError):
            store.kernels.get(lost.id)

    def test_no_other_can_be_forgotten(self, store: Store) -> None:
        store.blueprints.submit(blueprint(0))
        add_kernel(store, blueprint(1))
        for seed in (0, 1):
            with pytest.raises(IllegalTransitionError, match="only an invalid one"):
                store.blueprints.forget(blueprint(seed).id)
