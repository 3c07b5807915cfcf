"""``whole_pool``: a model that computes with all N adapters, to evaluate while it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..distributed.wrapping import unwrap
from .config import KPoolLoraConfig
from .members import find_members, find_tuner
from .registry import find_pool

__all__ = ["whole_pool"]


@contextlib.contextmanager
def whole_pool(model: nn.Module, config: KPoolLoraConfig | None = None) -> Iterator[nn.Module]:
    """Activate all N adapters, each scaled by K / N, inside a ``with`` block. On average the K of N in turn add up to this.

    This is the function that ``export``, ``merge_and_unload`` and a pool loaded for inference compute. Use it to
    evaluate while training; the adapters that were active are active again afterwards.

    Args:
        model: a model with a pool.
        config: for K and N of a pool that was built by hand; not needed where the model has a KPoolLoraConfig or
            ``attach`` was given one.
    """
    inner = unwrap(model)
    tuner = find_tuner(inner)
    if tuner is not None:
        config = tuner.peft_config[tuner.active_pool]
    elif config is None:
        attached = find_pool(model)
        if attached is None:
            raise ValueError(
                "whole_pool: this model has no KPoolLoraConfig; build it with get_peft_model(base, KPoolLoraConfig(...)). Of "
                "a pool that was built by hand pass config=, or call attach(model, config=...)"
            )
        config = attached.config
    members = find_members(inner, config.n_adapters)
    if members.whole:
        yield model
        return
    members.begin_whole(config.k_active / config.n_adapters)
    try:
        yield model
    finally:
        members.end_whole()
