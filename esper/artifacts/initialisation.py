"""Initial weights that are bit-identical in every process and on every machine.

Numbers are drawn as float64 uniforms on the CPU from a generator of their own (mt19937), one per tensor, seeded from
the blueprint's seed and the tensor's name. What follows is elementwise IEEE arithmetic, without reductions,
transcendental functions or LAPACK, whose results depend on the machine; the result is rounded to the kernel's dtype
once, at the end.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal, get_args

import torch
from torch import Tensor

from esper.artifacts.graph import DTYPES, TensorSpec

__all__ = ["INITS", "Init", "initialise"]

Init = Literal["zeros", "ones", "kaiming", "orthogonal"]
INITS: tuple[Init, ...] = get_args(Init)


def initialise(spec: TensorSpec, init: Init, seed: int) -> Tensor:
    """The initial value of `spec`; matrices are ``[out, in]``, as ``nn.Linear`` keeps them.

    "kaiming" is uniform with variance 2 / fan_in (He et al. 2015, arXiv:1502.01852, eq. 10); "orthogonal" has
    orthonormal rows or columns, whichever are fewer. Tensors of fewer than two dimensions are filled as vectors of
    fan-in 1 or unit length.
    """
    dtype = DTYPES[spec.dtype]
    if init == "zeros":
        return torch.zeros(spec.shape, dtype=dtype, device="cpu")
    if init == "ones":
        return torch.ones(spec.shape, dtype=dtype, device="cpu")
    draw = _kaiming if init == "kaiming" else _orthogonal
    return draw(spec.shape, _generator(seed, spec.name)).to(dtype)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"esper.init.v1\0{seed}\0{name}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:4], "little"))  # mt19937 takes 32 bits
    return generator


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform on [-1, 1)."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") * 2.0 - 1.0


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    fan_in = 1
    for size in shape[1:]:
        fan_in *= size
    return _uniform(shape, generator) * math.sqrt(6.0 / fan_in)


def _orthogonal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Unit vectors turned by layers of Givens rotations of random pairs.

    The first layers turn by 45 degrees either way, which spreads each vector evenly (as a randomised Hadamard transform
    does, but for any n); the last ones by random angles, cosine (1 - t²)/(1 + t²) and sine 2t/(1 + t²). Products, sums
    and quotients are exact to the last bit everywhere, which a QR decomposition is not.
    """
    rows = shape[0] if shape else 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    long, short = max(rows, columns), min(rows, columns)
    matrix = torch.zeros(long, short, dtype=torch.float64, device="cpu")
    start = torch.randperm(long, generator=generator, device="cpu")[:short]
    matrix[start, torch.arange(short, device="cpu")] = torch.where(
        _uniform((short,), generator) < 0, -1.0, 1.0
    ).double()
    half = long // 2
    for layer in range(long.bit_length() + 6 if half else 0):
        t = _uniform((half, 1), generator)
        if layer < long.bit_length() + 3:
            cosine = torch.full_like(t, math.sqrt(0.5))
            sine = torch.where(t < 0, -cosine, cosine)
        else:
            square = t * t
            cosine, sine = (1.0 - square) / (1.0 + square), (t + t) / (1.0 + square)
        matrix = matrix.index_select(0, torch.randperm(long, generator=generator, device="cpu"))
        a, b = matrix[:half], matrix[half : 2 * half]
        turned = a * cosine
        turned -= b * sine
        b *= cosine
        b += a * sine
        a.copy_(turned)
    return (matrix if rows >= columns else matrix.T).reshape(shape)
