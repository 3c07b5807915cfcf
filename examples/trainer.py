"""A pool of eight adapters under transformers' Trainer, and the same run gone on with from a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tsugi_kpool import KPoolCallback, KPoolLoraConfig


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )
    config = KPoolLoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        n_adapters=8,
        k_active=2,
        aggregation_mode="buffer_convergence",
        trigger="noise_scale",
    )
    return get_peft_model(base, config)


def sequences(count: int) -> list[dict]:
    """Sequences in which each token follows from the one before."""
    ids = (torch.randint(64, (count, 1)) + 7 * torch.arange(24)) % 64
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def make_trainer(folder: Path, steps: int) -> Trainer:
    model = make_model()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_steps=steps // 2,
        eval_strategy="steps",
        eval_steps=steps // 2,
        logging_steps=steps // 4,
        report_to=[],
    )
    data, held_out = sequences(128), sequences(16)
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=held_out, callbacks=[KPoolCallback()])


def main(folder: Path, steps: int = 40) -> tuple[float, float, float]:
    """Returns the loss before and after training, and after a run that went on from the checkpoint in the middle."""
    trainer = make_trainer(folder, steps)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]

    resumed = make_trainer(folder, steps)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{steps // 2}"))
    again = resumed.evaluate()["eval_loss"]
    print(f"loss {before:.3f} -> {after:.3f}; resumed in the middle: {again:.3f}")
    return before, after, again


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
