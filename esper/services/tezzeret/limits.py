"""Limits of one compilation: how long, how large and how thorough it may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from esper.configs import TezzeretConfig

__all__ = ["INDUCTOR_OPTIONS", "PIPELINES", "ChildLimits", "Pipeline", "sets_worth_trying"]

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What one pipeline does.

    All check the same properties; the slower ones on more inputs, measure for longer, and search for the options of
    Inductor that make the fastest code.
    """

    name: str
    wall_seconds: float
    leading: tuple[tuple[int, ...], ...]
    """Leading dimensions of the inputs that the kernel's graph is run on."""
    rows: tuple[int, ...]
    """Numbers of rows on which graph and attachment are compared."""
    latency_rows: tuple[int, ...]
    latency_seconds: float
    """Time for each measurement of a latency."""
    options: tuple[str, ...] = ("default",)
    """The sets of :data:`INDUCTOR_OPTIONS` that compiled code is made with; the fastest is kept."""
    tuning_rows: int = 256
    """Number of rows on which the sets are compared."""


INDUCTOR_OPTIONS: Mapping[str, Mapping[str, bool | int]] = MappingProxyType(
    {
        "default": {},
        "vectors of 256 bits": {"cpp.simdlen": 256},
        "autotuned products": {"max_autotune": True},
        "autotuned products, vectors of 256 bits": {"max_autotune": True, "cpp.simdlen": 256},
    }
)
"""Sets of Inductor's options by name. All compute the same: none relaxes the arithmetic."""


def sets_worth_trying(pipeline: Pipeline) -> tuple[str, ...]:
    """The sets of `pipeline` of which each makes other code on this machine: half a vector differs from a whole one."""
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return tuple(name for name in pipeline.options if wide or "cpp.simdlen" not in INDUCTOR_OPTIONS[name])


_FAST = Pipeline(
    name="fast",
    wall_seconds=180.0,
    leading=((), (1,), (5,), (2, 3)),
    rows=(2, 37),
    latency_rows=(1, 32),
    latency_seconds=0.05,
)
_STANDARD = Pipeline(
    name="standard",
    wall_seconds=300.0,
    leading=((), (1,), (5,), (2, 3), (2, 1, 4)),
    rows=(2, 5, 37, 128),
    latency_rows=(1, 32, 256),
    latency_seconds=0.2,
    options=("default", "vectors of 256 bits"),
)
_AGGRESSIVE = Pipeline(
    name="aggressive",
    wall_seconds=1200.0,
    leading=((), (1,), (2,), (5,), (2, 3), (2, 1, 4), (2, 3, 2, 2)),
    rows=(2, 3, 5, 8, 37, 128, 511),
    latency_rows=(1, 2, 8, 32, 128, 512, 2048),
    latency_seconds=1.0,
    options=tuple(INDUCTOR_OPTIONS),
)
PIPELINES: Mapping[str, Pipeline] = MappingProxyType({each.name: each for each in (_FAST, _STANDARD, _AGGRESSIVE)})


@dataclass(frozen=True, slots=True)
class ChildLimits:
    """Beyond these the child and its own children are killed."""

    wall_seconds: float
    memory_bytes: int
    """Of resident memory, added up over the child and its descendants."""
    niceness: int = 10
    """By how much the child is nicer than this process."""

    @classmethod
    def of(cls, config: TezzeretConfig) -> ChildLimits:
        """The configured limits, or the pipeline's."""
        wall = config.wall_seconds if config.wall_seconds is not None else PIPELINES[config.pipeline].wall_seconds
        return cls(wall, config.memory_mb * _MIB, config.niceness)

    @property
    def data_bytes(self) -> int:
        """A cap for the kernel to enforce (RLIMIT_DATA), for an allocation too sudden to be seen by looking.

        Far above the real limit, since it counts what is reserved and not what is used.
        """
        return 2 * self.memory_bytes + 4 * 2**30

    @property
    def cpu_seconds(self) -> int:
        """A cap on processor time (RLIMIT_CPU), for a child that nobody watches any more."""
        return int(self.wall_seconds * 2) + 60
