"""Fixtures that all tests share."""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One cache of compiled code for all tests and worker processes, set before torch is imported.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "inductor"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # test workers share the cores; a second thread would only wait for one
# Else what compiles gets next to nothing while tests beside it keep all cores busy.
os.environ.setdefault("ESPER_TEZZERET__NICENESS", "0")
os.environ.setdefault("ESPER_EXECUTION__COMPILE_NICENESS", "0")
# Else every process that compiles asks for a second, and every folder of compiled code for five more, whether the
# compiler knows AVX.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch

from esper import EsperConfig, Platform
from tests.kernel_shelf import COMPILED, KernelShelf

# Else pytest's handler is added to the log of torch's structured traces, since it does not propagate, and where that
# log has a handler torch writes down every graph and all generated code of every compilation.
logging.getLogger("torch.__trace").propagate = True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--default-device", default=None, help="torch's default device in all tests, as users set it")


@pytest.fixture(autouse=True)
def _deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.manual_seed(0)
    device = request.config.getoption("default_device")
    if device is not None:
        torch.set_default_device(device)
    yield
    if device is not None:
        torch.set_default_device(None)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Dynamo without code from other tests, so that compilations can be counted and limits are not reached."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counted_dynamo(fresh_dynamo: None) -> Iterator[None]:
    """As `fresh_dynamo`, with `torch._dynamo.utils.counters` at zero; that a limit is reached is an error."""
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelShelf]:
    """A platform on whose shelf a test puts kernels without waiting for Tezzeret."""
    with KernelShelf(tmp_path_factory.mktemp("platform")) as shelf:
        yield shelf


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform that has compiled the kernels of `COMPILED`, as users get them: for the group "attachments"."""
    config = EsperConfig.model_validate({"tezzeret": {"pipeline": "fast"}})
    with Platform.embedded(tmp_path_factory.mktemp("compiled"), config=config) as platform:
        for blueprint_id in [platform.submit(blueprint) for blueprint in COMPILED.values()]:
            platform.wait_sync(blueprint_id, 250)
        yield platform


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device. Where processes share the tests, long ones come first.

    A long test that comes last is one that all other processes wait for. Groups stay as they are, with their fixtures.
    """
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    if hasattr(config, "workerinput"):  # in a process of pytest-xdist
        items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None and "slow" not in item.keywords)


def pytest_collection_finish() -> None:
    """What has been collected stays to the end, and no garbage collection needs to look through it again and again.

    And the programs that tests start have no pool of compiling processes, each of which imports torch first. This
    process keeps its own, as users have it, and so do the programs whose ends and forks are tested.
    """
    if "torch._inductor.config" in sys.modules:  # it has read the variable
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of files with a mark `xdist_group` together.

    The suffixes of test ids by which pytest-xdist 3.8 knows groups get lost in pytest 9.2, and nothing says so.
    """
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling  # for the process that hands out the tests

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group_of(config.rootpath / nodeid.partition("::")[0]) or nodeid

    return Groups(config, log)


@functools.cache
def _group_of(file: Path) -> str | None:
    found = re.search(r'\bxdist_group\("([^"]+)"\)', file.read_text(encoding="utf-8"))
    return None if found is None else found[1]
