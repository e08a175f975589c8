"""Plain models with kernels built in: what is left to do when a model has grown."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from esper.core.copies.copying import as_host, layer_places
from esper.core.errors import WrapError, described
from esper.core.morphable_model import MorphableModel
from esper.core.replica.replace_modules import replace_modules
from esper.core.widening import CannotWidenError, feed_forward, neurons_in
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernels.fossils import fold, is_affine
from esper.execution.plans.plan import SeedPlan
from esper.user_warnings import warn_user

__all__ = ["bake"]


def bake(morphable: MorphableModel) -> nn.Module:
    """A plain PyTorch module of the host's class that computes what a wrapped model computes now; nothing of Esper's.

    It has copies of all parameters, under the host's names, and of the kernels in force, fossilized ones included; what
    is only staged is left out. Affine kernels that come first in their layer become part of its weight and bias, at
    their present alphas, unless that changes more than the layer: the weight is tied, or the kernel's input detached.
    (Code of the host's that reads such a weight itself, past the layer, reads it with the kernels.) Hidden neurons that
    come first beside a feed-forward block of their activation, a sequence of linear layer, activation and linear layer,
    become part of its two linear layers, which are wider then.
    In the place of a layer with other kernels stands a `torch.fx.GraphModule`, with `weight` and `bias` as before, one
    submodule `seed_<index>` for each such kernel's parameters, and alphas as constants. It can be pickled, exported and
    loaded where Esper is not installed. The wrapped model stays as it is.

    Warns where the host has a `save_pretrained` and such modules remain: what that saves, the host's class loads
    without them. Raises :class:`WrapError` if `morphable` is not a wrapped model, and for other kernels behind modules
    that are no linear layers; it says for each of these which condition does not hold.
    """
    if not isinstance(morphable, MorphableModel):
        raise WrapError(f"esper.bake takes what esper.wrap returned, not {described(morphable)}")

    morphable.runtime.look_for_layers()
    host = copy.deepcopy(as_host(morphable))
    plan = morphable.runtime.plan
    layers = {place: morphable.kasmina_layers[name] for name, place in layer_places(morphable).items()}
    grown = {place: layer for place, layer in layers.items() if plan.sites.get(layer.site)}

    modules: dict[str, Any] = dict(host.named_modules())
    left: dict[str, Sequence[SeedPlan]] = {}
    refused: dict[str, str] = {}
    for name, layer in sorted(grown.items(), key=lambda each: -each[0].count(".")):  # blocks after what is in them
        seeds = plan.sites[layer.site]
        if layer.linear_map is not None:
            left[name] = _fold_first(layer, modules[name], seeds, host)
        else:
            inner = [other for other, kernels in left.items() if kernels and other.startswith(f"{name}.")]
            reason = _widen(layer, modules[name], seeds, host, inner)
            if reason is not None:
                left[name], refused[layer.layer_name] = seeds, reason
    _check_built_in(refused)
    targets = {name: modules[name] for name, seeds in left.items() if seeds}
    if targets and hasattr(host, "save_pretrained"):
        warn_user(
            f"kernels of {', '.join(map(repr, targets))} are no part of their layers' weights: what save_pretrained() "
            "saves of the baked model is loaded without them. Save it whole, with torch.save",
        )

    def built_in(name: str, plain: nn.Linear) -> nn.Module:
        return _with_kernels(grown[name], plain, left[name])

    if "" in targets:
        return built_in("", cast("nn.Linear", host))
    return replace_modules(host, targets, built_in, lambda kind: kind, watched=False) if targets else host


def _check_built_in(refused: Mapping[str, str]) -> None:
    if refused:
        reasons = "; ".join(f"at {name!r}, {reason}" for name, reason in refused.items())
        raise WrapError(
            f"kernels stand behind {', '.join(map(repr, refused))}, which are no linear layers, and esper.bake cannot "
            f"build them in: {reasons}. Or keep the wrapped model, whose checkpoints and pickles have them"
        )


def _widen(
    layer: KasminaLayer, block: nn.Module, seeds: Sequence[SeedPlan], host: nn.Module, inner: Sequence[str]
) -> str | None:
    """Make `seeds` part of the two linear layers of `block`; or why not, and what to do about it.

    `inner` are the sites inside the block that keep kernels.
    """
    for each in seeds:
        try:
            if inner:
                raise CannotWidenError(
                    f"kernels stay in force inside of it, at {', '.join(map(repr, inner))}: unload those"
                )
            neurons = neurons_in(each)
            whole = feed_forward(block, host)
            whole.check_takes(neurons)
        except CannotWidenError as error:
            return f"seed {each.seed}: {error}"
        whole.take_in(neurons, _alpha(layer, each))
    return None


def _fold_first(
    layer: KasminaLayer, plain: nn.Linear, seeds: Sequence[SeedPlan], host: nn.Module
) -> Sequence[SeedPlan]:
    """Make the first of `seeds` part of the weights of `plain`, as many as can be; those that are left."""
    uses = Counter(id(each) for module in host.modules() for each in module._parameters.values())
    own = [each for each in (plain.weight, plain.bias) if each is not None]
    if not all(type(each) is nn.Parameter and uses[id(each)] == 1 for each in own):
        return seeds
    folded = 0
    for each in seeds:
        if each.isolate or not is_affine(each.kernel.graph, constant=plain.bias is not None):
            break
        fold(plain.weight, plain.bias, each.kernel, _alpha(layer, each))
        folded += 1
    return seeds[folded:]


def _with_kernels(layer: KasminaLayer, plain: nn.Linear, seeds: Sequence[SeedPlan]) -> fx.GraphModule:
    """A module that computes what `plain`, and the kernels of `seeds` behind it, do."""
    root, graph = nn.Module(), fx.Graph()
    for name, parameter in plain._parameters.items():
        root.register_parameter(name, parameter)
    x = graph.placeholder("input")
    weight = _tensor(root, graph, plain, "weight")
    bias = _tensor(root, graph, plain, "bias") if plain.bias is not None else None
    y = graph.call_function(torch.nn.functional.linear, (x, weight, bias))
    for each in seeds:
        y = _blended(root, graph, each, _alpha(layer, each), x, y)
    graph.output(y)
    baked = fx.GraphModule(root, graph)
    vars(baked).update(in_features=plain.in_features, out_features=plain.out_features)
    for name in sorted({"weight", "bias"} & set(plain.__dict__)):  # a hook computes it from other parameters
        del baked._buffers[name]
        baked.__dict__[name] = plain.__dict__[name]
    return baked.train(plain.training)


def _tensor(root: nn.Module, graph: fx.Graph, plain: nn.Linear, name: str) -> fx.Node:
    if parametrize.is_parametrized(plain, name):
        root.add_module("parametrizations", plain.get_submodule("parametrizations"))
        return graph.call_module(f"parametrizations.{name}")
    if name in plain.__dict__:
        root.register_buffer(name, plain.__dict__[name].detach())
    return graph.get_attr(name)


def _alpha(layer: KasminaLayer, seed: SeedPlan) -> float:
    return layer.state.alpha(seed.seed) if seed.constant_alpha is None else seed.constant_alpha


def _blended(root: nn.Module, graph: fx.Graph, seed: SeedPlan, alpha: float, x: fx.Node, y: fx.Node) -> fx.Node:
    kernel = seed.kernel
    holder, name = nn.Module(), f"seed_{seed.seed}"
    names = kernel.graph.parameter_names
    for parameter_name, parameter in zip(names, kernel.parameters, strict=True):
        holder.register_parameter(parameter_name, copy.deepcopy(parameter))
    root.add_module(name, holder)
    given = [graph.call_function(torch.detach, (each,)) if seed.isolate else each for each in (x, y)]
    values = [*(given if seed.uses_host else given[:1]), *(graph.get_attr(f"{name}.{each}") for each in names)]
    own = kernel.template.fx_graph
    placeholders = [node for node in own.nodes if node.op == "placeholder"]
    output = graph.graph_copy(own, dict(zip(placeholders, values, strict=True)))
    cast = graph.call_method("type_as", (output, y))
    return graph.call_function(torch.lerp, (y, cast, alpha))
