"""Remote control: a running model takes commands from the bus.

Commands are carried out on the subscription's thread, through the same staging as requests of the program's own: they
come into force where a forward begins, or at `commit()`. The thread that trains runs nothing of it, nor waits for it.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ValidationError

from esper.contracts.commands import CommandStatus, KasminaAction, KasminaCommandOutcome, KasminaControlCommand
from esper.contracts.messages import OonaMessage, TopicNames
from esper.errors import EsperError
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.lifecycle import LifecycleError, SeedLifecycleState
from esper.forking import reset_after_fork

if TYPE_CHECKING:
    from esper.configs import EsperConfig

__all__ = ["CommandBus", "Listener", "ListeningPlatform", "default_platform", "set_default_platform"]

_log = logging.getLogger("esper.execution")  # one part of `ESPER_LOGS`
_REMEMBERED = 4096  # commands whose outcomes are kept, to be given again
_State = SeedLifecycleState


class ModelWithLayers(Protocol):
    """A wrapped model, as far as listening is concerned."""

    kasmina_layers: Mapping[str, KasminaLayer]


class _Subscription(Protocol):
    @property
    def closed(self) -> bool: ...

    def close(self, timeout: float = ...) -> None: ...


class CommandBus(Protocol):
    """What a model needs of `OonaClient` to be steered."""

    def publish(self, topic: str, payload: BaseModel, *, trace_id: str | None = None) -> None: ...

    def subscribe(
        self, topics: str, callback: Callable[[OonaMessage], object], *, owner: object | None = None
    ) -> _Subscription: ...


class ListeningPlatform(Protocol):
    """A platform, as far as listening is concerned."""

    @property
    def oona(self) -> CommandBus: ...


_default: Callable[[EsperConfig | None], ListeningPlatform] | None = None


def set_default_platform(make: Callable[[EsperConfig | None], ListeningPlatform]) -> None:
    """What a model has that is given no platform, for its settings if it has some; `make` keeps what it makes."""
    global _default
    _default = make


def default_platform(config: EsperConfig | None = None) -> ListeningPlatform:
    """Raises ``EsperError`` if there is none, because the package's top level was not imported."""
    if _default is None:
        raise EsperError("there is no default platform: import esper, or pass `platform`")
    return _default(config)


class Listener:
    """A model's ear, made by `MorphableModel.listen`. A context manager; :meth:`close` ends it.

    It does not keep the model alive, and ends soon after the model was collected. A process that is forked does not
    listen until it asks for it. Commands are remembered by id, the last 4096 of them: one that comes again is answered
    with its first outcome.
    """

    def __init__(
        self,
        model: ModelWithLayers,
        oona: CommandBus,
        name: str | None,
        leading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.name = name
        """What commands have to name to reach this model alone."""
        self._model = weakref.ref(model)
        self._oona = oona
        self._leading = leading  # what is asked in such a block is asked of other ranks too
        self._inherited = False  # by a forked child, which has no part in what its parent carries out
        self._lock = Lock()  # of the next
        self._known: OrderedDict[str, tuple[KasminaControlCommand, KasminaCommandOutcome | None]] = OrderedDict()
        self._subscription = oona.subscribe(TopicNames.CONTROL_KASMINA_COMMANDS, self._receive, owner=model)
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Leave to the parent what is being carried out, and its answers; see `esper.forking`."""
        self._inherited = True

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether it takes no commands any more."""
        return self._subscription.closed

    def close(self, timeout: float = 2.0) -> None:
        """Take no more commands; waits up to `timeout` seconds for one that is being staged."""
        self._subscription.close(timeout)

    # -- on the subscription's thread ----------------------------------------------------------------------------------

    def _receive(self, message: OonaMessage) -> None:
        try:
            command = KasminaControlCommand.model_validate(message.payload)
        except ValidationError as error:
            self._reject_malformed(message, error)
            return
        if command.target is not None and command.target != self.name:
            return
        with self._lock:
            known = self._known.get(command.command_id)
            if known is None:
                self._known[command.command_id] = (command, None)
        if known is None:
            self._carry_out(command, message.trace_id)
        elif known[0] != command:
            reason = f"the id {command.command_id!r} was used for another command; give each one its own"
            self._publish(
                KasminaCommandOutcome.of(command, CommandStatus.DUPLICATE, reason, self.name), message.trace_id
            )
        elif known[1] is not None:
            self._publish(known[1], message.trace_id)
        # else it is being carried out, and its outcome is still to come

    def _carry_out(self, command: KasminaControlCommand, trace_id: str) -> None:
        def answer(status: CommandStatus, reason: str = "") -> None:
            if self._inherited:
                return
            outcome = KasminaCommandOutcome.of(command, status, reason, self.name)
            with self._lock:
                self._known[command.command_id] = (command, outcome)
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
            self._publish(outcome, trace_id)

        model = self._model()
        if model is None:
            answer(CommandStatus.REJECTED, "the model is gone")
            return
        if command.deadline is not None and datetime.now(UTC) > command.deadline:
            answer(CommandStatus.EXPIRED, f"the deadline was {command.deadline.isoformat()}")
            return
        layer = model.kasmina_layers.get(command.layer_name)
        if layer is None:
            answer(CommandStatus.REJECTED, _no_layer(command.layer_name, list(model.kasmina_layers)))
        elif command.seed_idx >= layer.num_seeds:
            answer(
                CommandStatus.REJECTED,
                f"layer {command.layer_name!r} has seeds 0 to {layer.num_seeds - 1}, and none of index "
                f"{command.seed_idx}",
            )
        else:
            try:
                with self._leading():
                    _ACTIONS[command.action](layer, command, answer)
            except LifecycleError as error:
                answer(CommandStatus.FAILED, str(error))
            except Exception as error:  # noqa: BLE001  # whatever it is, who sent the command has to learn of it
                _log.exception("command %s failed with an error that was not foreseen", command.command_id)
                answer(CommandStatus.FAILED, f"{type(error).__name__}: {error}")

    def _reject_malformed(self, message: OonaMessage, error: ValidationError) -> None:
        target, command_id = message.payload.get("target"), message.payload.get("command_id")
        if target is not None and target != self.name:
            return
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"this is no command: {where + ': ' if where else ''}{first['msg']}"
        _log.warning("%s (from %s)", reason, message.sender_id)
        if isinstance(command_id, str):
            outcome = KasminaCommandOutcome(
                command_id=command_id,
                status=CommandStatus.REJECTED,
                accepted=False,
                succeeded=False,
                reason=reason,
                model=self.name,
            )
            self._publish(outcome, message.trace_id)

    def _publish(self, outcome: KasminaCommandOutcome, trace_id: str) -> None:
        self._oona.publish(TopicNames.CONTROL_KASMINA_OUTCOMES, outcome, trace_id=trace_id)


# -- what is done: by the layer's control, since the layer's own methods would commit on a thread that they take for the
# -- one that runs the model

_Answer = Callable[..., None]


def _load(layer: KasminaLayer, command: KasminaControlCommand, answer: _Answer) -> None:
    seed = layer.seed(command.seed_idx)
    earlier = seed.error
    future = layer.control.load(
        seed,
        command.kernel_artifact_id or "",
        alpha=1.0 if command.alpha is None else command.alpha,
        trainable=command.trainable,
        isolate=command.isolate,
    )

    def ended(future: Future[bool]) -> None:
        reason = seed.error
        if future.result():
            answer(CommandStatus.DONE)
        elif reason is None or reason is earlier:  # not an equal one, which the same failure may have left again
            answer(CommandStatus.FAILED, "the load was called off, by what was asked later")
        else:
            answer(CommandStatus.FAILED, reason)

    future.add_done_callback(ended)


def _unload(layer: KasminaLayer, command: KasminaControlCommand, answer: _Answer) -> None:
    if layer.control.unload(layer.seed(command.seed_idx)):
        answer(CommandStatus.DONE)
    else:
        answer(CommandStatus.FAILED, f"there is nothing to unload: {_described(layer, command.seed_idx)}")


def _set_alpha(layer: KasminaLayer, command: KasminaControlCommand, answer: _Answer) -> None:
    if layer.state.lifecycle(command.seed_idx) in (_State.ACTIVE, _State.FOSSILIZED):  # of which the latter raises
        layer.control.set_alpha(layer.seed(command.seed_idx), command.alpha or 0.0)
        answer(CommandStatus.DONE)
    else:
        answer(
            CommandStatus.FAILED,
            f"{_described(layer, command.seed_idx)}: a kernel comes with its own alpha; set it once the seed is ACTIVE",
        )


def _fossilize(layer: KasminaLayer, command: KasminaControlCommand, answer: _Answer) -> None:
    if layer.control.fossilize(layer.seed(command.seed_idx)):
        answer(CommandStatus.DONE)
    else:
        answer(
            CommandStatus.FAILED,
            f"{_described(layer, command.seed_idx)}: only the kernel of a seed that is ACTIVE can be made permanent",
        )


_ACTIONS: dict[KasminaAction, Callable[[KasminaLayer, KasminaControlCommand, _Answer], Any]] = {
    KasminaAction.LOAD: _load,
    KasminaAction.UNLOAD: _unload,
    KasminaAction.SET_ALPHA: _set_alpha,
    KasminaAction.FOSSILIZE: _fossilize,
}


def _described(layer: KasminaLayer, seed: int) -> str:
    return f"seed {seed} of layer {layer.layer_name!r} is {layer.state.lifecycle(seed).name}"


def _no_layer(name: str, names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:20]))
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"there is no layer {name!r} with seeds; there are {shown}{more}"
