"""Which modules a pool's configuration names, and which of its entries name none.

PEFT's LORA rewrites names of experts that newer transformers fuse into one parameter (Mixtral's w1, w2, w3). A pool adapts
modules only, so such names are refused; every other entry that adapts nothing is a warning.
"""

from __future__ import annotations

import copy
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..warn import warn_user

__all__ = ["refuse_fused_experts", "warn_of_unmatched"]

#: What PEFT adds to modules_to_save of these tasks by itself; a model has one of them.
_HEADS = {"classifier", "score", "qa_outputs"}


def refuse_fused_experts(config: LoraConfig, model: nn.Module) -> None:
    """Refuse targets that PEFT's LORA would turn into parameters of fused experts.

    Raises:
        ValueError: names the entries and the parameters.
    """
    fused = _fused_experts(model)
    targets = config.target_modules
    if not fused or not targets:
        return
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    means = {
        entry: sorted({parameter for name, parameter in fused.items() if everything or _matches(config, entry, name)})
        for entry in ([targets] if isinstance(targets, str) else sorted(targets))
    }
    means = {entry: parameters for entry, parameters in means.items() if parameters}
    if means:
        parameters = sorted({parameter for found in means.values() for parameter in found})
        raise ValueError(
            f"target_modules: {', '.join(map(repr, means))} also means the experts of {_model_type(model)}, which are "
            f"parameters ({', '.join(parameters)}) and not modules; PEFT's LORA adapts them as target_parameters, a pool adapts "
            "modules only: name modules, as in target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj']"
        )


def _matches(config: LoraConfig, entry: str, name: str) -> bool:
    alone = copy.copy(config)
    alone.target_modules = entry if isinstance(config.target_modules, str) else {entry}
    return bool(check_target_module_exists(alone, name))


def _fused_experts(model: nn.Module) -> dict[str, str]:
    """The names that parts of fused parameters had as modules, with the parameter they are in now."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # transformers 4 has modules
        return {}
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model_type)
    parts = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(
        family, {}
    )  # w1 -> gate_up_proj, gate -> gate.weight
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for name, _ in model.named_parameters():
        for part, parameter in parts.items():
            if f".{name}".endswith(f".{parameter}"):
                container = name.removesuffix(parameter)
                if container + part not in linear:
                    found[container + part] = parameter
    return found


def warn_of_unmatched(asked: LoraConfig, model: nn.Module, pool: str, member: str) -> None:
    """Warn of each entry that adapted no module.

    Args:
        asked: the configuration as it was before PEFT resolved it.
        model: the base model, with the pool in it.
        pool: its name, which ``modules_to_save`` has.
        member: one of its adapters.
    """
    modules = list(model.named_modules())
    adapted = [name for name, module in modules if isinstance(module, LoraLayer) and member in module.scaling]
    saved = [
        name for name, module in modules if isinstance(module, ModulesToSaveWrapper) and pool in module.modules_to_save
    ]
    targets = asked.target_modules if isinstance(asked.target_modules, (list, set, tuple)) else ()
    heads = _HEADS if asked.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else set()
    layers = asked.layers_to_transform
    layers = [] if layers is None else [layers] if isinstance(layers, int) else layers
    nothing = {
        "target_modules": [e for e in targets if not any(f".{name}".endswith(f".{e}") for name in adapted)],
        "modules_to_save": [
            e for e in asked.modules_to_save or () if e not in heads and not any(name.endswith(e) for name in saved)
        ],
        "layers_to_transform": [i for i in layers if not any(_has_index(asked, i, name) for name in adapted)],
    }
    for name, entries in nothing.items():
        if entries:
            warn_user(
                f"{name}: {', '.join(map(repr, sorted(entries)))} matched no module of this {type(model).__name__} that is "
                "left to adapt, and does nothing; the names are those of model.named_modules()"
            )


def _has_index(asked: LoraConfig, index: int, name: str) -> bool:
    only = copy.copy(asked)
    only.layers_to_transform = [index]
    only.target_modules = {name.rpartition(".")[2]}
    return bool(check_target_module_exists(only, name))


def _model_type(model: Any) -> str:
    return str(model.config.model_type)
