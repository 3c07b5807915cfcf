"""Small mixtures of experts of transformers' families, and adapters on their parameters."""

from __future__ import annotations

import warnings

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

COMMON = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts_per_tok=2,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)
DEEPSEEK = dict(
    intermediate_size=48,
    moe_intermediate_size=24,
    n_routed_experts=4,
    n_shared_experts=1,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
)
LATENT = dict(
    q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, num_key_value_heads=4
)

#: transformers' class without its "Config", what its configuration has beside COMMON, and the block of experts in a layer.
FAMILIES = {
    "qwen3_moe": (
        "Qwen3Moe",
        dict(intermediate_size=48, moe_intermediate_size=24, num_experts=4, head_dim=8),
        "mlp",
    ),
    "mixtral": ("Mixtral", dict(intermediate_size=24, num_local_experts=4), "mlp"),
    "olmoe": ("Olmoe", dict(intermediate_size=24, num_experts=4), "mlp"),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK | LATENT, "mlp"),
    "glm4_moe": ("Glm4Moe", DEEPSEEK | dict(head_dim=8), "mlp"),
    "gpt_oss": ("GptOss", dict(intermediate_size=24, num_local_experts=4, head_dim=8), "mlp"),
    "llama4": (
        "Llama4",
        dict(
            intermediate_size=24,
            intermediate_size_mlp=48,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
            head_dim=8,
        ),
        "feed_forward",
    ),
}
#: Every implementation that each family has of its experts.
IMPLEMENTATIONS = [
    (family, implementation)
    for family in FAMILIES
    for implementation in (["eager"] if family == "llama4" else ["grouped_mm", "eager", "batched_mm"])
]


def small_moe(family: str, implementation: str = "grouped_mm", **config) -> nn.Module:
    name, settings, _ = FAMILIES[family]
    kind = getattr(transformers, f"{name}TextConfig" if family == "llama4" else f"{name}Config")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, f"{name}ForCausalLM")(kind(**(COMMON | settings | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    if family != "llama4":
        model.set_experts_implementation(implementation)
    return model


def targets_of(family: str, router: bool = True) -> list[str]:
    block = FAMILIES[family][2]
    found = [f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj"]
    if router and family != "llama4":  # PEFT does not know what llama4's router returns
        found.append(f"{block}.{'router' if family == 'gpt_oss' else 'gate'}.weight")
    return found


def adapted_moe(family: str, implementation="grouped_mm", ranks=(3,), dtype=torch.float32, router=True, **config):
    """A PEFT model with adapters a0, a1, ... of these ranks on its experts and routers, all of them active."""
    model = small_moe(family, implementation, **config).to(dtype)
    for k, r in enumerate(ranks):
        adapter = LoraConfig(
            r=r,
            lora_alpha=2 * k + 3,
            target_modules=[],
            target_parameters=targets_of(family, router),
            init_lora_weights=False,
        )
        if k == 0:
            model = get_peft_model(model, adapter, adapter_name="a0")
        else:
            model.add_adapter(f"a{k}", adapter)
    model.base_model.set_adapter([f"a{k}" for k in range(len(ranks))])
    return model


def experts_of(model: nn.Module) -> nn.Module:
    """The experts of the last layer, with what PEFT put around them."""
    layer = next(module for name, module in model.named_modules() if name.endswith("layers"))[-1]
    return (layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp).experts
