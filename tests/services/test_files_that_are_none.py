"""Named pipes, and sparse files of gigabytes, where a kernel, a key or settings should be: refused, and not read."""

from __future__ import annotations

import asyncio
import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import esper
from esper import Platform
from esper.artifacts import SigningKey, SigningKeyError
from esper.compiler.variant_store import VariantKey, VariantStore
from esper.configs import ConfigError, load_config
from esper.services.errors import StoreCorruptError
from esper.services.urza_client import DiskCache
from tests.kernel_shelf import KernelShelf
from tests.services.shelf import blueprint

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes"),
    pytest.mark.timeout(120, method="thread"),
]
GIB = 2**30


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path, 0o600)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 * GIB)
    path.chmod(0o600)


@pytest.fixture(params=[pipe, sparse])
def spoil(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    """Puts something in the place of a file."""
    made: Callable[[Path], None] = request.param
    return made


@contextmanager
def little_memory() -> Iterator[None]:
    """What is done in the block takes much less than the sparse file would."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 256 * 2**20
    finally:
        tracemalloc.stop()


def test_a_kernel_in_a_folder(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    with KernelShelf(_made(tmp_path)) as shelf:
        artifact = shelf.put(blueprint())
        spoil(tmp_path / "blobs" / artifact.id[:2] / artifact.id[2:])
        model = esper.wrap(torch.nn.Sequential(torch.nn.Linear(4, 4)), platform=shelf.platform)
        assert not asyncio.run(model.load_kernel("0", 0, artifact.id))
        with little_memory(), pytest.raises(StoreCorruptError, match="other content than was stored"):
            shelf.platform.store.kernels.content(artifact.id)
        shelf.put(blueprint())  # stored again, it is whole
        assert asyncio.run(model.load_kernel("0", 0, artifact.id))


def test_a_downloaded_kernel(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    cache = DiskCache(tmp_path)
    digest = cache.put(b"kernel")
    cache.note("fact", {"id": digest})
    for file in [each for each in tmp_path.rglob("*") if each.is_file()]:
        spoil(file)
    with little_memory():
        assert cache.get(digest) is None
        assert cache.fact("fact") is None
    cache.put(b"kernel")
    assert cache.get(digest) == b"kernel"


def test_a_key(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path / "key")
    with pytest.raises(SigningKeyError, match=r"cannot read the signing key .*(regular file|bytes, more than)"):
        SigningKey.load(tmp_path / "key")


def test_settings(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(tmp_path / "esper.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: .*(regular file|bytes, more than)"):
        load_config(tmp_path / "esper.yaml")


def test_a_compiled_variant(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    store, key = VariantStore(tmp_path), VariantKey.of({"graph": b"one"})
    store.put(key, b"code")
    (file,) = tmp_path.iterdir()
    spoil(file)
    with little_memory():
        assert store.get(key) is None


def _made(folder: Path) -> Path:
    with Platform.embedded(folder) as platform:
        assert len(platform.trust) == 1
    return folder
