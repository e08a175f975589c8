"""Scenarios of training on several ranks, each beside one process that sees all batches."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import esper
from esper import Blueprint
from tests.core.seeds import blueprint, load, states
from tests.distributed.ranks import Rank
from tests.models import mlp


def _batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(4, 8, generator=generator), torch.randn(4, 4, generator=generator)


def _loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (model(x) - y).square().mean()


def _add_kernels(optimizer: torch.optim.Optimizer, model: esper.MorphableModel) -> None:
    known = {id(each) for group in optimizer.param_groups for each in group["params"]}
    new = [each for each in model.seed_parameters() if id(each) not in known]
    if new:
        optimizer.add_param_group({"params": new})


class _Swaps:
    """What is asked for before which step, and that it is in force at once: all ranks stand still meanwhile."""

    def __init__(self, here: Rank, model: esper.MorphableModel) -> None:
        self._model = model
        self._at_block = not isinstance(model.kasmina_layers["0"], nn.Linear)
        first = Blueprint.deepen(8, 6, 5) if self._at_block else blueprint(start="identity")
        self._first = here.shelf.put(first).id
        self._other = here.shelf.put(Blueprint.widen(8, 6, 3, activation="tanh", start="kaiming")).id
        self._second = here.shelf.put(blueprint(6, 4, seed=2)).id

    def before(self, step: int) -> None:
        model = self._model
        if step == 3:
            assert model.request_kernel("0", 0, self._first, trainable=True).result(30)
        elif step == 6:
            assert model.request_kernel("2", 1, self._second, trainable=True, alpha=0.5).result(30)
        elif step == 9 and self._at_block:
            assert model.request_kernel("0", 0, self._other, trainable=True, alpha=0.5).result(30)
        elif step == 12:
            assert model.unload_kernel("2", 1)


def _trained(here: Rank, wrap: Any, steps: int = 16, at_block: bool | str = False, **how: Any) -> Any:
    """Train with swaps; returns the largest difference of parameters among ranks, and to one process alone."""
    torch.manual_seed(0)
    host = mlp(8, 6, 4)
    if at_block:
        host[0] = Broken(host[0], nn.Tanh()) if at_block == "broken" else nn.Sequential(host[0], nn.Tanh())
    alone = esper.wrap(copy.deepcopy(host), ["0", "2"], platform=here.shelf.platform)
    model, run = wrap(here, host)
    _run(here, model, run, steps, **how)
    _run(here, alone, alone, steps, alone=True)
    mine, theirs = (torch.cat([_whole(each).reshape(-1) for each in part.parameters()]) for part in (model, alone))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in alone.named_parameters()]
    others = [torch.empty_like(mine) for _ in range(here.size)]
    torch.distributed.all_gather(others, mine)
    between = max(float((each - others[0]).abs().max()) for each in others)
    return {
        "between": between,
        "alone": float((mine - theirs).abs().max()),
        "states": states(model),
        "flips": [_seen.pop(id(each))["flips"] for each in (model, alone)],
        "norms": max(
            abs(a - b) for a, b in zip(*(_seen.pop(f"norms {id(each)}") for each in (model, alone)), strict=True)
        ),
    }


_seen: dict[Any, Any] = {}


def _norms(model: esper.MorphableModel) -> torch.Tensor:
    """Those of all gradients, step by step."""
    return torch.tensor(_seen.pop(f"norms {id(model)}"))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach()


def _run(here: Rank, model: Any, run: Any, steps: int, alone: bool = False, accumulate: bool = False) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    swaps = _Swaps(here, model)
    plans, norms = [], []
    for step in range(steps):
        swaps.before(step)
        if step == 12 and not alone:
            _wait_for_unload(model)
        optimizer.zero_grad()
        if alone:
            batches = [_batch(step, rank) for rank in range(here.size)]
            x, y = (torch.cat(each) for each in zip(*batches, strict=True))
            _loss(run, x, y).backward()
        elif accumulate:
            x, y = _batch(step, here.rank)
            with _without_sync(run):
                (_loss(run, x[:2], y[:2]) / 2).backward()
            (_loss(run, x[2:], y[2:]) / 2).backward()
        else:
            _loss(run, *_batch(step, here.rank)).backward()
        plans.append(model.runtime.plan)
        _add_kernels(optimizer, model)
        norms.append(float(_whole(nn.utils.clip_grad_norm_(model.parameters(), 0.5))))
        optimizer.step()
    flips = [step for step in range(1, steps) if plans[step] is not plans[step - 1]]
    _seen.update({id(model): {"flips": flips}, f"norms {id(model)}": norms})


@contextlib.contextmanager
def _without_sync(run: Any) -> Iterator[None]:
    if hasattr(run, "no_sync"):
        with run.no_sync():
            yield
    else:
        run.set_requires_gradient_sync(False)
        yield
        run.set_requires_gradient_sync(True)


def _wait_for_unload(model: esper.MorphableModel) -> None:
    """An unload has no future; no forward is begun meanwhile, so that it comes with the next one."""
    end = time.monotonic() + 30
    while model.ranks.agreed is None:
        assert time.monotonic() < end
        time.sleep(0.001)


def _ddp(here: Rank, host: nn.Module, **options: Any) -> Any:
    model = esper.wrap(host, ["0", "2"], platform=here.shelf.platform)
    return model, DistributedDataParallel(model, **options)


def ddp(here: Rank) -> Any:
    return _trained(here, _ddp)


def ddp_at_a_block(here: Rank) -> Any:
    return _trained(here, _ddp, at_block=True)


class Broken(nn.Sequential):
    """A block whose graph is broken."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self[0](x)
        torch._dynamo.graph_break()
        return self[1](x)


def ddp_with_backend_at_a_broken_block(here: Rank) -> Any:
    return _trained(here, _ddp_with_backend, at_block="broken")


def ddp_with_backend_at_a_block(here: Rank) -> Any:
    return _trained(here, _ddp_with_backend, at_block=True)


def fsdp_at_a_block(here: Rank) -> Any:
    return _trained(here, _fsdp, at_block=True)


def ddp_that_accumulates(here: Rank) -> Any:
    return _trained(here, _ddp, accumulate=True)


def ddp_around_a_part(here: Rank) -> Any:
    def wrap(here: Rank, host: nn.Module) -> Any:
        model = esper.wrap(host, platform=here.shelf.platform)
        return model, DistributedDataParallel(nn.Sequential(nn.Identity(), model))

    return _trained(here, wrap)


def _ddp_with_backend(here: Rank, host: nn.Module) -> Any:
    model, run = _ddp(here, host)
    return model, torch.compile(run, backend="esper", options={"inner": "aot_eager"})


def ddp_with_backend(here: Rank) -> Any:
    return _trained(here, _ddp_with_backend)


def ddp_made_with_a_kernel_in_force(here: Rank) -> Any:
    """The kernel that is there when DDP is made can leave, and learns as the others do."""
    model = esper.wrap(mlp(8, 6, 4), platform=here.shelf.platform)
    load(model, "0", 0, here.shelf.put(blueprint()).id, trainable=True)
    run = DistributedDataParallel(model)
    _loss(run, *_batch(0, here.rank)).backward()
    mine = [each.grad for each in model.seed_parameters()]
    others = [torch.empty_like(mine[0]) for _ in range(here.size)]
    torch.distributed.all_gather(others, mine[0])
    assert model.unload_kernel("0", 0)
    _wait_for_unload(model)
    for step in range(3):
        _loss(run, *_batch(step, here.rank)).backward()
    return {"equal": all(torch.equal(each, others[0]) for each in others), "states": states(model)["0"][0]}


def _sharded(module: nn.Module, **options: Any) -> nn.Module:
    """As the tutorials do it: the parts first, then the whole."""
    for each in list(module.children()):
        if any(True for _ in each.parameters()):
            fully_shard(each, **options)
    return fully_shard(module, **options)


def _fsdp(here: Rank, host: nn.Module, before: bool = False, **options: Any) -> Any:
    host = _sharded(host, **options) if before else host
    model = esper.wrap(host, ["0", "2"], platform=here.shelf.platform)
    if not before:
        _sharded(model, **options)
    return model, model


def fsdp(here: Rank) -> Any:
    return _trained(here, _fsdp)


def fsdp_before_wrapping(here: Rank) -> Any:
    return _trained(here, lambda here, host: _fsdp(here, host, before=True))


def fsdp_that_accumulates(here: Rank) -> Any:
    return _trained(here, _fsdp, accumulate=True)


def hsdp(here: Rank) -> Any:
    mesh = init_device_mesh("cpu", (2, here.size // 2), mesh_dim_names=("replicate", "shard"))
    return _trained(here, lambda here, host: _fsdp(here, host, mesh=mesh))


def fsdp_in_bfloat16(here: Rank) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return _trained(here, lambda here, host: _fsdp(here, host, mp_policy=policy))


def _in_parallel(here: Rank, module: nn.Module) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (here.size,))
    return parallelize_module(module, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _parallel_later(here: Rank, use: Any, first: bool = False) -> Any:
    """Layers made parallel after wrapping, and after a first forward if that is asked for."""
    model = esper.wrap(mlp(8, 8, 8), platform=here.shelf.platform)
    if first:
        model(torch.ones(2, 8))
    _in_parallel(here, model)
    return use(model)


def _ask(here: Rank) -> Any:
    return lambda model: model.request_kernel("0", 0, here.shelf.put(blueprint(8, 8)).id)


def _fsdp1(module: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


class DeepSpeedEngine(nn.Module):
    """As DeepSpeed's is known: by the name of its class and of its package."""

    __module__ = "deepspeed.runtime.engine"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class PipelineEngine(DeepSpeedEngine):
    __module__ = "deepspeed.runtime.pipe.engine"


def _part(here: Rank, engine: Any) -> Any:
    model = esper.wrap(mlp(8, 6, 4), platform=here.shelf.platform)
    return engine(model[0])  # type: ignore[index]  # it is an instance of nn.Sequential too


def what_is_refused(here: Rank) -> Any:
    def wrapped(module: nn.Module) -> esper.MorphableModel:
        return esper.wrap(module, platform=here.shelf.platform)

    tries = {
        "ddp": lambda: wrapped(DistributedDataParallel(mlp(8, 6, 4))),
        "a part in ddp": lambda: _part(here, DistributedDataParallel),
        "fsdp1": lambda: wrapped(_fsdp1(mlp(8, 6, 4))),
        "fsdp1 inside": lambda: wrapped(nn.Sequential(nn.Linear(8, 8), _fsdp1(nn.Linear(8, 8)))),
        "fsdp1 later": lambda: _fsdp1(wrapped(mlp(8, 6, 4))),
        "a part in fsdp1": lambda: _part(here, _fsdp1),
        "deepspeed": lambda: wrapped(DeepSpeedEngine(mlp(8, 6, 4))),
        "deepspeed later": lambda: DeepSpeedEngine(wrapped(mlp(8, 6, 4))),
        "deepspeed's pipeline": lambda: PipelineEngine(wrapped(mlp(8, 6, 4))),
        "tensor parallel": lambda: wrapped(_in_parallel(here, mlp(8, 8, 8))),
        "parallel later": lambda: _parallel_later(here, lambda model: model(torch.ones(2, 8))),
        "parallel later, asked": lambda: _parallel_later(here, _ask(here)),
        "parallel after a forward": lambda: _parallel_later(here, _ask(here), first=True),
        "no group": lambda: esper.wrap(mlp(8, 6, 4), process_group="world"),
        "a grower": lambda: _grower(here),
        "join": lambda: _join(here),
        "late": lambda: _shard_late(here),
    }
    messages = {}
    for name, attempt in tries.items():
        try:
            attempt()
        except esper.EsperError as error:
            messages[name] = str(error)
    return messages


def _grower(here: Rank) -> None:
    model, _ = _ddp(here, mlp(8, 6, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    esper.Grower(
        model, optimizer, lambda model, batch: _loss(model, *batch), budget=99, probe_batches=[_batch(0, here.rank)]
    )


def _join(here: Rank) -> None:
    model, run = _ddp(here, mlp(8, 6, 4))
    assert model.request_kernel("0", 0, here.shelf.put(blueprint()).id, trainable=True).result(30)
    with run.join():
        _loss(run, *_batch(0, here.rank)).backward()


def _shard_late(here: Rank) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=here.shelf.platform)
    model(torch.ones(1, 8))
    fully_shard(model)
    model.request_kernel("0", 0, here.shelf.put(blueprint()).id)


def fsdp_of_a_model_that_has_grown(here: Rank) -> Any:
    """The kernel that is there when the model is sharded learns as the others do, and can leave."""
    model = esper.wrap(mlp(8, 6, 4), platform=here.shelf.platform)
    load(model, "0", 0, here.shelf.put(blueprint()).id, trainable=True)
    _sharded(model)
    _loss(model, *_batch(0, here.rank)).backward()
    mine = [each.grad.to_local() for each in model.seed_parameters()]
    others = [torch.empty_like(mine[0]) for _ in range(here.size)]
    torch.distributed.all_gather(others, mine[0])
    assert model.unload_kernel("0", 0)
    _wait_for_unload(model)
    for step in range(3):
        _loss(model, *_batch(step, here.rank)).backward()
    return {"equal": all(torch.equal(each, others[0]) for each in others), "states": states(model)["0"][0]}
