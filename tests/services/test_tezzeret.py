"""Compiling in a child process: what ends it, and what becomes of the blueprint. All children are real."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # psutil ships no types
import pytest

from esper.artifacts import SigningKey
from esper.contracts.messages import KernelCharacterized, OonaMessage, TopicNames
from esper.services.contracts import BlueprintRecord, BlueprintStatus
from esper.services.errors import ServiceError
from esper.services.oona_client import OonaClient
from esper.services.tezzeret.limits import ChildLimits
from esper.services.tezzeret.protocol import BLUEPRINT, RESULT
from esper.services.tezzeret.watchers import StopSignal
from esper.services.tezzeret.worker import Worker
from esper.services.urza import UrzaStore
from tests.services.children import child_of, children_of, wait_until_gone
from tests.services.programs import Program
from tests.services.shelf import blueprint, exponential

MIB = 2**20
AMPLE = ChildLimits(wall_seconds=120, memory_bytes=4096 * MIB)


class Bench:
    """A worker on a store, and what it announces."""

    def __init__(self, store: UrzaStore) -> None:
        self.store = store
        self.oona = OonaClient(name="bench")
        self.messages: queue.Queue[OonaMessage] = queue.Queue()
        self.oona.subscribe(list(TopicNames), self.messages.put)
        self.stop = StopSignal()
        self.threads = ThreadPoolExecutor(1)

    def worker(self, limits: ChildLimits = AMPLE, lease_seconds: float = 30.0) -> Worker:
        return Worker(self.store, SigningKey.generate(), self.oona, "fast", limits, lease_seconds)

    def compile(self, limits: ChildLimits = AMPLE) -> BlueprintRecord:
        done = self.worker(limits).compile_next(self.stop)
        assert done is not None
        return self.store.blueprints.get(done)

    def start(self, worker: Worker) -> Future[str | None]:
        return self.threads.submit(worker.compile_next, self.stop)

    def close(self) -> None:
        self.stop.set()
        self.threads.shutdown()
        self.oona.close()


@pytest.fixture
def bench(store: UrzaStore) -> Iterator[Bench]:
    bench = Bench(store)
    yield bench
    bench.close()
    assert children_of() == [], "a child was left behind"


def test_nothing_to_do_is_no_work(bench: Bench) -> None:
    assert bench.worker().compile_next(bench.stop) is None


def test_a_child_that_takes_too_long_is_killed_and_the_blueprint_invalid(bench: Bench) -> None:
    bench.store.blueprints.submit(blueprint())
    record = bench.compile(ChildLimits(wall_seconds=0.5, memory_bytes=AMPLE.memory_bytes))
    assert record.status is BlueprintStatus.INVALID
    assert "within 0.5 s; raise tezzeret.wall_seconds" in record.reason
    assert record.report is not None
    assert record.report.seconds >= 0.5


def test_a_child_that_takes_too_much_memory_is_killed_and_the_blueprint_invalid(bench: Bench) -> None:
    bench.store.blueprints.submit(blueprint())
    record = bench.compile(ChildLimits(wall_seconds=120, memory_bytes=60 * MIB))
    assert record.status is BlueprintStatus.INVALID
    assert "more than 60 MiB; raise tezzeret.memory_mb" in record.reason
    assert record.report is not None
    assert record.report.peak_memory_mb is not None
    assert record.report.peak_memory_mb > 60


def test_a_child_that_is_killed_by_somebody_gets_one_more_try(bench: Bench) -> None:
    bench.store.blueprints.submit(blueprint())
    working = bench.start(bench.worker())
    first = child_of()
    first.kill()
    second = child_of(other_than=first)
    second.kill()
    assert working.result(timeout=60) == blueprint().id
    record = bench.store.blueprints.get(blueprint().id)
    assert record.status is BlueprintStatus.INVALID
    assert "was killed by SIGKILL, 2 times, without a report" in record.reason


@pytest.mark.slow
def test_after_one_such_death_the_kernel_is_made(bench: Bench) -> None:
    bench.store.blueprints.submit(blueprint())
    working = bench.start(bench.worker())
    child_of().kill()
    assert working.result(timeout=200) == blueprint().id
    record = bench.store.blueprints.get(blueprint().id)
    assert record.status is BlueprintStatus.VALIDATED, record.reason
    assert record.attempts == 1


@pytest.mark.slow
def test_what_fails_validation_is_invalid_with_the_report_and_is_announced(bench: Bench) -> None:
    bench.store.blueprints.submit(exponential(), "growth")
    record = bench.compile()
    assert record.status is BlueprintStatus.INVALID
    assert record.report is not None
    assert [check.name for check in record.report.failures()] == ["large inputs"]
    assert record.reason == record.report.reason
    assert "large inputs" in record.reason
    assert bench.store.stats().kernels == 0
    assert bench.oona.flush(10)
    message = bench.messages.get(timeout=10)
    assert message.topic == TopicNames.VALIDATION_KERNEL_CHARACTERIZED
    characterized = KernelCharacterized.model_validate(message.payload)
    assert (characterized.blueprint_id, characterized.report) == (record.id, record.report)
    assert bench.messages.empty(), "a kernel was announced that does not exist"


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["/nowhere/c++", "/bin/false"], ids=["no compiler", "broken compiler"])
def test_without_a_working_compiler_the_kernel_is_valid_and_has_no_attachment(
    bench: Bench, compiler: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "nothing-compiled-before"))
    bench.store.blueprints.submit(blueprint())
    record = bench.compile()
    assert record.status is BlueprintStatus.VALIDATED, record.reason
    assert record.artifact_id is not None
    kernel = bench.store.kernels.get(record.artifact_id)
    assert kernel.attachments == ()
    assert kernel.report.attachment is not None
    assert kernel.report.attachment.status == "unavailable"
    assert "this machine cannot compile kernels" in kernel.report.attachment.detail
    assert kernel.latency_us is not None


def test_a_child_that_cannot_even_start_is_not_held_against_the_blueprint(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bench.store.blueprints.submit(blueprint())
    with pytest.raises(ServiceError, match="a broken installation"):
        bench.worker().compile_next(bench.stop)
    record = bench.store.blueprints.get(blueprint().id)
    assert (record.status, record.attempts) == (BlueprintStatus.UNVALIDATED, 0)


def test_a_stop_ends_the_child_at_once_and_gives_the_blueprint_back(bench: Bench) -> None:
    bench.store.blueprints.submit(blueprint())
    working = bench.start(bench.worker())
    child = child_of()
    bench.stop.set()
    working.result(timeout=30)
    wait_until_gone(child, 10)
    record = bench.store.blueprints.get(blueprint().id)
    assert (record.status, record.attempts) == (BlueprintStatus.UNVALIDATED, 0)


SECRETS = """
ESPER_URZA__TOKEN ESPER_DATABASE__URL AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_PROFILE
AZURE_STORAGE_KEY AZURE_STORAGE_CONNECTION_STRING AZURE_STORAGE_SAS_TOKEN AZURE_CLIENT_SECRET AZURE_TENANT_ID
AZURE_CLIENT_ID ARM_CLIENT_SECRET GOOGLE_APPLICATION_CREDENTIALS GOOGLE_API_KEY GCP_SERVICE_ACCOUNT
CLOUDSDK_AUTH_ACCESS_TOKEN PGPASSWORD PGPASSFILE PGUSER PGSERVICEFILE POSTGRES_PASSWORD MYSQL_PWD REDIS_URL
REDISCLI_AUTH MONGODB_URI DATABASE_URL HF_TOKEN HF_TOKEN_PATH HUGGING_FACE_HUB_TOKEN HUGGINGFACE_TOKEN
WANDB_API_KEY COMET_API_KEY NEPTUNE_API_TOKEN MLFLOW_TRACKING_PASSWORD DATABRICKS_TOKEN KAGGLE_KEY OPENAI_API_KEY
ANTHROPIC_API_KEY GITHUB_TOKEN GH_TOKEN GITLAB_TOKEN CI_JOB_TOKEN NPM_TOKEN PIP_INDEX_URL TWINE_PASSWORD VAULT_TOKEN
KUBECONFIG DOCKER_AUTH_CONFIG SSH_AUTH_SOCK SLACK_WEBHOOK_URL SENTRY_DSN MY_SECRET MY_SECRET_FILE SIGNING_KEY
SERVICE_PASSWORD api_key some_token DB_PASS TLS_CERT
"""
NO_SECRETS = "KEPT CXX_EXTRA OMP_PROC_BIND MONKEY_PATCHED TORCH_LOGS_OUT KEYBOARD COMPASS_DIR CUDA_HOME_EXTRA"
SECRET_VALUES = {
    "http_proxy": "http://me:hunter2@proxy:3128",
    "MY_SERVER": "amqp://me:hunter2@host/",
    "X": "-----BEGIN hunter2",
}


def test_a_child_stands_back_from_its_first_moment_on_and_gets_no_secrets(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports torch for seconds; on a machine that trains, that is not to be felt either."""
    for name in (*SECRETS.split(), *NO_SECRETS.split()):
        monkeypatch.setenv(name, "hunter2")
    for name, value in SECRET_VALUES.items():
        monkeypatch.setenv(name, value)
    bench.store.blueprints.submit(blueprint())
    working = bench.start(bench.worker())
    child = child_of()
    time.sleep(0.1)  # far less than the imports take
    assert child.nice() == min(19, os.nice(0) + 10)
    given = child.environ()
    assert {name for name, value in given.items() if "hunter2" in value} == set(NO_SECRETS.split())
    assert {"PATH", "HOME", "TORCHINDUCTOR_CACHE_DIR"} & set(os.environ) <= set(given)
    assert "hunter2" not in " ".join(child.cmdline())
    bench.stop.set()
    working.result(timeout=30)


def test_while_a_child_runs_its_claim_is_renewed(bench: Bench) -> None:
    bench.store.blueprints.submit(blueprint())
    working = bench.start(bench.worker(lease_seconds=1.0))
    child = child_of()
    stolen = threading.Event()
    for _ in range(8):
        if bench.store.blueprints.claim("thief") is not None or stolen.wait(0.3):
            pytest.fail("the claim ran out while its child was running")
    assert child.is_running()
    bench.stop.set()
    working.result(timeout=30)


def test_a_worker_whose_claim_was_taken_stops_its_child_and_leaves_the_result_to_the_other(
    bench: Bench, store: UrzaStore
) -> None:
    store.blueprints.submit(blueprint())
    working = bench.start(bench.worker(lease_seconds=0.001))  # too short to be renewed in time
    child = child_of()
    other = None
    while other is None:
        other = store.blueprints.claim("quick")
    assert working.result(timeout=30) == blueprint().id
    wait_until_gone(child, 10)
    assert store.blueprints.renew(other).token == other.token


WORKER = """
import sys
from pathlib import Path
from esper.artifacts import SigningKey
from esper.services.oona_client import OonaClient
from esper.services.tezzeret.watchers import StopSignal
from esper.services.tezzeret.limits import ChildLimits
from esper.services.tezzeret.worker import Worker
from esper.services.urza import UrzaStore
store = UrzaStore.in_folder(Path(sys.argv[1]))
limits = ChildLimits(wall_seconds=600, memory_bytes=2**40)
Worker(store, SigningKey.generate(), OonaClient(), "fast", limits, 2.0).compile_next(StopSignal())
"""


@pytest.mark.slow
def test_when_a_worker_is_killed_its_child_ends_too_and_another_takes_over(
    store: UrzaStore, folder: Path, tmp_path: Path
) -> None:
    store.blueprints.submit(blueprint())
    (tmp_path / "tmp").mkdir()
    program = Program(WORKER, folder, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")})
    child = child_of(program.process.pid)
    psutil.Process(program.process.pid).kill()
    program.process.wait()
    wait_until_gone(child, 30)
    left = [path.name for path in tmp_path.glob("tmp/esper-tezzeret-*/*")]
    assert BLUEPRINT in left
    assert RESULT not in left, "the child went on to the end"
    claim = None
    while claim is None:
        lease_end = store.blueprints.next_lease_end()
        assert lease_end is not None
        assert lease_end <= 2.0
        threading.Event().wait(lease_end)
        claim = store.blueprints.claim("heir")
    assert (claim.blueprint_id, claim.attempt) == (blueprint().id, 2)
