"""The wrapped model."""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NoReturn, Self

import torch
from torch import fx, nn

from esper import torch_internals
from esper.compiler.dispatcher import report_on
from esper.compiler.report import CompileReport
from esper.core.copies.copying import ModelParts, layer_places, unpacked
from esper.core.eager import EagerExecutor
from esper.core.errors import UnknownLayerError
from esper.core.parts.learning import LearningModel
from esper.core.parts.many_layers import ManyLayers
from esper.core.parts.site_watch import SiteWatch
from esper.core.peers import join_shards
from esper.core.remote_control import Listener, ListeningPlatform, default_platform
from esper.core.replica.subclassing import undisguised
from esper.core.reports.explain import Explanation
from esper.core.wrapping import Wrapping
from esper.distributed.ranks import Ranks, RanksError
from esper.errors import shown
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.lifecycle import Transition
from esper.execution.plans.alpha import AlphaSchedule
from esper.execution.plans.model_link import ModelLink
from esper.execution.plans.runtime import Runtime
from esper.execution.seeds.active_kernels import BANK_NAME, ActiveKernels
from esper.execution.seeds.progress import KernelRequest

__all__ = ["MorphableModel", "WrappedModelLink"]

_LOG = logging.getLogger("esper.core")
_LOOK_FOR_PARAMETERS = frozenset({"torch.distributed.checkpoint.state_dict", "transformers.trainer_pt_utils"})
_POSITIONS = ((1, "prefix"), (2, "keep_vars"))  # of the arguments of state_dict()


class MorphableModel(ManyLayers, LearningModel):
    """A model whose linear layers carry seeds. Made by `esper.wrap`.

    It is an instance of the host's class too: a replica of the host that shares its parameters and buffers, with a
    :class:`KasminaLayer` in the place of each layer that carries seeds. The host's own methods run on it, and see its
    kernels among their parameters and in their state dicts. A staged change comes into force where a forward begins
    (`commit="auto"`), whichever module or method of the model that forward enters, or with `commit()`.
    """

    _eager: EagerExecutor
    _runtime_id: int
    _runtime_tag: torch.Tensor
    _run: Callable[..., Any]
    _site_watch: SiteWatch
    layer_mappings: dict[str, str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """The host's class called through a wrapped model makes a plain host; `esper.wrap` makes wrapped models."""
        kind = undisguised(cls)
        if issubclass(kind, MorphableModel):
            raise TypeError("a MorphableModel is made by esper.wrap(model)")
        return kind(*args, **kwargs)

    def _become_wrapped(
        self, wrapping: Wrapping, runtime: Runtime, tag: torch.Tensor, layers: Mapping[str, KasminaLayer]
    ) -> None:
        """Turn a replica of the host into its wrapped model."""
        self.__dict__.update(
            _wrapping=wrapping,
            _runtime_id=runtime.id,
            _root_site=layers.get(""),
            _runtime_tag=tag,
            runtime=runtime,
            kasmina_layers=MappingProxyType(dict(layers)),
            layer_mappings={name: type(linear).__name__ for name, linear in wrapping.selection.targets.items()},
        )
        self.__dict__["_site_watch"] = SiteWatch(self, runtime.note_layers_changed)

    def _run_by(self, eager: EagerExecutor) -> None:
        """Have uncompiled forwards run by `eager`."""
        self.__dict__["_eager"] = eager
        eager.attach_to(self)

    @property
    def _esper(self) -> ActiveKernels:
        """The kernels in force. No child of the model, whose own code may call all of its children one by one."""
        return self._wrapping.bank

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        """The host's modules and, below `_esper`, the kernels in force; so `parameters()` has theirs too."""
        if self._wrapping.average is not None:
            self._wrapping.average.catch_up()
        seen = set() if memo is None else memo
        yield from super().named_modules(seen, prefix, remove_duplicate)
        if not self._esper.is_empty:
            below = f"{prefix}.{BANK_NAME}" if prefix else BANK_NAME
            yield from self._esper.named_modules(seen, below, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The host's; and the kernels, for those who find parameters by children alone."""
        yield from super().named_children()
        if not self._esper.is_empty and sys._getframe(1).f_globals.get("__name__") in _LOOK_FOR_PARAMETERS:
            yield BANK_NAME, self._esper

    # -- what it computes ------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`."""
        super().train(mode)
        self._esper.train(mode)
        self._eager.refresh()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As `nn.Module.requires_grad_`; kernels that were loaded frozen take part like any parameter."""
        super().requires_grad_(requires_grad)
        self.runtime.refresh()  # what is compiled depends on it
        self._esper.follow_gradients()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self._esper._apply(fn, recurse)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """As `nn.Module.apply`; kernels in force are visited too."""
        if not self._esper.is_empty:
            self._esper.apply(fn)
        return super().apply(fn)

    # -- checkpoints and copies ------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The host's, as its class makes it, and with kernels in force their part under keys that start with `_esper.`.

        What the kernels add are tensors: their parameters, their artifacts' bytes, and the state of their seeds. Alpha
        schedules and what is staged are not in it.
        """
        self.runtime.look_for_layers(anew=True)
        state = super().state_dict(*args, **kwargs)
        prefix, keep_vars = (kwargs.get(name, args[i] if len(args) > i else "") for i, name in _POSITIONS)
        if self._esper.is_empty:
            self._esper.mark(state, prefix)
        else:
            self._esper.state_dict(destination=state, prefix=f"{prefix}{BANK_NAME}.", keep_vars=bool(keep_vars))
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
            return super().load_state_dict(state_dict, *args, **kwargs)
        bank = self._esper
        kernels = bank.read(state_dict, f"{BANK_NAME}.")
        host = OrderedDict((key, value) for key, value in state_dict.items() if not key.startswith(f"{BANK_NAME}."))
        versions = getattr(state_dict, "_metadata", None) or {}  # torch keeps them there
        said = dict(versions.get("", {}))
        dormant = bank.said_dormant(said, state_dict, f"{BANK_NAME}.")
        host._metadata = {**versions, "": bank.unmarked(said)}  # type: ignore[attr-defined]  # as above
        result = super().load_state_dict(host, *args, **kwargs)
        bank.follow_model()
        bank.follow(kernels, dormant, state_dict)
        if bank.is_empty and self._is_own(state_dict):
            _LOG.warning(
                "the state dict that was loaded is made of the model's own tensors. If torch.distributed.checkpoint "
                "filled them from a checkpoint with kernels, these were not asked for: add entries for its keys with "
                "%r to the state dict, as docs/checkpoints.md shows", f"{BANK_NAME}."
            )  # fmt: skip
        return result

    def _is_own(self, state_dict: Mapping[str, Any]) -> bool:
        """Whether `state_dict` holds the very memory of the model's parameters, so that loading it changes nothing."""
        name, mine = next(self.named_parameters(), ("", None))
        given: Any = state_dict.get(name)
        if mine is None or type(given) not in (torch.Tensor, nn.Parameter) or type(mine) is not nn.Parameter:
            return False
        return mine.device.type != "meta" and bool(given.is_set_to(mine))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        """As a part of a larger module, which may hold kernels for this one."""
        own = f"{prefix}{BANK_NAME}."
        bank = self._esper
        kernels, dormant = bank.read(state_dict, own), bank.said_dormant(metadata, state_dict, own)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        unexpected[:] = [key for key in unexpected if not key.startswith(own)]
        if not bank.is_unmarked(metadata):
            bank.follow(kernels, dormant, state_dict)

    def __prepare_scriptable__(self) -> NoReturn:
        """What `torch.jit.script` asks for."""
        raise TypeError(
            "torch.jit.script cannot compile a model that changes: script what esper.bake(model) returns, or trace the "
            "model with torch.jit.trace"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled with its kernels, without its platform: where it is loaded it has the default one.

        A deep copy is an independent wrapped model, with copies of the parameters and of the kernels in force.
        """
        return unpacked, (ModelParts(self),)

    # -- control ---------------------------------------------------------------------------------------------------

    def _layer(self, name: str) -> KasminaLayer:
        try:
            return self.kasmina_layers[name]
        except KeyError:
            raise UnknownLayerError.of(name, self.kasmina_layers) from None

    def request_kernel(
        self,
        layer_name: str,
        seed_idx: int,
        kernel_artifact_id: str,
        *,
        alpha: float | AlphaSchedule = 1.0,
        trainable: bool = False,
        isolate: bool = False,
    ) -> KernelRequest:
        """Ask for a kernel and go on training; the future tells whether it is staged, and how far it is.

        A staged kernel comes into force with the next forward (`commit="auto"`) or at `commit()`. Parameters and
        errors as for :meth:`load_kernel`.
        """
        self.runtime.look_for_layers(anew=True)
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
        self.runtime.look_for_layers(anew=True)
        layer = self._layer(layer_name)
        return await layer.load_kernel(seed_idx, kernel_artifact_id, alpha=alpha, trainable=trainable, isolate=isolate)

    def unload_kernel(self, layer_name: str, seed_idx: int) -> bool:
        """Make a seed dormant again, or cancel its load; False if there is nothing to unload.

        True means staged; see :meth:`KasminaLayer.unload_kernel` for when it is in force.
        """
        return self._layer(layer_name).unload_kernel(seed_idx)

    def set_alpha(self, layer_name: str, seed_idx: int, value_or_schedule: float | AlphaSchedule) -> None:
        """Set a seed's share in its layer's output, or a schedule (`step -> alpha`) that moves it while training.

        For a seed that has a kernel or is loading one; see :meth:`KasminaLayer.set_alpha`.
        """
        self._layer(layer_name).set_alpha(seed_idx, value_or_schedule)

    def fossilize(self, layer_name: str, seed_idx: int) -> bool:
        """Make a seed's kernel a permanent part of the model at its present alpha; False unless it is active.

        An affine kernel becomes part of the layer's weight and bias where that computes the same: if the layer has its
        weights to itself, and a bias if the kernel adds a constant; if no seed before it is active, none beside it
        reads the layer's output, and its input is not detached. Its parameters are gone then, and a checkpoint has it
        as part of the host. Any other kernel stays, of a constant share.

        True means staged, and final; see :meth:`KasminaLayer.fossilize` for when the seed is `FOSSILIZED`.
        """
        return self._layer(layer_name).fossilize(seed_idx)

    def listen(
        self, platform: ListeningPlatform | None = None, *, name: str | None = None, leading: bool = False
    ) -> Listener:
        """Take commands from the bus of `platform`, by default this model's own, until the returned listener is closed.

        They are :class:`~esper.contracts.commands.KasminaControlCommand`: those for all models, and with `name` those
        for the model of that name. Each is answered with a ``KasminaCommandOutcome``. What it changes is staged, on a
        thread of the listener's, and comes into force like what is asked here. The listener does not keep the model
        alive. To be called before training begins, as it may have to connect.

        Where several ranks train the model, every command has to reach all of them, or with `leading` the first one,
        which has the others do the same.
        """
        chosen = platform or self._wrapping.options.platform or default_platform()
        if not hasattr(chosen, "oona"):
            raise TypeError(f"platform must be one that esper.Platform makes, not {shown(chosen)}, which has no `oona`")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be the string that commands name this model by, not {shown(name)}")
        if not leading:
            return Listener(self, chosen.oona, name)
        if self.ranks is None:
            raise RanksError("the model has no other ranks to lead: wrap it with process_group=...")
        with self.ranks.leading():  # raises on another rank than the first
            return Listener(self, chosen.oona, name, self.ranks.leading)

    def commit(self) -> list[Transition]:
        """Put everything staged in force, all at once; call it between two steps. Returns what changed.

        Raises :class:`CommitError` in the middle of a forward of this model, or of a backward.

        A model that changes together with those of other ranks changes at the commit that all ranks agree on, the same
        one on all by its number; without `commit="manual"`, at the forward.
        """
        return self.runtime.commit()

    @property
    def ranks(self) -> Ranks | None:
        """The ranks with which the model changes together, if it does."""
        gate = self.runtime.gate
        return gate if isinstance(gate, Ranks) else None

    def seed_parameters(self) -> Iterator[nn.Parameter]:
        """The kernels' parameters that learn, for an optimizer: those of kernels loaded with `trainable=True`."""
        self.runtime.look_for_layers()
        return self._esper.trainable()

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

    # -- traces, in mode="fx" --------------------------------------------------------------------------------------

    @property
    def graph_module(self) -> fx.GraphModule:
        """The traced graph of the present training state, in which each site is the call of a `KasminaLayer`.

        To look at, and to run: it shares the model's modules and parameters, and a change of plan is a change of what
        its sites compute. What it is traced for, and what it does not follow, is torch.fx's contract (`docs/modes.md`).
        With `mode="module"`, and for a model that is not traced whole, there is none, as for an attribute that the
        model does not have: the `AttributeError` is torch's own, and :meth:`explain` says why, and what to do.
        """
        return self._eager.graph_module

    def retrace(self) -> None:
        """Trace the model anew where its next calls need it: Python values that it reads may have changed."""
        self._eager.retrace()

    def explain(self) -> Explanation:
        """What was traced, what was not, and why; and what is compiled by itself. `str()` of it is a table."""
        compiled = [name for name, part in self.named_modules() if torch_internals.is_compiled_in_place(part)]
        return replace(self._eager.explain(), compiled=tuple(compiled))


class WrappedModelLink(ModelLink[MorphableModel]):
    """What a runtime asks of a wrapped model."""

    def modules(self) -> Iterable[nn.Module]:
        return () if (model := self.model) is None else model.modules()

    def places(self, names: Iterable[str]) -> Mapping[str, str]:
        del names  # those of the model
        return {} if (model := self.model) is None else layer_places(model)

    def follow_layers(self) -> None:
        if (model := self.model) is not None:
            model._site_watch.follow()

    def find_peers(self) -> None:
        if (model := self.model) is not None:
            join_shards(model)

    def runs_eagerly(self) -> bool:
        return (model := self.model) is None or model._eager.runs_eagerly()
