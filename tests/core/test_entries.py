"""Law 3, wherever a forward enters the model: at the model, at a method of the host's, at one of its modules."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import esper
from tests.core.seeds import blueprint, load, outputs, states
from tests.kernel_shelf import KernelShelf

MODES = pytest.mark.parametrize("mode", ["module", "fx"])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between: Callable[[], object] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).tanh()
        if not isinstance(h, torch.fx.Proxy):
            self.between()
        result: torch.Tensor = self.second(h)
        return result

    def twice(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        self.between()
        result: torch.Tensor = self.second(h)
        return result


class Host(nn.Module):
    """A host with methods of every kind that people write."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.head = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.encoder(x))
        return result

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).square().mean()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.encoder(x)
        return result

    @torch.no_grad()
    def generate(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self(x)
        return result

    def pair(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self(x)
        self.encoder.between()
        return first, self(x)

    def stream(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        while True:
            yield self(x)

    def fit(self, x: torch.Tensor, steps: int, after: Callable[[int], object]) -> None:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        for step in range(steps):
            optimizer.zero_grad()
            self(x).square().mean().backward()
            optimizer.step()
            after(step)


def wrapped(shelf: KernelShelf, mode: str = "module", **options: Any) -> Any:
    torch.manual_seed(0)
    return esper.wrap(Host(), platform=shelf.platform, mode=mode, **options)  # type: ignore[arg-type]  # a text among the parameters


def staged(model: Any, shelf: KernelShelf, layer: str = "encoder.first", **options: Any) -> None:
    """Stage a kernel, without bringing it into force."""
    assert model.request_kernel(layer, 0, shelf.put(blueprint(8, 8)).id, **{"alpha": 0.5, **options}).result(30)
    assert states(model)[layer][0] == "LOADING"


ENTRIES: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "the model": lambda model, x: model(x),
    "forward": lambda model, x: model.forward(x),
    "a method that calls the model": lambda model, x: model.loss(x),
    "a method that calls a module": lambda model, x: model.encode(x),
    "a decorated method": lambda model, x: model.generate(x),
    "a generator": lambda model, x: next(model.stream(x)),
    "a module": lambda model, x: model.encoder(x),
    "a method of a module": lambda model, x: model.encoder.twice(x),
    "a layer": lambda model, x: model.encoder.first(x),
}


@MODES
@pytest.mark.parametrize("entry", ENTRIES)
def test_whatever_way_a_forward_enters_what_is_staged_comes_into_force(
    shelf: KernelShelf, x: torch.Tensor, entry: str, mode: str
) -> None:
    model, run = wrapped(shelf, mode), ENTRIES[entry]
    with torch.no_grad():
        dormant = run(model, x)
        staged(model, shelf)
        grown = run(model, x)
        assert states(model)["encoder.first"][0] == "ACTIVE"
        assert not torch.equal(grown, dormant)
        assert torch.equal(run(model, x), grown)


@MODES
@pytest.mark.parametrize("entry", ["a method that calls the model", "a method that calls a module", "a module"])
def test_a_schedule_moves_once_for_each_forward(shelf: KernelShelf, x: torch.Tensor, entry: str, mode: str) -> None:
    model = wrapped(shelf, mode)
    load(model, "encoder.first", 0, shelf.put(blueprint(8, 8)).id, alpha=esper.LinearRamp(0.0, 1.0, 8))
    for step in range(1, 5):
        ENTRIES[entry](model, x)
        assert model.kasmina_layers["encoder.first"].state.alpha(0) == (step - 1) / 8


class Together:
    """Stages kernels for both layers of the encoder, from another thread, when it is called for the first time."""

    def __init__(self, model: Any, shelf: KernelShelf) -> None:
        self.model, self.ids = model, shelf.put(blueprint(8, 8)).id
        self.called = 0

    def __call__(self) -> None:
        self.called += 1
        if self.called == 1:
            thread = threading.Thread(target=self._stage)
            thread.start()
            thread.join()

    def _stage(self) -> None:
        futures = [self.model.request_kernel(f"encoder.{name}", 0, self.ids, alpha=0.5) for name in ("first", "second")]
        assert all(future.result(30) for future in futures)


@pytest.mark.parametrize(
    "entry", ["the model", "a method that calls the model", "a method that calls a module", "a module",
              "a method of a module"],
)  # fmt: skip
@pytest.mark.parametrize("has_run", [True, False])
def test_what_is_staged_within_a_forward_waits_for_the_next(
    shelf: KernelShelf, x: torch.Tensor, entry: str, has_run: bool
) -> None:
    model, run = wrapped(shelf), ENTRIES[entry]
    with torch.no_grad():
        dormant = run(wrapped(shelf), x)
        if has_run:
            run(model, x)
        model.encoder.between = Together(model, shelf)
        assert torch.equal(run(model, x), dormant)
        assert states(model)["encoder.second"][0] == "LOADING"
        assert not torch.equal(run(model, x), dormant)
        assert states(model)["encoder.second"][0] == "ACTIVE"


def test_a_method_that_calls_the_model_twice_is_one_forward(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    with torch.no_grad():
        model(x)
        model.encoder.between = Together(model, shelf)
        first, second = model.pair(x)
        assert torch.equal(first, second)
        third, fourth = model.pair(x)
        assert torch.equal(third, fourth)
        assert not torch.equal(first, third)


@MODES
def test_a_method_that_trains_commits_between_its_steps(shelf: KernelShelf, x: torch.Tensor, mode: str) -> None:
    model = wrapped(shelf, mode)
    seen: list[str] = []

    def after(step: int) -> None:
        if step == 1:
            staged(model, shelf, trainable=True)
        seen.append(states(model)["encoder.first"][0])

    model.fit(x, 6, after)
    assert seen[:2] == ["DORMANT", "LOADING"]
    assert seen[-1] == "ACTIVE"


def test_what_a_method_of_the_host_sees_is_the_wrapped_model(shelf: KernelShelf) -> None:
    class Curious(Host):
        def me(self) -> nn.Module:
            return self

        def learning(self) -> list[str]:
            return [name for name, _ in self.named_parameters()]

        def save(self) -> Any:
            return self.state_dict()

    host = Curious()
    model: Any = esper.wrap(host, platform=shelf.platform)
    assert isinstance(model, Curious)
    assert isinstance(model, esper.MorphableModel)
    assert type(model).__name__ == "Curious"
    assert model.me() is model
    load(model, "head", 0, shelf.put(blueprint(8, 1)).id, alpha=0.5, trainable=True)
    assert model.learning() == [name for name, _ in model.named_parameters()]
    assert any(name.startswith("_esper.") for name in model.learning())
    assert list(model.save()) == list(model.state_dict())
    assert not any(name.startswith("_esper.") for name in host.learning())
    assert type(type(model)()) is Curious


@pytest.mark.parametrize("name", ["commit", "explain", "set_alpha", "runtime", "kasmina_layers"])
@pytest.mark.parametrize("kind", ["method", "attribute", "module"])
def test_a_host_with_a_name_of_ours_is_refused(name: str, kind: str) -> None:
    host = Host()
    if kind == "method":
        host.__class__ = type("Named", (Host,), {name: lambda self: None})
    else:
        setattr(host, name, nn.Linear(2, 2) if kind == "module" else 3)
    with pytest.raises(esper.EsperError, match=name):
        esper.wrap(host)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("what", ["the model", "loss", "encode", "a module", "a layer", "a block in place"])
def test_compiled_entries_commit(
    shelf: KernelShelf, x: torch.Tensor, what: str, inner: str, fresh_dynamo: None
) -> None:
    model = wrapped(shelf)
    options = {"inner": inner}
    if what == "a block in place":
        model.encoder.compile(backend="esper", options=options)
    part = {
        "the model": model,
        "loss": model.loss,
        "encode": model.encode,
        "a module": model.encoder,
        "a layer": model.encoder.first,
    }.get(what)
    run: Any = model if part is None else torch.compile(part, backend="esper", options=options)
    dormant = run(x)
    staged(model, shelf)
    grown = run(x)
    assert states(model)["encoder.first"][0] == "ACTIVE"
    assert not torch.allclose(grown, dormant)
    torch.testing.assert_close(run(x), grown)
    assert model.unload_kernel("encoder.first", 0)
    torch.testing.assert_close(run(x), dormant)


def test_a_layer_that_is_called_alone_commits(x: torch.Tensor, shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Linear(8, 6), platform=shelf.platform)
    dormant = outputs(model, x)
    assert list(model.kasmina_layers) == [""]
    assert isinstance(model, nn.Linear)
    assert model.request_kernel("", 0, shelf.put(blueprint(8, 6)).id, alpha=0.5).result(30)
    assert not torch.equal(outputs(model, x), dormant)
    assert states(model)[""][0] == "ACTIVE"
