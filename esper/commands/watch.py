"""`esper watch`: layers and seeds of the models that train, live from the bus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from esper.commands.output import AsJson
from esper.configs import load_config
from esper.contracts.messages import HealthSignal, OonaMessage, SeedReport, TopicNames
from esper.errors import EsperError
from esper.services.parts import open_bus

__all__ = ["watch"]

_TOPICS = (
    TopicNames.TELEMETRY_SEED_HEALTH,
    TopicNames.INNOVATION_FIELD_REPORTS,
    TopicNames.COMPILATION_KERNEL_READY,
    TopicNames.SYSTEM_EVENTS_EPOCH,
)
_REFRESH = 0.5
_EVENTS = 8
_QUIET_AFTER = 30.0


@dataclass
class _Board:
    """What is shown: the last signal of each layer, and the last events."""

    layers: dict[tuple[str, int, str], tuple[HealthSignal, float]] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)

    def note(self, message: OonaMessage) -> None:
        """Raises pydantic's ``ValidationError`` for a payload that is not its topic's."""
        at = message.timestamp.astimezone().strftime("%H:%M:%S")
        if message.topic == TopicNames.TELEMETRY_SEED_HEALTH:
            signal = HealthSignal.model_validate(message.payload)
            self.layers[message.sender_id, signal.layer_id, signal.layer_name] = (signal, time.monotonic())
        elif message.topic == TopicNames.INNOVATION_FIELD_REPORTS:
            report = SeedReport.model_validate(message.payload)
            self._event(f"{at} {report.layer_name} seed {report.seed_idx}: {report.state} {report.reason}")
        else:
            told = ", ".join(f"{name} {value}" for name, value in message.payload.items())
            self._event(f"{at} {message.topic}: {told}")

    def _event(self, text: str) -> None:
        self.events = [*self.events, text][-_EVENTS:]

    def __rich__(self) -> Group:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("model", "no.", "layer", "seeds", "latency, μs", "cache hits", "errors", "MiB", "seen"):
            table.add_column(column, overflow="fold")
        for (sender, *_), (signal, seen) in sorted(self.layers.items(), key=lambda item: item[0]):
            age = time.monotonic() - seen
            table.add_row(
                Text(sender), str(signal.layer_id), Text(signal.layer_name),
                f"{signal.active_seed_count} of {signal.seed_count}",
                f"{signal.avg_execution_latency_μs:.1f}", f"{signal.cache_hit_rate:.0%}", str(signal.error_count),
                f"{signal.memory_usage_mb:.2f}", f"{age:.0f} s ago", style="dim" if age > _QUIET_AFTER else None,
            )  # fmt: skip
        shown = table if self.layers else Text("no layer has sent a signal yet; one comes every 100 executions")
        return Group(shown, "", *(Text(event, style="dim") for event in self.events))


def watch(
    seconds: Annotated[float | None, typer.Option(min=0, help="End after that time; by default at Ctrl-C.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show layers, seeds and events of all models that publish to redis.url, as they come."""
    config = load_config()
    if config.redis.url is None:
        raise EsperError("there is nothing to watch: set redis.url (or ESPER_REDIS__URL) to the bus of the models")
    bus = open_bus(config)
    subscription = bus.subscribe(_TOPICS)
    deadline = None if seconds is None else time.monotonic() + seconds
    board = _Board()

    def messages() -> Iterable[OonaMessage]:
        left = _REFRESH if deadline is None else min(_REFRESH, max(0.0, deadline - time.monotonic()))
        return subscription.receive(timeout=left)

    try:
        if as_json:
            while deadline is None or time.monotonic() < deadline:
                for message in messages():
                    typer.echo(message.model_dump_json())
        else:
            _show(board, messages, deadline)
    except KeyboardInterrupt:
        pass
    finally:
        bus.close()


def _show(board: _Board, messages: Callable[[], Iterable[OonaMessage]], deadline: float | None) -> None:
    with Live(board, console=Console(), refresh_per_second=1 / _REFRESH) as live:
        while deadline is None or time.monotonic() < deadline:
            for message in messages():
                try:
                    board.note(message)
                except ValidationError as error:
                    board.events.append(f"a message of {message.topic} cannot be read: {error.error_count()} errors")
            live.refresh()
