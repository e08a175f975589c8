"""The platform: Urza stores, Tezzeret compiles, Oona carries messages; here all of it inside this process."""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import platformdirs
from sqlalchemy import URL

from esper.artifacts import Blueprint, BlueprintError, SigningKey, SigningKeyError, TrustStore
from esper.configs import EsperConfig, load_config
from esper.contracts.messages import BlueprintSubmitted, TopicNames
from esper.execution.sources import (
    AmbiguousKernelError,
    FetchedKernel,
    KernelSource,
    KernelSourceError,
    UnknownKernelError,
)
from esper.forking import reset_after_fork
from esper.services.contracts import BlueprintStatus, CompiledKernelArtifact
from esper.services.errors import (
    AmbiguousPrefixError,
    CompilationFailedError,
    CompilationTimeoutError,
    PlatformClosedError,
    ServiceError,
    StoreReadOnlyError,
    UnknownKernelReferenceError,
)
from esper.services.oona import Bus, InMemoryBus
from esper.services.oona_client import OonaClient
from esper.services.tezzeret.limits import ChildLimits
from esper.services.tezzeret.service import TezzeretService
from esper.services.tezzeret.worker import Worker
from esper.services.urza import UrzaStore

__all__ = ["POLL_SECONDS", "Platform", "StoreKernelSource", "default_platform", "opened_default_platform"]

_log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""How often the store is looked at for what another process finished. This process's own work is noticed at once."""

_KEY_FILE = "signing.pem"


class StoreKernelSource:
    """A :class:`~esper.execution.sources.KernelSource` over a store, which is opened at the first question."""

    def __init__(self, store: Callable[[], UrzaStore], trust: Callable[[], TrustStore]) -> None:
        self._store = store
        self._trust = trust

    def __deepcopy__(self, memo: object) -> StoreKernelSource:
        return self  # a copied model finds its kernels where the original does

    def resolve(self, reference: str) -> str:
        """See :class:`~esper.execution.sources.KernelSource`."""
        with _source_errors():
            return self._store().kernels.resolve(reference)

    def fetch(self, artifact_id: str) -> FetchedKernel:
        """See :class:`~esper.execution.sources.KernelSource`."""
        with _source_errors():
            return FetchedKernel(*self._store().kernels.content(artifact_id))

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        """See :class:`~esper.execution.sources.KernelSource`."""
        with _source_errors():
            return self._store().kernels.attachment(artifact_id, target_key)

    def trust(self) -> TrustStore:
        """The platform's own key."""
        with _source_errors():
            return self._trust()


@contextmanager
def _source_errors() -> Iterator[None]:
    try:
        yield
    except UnknownKernelReferenceError as error:
        raise UnknownKernelError(str(error)) from error
    except AmbiguousPrefixError as error:
        raise AmbiguousKernelError(str(error)) from error
    except (ServiceError, SigningKeyError) as error:
        raise KernelSourceError(str(error)) from error


class Platform:
    """Compiles blueprints into kernels and hands kernels out. Make one with :meth:`embedded`.

    A context manager, also an async one; leaving it stops what it started. Safe for threads, after a fork, and for
    several processes on one folder, which share the work.
    """

    def __init__(self, root: Path, config: EsperConfig) -> None:
        self.root = root
        """Folder of the database, the blobs and the signing key."""
        self._config = config
        self.bus: Bus = InMemoryBus()
        self.oona = OonaClient(
            self.bus, name=config.name, queue_size=config.oona.queue_size, batch_size=config.oona.batch_size
        )
        """Publishes and subscribes; also the telemetry sink."""
        self.kernel_source: KernelSource = StoreKernelSource(lambda: self.store, lambda: self.trust)
        """Where the execution side finds kernels."""
        self._closed = False
        self._store: UrzaStore | None = None
        self._key: SigningKey | None = None
        self._start_afresh()
        reset_after_fork(self)
        _live.add(self)

    @classmethod
    def embedded(cls, root: str | Path | None = None, *, config: EsperConfig | None = None) -> Platform:
        """A platform inside this process, with its data in the folder `root`.

        By default that is `config.platform.root`, or else the user's data folder. `config` defaults to
        :func:`~esper.configs.load_config`. Nothing is made, opened or started before it is needed, so trouble with the
        folder shows at the first use, as a :class:`~esper.services.errors.StoreError`.
        """
        config = load_config() if config is None else config
        chosen = root if root is not None else config.platform.root
        folder = Path(platformdirs.user_data_dir("esper", appauthor=False)) if chosen is None else Path(chosen)
        return cls(folder.expanduser().absolute(), config)

    def __deepcopy__(self, memo: object) -> Platform:
        return self  # shared by copies of a model

    def _start_afresh(self) -> None:
        self._opening = threading.RLock()
        self._service: TezzeretService | None = None

    def after_fork(self) -> None:
        """Forget the parent's thread; see `esper.forking`."""
        self._start_afresh()

    # -- what it consists of, made when first asked for ----------------------------------------------------------------

    @property
    def store(self) -> UrzaStore:
        """Urza. Raises :class:`~esper.services.errors.StoreError` if it cannot be opened."""
        with self._opening:
            self._check_open()
            if self._store is None:
                url, blobs = self._config.database.url, self._config.store.url
                self._store = UrzaStore(
                    URL.create("sqlite", database=str(self.root / "esper.db"))
                    if url is None
                    else url.get_secret_value(),
                    self.root / "blobs" if blobs is None else blobs.get_secret_value(),
                )
            return self._store

    @property
    def trust(self) -> TrustStore:
        """The keys whose artifacts and attachments may be used: this folder's own."""
        return TrustStore([self._signing_key().public_bytes])

    def _signing_key(self) -> SigningKey:
        with self._opening:
            if self._key is None:
                try:
                    self.root.mkdir(parents=True, exist_ok=True)
                except OSError as cause:
                    raise StoreReadOnlyError(
                        f"the folder {self.root} cannot be made ({cause.strerror}); choose another root"
                    ) from cause
                self._key = SigningKey.load_or_create(self.root / _KEY_FILE)
            return self._key

    def _tezzeret(self) -> TezzeretService:
        with self._opening:
            self._check_open()
            if self._service is None:
                settings = self._config.tezzeret
                self._service = TezzeretService(
                    Worker(self.store, self._signing_key(), self.oona, settings.pipeline, ChildLimits.of(settings))
                )
            return self._service

    # -- compiling -----------------------------------------------------------------------------------------------------

    def submit(self, blueprint: Blueprint, name: str | None = None) -> str:
        """Put `blueprint` on the list of what is to be compiled, and return its id at once.

        Submitting the same content again is harmless. `name` may be used in place of the kernel's id later. Raises
        ``NameTakenError``, ``InvalidNameError``, or another :class:`~esper.services.errors.StoreError`.
        """
        if not isinstance(blueprint, Blueprint):
            raise BlueprintError(f"a {type(blueprint).__name__} was submitted; make a Blueprint, e.g. by from_json()")
        record = self.store.blueprints.submit(blueprint, name)
        if not record.status.is_final:
            self.oona.publish(
                TopicNames.COMPILATION_BLUEPRINT_SUBMITTED,
                BlueprintSubmitted(blueprint_id=record.id, name=name),
                trace_id=record.id,
            )
            self._tezzeret().ask()
        return record.id

    async def wait(self, blueprint_id: str, timeout: float | None = None) -> CompiledKernelArtifact:
        """The kernel of a submitted blueprint, once it is there.

        Raises :class:`~esper.services.errors.CompilationFailedError` with the report if the blueprint is invalid,
        ``CompilationTimeoutError`` after `timeout` seconds, ``UnknownBlueprintError``, ``PlatformClosedError``, or the
        ``StoreError`` that keeps it from being compiled.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        deadline = _Deadline(blueprint_id, timeout)
        service = await asyncio.to_thread(self._tezzeret)
        with service.watched(lambda: _wake(loop, changed)):
            while (kernel := await asyncio.to_thread(self._look, blueprint_id, deadline)) is None:
                try:
                    await asyncio.wait_for(changed.wait(), deadline.next_look())
                except TimeoutError:
                    continue
                changed.clear()
        return kernel

    def wait_sync(self, blueprint_id: str, timeout: float | None = None) -> CompiledKernelArtifact:
        """:meth:`wait` for code that is not async: blocks the calling thread."""
        changed, deadline = threading.Event(), _Deadline(blueprint_id, timeout)
        with self._tezzeret().watched(changed.set):
            while (kernel := self._look(blueprint_id, deadline)) is None:
                changed.wait(deadline.next_look())
                changed.clear()
        return kernel

    def request(
        self, blueprint: Blueprint, name: str | None = None, *, timeout: float | None = None
    ) -> Future[CompiledKernelArtifact]:
        """:meth:`compile` for a loop that goes on meanwhile: the future has the kernel, or what :meth:`wait` raises.

        The future cannot be cancelled; the compilation is anybody's who asks for the same content.
        """
        blueprint_id = self.submit(blueprint, name)
        future: Future[CompiledKernelArtifact] = Future()
        future.set_running_or_notify_cancel()

        def work() -> None:
            try:
                kernel = self.wait_sync(blueprint_id, timeout)
            except BaseException as error:  # noqa: BLE001  # the future carries it to whoever asks
                future.set_exception(error)
            else:
                future.set_result(kernel)

        threading.Thread(target=work, name=f"esper-request-{blueprint_id[:12]}", daemon=True).start()
        return future

    async def compile(
        self, blueprint: Blueprint, name: str | None = None, *, timeout: float | None = None
    ) -> CompiledKernelArtifact:
        """:meth:`submit` and :meth:`wait`. The result's `id` is what `load_kernel` takes."""
        blueprint_id = await asyncio.to_thread(self.submit, blueprint, name)
        return await self.wait(blueprint_id, timeout)

    def compile_sync(
        self, blueprint: Blueprint, name: str | None = None, *, timeout: float | None = None
    ) -> CompiledKernelArtifact:
        """:meth:`compile` for code that is not async: blocks the calling thread."""
        return self.wait_sync(self.submit(blueprint, name), timeout)

    def _look(self, blueprint_id: str, deadline: _Deadline) -> CompiledKernelArtifact | None:
        record = self.store.blueprints.get(blueprint_id)
        if record.status is BlueprintStatus.VALIDATED and record.artifact_id is not None:
            return self.store.kernels.get(record.artifact_id)
        if record.status is BlueprintStatus.INVALID:
            message = f"blueprint {blueprint_id} is invalid: {record.reason}"
            raise CompilationFailedError(message, blueprint_id, record.report)
        service = self._tezzeret()
        failure = service.failure
        if failure is not None and deadline.looked_before:
            raise failure
        deadline.check(record.status)
        if record.status is BlueprintStatus.UNVALIDATED or not deadline.looked_before:
            service.ask()
        deadline.looked_before = True
        return None

    # -- the end -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Platform:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Platform:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Stop compiling, which gives an unfinished blueprint back, send what is queued, and close the store."""
        with self._opening:
            self._closed = True
            service, store = self._service, self._store
        if service is not None:
            service.stop()
        self.oona.close()
        self.bus.close()
        if store is not None:
            store.close()

    def _check_open(self) -> None:
        if self._closed:
            raise PlatformClosedError("the platform was closed; make another one with Platform.embedded()")


class _Deadline:
    def __init__(self, blueprint_id: str, timeout: float | None) -> None:
        self._blueprint_id = blueprint_id
        self._timeout = timeout
        self._end = None if timeout is None else time.monotonic() + timeout
        self.looked_before = False

    def next_look(self) -> float:
        """Seconds until it is worth looking again."""
        return POLL_SECONDS if self._end is None else max(0.0, min(POLL_SECONDS, self._end - time.monotonic()))

    def check(self, status: BlueprintStatus) -> None:
        if self._end is not None and time.monotonic() >= self._end:
            raise CompilationTimeoutError(
                f"blueprint {self._blueprint_id} is {status} after {self._timeout:g} s; it goes on, wait for it again"
            )


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    try:
        loop.call_soon_threadsafe(event.set)
    except RuntimeError:  # the loop is closed: nobody waits any more
        _log.debug("a loop was closed while it waited for a kernel")


_live: weakref.WeakSet[Platform] = weakref.WeakSet()
_default_lock = threading.Lock()
_default: Platform | None = None


def default_platform() -> Platform:
    """The embedded platform that is used where none is given: one per process, anew after it was closed."""
    global _default
    with _default_lock:
        if _default is None or _default.closed:
            _default = Platform.embedded()
        return _default


def opened_default_platform() -> Platform | None:
    """The default platform if somebody has asked for it; opens nothing and waits for nothing."""
    return _default


@atexit.register
def _close_all() -> None:
    for platform in list(_live):
        platform.close()
