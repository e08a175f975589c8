"""The peers of a wrapped model: how it finds those on other ranks, and does what one of them asks of all."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from esper.core.wrapping import WrappedModel
from esper.distributed.data_parallel import average_like
from esper.distributed.joining import join
from esper.distributed.ranks import RanksError
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.plans.alpha import SavedRamp

__all__ = ["join_group", "watch_for_ddp"]

_is_watching = False


def join_group(model: WrappedModel, group: Any) -> None:
    """Have `model` change together with the models of other ranks that join `group`."""
    if model.runtime.gate is None:
        layers = model.kasmina_layers  # not the model, which `ranks` would keep alive

        def carry_out(request: dict[str, Any]) -> None:
            _carry_out(layers[request.pop("layer")], **request)

        model.__dict__["ranks"] = join(model.runtime, group, carry_out)


def watch_for_ddp() -> None:
    """From now on, notice when a wrapped model is put into `DistributedDataParallel`."""
    global _is_watching
    if not _is_watching:
        _is_watching = True
        register_module_module_registration_hook(_registered)


def _registered(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if name == "module" and isinstance(module, nn.parallel.DistributedDataParallel) and child is not None:
        for each in child.modules():
            if isinstance(each, WrappedModel):
                _put_into(each, module, child)


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


def _carry_out(layer: KasminaLayer, action: str, seed: int, **options: Any) -> None:
    """What the first rank was asked, here; by the layer's control, as this is not the thread that runs the model."""
    if isinstance(alpha := options.get("alpha"), dict):
        options["alpha"] = SavedRamp.model_validate(alpha).schedule().alpha
    control, target = layer.control, layer.seed(seed)
    if action == "load":
        control.load(target, options.pop("kernel"), **options)
    elif action == "unload":
        control.unload(target)
    elif action == "fossilize":
        control.fossilize(target)
    else:
        control.set_alpha(target, cast("float", options["alpha"]))
