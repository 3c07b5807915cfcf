"""How ranks come to one decision about an adapter: by no decision at all, by planned windows, or by a record in every step.

Each way is an :class:`Agreement`. Whatever it decides is a function of what every rank has received.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.statistics import Kept, Seen
from .buffers import Agreed, Buffered, Contribution, Decision, Landed, Moment, Trend
from .exchanges import Exchanges
from .ranks import Exchange, SyncError
from .records import (
    Header,
    Part,
    Record,
    check_headers,
    header_at,
    largest,
    mean_loss,
    pack_part,
    pack_record,
    upgraded,
)

__all__ = ["Agreement", "Planned", "Stepwise", "StepwiseAtOnce", "Synchronous", "rule_of"]


def rule_of(config: Any, world_size: int, params: Sequence[nn.Parameter]) -> Any:
    """What decides about an adapter, see src/trigger.rs."""
    thresholds = {
        "variance": config.buffer_convergence_eps,
        "relative": config.relative_theta,
        "noise_scale": config.fire_cost,
    }
    return ops._native.TriggerRule(
        config.trigger,
        thresholds[config.trigger],
        capacity=config.buffer_capacity,
        max_hold_steps=config.max_hold_steps,
        max_drift_ms=config.max_drift_ms,
        world_size=world_size,
        numel=sum(p.numel() for p in params),
    )


class Agreement:
    """One way to agree. What is written here holds where no record is sent in a step: losses then ride in FIREs."""

    name: str  # in states
    drift_ms: float | None = None  # between ranks, where it is known for a whole step

    def __init__(self, config: Any):
        self._capacity, self._stagger = config.buffer_capacity, config.stagger

    @property
    def awaited_step(self) -> int | None:
        """The step of the record that is on its way."""
        return None

    # -- a window

    def first_window(self, a: Buffered) -> None:
        a.bound = a.rule.first_window(a.index, False, self._stagger)

    def decide(self, a: Buffered, step: int, flush: bool) -> Decision:
        raise NotImplementedError

    def window(self, parts: Sequence[Part], whole: Tensor | None) -> Agreed | None:
        """What all ranks know of a window that ends, none of ``parts`` if nothing of it is applied.

        Args:
            whole: the sum of all its gradients over ranks; None where a FIRE carries something else.
        """
        return _fold(parts)

    def next_window(
        self, a: Buffered, window: Agreed | None, held: int, others: Sequence[Buffered], headers: Sequence[Header]
    ) -> None:
        """What follows for the adapter from a window of ``held`` steps that has ended."""

    # -- a loss

    def told(self, loss: float | Tensor | None, weight: float) -> dict[str, float]:
        """The fields of a moment about this rank's loss."""
        return {}

    def keep_loss(self, a: Buffered, given: Contribution) -> None:
        """Keep this rank's loss until the adapter fires. Nothing is read from the device."""
        loss = given.counted_loss
        if loss is not None and not given.left_out:
            value = torch.as_tensor(loss, dtype=torch.float64, device=a.device).detach()
            pair = torch.stack((value * given.weight, torch.full_like(value, given.weight)))
            a.loss = a.loss + torch.where(torch.isfinite(value), pair, 0.0)

    def land_loss(self, a: Buffered, step: int, headers: Sequence[Header]) -> None:
        loss = mean_loss(headers)
        if loss is not None:
            a.landed = Landed(step, loss)

    # -- what is told of a step

    def part(self, a: Buffered) -> Tensor:
        """This rank's part about the adapter, float64 [7] on its device."""
        seen = Seen.of(ops.sideband_stats(a.buffer.views, a.stats))
        return pack_part(
            m=seen.m,
            n=seen.n,
            n2=Kept.of(a.stats).n2,
            q=seen.q,
            norm2=seen.norm2,
            left_out=seen.nonfinite,
            sent=Kept.of(a.outgoing.stats).n,
        )

    def post_at_once(self, moment: Moment, chosen: Sequence[Buffered]) -> None:
        """Send a record before it is decided what fires in this step."""

    def post_late(self, moment: Moment, holding: Sequence[Buffered]) -> None:
        """Send a record when that is decided."""

    def arrived(self) -> Record | None:
        """The record on its way, waited for; None where there is none."""
        return None

    def use(self, record: Record, adapters: Sequence[Buffered]) -> float | None:
        """Take what ranks told of these adapters, and return the loss they agree on. Inside all_or_nothing."""
        return None

    # -- its state

    def saved_record(self) -> list[Any] | None:
        """The record on its way, for a state; None where there is none, or where it cannot arrive any more."""
        return None

    def resume(self, drift_ms: float | None, record: Sequence[Any] | None, adapters: int) -> None:
        """Go on from what was saved."""


class Synchronous(Agreement):
    """Every step is a FIRE, and nothing is decided."""

    name = "none"

    def decide(self, a: Buffered, step: int, flush: bool) -> Decision:
        return Decision(True, "fire")

    def part(self, a: Buffered) -> Tensor:
        kept = Kept.of(a.stats)
        norm2 = torch.zeros_like(kept.n)  # which only decisions need
        return pack_part(m=kept.m, n=kept.n, n2=kept.n2, q=kept.q, norm2=norm2, left_out=kept.nonfinite, sent=kept.n)

    def window(self, parts: Sequence[Part], whole: Tensor | None) -> Agreed | None:
        return None


class Planned(Agreement):
    """At the end of a window all ranks plan the length of the next, and nothing is sent but what fires."""

    name = "planned"

    def first_window(self, a: Buffered) -> None:
        a.planned = a.wanted = a.rule.first_window(a.index, True, self._stagger)
        a.bound = self._capacity

    def decide(self, a: Buffered, step: int, flush: bool) -> Decision:
        return _decision(a, step, flush, drift_ms=a.drift_ms, planned=a.planned, agreed=None)

    def window(self, parts: Sequence[Part], whole: Tensor | None) -> Agreed | None:
        """V and P of all ranks' gradients together where their sum says it, else the mean of ranks'."""
        if whole is None or not parts:
            return _fold(parts)
        return Agreed(*ops._native.trigger_pool([part.buffer for part in parts], _square_sum(whole.float())))

    def next_window(
        self, a: Buffered, window: Agreed | None, held: int, others: Sequence[Buffered], headers: Sequence[Header]
    ) -> None:
        trend, a.wanted = a.rule.plan(a.trend, window, held)
        a.trend = None if trend is None else Trend(*trend)
        a.planned = a.wanted
        if self._stagger:  # adapters that are active together shall not all fire in one step
            a.planned = a.rule.apart(a.wanted, [(max(o.planned - o.held, 0), o.wanted) for o in others])
        a.drift_ms = largest(header.drift_ms for header in headers)
        a.agreed = window


@dataclass(frozen=True)
class _Pending:
    """A record on its way."""

    step: int
    active: tuple[int, ...]
    rows: Tensor  # float64 [ranks, length of a record]: filled when the exchange has ended
    exchange: Exchange | None


class Stepwise(Agreement):
    """Each step has a record, which travels during the next one; an adapter's decision uses what has arrived."""

    name = "stepwise"

    def __init__(self, config: Any, exchanges: Exchanges, adapters: int):
        super().__init__(config)
        self._exchanges, self._adapters = exchanges, adapters
        self._pending: _Pending | None = None

    def decide(self, a: Buffered, step: int, flush: bool) -> Decision:
        return _decision(a, step, flush, drift_ms=self.drift_ms, planned=None, agreed=a.agreed)

    def told(self, loss: float | Tensor | None, weight: float) -> dict[str, float]:
        if loss is None or not weight > 0 or not math.isfinite(value := float(loss)):
            return {}
        return {"loss": value * weight, "loss_weight": weight}

    def keep_loss(self, a: Buffered, given: Contribution) -> None:
        """The record has it."""

    def land_loss(self, a: Buffered, step: int, headers: Sequence[Header]) -> None:
        """The record has it."""

    def post_late(self, moment: Moment, holding: Sequence[Buffered]) -> None:
        record = pack_record(header_at(moment), {a.index: self.part(a) for a in holding}, self._adapters)
        rows, exchange = self._exchanges.gather(record)
        self._pending = _Pending(moment.step, moment.active, rows, exchange)

    @property
    def awaited_step(self) -> int | None:
        return None if self._pending is None else self._pending.step

    def arrived(self) -> Record | None:
        if self._pending is None:
            return None
        record = self._waited_for(self._pending)
        wrong = check_headers(record.headers, self._exchanges.ranks.names)
        if wrong is not None:
            self._exchanges.refuse(wrong)
        return record

    def _waited_for(self, pending: _Pending) -> Record:
        if pending.exchange is not None:
            self._exchanges.wait(pending.exchange)
            self._pending = _Pending(pending.step, pending.active, pending.rows, None)
        return Record(pending.step, pending.active, pending.rows.tolist())

    def use(self, record: Record, adapters: Sequence[Buffered]) -> float | None:
        headers = record.headers
        self._pending = None
        self.drift_ms = largest(header.drift_ms for header in headers)
        for a in adapters:
            parts = record.parts(a.index)
            filled = any(part.m for part in parts)
            a.agreed = _fold(parts) if filled else None
            a.nothing_finite = not filled and any(part.left_out for part in parts)
        return mean_loss(headers)

    def saved_record(self) -> list[Any] | None:
        if self._pending is None or self._exchanges.broken is not None:
            return None
        try:
            record = self._waited_for(self._pending)
        except SyncError:
            return None
        return [record.step, list(record.active), record.rows]

    def resume(self, drift_ms: float | None, record: Sequence[Any] | None, adapters: int) -> None:
        self.drift_ms, self._pending = drift_ms, None
        if record is not None:
            step, active, rows = record
            rows = torch.tensor(upgraded(rows, active, adapters), dtype=torch.float64)
            self._pending = _Pending(step, tuple(active), rows, None)


class StepwiseAtOnce(Stepwise):
    """Each step waits for its record, and decides by it."""

    def post_at_once(self, moment: Moment, chosen: Sequence[Buffered]) -> None:
        super().post_late(moment, chosen)

    def post_late(self, moment: Moment, holding: Sequence[Buffered]) -> None:
        """It is sent already."""


def _decision(a: Buffered, step: int, flush: bool, **known: Any) -> Decision:
    age = step - a.first_step + 1
    return Decision(
        *a.rule.decide(held=a.held, age=age, bound=a.bound, flush=flush, nothing_finite=a.nothing_finite, **known)
    )


def _fold(parts: Sequence[Part]) -> Agreed:
    """The mean over ranks of their V and P."""
    return Agreed(*ops._native.trigger_fold([part.buffer for part in parts]))


def _square_sum(flat: Tensor) -> float:
    """||flat||^2 with the same bits on every processor: squares in float64 and a tree of elementwise sums.

    A library's own reduction may order its sums by the width of its vectors, and ranks may run on different machines.
    """
    squares = flat.double().square_()
    while squares.numel() > 1:
        half = (squares.numel() + 1) // 2
        squares[: squares.numel() - half] += squares[half:]
        squares = squares[:half]
    return squares.item() if squares.numel() else 0.0
