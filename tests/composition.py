"""Kernels of every way to read a site, each written once more in plain PyTorch, and the formula that blends them.

Nothing here uses Esper's arithmetic: a kind's `function` says what its blueprint is to compute, :func:`composed` what
a site is to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from esper.artifacts import Blueprint, KernelGraph, Node, TensorSpec

__all__ = ["ADDED", "AFFINE", "IN", "KINDS", "OUT", "Kind", "Planted", "composed"]

IN, OUT = 4, 6
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """`blueprint(seed, dtype)`, and what its kernel computes of its parameters by name, the input and the output."""

    blueprint: Callable[[int, str], Blueprint]
    function: Callable[[Parameters, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Planted:
    """A kernel at a site: its kind, its parameters by name (float64), its share, and whether it is detached."""

    kind: str
    parameters: Parameters
    alpha: float
    isolate: bool = False


def composed(x: Tensor, weight: Tensor, bias: Tensor | None, seeds: Sequence[Planted]) -> Tensor:
    """`y = host(x)`, then for each seed in order `y = alpha K(x, y) + (1 - alpha) y`."""
    y = functional.linear(x, weight, bias)
    for seed in seeds:
        given = (x.detach(), y.detach()) if seed.isolate else (x, y)
        y = seed.alpha * KINDS[seed.kind].function(seed.parameters, *given) + (1 - seed.alpha) * y
    return y


def _graph(*nodes: Node, **shapes: tuple[int, ...]) -> Callable[[int, str], Blueprint]:
    def blueprint(seed: int, dtype: str) -> Blueprint:
        specs = tuple(TensorSpec(name, shape, dtype) for name, shape in shapes.items())
        graph = KernelGraph(IN, OUT, dtype, specs, nodes, nodes[-1].name)
        return Blueprint.from_graph(graph, dict.fromkeys(shapes, "kaiming"), seed=seed)

    return blueprint


def _linear(p: Parameters, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def _bottleneck(p: Parameters, x: Tensor) -> Tensor:
    return _linear(p, "up", functional.gelu(_linear(p, "down", x)))


def _gated(p: Parameters, x: Tensor) -> Tensor:
    return _linear(p, "down", functional.silu(_linear(p, "gate", x)) * _linear(p, "up", x))


def _deepened(p: Parameters, y: Tensor) -> Tensor:
    normed = functional.layer_norm(y, (OUT,), p["norm.weight"], p["norm.bias"])
    return _linear(p, "down", functional.gelu(_linear(p, "up", normed)))


_SQUASHED = (Node("s", "mul", ("host", "p"), {}), Node("t", "tanh", ("s",), {}))
_W, _P = (OUT, IN), (OUT,)

KINDS = {
    "affine": Kind(
        lambda seed, dtype: Blueprint.affine(IN, OUT, start="kaiming", seed=seed, dtype=dtype),
        lambda p, x, y: _linear(p, "linear", x),
    ),
    "low rank": Kind(
        lambda seed, dtype: Blueprint.low_rank(IN, OUT, 2, start="kaiming", seed=seed, dtype=dtype),
        lambda p, x, y: _linear(p, "up", _linear(p, "down", x)),
    ),
    "bottleneck": Kind(
        lambda seed, dtype: Blueprint.bottleneck(IN, OUT, 3, start="kaiming", seed=seed, dtype=dtype),
        lambda p, x, y: _bottleneck(p, x),
    ),
    "affine, added": Kind(
        lambda seed, dtype: Blueprint.affine(IN, OUT, start="identity", seed=seed, dtype=dtype),
        lambda p, x, y: y + _linear(p, "linear", x),
    ),
    "low rank, added": Kind(
        lambda seed, dtype: Blueprint.low_rank(IN, OUT, 2, bias=True, start="identity", seed=seed, dtype=dtype),
        lambda p, x, y: y + _linear(p, "up", _linear(p, "down", x)),
    ),
    "bottleneck, added": Kind(
        lambda seed, dtype: Blueprint.bottleneck(IN, OUT, 3, start="identity", seed=seed, dtype=dtype),
        lambda p, x, y: y + _bottleneck(p, x),
    ),
    "gated, added": Kind(
        lambda seed, dtype: Blueprint.gated_mlp(IN, OUT, 3, start="identity", seed=seed, dtype=dtype),
        lambda p, x, y: y + _gated(p, x),
    ),
    "widen, added": Kind(
        lambda seed, dtype: Blueprint.widen(IN, OUT, 3, activation="tanh", seed=seed, dtype=dtype),
        lambda p, x, y: y + _linear(p, "fan_out", _linear(p, "fan_in", x).tanh()),
    ),
    "two maps, added": Kind(
        _graph(
            Node("a", "linear", ("x", "v"), {}),
            Node("b", "linear", ("x", "w"), {}),
            Node("c", "tanh", ("b",), {}),
            Node("d", "add", ("host", "a"), {}),
            Node("y", "add", ("c", "d"), {}),
            v=_W,
            w=_W,
        ),
        lambda p, x, y: (x @ p["w"].T).tanh() + y + x @ p["v"].T,
    ),
    "a vector, added": Kind(_graph(Node("y", "add", ("p", "host"), {}), p=_P), lambda p, x, y: y + p["p"]),
    "output scaled": Kind(_graph(Node("y", "mul", ("host", "p"), {}), p=_P), lambda p, x, y: y * p["p"]),
    "output squashed": Kind(_graph(*_SQUASHED, p=_P), lambda p, x, y: (y * p["p"]).tanh()),
    "output squashed, added": Kind(
        _graph(*_SQUASHED, Node("y", "add", ("host", "t"), {}), p=_P), lambda p, x, y: y + (y * p["p"]).tanh()
    ),
    "output mapped, added": Kind(
        _graph(Node("a", "linear", ("host", "w"), {}), Node("y", "add", ("a", "host"), {}), w=(OUT, OUT)),
        lambda p, x, y: y + y @ p["w"].T,
    ),
    "output deepened, added": Kind(
        lambda seed, dtype: Blueprint.deepen(IN, OUT, 3, seed=seed, dtype=dtype),
        lambda p, x, y: y + _deepened(p, y),
    ),
    "output doubled": Kind(
        _graph(Node("a", "add", ("host", "host"), {}), Node("y", "add", ("a", "p"), {}), p=_P),
        lambda p, x, y: 2 * y + p["p"],
    ),
    "output added twice": Kind(
        _graph(Node("a", "add", ("host", "p"), {}), Node("y", "add", ("a", "host"), {}), p=_P),
        lambda p, x, y: 2 * y + p["p"],
    ),
    "output less a map": Kind(
        _graph(Node("a", "linear", ("x", "w"), {}), Node("y", "sub", ("host", "a"), {}), w=_W),
        lambda p, x, y: y - x @ p["w"].T,
    ),
}  # fmt: skip
"""By name; those named "added" add to the output what depends on the input alone, as an identity start does, but for
those whose names begin with "output"."""

ADDED = tuple(name for name in KINDS if name.endswith("added") and not name.startswith("output"))
AFFINE = ("affine", "low rank", "affine, added", "low rank, added", "a vector, added", "output less a map")
