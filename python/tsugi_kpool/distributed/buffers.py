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

from .. import ops
from ..ops.statistics import LENGTH, Kept

__all__ = [
    "Agreed",
    "Buffered",
    "Contribution",
    "Decision",
    "Flight",
    "Landed",
    "Moment",
    "Snapshots",
    "Trend",
    "all_or_nothing",
    "drop_gradients",
]


class Decision(NamedTuple):
    """HOLD or FIRE, why, and the two numbers that were compared; NaN where nothing was."""

    fires: bool
    reason: str
    statistic: float = math.nan
    threshold: float = math.nan


class Agreed(NamedTuple):
    """What all ranks know of an adapter's window, see src/trigger.rs."""

    m: float | None = None
    variance: float | None = None  # V
    signal: float | None = None  # ||E g||^2
    power: float | None = None  # P


class Trend(NamedTuple):
    """Moving averages, from which windows are planned."""

    variance: float
    signal: float


class Landed(NamedTuple):
    """An agreed loss, until the router may see it."""

    step: int
    loss: float


@dataclass(frozen=True)
class Moment:
    """A step, as records tell of it. What other code than ours says is asked for before anything is changed."""

    epoch: int  # how often the run was resumed
    step: int
    active: tuple[int, ...]
    router: int  # the digest of its choice
    drift_ms: float  # NaN: unknown
    scaled: float  # 1.0: this rank gave a GradScaler's tensor; 0.0: it gave none; NaN: it had no data to scale
    loss: float = 0.0  # weighted; of agreement="stepwise" alone
    loss_weight: float = 0.0


@dataclass(frozen=True)
class Contribution:
    """What this rank brings to a step beside its gradients."""

    weight: float
    loss: float | Tensor | None
    left_out: bool  # its gradients are not to be used

    @property
    def counted_loss(self) -> float | Tensor | None:
        """The loss if there is data behind it."""
        return self.loss if self.weight > 0 else None


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


@dataclass(frozen=True)
class Snapshots:
    """Gradients of an adapter, added up."""

    flat: Tensor  # S, the sum of weight * gradient: float32 [numel]
    stats: Tensor  # float64 [8], see ops.statistics.Kept
    views: list[Tensor]  # S in the shapes of the parameters

    def add(self, params: Sequence[nn.Parameter], weight: float) -> None:
        """Add the gradients that are there, as one snapshot."""
        pairs = [(view, p.grad) for view, p in zip(self.views, params) if p.grad is not None]
        ops.sideband_accumulate_([view for view, _ in pairs], self.stats, [grad for _, grad in pairs], weight)

    def leave_one_out(self) -> None:
        """Count a snapshot that is not added, as the operation counts those that are not finite."""
        Kept.of(self.stats).nonfinite.add_(1.0)


class Buffered:
    """One adapter's elastic buffer, and where its window stands. ``rule`` decides about it."""

    def __init__(self, index: int, params: Sequence[nn.Parameter], rule: Any, world_size: int):
        self.index, self.params, self.rule = index, list(params), rule
        self.device = self.params[0].device
        self.numel = sum(p.numel() for p in self.params)
        self.buffer = self.empty()
        self.loss = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum of weight * loss, sum of weight
        self.anchor: Tensor | None = None  # hold_action="local": the parameters that all ranks had last
        self.current: Snapshots | None = None  # hold_action="discard": this step's snapshot alone
        self.flight: Flight | None = None
        self.landed: Landed | None = None
        # Alike on all ranks:
        self.held = 0  # steps in the buffer
        self.first_step = 0
        self.bound = self.planned = 0
        self.wanted = 0  # the length that was planned, before it was moved away from others'
        self.trend: Trend | None = None
        self.agreed: Agreed | None = None
        self.drift_ms: float | None = None
        self.lr_factor = 1.0
        self.nothing_finite = False  # in this window, as agreed last
        self.came_to_nothing = False  # the last FIRE: no rank had anything finite
        self.rows_without_finite = [0] * world_size  # of each rank, steps in a row without a finite gradient

    @property
    def flat(self) -> Tensor:
        return self.buffer.flat

    @property
    def stats(self) -> Tensor:
        return self.buffer.stats

    @property
    def outgoing(self) -> Snapshots:
        """What a FIRE sends."""
        return self.buffer if self.current is None else self.current

    @property
    def variance(self) -> float:
        """V / numel."""
        total = None if self.agreed is None else self.agreed.variance
        return math.inf if total is None else total / self.numel

    def views(self, flat: Tensor) -> list[Tensor]:
        """``flat`` [at least numel] cut into the shapes of the parameters."""
        parts = flat[: self.numel].split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params)]

    def values(self) -> Tensor:
        """The parameters' values, float32 [numel]."""
        return torch.cat([p.detach().float().flatten() for p in self.params])

    def empty(self) -> Snapshots:
        return self._snapshots(
            torch.zeros(self.numel, dtype=torch.float32, device=self.device),
            torch.zeros(LENGTH, dtype=torch.float64, device=self.device),
        )

    def own(self) -> None:
        """Go on in copies, so that adding to them leaves what :func:`all_or_nothing` may have to put back."""
        self.buffer = self._snapshots(self.flat.clone(), self.stats.clone())

    def _snapshots(self, flat: Tensor, stats: Tensor) -> Snapshots:
        return Snapshots(flat, stats, self.views(flat))

    def check_gradients(self) -> None:
        for p in self.params:
            if p.grad is not None and p.grad.is_sparse:
                raise ValueError(f"adapter {self.index} has a sparse gradient; dense ones are needed")

    @property
    def has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.params)

    def end_window(self, bound: int) -> None:
        """An empty buffer, in new memory: what was held can still be put back."""
        self.held, self.flight, self.current, self.agreed, self.nothing_finite = 0, None, None, None, False
        self.bound = bound
        self.loss = torch.zeros_like(self.loss)
        self.buffer = self.empty()


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
