"""An adapter's elastic buffer, what it has on its way, and how a change of either is all or nothing."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Buffered", "Decision", "Flight", "Moment", "all_or_nothing", "drop_gradients"]


class Decision(NamedTuple):
    """HOLD or FIRE, why, and the two numbers that were compared; NaN where nothing was."""

    fires: bool
    reason: str
    statistic: float = math.nan
    threshold: float = math.nan


@dataclass(frozen=True)
class Moment:
    """A step, as records tell of it. What other code than ours says is asked for before anything is changed."""

    step: int
    active: tuple[int, ...]
    router: int  # the digest of its choice
    drift_ms: float  # NaN: unknown
    scaled: float  # 1.0: this rank gave a GradScaler's tensor; 0.0: it gave none; NaN: it had no data to scale
    loss: float = 0.0  # weighted; of agreement="stepwise" alone
    loss_weight: float = 0.0


@dataclass
class Flight:
    """A reduce on its way, and what the optimizer needs to know when it lands.

    ``payload`` is [elements + ranks x bytes of a record] in the wire's dtype, or None in one process; ``record`` is float64.
    """

    moment: Moment
    decision: Decision
    payload: Tensor | None
    record: Tensor
    rates: list[Any]  # the learning rate of each parameter group at the step that produced the gradient
    work: Any = None
    bytes: int = 0


class Buffered:
    """One adapter's elastic buffer, and where its window stands."""

    def __init__(self, index: int, params: Sequence[nn.Parameter]):
        self.index, self.params = index, list(params)
        self.device = self.params[0].device
        self.numel = sum(p.numel() for p in self.params)
        self.clear()
        self.loss = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum of weight * loss, sum of weight
        self.anchor: Tensor | None = None  # hold_action="local": the parameters that all ranks had last
        self.current: tuple[Tensor, Tensor] | None = None  # hold_action="discard": this step's snapshot alone
        self.flight: Flight | None = None
        self.landed: tuple[int, float] | None = None  # an agreed loss, until the router may see it
        # Alike on all ranks:
        self.held = 0  # steps in S
        self.first_step = 0
        self.bound = self.planned = 0
        self.wanted = 0  # the length that was planned, before it was moved away from others'
        self.trend: tuple[float, float] | None = None
        self.agreed: tuple | None = None  # m, V, ||E g||^2, P
        self.drift_ms: float | None = None
        self.lr_factor = 1.0
        self.nothing_finite = False  # in this window, as agreed last
        self.came_to_nothing = False  # the last FIRE: no rank had anything finite
        self.rows_without_finite: list[int] = []  # of each rank, steps in a row without a finite gradient

    def views(self, flat: Tensor) -> list[Tensor]:
        """``flat`` [at least numel] cut into the shapes of the parameters."""
        parts = flat[: self.numel].split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params)]

    def clear(self) -> None:
        """An empty buffer, in new memory: what was held can still be put back."""
        self._take(
            torch.zeros(self.numel, dtype=torch.float32, device=self.device),
            torch.zeros(8, dtype=torch.float64, device=self.device),
        )

    def own(self) -> None:
        """Go on in copies, so that adding to them leaves what :func:`all_or_nothing` may have to put back."""
        self._take(self.flat.clone(), self.stats.clone())

    def _take(self, flat: Tensor, stats: Tensor) -> None:
        self.flat, self.stats, self.sum = flat, stats, self.views(flat)

    @property
    def variance(self) -> float:
        """V / numel."""
        known = self.agreed is not None and self.agreed[1] is not None
        return self.agreed[1] / self.numel if known else math.inf


@contextmanager
def all_or_nothing(*objects: Any, undo: Sequence[Callable[[], None]] = ()) -> Iterator[None]:
    """What raises inside, at any point, leaves the objects' attributes as they were before.

    Attributes are put back as they were bound: code inside binds new values, and changes none in place. ``undo`` puts back
    what lies elsewhere.
    """
    before = [(each, dict(vars(each))) for each in objects]
    try:
        yield
    except BaseException:
        with _uninterrupted():
            for each, attributes in before:
                each.__dict__ = attributes
            for step in undo:
                step()
        raise


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A Ctrl-C that comes inside waits for the end: whoever presses it twice would tear what the first one put back."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # no other thread is interrupted, and a handler that is not Python's cannot be set again
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(*came[-1])


def drop_gradients(adapters: Sequence[Buffered]) -> None:
    for a in adapters:
        for p in a.params:
            p.grad = None
