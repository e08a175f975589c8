"""BatchSeeds: the graph before and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper.artifacts import Blueprint
from esper_passes import FoldFossils
from tests.passes.batching import TWO, apply, inlined, linear_seed, of_blueprint
from tests.passes.graphs import MLP, MarkedLinear, Shown, low_rank, low_rank_seed, low_rank_values


def test_two_seeds_of_one_blueprint_at_a_site_with_bias(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed(), low_rank_seed()]}, torch.rand(2))
    shown(module)
    module, modified = apply(module, TWO)
    assert modified
    shown(module)


def test_three_seeds_without_any_bias(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3, bias=False), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [linear_seed(seed) for seed in range(3)]}, torch.rand(3))
    module, _ = apply(module, TWO)
    shown(module)


def test_affine_kernels_and_the_host_become_one_linear_layer(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    seeds = [of_blueprint(Blueprint.affine(4, 4, bias=bias, start="kaiming")) for bias in (True, False)]
    module, _ = inlined(layer, x, {3: seeds}, torch.rand(2))
    module, _ = apply(module, TWO)
    shown(module)


def test_kernels_of_different_blueprints_share_the_last_product(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    gated = [of_blueprint(Blueprint.gated_mlp(4, 4, 3, start="kaiming", seed=seed)) for seed in range(2)]
    module, _ = inlined(layer, x, {3: [gated[0], linear_seed(0), gated[1]]}, torch.rand(3))
    module, _ = apply(module, TWO)
    shown(module)


def test_kernels_that_read_the_host_and_isolated_ones(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    kinds: Any = ({"uses_host": True}, {"uses_host": True}, {"isolate": True}, {"isolate": True, "uses_host": True})
    module, _ = inlined(layer, x, {3: [low_rank_seed(**kind) for kind in kinds]}, torch.rand(4))
    module, _ = apply(module, TWO)
    shown(module)


def test_layers_behind_the_first_are_a_batched_product(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    seeds = [of_blueprint(Blueprint.residual_mlp(4, 4, 3, start="kaiming", seed=seed)) for seed in range(2)]
    module, _ = inlined(layer, x, {3: seeds}, torch.rand(2))
    module, _ = apply(module, TWO)
    shown(module)


def test_a_site_that_is_called_twice(shown: Shown) -> None:
    layer = MarkedLinear(4, 4, 3)
    seeds = {3: [linear_seed(0), linear_seed(1)]}
    module, _ = inlined(lambda x: layer(layer(x)), torch.randn(2, 4), seeds, torch.rand(2))
    module, _ = apply(module, TWO)
    shown(module)


def test_sites_inside_and_behind_a_checkpoint(shown: Shown) -> None:
    first, second = MarkedLinear(4, 4, 2), MarkedLinear(4, 4, 9)
    seeds = {2: [linear_seed(0), linear_seed(1)], 9: [linear_seed(2), linear_seed(3)]}
    module, _ = inlined(
        lambda x: second(checkpoint(first, x, use_reentrant=False)), torch.randn(2, 4), seeds, torch.rand(4)
    )
    module, _ = apply(module, TWO)
    shown(module)


def test_a_dynamic_batch_keeps_its_symbols_and_gets_no_guard(shown: Shown) -> None:
    seeds = {5: [(low_rank(), low_rank_values(6, 4)) for _ in range(2)]}
    module, _ = inlined(MLP(), torch.randn(2, 4), seeds, torch.rand(2), dynamic=True)
    module, _ = apply(module, TWO)
    shown(module)


def test_fossils_take_part_with_their_constant_shares(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [linear_seed(seed) for seed in range(3)]}, torch.rand(3))
    module, _ = apply(module, FoldFossils({0: 1.0, 2: 0.25}), TWO)
    shown(module)


def test_frozen_kernels_stay_apart_from_those_that_learn(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4, requires_grad=True)
    blueprints = [Blueprint.low_rank(4, 4, 2, start="kaiming", seed=seed) for seed in range(4)]
    seeds = [of_blueprint(blueprint, learns=seed % 2 == 0) for seed, blueprint in enumerate(blueprints)]
    module, _ = inlined(layer, x, {3: seeds}, torch.rand(4))
    module, _ = apply(module, TWO)
    shown(module)


def test_kernels_that_end_in_no_linear_layer_are_stacked_and_summed(shown: Shown) -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    blueprint = Blueprint.from_module(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()), 4)
    module, _ = inlined(layer, x, {3: [of_blueprint(blueprint), of_blueprint(blueprint)]}, torch.rand(2))
    module, _ = apply(module, TWO)
    shown(module)
