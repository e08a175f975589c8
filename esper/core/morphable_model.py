"""The wrapped model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn

from esper.core.eager import EagerExecutor
from esper.core.errors import UnknownLayerError
from esper.core.explain import Explanation
from esper.execution.alpha import AlphaSchedule
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernel_bank import BANK_NAME, KernelBank
from esper.execution.lifecycle import Transition
from esper.execution.runtime import Runtime
from esper.execution.site_marker import commit_while_tracing, postponed_while_tracing, traced_by_esper
from esper_passes import ENTER

__all__ = ["MorphableModel"]


class MorphableModel(nn.Module):
    """A model whose linear layers carry seeds. Made by `esper.wrap`.

    It has the host's parameters, buffers, submodule names, hooks and attributes. `forward` is the host's, with the
    kernels that are in force. A staged change comes into force where a forward begins (`commit="auto"`), or with
    `commit()`.
    """

    _root: nn.Module
    _host: nn.Module
    _run: Callable[..., Any]

    def __init__(
        self,
        host: nn.Module,
        root: nn.Module,
        runtime: Runtime,
        layers: Mapping[str, KasminaLayer],
        eager: EagerExecutor,
        layer_mappings: Mapping[str, str],
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        own = self.__dict__
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            own[name] = root.__dict__[name]
        for name, value in root.__dict__.items():
            if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs") or name.endswith("_hooks_always_called"):
                own[name] = type(value)(value) if isinstance(value, dict) else value
        own["_modules"] = dict(root._modules)
        own["training"] = root.training
        bank = KernelBank(runtime.state, {layer.site: name for name, layer in layers.items()}, runtime.refresh)
        own["_modules"][BANK_NAME] = bank
        own.update(
            _host=host,
            _root=root,
            _bank=bank,
            _eager=eager,
            _options=dict(options),
            _runtime_id=runtime.id,
            runtime=runtime,
            kasmina_layers=MappingProxyType(dict(layers)),
            layer_mappings=dict(layer_mappings),
        )
        runtime.is_training = lambda: self.training
        runtime.on_commit = bank.sync
        eager.attach_to(self)

    # -- what it computes ------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's forward."""
        if torch.compiler.is_dynamo_compiling():
            if traced_by_esper():
                ENTER(self._runtime_id)
            else:
                commit_while_tracing(self._runtime_id)
                if self.runtime.pending:  # the guard that brings Dynamo here again when something is staged
                    postponed_while_tracing(self._runtime_id)
            return self._root.forward(*args, **kwargs)
        return self._run(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`."""
        super().train(mode)
        self._root.training = mode
        self._eager.refresh()
        return self

    def __getattr__(self, name: str) -> Any:
        """The host's attributes and methods; methods run on the wrapped modules."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            root = self.__dict__.get("_root")
            if root is None:
                raise
            return getattr(root, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A submodule, parameter or plain attribute of the host is set for both views of the model."""
        super().__setattr__(name, value)
        root = self.__dict__.get("_root")
        if root is not None and name not in ("_run", "training"):
            setattr(root, name, value)

    # -- control ---------------------------------------------------------------------------------------------------

    def _layer(self, name: str) -> KasminaLayer:
        try:
            return self.kasmina_layers[name]
        except KeyError:
            near = difflib.get_close_matches(str(name), self.kasmina_layers, n=3)
            hint = (
                f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {_listed(self.kasmina_layers)}"
            )
            raise UnknownLayerError(f"there is no layer {name!r} with seeds; {hint}") from None

    def request_kernel(
        self,
        layer_name: str,
        seed_idx: int,
        kernel_artifact_id: str,
        *,
        alpha: float | AlphaSchedule = 1.0,
        trainable: bool = False,
        isolate: bool = False,
    ) -> Future[bool]:
        """Ask for a kernel and go on training; the future tells whether it is staged.

        A staged kernel comes into force with the next forward (`commit="auto"`) or at `commit()`. Parameters and
        errors as for :meth:`load_kernel`.
        """
        return self._layer(layer_name).request_kernel(
            seed_idx, kernel_artifact_id, alpha=alpha, trainable=trainable, isolate=isolate
        )

    async def load_kernel(
        self,
        layer_name: str,
        seed_idx: int,
        kernel_artifact_id: str,
        *,
        alpha: float | AlphaSchedule = 1.0,
        trainable: bool = False,
        isolate: bool = False,
    ) -> bool:
        """Load a kernel into a seed of layer `layer_name`; see :meth:`KasminaLayer.load_kernel`.

        Raises `KeyError` for an unknown layer and `IndexError` for a seed that does not exist. An unknown kernel, or one
        that does not fit, makes this return False and leaves the model as it was.
        """
        layer = self._layer(layer_name)
        return await layer.load_kernel(seed_idx, kernel_artifact_id, alpha=alpha, trainable=trainable, isolate=isolate)

    def unload_kernel(self, layer_name: str, seed_idx: int) -> bool:
        """Make a seed dormant again, or call off its load; False if there is nothing to unload."""
        return self._layer(layer_name).unload_kernel(seed_idx)

    def set_alpha(self, layer_name: str, seed_idx: int, value_or_schedule: float | AlphaSchedule) -> None:
        """Set a seed's share in its layer's output, or a schedule (`step -> alpha`) that moves it while training."""
        self._layer(layer_name).set_alpha(seed_idx, value_or_schedule)

    def fossilize(self, layer_name: str, seed_idx: int) -> bool:
        """Make a seed's kernel a permanent part of the model at its present alpha; False unless it is active."""
        return self._layer(layer_name).fossilize(seed_idx)

    def commit(self) -> list[Transition]:
        """Put everything staged in force, all at once; call it between two steps. Returns what changed."""
        return self.runtime.commit()

    def seed_parameters(self) -> Iterator[nn.Parameter]:
        """The kernels' parameters that learn, for an optimizer: those of kernels loaded with `trainable=True`."""
        return self._bank.trainable()

    def get_model_stats(self) -> dict[str, Any]:
        """`{"total_layers": n, "layers": {name: KasminaLayer.get_layer_stats()}}`."""
        layers = {name: layer.get_layer_stats() for name, layer in self.kasmina_layers.items()}
        return {"total_layers": len(layers), "layers": layers}

    def explain(self) -> Explanation:
        """What was traced, what was not, and why. `str()` of it is a table."""
        return self._eager.explain()


def _listed(names: Mapping[str, Any]) -> str:
    shown = ", ".join(map(repr, list(names)[:8]))
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
