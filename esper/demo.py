"""`esper demo`: a small classifier of handwritten digits grows while it trains.

The host is too small for its task on purpose. In the middle of training a blueprint is submitted; training goes on
while it compiles; the kernel is loaded into the running, compiled model; its alpha rises; it learns. A control with the
same initial weights, the same batches and the same number of steps does not grow. Whatever comes out is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import esper

__all__ = ["DemoReport", "Event", "Phase", "Trace", "run_demo"]

HIDDEN = 8
RANK = 64
BATCH = 64
LEARNING_RATE = 1e-3
LAYER, SEED = "0", 0
HOST_STEPS = 3000
RAMP_STEPS = 300
GROWN_STEPS = 9000


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, scaled to [0, 1]: images `[n, 64]` float32, labels `[n]` int64; 70 % to train on."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    @classmethod
    def load(cls, seed: int) -> Digits:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images / 16.0, labels, test_size=0.3, random_state=seed, stratify=labels)
        train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
        train_y, test_y = (torch.tensor(part) for part in parts[2:])
        return cls(train_x, train_y, test_x, test_y)

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Random batches without end; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(len(self.train_x), (BATCH,), generator=generator)
            yield self.train_x[chosen], self.train_y[chosen]

    def accuracy(self, model: nn.Module) -> float:
        """Share of the test images that `model` gets right."""
        training = model.training
        model.eval()
        with torch.no_grad():
            right = (model(self.test_x).argmax(1) == self.test_y).float().mean()
        model.train(training)
        return float(right)


@dataclass
class Trace:
    """What was seen at each step: loss, alpha of the grown layer's seed, seconds."""

    loss: list[float] = field(default_factory=list)
    alpha: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Phase:
    """A named stretch of steps `[start, stop)`."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Event:
    """Something that happened to the seed, at a step and so many seconds after the start."""

    step: int
    seconds: float
    what: str


@dataclass(frozen=True)
class DemoReport:
    """Everything that the demo measured."""

    grown: Trace
    control: Trace
    phases: list[Phase]
    events: list[Event]
    artifact_id: str
    accuracy_before: float
    accuracy_after: float
    accuracy_control: float
    host_parameters: int
    kernel_parameters: int


def build_host(seed: int) -> nn.Sequential:
    """The host: 64 inputs, a narrow hidden layer, 10 classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


class Training:
    """One model, compiled, with its optimizer and its trace."""

    def __init__(self, model: esper.MorphableModel, digits: Digits, seed: int) -> None:
        self.model = model
        self.compiled: Any = torch.compile(model, backend="esper")
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        self.batches = digits.batches(seed)
        self.trace = Trace()

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.trace.loss)

    def step(self) -> None:
        """One step of training, timed."""
        images, labels = next(self.batches)
        start = time.perf_counter()
        loss = F.cross_entropy(self.compiled(images), labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.optimizer.step()
        self.trace.seconds.append(time.perf_counter() - start)
        self.trace.loss.append(loss.item())
        state = self.model.kasmina_layers[LAYER].state
        self.trace.alpha.append(state.alpha(SEED) if state.in_force(SEED) else 0.0)


class Growth:
    """The run that grows. `progress` is told the phase, its steps so far and, where it is known, how many it has."""

    def __init__(
        self, training: Training, platform: esper.Platform, progress: Callable[[str, int, int | None], None]
    ) -> None:
        self.training = training
        self.platform = platform
        self.progress = progress
        self.phases: list[Phase] = []
        self.events: list[Event] = []
        self._start = time.perf_counter()

    def note(self, what: str) -> None:
        """Something happened at the present step."""
        self.events.append(Event(self.training.steps, time.perf_counter() - self._start, what))

    def train(self, phase: str, steps: int | None = None, until: Future[Any] | None = None) -> None:
        """Train for so many steps, or until something is done elsewhere."""
        first = self.training.steps
        while self.training.steps - first < steps if steps is not None else until is not None and not until.done():
            self.training.step()
            self.progress(phase, self.training.steps - first, steps)
        done = self.training.steps - first
        self.progress(phase, done, done)
        self.phases.append(Phase(phase, first, self.training.steps))

    def load(self, artifact_id: str) -> None:
        """Load the kernel, let its alpha rise, and have the optimizer train it."""
        self.training.model.attach_optimizer(self.training.optimizer)
        request = self.training.model.request_kernel(
            LAYER, SEED, artifact_id, alpha=esper.LinearRamp(0.0, 1.0, RAMP_STEPS), trainable=True
        )
        self.train("staging", until=request)
        if not request.result():
            raise esper.EsperError(self.training.model.kasmina_layers[LAYER].seed_errors[SEED])
        self.note("kernel staged")
        self.train("first step with the kernel", steps=1)
        self.note("kernel in force, alpha rises from 0")


def run_demo(platform: esper.Platform, seed: int, progress: Callable[[str, int, int | None], None]) -> DemoReport:
    """Train, grow, train on; then train the control. Takes about a minute or two."""
    torch.set_num_threads(1)  # a second one gains nothing at these sizes and would wait for the compiler's core
    digits = Digits.load(seed)
    host = build_host(seed)
    growth = Growth(Training(esper.wrap(host, platform=platform, mode="fx"), digits, seed), platform, progress)
    training = growth.training
    growth.train("compiling the host", steps=1)
    growth.note("host compiled, every seed dormant")
    growth.train("host alone", steps=HOST_STEPS)
    before = digits.accuracy(training.model)
    blueprint = esper.Blueprint.bottleneck(64, HIDDEN, rank=RANK, start="identity", seed=seed)
    growth.note("blueprint submitted")
    compilation = platform.request(blueprint)
    growth.train("kernel compiling", until=compilation)
    kernel = compilation.result()
    growth.note("kernel validated")
    growth.load(kernel.id)
    growth.train("alpha rising", steps=RAMP_STEPS)
    growth.note("alpha is 1")
    growth.train("kernel learning", steps=GROWN_STEPS)
    control = Training(esper.wrap(build_host(seed), platform=platform, mode="fx"), digits, seed)
    while control.steps < training.steps:
        control.step()
        progress("control, without growth", control.steps, training.steps)
    return DemoReport(
        grown=training.trace,
        control=control.trace,
        phases=growth.phases,
        events=growth.events,
        artifact_id=kernel.id,
        accuracy_before=before,
        accuracy_after=digits.accuracy(training.model),
        accuracy_control=digits.accuracy(control.model),
        host_parameters=sum(parameter.numel() for parameter in host.parameters()),
        kernel_parameters=sum(parameter.numel() for parameter in training.model.seed_parameters()),
    )
