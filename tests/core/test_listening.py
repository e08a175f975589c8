"""Commands from the bus steer a model, over both transports."""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict

import esper
from esper.contracts.commands import KasminaCommandOutcome, KasminaControlCommand
from esper.contracts.messages import OonaMessage, TopicNames
from esper.services.oona import Bus, InMemoryBus
from esper.services.oona.redis_bus import RedisBus
from esper.services.oona_client import OonaClient
from tests.core.seeds import GatedPlatform, blueprint, load, outputs, states
from tests.kernel_shelf import KernelShelf
from tests.models import mlp
from tests.services.valkey_server import ValkeyProcess

COMMANDS = TopicNames.CONTROL_KASMINA_COMMANDS
OUTCOMES = TopicNames.CONTROL_KASMINA_OUTCOMES


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyProcess]:
    with ValkeyProcess() as server:
        yield server


class Control:
    """Who steers: sends commands over a client of its own and reads what is answered."""

    def __init__(self, oona: OonaClient) -> None:
        self.oona = oona
        self.messages: queue.Queue[OonaMessage] = queue.Queue()
        oona.subscribe(OUTCOMES, self.messages.put)

    def send(self, **fields: Any) -> KasminaControlCommand:
        command = KasminaControlCommand.model_validate({"layer_name": "0", "seed_idx": 0, **fields})
        self.oona.publish(COMMANDS, command, trace_id="a test")
        return command

    def outcome(self) -> KasminaCommandOutcome:
        message = self.messages.get(timeout=20)
        assert message.trace_id == "a test"
        return KasminaCommandOutcome.model_validate(message.payload)

    def do(self, **fields: Any) -> KasminaCommandOutcome:
        command = self.send(**fields)
        outcome = self.outcome()
        assert outcome.command_id == command.command_id
        return outcome


@pytest.fixture(params=["memory", "redis"])
def make_client(request: pytest.FixtureRequest) -> Iterator[Callable[[], OonaClient]]:
    """Makes a client of the bus of this test."""
    made: list[OonaClient] = []
    memory = InMemoryBus()

    def make() -> OonaClient:
        bus: Bus = memory
        if request.param == "redis":
            bus = RedisBus(request.getfixturevalue("server").config())
        made.append(OonaClient(bus))
        return made[-1]

    if request.param == "redis":
        with request.getfixturevalue("server").client() as client:
            client.flushall()
    yield make
    for client in made:
        client.close()
        client.bus.close()


@pytest.fixture
def control(make_client: Callable[[], OonaClient]) -> Control:
    return Control(make_client())


@pytest.fixture
def platform(shelf: KernelShelf, make_client: Callable[[], OonaClient]) -> Any:
    """The shelf's kernels and this test's bus."""
    return SimpleNamespace(kernel_source=shelf.platform.kernel_source, oona=make_client())


@pytest.fixture
def model(platform: Any) -> esper.MorphableModel:
    return esper.wrap(mlp(8, 6, 4), seeds_per_layer=2, platform=platform)


class TestSteering:
    def test_a_seed_is_led_through_its_life_while_the_model_runs(
        self, model: esper.MorphableModel, control: Control, kernel: str
    ) -> None:
        x, host = torch.randn(5, 8), esper.unwrap(model)
        with model.listen():
            done = control.do(action="load", kernel_artifact_id=kernel, alpha=0.5, trainable=True)
            assert (done.status, done.accepted, done.succeeded, done.reason) == ("done", True, True, "")
            assert (done.layer, done.seed, done.model) == ("0", 0, None)
            assert states(model)["0"] == ["LOADING", "DORMANT"]  # staged, and in force with the next forward
            half = outputs(model, x)
            assert states(model)["0"] == ["ACTIVE", "DORMANT"]
            assert len(list(model.seed_parameters())) > 0

            assert control.do(action="set_alpha", alpha=0.25).succeeded
            quarter = outputs(model, x)
            expected = esper.wrap(host, seeds_per_layer=2, platform=model._wrapping.options.platform)
            load(expected, "0", 0, kernel, alpha=0.5)
            assert torch.equal(half, outputs(expected, x))
            expected.set_alpha("0", 0, 0.25)
            assert torch.equal(quarter, outputs(expected, x))

            assert control.do(action="fossilize").succeeded
            assert torch.equal(outputs(model, x), quarter)
            assert states(model)["0"] == ["FOSSILIZED", "DORMANT"]

            assert control.do(action="load", kernel_artifact_id=kernel, seed_idx=1, isolate=True).succeeded
            outputs(model, x)
            assert states(model)["0"] == ["FOSSILIZED", "ACTIVE"]
            assert control.do(action="unload", seed_idx=1).succeeded
            assert torch.equal(outputs(model, x), quarter)

    def test_with_manual_commits_it_comes_into_force_at_the_commit(
        self, platform: Any, control: Control, kernel: str
    ) -> None:
        model = esper.wrap(mlp(8, 6, 4), platform=platform, commit="manual")
        x = torch.randn(5, 8)
        before = outputs(model, x)
        with model.listen():
            assert control.do(action="load", kernel_artifact_id=kernel).succeeded
            assert torch.equal(outputs(model, x), before)
            assert [each.new.name for each in model.commit()] == ["ACTIVE"]
            assert not torch.equal(outputs(model, x), before)

    def test_training_goes_on_while_commands_come(
        self, model: esper.MorphableModel, control: Control, shelf: KernelShelf, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, logger="esper.execution")
        kernels = [shelf.put(blueprint(seed=seed)).id for seed in range(3)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        stop, problems = threading.Event(), []

        def train() -> None:
            try:
                while not stop.is_set():
                    optimizer.zero_grad()
                    model(torch.randn(16, 8)).square().mean().backward()
                    optimizer.step()
            except BaseException as error:  # noqa: BLE001  # shown by the assertion below
                problems.append(error)

        trainer = threading.Thread(target=train)
        with model.listen():
            trainer.start()
            for turn in range(12):
                assert control.do(action="load", kernel_artifact_id=kernels[turn % 3], seed_idx=turn % 2).succeeded
                if turn % 3 == 2:
                    assert control.do(action="unload", seed_idx=turn % 2).succeeded
            stop.set()
            trainer.join(30)
        assert problems == []
        commits = [record.thread for record in caplog.records if "-> ACTIVE" in record.getMessage()]
        assert len(commits) >= 2
        assert set(commits) == {trainer.ident}, "a plan changed on another thread than the one that trains"

    def test_commands_reach_the_models_of_a_name_or_all(self, platform: Any, control: Control, kernel: str) -> None:
        models = {name: esper.wrap(mlp(8, 6, 4), platform=platform) for name in ("a", "b")}
        listeners = [model.listen(name=name) for name, model in models.items()]
        assert [each.name for each in listeners] == ["a", "b"]
        assert control.do(action="load", kernel_artifact_id=kernel, target="b").model == "b"
        assert states(models["a"])["0"][0] == "DORMANT"
        assert states(models["b"])["0"][0] == "LOADING"
        control.send(action="load", kernel_artifact_id=kernel, seed_idx=1)
        assert {control.outcome().model for _ in range(2)} == {"a", "b"}
        control.send(action="unload", target="nobody")
        assert control.do(action="unload", seed_idx=1, target="a").model == "a"  # nobody answered the one before
        for each in listeners:
            each.close()


class TestRefusals:
    def test_what_the_model_does_not_have_is_rejected_with_what_it_has(
        self, model: esper.MorphableModel, control: Control
    ) -> None:
        with model.listen():
            layer = control.do(action="unload", layer_name="encoder")
            assert (layer.status, layer.accepted, layer.succeeded) == ("rejected", False, False)
            assert layer.reason == "there is no layer 'encoder' with seeds; there are '0', '2'"
            seed = control.do(action="unload", seed_idx=2)
            assert (seed.status, seed.layer, seed.seed) == ("rejected", "0", 2)
            assert seed.reason == "layer '0' has seeds 0 to 1, and none of index 2"

    def test_a_kernel_that_is_unknown_or_does_not_fit_fails_with_the_reason_and_changes_nothing(
        self, model: esper.MorphableModel, control: Control, shelf: KernelShelf
    ) -> None:
        x = torch.randn(5, 8)
        before = outputs(model, x)
        with model.listen():
            unknown = control.do(action="load", kernel_artifact_id="0" * 64)
            assert (unknown.status, unknown.accepted, unknown.succeeded) == ("failed", True, False)
            assert "UnknownKernelError" in unknown.reason
            misfit = control.do(action="load", kernel_artifact_id=shelf.put(blueprint(5, 5)).id, seed_idx=1)
            assert misfit.status == "failed"
            assert "5" in misfit.reason
        assert torch.equal(outputs(model, x), before)

    def test_what_the_seed_is_not_ready_for_fails_and_says_what_it_is(
        self, model: esper.MorphableModel, control: Control, kernel: str
    ) -> None:
        with model.listen():
            for action, fields in (("unload", {}), ("set_alpha", {"alpha": 0.5}), ("fossilize", {})):
                outcome = control.do(action=action, **fields)
                assert (outcome.status, outcome.accepted) == ("failed", True)
                assert "seed 0 of layer '0' is DORMANT" in outcome.reason
            load(model, "0", 0, kernel)
            assert control.do(action="fossilize").succeeded
            model.commit()
            for action, fields in (
                ("unload", {}),
                ("set_alpha", {"alpha": 0.5}),
                ("load", {"kernel_artifact_id": kernel}),
            ):
                outcome = control.do(action=action, **fields)
                assert outcome.status == "failed"
                assert "FOSSILIZED" in outcome.reason

    def test_a_load_that_is_called_off_fails_and_does_not_show_an_older_reason(
        self, shelf: KernelShelf, platform: Any, control: Control, kernel: str
    ) -> None:
        gated = GatedPlatform(shelf)
        model = esper.wrap(
            mlp(8, 6, 4), platform=SimpleNamespace(kernel_source=gated.kernel_source, oona=platform.oona)
        )
        with model.listen():
            assert "UnknownKernelError" in control.do(action="load", kernel_artifact_id="0" * 64).reason
            gate = gated.hold(kernel)
            loading = control.send(action="load", kernel_artifact_id=kernel)
            gated.wait_until_held()
            assert control.messages.empty()
            unloading = control.send(action="unload")
            outcomes = {each.command_id: each for each in (control.outcome(), control.outcome())}
            gate.set()
        assert outcomes[unloading.command_id].succeeded
        assert outcomes[loading.command_id].status == "failed"
        assert "called off" in outcomes[loading.command_id].reason

    def test_a_command_that_comes_too_late_is_not_carried_out(
        self, model: esper.MorphableModel, control: Control, kernel: str
    ) -> None:
        with model.listen():
            late = control.do(
                action="load", kernel_artifact_id=kernel, deadline=datetime.now(UTC) - timedelta(seconds=1)
            )
            assert (late.status, late.accepted, late.succeeded) == ("expired", False, False)
            assert states(model)["0"] == ["DORMANT", "DORMANT"]
            in_time = datetime.now(UTC) + timedelta(minutes=1)
            assert control.do(action="load", kernel_artifact_id=kernel, deadline=in_time).succeeded

    def test_what_is_no_command_is_rejected_if_it_says_which_it_is_and_the_next_one_is_heard(
        self, model: esper.MorphableModel, control: Control, kernel: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Anything(BaseModel):
            model_config = ConfigDict(frozen=True, extra="allow")

        with model.listen(name="m"):
            for fields in ({"some": "thing"}, {"command_id": "c0", "action": "explode", "target": "other"}):
                control.oona.publish(COMMANDS, Anything.model_validate(fields), trace_id="a test")
            control.oona.publish(
                COMMANDS, Anything.model_validate({"command_id": "c1", "action": "explode"}), trace_id="a test"
            )
            outcome = control.outcome()
            assert (outcome.command_id, outcome.status, outcome.model) == ("c1", "rejected", "m")
            assert "action" in outcome.reason
            assert control.do(action="load", kernel_artifact_id=kernel).succeeded
        assert caplog.text.count("this is no command") == 2


class TestIdempotence:
    def test_a_command_that_comes_again_is_done_once_and_answered_with_the_first_outcome(
        self, model: esper.MorphableModel, control: Control, kernel: str
    ) -> None:
        with model.listen():
            command = {"action": "load", "kernel_artifact_id": kernel, "command_id": "once"}
            first = control.do(**command)
            assert first.succeeded
            outputs(model, torch.randn(1, 8))
            assert control.do(action="unload").succeeded
            assert control.do(**command) == first
            outputs(model, torch.randn(1, 8))
            assert states(model)["0"] == ["DORMANT", "DORMANT"]

    def test_one_that_comes_again_while_it_is_carried_out_is_answered_once_it_is(
        self, shelf: KernelShelf, platform: Any, control: Control, kernel: str
    ) -> None:
        gated = GatedPlatform(shelf)
        model = esper.wrap(
            mlp(8, 6, 4), platform=SimpleNamespace(kernel_source=gated.kernel_source, oona=platform.oona)
        )
        gate = gated.hold(kernel)
        with model.listen():
            for _ in range(3):
                control.send(action="load", kernel_artifact_id=kernel, command_id="again")
            gated.wait_until_held()
            marker = control.do(action="unload", layer_name="2")  # the three have been heard
            assert marker.status == "failed"
            gate.set()
            assert control.outcome().succeeded
            assert control.do(action="load", kernel_artifact_id=kernel, command_id="again").succeeded
        assert control.messages.empty()

    def test_an_id_that_was_used_for_another_command_is_refused(
        self, model: esper.MorphableModel, control: Control, kernel: str
    ) -> None:
        with model.listen():
            assert control.do(action="load", kernel_artifact_id=kernel, command_id="id").succeeded
            other = control.do(action="load", kernel_artifact_id=kernel, seed_idx=1, command_id="id")
            assert (other.status, other.accepted, other.succeeded) == ("duplicate", False, False)
            assert "'id'" in other.reason
            assert states(model)["0"] == ["LOADING", "DORMANT"]


class TestListening:
    def test_it_hears_nothing_after_closing(
        self, model: esper.MorphableModel, control: Control, make_client: Callable[[], OonaClient]
    ) -> None:
        listener = model.listen()
        assert not listener.closed
        listener.close()
        listener.close()
        assert listener.closed
        control.send(action="unload")
        assert control.oona.flush(10)
        with model.listen(SimpleNamespace(oona=make_client())):  # of another platform than its own
            assert control.do(action="unload", seed_idx=1).seed == 1
        assert control.messages.empty()

    def test_it_does_not_keep_the_model_and_ends_with_it(self, platform: Any, control: Control, kernel: str) -> None:
        model = esper.wrap(mlp(8, 6, 4), platform=platform)
        listener = model.listen()
        assert control.do(action="load", kernel_artifact_id=kernel).succeeded
        gone = weakref.ref(model)
        del model
        deadline = time.monotonic() + 20
        while gone() is not None or not listener.closed:
            assert time.monotonic() < deadline, f"the model is {'gone' if gone() is None else 'alive'}"
            gc.collect()
            time.sleep(0.05)

    def test_it_works_on_a_compiled_model(
        self, model: esper.MorphableModel, control: Control, kernel: str, fresh_dynamo: None
    ) -> None:
        x = torch.randn(5, 8)
        run = torch.compile(model, backend="esper", options={"inner": "eager"})
        before = outputs(run, x)
        with model.listen():
            assert control.do(action="load", kernel_artifact_id=kernel, alpha=0.5).succeeded
            assert not torch.equal(outputs(run, x), before)
            torch.testing.assert_close(outputs(run, x), outputs(model, x))


def test_by_default_it_is_the_models_own_platform(shelf: KernelShelf, kernel: str) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    control = Control(shelf.platform.oona)
    with model.listen():
        assert control.do(action="load", kernel_artifact_id=kernel).succeeded
