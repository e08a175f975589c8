"""A small kernel of every kind, and what it has to compute."""

from esper.artifacts import Blueprint, build_artifact

IN, OUT, RANK = 6, 4, 3


def bottleneck(start="kaiming", dtype="float32"):
    return build_artifact(Blueprint.bottleneck(IN, OUT, RANK, start=start, dtype=dtype, seed=3))


def reference(artifact, x, host=None):
    """The artifact's own module in float64."""
    tensors = {name: tensor.double() for name, tensor in artifact.tensors.items()}
    module = artifact.graph.to_module(tensors)
    return module(x.double()) if host is None else module(x.double(), host.double())
