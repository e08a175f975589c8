"""The embedded platform: submit, compile for real, fetch, share, close."""

from __future__ import annotations

import asyncio
import copy
import os
import queue
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # psutil ships no types
import pytest
import torch

from esper.artifacts import (
    Attachment,
    Blueprint,
    BlueprintError,
    SigningKey,
    Target,
    TrustStore,
    UntrustedArtifactError,
    load_artifact,
)
from esper.compiler.attachment import read_payload
from esper.compiler.attachment_code import load_attachment
from esper.configs import EsperConfig, TezzeretConfig
from esper.contracts.messages import KernelReady, OonaMessage, TopicNames
from esper.execution.sources import AmbiguousKernelError, KernelSource, KernelSourceError, UnknownKernelError
from esper.platform import Platform, default_platform
from esper.services.contracts import BlueprintStatus, CompiledKernelArtifact
from esper.services.errors import (
    CompilationFailedError,
    CompilationTimeoutError,
    NameTakenError,
    PlatformClosedError,
    StoreCorruptError,
    StoreReadOnlyError,
    UnknownBlueprintError,
)
from tests.services.children import child_of, children_of, wait_until_gone
from tests.services.programs import Program
from tests.services.shelf import add_kernel, blueprint, exponential

pytestmark = pytest.mark.xdist_group("platform")  # so that the one kernel is compiled once

FAST = EsperConfig(tezzeret=TezzeretConfig(pipeline="fast"))
KERNEL = Blueprint.bottleneck(8, 8, 3, start="identity", seed=7)


class Compiled:
    """A platform with one kernel on it, and what was announced meanwhile."""

    def __init__(self, root: Path) -> None:
        self.platform = Platform.embedded(root, config=FAST)
        self.announced: queue.Queue[OonaMessage] = queue.Queue()
        self.platform.oona.subscribe(list(TopicNames), self.announced.put)
        blueprint_id = self.platform.submit(KERNEL, "identity-3")
        self.status_after_submission = self.platform.store.blueprints.get(blueprint_id).status
        self.kernel: CompiledKernelArtifact = self.platform.wait_sync(blueprint_id, timeout=200)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    compiled = Compiled(tmp_path_factory.mktemp("platform"))
    yield compiled
    compiled.platform.close()


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    with Platform.embedded(tmp_path / "root", config=FAST) as platform:
        yield platform
    assert children_of() == [], "a child was left behind"


@pytest.mark.slow
class TestACompiledKernel:
    def test_it_is_validated_measured_and_described(self, compiled: Compiled) -> None:
        kernel = compiled.kernel
        assert (kernel.blueprint_id, kernel.name) == (KERNEL.id, "identity-3")
        assert (kernel.in_features, kernel.out_features, kernel.dtype) == (8, 8, "float32")
        assert kernel.metadata.uses_host
        assert kernel.report.passed
        checks = {check.name for check in kernel.report.checks}
        assert checks >= {"deterministic build", "shapes", "gradients", "large inputs", "agreement"}
        assert [each.rows for each in kernel.report.latencies] == [1, 32]
        assert kernel.latency_us == kernel.report.latencies[1].attachment_us
        assert kernel.report.peak_memory_mb is not None
        assert kernel.report.peak_memory_mb > 50
        assert not compiled.status_after_submission.is_final, "submitting waits for the compilation"

    def test_it_can_be_loaded_by_id_prefix_and_name(self, compiled: Compiled) -> None:
        source = compiled.platform.kernel_source
        assert isinstance(source, KernelSource)
        for reference in (compiled.kernel.id, compiled.kernel.id[:12], "identity-3"):
            assert source.resolve(reference) == compiled.kernel.id
        fetched = source.fetch(compiled.kernel.id)
        artifact = load_artifact(
            fetched.data, expected_id=compiled.kernel.id, signature=fetched.signature, trust=source.trust()
        )
        assert artifact.graph == KERNEL.graph
        assert artifact.blueprint_id == KERNEL.id

    def test_its_signature_is_by_the_platforms_own_key(self, compiled: Compiled) -> None:
        fetched = compiled.platform.kernel_source.fetch(compiled.kernel.id)
        stranger = TrustStore([SigningKey.generate().public_bytes])
        with pytest.raises(UntrustedArtifactError):
            load_artifact(fetched.data, signature=fetched.signature, trust=stranger)

    def test_its_attachment_is_signed_for_this_machine_and_computes_the_graph(self, compiled: Compiled) -> None:
        source, target = compiled.platform.kernel_source, Target.current()
        assert compiled.kernel.attachments == (target.key,)
        packed = source.attachment(compiled.kernel.id, target.key)
        assert packed is not None
        attachment = Attachment.unpack(packed)
        trust = source.trust()
        assert trust is not None
        attachment.verify(trust)
        assert (attachment.artifact_id, attachment.target) == (compiled.kernel.id, target)

        run = load_attachment(read_payload(attachment.payload)[1])
        graph, tensors = KERNEL.build()
        weights = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
        module = graph.to_module(weights)
        x, host = torch.randn(11, 8), torch.randn(11, 8)
        parameters = [weights[name].requires_grad_() for name in graph.tensor_names]
        ours, theirs = run(x, host, *parameters), module(x, host)
        torch.testing.assert_close(ours, theirs)
        for mine, other in zip(
            torch.autograd.grad(ours.square().mean(), parameters),
            torch.autograd.grad(theirs.square().mean(), list(module.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
        assert source.attachment(compiled.kernel.id, "another-target") is None

    def test_it_was_announced_in_order_under_one_trace(self, compiled: Compiled) -> None:
        assert compiled.platform.oona.flush(10)
        messages = [compiled.announced.get(timeout=10) for _ in range(3)]
        assert [message.topic for message in messages] == [
            TopicNames.COMPILATION_BLUEPRINT_SUBMITTED,
            TopicNames.COMPILATION_KERNEL_READY,
            TopicNames.VALIDATION_KERNEL_CHARACTERIZED,
        ]
        assert {message.trace_id for message in messages} == {KERNEL.id}
        assert KernelReady.model_validate(messages[1].payload).artifact_id == compiled.kernel.id

    async def test_compiling_the_same_again_returns_it_at_once(self, compiled: Compiled) -> None:
        again = await compiled.platform.compile(Blueprint.from_json(KERNEL.to_json()), "alias", timeout=5)
        assert again == compiled.kernel
        assert compiled.platform.kernel_source.resolve("alias") == again.id
        with pytest.raises(NameTakenError):
            compiled.platform.submit(blueprint(99), "alias")

    def test_a_request_is_a_future_of_the_kernel(self, compiled: Compiled) -> None:
        assert compiled.platform.request(KERNEL, timeout=5).result(10) == compiled.kernel

    def test_another_platform_on_the_folder_finds_and_trusts_it(self, compiled: Compiled) -> None:
        with Platform.embedded(compiled.platform.root, config=FAST) as other:
            source = other.kernel_source
            fetched = source.fetch(source.resolve("identity-3"))
            assert (
                load_artifact(fetched.data, signature=fetched.signature, trust=source.trust()).id == compiled.kernel.id
            )
            assert other.compile_sync(KERNEL, timeout=5).id == compiled.kernel.id

    def test_what_is_not_there_is_an_error_of_the_source(self, compiled: Compiled) -> None:
        source = compiled.platform.kernel_source
        for ask in (source.resolve, source.fetch):
            with pytest.raises(UnknownKernelError):
                ask("0" * 64)
        assert issubclass(AmbiguousKernelError, KernelSourceError)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_a_forked_child_can_fetch_it(self, compiled: Compiled) -> None:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                source = compiled.platform.kernel_source
                fetched = source.fetch(source.resolve("identity-3"))
                status = 0 if len(fetched.data) == compiled.kernel.size_bytes else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert compiled.platform.kernel_source.resolve("identity-3") == compiled.kernel.id


class TestWaiting:
    @pytest.mark.slow
    async def test_an_invalid_blueprint_is_an_error_with_the_report(self, platform: Platform) -> None:
        with pytest.raises(CompilationFailedError, match="large inputs") as caught:
            await platform.compile(exponential(), "growth")
        assert caught.value.blueprint_id == exponential().id
        assert caught.value.report is not None
        assert not caught.value.report.passed
        with pytest.raises(CompilationFailedError):
            platform.compile_sync(exponential(), timeout=5)
        with pytest.raises(UnknownKernelError, match="its blueprint is invalid"):
            platform.kernel_source.resolve("growth")

    async def test_a_timeout_is_an_error_and_the_work_goes_on(self, platform: Platform) -> None:
        blueprint_id = platform.submit(blueprint())
        child = child_of()
        for wait in (platform.wait, lambda *a: asyncio.to_thread(platform.wait_sync, *a)):
            with pytest.raises(CompilationTimeoutError, match=r"compiling after 0\.2 s"):
                await wait(blueprint_id, 0.2)
        assert child.is_running()

    async def test_what_was_never_submitted_is_not_waited_for(self, platform: Platform) -> None:
        with pytest.raises(UnknownBlueprintError):
            await platform.wait("0" * 64)
        with pytest.raises(UnknownBlueprintError):
            platform.wait_sync("0" * 64)

    async def test_a_cancelled_wait_leaves_the_work_alone(self, platform: Platform) -> None:
        waiting = asyncio.create_task(platform.compile(blueprint()))
        child = await asyncio.to_thread(child_of)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert child.is_running()

    async def test_work_that_another_process_left_is_taken_up(self, platform: Platform) -> None:
        platform.store.blueprints.submit(blueprint())  # submitted, but nobody in this process was asked to compile it
        waiting = asyncio.create_task(platform.wait(blueprint().id))
        await asyncio.to_thread(child_of)
        waiting.cancel()

    async def test_what_another_process_finishes_is_noticed(self, platform: Platform) -> None:
        platform.store.blueprints.submit(blueprint())
        claim = platform.store.blueprints.claim("another process")
        assert claim is not None
        waiting = asyncio.create_task(platform.wait(blueprint().id, 20))
        await asyncio.sleep(0.1)
        platform.store.blueprints.set_status(
            blueprint().id, BlueprintStatus.INVALID, token=claim.token, reason="they did not like it"
        )
        with pytest.raises(CompilationFailedError, match="they did not like it"):
            await waiting

    async def test_trouble_with_the_store_reaches_who_waits(self, platform: Platform) -> None:
        platform.store.blueprints.submit(blueprint())
        shutil.rmtree(platform.root / "blobs")
        with pytest.raises(StoreCorruptError, match="missing"):
            await platform.wait(blueprint().id, 20)
        record = platform.store.blueprints.get(blueprint().id)
        assert (record.status, record.attempts) == (BlueprintStatus.UNVALIDATED, 0)
        platform.submit(blueprint())  # which stores the document again
        child_of()


class TestClosing:
    def test_it_ends_the_child_and_gives_the_blueprint_back(self, tmp_path: Path) -> None:
        with Platform.embedded(tmp_path, config=FAST) as platform:
            blueprint_id = platform.submit(blueprint())
            child = child_of()
        wait_until_gone(child, 10)
        with Platform.embedded(tmp_path, config=FAST) as platform:
            record = platform.store.blueprints.get(blueprint_id)
            assert (record.status, record.attempts) == (BlueprintStatus.UNVALIDATED, 0)

    def test_no_thread_is_left(self, tmp_path: Path) -> None:
        before = set(threading.enumerate())
        with Platform.embedded(tmp_path, config=FAST) as platform:
            platform.submit(blueprint())
            child_of()
        left = {thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("esper")}
        assert left == set()

    def test_whoever_waits_is_told(self, tmp_path: Path) -> None:
        platform = Platform.embedded(tmp_path, config=FAST)
        caught: queue.Queue[BaseException] = queue.Queue()

        def wait() -> None:
            try:
                platform.compile_sync(blueprint())
            except PlatformClosedError as error:
                caught.put(error)

        thread = threading.Thread(target=wait)
        thread.start()
        child_of()
        platform.close()
        assert "was closed" in str(caught.get(timeout=5))
        thread.join()

    def test_it_says_where_it_is_and_whether_it_is_closed(self, tmp_path: Path) -> None:
        with Platform.embedded(tmp_path) as platform:
            assert repr(platform) == f"<Platform embedded in {tmp_path}>"
        assert repr(platform).endswith(", closed>")
        config = EsperConfig.model_validate({"urza": {"url": "http://127.0.0.1:1"}})
        with Platform.connect(config) as platform:
            assert repr(platform) == "<Platform connected to http://127.0.0.1:1>"

    async def test_a_closed_platform_refuses(self, tmp_path: Path) -> None:
        async with Platform.embedded(tmp_path, config=FAST) as platform:
            add_kernel(platform.store, blueprint(), "small")
        platform.close()
        with pytest.raises(PlatformClosedError):
            platform.submit(blueprint(1))
        with pytest.raises(PlatformClosedError):
            await platform.wait(blueprint().id)
        with pytest.raises(KernelSourceError, match="closed"):
            platform.kernel_source.resolve("small")

    @pytest.mark.slow
    def test_a_program_that_just_ends_leaves_no_child_and_no_claim(self, tmp_path: Path) -> None:
        program = Program(
            """
import sys, psutil, time
from esper.platform import Platform
from tests.services.shelf import blueprint
platform = Platform.embedded(sys.argv[1])
platform.submit(blueprint())
while not psutil.Process().children():
    time.sleep(0.01)
print(psutil.Process().children()[0].pid)
""",
            tmp_path,
        )
        (pid,) = program.finish()
        assert not psutil.pid_exists(int(pid))
        with Platform.embedded(tmp_path, config=FAST) as platform:
            assert platform.store.blueprints.get(blueprint().id).status is BlueprintStatus.UNVALIDATED


class TestTheFolder:
    def test_it_is_in_the_users_data_folder_and_made_at_the_first_use(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
        monkeypatch.setenv("HOME", str(tmp_path))
        with Platform.embedded(config=FAST) as platform:
            assert platform.root.name == "esper"
            assert tmp_path in platform.root.parents
            assert list(tmp_path.iterdir()) == [], "the folder was made before it was needed"
            with pytest.raises(UnknownKernelError):
                platform.kernel_source.resolve("anything")
            assert (platform.root / "esper.db").exists()

    def test_the_configuration_may_name_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ESPER_PLATFORM__ROOT", str(tmp_path / "configured"))
        with Platform.embedded() as platform:
            assert platform.root == tmp_path / "configured"
        with Platform.embedded(tmp_path / "given") as platform:
            assert platform.root == tmp_path / "given"

    def test_one_that_cannot_be_made_is_an_error_at_the_first_use(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with Platform.embedded(tmp_path / "file" / "root", config=FAST) as platform:
            with pytest.raises(StoreReadOnlyError, match="choose another root"):
                platform.submit(blueprint())
            with pytest.raises(KernelSourceError, match="choose another root"):
                platform.kernel_source.resolve("anything")
            with pytest.raises(KernelSourceError, match="choose another root"):
                platform.kernel_source.trust()

    def test_the_default_platform_is_one_until_it_is_closed(self) -> None:
        first = default_platform()
        assert default_platform() is first
        first.close()
        assert default_platform() is not first

    def test_copies_of_a_model_share_platform_and_bus(self, platform: Platform) -> None:
        held = (platform, platform.kernel_source, platform.oona)
        assert all(copied is original for copied, original in zip(copy.deepcopy(held), held, strict=True))

    def test_only_blueprints_can_be_submitted(self, platform: Platform) -> None:
        with pytest.raises(BlueprintError, match="a dict was submitted"):
            platform.submit({"family": "affine"})  # type: ignore[arg-type]  # that is the mistake


SHARE = """
import sys
from esper.configs import EsperConfig, TezzeretConfig
from esper.platform import Platform
from tests.services.shelf import blueprint
with Platform.embedded(sys.argv[1], config=EsperConfig(tezzeret=TezzeretConfig(pipeline="fast"))) as platform:
    print("ready", flush=True)
    kernels = [platform.submit(blueprint(seed)) for seed in (0, 1)]
    for each in kernels:
        print(platform.wait_sync(each, timeout=250).id, flush=True)
    print(platform.trust)
"""


@pytest.mark.slow
def test_two_processes_on_one_folder_share_the_work_and_the_key(tmp_path: Path) -> None:
    programs = [Program(SHARE, tmp_path) for _ in range(2)]
    (first, second) = [program.finish(timeout=280) for program in programs]
    assert first == second
    assert len(first) == 4
    with Platform.embedded(tmp_path, config=FAST) as platform:
        records = platform.store.blueprints.list()
        assert {record.attempts for record in records} == {1}, "a blueprint was compiled twice"
        assert sorted(str(record.artifact_id) for record in records) == sorted(first[1:3])
