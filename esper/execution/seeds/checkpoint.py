"""The format of kernels in a `state_dict`, written and read.

Every value is a tensor, so that whatever handles state dicts handles these, and `torch.load(weights_only=True)` reads
them. Below the prefix under which a model registers its `ActiveKernels` there are

- `seeds`: uint8, JSON that names each seed with its artifact, flags and state (:class:`SavedSeed`), and spaces up to a
  size that depends on the layers' names alone, so that a planner of distributed checkpoints can read it in place;
- `artifact.<id>`: uint8, the artifact's bytes, once for all seeds that have it;
- `<layer>:<seed>.<parameter>`: the kernel's parameters as they are.

What is read is checked as if it came from a stranger: nothing in it is executed, and artifacts are verified again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from esper.artifacts.errors import ArtifactError
from esper.artifacts.loading import load_artifact
from esper.errors import EsperError
from esper.execution.kernels.loaded_kernel import KernelTemplate
from esper.execution.lifecycle import SeedLifecycleState
from esper.execution.plans.alpha import SavedRamp
from esper.execution.state_layout import FIELDS, kernel_number

__all__ = ["ARTIFACT", "INDEX", "CheckpointError", "SavedKernel", "SavedSeed", "decode", "encode", "seed_key"]

INDEX = "seeds"
ARTIFACT = "artifact."
_HEAD_SIZE, _SEED_SIZE = 64, 1024  # bytes: more than the JSON takes without and for a seed, its layer's name aside

_Count = Annotated[int, Field(ge=0, le=2**15 - 1)]


class CheckpointError(EsperError, RuntimeError):
    """Kernels in a checkpoint that cannot be loaded into this model; nothing was changed.

    To load the host's part alone, drop the checkpoint's keys that start with "_esper.".
    """


class SavedSeed(BaseModel):
    """One seed with a kernel in force. The numbers are those of `KasminaStateLayout`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    layer: str
    place: str | None = None
    """Where that layer stands, if it was moved to another name after wrapping."""
    seed: int = Field(ge=0)
    artifact: str = Field(pattern="^[0-9a-f]{64}$")
    trainable: bool
    isolate: bool
    fossilized: bool
    scheduled: bool
    """Whether alpha was moving on a schedule."""
    ramp: SavedRamp | None = None
    """That schedule, if it is a ramp. Any other is code, which a checkpoint does not hold."""
    alpha: float = Field(ge=0, le=1)
    health: float = Field(allow_inf_nan=False)
    epoch: int = Field(ge=0, le=2**31 - 1)
    latency_μs: _Count
    errors: _Count

    @property
    def stands_at(self) -> str:
        """The name of the layer's place in the model that was saved."""
        return self.layer if self.place is None else self.place

    def state(self) -> dict[str, Tensor]:
        """The fields of a `KasminaStateLayout` of this one seed."""
        lifecycle = SeedLifecycleState.FOSSILIZED if self.fossilized else SeedLifecycleState.ACTIVE
        values = {
            "lifecycle_states": lifecycle,
            "active_kernel_id": kernel_number(self.artifact),
            "alpha_blend": self.alpha,
            "health_accumulator": self.health,
            "last_update_epoch": self.epoch,
            "exec_latency_μs": self.latency_μs,
            "error_count": self.errors,
            "fallback_active": False,
        }
        return {name: torch.tensor([value], dtype=FIELDS[name], device="cpu") for name, value in values.items()}


class _Index(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    seeds: list[SavedSeed]
    """None in what says that all were dormant."""


@dataclass(frozen=True, slots=True)
class SavedKernel:
    """A seed read from a checkpoint: `tensors` are the parameters, in the order of the template's graph."""

    saved: SavedSeed
    template: KernelTemplate
    tensors: tuple[Tensor, ...]


def seed_key(layer_name: str, seed: int) -> str:
    """The name of a seed's kernel among a bank's modules, different for different seeds.

    Module names hold no dots, so those of the layer become slashes.
    """
    return f"{layer_name.replace('%', '%25').replace('/', '%2F').replace('.', '/')}:{seed}"


def encode(seeds: Iterable[tuple[SavedSeed, KernelTemplate]]) -> dict[str, Tensor]:
    """The index and the artifacts, by name. The parameters are written by the kernels' own modules."""
    seeds = list(seeds)
    index = _Index(seeds=[saved for saved, _ in seeds])
    text = index.model_dump_json(exclude_none=True).encode()  # without what is None, versions before it read this too
    names = [name.encode("unicode_escape") for saved, _ in seeds for name in (saved.layer, saved.place or "")]
    size = _HEAD_SIZE + _SEED_SIZE * len(seeds) + sum(map(len, names))
    entries = {INDEX: _to_tensor(text.ljust(size))}
    for _, template in seeds:
        name = ARTIFACT + template.artifact_id
        if name not in entries:
            entries[name] = _to_tensor(template.data)
    return entries


def decode(
    entries: Mapping[str, Tensor], known: Callable[[str], KernelTemplate | None] = lambda _: None
) -> tuple[SavedKernel, ...]:
    """Read and verify what :func:`encode` and the kernels' modules wrote.

    `known` may offer the template of an artifact that is in memory already; the checkpoint's bytes are verified all the
    same. Raises :class:`CheckpointError`.
    """
    left = dict(entries)
    index = _read_index(left.pop(INDEX, None))
    templates: dict[str, KernelTemplate] = {}
    kernels = []
    for saved in index.seeds:
        where, identity = f"seed {saved.seed} of layer {saved.layer!r}", saved.artifact
        if identity not in templates:
            templates[identity] = _read_artifact(left.pop(ARTIFACT + identity, None), identity, where, known)
        template = templates[identity]
        tensors = []
        for spec, name in zip(template.graph.tensors, template.graph.parameter_names, strict=True):
            tensor = left.pop(f"{seed_key(saved.layer, saved.seed)}.{name}", None)
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != spec.shape or not tensor.is_floating_point():
                found = "is missing" if tensor is None else f"is {_described(tensor)}"
                raise CheckpointError(
                    f"the checkpoint's kernel for {where} does not fit its artifact {identity[:12]}: parameter "
                    f"{name!r} {found}, and has to be a floating-point tensor of shape {list(spec.shape)}"
                )
            tensors.append(tensor)
        kernels.append(SavedKernel(saved, template, tuple(tensors)))
    if left:
        raise CheckpointError(f"the checkpoint has entries of Esper's that belong to no seed: {sorted(left)[:4]}")
    return tuple(kernels)


def _read_index(tensor: object) -> _Index:
    if tensor is None:
        raise CheckpointError(f"the checkpoint has entries of Esper's, but not the one that explains them, {INDEX!r}")
    try:
        index = _Index.model_validate_json(_to_bytes(tensor, INDEX))
    except ValidationError as error:
        raise CheckpointError(f"the checkpoint's list of seeds is damaged, or of another version: {error}") from error
    names = [(saved.layer, saved.seed) for saved in index.seeds]
    if len(set(names)) != len(names):
        raise CheckpointError("the checkpoint's list of seeds names a seed twice")
    return index


def _read_artifact(
    tensor: object, identity: str, where: str, known: Callable[[str], KernelTemplate | None]
) -> KernelTemplate:
    if tensor is None:
        raise CheckpointError(f"the checkpoint lacks artifact {identity[:12]}, the kernel of {where}")
    try:
        with torch.inference_mode(False):
            artifact = load_artifact(_to_bytes(tensor, ARTIFACT + identity), expected_id=identity)
            return known(identity) or KernelTemplate.from_artifact(artifact)
    except ArtifactError as error:
        raise CheckpointError(f"the checkpoint's artifact {identity[:12]}, the kernel of {where}: {error}") from error


def _to_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _to_bytes(tensor: object, name: str) -> bytes:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise CheckpointError(f"the checkpoint's entry {name!r} is {_described(tensor)}, not bytes as a uint8 tensor")
    return tensor.detach().cpu().numpy().tobytes()


def _described(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
