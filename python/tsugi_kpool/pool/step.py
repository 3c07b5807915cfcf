"""One step of a pool: the ``with`` block, and the checks that what happens in and around it loses no gradient."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..warn import warn_user
from .members import Members
from .registry import AttachedPool
from .watch import gradients_now, holds

__all__ = ["Loss", "Step", "StepChecks", "is_number"]

Loss = float | Tensor | Callable[[], float | Tensor]

#: Steps with data and without a loss after which ``routing_strategy="loss_aware"`` is an error.
STEPS_WITHOUT_LOSS = 3


def is_number(value: Any) -> bool:
    """Whether it is a number: Python's, NumPy's, or a tensor with one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    return isinstance(value, numbers.Real)


F = TypeVar("F", bound=Callable[..., Any])


class Step(contextlib.ContextDecorator):
    """What ``pool.step()`` returns: each ``with`` block of it is one step, and so is each call of a function it decorates."""

    def __init__(self, pool: AttachedPool, loss: Loss | None, weight: float):
        self._pool, self._loss, self._weight = pool, loss, weight
        self._used = False
        self._active: tuple[int, ...] = ()

    def __call__(self, function: F) -> F:
        self._used = True
        return super().__call__(function)

    def __enter__(self) -> tuple[int, ...]:
        self._used = True
        self._active = self._pool.begin(self._pool.current_step)
        return self._active

    def __exit__(self, kind: type | None, *_: object) -> None:
        pool = self._pool
        try:
            if kind is None:
                if self._loss is not None:
                    pool.record_loss(self._loss() if callable(self._loss) else self._loss)
                pool.end(pool.current_step, self._active, self._weight)
        finally:
            if pool.is_open:  # by an error before anything was exchanged
                pool.abandon()
                pool.drop_gradients(self._active)

    def __del__(self) -> None:
        if not self._used:
            warn_user("pool.step() was called and not entered, which does nothing: write `with pool.step():`")


class StepChecks:
    """Follows a step's gradients, from its first backward pass until they are applied, and raises where one would be lost."""

    def __init__(self, members: Members, needs_loss: bool):
        self._members = members
        self._step = 0
        self.active: tuple[int, ...] = ()  # of the open step; empty where none is open
        self._had_gradient = False  # a backward pass of the open step left one
        self._after_backward: list[Any] = []  # gradients_now() at the end of the last one
        self._was_any: bool | Tensor = False  # whether the last gradient was not all zeros then; read when needed
        self.left: tuple[int, ...] = ()  # adapters whose gradients are the caller's to step with
        self.gradient_state: Any = None  # accelerate's, which says whether its optimizer steps next
        self._without_loss: int | None = 0 if needs_loss else None  # steps so far; None: it is not looked at
        self._told: set[str] = set()

    def begin(self, step: int, active: Sequence[int]) -> None:
        self._step, self.active, self._had_gradient = step, tuple(active), False

    def parameters(self, adapters: Sequence[int]) -> Iterator[nn.Parameter]:
        return (p for i in adapters for p in self._members.parameters[i])

    def has_gradient(self) -> bool:
        """Whether an adapter of the open step has one."""
        return bool(self._gradients())

    def _gradients(self) -> list[Tensor]:
        """Those that the adapters of the open step have."""
        return [p.grad for p in self.parameters(self.active) if p.grad is not None]

    # -- within a step

    def note_backward(self) -> None:
        """A backward pass of the open step has ended."""
        grads = self._gradients()
        if grads:
            self._had_gradient, self._was_any = True, grads[-1].any()
            self._after_backward = gradients_now(self.parameters(self.active))

    def check_not_cleared(self) -> None:
        """A step's gradients add up from its first backward pass to its end."""
        if self.active and self._had_gradient and self._are_cleared():
            raise RuntimeError(
                f"pool.step: the gradients of step {self._step} were cleared inside the block, after a backward pass; call "
                "zero_grad() after the block, behind opt.step()"
            )

    def _are_cleared(self) -> bool:
        grads = self._gradients()
        if not grads:
            return True
        if gradients_now(self.parameters(self.active)) == self._after_backward:
            return False
        # Something wrote to them: zero_grad(set_to_none=False), or a clip. Reading them waits for the device.
        return bool(self._was_any) and not any(bool(grad.any()) for grad in grads)

    def check_end(self, weight: float, has_loss: bool) -> None:
        """Check what the block did, before anything is exchanged."""
        self.check_not_cleared()
        if self.gradient_state is not None and not self.gradient_state.sync_gradients:
            raise RuntimeError(
                "pool.step: the block ended at a micro-batch after which accelerate's optimizer does not step; put "
                "`with pool.step():` around all micro-batches of a step, and accelerator.accumulate inside it"
            )
        if weight == 0:
            return
        if self._without_loss is not None:
            self._without_loss = None if has_loss else self._without_loss + 1
            self._check_losses(self._without_loss or 0)
        if not self.has_gradient():
            self._tell_once(
                "no gradient",
                f"pool.step: no active adapter has a gradient at the end of step {self._step}: call loss.backward() inside "
                "the block; a rank without data takes part with pool.step(weight=0)",
            )

    @staticmethod
    def _check_losses(without: int) -> None:
        if without >= STEPS_WITHOUT_LOSS:
            raise RuntimeError(
                f"routing_strategy is 'loss_aware', but {without} steps had no loss: call "
                "pool.record_loss(loss) inside `with pool.step():`, or choose 'round_robin' or 'random'"
            )

    # -- optimizers, and the step after

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer, closure: bool) -> None:
        """Called before any optimizer of the process steps."""
        if self.active:
            if holds(optimizer, self.parameters(self.active), with_gradient=not closure):
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step() inside `with pool.step():`: the gradients there are this rank's "
                    "own, before they were exchanged, so ranks would differ. Call opt.step() after the block"
                )
        elif self.left and holds(optimizer, self.parameters(self.left)):
            self.left = ()

    def check_applied(self) -> None:
        """Raise if gradients that the last step left to the caller were not applied."""
        grads = [p.grad for p in self.parameters(self.left) if p.grad is not None]
        # An overflow that a GradScaler found is not to be applied, and zeros are what zero_grad left.
        if any(bool(grad.isfinite().all()) and bool(grad.any()) for grad in grads):
            raise RuntimeError(
                f"pool.step: the gradients of the step before were never applied: adapters {self.left} still have them, "
                "and no optimizer that holds them stepped (it is made after get_peft_model). One `with pool.step():` is one "
                "optimizer step: put all its micro-batches (accelerator.accumulate too) inside the block, and call opt.step() "
                "and opt.zero_grad() after each block. To drop these, as after an interruption, call opt.zero_grad()"
            )
        if self.left and all(bool(grad.isfinite().all()) for grad in grads):
            self._tell_once(
                "cleared",
                "pool.step: the gradients of the step before were cleared without optimizer.step(), so that step is lost. "
                "One `with pool.step():` is one optimizer step: put all its micro-batches inside. Where a GradScaler "
                "skipped it, call pool.record_found_inf in the block, so that ranks skip alike",
            )
        self.left = ()

    def _tell_once(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warn_user(message)
