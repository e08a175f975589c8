"""The wrapped model."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn

from esper.compiler.dispatcher import report_on
from esper.compiler.report import CompileReport
from esper.core.eager import EagerExecutor
from esper.core.errors import UnknownLayerError
from esper.core.explain import Explanation
from esper.core.listening import Listener, ListeningPlatform, default_platform
from esper.core.persistence import PackedModel, is_hooks
from esper.core.targets import Selection
from esper.core.watched import signal_of
from esper.core.wrap_options import WrapOptions
from esper.execution import site_marker
from esper.execution.alpha import AlphaSchedule
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.kernel_bank import BANK_NAME, KernelBank
from esper.execution.lifecycle import Transition
from esper.execution.plan import Plan
from esper.execution.runtime import Runtime
from esper.execution.site_marker import commit_while_tracing, traced_by_esper
from esper.execution.staging import Stager
from esper_passes import TAGGED_ENTER

__all__ = ["MorphableModel"]

_SHARED = (  # with the root, so that what is registered on one is seen by the other
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_ITS_OWN = ("_run", "training", "forward", "_compiled_call_impl")  # attributes that are not set for the root as well
_POSITIONS = ((1, "prefix"), (2, "keep_vars"))  # of the arguments of state_dict()


class MorphableModel(nn.Module):
    """A model whose linear layers carry seeds. Made by `esper.wrap`.

    It has the host's parameters, buffers, submodule names, hooks and attributes. `forward` is the host's, with the
    kernels that are in force. A staged change comes into force where a forward begins (`commit="auto"`), or with
    `commit()`.
    """

    _root: nn.Module
    _host: nn.Module
    _bank: KernelBank
    _eager: EagerExecutor
    _selection: Selection
    _options: WrapOptions
    _runtime_id: int
    _runtime_tag: torch.Tensor
    _run: Callable[..., Any]
    runtime: Runtime
    kasmina_layers: Mapping[str, KasminaLayer]
    layer_mappings: dict[str, str]

    def __init__(
        self,
        host: nn.Module,
        root: nn.Module,
        runtime: Runtime,
        stager: Stager,
        layers: Mapping[str, KasminaLayer],
        eager: EagerExecutor,
        selection: Selection,
        options: WrapOptions,
    ) -> None:
        super().__init__()
        own = self.__dict__
        own.update({name: root.__dict__[name] for name in (*_SHARED, "_is_full_backward_hook")})
        for name, value in root.__dict__.items():
            if is_hooks(name, value) and name not in _SHARED:
                own[name] = OrderedDict(value) if isinstance(value, OrderedDict) else dict(value)
        own["_modules"] = dict(root._modules)
        own["training"] = root.training
        own.update(
            _host=host,
            _root=root,
            _bank=KernelBank(runtime, stager, layers),
            _eager=eager,
            _selection=selection,
            _options=options,
            _runtime_id=runtime.id,
            _runtime_tag=runtime.tag,
            runtime=runtime,
            kasmina_layers=MappingProxyType(dict(layers)),
            layer_mappings={name: type(linear).__name__ for name, linear in selection.targets.items()},
        )
        runtime.is_training = lambda: self.training
        runtime.on_commit = self._hold_kernels
        runtime.uses_of = self._uses_of
        eager.attach_to(self)
        signal = signal_of(root)
        if signal is not None:
            signal.listen(self._mirror)

    def _mirror(self) -> None:
        """A child of the root was set, added or deleted, perhaps by a method of the host: have the same children."""
        bank = {BANK_NAME: self._bank} if BANK_NAME in self._modules else {}
        self._modules.clear()
        self._modules.update({**self._root._modules, **bank})

    def _uses_of(self, parameter: torch.Tensor) -> int:
        return sum(each is parameter for module in self._root.modules() for each in module._parameters.values())

    def _hold_kernels(self, plan: Plan) -> None:
        """Register the kernels of `plan`; a dormant model has the host's modules and no others."""
        self._bank.sync(plan)
        if self._bank.is_empty:
            self._modules.pop(BANK_NAME, None)
        else:
            self._modules[BANK_NAME] = self._bank

    # -- what it computes ------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's forward."""
        if torch.compiler.is_dynamo_compiling():
            if traced_by_esper():
                TAGGED_ENTER(self._runtime_tag)
            else:
                commit_while_tracing(self._runtime_id)  # before Dynamo reads, and guards on, the next two
                if self.runtime.scheduled or self.runtime.pending:  # the second only inside a backward
                    site_marker.enter_uncompiled(self._runtime_id)
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
            if root is None or name == "__deepcopy__":  # which `torch.compile`'s modules would take for their own
                raise
            return getattr(root, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """A submodule, parameter or plain attribute of the host is set for both views of the model.

        A private attribute that the host does not have stays with this module: `torch.compile` keeps notes in some.
        """
        super().__setattr__(name, value)
        root = self.__dict__.get("_root")
        if root is None or name in _ITS_OWN or (name.startswith("_") and not hasattr(root, name)):
            return
        setattr(root, name, value)

    def __delattr__(self, name: str) -> None:
        """Deleted for both views of the model."""
        own = name in self.__dict__ or any(
            name in self.__dict__[kind] for kind in ("_parameters", "_buffers", "_modules")
        )
        if own:
            super().__delattr__(name)
        if not own or name in self._root.__dict__ or name in self._root._modules:  # the other dictionaries are shared
            delattr(self._root, name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As `nn.Module.add_module`."""
        self._root.add_module(name, module)
        if signal_of(self._root) is None:
            super().add_module(name, module)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As `nn.Module.requires_grad_`; kernels that were loaded frozen take part like any parameter."""
        if requires_grad:
            self._bank.own_memory()
        super().requires_grad_(requires_grad)
        self.runtime.refresh()  # what is compiled depends on it
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if BANK_NAME not in self._modules:
            self._bank._apply(fn, recurse)
        return self

    # -- checkpoints and copies ------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The host's, as its class makes it, and with kernels in force their part under keys that start with `_esper.`.

        What the kernels add are tensors: their parameters, their artifacts' bytes, and the state of their seeds. Alpha
        schedules and what is staged are not in it.
        """
        state = self._root.state_dict(*args, **kwargs)
        if not self._bank.is_empty:
            prefix, keep_vars = (kwargs.get(name, args[i] if len(args) > i else "") for i, name in _POSITIONS)
            self._bank.state_dict(destination=state, prefix=f"{prefix}{BANK_NAME}.", keep_vars=bool(keep_vars))
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint of the host or of a wrapped model; between two steps.

        A checkpoint of the host leaves the kernels in force as they are. One with kernels makes the model what the
        saved one was: it brings its kernels into force before it returns, whatever the commit mode, and other seeds
        are dormant then. Neither needs a platform.

        Raises :class:`CheckpointError` for kernels that are damaged or do not fit, with nothing changed; `CommitError`
        inside a backward; and what the host raises. The kernels come into force only if the host's part was loaded.
        """
        if not isinstance(state_dict, Mapping):
            return self._root.load_state_dict(state_dict, *args, **kwargs)
        kernels = self._bank.read(state_dict, f"{BANK_NAME}.")
        host = OrderedDict((key, value) for key, value in state_dict.items() if not key.startswith(f"{BANK_NAME}."))
        if hasattr(state_dict, "_metadata"):
            host._metadata = state_dict._metadata  # type: ignore[attr-defined]  # torch keeps versions there
        result = self._root.load_state_dict(host, *args, **kwargs)
        self._bank.follow_model()
        if kernels:
            self._bank.restore(kernels)
        return result

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """As a part of a larger module; the kernels are loaded when their bank's turn comes."""
        own = f"{prefix}{BANK_NAME}."
        if self._bank.expect(state_dict, own):
            self._modules[BANK_NAME] = self._bank
        self._root._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        unexpected[:] = [key for key in unexpected if not key.startswith(own)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled with its kernels, without its platform: where it is loaded it has the default one.

        A deep copy is an independent wrapped model, with copies of the parameters and of the kernels in force.
        """
        return PackedModel.unpack, (PackedModel.of(self),)

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

        Raises `KeyError` for an unknown layer and `IndexError` for a seed that does not exist. A kernel that is unknown
        or does not fit makes this return False and leaves the model as it was.
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
        """Make a seed's kernel a permanent part of the model at its present alpha; False unless it is active.

        An affine kernel becomes part of the layer's weight and bias where that computes the same: if the layer has its
        weights to itself, and a bias if the kernel adds a constant; if no seed before it is active, none beside it
        reads the layer's output, and its input is not detached. Its parameters are gone then, and a checkpoint has it
        as part of the host. Any other kernel stays, of a constant share.
        """
        return self._layer(layer_name).fossilize(seed_idx)

    def listen(self, platform: ListeningPlatform | None = None, *, name: str | None = None) -> Listener:
        """Take commands from the bus of `platform`, by default this model's own, until the returned listener is closed.

        They are :class:`~esper.contracts.commands.KasminaControlCommand`: those for all models, and with `name` those
        for the model of that name. Each is answered with a ``KasminaCommandOutcome``. What it changes is staged, on a
        thread of the listener's, and comes into force like what is asked here. The listener does not keep the model
        alive. To be called before training begins, as it may have to connect.
        """
        chosen = platform or self._options.platform or default_platform()
        return Listener(self, chosen.oona, name)

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

    def compile_report(self) -> CompileReport:
        """What `torch.compile(..., backend="esper")` did for this model. `str()` of it is a table.

        Its graphs, their variants, where each came from, and what that took.
        """
        names = {layer.site: name for name, layer in self.kasmina_layers.items()}
        return report_on(self.runtime.executors(), names)

    def explain(self) -> Explanation:
        """What was traced, what was not, and why. `str()` of it is a table."""
        return self._eager.explain()


def _listed(names: Mapping[str, Any]) -> str:
    shown = ", ".join(map(repr, list(names)[:8]))
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
