"""BatchSeeds: the graph before and after, where the site is called in a special way or its kernels are special."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch.utils.checkpoint import checkpoint

from esper.artifacts import Blueprint
from esper_passes import FoldFossils
from tests.passes.batching import TWO, apply, inlined, linear_seed, of_blueprint
from tests.passes.graphs import MLP, MarkedLinear, code, low_rank, low_rank_values


def test_a_site_that_is_called_twice() -> None:
    layer = MarkedLinear(4, 4, 3)
    seeds = {3: [linear_seed(0), linear_seed(1)]}
    module, _ = inlined(lambda x: layer(layer(x)), torch.randn(2, 4), seeds, torch.rand(2))
    module, _ = apply(module, TWO)
    assert_expected_inline(
        code(module),
        """\
def forward(self, layer_weight, layer_bias, x, esper_3_0_down_weight, esper_3_0_up_weight,
        esper_3_1_down_weight, esper_3_1_up_weight, esper_alphas):
    marked = torch._C._nn.linear(x, layer_weight, layer_bias)
    cat = torch.cat([esper_3_0_down_weight, esper_3_1_down_weight])
    linear_8 = torch._C._nn.linear(x, cat, None)
    unflatten = torch.unflatten(linear_8, -1, (2, -1))
    narrow = torch.narrow(esper_alphas, 0, 0, 2)
    to_dtype = torch.ops.aten.to.dtype(narrow, torch.float32)
    pad = torch._C._nn.pad(to_dtype, (1, 0), 'constant', 1.0)
    rsub = torch.rsub(pad, 1)
    broadcast_to = torch.broadcast_to(rsub, (3, 3))
    ones_like = torch.ones_like(broadcast_to)
    tril = torch.tril(ones_like)
    triu = torch.triu(broadcast_to, 1)
    add = torch.add(triu, tril)
    prod = torch.prod(add, 1)
    mul = torch.mul(pad, prod)
    narrow_1 = torch.narrow(mul, 0, 1, 2)
    unsqueeze = torch.unsqueeze(narrow_1, -1)
    type_as_default_8 = torch.ops.aten.type_as.default(unsqueeze, unflatten)
    mul_1 = torch.mul(unflatten, type_as_default_8)
    flatten = torch.flatten(mul_1, -2)
    cat_1 = torch.cat([esper_3_0_up_weight, esper_3_1_up_weight], 1)
    linear_9 = torch._C._nn.linear(flatten, cat_1)
    select_4 = torch.select(mul, 0, 0)
    mul_2 = torch.mul(marked, select_4)
    add_1 = torch.add(linear_9, mul_2)
    marked_1 = torch._C._nn.linear(add_1, layer_weight, layer_bias)
    cat_2 = torch.cat([esper_3_0_down_weight, esper_3_1_down_weight])
    linear_10 = torch._C._nn.linear(add_1, cat_2, None)
    unflatten_1 = torch.unflatten(linear_10, -1, (2, -1))
    narrow_2 = torch.narrow(esper_alphas, 0, 0, 2)
    to_dtype_1 = torch.ops.aten.to.dtype(narrow_2, torch.float32)
    pad_1 = torch._C._nn.pad(to_dtype_1, (1, 0), 'constant', 1.0)
    rsub_1 = torch.rsub(pad_1, 1)
    broadcast_to_1 = torch.broadcast_to(rsub_1, (3, 3))
    ones_like_1 = torch.ones_like(broadcast_to_1)
    tril_1 = torch.tril(ones_like_1)
    triu_1 = torch.triu(broadcast_to_1, 1)
    add_2 = torch.add(triu_1, tril_1)
    prod_1 = torch.prod(add_2, 1)
    mul_3 = torch.mul(pad_1, prod_1)
    narrow_3 = torch.narrow(mul_3, 0, 1, 2)
    unsqueeze_1 = torch.unsqueeze(narrow_3, -1)
    type_as_default_9 = torch.ops.aten.type_as.default(unsqueeze_1, unflatten_1)
    mul_4 = torch.mul(unflatten_1, type_as_default_9)
    flatten_1 = torch.flatten(mul_4, -2)
    cat_3 = torch.cat([esper_3_0_up_weight, esper_3_1_up_weight], 1)
    linear_11 = torch._C._nn.linear(flatten_1, cat_3)
    select_5 = torch.select(mul_3, 0, 0)
    mul_5 = torch.mul(marked_1, select_5)
    add_3 = torch.add(linear_11, mul_5)
    return (add_3,)""",
    )


def test_sites_inside_and_behind_a_checkpoint() -> None:
    first, second = MarkedLinear(4, 4, 2), MarkedLinear(4, 4, 9)
    seeds = {2: [linear_seed(0), linear_seed(1)], 9: [linear_seed(2), linear_seed(3)]}
    module, _ = inlined(
        lambda x: second(checkpoint(first, x, use_reentrant=False)), torch.randn(2, 4), seeds, torch.rand(4)
    )
    module, _ = apply(module, TWO)
    assert_expected_inline(
        code(module),
        """\
def forward(self, x, first_weight, first_bias, second_weight, second_bias, esper_2_0_down_weight,
        esper_2_0_up_weight, esper_2_1_down_weight, esper_2_1_up_weight, esper_9_0_down_weight,
        esper_9_0_up_weight, esper_9_1_down_weight, esper_9_1_up_weight, esper_alphas):
    wrap_body_0 = self.wrap_body_0
    tag_activation_checkpoint = torch.ops.higher_order.tag_activation_checkpoint(wrap_body_0, x, first_weight,
        first_bias, esper_2_0_down_weight, esper_2_0_up_weight, esper_2_1_down_weight, esper_2_1_up_weight,
        esper_alphas, use_reentrant = False)
    getitem = tag_activation_checkpoint[0]
    marked = torch._C._nn.linear(getitem, second_weight, second_bias)
    cat = torch.cat([esper_9_0_down_weight, esper_9_1_down_weight])
    linear_4 = torch._C._nn.linear(getitem, cat, None)
    unflatten = torch.unflatten(linear_4, -1, (2, -1))
    narrow = torch.narrow(esper_alphas, 0, 2, 2)
    to_dtype = torch.ops.aten.to.dtype(narrow, torch.float32)
    pad = torch._C._nn.pad(to_dtype, (1, 0), 'constant', 1.0)
    rsub = torch.rsub(pad, 1)
    broadcast_to = torch.broadcast_to(rsub, (3, 3))
    ones_like = torch.ones_like(broadcast_to)
    tril = torch.tril(ones_like)
    triu = torch.triu(broadcast_to, 1)
    add = torch.add(triu, tril)
    prod = torch.prod(add, 1)
    mul = torch.mul(pad, prod)
    narrow_1 = torch.narrow(mul, 0, 1, 2)
    unsqueeze = torch.unsqueeze(narrow_1, -1)
    type_as_default_4 = torch.ops.aten.type_as.default(unsqueeze, unflatten)
    mul_1 = torch.mul(unflatten, type_as_default_4)
    flatten = torch.flatten(mul_1, -2)
    cat_1 = torch.cat([esper_9_0_up_weight, esper_9_1_up_weight], 1)
    linear_5 = torch._C._nn.linear(flatten, cat_1)
    select_2 = torch.select(mul, 0, 0)
    mul_2 = torch.mul(marked, select_2)
    add_1 = torch.add(linear_5, mul_2)
    return (add_1,)

# wrap_body_0
def forward(self, x, first_weight, first_bias, esper_2_0_down_weight, esper_2_0_up_weight,
        esper_2_1_down_weight, esper_2_1_up_weight, esper_alphas):
    marked = torch._C._nn.linear(x, first_weight, first_bias)
    cat = torch.cat([esper_2_0_down_weight, esper_2_1_down_weight])
    linear_4 = torch._C._nn.linear(x, cat, None)
    unflatten = torch.unflatten(linear_4, -1, (2, -1))
    narrow = torch.narrow(esper_alphas, 0, 0, 2)
    to_dtype = torch.ops.aten.to.dtype(narrow, torch.float32)
    pad = torch._C._nn.pad(to_dtype, (1, 0), 'constant', 1.0)
    rsub = torch.rsub(pad, 1)
    broadcast_to = torch.broadcast_to(rsub, (3, 3))
    ones_like = torch.ones_like(broadcast_to)
    tril = torch.tril(ones_like)
    triu = torch.triu(broadcast_to, 1)
    add = torch.add(triu, tril)
    prod = torch.prod(add, 1)
    mul = torch.mul(pad, prod)
    narrow_1 = torch.narrow(mul, 0, 1, 2)
    unsqueeze = torch.unsqueeze(narrow_1, -1)
    type_as_default_4 = torch.ops.aten.type_as.default(unsqueeze, unflatten)
    mul_1 = torch.mul(unflatten, type_as_default_4)
    flatten = torch.flatten(mul_1, -2)
    cat_1 = torch.cat([esper_2_0_up_weight, esper_2_1_up_weight], 1)
    linear_5 = torch._C._nn.linear(flatten, cat_1)
    select_2 = torch.select(mul, 0, 0)
    mul_2 = torch.mul(marked, select_2)
    add_1 = torch.add(linear_5, mul_2)
    return (add_1,)""",
    )


def test_a_dynamic_batch_keeps_its_symbols_and_gets_no_guard() -> None:
    seeds = {5: [(low_rank(), low_rank_values(6, 4)) for _ in range(2)]}
    module, _ = inlined(MLP(), torch.randn(2, 4), seeds, torch.rand(2), dynamic=True)
    module, _ = apply(module, TWO)
    assert_expected_inline(
        code(module),
        """\
def forward(self, up_weight, up_bias, s77, x, down_weight, esper_5_0_a, esper_5_0_b, esper_5_0_c, esper_5_1_a,
        esper_5_1_b, esper_5_1_c, esper_alphas):
    marked = torch._C._nn.linear(x, up_weight, up_bias)
    relu = marked.relu()
    marked_1 = torch._C._nn.linear(relu, down_weight, None)
    cat = torch.cat([esper_5_0_a, esper_5_1_a])
    linear_4 = torch._C._nn.linear(relu, cat, None)
    unflatten = torch.unflatten(linear_4, -1, (2, -1))
    gelu_2 = torch._C._nn.gelu(unflatten)
    narrow = torch.narrow(esper_alphas, 0, 0, 2)
    to_dtype = torch.ops.aten.to.dtype(narrow, torch.float32)
    pad = torch._C._nn.pad(to_dtype, (1, 0), 'constant', 1.0)
    rsub = torch.rsub(pad, 1)
    broadcast_to = torch.broadcast_to(rsub, (3, 3))
    ones_like = torch.ones_like(broadcast_to)
    tril = torch.tril(ones_like)
    triu = torch.triu(broadcast_to, 1)
    add = torch.add(triu, tril)
    prod = torch.prod(add, 1)
    mul = torch.mul(pad, prod)
    narrow_1 = torch.narrow(mul, 0, 1, 2)
    unsqueeze = torch.unsqueeze(narrow_1, -1)
    type_as_default_4 = torch.ops.aten.type_as.default(unsqueeze, gelu_2)
    mul_1 = torch.mul(gelu_2, type_as_default_4)
    flatten = torch.flatten(mul_1, -2)
    cat_1 = torch.cat([esper_5_0_b, esper_5_1_b], 1)
    linear_5 = torch._C._nn.linear(flatten, cat_1)
    stack = torch.stack([esper_5_0_c, esper_5_1_c])
    narrow_2 = torch.narrow(mul, 0, 1, 2)
    unsqueeze_1 = torch.unsqueeze(narrow_2, -1)
    type_as_default_5 = torch.ops.aten.type_as.default(unsqueeze_1, stack)
    mul_2 = torch.mul(stack, type_as_default_5)
    sum_1 = torch.sum(mul_2, 0)
    to_dtype_1 = torch.ops.aten.to.dtype(sum_1, torch.float32)
    add_1 = torch.add(linear_5, to_dtype_1)
    select_2 = torch.select(mul, 0, 0)
    mul_3 = torch.mul(marked_1, select_2)
    add_2 = torch.add(add_1, mul_3)
    return (add_2,)""",
    )


def test_fossils_take_part_with_their_constant_shares() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [linear_seed(seed) for seed in range(3)]}, torch.rand(3))
    module, _ = apply(module, FoldFossils({0: 1.0, 2: 0.25}), TWO)
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_down_weight, esper_3_0_up_weight,
        esper_3_1_down_weight, esper_3_1_up_weight, esper_3_2_down_weight, esper_3_2_up_weight, esper_alphas):
    select_1 = torch.select(esper_alphas, 0, 1)
    cat = torch.cat([esper_3_0_down_weight, esper_3_1_down_weight, esper_3_2_down_weight])
    linear_6 = torch._C._nn.linear(x, cat, None)
    unflatten = torch.unflatten(linear_6, -1, (3, -1))
    select_3 = torch.select(esper_alphas, 0, 0)
    to_dtype_1 = torch.ops.aten.to.dtype(select_1, torch.float32)
    full_like = torch.full_like(select_3, 0.25, dtype = torch.float32)
    stack = torch.stack([to_dtype_1, full_like])
    pad = torch._C._nn.pad(stack, (1, 0), 'constant', 1.0)
    rsub = torch.rsub(pad, 1)
    broadcast_to = torch.broadcast_to(rsub, (3, 3))
    ones_like = torch.ones_like(broadcast_to)
    tril = torch.tril(ones_like)
    triu = torch.triu(broadcast_to, 1)
    add = torch.add(triu, tril)
    prod = torch.prod(add, 1)
    mul = torch.mul(pad, prod)
    unsqueeze = torch.unsqueeze(mul, -1)
    type_as_default_6 = torch.ops.aten.type_as.default(unsqueeze, unflatten)
    mul_1 = torch.mul(unflatten, type_as_default_6)
    flatten = torch.flatten(mul_1, -2)
    cat_1 = torch.cat([esper_3_0_up_weight, esper_3_1_up_weight, esper_3_2_up_weight], 1)
    linear_7 = torch._C._nn.linear(flatten, cat_1)
    return (linear_7,)""",
    )


def test_frozen_kernels_stay_apart_from_those_that_learn() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4, requires_grad=True)
    blueprints = [Blueprint.low_rank(4, 4, 2, start="kaiming", seed=seed) for seed in range(4)]
    seeds = [of_blueprint(blueprint, learns=seed % 2 == 0) for seed, blueprint in enumerate(blueprints)]
    module, _ = inlined(layer, x, {3: seeds}, torch.rand(4))
    module, _ = apply(module, TWO)
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_down_weight, esper_3_0_up_weight,
        esper_3_1_down_weight, esper_3_1_up_weight, esper_3_2_down_weight, esper_3_2_up_weight,
        esper_3_3_down_weight, esper_3_3_up_weight, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, parameters_bias)
    cat = torch.cat([esper_3_0_down_weight, esper_3_2_down_weight])
    linear_8 = torch._C._nn.linear(x, cat, None)
    unflatten = torch.unflatten(linear_8, -1, (2, -1))
    narrow = torch.narrow(esper_alphas, 0, 0, 4)
    to_dtype = torch.ops.aten.to.dtype(narrow, torch.float32)
    pad = torch._C._nn.pad(to_dtype, (1, 0), 'constant', 1.0)
    rsub = torch.rsub(pad, 1)
    broadcast_to = torch.broadcast_to(rsub, (5, 5))
    ones_like = torch.ones_like(broadcast_to)
    tril = torch.tril(ones_like)
    triu = torch.triu(broadcast_to, 1)
    add = torch.add(triu, tril)
    prod = torch.prod(add, 1)
    mul = torch.mul(pad, prod)
    select_4 = torch.select(mul, 0, 1)
    select_5 = torch.select(mul, 0, 3)
    stack = torch.stack([select_4, select_5])
    unsqueeze = torch.unsqueeze(stack, -1)
    type_as_default_8 = torch.ops.aten.type_as.default(unsqueeze, unflatten)
    mul_1 = torch.mul(unflatten, type_as_default_8)
    flatten = torch.flatten(mul_1, -2)
    cat_1 = torch.cat([esper_3_0_up_weight, esper_3_2_up_weight], 1)
    linear_9 = torch._C._nn.linear(flatten, cat_1)
    cat_2 = torch.cat([esper_3_1_down_weight, esper_3_3_down_weight])
    linear_10 = torch._C._nn.linear(x, cat_2, None)
    unflatten_1 = torch.unflatten(linear_10, -1, (2, -1))
    select_6 = torch.select(mul, 0, 2)
    select_7 = torch.select(mul, 0, 4)
    stack_1 = torch.stack([select_6, select_7])
    unsqueeze_1 = torch.unsqueeze(stack_1, -1)
    type_as_default_9 = torch.ops.aten.type_as.default(unsqueeze_1, unflatten_1)
    mul_2 = torch.mul(unflatten_1, type_as_default_9)
    flatten_1 = torch.flatten(mul_2, -2)
    cat_3 = torch.cat([esper_3_1_up_weight, esper_3_3_up_weight], 1)
    linear_11 = torch._C._nn.linear(flatten_1, cat_3)
    select_8 = torch.select(mul, 0, 0)
    mul_3 = torch.mul(marked, select_8)
    add_1 = torch.add(linear_9, linear_11)
    add_2 = torch.add(add_1, mul_3)
    return (add_2,)""",
    )


def test_kernels_that_end_in_no_linear_layer_are_stacked_and_summed() -> None:
    from torch import nn

    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    blueprint = Blueprint.from_module(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()), 4)
    module, _ = inlined(layer, x, {3: [of_blueprint(blueprint), of_blueprint(blueprint)]}, torch.rand(2))
    module, _ = apply(module, TWO)
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_p_0_weight, esper_3_0_p_0_bias,
        esper_3_0_p_1_weight, esper_3_0_p_1_bias, esper_3_1_p_0_weight, esper_3_1_p_0_bias,
        esper_3_1_p_1_weight, esper_3_1_p_1_bias, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, parameters_bias)
    cat = torch.cat([esper_3_0_p_0_bias, esper_3_1_p_0_bias])
    cat_1 = torch.cat([esper_3_0_p_0_weight, esper_3_1_p_0_weight])
    linear_2 = torch._C._nn.linear(x, cat_1, cat)
    unflatten = torch.unflatten(linear_2, -1, (2, -1))
    layer_norm_2 = torch.layer_norm(unflatten, (4,), None, None, 1e-05)
    stack = torch.stack([esper_3_0_p_1_weight, esper_3_1_p_1_weight])
    type_as_default_4 = torch.ops.aten.type_as.default(stack, layer_norm_2)
    mul = torch.mul(layer_norm_2, type_as_default_4)
    stack_1 = torch.stack([esper_3_0_p_1_bias, esper_3_1_p_1_bias])
    type_as_default_5 = torch.ops.aten.type_as.default(stack_1, mul)
    add = torch.add(mul, type_as_default_5)
    tanh_2 = torch.tanh(add)
    narrow = torch.narrow(esper_alphas, 0, 0, 2)
    to_dtype = torch.ops.aten.to.dtype(narrow, torch.float32)
    pad = torch._C._nn.pad(to_dtype, (1, 0), 'constant', 1.0)
    rsub = torch.rsub(pad, 1)
    broadcast_to = torch.broadcast_to(rsub, (3, 3))
    ones_like = torch.ones_like(broadcast_to)
    tril = torch.tril(ones_like)
    triu = torch.triu(broadcast_to, 1)
    add_1 = torch.add(triu, tril)
    prod = torch.prod(add_1, 1)
    mul_1 = torch.mul(pad, prod)
    narrow_1 = torch.narrow(mul_1, 0, 1, 2)
    unsqueeze = torch.unsqueeze(narrow_1, -1)
    type_as_default_6 = torch.ops.aten.type_as.default(unsqueeze, tanh_2)
    mul_2 = torch.mul(tanh_2, type_as_default_6)
    sum_1 = torch.sum(mul_2, -2)
    to_dtype_1 = torch.ops.aten.to.dtype(sum_1, torch.float32)
    select_2 = torch.select(mul_1, 0, 0)
    mul_3 = torch.mul(marked, select_2)
    add_2 = torch.add(to_dtype_1, mul_3)
    return (add_2,)""",
    )
