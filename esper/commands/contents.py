"""`esper submit`, `esper blueprints` and `esper kernels`: what is in the store, here or at `urza.url`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from esper.artifacts import Blueprint, load_artifact
from esper.commands.output import AsJson, print_facts, print_json, print_table, short_time
from esper.commands.progress import awaited
from esper.configs import load_config
from esper.platform import Platform
from esper.services.contracts import BlueprintStatus, CompiledKernelArtifact, KernelQuery, KernelStatus
from esper.services.parts import open_store, trusted_keys
from esper.services.store_source import best_signature
from esper.services.stores import Store

__all__ = ["blueprints_app", "kernels_app", "submit"]

blueprints_app = typer.Typer(no_args_is_help=True, help="Blueprints in the store.")
kernels_app = typer.Typer(no_args_is_help=True, help="Kernels in the store.")

Reference = Annotated[str, typer.Argument(help="A full id, its first 12 or more hex digits, or a name.")]
BlueprintId = Annotated[str, typer.Argument(help="The blueprint's full id.")]
Limit = Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")]


@contextmanager
def _opened() -> Iterator[Store]:
    store = open_store(load_config())
    try:
        yield store
    finally:
        store.close()


def submit(
    file: Annotated[Path, typer.Argument(help='A blueprint as JSON, as Blueprint.to_json() writes it; "-" reads it.')],
    name: Annotated[str | None, typer.Option(help="A name for the kernel.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is compiled; without Urza, compile it here.")] = False,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait at most.")] = None,
    as_json: AsJson = False,
) -> None:
    """Submit a blueprint for compilation."""
    blueprint = Blueprint.from_json(_read(file))
    config = load_config()
    with Platform.embedded(config=config) if config.urza.url is None else Platform.connect(config) as platform:
        if not wait:
            record = platform.store.blueprints.submit(blueprint, name)
            print_json(record) if as_json else typer.echo(record.id)
            return
        kernel = awaited(platform, blueprint, name, timeout)
    print_json(kernel) if as_json else _print_kernel(kernel)


def _read(file: Path) -> bytes:
    if str(file) == "-":
        return sys.stdin.buffer.read()
    try:
        return file.read_bytes()
    except OSError as cause:
        raise typer.BadParameter(f"{file} cannot be read: {cause.strerror}") from cause


@blueprints_app.command("list")
def list_blueprints(
    status: Annotated[BlueprintStatus | None, typer.Option(help="Only those.")] = None,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """The blueprints submitted last."""
    with _opened() as store:
        records = store.blueprints.list(status, limit)
    if as_json:
        print_json(list(records))
        return
    rows = ((r.id[:12], ", ".join(r.names), r.status, short_time(r.submitted_at), r.reason[:80]) for r in records)
    print_table(("id", "names", "status", "submitted", "reason"), rows, "there are no such blueprints")


@blueprints_app.command("show")
def show_blueprint(blueprint_id: BlueprintId, as_json: AsJson = False) -> None:
    """One blueprint, and how its compilation went."""
    with _opened() as store:
        record = store.blueprints.get(blueprint_id)
    if as_json:
        print_json(record)
        return
    print_facts(
        [
            ("id", record.id), ("names", ", ".join(record.names)), ("status", record.status),
            ("reason", record.reason), ("kernel", record.artifact_id), ("claims", record.attempts),
            ("submitted", short_time(record.submitted_at)), ("changed", short_time(record.updated_at)),
        ]
    )  # fmt: skip
    for check in record.report.checks if record.report else ():
        typer.echo(f"  {'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}")


@blueprints_app.command("recompile")
def recompile_blueprint(blueprint_id: BlueprintId, as_json: AsJson = False) -> None:
    """Have a finished blueprint compiled again, and so signed by another worker; its kernel stays meanwhile."""
    with _opened() as store:
        record = store.blueprints.recompile(blueprint_id)
    print_json(record) if as_json else typer.echo(f"{record.id}: {record.status}")


@blueprints_app.command("pull")
def pull_blueprint(
    blueprint_id: BlueprintId,
    out: Annotated[Path | None, typer.Option(help="File to write; standard output by default.")] = None,
) -> None:
    """The blueprint itself, as JSON."""
    with _opened() as store:
        document = store.blueprints.document(blueprint_id)
    if out is None:
        typer.echo(document.decode())
    else:
        _write(out, document)


@kernels_app.command("list")
def list_kernels(
    in_features: Annotated[int | None, typer.Option(min=1, help="Only of that input width.")] = None,
    out_features: Annotated[int | None, typer.Option(min=1, help="Only of that output width.")] = None,
    retired: Annotated[bool, typer.Option(help="Those that were retired.")] = False,
    limit: Limit = 20,
    as_json: AsJson = False,
) -> None:
    """The kernels stored last."""
    status = KernelStatus.RETIRED if retired else KernelStatus.VALIDATED
    query = KernelQuery(in_features=in_features, out_features=out_features, status=status, limit=limit)
    with _opened() as store:
        kernels = store.kernels.query(query)
    if as_json:
        print_json(list(kernels))
        return
    rows = (
        (k.id[:12], k.name, f"{k.in_features} -> {k.out_features}", k.metadata.parameter_count, k.size_bytes,
         None if k.latency_us is None else f"{k.latency_us:.1f}", short_time(k.created_at))
        for k in kernels
    )  # fmt: skip
    columns = ("id", "name", "features", "parameters", "bytes", "latency, μs", "stored")
    print_table(columns, rows, "there are no such kernels")


@kernels_app.command("show")
def show_kernel(reference: Reference, as_json: AsJson = False) -> None:
    """One kernel, and what its validation found."""
    with _opened() as store:
        kernel = store.kernels.get(store.kernels.resolve(reference))
    print_json(kernel) if as_json else _print_kernel(kernel)


def _print_kernel(kernel: CompiledKernelArtifact) -> None:
    print_facts(
        [
            ("id", kernel.id), ("name", kernel.name), ("blueprint", kernel.blueprint_id), ("status", kernel.status),
            ("features", f"{kernel.in_features} -> {kernel.out_features}, {kernel.dtype}"),
            ("parameters", kernel.metadata.parameter_count), ("bytes", kernel.size_bytes),
            ("latency", None if kernel.latency_us is None else f"{kernel.latency_us:.1f} μs"),
            ("signed by", ", ".join(each.key_id[:12] for each in kernel.signatures) or "nobody"),
            ("compiled for", ", ".join(kernel.attachments) or "no target"), ("stored", short_time(kernel.created_at)),
        ]
    )  # fmt: skip


@kernels_app.command("pull")
def pull_kernel(
    reference: Reference, out: Annotated[Path, typer.Option(help="File to write.")], as_json: AsJson = False
) -> None:
    """Download a kernel's artifact; a signature goes into a file beside it, of the same name and `.sig`."""
    with _opened() as store:
        artifact_id = store.kernels.resolve(reference)
        data, signatures = store.kernels.content(artifact_id)
    signature = best_signature(trusted_keys(load_config()), artifact_id, signatures)
    _write(out, data)
    if signature is not None:
        _write(out.with_name(f"{out.name}.sig"), signature.to_json().encode())
    facts = {"id": artifact_id, "file": str(out), "bytes": len(data), "signed": signature is not None}
    print_json(facts) if as_json else typer.echo(f"{out}: {artifact_id}, {len(data)} bytes")


@kernels_app.command("verify")
def verify_kernel(reference: Reference, as_json: AsJson = False) -> None:
    """Check a kernel as a model would before it loads it: hash, signature, format, limits, shapes, weights."""
    config = load_config()
    with _opened() as store:
        artifact_id = store.kernels.resolve(reference)
        data, signatures = store.kernels.content(artifact_id)
    trust = trusted_keys(config)
    signature = best_signature(trust, artifact_id, signatures)
    artifact = load_artifact(data, expected_id=artifact_id, signature=signature, trust=trust)
    assert signature is not None  # or it would not have been trusted
    facts = {
        "id": artifact.id,
        "signed_by": signature.key_id,
        "in_features": artifact.in_features,
        "out_features": artifact.out_features,
    }
    told = f"{artifact_id}: can be loaded; signed by the trusted key {signature.key_id[:12]}"
    print_json(facts) if as_json else typer.echo(told)


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as cause:
        raise typer.BadParameter(f"{path} cannot be written: {cause.strerror}") from cause
