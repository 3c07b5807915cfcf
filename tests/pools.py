"""Small models with a pool, and training them, for the tests of the pool."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_models import tiny_llama
from tsugi_kpool import KPoolLoraConfig

TOKENS = (torch.arange(24).reshape(2, 12) * 7 + 3) % 64


def kpool(base: nn.Module | None = None, *, cast_adapters: bool = True, seed: int = 0, **config):
    """A tiny Llama with a pool of adapters that are not zero: 4 of rank 3, 2 active."""
    settings = dict(n_adapters=4, k_active=2, r=3, lora_alpha=5, init_lora_weights=False)
    base = tiny_llama() if base is None else base
    torch.manual_seed(seed)
    return get_peft_model(base, KPoolLoraConfig(**(settings | config)), autocast_adapter_dtype=cast_adapters)


def by_hand(model: nn.Module, base: nn.Module) -> nn.Module:
    """The same adapters as PEFT users build them: adapter_0 ... adapter_{N-1} from LoraConfig."""
    config = model.peft_config["default"]
    plain = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules)
    hand = get_peft_model(base, plain, adapter_name="adapter_0", autocast_adapter_dtype=False)
    for index in range(1, config.n_adapters):
        hand.add_adapter(f"adapter_{index}", plain, autocast_adapter_dtype=False)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in hand.named_parameters():
            parameter.data = parameters[name].detach().clone()
    return hand


def loss_of(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def train(model, pool, optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        with pool.step():
            loss = loss_of(model, (TOKENS + pool.current_step) % 64)
            loss.backward()
            pool.record_loss(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def pool_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
