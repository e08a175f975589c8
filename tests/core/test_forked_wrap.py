"""A process that is forked while another thread wraps a model, or makes the default platform."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import esper
import esper.core.tracing
from tests.models import mlp
from tests.services.programs import forked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


@pytest.fixture
def while_another_thread_is_in() -> Iterator[Callable[[Callable[[threading.Event, threading.Event], object]], None]]:
    """Runs a function of two events on a thread; it sets the first, and waits for the second, set at the end."""
    inside, go_on, threads = threading.Event(), threading.Event(), list[threading.Thread]()

    def start(work: Callable[[threading.Event, threading.Event], object]) -> None:
        threads.append(threading.Thread(target=work, args=(inside, go_on)))
        threads[0].start()
        assert inside.wait(60)

    yield start
    go_on.set()
    threads[0].join(60)


def wraps_and_runs(root: str) -> list[int]:
    os.environ["ESPER_PLATFORM__ROOT"] = root
    model = esper.wrap(mlp(8, 6, 4))
    model.request_kernel("0", 0, "nothing of this name").result(30)
    return list(model(torch.randn(3, 8)).shape)


def test_while_a_model_is_traced(
    while_another_thread_is_in: Callable[[Callable[[threading.Event, threading.Event], object]], None], tmp_path: Path
) -> None:
    def trace(inside: threading.Event, go_on: threading.Event) -> None:
        with esper.core.tracing._lock.held():  # no code that can be traced waits for something
            inside.set()
            assert go_on.wait(60)

    while_another_thread_is_in(trace)
    assert forked(wraps_and_runs, str(tmp_path)) == [3, 4]


def test_while_the_default_platform_is_made(
    while_another_thread_is_in: Callable[[Callable[[threading.Event, threading.Event], object]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("esper.platform._default", None)
    waits, load_config = iter([True]), esper.load_config

    def make(inside: threading.Event, go_on: threading.Event) -> None:
        def slow_settings() -> esper.EsperConfig:
            if next(waits, False):  # in the parent; the child's own platform is made at once
                inside.set()
                assert go_on.wait(60)
            return load_config()

        monkeypatch.setattr("esper.platform.load_config", slow_settings)
        esper.platform.default_platform()

    while_another_thread_is_in(make)
    assert forked(wraps_and_runs, str(tmp_path)) == [3, 4]
