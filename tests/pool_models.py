"""Small models with a pool, and what the pool's tests do with them."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_models import TwoLinears, tiny_llama
from tsugi_kpool import KPoolLoraConfig


def two_linears():
    """The same at each call, so that two models that are built alike can be compared."""
    torch.manual_seed(1)
    return TwoLinears()


def pool_model(n=6, k=2, base: nn.Module | None = None, dtype=torch.float32, seed=0, name="default", **config):
    """A PEFT model with a pool whose adapters are random, not zero."""
    base = two_linears() if base is None else base
    settings = dict(r=3, lora_alpha=5, init_lora_weights=False, n_adapters=n, k_active=k)
    if isinstance(base, TwoLinears):
        settings["target_modules"] = ["first", "second"]
    torch.manual_seed(seed)
    return get_peft_model(base.to(dtype), KPoolLoraConfig(**(settings | config)), adapter_name=name)


def pool_by_hand(n=6, base: nn.Module | None = None, seed=0, **config):
    """The same as PEFT users build it from ``LoraConfig``."""
    settings = dict(r=3, lora_alpha=5, init_lora_weights=False, target_modules=["first", "second"]) | config
    base = two_linears() if base is None else base
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**settings), adapter_name="adapter_0")
    for i in range(1, n):
        model.add_adapter(f"adapter_{i}", LoraConfig(**settings))
    return model


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))


def tiny_bert():
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64)
    return BertForMaskedLM(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


#: A base model of each family, and the layers of it that get adapters.
FAMILIES = {
    "llama": (tiny_llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (tiny_gpt2, ["c_attn", "c_fc"]),
    "bert": (tiny_bert, ["query", "value"]),
}


def family(name: str, **config) -> nn.Module:
    make, targets = FAMILIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT turns fan_in_fan_out on for Conv1D and says so
        return pool_model(base=make(), target_modules=targets, **config)


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every adapter's parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def belongs(name: str, active, prefix="adapter_") -> bool:
    """Whether a parameter is one of these adapters'."""
    return any(f".{prefix}{i}." in f"{name}." for i in active)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    """A loss on data that the seed draws, of whatever kind the model takes."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model, "get_base_model") and hasattr(model.get_base_model(), "config"):
        ids = torch.randint(64, (2, 7), generator=generator)
        return model(input_ids=ids, labels=ids).loss
    dtype = next(model.parameters()).dtype
    return model(torch.randn(5, 12, generator=generator).to(dtype)).square().mean()
