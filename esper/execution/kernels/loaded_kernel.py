"""A validated artifact made ready to execute: what many seeds share of it, and what each seed has to itself.

`KernelTemplate` is the shared, immutable part: graph, bytes of the artifact, compiled attachments. `LoadedKernel` is
one use of it on one device, with parameters in memory of its own. Making either is work for a background thread;
executing one is not.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from esper.artifacts import safetensors_file
from esper.artifacts.container import Artifact
from esper.artifacts.graph import DTYPES, KernelGraph
from esper.artifacts.loading import load_artifact
from esper.errors import EsperError
from esper.torch_internals import transforms_active
from esper_passes import SeedGraph

__all__ = [
    "AttachedKernel",
    "CompiledAttachment",
    "KernelMismatchError",
    "KernelModule",
    "KernelTemplate",
    "LoadedKernel",
    "check_features",
]


class KernelMismatchError(EsperError, ValueError):
    """A kernel that does not fit the site it was asked for."""


class CompiledAttachment:
    """A kernel's compiled code, and for how many rows it was measured to be faster than the kernel's graph.

    `measured` has, for ascending numbers of rows, whether it was. Between two of them it counts as faster if it was at
    both, above the last if it was there, below the first never. `call` is the code, or None until it is unpacked: the
    first who could use it has `unpack` called, which returns at once and sets `call` when it can.

    `call(x, *parameters)`, or `call(x, host, *parameters)` if the kernel reads `host`: `x` is contiguous
    `[n, in_features]` and `host` contiguous `[n, out_features]` with n >= 2, `parameters` are in the order of the
    graph's tensors, and the result is `[n, out_features]`. Nothing that it is given may be differentiated.
    """

    __slots__ = ("__weakref__", "_faster", "_rows", "_unpack", "call")

    def __init__(
        self,
        measured: Sequence[tuple[int, bool]],
        call: Callable[..., Tensor] | None = None,
        unpack: Callable[[CompiledAttachment], None] | None = None,
    ) -> None:
        self._rows = [rows for rows, _ in measured]
        self._faster = [faster for _, faster in measured]
        self._unpack = unpack
        self.call = call

    @property
    def gains(self) -> bool:
        """Whether there is any number of rows for which it counts as faster."""
        return any(self.is_faster(rows) for rows in self._rows)

    def is_faster(self, rows: int) -> bool:
        """Whether it counts as faster than the graph for `rows`."""
        above = bisect_right(self._rows, rows)
        return above > 0 and all(self._faster[above - 1 : above + 1])

    def for_rows(self, rows: int) -> Callable[..., Tensor] | None:
        """The code where it is there and counts as faster."""
        if not self.is_faster(rows):
            return None
        if self.call is None:
            unpack, self._unpack = self._unpack, None
            if unpack is not None:
                unpack(self)
        return self.call


class _Signature:
    """A graph that equals those of the same structure whose parameters have the same names."""

    def __init__(self, graph: KernelGraph) -> None:
        self.graph = graph
        self._key = graph.digest, graph.parameter_names

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Signature) and self._key == other._key


class _Code(NamedTuple):
    """A kernel's graph as torch.fx has it, and as Python. Templates of one signature share both."""

    graph: fx.Graph
    function: Callable[..., Tensor]


@functools.lru_cache(maxsize=256)
def _code_of(signature: _Signature) -> _Code:
    graph = signature.graph.to_fx()
    return _Code(graph, type(fx.GraphModule(nn.Module(), graph)).forward)


class KernelTemplate:
    """A validated artifact in host memory. Immutable; may be used from any thread and shared by any number of seeds.

    It keeps the artifact's bytes beside its weights, for checkpoints and pickles: both travel with their kernels.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact_id = artifact.id
        self.data = artifact.data
        self.graph = graph = artifact.graph
        code = _code_of(_Signature(graph))
        self.fx_graph = code.graph
        """Placeholders `x`, `host` if `graph.uses_host`, then `graph.parameter_names`. Copied from, never changed."""
        self.function = code.function
        """The graph as Python, called as `function(None, x[, host], *parameters)`."""
        self._attachments: dict[torch.device, CompiledAttachment] = {}
        self._alone: set[torch.device] = set()

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> KernelTemplate:
        return cls(artifact)

    @property
    def size_bytes(self) -> int:
        """Size of the artifact file, which is within a few KB of the memory that the weights take."""
        return len(self.data)

    def place(self, device: torch.device | str = "cpu", *, trainable: bool = False) -> LoadedKernel:
        """This kernel for one seed, with the artifact's weights in memory of its own: nothing else writes to it."""
        with torch.inference_mode(False):  # an inference tensor could never take part in a backward
            return self._with(safetensors_file.read_tensors(self.data), device, trainable)

    def first(self, artifact: Artifact) -> LoadedKernel:
        """This kernel, frozen, with the very weights of the `artifact` that it was made of, which nobody else has."""
        return self._with(artifact.tensors, "cpu", trainable=False)

    def _with(self, weights: Mapping[str, Tensor], device: torch.device | str, trainable: bool) -> LoadedKernel:
        target = torch.empty(0, device=device).device
        tensors = [weights[name].to(target) for name in self.graph.tensor_names]
        return LoadedKernel(self, KernelModule(self, tensors, trainable), trainable, target)

    def attachment(self, device: torch.device) -> CompiledAttachment | None:
        """The compiled code for this device, if some was attached."""
        return self._attachments.get(device)

    def attach(self, device: torch.device, attachment: CompiledAttachment) -> None:
        """Let every use on `device`, present and later, have `attachment`."""
        self._attachments[device] = attachment

    def leave_alone(self, device: torch.device) -> None:
        """The compiled code for this device is of no use: nobody need look for it again."""
        self._alone.add(device)

    def is_best_alone(self, device: torch.device) -> bool:
        """Whether that is known."""
        return device in self._alone

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelTemplate:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _template_of, (self.data, self.artifact_id)


def _template_of(data: bytes, artifact_id: str) -> KernelTemplate:
    with torch.inference_mode(False):
        return KernelTemplate(load_artifact(data, expected_id=artifact_id))


class KernelModule(nn.Module):
    """A kernel's graph with parameters of its own, in the order of the graph's tensors. Dynamo traces it whole."""

    def __init__(self, template: KernelTemplate, tensors: Sequence[Tensor], trainable: bool) -> None:
        super().__init__()
        self._template = template
        self._function = template.function
        self._uses_host = template.graph.uses_host
        self.is_shared = False
        """Whether the parameters are `DTensor`s, each whole on this rank."""
        for name, tensor in zip(template.graph.parameter_names, tensors, strict=True):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=trainable))

    def forward(self, x: Tensor, host: Tensor | None = None) -> Tensor:
        """`[*, in_features] -> [*, out_features]`; `host`, `[*, out_features]`, only matters if the graph reads it."""
        weights: Iterable[Any] = self._parameters.values()
        if self.is_shared:  # what shards a model may compute in another dtype than it keeps
            weights = [each.to_local().to(x.dtype) for each in weights]
        # Tracing takes them for constants, since a kernel is no child of the traced model.
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]  # torch leaves it untyped
            weights = [each.data for each in self.parameters(recurse=False)]  # `detach` would be traced
        if self._uses_host:
            if host is None:
                raise TypeError("this kernel reads the site's linear output; call it as kernel(x, host).")
            return self._function(None, x, host, *weights)
        return self._function(None, x, *weights)

    @property
    def has_hooks(self) -> bool:
        """Whether hooks are on it: only who calls the module runs them, not who runs its operations."""
        return bool(self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}  # generated code is not importable; the template makes it again

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._function = self._template.function

    def extra_repr(self) -> str:
        graph = self._template.graph
        return f"{self._template.artifact_id[:12]}, in_features={graph.in_features}, out_features={graph.out_features}"


class AttachedKernel:
    """What an eager host calls: the kernel's graph, and its compiled attachment where that is as good and faster.

    Compiled code has no second derivative and frees what a second backward needs: where anything is differentiated, or
    torch would do more with the operations than execute them, the graph runs.
    """

    __slots__ = ("_dtype", "_in", "_module", "_out", "_uses_host", "attachment", "device")

    def __init__(
        self, module: KernelModule, graph: KernelGraph, attachment: CompiledAttachment, device: torch.device
    ) -> None:
        self._module, self.attachment, self.device = module, attachment, device
        self._in, self._out, self._uses_host = graph.in_features, graph.out_features, graph.uses_host
        self._dtype: torch.dtype = DTYPES[graph.dtype]

    def __call__(self, x: Tensor, host: Tensor | None = None) -> Tensor:
        """`[*, in_features] -> [*, out_features]`, as the kernel's module would have it."""
        compiled = None if torch.compiler.is_compiling() else self._compiled(x, host)
        if compiled is None:
            result: Tensor = self._module(x, host)
            return result
        parameters = self._module._parameters.values()
        if self._uses_host and host is not None:
            flat = compiled(_rows(x), _rows(host), *parameters)
        else:
            flat = compiled(_rows(x), *parameters)
        return flat if x.dim() == 2 else flat.reshape(*x.shape[:-1], self._out)

    def _compiled(self, x: Tensor, host: Tensor | None) -> Callable[..., Tensor] | None:
        """The code to run on these inputs; None if the graph has to, or had better."""
        given = [x, *([host] if self._uses_host else []), *self._module._parameters.values()]
        if not all(self._is_plain(each) for each in given):
            return None
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given):
            return None
        if _torch_does_more(self.device.type) or _has_hooks(self._module):
            return None
        if x.dim() < 1 or x.shape[-1] != self._in or x.numel() < 2 * self._in:
            return None
        if self._uses_host and (host is None or host.shape != (*x.shape[:-1], self._out)):
            return None
        return self.attachment.for_rows(x.numel() // self._in)

    def _is_plain(self, tensor: Tensor | None) -> bool:
        """Whether it is what code was compiled for, parameters too: `.to()` may have moved or cast them."""
        return (
            tensor is not None
            and type(tensor) in (Tensor, nn.Parameter)
            and tensor.dtype == self._dtype
            and tensor.device == self.device
            and tensor.layout == torch.strided
            and not tensor.is_nested
            and not tensor.is_inference()
        )


def _torch_does_more(device_type: str) -> bool:
    """Whether torch is in a mode that compiled code does not know."""
    return (
        torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled(device_type)
        or torch.are_deterministic_algorithms_enabled()
        or transforms_active()
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class LoadedKernel:
    """One use of a kernel, on one device. Its parameters belong to the seed that uses it."""

    def __init__(self, template: KernelTemplate, module: KernelModule, trainable: bool, device: torch.device) -> None:
        self.template = template
        self.trainable = trainable
        self.uses_host = template.graph.uses_host
        """Whether the graph reads what the site has computed so far."""
        self.module = module
        """The graph with this use's parameters: `module(x)`, or `module(x, host)` where `uses_host`."""
        self._device = device
        self._executor: AttachedKernel | None = None

    @classmethod
    def from_artifact(
        cls, artifact: Artifact, device: torch.device | str = "cpu", trainable: bool = False
    ) -> LoadedKernel:
        """A single use of `artifact`, which has been validated by `esper.artifacts.load_artifact`."""
        return KernelTemplate.from_artifact(artifact).place(device, trainable=trainable)

    def place(self, device: torch.device | str = "cpu", *, trainable: bool = False) -> LoadedKernel:
        """Another use of the same kernel, with the artifact's weights; see `KernelTemplate.place`."""
        return self.template.place(device, trainable=trainable)

    @property
    def artifact_id(self) -> str:
        return self.template.artifact_id

    @property
    def graph(self) -> KernelGraph:
        return self.template.graph

    @property
    def size_bytes(self) -> int:
        """Size of the artifact."""
        return self.template.size_bytes

    @property
    def device(self) -> torch.device:
        """Where the parameters are now; where this use was placed, if the kernel has none."""
        return next((parameter.device for parameter in self.module.parameters(recurse=False)), self._device)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """In the order of the graph's tensors; `requires_grad` where trainable."""
        return tuple(self.module.parameters(recurse=False))

    def seed_graph(self, isolate: bool) -> SeedGraph:
        """What `esper_passes.InlineKernels` takes; its parameters are in the order of `parameters`."""
        template = self.template
        return SeedGraph(template.fx_graph, template.graph.parameter_names, self.uses_host, isolate)

    @property
    def attached(self) -> bool:
        """Whether this artifact has a compiled attachment on this device."""
        return self.template.attachment(self.device) is not None

    def attach(self, attachment: CompiledAttachment) -> None:
        """Give the artifact a compiled attachment for this device: every use there has it in its `executor`."""
        self.template.attach(self.device, attachment)

    @property
    def executor(self) -> Callable[..., Tensor]:
        """What an eager host calls, as `executor(x)` or `executor(x, host)`: the attachment, or without one the module.

        An executor never changes: one that was taken before `attach` goes on running the graph.
        """
        device = self.device
        attachment = self.template.attachment(device)
        if attachment is None:
            return self.module
        executor = self._executor
        if executor is None or executor.attachment is not attachment or executor.device != device:
            executor = self._executor = AttachedKernel(self.module, self.graph, attachment, device)
        return executor

    def check_fits(self, in_features: int, out_features: int, dtype: torch.dtype, layer: str) -> None:
        """Raise `KernelMismatchError` unless the kernel can stand at a linear layer of these features and dtype."""
        graph, who = self.graph, f"kernel {self.artifact_id[:12]}"
        check_features(graph, (in_features, out_features), layer, who)
        wanted = str(dtype).removeprefix("torch.")
        if graph.dtype != wanted:
            raise KernelMismatchError(
                f"{who} computes in {graph.dtype}, but layer {layer!r} has weights in {wanted}; "
                f"compile its blueprint with dtype={wanted!r}."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.template, self.module, self.trainable, self._device)

    def __repr__(self) -> str:
        graph, how = self.graph, "trainable" if self.trainable else "frozen"
        return (
            f"LoadedKernel({self.artifact_id[:12]}, {graph.in_features} -> {graph.out_features}, {how}, {self.device})"
        )


def _rows(tensor: Tensor) -> Tensor:
    """`[*, features]` as contiguous `[n, features]`."""
    flat = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return flat.contiguous()


def check_features(graph: KernelGraph, features: tuple[int, int], layer: str, who: str) -> None:
    """Raise `KernelMismatchError` unless kernels of `graph` can stand at a layer of these features."""
    if (graph.in_features, graph.out_features) != features:
        raise KernelMismatchError(
            f"{who} maps {graph.in_features} to {graph.out_features} features, but layer {layer!r} maps {features[0]} "
            f"to {features[1]}; compile a blueprint with in_features={features[0]}, out_features={features[1]}."
        )
