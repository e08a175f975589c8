"""Modules become blueprints through torch.export, or are refused by the name of the operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.artifacts import Blueprint, BlueprintError, Limits, build_artifact


class Of(nn.Module):
    """A module of a function and the modules and parameters that it uses."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Plain(nn.Module):
    """A module of a function alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(4)) + 1.0)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("offset", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale + self.offset  # type: ignore[no-any-return]  # buffers are tensors


class Mixer(nn.Module):
    """Mixes 4 tokens of 2 features inside one position, as MLP-Mixer does."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = nn.Linear(4, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(x.shape[0], 4, 2)
        h = h + self.tokens(h.transpose(1, 2)).transpose(1, 2)
        return (h + F.gelu(self.channels(h))).flatten(1)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 3),
    "identity": nn.Identity,
    "mlp": lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8)),
    "in place": lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(inplace=True), nn.Linear(4, 8)),
    "in place arithmetic": lambda: Plain(lambda x: (x + 1).mul_(2).add_(x)),
    "evaluated dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).eval(),
    "normalised": lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8)),
    "plain norm": lambda: nn.LayerNorm(8, elementwise_affine=False, bias=False),
    "buffers": Buffered,
    "mixer": Mixer,
    "glu": nn.GLU,
    "prelu": lambda: nn.PReLU(8, init=0.3),
    "normalize": lambda: Plain(lambda x: F.normalize(x, dim=-1)),
    "swiglu": lambda: Of(
        lambda m, x: m.d(F.silu(m.g(x)) * m.u(x)), g=nn.Linear(8, 5), u=nn.Linear(8, 5), d=nn.Linear(5, 8)
    ),
    "row weight": lambda: Of(lambda m, x: x * m.w + 1, w=parameter(1, 8)),
    "scalars": lambda: Plain(lambda x: (2 - x) * 3 / 7 + 1 / (x.abs() + 1) - 0.5 + (-x) ** 2),
    "alpha": lambda: Plain(lambda x: torch.add(x, x.sin(), alpha=2) - torch.sub(x, 1.0, alpha=3)),
    "reversed alpha": lambda: Plain(lambda x: torch.rsub(x, x.cos(), alpha=4) + torch.rsub(x, 2.0, alpha=3)),
    "addmm": lambda: Of(lambda m, x: torch.addmm(m.b, x, m.w), w=parameter(8, 5), b=parameter(5)),
    "matrix": lambda: Of(lambda m, x: x @ m.w @ m.v.T, w=parameter(8, 5), v=parameter(6, 5)),
    "batched matrix": lambda: Of(lambda m, x: (x.view(-1, 2, 4) @ m.w).flatten(1), w=parameter(4, 3)),
    "gram": lambda: Plain(lambda x: (x.view(-1, 4, 2) @ x.view(-1, 2, 4)).flatten(1)),
    "weight on the left": lambda: Of(lambda m, x: (m.w @ x.view(-1, 4, 2)).flatten(1), w=parameter(3, 4)),
    "softmaxes": lambda: Plain(lambda x: x.softmax(-1) + F.log_softmax(x, 1)),
    "reductions": lambda: Plain(
        lambda x: x
        - x.mean(-1, keepdim=True)
        + x.var(1, keepdim=True)
        + x.std(1, unbiased=False, keepdim=True)
        + x.amax(1, True)
        + x.max(1, keepdim=True).values
        + x.logsumexp(1, keepdim=True)
        + x.sum(1)[:, None]
    ),
    "pieces": lambda: Plain(
        lambda x: torch.cat([*x.chunk(3, 1), *x.split([3, 5], -1), x[:, 1:4], x.narrow(1, 2, 2), x[:, 3:4]], 1)
    ),
    "unbind": lambda: Plain(lambda x: torch.stack(x.view(-1, 2, 4).unbind(1)[::-1], 1).flatten(1)),
    "select": lambda: Plain(lambda x: x[:, 0].unsqueeze(-1) + x[:, -1:].squeeze(-1)[:, None] + x),
    "permutations": lambda: Plain(
        lambda x: x.view(-1, 2, 2, 2).permute(0, 3, 1, 2).movedim(1, 3).transpose(-1, -2).mT.reshape(-1, 8)
    ),
    "expand": lambda: Plain(lambda x: x[:, None, :].expand(-1, 3, -1).flatten(1) + x.repeat_interleave(3, 1)),
    "clamps": lambda: Plain(lambda x: x.clamp(-1, 1) + x.clamp(min=0) + x.clamp_max(0.5) + F.relu6(x) + F.hardtanh(x)),
    "activations": lambda: nn.Sequential(
        nn.GELU(), nn.SiLU(), nn.Tanh(), nn.LeakyReLU(0.2), nn.ELU(0.5), nn.SELU(), nn.CELU(0.3), nn.Softplus(2.0),
        nn.Mish(), nn.Hardswish(), nn.Hardsigmoid(), nn.LogSigmoid(), nn.Softsign(), nn.Tanhshrink(), nn.Sigmoid(),
    ),
    "constants": lambda: Plain(
        lambda x: x @ torch.eye(8) * torch.arange(8.0) + torch.full((8,), 3.0) + torch.tensor(2)
    ),
    "repeated constant": lambda: Plain(lambda x: x + torch.ones(x.shape[0], 8) * 2),
    "cast to itself": lambda: Plain(lambda x: x.float().to(torch.float32).type_as(x) * 2),
    "reused": lambda: Of(lambda m, x: m.l(m.l(x)), l=nn.Linear(8, 8)),
    "weight of a weight": lambda: Of(lambda m, x: x @ m.l(m.w), l=nn.Linear(5, 4), w=parameter(8, 5)),
    "flip": lambda: Plain(lambda x: x.flip(-1).cumsum(1)),
    "host": lambda: Of(lambda m, x: x * m.host, host=parameter(8)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_kernel_computes_what_the_module_does(name: str) -> None:
    module = MODULES[name]()
    blueprint = Blueprint.from_module(module, 8)
    artifact = build_artifact(Blueprint.from_json(blueprint.to_json()))
    kernel = artifact.graph.to_module(artifact.tensors)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(kernel(x), module(x.flatten(0, 1)).unflatten(0, (2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernel(x[0, 0]), module(x[0, :1])[0], rtol=1e-5, atol=1e-5)
    assert set(dict(module.named_parameters())) - {"host"} <= set(artifact.tensors)


def test_weights_are_kept_bit_for_bit() -> None:
    module = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    _, tensors = Blueprint.from_module(module, 8).build()
    assert list(tensors) == ["0.weight", "0.bias", "2.weight"]
    for name, value in module.named_parameters():
        assert torch.equal(tensors[name], value)


def test_single_numbers_in_buffers_stay_numbers() -> None:
    graph, tensors = Blueprint.from_module(Buffered(), 8).build()
    assert sorted(tensors) == ["linear.bias", "linear.weight", "offset"]
    assert {"value": 2.0} in [dict(node.attributes) for node in graph.nodes]


def test_dtype_follows_the_module_or_the_argument() -> None:
    module = nn.Linear(8, 8)
    for dtype in (None, "float64", "bfloat16", "float16"):
        blueprint = Blueprint.from_module(module, 8, dtype=dtype)
        assert blueprint.dtype == (dtype or "float32")
        assert module.weight.dtype == torch.float32
    assert Blueprint.from_module(nn.Linear(8, 8).double(), 8).dtype == "float64"
    with pytest.raises(BlueprintError, match="dtype is 'int8'"):
        Blueprint.from_module(module, 8, dtype="int8")
    with pytest.raises(BlueprintError, match=r"parameters are torch.float32, torch.float64; pass dtype="):
        Blueprint.from_module(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).double()), 8)


def test_equal_modules_give_equal_ids_and_exporting_changes_nothing() -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)).eval()
    torch.manual_seed(0)
    second = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)).eval()
    state = torch.get_rng_state()
    assert Blueprint.from_module(first, 8).id == Blueprint.from_module(second, 8).id
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in first.parameters())


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "dropout": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout()), r"aten.dropout.default in 1 .* call .eval\(\)"),
    "random": (lambda: Plain(lambda x: x + torch.rand(8)), "aten.rand.default .* it draws random numbers"),
    "comparison": (lambda: Plain(lambda x: torch.where(x > 0, x, -x)), "aten.gt.Scalar does not land"),
    "batch norm": (lambda: nn.BatchNorm1d(8), "must return one tensor and change no buffer"),
    "evaluated batch norm": (lambda: nn.BatchNorm1d(8).eval(), "aten.batch_norm.default"),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16).eval(), "in self_attn does not land"),
    "rnn": (lambda: nn.LSTM(8, 8), "must return one tensor"),
    "conv": (lambda: nn.Conv1d(1, 1, 1), "torch.export cannot trace Conv1d"),
    "wrong features": (lambda: nn.Linear(7, 8), "torch.export cannot trace Linear"),
    "two inputs": (lambda: nn.Bilinear(8, 8, 3), "torch.export cannot trace Bilinear"),
    "tuple": (lambda: Plain(lambda x: (x, x)), "must return one tensor"),  # type: ignore[arg-type,return-value]  # the point
    "scalar output": (lambda: Plain(lambda x: x.sum()), r"maps \[11, 8\] to \[\]"),
    "batch mean": (lambda: Plain(lambda x: x - x.mean(0)), "aten.mean.dim .* works on the leading dimension"),
    "total": (lambda: Plain(lambda x: x / x.sum()), "aten.sum.dim_IntList .* the leading one too"),
    "batch softmax": (lambda: nn.Softmax(0), "aten.softmax.int .* works on the leading dimension"),
    "batch gram": (lambda: Plain(lambda x: x @ x.T @ x), "moves the leading dimension"),
    "batch size": (lambda: Plain(lambda x: x / x.shape[0]), "something else for other batch sizes"),
    "batch reshape": (lambda: Plain(lambda x: x.reshape(8, -1).T), "across the leading dimension"),
    "batch flip": (lambda: Plain(lambda x: x.flip(0)), "works on the leading dimension"),
    "batch cut": (lambda: Plain(lambda x: x + x[:1]), "works on the leading dimension"),
    "batch cat": (lambda: Plain(lambda x: torch.cat([x, x])[: x.shape[0]]), "works on the leading dimension"),
    "per position weight": (lambda: Of(lambda m, x: x + m.w, w=parameter(11, 8)), "Attempting to broadcast"),
    "outer broadcast": (lambda: Plain(lambda x: (x[:, None] + x).sum(1)), "across the leading dimension"),
    "cast": (lambda: Plain(lambda x: x.double().float()), "casts to torch.float64"),
    "control flow": (lambda: Plain(lambda x: x if x.sum() > 0 else -x), "torch.export cannot trace"),
    "numpy": (lambda: Plain(lambda x: x + float(x[0, 0].item())), "torch.export|does not land"),
    "indices": (lambda: Plain(lambda x: x + x.max(1, keepdim=True).indices), "indices of a maximum"),
    "rounding": (lambda: Plain(lambda x: torch.div(x, 2, rounding_mode="floor")), "it rounds"),
    "constant output": (lambda: Plain(lambda x: torch.ones(x.shape[0], 3)), "batch sizes|does not depend|leading"),
    "nan weights": (lambda: Of(lambda m, x: x * m.w, w=nn.Parameter(torch.full((8,), torch.nan))), "holds NaN"),
    "infinite number": (lambda: Plain(lambda x: x.clamp(max=float("inf"))), "a finite number"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_is_no_kernel(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(BlueprintError, match=message):
        Blueprint.from_module(make(), 8)


def test_weights_count_toward_limits() -> None:
    with pytest.raises(BlueprintError, match=r"Limits.max_parameters is 10"):
        Blueprint.from_module(nn.Linear(8, 8), 8, limits=Limits(max_parameters=10))


def test_error_names_the_submodule() -> None:
    module: Any = nn.Sequential()
    module.add_module("inner", nn.Sequential(nn.Linear(8, 8), nn.Softmax(0)))
    with pytest.raises(BlueprintError, match=r"in inner\.1 "):
        Blueprint.from_module(module, 8)
