"""The functions of the 0.1 releases, over ``attach`` and ``Pool``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import cast

from torch import nn

from ..distributed.aggregator import AggregationDecision
from ..warn import warn_user
from .attach import attach
from .config import KPoolLoraConfig
from .registry import find_pool
from .training import Pool

__all__ = [
    "apply_kpool_step",
    "get_runtime",
    "plesio_init",
    "plesio_shutdown",
    "post_backward_step",
    "pre_forward_step",
]


def plesio_init(model: nn.Module, config: KPoolLoraConfig, sender_id: str | None = None) -> None:
    """``attach`` without an optimizer. ``sender_id`` names this process in the diagnostics.

    Raises:
        RuntimeError: called before for this model, or the model has no pool.
    """
    if find_pool(model) is not None:
        raise RuntimeError("plesio_init: called before for this model; call plesio_shutdown(model) first")
    try:
        pool = attach(model, config=config)
    except ValueError as error:
        raise RuntimeError(f"plesio_init: {error}") from error
    pool.name_sender(sender_id)


def plesio_shutdown(model: nn.Module) -> None:
    """``pool.close()``; nothing where no pool is attached.

    What is held is flushed into ``.grad``, for an ``optimizer.step()`` that is still to come; a warning says so.
    """
    if find_pool(model) is None:
        return
    pool = _attached(model, "plesio_shutdown")
    pool.abandon()
    if pool.has_gradients_for_the_caller():
        warn_user(
            f"plesio_shutdown: gradients of {pool.held} steps were held and are in .grad now: call optimizer.step() once "
            "more; or before it get_runtime(model).flush(), optimizer.step()"
        )
    pool.let_go(flush=True)


def apply_kpool_step(model: nn.Module, step: int) -> tuple[int, ...]:
    """Activate the adapters of a step; the first call of a step.

    Returns:
        Their indices, ascending.
    """
    pool = _attached(model, "apply_kpool_step")
    pool.abandon()  # these functions may leave a step without ending it
    return pool.begin(step)


def pre_forward_step(model: nn.Module, step: int, active: tuple[int, ...]) -> contextlib.AbstractContextManager[None]:
    """A context for the forward and backward passes of the step that ``apply_kpool_step`` began."""
    _began(_attached(model, "pre_forward_step"), "pre_forward_step", step, active)
    return contextlib.nullcontext()


def post_backward_step(model: nn.Module, step: int, active: tuple[int, ...]) -> list[AggregationDecision]:
    """Decide about the active adapters' gradients; after the backward pass and before ``optimizer.step()``.

    Returns:
        One decision for each active adapter.
    """
    pool = _attached(model, "post_backward_step")
    _began(pool, "post_backward_step", step, active)
    return pool.end(step, pool.active, 1.0)


def get_runtime(model: nn.Module) -> Pool:
    """The ``Pool`` of a model."""
    return _attached(model, "get_runtime")


def _attached(model: nn.Module, call: str) -> Pool:
    pool = find_pool(model)
    if pool is None:
        raise RuntimeError(f"{call}: no pool is attached to this model; call plesio_init(model, config) first")
    return cast(Pool, pool)  # attach makes no other


def _began(pool: Pool, call: str, step: int, active: Sequence[int]) -> None:
    if not pool.is_open or pool.current_step != step:
        raise RuntimeError(f"{call}: step {step} has not begun; call apply_kpool_step(model, {step}) first")
    if tuple(active) != pool.active:
        raise ValueError(f"{call}: active is {tuple(active)}, but apply_kpool_step returned {pool.active}")
