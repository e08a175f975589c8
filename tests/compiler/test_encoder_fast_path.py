"""The fast path of nn.TransformerEncoder, which reads weights past its layers, under `backend="esper"`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import esper


@pytest.fixture
def fast_path() -> Iterator[None]:
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_a_dormant_encoder_computes_what_the_plain_one_does(
    fresh_dynamo: None, fast_path: None, enabled: bool, padded: bool
) -> None:
    torch.backends.mha.set_fastpath_enabled(enabled)
    host = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    model = esper.wrap(host)
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    compiled = torch.compile(model, backend="esper", options={"inner": "eager"})
    with torch.no_grad():
        expected = torch.compile(host, backend="eager")(x, src_key_padding_mask=mask)
        assert torch.equal(model(x, src_key_padding_mask=mask), host(x, src_key_padding_mask=mask))
        if enabled:
            torch.testing.assert_close(compiled(x, src_key_padding_mask=mask), expected)
        else:
            assert torch.equal(compiled(x, src_key_padding_mask=mask), expected)
