"""LoRA adapters of PEFT as kernels, and kernels as LoRA adapters.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. PEFT itself is not needed.
A layer's adapter computes `host(x) + s B A x`; as a low-rank kernel that is `host + up(down(x))`, with `A` as `down`
and `s B` as `up`; `s` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from esper.artifacts import ArtifactError, Blueprint
from esper.artifacts.document import near_misses
from esper.artifacts.graph import KernelGraph
from esper.core.errors import described
from esper.core.morphable_model import MorphableModel
from esper.core.sites.features import told_features
from esper.errors import EsperError, shown
from esper.execution.kasmina_layer import KasminaLayer

__all__ = ["AdapterError", "load", "save"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?P<name>lora_A\.weight|lora_B\.weight|lora_B\.bias)")
_HOSTS_OWN = re.compile(r"base_model\.model\.(.+?)(?:\.base_layer)?\.(weight|bias)")
_READ = frozenset({"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias"})
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # those that leave the host's weights as they are
_OF_NO_EFFECT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
        "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version",
        "qalora_group_size", "revision", "target_modules", "task_type",
    }
)  # fmt: skip
"""What says where adapters were put (the file's names do, too), or how they were trained."""


class AdapterError(EsperError, ValueError):
    """A folder holds no adapter that Esper can read, or a model has kernels that no adapter can hold."""


def load(model: MorphableModel, folder: str | os.PathLike[str]) -> dict[str, Blueprint]:
    """Blueprints of the LoRA adapter in `folder`, by the name of the layer that each is for.

    Their weights are in the dtype of the layer's. Adapters with `use_rslora`, `rank_pattern`, `alpha_pattern` and
    `lora_bias` are read; dropout, which matters while an adapter is trained, is not part of a kernel.

    Raises :class:`AdapterError`, naming the layer and the value, for other kinds of adapters (DoRA, trained biases,
    `modules_to_save` and the like), for files that are damaged, and for layers that carry no seeds or are of other
    sizes. Nothing is changed by it.
    """
    _check_wrapped(model)
    folder = Path(folder)
    config = _read_config(folder)
    layers = _read_weights(folder / WEIGHTS, dict(model.named_parameters()))
    _check_layers(model, layers)
    return {
        name: _blueprint(config, name, tensors, model.kasmina_layers[name]) for name, tensors in sorted(layers.items())
    }


def save(model: MorphableModel, folder: str | os.PathLike[str]) -> None:
    """Write the kernels in force as a LoRA adapter, which `PeftModel.from_pretrained` reads for the host.

    Each must be a low-rank kernel of an identity start, as `Blueprint.low_rank` makes and :func:`load` returns.
    Alphas become part of the weights, as they are now, and several seeds of a layer one adapter of their ranks' sum.
    Raises :class:`AdapterError`, naming the layer, before anything is written: for any other kernel, for a fossil that
    is part of the layer's weight, and if there is no kernel.
    """
    _check_wrapped(model)
    model.runtime.look_for_layers()
    found = {name: _merged(kernels) for name, kernels in _low_rank_kernels(model) if kernels}
    if not found:
        raise AdapterError("the model has no kernel in force: load one, and run a forward or commit()")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    biased = any(each.bias is not None for each in found.values())
    tensors: dict[str, Tensor] = {}
    for name, each in found.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = each.down
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = each.up
        if biased:
            bias = each.up.new_zeros(each.up.shape[0]) if each.bias is None else each.bias
            tensors[f"{_PREFIX}{name}.lora_B.bias"] = bias
    ranks = {name: each.down.shape[0] for name, each in found.items()}
    config = json.dumps(_config(model, ranks, biased), indent=2, sort_keys=True)
    _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG, lambda path: path.write_text(config, encoding="utf-8"))


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Config:
    rank: int
    alpha: float
    ranks: Mapping[str, float]
    """Of layers, by patterns of their names."""
    alphas: Mapping[str, float]
    root: bool
    """Whether alpha is divided by the root of the rank."""

    def rank_of(self, layer: str) -> float:
        return _matching(self.ranks, layer, self.rank)

    def scale_of(self, layer: str) -> float:
        rank = self.rank_of(layer)
        return _matching(self.alphas, layer, self.alpha) / (math.sqrt(rank) if self.root else rank)


def _matching(patterns: Mapping[str, float], layer: str, otherwise: float) -> float:
    """As PEFT does it: the first pattern that matches the end of the layer's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return otherwise


def _read_config(folder: Path) -> _Config:
    path = folder / CONFIG
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path} cannot be read: {error}; give the folder that PEFT's save_pretrained wrote"
        ) from error
    kind = fields.get("peft_type") if isinstance(fields, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{path} has the peft_type {kind!r}; only LORA can be made kernels of")
    if fields.get("init_lora_weights") not in _STARTS:
        raise AdapterError(
            f"{path} has init_lora_weights={fields['init_lora_weights']!r}, which changes the host's own weights; save "
            "the adapter with path_initial_model_for_weight_conversion, which makes an ordinary one of it"
        )
    if fields.get("bias") not in (None, "none"):
        raise AdapterError(f"{path} has bias={fields['bias']!r}: it trains the host's biases; merge them into the host")
    for name in sorted(fields.keys() - _READ - _OF_NO_EFFECT - {"init_lora_weights", "bias"}):
        if fields[name]:
            raise AdapterError(
                f"{path} has {name}={str(fields[name])[:80]}, which kernels cannot do; merge that adapter into the "
                "host with PEFT's merge_and_unload() before you wrap it"
            )
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    ranks, alphas = fields.get("rank_pattern") or {}, fields.get("alpha_pattern") or {}
    values = {"r": rank, "lora_alpha": alpha}
    for name, patterns in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(patterns, dict):
            raise AdapterError(f"{path} has {name}={str(patterns)[:80]}; it is to be an object")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise AdapterError(f"{path} has the {name} {pattern!r}, which is no pattern: {error}") from error
        values |= {f"{name}[{pattern!r}]": value for pattern, value in patterns.items()}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise AdapterError(f"{path} has {name}={shown(value)}; it is to be a number")
        if value < 1 and "alpha" not in name:
            raise AdapterError(f"{path} has {name}={value!r}; a rank is at least 1")
    return _Config(rank, alpha, ranks, alphas, bool(fields.get("use_rslora")))


def _read_weights(path: Path, hosts: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`lora_A.weight`, `lora_B.weight` and perhaps `lora_B.bias`, by layer. `hosts` are parameters by name."""
    if not path.exists() and (path.parent / "adapter_model.bin").exists():
        raise AdapterError(
            f"{path.parent} has adapter_model.bin, a pickle, which can run code; load it with PEFT where you trust it, "
            "and save it again, which writes safetensors"
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match is not None:
            layers.setdefault(match["layer"], {})[match["name"]] = tensor
        elif not _is_hosts_own(key, tensor, hosts):
            raise AdapterError(f"{path} has {shown(key)}, which is of no linear layer's LoRA; kernels cannot do that")
    for layer, parts in layers.items():
        missing = {"lora_A.weight", "lora_B.weight"} - parts.keys()
        if missing:
            raise AdapterError(f"{path} has no {missing.pop()} for layer {layer!r}; it was not saved whole")
    if not layers:
        raise AdapterError(f"{path} has no tensors")
    return layers


def _is_hosts_own(key: str, tensor: Tensor, hosts: Mapping[str, Tensor]) -> bool:
    """Whether it is a copy of a weight of the host's: PEFT saves those of embeddings and heads that have adapters."""
    match = _HOSTS_OWN.fullmatch(key)
    own = None if match is None else hosts.get(f"{match[1]}.{match[2]}")
    if match is None or own is None:
        return False
    if not torch.equal(own.detach().cpu(), tensor.to(own.dtype)):
        raise AdapterError(
            f"the adapter brings a {match[2]} of its own for {match[1]!r}, other than the model's; load that into the "
            "host first, or save the adapter with save_embedding_layers=False"
        )
    return True


def _check_layers(model: MorphableModel, layers: Mapping[str, object]) -> None:
    unknown = sorted(layers.keys() - model.kasmina_layers.keys())
    if not unknown:
        return
    others = f" (and {len(unknown) - 1} other layers)" if len(unknown) > 1 else ""
    hint = near_misses(unknown[0], list(model.kasmina_layers))
    is_there = any(name == unknown[0] for name, _ in model.named_modules())
    remedy = "name it among target_layers of esper.wrap; explain() says why not" if is_there else hint[:400]
    raise AdapterError(
        f"the adapter is for layer {unknown[0]!r}{others}, which {'carries no seeds' if is_there else 'is not there'}: "
        f"{remedy}"
    )


def _blueprint(config: _Config, name: str, tensors: Mapping[str, Tensor], layer: KasminaLayer) -> Blueprint:
    down, up, bias = (tensors.get(each) for each in ("lora_A.weight", "lora_B.weight", "lora_B.bias"))
    assert down is not None
    assert up is not None
    rank, features = config.rank_of(name), (layer.output_dim, layer.input_dim)
    shapes = (tuple(down.shape), tuple(up.shape), (up.shape[0],) if bias is None else tuple(bias.shape))
    if down.dim() != 2 or up.dim() != 2 or shapes != ((rank, features[1]), (features[0], rank), (features[0],)):
        raise AdapterError(
            f"the adapter's A and B for layer {name!r} are of shapes {shapes[0]} and {shapes[1]}; for a layer of "
            f"{features[1]} to {features[0]} features and the rank {rank} that {CONFIG} says, they would be "
            f"{(rank, features[1])} and {(features[0], rank)}"
        )
    dtype, scale = layer.placement[1], config.scale_of(name)
    weights = {"down.weight": down.to(dtype), "up.weight": (up.float() * scale).to(dtype)}
    if bias is not None:
        weights["up.bias"] = (bias.float() * scale).to(dtype)
    try:
        graph = _low_rank(layer.input_dim, layer.output_dim, int(rank), bias is not None, dtype)
        return Blueprint.from_graph(graph, weights)
    except ArtifactError as error:
        raise AdapterError(f"the adapter for layer {name!r} cannot be a kernel: {error}") from error


def _low_rank(in_features: int, out_features: int, rank: int, bias: bool, dtype: torch.dtype | str) -> KernelGraph:
    named = str(dtype).removeprefix("torch.")
    return Blueprint.low_rank(in_features, out_features, rank, bias=bias, dtype=named).graph


# -- writing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LowRank:
    """`host + up(down(x))`, with `bias` added."""

    down: Tensor
    up: Tensor
    bias: Tensor | None


def _low_rank_kernels(model: MorphableModel) -> Iterator[tuple[str, list[_LowRank]]]:
    plan = model.runtime.plan
    for name, layer in model.kasmina_layers.items():
        seeds = plan.sites.get(layer.site, ())
        folded = [seed.index for seed in layer.seeds if _is_folded(layer, seed.index, [each.seed for each in seeds])]
        if folded:
            raise AdapterError(
                f"seed {folded[0]} of layer {name!r} is a fossil that is part of the layer's own weight, which no "
                "adapter holds; save the host as it is now, with `esper.bake`, or save the adapter before you fossilize"
            )
        if seeds and told_features(layer) is None:  # neither a kind of nn.Linear nor Conv1D
            kind = model.layer_mappings[name]
            raise AdapterError(
                f"layer {name!r} is a {kind}, and adapters are for linear layers alone: unload its kernels, or save "
                "the model instead"
            )
        yield name, [_read_kernel(name, layer, each) for each in seeds]


def _is_folded(layer: KasminaLayer, seed: int, in_plan: Sequence[int]) -> bool:
    return layer.state.lifecycle(seed).name == "FOSSILIZED" and seed not in in_plan


@torch.no_grad()
def _read_kernel(name: str, layer: KasminaLayer, seed: Any) -> _LowRank:
    graph, parameters = seed.kernel.graph, [each.detach().cpu() for each in seed.kernel.parameters]
    shapes = [tuple(spec.shape) for spec in graph.tensors]
    rank = shapes[0][0] if shapes else 0
    bias = len(shapes) == 3
    expected = _low_rank(graph.in_features, graph.out_features, max(rank, 1), bias, graph.dtype).digest
    if graph.digest != expected:
        raise AdapterError(
            f"seed {seed.seed} of layer {name!r} has kernel {seed.kernel.artifact_id[:12]}, which is not low-rank with "
            "an identity start, so that no LoRA adapter computes it; unload it, or save the model instead"
        )
    alpha = layer.state.alpha(seed.seed) if seed.constant_alpha is None else seed.constant_alpha
    down, up, *rest = parameters
    return _LowRank(down.clone(), up * alpha, rest[0] * alpha if rest else None)


def _merged(kernels: Sequence[_LowRank]) -> _LowRank:
    """One that computes the sum of all."""
    biases = [each.bias for each in kernels if each.bias is not None]
    return _LowRank(
        torch.cat([each.down for each in kernels]).contiguous(),
        torch.cat([each.up for each in kernels], dim=1).contiguous(),
        torch.stack(biases).sum(0) if biases else None,
    )


def _config(model: MorphableModel, ranks: Mapping[str, int], biased: bool) -> dict[str, Any]:
    """With an `alpha` that is the rank, of which nothing is left to multiply with."""
    usual, _ = Counter(ranks.values()).most_common(1)[0]
    longest_first = sorted(ranks, key=lambda name: (-len(name), name))  # shorter names may be the ends of longer ones
    patterns = {re.escape(name): ranks[name] for name in longest_first} if len(set(ranks.values())) > 1 else {}
    config = getattr(model, "config", None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": getattr(config, "_name_or_path", None) or None,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": sorted(ranks),
        "lora_bias": biased,
        "bias": "none",
        "lora_dropout": 0.0,
        "use_rslora": False,
        "inference_mode": True,
    }


def _replace(path: Path, write: Any) -> None:
    """Have `write` make the file beside `path`, which takes its place once it is whole."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _check_wrapped(model: object) -> None:
    if not isinstance(model, MorphableModel):
        raise AdapterError(f"it takes what esper.wrap returned, not {described(model)}")
