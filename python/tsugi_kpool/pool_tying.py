"""Heads that ``ensure_weight_tying`` ties to the embedding: A of the head is B^T of the embedding, and B is A^T.

PEFT ties the first adapter on a layer only, and by views of one storage, which a move, a cast, a copy or a load that replaces
parameters takes apart. A pool ties all of its adapters, and again after each of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

__all__ = ["tie", "tie_heads", "untie_bases"]


def _tied_names(config: LoraConfig) -> list[str]:
    """The modules that PEFT found to be tied to the embedding."""
    return sorted(getattr(config, "target_modules_to_tie", None) or ())


@torch.no_grad()
def tie(head: LoraLayer, embedding: LoraLayer, members: Sequence[str]) -> None:
    """Let the head's adapters be views of the embedding's, with the values that the head's have now."""
    head.kwargs.pop("tied_adapter", None)  # PEFT leaves tensors with a graph there, which cannot be copied
    for member in members:
        A, B = head.lora_A[member].weight, head.lora_B[member].weight
        emb_A, emb_B = embedding.lora_embedding_A[member], embedding.lora_embedding_B[member]
        for own, source in ((A, emb_B), (B, emb_A)):
            if own.device == source.device and own.data_ptr() != source.data_ptr():
                source.copy_(own.t())  # the head's is what was initialised, or loaded, last
                own.data = source.data.t()


def tie_heads(model: nn.Module, config: LoraConfig, members: Sequence[str]) -> None:
    """Tie the adapters of all heads that the configuration ties."""
    for name in _tied_names(config):
        head = model.get_submodule(name)
        if isinstance(head, LoraLayer) and members[0] in head.lora_A:
            tie(head, model.get_input_embeddings(), members)


def untie_bases(model: nn.Module, config: LoraConfig) -> list[str]:
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
