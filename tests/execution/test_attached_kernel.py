"""When compiled code is used for a kernel, and when its graph."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from esper.execution.kernels.loaded_kernel import CompiledAttachment, KernelTemplate, LoadedKernel
from tests.execution.small_kernels import IN, OUT, bottleneck, reference


class Compiled:
    """Stands for compiled code: computes the kernel from what it is handed, and notes what that was."""

    def __init__(self, artifact):
        self.graph, self.calls = artifact.graph, []

    def __call__(self, *inputs):
        count = 2 if self.graph.uses_host else 1
        self.calls.append([tuple(each.shape) for each in inputs[:count]])
        assert all(each.is_contiguous() for each in inputs[:count])
        module = self.graph.to_module(dict(zip(self.graph.tensor_names, inputs[count:], strict=True)))
        return module(*inputs[:count])


def test_without_an_attachment_the_module_is_executed(artifact):
    kernel = LoadedKernel.from_artifact(artifact)
    assert not kernel.attached
    assert kernel.executor is kernel.module


def faster(compiled):
    """An attachment that was measured to be faster for any number of rows."""
    return CompiledAttachment([(1, True)], call=compiled)


@pytest.mark.parametrize("lead", [(2,), (5,), (2, 3), (1, 2), (2, 1, 3)])
@pytest.mark.parametrize("start", ["kaiming", "identity"])
def test_an_attachment_gets_rows_and_its_result_gets_its_shape_back(lead, start):
    artifact = bottleneck(start)
    kernel, compiled = LoadedKernel.from_artifact(artifact, trainable=True), Compiled(artifact)
    kernel.attach(faster(compiled))
    x, host = torch.randn(*lead, IN, requires_grad=True), torch.randn(*lead, OUT)
    with torch.no_grad():
        y = kernel.executor(x, host)
    rows = x.numel() // IN
    assert compiled.calls == [[(rows, IN), (rows, OUT)] if kernel.uses_host else [(rows, IN)]]
    assert y.shape == (*lead, OUT)
    assert torch.allclose(y.double(), reference(artifact, x, host if kernel.uses_host else None), atol=1e-6)


@pytest.mark.parametrize("differentiated", ["x", "host", "parameters"])
def test_the_graph_runs_where_anything_is_differentiated(host_artifact, differentiated):
    kernel = LoadedKernel.from_artifact(host_artifact, trainable=differentiated == "parameters")
    compiled = Compiled(host_artifact)
    kernel.attach(faster(compiled))
    x = torch.randn(5, IN, requires_grad=differentiated == "x")
    host = torch.randn(5, OUT, requires_grad=differentiated == "host")
    kernel.executor(x, host).sum().backward()
    assert compiled.calls == []
    kernel.executor(x.detach(), host.detach()) if differentiated != "parameters" else None
    assert len(compiled.calls) == (differentiated != "parameters")
    with torch.no_grad():
        kernel.executor(x, host)
    assert len(compiled.calls) == 1 + (differentiated != "parameters")


@pytest.mark.parametrize(
    ("measured", "used"),
    [
        ([], ()),
        ([(4, False)], ()),
        ([(4, True)], (4, 5, 16, 40)),
        ([(4, True), (16, False)], ()),
        ([(4, False), (16, True)], (16, 40)),
        ([(4, True), (16, True), (32, False)], (4, 5)),
        ([(2, True), (4, False), (16, True), (32, True)], (16, 40)),
    ],
)
def test_an_attachment_runs_for_numbers_of_rows_between_two_at_which_it_was_faster(artifact, measured, used):
    kernel, compiled = LoadedKernel.from_artifact(artifact), Compiled(artifact)
    attachment = CompiledAttachment(measured, call=compiled)
    assert attachment.gains == bool(used)
    kernel.attach(attachment)
    for rows in (2, 3, 4, 5, 16, 40):
        kernel.executor(torch.randn(rows, IN))
    assert tuple(shapes[0][0] for shapes in compiled.calls) == used


def test_it_is_unpacked_for_the_first_forward_that_could_use_it_and_the_graph_runs_until_it_is(artifact):
    kernel, compiled, asked = LoadedKernel.from_artifact(artifact), Compiled(artifact), []
    kernel.attach(CompiledAttachment([(8, True)], unpack=asked.append))
    kernel.executor(torch.randn(9, IN, requires_grad=True)).sum().backward()
    kernel.executor(torch.randn(7, IN))
    assert asked == []
    for _ in range(3):
        kernel.executor(torch.randn(9, IN))
    (attachment,) = asked
    assert compiled.calls == []
    thread = threading.Thread(target=lambda: setattr(attachment, "call", compiled))
    thread.start()
    thread.join()
    kernel.executor(torch.randn(9, IN))
    assert compiled.calls == [[(9, IN)]]


def test_hooks_on_a_kernel_fire(artifact):
    kernel, compiled, seen = LoadedKernel.from_artifact(artifact), Compiled(artifact), []
    kernel.attach(faster(compiled))
    handle = kernel.module.register_forward_hook(lambda *given: seen.append(given))
    kernel.executor(torch.randn(5, IN))
    assert (len(seen), len(compiled.calls)) == (1, 0)
    handle.remove()
    kernel.executor(torch.randn(5, IN))
    assert (len(seen), len(compiled.calls)) == (1, 1)


def test_inputs_that_are_not_contiguous_arrive_contiguous(artifact):
    kernel, compiled = LoadedKernel.from_artifact(artifact), Compiled(artifact)
    kernel.attach(faster(compiled))
    for x in (torch.randn(IN, 5).T, torch.randn(3, IN, 2).transpose(1, 2), torch.randn(5, 2 * IN)[:, ::2]):
        assert torch.allclose(kernel.executor(x).double(), reference(artifact, x), atol=1e-6)
    assert len(compiled.calls) == 3


def test_an_attachment_is_for_every_use_of_the_artifact_on_that_device(artifact):
    template, compiled = KernelTemplate.from_artifact(artifact), Compiled(artifact)
    early, elsewhere = template.place(), template.place("meta")
    taken = early.executor
    early.attach(faster(compiled))
    late = template.place()
    assert (early.attached, late.attached, elsewhere.attached) == (True, True, False)
    assert late.executor is late.executor
    x = torch.randn(5, IN)
    early.executor(x), late.executor(x)
    assert len(compiled.calls) == 2
    taken(x)
    assert len(compiled.calls) == 2  # an executor in use never changes


class Subclass(torch.Tensor):
    pass


class CountingMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _under(context, x=None):
    def call(execute):
        with context():
            execute(torch.randn(5, IN) if x is None else x)

    return call


def _jvp(execute):
    torch.func.jvp(execute, (torch.randn(5, IN),), (torch.randn(5, IN),))


def _forward_ad(execute):
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.randn(5, IN), torch.randn(5, IN))
        assert torch.autograd.forward_ad.unpack_dual(execute(x)).tangent is not None


def _inference(execute):
    with torch.inference_mode():
        x = torch.randn(5, IN)
        execute(x)
    execute(x)


def _deterministic(execute):
    torch.use_deterministic_algorithms(True)
    try:
        execute(torch.randn(5, IN))
    finally:
        torch.use_deterministic_algorithms(False)


GRAPH_INSTEAD = {
    "inference mode": _inference,
    "deterministic algorithms": _deterministic,
    "no rows": lambda execute: execute(torch.randn(0, IN)),
    "one row": lambda execute: execute(torch.randn(1, IN)),
    "a vector": lambda execute: execute(torch.randn(IN)),
    "autocast": _under(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "compile": lambda execute: torch.compile(lambda x: execute(x), backend="eager", fullgraph=True)(torch.randn(5, IN)),
    "vmap": lambda execute: torch.func.vmap(execute)(torch.randn(4, 5, IN)),
    "grad": lambda execute: torch.func.grad(lambda x: execute(x).sum())(torch.randn(5, IN)),
    "jvp": _jvp,
    "forward AD": _forward_ad,
    "jit": lambda execute: torch.jit.trace(lambda x: execute(x), torch.randn(5, IN), check_trace=False),
    "a dispatch mode": _under(CountingMode),
    "a function mode": _under(torch.overrides.BaseTorchFunctionMode),
    "a subclass": lambda execute: execute(torch.randn(5, IN).as_subclass(Subclass)),
    "a nested tensor": lambda execute: execute(torch.nested.nested_tensor([torch.randn(2, IN), torch.randn(3, IN)])),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:.*nested tensors")
@pytest.mark.parametrize("situation", GRAPH_INSTEAD)
def test_the_graph_runs_where_compiled_code_does_not_apply(artifact, situation):
    kernel, compiled = LoadedKernel.from_artifact(artifact), Compiled(artifact)
    kernel.attach(faster(compiled))
    GRAPH_INSTEAD[situation](kernel.executor)
    assert compiled.calls == []
    kernel.executor(torch.randn(5, IN))
    assert len(compiled.calls) == 1


def test_a_fake_input_is_propagated_through_the_graph(artifact):
    kernel, compiled = LoadedKernel.from_artifact(artifact), Compiled(artifact)
    kernel.attach(faster(compiled))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert kernel.executor(torch.empty(5, IN)).shape == (5, OUT)
    assert compiled.calls == []


def test_the_attachment_is_still_used_with_a_default_device_set_and_without_gradients(artifact):
    kernel, compiled = LoadedKernel.from_artifact(artifact), Compiled(artifact)
    kernel.attach(faster(compiled))
    with torch.device("cpu"):
        kernel.executor(torch.randn(5, IN))
    with torch.no_grad():
        kernel.executor(torch.randn(5, IN))
    assert len(compiled.calls) == 2


def test_parameters_that_were_cast_or_moved_are_not_handed_to_compiled_code(artifact):
    kernel, compiled = LoadedKernel.from_artifact(artifact), Compiled(artifact)
    kernel.attach(faster(compiled))
    execute = kernel.executor
    kernel.module.double()
    assert execute(torch.randn(5, IN, dtype=torch.float64)).dtype == torch.float64
    kernel.module.to("meta")
    assert execute(torch.empty(5, IN, device="meta", dtype=torch.float64)).shape == (5, OUT)
    assert compiled.calls == []
    assert kernel.executor is kernel.module  # nothing is attached for the device it is on now


def test_an_input_or_host_that_does_not_fit_gets_the_error_of_the_graph(host_artifact):
    kernel, compiled = LoadedKernel.from_artifact(host_artifact), Compiled(host_artifact)
    kernel.attach(faster(compiled))
    with pytest.raises(RuntimeError, match=r"shapes|size"):
        kernel.executor(torch.randn(6, IN + 1), torch.randn(6, OUT))
    with pytest.raises(RuntimeError, match="size"):
        kernel.executor(torch.randn(6, IN), torch.randn(3, OUT))
    with pytest.raises(TypeError, match=r"kernel\(x, host\)"):
        kernel.executor(torch.randn(6, IN))
    assert compiled.calls == []
