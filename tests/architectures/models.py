"""Architectures in small configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ARCHITECTURES", "Architecture"]

_VOCABULARY = 32


@dataclass(frozen=True)
class Architecture:
    """A model, inputs by name, and how an output is read of what it returns."""

    host: nn.Module
    inputs: dict[str, Tensor]
    result: Callable[[Any], Tensor] = lambda returned: returned

    def output(self, model: nn.Module, **inputs: Tensor) -> Tensor:
        """The output of `model`, which is the host or the host wrapped."""
        return self.result(model(**inputs))


def _transformers() -> Any:
    import transformers  # seconds, which the plain models do not need

    return transformers


def _tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, _VOCABULARY, (rows, length))


def _decoder(kind: str, **options: Any) -> Callable[[], Architecture]:
    def make() -> Architecture:
        library = _transformers()
        sizes = {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": _VOCABULARY, "pad_token_id": 0, "use_cache": False,
        }  # fmt: skip
        config = getattr(library, f"{kind}Config")(**{**sizes, **options})
        host = getattr(library, f"{kind}ForCausalLM")(config)
        return Architecture(host, {"input_ids": _tokens()}, lambda returned: returned.logits)

    return make


def _encoder(kind: str, **options: Any) -> Callable[[], Architecture]:
    def make() -> Architecture:
        library = _transformers()
        config = getattr(library, f"{kind}Config")(vocab_size=_VOCABULARY, **options)
        host = getattr(library, f"{kind}ForSequenceClassification")(config)
        inputs = {"input_ids": _tokens().clamp(min=2), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
        return Architecture(host, inputs, lambda returned: returned.logits)

    return make


_BERT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def _gpt2() -> Architecture:
    library = _transformers()
    config = library.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=_VOCABULARY, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Architecture(library.GPT2LMHeadModel(config), {"input_ids": _tokens()}, lambda returned: returned.logits)


def _t5() -> Architecture:
    library = _transformers()
    config = library.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=_VOCABULARY, dropout_rate=0.0,
        use_cache=False, decoder_start_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": _tokens(), "decoder_input_ids": _tokens(length=5)}
    return Architecture(library.T5ForConditionalGeneration(config), inputs, lambda returned: returned.logits)


def _vit() -> Architecture:
    library = _transformers()
    config = library.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    host = library.ViTForImageClassification(config)
    return Architecture(host, {"pixel_values": torch.randn(2, 3, 8, 8)}, lambda returned: returned.logits)


def _swin() -> Architecture:
    library = _transformers()
    config = library.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3,
        drop_path_rate=0.0,
    )  # fmt: skip
    host = library.SwinForImageClassification(config)
    return Architecture(host, {"pixel_values": torch.randn(2, 3, 16, 16)}, lambda returned: returned.logits)


def _whisper() -> Architecture:
    library = _transformers()
    config = library.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=_VOCABULARY, num_mel_bins=8, max_source_positions=10,
        max_target_positions=12, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
        use_cache=False, dropout=0.0,
    )  # fmt: skip
    host = library.WhisperForConditionalGeneration(config)
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": _tokens(length=5)}
    return Architecture(host, inputs, lambda returned: returned.logits)


def _mamba() -> Architecture:
    library = _transformers()
    config = library.MambaConfig(
        hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=_VOCABULARY, use_cache=False, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Architecture(
        library.MambaForCausalLM(config), {"input_ids": _tokens(length=3)}, lambda returned: returned.logits
    )


def _transformer() -> Architecture:
    host = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=True)
    return Architecture(host, {"src": torch.randn(2, 7, 16), "tgt": torch.randn(2, 5, 16)})


def _encoder_stack() -> Architecture:
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    mask = torch.tensor([[False] * 5 + [True] * 2] * 2)
    host = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Architecture(host, {"src": torch.randn(2, 7, 16), "src_key_padding_mask": mask})


class Recurrent(nn.Module):
    """An LSTM with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 16, num_layers=2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0])
        return y


class Convolutional(nn.Module):
    """Convolutions with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(2))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x).flatten(1))
        return y


ARCHITECTURES: Mapping[str, Callable[[], Architecture]] = {
    "llama": _decoder("Llama", num_hidden_layers=2),
    "qwen2": _decoder("Qwen2"),
    "mistral": _decoder("Mistral", sliding_window=4),
    "mixtral": _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "gpt2": _gpt2,
    "bert": _encoder("Bert", **_BERT),
    "roberta": _encoder("Roberta", **_BERT, pad_token_id=1),
    "distilbert": _encoder(
        "DistilBert", dim=16, hidden_dim=24, n_layers=1, n_heads=2, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0, max_position_embeddings=16,
    ),
    "t5": _t5,
    "vit": _vit,
    "swin": _swin,
    "whisper": _whisper,
    "mamba": _mamba,
    "nn.Transformer": _transformer,
    "nn.TransformerEncoder": _encoder_stack,
    "LSTM": lambda: Architecture(Recurrent(), {"x": torch.randn(2, 5, 8)}),
    "convolutions": lambda: Architecture(Convolutional(), {"x": torch.randn(2, 3, 8, 8)}),
}  # fmt: skip
