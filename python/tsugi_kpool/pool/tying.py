"""Heads that ``ensure_weight_tying`` ties to the embedding: A of the head is B^T of the embedding, and B is A^T.

PEFT ties only the first adapter on a layer. It uses views of one storage, and a move, a cast, a copy or a load replaces
parameters and takes these views apart. A pool ties all of its adapters, and ties them again after each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

__all__ = ["tie_heads", "untie_bases"]


def _tied_names(config: LoraConfig) -> list[str]:
    """The modules that PEFT found to be tied to the embedding."""
    return sorted(getattr(config, "target_modules_to_tie", None) or ())


@torch.no_grad()
def _tie(tied: LoraLayer, embedding: LoraLayer, members: Sequence[str]) -> None:
    """Let a head's adapters, or another embedding's, be views of the embedding's, with the values that they have now."""
    tied.kwargs.pop("tied_adapter", None)  # PEFT leaves tensors with a graph there, which cannot be copied
    for member in members:
        emb_A, emb_B = embedding.lora_embedding_A[member], embedding.lora_embedding_B[member]
        if member in tied.lora_A:
            _view(tied.lora_A[member].weight, emb_B, lambda x: x.t())
            _view(tied.lora_B[member].weight, emb_A, lambda x: x.t())
        elif tied is not embedding:  # an encoder's or a decoder's own embedding
            _view(tied.lora_embedding_A[member], emb_A, lambda x: x)
            _view(tied.lora_embedding_B[member], emb_B, lambda x: x)


def _view(own: Tensor, source: Tensor, turned: Callable[[Tensor], Tensor]) -> None:
    if own.device == source.device and own.data_ptr() != source.data_ptr():
        source.copy_(turned(own))  # the tied layer is what was initialised, or loaded, last
        own.data = turned(source.data)


def tie_heads(model: Any, config: LoraConfig, members: Sequence[str]) -> None:
    """Tie the adapters of all layers that the configuration ties."""
    for name in _tied_names(config):
        tied = model.get_submodule(name)
        if isinstance(tied, LoraLayer) and members[0] in tied.scaling:
            _tie(tied, model.get_input_embeddings(), members)


def untie_bases(model: Any, config: LoraConfig) -> list[str]:
    """Give tied heads a base weight of their own, and return their names.

    Embedding and head have the same change, and merging both into the weight that they share would add it twice.
    """
    heads = []
    for name in _tied_names(config):
        head, shared = model.get_submodule(name).get_base_layer(), model.get_input_embeddings().weight
        if head.weight is shared:
            head.weight = nn.Parameter(shared.detach().clone(), shared.requires_grad)
            heads.append(name)
    return heads
