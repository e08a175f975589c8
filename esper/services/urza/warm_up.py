"""Preparation for the first request: imports, a thread pool and the way to the blobs, which it would wait for."""

from __future__ import annotations

import logging
import threading

from anyio.from_thread import start_blocking_portal

from esper.artifacts.shapes import import_meta_kernels
from esper.services.errors import StoreError
from esper.services.urza.http.store_threads import StoreThreads
from esper.services.urza.storage.blobs import BlobStore

__all__ = ["warm_up"]

_log = logging.getLogger(__name__)
_PATIENCE = 10.0
"""Seconds that the blob store has to answer; Urza starts without it too."""
_NO_BLOB = "0" * 64


def warm_up(blobs: BlobStore) -> None:
    """Make ready what requests need. Takes seconds, the first time in a process. Raises nothing."""
    import_meta_kernels()
    with start_blocking_portal() as portal:  # imports anyio's event loop
        portal.call(StoreThreads().read, import_meta_kernels)
    reaching = threading.Thread(target=_reach, args=(blobs,), name="esper-urza-blobs", daemon=True)
    reaching.start()
    reaching.join(_PATIENCE)
    if reaching.is_alive():
        _log.warning("the blobs in %s have not answered within %g s; Urza starts without", blobs.root, _PATIENCE)


def _reach(blobs: BlobStore) -> None:
    """Clients of object stores are made at first use."""
    try:
        blobs.exists(_NO_BLOB)
    except StoreError as error:
        _log.warning("Urza starts although its blobs cannot be reached: %s", error)
