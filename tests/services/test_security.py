"""What somebody can do who owns the store or the bus: the claims of docs/security.md that no other test has.

Attackers write what they like: rows and files of the store, streams and lists of Redis. Nothing here is imitated.
"""

from __future__ import annotations

import queue
import sqlite3
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import Blueprint
from esper.artifacts import SigningKey
from esper.configs import RedisConfig
from esper.contracts.commands import KasminaCommandOutcome, KasminaControlCommand
from esper.contracts.messages import HealthSignal, OonaMessage, TopicNames
from esper.services.parts import open_bus
from esper.services.tezzeret.queue import CompilationQueue
from esper.services.urza import UrzaStore
from tests.services.shelf import add_kernel
from tests.services.valkey_server import ValkeyProcess

X = torch.randn(5, 8)


@pytest.fixture(scope="module")
def valkey() -> Iterator[ValkeyProcess]:
    with ValkeyProcess() as server:
        yield server


@pytest.fixture
def platform(tmp_path: Path, valkey: ValkeyProcess) -> Iterator[esper.Platform]:
    """With its store in `tmp_path/data`, on a bus that others can write to."""
    config = {"redis": {"url": valkey.url}, "platform": {"root": tmp_path / "data"}}
    settings = esper.EsperConfig.model_validate(config)
    with esper.Platform(tmp_path / "data", settings, open_bus(settings)) as opened:
        yield opened
    with valkey.client() as client:
        client.flushall()


@pytest.fixture
def model(platform: esper.Platform) -> esper.MorphableModel:
    torch.manual_seed(0)
    return esper.wrap(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), platform=platform)


def put(platform: esper.Platform, seed: int, name: str, key: SigningKey | None = None) -> str:
    """The id of a kernel in the platform's store, signed with `key` or with the platform's own."""
    store = platform.store
    assert isinstance(store, UrzaStore)
    key = key or SigningKey.load_or_create(platform.root / "signing.pem")
    artifact, _ = add_kernel(store, Blueprint.bottleneck(8, 8, 2, start="kaiming", seed=seed), name, key=key)
    return artifact.id


def load(model: esper.MorphableModel, reference: str) -> torch.Tensor:
    """What the model says with the kernel at half."""
    assert model.request_kernel("0", 0, reference, alpha=0.5).result(timeout=60), model.kasmina_layers["0"].seed_errors
    return model(X)


def lifecycle(model: esper.MorphableModel) -> str:
    return model.kasmina_layers["0"].state.lifecycle(0).name


class Attacker:
    """Writes to Redis itself, as nothing that Esper ships would, and hears what models answer."""

    def __init__(self, redis: Any, platform: esper.Platform) -> None:
        self._redis = redis
        self.outcomes: queue.Queue[KasminaCommandOutcome] = queue.Queue()
        platform.oona.subscribe(
            TopicNames.CONTROL_KASMINA_OUTCOMES,
            lambda message: self.outcomes.put(KasminaCommandOutcome.model_validate(message.payload)),
        )

    def write(self, topic: str, data: bytes) -> None:
        """Put any bytes into the stream of a topic."""
        self._redis.xadd(f"esper:oona:{topic}", {b"message": data})

    def forge(self, topic: TopicNames, payload: Any) -> None:
        """Send a message that is well formed."""
        message = OonaMessage.model_validate({"sender_id": "nobody you know", "topic": topic, "payload": payload})
        self.write(topic, message.model_dump_json().encode())

    def command(self, **fields: Any) -> KasminaCommandOutcome:
        """Send a command to seed 0 of layer 0; the answer to it."""
        command = KasminaControlCommand.model_validate({"layer_name": "0", "seed_idx": 0, **fields})
        self.forge(TopicNames.CONTROL_KASMINA_COMMANDS, command.model_dump(mode="json"))
        while (outcome := self.outcomes.get(timeout=20)).command_id != command.command_id:
            assert not outcome.succeeded
        return outcome


@pytest.fixture
def attacker(valkey: ValkeyProcess, platform: esper.Platform) -> Iterator[Attacker]:
    with valkey.client() as client:
        yield Attacker(client, platform)


class TestWhoOwnsTheBus:
    def test_a_command_loads_nothing_that_no_trusted_key_signed(
        self, platform: esper.Platform, model: esper.MorphableModel, attacker: Attacker
    ) -> None:
        before = model(X)
        strange, ours = put(platform, 1, "strange", SigningKey.generate()), put(platform, 2, "ours")
        with model.listen(platform):
            refused = attacker.command(action="load", kernel_artifact_id=strange, alpha=0.5)
            assert not refused.succeeded
            assert "not trusted" in refused.reason
            assert torch.equal(model(X), before)
            assert attacker.command(action="load", kernel_artifact_id=ours, alpha=0.5).succeeded
        assert not torch.equal(model(X), before)

    def test_announcements_and_telemetry_change_nothing(
        self, platform: esper.Platform, model: esper.MorphableModel, attacker: Attacker
    ) -> None:
        before, known = model(X), put(platform, 3, "known")
        with model.listen(platform):
            for topic in TopicNames:
                attacker.write(topic, b'{"event_id": "1", "topic": "' + topic.encode() + b'", "payload": ')
                attacker.write(topic, b"x" * 10_000)
                for payload in ({}, {"artifact_id": known}):
                    attacker.forge(topic, payload)
            assert not attacker.command(action="unload").succeeded, "there is nothing to unload"
        assert lifecycle(model) == "DORMANT"
        assert torch.equal(model(X), before)

    def test_a_model_that_does_not_listen_is_not_steered(
        self, platform: esper.Platform, model: esper.MorphableModel, attacker: Attacker
    ) -> None:
        other = esper.wrap(nn.Sequential(nn.Linear(8, 8)), platform=platform)
        with other.listen(platform):
            assert attacker.command(action="load", kernel_artifact_id=put(platform, 4, "ours")).succeeded
        other(X)
        assert (lifecycle(other), lifecycle(model)) == ("ACTIVE", "DORMANT")

    def test_telemetry_has_no_weights_and_no_data(self, platform: esper.Platform, model: esper.MorphableModel) -> None:
        heard: queue.Queue[OonaMessage] = queue.Queue()
        platform.oona.subscribe(TopicNames.TELEMETRY_SEED_HEALTH, heard.put)
        assert model.request_kernel("0", 0, put(platform, 5, "ours")).result(timeout=60)
        signal: dict[str, Any] = {}
        deadline = time.monotonic() + 20
        while not signal.get("active_seed_count") and time.monotonic() < deadline:
            model(X)
            with suppress(queue.Empty):
                signal = heard.get(timeout=0.01).payload
        assert signal["active_seed_count"] == 1
        HealthSignal.model_validate(signal)
        leaves = list(_leaves(signal))
        assert all(isinstance(each, str | int | float | bool | None) for each in leaves)
        assert len(leaves) < 30, "a summary, whatever the size of the layer"

    @pytest.mark.slow
    def test_the_queue_of_compilations_takes_nothing_but_ids(
        self, valkey: ValkeyProcess, caplog: pytest.LogCaptureFixture
    ) -> None:
        messages, done = CompilationQueue(RedisConfig.model_validate({"url": valkey.url})), list[str]()
        with valkey.client() as client:
            key = "esper:tezzeret:compile"
            for number, garbage in enumerate((b"\x80\x04cos\nsystem\n", b'{"actor_name": "os.system"}')):
                client.hset(f"{key}.msgs", f"garbage {number}", garbage)
                client.rpush(key, f"garbage {number}")
        for odd in ("no id", "../../etc", "a" * 63, "A" * 64):
            messages.put(odd)
        messages.put("0" * 64)
        with messages.consumed_by(done.append):
            deadline = time.monotonic() + 20
            while not done and time.monotonic() < deadline:
                time.sleep(0.02)
        assert done == ["0" * 64]
        assert "is not about a blueprint" in caplog.text
        messages.close()


def _leaves(document: Any) -> Iterator[Any]:
    if isinstance(document, dict):
        for value in document.values():
            yield from _leaves(value)
    elif isinstance(document, list):
        for value in document:
            yield from _leaves(value)
    else:
        yield document


def test_a_name_is_the_stores_word_and_an_id_is_not(
    platform: esper.Platform, model: esper.MorphableModel, tmp_path: Path
) -> None:
    old, good = put(platform, 6, "old"), put(platform, 7, "good")
    with sqlite3.connect(tmp_path / "data" / "esper.db") as database:
        (blueprint,) = database.execute("SELECT blueprint_id FROM names WHERE name = 'old'").fetchone()
        database.execute("UPDATE names SET blueprint_id = ? WHERE name = 'good'", (blueprint,))
    database.close()
    by_name = load(model, "good")
    assert torch.equal(by_name, load(model, old)), "a signed kernel, and another one than was meant"
    assert not torch.equal(by_name, load(model, good))
