"""The command line."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import esper
from esper.commands import contents, services, settings
from esper.commands.doctor import doctor
from esper.commands.watch import watch
from esper.errors import EsperError
from esper.variables import CONFIG_VARIABLE

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help="PyTorch models that grow while they train.")


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"esper {esper.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", help="YAML file of settings, in place of ESPER_CONFIG.")
    ] = None,
) -> None:
    """PyTorch models that grow while they train."""
    del version  # its callback has printed it
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config.absolute())  # for the processes that a service starts as well


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of the split, the initial weights, the batches and the kernel.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for report.png.")] = Path("demo"),
    root: Annotated[Path | None, typer.Option(help="Platform folder; a temporary one by default.")] = None,
) -> None:
    """Grow a classifier of handwritten digits while it trains, and show what happened."""
    console = Console()
    try:
        import matplotlib  # noqa: F401  # only whether it is there
        import sklearn  # noqa: F401  # only whether it is there
    except ImportError as error:
        console.print(f"[red]{error}[/red]: the demo needs the packages of the extra: pip install 'esper-fx[demo]'")
        raise typer.Exit(1) from error
    from esper.demo import run_demo
    from esper.demo_report import print_report, save_picture

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(root or folder) as platform:
        with Progress(*columns, console=console) as bars:
            tasks: dict[str, object] = {}

            def progress(phase: str, done: int, total: int | None) -> None:
                if phase not in tasks:
                    tasks[phase] = bars.add_task(phase, total=total)
                if done == total or done % 50 == 1:
                    bars.update(tasks[phase], completed=done, total=total)  # type: ignore[arg-type]  # rich's task id

            report = run_demo(platform, seed, progress)
        print_report(report, console)
    picture = out / "report.png"
    save_picture(report, picture)
    console.print(f"picture in [bold]{picture}[/bold]")


app.command()(services.up)
app.add_typer(services.urza_app, name="urza")
app.command()(services.tezzeret)
app.command()(contents.submit)
app.add_typer(contents.blueprints_app, name="blueprints")
app.add_typer(contents.kernels_app, name="kernels")
app.command()(watch)
app.add_typer(settings.keys_app, name="keys")
app.add_typer(settings.config_app, name="config")
app.command()(doctor)


def main() -> None:
    """The console script `esper`: Esper's own errors are shown without a traceback."""
    try:
        app()
    except EsperError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
