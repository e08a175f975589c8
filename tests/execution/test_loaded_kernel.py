"""Kernels placed on a device: whose weights they have, what they compute, and when compiled code is used."""

import copy
import io
import threading

import pytest
import torch
from torch import nn

from esper.artifacts import Blueprint, KernelGraph, build_artifact
from esper.errors import EsperError
from esper.execution.kernels.loaded_kernel import KernelMismatchError, KernelTemplate, LoadedKernel
from tests.execution.kernel_sources import make_artifact
from tests.execution.small_kernels import IN, OUT, RANK, bottleneck, reference


@pytest.mark.parametrize("leading", ["a", "b"])
def test_kernels_of_one_structure_keep_the_names_of_their_own_parameters(leading):
    """Whichever of two such kernels, which compute different things, comes first."""
    for prefix in (leading, "b" if leading == "a" else "a"):
        tensors = {f"{prefix}_down": torch.randn(RANK, IN), f"{prefix}_up": torch.randn(OUT, RANK)}
        graph = {
            "in_features": IN,
            "out_features": OUT,
            "dtype": "float32",
            "tensors": [{"name": name, "shape": list(tensor.shape)} for name, tensor in tensors.items()],
            "nodes": [
                {"name": "h", "op": "linear", "inputs": ["x", f"{prefix}_down"]},
                {"name": "y", "op": "linear", "inputs": ["h", f"{prefix}_up"]},
            ],
            "output": "y",
        }
        kernel = LoadedKernel.from_artifact(build_artifact(Blueprint.from_graph(KernelGraph.from_json(graph), tensors)))
        assert [name for name, _ in kernel.module.named_parameters()] == list(tensors)
        x = torch.randn(5, IN)
        down, up = tensors.values()
        assert torch.allclose(kernel.module(x), x @ down.T @ up.T, atol=1e-5)


# ---- what it computes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (2, 0, 3)])
def test_the_module_computes_the_artifacts_graph(artifact, lead):
    x = torch.randn(*lead, IN)
    y = LoadedKernel.from_artifact(artifact).module(x)
    assert y.shape == (*lead, OUT)
    assert torch.allclose(y.double(), reference(artifact, x), atol=1e-6)


def test_a_kernel_that_reads_the_host_gets_it_and_says_so_when_it_does_not(host_artifact):
    kernel = LoadedKernel.from_artifact(host_artifact)
    x, host = torch.randn(5, IN), torch.randn(5, OUT)
    assert kernel.uses_host
    assert torch.equal(kernel.module(x, host), host)  # identity start
    with pytest.raises(TypeError, match=r"kernel\(x, host\)"):
        kernel.module(x)


def test_a_host_that_is_not_read_may_be_passed_all_the_same(artifact):
    kernel = LoadedKernel.from_artifact(artifact)
    x = torch.randn(5, IN)
    assert not kernel.uses_host
    assert torch.equal(kernel.module(x, torch.randn(5, OUT)), kernel.module(x))


@pytest.mark.parametrize("start", ["kaiming", "identity"])
def test_dynamo_traces_it_whole_forward_and_backward(start):
    kernel = LoadedKernel.from_artifact(bottleneck(start), trainable=True)
    x, host = torch.randn(5, IN, requires_grad=True), torch.randn(5, OUT)
    traced = torch.compile(kernel.module, backend="aot_eager", fullgraph=True)
    grads = []
    for run in (kernel.module, traced):
        grads.append(torch.autograd.grad(run(x, host).square().sum(), [x, *kernel.parameters], allow_unused=True))
    for eager, compiled in zip(*grads, strict=True):
        assert (eager is None) == (compiled is None)
        assert eager is None or torch.allclose(eager, compiled)


def test_the_seed_graph_lines_up_with_the_parameters(host_artifact):
    kernel = LoadedKernel.from_artifact(host_artifact, trainable=True)
    seed = kernel.seed_graph(isolate=True)
    assert (seed.uses_host, seed.isolate) == (True, True)
    assert not kernel.seed_graph(isolate=False).isolate
    placeholders = [node.name for node in seed.graph.nodes if node.op == "placeholder"]
    assert placeholders == ["x", "host", *seed.parameters]
    assert len(seed.parameters) == len(kernel.parameters)
    run = torch.fx.GraphModule(nn.Module(), seed.graph)
    x, host = torch.randn(5, IN), torch.randn(5, OUT)
    assert torch.equal(run(x, host, *kernel.parameters), kernel.module(x, host))


# ---- whose weights -------------------------------------------------------------------------------------------------


def test_parameters_come_in_the_order_of_the_graphs_tensors(artifact):
    kernel = LoadedKernel.from_artifact(artifact, trainable=True)
    assert len(kernel.parameters) == len(artifact.graph.tensors) > 2
    for parameter, spec in zip(kernel.parameters, artifact.graph.tensors, strict=True):
        assert isinstance(parameter, nn.Parameter)
        assert parameter.requires_grad
        assert torch.equal(parameter, artifact.tensors[spec.name])
    assert list(kernel.module.parameters()) == list(kernel.parameters)


def test_trainable_uses_have_weights_of_their_own(artifact):
    template = KernelTemplate.from_artifact(artifact)
    first, second = template.place(trainable=True), template.place(trainable=True)
    x = torch.randn(5, IN)
    before = second.module(x).detach()
    optimizer = torch.optim.SGD(first.parameters, lr=1.0)
    first.module(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(first.module(x), before)
    assert torch.equal(second.module(x), before)
    assert torch.equal(template.place().module(x), before)


@pytest.mark.parametrize("trainable", [False, True])
def test_writing_to_one_use_changes_no_other_and_no_later_one(artifact, trainable):
    template = KernelTemplate.from_artifact(artifact)
    first, second = template.place(trainable=trainable), template.place(trainable=trainable)
    with torch.no_grad():
        for parameter in first.parameters:
            parameter.add_(1)
    for other in (second, template.place(), first.place()):
        for parameter, spec in zip(other.parameters, artifact.graph.tensors, strict=True):
            assert torch.equal(parameter, artifact.tensors[spec.name])


def test_no_two_uses_share_memory_nor_do_the_weights_of_one(artifact):
    template = KernelTemplate.from_artifact(artifact)
    uses = [template.place(), template.place(), template.place(trainable=True)]
    uses.append(copy.deepcopy(uses[0]))
    owners = [parameter.untyped_storage().data_ptr() for use in uses for parameter in use.parameters]
    assert len(set(owners)) == len(owners)


def test_a_use_on_another_device_leaves_those_on_the_cpu(artifact):
    template = KernelTemplate.from_artifact(artifact)
    elsewhere = template.place("meta")
    assert elsewhere.device == torch.device("meta")
    assert elsewhere.module(torch.empty(5, IN, device="meta")).shape == (5, OUT)
    assert template.place().device == torch.device("cpu")


@pytest.mark.parametrize("trainable", [False, True])
def test_made_under_inference_mode_it_still_takes_part_in_a_backward(trainable):
    with torch.inference_mode():
        kernel = LoadedKernel.from_artifact(make_artifact(), trainable=trainable)
    x = torch.randn(5, 8, requires_grad=True)
    kernel.module(x).sum().backward()
    assert x.grad is not None
    assert all((parameter.grad is not None) == trainable for parameter in kernel.parameters)


def test_a_kernel_follows_its_module(artifact):
    kernel = LoadedKernel.from_artifact(artifact)
    kernel.module.to("meta")
    assert kernel.device == torch.device("meta")
    assert kernel.place("cpu").device == torch.device("cpu")


def test_copies_and_pickles_compute_the_same_and_stand_alone(artifact):
    kernel = LoadedKernel.from_artifact(artifact, trainable=True)
    x = torch.randn(5, IN)
    stored = io.BytesIO()
    torch.save(kernel.module, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(kernel.module), torch.load(stored, weights_only=False)):
        assert torch.equal(twin(x), kernel.module(x))
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(twin(x), kernel.module(x))


def test_it_names_itself(artifact):
    kernel = LoadedKernel.from_artifact(artifact)
    assert repr(kernel) == f"LoadedKernel({artifact.id[:12]}, 6 -> 4, frozen, cpu)"
    assert (kernel.artifact_id, kernel.graph, kernel.size_bytes) == (artifact.id, artifact.graph, len(artifact.data))
    assert repr(kernel.module) == f"KernelModule({artifact.id[:12]}, in_features=6, out_features=4)"


# ---- does it fit ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ((7, OUT, torch.float32), r"maps 6 to 4 features, but layer 'fc1' maps 7 to 4.*in_features=7, out_features=4"),
        ((IN, 5, torch.float32), r"maps 6 to 4 features, but layer 'fc1' maps 6 to 5.*out_features=5"),
        ((IN, OUT, torch.bfloat16), r"computes in float32, but layer 'fc1' has weights in bfloat16.*dtype='bfloat16'"),
    ],
)
def test_a_kernel_that_does_not_fit_says_what_would(artifact, site, message):
    kernel = LoadedKernel.from_artifact(artifact)
    kernel.check_fits(IN, OUT, torch.float32, "fc1")
    with pytest.raises(KernelMismatchError, match=message) as caught:
        kernel.check_fits(*site, "fc1")
    assert isinstance(caught.value, EsperError)
    assert isinstance(caught.value, ValueError)
    assert artifact.id[:12] in str(caught.value)


def test_templates_are_placed_from_several_threads(artifact):
    template = KernelTemplate.from_artifact(artifact)
    x, results = torch.randn(5, IN), []

    def work():
        for _ in range(20):
            results.append(template.place(trainable=True).module(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all(torch.equal(result, results[0]) for result in results)
