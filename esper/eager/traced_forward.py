"""A model that runs as code generated from torch.fx traces, whole or by its largest traceable parts."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from esper.eager.parts import Part, Run, entrance, part_of
from esper.eager.tracer import Trace, is_of_torch_nn, modules_of
from esper.errors import EsperError
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.plans.plan import Plan
from esper.execution.plans.runtime import Runtime

__all__ = ["NotTracedError", "TracedForward"]


class NotTracedError(EsperError, AttributeError):
    """A graph was asked for of a model that is not traced whole.

    An `AttributeError`, for `hasattr` and whatever else walks over a module's attributes, `torch.jit` for one.
    """


class TracedForward:
    """The forward of `root` as generated code, for the plan of `runtime`.

    - `forward` is the root's own Python, and `as_modules` what runs it where `root` is not traced whole.
    - `tick` is called once in each forward that runs as generated code.
    - `switched` is told what the next forward is to run, whenever that changes.
    - `subclass` makes subclasses of module classes that pass for the class itself: modules below `root` with sites in
      them become instances of such, so that they are traced where untraced Python calls them.

    Traces are made by the thread that calls, where a call needs one. :meth:`prepare` belongs to any thread, everything
    else to those that run the model.
    """

    def __init__(
        self,
        root: nn.Module,
        runtime: Runtime,
        forward: Run,
        as_modules: Run,
        tick: Callable[[], object],
        switched: Callable[[Run], None],
        subclass: Callable[[type, Mapping[str, Any]], type],
    ) -> None:
        def in_parts(*args: Any, **kwargs: Any) -> Any:
            runtime.divide()
            return as_modules(*args, **kwargs)

        self._aside: set[int] = set()
        self._parts = [
            Part(root, forward, runtime, "", self._aside, as_modules=in_parts, first=tick, switched=switched)
        ]
        for path, module in modules_of(root).items():
            kind = type(module)
            if (
                is_of_torch_nn(module)
                or isinstance(module, KasminaLayer)
                or kind.forward is nn.Module.forward
                or not _has_sites(module)
            ):
                continue
            try:
                object.__setattr__(module, "__class__", entrance(kind, subclass))
            except TypeError:  # of a layout that its subclasses do not share: what is below may still be traced
                continue
            self._parts.append(Part(module, types.MethodType(kind.forward, module), runtime, path, self._aside))

    # -- what runs -------------------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        """What a forward runs now."""
        return self._parts[0].run

    def follow(self, plan: Plan) -> None:
        """Switch to the code for `plan`. Also to be called when training flags have changed."""
        for part in self._parts:
            part.follow(plan)

    def prepare(self, plan: Plan) -> None:
        """Generate the code for `plan` of what has been traced; any thread."""
        for part in self._parts:
            part.prepare(plan)

    def changed(self) -> None:
        """Hooks or children of modules in the tree have changed."""
        for part in self._parts:
            part.changed()

    def retrace(self) -> None:
        """Trace anew where the next calls need it."""
        for part in self._parts:
            part.retrace()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Until the block is left, no part runs as generated code, on whatever thread it is called."""
        self._aside.add(threading.get_ident())
        try:
            yield
        finally:
            self._aside.discard(threading.get_ident())

    # -- what was traced -------------------------------------------------------------------------------------------

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph of the model, in its present training state, with its sites as calls of `KasminaLayer`.

        Raises :class:`NotTracedError` if the model is not traced whole.
        """
        root = self._parts[0]
        traced = root.present()
        if isinstance(traced, Trace):
            return root.graph_module(traced)
        raise NotTracedError(f"the model is not traced whole ({traced}); explain() shows which of its parts are")

    def survey(self) -> tuple[dict[nn.Module, str], dict[str, str]]:
        """For each site that a traced part runs, the name of that part; for what is not traced whole, the reason.

        What has not been called yet is traced for a call with a tensor for each argument that has to be given.
        """
        sites: dict[nn.Module, str] = {}
        untraced: dict[str, str] = {}
        root = self._parts[0]
        names = {module: path for path, module in modules_of(root.module).items()}
        stack: list[nn.Module] = [root.module]
        while stack:
            module = stack.pop()
            part, name = part_of(module), names.get(module, "")
            traced = None if part is None else part.present()
            if isinstance(traced, Trace):
                called = list(traced.calls())
                sites.update((each, name) for each in called if isinstance(each, KasminaLayer))
            else:
                called = [each for each in module._modules.values() if each is not None]
                if traced is not None:
                    untraced[name] = traced
                elif type(module).forward is not nn.Module.forward:
                    untraced[name] = f"{type(module).__name__} is called as it is"
            wanted = (each for each in called if not isinstance(each, KasminaLayer) and _has_sites(each))
            stack.extend(reversed(list(wanted)))
        return sites, untraced


def _has_sites(module: nn.Module) -> bool:
    return any(isinstance(each, KasminaLayer) for each in modules_of(module).values())
