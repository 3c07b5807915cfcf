"""Wrappers around models and optimizers: which ones a pool takes (not FSDP1; DDP if it leaves gradients alone), and what is inside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

__all__ = ["FSDP1", "check_wrapping", "keep_local", "unwrap", "unwrap_optimizer", "watch_for_ddp"]

FSDP1 = (
    "the model is wrapped in FullyShardedDataParallel (FSDP1), which flattens adapters into its own shards; use FSDP2: "
    "torch.distributed.fsdp.fully_shard(module, ignored_params=the adapters' parameters)"
)


def unwrap(model: nn.Module) -> nn.Module:
    """The model below DistributedDataParallel, FSDP, torch.compile and the like."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    while True:
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None or isinstance(model, (BaseTuner, peft.PeftModel)):
            return model
        model = inner


def check_wrapping(model: nn.Module) -> None:
    """Raise TypeError for a model in FSDP1, and for one in DDP whose gradients DDP would still reduce."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            raise TypeError(FSDP1)
        if isinstance(module, nn.parallel.DistributedDataParallel) and not getattr(module, "_tsugi_kept_local", False):
            raise TypeError(
                "the model is wrapped in DistributedDataParallel, which would exchange every gradient itself; do not wrap "
                "it, or call tsugi_kpool.keep_ddp_local(model) right after wrapping"
            )


def keep_local(ddp: Any, pooled: Iterable[nn.Parameter]) -> None:
    """What :func:`tsugi_kpool.keep_ddp_local` does, for these parameters; its errors too."""
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
            "but inactive adapters are unused: set it; with accelerate by Accelerator(kwargs_handlers=["
            "DistributedDataParallelKwargs(find_unused_parameters=True)]). Or leave the model unwrapped (accelerate: do not "
            "prepare it): the pool exchanges its gradients itself"
        )
    ddp.register_comm_hook(_Beside({id(p) for p in pooled}, ddp.process_group), _average_others)
    ddp._tsugi_kept_local = True


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


@dataclass
class _Beside:
    pooled: set[int]  # by id
    group: Any


def _average_others(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations with classes, and here they would be text
    others = [grad for p, grad in zip(bucket.parameters(), bucket.gradients()) if id(p) not in state.pooled]
    if not others:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future
    flat = torch.cat([grad.flatten() for grad in others]).div_(dist.get_world_size(state.group))

    def put_back(done: Any) -> Tensor:
        parts = done.value()[0].split([grad.numel() for grad in others])
        for grad, part in zip(others, parts):
            grad.copy_(part.view_as(grad))
        return bucket.buffer()

    return dist.all_reduce(flat, group=state.group, async_op=True).get_future().then(put_back)


def watch_for_ddp(model: nn.Module, pooled: Iterable[nn.Parameter]) -> RemovableHandle:
    """Keep DDP local at the next forward pass of the model, if one is around it then.

    A pool may be attached to the model inside, before or after something wraps it. From the inside a wrapper cannot be
    seen; the outermost module that is called can.
    """
    pooled = list(pooled)

    def look(module: nn.Module, _: Any) -> None:
        if unwrap(module) is not model:
            return
        handle.remove()
        for wrapper in module.modules():
            if isinstance(wrapper, nn.parallel.DistributedDataParallel):
                keep_local(wrapper, pooled)

    handle = register_module_forward_pre_hook(look)
    return handle
