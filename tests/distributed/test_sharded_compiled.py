"""A model that `fully_shard` has sharded, under `backend="esper"`: what it computes is what it computes uncompiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import esper
from tests.compiler.agreement import put
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _gradients(run: nn.Module, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    run(x).square().sum().backward()
    return [parameter.grad.full_tensor().clone() for parameter in model.parameters()]  # type: ignore[union-attr, operator]  # a DTensor's


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_kernel_in_it_learns_as_uncompiled(
    dtype: torch.dtype | None, alone: None, shelf: KernelShelf, fresh_dynamo: None
) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    host = fully_shard(mlp(8, 6, 4), mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    model = esper.wrap(host, platform=shelf.platform, commit="manual")
    run: nn.Module = torch.compile(model, backend="esper", options={"inner": "aot_eager"})  # type: ignore[assignment]  # torch says Callable
    x = torch.randn(3, 8)
    for grown in (False, True):
        if grown:
            staged = model.request_kernel("0", 0, put(shelf), alpha=0.5, trainable=True)
            assert staged.result(100), model.kasmina_layers["0"].seed_errors
            model.commit()
        ours = _gradients(run, model, x)
        with torch.compiler.set_stance("force_eager"):
            wanted = _gradients(model, model, x)
        assert len(ours) == (8 if grown else 4)
        for one, other in zip(ours, wanted, strict=True):
            torch.testing.assert_close(one, other, **({"rtol": 0.05, "atol": 0.05} if dtype else {}))
    total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert torch.isfinite(total.full_tensor())  # type: ignore[operator]  # a DTensor's
    assert model.ranks is None, "there is nobody to agree with"
