"""Stepping the optimizer for one adapter alone, at a given rate, and undoing it if it fails."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

__all__ = ["learning_rates", "restorer", "step_optimizer"]


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
