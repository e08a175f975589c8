"""A small model and a batch for it, and what tests of compile workers and of the store of variants need."""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import esper
from tests.compiler.moody_compiler import MoodyCompiler
from tests.compiler.variants import workers
from tests.kernel_shelf import KernelShelf
from tests.models import mlp
from tests.services.children import wait_until_gone


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8)


@pytest.fixture
def model(shelf: KernelShelf) -> esper.MorphableModel:
    return esper.wrap(mlp(8, 6, 4), platform=shelf.platform)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def _own_cache() -> Iterator[Path]:
    """A cache of Inductor's that no other run of the tests is using, with what earlier ones have compiled."""
    for number in itertools.count(1):
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / f"worker-tests-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "in use", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield folder
            return


@pytest.fixture
def empty_store(_own_cache: Path, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Path:
    """The folder of the store of variants, which is empty: what was compiled earlier is in Inductor's caches alone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(_own_cache))
    folder = _own_cache / "esper"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


@pytest.fixture
def compiler(
    _own_cache: Path, _own_workers: None, monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None
) -> Iterator[MoodyCompiler]:
    """What compile workers, and programs of their own, compile with. No variant is stored yet.

    Workers that live go on to a module's next test. What they have compiled they do not compile again.
    """
    cache = _own_cache / "faults"
    compiler = MoodyCompiler(cache / "compiler")
    compiler.install()
    for stored in (cache / "esper").glob("*"):
        stored.unlink()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(compiler.path))
        yield compiler


@pytest.fixture(scope="module")
def _own_workers() -> Iterator[None]:
    """No worker that has the environment of another module's tests is used, and none is left to others."""
    _end_workers()
    yield
    _end_workers()


def _end_workers() -> None:
    for each in workers():
        each.kill()
        wait_until_gone(each, 10)
