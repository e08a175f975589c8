"""The state of every seed of a model: eight tensors on the model's device, and their mirror in host memory.

The tensors are one Structure-of-Arrays for the whole model; a layer holds a *view*, which is a range of the same
storage. Compiled graphs read the tensors (`alpha_blend` above all). The control side never does: every question is
answered from the mirror, and every setter enqueues one asynchronous device write and then changes the mirror, so no
method here waits for a device. A write that goes to a tensor directly is not seen by the mirror.

Threads: writers take the storage's one lock for O(1) work; readers take none and see each field whole. An interrupt
may come between mirror and device: the mirror counts, and the device is given what it lacks when it is asked next.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.errors import EsperError, shown
from esper.execution.lifecycle import (
    LifecycleError,
    SeedLifecycleState,
    after_cancelled_load,
    after_failed_load,
    check_transition,
)
from esper.execution.state_storage import (
    FIELDS,
    WITH_KERNEL,
    WITHOUT_KERNEL,
    StateDictError,
    StateStorage,
    checked_values,
)

__all__ = [
    "FIELDS",
    "HEALTH_WEIGHT",
    "AlphaError",
    "KasminaStateLayout",
    "StateDictError",
    "checked_alpha",
    "kernel_number",
    "seed_number",
]

HEALTH_WEIGHT = 0.1
"""Weight of the newest score in `health_accumulator`, an exponential moving average."""

_INT16_MAX = 32767
_INT32_MAX = 2**31 - 1


class AlphaError(EsperError, ValueError):
    """A blend factor that is no finite number in [0, 1]."""


def checked_alpha(value: object) -> float:
    """Return `value` as a float in [0, 1], rounded to float16 as the device holds it; else `AlphaError`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        remedy = " Reading a tensor would wait for its device." if isinstance(value, Tensor) else ""
        raise AlphaError(f"alpha is a {type(value).__name__}; pass a Python number in [0, 1].{remedy}")
    number = float(value)
    if not 0.0 <= number <= 1.0:  # NaN fails this too
        raise AlphaError(f"alpha is {number}; pass a finite number from 0 (host only) to 1 (kernel only).")
    return float(np.float16(number))


def kernel_number(artifact_id: str) -> int:
    """The 64-bit signed number that stands for an artifact on the device: the first 8 bytes of its id; 0 is "none"."""
    try:
        raw = bytes.fromhex(artifact_id[:16])
    except ValueError:
        raw = b""
    if len(raw) != 8:
        raise EsperError(f"{artifact_id!r} is no artifact id; pass the full id, 64 hexadecimal digits.")
    return int.from_bytes(raw, "big", signed=True) or 1


def seed_number(seed: object) -> int:
    """The number of a seed as it was given, which any kind of integer may be. Raises ``TypeError`` for others."""
    try:
        return operator.index(seed if not isinstance(seed, bool) else None)  # type: ignore[arg-type]  # which raises
    except TypeError:
        raise TypeError(f"a seed is given by its number, a whole number from 0 on, not {shown(seed)}") from None


class KasminaStateLayout:
    """The state of `num_seeds` seeds on `device`; see the module's docstring for who may read what.

    Seed indices are those of this view, from 0; one out of range raises `IndexError`.
    """

    def __init__(self, num_seeds: int, device: torch.device | str | int = "cpu") -> None:
        if operator.index(num_seeds) < 0:
            raise ValueError(f"num_seeds is {num_seeds}; it must be 0 or more.")
        self._storage = StateStorage(num_seeds, device)
        self._start, self._stop = 0, num_seeds
        self._label = ""

    # ---- the tensors -------------------------------------------------------------------------------------------

    def _tensor(self, name: str) -> Tensor:
        storage = self._storage
        if storage.behind:
            storage.catch_up()
        tensor = storage.tensors[name]
        size = len(storage.mirror[name])  # the tensor's own is a tensor to `torch.jit.trace`
        whole = self._stop - self._start == size
        return tensor if whole else tensor[self._start : self._stop]

    @property
    def lifecycle_states(self) -> Tensor:
        """uint8 `[num_seeds]`, values of `SeedLifecycleState`."""
        return self._tensor("lifecycle_states")

    @property
    def active_kernel_id(self) -> Tensor:
        """int64 `[num_seeds]`, `kernel_number` of the kernel in force, 0 without one."""
        return self._tensor("active_kernel_id")

    @property
    def alpha_blend(self) -> Tensor:
        """float16 `[num_seeds]`, each seed's share in the site's output."""
        return self._tensor("alpha_blend")

    @property
    def health_accumulator(self) -> Tensor:
        """float32 `[num_seeds]`, moving average of the scores given to `record_health`."""
        return self._tensor("health_accumulator")

    @property
    def last_update_epoch(self) -> Tensor:
        """int32 `[num_seeds]`, as given to `touch_epoch`."""
        return self._tensor("last_update_epoch")

    @property
    def exec_latency_μs(self) -> Tensor:
        """int16 `[num_seeds]`, microseconds of the last timed execution; saturates at 32767."""
        return self._tensor("exec_latency_μs")

    @property
    def error_count(self) -> Tensor:
        """int16 `[num_seeds]`, failures so far; saturates at 32767."""
        return self._tensor("error_count")

    @property
    def fallback_active(self) -> Tensor:
        """bool `[num_seeds]`, True while the host's path stands in for a kernel that failed."""
        return self._tensor("fallback_active")

    @property
    def num_seeds(self) -> int:
        return self._stop - self._start

    @property
    def device(self) -> torch.device:
        return self._storage.tensors["alpha_blend"].device

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.num_seeds * sum(dtype.itemsize for dtype in FIELDS.values())

    def view(self, start: int, stop: int, *, label: str = "") -> KasminaStateLayout:
        """The seeds `start` to `stop - 1` of this layout, in O(1) and without copies; `label` is for messages."""
        if not 0 <= start <= stop <= self.num_seeds:
            raise IndexError(f"seeds {start} to {stop} are not within the {self.num_seeds} seeds of this layout.")
        view = object.__new__(KasminaStateLayout)
        view._storage, view._label = self._storage, label
        view._start, view._stop = self._start + start, self._start + stop
        return view

    def to(self, device: torch.device | str | int) -> KasminaStateLayout:
        """Move the whole model's state to `device`, whichever view is asked; dtypes never change. Returns self."""
        self._storage.move(device)
        return self

    # ---- questions: answered from the mirror -------------------------------------------------------------------

    def _index(self, seed: int) -> int:
        index = operator.index(seed)
        if not 0 <= index < self._stop - self._start:
            what = f" of {self._label}" if self._label else ""
            exist = f"0 to {self.num_seeds - 1} exist" if self.num_seeds else "there are none"
            raise IndexError(f"there is no seed {seed}{what}; seeds {exist}.")
        return self._start + index

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is changed until the block is left goes to the device at its end, in one write for each field."""
        storage = self._storage
        storage.together = True
        try:
            yield
        finally:
            storage.together = False
            storage.catch_up()

    def catch_up(self) -> None:
        """Give the device what an interrupt has kept from it."""
        self._storage.together = False
        if self._storage.behind:
            self._storage.catch_up()

    def mirror(self, name: str) -> npt.NDArray[Any]:
        """The field `name` of `FIELDS` in host memory: a read-only array `[num_seeds]` that stays current."""
        values = self._storage.mirror[name][self._start : self._stop]
        values.flags.writeable = False
        return values

    def lifecycle(self, seed: int) -> SeedLifecycleState:
        return SeedLifecycleState(self._storage.mirror["lifecycle_states"].item(self._index(seed)))

    def kernel_id(self, seed: int) -> int:
        """`kernel_number` of the kernel in force at `seed`, or 0."""
        return int(self._storage.mirror["active_kernel_id"].item(self._index(seed)))

    def in_force(self, seed: int) -> bool:
        """Whether a kernel contributes to the output at `seed`: also while its replacement is loading."""
        return self.kernel_id(seed) != 0

    def alpha(self, seed: int) -> float:
        """The blend factor as the device holds it, that is, rounded to float16."""
        return float(self._storage.mirror["alpha_blend"].item(self._index(seed)))

    def health(self, seed: int) -> float:
        return float(self._storage.mirror["health_accumulator"].item(self._index(seed)))

    def last_epoch(self, seed: int) -> int:
        return int(self._storage.mirror["last_update_epoch"].item(self._index(seed)))

    def latency_μs(self, seed: int) -> int:
        return int(self._storage.mirror["exec_latency_μs"].item(self._index(seed)))

    def errors(self, seed: int) -> int:
        return int(self._storage.mirror["error_count"].item(self._index(seed)))

    def fallback(self, seed: int) -> bool:
        return bool(self._storage.mirror["fallback_active"].item(self._index(seed)))

    def active_seeds(self) -> tuple[int, ...]:
        """The seeds with a kernel in force that is not yet fossilized, ascending."""
        fossil = self.mirror("lifecycle_states") == SeedLifecycleState.FOSSILIZED
        return tuple(np.flatnonzero((self.mirror("active_kernel_id") != 0) & ~fossil).tolist())

    def seeds_in(self, state: SeedLifecycleState) -> tuple[int, ...]:
        """The seeds whose lifecycle state is `state`, ascending."""
        return tuple(np.flatnonzero(self.mirror("lifecycle_states") == state).tolist())

    def error_seeds(self) -> tuple[int, ...]:
        """The seeds in `ERROR_RECOVERY`, ascending."""
        return self.seeds_in(SeedLifecycleState.ERROR_RECOVERY)

    # ---- changes: one asynchronous device write, then the mirror -----------------------------------------------

    def set_lifecycle(self, seed: int, new: SeedLifecycleState, kernel: str | None = None) -> SeedLifecycleState:
        """Change the state and return the old one; `LifecycleError` if the table has no such change.

        `kernel` is the full id of the artifact that comes into force with `ACTIVE`; it may be left out where one
        is in force already. `DORMANT` and `ERROR_RECOVERY` take the kernel out of force, and `fallback_active`
        is set with `ERROR_RECOVERY` and cleared by whatever follows it other than `LOADING`.
        """
        index, new = self._index(seed), SeedLifecycleState(new)
        with self._storage.lock:
            return self._change(seed, index, new, kernel)

    def _change(self, seed: int, index: int, new: SeedLifecycleState, kernel: str | None) -> SeedLifecycleState:
        storage = self._storage
        old = SeedLifecycleState(storage.mirror["lifecycle_states"].item(index))
        who = f"seed {seed}" + (f" of {self._label}" if self._label else "")
        check_transition(old, new, who)
        number = storage.mirror["active_kernel_id"].item(index) if kernel is None else kernel_number(kernel)
        if new in WITHOUT_KERNEL:
            number = 0
        elif new in WITH_KERNEL and number == 0:
            raise LifecycleError(f"{who} cannot become {new.name} without a kernel; pass its artifact id.")
        elif kernel is not None and new is not SeedLifecycleState.ACTIVE:
            raise LifecycleError(f"{who} gets its kernel when it becomes ACTIVE, not {new.name}.")
        if number != storage.mirror["active_kernel_id"].item(index):
            storage.write("active_kernel_id", index, number)
        failed = new is SeedLifecycleState.ERROR_RECOVERY
        if new is not SeedLifecycleState.LOADING and failed != storage.mirror["fallback_active"].item(index):
            storage.write("fallback_active", index, failed)
        storage.write("lifecycle_states", index, int(new))
        return old

    def fail_load(self, seed: int) -> SeedLifecycleState:
        """A `LOADING` seed's load failed: count it, and go to `ERROR_RECOVERY`, or back to `ACTIVE` if the old
        kernel is still in force. Returns the new state."""
        return self._leave_loading(seed, failed=True)

    def cancel_load(self, seed: int) -> SeedLifecycleState:
        """A `LOADING` seed's load was cancelled: go back to `DORMANT` or `ACTIVE`. Returns the new state."""
        return self._leave_loading(seed, failed=False)

    def _leave_loading(self, seed: int, *, failed: bool) -> SeedLifecycleState:
        index, mirror = self._index(seed), self._storage.mirror
        with self._storage.lock:
            in_force = bool(mirror["active_kernel_id"].item(index))
            new = after_failed_load(in_force) if failed else after_cancelled_load(in_force)
            if mirror["lifecycle_states"].item(index) != SeedLifecycleState.LOADING:
                raise LifecycleError(f"seed {seed} is {self.lifecycle(seed).name}, so no load can end there.")
            if failed:
                self._saturating_add("error_count", index, 1)
            self._change(seed, index, new, None)
        return new

    def _saturating_add(self, name: str, index: int, amount: int) -> int:
        value = min(self._storage.mirror[name].item(index) + amount, _INT16_MAX)
        self._storage.write(name, index, value)
        return int(value)

    def set_alpha(self, seed: int, value: float) -> float:
        """Set the blend factor, from the next forward on; returns it rounded. `AlphaError` if it is none."""
        index, alpha = self._index(seed), checked_alpha(value)
        with self._storage.lock:
            self._storage.write("alpha_blend", index, alpha)
        return alpha

    def record_error(self, seed: int) -> int:
        """Count one failure; returns the count, which stays at 32767."""
        index = self._index(seed)
        with self._storage.lock:
            return self._saturating_add("error_count", index, 1)

    def record_latency(self, seed: int, microseconds: float) -> int:
        """Note how long an execution took; returns the whole microseconds kept, at most 32767."""
        index = self._index(seed)
        if not microseconds >= 0:  # NaN fails this too
            raise ValueError(f"a latency of {microseconds} μs is not possible; pass a number that is 0 or more.")
        value = round(min(microseconds, _INT16_MAX))
        with self._storage.lock:
            self._storage.write("exec_latency_μs", index, value)
        return value

    def record_health(self, seed: int, score: float) -> float:
        """Mix a finite `score` into the moving average with `HEALTH_WEIGHT`; returns the average."""
        index = self._index(seed)
        if not math.isfinite(score):
            raise ValueError(f"a health score of {score} would spoil the average; pass a finite number.")
        with self._storage.lock:
            old = self._storage.mirror["health_accumulator"].item(index)
            value = float(np.float32(old + HEALTH_WEIGHT * (score - old)))
            self._storage.write("health_accumulator", index, value)
        return value

    def touch_epoch(self, seed: int, epoch: int) -> None:
        """Note the epoch of the seed's last change; 0 to 2**31 - 1."""
        index, value = self._index(seed), operator.index(epoch)
        if not 0 <= value <= _INT32_MAX:
            raise ValueError(f"epoch {epoch} does not fit; pass a number from 0 to {_INT32_MAX}.")
        with self._storage.lock:
            self._storage.write("last_update_epoch", index, value)

    # ---- saving ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """This view's fields by name, as fresh CPU tensors `[num_seeds]`; no device is read."""
        return self._storage.copy_range(self._start, self._stop)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned for as many seeds; `StateDictError` if it does not fit.

        All fields are checked before the first is written. The transition table is not asked.
        """
        values = checked_values(state, self.num_seeds)
        self._storage.write_range(self._start, self._stop, values)

    def __repr__(self) -> str:
        of = f" of {self._label}" if self._label else ""
        active = len(self.active_seeds())
        return f"{type(self).__name__}({self.num_seeds} seeds{of} on {self.device}, {active} active)"
