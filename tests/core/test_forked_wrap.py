"""A process that is forked while another thread wraps a model, makes the default platform, or obeys a command."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import esper
import esper.eager.tracer
from esper.contracts.commands import CommandStatus, KasminaAction, KasminaCommandOutcome, KasminaControlCommand
from esper.contracts.messages import OonaMessage, TopicNames
from esper.services.oona import InMemoryBus
from esper.services.oona_client import OonaClient
from tests.core.seeds import GatedPlatform, blueprint
from tests.execution.forked_layer import end_of
from tests.kernel_shelf import KernelShelf
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
    model = esper.wrap(mlp(8, 6, 4), mode="fx")
    model.request_kernel("0", 0, "nothing of this name").result(30)
    return list(model(torch.randn(3, 8)).shape)


def test_while_a_model_is_traced(
    while_another_thread_is_in: Callable[[Callable[[threading.Event, threading.Event], object]], None], tmp_path: Path
) -> None:
    def trace(inside: threading.Event, go_on: threading.Event) -> None:
        with esper.eager.tracer._lock.held():  # no code that can be traced waits for something
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


def test_while_a_command_is_carried_out_which_stays_the_parents(shelf: KernelShelf) -> None:
    """A child that calls the load off for itself neither waits for the parent's threads nor answers in its name."""
    kernel, gated, oona = shelf.put(blueprint()).id, GatedPlatform(shelf), OonaClient(InMemoryBus())
    platform = SimpleNamespace(kernel_source=gated.kernel_source, oona=oona)
    model = esper.wrap(mlp(8, 6, 4), platform=platform)
    gate, outcomes = gated.hold(kernel), queue.Queue[OonaMessage]()
    load = KasminaControlCommand(layer_name="0", seed_idx=0, action=KasminaAction.LOAD, kernel_artifact_id=kernel)
    oona.subscribe(TopicNames.CONTROL_KASMINA_OUTCOMES, outcomes.put)
    with model.listen(platform) as listener:
        oona.publish(TopicNames.CONTROL_KASMINA_COMMANDS, load)
        gated.wait_until_held()
        with listener._lock:  # as the thread that notes a command holds it, for a moment
            child = os.fork()
            if child == 0:
                os._exit(_calls_off(model, oona, load))
        assert end_of(child) == "0"
        gate.set()
        outcome = KasminaCommandOutcome.model_validate(outcomes.get(timeout=20).payload)
    assert (outcome.command_id, outcome.status) == (load.command_id, CommandStatus.DONE)
    oona.close()


def _calls_off(model: esper.MorphableModel, oona: OonaClient, command: KasminaControlCommand) -> int:
    heard = queue.Queue[OonaMessage]()
    oona.subscribe(TopicNames.CONTROL_KASMINA_OUTCOMES, heard.put)
    model.unload_kernel("0", 0)
    last = KasminaCommandOutcome.of(command, CommandStatus.REJECTED, "the last that this child says", None)
    oona.publish(TopicNames.CONTROL_KASMINA_OUTCOMES, last, trace_id="last")
    return 0 if heard.get(timeout=10).trace_id == "last" else 2
