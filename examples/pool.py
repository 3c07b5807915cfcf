"""A pool of eight adapters, two active in a step: trained, resumed, and exported as ordinary LoRA."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import tsugi_kpool


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
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


def batch() -> torch.Tensor:
    """Sequences in which each token follows from the one before."""
    return (torch.randint(64, (16, 1)) + 7 * torch.arange(24)) % 64


def train(model: torch.nn.Module, steps: int, state: dict | None = None) -> dict:
    """Trains for ``steps``, from ``state`` if there is one, and returns the state to go on from."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with tsugi_kpool.attach(model, optimizer=optimizer) as pool:
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
            pool.load_state_dict(state["pool"])
        for _ in range(steps):
            with pool.step():
                ids = batch()
                loss = model(input_ids=ids, labels=ids).loss
                pool.record_loss(loss)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        # The pool first: it finishes what is in flight, which steps the optimizer.
        return {"pool": pool.state_dict(), "optimizer": optimizer.state_dict()}


@torch.no_grad()
def evaluate(model: torch.nn.Module, ids: torch.Tensor) -> float:
    return model(input_ids=ids, labels=ids).loss.item()


def main(steps: int = 40) -> tuple[float, float, float]:
    """Returns the loss before and after training, and that of the exported adapter."""
    config = tsugi_kpool.KPoolLoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", n_adapters=8, k_active=2, routing_strategy="loss_aware"
    )
    model = get_peft_model(make_base(), config)
    model.print_trainable_parameters()
    held_out = batch()
    before = evaluate(model, held_out)

    with tempfile.TemporaryDirectory() as folder:
        state = train(model, steps // 2)
        model.save_pretrained(Path(folder) / "pool")
        model = PeftModel.from_pretrained(make_base(), Path(folder) / "pool", is_trainable=True)
        train(model, steps - steps // 2, state)

        with tsugi_kpool.whole_pool(model):
            after = evaluate(model, held_out)
        tsugi_kpool.export(model, Path(folder) / "lora", mode="concat")
        plain = PeftModel.from_pretrained(make_base(), Path(folder) / "lora")  # needs no tsugi_kpool
        exported = evaluate(plain, held_out)
    print(f"loss {before:.3f} -> {after:.3f}; exported as one LoRA adapter of rank 32: {exported:.3f}")
    return before, after, exported


if __name__ == "__main__":
    main()
