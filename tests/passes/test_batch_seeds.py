"""BatchSeeds: the graph before and after."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline

from esper.artifacts import Blueprint
from tests.passes.batching import TWO, apply, inlined, linear_seed, of_blueprint
from tests.passes.graphs import MarkedLinear, code, low_rank_seed


def test_two_seeds_of_one_blueprint_at_a_site_with_bias() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [low_rank_seed(), low_rank_seed()]}, torch.rand(2))
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_a, esper_3_0_b, esper_3_0_c, esper_3_1_a,
        esper_3_1_b, esper_3_1_c, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, parameters_bias)
    linear = torch._C._nn.linear(x, esper_3_0_a)
    gelu = torch._C._nn.gelu(linear)
    linear_1 = torch._C._nn.linear(gelu, esper_3_0_b, esper_3_0_c)
    type_as_default = torch.ops.aten.type_as.default(linear_1, marked)
    select = torch.select(esper_alphas, 0, 0)
    type_as_default_1 = torch.ops.aten.type_as.default(select, marked)
    lerp = torch.lerp(marked, type_as_default, type_as_default_1)
    linear_2 = torch._C._nn.linear(x, esper_3_1_a)
    gelu_1 = torch._C._nn.gelu(linear_2)
    linear_3 = torch._C._nn.linear(gelu_1, esper_3_1_b, esper_3_1_c)
    type_as_default_2 = torch.ops.aten.type_as.default(linear_3, marked)
    select_1 = torch.select(esper_alphas, 0, 1)
    type_as_default_3 = torch.ops.aten.type_as.default(select_1, marked)
    lerp_1 = torch.lerp(lerp, type_as_default_2, type_as_default_3)
    return (lerp_1,)""",
    )
    module, modified = apply(module, TWO)
    assert modified
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_a, esper_3_0_b, esper_3_0_c, esper_3_1_a,
        esper_3_1_b, esper_3_1_c, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, parameters_bias)
    cat = torch.cat([esper_3_0_a, esper_3_1_a])
    linear_4 = torch._C._nn.linear(x, cat, None)
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
    cat_1 = torch.cat([esper_3_0_b, esper_3_1_b], 1)
    linear_5 = torch._C._nn.linear(flatten, cat_1)
    stack = torch.stack([esper_3_0_c, esper_3_1_c])
    narrow_2 = torch.narrow(mul, 0, 1, 2)
    unsqueeze_1 = torch.unsqueeze(narrow_2, -1)
    type_as_default_5 = torch.ops.aten.type_as.default(unsqueeze_1, stack)
    mul_2 = torch.mul(stack, type_as_default_5)
    sum_1 = torch.sum(mul_2, 0)
    to_dtype_1 = torch.ops.aten.to.dtype(sum_1, torch.float32)
    add_1 = torch.add(linear_5, to_dtype_1)
    select_2 = torch.select(mul, 0, 0)
    mul_3 = torch.mul(marked, select_2)
    add_2 = torch.add(add_1, mul_3)
    return (add_2,)""",
    )


def test_three_seeds_without_any_bias() -> None:
    layer, x = MarkedLinear(4, 4, 3, bias=False), torch.randn(2, 4)
    module, _ = inlined(layer, x, {3: [linear_seed(seed) for seed in range(3)]}, torch.rand(3))
    module, _ = apply(module, TWO)
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, x, esper_3_0_down_weight, esper_3_0_up_weight, esper_3_1_down_weight,
        esper_3_1_up_weight, esper_3_2_down_weight, esper_3_2_up_weight, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, None)
    cat = torch.cat([esper_3_0_down_weight, esper_3_1_down_weight, esper_3_2_down_weight])
    linear_6 = torch._C._nn.linear(x, cat, None)
    unflatten = torch.unflatten(linear_6, -1, (3, -1))
    narrow = torch.narrow(esper_alphas, 0, 0, 3)
    to_dtype = torch.ops.aten.to.dtype(narrow, torch.float32)
    pad = torch._C._nn.pad(to_dtype, (1, 0), 'constant', 1.0)
    rsub = torch.rsub(pad, 1)
    broadcast_to = torch.broadcast_to(rsub, (4, 4))
    ones_like = torch.ones_like(broadcast_to)
    tril = torch.tril(ones_like)
    triu = torch.triu(broadcast_to, 1)
    add = torch.add(triu, tril)
    prod = torch.prod(add, 1)
    mul = torch.mul(pad, prod)
    narrow_1 = torch.narrow(mul, 0, 1, 3)
    unsqueeze = torch.unsqueeze(narrow_1, -1)
    type_as_default_6 = torch.ops.aten.type_as.default(unsqueeze, unflatten)
    mul_1 = torch.mul(unflatten, type_as_default_6)
    flatten = torch.flatten(mul_1, -2)
    cat_1 = torch.cat([esper_3_0_up_weight, esper_3_1_up_weight, esper_3_2_up_weight], 1)
    linear_7 = torch._C._nn.linear(flatten, cat_1)
    select_3 = torch.select(mul, 0, 0)
    mul_2 = torch.mul(marked, select_3)
    add_1 = torch.add(linear_7, mul_2)
    return (add_1,)""",
    )


def test_affine_kernels_and_the_host_become_one_linear_layer() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    seeds = [of_blueprint(Blueprint.affine(4, 4, bias=bias, start="kaiming")) for bias in (True, False)]
    module, _ = inlined(layer, x, {3: seeds}, torch.rand(2))
    module, _ = apply(module, TWO)
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_linear_weight, esper_3_0_linear_bias,
        esper_3_1_linear_weight, esper_alphas):
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
    select_2 = torch.select(mul, 0, 0)
    mul_1 = torch.mul(parameters_weight, select_2)
    select_3 = torch.select(mul, 0, 1)
    mul_2 = torch.mul(esper_3_0_linear_weight, select_3)
    add_1 = torch.add(mul_1, mul_2)
    select_4 = torch.select(mul, 0, 2)
    mul_3 = torch.mul(esper_3_1_linear_weight, select_4)
    add_2 = torch.add(add_1, mul_3)
    mul_4 = torch.mul(parameters_bias, select_2)
    mul_5 = torch.mul(esper_3_0_linear_bias, select_3)
    add_3 = torch.add(mul_4, mul_5)
    linear_2 = torch._C._nn.linear(x, add_2, add_3)
    return (linear_2,)""",
    )


def test_kernels_of_different_blueprints_share_the_last_product() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    gated = [of_blueprint(Blueprint.gated_mlp(4, 4, 3, start="kaiming", seed=seed)) for seed in range(2)]
    module, _ = inlined(layer, x, {3: [gated[0], linear_seed(0), gated[1]]}, torch.rand(3))
    module, _ = apply(module, TWO)
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_gate_weight, esper_3_0_up_weight,
        esper_3_0_down_weight, esper_3_1_down_weight, esper_3_1_up_weight, esper_3_2_gate_weight,
        esper_3_2_up_weight, esper_3_2_down_weight, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, parameters_bias)
    linear_3 = torch._C._nn.linear(x, esper_3_1_down_weight)
    cat = torch.cat([esper_3_0_gate_weight, esper_3_2_gate_weight])
    linear_8 = torch._C._nn.linear(x, cat, None)
    unflatten = torch.unflatten(linear_8, -1, (2, -1))
    silu_2 = torch._C._nn.silu(unflatten)
    cat_1 = torch.cat([esper_3_0_up_weight, esper_3_2_up_weight])
    linear_9 = torch._C._nn.linear(x, cat_1, None)
    unflatten_1 = torch.unflatten(linear_9, -1, (2, -1))
    mul_2 = torch.mul(silu_2, unflatten_1)
    narrow = torch.narrow(esper_alphas, 0, 0, 3)
    to_dtype = torch.ops.aten.to.dtype(narrow, torch.float32)
    pad = torch._C._nn.pad(to_dtype, (1, 0), 'constant', 1.0)
    rsub = torch.rsub(pad, 1)
    broadcast_to = torch.broadcast_to(rsub, (4, 4))
    ones_like = torch.ones_like(broadcast_to)
    tril = torch.tril(ones_like)
    triu = torch.triu(broadcast_to, 1)
    add = torch.add(triu, tril)
    prod = torch.prod(add, 1)
    mul_3 = torch.mul(pad, prod)
    select_3 = torch.select(mul_3, 0, 1)
    select_4 = torch.select(mul_3, 0, 3)
    stack = torch.stack([select_3, select_4])
    unsqueeze = torch.unsqueeze(stack, -1)
    type_as_default_6 = torch.ops.aten.type_as.default(unsqueeze, mul_2)
    mul_4 = torch.mul(mul_2, type_as_default_6)
    flatten = torch.flatten(mul_4, -2)
    select_5 = torch.select(mul_3, 0, 2)
    mul_5 = torch.mul(linear_3, select_5)
    cat_2 = torch.cat([flatten, mul_5], -1)
    cat_3 = torch.cat([esper_3_0_down_weight, esper_3_2_down_weight, esper_3_1_up_weight], 1)
    linear_10 = torch._C._nn.linear(cat_2, cat_3)
    select_6 = torch.select(mul_3, 0, 0)
    mul_6 = torch.mul(marked, select_6)
    add_1 = torch.add(linear_10, mul_6)
    return (add_1,)""",
    )


def test_kernels_that_read_the_host_and_isolated_ones() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    kinds: Any = ({"uses_host": True}, {"uses_host": True}, {"isolate": True}, {"isolate": True, "uses_host": True})
    module, _ = inlined(layer, x, {3: [low_rank_seed(**kind) for kind in kinds]}, torch.rand(4))
    module, _ = apply(module, TWO)
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_a, esper_3_0_b, esper_3_0_c, esper_3_1_a,
        esper_3_1_b, esper_3_1_c, esper_3_2_a, esper_3_2_b, esper_3_2_c, esper_3_3_a, esper_3_3_b,
        esper_3_3_c, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, parameters_bias)
    detach = torch.detach(x)
    linear_4 = torch._C._nn.linear(detach, esper_3_2_a)
    gelu_2 = torch._C._nn.gelu(linear_4)
    select_2 = torch.select(esper_alphas, 0, 2)
    cat = torch.cat([esper_3_0_a, esper_3_1_a])
    linear_8 = torch._C._nn.linear(x, cat, None)
    unflatten = torch.unflatten(linear_8, -1, (2, -1))
    gelu_4 = torch._C._nn.gelu(unflatten)
    narrow = torch.narrow(esper_alphas, 0, 0, 3)
    to_dtype = torch.ops.aten.to.dtype(narrow, torch.float32)
    pad = torch._C._nn.pad(to_dtype, (1, 0), 'constant', 1.0)
    select_4 = torch.select(esper_alphas, 0, 0)
    full_like = torch.full_like(select_4, 0.0, dtype = torch.float32)
    full_like_1 = torch.full_like(select_4, 0.0, dtype = torch.float32)
    to_dtype_1 = torch.ops.aten.to.dtype(select_2, torch.float32)
    stack = torch.stack([full_like, full_like_1, to_dtype_1])
    pad_1 = torch._C._nn.pad(stack, (1, 0), 'constant', 1.0)
    rsub = torch.rsub(pad_1, 1)
    broadcast_to = torch.broadcast_to(rsub, (4, 4))
    ones_like = torch.ones_like(broadcast_to)
    tril = torch.tril(ones_like)
    triu = torch.triu(broadcast_to, 1)
    add_3 = torch.add(triu, tril)
    prod = torch.prod(add_3, 1)
    mul = torch.mul(pad, prod)
    narrow_1 = torch.narrow(mul, 0, 1, 2)
    unsqueeze = torch.unsqueeze(narrow_1, -1)
    type_as_default_8 = torch.ops.aten.type_as.default(unsqueeze, gelu_4)
    mul_1 = torch.mul(gelu_4, type_as_default_8)
    flatten = torch.flatten(mul_1, -2)
    select_5 = torch.select(mul, 0, 3)
    mul_2 = torch.mul(gelu_2, select_5)
    cat_1 = torch.cat([flatten, mul_2], -1)
    cat_2 = torch.cat([esper_3_0_b, esper_3_1_b, esper_3_2_b], 1)
    linear_9 = torch._C._nn.linear(cat_1, cat_2)
    stack_1 = torch.stack([esper_3_0_c, esper_3_1_c, esper_3_2_c])
    narrow_2 = torch.narrow(mul, 0, 1, 3)
    unsqueeze_1 = torch.unsqueeze(narrow_2, -1)
    type_as_default_9 = torch.ops.aten.type_as.default(unsqueeze_1, stack_1)
    mul_3 = torch.mul(stack_1, type_as_default_9)
    sum_1 = torch.sum(mul_3, 0)
    to_dtype_2 = torch.ops.aten.to.dtype(sum_1, torch.float32)
    add_4 = torch.add(linear_9, to_dtype_2)
    select_6 = torch.select(mul, 0, 0)
    mul_4 = torch.mul(marked, select_6)
    add_5 = torch.add(add_4, mul_4)
    detach_1 = torch.detach(x)
    detach_2 = torch.detach(add_5)
    linear_6 = torch._C._nn.linear(detach_1, esper_3_3_a)
    gelu_3 = torch._C._nn.gelu(linear_6)
    linear_7 = torch._C._nn.linear(gelu_3, esper_3_3_b, esper_3_3_c)
    add_2 = torch.add(detach_2, linear_7)
    type_as_default_6 = torch.ops.aten.type_as.default(add_2, marked)
    select_3 = torch.select(esper_alphas, 0, 3)
    type_as_default_7 = torch.ops.aten.type_as.default(select_3, marked)
    lerp_3 = torch.lerp(add_5, type_as_default_6, type_as_default_7)
    return (lerp_3,)""",
    )


def test_layers_behind_the_first_are_a_batched_product() -> None:
    layer, x = MarkedLinear(4, 4, 3), torch.randn(2, 4)
    seeds = [of_blueprint(Blueprint.residual_mlp(4, 4, 3, start="kaiming", seed=seed)) for seed in range(2)]
    module, _ = inlined(layer, x, {3: seeds}, torch.rand(2))
    module, _ = apply(module, TWO)
    assert_expected_inline(
        code(module),
        """\
def forward(self, parameters_weight, parameters_bias, x, esper_3_0_head_weight, esper_3_0_head_bias,
        esper_3_0_blocks_0_norm_weight, esper_3_0_blocks_0_norm_bias, esper_3_0_blocks_0_up_weight,
        esper_3_0_blocks_0_up_bias, esper_3_0_blocks_0_down_weight, esper_3_0_blocks_0_down_bias,
        esper_3_0_tail_weight, esper_3_0_tail_bias, esper_3_1_head_weight, esper_3_1_head_bias,
        esper_3_1_blocks_0_norm_weight, esper_3_1_blocks_0_norm_bias, esper_3_1_blocks_0_up_weight,
        esper_3_1_blocks_0_up_bias, esper_3_1_blocks_0_down_weight, esper_3_1_blocks_0_down_bias,
        esper_3_1_tail_weight, esper_3_1_tail_bias, esper_alphas):
    marked = torch._C._nn.linear(x, parameters_weight, parameters_bias)
    cat = torch.cat([esper_3_0_head_bias, esper_3_1_head_bias])
    cat_1 = torch.cat([esper_3_0_head_weight, esper_3_1_head_weight])
    linear_8 = torch._C._nn.linear(x, cat_1, cat)
    unflatten = torch.unflatten(linear_8, -1, (2, -1))
    layer_norm_2 = torch.layer_norm(unflatten, (3,), None, None, 1e-05)
    stack = torch.stack([esper_3_0_blocks_0_norm_weight, esper_3_1_blocks_0_norm_weight])
    type_as_default_4 = torch.ops.aten.type_as.default(stack, layer_norm_2)
    mul = torch.mul(layer_norm_2, type_as_default_4)
    stack_1 = torch.stack([esper_3_0_blocks_0_norm_bias, esper_3_1_blocks_0_norm_bias])
    type_as_default_5 = torch.ops.aten.type_as.default(stack_1, mul)
    add_2 = torch.add(mul, type_as_default_5)
    stack_2 = torch.stack([esper_3_0_blocks_0_up_weight, esper_3_1_blocks_0_up_weight])
    einsum = torch.functional.einsum('...mi,moi->...mo', add_2, stack_2)
    stack_3 = torch.stack([esper_3_0_blocks_0_up_bias, esper_3_1_blocks_0_up_bias])
    type_as_default_6 = torch.ops.aten.type_as.default(stack_3, einsum)
    add_3 = torch.add(einsum, type_as_default_6)
    gelu_2 = torch._C._nn.gelu(add_3, approximate = 'none')
    stack_4 = torch.stack([esper_3_0_blocks_0_down_weight, esper_3_1_blocks_0_down_weight])
    einsum_1 = torch.functional.einsum('...mi,moi->...mo', gelu_2, stack_4)
    stack_5 = torch.stack([esper_3_0_blocks_0_down_bias, esper_3_1_blocks_0_down_bias])
    type_as_default_7 = torch.ops.aten.type_as.default(stack_5, einsum_1)
    add_4 = torch.add(einsum_1, type_as_default_7)
    add_5 = torch.add(unflatten, add_4)
    narrow = torch.narrow(esper_alphas, 0, 0, 2)
    to_dtype = torch.ops.aten.to.dtype(narrow, torch.float32)
    pad = torch._C._nn.pad(to_dtype, (1, 0), 'constant', 1.0)
    rsub = torch.rsub(pad, 1)
    broadcast_to = torch.broadcast_to(rsub, (3, 3))
    ones_like = torch.ones_like(broadcast_to)
    tril = torch.tril(ones_like)
    triu = torch.triu(broadcast_to, 1)
    add_6 = torch.add(triu, tril)
    prod = torch.prod(add_6, 1)
    mul_1 = torch.mul(pad, prod)
    narrow_1 = torch.narrow(mul_1, 0, 1, 2)
    unsqueeze = torch.unsqueeze(narrow_1, -1)
    type_as_default_8 = torch.ops.aten.type_as.default(unsqueeze, add_5)
    mul_2 = torch.mul(add_5, type_as_default_8)
    flatten = torch.flatten(mul_2, -2)
    cat_2 = torch.cat([esper_3_0_tail_weight, esper_3_1_tail_weight], 1)
    linear_9 = torch._C._nn.linear(flatten, cat_2)
    stack_6 = torch.stack([esper_3_0_tail_bias, esper_3_1_tail_bias])
    narrow_2 = torch.narrow(mul_1, 0, 1, 2)
    unsqueeze_1 = torch.unsqueeze(narrow_2, -1)
    type_as_default_9 = torch.ops.aten.type_as.default(unsqueeze_1, stack_6)
    mul_3 = torch.mul(stack_6, type_as_default_9)
    sum_1 = torch.sum(mul_3, 0)
    to_dtype_1 = torch.ops.aten.to.dtype(sum_1, torch.float32)
    add_7 = torch.add(linear_9, to_dtype_1)
    select_2 = torch.select(mul_1, 0, 0)
    mul_4 = torch.mul(marked, select_2)
    add_8 = torch.add(add_7, mul_4)
    return (add_8,)""",
    )
