"""``attach``: from a model with a pool to a :class:`Pool` that trains it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..distributed.wrapping import check_wrapping, unwrap, unwrap_optimizer
from ..warn import warn_user
from . import registry
from .config import KPoolLoraConfig, suggest_trigger
from .evaluation import end_evaluation
from .members import find_members, find_tuner
from .registry import find_pool, watched_module
from .step import is_number
from .training import Pool
from .watch import watch

__all__ = ["attach"]

#: How an optimizer gets all parameters, by whether the pool was built by hand.
_HOW_TO_HOLD_ALL = {
    False: (
        "Make the optimizer after get_peft_model: torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)"
    ),
    True: (
        "Adapters added by hand start frozen: attach first, then give the optimizer the parameters that require gradients, "
        "and attach again with it"
    ),
}


def attach(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    group: Any = None,
    max_grad_norm: float | None = None,
    config: KPoolLoraConfig | None = None,
) -> Pool:
    """Make a pool train: ``with pool.step():`` then activates K of N adapters a step.

    Args:
        model: a PEFT model with a pool, from ``KPoolLoraConfig`` or by hand; wrapped by torch.compile or not.
        optimizer: holds all adapters. If given, the pool steps it for an adapter when that adapter's exchange has arrived,
            so exchanges may run past the end of a step.
        group: the ranks that train together; None for all.
        max_grad_norm: clip each adapter's aggregated gradient to this norm.
        config: routing, trigger and sideband of a pool that was built by hand; None for the model's own configuration.

    Returns:
        The pool. ``pool.close()`` ends it; it is also a context manager.

    Raises:
        RuntimeError: the model has a pool attached already, the pool was loaded for inference, the native library is
            missing.
        TypeError: ``model``, ``config`` or ``optimizer`` is something else; or the model is wrapped in FSDP1, or in DDP that
            would exchange gradients itself.
        ValueError: there is no pool, ``config`` is missing or describes another pool, or the optimizer does not hold
            all of its parameters. Nothing is installed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: model is a {type(model).__name__}, expected the model from get_peft_model")
    if not isinstance(config, (KPoolLoraConfig, type(None))):
        raise TypeError(f"attach: config is a {type(config).__name__}, expected a KPoolLoraConfig or None")
    inner = unwrap(model)
    watched = watched_module(inner)
    if find_pool(inner) is not None:
        raise RuntimeError(
            "attach: this model has a pool attached already; call its close() first, which is "
            "tsugi_kpool.get_runtime(model).close(); close(flush=False) drops what is held"
        )
    if not ops.available():
        raise RuntimeError(f"attach: {ops.unavailable_reason}")
    check_wrapping(model)
    tuner = find_tuner(inner)
    own = None if tuner is None else tuner.peft_config[tuner.active_pool]
    if config is None:
        config = own
    if config is None:
        raise ValueError(
            "attach: this model has no KPoolLoraConfig; build it with get_peft_model(base, KPoolLoraConfig(...)), or "
            "pass config= for adapters adapter_0, adapter_1, ... that were added by hand"
        )
    if own is not None and own.n_adapters != config.n_adapters:
        raise ValueError(f"attach: config.n_adapters is {config.n_adapters}, the model's pool has {own.n_adapters}")
    if tuner is not None and tuner.whole:
        raise RuntimeError(
            "attach: this pool was loaded for inference; load it with PeftModel.from_pretrained(..., is_trainable=True), "
            "or call model.set_adapter(name) before the optimizer is made"
        )
    end_evaluation(inner)
    members = find_members(inner, config.n_adapters)
    if members.shows_whole:
        raise RuntimeError("attach: the model is inside `with whole_pool(model):`; attach outside of it")
    if max_grad_norm is not None and not (is_number(max_grad_norm) and max_grad_norm > 0):
        raise ValueError(f"attach: max_grad_norm is {max_grad_norm!r}, expected a number above 0")
    wrapper, optimizer = optimizer, unwrap_optimizer(optimizer)
    if optimizer is not None:
        held = {id(p) for group_ in optimizer.param_groups for p in group_["params"]}
        left_out = [
            name for name, own_ in zip(members.names, members.parameters) if any(id(p) not in held for p in own_)
        ]
        if left_out:
            raise ValueError(
                f"attach: the optimizer does not hold all parameters of {len(left_out)} of {len(members.names)} adapters "
                f"(first: {left_out[0]!r}). {_HOW_TO_HOLD_ALL[tuner is None]}"
            )
    pool = Pool(inner, config, members, optimizer=optimizer, group=group, max_grad_norm=max_grad_norm)
    pool.checks.gradient_state = getattr(wrapper, "gradient_state", None)
    if wrapper is not optimizer and pool.checks.gradient_state is None and pool._aggregator.steps_itself:
        warn_user(
            f"attach: the pool steps the {type(optimizer).__name__} inside the {type(wrapper).__name__} that was given, so "
            f"what {type(wrapper).__name__} does beside is not done for adapters; set overlap=False to step it yourself"
        )
    suggest_trigger(config)
    for adapter in members.parameters:
        for parameter in adapter:
            parameter.requires_grad_(True)
    registry.enter(inner, watched, pool)
    pool.watched_by(watched, watch(pool, watched))
    pool.activate(pool.select(0))
    return pool
