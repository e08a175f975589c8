"""How far a compilation is, for whoever waits for it on the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from esper.artifacts import Blueprint
from esper.errors import EsperError
from esper.platform import Platform
from esper.services.contracts import BlueprintStatus, CompiledKernelArtifact

__all__ = ["awaited"]

_LOOK_SECONDS = 0.5
_WORDS = {
    BlueprintStatus.UNVALIDATED: "waits for a worker",
    BlueprintStatus.COMPILING: "is compiled and validated",
    BlueprintStatus.VALIDATED: "is compiled",
    BlueprintStatus.INVALID: "is invalid",
}


def awaited(
    platform: Platform, blueprint: Blueprint, name: str | None, timeout: float | None
) -> CompiledKernelArtifact:
    """The kernel of `blueprint`, once it is there; on standard error, how far it is.

    On a terminal that is one line that moves, elsewhere a line for each change. Raises what `Platform.request` does.
    """
    request = platform.request(blueprint, name, timeout=timeout)
    with _shown(f"blueprint {blueprint.id[:12]}" + (f" ({name})" if name else "")) as show:
        while not request.done():
            show(_state(platform, blueprint))
            _wait(request)
        show(_WORDS[BlueprintStatus.VALIDATED] if request.exception() is None else "has no kernel")
    return request.result()


def _state(platform: Platform, blueprint: Blueprint) -> str:
    try:
        return _WORDS[platform.store.blueprints.get(blueprint.id).status]
    except EsperError:  # it is not in the store yet, or that does not answer, which the request finds out too
        return "is submitted"


def _wait(request: Future[CompiledKernelArtifact]) -> None:
    try:
        request.exception(_LOOK_SECONDS)
    except TimeoutError:
        return


@contextmanager
def _shown(what: str) -> Iterator[Callable[[str], None]]:
    """A function that shows a state of `what`."""
    console = Console(stderr=True)
    if not console.is_terminal:
        said = [""]

        def line(state: str) -> None:
            if state != said[-1]:
                said.append(state)
                console.print(f"{what} {state}", markup=False, highlight=False, soft_wrap=True)

        yield line
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(escape(what), total=None)
        yield lambda state: bars.update(task, description=escape(f"{what} {state}"))
