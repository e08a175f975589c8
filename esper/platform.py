"""The platform: Urza stores, Tezzeret compiles, Oona carries messages; in this process, or elsewhere."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import time
import weakref
from concurrent.futures import Future
from pathlib import Path

from esper.artifacts import Blueprint, BlueprintError, TrustStore, artifact_message
from esper.configs import ConfigError, EsperConfig, checked_settings, load_config
from esper.contracts.messages import BlueprintSubmitted, TopicNames
from esper.errors import shown
from esper.execution.sources import KernelSource
from esper.forking import ModuleLock, reset_after_fork
from esper.futures import in_thread
from esper.services.contracts import BlueprintRecord, BlueprintStatus, CompiledKernelArtifact
from esper.services.errors import (
    CompilationFailedError,
    CompilationTimeoutError,
    KernelNotTrustedError,
    PlatformClosedError,
)
from esper.services.oona import Bus, InMemoryBus
from esper.services.oona_client import OonaClient
from esper.services.parts import data_folder, open_bus, open_local_store, signing_key, trusted_keys
from esper.services.store_source import StoreKernelSource
from esper.services.stores import Store
from esper.services.tezzeret.announcements import Announcements, Compiler
from esper.services.tezzeret.limits import ChildLimits
from esper.services.tezzeret.service import TezzeretService
from esper.services.tezzeret.worker import Worker

__all__ = ["Platform", "default_platform", "opened_default_platform"]

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
"""How often the store is looked at for what another process finished. This process's own work is noticed at once."""


class Platform:
    """Compiles blueprints into kernels and hands kernels out. Made by :meth:`embedded` or :meth:`connect`.

    A context manager, also an async one; leaving it stops what it started. Safe for threads, after a fork, and for
    several processes on one folder, which share the work.
    """

    def __init__(self, root: Path, config: EsperConfig, bus: Bus) -> None:
        self.root = root
        """Folder of the signing key, and of an embedded platform's database and blobs."""
        self.bus = bus
        self.oona = OonaClient(
            bus, name=config.name, queue_size=config.oona.queue_size, batch_size=config.oona.batch_size
        )
        """Publishes and subscribes; also the telemetry sink."""
        self.kernel_source: KernelSource = StoreKernelSource(lambda: self.store, lambda: self.trust)
        """Where the execution side finds kernels."""
        self.config = config
        """The settings that it was made with."""
        self._closed = False
        self._store: Store | None = None
        self._trust: TrustStore | None = None
        self._is_embedded = True
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
        config = load_config() if config is None else checked_settings(config)
        if root is not None and not isinstance(root, (str, os.PathLike)):
            raise TypeError(f"root must be the path of a folder, not {shown(root)}; settings are passed as config=...")
        return cls(data_folder(config, root), config, InMemoryBus())

    @classmethod
    def connect(cls, config: EsperConfig | None = None) -> Platform:
        """The platform whose Urza is at `config.urza.url`, and whose messages go over `config.redis.url`.

        Without Redis messages stay in this process, and :meth:`wait` looks again now and then. Nothing is connected
        before it is needed. Kernels are used if their signature is by one of `config.platform.trusted_keys`, or by the
        key in the data folder. Raises :class:`~esper.configs.ConfigError` if there is no URL, and ``BusError`` for a
        Redis URL that cannot be one.
        """
        config = load_config() if config is None else checked_settings(config)
        if config.urza.url is None:
            raise ConfigError("to connect, set urza.url (or ESPER_URZA__URL), for example http://localhost:8321")
        from esper.services.urza_client import RemoteKernelSource, RemoteStore  # with httpx, for those who need it

        platform = cls(data_folder(config), config, open_bus(config))
        remote = RemoteStore(config.urza)
        platform._is_embedded, platform._store = False, remote
        platform.kernel_source = RemoteKernelSource(remote, lambda: platform.trust)
        return platform

    def __repr__(self) -> str:
        where = f"embedded in {self.root}" if self._is_embedded else f"connected to {self.config.urza.url}"
        return f"<Platform {where}{', closed' if self._closed else ''}>"

    def __deepcopy__(self, memo: object) -> Platform:
        return self  # shared by copies of a model

    def _start_afresh(self) -> None:
        self._opening = threading.RLock()
        self._compiler: Compiler | None = None

    def after_fork(self) -> None:
        """Forget the parent's thread; see `esper.forking`."""
        self._start_afresh()

    # -- what it consists of, made when first asked for ----------------------------------------------------------------

    @property
    def store(self) -> Store:
        """Urza. Raises :class:`~esper.services.errors.StoreError` if it cannot be opened."""
        with self._opening:
            self._check_open()
            if self._store is None:
                self._store = open_local_store(self.config, self.root)
            return self._store

    @property
    def trust(self) -> TrustStore:
        """The keys whose artifacts and attachments may be used, as they were when first asked for."""
        with self._opening:
            if self._trust is None:
                if self._is_embedded:
                    signing_key(self.config, self.root)  # made, so that it is among them
                self._trust = trusted_keys(self.config, self.root)
            return self._trust

    def _tezzeret(self) -> Compiler:
        with self._opening:
            self._check_open()
            if self._compiler is None:
                self._compiler = self._worker_here() if self._is_embedded else Announcements(self.oona)
            return self._compiler

    def _worker_here(self) -> TezzeretService:
        settings, key = self.config.tezzeret, signing_key(self.config, self.root)
        return TezzeretService(
            Worker(self.store, key, self.oona, settings.pipeline, ChildLimits.of(settings), settings.lease_seconds)
        )

    # -- compiling -----------------------------------------------------------------------------------------------------

    def submit(self, blueprint: Blueprint, name: str | None = None) -> str:
        """Put `blueprint` on the list of what is to be compiled, and return its id at once.

        Submitting the same content again is harmless; it is compiled again if its kernel is signed by no key that this
        platform trusts, for instance after a key was lost. `name` may be used in place of the kernel's id later. Raises
        ``NameTakenError``, ``InvalidNameError``, or another :class:`~esper.services.errors.StoreError`.
        """
        _check_blueprint(blueprint)
        record = self._recorded(blueprint, name)
        if not record.status.is_final:
            self.oona.publish(
                TopicNames.COMPILATION_BLUEPRINT_SUBMITTED,
                BlueprintSubmitted(blueprint_id=record.id, name=name),
                trace_id=record.id,
            )
            self._tezzeret().ask()
        return record.id

    def _recorded(self, blueprint: Blueprint, name: str | None) -> BlueprintRecord:
        record = self.store.blueprints.submit(blueprint, name)
        if record.status is BlueprintStatus.VALIDATED and record.artifact_id is not None:
            kernel = self.store.kernels.get(record.artifact_id)
            if not self._trusts(kernel):
                _log.info("kernel %s is signed by no trusted key; it is compiled again", kernel.id[:12])
                return self.store.blueprints.recompile(record.id, self.trust.key_ids)
        return record

    def _trusts(self, kernel: CompiledKernelArtifact) -> bool:
        """Whether a model here could load it. True where no key is trusted: such a platform only submits."""
        trust = self.trust
        signatures = (each.signature() for each in kernel.signatures)
        return not len(trust) or trust.choose(artifact_message(kernel.id), signatures) is not None

    async def wait(self, blueprint_id: str, timeout: float | None = None) -> CompiledKernelArtifact:
        """The kernel of a submitted blueprint, once it is there.

        Raises :class:`~esper.services.errors.CompilationFailedError` with the report if the blueprint is invalid,
        ``KernelNotTrustedError`` if no model here would load its kernel, ``CompilationTimeoutError`` after `timeout`
        seconds, ``UnknownBlueprintError``, ``PlatformClosedError``, or the ``StoreError`` that keeps it from being
        compiled.
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
        """:meth:`wait` for code that is not async: blocks the calling thread, for `timeout` seconds at most."""
        if timeout is None:
            return self._wait_here(blueprint_id, None)
        return in_thread(lambda: self._wait_here(blueprint_id, timeout), timeout, _late).result()

    def _wait_here(self, blueprint_id: str, timeout: float | None) -> CompiledKernelArtifact:
        changed, deadline = threading.Event(), _Deadline(blueprint_id, timeout)
        with self._tezzeret().watched(changed.set):
            while (kernel := self._look(blueprint_id, deadline)) is None:
                changed.wait(deadline.next_look())
                changed.clear()
        return kernel

    def request(
        self, blueprint: Blueprint, name: str | None = None, *, timeout: float | None = None
    ) -> Future[CompiledKernelArtifact]:
        """:meth:`compile` for a loop that goes on meanwhile: the future has the kernel, or what :meth:`submit` and
        :meth:`wait` raise.

        Returns at once, also while the store is away; only what is no blueprint raises here. `timeout` seconds after
        the request the future fails, whatever keeps the kernel. It cannot be cancelled; the compilation is anybody's
        who asks for the same content.
        """
        _check_blueprint(blueprint)

        def work() -> CompiledKernelArtifact:
            began = time.monotonic()
            blueprint_id = self.submit(blueprint, name)
            left = None if timeout is None else max(0.0, timeout - (time.monotonic() - began))
            return self._wait_here(blueprint_id, left)

        return in_thread(work, timeout, _late)

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
            kernel = self.store.kernels.get(record.artifact_id)
            if not self._trusts(kernel):
                signers = ", ".join(each.key_id[:12] for each in kernel.signatures) or "nobody"
                raise KernelNotTrustedError(
                    f"kernel {kernel.id} of blueprint {blueprint_id} is signed by {signers}, and by no key that is "
                    "trusted here; add the public key of a worker to platform.trusted_keys (`esper keys show` prints "
                    "it there), or submit the blueprint again once such a worker runs"
                )
            return kernel
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

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Platform:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Stop compiling, which gives an unfinished blueprint back, send what is queued, and close the store."""
        with self._opening:
            self._closed = True
            compiler, store = self._compiler, self._store
        if compiler is not None:
            compiler.stop()
        self.oona.close()
        self.bus.close()
        if store is not None:
            store.close()

    def _check_open(self) -> None:
        if self._closed:
            raise PlatformClosedError("the platform was closed; make another one")


class _Deadline:
    def __init__(self, blueprint_id: str, timeout: float | None) -> None:
        self._blueprint_id = blueprint_id
        self._timeout = timeout
        self._end = None if timeout is None else time.monotonic() + timeout
        self.looked_before = False

    def next_look(self) -> float:
        """Seconds until it is worth looking again."""
        return _POLL_SECONDS if self._end is None else max(0.0, min(_POLL_SECONDS, self._end - time.monotonic()))

    def check(self, status: BlueprintStatus) -> None:
        if self._end is not None and time.monotonic() >= self._end:
            raise CompilationTimeoutError(
                f"blueprint {self._blueprint_id} is {status} after {self._timeout:g} s; it goes on, wait for it again"
            )


def _check_blueprint(blueprint: object) -> None:
    if not isinstance(blueprint, Blueprint):
        raise BlueprintError(f"a {type(blueprint).__name__} was submitted; make a Blueprint, e.g. by from_json()")


def _late(timeout: float) -> CompilationTimeoutError:
    return CompilationTimeoutError(f"the store has not answered for {timeout:g} s; look at it, or ask again")


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    try:
        loop.call_soon_threadsafe(event.set)
    except RuntimeError:  # the loop is closed: nobody waits any more
        _log.debug("a loop was closed while it waited for a kernel")


_live: weakref.WeakSet[Platform] = weakref.WeakSet()
_default_lock = ModuleLock()
_default: Platform | None = None
_made: dict[EsperConfig, Platform] = {}


def default_platform(config: EsperConfig | None = None) -> Platform:
    """The platform that is used where none is given: one per process and settings, anew after it was closed.

    The one at `urza.url` if the settings have that, else an embedded one. `config` is in place of the settings that
    :func:`~esper.configs.load_config` finds.
    """
    global _default
    with _default_lock.held():
        if config is None:
            if _default is None or _default.closed:
                _default = _of(load_config())
            return _default
        if config not in _made or _made[config].closed:
            _made[config] = _of(config)
        return _made[config]


def _of(config: EsperConfig) -> Platform:
    return Platform.embedded(config=config) if config.urza.url is None else Platform.connect(config)


def opened_default_platform() -> Platform | None:
    """The default platform if somebody has asked for it; opens nothing and waits for nothing."""
    return _default


@atexit.register
def _close_all() -> None:
    for platform in list(_live):
        platform.close()
