"""Stepping the optimizer for one adapter alone, at a given rate, and undoing it if it fails; or leaving it to the caller."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .buffers import Buffered

__all__ = [
    "SCALINGS",
    "Awaited",
    "Overlapped",
    "Scaled",
    "Undo",
    "clip",
    "learning_rates",
    "restorer",
    "step_optimizer",
]

Undo = list[Callable[[], None]]  # see buffers.all_or_nothing


@dataclass(frozen=True)
class Scaled:
    """How the mean gradient of a window is applied in one step."""

    rate: float = 1.0  # times the learning rate
    gradient: float = 1.0  # times the gradient
    steps: int = 1  # that an Adam counts it as


#: lr_scaling -> what it makes of a window of m steps.
SCALINGS: dict[str, Callable[[int], Scaled]] = {
    "none": lambda m: Scaled(),
    "linear": lambda m: Scaled(rate=float(m)),
    "sqrt": lambda m: Scaled(rate=math.sqrt(m)),
    "adam": lambda m: Scaled(rate=math.sqrt(m), gradient=math.sqrt(m), steps=m),
}


class Awaited:
    """A FIRE is waited for in its step, and its gradient is left in ``.grad`` for the caller's optimizer."""

    steps = False
    resends = False  # what is on its way when a state is made is still held in it

    def __init__(self, max_grad_norm: float | None):
        self._max_grad_norm = max_grad_norm

    def rates(self) -> list[float | Tensor]:
        """The learning rates that a FIRE of now is to be applied at."""
        return []

    def due(self, fired: Sequence[Buffered]) -> Sequence[Buffered]:
        """The adapters whose FIRE is waited for now."""
        return fired

    def deliver(
        self, params: Sequence[nn.Parameter], grads: Sequence[Tensor], rates: Sequence, scaled: Scaled, undo: Undo
    ) -> None:
        """Set the gradients, and step by them if that is done here; inside all_or_nothing.

        Args:
            rates: what :meth:`rates` returned in the step of the gradients.
        """
        for p, grad in zip(params, grads):
            p.grad = grad
        clip(params, self._max_grad_norm)


class Overlapped(Awaited):
    """A FIRE is on its way until its adapter is next active; then the optimizer is stepped for that adapter alone."""

    steps = True
    resends = True

    def __init__(self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None):
        super().__init__(max_grad_norm)
        self._optimizer = optimizer

    def rates(self) -> list[float | Tensor]:
        return learning_rates(self._optimizer)

    def due(self, fired: Sequence[Buffered]) -> Sequence[Buffered]:
        # After a FIRE of nothing finite the next is waited for, so that what is returned says what came of it.
        return [a for a in fired if a.came_to_nothing]

    def deliver(
        self, params: Sequence[nn.Parameter], grads: Sequence[Tensor], rates: Sequence, scaled: Scaled, undo: Undo
    ) -> None:
        undo.append(restorer(self._optimizer, params))
        super().deliver(params, grads, rates, scaled, undo)
        step_optimizer(self._optimizer, params, rates, scaled.rate, scaled.steps)


def clip(params: Sequence[nn.Parameter], max_norm: float | None) -> None:
    """Clip the gradients of these parameters together; None does nothing."""
    if max_norm is not None:
        nn.utils.clip_grad_norm_(params, max_norm)


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float | Tensor]:
    """That of each parameter group now, which a scheduler does not move any more."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return [lr.clone() if isinstance(lr, Tensor) else lr for lr in rates]


def step_optimizer(
    optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], rates: Sequence, factor: float, steps: int = 1
) -> None:
    """Step for ``params`` alone, at these rates times ``factor``, and set their gradients to None.

    ``steps`` above 1: as that many steps of Adam would, for a gradient that was multiplied by ``factor``, their square
    root.
    """
    mine = {id(p) for p in params}
    groups = optimizer.param_groups
    touched = []
    for group, lr in zip(groups, rates):
        own = [p for p in group["params"] if id(p) in mine]
        if own:
            changes = {"params": own, "lr": lr * factor}
            if steps > 1:
                changes["betas"] = tuple(beta**steps for beta in group["betas"])
                changes["weight_decay"] = group["weight_decay"] * factor
            touched.append((group, {name: group[name] for name in changes}, changes))
    try:
        for group, _, changes in touched:
            group.update(changes)
        optimizer.param_groups = [group for group, _, _ in touched]
        with _counted_as(steps, optimizer, params), torch.enable_grad():  # as a training loop would call it
            optimizer.step()
    finally:
        optimizer.param_groups = groups
        for group, before, _ in touched:
            group.update(before)
    for p in params:
        p.grad = None


@contextlib.contextmanager
def _counted_as(steps: int, optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Lets Adam count the one step inside as ``steps``.

    Its bias correction is 1 - beta^t. With beta^steps in the place of beta, t / steps in the place of t keeps it right.
    """
    if steps == 1:
        yield
        return
    for p in params:
        if optimizer.state.get(p):  # none before the first step
            t = optimizer.state[p]["step"]
            t += steps
            t /= steps
            t -= 1
    yield
    for p in params:
        optimizer.state[p]["step"].mul_(steps).round_()


def restorer(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter]) -> Callable[[], None]:
    """What puts parameters, gradients and the optimizer's state of them back to where they are now."""
    values = [p.detach().clone() for p in params]
    grads = [p.grad for p in params]
    states = [_copied(optimizer.state[p]) if p in optimizer.state else None for p in params]
    groups = [(group, dict(group)) for group in optimizer.param_groups]

    @torch.no_grad()
    def restore() -> None:
        optimizer.param_groups = [group for group, _ in groups]
        for group, entries in groups:
            group.update(entries)
        for p, value, grad, state in zip(params, values, grads, states):
            p.copy_(value)
            p.grad = grad
            if state is None:
                optimizer.state.pop(p, None)
            else:
                optimizer.state[p] = state

    return restore


def _copied(state: dict) -> dict:
    return {key: value.clone() if isinstance(value, Tensor) else copy.copy(value) for key, value in state.items()}
