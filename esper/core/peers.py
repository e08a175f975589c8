"""The peers of a wrapped model: how it finds those on other ranks, and does what one of them asks of all."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from esper.core.errors import WrapError
from esper.core.wrapping import WrappedModel
from esper.distributed.data_parallel import average_like
from esper.distributed.joining import join
from esper.distributed.ranks import RanksError
from esper.distributed.sharding import (
    average_like_shards,
    group_of,
    is_sharded,
    mesh_of,
    refuse_parallel_layers,
    replicate,
)
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernels.loaded_kernel import KernelModule
from esper.execution.plans.alpha import SavedRamp
from esper.execution.seeds.control import SeedControl
from esper.execution.seeds.seed import Seed
from esper.torch_internals import share_fsdp_state

__all__ = ["join_group", "watch_for_ddp"]

_is_watching = False


def join_group(model: WrappedModel, group: Any) -> None:
    """Have `model` change together with the models of other ranks that join `group`."""
    if model.runtime.gate is None:
        this = weakref.ref(model)

        def carry_out(request: dict[str, Any]) -> None:
            model, options = this(), dict(request)
            if model is not None:
                _carry_out([model.kasmina_layers[name].seed(index) for name, index in options.pop("seeds")], **options)

        layers = model.kasmina_layers.items()
        sites = [(name, each.num_seeds, *(each.told_features or (0, 0))) for name, each in layers]
        join(model.runtime, group, sites, carry_out)


def join_shards(model: WrappedModel) -> None:
    """If `model`, or a module of it, was sharded by `fully_shard`: change together with the other ranks of its mesh.

    Raises :class:`RanksError` for what cannot be kept, and where it is too late for that.
    """
    if model._wrapping.bank.gradients is not None:
        return
    if not is_sharded(model.modules()):
        refuse_parallel_layers(each for each in model.modules() if not isinstance(each, KernelModule))
        return
    with _sharding:  # a first forward may begin while another thread asks for something
        if model._wrapping.bank.gradients is None:
            _join_shards(model)


_sharding = threading.Lock()


def _join_shards(model: WrappedModel) -> None:
    runtime, bank = model.runtime, model._wrapping.bank
    host = model._wrapping.host
    modules = list(host.modules() if is_sharded(host.modules()) else model.modules())
    mesh = mesh_of(each for each in modules if not isinstance(each, KernelModule))
    if mesh is None:
        return
    is_alone = mesh.size() == 1  # kernels have the kind of parameters that the host has, and nobody to agree with
    if is_alone and runtime.share is not None:
        return
    if runtime.has_run and not is_alone:
        raise RanksError(
            "the model was sharded by fully_shard() after its first forward: shard it before that, or before it is "
            "wrapped"
        )
    if runtime.gate is None and not is_alone:
        join_group(model, mesh if mesh.ndim == 1 else group_of(mesh))
    replicas = dict(model.named_modules())
    for name, original in host.named_modules() if is_sharded(host.modules()) else ():
        if is_sharded([original]) and is_sharded([replica := replicas[name]]):
            share_fsdp_state(replica, original)
    runtime.share = functools.partial(replicate, mesh=mesh)
    for seed in runtime.target.seeds():
        replicate(seed.kernel, mesh)
    runtime.refresh()
    if not is_alone:
        average_like_shards(bank, modules, mesh, next(model.parameters()).device)


def refuse_engine(module: nn.Module, where: str) -> None:
    """Raise `WrapError` for a module around a model that shares it among ranks by itself."""
    kind = _engine_of(module)
    if kind is not None:
        raise WrapError(f"the model is in a {kind} already{where}: {_ENGINES[kind]}")


def _engine_of(module: nn.Module) -> str | None:
    """Which of the engines `module` is one of; none of them need be there."""
    for kind in type(module).__mro__:
        if kind.__name__ in _ENGINES and kind.__module__.startswith(("torch.", "deepspeed")):
            return kind.__name__
    return None


_ENGINES = {
    "DistributedDataParallel": "wrap the module inside first, and put what esper.wrap returns into it",
    "FullyShardedDataParallel": "FSDP1 keeps parameters in flat ones of its own, beside which kernels cannot be "
    "trained; use torch.distributed.fsdp.fully_shard (FSDP2), before or after esper.wrap",
    "DeepSpeedEngine": "DeepSpeed reduces and steps the parameters that it knew at its start, and no kernels; use "
    "DistributedDataParallel or fully_shard (FSDP2)",
}


def watch_for_ddp() -> None:
    """From now on, notice when a wrapped model is put into `DistributedDataParallel`."""
    global _is_watching
    if not _is_watching:
        _is_watching = True
        register_module_module_registration_hook(_registered)


def _registered(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if child is None or (kind := _engine_of(module)) is None:
        return
    wrapped = [each for each in child.modules() if isinstance(each, WrappedModel)]
    known = {layer for each in wrapped for layer in each.modules()}
    alone = [each.layer_name for each in child.modules() if isinstance(each, KasminaLayer) and each not in known]
    if isinstance(module, nn.parallel.DistributedDataParallel):
        if alone and module.process_group.size() > 1:
            raise RanksError(
                f"layer {alone[0]!r}, which has seeds, is put into {kind} without the model that it is a part of, so "
                "that its kernels would not be averaged among the ranks: put what esper.wrap returns into it, whole"
            )
        for each in wrapped if name == "module" else ():
            _put_into(each, module, child)
    elif wrapped or alone:
        raise WrapError(f"a model that esper.wrap returned, or a part of one, is put into {kind}: {_ENGINES[kind]}")


def _put_into(model: WrappedModel, ddp: nn.parallel.DistributedDataParallel, child: nn.Module) -> None:
    """`child`, which is `model` or holds it, becomes `ddp.module`, on all ranks."""
    kernels = {id(each) for each in model._wrapping.bank.parameters()}
    ddp.parameters_to_ignore.update(name for name, each in child.named_parameters() if id(each) in kernels)
    if not any(each.requires_grad and id(each) not in kernels for each in child.parameters()):
        raise RanksError(
            "DistributedDataParallel needs a parameter of the host that learns, and of this model only kernels do: let "
            "one learn, or wrap the model with process_group=... and average the gradients of seed_parameters() "
            "yourself"
        )
    if ddp.process_group.size() > 1:
        join_group(model, ddp.process_group)
        average_like(model._wrapping.bank, ddp, next(child.parameters()).device)


def _carry_out(seeds: Sequence[Seed], action: str, **options: Any) -> None:
    """What the first rank was asked, here; by the layers' control, as this is not the thread that runs the model."""
    if isinstance(alpha := options.get("alpha"), dict):
        options["alpha"] = SavedRamp.model_validate(alpha).schedule().alpha
    control: SeedControl = cast("KasminaLayer", seeds[0].layer).control
    if action == "load":
        kernels = dict(zip(seeds, options.pop("kernels"), strict=True))
        control.fetch_together(control.load_together(kernels, **options))
    elif action == "unload":
        control.unload_together(seeds)
    elif action == "fossilize":
        control.fossilize_together(seeds)
    else:
        control.set_alphas(seeds, options["alpha"])
