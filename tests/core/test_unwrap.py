"""What `esper.unwrap` returns: the module that was wrapped, with what was done to the wrapped model since."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import esper
from tests.core.test_parametrized_copies import CHANGES as LASTING
from tests.core.test_parametrized_copies import Change

CHANGES: dict[str, Change] = {
    **{name: LASTING[name] for name in ("weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "pruned")},
    "pruned for good": lambda layer: (prune.l1_unstructured(layer, "weight", 0.5), prune.remove(layer, "weight")),
}


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.ones(3))
        self.temperature = 1.0
        self.order = [self.body, self.head]

    def forward(self, x: Tensor) -> Tensor:
        for each in self.order:
            x = each(x)
        return x * self.gain / self.temperature


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["module", "fx"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_torchs_utilities_did_to_a_layer_is_done_to_the_hosts(change: str, mode: str) -> None:
    host = _Net()
    inner = host.body[0]
    model = esper.wrap(host, mode=mode)  # type: ignore[arg-type]  # one of the two
    model.eval()
    CHANGES[change](model.body[0])
    expected = model(X)
    assert esper.unwrap(model) is host
    assert host.body[0] is inner
    torch.testing.assert_close(host(X), expected, rtol=0, atol=0)
    assert host.state_dict().keys() == model.state_dict().keys()
    host(X).sum().backward()
    assert all(parameter.grad is not None for parameter in host.parameters())


@pytest.mark.parametrize("change", CHANGES)
def test_what_had_been_done_before_wrapping_can_be_taken_off(change: str) -> None:
    host = _Net().eval()
    CHANGES[change](host.head)
    model = esper.wrap(host)
    if parametrize.is_parametrized(model.head):
        parametrize.remove_parametrizations(model.head, "weight")
    elif change == "pruned":
        prune.remove(model.head, "weight")
    elif change == "old weight_norm":
        nn.utils.remove_weight_norm(model.head)
    expected = model(X)
    esper.unwrap(model)
    assert type(host.head) is nn.Linear
    assert sorted(name for name, _ in host.head.named_parameters()) == ["bias", "weight"]
    torch.testing.assert_close(host(X), expected)


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_parametrization_of_the_model_itself() -> None:
    model = esper.wrap(host := _Net())
    parametrize.register_parametrization(model, "gain", _Double())
    expected = model(X)
    esper.unwrap(model)
    assert isinstance(host, _Net)
    assert not isinstance(host, esper.MorphableModel)
    torch.testing.assert_close(host(X), expected)
    assert "parametrizations.gain.original" in host.state_dict()


def test_layers_hooks_and_attributes_that_were_set_later() -> None:
    model = esper.wrap(host := _Net())
    model.temperature = 0.5
    model.head = new = nn.Linear(8, 3)
    model(X)  # the site takes its place
    model.order[1] = model.head
    model.tail = nn.Dropout(0.5)
    seen: list[object] = []
    model.body.register_forward_hook(lambda module, *_: seen.append(module))
    esper.unwrap(model)
    seen.clear()
    model.eval()
    assert host.training
    torch.testing.assert_close(host(X), model(X))
    assert seen == [host.body, model.body]
    assert host.head.weight is new.weight
    assert isinstance(host.tail, nn.Dropout)
    assert host.order == [host.body, host.head]
    assert not any(isinstance(module, esper.KasminaLayer) for module in host.modules())
    del model.tail
    esper.unwrap(model)
    assert not hasattr(host, "tail")


def test_a_handle_from_before_wrapping_still_removes_its_hook() -> None:
    host, seen = _Net(), []
    handle = host.head.register_forward_hook(lambda module, *_: seen.append(module))
    model = esper.wrap(host)
    model(X)
    esper.unwrap(model)
    host(X)
    assert seen == [model.head, host.head]
    handle.remove()
    host(X)
    assert len(seen) == 2
