"""``keep_ddp_local``: DistributedDataParallel around a model with a pool."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..distributed.wrapping import keep_local
from .members import find_members, find_tuner

__all__ = ["keep_ddp_local"]


def keep_ddp_local(ddp: nn.parallel.DistributedDataParallel, pooled: Iterable[nn.Parameter] | None = None) -> None:
    """Make DDP leave a pool's gradients alone. For frameworks that wrap the model without being asked, such as accelerate.

    What trains beside the pool (``modules_to_save``) is averaged by DDP as ever. All adapters must have required gradients
    when DDP was built, and ``find_unused_parameters=True``. A second call does nothing. A pool calls it by itself where it
    was attached to the model inside.

    Args:
        ddp: the wrapper.
        pooled: the pool's parameters; None for those of the KPoolLoraConfig inside, or all where there is none.

    Raises:
        ValueError: without ``find_unused_parameters``, under which inactive adapters would stop the backward pass, or
            with ``static_graph``, under which other adapters than the first would.
    """
    keep_local(ddp, _pooled(ddp.module) if pooled is None else pooled)


def _pooled(model: nn.Module) -> list[nn.Parameter]:
    tuner = find_tuner(model)
    if tuner is None:
        return list(model.parameters())
    members = find_members(model, tuner.peft_config[tuner.active_pool].n_adapters)
    return [p for own in members.parameters for p in own]
