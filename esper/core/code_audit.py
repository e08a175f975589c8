"""Watching which code a forward runs while it is traced.

A trace records tensor operations. Whatever else a forward does (print, measure time, draw a random number, look at the
autograd mode, run a custom autograd function, ...) would happen once, at tracing, and never again. The audit sees every
function that is called, through the interpreter's profiling hook on this thread, and refuses such code.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, Self

from esper.core.code_facts import CodeFacts, facts_of
from esper.core.stand_ins import is_stand_in

__all__ = ["CodeAudit"]

_OURS = frozenset({"esper", "esper_passes"})
_FREE_STANDARD_LIBRARY = frozenset(
    {
        "abc",
        "_abc",
        "_collections_abc",
        "collections",
        "copy",
        "dataclasses",
        "enum",
        "functools",
        "importlib",
        "_frozen_importlib",
        "_frozen_importlib_external",
        "itertools",
        "keyword",
        "math",
        "numbers",
        "operator",
        "types",
        "typing",
        "weakref",
        "_weakrefset",
        "zipimport",
    }
)
_FREE_TORCH = (
    "torch._classes",
    "torch._dynamo.mutation_guard",  # notes modules that are made, once Dynamo has run
    "torch._dynamo.utils",
    "torch._jit_internal",
    "torch._ops",
    "torch._tensor",
    "torch.functional",
    "torch.fx",
    "torch.nn.functional",
    "torch.nn.modules",
    "torch.overrides",
    "torch.utils._pytree",
)
"""What a model's own code may call: modules whose functions only record operations, with those below them."""

_FREE_FUNCTIONS = frozenset({("torch", "is_tensor"), ("torch", "_assert")})

_NEVER_TORCH = (
    "torch._dynamo.eval_frame",
    "torch._functorch",
    "torch._higher_order_ops",
    "torch.amp",
    "torch.autograd.function",
    "torch.autograd.grad_mode",
    "torch.autograd.graph",
    "torch.autograd.profiler",
    "torch.compiler",
    "torch.func",
    "torch.profiler",
    "torch.utils.checkpoint",
)
"""What nothing may call, not even torch: it changes how the operations inside it run, or asks how they are run."""

_EFFECTFUL_BUILTINS = frozenset(
    {
        "breakpoint",
        "callable",
        "compile",
        "delattr",
        "eval",
        "exec",
        "globals",
        "id",
        "input",
        "locals",
        "next",
        "open",
        "print",
        "setattr",
        "vars",
        "__build_class__",
    }
)
_EFFECTFUL_MODULES = frozenset(
    {
        "time",
        "_io",
        "io",
        "posix",
        "nt",
        "os",
        "_thread",
        "threading",
        "_random",
        "random",
        "_warnings",
        "warnings",
        "_socket",
        "socket",
        "gc",
        "_signal",
        "signal",
        "sys",
        "_queue",
        "select",
        "_csv",
        "_pickle",
        "_sqlite3",
        "numpy.random",
        "mtrand",
    }
)


class CodeAudit:
    """A context in which every function call on this thread is looked at.

    Garbage is not collected meanwhile: finalizers of things that have nothing to do with the forward would be seen.

    `refuse` is called, and raises, for what cannot be traced; the reason follows "not traced: ". `entered` is told of
    every frame of the model's own code (what belongs neither to torch nor to the standard library) as it begins.
    """

    def __init__(self, refuse: Callable[[str], None], entered: Callable[[FrameType, CodeFacts], None]) -> None:
        self._refuse = refuse
        self._entered = entered
        self._own_code: set[CodeType] = set()
        self._lent: set[CodeType] = set()  # of the standard library, called by the model's own
        self._trusted: set[CodeType] = set()
        self._collecting = False

    def is_own(self, code: CodeType) -> bool:
        """Whether `code` belongs to the model."""
        return code in self._own_code

    def __enter__(self) -> Self:
        if sys.getprofile() is not None:
            self._refuse("a profiler is running on this thread")
        self._collecting = gc.isenabled()
        gc.disable()
        sys.setprofile(self._event)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)
        if self._collecting:
            gc.enable()

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            if frame.f_code not in self._trusted:
                self._call(frame)
        elif event == "c_call" and frame.f_code in self._own_code:
            reason = _objection_to_builtin(argument)
            if reason is not None:
                self._refuse(reason)

    def _call(self, frame: FrameType) -> None:
        code = frame.f_code
        name = str(frame.f_globals.get("__name__", ""))
        top = name.partition(".")[0]
        caller = frame.f_back
        from_own = caller is not None and (caller.f_code in self._own_code or caller.f_code in self._lent)
        if top in _OURS:
            self._trusted.add(code)
        elif top == "torch":
            if _below(name, _NEVER_TORCH):
                self._refuse(f"it uses {name}.{code.co_qualname}")
            if from_own and not _below(name, _FREE_TORCH) and (name, code.co_name) not in _FREE_FUNCTIONS:
                wrapped = frame.f_locals.get("fn") if name == "torch._compile" else None
                called = f"{name}.{code.co_qualname}" if wrapped is None else f"{wrapped.__module__}.{wrapped.__name__}"
                self._refuse(f"it calls {called}")
            if code.co_name == "_wrapped_call_impl" and not is_stand_in(frame.f_locals.get("self")):
                self._refuse("it calls a module that is not one of its submodules")
        elif top in sys.stdlib_module_names:
            if from_own and top not in _FREE_STANDARD_LIBRARY:
                self._refuse(f"it calls {name}.{code.co_qualname}")
            if from_own:
                self._lent.add(code)
        else:
            self._own_code.add(code)
            facts = facts_of(code)
            if facts.refusal is not None:
                where = "" if code.co_name == "forward" else f" in {code.co_qualname}()"
                self._refuse(facts.refusal + where)
            self._entered(frame, facts)


@functools.lru_cache(maxsize=4096)
def _below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def _objection_to_builtin(function: Any) -> str | None:
    owner = getattr(function, "__self__", None)
    name = str(getattr(function, "__name__", function))
    home = getattr(owner, "__name__", None) if isinstance(owner, type(sys)) else None
    module = str(home or getattr(function, "__module__", None) or type(owner).__module__)
    if module == "builtins" and name in _EFFECTFUL_BUILTINS:
        return f"it calls {name}()"
    if module in _EFFECTFUL_MODULES or (owner is not None and type(owner).__module__ in _EFFECTFUL_MODULES):
        return f"it calls {module}.{name}()"
    if module == "torch._C" and name != "_has_torch_function":
        return f"it calls torch.{name}()"
    return None
