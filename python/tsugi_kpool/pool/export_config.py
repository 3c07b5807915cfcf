"""Writes the configuration of an exported adapter, which says what its tensors hold and nothing else.

PEFT finds layers by the ends of their names, and reads the keys of ``rank_pattern`` as regular expressions. The entries
written here match the adapted layers and no others. All layers have one scaling, ``lora_alpha / r``, so that readers which
know no patterns (vLLM) compute the same. Layers with another r are named in both patterns, so PEFT scales them alike too.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

__all__ = ["check_fields", "commonest_scaling", "plain_config"]

#: Copied: they mean the same for the exported adapter.
KEPT = (
    "task_type",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
)
#: Written by :func:`plain_config` from the tensors.
WRITTEN = (
    "peft_type",
    "inference_mode",
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "rank_pattern",
    "alpha_pattern",
)
#: Left at PEFT's defaults, and why that is the same function.
DROPPED = {
    "peft_version": "PEFT fills it in",
    "use_rslora": "its scaling is in lora_alpha",
    "exclude_modules": "target_modules names the layers that are left",
    "layers_to_transform": "target_modules names the layers that are left",
    "layers_pattern": "target_modules names the layers that are left",
    "lora_dropout": "for training only",
    "init_lora_weights": "what the adapters began with",
    "loftq_config": "what the adapters began with",
    "eva_config": "what the adapters began with",
    "corda_config": "what the adapters began with",
    "lora_ga_config": "what the adapters began with",
    "qalora_group_size": "read with use_qalora only, which is refused",
    "megatron_core": "read with megatron_config only, which is refused",
    "runtime_config": "never saved",
}
#: Refused where set: the adapters are then no plain LoRA. So is every field that is in no list.
REFUSED = (
    "use_dora",
    "lora_bias",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "megatron_config",
)


def check_fields(config: LoraConfig) -> None:
    """Refuse a configuration with a field whose effect the export would lose, known or not.

    Raises:
        ValueError: names the field and its value.
    """
    for f in dataclasses.fields(LoraConfig):
        if f.name in KEPT or f.name in WRITTEN or f.name in DROPPED:
            continue
        value = getattr(config, f.name, _default(f))
        if value and value != _default(f):
            why = "is not plain LoRA" if f.name in REFUSED else "is not known to this version"
            raise ValueError(
                f"export: {f.name} is {value!r}, which {why}, so the exported adapters would lose it; "
                "save_pretrained() keeps the pool as it is, and merge_and_unload() merges it into the base"
            )


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def commonest_scaling(scalings: Iterable[float]) -> float:
    """The scaling that most adapters have; never 0, since the others are divided by it."""
    counts = Counter(scaling for scaling in scalings if scaling)
    return counts.most_common(1)[0][0] if counts else 1.0


def plain_config(
    source: LoraConfig, r: dict[str, int], scaling: float, model: nn.Module, names: set[str], parameters: dict[str, str]
) -> LoraConfig:
    """The configuration of an adapter with these layers.

    Args:
        source: the pool's.
        r: rank of each layer, by its name in the base model.
        scaling: of all layers.
        model: with the pool, for the class of the base model.
        names: of all modules, those of the adapters among them.
        parameters: for a layer that adapts a parameter, by its name in the base model: that of the parameter.
    """
    config = LoraConfig(**{name: copy.deepcopy(getattr(source, name)) for name in KEPT if name != "auto_mapping"})
    config.inference_mode = True
    config.auto_mapping = source.auto_mapping or _auto_mapping(source, model)
    if config.modules_to_save is not None:
        config.modules_to_save = list(dict.fromkeys(config.modules_to_save))  # PEFT adds a head's name at each load
    # The heads that PEFT tied to the embedding have their own A and B in a checkpoint, so nothing is left to tie.
    if getattr(source, "target_modules_to_tie", None):
        config.ensure_weight_tying = False

    targets = {path: rank for path, rank in r.items() if path not in parameters and not _is_inside(path, parameters)}
    adapted = {parameters[path]: rank for path, rank in r.items() if path in parameters}
    if targets:
        config.target_modules = _exact_targets(config, set(targets), {_in_base(name) for name in names})
    else:
        config.target_modules = []
    if adapted:
        config.target_parameters = _exact_parameters(set(adapted), {name for name, _ in model.named_parameters()})
    targets |= adapted
    config.r = max(r.values())
    config.lora_alpha = _alpha(scaling * config.r)
    config.rank_pattern = _pattern(targets, config.r)
    config.alpha_pattern = {key: _alpha(scaling * rank) for key, rank in config.rank_pattern.items()}
    return config


def _is_inside(path: str, parameters: dict[str, str]) -> bool:
    """Whether a layer lies in another, whose inside PEFT adapts by itself."""
    if ".base_layer." not in path:
        return False
    outer = path.partition(".base_layer.")[0]
    if outer in parameters:
        raise ValueError(f"export: {path} is a part of {outer}, which adapts a parameter; no LoraConfig names both")
    return True


def _exact_parameters(adapted: set[str], names: set[str]) -> list[str]:
    """What makes PEFT adapt these parameters and no others: the shortest ends of their names that do."""
    plain = {_in_base(name.removeprefix("base_model.model.")) for name in names if ".lora_" not in name}
    for parts in (2, 3):
        ends = {".".join(name.split(".")[-parts:]) for name in adapted}
        if {name for name in plain if any(f".{name}".endswith(f".{end}") for end in ends)} == adapted:
            return sorted(ends)
    return sorted(adapted)


def _alpha(value: float) -> float:
    return int(value) if value == int(value) else value


def _auto_mapping(source: LoraConfig, model: Any) -> dict[str, str] | None:
    """As PEFT writes it, for AutoPeftModel to find the base's class where no task_type tells it."""
    if source.task_type is not None or not hasattr(model, "get_base_model"):
        return None
    base = type(model.get_base_model())
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def _in_base(name: str) -> str:
    """A module's name in the base model, without the layers that PEFT put around it."""
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.|$)", "", name)


def _exact_targets(config: LoraConfig, paths: set[str], names: set[str]) -> list[str] | str:
    """A ``target_modules`` with which PEFT adapts the modules ``paths`` and no others of ``names``; the shortest of three ways.

    Readers beside PEFT expect the last parts of the names. Full names come second; one can also be the end of another, so the
    last resort is a regular expression.
    """
    trial = copy.copy(config)
    for targets in ({path.rpartition(".")[2] for path in paths}, paths):
        trial.target_modules = targets
        if {name for name in names | paths if name and check_target_module_exists(trial, name)} == paths:
            return sorted(targets)
    return "|".join(re.escape(path) for path in sorted(paths))


def _pattern(r: dict[str, int], usual: int) -> dict[str, int]:
    """``rank_pattern`` for the layers with another r: by the last part of the name where all layers of that name agree."""
    ranks: dict[str, set[int]] = {}
    for path, rank in r.items():
        ranks.setdefault(path.rpartition(".")[2], set()).add(rank)
    pattern = {}
    for path, rank in r.items():
        leaf = path.rpartition(".")[2]
        if rank != usual:
            pattern[re.escape(leaf) if len(ranks[leaf]) == 1 else "^" + re.escape(path)] = rank
    return pattern
