"""What may be wrapped around a model with a pool: not FSDP1, DDP where it leaves gradients alone. Optimizers' wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FSDP1", "check_wrapping", "keep_ddp_local", "unwrap_optimizer"]

FSDP1 = (
    "the model is wrapped in FullyShardedDataParallel (FSDP1), which flattens adapters into its own shards; use FSDP2: "
    "torch.distributed.fsdp.fully_shard(module, ignored_params=the adapters' parameters)"
)


def check_wrapping(model: nn.Module) -> None:
    """Raise TypeError for a model in FSDP1, and for one in DDP whose gradients DDP would still reduce."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise TypeError(FSDP1)
        if isinstance(module, nn.parallel.DistributedDataParallel) and not getattr(module, "_tsugi_kept_local", False):
            raise TypeError(
                "the model is wrapped in DistributedDataParallel, which would exchange every gradient itself; do not wrap "
                "it, or call tsugi_kpool.sync.keep_ddp_local(model) right after wrapping"
            )


def keep_ddp_local(ddp: nn.parallel.DistributedDataParallel) -> None:
    """Make DDP leave gradients as they are, for where something wraps the model without being asked (accelerate).

    All adapters must have required gradients when DDP was built, and ``find_unused_parameters=True``. A second call does
    nothing.

    Raises:
        ValueError: without ``find_unused_parameters``, under which inactive adapters would stop the backward pass, or
            with ``static_graph``, under which other adapters than the first would.
    """
    if getattr(ddp, "_tsugi_kept_local", False):
        return
    if ddp.static_graph:
        raise ValueError(
            "DistributedDataParallel has static_graph=True (ddp_static_graph in TrainingArguments), but the active "
            "adapters change: leave it out"
        )
    if not ddp.find_unused_parameters:
        raise ValueError(
            "DistributedDataParallel has find_unused_parameters=False (ddp_find_unused_parameters in TrainingArguments), "
            "but inactive adapters are unused: set it"
        )
    ddp.register_comm_hook(None, _finished)
    ddp._tsugi_kept_local = True


def _finished(state, bucket):  # DDP compares annotations with classes, and here they would be text
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer inside accelerate's wrapper, and inside any that keeps it as ``.optimizer``.

    Raises:
        TypeError: it is no ``torch.optim.Optimizer``.
    """
    while hasattr(optimizer, "param_groups") and hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, (torch.optim.Optimizer, type(None))):
        raise TypeError(f"attach: optimizer is a {type(optimizer).__name__}, expected a torch.optim.Optimizer")
    return optimizer
