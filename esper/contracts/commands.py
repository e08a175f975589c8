"""Commands that steer a running model, and what is answered to them. Frozen; unknown keys are refused."""

from __future__ import annotations

import uuid
from enum import StrEnum
from typing import Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, model_validator

__all__ = ["CommandStatus", "KasminaAction", "KasminaCommandOutcome", "KasminaControlCommand"]


class KasminaAction(StrEnum):
    """What can be done to a seed. A member is its own string."""

    LOAD = "load"
    """Load `kernel_artifact_id` into the seed; `alpha`, `trainable` and `isolate` as for `load_kernel`."""
    UNLOAD = "unload"
    """Make the seed dormant again, or cancel its load."""
    SET_ALPHA = "set_alpha"
    """Set the share of the seed's kernel to `alpha`."""
    FOSSILIZE = "fossilize"
    """Make the seed's kernel a permanent part of the model."""


class CommandStatus(StrEnum):
    """How a command ended. A member is its own string."""

    DONE = "done"
    """Staged: in force with the model's next forward, or at its `commit()` if it was wrapped so."""
    FAILED = "failed"
    """It was tried, and the model is as it was; the reason says why."""
    EXPIRED = "expired"
    """It came after its deadline, and was not tried."""
    DUPLICATE = "duplicate"
    """Its id was used before for another command, and it was not tried."""
    REJECTED = "rejected"
    """It names something that the model does not have, or is no command; it was not tried."""


_TRIED = frozenset({CommandStatus.DONE, CommandStatus.FAILED})
_FIELDS_OF_LOAD = ("kernel_artifact_id", "alpha", "trainable", "isolate")
_FIELDS = {
    KasminaAction.LOAD: frozenset(_FIELDS_OF_LOAD),
    KasminaAction.SET_ALPHA: frozenset({"alpha"}),
}
_REQUIRED = {KasminaAction.LOAD: "kernel_artifact_id", KasminaAction.SET_ALPHA: "alpha"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KasminaControlCommand(_Frozen):
    """`control.kasmina.commands`: what is to be done to one seed of every model that listens, or of those of one name.

    Sent again with the same content, it is done once.
    """

    command_id: str = Field(default_factory=lambda: uuid.uuid4().hex, min_length=1, max_length=200)
    """Another one for each command; outcomes name it."""
    action: KasminaAction
    layer_name: str = Field(min_length=1)
    """The layer's dotted name in the host."""
    seed_idx: int = Field(ge=0)
    kernel_artifact_id: str | None = Field(default=None, min_length=1)
    """To load: a full id, a unique prefix of at least 12 hex digits, or a registered name."""
    alpha: float | None = Field(default=None, ge=0, le=1)
    """The kernel's share in the layer's output. To set, or to load with, where None is 1."""
    trainable: bool = False
    """To load: whether the kernel's parameters learn."""
    isolate: bool = False
    """To load: whether the host gets no gradient through the kernel."""
    deadline: AwareDatetime | None = None
    """With a time zone. A model that takes the command up later does not carry it out."""
    target: str | None = Field(default=None, min_length=1)
    """The name under which a model listens; None is for all."""

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        required = _REQUIRED.get(self.action)
        if required is not None and getattr(self, required) is None:
            raise ValueError(f"to {self.action} needs {required}")
        for name in _FIELDS_OF_LOAD:
            given = getattr(self, name) not in (None, False)
            if given and name not in _FIELDS.get(self.action, frozenset()):
                raise ValueError(f"{name} does not go with {self.action}; leave it out")
        return self


class KasminaCommandOutcome(_Frozen):
    """`control.kasmina.outcomes`: what became of a command at one model."""

    command_id: str
    status: CommandStatus
    accepted: bool
    """Whether it was tried."""
    succeeded: bool
    """Whether it is done."""
    reason: str = ""
    """In a sentence, if it is not done."""
    layer: str | None = None
    seed: int | None = None
    model: str | None = None
    """The name under which the model listens, if it has one; the envelope's `sender_id` names the process."""

    @model_validator(mode="after")
    def _check_status(self) -> Self:
        if self.accepted != (self.status in _TRIED) or self.succeeded != (self.status is CommandStatus.DONE):
            raise ValueError(f"accepted and succeeded do not agree with status {self.status}")
        return self

    @classmethod
    def of(
        cls, command: KasminaControlCommand, status: CommandStatus, reason: str = "", model: str | None = None
    ) -> Self:
        """The answer to `command`."""
        return cls(
            command_id=command.command_id,
            status=status,
            accepted=status in _TRIED,
            succeeded=status is CommandStatus.DONE,
            reason=reason,
            layer=command.layer_name,
            seed=command.seed_idx,
            model=model,
        )
