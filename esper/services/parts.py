"""The parts that the settings describe: where the data lies, the store, the bus, the keys."""

from __future__ import annotations

from pathlib import Path

import platformdirs
from sqlalchemy import URL

from esper.artifacts import SigningKey, TrustStore
from esper.configs import EsperConfig
from esper.services.errors import StoreReadOnlyError
from esper.services.oona import Bus, InMemoryBus
from esper.services.stores import Store
from esper.services.urza import UrzaStore

__all__ = ["data_folder", "open_bus", "open_local_store", "open_store", "signing_key", "trusted_keys"]

_KEY_FILE = "signing.pem"


def data_folder(config: EsperConfig, root: str | Path | None = None) -> Path:
    """`root`, or `platform.root`, or the user's data folder; not made."""
    chosen = root if root is not None else config.platform.root
    folder = Path(platformdirs.user_data_dir("esper", appauthor=False)) if chosen is None else Path(chosen)
    return folder.expanduser().absolute()


def open_local_store(config: EsperConfig, root: str | Path | None = None) -> UrzaStore:
    """The store itself, with the database and blobs in the data folder unless the settings name others.

    Raises :class:`~esper.services.errors.StoreError` if it cannot be opened.
    """
    folder, url, blobs = data_folder(config, root), config.database.url, config.store.url
    return UrzaStore(
        URL.create("sqlite", database=str(folder / "esper.db")) if url is None else url.get_secret_value(),
        folder / "blobs" if blobs is None else blobs.get_secret_value(),
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
    """The key in the data folder, made if there is none. Raises ``StoreReadOnlyError`` and ``SigningKeyError``."""
    folder = data_folder(config, root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise StoreReadOnlyError(
            f"the folder {folder} cannot be made ({cause.strerror}); choose another root"
        ) from cause
    return SigningKey.load_or_create(folder / _KEY_FILE)


def trusted_keys(config: EsperConfig, root: str | Path | None = None) -> TrustStore:
    """`platform.trusted_keys`, and the data folder's own if it has one. Raises ``SigningKeyError``."""
    own = data_folder(config, root) / _KEY_FILE
    keys = [SigningKey.load(own).public_bytes] if own.exists() else []
    return TrustStore([*keys, *map(bytes.fromhex, config.platform.trusted_keys)])
