"""The gradients of kernels, averaged over the ranks as those of the host are.

`DistributedDataParallel` reduces the parameters that are there when it is made; kernels come and go. Here, as there,
gradients are gathered in buckets that are reduced while the backward goes on, as soon as they are complete, and the
backward does not end before all are there. On every rank buckets are reduced in one and the same order, by a group of
their own, so that it does not matter when they are complete, nor what else is reduced meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from esper import torch_internals
from esper.execution.kernels.local_parts import like, local

__all__ = ["KernelGradients"]

_BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel has it


class _Bucket:
    """Parameters whose gradients are reduced together, of one device and dtype."""

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.missing: set[nn.Parameter] = set()
        self.flat: Tensor | None = None
        self.work: Any = None

    def begin(self) -> None:
        """A backward begins."""
        self.missing = set(self.parameters)
        self.flat = self.work = None

    def reduce(self, group: Any) -> None:
        """Begin to average the gradients; one that is missing counts as 0."""
        size = group.size()
        parts = [
            torch.zeros(each.numel(), dtype=each.dtype, device=each.device)
            if each.grad is None
            else local(each.grad).detach().reshape(-1)
            for each in self.parameters
        ]
        self.flat = torch.cat(parts).div_(size)
        self.work = dist.all_reduce(self.flat, group=group, async_op=True)

    def finish(self) -> None:
        """Write the averages; waits as the group's backend does, with CUDA no longer than to queue it."""
        assert self.flat is not None
        self.work.wait()
        with torch.no_grad():
            averages = torch.split(self.flat, [each.numel() for each in self.parameters])
            for parameter, average in zip(self.parameters, averages, strict=True):
                if parameter.grad is None:
                    parameter.grad = like(parameter, average.view_as(local(parameter)).clone())
                else:
                    local(parameter.grad).copy_(average.view_as(local(parameter.grad)))
        self.flat = self.work = None


class KernelGradients:
    """The averaging of one model's kernel gradients, over `group`, which nobody else uses.

    `wanted` says whether the backward that is under way is one after which gradients have to agree, rather than one
    of several that are accumulated. For the thread that trains; hooks run in the backward.
    """

    def __init__(self, group: Any, wanted: Callable[[], bool]) -> None:
        self._group = group
        self._wanted = wanted
        self._handles: list[Any] = []
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._is_under_way = False
        self._next = 0  # bucket to be reduced

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """From now on it is `parameters` that have to agree, in an order that is the same on all ranks."""
        wanted = [each for each in parameters if each.requires_grad]
        if len(wanted) == len(self._bucket_of) and all(each in self._bucket_of for each in wanted):
            return
        self.close()
        self._buckets = _bucketed(wanted[::-1])  # gradients come from the last layer to the first
        self._bucket_of = {each: bucket for bucket in self._buckets for each in bucket.parameters}
        self._handles = [torch_internals.after_accumulation(each, self._accumulated) for each in wanted]
        self._is_under_way = False

    def close(self) -> None:
        """Average nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._buckets, self._bucket_of = [], [], {}

    def _accumulated(self, parameter: Tensor) -> None:
        """The gradient of one parameter is there."""
        if not self._is_under_way:
            if not self._wanted():
                return
            self._begin()
        bucket = self._bucket_of.get(parameter)  # type: ignore[call-overload]  # torch calls a parameter a tensor
        if bucket is None:
            return
        bucket.missing.discard(parameter)
        if bucket.work is not None:  # a gradient that came once more: what is reduced already is done again
            bucket.work.wait()
            bucket.reduce(self._group)
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._buckets[self._next].reduce(self._group)
            self._next += 1

    def _begin(self) -> None:
        self._is_under_way, self._next = True, 0
        for each in self._buckets:
            each.begin()
        torch_internals.at_the_end_of_the_backward(self._finish)

    def _finish(self) -> None:
        self._is_under_way = False
        buckets = self._buckets
        for each in buckets[self._next :]:
            each.reduce(self._group)
        for each in buckets:
            if each.flat is not None:
                each.finish()


def _bucketed(parameters: Sequence[nn.Parameter]) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    sizes: dict[Any, tuple[_Bucket, int]] = {}
    for each in parameters:
        key = each.device, each.dtype
        bucket, size = sizes.get(key, (None, _BUCKET_BYTES))
        if bucket is None or size >= _BUCKET_BYTES:
            bucket, size = _Bucket(), 0
            buckets.append(bucket)
        bucket.parameters.append(each)
        sizes[key] = bucket, size + each.numel() * each.element_size()
    return buckets
