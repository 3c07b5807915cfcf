"""A plain training loop with PEFT and one line more; a small model of bytes learns this file. Takes a few seconds.

PYTHONPATH=python .venv/bin/python examples/finetune.py
"""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

import tsugi_kpool

ADAPTERS, ACTIVE = 4, 2  # N adapters in the model, K of them active in a step


def main(steps: int = 60) -> tuple[float, float]:
    """Returns the loss of the first and of the last step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    names = [f"adapter_{i}" for i in range(ADAPTERS)]
    model = get_peft_model(LlamaForCausalLM(config), lora, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora)

    report = tsugi_kpool.use_backend(model)  # the one line

    data = torch.tensor(list(Path(__file__).read_bytes()))
    optimizer = torch.optim.AdamW((p for n, p in model.named_parameters() if "lora_" in n), lr=1e-2)
    losses = []
    for step in (bar := trange(steps)):
        # Others have no gradient in this step, so the optimizer leaves them alone.
        active = [names[(step * ACTIVE + i) % ADAPTERS] for i in range(ACTIVE)]
        model.base_model.set_adapter(active)
        starts = torch.randint(len(data) - 64, (8,)).tolist()
        batch = torch.stack([data[start : start + 64] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    print(report)
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
