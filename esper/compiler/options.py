"""The options of `torch.compile(model, backend="esper", mode=..., options=...)`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from esper import torch_internals
from esper.compiler.inner import BackendOptionError, Inductor, InnerCompiler, resolve_inner

__all__ = ["BackendOptions", "ColdStart", "Fallback"]

ColdStart = Literal["block", "eager"]
Fallback = Literal["raise", "eager"]


@dataclass(frozen=True)
class BackendOptions:
    """What Esper's own options say; all others are Inductor's."""

    inner: InnerCompiler
    """The compiler that gets graphs without markers: `inner="inductor"` (default), "aot_eager", "eager", the name of
    any other backend, or a callable."""
    inner_name: str
    cold_start: ColdStart = "block"
    """"block": the first call waits for its graph to be compiled, as under any backend. "eager": the graph runs as it
    is until a worker has compiled it."""
    fallback: Fallback = "raise"
    """What becomes of a graph that the inner compiler cannot compile: "raise" (the first compilation raises, a load
    fails), or "eager" (it runs uncompiled)."""
    batch_seeds: bool = True
    """Run kernels of one blueprint at one site as one batched product where that is faster."""
    variant_cache_mb: float = 256.0
    """MiB of compiled variants that a graph keeps besides the dormant one and the one in force; the least recently used
    one goes first."""

    @classmethod
    def read(cls, mode: str | None, options: Mapping[str, Any] | None) -> BackendOptions:
        """The options that `torch.compile` was given. Raises :class:`BackendOptionError`, naming the option."""
        remaining = dict(options or {})
        own = {name: remaining.pop(name) for name in _CHECKS if name in remaining}
        for name, value in own.items():
            accepts, wanted = _CHECKS[name]
            if not accepts(value):
                raise BackendOptionError(f"options[{name!r}] must be {wanted}, not {value!r}")
        _check_names(remaining)
        inner = resolve_inner(mode, remaining)
        if own.get("cold_start") == "eager" and not isinstance(inner, Inductor):
            raise BackendOptionError(
                'options["cold_start"] = "eager" waits for a worker to compile with Inductor, and the inner compiler is'
                f" {options['inner']!r}: drop one of the two"  # type: ignore[index]  # there is an "inner" among them
            )
        name = remaining.get("inner", "inductor")
        return cls(inner, name if isinstance(name, str) else getattr(name, "__qualname__", repr(name)), **own)


def _check_names(names: Iterable[str]) -> None:
    """That each is "inner" or an option of Inductor's."""
    unknown = [name for name in names if name != "inner"]
    inductors = torch_internals.inductor_option_names() if unknown else []
    for name in unknown:
        if str(name).replace("-", "_") not in inductors:
            own = sorted({*_CHECKS, "inner"})
            near = [match for known in (own, inductors) for match in _near(str(name), known)]
            hint = f", did you mean {near[0]!r}?" if near else ";"
            raise BackendOptionError(
                f"there is no option {name!r}{hint} Esper's own options are {', '.join(map(repr, own))}; all others "
                "are Inductor's, which torch._inductor.list_options() lists"
            )


def _near(name: str, known: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name.lower().replace("-", "_"), known, n=1)


def _is_size(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


_CHECKS: Mapping[str, tuple[Any, str]] = {
    "cold_start": (lambda value: value in get_args(ColdStart), '"block" or "eager"'),
    "fallback": (lambda value: value in get_args(Fallback), '"raise" or "eager"'),
    "batch_seeds": (lambda value: isinstance(value, bool), "True or False"),
    "variant_cache_mb": (_is_size, "a number of MiB, at least 0"),
}
