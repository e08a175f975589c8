"""Evaluation of a graph on fake values that leaves nothing behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from esper_passes._torch_internals import FakeTensor, FakeTensorMode, enable_python_dispatcher, tree_leaves

__all__ = ["mode_of", "undisturbed"]


def mode_of(values: Iterable[object]) -> FakeTensorMode | None:
    """The fake mode of the first fake tensor among `values`, which may be nested; None if there is no such tensor."""
    leaves = (leaf for value in values for leaf in tree_leaves(value))
    return next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), None)


@contextlib.contextmanager
def undisturbed(mode: FakeTensorMode) -> Iterator[None]:
    """Neither leave guards behind, nor pending symbols, nor another grad mode."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        stack.enter_context(enable_python_dispatcher())  # some operators take symbolic sizes in no other way
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.suppress_guards())
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        yield
