"""The share of a model that stands at sites, and what was passed over: told at every wrap."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

from torch import nn

from esper.core.sites.targets import Selection
from esper.user_warnings import warn_user

__all__ = ["report_share"]

_LOG = logging.getLogger("esper.core")
_SMALL = 0.5
_SHOWN = 4
_NO_LINEAR_MAPS = (  # although their weight may have two dimensions; the last is a part of MultiheadAttention
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
)


def report_share(model: nn.Module, selection: Selection, *, chosen: bool) -> None:
    """Log what share of the parameters stands at sites, and the classes of the modules that hold the others.

    Warns where linear maps that are no `nn.Linear`, as GPT-2's `Conv1D`, hold most of a model or number more than its
    sites; not if the layers were `chosen`, by the caller's `target_layers`.
    """
    at_sites = {id(each) for target in selection.targets.values() for each in target.parameters()}
    sizes = {id(each): each.numel() for each in model.parameters() if not nn.parameter.is_lazy(each)}
    passed_over, linear_maps = Counter[str](), Counter[str]()
    seen: set[int] = set(at_sites)
    for module in model.modules():
        own = [each for each in module.parameters(recurse=False) if id(each) in sizes and id(each) not in seen]
        seen.update(map(id, own))
        passed_over.update({type(module).__name__: sum(map(nn.Parameter.numel, own))} if own else {})
        weight = module._parameters.get("weight")
        is_map = weight is not None and any(weight is each for each in own) and weight.dim() == 2
        linear_maps.update([type(module).__name__] if is_map and not isinstance(module, _NO_LINEAR_MAPS) else [])
    total = sum(sizes.values())
    share = sum(size for each, size in sizes.items() if each in at_sites) / total if total else 0.0
    sites = len(selection.targets)
    told = f"{sites} {'site holds' if sites == 1 else 'sites hold'} {share:.0%} of the {total:,} parameters".replace(
        "%", " %"
    )
    others = _listed(
        f"{name} ({size / total:.0%})".replace("%", " %") for name, size in passed_over.most_common(_SHOWN)
    )
    _LOG.info("%s%s", told, f"; the others are in {others}" if passed_over else "")
    if chosen or not sites or not linear_maps or (share >= _SMALL and linear_maps.total() <= sites):
        return
    classes = _listed(f"{count} {name}" for name, count in linear_maps.most_common(_SHOWN))
    warn_user(
        f"{told}: passed over {classes}, since without target_layers only nn.Linear carries seeds. Name their types, "
        "names or patterns too, as in target_layers=[nn.Linear, Conv1D], or those layers alone that are to have seeds",
    )


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts)
