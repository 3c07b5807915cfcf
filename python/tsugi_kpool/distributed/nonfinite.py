"""Gradients with a NaN or an infinity: who had them, said once, and an error when it does not end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .. import ops
from ..warn import warn_user
from .agree import named
from .buffers import Buffered, drop_gradients

__all__ = ["LeftOut", "NonFinite", "NonFiniteError", "Share", "Withheld", "is_finite", "nothing_to_apply"]


class Share(NamedTuple):
    """What one rank put into a FIRE: the weight of what it sent, and how many gradients were not finite."""

    sent: float
    left_out: float


def nothing_to_apply(shares: Sequence[Share], sum_is_finite: bool) -> str | None:
    """Why a FIRE has nothing to apply; None where it has."""
    return ops._native.trigger_nothing_to_apply(list(shares), sum_is_finite)


class NonFiniteError(FloatingPointError):
    """A rank had no finite gradient of an adapter for ``nonfinite_limit`` steps; raised on all ranks at the same step.

    Ranks still agree and exchanges still work: a loop that catches it may go on, and meets it again after the next step.
    """


@dataclass(frozen=True)
class LeftOut:
    """Gradients that were left out since they were not finite."""

    adapter: int
    step: int
    ranks: tuple[int, ...]  # by their global number


class NonFinite:
    """Counts each rank's steps without a finite gradient, warns once of each rank, and raises at the limit."""

    def __init__(self, limit: int | None, names: Sequence[int]):
        self._limit, self._names = limit, names
        self._warned: set[int] = set()
        self._watched: dict[int, Buffered] = {}  # the adapters that may be at the limit

    def count(self, a: Buffered, shares: Sequence[Share]) -> None:
        self.put_rows(a, ops._native.trigger_rows_without_finite(a.rows_without_finite, list(shares)))

    def end_rows(self, a: Buffered, ranks: Sequence[int]) -> None:
        """These ranks, by their place, had a finite gradient."""
        self.put_rows(a, [0 if k in ranks else row for k, row in enumerate(a.rows_without_finite)])

    def put_rows(self, a: Buffered, rows: list[int]) -> None:
        a.rows_without_finite = rows
        self._watched[a.index] = a

    def warn(self, news: Iterable[LeftOut]) -> None:
        for each in news:
            ranks = [rank for rank in each.ranks if rank not in self._warned]
            self._warned.update(ranks)
            if ranks:
                until = "" if self._limit is None else f"; after {self._limit} such steps in a row it is an error"
                warn_user(
                    f"adapter {each.adapter}, step {each.step}: {named(ranks)} had a gradient with a NaN or an infinity, "
                    f"which was left out. Training goes on without it, and diagnostics count it (nonfinite){until}",
                    RuntimeWarning,
                )

    def check(self) -> None:
        """NonFiniteError where a rank's row of steps without a finite gradient has reached the limit."""
        for i, a in sorted(self._watched.items()):
            ranks = [name for name, steps in zip(self._names, a.rows_without_finite) if self._is_limit(steps)]
            if ranks:
                raise NonFiniteError(
                    f"adapter {a.index}: {named(ranks)} had no finite gradient in the last {max(a.rows_without_finite)} steps "
                    f"in which it was active (nonfinite_limit is {self._limit}): look at the data, the learning rate and the "
                    "loss scale there, and go back to a checkpoint if parameters are NaN already"
                )
            del self._watched[i]

    def _is_limit(self, steps: int) -> bool:
        return self._limit is not None and steps >= self._limit


def is_finite(params: Iterable[nn.Parameter]) -> bool:
    """Whether no gradient of these parameters holds a NaN or an infinity. Waits for the device."""
    grads = [p.grad for p in params if p.grad is not None]
    return not grads or bool(torch.isfinite(nn.utils.get_total_norm(grads, float("inf"))))


class Withheld:
    """Gradients that are not finite and that no optimizer gets to see; until one is stepped they stay in ``.grad``.

    A GradScaler that has not unscaled yet finds there what makes it skip the step and lower its scale.
    """

    def __init__(self, adapters: Sequence[Buffered]):
        self._adapters = adapters
        self._handle = register_optimizer_step_pre_hook(self._before_step)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        drop_gradients([a for a in self._adapters if any(id(p) in held for p in a.params)])

    def end(self) -> None:
        self._handle.remove()
        drop_gradients(self._adapters)
