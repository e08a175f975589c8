"""`Probe`: statistics of sites over some batches, taken while they go forward and backward through the model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from esper.artifacts.document import near_misses
from esper.core.errors import UnknownLayerError
from esper.core.morphable_model import MorphableModel
from esper.core.parts.many_layers import Layers
from esper.execution.kasmina_layer import KasminaLayer
from esper.growth.errors import GrowthError
from esper.growth.statistics import RunningStatistics, SiteStatistics

__all__ = ["MOST_FEATURES", "Probe"]

MOST_FEATURES = 8192
"""Of a site: its second moments are three matrices of that size, 256 MiB each at the most."""


class Probe(Mapping[str, SiteStatistics]):
    """Statistics of what sites take in and of the gradients they are given, by the layers' names.

    ::

        with Probe(model, "blocks.*.fc1") as probe:
            for x, y in batches:
                loss_function(model(x), y).backward()
        statistics = probe["blocks.0.fc1"]

    Gradients add up in the parameters as ever: `zero_grad()` before the next step. Within the block a compiled model
    runs as it is, uncompiled; outside of it nothing is paid. Blocks may follow each other: what they see adds up.

    Memory is bounded: `(in + 1)² + out² + out (in + 1)` numbers a site, and a uniform sample of `rows` rows (while
    batches go by, of up to twice as many and those of a batch), the same for the same `seed` and batches. Everything is
    summed up in float32, on the model's device, without waiting for it.
    Under data parallelism each rank has the statistics of its own batches.

    Raises :class:`TargetError` for `layers` that select none, and :class:`GrowthError` for those of more than 8192
    features.
    """

    def __init__(self, model: MorphableModel, layers: Layers = None, *, rows: int = 4096, seed: int = 0) -> None:
        """`layers` are those of `MorphableModel.select_layers`: names, patterns, types or modules; by default all."""
        if not isinstance(model, MorphableModel):
            raise GrowthError(f"a probe is for what esper.wrap() returned, not for a {type(model).__name__}")
        if rows < 1:
            raise GrowthError(f"rows must be at least 1, not {rows}")
        self._model = model
        self._rows = rows
        self._layers = model.select_layers(layers)
        for name, layer in self._layers.items():
            if max(layer.input_dim, layer.output_dim) > MOST_FEATURES:
                raise GrowthError(
                    f"layer {name!r} has {layer.input_dim} inputs and {layer.output_dim} outputs, and a probe holds "
                    f"square matrices of up to {MOST_FEATURES}: leave it out"
                )
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._drawn: dict[str, Tensor] = {}
        """States of generators that were loaded, for when there is one of that device."""
        self._running: dict[str, RunningStatistics] = {}
        self._block: contextlib.ExitStack | None = None

    def __enter__(self) -> Self:
        if self._block is not None:
            raise GrowthError("this probe is in its block already")
        self._block = contextlib.ExitStack()
        for name, layer in self._layers.items():
            self._block.callback(layer.register_forward_hook(partial(self._see, name)).remove)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            self._block.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(self, *_: object) -> None:
        block, self._block = self._block, None
        if block is not None:
            block.close()

    # -- the statistics --------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> SiteStatistics:
        """The statistics of a layer so far; raises :class:`GrowthError` if there are none, or they are not finite."""
        layer = self._layers.get(name)
        if layer is None:
            raise UnknownLayerError(f"the probe is not for {name!r}; {near_misses(name, list(self._layers))}")
        running = self._running.get(name) or self._new(name, layer, layer.placement[0])
        weight, bias = layer.linear_map or (None, None)  # what another module can follow is not known
        return running.finish((weight is not None and weight.requires_grad, bias is not None and bias.requires_grad))

    @property
    def reached(self) -> frozenset[str]:
        """The layers that a gradient has reached."""
        return frozenset(self._running)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def state_dict(self) -> dict[str, Any]:
        """What it has seen so far, as data for `torch.save`: a copy, as large as the statistics of all sites are."""
        drawn = {str(device): each.get_state() for device, each in self._generators.items()}
        sites = {name: running.state() for name, running in self._running.items()}
        return {"drawn": {**self._drawn, **drawn}, "sites": sites}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, of a probe for the same layers, `rows` and `seed`.

        Raises :class:`GrowthError` for what is no such state, with nothing changed.
        """
        try:
            drawn = {str(device): torch.as_tensor(each).cpu() for device, each in state_dict["drawn"].items()}
            running = {}
            for name, state in state_dict["sites"].items():
                layer = self._layers[name]
                running[name] = self._new(name, layer, layer.placement[0])
                running[name].load(state)
        except (AttributeError, KeyError, TypeError, ValueError) as cause:
            raise GrowthError(
                f"a probe's state is of another one or damaged: {type(cause).__name__}: {cause}"
            ) from cause
        self._drawn, self._generators, self._running = drawn, {}, running

    # -- while batches go by -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _see(self, name: str, layer: KasminaLayer, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not output.requires_grad:  # no backward comes back here
            return
        x, y = inputs[0].detach().flatten(0, -2), output.detach().flatten(0, -2)
        keys = torch.rand(len(x), device=x.device, generator=self._generator(x.device))
        chosen = keys.topk(self._rows).indices if len(x) > self._rows else None
        seen_to = layer.linear_map is not None and layer.weight.requires_grad
        if not seen_to or torch.is_autocast_enabled(x.device.type):  # where autograd keeps another tensor, if any
            x = x.clone()  # or somebody may write to it before the backward
        kept = (keys, y.clone()) if chosen is None else (keys[chosen], y[chosen])
        output.register_hook(partial(self._add, name, layer, x, chosen, *kept))  # type: ignore[no-untyped-call]  # torch's own

    @torch.no_grad()
    def _add(
        self,
        name: str,
        layer: KasminaLayer,
        x: Tensor,
        chosen: Tensor | None,
        keys: Tensor,
        outputs: Tensor,
        g: Tensor,
    ) -> None:
        running = self._running.get(name)
        if running is None or running.device != x.device:
            running = self._running[name] = self._new(name, layer, x.device)
        with torch.autocast(x.device.type, enabled=False):
            running.add(x, g.detach().flatten(0, -2), chosen, keys, outputs)

    def _new(self, name: str, layer: KasminaLayer, device: torch.device) -> RunningStatistics:
        return RunningStatistics(name, layer.input_dim, layer.output_dim, self._rows, device)

    def _generator(self, device: torch.device) -> torch.Generator:
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device).manual_seed(self._seed)
            if (drawn := self._drawn.get(str(device))) is not None:
                generator.set_state(drawn)
        return generator
