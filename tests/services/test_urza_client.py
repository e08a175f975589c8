"""What only the store over HTTP does; all else is in `test_urza_blueprints` and `test_urza_kernels`, for both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from esper.artifacts import Attachment, artifact_message, build_artifact
from esper.services.contracts import BlueprintStatus, KernelMetadata
from esper.services.urza import UrzaStore
from esper.services.urza_client import RemoteStore
from tests.services.remote_stores import KEY, TARGET, add, claimed, remote_of, report_of
from tests.services.shelf import add_kernel, blueprint, fill
from tests.services.urza_server import RunningUrza


@pytest.fixture
def remote(urza: RunningUrza) -> Iterator[RemoteStore]:
    opened = remote_of(urza)
    yield opened
    opened.close()


def test_a_list_that_takes_several_pages(store: UrzaStore, remote: RemoteStore) -> None:
    fill(store, 2100, at_once=2)
    everything = store.blueprints.list(limit=3000)
    assert len(everything) == 2100
    for limit in (1000, 1001, 2000, 2100, 3000):
        assert remote.blueprints.list(limit=limit) == everything[:limit]


def test_a_kernel_is_stored_and_read_back(store: UrzaStore, remote: RemoteStore) -> None:
    token = claimed(remote, remote.blueprints.submit(blueprint(1), "mine").id).token
    artifact = build_artifact(blueprint(1))
    signature, report = KEY.sign(artifact_message(artifact.id)), report_of(artifact)
    kernel = add(remote, artifact, signature, report)
    assert kernel == store.kernels.get(artifact.id)
    assert (kernel.report, kernel.metadata) == (report, KernelMetadata.of(artifact.graph))
    ended = remote.blueprints.set_status(
        blueprint(1).id, BlueprintStatus.VALIDATED, token=token, report=report, artifact_id=artifact.id
    )
    assert ended == store.blueprints.get(blueprint(1).id)
    assert (ended.artifact_id, ended.report) == (artifact.id, report)
    assert remote.kernels.get(artifact.id) == store.kernels.get(artifact.id)
    assert remote.kernels.content(artifact.id) == (artifact.data, (signature,))
    assert store.kernels.content(artifact.id) == (artifact.data, (signature,))
    assert remote.stats() == store.stats()


def test_an_attachment_that_is_there_already_is_not_sent_again(store: UrzaStore, remote: RemoteStore) -> None:
    artifact, _ = add_kernel(store, blueprint(1))
    old, new = (Attachment.create(artifact.id, TARGET, code, KEY) for code in (b"old", b"new"))
    store.kernels.add_attachment(old)
    known = old.pack()
    assert remote.kernels.attachment(artifact.id, TARGET.key, known=known) is known
    store.kernels.add_attachment(new)
    assert remote.kernels.attachment(artifact.id, TARGET.key, known=known) == new.pack()
