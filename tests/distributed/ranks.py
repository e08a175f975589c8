"""Processes that train together: as many as one likes, on gloo, in which scenarios run one after the other.

A scenario is a function of a :class:`Rank` in one of the `programs`. It runs on all ranks; what it returns comes back,
by rank. A process start takes seconds, so many scenarios share one.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

__all__ = ["Launched", "Rank", "launch"]

_LONGEST = 240.0


@dataclass
class Rank:
    """Where a scenario runs."""

    rank: int
    size: int
    folder: Path
    """Of this rank alone."""
    shelf: Any
    """A `KernelShelf`; equal blueprints have equal ids on all."""
    store: Any
    lonely: bool = False
    """Set by a scenario after which others do not live any more: this process ends then, without waiting for them."""

    def meet(self, name: str, seconds: float = 60.0) -> None:
        """Wait until all ranks are here."""
        self.store.add(f"meet/{name}", 1)
        end = time.monotonic() + seconds
        while self.store.add(f"meet/{name}", 0) < self.size:
            if time.monotonic() > end:
                raise TimeoutError(f"not all ranks came to {name}")
            time.sleep(0.01)


@dataclass
class Launched:
    """What became of the scenarios."""

    results: dict[str, list[Any]]
    """By scenario and rank; a missing one is None."""
    errors: dict[str, list[str]]
    logs: list[str]

    def of(self, scenario: str) -> list[Any]:
        """What the ranks returned. Fails with what they raised."""
        assert not self.errors.get(scenario), "\n".join(self.errors[scenario])
        results = self.results.get(scenario)
        assert results is not None, "it did not run\n" + "\n".join(log[-3000:] for log in self.logs)
        return results


def launch(module: str, scenarios: Sequence[str], size: int, folder: Path) -> Launched:
    """Run `scenarios` of `module` on `size` ranks."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    logs = [folder / f"log{rank}" for rank in range(size)]
    processes = []
    for rank in range(size):
        command = [sys.executable, "-m", "tests.distributed.ranks", module, str(rank), str(size), str(folder)]
        with logs[rank].open("w") as log:
            processes.append(
                subprocess.Popen([*command, *scenarios], stdout=log, stderr=log, env=env, start_new_session=True)
            )
    end = time.monotonic() + _LONGEST
    try:
        for process in processes:
            process.wait(max(end - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    results: dict[str, list[Any]] = {}
    errors: dict[str, list[str]] = {}
    for rank in range(size):
        for path in sorted(folder.glob(f"{rank}/*.json")):
            found = json.loads(path.read_text())
            results.setdefault(path.stem, [None] * size)[rank] = found.get("result")
            if "error" in found:
                errors.setdefault(path.stem, []).append(f"rank {rank}: {found['error']}")
    return Launched(results, errors, [log.read_text() for log in logs])


def _main(module: str, rank_text: str, size_text: str, folder_text: str, *scenarios: str) -> None:
    rank, size, folder = int(rank_text), int(size_text), Path(folder_text)
    import torch
    from torch import distributed as dist

    from tests.kernel_shelf import KernelShelf

    torch.set_num_threads(1)
    port = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, True, timedelta(seconds=60), wait_for_workers=False)
        (folder / "port.new").write_text(str(store.port))
        (folder / "port.new").rename(port)
    else:
        while not port.exists():
            time.sleep(0.02)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), size, False, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    own = folder / str(rank)
    own.mkdir()
    with KernelShelf(own) as shelf:
        here = Rank(rank, size, own, shelf, dist.PrefixStore("scenarios", store).clone())
        functions = importlib.import_module(module)
        for name in scenarios:
            _run(getattr(functions, name), name, here)
            if here.lonely:
                os._exit(0)
            here.meet(f"end of {name}", 90.0)
    dist.destroy_process_group()
    here.meet("the end")


def _run(scenario: Callable[[Rank], Any], name: str, here: Rank) -> None:
    import torch

    torch.manual_seed(0)
    try:
        found = {"result": scenario(here)}
    except BaseException:  # noqa: BLE001  # whatever it is, the test has to learn of it
        found = {"error": traceback.format_exc()}
    (here.folder / f"{name}.new").write_text(json.dumps(found))
    (here.folder / f"{name}.new").rename(here.folder / f"{name}.json")


if __name__ == "__main__":
    _main(*sys.argv[1:])
