"""Small random models under the names that PEFT's tests of target_parameters load from a hub, as a cache of their own."""

from __future__ import annotations

import sys
from pathlib import Path

COMMON = dict(
    vocab_size=128,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


def _models() -> dict[str, object]:
    from transformers import GptOssConfig, Llama4TextConfig, LlamaConfig

    experts = dict(intermediate_size=32, num_local_experts=4)
    return {
        "hf-internal-testing/tiny-random-LlamaForCausalLM": LlamaConfig(**COMMON, intermediate_size=64),
        "trl-internal-testing/tiny-Llama4ForCausalLM": Llama4TextConfig(
            **COMMON, **experts, num_experts_per_tok=1, intermediate_size_mlp=32, interleave_moe_layer_step=1
        ),
        "trl-internal-testing/tiny-GptOssForCausalLM": GptOssConfig(**COMMON, **experts, num_experts_per_tok=2),
    }


def make(folder: Path) -> None:
    """Write the models where huggingface_hub looks for them with HF_HUB_CACHE set to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name, config in _models().items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        target = folder / f"models--{name.replace('/', '--')}"
        (target / "refs").mkdir(parents=True, exist_ok=True)
        (target / "refs" / "main").write_text("0" * 40)
        model.save_pretrained(target / "snapshots" / ("0" * 40))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
