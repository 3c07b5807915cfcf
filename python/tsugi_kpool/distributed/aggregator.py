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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..warn import warn_user
from . import state as state_
from .agree import check_parameters, compare, facts_of, named
from .buffers import Buffered, Decision, Flight, Moment, all_or_nothing, drop_gradients
from .fingerprint import adapter_fingerprint, as_record_field
from .lines import reason_of
from .nonfinite import LeftOut, NonFinite, Withheld, is_finite
from .ranks import LABEL_BYTES, Ranks, SyncError
from .records import (
    FIRE_LENGTH,
    Header,
    Part,
    check_fingerprints,
    check_headers,
    digest,
    header_of,
    largest,
    mean_loss,
    part_of,
    record_length,
    upgraded,
)
from .scalers import Scalers
from .stepping import learning_rates, restorer, step_optimizer

__all__ = ["AggregationDecision", "Aggregator"]

_WIRE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNKNOWN = float("nan")


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
        self._synchronous = config.aggregation_mode == "synchronous"
        self._action = "defer" if self._synchronous else config.hold_action
        agreement = config.agreement or ("stepwise" if config.trigger == "variance" else "planned")
        self._planned = not self._synchronous and agreement == "planned"
        self._stepwise = not self._synchronous and agreement == "stepwise"
        self._ranks = Ranks(group, float(config.sync_timeout_s))
        self.world_size, self.rank = self._ranks.size, self._ranks.rank
        # Nothing to aggregate: gradients are left as they are, in their own precision.
        self._alone = self._synchronous and self.world_size == 1
        self._hidden = optimizer is not None and config.overlap and not self._alone
        self._steps_itself = self._hidden or self._action == "local"
        try:
            facts = self._checked_facts(adapters, model)
            if self.world_size > 1:
                compare(self._ranks, facts, adapters)
                self._ranks.longest_record = record_length(len(adapters))
        except BaseException as error:
            refused = isinstance(error, (ValueError, TypeError))  # on all ranks alike
            self._ranks.close(not refused, None if refused else error)
            raise
        self._wire = _WIRE[config.wire_dtype]
        self._adapters = [Buffered(i, params) for i, params in enumerate(adapters)]
        self._longest = max(a.numel for a in self._adapters)  # of a payload: the same whatever fires
        self.agreed_losses: list[float | None] = [None] * len(self._adapters)
        self.on_agreed_loss: Callable[[int, tuple[int, ...], float], None] | None = None
        self._epoch, self._step, self._active = 0, -1, ()
        self._pending: tuple[int, tuple[int, ...], Any, Any] | None = None  # a record on its way
        self._stepwise_drift: float | None = None
        self._scalers = Scalers(self._ranks)
        self._broken: SyncError | None = None
        self._nonfinite = NonFinite(config.nonfinite_limit, self._ranks.names)
        self._withheld: Withheld | None = None
        # What is told when a step is done, see _tell.
        self._rows: list[dict[str, Any]] = []
        self._losses: list[tuple[int, tuple[int, ...], float]] = []
        self._left_out: list[LeftOut] = []
        self._telemetry_failed = False
        self.control_bytes = self.payload_bytes = 0
        thresholds = {
            "variance": config.buffer_convergence_eps,
            "relative": config.relative_theta,
            "noise_scale": config.fire_cost,
        }
        self._rules = [
            ops._native.TriggerRule(
                config.trigger,
                thresholds[config.trigger],
                capacity=config.buffer_capacity,
                max_hold_steps=config.max_hold_steps,
                max_drift_ms=config.max_drift_ms,
                world_size=self.world_size,
                numel=a.numel,
            )
            for a in self._adapters
        ]
        for a, rule in zip(self._adapters, self._rules):
            first = rule.first_window(a.index, self._planned, config.stagger)
            a.planned, a.bound = (first, config.buffer_capacity) if self._planned else (0, first)
            a.wanted = a.planned
            a.rows_without_finite = [0] * self.world_size
            if self._action == "local":
                a.anchor = _flat(a.params)

    def _checked_facts(self, adapters: Sequence[Sequence[nn.Parameter]], model: nn.Module | None) -> Any:
        """This rank's facts; where its arguments are refused, the others are told before it raises."""
        try:
            check_parameters(adapters, self._optimizer)
            if self._max_grad_norm is not None and not self._max_grad_norm > 0:
                raise ValueError(f"max_grad_norm is {self._max_grad_norm}, not above 0")
            if self._action == "local" and self._optimizer is None:
                raise ValueError("hold_action is 'local', which steps the optimizer during HOLD: pass optimizer=")
            self._scaling = self._chosen_scaling(self._config.lr_scaling)
            facts = None
            if self.world_size > 1:
                router = self._router_digest(0)
                settings = {"max_grad_norm": self._max_grad_norm, "the router's choice": router}
                facts = facts_of(adapters, self._config, model=model, optimizer=self._optimizer, settings=settings)
        except Exception as error:
            self._ranks.gather_objects("compare ranks", f"{type(error).__name__}: {error}")
            raise
        refused = {
            name: said
            for name, said in zip(self._ranks.names, self._ranks.gather_objects("compare ranks", None))
            if said is not None
        }
        if refused:
            first, said = next(iter(refused.items()))
            raise ValueError(f"{named(list(refused))} could not attach. Rank {first}: {said}")
        if not (self._synchronous or self._steps_itself or self._scaling == "none" or self._action == "discard"):
            warn_user(
                f"lr_scaling is {self._scaling!r}, but the optimizer is yours to step here: a gradient of m held "
                "steps is applied with the rate of one; use lr_factors, or pass optimizer= with overlap"
            )
        return facts

    def _chosen_scaling(self, asked: str | None) -> str:
        known = self._hidden and isinstance(self._optimizer, torch.optim.Adam)  # AdamW is one
        if asked == "adam" and not (known or self._synchronous or self._action != "defer"):
            what = "there is none to step" if not self._hidden else f"this is a {type(self._optimizer).__name__}"
            raise ValueError(
                f"lr_scaling is 'adam', which sets the betas of a torch.optim.Adam or AdamW, but {what}: pass such an "
                "optimizer= with overlap, or choose 'linear', 'sqrt' or 'none'"
            )
        if asked is None and self._hidden and not (known or self._synchronous or self._action != "defer"):
            if any("betas" in group for group in self._optimizer.param_groups):
                warn_user(
                    f"lr_scaling is 'linear' for a {type(self._optimizer).__name__}: the recommended 'adam' is known for "
                    "torch.optim.Adam and AdamW only. An Adam takes steps of its rate whatever the gradient's size, so m "
                    "held steps then go up to sqrt(m) times too far: set lr_scaling='sqrt', or 'linear' if that is meant"
                )
        return asked or ("adam" if known else "linear")

    @property
    def steps_itself(self) -> bool:
        """Whether the optimizer is stepped here; else ``.grad`` is the caller's to step with."""
        return self._steps_itself

    # ---- the three calls of a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self, step: int, active: Sequence[int]) -> None:
        """Finish what is in flight for the adapters that are about to be active.

        Raises:
            SyncError: an exchange failed, or ranks differ in what fires; what it carried is still held.
            NonFiniteError: gradients of an adapter are not finite any more.
        """
        self._check_usable()
        self._end_withholding()
        for i in self._checked(active):
            a = self._adapters[i]
            if a.flight is not None:
                self._finish(a)
            if a.landed is not None:
                with all_or_nothing(self, a):
                    landed, a.landed = a.landed, None
                    self._losses = [*self._losses, (landed[0], (i,), landed[1])]
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
        self._check_usable()
        active = self._checked(active)
        if step <= self._step:
            raise ValueError(f"step is {step}, not above the step before, {self._step}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight is {weight}, not a finite number of at least 0")
        for i in active:
            if self._adapters[i].flight is not None:
                raise ValueError(
                    f"adapter {i} is active with a reduce in flight: call before_step({step}, active) first"
                )
        chosen = [self._adapters[i] for i in active]
        moment = self._moment(step, active, weight, loss, found_inf)
        agreed = self._guard(self._scalers.agree, moment, found_inf)
        if agreed.overflowed:
            return self._leave_out(chosen, moment, agreed.overflowed)
        for a in chosen:
            a.rows_without_finite = [0 if k in agreed.finite else row for k, row in enumerate(a.rows_without_finite)]
        found_inf = agreed.left_out_here
        if self._alone:
            return self._pass_on(chosen, moment, weight, loss, found_inf)
        undo: list[Callable[[], None]] = []
        with all_or_nothing(self, *chosen, undo=undo):
            for a in chosen:
                self._accumulate(a, moment, weight, loss, found_inf, undo)
            self._step, self._active = step, active

        if self._stepwise:
            if self._config.decision_delay == 0:
                self._post_record(moment, chosen)
            self._take_record()
        decisions = {a: self._decide(a, step, flush=False) for a in chosen}
        fired = [a for a, decision in decisions.items() if decision.fires]
        if self._stepwise and self._config.decision_delay == 1:
            self._post_record(moment, [a for a in chosen if a not in fired])
        self._fire(fired, decisions, moment)
        drop_gradients(chosen)
        for a in fired:
            # After a FIRE of nothing finite the next is waited for, so that what is returned says what came of it.
            if not self._hidden or a.came_to_nothing:
                decisions[a] = self._finish(a)
        for a in chosen:
            if a not in fired:
                self._report(a, step, decisions[a])
        results = [self._summary(a, decision) for a, decision in decisions.items()]
        self._settle()
        return results

    @torch.no_grad()
    def flush(self) -> list[AggregationDecision]:
        """FIRE whatever is held and finish whatever is in flight: before a save for others, an evaluation, the end.

        All ranks call it after the same step. Where the caller steps the optimizer, ``.grad`` is set: step it next.
        """
        self._check_usable()
        self._end_withholding()
        self._finish_all()
        self._take_record()
        moment = self._moment(self._step, self._active, 0.0, None, False)
        decisions = {a: self._decide(a, self._step, flush=True) for a in self._adapters if a.held}
        if self._action == "discard":  # what is held is not for sending
            for a, decision in decisions.items():
                decisions[a] = decision._replace(fires=False)
                with all_or_nothing(self, a):
                    self._end_window(a)
                    self._report(a, self._step, decisions[a])
        else:
            self._fire(list(decisions), decisions, moment)
            for a in decisions:
                decisions[a] = self._finish(a)
        results = [self._summary(a, decision) for a, decision in decisions.items()]
        self._settle()
        return results

    @torch.no_grad()
    def finish(self) -> None:
        """Finish what is in flight, and nothing else: before the model or the optimizer is looked at or saved."""
        self._check_usable()
        self._finish_all()
        self._tell()

    def _finish_all(self) -> None:
        for a in self._adapters:
            if a.flight is not None:
                self._finish(a)

    def close(self, error: BaseException | None = None) -> None:
        """Let go of the groups and the diagnostics. What is held or in flight is not sent: :meth:`flush` first.

        Args:
            error: why, where it is not the orderly end; the other ranks are told.
        """
        self._end_withholding()
        try:
            self._ranks.close(self._broken is not None, error or self._broken)
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

    # ---- before anything changes -------------------------------------------------------------------------------------

    def _moment(
        self, step: int, active: tuple[int, ...], weight: float, loss: float | Tensor | None, found_inf: bool | Tensor
    ) -> Moment:
        """What records tell of this step. Asks code of others, which may raise."""
        drift = self._drift_ms()
        scaled = 1.0 if isinstance(found_inf, Tensor) else 0.0 if weight > 0 else _UNKNOWN
        told = {}
        if self._stepwise and loss is not None and weight > 0 and math.isfinite(value := float(loss)):
            told = {"loss": value * weight, "loss_weight": weight}
        router = self._router_digest(step) if step >= 0 else 0
        return Moment(step, active, router, _UNKNOWN if drift is None else float(drift), scaled, **told)

    # ---- steps without a buffer --------------------------------------------------------------------------------------

    def _leave_out(self, chosen: list[Buffered], moment: Moment, overflowed: list[int]) -> list[AggregationDecision]:
        """A step that GradScalers skip on all ranks: it enters no buffer. Now and then that is how they find their scale."""
        shares = [(0.0, float(k in overflowed)) for k in range(self.world_size)]
        decision = Decision(False, "hold_nonfinite")
        with all_or_nothing(self, *chosen):
            for a in chosen:
                a.rows_without_finite = ops._native.trigger_rows_without_finite(a.rows_without_finite, shares)
                self._report(a, moment.step, decision, left_out=len(overflowed))
            self._step, self._active = moment.step, moment.active
        drop_gradients(chosen)
        self._settle()
        return [self._summary(a, decision) for a in chosen]

    def _pass_on(
        self, chosen: list[Buffered], moment: Moment, weight: float, loss: float | Tensor | None, found_inf: bool
    ) -> list[AggregationDecision]:
        """One rank, every step a FIRE: what the backward pass left is the result, if it is finite."""
        loss = None if loss is None or weight == 0 or not math.isfinite(loss) else float(loss)
        if weight == 0 or found_inf:
            drop_gradients(chosen)
        bad = [] if weight == 0 else [a for a in chosen if found_inf or not is_finite(a.params)]
        decisions = {}
        with all_or_nothing(self, *chosen):
            for a in chosen:
                got = any(p.grad is not None for p in a.params)
                reason = "hold_nonfinite" if a in bad else "fire" if got else "empty_buffer"
                decisions[a] = Decision(reason == "fire", reason)
                share = (float(reason == "fire"), float(a in bad))
                a.rows_without_finite = ops._native.trigger_rows_without_finite(a.rows_without_finite, [share])
                self._report(a, moment.step, decisions[a], left_out=int(a in bad))
                if a in bad:
                    self._left_out = [*self._left_out, LeftOut(a.index, moment.step, (self._ranks.names[0],))]
            if loss is not None:
                self._losses = [*self._losses, (moment.step, moment.active, loss)]
            self._step, self._active = moment.step, moment.active
        if self._max_grad_norm is not None:
            for a in chosen:
                if a not in bad:
                    nn.utils.clip_grad_norm_(a.params, self._max_grad_norm)
        if bad:
            self._withheld = Withheld(bad)
        self._settle()
        return [self._summary(a, decision) for a, decision in decisions.items()]

    def _end_withholding(self) -> None:
        if self._withheld is not None:
            self._withheld.end()
            self._withheld = None

    # ---- accumulate and decide --------------------------------------------------------------------------------------

    def _accumulate(
        self,
        a: Buffered,
        moment: Moment,
        weight: float,
        loss: float | Tensor | None,
        found_inf: bool,
        undo: list[Callable[[], None]],
    ) -> None:
        """Add one adapter's gradient to its buffer; inside all_or_nothing."""
        a.own()
        if a.held == 0:
            a.first_step = moment.step
        a.held += 1
        with_grad = [(s, p) for s, p in zip(a.sum, a.params) if p.grad is not None]
        for _, p in with_grad:
            if p.grad.is_sparse:
                raise ValueError(f"adapter {a.index} has a sparse gradient; dense ones are needed")
        if self._action == "discard":
            a.current = (torch.zeros_like(a.flat), torch.zeros_like(a.stats))
        if found_inf:
            a.stats[4] += float(weight > 0)
        elif weight > 0 and with_grad:
            grads = [p.grad for _, p in with_grad]
            ops.sideband_accumulate_([s for s, _ in with_grad], a.stats, grads, weight)
            if a.current is not None:
                views = [v for v, p in zip(a.views(a.current[0]), a.params) if p.grad is not None]
                ops.sideband_accumulate_(views, a.current[1], grads, weight)
            if self._action == "local" and all(bool(torch.isfinite(g).all()) for g in grads):
                undo.append(restorer(self._optimizer, a.params))
                self._step_optimizer(a, self._rates(), 1.0)
        if loss is not None and weight > 0 and not found_inf and not self._stepwise:
            value = torch.as_tensor(loss, dtype=torch.float64, device=a.device).detach()
            pair = torch.stack((value * weight, torch.full_like(value, weight)))
            a.loss = a.loss + torch.where(torch.isfinite(value), pair, 0.0)

    def _decide(self, a: Buffered, step: int, flush: bool) -> Decision:
        if self._synchronous:
            return Decision(True, "fire")
        return Decision(
            *self._rules[a.index].decide(
                held=a.held,
                age=step - a.first_step + 1,
                bound=a.bound,
                flush=flush,
                drift_ms=a.drift_ms if self._planned else self._stepwise_drift,
                planned=a.planned if self._planned else None,
                agreed=None if self._planned else a.agreed,
                nothing_finite=a.nothing_finite,
            )
        )

    # ---- records -----------------------------------------------------------------------------------------------------

    def _header(self, moment: Moment, choice: float) -> Header:
        active = float(len(moment.active))
        scalars = moment.scaled, moment.drift_ms, moment.loss, moment.loss_weight
        return Header(float(self._epoch), float(moment.step), active, choice, *scalars)

    def _part(self, a: Buffered) -> Tensor:
        """The fields of ``Part`` on the adapter's device."""
        if self._synchronous:  # nothing is decided by the rest
            m, n, n2, q, left_out = a.stats[:5]
            return torch.stack((m, n, n2, q, torch.zeros_like(n), left_out, n))
        seen = ops.sideband_stats(a.sum, a.stats)
        sent = seen[1] if a.current is None else a.current[1][1]
        return torch.stack((seen[0], seen[1], a.stats[2], seen[2], seen[3], seen[7], sent))

    def _post_record(self, moment: Moment, holding: list[Buffered]) -> None:
        """Start the exchange of this step's record, with the parts of the adapters that hold."""
        self._take_record()
        header = self._header(moment, digest(moment.step, moment.active, moment.router))
        parts = torch.zeros(len(self._adapters), len(Part._fields), dtype=torch.float64)
        for a in holding:
            parts[a.index] = self._part(a).cpu()
        record = torch.cat((torch.tensor(header, dtype=torch.float64), parts.flatten()))
        gathered, work = self._guard(self._ranks.gather, record)
        self.control_bytes += (LABEL_BYTES + record.nbytes) * (self.world_size - 1)
        self._pending = (moment.step, moment.active, gathered, work)

    def _pending_rows(self) -> list[list[float]]:
        step, active, gathered, work = self._pending
        if work is not None:
            self._guard(self._ranks.wait, work)
            self._pending = (step, active, gathered, None)
        return gathered.tolist() if isinstance(gathered, Tensor) else gathered

    def _take_record(self) -> None:
        """Wait for the record on its way, if there is one, and use it."""
        if self._pending is None:
            return
        rows = self._pending_rows()
        step, active, _, _ = self._pending
        headers = [header_of(row) for row in rows]
        self._check_headers(headers)
        loss = mean_loss(headers)
        adapters = [self._adapters[i] for i in active]
        with all_or_nothing(self, *adapters):
            self._pending = None
            self._stepwise_drift = largest(h.drift_ms for h in headers)
            for a in adapters:
                parts = [part_of(row, a.index) for row in rows]
                filled = any(p.m for p in parts)
                a.agreed = ops._native.trigger_fold([p[:5] for p in parts]) if filled else None
                a.nothing_finite = not filled and any(p.left_out for p in parts)
            if loss is not None:
                self._losses = [*self._losses, (step, active, loss)]

    def _check_headers(self, headers: list[Header]) -> None:
        """Fail closed: on every rank, since every rank has the same rows."""
        wrong = check_headers(headers, self._ranks.names)
        if wrong is not None:
            self._break(SyncError(wrong))

    # ---- FIRE --------------------------------------------------------------------------------------------------------

    def _fire(self, adapters: list[Buffered], decisions: dict[Buffered, Decision], moment: Moment) -> None:
        """Send the adapters' buffers. All payloads are made before the first is sent: what can fail here does so first."""
        flights = [self._flight(a, decisions[a], moment) for a in adapters]
        for a, flight in zip(adapters, flights):
            a.flight = flight  # first, so that an exchange that was begun is never forgotten
            if flight.payload is not None:
                flight.work = self._guard(self._ranks.reduce, flight.payload)
                self.payload_bytes += flight.bytes

    def _flight(self, a: Buffered, decision: Decision, moment: Moment) -> Flight:
        choice = digest(moment.step, moment.active, moment.router, a.index, a.held)
        header = torch.tensor(self._header(moment, choice), dtype=torch.float64).to(a.device)
        header[-2:] = a.loss
        part = self._part(a)
        if self.world_size == 1:
            record = torch.cat((header, part, part.new_zeros(1)))
            return Flight(moment, decision, None, record, self._rates())
        alike = a.params if a.anchor is None else [a.anchor]  # what all ranks have in common now
        record = torch.cat((header, part, as_record_field(adapter_fingerprint(alike)).reshape(1)))
        slot = FIRE_LENGTH * 8
        payload = torch.zeros(self._longest + self.world_size * slot, dtype=self._wire, device=a.device)
        if self._action == "local":
            for view, start, p in zip(a.views(payload), a.views(a.anchor), a.params):
                view.copy_((p.float() - start) * part[-1].float())
        else:
            payload[: a.numel].copy_(a.flat if a.current is None else a.current[0])
        start = self._longest + self.rank * slot
        payload[start : start + slot] = record.view(torch.uint8).to(self._wire)
        sent = int(2 * (self.world_size - 1) / self.world_size * payload.nbytes)  # what a ring sends from each rank
        return Flight(moment, decision, payload, record, self._rates(), bytes=sent)

    def _finish(self, a: Buffered) -> Decision:
        """Wait for the adapter's reduce; then, and only then, use and clear what was held. What came of the FIRE."""
        flight = a.flight
        if self._pending is not None and self._pending[0] == flight.moment.step:
            self._take_record()  # first: where ranks differ in the step, they may not all have sent this FIRE
        started = time.perf_counter()
        if flight.payload is not None:
            if flight.work is None:
                self._break(SyncError(f"the FIRE of adapter {a.index} was interrupted before it was sent"))
            self._guard(self._ranks.wait, flight.work)
        waited_ms = (time.perf_counter() - started) * 1e3
        rows, finite = self._arrived(a, flight)
        self._check_headers([header_of(row) for row in rows])
        wrong = check_fingerprints([row[-1] for row in rows], self._ranks.names, a.index, flight.moment.step)
        if wrong is not None:
            self._break(SyncError(wrong))
        undo: list[Callable[[], None]] = []
        with all_or_nothing(self, a, undo=undo):
            return self._land(a, flight, rows, finite, waited_ms, undo)

    def _arrived(self, a: Buffered, flight: Flight) -> tuple[list[list[float]], bool]:
        """Each rank's record, and whether the sum over ranks is finite; read in one go."""
        if flight.payload is None:
            codes = flight.record.view(torch.uint8)
            body = a.flat if a.current is None else a.current[0]
            if self._action == "local":
                body = _flat(a.params)
        else:
            codes = flight.payload[self._longest :].round().to(torch.uint8)
            body = flight.payload[: a.numel]
        finite = torch.isfinite(body).all().to(torch.uint8).reshape(1)
        read = torch.cat((codes, finite)).cpu()
        rows = read[:-1].clone().view(torch.float64).view(self.world_size, FIRE_LENGTH).tolist()
        return rows, bool(read[-1])

    def _land(
        self,
        a: Buffered,
        flight: Flight,
        rows: list[list[float]],
        finite: bool,
        waited_ms: float,
        undo: list[Callable[[], None]],
    ) -> Decision:
        """What a FIRE that has arrived does; inside all_or_nothing."""
        headers, parts = [header_of(row) for row in rows], [part_of(row) for row in rows]
        held, step = a.held, flight.moment.step
        # A sum that overflowed tells nobody whose share was too large.
        shares = [(p.n, p.left_out) if finite else (0.0, float(held)) for p in parts]
        reason = ops._native.trigger_nothing_to_apply([(p.sent, p.left_out) for p in parts], finite)
        decision = flight.decision if reason is None else flight.decision._replace(fires=False, reason=reason)
        summed = a.flat if a.current is None else a.current[0]
        if flight.payload is not None:
            summed = flight.payload[: a.numel]

        a.rows_without_finite = ops._native.trigger_rows_without_finite(a.rows_without_finite, shares)
        a.came_to_nothing = reason == "hold_nonfinite"
        bad = tuple(name for name, (_, left_out) in zip(self._ranks.names, shares) if left_out)
        if bad:
            self._left_out = [*self._left_out, LeftOut(a.index, step, bad)]
        window = None
        if not self._synchronous:
            window = self._fold([] if reason is not None else parts, summed)
        if self._planned:
            a.trend, a.wanted = self._rules[a.index].plan(a.trend, window, held)
            a.planned = self._apart(a, flight.moment.active)
            a.drift_ms = largest(h.drift_ms for h in headers)
        loss = None if self._stepwise else mean_loss(headers)
        if loss is not None:
            a.landed = (step, loss)

        total = math.fsum(p.sent for p in parts)
        if self._action == "local":
            undo.append(restorer(self._optimizer, a.params))
            self._average_parameters(a, None if reason is not None else summed.float() / total)
        elif reason is None:
            self._apply(a, flight, summed, total, held, undo)
        self._end_window(a)
        a.agreed = window
        left_out = int(sum(left_out for _, left_out in shares))
        self._report(a, step, decision, held, flight.bytes, waited_ms, left_out)
        if not self._planned:
            a.agreed = None
        return decision

    def _fold(self, parts: list[Part], summed: Tensor) -> tuple:
        """V and P of the window: over all ranks' gradients together where their sum says it, else the mean of ranks'."""
        buffers = [part[:5] for part in parts]
        if self._planned and self._action == "defer" and parts:
            return ops._native.trigger_pool(buffers, _square_sum(summed.float()))
        return ops._native.trigger_fold(buffers)

    def _average_parameters(self, a: Buffered, moved: Tensor | None) -> None:
        """hold_action="local": all ranks go on from where they are in the mean; from where they were, if nothing came."""
        if self.world_size == 1 and moved is not None:
            a.anchor = _flat(a.params)
            return
        if moved is not None:
            a.anchor = a.anchor + moved
        for p, start in zip(a.params, a.views(a.anchor)):
            p.copy_(start)

    def _apply(
        self,
        a: Buffered,
        flight: Flight,
        summed: Tensor,
        total: float,
        held: int,
        undo: list[Callable[[], None]],
    ) -> None:
        """The mean gradient into .grad, and, where the optimizer was handed over, into the parameters."""
        window = held if self._action == "defer" and not self._synchronous else 1
        as_adam = self._scaling == "adam"
        a.lr_factor = {"linear": float(window), "none": 1.0}.get(self._scaling, math.sqrt(window))
        grads = [torch.empty_like(p) for p in a.params]
        emptied = summed.to(torch.float32, copy=True)  # the operation clears what it reads
        ops.sideband_drain_(
            a.views(emptied), torch.zeros_like(a.stats), grads, (a.lr_factor if as_adam else 1.0) / total
        )
        undo.append(lambda: drop_gradients([a]))
        if self._hidden:
            undo.append(restorer(self._optimizer, a.params))
        for p, grad in zip(a.params, grads):
            p.grad = grad
        if self._hidden:
            self._step_optimizer(a, flight.rates, a.lr_factor, window if as_adam else 1)
        elif self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(a.params, self._max_grad_norm)

    def _apart(self, a: Buffered, active: tuple[int, ...]) -> int:
        """The planned length, moved so that adapters that are active together do not all fire in one step."""
        if not self._config.stagger:
            return a.wanted
        others = [self._adapters[i] for i in active if i != a.index]
        return self._rules[a.index].apart(a.wanted, [(max(o.planned - o.held, 0), o.wanted) for o in others])

    def _end_window(self, a: Buffered) -> None:
        a.held, a.flight, a.current, a.agreed, a.nothing_finite = 0, None, None, None, False
        a.bound = self._config.buffer_capacity
        a.loss = torch.zeros_like(a.loss)
        a.clear()

    def _rates(self) -> list:
        return learning_rates(self._optimizer) if self._steps_itself else []

    def _step_optimizer(self, a: Buffered, rates: list, factor: float, steps: int = 1) -> None:
        """Step the optimizer for one adapter alone, at the given learning rates; its gradients are None afterwards."""
        if self._max_grad_norm is not None:
            for p in a.params if self._action == "local" else ():
                p.grad = None if p.grad is None else p.grad.clone()  # a step that is undone is tried again with it
            nn.utils.clip_grad_norm_(a.params, self._max_grad_norm)
        step_optimizer(self._optimizer, a.params, rates, factor, steps)

    # ---- when a step is done ---------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """The end of a step. Nothing of it depends on what is done here, so whatever raises here tears nothing."""
        self._tell()
        self._nonfinite.check(self._adapters)

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

    def _summary(self, a: Buffered, decision: Decision) -> AggregationDecision:
        return AggregationDecision(a.index, decision.fires, a.variance, decision.reason)

    def _report(
        self,
        a: Buffered,
        step: int,
        decision: Decision,
        held: int | None = None,
        sent: int = 0,
        waited_ms: float = 0.0,
        left_out: int = 0,
    ) -> None:
        """Note a decision for the diagnostics."""
        if self._diagnostics is None:
            return
        m, variance, signal, power = a.agreed or (None,) * 4
        row = {
            "step": step,
            "active": list(self._active),
            "adapter": a.index,
            "decision": "FIRE" if decision.fires else "HOLD",
            "reason": decision.reason,
            "V": variance,
            "P": power,
            "signal": signal,
            "statistic": decision.statistic,
            "threshold": decision.threshold,
            "m": a.held if held is None else held,
            "planned": a.planned or None,
            "nonfinite": left_out,
            "bytes": sent,
            "waited_ms": waited_ms,
        }
        self._rows = [*self._rows, row]

    # ---- failure ---------------------------------------------------------------------------------------------------------

    def _guard(self, call: Callable, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except SyncError as error:
            self._broken = error
            raise
        except BaseException as error:  # Ctrl-C: the others have been told, and what was held is held
            if self.world_size == 1:  # nobody else is in the middle of anything
                raise
            self._broken = SyncError(f"rank {self._ranks.me} {reason_of(error)} in an exchange", first=self._ranks.me)
            raise

    def _break(self, error: SyncError) -> None:
        self._broken = error
        raise error

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise SyncError(
                f"an exchange failed before, so none is possible: {self._broken}",
                self._broken.missing,
                self._broken.left,
                self._broken.first,
            )

    def _checked(self, active: Iterable[int]) -> tuple[int, ...]:
        active = tuple(int(i) for i in active)
        for i in active:
            if not 0 <= i < len(self._adapters):
                raise ValueError(f"active is {active}, but the adapters are 0 to {len(self._adapters) - 1}")
        if len(set(active)) != len(active):
            raise ValueError(f"active is {active}, with an adapter twice")
        return active

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
        if finish and self._broken is None:
            with contextlib.suppress(SyncError):  # what did not land is in the state
                self.finish()
        return {
            "version": state_.VERSION,
            "world_size": self.world_size,
            "rank": self.rank,
            "hold_action": self._action,
            "agreement": self._agreement,
            "capacity": self._config.buffer_capacity,
            "epoch": self._epoch,
            "step": self._step,
            "drift_ms": self._stepwise_drift,
            "agreed_losses": list(self.agreed_losses),
            "pending": self._pending_state(),
            "adapters": [self._adapter_state(a) for a in self._adapters],
        }

    @property
    def _agreement(self) -> str:
        return "planned" if self._planned else "stepwise" if self._stepwise else "none"

    def _pending_state(self) -> list[Any] | None:
        """The record on its way; None where there is none, or where it cannot arrive any more."""
        if self._pending is None or self._broken is not None:
            return None
        try:
            rows = self._pending_rows()
        except SyncError:
            return None
        return [self._pending[0], list(self._pending[1]), rows]

    def _adapter_state(self, a: Buffered) -> dict[str, Any]:
        flight = None
        if a.flight is not None and self._hidden and self._action != "discard":
            rates = [lr.detach().cpu().clone() if isinstance(lr, Tensor) else lr for lr in a.flight.rates]
            moment = a.flight.moment
            flight = {
                "step": moment.step,
                "active": list(moment.active),
                "decision": list(a.flight.decision),
                "rates": rates,
            }
        return {
            "numel": a.numel,
            "sum": a.flat.cpu().clone() if a.held else None,
            "stats": a.stats.cpu().clone(),
            "loss": a.loss.cpu().clone(),
            "anchor": None if a.anchor is None else a.anchor.cpu().clone(),
            "flight": flight,
            **{name: getattr(a, name) for name in _ALIKE},
        }

    def gather_objects(self, what: str, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order. All ranks call it.

        Raises:
            SyncError: a rank did not answer.
        """
        self._check_usable()
        return self._guard(self._ranks.gather_objects, what, value)

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
    def prepare(self, read: Callable[[], list[dict[str, Any]]]) -> Resumed:
        """Check on all ranks what :meth:`resume` is to continue from, and change nothing.

        Args:
            read: returns this rank's state or all ranks', checked for damage; it may raise, which all ranks then hear of.

        Raises:
            ValueError: as :meth:`load_state_dict`.
            SyncError: the ranks could not compare their states.
        """
        resumed, problem = None, None
        try:
            resumed = self._fitting(read())
        except Exception as error:
            problem = error
        told = (str(problem), None, None, False) if resumed is None else resumed.told()
        everyone = self._ranks.gather_objects("compare the states to load", told)
        if problem is not None:
            raise problem
        for rank, (said, step, _, _) in zip(self._ranks.names, everyone):
            if step is None:
                raise ValueError(f"rank {rank} refused its state, so no rank loaded any: {said}")
        state_.moment({rank: step for rank, (_, step, _, _) in zip(self._ranks.names, everyone)})
        if len({alike for _, _, alike, _ in everyone}) > 1:
            raise ValueError(
                f"the ranks' states are all of step {resumed.step + 1}, but not of one moment: an exchange had landed on some "
                "ranks alone. Nothing was loaded: use an earlier checkpoint"
            )
        if not all(pending for _, _, _, pending in everyone):
            resumed.pending = None  # a record counts on all ranks or on none
        return resumed

    def _fitting(self, states: list[dict[str, Any]]) -> Resumed:
        """What these states add up to for this rank; ValueError where they do not fit it or each other."""
        head, size = states[0], states[0]["world_size"]
        ranks = [s["rank"] for s in states]
        if len(states) == 1 < size and (size, head["rank"]) != (self.world_size, self.rank):
            raise ValueError(
                f"state is of rank {head['rank']} of {size}, but this is rank {self.rank} of {self.world_size}, "
                f"and there are the ranks {ranks}, not 0 to {size - 1}: pass the list of all ranks' states (pool.load takes "
                "their folder). Where one file is written for all ranks, save "
                "pool.state_dict(all_ranks=True) in it"
            )
        if len(states) > 1 and ranks != list(range(size)):
            raise ValueError(f"state has the ranks {ranks}, not 0 to {size - 1} in order")
        state_.moment({s["rank"]: s["step"] + 1 for s in states})
        self._check_fit(head)
        for s in states:
            for name in ("world_size", "hold_action", "agreement", "epoch"):
                if s[name] != head[name]:
                    raise ValueError(f"state has ranks that differ in {name}: {[each[name] for each in states]}")
            for i, (entry, first) in enumerate(zip(s["adapters"], head["adapters"])):
                for name in ("numel", *_ALIKE):
                    if state_.checksum({name: entry[name]}) != state_.checksum({name: first[name]}):  # NaN is not NaN
                        raise ValueError(
                            f"state has ranks that differ in adapters[{i}].{name}: rank {s['rank']} has {entry[name]}, rank "
                            f"{head['rank']} {first[name]}. They are not of one moment: use an earlier checkpoint"
                        )
        if len(states) == 1 or size == self.world_size:
            mine = [s for s in states if s["rank"] == self.rank]  # none on a rank that did not exist then
        else:
            mine = states[self.rank :: self.world_size]
        pending = head["pending"] if size == self.world_size and all(s["pending"] is not None for s in states) else None
        return Resumed(head, pending, [self._added_up(i, mine) for i in range(len(self._adapters))])

    def _check_fit(self, head: dict[str, Any]) -> None:
        """ValueError if a state is of another kind of pool than this."""
        numels, own = [e["numel"] for e in head["adapters"]], [a.numel for a in self._adapters]
        if numels != own:
            raise ValueError(
                f"state has adapters of {numels} elements, but this pool's have {own}: {state_.OTHER_POOL}"
            )
        for name, here in (("hold_action", self._action), ("agreement", self._agreement)):
            if head[name] not in (None, here):
                raise ValueError(
                    f"state was made with {name}={head[name]!r}, but this is {here!r}: {state_.OTHER_POOL}"
                )
        for i, (entry, a) in enumerate(zip(head["adapters"], self._adapters)):
            name = f"state's adapters[{i}]"
            if (entry["anchor"] is None) != (a.anchor is None):
                raise ValueError(f"{name}.anchor is there with hold_action='local' alone: {state_.DAMAGED}")
            if self._planned and not entry["planned"]:
                raise ValueError(f"{name}.planned is 0, but this pool plans its windows: {state_.OTHER_POOL}")
            if entry["flight"] is not None and self._optimizer is not None:
                rates, groups = len(entry["flight"]["rates"]), len(self._optimizer.param_groups)
                if rates != groups:
                    raise ValueError(
                        f"{name}.flight has the learning rates of {rates} parameter groups, but this optimizer has {groups}: "
                        f"{state_.OTHER_POOL}"
                    )
            if head["world_size"] != self.world_size and self._action == "local" and entry["held"]:
                raise ValueError(
                    f"state holds {entry['held']} local steps of adapter {i}, which another number of ranks cannot share: "
                    "flush before saving"
                )
        if head["pending"] is not None:
            step, active, rows = head["pending"]
            if any(
                len(each) != record_length(len(self._adapters)) for each in upgraded(rows, active, len(self._adapters))
            ):
                raise ValueError(
                    f"state's pending has rows that are no records of {len(active)} adapters: {state_.DAMAGED}"
                )

    def _added_up(self, i: int, states: list[dict[str, Any]]) -> Buffers:
        """The buffers of adapter i in these ranks' states, on the adapter's device."""
        a, entries = self._adapters[i], [s["adapters"][i] for s in states]
        added = Buffers(torch.zeros_like(a.flat), torch.zeros_like(a.stats), torch.zeros_like(a.loss))
        for entry in entries:
            if entry["sum"] is not None:
                added.flat += entry["sum"].to(a.device)
            added.stats += entry["stats"].to(a.device)
            added.loss += entry["loss"].to(a.device)
        return added

    @torch.no_grad()
    def resume(self, resumed: Resumed) -> None:
        """Continue from what :meth:`prepare` returned; what was in flight is sent again. All ranks call it."""
        head = resumed.head
        self._broken = self._pending = None
        self._epoch, self._step = head["epoch"] + 1, head["step"]
        self._active = ()
        self._stepwise_drift = head["drift_ms"]
        self.agreed_losses = list(head["agreed_losses"])
        if resumed.pending is not None:
            step, active, rows = resumed.pending
            self._pending = (step, tuple(active), upgraded(rows, active, len(self._adapters)), None)
        capacity = self._config.buffer_capacity
        for a, entry, buffers in zip(self._adapters, head["adapters"], resumed.buffers):
            a.flight = a.current = None
            a.flat.copy_(buffers.flat)
            a.stats.copy_(buffers.stats)
            a.loss.copy_(buffers.loss)
            for name in _ALIKE:
                setattr(a, name, entry[name])
            a.bound, a.planned, a.wanted = (min(length, capacity) for length in (a.bound, a.planned, a.wanted))
            a.trend, a.agreed, a.landed = (None if v is None else tuple(v) for v in (a.trend, a.agreed, a.landed))
            if a.rows_without_finite is None or len(a.rows_without_finite) != self.world_size:
                a.rows_without_finite = [0] * self.world_size  # not saved, or of other ranks
            if a.anchor is not None:
                a.anchor.copy_(entry["anchor"])
        for a, entry in zip(self._adapters, head["adapters"]):
            if entry["flight"] is not None and self._hidden:  # else it counts as held
                self._launch_again(a, entry["flight"])

    def _launch_again(self, a: Buffered, flight: dict[str, Any]) -> None:
        moment = self._moment(flight["step"], tuple(flight["active"]), 0.0, None, False)
        self._fire([a], {a: Decision(*flight["decision"])}, moment)
        pairs = zip(flight["rates"], a.flight.rates)
        a.flight.rates = [
            lr.to(now.device) if isinstance(lr, Tensor) and isinstance(now, Tensor) else lr for lr, now in pairs
        ]


@dataclass
class Buffers:
    """One adapter's part of a state to continue from."""

    flat: Tensor  # S: float32 [numel]
    stats: Tensor  # float64 [8]
    loss: Tensor  # float64 [2]


@dataclass
class Resumed:
    """A state to continue from, checked: ``head`` has what is alike on all ranks."""

    head: dict[str, Any]
    pending: list[Any] | None  # the record that was on its way
    buffers: list[Buffers]  # of each adapter

    @property
    def step(self) -> int:
        return self.head["step"]

    def told(self) -> tuple[str, int, str, bool]:
        """What ranks compare: no problem, the step that comes next, a checksum of what must be alike, and the record."""
        alike = {name: self.head[name] for name in ("world_size", "hold_action", "agreement", "epoch", "agreed_losses")}
        adapters = [{name: entry[name] for name in ("flight", *_ALIKE)} for entry in self.head["adapters"]]
        return "", self.step + 1, state_.checksum({**alike, "adapters": adapters}), self.pending is not None


# What of an adapter is the same on all ranks.
_ALIKE = (
    "held",
    "first_step",
    "bound",
    "planned",
    "wanted",
    "trend",
    "agreed",
    "drift_ms",
    "lr_factor",
    "landed",
    "nothing_finite",
    "came_to_nothing",
    "rows_without_finite",
)


def _flat(params: Sequence[nn.Parameter]) -> Tensor:
    """The parameters' values, float32 [numel]."""
    return torch.cat([p.detach().float().flatten() for p in params])


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
