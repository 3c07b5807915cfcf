"""GradScalers of several ranks: whether there are any, and in which steps one of them overflowed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .agree import named
from .buffers import Moment
from .ranks import Ranks, SyncError

__all__ = ["Scalers", "Step"]

# What a rank says in a step; the largest counts.
_NO_DATA, _NO_TENSOR, _FINITE, _OVERFLOW = range(4)


@dataclass(frozen=True)
class Step:
    """What is known of a step's gradients; ranks by their place in the group."""

    overflowed: list[int] = field(default_factory=list)  # where a scaler says so: the step is left out on all ranks
    finite: list[int] = field(default_factory=list)  # where a scaler says so
    left_out_here: bool = False  # this rank's own wish, without a scaler


class Scalers:
    """Agrees in the first step whether ranks give found_inf as a tensor, and if they do, in every step on its value."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._used: bool | None = None  # None: not known yet

    def agree(self, moment: Moment, found_inf: bool | Tensor) -> Step:
        """Agree with the other ranks on ``found_inf``. A tensor is overwritten with the result, 1.0 or 0.0; a rank without data needs none.

        Raises:
            SyncError: a rank that has data gave no tensor, but others did.
        """
        tensor = found_inf if isinstance(found_inf, Tensor) else None
        given = tensor is not None
        own = bool(found_inf) if tensor is None else bool((tensor.detach() != 0).any())
        # Agreed that no rank gives a tensor: where this one does, its record tells the others. Alone, there is no other.
        if self._used is False or (self._ranks.size == 1 and not given):
            return Step(left_out_here=own)
        if given:
            mine = _OVERFLOW if own else _FINITE
        else:
            mine = _NO_DATA if math.isnan(moment.scaled) else _NO_TENSOR
        everyone = self._gather(mine)
        if max(everyone) >= _FINITE:
            self._used = True
        elif max(everyone) == _NO_TENSOR and self._used is None:
            self._used = False
        if self._used and _NO_TENSOR in everyone:
            without = [name for name, said in zip(self._ranks.names, everyone) if said == _NO_TENSOR]
            raise SyncError(
                f"step {moment.step}: {named(without)} gave no found_inf tensor and has data, but other ranks gave one, or "
                "did in earlier steps: pass the GradScaler's tensor on every rank that has data, in every step, or on none"
            )
        step = Step(
            overflowed=[k for k, said in enumerate(everyone) if said == _OVERFLOW],
            finite=[k for k, said in enumerate(everyone) if said == _FINITE],
            left_out_here=own and not given,
        )
        if tensor is not None:
            tensor.fill_(float(bool(step.overflowed)))
        return step

    def _gather(self, said: int) -> list[int]:
        if self._ranks.size == 1:
            return [said]
        number = torch.tensor([float(said)], dtype=torch.float64)
        gathered, work = self._ranks.gather(number, "agree on found_inf")
        if work is not None:
            self._ranks.wait(work)
        return [int(value) for value in gathered.flatten().tolist()]
