"""What is asked of many layers in one call: kernels that come together, and go together."""

from __future__ import annotations

import asyncio
import difflib
import fnmatch
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

from torch import nn

from esper.artifacts import Blueprint
from esper.core.copies.copying import layer_places
from esper.core.errors import TargetError, UnknownLayerError
from esper.core.remote_control import default_platform
from esper.core.wrapping import WrappedModel
from esper.errors import EsperError, shown
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernels.loaded_kernel import KernelMismatchError, check_features
from esper.execution.plans.alpha import AlphaSchedule
from esper.execution.seeds.load_groups import GroupedLoad, KernelsRequest, LoadGroup
from esper.execution.seeds.progress import Stage
from esper.execution.seeds.seed import Seed

__all__ = ["Kernels", "Layers", "ManyLayers"]

Layers = Any
"""Layers with seeds: a dotted name, a glob pattern, a type, a module, or several of these."""

Kernel = str | Blueprint
Kernels = Kernel | Mapping[str, Kernel] | Callable[[KasminaLayer], Kernel]
"""One for all layers, by the layer's name, or a function of the layer: ids, names, or blueprints to be compiled."""


class ManyLayers(WrappedModel):
    """A wrapped model whose layers are spoken to by patterns."""

    def select_layers(self, layers: Layers) -> dict[str, KasminaLayer]:
        """The layers with seeds that `layers` names, in the model's order; None for all of them.

        As with `target_layers`, it is one or several of: a dotted name, a glob pattern whose `*` matches dots too, a
        type; or a module of the model or its host. What stands for a container selects the layers inside, unless that
        carries seeds itself.

        Raises :class:`TargetError` for anything that selects none.
        """
        self.runtime.look_for_layers(anew=True)
        several = isinstance(layers, Iterable) and not isinstance(layers, (str, type, nn.Module))
        wanted = list(self.kasmina_layers) if layers is None else list(layers) if several else [layers]
        if not wanted:
            raise TargetError("no layers are named: name some, or pass None for all that have seeds")
        chosen = set().union(*(self._matching(each) for each in wanted))
        return {name: layer for name, layer in self.kasmina_layers.items() if name in chosen}

    def _matching(self, target: Any) -> set[str]:
        places = layer_places(self)
        modules = dict(self.named_modules(remove_duplicate=False))
        if isinstance(target, str):
            hits = {name for name in {*modules, *places} if name == target or fnmatch.fnmatchcase(name, target)}
        elif isinstance(target, type):
            hits = {name for name, module in modules.items() if isinstance(module, target)}
        elif isinstance(target, nn.Module):
            shares = dict(self._wrapping.host.named_modules())
            hits = {name for name, module in (*modules.items(), *shares.items()) if module is target}
        else:
            raise TargetError(f"layers are named by names, patterns, types and modules, not by {shown(target)}")
        known = {name: (name, place) for name, place in places.items()}
        around = hits - known.keys() - set(places.values())
        found = {
            name
            for name, both in known.items()
            if not hits.isdisjoint(both) or any(_is_inside(own, hit) for own in both for hit in around)
        }
        if not found:
            raise TargetError(f"no layer with seeds is selected by {_described(target)}; {self._near(target)}")
        return found

    def _near(self, target: Any) -> str:
        names = list(self.kasmina_layers)
        near = difflib.get_close_matches(target, names, n=4, cutoff=0.5) if isinstance(target, str) else []
        if near:
            return f"did you mean {', '.join(map(repr, near))}?"
        return f"there are {', '.join(map(repr, names[:8]))}" + (f" and {len(names) - 8} more" if names[8:] else "")

    def _seeds(self, layers: Layers, seed_idx: int) -> list[Seed]:
        return [layer.seed(seed_idx) for layer in self.select_layers(layers).values()]

    def request_kernels(
        self,
        layers: Layers,
        kernel: Kernels,
        *,
        seed_idx: int = 0,
        alpha: float | AlphaSchedule = 1.0,
        trainable: bool = False,
        isolate: bool = False,
    ) -> KernelsRequest:
        """Ask for kernels of many layers and go on; the future tells whether they are staged, all or none of them.

        `layers` are those of :meth:`select_layers`. `kernel` is an id, a name or a blueprint for all of them, a mapping
        of these by layer name, or a function of the layer: `lambda site: Blueprint.low_rank(site.in_features,
        site.out_features, rank=8)`. Blueprints are compiled first, each once. The kernels come into force in one
        commit, at seed `seed_idx` of each layer. If one cannot be staged, none is: its seed is in `ERROR_RECOVERY`, the
        others are as before, the future is False, and its `errors` name the layers and the reasons. Where ranks change
        together, all of them ask for the same layers, and the kernels come into force at one forward on all.

        Raises as :meth:`load_kernel`, :class:`TargetError`, and what a function of the layer raises; nothing is changed
        then.
        """
        chosen = self.select_layers(layers)
        wanted = {layer.seed(seed_idx): _kernel_for(kernel, name, layer) for name, layer in chosen.items()}
        control = next(iter(chosen.values())).control
        references = {seed: each if isinstance(each, str) else repr(each) for seed, each in wanted.items()}
        blueprints = {seed: each for seed, each in wanted.items() if isinstance(each, Blueprint)}
        if blueprints and self.runtime.gate is not None and self.runtime.gate.is_leading:
            raise EsperError(
                "the other ranks are led to kernels that are there already: compile the blueprints first, as by "
                "Platform.compile(), and ask for their kernels' ids"
            )
        request = self._compiler() if blueprints else None
        group = control.load_together(references, alpha=alpha, trainable=trainable, isolate=isolate)
        if request is None:
            control.fetch_together(group)
        else:
            _compile_first(group, blueprints, request, lambda: control.fetch_together(group))
        return group.request

    def _compiler(self) -> Callable[[Blueprint], Future[Any]]:
        platform: Any = self._wrapping.options.platform or default_platform()
        if not hasattr(platform, "request"):
            raise TypeError(f"blueprints are compiled by what esper.Platform makes, not by {shown(platform)}: pass ids")
        compiler: Callable[[Blueprint], Future[Any]] = platform.request
        return compiler

    async def load_kernels(self, layers: Layers, kernel: Kernels, **options: Any) -> bool:
        """As :meth:`request_kernels`, awaited; on the thread that runs the model they are in force then.

        A task that is cancelled here cancels the loads.
        """
        request = self.request_kernels(layers, kernel, **options)
        try:
            staged: bool = await asyncio.wrap_future(request)
        except asyncio.CancelledError:
            seeds = self._seeds(list(request.layers), options.get("seed_idx", 0))
            for seed in seeds:
                load = seed.loading or seed.published
                if isinstance(load, GroupedLoad) and load.group.request is request:
                    seed.layer.control.cancel(seed, load.staged)  # type: ignore[attr-defined]  # a KasminaLayer has it
            raise
        if staged:
            self.runtime.commit_if_idle()
        return staged

    def unload_kernels(self, layers: Layers = None, *, seed_idx: int = 0) -> list[str]:
        """Make seed `seed_idx` of many layers dormant again, in one commit; see :meth:`unload_kernel`.

        Returns the names of the layers with something to unload. Raises :class:`TargetError`, and `LifecycleError` if
        one of the seeds is fossilized, with nothing changed.
        """
        seeds = self._seeds(layers, seed_idx)
        unloaded = self._control.unload_together(seeds)
        self.runtime.commit_if_idle()
        return [seed.layer_name for seed in unloaded]

    def fossilize_kernels(self, layers: Layers = None, *, seed_idx: int = 0) -> list[str]:
        """Make the kernels at seed `seed_idx` of many layers permanent; see :meth:`fossilize`.

        Returns the names of the layers whose seed is active.
        """
        seeds = self._seeds(layers, seed_idx)
        fossils = self._control.fossilize_together(seeds)
        self.runtime.commit_if_idle()
        return [seed.layer_name for seed in fossils]

    def set_alphas(self, layers: Layers, value_or_schedule: float | AlphaSchedule, *, seed_idx: int = 0) -> None:
        """Set the share of seed `seed_idx` in the output of many layers, or a schedule of it; see :meth:`set_alpha`.

        Raises `LifecycleError` if one of the seeds is fossilized, with nothing changed.
        """
        seeds = self._seeds(layers, seed_idx)
        self._control.set_alphas(seeds, value_or_schedule)

    @property
    def _control(self) -> Any:
        """That of all layers."""
        return next(iter(self.kasmina_layers.values())).control


def _is_inside(name: str, root: str) -> bool:
    return name == root or not root or name.startswith(f"{root}.")


def _described(target: Any) -> str:
    kind = target if isinstance(target, type) else type(target)
    return (
        repr(target)
        if isinstance(target, str)
        else f"type {kind.__name__}"
        if kind is target
        else f"this {kind.__name__}"
    )


def _kernel_for(kernel: Any, name: str, layer: KasminaLayer) -> Any:
    """The kernel, or the blueprint, that is asked for at one layer."""
    if isinstance(kernel, Mapping):
        if name not in kernel:
            raise UnknownLayerError(
                f"no kernel is named for layer {name!r}, which was selected: name one, or select only the layers that "
                "have one"
            )
        found = kernel[name]
    else:
        found = kernel(layer) if callable(kernel) and not isinstance(kernel, Blueprint) else kernel
    if not isinstance(found, (str, Blueprint)):
        hint = "; pass its id" if hasattr(found, "id") else ""
        raise TypeError(f"layer {name!r} is to have an id, a name or a Blueprint, not {shown(found)}{hint}")
    return found


def _compile_first(
    group: LoadGroup,
    blueprints: Mapping[Seed, Blueprint],
    compiler: Callable[[Blueprint], Future[Any]],
    go_on: Callable[[], None],
) -> None:
    """Have `blueprints` compiled, each once, and then `go_on`; if one fails, nothing of `group` is loaded.

    None is compiled if there is one that cannot stand at its layer.
    """
    misfits = {load: error for load in group.loads if (error := _misfit(load.seed, blueprints)) is not None}
    if misfits:
        group.refuse(misfits)
        return
    compiled = {blueprint: compiler(blueprint) for blueprint in set(blueprints.values())}
    left, lock = set(compiled), threading.Lock()
    group.request.note_blueprints(0, len(compiled))
    for load in group.loads:
        if load.seed in blueprints:
            load.note(Stage.COMPILING_BLUEPRINTS)

    def end(blueprint: Blueprint) -> None:
        with lock:
            left.discard(blueprint)
            group.request.note_blueprints(len(compiled) - len(left), len(compiled))
            if left:
                return
        failed: dict[GroupedLoad, Exception] = {}
        for load in group.loads:
            future = compiled.get(blueprints.get(load.seed))  # type: ignore[arg-type]  # None is no blueprint of these
            error = None if future is None else future.exception()
            if isinstance(error, Exception):
                failed[load] = error
            elif future is not None:
                load.refer_to(future.result().id)
        if failed:
            group.refuse(failed)
        else:
            go_on()

    for blueprint, future in compiled.items():
        future.add_done_callback(lambda _, each=blueprint: end(each))  # type: ignore[misc]  # mypy cannot infer it


def _misfit(seed: Seed, blueprints: Mapping[Seed, Blueprint]) -> KernelMismatchError | None:
    """Why the kernel of the blueprint for `seed` could not stand there, as far as is known before it has run."""
    features = seed.layer.features
    if seed in blueprints and features is not None:
        try:
            check_features(blueprints[seed].graph, features, seed.layer_name, "the blueprint's kernel")
        except KernelMismatchError as error:
            return error
    return None
