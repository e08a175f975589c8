"""A kernel has the signatures of all who signed it: none is lost, none is in another one's way."""

from __future__ import annotations

import asyncio
import dataclasses
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import torch
from sqlalchemy import text

import esper
from esper import Platform
from esper.artifacts import (
    Artifact,
    Attachment,
    Signature,
    SigningKey,
    Target,
    TrustStore,
    artifact_message,
    build_artifact,
)
from esper.configs import EsperConfig, PlatformConfig, UrzaConfig
from esper.services.contracts import BlueprintStatus
from esper.services.errors import KernelNotTrustedError, TooManySignaturesError, UnknownBlueprintError
from esper.services.urza import UrzaStore
from esper.services.urza.storage.kernels import SIGNATURES_OF_ALL, SIGNATURES_OF_ONE
from esper.services.urza.storage.schema import prepare
from tests.services.older_schema import as_left_by
from tests.services.remote_stores import remote_of
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import RunningUrza, settings
from tests.services.urza_server_calls import record_of, submit, upload

KEY, OTHER = SigningKey.generate(), SigningKey.generate()
TARGET = Target(torch="2.13.0", python="cpython3.11", compiler="inductor", device="cpu.test")


def signed(artifact: Artifact, key: SigningKey) -> Signature:
    return key.sign(artifact_message(artifact.id))


def sign(store: UrzaStore, artifact: Artifact, signature: Signature | None, added_by: str = "") -> None:
    kernel = store.kernels.get(artifact.id)
    store.kernels.add(
        artifact.data,
        signature,
        blueprint_id=kernel.blueprint_id,
        metadata=kernel.metadata,
        report=kernel.report,
        added_by=added_by,
    )


class TestTheSet:
    def test_whoever_signs_later_is_kept_too_and_each_reader_finds_its_own(self, any_store: UrzaStore) -> None:
        artifact, _ = add_kernel(any_store, blueprint(1), key=KEY)
        sign(any_store, artifact, signed(artifact, OTHER))
        sign(any_store, artifact, signed(artifact, OTHER))
        sign(any_store, artifact, None)
        data, signatures = any_store.kernels.content(artifact.id)
        assert data == artifact.data
        assert signatures == (signed(artifact, KEY), signed(artifact, OTHER))
        for key in (KEY, OTHER):
            found = TrustStore([key.public_bytes]).choose(artifact_message(artifact.id), signatures)
            assert found == signed(artifact, key)
        told = any_store.kernels.get(artifact.id).signatures
        assert [each.signature() for each in told] == list(signatures)

    def test_an_unsigned_kernel_that_came_first_is_in_nobodys_way(self, any_urza: RunningUrza) -> None:
        with any_urza.client() as client:
            artifact = _uploaded(client, None)
            assert "esper-signature" not in client.get(f"/api/v1/kernels/{artifact.id}/content").headers
            assert upload(client, record_of(artifact, signed(artifact, KEY)), artifact.data).status_code == 201
        with closing(remote_of(any_urza)) as remote:
            assert remote.kernels.content(artifact.id)[1] == (signed(artifact, KEY),)
            assert remote.kernels.signatures(artifact.id) == (signed(artifact, KEY),)

    def test_a_forged_signature_under_somebodys_key_gives_way_to_the_true_one(self, any_store: UrzaStore) -> None:
        artifact, _ = add_kernel(any_store, blueprint(1), key=OTHER)
        forged = Signature(KEY.key_id, bytes(64))
        sign(any_store, artifact, forged)
        assert forged in any_store.kernels.signatures(artifact.id)
        sign(any_store, artifact, signed(artifact, KEY))
        for later in (forged, dataclasses.replace(forged, public_key=KEY.public_bytes)):
            sign(any_store, artifact, later)
        assert set(any_store.kernels.signatures(artifact.id)) == {signed(artifact, OTHER), signed(artifact, KEY)}

    def test_a_signature_that_does_not_fit_its_public_key_is_refused_at_the_door(self, any_urza: RunningUrza) -> None:
        with any_urza.client() as client:
            artifact = _uploaded(client, None)
            wrong = dataclasses.replace(signed(artifact, KEY), public_key=OTHER.public_bytes)
            for bad in (wrong, KEY.sign(b"another message")):
                answer = upload(client, record_of(artifact, bad), artifact.data)
                assert answer.status_code == 422
                assert "is none of artifact" in answer.json()["detail"]
            path = f"/internal/v1/kernels/{artifact.id}/attachments/{TARGET.key}"
            attachment = Attachment.create(artifact.id, TARGET, b"code", KEY)
            answer = client.put(path, content=dataclasses.replace(attachment, payload=b"other").pack())
            assert answer.status_code == 422

    def test_strangers_push_nobody_out(self, folder: Path) -> None:
        """However many keys a token's holder makes: what is there stays, others have room, and trusted keys always."""
        trusted = SigningKey.generate()
        with UrzaStore(f"sqlite:///{folder}/esper.db", folder / "blobs", trusted_keys=[trusted.key_id]) as store:
            artifact, _ = add_kernel(store, blueprint(1), key=KEY)
            for _ in range(SIGNATURES_OF_ONE):
                sign(store, artifact, signed(artifact, SigningKey.generate()), "stranger")
            with pytest.raises(TooManySignaturesError, match=r"8 of a token, .*platform.trusted_keys"):
                sign(store, artifact, signed(artifact, SigningKey.generate()), "stranger")
            sign(store, artifact, signed(artifact, OTHER), "worker")
            for number in range(SIGNATURES_OF_ALL - SIGNATURES_OF_ONE - 2):
                sign(store, artifact, signed(artifact, SigningKey.generate()), f"stranger {number % 7}")
            with pytest.raises(TooManySignaturesError, match=f"at most {SIGNATURES_OF_ALL} are kept"):
                sign(store, artifact, signed(artifact, SigningKey.generate()), "another stranger")
            sign(store, artifact, signed(artifact, trusted), "stranger")
            signers = [each.key_id for each in store.kernels.signatures(artifact.id)]
            assert len(signers) == SIGNATURES_OF_ALL + 1
            assert {KEY.key_id, OTHER.key_id, trusted.key_id} <= set(signers)
            with RunningUrza(store) as urza, closing(remote_of(urza)) as remote:
                assert len(remote.kernels.content(artifact.id)[1]) == len(signers)

    def test_the_limit_counts_by_token_at_the_door(self, store: UrzaStore) -> None:
        tokens = {name: name * 20 for name in "ab"}
        scopes = ["worker", "read", "submit"]
        config = settings(tokens=[{"name": name, "token": token, "scopes": scopes} for name, token in tokens.items()])
        with RunningUrza(store, config) as urza, urza.client() as client:
            headers = {name: {"Authorization": f"Bearer {token}"} for name, token in tokens.items()}
            client.headers.update(headers["a"])
            artifact = _uploaded(client, KEY)
            answers = [
                upload(client, record_of(artifact, signed(artifact, SigningKey.generate())), artifact.data)
                for _ in range(SIGNATURES_OF_ONE)
            ]
            assert [each.status_code for each in answers] == [201] * (SIGNATURES_OF_ONE - 1) + [409]
            assert answers[-1].json()["type"] == "urn:esper:problem:too-many-signatures"
            client.headers.update(headers["b"])
            assert upload(client, record_of(artifact, signed(artifact, OTHER)), artifact.data).status_code == 201
            told = client.get(f"/api/v1/kernels/{artifact.id}").json()["signatures"]
            assert OTHER.key_id in [each["key_id"] for each in told]


class TestAttachments:
    def test_each_reader_gets_the_one_that_it_trusts(self, any_store: UrzaStore) -> None:
        artifact, _ = add_kernel(any_store, blueprint(1), key=KEY)
        own, others = (Attachment.create(artifact.id, TARGET, b"code", key) for key in (KEY, OTHER))
        forged = dataclasses.replace(own, payload=b"bad", signature=Signature(KEY.key_id, own.signature.value))
        for each in (own, others, forged):
            any_store.kernels.add_attachment(each)
        with RunningUrza(any_store) as urza, closing(remote_of(urza)) as remote:
            for store in (any_store, remote):
                assert store.kernels.attachment(artifact.id, TARGET.key, {KEY.key_id}) == own.pack()
                assert store.kernels.attachment(artifact.id, TARGET.key, [OTHER.key_id]) == others.pack()
                assert store.kernels.attachment(artifact.id, TARGET.key) == others.pack()
                assert store.kernels.get(artifact.id).attachments == (TARGET.key,)

    def test_strangers_push_nobody_out(self, store: UrzaStore) -> None:
        artifact, _ = add_kernel(store, blueprint(1), key=KEY)
        own = Attachment.create(artifact.id, TARGET, b"code", KEY)
        store.kernels.add_attachment(own, added_by="worker")
        *others, last = (
            Attachment.create(artifact.id, TARGET, b"code", SigningKey.generate()) for _ in range(SIGNATURES_OF_ONE + 1)
        )
        for each in others:
            store.kernels.add_attachment(each, added_by="stranger")
        with pytest.raises(TooManySignaturesError):
            store.kernels.add_attachment(last, added_by="stranger")
        assert store.kernels.attachment(artifact.id, TARGET.key, [KEY.key_id]) == own.pack()


class TestRecompiling:
    def test_a_finished_blueprint_waits_again_and_its_kernel_stays(self, any_store: UrzaStore) -> None:
        artifact, _ = add_kernel(any_store, blueprint(1), "mine", key=KEY)
        assert any_store.blueprints.recompile(blueprint(1).id, [KEY.key_id]).status is BlueprintStatus.VALIDATED
        again = any_store.blueprints.recompile(blueprint(1).id, [OTHER.key_id])
        assert (again.status, again.attempts, again.names) == (BlueprintStatus.UNVALIDATED, 0, ("mine",))
        assert any_store.blueprints.recompile(blueprint(1).id) == again
        assert any_store.kernels.resolve("mine") == artifact.id
        claim = any_store.blueprints.claim("a worker")
        assert claim is not None
        failed = any_store.blueprints.set_status(
            claim.blueprint_id, BlueprintStatus.INVALID, token=claim.token, reason="no memory"
        )
        assert failed.artifact_id == artifact.id
        assert any_store.kernels.resolve("mine") == artifact.id
        with pytest.raises(UnknownBlueprintError):
            any_store.blueprints.recompile("0" * 64)

    def test_over_http_the_workers_are_told(self, store: UrzaStore) -> None:
        add_kernel(store, blueprint(1), key=KEY)
        told: list[str] = []
        with RunningUrza(store, on_submit=told.append) as urza, closing(remote_of(urza)) as remote:
            remote.blueprints.recompile(blueprint(1).id, [KEY.key_id])
            assert told == []
            assert remote.blueprints.recompile(blueprint(1).id).status is BlueprintStatus.UNVALIDATED
            assert told == [blueprint(1).id]


class TestPlatforms:
    @pytest.mark.slow
    def test_after_a_lost_key_the_same_blueprint_is_compiled_and_can_be_loaded(self, tmp_path: Path) -> None:
        config = EsperConfig.model_validate({"tezzeret": {"pipeline": "fast"}})
        with Platform.embedded(tmp_path, config=config) as platform:
            first = platform.compile_sync(blueprint(1), "mine", timeout=240)
        (tmp_path / "signing.pem").unlink()
        with Platform.embedded(tmp_path, config=config) as platform:
            model = esper.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4)), platform=platform)
            assert not asyncio.run(model.load_kernel("0", 0, "mine"))
            with pytest.raises(KernelNotTrustedError, match=f"signed by {first.signatures[0].key_id[:12]}"):
                platform.wait_sync(blueprint(1).id)
            again = platform.compile_sync(blueprint(1), timeout=240)
            assert again.id == first.id
            assert len(again.signatures) == 2
            assert asyncio.run(model.load_kernel("0", 0, "mine"))
            assert platform.submit(blueprint(1)) == blueprint(1).id
            assert platform.store.blueprints.get(blueprint(1).id).status is BlueprintStatus.VALIDATED

    def test_a_model_takes_a_kernel_that_a_trusted_worker_signed_after_it_was_on_the_disk(
        self, store: UrzaStore, tmp_path: Path
    ) -> None:
        artifact, _ = add_kernel(store, blueprint(1), "mine", key=OTHER)
        with RunningUrza(store) as urza:
            config = EsperConfig().model_copy(
                update={
                    "platform": PlatformConfig(root=tmp_path, trusted_keys=(KEY.public_bytes.hex(),)),
                    "urza": UrzaConfig.model_validate(
                        {"url": urza.url, "client": {"cache_folder": tmp_path / "cache", "retries": 0}}
                    ),
                }
            )
            with Platform.connect(config) as platform:
                model = esper.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4)), platform=platform)
                assert not asyncio.run(model.load_kernel("0", 0, "mine"))
                sign(store, artifact, signed(artifact, KEY))
                assert asyncio.run(model.load_kernel("0", 0, "mine"))
                platform.kernel_source.fetch(artifact.id)
            urza.stop()
            with Platform.connect(config) as platform:
                fetched = platform.kernel_source.fetch(artifact.id)
                assert fetched.signature == signed(artifact, KEY)


def test_signatures_and_attachments_of_an_older_database_are_kept(any_store: UrzaStore) -> None:
    artifact, _ = add_kernel(any_store, blueprint(1), key=KEY)
    unsigned, _ = add_kernel(any_store, blueprint(2), key=KEY)
    attachment = Attachment.create(artifact.id, TARGET, b"code", KEY)
    any_store.kernels.add_attachment(attachment)
    as_left_by("0002", any_store)
    with any_store.database.connection() as connection:
        before = connection.execute(text("SELECT signature FROM kernels WHERE id = :id"), {"id": artifact.id}).scalar()
        assert Signature.from_json(before) == signed(artifact, KEY)
        connection.execute(text("UPDATE kernels SET signature = NULL WHERE id = :id"), {"id": unsigned.id})
    assert prepare(any_store.database) == "0003"
    assert any_store.kernels.signatures(artifact.id) == (signed(artifact, KEY),)
    assert any_store.kernels.signatures(unsigned.id) == ()
    assert any_store.kernels.attachment(artifact.id, TARGET.key, [KEY.key_id]) == attachment.pack()
    sign(any_store, artifact, signed(artifact, OTHER))
    newer = Attachment.create(artifact.id, TARGET, b"newer code", KEY)
    any_store.kernels.add_attachment(newer)
    assert any_store.kernels.attachment(artifact.id, TARGET.key, [KEY.key_id]) == newer.pack()
    assert len(any_store.kernels.signatures(artifact.id)) == 2


def _uploaded(client: httpx.Client, key: SigningKey | None) -> Artifact:
    artifact = build_artifact(blueprint(1))
    submit(client, blueprint(1))
    record = record_of(artifact, None if key is None else signed(artifact, key))
    assert upload(client, record, artifact.data).status_code == 201
    return artifact
