"""Commands and their outcomes as documents: which fields go together."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from esper.contracts.commands import CommandStatus, KasminaCommandOutcome, KasminaControlCommand


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "load"},
        {"action": "set_alpha"},
        {"action": "unload", "alpha": 0.5},
        {"action": "unload", "kernel_artifact_id": "k"},
        {"action": "fossilize", "trainable": True},
        {"action": "set_alpha", "alpha": 0.5, "isolate": True},
        {"action": "set_alpha", "alpha": 0.5, "kernel_artifact_id": "k"},
        {"action": "set_alpha", "alpha": 1.5},
        {"action": "set_alpha", "alpha": float("nan")},
        {"action": "load", "kernel_artifact_id": "k", "deadline": "2030-01-01T00:00:00"},
        {"action": "load", "kernel_artifact_id": "k", "seed_idx": -1},
        {"action": "load", "kernel_artifact_id": "k", "command_id": ""},
        {"action": "load", "kernel_artifact_id": "k", "extra": 1},
        {"action": "explode"},
    ],
)
def test_fields_that_do_not_go_with_the_action_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        KasminaControlCommand.model_validate({"layer_name": "0", "seed_idx": 0, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "load", "kernel_artifact_id": "k"},
        {"action": "load", "kernel_artifact_id": "k", "alpha": 0.0, "trainable": True, "isolate": True},
        {"action": "set_alpha", "alpha": 0.0},
        {"action": "unload", "deadline": datetime.now(UTC), "target": "m"},
        {"action": "fossilize", "command_id": "mine"},
    ],
)
def test_a_command_comes_back_from_json_as_it_was(fields: dict[str, Any]) -> None:
    command = KasminaControlCommand.model_validate({"layer_name": "0", "seed_idx": 0, **fields})
    assert KasminaControlCommand.model_validate_json(command.model_dump_json()) == command


def test_an_outcome_cannot_contradict_itself() -> None:
    command = KasminaControlCommand.model_validate({"layer_name": "0", "seed_idx": 0, "action": "unload"})
    fields = KasminaCommandOutcome.of(command, CommandStatus.FAILED, "because").model_dump()
    with pytest.raises(ValidationError, match="do not agree"):
        KasminaCommandOutcome.model_validate({**fields, "succeeded": True})
