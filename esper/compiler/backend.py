"""`torch.compile(model, backend="esper")`.

Dynamo hands over a graph in which every site is a marker. With no active seed the markers become the host's own linear
calls again and the graph goes to the inner compiler, which sees exactly what it would have seen without Esper. What
Dynamo keeps is a :class:`Dispatcher`, whose variant changes with the plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from esper import torch_internals
from esper.compiler.dispatcher import Dispatcher
from esper.compiler.inner import resolve_inner
from esper.execution.registry import runtime_by_id, runtime_of_site
from esper.execution.site_marker import mark_as_backend
from esper_passes import ElideDormant, runtimes_in, sites_in

__all__ = ["esper_backend"]

_LOG = logging.getLogger("esper.compiler")
_said: set[str] = set()


@mark_as_backend
def esper_backend(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo captured; registered with torch under the name "esper".

    `mode` and `options` are `torch.compile`'s and go to Inductor. `options["inner"]` names another inner compiler:
    "aot_eager", "eager", any registered backend, or a callable.
    """
    inner = resolve_inner(mode, options)
    sites, entered = sites_in(module.graph), runtimes_in(module.graph)
    if not sites and not entered:
        _say_once(
            "this graph has no sites: it compiles exactly as under the inner compiler. "
            "Wrap the model with esper.wrap() before torch.compile() for kernels to be loaded into it"
        )
        return inner(module, inputs)
    roots = [runtime_by_id(identity) for identity in entered]
    runtimes = list(dict.fromkeys([*(runtime_of_site(site) for site in sites), *roots]))
    marked = torch_internals.copy_for_recompile(module)
    dispatcher = Dispatcher(marked, torch_internals.fake_inputs(marked.graph), inner, runtimes, roots)
    if all(runtime.plan.restricted(sites).is_dormant for runtime in runtimes):
        host = ElideDormant()(module).graph_module
        host.recompile()
        empty = not any(node.op.startswith("call") for node in host.graph.nodes)
        dispatcher.adopt(host.forward if empty else inner(host, inputs))
    return dispatcher


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        _LOG.warning(message)
