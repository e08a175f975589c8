"""The parts that the settings describe: where the data lies, the store, the bus, the keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from sqlalchemy import URL

from esper.artifacts import SigningKey, TrustStore
from esper.configs import EsperConfig
from esper.ownership import UnsafePathError, check_own, make_own_folder
from esper.services.errors import StoreReadOnlyError, StoreUnsafeError
from esper.services.oona import Bus, InMemoryBus
from esper.services.stores import Store
from esper.services.urza import UrzaStore

__all__ = ["data_folder", "open_bus", "open_local_store", "open_store", "signing_key", "trusted_keys"]

_KEY_FILE = "signing.pem"
_DATA = "the data folder"


def data_folder(config: EsperConfig, root: str | Path | None = None) -> Path:
    """`root`, or `platform.root`, or the user's data folder; not made."""
    chosen = root if root is not None else config.platform.root
    folder = Path(platformdirs.user_data_dir("esper", appauthor=False)) if chosen is None else Path(chosen)
    return folder.expanduser().absolute()


def open_local_store(config: EsperConfig, root: str | Path | None = None) -> UrzaStore:
    """The store itself, with the database and blobs in the data folder unless the settings name others.

    Raises :class:`~esper.services.errors.StoreError` if it cannot be opened: ``StoreUnsafeError`` if others than this
    user could have put something into the folder.
    """
    folder, url, blobs = data_folder(config, root), config.database.url, config.store.url
    trusted = TrustStore(map(bytes.fromhex, config.platform.trusted_keys))
    if url is None or blobs is None:
        _make_data_folder(folder)
        trusted = trusted_keys(config, root)
    return UrzaStore(
        URL.create("sqlite", database=str(folder / "esper.db")) if url is None else url.get_secret_value(),
        folder / "blobs" if blobs is None else blobs.get_secret_value(),
        trusted_keys=trusted.key_ids,
    )


def open_store(config: EsperConfig) -> Store:
    """Urza at `urza.url`, or the store itself where no URL is set."""
    if config.urza.url is None:
        return open_local_store(config)
    from esper.services.urza_client import RemoteStore  # with httpx, for those who need it

    return RemoteStore(config.urza)


def open_bus(config: EsperConfig) -> Bus:
    """Redis, or a bus within this process where none is set. Raises ``BusError`` for a URL that cannot be one."""
    if config.redis.url is None:
        return InMemoryBus()
    from esper.services.oona.redis_bus import RedisBus  # with redis, for those who need it

    return RedisBus(config.redis, config.oona)


def signing_key(config: EsperConfig, root: str | Path | None = None) -> SigningKey:
    """The key in the data folder, made if there is none.

    Raises ``StoreReadOnlyError``, ``StoreUnsafeError`` and ``SigningKeyError``.
    """
    folder = data_folder(config, root)
    _make_data_folder(folder)
    return SigningKey.load_or_create(folder / _KEY_FILE)


def trusted_keys(config: EsperConfig, root: str | Path | None = None) -> TrustStore:
    """`platform.trusted_keys`, and the data folder's own if it has one.

    Raises ``StoreUnsafeError`` and ``SigningKeyError``.
    """
    own = data_folder(config, root) / _KEY_FILE
    with _unsafe_store():
        check_own(own.parent, _DATA)
    keys = [SigningKey.load(own).public_bytes] if own.exists() else []
    return TrustStore([*keys, *map(bytes.fromhex, config.platform.trusted_keys)])


def _make_data_folder(folder: Path) -> None:
    with _unsafe_store():
        try:
            make_own_folder(folder, _DATA)
        except OSError as cause:
            raise StoreReadOnlyError(
                f"the folder {folder} cannot be made ({cause.strerror}); choose another root"
            ) from cause


@contextmanager
def _unsafe_store() -> Iterator[None]:
    try:
        yield
    except UnsafePathError as cause:
        raise StoreUnsafeError(f"{cause} (platform.root)") from cause
