"""The replica: the host's modules once more, sharing its tensors, with the host left alone."""

from __future__ import annotations

import copy
import functools
import pickle
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from esper.core.replica.mutation_watch import WatchedDict, WatchedHooks
from tests.core.planting import Planted, Site, agrees, planted


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.zeros(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.fc(x)) * self.scale + self.shift


def test_names_types_and_tensors_are_the_hosts() -> None:
    host = nn.Sequential(Block(), nn.ReLU(), Block())
    case = planted(host)
    assert [name for name, _ in case.root.named_modules()] == [name for name, _ in host.named_modules()]
    assert list(case.root.state_dict()) == list(host.state_dict())
    for (name, ours), (other, theirs) in zip(case.root.named_parameters(), host.named_parameters(), strict=True):
        assert name == other
        assert ours is theirs
    for ours, theirs in zip(case.root.buffers(), host.buffers(), strict=True):
        assert ours is theirs
    assert type(case.root[0]) is Block
    assert isinstance(case.root[0].fc, Site)
    assert type(host[0].fc) is nn.Linear


def test_checkpoints_load_both_ways() -> None:
    host = nn.Sequential(Block(), Block())
    case = planted(host)
    other = nn.Sequential(Block(), Block())
    case.root.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(host[1].fc.weight, other[1].fc.weight)
    nn.Sequential(Block(), Block()).load_state_dict(case.root.state_dict(), strict=True)


def test_moves_casts_and_new_parameters_are_seen_on_both_sides() -> None:
    host = nn.Sequential(Block(), Block())
    case = planted(host)
    case.root.double()
    assert host[0].fc.weight.dtype == host[0].shift.dtype == torch.float64
    host.float()
    assert case.sites["0.fc"].weight.dtype == torch.float32
    case.root[0].scale = nn.Parameter(torch.zeros(4))
    assert host[0].scale is case.root[0].scale
    host[1].shift = torch.ones(4)
    assert case.root[1].shift is host[1].shift


def test_training_flags_children_and_hooks_are_its_own() -> None:
    host = nn.Sequential(Block(), Block()).eval()
    calls: list[str] = []
    host[0].register_forward_hook(lambda module, args, output: calls.append("old"))
    case = planted(host)
    assert not case.root.training
    case.root.train()
    assert not any(module.training for module in host.modules())
    case.root[0].register_forward_hook(lambda module, args, output: calls.append("new"))
    case.root[1] = nn.Identity()
    assert isinstance(host[1], Block)
    case.root(torch.randn(3, 4))
    assert calls == ["old", "new"]
    calls.clear()
    host(torch.randn(3, 4))
    assert calls == ["old"]


def test_hooks_of_a_target_come_along() -> None:
    host = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    host[0].register_forward_hook(lambda module, args, output: output * 2)
    host[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    agrees(host, planted(host).root, torch.randn(3, 4))
    agrees(host, planted(host).root, torch.randn(3, 4))


def test_a_module_under_several_names_stays_one() -> None:
    shared = nn.Linear(4, 4)
    host = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": shared, "c": nn.Linear(4, 4)})
    host["c"].weight = shared.weight
    case = planted(host)
    assert list(case.sites) == ["a.0", "c"]
    assert case.root["b"] is case.root["a"][0]
    assert case.root["c"].weight is case.root["b"].weight


class Referring(nn.Module):
    """Refers to its modules in every way that is followed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.block = Block()
        self.__dict__["me"] = self
        self.plain = [self.fc, {"block": self.block}]
        self.pair = (self.fc, 3)
        self.loop: list[Any] = [1]
        self.loop.append(self.loop)
        self.bound = self.block.forward
        self.partial = functools.partial(self.fc, 1)
        self.weak = weakref.ref(self.block)
        self.ordered = OrderedDict(fc=self.fc)
        self.history: list[Any] = []


def test_references_in_attributes_are_redirected() -> None:
    host = Referring()
    root = planted(host).root
    fc, block = root.fc, root.block
    assert fc is not host.fc
    assert vars(root)["me"] is root
    assert root.plain[0] is fc
    assert root.plain[1]["block"] is block
    assert root.pair == (fc, 3)
    assert root.bound.__self__ is block
    assert root.partial.func is fc
    assert root.weak() is block
    assert root.ordered["fc"] is fc
    assert root.loop is host.loop
    assert root.history is host.history
    assert host.plain[0] is host.fc
    assert host.bound.__self__ is host.block


def test_a_replaced_forward_is_kept_and_nothing_below_it_is_a_site() -> None:
    host = nn.Sequential(Block(), Block()).eval()
    original = host[0].forward
    host[0].forward = lambda x: original(x) * 3
    case = planted(host)
    assert list(case.sites) == ["1.fc"]
    assert case.root[0] is host[0]
    agrees(host, case.root, torch.randn(3, 4))


def test_parametrized_scripted_and_uninitialised_modules() -> None:
    class Symmetric(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.triu() + x.triu(1).transpose(-1, -2)

    parametrized = nn.Linear(4, 4)
    parametrize.register_parametrization(parametrized, "weight", Symmetric())
    host = nn.Sequential(parametrized, torch.jit.script(nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 4))
    case = planted(host)
    assert list(case.sites) == ["2"]
    agrees(host, case.root, torch.randn(3, 4))
    case.root[0].parametrizations.weight.original.data.mul_(2)
    agrees(host, case.root, torch.randn(3, 4))


def test_weight_norm_runs_on_the_replica() -> None:
    host = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    agrees(host, planted(host).root, torch.randn(3, 4))


def test_classes_with_slots_and_with_their_own_new() -> None:
    class Odd(nn.Module):
        __slots__ = ("extra",)

        def __new__(cls, width: int) -> Odd:
            return super().__new__(cls)

        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(width, width)
            object.__setattr__(self, "extra", 3.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) * self.extra

    host = Odd(4)
    agrees(host, planted(host).root, torch.randn(3, 4))
    agrees(host, planted(host).root, torch.randn(3, 4))


def test_load_hooks_are_called_with_the_replica() -> None:
    seen: list[nn.Module] = []
    host = nn.Sequential(Block())
    host[0].register_load_state_dict_pre_hook(lambda module, *rest: seen.append(module))
    case = planted(host)
    case.root.load_state_dict(host.state_dict())
    assert seen == [case.root[0]]


def test_watched_dictionaries_copy_as_plain_ones() -> None:
    case = planted(nn.Sequential(nn.Linear(4, 4)))
    modules, hooks = case.root._modules, case.root._forward_hooks
    assert type(modules) is WatchedDict
    assert type(hooks) is WatchedHooks
    for copied in (copy.copy(hooks), copy.deepcopy(hooks), pickle.loads(pickle.dumps(hooks))):
        assert type(copied) is OrderedDict
    assert type(copy.deepcopy(modules)) is dict


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_dynamo_traces_a_replica_as_it_traces_the_host(backend: str) -> None:
    host = nn.Sequential(Block(), nn.ModuleList([nn.Linear(4, 4)])[0], nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    host[2].register_forward_hook(lambda module, args, output: output * 2)
    case = planted(host)
    torch._dynamo.reset()
    compiled = torch.compile(case.root, backend=backend, fullgraph=True)
    x = torch.randn(3, 4)
    host.eval()
    case.root.eval()
    assert torch.allclose(compiled(x), host(x))
    case.root[2] = nn.Identity()
    assert torch.allclose(compiled(x), host[1](host[0](x)))


def encoder(case_seeds: tuple[int, ...] = ()) -> tuple[Planted, nn.Module]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    host = nn.TransformerEncoder(layer, 2).eval()
    case = planted(host)
    case.sites["layers.0.linear1"].__dict__["_seeds"] = case_seeds
    return case, host


def test_fast_path_of_encoder_layers_is_left_while_a_seed_is_active() -> None:
    x = torch.randn(2, 3, 8)
    for seeds in ((), (1,)):
        case, host = encoder(seeds)
        run = case.root
        with torch.no_grad():
            expected = host(x)
            calls: list[int] = []
            site = case.sites["layers.0.linear1"]
            site.forward = lambda x, site=site, calls=calls: calls.append(1) or Site.forward(site, x)
            assert torch.allclose(case.root(x), expected, atol=1e-6)
            assert len(calls) == len(seeds)
            if not seeds:
                assert torch.equal(case.root(x), expected)
                assert torch.equal(run(x), expected)
            padding = torch.tensor([[False, False, True], [False, False, False]])
            ours, theirs = (each(x, src_key_padding_mask=padding) for each in (case.root, host))
            assert torch.allclose(ours[~padding], theirs[~padding], atol=1e-6)
