"""`wrap` and `unwrap`."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from esper import torch_internals
from esper.compiler.attachment import attach_from
from esper.core.copies.copying import give_back
from esper.core.eager import EagerExecutor
from esper.core.errors import WrapError, described
from esper.core.morphable_model import MorphableModel, WrappedModelLink
from esper.core.peers import join_group, refuse_engine, watch_for_ddp
from esper.core.replica.replace_modules import replace_modules
from esper.core.root_layer import RootLayer
from esper.core.sites.features import Features
from esper.core.sites.module_site import ModuleSite
from esper.core.sites.share import report_share
from esper.core.sites.targets import Selection, Target, select_targets
from esper.core.wrapped_class import check_names, hosts_forward, wrapped_class
from esper.core.wrapping import Mode, WrapOptions, Wrapping
from esper.distributed.joining import checked_group
from esper.distributed.sharding import mesh_of
from esper.execution.assembly import Assembly
from esper.execution.kasmina_layer import KasminaLayer, LinearSite
from esper.execution.kernels import service_locator
from esper.execution.plans.runtime import CommitMode
from esper.execution.seeds.active_kernels import BANK_NAME
from esper.user_warnings import warn_user

if TYPE_CHECKING:
    from esper.configs import EsperConfig
    from esper.platform import Platform

__all__ = ["MorphableModel", "Target", "assemble", "unwrap", "wrap"]


def wrap(
    model: nn.Module,
    target_layers: Target | Iterable[Target] | Mapping[Target, Features | None] | None = None,
    seeds_per_layer: int = 4,
    cache_size_mb: float | None = None,
    telemetry_enabled: bool | None = None,
    *,
    mode: Mode = "module",
    commit: CommitMode = "auto",
    platform: Platform | None = None,
    config: EsperConfig | None = None,
    process_group: Any = None,
) -> MorphableModel:
    """Plant dormant seeds at `model`'s linear layers, or other modules, and return the wrapped model.

    The wrapped model is an instance of the host's class too. It shares the host's parameters and buffers under their
    names, computes what the host computes until a kernel is loaded, and leaves `model` itself as it was.

    - `target_layers`: types, exact dotted names and glob patterns, one or several; None means every `nn.Linear`. One
      that stands for linear layers selects these; one that stands for other modules only makes them sites, if they take
      one tensor and return one, of which the last dimension alone may differ. A mapping gives `(in, out)`, the sizes of
      that dimension, for modules of which only a forward could tell them: `{"blocks.*.mlp": (64, 64)}`.
    - `seeds_per_layer`: kernels that one layer can hold at once.
    - `cache_size_mb`: budget for cached kernels, per layer and pooled over the model; by default as the settings say,
      128.
    - `telemetry_enabled`: whether executions are counted, timed and reported; by default as the settings say, True.
    - `mode`: "module" has the host's own code run, with other modules in the place of the target layers; "fx" traces
      the model with `torch.fx`, whose contract then holds, and runs code generated for the kernels in force.
    - `commit`: "auto" puts staged changes in force where a forward begins; "manual" waits for `commit()`.
    - `platform`: where kernels come from and telemetry goes; by default the one that the settings describe, which is
      the embedded one in the user's data folder unless they say otherwise.
    - `config`: the settings; by default those of `platform`, or else what `load_config()` finds.
    - `process_group`: the `torch.distributed` group of the ranks that train this model together, or a device mesh of
      one dimension: changes come into force on all of them at the same forward, or on none. Called on all of them.
      A model that is put into `DistributedDataParallel` finds its group there.

    Raises :class:`WrapError` for what is no module, is compiled or wrapped already, and :class:`TargetError` for a
    target that names nothing in the model.
    """
    _check(model, seeds_per_layer, cache_size_mb, mode)
    options = WrapOptions.read(seeds_per_layer, cache_size_mb, telemetry_enabled, mode, commit, platform, config)
    group = None if process_group is None else checked_group(process_group)
    selection = select_targets(model, target_layers)
    report_share(model, selection, chosen=target_layers is not None)
    mesh_of(model.modules())  # raises for what cannot be kept
    wrapped = assemble(model, selection, options)
    if group is not None:
        join_group(wrapped, group)
    watch_for_ddp()
    wrapped.runtime.model.find_peers()
    return wrapped


def assemble(
    model: nn.Module, selection: Selection, options: WrapOptions, into: MorphableModel | None = None
) -> MorphableModel:
    """Wrap `model` at the selected layers; everything has been checked. `into` is a wrapped model to initialise."""
    targets, platform = selection.targets, options.platform
    kind = wrapped_class(model, root_is_site="" in targets)
    wrapped: MorphableModel = object.__new__(kind) if into is None else into
    assembly = Assembly.of(
        WrappedModelLink(wrapped),
        layers=len(targets),
        seeds_per_layer=options.seeds_per_layer,
        device=next((each.device for target in targets.values() for each in target.parameters()), torch.device("cpu")),
        cache_size_mb=options.cache_size_mb,
        commit=options.commit,
        telemetry_enabled=options.telemetry_enabled,
        source=service_locator.kernel_source() if platform is None else platform.kernel_source,
        sink=_sink(platform) if options.telemetry_enabled else None,
        attach=attach_from,
    )
    layers: dict[str, KasminaLayer] = {}

    def replace(name: str, module: Any) -> KasminaLayer:
        parts = assembly.parts(len(layers), name, layer_id=len(layers))
        if name in selection.features:
            layers[name] = ModuleSite.at_site(module, parts, selection.features[name])
        elif name:
            layers[name] = LinearSite.at_site(module, parts)
        else:
            layers[name] = RootLayer.of(weakref.ref(wrapped), module, parts)
        return layers[name]

    replace_modules(model, targets, replace, root=wrapped, watched=options.mode == "fx")
    runtime, bank = assembly.runtime, assembly.complete(layers)
    wrapped._become_wrapped(Wrapping(model, bank, selection, options, again=assemble), runtime, assembly.tag, layers)
    wrapped._run_by(EagerExecutor(wrapped, runtime, layers, selection, options.mode, hosts_forward(wrapped)))
    return wrapped


def unwrap(morphable: MorphableModel) -> nn.Module:
    """The host: the very module that was wrapped, with parameters, layers, hooks and attributes as they are now.

    Kernels in force are not part of it; :func:`esper.bake` makes a plain model that has them. Warns of fossilized ones,
    which were meant to stay. What is set on the wrapped model later is not seen in the host.

    Raises :class:`WrapError` if `morphable` is not a wrapped model.
    """
    if not isinstance(morphable, MorphableModel):
        raise WrapError(f"esper.unwrap takes what esper.wrap returned, not {described(morphable)}")
    fossils = [each for each in morphable.runtime.plan.seeds() if each.constant_alpha is not None]
    if fossils:
        warn_user(
            f"the host is without {len(fossils)} fossilized kernel{'s'[: len(fossils) > 1]} of the wrapped model: "
            "esper.bake(model) makes a plain model that has them",
        )
    return give_back(morphable)


def _check(model: object, seeds_per_layer: object, cache_size_mb: object, mode: object) -> None:
    if not isinstance(model, nn.Module):
        raise WrapError(f"esper.wrap takes an nn.Module, not {described(model)}")
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise WrapError(
            "the model is a ScriptModule, whose layers cannot be replaced: wrap the model before scripting it"
        )
    for name, module in model.named_modules():
        where = f" (its submodule {name!r})" if name else ""
        if isinstance(module, (MorphableModel, KasminaLayer)):
            raise WrapError(f"the model is wrapped already{where}: use it as it is, or esper.unwrap() it first")
        if torch_internals.is_compiled(module):
            raise WrapError(f"the model is compiled already{where}: wrap it first, and compile what esper.wrap returns")
        refuse_engine(module, where)
    check_names(model)
    if any(BANK_NAME in names for names in (vars(model), model._modules, model._parameters, model._buffers)):
        raise WrapError(f"the model has an attribute {BANK_NAME!r}, the name under which kernels are registered")
    if isinstance(seeds_per_layer, bool) or not isinstance(seeds_per_layer, int) or seeds_per_layer < 1:
        raise ValueError(f"seeds_per_layer must be a whole number of at least 1, not {seeds_per_layer!r}")
    is_number = isinstance(cache_size_mb, (int, float)) and not isinstance(cache_size_mb, bool)
    if cache_size_mb is not None and not (is_number and 0 < cache_size_mb < math.inf):  # type: ignore[operator]  # mypy does not follow `is_number`
        raise ValueError(f"cache_size_mb must be a number of megabytes above 0, not {cache_size_mb!r}")
    if mode not in get_args(Mode):
        raise ValueError(f'mode must be "fx" or "module", not {mode!r}')


def _sink(platform: Platform | None) -> Any:
    return service_locator.telemetry_sink() if platform is None else platform.oona
