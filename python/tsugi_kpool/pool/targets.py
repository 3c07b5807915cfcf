"""Which modules and parameters a pool's configuration names, and which of its entries name none.

Names of experts that newer transformers fuse into one parameter (Mixtral's w1, w2, w3) become ``target_parameters``, as
with PEFT's LORA; an entry that adapts nothing is a warning.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from peft import LoraConfig, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..warn import warn_user

__all__ = ["adapted_parameter", "translate_fused_experts", "warn_of_unmatched"]

#: What PEFT adds to modules_to_save of these tasks by itself; a model has one of them.
_HEADS = {"classifier", "score", "qa_outputs"}


def translate_fused_experts(config: LoraConfig, model: nn.Module) -> None:
    """Turn targets that mean parts of fused experts into ``target_parameters``, where PEFT's LORA would.

    Raises:
        ValueError: PEFT's own, of a part without the others that it is fused with.
    """
    fused = _fused_experts(model)
    targets = config.target_modules
    if not fused or not targets:
        return
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    entries = [targets] if isinstance(targets, str) else targets
    if everything or any(_matches(config, entry, name) for entry in entries for name in fused):
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        as_lora = copy.copy(config)  # PEFT asks for this type
        as_lora.peft_type = PeftType.LORA
        convert_peft_config_for_transformers(as_lora, model, None)
        for name in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern"):
            setattr(config, name, getattr(as_lora, name))


def adapted_parameter(name: str, layer: LoraLayer) -> str | None:
    """The name in the base model of the parameter that the layer of this name adapts; None where it adapts a module."""
    if not isinstance(layer, ParamWrapper):
        return None
    return f"{re.sub(r'[.]base_layer(?=[.]|$)', '', name)}.{layer.parameter_name}"


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
    """Warn of each entry that adapted nothing.

    Args:
        asked: the configuration as it was before PEFT resolved it.
        model: the base model, with the pool in it.
        pool: its name, which ``modules_to_save`` has.
        member: one of its adapters.
    """
    modules = list(model.named_modules())
    adapted = [name for name, module in modules if isinstance(module, LoraLayer) and member in module.scaling]
    parameters = [adapted_parameter(name, module) for name, module in modules if isinstance(module, ParamWrapper)]
    saved = [
        name for name, module in modules if isinstance(module, ModulesToSaveWrapper) and pool in module.modules_to_save
    ]
    targets = asked.target_modules if isinstance(asked.target_modules, (list, set, tuple)) else ()
    heads = _HEADS if asked.task_type in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else set()
    layers = asked.layers_to_transform
    layers = [] if layers is None else [layers] if isinstance(layers, int) else layers
    nothing = {
        "target_modules": [e for e in targets if not any(f".{name}".endswith(f".{e}") for name in adapted)],
        "target_parameters": [
            e for e in asked.target_parameters or () if not any(f".{name}".endswith(f".{e}") for name in parameters)
        ],
        "modules_to_save": [
            e for e in asked.modules_to_save or () if e not in heads and not any(name.endswith(e) for name in saved)
        ],
        "layers_to_transform": [i for i in layers if not any(_has_index(asked, i, name) for name in adapted)],
    }
    for name, entries in nothing.items():
        if entries:
            what = "parameter" if name == "target_parameters" else "module"
            warn_user(
                f"{name}: {', '.join(map(repr, sorted(entries)))} matched no {what} of this {type(model).__name__} that is "
                f"left to adapt, and does nothing; the names are those of model.named_{what}s()"
            )


def _has_index(asked: LoraConfig, index: int, name: str) -> bool:
    only = copy.copy(asked)
    only.layers_to_transform = [index]
    only.target_modules = {name.rpartition(".")[2]}
    return bool(check_target_module_exists(only, name))


def _model_type(model: Any) -> str:
    return str(model.config.model_type)
