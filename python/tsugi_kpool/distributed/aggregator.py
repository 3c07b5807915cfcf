"""Between ranks: what is held, when it is exchanged, and what the exchange does to the parameters.

An :class:`Aggregator` owns one elastic buffer an adapter: S = sum n_t g_t in float32, with the scalars of
``ops.sideband_accumulate_``. After each backward pass it adds the active adapters' gradients, decides HOLD or FIRE
(src/trigger.rs) and, on FIRE, exchanges S: the gradient that comes out is sum over ranks of S / sum over ranks of n.
docs/trigger.md has the formulas and the guarantees.

Ranks never disagree: a decision is a function of the configuration, of counters that advance alike everywhere, and of
bytes that every rank has received, folded in rank order. Each payload ends with one slot a rank, in which the rank's
scalars stand as single bytes, zeros in all other ranks' slots; sums of integers up to 255 are exact in float32 and in
bfloat16, so every rank reads every rank's float64 scalars to the bit from the reduce it needed anyway. Payloads and records
have one length each, whatever fires and whatever is active.

A step is all or nothing: what others have to say (the router's digest, drift, losses) is asked for first, buffers and
counters change in :func:`buffers.all_or_nothing`, and who listens (diagnostics, ``on_agreed_loss``) is told afterwards.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..warn import warn_user
from . import checkpoint
from . import state as state_
from .agree import Facts, check_parameters, compare, facts_of, refused_by_none
from .agreement import rule_of
from .buffers import Buffered, Contribution, Decision, Flight, Moment, all_or_nothing, drop_gradients
from .diagnostics import row_of
from .exchanges import Exchanges
from .fingerprint import adapter_fingerprint, as_record_field
from .modes import Modes
from .nonfinite import LeftOut, NonFinite, Share, Withheld, is_finite, nothing_to_apply
from .ranks import Ranks, SyncError
from .records import (
    Arrival,
    Payloads,
    check_fingerprints,
    check_headers,
    header_at,
    pack_fire,
    record_length,
    unpack_fires,
)
from .scalers import Scalers
from .stepping import Undo, clip

__all__ = ["AggregationDecision", "Aggregator"]


class AggregationDecision(NamedTuple):
    """What was decided for one adapter; ``variance`` is V / numel as agreed last, infinite where there is none yet."""

    adapter_idx: int
    fired: bool
    variance: float
    reason: str


class Aggregator:
    """Accumulates, decides and exchanges the gradients of a pool of adapters.

    Args:
        adapters: for each adapter all its A and B parameters, in one order that is the same on all ranks.
        config: any object with the fields of ``KPoolLoraConfig`` that docs/trigger.md lists.
        group: the process group to exchange over; the default group if None. Groups of its own are made from it, so
            that its time limit holds and nothing is interleaved with other collectives. Without torch.distributed, or
            with one rank, the same code runs and communicates nothing.
        model: what the adapters are part of; its layers, parameters and buffers are then compared between ranks too.
        optimizer: any ``torch.optim`` optimizer that holds the adapters' parameters. With it, and ``config.overlap``, a
            reduce stays in flight until its adapter is next active, when the optimizer is stepped for that adapter
            alone. Without it ``.grad`` is ready when :meth:`after_backward` returns, for the caller to step.
        max_grad_norm: the norm to which one adapter's aggregated gradient is clipped.
        router_digest: step -> an integer that must be the same on all ranks.
        drift_ms: how far apart the ranks are, as far as this one knows; None where it does not.
        diagnostics: an object with ``write(dict)``; see :mod:`tsugi_kpool.distributed.diagnostics`.

    Raises:
        ValueError: for arguments that do not fit together, or ranks that differ (agree.py has in what).
        TypeError: for parameters that are sharded (FSDP).
        SyncError: a rank was not there to be compared within the time limit, or its own arguments were refused.

    Where ranks differ in the parameters of adapters and in nothing else, the lowest rank's are copied to all.

    ``agreed_losses[i]`` is the last loss folded across ranks for adapter i, or None; ``on_agreed_loss(step, active,
    loss)`` is called when one may be used, at the same step on every rank. ``lr_factors[i]`` is the factor by
    ``lr_scaling`` of the adapter's last FIRE: applied already with ``optimizer``, the caller's to apply without.
    """

    def __init__(
        self,
        adapters: Sequence[Sequence[nn.Parameter]],
        config: Any,
        *,
        group: Any = None,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        max_grad_norm: float | None = None,
        router_digest: Callable[[int], int] = lambda step: 0,
        drift_ms: Callable[[], float | None] = lambda: None,
        diagnostics: Any = None,
    ):
        self._config, self._optimizer, self._max_grad_norm = config, optimizer, max_grad_norm
        self._router_digest, self._drift_ms, self._diagnostics = router_digest, drift_ms, diagnostics
        self._ranks = ranks = Ranks(group, float(config.sync_timeout_s))
        self.world_size, self.rank = ranks.size, ranks.rank
        modes = Modes(config, optimizer, max_grad_norm, ranks.size)
        self._compare(adapters, model, modes)
        self._exchanges = Exchanges(ranks)
        self._adapters = [
            Buffered(i, params, rule_of(config, ranks.size, params), ranks.size) for i, params in enumerate(adapters)
        ]
        longest = max(a.numel for a in self._adapters)  # of a payload: the same whatever fires
        self._payloads = Payloads(longest, ranks.size, ranks.rank, getattr(torch, config.wire_dtype))
        self._alone = modes.alone  # gradients are left as they are, in their own precision
        self._agreement = modes.agreement(self._exchanges, len(self._adapters))
        self._delivery = modes.delivery()
        self._hold = modes.hold_action(self._delivery)
        for a in self._adapters:
            self._agreement.first_window(a)
            self._hold.begin(a)
        self._scalers = Scalers(ranks)
        self._nonfinite = NonFinite(config.nonfinite_limit, ranks.names)
        self._withheld: Withheld | None = None
        self._epoch, self._step = 0, -1
        self._active: tuple[int, ...] = ()
        self.agreed_losses: list[float | None] = [None] * len(self._adapters)
        self.on_agreed_loss: Callable[[int, tuple[int, ...], float], None] | None = None
        # What is told when a step is done, see _tell.
        self._rows: list[dict[str, Any]] = []
        self._losses: list[tuple[int, tuple[int, ...], float]] = []
        self._left_out: list[LeftOut] = []
        self._telemetry_failed = False

    def _compare(self, adapters: Sequence[Sequence[nn.Parameter]], model: nn.Module | None, modes: Modes) -> None:
        """Make sure that ranks are alike; the groups are let go of if they are not."""
        try:
            facts = refused_by_none(self._ranks, lambda: self._facts(adapters, model, modes))
            modes.warn_of_unscaled()
            if facts is not None:
                compare(self._ranks, facts, adapters)
                self._ranks.longest_record = record_length(len(adapters))
        except BaseException as error:
            refused = isinstance(error, (ValueError, TypeError))  # on all ranks alike
            self._ranks.close(not refused, None if refused else error)
            raise

    def _facts(self, adapters: Sequence[Sequence[nn.Parameter]], model: nn.Module | None, modes: Modes) -> Facts | None:
        """What this rank has, if there is anybody to compare it with; raises where its arguments are refused."""
        check_parameters(adapters, self._optimizer)
        modes.check()
        if self.world_size == 1:
            return None
        settings = {"max_grad_norm": self._max_grad_norm, "the router's choice": self._router_digest(0)}
        return facts_of(adapters, self._config, model=model, optimizer=self._optimizer, settings=settings)

    # ---- what it is --------------------------------------------------------------------------------------------------

    @property
    def steps_itself(self) -> bool:
        """Whether the optimizer is stepped here; else ``.grad`` is the caller's to step with."""
        return self._delivery.steps or self._hold.steps

    @property
    def step(self) -> int:
        """The last step whose gradients are in the buffers, or were applied; -1 before the first."""
        return self._step

    @property
    def lr_factors(self) -> list[float]:
        return [a.lr_factor for a in self._adapters]

    @property
    def held(self) -> list[int]:
        """Steps in each adapter's buffer; what is in flight counts until it has landed."""
        return [a.held for a in self._adapters]

    @property
    def control_bytes(self) -> int:
        """Sent by this rank in records so far."""
        return self._exchanges.control_bytes

    @property
    def payload_bytes(self) -> int:
        """Sent by this rank in FIREs so far."""
        return self._exchanges.payload_bytes

    # ---- the calls of a step -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self, step: int, active: Sequence[int]) -> None:
        """Finish what is in flight for the adapters that are about to be active.

        Raises:
            SyncError: an exchange failed, or ranks differ in what fires; what it carried is still held.
            NonFiniteError: gradients of an adapter are not finite any more.
        """
        self._exchanges.check_usable()
        self._end_withholding()
        for i in self._checked(active):
            a = self._adapters[i]
            if a.flight is not None:
                self._finish(a, a.flight)
            if a.landed is not None:
                with all_or_nothing(self, a):
                    landed, a.landed = a.landed, None
                    self._note_loss(landed.step, (i,), landed.loss)
        self._settle()

    @torch.no_grad()
    def after_backward(
        self,
        step: int,
        active: Sequence[int],
        *,
        weight: float = 1.0,
        loss: float | Tensor | None = None,
        found_inf: bool | Tensor = False,
    ) -> list[AggregationDecision]:
        """Take the gradients of the active adapters, decide, and exchange what fires.

        An exception before the gradients are in the buffers leaves everything as it was: the step may be tried again. An
        exception after it leaves a step that is done as far as :attr:`step` and :attr:`held` say.

        Args:
            step: the optimizer step; on all ranks the same, and more than the one before.
            active: the adapters of this step, in the router's order; on all ranks the same.
            weight: tokens or samples behind this rank's gradients; 0 for a rank that had no data.
            loss: this rank's loss, for the router.
            found_inf: a tensor is agreed on (one number on the control group, and the tensor is overwritten with the
                result, so that GradScalers stay equal): if it is not 0 on any rank, the step is left out on all. Every
                rank that has data gives one, from the first step on, or none does. True leaves out this rank's gradients
                alone.

        Returns:
            One decision for each active adapter. ``.grad`` is the aggregated gradient of an adapter that fired, where
            the caller steps the optimizer, and None for all others. With ``optimizer`` and overlap, a FIRE is still on its
            way: what came of it is in the diagnostics.

        Raises:
            ValueError: wrong arguments.
            SyncError: an exchange failed, or ranks differ; what was held is still held.
            NonFiniteError: gradients of an adapter are not finite any more.
        """
        self._exchanges.check_usable()
        active = self._checked(active)
        self._check_turn(step, active, weight)
        chosen = [self._adapters[i] for i in active]
        moment = self._moment(step, active, weight, loss, found_inf)
        scaled = self._exchanges.guard(self._scalers.agree, moment, found_inf)
        given = Contribution(weight, loss, scaled.left_out_here)
        if scaled.overflowed:
            decisions = self._leave_out(chosen, moment, scaled.overflowed)
        elif self._alone:
            decisions = self._pass_on(chosen, moment, given, scaled.finite)
        else:
            decisions = self._hold_or_fire(chosen, moment, given, scaled.finite)
        return self._done(decisions)

    @torch.no_grad()
    def flush(self) -> list[AggregationDecision]:
        """FIRE whatever is held and finish whatever is in flight: before a save for others, an evaluation, the end.

        All ranks call it after the same step. Where the caller steps the optimizer, ``.grad`` is set: step it next.
        """
        self._exchanges.check_usable()
        self._end_withholding()
        self._finish_all()
        self._take_record()
        moment = self._moment(self._step, self._active)
        held = [a for a in self._adapters if a.held]
        decisions = {a: self._agreement.decide(a, self._step, flush=True) for a in held}
        sent = self._hold.to_flush(held)
        for a in held:
            if a not in sent:
                decisions[a] = self._drop_held(a, decisions[a])
        flights = self._fire(sent, decisions, moment)
        for a in sent:
            decisions[a] = self._finish(a, flights[a])
        return self._done(decisions)

    def _drop_held(self, a: Buffered, decision: Decision) -> Decision:
        decision = decision._replace(fires=False)
        with all_or_nothing(self, a):
            a.end_window(self._config.buffer_capacity)
            self._report(a, self._step, decision)
        return decision

    @torch.no_grad()
    def finish(self) -> None:
        """Finish what is in flight, and nothing else: before the model or the optimizer is looked at or saved."""
        self._exchanges.check_usable()
        self._finish_all()
        self._tell()

    def _finish_all(self) -> None:
        for a in self._adapters:
            if a.flight is not None:
                self._finish(a, a.flight)

    def close(self, error: BaseException | None = None) -> None:
        """Let go of the groups and the diagnostics. What is held or in flight is not sent: :meth:`flush` first.

        Args:
            error: why, where it is not the orderly end; the other ranks are told.
        """
        self._end_withholding()
        broken = self._exchanges.broken
        try:
            self._ranks.close(broken is not None, error or broken)
        finally:
            if self._diagnostics is not None:
                self._write_rows()
                self._diagnostics.close()

    def flush_and_close(self) -> None:
        """The orderly end, on all ranks after the same step. A rank that is in a step meanwhile is told that it cannot go on."""
        try:
            self._ranks.closing()
            self.flush()
        except BaseException as error:
            self.close(error)
            raise
        self.close()

    # ---- before anything changes -------------------------------------------------------------------------------------

    def _checked(self, active: Iterable[int]) -> tuple[int, ...]:
        active = tuple(int(i) for i in active)
        for i in active:
            if not 0 <= i < len(self._adapters):
                raise ValueError(f"active is {active}, but the adapters are 0 to {len(self._adapters) - 1}")
        if len(set(active)) != len(active):
            raise ValueError(f"active is {active}, with an adapter twice")
        return active

    def _check_turn(self, step: int, active: tuple[int, ...], weight: float) -> None:
        if step <= self._step:
            raise ValueError(f"step is {step}, not above the step before, {self._step}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight is {weight}, not a finite number of at least 0")
        for i in active:
            if self._adapters[i].flight is not None:
                raise ValueError(
                    f"adapter {i} is active with a reduce in flight: call before_step({step}, active) first"
                )

    def _moment(
        self,
        step: int,
        active: tuple[int, ...],
        weight: float = 0.0,
        loss: float | Tensor | None = None,
        found_inf: bool | Tensor = False,
    ) -> Moment:
        """What records tell of this step. Asks code of others, which may raise."""
        drift = self._drift_ms()
        scaled = 1.0 if isinstance(found_inf, Tensor) else 0.0 if weight > 0 else math.nan
        told = self._agreement.told(loss, weight)
        router = self._router_digest(step) if step >= 0 else 0
        drift = math.nan if drift is None else float(drift)
        return Moment(self._epoch, step, active, router, drift, scaled, **told)

    # ---- steps without a buffer --------------------------------------------------------------------------------------

    def _leave_out(self, chosen: list[Buffered], moment: Moment, overflowed: list[int]) -> dict[Buffered, Decision]:
        """A step that GradScalers skip on all ranks: it enters no buffer. Now and then that is how they find their scale."""
        shares = [Share(0.0, float(k in overflowed)) for k in range(self.world_size)]
        decision = Decision(False, "hold_nonfinite")
        with all_or_nothing(self, *chosen):
            for a in chosen:
                self._nonfinite.count(a, shares)
                self._report(a, moment.step, decision, left_out=len(overflowed))
            self._step, self._active = moment.step, moment.active
        drop_gradients(chosen)
        return dict.fromkeys(chosen, decision)

    def _pass_on(
        self, chosen: list[Buffered], moment: Moment, given: Contribution, finite: list[int]
    ) -> dict[Buffered, Decision]:
        """One rank, every step a FIRE: what the backward pass left is the result, if it is finite."""
        loss = given.counted_loss
        loss = float(loss) if loss is not None and math.isfinite(loss) else None
        if given.weight == 0 or given.left_out:
            drop_gradients(chosen)
        bad = [] if given.weight == 0 else [a for a in chosen if given.left_out or not is_finite(a.params)]
        decisions = {}
        with all_or_nothing(self, *chosen):
            for a in chosen:
                reason = "hold_nonfinite" if a in bad else "fire" if a.has_gradients else "empty_buffer"
                decisions[a] = Decision(reason == "fire", reason)
                self._nonfinite.end_rows(a, finite)
                self._nonfinite.count(a, [Share(float(reason == "fire"), float(a in bad))])
                self._report(a, moment.step, decisions[a], left_out=int(a in bad))
                if a in bad:
                    self._left_out = [*self._left_out, LeftOut(a.index, moment.step, (self._ranks.names[0],))]
            self._note_loss(moment.step, moment.active, loss)
            self._step, self._active = moment.step, moment.active
        for a in chosen:
            if a not in bad:
                clip(a.params, self._max_grad_norm)
        if bad:
            self._withheld = Withheld(bad)
        return decisions

    def _end_withholding(self) -> None:
        if self._withheld is not None:
            self._withheld.end()
            self._withheld = None

    # ---- accumulate and decide ---------------------------------------------------------------------------------------

    def _hold_or_fire(
        self, chosen: list[Buffered], moment: Moment, given: Contribution, finite: list[int]
    ) -> dict[Buffered, Decision]:
        """Take the gradients, decide about each adapter, and send what fires."""
        undo: Undo = []
        with all_or_nothing(self, *chosen, undo=undo):
            for a in chosen:
                self._nonfinite.end_rows(a, finite)
                self._accumulate(a, moment, given, undo)
            self._step, self._active = moment.step, moment.active
        self._take_record()
        self._agreement.post_at_once(moment, chosen)
        self._take_record()
        decisions = {a: self._agreement.decide(a, moment.step, flush=False) for a in chosen}
        fired = [a for a in chosen if decisions[a].fires]
        holding = [a for a in chosen if a not in fired]
        self._agreement.post_late(moment, holding)
        flights = self._fire(fired, decisions, moment)
        drop_gradients(chosen)
        for a in self._delivery.due(fired):
            decisions[a] = self._finish(a, flights[a])
        for a in holding:
            self._report(a, moment.step, decisions[a])
        return decisions

    def _accumulate(self, a: Buffered, moment: Moment, given: Contribution, undo: Undo) -> None:
        """Add one adapter's gradient to its buffer; inside all_or_nothing."""
        a.own()
        if a.held == 0:
            a.first_step = moment.step
        a.held += 1
        a.check_gradients()
        self._hold.begin_step(a)
        if given.weight > 0 and given.left_out:
            a.buffer.leave_one_out()
        elif given.weight > 0 and a.has_gradients:
            self._hold.take(a, given.weight, undo)
        self._agreement.keep_loss(a, given)

    def _take_record(self) -> None:
        """Wait for the record on its way, if there is one, and use it."""
        record = self._agreement.arrived()
        if record is None:
            return
        adapters = [self._adapters[i] for i in record.active]
        with all_or_nothing(self, self._agreement, *adapters):
            self._note_loss(record.step, record.active, self._agreement.use(record, adapters))

    # ---- FIRE --------------------------------------------------------------------------------------------------------

    def _fire(
        self, adapters: Sequence[Buffered], decisions: dict[Buffered, Decision], moment: Moment
    ) -> dict[Buffered, Flight]:
        """Send the adapters' buffers. All payloads are made before the first is sent: what can fail here does so first."""
        flights = {a: self._packed(a, decisions[a], moment) for a in adapters}
        for a, flight in flights.items():
            a.flight = flight  # first, so that an exchange that was begun is never forgotten
            if flight.payload is not None:
                flight.work = self._exchanges.reduce(flight.payload)
        return flights

    def _packed(self, a: Buffered, decision: Decision, moment: Moment) -> Flight:
        header, part = header_at(moment, a.index, a.held), self._agreement.part(a)
        if self.world_size == 1:  # nobody to send it to, or to compare with
            record = pack_fire(header, a.loss, part, part.new_zeros(1))
            return Flight(moment, decision, None, record, self._delivery.rates())
        fingerprint = as_record_field(adapter_fingerprint(self._hold.common(a)))
        record = pack_fire(header, a.loss, part, fingerprint)
        payload = self._payloads.pack(record)
        self._hold.fill(a, payload[: a.numel])
        sent = self._exchanges.bytes_of(payload)
        return Flight(moment, decision, payload, record, self._delivery.rates(), bytes=sent)

    def _finish(self, a: Buffered, flight: Flight) -> Decision:
        """Wait for the adapter's reduce; then, and only then, use and clear what was held. What came of the FIRE."""
        if self._agreement.awaited_step == flight.moment.step:
            self._take_record()  # first: where ranks differ in the step, they may not all have sent this FIRE
        arrival = self._arrived(a, flight)
        self._check_arrival(a, flight, arrival)
        undo: Undo = []
        with all_or_nothing(self, a, undo=undo):
            return self._land(a, flight, arrival, undo)

    def _arrived(self, a: Buffered, flight: Flight) -> Arrival:
        """Wait for a FIRE, and read what all ranks told in it."""
        started = time.perf_counter()
        if flight.payload is None:
            codes, body = flight.record.view(torch.uint8), self._hold.alone(a)
        else:
            if flight.work is None:
                self._exchanges.refuse(f"the FIRE of adapter {a.index} was interrupted before it was sent")
            self._exchanges.wait(flight.work)
            codes, body = self._payloads.codes(flight.payload), flight.payload[: a.numel]
        waited_ms = (time.perf_counter() - started) * 1e3
        fires, finite = unpack_fires(codes, body)
        return Arrival(fires, body, finite, waited_ms)

    def _check_arrival(self, a: Buffered, flight: Flight, arrival: Arrival) -> None:
        names, step = self._ranks.names, flight.moment.step
        wrong = check_headers(arrival.headers, names)
        if wrong is None:
            wrong = check_fingerprints([fire.fingerprint for fire in arrival.fires], names, a.index, step)
        if wrong is not None:
            self._exchanges.refuse(wrong)

    def _land(self, a: Buffered, flight: Flight, arrival: Arrival, undo: Undo) -> Decision:
        """What a FIRE that has arrived does; inside all_or_nothing."""
        held, step, parts = a.held, flight.moment.step, arrival.parts
        nothing = nothing_to_apply([Share(part.sent, part.left_out) for part in parts], arrival.finite)
        left_out = self._count_left_out(a, step, arrival)
        a.came_to_nothing = nothing == "hold_nonfinite"
        self._agreement.land_loss(a, step, arrival.headers)
        if nothing is None:
            decision = flight.decision
            window = self._agreement.window(parts, self._hold.whole(arrival.body))
            self._hold.apply(a, flight, arrival, undo)
        else:
            decision = flight.decision._replace(fires=False, reason=nothing)
            window = self._agreement.window([], None)
            self._hold.apply_nothing(a, undo)
        a.end_window(self._config.buffer_capacity)
        others = [self._adapters[i] for i in flight.moment.active if i != a.index]
        self._agreement.next_window(a, window, held, others, arrival.headers)
        known = {"held": held, "agreed": window, "left_out": left_out, "sent": flight.bytes}
        self._report(a, step, decision, waited_ms=arrival.waited_ms, **known)
        return decision

    def _count_left_out(self, a: Buffered, step: int, arrival: Arrival) -> int:
        """How many gradients of the window all ranks left out; notes who did."""
        if arrival.finite:
            shares = [Share(part.n, part.left_out) for part in arrival.parts]
        else:  # a sum that overflowed tells nobody whose share was too large
            shares = [Share(0.0, float(a.held)) for _ in arrival.parts]
        self._nonfinite.count(a, shares)
        bad = tuple(name for name, share in zip(self._ranks.names, shares) if share.left_out)
        if bad:
            self._left_out = [*self._left_out, LeftOut(a.index, step, bad)]
        return int(sum(share.left_out for share in shares))

    # ---- when a step is done -----------------------------------------------------------------------------------------

    def _done(self, decisions: dict[Buffered, Decision]) -> list[AggregationDecision]:
        """Settle a step, and say what was decided in it."""
        results = [AggregationDecision(a.index, d.fires, a.variance, d.reason) for a, d in decisions.items()]
        self._settle()
        return results

    def _settle(self) -> None:
        """The end of a step. Nothing of it depends on what is done here, so whatever raises here tears nothing."""
        self._tell()
        self._nonfinite.check()

    def _tell(self) -> None:
        """Tell whoever listens."""
        self._write_rows()
        losses, self._losses = self._losses, []
        for step, active, loss in losses:
            agreed = list(self.agreed_losses)
            for i in active:
                agreed[i] = loss
            self.agreed_losses = agreed
            if self.on_agreed_loss is not None:
                self.on_agreed_loss(step, active, loss)
        left_out, self._left_out = self._left_out, []
        self._nonfinite.warn(left_out)

    def _write_rows(self) -> None:
        rows, self._rows = self._rows, []
        try:
            for row in rows:
                self._diagnostics.write(row)
        except Exception as error:  # of an object that is not ours: ours never raises
            if not self._telemetry_failed:
                self._telemetry_failed = True
                warn_user(
                    f"diagnostics.write raised {type(error).__name__}: {error}; training goes on, and what it is not told "
                    "of is lost"
                )

    def _note_loss(self, step: int, active: tuple[int, ...], loss: float | None) -> None:
        """Note an agreed loss, if there is one, for the router."""
        if loss is not None:
            self._losses = [*self._losses, (step, active, loss)]

    def _report(self, a: Buffered, step: int, decision: Decision, **known: Any) -> None:
        """Note a decision for the diagnostics, with what else :func:`diagnostics.row_of` takes."""
        if self._diagnostics is not None:
            self._rows = [*self._rows, row_of(a, step, self._active, decision, **known)]

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def state_dict(self, *, finish: bool = True) -> dict[str, Any]:
        """Everything that continues a run, of this rank: buffers, counters, agreed numbers. Tensors are on the CPU.

        All ranks call it after the same step, before the model and the optimizer are saved: it finishes what is in
        flight, which steps the optimizer. After a failure it finishes nothing, and communicates nothing.

        Args:
            finish: False where the model and the optimizer are saved already: what is in flight then is in the state,
                and lands when the resumed run needs it.
        """
        if finish and self._exchanges.broken is None:
            with contextlib.suppress(SyncError):  # what did not land is in the state
                self.finish()
        with_flight = self._delivery.resends and self._hold.resends
        return {
            "version": state_.VERSION,
            "world_size": self.world_size,
            "rank": self.rank,
            "hold_action": self._hold.name,
            "agreement": self._agreement.name,
            "capacity": self._config.buffer_capacity,
            "epoch": self._epoch,
            "step": self._step,
            "drift_ms": self._agreement.drift_ms,
            "agreed_losses": list(self.agreed_losses),
            "pending": self._agreement.saved_record(),
            "adapters": [checkpoint.saved_adapter(a, with_flight) for a in self._adapters],
        }

    def gather_objects(self, what: str, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order. All ranks call it.

        Raises:
            SyncError: a rank did not answer.
        """
        self._exchanges.check_usable()
        return self._exchanges.guard(self._ranks.gather_objects, what, value)

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Continue from :meth:`state_dict`: this rank's, or the list of all ranks', in rank order.

        With the list, another number of ranks may continue: rank r of now W takes the buffers of the old ranks r, r + W,
        r + 2W, ... added up, so that no gradient is lost. All ranks call it, with states of one moment.

        Raises:
            ValueError: a state is damaged, or does not fit this pool or the other ranks'. Nothing was changed then, on
                any rank.
            SyncError: the ranks could not compare their states.
        """
        self.resume(self.prepare(lambda: [state_.checked_aggregator(each) for each in state_.parts(state)]))

    @torch.no_grad()
    def prepare(self, read: Callable[[], list[dict[str, Any]]]) -> checkpoint.Resumed:
        """Check on all ranks what :meth:`resume` is to continue from, and change nothing.

        Args:
            read: returns this rank's state or all ranks', checked for damage; it may raise, which all ranks then hear of.

        Raises:
            ValueError: as :meth:`load_state_dict`.
            SyncError: the ranks could not compare their states.
        """
        kind = checkpoint.Kind(
            self.world_size,
            self.rank,
            self._hold.name,
            self._agreement.name,
            None if self._optimizer is None else len(self._optimizer.param_groups),
        )
        return checkpoint.compared(self._ranks, lambda: checkpoint.fitting(read(), kind, self._adapters))

    @torch.no_grad()
    def resume(self, resumed: checkpoint.Resumed) -> None:
        """Continue from what :meth:`prepare` returned; what was in flight is sent again. All ranks call it."""
        head = resumed.head
        self._exchanges.broken = None
        self._epoch, self._step = head["epoch"] + 1, head["step"]
        self._active = ()
        self.agreed_losses = list(head["agreed_losses"])
        self._agreement.resume(head["drift_ms"], resumed.pending, len(self._adapters))
        for a, entry, buffers in zip(self._adapters, head["adapters"], resumed.buffers):
            checkpoint.put_back(a, entry, buffers, self._config.buffer_capacity, self._nonfinite)
        for a, entry in zip(self._adapters, head["adapters"]):
            if entry["flight"] is not None and self._delivery.resends:  # else it counts as held
                self._launch_again(a, entry["flight"])

    def _launch_again(self, a: Buffered, flight: dict[str, Any]) -> None:
        moment = self._moment(flight["step"], tuple(flight["active"]))
        again = self._fire([a], {a: Decision(*flight["decision"])}, moment)[a]
        again.rates = checkpoint.rates_on(flight["rates"], again.rates)
