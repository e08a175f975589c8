"""A llama that grows while Hugging Face's Trainer trains it, and a run that resumes: python examples/trainer.py"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

import esper
from esper.integrations.transformers import EsperTrainer

VOCABULARY, WIDTH = 32, 32


class GrowOnce(TrainerCallback):
    """Asks for a kernel in the middle of the run, and does not wait for it."""

    def __init__(self, kernel: str, at_step: int) -> None:
        self.kernel, self.at_step = kernel, at_step

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.at_step:
            ramp = esper.LinearRamp(0.0, 1.0, steps=20)
            given["model"].request_kernel("lm_head", 0, self.kernel, alpha=ramp, trainable=True)


def wrapped(platform: esper.Platform) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return esper.wrap(LlamaForCausalLM(config), platform=platform)


def main() -> None:
    tokens = torch.arange(64)[:, None] + torch.arange(12)[None, :]
    data = [{"input_ids": row % VOCABULARY, "labels": row % VOCABULARY} for row in tokens]
    with esper.Platform.embedded() as platform, tempfile.TemporaryDirectory() as folder:
        kernel = platform.compile_sync(esper.Blueprint.low_rank(WIDTH, VOCABULARY, rank=4)).id

        def trainer(model: Any, steps: int) -> EsperTrainer:
            arguments = TrainingArguments(
                folder, max_steps=steps, save_steps=60, logging_steps=20, learning_rate=1e-2, use_cpu=True,
                report_to=[], disable_tqdm=True,
            )  # fmt: skip
            callbacks = [GrowOnce(kernel, at_step=20)]
            return EsperTrainer(model, arguments, train_dataset=data, callbacks=callbacks)

        model = wrapped(platform)
        trainer(model, 60).train()
        print("after 60 steps:", model.kasmina_layers["lm_head"].state.lifecycle(0).name)

        again = wrapped(platform)
        trainer(again, 80).train(resume_from_checkpoint=True)
        print("resumed:", again.kasmina_layers["lm_head"].state.lifecycle(0).name)
        print(again.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=4, do_sample=False)[0].tolist())


if __name__ == "__main__":
    main()
