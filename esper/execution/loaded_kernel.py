"""A validated artifact made ready to execute: what many seeds share of it, and what each seed has to itself.

`KernelTemplate` is the shared, immutable part: graph, weights as they were in the artifact, compiled attachments.
`LoadedKernel` is one use of it on one device, with parameters of its own: a copy where they are to be trained, the
shared weights where they are frozen. Making either is work for a background thread; executing one is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from esper.artifacts.container import Artifact
from esper.artifacts.graph import DTYPES, KernelGraph
from esper.artifacts.loading import load_artifact
from esper.errors import EsperError
from esper.execution.active_transforms import transforms_active, write_count
from esper_passes import SeedGraph

__all__ = [
    "AttachedKernel",
    "CompiledAttachment",
    "KernelMismatchError",
    "KernelModule",
    "KernelTemplate",
    "LoadedKernel",
]

CompiledAttachment = Callable[..., Tensor]
"""Compiled code for one kernel: `attachment(x, *parameters)`, or `attachment(x, host, *parameters)` if it reads `host`.

`x` is contiguous `[n, in_features]` and `host` contiguous `[n, out_features]` with n >= 2, `parameters` are in the
order of the graph's tensors, and the result is `[n, out_features]`.
"""


class KernelMismatchError(EsperError, ValueError):
    """A kernel that does not fit the site it was asked for."""


class _SharedTensors:
    """An artifact's weights on one device, read-only by agreement; `intact` says whether the agreement was kept."""

    __slots__ = ("__weakref__", "_writes", "device", "tensors")

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.tensors = tuple(tensors)
        self.device = device
        self._writes = tuple(write_count(tensor) for tensor in self.tensors)

    @property
    def intact(self) -> bool:
        return all(write_count(tensor) == writes for tensor, writes in zip(self.tensors, self._writes, strict=True))


class KernelTemplate:
    """A validated artifact in host memory. Immutable; may be used from any thread and shared by any number of seeds.

    It keeps the artifact's bytes beside its weights, for checkpoints and pickles: both travel with their kernels.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact_id = artifact.id
        self.data = artifact.data
        self.graph = graph = artifact.graph
        self.fx_graph: fx.Graph = graph.to_fx()
        """Placeholders `x`, `host` if `graph.uses_host`, then `graph.parameter_names`. Copied from, never changed."""
        self.function: Callable[..., Tensor] = type(fx.GraphModule(nn.Module(), self.fx_graph)).forward
        """The graph as Python, called as `function(None, x[, host], *parameters)`."""
        with torch.inference_mode(False):  # an inference tensor could never take part in a backward
            values = [artifact.tensors[spec.name].detach() for spec in graph.tensors]
            values = [value.clone() if value.is_inference() else value for value in values]
        self._host_tensors = _SharedTensors(values, torch.device("cpu"))
        self._placed: weakref.WeakValueDictionary[torch.device, _SharedTensors] = weakref.WeakValueDictionary()
        self._attachments: dict[torch.device, CompiledAttachment] = {}

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> KernelTemplate:
        return cls(artifact)

    @property
    def size_bytes(self) -> int:
        """Size of the artifact file, which is within a few KB of the memory that the weights take."""
        return len(self.data)

    @property
    def intact(self) -> bool:
        """Whether nobody has written to the shared weights, for instance by making a frozen parameter trainable."""
        return self._host_tensors.intact

    def place(self, device: torch.device | str = "cpu", *, trainable: bool = False) -> LoadedKernel:
        """This kernel for one seed: with its own copy of the weights if `trainable`, else sharing the device's."""
        with torch.inference_mode(False):
            shared = self._on(torch.empty(0, device=device).device)
            return LoadedKernel(self, shared, trainable)

    def _on(self, device: torch.device) -> _SharedTensors:
        if device == torch.device("cpu"):
            return self._host_tensors
        shared = self._placed.get(device)
        if shared is None or not shared.intact:  # a race makes a second copy, which is harmless
            shared = _SharedTensors([tensor.to(device) for tensor in self._host_tensors.tensors], device)
            self._placed[device] = shared
        return shared

    def attachment(self, device: torch.device) -> CompiledAttachment | None:
        """The compiled code for this device, if some was attached."""
        return self._attachments.get(device)

    def attach(self, device: torch.device, attachment: CompiledAttachment) -> None:
        """Let every use on `device`, present and later, have `attachment`."""
        self._attachments[device] = attachment

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
        self._shares_memory = not trainable
        for name, tensor in zip(template.graph.parameter_names, tensors, strict=True):
            value = tensor.clone() if trainable else tensor
            self.register_parameter(name, nn.Parameter(value, requires_grad=trainable))

    def forward(self, x: Tensor, host: Tensor | None = None) -> Tensor:
        """`[*, in_features] -> [*, out_features]`; `host`, `[*, out_features]`, only matters if the graph reads it."""
        if self._uses_host:
            if host is None:
                raise TypeError("this kernel reads the site's linear output; call it as kernel(x, host).")
            return self._function(None, x, host, *self._parameters.values())
        return self._function(None, x, *self._parameters.values())

    def own_memory(self) -> None:
        """Stop sharing memory with the cache and with other seeds, before somebody writes to the parameters."""
        if self._shares_memory:
            self._shares_memory = False
            for parameter in self.parameters(recurse=False):
                parameter.data = parameter.data.clone()  # whoever holds the parameter still holds this kernel's

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.own_memory()  # loading copies in place
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}  # generated code is not importable; the template makes it again

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._function = self._template.function

    def extra_repr(self) -> str:
        graph = self._template.graph
        return f"{self._template.artifact_id[:12]}, in_features={graph.in_features}, out_features={graph.out_features}"


class AttachedKernel:
    """What an eager host calls: the compiled attachment where it applies, and the kernel's graph everywhere else."""

    __slots__ = ("_dtype", "_in", "_module", "_out", "_uses_host", "attachment", "device")

    def __init__(
        self, module: KernelModule, graph: KernelGraph, attachment: CompiledAttachment, device: torch.device
    ) -> None:
        self._module, self.attachment, self.device = module, attachment, device
        self._in, self._out, self._uses_host = graph.in_features, graph.out_features, graph.uses_host
        self._dtype: torch.dtype = DTYPES[graph.dtype]

    def __call__(self, x: Tensor, host: Tensor | None = None) -> Tensor:
        """`[*, in_features] -> [*, out_features]`, as the kernel's module would have it."""
        if torch.compiler.is_compiling() or not self._applies(x, host):
            result: Tensor = self._module(x, host)
            return result
        parameters = self._module._parameters.values()
        if self._uses_host and host is not None:
            flat = self.attachment(_rows(x), _rows(host), *parameters)
        else:
            flat = self.attachment(_rows(x), *parameters)
        return flat if x.dim() == 2 else flat.reshape(*x.shape[:-1], self._out)

    def _applies(self, x: Tensor, host: Tensor | None) -> bool:
        if torch.is_autocast_enabled(self.device.type) or transforms_active():
            return False
        if not self._is_plain(x) or x.dim() < 1 or x.shape[-1] != self._in or x.numel() < 2 * self._in:
            return False
        if self._uses_host and (host is None or not self._is_plain(host) or host.shape != (*x.shape[:-1], self._out)):
            return False
        return all(  # unless `.to()` moved or cast the parameters
            parameter is not None and parameter.dtype == self._dtype and parameter.device == self.device
            for parameter in self._module._parameters.values()
        )

    def _is_plain(self, tensor: Tensor) -> bool:
        return (
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.dtype == self._dtype
            and tensor.device == self.device
            and tensor.layout == torch.strided
            and not tensor.is_nested
        )


class LoadedKernel:
    """One use of a kernel, on one device. Its parameters belong to the seed that uses it."""

    def __init__(self, template: KernelTemplate, shared: _SharedTensors, trainable: bool) -> None:
        self.template = template
        self.trainable = trainable
        self.uses_host = template.graph.uses_host
        """Whether the graph reads what the site has computed so far."""
        self.module = KernelModule(template, shared.tensors, trainable)
        """The graph with this use's parameters: `module(x)`, or `module(x, host)` where `uses_host`."""
        self._shared = shared  # keeps the device's weights for the next seed that asks for them
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
        return next((parameter.device for parameter in self.module.parameters(recurse=False)), self._shared.device)

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
        if (graph.in_features, graph.out_features) != (in_features, out_features):
            raise KernelMismatchError(
                f"{who} maps {graph.in_features} to {graph.out_features} features, but layer {layer!r} maps "
                f"{in_features} to {out_features}; compile a blueprint with in_features={in_features}, "
                f"out_features={out_features}."
            )
        wanted = str(dtype).removeprefix("torch.")
        if graph.dtype != wanted:
            raise KernelMismatchError(
                f"{who} computes in {graph.dtype}, but layer {layer!r} has weights in {wanted}; "
                f"compile its blueprint with dtype={wanted!r}."
            )

    @property
    def is_untouched(self) -> bool:
        """Whether the parameters are still the shared weights themselves."""
        return self._shared.intact and all(
            mine.data_ptr() == shared.data_ptr() and mine.dtype == shared.dtype and not mine.requires_grad
            for mine, shared in zip(self.parameters, self._shared.tensors, strict=True)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: parameters of its own go along, shared weights are found in the template again."""
        module = None if not self.trainable and self.is_untouched else self.module
        return _use_of, (self.template, self.trainable, module)

    def __repr__(self) -> str:
        graph, how = self.graph, "trainable" if self.trainable else "frozen"
        return (
            f"LoadedKernel({self.artifact_id[:12]}, {graph.in_features} -> {graph.out_features}, {how}, {self.device})"
        )


def _use_of(template: KernelTemplate, trainable: bool, module: KernelModule | None) -> LoadedKernel:
    kernel = template.place(trainable=trainable and module is None)
    kernel.trainable = trainable
    kernel.module = module if module is not None else kernel.module
    return kernel


def _rows(tensor: Tensor) -> Tensor:
    """`[*, features]` as contiguous `[n, features]`."""
    flat = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return flat.contiguous()
