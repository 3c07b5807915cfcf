"""Copying one pool to another, and noticing a pool that should have been a copy and is not.

TRL makes a reference by ``model.add_adapter("ref", model.peft_config["default"])`` and then copies the parameters whose
name has ``.default.`` in it. The parameters of a pool are named by its adapters (``adapter_0``), so nothing is copied.
"""

from __future__ import annotations

import re

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..warn import warn_user

__all__ = ["copy_parameters", "has_learned", "is_copy", "warn_of_fresh_reference"]

_CONTAINERS = r"lora_\w+|modules_to_save|trainable_tokens_delta"


def _pairs(model: nn.Module, names: dict[str, str]) -> list[tuple[str, Tensor, str, Tensor | None]]:
    """Pairs of parameters: one of an adapter that is a key of ``names``, and its counterpart in the adapter it maps to."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owner = re.compile(rf"(?<=\.)({_CONTAINERS})\.({'|'.join(map(re.escape, names))})(?=\.|$)")
    pairs: list[tuple[str, Tensor, str, Tensor | None]] = []
    for name, parameter in parameters.items():
        other = owner.sub(lambda match: f"{match[1]}.{names[match[2]]}", name)
        if other != name:
            pairs.append((name, parameter, other, parameters.get(other)))
    return pairs


@torch.no_grad()
def copy_parameters(model: nn.Module, names: dict[str, str]) -> None:
    """Copy parameters from the adapters that are ``names``' keys to those that are its values.

    Raises:
        ValueError: a parameter has no counterpart, or one of another shape. Nothing was copied then.
    """
    checked = []
    for name, source, other, target in _pairs(model, names):
        if target is None:
            raise ValueError(f"copy_pool: {name} has no counterpart {other}: both pools need the same target_modules")
        if target.shape != source.shape:
            raise ValueError(
                f"copy_pool: {name} is {list(source.shape)}, but {other} is {list(target.shape)}: same r needed"
            )
        checked.append((source, target))
    for source, target in checked:
        target.copy_(source)


@torch.no_grad()
def is_copy(model: nn.Module, names: dict[str, str]) -> bool:
    return all(target is not None and torch.equal(source, target) for _, source, _, target in _pairs(model, names))


@torch.no_grad()
def has_learned(layers: list[LoraLayer], members: tuple[str, ...]) -> bool:
    """Whether any of the adapters is more than PEFT's initial B = 0 (for embeddings, A = 0), which changes nothing."""
    for layer in layers:
        for member in members:
            zero = layer.lora_B[member].weight if member in layer.lora_B else layer.lora_embedding_A.get(member)
            if zero is not None and not zero.is_meta and bool(zero.any()):
                return True
    return False


def warn_of_fresh_reference(pool: str, other: str, state: str) -> None:
    """Warn that ``pool`` is a fresh pool where a copy of a trained one was probably meant."""
    warn_user(
        f"pool {pool!r} was added beside the trained pool {other!r} and {state}. If it is to be a reference (as TRL makes "
        f"one), copy it before training: model.base_model.copy_pool({other!r}, {pool!r})"
    )
