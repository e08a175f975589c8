"""Errors of the store over HTTP are those of the store: the same class with the same message."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper.artifacts import Attachment, build_artifact
from esper.configs import UrzaConfig
from esper.services.contracts import BlueprintStatus, Claim, KernelStatus
from esper.services.errors import (
    AmbiguousPrefixError,
    ClaimLostError,
    ForbiddenError,
    IllegalTransitionError,
    InvalidNameError,
    NameTakenError,
    RateLimitedError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    UnauthorisedError,
    UnknownBlueprintError,
    UnknownKernelReferenceError,
    UrzaUnavailableError,
)
from esper.services.stores import Store
from esper.services.urza import UrzaStore
from esper.services.urza_client import RemoteStore
from tests.services.remote_stores import KEY, NOBODY, TARGET, add, claimed, remote_of, report_of
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import RunningUrza, locked, settings

ODD = (
    "",
    ".",
    "..",
    "../..",
    "a/b",
    "x/content",
    "query",
    "a b",
    "%2e%2e",
    "%00",
    "nül",
    "\x00",
    "?a=b",
    "#",
    "a" * 101,
)


@pytest.fixture
def remote(urza: RunningUrza) -> Iterator[RemoteStore]:
    opened = remote_of(urza)
    yield opened
    opened.close()


LOST = Claim.model_validate(
    {"blueprint_id": blueprint(1).id, "token": "0" * 32, "worker": "w", "attempt": 1, "expires_at": "2026-01-01T00:00Z"}
)
KERNEL = build_artifact(blueprint(2))
UNSTORED = build_artifact(blueprint(9))
RETIRED = build_artifact(blueprint(4))
TWIN = KERNEL.id[:20] + "0" * 44

REFUSALS: dict[str, tuple[type[StoreError], Callable[[Store], object]]] = {
    "submit: name taken": (NameTakenError, lambda s: s.blueprints.submit(blueprint(9), "waits")),
    "submit: no name": (InvalidNameError, lambda s: s.blueprints.submit(blueprint(9), "../etc")),
    "submit: like an id": (InvalidNameError, lambda s: s.blueprints.submit(blueprint(9), "abcdefabcdef")),
    "get": (UnknownBlueprintError, lambda s: s.blueprints.get(NOBODY)),
    "document": (UnknownBlueprintError, lambda s: s.blueprints.document(NOBODY)),
    "forget: unknown": (UnknownBlueprintError, lambda s: s.blueprints.forget(NOBODY)),
    "forget: waits": (IllegalTransitionError, lambda s: s.blueprints.forget(blueprint(1).id)),
    "renew": (ClaimLostError, lambda s: s.blueprints.renew(LOST)),
    "renew: unknown": (
        UnknownBlueprintError,
        lambda s: s.blueprints.renew(LOST.model_copy(update={"blueprint_id": NOBODY})),
    ),
    "status: waits": (
        IllegalTransitionError,
        lambda s: s.blueprints.set_status(blueprint(1).id, BlueprintStatus.INVALID, token=LOST.token),
    ),
    "status: compiling": (
        IllegalTransitionError,
        lambda s: s.blueprints.set_status(blueprint(1).id, BlueprintStatus.COMPILING, token=LOST.token),
    ),
    "status: without a kernel": (
        IllegalTransitionError,
        lambda s: s.blueprints.set_status(blueprint(3).id, BlueprintStatus.VALIDATED, token=LOST.token),
    ),
    "status: lost": (
        ClaimLostError,
        lambda s: s.blueprints.set_status(blueprint(3).id, BlueprintStatus.INVALID, token=LOST.token),
    ),
    "status: unknown": (
        UnknownBlueprintError,
        lambda s: s.blueprints.set_status(NOBODY, BlueprintStatus.INVALID, token=LOST.token),
    ),
    "add: unknown blueprint": (UnknownBlueprintError, lambda s: add(s, UNSTORED, None, report_of(UNSTORED))),
    "add attachment": (
        UnknownKernelReferenceError,
        lambda s: s.kernels.add_attachment(Attachment.create(UNSTORED.id, TARGET, b"code", KEY)),
    ),
    "get kernel": (UnknownKernelReferenceError, lambda s: s.kernels.get(NOBODY)),
    "get kernel: of a blueprint": (UnknownKernelReferenceError, lambda s: s.kernels.get(blueprint(2).id)),
    "get kernel: by name": (UnknownKernelReferenceError, lambda s: s.kernels.get("ready")),
    "get kernel: by prefix": (UnknownKernelReferenceError, lambda s: s.kernels.get(RETIRED.id[:12])),
    "content": (UnknownKernelReferenceError, lambda s: s.kernels.content(NOBODY)),
    "content: by name": (UnknownKernelReferenceError, lambda s: s.kernels.content("ready")),
    "kernel status": (UnknownKernelReferenceError, lambda s: s.kernels.set_status(NOBODY, KernelStatus.RETIRED)),
    "resolve: id": (UnknownKernelReferenceError, lambda s: s.kernels.resolve(NOBODY)),
    "resolve: id of a blueprint": (UnknownKernelReferenceError, lambda s: s.kernels.resolve(blueprint(1).id)),
    "resolve: prefix": (UnknownKernelReferenceError, lambda s: s.kernels.resolve("0" * 12)),
    "resolve: endless": (UnknownKernelReferenceError, lambda s: s.kernels.resolve("a" * 100_000)),
    "resolve: ambiguous": (AmbiguousPrefixError, lambda s: s.kernels.resolve(KERNEL.id[:12])),
    "resolve: name": (UnknownKernelReferenceError, lambda s: s.kernels.resolve("nobody")),
    "resolve: waits": (UnknownKernelReferenceError, lambda s: s.kernels.resolve("waits")),
    "resolve: retired": (UnknownKernelReferenceError, lambda s: s.kernels.resolve("old")),
}


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[UrzaStore, RemoteStore]]:
    """A store with a blueprint that waits, one in work, a kernel and its twin, and a retired kernel; and its client."""
    folder = tmp_path_factory.mktemp("store")
    with UrzaStore.in_folder(folder) as store:
        store.blueprints.submit(blueprint(1), "waits")
        add_kernel(store, blueprint(2), "ready")
        store.blueprints.submit(blueprint(3))
        claimed(store, blueprint(3).id)
        add_kernel(store, blueprint(4), "old")
        store.kernels.set_status(RETIRED.id, KernelStatus.RETIRED)
        with sqlite3.connect(folder / "esper.db") as database:
            columns = [row[1] for row in database.execute("PRAGMA table_info(kernels)") if row[1] != "id"]
            listed = ", ".join(columns)
            database.execute(
                f"INSERT INTO kernels (id, {listed}) SELECT ?, {listed} FROM kernels WHERE id = ?", (TWIN, KERNEL.id)
            )
        with RunningUrza(store) as urza:
            remote = remote_of(urza)
            yield store, remote
            remote.close()


def assert_same_error(
    stores: tuple[UrzaStore, RemoteStore], kind: type[StoreError], question: Callable[[Store], object]
) -> None:
    found = []
    for store in stores:
        with pytest.raises(StoreError) as raised:
            question(store)
        found.append((type(raised.value), str(raised.value)))
    assert found[0] == found[1]
    assert found[0][0] is kind


class TestErrors:
    @pytest.mark.parametrize("name", REFUSALS)
    def test_is_that_of_the_store(self, troubled: tuple[UrzaStore, RemoteStore], name: str) -> None:
        kind, question = REFUSALS[name]
        assert_same_error(troubled, kind, question)

    @pytest.mark.parametrize("odd", ODD)
    def test_what_is_no_id_is_unknown(self, troubled: tuple[UrzaStore, RemoteStore], odd: str) -> None:
        unknown = UnknownKernelReferenceError
        assert_same_error(troubled, unknown, lambda store: store.kernels.resolve(odd))
        assert_same_error(troubled, unknown, lambda store: store.kernels.set_status(odd, KernelStatus.RETIRED))
        assert_same_error(troubled, unknown, lambda store: store.kernels.get(odd))
        assert_same_error(troubled, unknown, lambda store: store.kernels.content(odd))
        assert_same_error(troubled, UnknownBlueprintError, lambda store: store.blueprints.get(odd))
        assert_same_error(troubled, UnknownBlueprintError, lambda store: store.blueprints.forget(odd))
        assert_same_error(troubled, UnknownBlueprintError, lambda store: store.blueprints.claim("w", blueprint_id=odd))

    @pytest.mark.parametrize("odd", ODD)
    def test_there_is_no_attachment_under_an_odd_key(self, troubled: tuple[UrzaStore, RemoteStore], odd: str) -> None:
        for store in troubled:
            assert store.kernels.attachment(KERNEL.id, odd) is None
            assert store.kernels.attachment(odd, TARGET.key) is None

    def test_a_damaged_artifact(self, folder: Path, store: UrzaStore, remote: RemoteStore) -> None:
        artifact, _ = add_kernel(store, blueprint(1))
        blobs = [each for each in folder.rglob("*") if each.is_file() and each.read_bytes() == artifact.data]
        assert len(blobs) == 1
        blobs[0].chmod(0o600)
        blobs[0].write_bytes(artifact.data[:-1] + bytes([artifact.data[-1] ^ 1]))
        with pytest.raises(StoreCorruptError):
            store.kernels.content(artifact.id)
        with pytest.raises(StoreCorruptError, match="restore it on the server") as raised:
            remote.kernels.content(artifact.id)
        assert str(folder) not in str(raised.value)

    def test_a_busy_database(self, folder: Path) -> None:
        UrzaStore.in_folder(folder).close()
        with (
            UrzaStore(f"sqlite:///{folder / 'esper.db'}", folder / "blobs", busy_seconds=0.2) as store,
            RunningUrza(store) as urza,
            locked(folder) as release,
        ):
            remote = remote_of(urza, client={"retries": 0})
            with pytest.raises(StoreBusyError, match="try again"):
                remote.blueprints.submit(blueprint(1))
            release()
            assert remote.blueprints.submit(blueprint(1)).id == blueprint(1).id
            remote.close()

    def test_too_many_requests(self, store: UrzaStore) -> None:
        with RunningUrza(store, settings(rate_per_second=0.1, rate_burst=1)) as urza:
            hasty = remote_of(urza, client={"retries": 0})
            hasty.blueprints.list()
            with pytest.raises(RateLimitedError) as refused:
                hasty.blueprints.list()
            assert refused.value.retry_after is not None
            assert 1 <= refused.value.retry_after <= 10
            hasty.close()


class TestAccess:
    def test_tokens_and_their_scopes(self, store: UrzaStore) -> None:
        tokens = [
            {"name": "reader", "token": "reader-0123456789abcdef", "scopes": ["read"]},
            {"name": "all", "token": "everything-0123456789abcdef", "scopes": ["read", "submit", "worker"]},
        ]
        with RunningUrza(store, settings(tokens=tokens)) as urza:
            reader = remote_of(urza, token="reader-0123456789abcdef")
            assert reader.blueprints.list() == ()
            for ask in (
                lambda: reader.blueprints.submit(blueprint(1)),
                lambda: reader.blueprints.claim("w"),
                reader.stats,
            ):
                with pytest.raises(ForbiddenError) as refused:
                    ask()
                assert "reader-0123456789abcdef" not in str(refused.value)
            for token in (None, "wrong-0123456789abcdef"):
                stranger = remote_of(urza, token=token)
                with pytest.raises(UnauthorisedError) as unknown:
                    stranger.blueprints.list()
                assert "wrong-0123456789abcdef" not in str(unknown.value)
                stranger.close()
            worker = remote_of(urza, token="everything-0123456789abcdef")
            worker.blueprints.submit(blueprint(1))
            assert claimed(worker, blueprint(1).id).blueprint_id == blueprint(1).id
            worker.close()
            reader.close()

    def test_without_an_address(self) -> None:
        with pytest.raises(UrzaUnavailableError, match=r"set urza\.url"):
            RemoteStore(UrzaConfig()).blueprints.list()

    def test_offline(self, urza: RunningUrza) -> None:
        with pytest.raises(UrzaUnavailableError, match="offline"):
            remote_of(urza, client={"offline": True}).blueprints.list()
