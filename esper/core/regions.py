"""Regional compilation: the repeated blocks of a model, each compiled by itself, share what is compiled for one."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from torch import nn

from esper import torch_internals
from esper.core.errors import RegionError, described
from esper.core.morphable_model import MorphableModel
from esper.errors import shown
from esper.execution.kasmina_layer import KasminaLayer, LinearSite

__all__ = ["compile_blocks"]

_Block = str | type[nn.Module]


def compile_blocks(
    model: MorphableModel,
    blocks: _Block | Iterable[_Block] | None = None,
    *,
    backend: Any = "esper",
    **options: Any,
) -> list[str]:
    """Compile the repeated blocks of a wrapped model, each by itself, and return their dotted names.

    Blocks of one structure are traced once and share their compiled code, dormant and with kernels: the time to compile
    a model, and to compile for a kernel or for one in every block, does not grow with its depth. The model is called as
    before, and still changes in all blocks between two forwards. What is not in a block runs as it is.

    - `blocks`: by default the children of every `nn.ModuleList` and `nn.Sequential` that holds at least two of the same
      class with the same linear layers with seeds. Else types, exact dotted names and glob patterns, one or several; a
      `nn.ModuleList` stands for its children, and of modules inside of each other the outermost is taken.
    - `backend` and all other options are those of `torch.compile`. Dynamo counts the compilations of all blocks of a
      class together; where `torch.compile` takes a `recompile_limit`, it is 8 for each block unless it is given.

    Copies and pickles of the model are not compiled, as those of any module. Raises :class:`RegionError` for a model
    that is not wrapped, or compiled as a whole, and for blocks that it does not have; nothing is compiled then.
    """
    if not isinstance(model, MorphableModel):
        raise RegionError(f"compile_blocks takes what esper.wrap() returned, not {described(model)}")
    if torch_internals.is_compiled_in_place(model):
        raise RegionError("the model is compiled as a whole, by its compile(): its blocks are part of that")
    chosen = list(_repeated("", model)) if blocks is None else _named(model, blocks)
    if not chosen:
        raise RegionError(
            "no blocks with seeds are repeated in the model: name them with blocks=..., or compile it as a whole, "
            'with torch.compile(model, backend="esper")'
        )
    options = {**torch_internals.recompile_limit(8 * len(chosen)), **options}
    for name in chosen:
        model.get_submodule(name).compile(backend=backend, **options)
    model.retrace()  # in mode="fx": a trace from before has the blocks' own operations
    return chosen


def _repeated(name: str, module: nn.Module) -> Iterator[str]:
    """The blocks of the outermost lists that repeat one."""
    children = {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
    if isinstance(module, nn.ModuleList | nn.Sequential):
        structures = {key: _structure(child) for key, child in children.items()}
        counted = Counter(each for each in structures.values() if each is not None)
        if any(count > 1 for count in counted.values()):
            yield from (key for key, structure in structures.items() if structure is not None)
            return
    for key, child in children.items():
        yield from _repeated(key, child)


def _structure(module: nn.Module) -> Hashable | None:
    """What is the same for blocks that are taken for repeated; None for what is no block."""
    if isinstance(module, LinearSite):
        return None
    sites = [(key, type(each), each.features) for key, each in module.named_modules() if isinstance(each, KasminaLayer)]
    return (module.__class__, tuple(sites)) if sites else None


def _named(model: nn.Module, blocks: _Block | Iterable[_Block]) -> list[str]:
    several = isinstance(blocks, Iterable) and not isinstance(blocks, str | type | nn.Module)
    wanted: list[object] = list(blocks) if several else [blocks]  # type: ignore[arg-type]  # mypy does not follow `several`
    modules = {name: module for name, module in model.named_modules() if name}
    found = {name for each in wanted for name in _matching(modules, each)}
    return [name for name in modules if name in found and not found.intersection(_above(name))]


def _matching(modules: dict[str, nn.Module], block: object) -> list[str]:
    if isinstance(block, type):
        names = [name for name, module in modules.items() if isinstance(module, block)]
    elif isinstance(block, str):
        names = [name for name in modules if name == block or fnmatch.fnmatchcase(name, block)]
    else:
        raise RegionError(f"blocks takes module types, names and patterns, not {shown(block)}")
    lists = [name for name in names if isinstance(modules[name], nn.ModuleList)]
    names = [name for name in names if name not in lists]
    names += [f"{name}.{key}" for name in lists for key, _ in modules[name].named_children()]
    if not names:
        wish = block.__name__ if isinstance(block, type) else block
        near = difflib.get_close_matches(wish, [*modules, *{type(each).__name__ for each in modules.values()}], n=4)
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        raise RegionError(f"blocks: nothing in the model is {wish!r}{hint}")
    return names


def _above(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
