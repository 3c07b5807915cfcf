"""Which pool is attached to which model.

The references to pools' models are weak, so copies and pickles of a model know nothing of its pool.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..distributed.wrapping import unwrap
from .config import KPoolLoraConfig
from .members import Members

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from torch import Tensor

__all__ = ["AttachedPool", "Checks", "attached_pools", "attached_to", "enter", "find_pool", "leave", "watched_module"]


class Checks(Protocol):
    """What is checked of a step's gradients (:class:`.step.StepChecks`)."""

    def check_not_cleared(self) -> None: ...
    def note_backward(self) -> None: ...
    def before_optimizer_step(self, optimizer: torch.optim.Optimizer, closure: bool) -> None: ...


class AttachedPool(Protocol):
    """What the rest of this package uses of a pool that trains (:class:`.training.Pool`)."""

    config: KPoolLoraConfig
    members: Members
    is_closed: bool

    @property
    def checks(self) -> Checks: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def current_step(self) -> int: ...
    @property
    def held(self) -> list[int]: ...
    def begin(self, step: int) -> tuple[int, ...]: ...
    def end(self, step: int, active: Sequence[int], weight: float) -> list[Any]: ...
    def abandon(self) -> None: ...
    def drop_gradients(self, adapters: Iterable[int]) -> None: ...
    def record_loss(self, loss: float | Tensor) -> None: ...
    def finish(self) -> None: ...
    def holds_what_is_saved_nowhere(self) -> bool: ...


# The model that attach was given, without its wrappers -> its pool.
_pools: weakref.WeakKeyDictionary[nn.Module, AttachedPool] = weakref.WeakKeyDictionary()

# The module whose passes are watched -> its pool. The reference is weak, since a pool holds layers of the model.
_watched: weakref.WeakKeyDictionary[nn.Module, weakref.ref[AttachedPool]] = weakref.WeakKeyDictionary()


def watched_module(model: nn.Module) -> nn.Module:
    """The module that every forward pass goes through, however the model is called: the one below PEFT's tuner."""
    tuner = next((module for module in model.modules() if isinstance(module, BaseTuner)), None)
    return model if tuner is None else tuner.model


def enter(model: nn.Module, watched: nn.Module, pool: AttachedPool) -> None:
    """Note that ``pool`` is attached to ``model``, and that passes of ``watched`` are its passes."""
    _pools[model] = pool
    _watched[watched] = weakref.ref(pool)


def leave(model: nn.Module | None, watched: nn.Module | None, pool: AttachedPool) -> None:
    """Take back :func:`enter`; modules that are gone are None."""
    if model is not None and _pools.get(model) is pool:
        del _pools[model]
    if watched is not None:
        _watched.pop(watched, None)


def attached_to(module: nn.Module) -> AttachedPool | None:
    """The pool that watches this module (:func:`watched_module`), or None."""
    reference = _watched.get(module)
    return None if reference is None else reference()


def find_pool(model: nn.Module) -> AttachedPool | None:
    """The pool attached to this model, or to a part of it or around it that has the same adapters; or None."""
    inner = unwrap(model)
    return _pools.get(inner) or attached_to(watched_module(inner))


def attached_pools() -> Iterator[AttachedPool]:
    """All pools of this process that are attached."""
    for reference in list(_watched.values()):
        pool = reference()
        if pool is not None:
            yield pool
