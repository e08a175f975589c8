"""The inner compiler, such as Inductor: it is handed a variant's graph once Esper's markers are gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from esper import torch_internals
from esper.errors import EsperError

__all__ = ["BackendOptionError", "Inductor", "InnerCompiler", "resolve_inner"]

InnerCompiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""What Dynamo calls a backend: a graph and example inputs in, a callable on flat inputs out."""


class BackendOptionError(EsperError, ValueError):
    """An option of `torch.compile(..., backend="esper", options=...)` is not usable."""


@dataclass(frozen=True, slots=True)
class Inductor:
    """Inductor, with `config_patches` over the settings in force."""

    config_patches: Mapping[str, Any]

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return torch_internals.compile_with_inductor(module, inputs, self.config_patches)


def resolve_inner(mode: str | None, options: Mapping[str, Any] | None) -> InnerCompiler:
    """The inner compiler for `torch.compile`'s `mode` and `options`.

    `options["inner"]` is "inductor" (the default), the name of any other registered backend, or a callable. `mode` and
    the remaining options are Inductor's own. Raises :class:`BackendOptionError` for what cannot be combined.
    """
    remaining = dict(options or {})
    inner = remaining.pop("inner", "inductor")
    if inner == "inductor":
        return Inductor(torch_internals.inductor_options(mode, remaining))
    if remaining or (mode and mode != "default"):
        named = ", ".join([*remaining, *([f"mode={mode!r}"] if mode else [])])
        raise BackendOptionError(f"{named} are Inductor's own options, and the inner compiler is {inner!r}: drop them")
    if callable(inner):
        return cast(InnerCompiler, inner)
    if inner == "esper":
        raise BackendOptionError(
            'options={"inner": "esper"} would call itself: name another backend, such as "inductor"'
        )
    try:
        found = cast(InnerCompiler, torch_internals.find_backend(inner))
    except Exception as error:  # torch raises private types here; all mean "no such backend"
        known = ", ".join(torch.compiler.list_backends())
        raise BackendOptionError(
            f"there is no backend {inner!r} to use as inner compiler; there are: {known}"
        ) from error
    return found
