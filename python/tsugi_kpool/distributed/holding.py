"""What becomes of an adapter while its gradients are held, what its FIRE sends and what that does: ``hold_action``.

Each is a :class:`HoldAction`. What takes ``undo`` is called inside :func:`buffers.all_or_nothing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from .. import ops
from ..ops.statistics import Kept
from .buffers import Buffered, Flight, drop_gradients
from .records import Arrival
from .stepping import Awaited, Scaled, Undo, clip, learning_rates, restorer, step_optimizer

__all__ = ["Defer", "Discard", "HoldAction", "Local"]


class HoldAction:
    """One thing to do. What is written here holds where the adapter stays where it is until its FIRE."""

    name: str  # in states
    steps = False  # the optimizer, while gradients are held
    resends = True  # what was on its way when a state was made can be sent again from it

    def begin(self, a: Buffered) -> None:
        """Before the first step."""

    def begin_step(self, a: Buffered) -> None:
        """Before a step's gradient comes, if there is one."""

    def take(self, a: Buffered, weight: float, undo: Undo) -> None:
        """A gradient into the buffer."""
        a.buffer.add(a.params, weight)

    def to_flush(self, held: Sequence[Buffered]) -> Sequence[Buffered]:
        """The adapters whose buffers are sent when nothing may stay."""
        return held

    def common(self, a: Buffered) -> Sequence[Tensor]:
        """What all ranks have alike before a FIRE."""
        return a.params

    def fill(self, a: Buffered, body: Tensor) -> None:
        """This rank's share of the sum over ranks into ``body`` [numel], zeros so far."""
        body.copy_(a.outgoing.flat)

    def alone(self, a: Buffered) -> Tensor:
        """What arrives where there is one rank."""
        return a.outgoing.flat

    def whole(self, body: Tensor) -> Tensor | None:
        """What arrived, if it is the sum of all gradients of the window."""
        return None

    def apply(self, a: Buffered, flight: Flight, arrival: Arrival, undo: Undo) -> None:
        """What a FIRE does that brought something."""
        raise NotImplementedError

    def apply_nothing(self, a: Buffered, undo: Undo) -> None:
        """What a FIRE does that brought nothing."""


class Defer(HoldAction):
    """A FIRE sends the sum of what was held, and applies its mean in one step.

    Args:
        delivery: hands the mean gradient to an optimizer.
        scaling: how the mean over so many steps is applied.
    """

    name = "defer"

    def __init__(self, delivery: Awaited, scaling: Callable[[int], Scaled]):
        self._delivery, self._scaling = delivery, scaling

    def whole(self, body: Tensor) -> Tensor | None:
        return body

    def apply(self, a: Buffered, flight: Flight, arrival: Arrival, undo: Undo) -> None:
        """The mean gradient into .grad, and, where the optimizer was handed over, into the parameters."""
        scaled = self._scaling(a.held)
        a.lr_factor = scaled.rate
        grads = [torch.empty_like(p) for p in a.params]
        emptied = arrival.body.to(torch.float32, copy=True)  # the operation clears what it reads
        ops.sideband_drain_(a.views(emptied), torch.zeros_like(a.stats), grads, scaled.gradient / arrival.total)
        undo.append(lambda: drop_gradients([a]))
        self._delivery.deliver(a.params, grads, flight.rates, scaled, undo)


class Discard(Defer):
    """A FIRE sends its own step's gradient; what was held only decides. To compare with."""

    name = "discard"
    resends = False

    def begin_step(self, a: Buffered) -> None:
        a.current = a.empty()

    def take(self, a: Buffered, weight: float, undo: Undo) -> None:
        super().take(a, weight, undo)
        a.outgoing.add(a.params, weight)

    def to_flush(self, held: Sequence[Buffered]) -> Sequence[Buffered]:
        return []

    def whole(self, body: Tensor) -> Tensor | None:
        return None


class Local(HoldAction):
    """Each rank steps the optimizer by its own gradients; a FIRE brings all to the mean of where they are."""

    name = "local"
    steps = True

    def __init__(self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None):
        self._optimizer, self._max_grad_norm = optimizer, max_grad_norm

    def begin(self, a: Buffered) -> None:
        a.anchor = a.values()

    def take(self, a: Buffered, weight: float, undo: Undo) -> None:
        super().take(a, weight, undo)
        if not all(bool(torch.isfinite(p.grad).all()) for p in a.params if p.grad is not None):
            return
        undo.append(restorer(self._optimizer, a.params))
        if self._max_grad_norm is not None:
            for p in a.params:
                p.grad = None if p.grad is None else p.grad.clone()  # a step that is undone is tried again with it
        clip(a.params, self._max_grad_norm)
        step_optimizer(self._optimizer, a.params, learning_rates(self._optimizer), 1.0)

    def common(self, a: Buffered) -> Sequence[Tensor]:
        return [_anchor(a)]

    def fill(self, a: Buffered, body: Tensor) -> None:
        weight = Kept.of(a.stats).n.float()
        for view, start, p in zip(a.views(body), a.views(_anchor(a)), a.params):
            view.copy_((p.float() - start) * weight)

    def alone(self, a: Buffered) -> Tensor:
        return a.values()

    def apply(self, a: Buffered, flight: Flight, arrival: Arrival, undo: Undo) -> None:
        """All ranks go on from the mean of where they are."""
        if flight.payload is None:
            a.anchor = arrival.body
        else:
            a.anchor = _anchor(a) + arrival.body.float() / arrival.total
            self.apply_nothing(a, undo)

    def apply_nothing(self, a: Buffered, undo: Undo) -> None:
        """All go on from where they were."""
        undo.append(restorer(self._optimizer, a.params))
        for p, start in zip(a.params, a.views(_anchor(a))):
            p.copy_(start)


def _anchor(a: Buffered) -> Tensor:
    return cast(Tensor, a.anchor)  # which begin has set
