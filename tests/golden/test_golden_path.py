"""Blueprint to running kernel across real processes, as a team has them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import redis
import torch
from torch import nn

from esper import Blueprint
from esper.contracts.messages import HealthSignal, OonaMessage, TopicNames
from tests.golden.backends import BACKENDS, settings_of
from tests.golden.deployment import TOKENS, Deployment, deployment
from tests.services.urza_server_calls import submit
from tests.services.valkey_server import ValkeyProcess

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("golden")]

_SCOPES = {"submitter": ["read", "submit"], "worker": ["read", "worker"]}


@pytest.fixture(params=BACKENDS)
def team(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Deployment]:
    """Urza and two workers, on SQLite and folders or on PostgreSQL and S3."""
    tokens = [{"name": name, "token": token, "scopes": _SCOPES[name]} for name, token in TOKENS.items()]
    with ValkeyProcess() as valkey, settings_of(request.param, tmp_path) as settings:
        settings = {**settings, "ESPER_URZA__TOKENS": json.dumps(tokens)}
        with deployment(tmp_path, valkey.url, settings) as made:
            made.start_urza()
            made.start_workers(2)
            yield made


def test_from_a_blueprint_to_a_kernel_that_runs_in_another_process(team: Deployment, tmp_path: Path) -> None:
    torch.manual_seed(7)
    network = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))
    with team.client(TOKENS["submitter"]) as client:
        submitted = submit(client, Blueprint.from_module(network, 8), "golden")
        assert submitted.status_code == httpx.codes.CREATED, submitted.text
        address = f"/api/v1/blueprints/{submitted.json()['id']}"
        team.wait_for(lambda: client.get(address).json()["status"] in ("validated", "invalid"), "compiled")
        record = client.get(address).json()
    assert record["status"] == "validated", record
    assert record["attempts"] == 1

    results = tmp_path / "results.npz"
    trainer = subprocess.run(
        [sys.executable, "-m", "tests.golden.trainer", record["artifact_id"], str(results)],
        env=team.environment(ESPER_URZA__URL=team.url, ESPER_URZA__TOKEN=TOKENS["submitter"]),
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert trainer.returncode == 0, trainer.stderr
    _compare(np.load(results), network)

    (signal, *_) = _signals(team.redis_url)
    assert (signal.layer_id, signal.layer_name) == (0, "0")
    assert (signal.seed_count, signal.active_seed_count, signal.error_count) == (4, 1, 0)
    assert set(team.stop().values()) == {0}


def _compare(found: np.lib.npyio.NpzFile, network: nn.Sequential) -> None:
    """With the same computation in float64, by plain PyTorch and the module that the blueprint was made of."""
    x = torch.from_numpy(found["x"]).double().requires_grad_()
    weights = {name: torch.from_numpy(found[name]).double() for name in ("0.weight", "0.bias", "2.weight", "2.bias")}
    kernel = network.double()
    host = x @ weights["0.weight"].T + weights["0.bias"]
    site = 0.5 * kernel(x) + 0.5 * host
    y = torch.relu(site) @ weights["2.weight"].T + weights["2.bias"]
    y.square().mean().backward()
    before = torch.relu(host) @ weights["2.weight"].T + weights["2.bias"]
    assert x.grad is not None
    near = {"rtol": 1e-4, "atol": 1e-6}
    np.testing.assert_allclose(found["before"], before.detach(), **near)
    np.testing.assert_allclose(found["y"], y.detach(), **near)
    np.testing.assert_allclose(found["x_grad"], x.grad, **near)
    expected = {tuple(parameter.shape): parameter.grad for parameter in kernel.parameters()}
    for i in range(4):
        gradient = found[f"kernel.{i}.grad"]
        np.testing.assert_allclose(gradient, expected[gradient.shape], **near)


def _signals(redis_url: str) -> list[HealthSignal]:
    """The health signals of the layer with the kernel that are on the bus."""
    client = redis.Redis.from_url(redis_url)
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        entries = client.xrange(f"esper:oona:{TopicNames.TELEMETRY_SEED_HEALTH}")
        messages = [OonaMessage.model_validate_json(next(iter(fields.values()))) for _, fields in entries]
        signals = [HealthSignal.model_validate(message.payload) for message in messages]
        active = [signal for signal in signals if signal.layer_name == "0" and signal.active_seed_count]
        if active:
            return active
        time.sleep(0.2)
    raise AssertionError("no health signal came")
