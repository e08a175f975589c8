"""The storage behind a model's seed state: device tensors, their mirror in host memory, and the lock for both."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.errors import EsperError
from esper.execution.lifecycle import SeedLifecycleState
from esper.forking import reset_after_fork

__all__ = ["FIELDS", "WITHOUT_KERNEL", "WITH_KERNEL", "StateDictError", "StateStorage", "checked_values"]

FIELDS: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "lifecycle_states": torch.uint8,
        "active_kernel_id": torch.int64,
        "alpha_blend": torch.float16,
        "health_accumulator": torch.float32,
        "last_update_epoch": torch.int32,
        "exec_latency_μs": torch.int16,
        "error_count": torch.int16,
        "fallback_active": torch.bool,
    }
)
"""The tensors' names and dtypes; each has shape `[num_seeds]`."""

_NUMPY: Mapping[torch.dtype, type[np.generic]] = {
    torch.uint8: np.uint8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.bool: np.bool_,
}


WITHOUT_KERNEL = (SeedLifecycleState.DORMANT, SeedLifecycleState.ERROR_RECOVERY)
WITH_KERNEL = (SeedLifecycleState.ACTIVE, SeedLifecycleState.FOSSILIZED)


class StateDictError(EsperError, ValueError):
    """A saved seed state that does not fit this layout; nothing was loaded."""


def checked_values(state: Mapping[str, Tensor], num_seeds: int) -> dict[str, npt.NDArray[Any]]:
    """The fields of a saved state of so many seeds; `StateDictError` for one that no setter would have written."""
    if state.keys() != FIELDS.keys():
        missing, unknown = sorted(FIELDS.keys() - state.keys()), sorted(state.keys() - FIELDS.keys())
        raise StateDictError(f"a seed state needs exactly its eight fields; missing {missing}, unknown {unknown}.")
    for name, tensor in state.items():
        if tensor.dtype != FIELDS[name] or tuple(tensor.shape) != (num_seeds,):
            raise StateDictError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; this layout has {FIELDS[name]} [{num_seeds}]."
            )
    values = {name: tensor.detach().cpu().numpy().copy() for name, tensor in state.items()}
    alpha = values["alpha_blend"]
    states, kernels = values["lifecycle_states"], values["active_kernel_id"] != 0
    wrong = {
        "lifecycle_states": states > max(SeedLifecycleState),
        "alpha_blend": ~((alpha >= 0) & (alpha <= 1)),
        "health_accumulator": ~np.isfinite(values["health_accumulator"]),
        "active_kernel_id": (np.isin(states, WITH_KERNEL) & ~kernels) | (np.isin(states, WITHOUT_KERNEL) & kernels),
        **{name: values[name] < 0 for name in ("last_update_epoch", "exec_latency_μs", "error_count")},
    }
    for name, bad in wrong.items():
        if bad.any():
            seed = int(np.argmax(bad))
            raise StateDictError(f"{name} of seed {seed} is {values[name][seed]}, which no seed in its state can have.")
    return values


class StateStorage:
    """The tensors and mirrors of a whole model, with the lock under which they change. Shared by all views."""

    def __init__(self, num_seeds: int, device: torch.device | str | int) -> None:
        self.mirror: dict[str, npt.NDArray[Any]] = {
            name: np.zeros(num_seeds, dtype=_NUMPY[dtype]) for name, dtype in FIELDS.items()
        }
        self.mirror["alpha_blend"].fill(1.0)
        self.lock = threading.RLock()
        self.behind: dict[str, set[int]] = {}
        """By field, the seeds for which its tensor has not got what the mirror has; see :meth:`catch_up`."""
        self.together = False
        """Whether :meth:`write` leaves the tensors to the next :meth:`catch_up`."""
        self.tensors = self._placed(device)
        reset_after_fork(self)

    def after_fork(self) -> None:
        """Nobody in this child holds the lock, whoever held it in the parent; see `esper.forking`."""
        self.lock = threading.RLock()

    def _placed(self, device: torch.device | str | int) -> dict[str, Tensor]:
        # Inference tensors could not be written outside of inference mode, so they are never made.
        with torch.inference_mode(False):
            return {
                name: torch.empty(len(values), dtype=FIELDS[name], device=device).copy_(
                    torch.from_numpy(values), non_blocking=True
                )
                for name, values in self.mirror.items()
            }

    def move(self, device: torch.device | str | int) -> None:
        # The mirror is the truth, so nothing is read back from the old device, and "meta" can be left again.
        with self.lock:
            if torch.empty(0, device=device).device != self.tensors["alpha_blend"].device:
                self.tensors = self._placed(device)
                self.behind.clear()

    def write(self, name: str, index: int, value: float | int | bool) -> None:
        """Change the mirror and enqueue the device write: if that fails, nothing changed. Lock held.

        An interrupt in between leaves the field `behind`, so that whoever asks for its tensor next completes the write.
        """
        before = self.mirror[name].item(index)
        self.behind.setdefault(name, set()).add(index)
        self.mirror[name][index] = value
        if self.together:
            return
        try:
            self.catch_up()
        except Exception:
            self.mirror[name][index] = before
            raise

    def catch_up(self) -> None:
        """Enqueue the device writes that are left to do: one for each field."""
        with self.lock:
            for name, seeds in list(self.behind.items()):
                tensor, values, indices = self.tensors[name], self.mirror[name], sorted(seeds)
                if len(indices) == 1:
                    tensor[indices[0] : indices[0] + 1].fill_(values.item(indices[0]))
                elif indices:
                    where, what = torch.tensor(indices, device="cpu"), torch.from_numpy(values[indices])
                    device = tensor.device
                    tensor.index_copy_(0, where.to(device, non_blocking=True), what.to(device, non_blocking=True))
                del self.behind[name]

    def __getstate__(self) -> dict[str, Any]:
        self.catch_up()
        return {"mirror": self.mirror, "tensors": self.tensors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, behind={}, together=False)
        self.lock = threading.RLock()
        reset_after_fork(self)

    def copy_range(self, start: int, stop: int) -> dict[str, Tensor]:
        """Fresh CPU tensors with the values of seeds `start` to `stop - 1`, taken at one moment."""
        with self.lock, torch.inference_mode(False):
            return {name: torch.from_numpy(values[start:stop].copy()) for name, values in self.mirror.items()}

    def write_range(self, start: int, stop: int, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace the values of seeds `start` to `stop - 1`; the arrays have been checked."""
        with self.lock:
            for name, array in values.items():
                self.behind.setdefault(name, set()).update(range(start, stop))
                self.mirror[name][start:stop] = array
            if not self.together:
                self.catch_up()
