"""Between ranks: what is held, when it is exchanged, and what the exchange does to the parameters.

An :class:`Aggregator` owns one elastic buffer an adapter: S = sum n_t g_t in float32, with the scalars of
``ops.sideband_accumulate_``. After each backward pass it adds the active adapters' gradients, decides HOLD or FIRE
(src/trigger.rs) and, on FIRE, exchanges S: the gradient that comes out is sum over ranks of S / sum over ranks of n.
docs/trigger.md has the formulas and the guarantees.

Ranks never disagree: a decision is a function of the configuration, of counters that advance alike everywhere, and of
bytes that every rank has received, folded in rank order. Each payload ends with one slot a rank, in which the rank's
scalars stand as single bytes, zeros in all other ranks' slots; sums of integers up to 255 are exact in float32 and in
bfloat16, so every rank reads every rank's float64 scalars to the bit from the reduce it needed anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .lines import reason_of
from .ranks import Ranks, SyncError
from .wrapping import FSDP1, check_wrapping, keep_ddp_local

__all__ = ["AggregationDecision", "Aggregator", "SyncError", "check_wrapping", "keep_ddp_local"]

# The scalars of a record, float64 each. `digest` is of the router's choice; a drift of NaN means that none is known.
_HEADER = ("epoch", "step", "digest", "drift_ms", "loss", "loss_weight")
# Of one adapter: what the statistic needs, and the weight of what the payload holds.
_BUFFER = ("m", "n", "n2", "q", "norm2", "sent")
_WIRE = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNKNOWN = float("nan")


class AggregationDecision(NamedTuple):
    """What was decided for one adapter; ``variance`` is V / numel as agreed last, infinite where there is none yet."""

    adapter_idx: int
    fired: bool
    variance: float
    reason: str


class _Flight:
    """A reduce on its way: its payload, and what the optimizer needs to know when it lands."""

    def __init__(
        self, step: int, active: tuple, decision: tuple, payload: Tensor | None, record: Tensor, work, lrs: list
    ):
        self.step, self.active, self.decision, self.lrs = step, active, decision, lrs
        self.payload, self.record, self.work = payload, record, work
        self.bytes = 0


class _Adapter:
    """One adapter's elastic buffer, and where its window stands."""

    def __init__(self, index: int, params: Sequence[nn.Parameter]):
        self.index, self.params = index, list(params)
        self.device = self.params[0].device
        self.numel = sum(p.numel() for p in self.params)
        self.stats = torch.zeros(8, dtype=torch.float64, device=self.device)
        self.loss = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum of weight * loss, sum of weight
        self.flat = torch.zeros(self.numel, dtype=torch.float32, device=self.device)
        self.sum = self.views(self.flat)
        self.anchor: Tensor | None = None  # hold_action="local": the parameters that all ranks had last
        self.current: tuple[Tensor, Tensor] | None = None  # hold_action="discard": this step's snapshot alone
        self.flight: _Flight | None = None
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

    def views(self, flat: Tensor) -> list[Tensor]:
        """``flat`` [numel] cut into the shapes of the parameters."""
        parts = flat[: self.numel].split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params)]

    def clear(self) -> None:
        self.flat.zero_()
        self.stats.zero_()

    @property
    def variance(self) -> float:
        """V / numel."""
        known = self.agreed is not None and self.agreed[1] is not None
        return self.agreed[1] / self.numel if known else math.inf


class Aggregator:
    """Accumulates, decides and exchanges the gradients of a pool of adapters.

    Args:
        adapters: for each adapter all its A and B parameters, in one order that is the same on all ranks.
        config: any object with the fields of ``KPoolLoraConfig`` that docs/trigger.md lists.
        group: the process group to exchange over; the default group if None. Groups of its own are made from it, so
            that its time limit holds and nothing is interleaved with other collectives. Without torch.distributed, or
            with one rank, the same code runs and communicates nothing.
        optimizer: any ``torch.optim`` optimizer that holds the adapters' parameters. With it, and ``config.overlap``, a
            reduce stays in flight until its adapter is next active, when the optimizer is stepped for that adapter
            alone. Without it ``.grad`` is ready when :meth:`after_backward` returns, for the caller to step.
        max_grad_norm: the norm to which one adapter's aggregated gradient is clipped.
        router_digest: step -> an integer that must be the same on all ranks.
        drift_ms: how far apart the ranks are, as far as this one knows; None where it does not.
        diagnostics: an object with ``write(dict)``; see :mod:`tsugi_kpool.diagnostics`.

    Raises:
        ValueError: for arguments that do not fit together, or configurations that differ between ranks.
        TypeError: for parameters that are sharded (FSDP).

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
        optimizer: torch.optim.Optimizer | None = None,
        max_grad_norm: float | None = None,
        router_digest: Callable[[int], int] = lambda step: 0,
        drift_ms: Callable[[], float | None] = lambda: None,
        diagnostics: Any = None,
    ):
        _check_parameters(adapters, optimizer)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}, not above 0")
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
        if self._action == "local" and optimizer is None:
            raise ValueError("hold_action is 'local', which steps the optimizer during HOLD: pass optimizer=")
        self._scaling = self._chosen_scaling(config.lr_scaling)
        if not (self._synchronous or self._steps_itself or self._scaling == "none" or self._action == "discard"):
            warnings.warn(
                f"lr_scaling is {self._scaling!r}, but the optimizer is yours to step here: a gradient of m held "
                "steps is applied with the rate of one; use lr_factors, or pass optimizer= with overlap",
                stacklevel=2,
            )
        self._wire = _WIRE[config.wire_dtype]
        self._adapters = [_Adapter(i, params) for i, params in enumerate(adapters)]
        self.agreed_losses: list[float | None] = [None] * len(self._adapters)
        self.on_agreed_loss: Callable[[int, tuple[int, ...], float], None] | None = None
        self._epoch, self._step, self._active = 0, -1, ()
        self._pending: tuple[int, tuple[int, ...], Any, Any] | None = None  # a record on its way
        self._stepwise_drift: float | None = None
        self._broken: SyncError | None = None
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
            if self._action == "local":
                a.anchor = torch.cat([p.detach().float().flatten() for p in a.params])
        self._ranks.check_same(
            {
                "numel of each adapter": [a.numel for a in self._adapters],
                "optimizer": type(optimizer).__name__ if self._steps_itself else None,
                "max_grad_norm": max_grad_norm,
                **{
                    name: getattr(config, name)
                    for name in (
                        "aggregation_mode", "trigger", "relative_theta", "fire_cost", "buffer_convergence_eps", "buffer_capacity",
                        "max_hold_steps", "max_drift_ms", "agreement", "decision_delay", "hold_action", "lr_scaling",
                        "wire_dtype", "overlap", "stagger",
                    )
                },
            }
        )  # fmt: skip

    def _chosen_scaling(self, asked: str | None) -> str:
        known = self._hidden and isinstance(self._optimizer, torch.optim.Adam)  # AdamW is one
        if asked == "adam" and not (known or self._synchronous or self._action != "defer"):
            what = "there is none to step" if not self._hidden else f"this is a {type(self._optimizer).__name__}"
            raise ValueError(
                f"lr_scaling is 'adam', which sets the betas of a torch.optim.Adam or AdamW, but {what}: pass such an "
                "optimizer= with overlap, or choose 'linear', 'sqrt' or 'none'"
            )
        return asked or ("adam" if known else "linear")

    # ---- the three calls of a step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self, step: int, active: Sequence[int]) -> None:
        """Finish what is in flight for the adapters that are about to be active.

        Raises:
            SyncError: an exchange failed; what it carried is still held.
        """
        self._check_usable()
        for i in self._checked(active):
            a = self._adapters[i]
            if a.flight is not None:
                self._finish(a)
            if a.landed is not None:
                landed, a.landed = a.landed, None
                self._deliver_loss(landed[0], (i,), landed[1])

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

        Args:
            step: the optimizer step; on all ranks the same, and more than the one before.
            active: the adapters of this step, in the router's order; on all ranks the same.
            weight: tokens or samples behind this rank's gradients; 0 for a rank that had no data.
            loss: this rank's loss, for the router.
            found_inf: a tensor is agreed on (one number on the control group, and the tensor is overwritten with the
                result, so that GradScalers stay equal): if it is not 0 on any rank, the step is left out on all. True
                leaves out this rank's gradients alone.

        Returns:
            One decision for each active adapter. ``.grad`` is the aggregated gradient of an adapter that fired, where
            the caller steps the optimizer, and None for all others.

        Raises:
            ValueError: wrong arguments.
            SyncError: an exchange failed, or ranks chose different adapters; what was held is still held.
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
        # The digest first: a router that raises must not leave half a step behind.
        router = self._router_digest(step)
        self._step, self._active = step, active
        if isinstance(found_inf, Tensor):
            found_inf, everywhere = self._guard(self._ranks.any, found_inf), True
        else:
            everywhere = False
        chosen = [self._adapters[i] for i in active]
        if found_inf and everywhere:
            _drop_gradients(chosen)
            return [self._report(a, step, (False, "hold_nonfinite", _UNKNOWN, _UNKNOWN)) for a in chosen]
        if self._alone:
            return self._pass_on(chosen, step, None if weight == 0 else loss, found_inf or weight == 0)
        for a in chosen:
            self._accumulate(a, step, 0.0 if found_inf else weight, loss)

        if self._stepwise:
            if self._config.decision_delay == 0:
                self._post_record(step, chosen, (), router, loss, weight)
            self._take_record()
        decisions = [self._decide(a, step, flush=False) for a in chosen]
        fired = [a for a, decision in zip(chosen, decisions) if decision[0]]
        if self._stepwise and self._config.decision_delay == 1:
            self._post_record(step, chosen, fired, router, loss, weight)
        for a, decision in zip(chosen, decisions):
            if decision[0]:
                self._launch(a, step, decision, router)
        _drop_gradients(chosen)
        if not self._hidden:
            for a in fired:
                self._finish(a)
        return [
            self._summary(a, decision) if decision[0] else self._report(a, step, decision)
            for a, decision in zip(chosen, decisions)
        ]

    @torch.no_grad()
    def flush(self) -> list[AggregationDecision]:
        """FIRE whatever is held and finish whatever is in flight: before a save for others, an evaluation, the end.

        All ranks call it after the same step. Where the caller steps the optimizer, ``.grad`` is set: step it next.
        """
        self._check_usable()
        self.finish()
        self._take_record()
        router = self._router_digest(self._step) if self._step >= 0 else 0
        results = []
        for a in self._adapters:
            if a.held == 0:
                continue
            decision = self._decide(a, self._step, flush=True)
            if self._action == "discard":  # what is held is not for sending
                self._end_window(a)
                a.clear()
                results.append(self._report(a, self._step, (False, *decision[1:])))
                continue
            self._launch(a, self._step, decision, router)
            results.append(self._summary(a, decision))
        self.finish()
        return results

    @torch.no_grad()
    def finish(self) -> None:
        """Finish what is in flight, and nothing else: before the model or the optimizer is looked at or saved."""
        self._check_usable()
        for a in self._adapters:
            if a.flight is not None:
                self._finish(a)

    def close(self, error: BaseException | None = None) -> None:
        """Let go of the groups and the diagnostics. What is held or in flight is not sent: :meth:`flush` first.

        Args:
            error: why, where it is not the orderly end; the other ranks are told.
        """
        try:
            self._ranks.close(self._broken is not None, error or self._broken)
        finally:
            if self._diagnostics is not None:
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
    def lr_factors(self) -> list[float]:
        return [a.lr_factor for a in self._adapters]

    @property
    def held(self) -> list[int]:
        """Steps in each adapter's buffer; what is in flight counts until it has landed."""
        return [a.held for a in self._adapters]

    def _pass_on(self, chosen: list[_Adapter], step: int, loss: float | Tensor | None, left_out: bool) -> list:
        """One rank, every step a FIRE: what the backward pass left is the result."""
        if left_out:
            _drop_gradients(chosen)
        for a in chosen:
            if self._max_grad_norm is not None:
                nn.utils.clip_grad_norm_(a.params, self._max_grad_norm)
        if loss is not None and math.isfinite(loss):
            self._deliver_loss(step, self._active, float(loss))
        got = [any(p.grad is not None for p in a.params) for a in chosen]
        decisions = [(fired, "fire" if fired else "empty_buffer", _UNKNOWN, _UNKNOWN) for fired in got]
        return [self._report(a, step, decision) for a, decision in zip(chosen, decisions)]

    # ---- accumulate and decide --------------------------------------------------------------------------------------

    def _accumulate(self, a: _Adapter, step: int, weight: float, loss: float | Tensor | None) -> None:
        if a.held == 0:
            a.first_step = step
        a.held += 1
        pairs = [(s, p.grad) for s, p in zip(a.sum, a.params) if p.grad is not None]
        if self._action == "discard":
            flat = torch.zeros_like(a.flat)
            a.current = (flat, torch.zeros_like(a.stats))
        if weight > 0 and pairs:
            for _, grad in pairs:
                if grad.is_sparse:
                    raise ValueError(f"adapter {a.index} has a sparse gradient; dense ones are needed")
            sums, grads = [s for s, _ in pairs], [g for _, g in pairs]
            ops.sideband_accumulate_(sums, a.stats, grads, weight)
            if a.current is not None:
                views = [v for v, p in zip(a.views(a.current[0]), a.params) if p.grad is not None]
                ops.sideband_accumulate_(views, a.current[1], grads, weight)
            if self._action == "local" and all(bool(torch.isfinite(g).all()) for g in grads):
                self._step_optimizer(a, self._rates(), 1.0)
        if loss is not None and weight > 0 and not self._stepwise:
            value = torch.as_tensor(loss, dtype=torch.float64, device=a.device).detach()
            pair = torch.stack((value * weight, torch.full_like(value, weight)))
            a.loss += torch.where(torch.isfinite(value), pair, 0.0)

    def _decide(self, a: _Adapter, step: int, flush: bool) -> tuple[bool, str, float, float]:
        """(fires, reason, statistic, threshold)."""
        if self._synchronous:
            return True, "fire", _UNKNOWN, _UNKNOWN
        return self._rules[a.index].decide(
            held=a.held,
            age=step - a.first_step + 1,
            bound=a.bound,
            flush=flush,
            drift_ms=a.drift_ms if self._planned else self._stepwise_drift,
            planned=a.planned if self._planned else None,
            agreed=None if self._planned else a.agreed,
        )

    # ---- records -----------------------------------------------------------------------------------------------------

    def _digest(self, *what: Any) -> float:
        """48 bits, which a float64 holds exactly."""
        return float(int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=6).digest(), "little"))

    def _header(self, step: int, digest: float, loss: float, loss_weight: float) -> list[float]:
        drift = self._drift_ms()
        return [float(self._epoch), float(step), digest, _UNKNOWN if drift is None else float(drift), loss, loss_weight]

    def _buffer(self, a: _Adapter) -> Tensor:
        """The fields of ``_BUFFER`` on the adapter's device."""
        if self._synchronous:  # nothing is decided by them
            m, n, n2, q = a.stats[:4]
            return torch.stack((m, n, n2, q, torch.zeros_like(n), n))
        seen = ops.sideband_stats(a.sum, a.stats)
        sent = a.current[1][1] if a.current is not None else seen[1]
        return torch.stack((seen[0], seen[1], a.stats[2], seen[2], seen[3], sent))

    def _post_record(self, step, chosen, fired, router, loss, weight) -> None:
        """Start the exchange of this step's record: header, then the buffer of each active adapter."""
        self._take_record()
        value = 0.0 if loss is None else float(loss)
        known = loss is not None and weight > 0 and math.isfinite(value)
        digest = self._digest(step, self._active, router)
        header = self._header(step, digest, value * weight if known else 0.0, weight if known else 0.0)
        empty = torch.zeros(len(_BUFFER), dtype=torch.float64)
        rows = [empty if a in fired else self._buffer(a).cpu() for a in chosen]
        record = torch.cat((torch.tensor(header, dtype=torch.float64), *rows))
        gathered, work = self._guard(self._ranks.gather, record)
        self.control_bytes += record.nbytes * (self.world_size - 1)
        self._pending = (step, self._active, gathered, work)

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
        self._pending = None
        self._check_header(rows)
        self._stepwise_drift = _largest(row[3] for row in rows)
        for k, i in enumerate(active):
            start = len(_HEADER) + k * len(_BUFFER)
            buffers = [tuple(row[start : start + 5]) for row in rows]
            a = self._adapters[i]
            a.agreed = ops._native.trigger_fold(buffers) if any(b[0] for b in buffers) else None
        loss = _mean_loss(rows)
        if loss is not None:
            self._deliver_loss(step, active, loss)

    def _deliver_loss(self, step: int, active: tuple[int, ...], loss: float) -> None:
        for i in active:
            self.agreed_losses[i] = loss
        if self.on_agreed_loss is not None:
            self.on_agreed_loss(step, active, loss)

    def _check_header(self, rows: list[list[float]]) -> None:
        """Fail closed: on every rank, since every rank has the same rows."""
        for field, name in enumerate(_HEADER[:3]):
            values = [row[field] for row in rows]
            if any(v != values[0] for v in values):
                what = {"epoch": "were restarted from different states", "step": "are at different steps"}
                each = ", ".join(f"rank {r} has {v:.0f}" for r, v in zip(self._ranks.names, values))
                self._break(SyncError(f"the ranks {what.get(name, 'chose different adapters')}: {name}: {each}"))

    # ---- FIRE --------------------------------------------------------------------------------------------------------

    def _launch(self, a: _Adapter, step: int, decision: tuple, router: int) -> None:
        digest = self._digest(step, self._active, router, a.index, a.held)
        header = torch.tensor(self._header(step, digest, 0.0, 0.0), dtype=torch.float64).to(a.device)
        record = torch.cat((header, self._buffer(a)))
        record[4:6] = a.loss
        payload = work = None
        if self.world_size == 1:
            if a.current is not None:
                a.flat.copy_(a.current[0])
        else:
            slot = record.numel() * 8
            payload = torch.zeros(a.numel + self.world_size * slot, dtype=self._wire, device=a.device)
            body = payload[: a.numel]
            if self._action == "local":
                for part, start, p in zip(a.views(payload), a.views(a.anchor), a.params):
                    part.copy_((p.float() - start) * record[-1].float())
            else:
                body.copy_(a.flat if a.current is None else a.current[0])
            start = a.numel + self.rank * slot
            payload[start : start + slot] = record.view(torch.uint8).to(self._wire)
            work = self._guard(self._ranks.reduce, payload)
        flight = _Flight(step, self._active, decision, payload, record, work, self._rates())
        if payload is not None:  # what a ring sends from each rank
            flight.bytes = int(2 * (self.world_size - 1) / self.world_size * payload.nbytes)
        self.payload_bytes += flight.bytes
        a.flight, a.current = flight, None

    def _finish(self, a: _Adapter) -> None:
        """Wait for the adapter's reduce; then, and only then, use and clear what was held."""
        flight = a.flight
        started = time.perf_counter()
        if flight.work is not None:
            self._guard(self._ranks.wait, flight.work)
        waited_ms = (time.perf_counter() - started) * 1e3
        if flight.payload is None:
            rows = [flight.record.tolist()]
        else:
            codes = flight.payload[a.numel :].round().to(torch.uint8)
            rows = codes.cpu().view(torch.float64).view(self.world_size, -1).tolist()
        self._check_header(rows)

        buffers = [tuple(row[len(_HEADER) : len(_HEADER) + 5]) for row in rows]
        total = math.fsum(row[-1] for row in rows)
        held, defer = a.held, self._action == "defer"
        if flight.payload is not None and self._action != "local":
            a.flat.copy_(flight.payload[: a.numel])
        if not self._synchronous:
            if self._planned:
                window = (
                    ops._native.trigger_pool(buffers, _square_sum(a.flat))
                    if defer
                    else ops._native.trigger_fold(buffers)
                )
            else:
                window = ops._native.trigger_fold(buffers)
            if self._planned:
                a.trend, a.wanted = self._rules[a.index].plan(a.trend, window, held)
                a.planned = self._apart(a, flight.active)
                a.drift_ms = _largest(row[3] for row in rows)
        loss = None if self._stepwise else _mean_loss(rows)
        if loss is not None:
            a.landed = (flight.step, loss)
        self._end_window(a)
        if not self._synchronous:
            a.agreed = window
        if self._diagnostics is not None:
            self._write(a, flight.step, flight.decision, held, flight.bytes, waited_ms)
        if not self._planned:
            a.agreed = None

        if self._action == "local":
            if flight.payload is not None and total > 0:
                a.anchor.add_(flight.payload[: a.numel].float(), alpha=1.0 / total)
                for p, start in zip(a.params, a.views(a.anchor)):
                    p.copy_(start)
            a.clear()
            return
        if total == 0:  # no rank had anything finite to send
            a.clear()
            return
        window = held if defer and not self._synchronous else 1
        as_adam = self._scaling == "adam"
        a.lr_factor = {"linear": float(window), "none": 1.0}.get(self._scaling, math.sqrt(window))
        grads = [torch.empty_like(p) for p in a.params]
        ops.sideband_drain_(a.sum, a.stats, grads, (a.lr_factor if as_adam else 1.0) / total)
        for p, grad in zip(a.params, grads):
            p.grad = grad
        if self._hidden:
            self._step_optimizer(a, flight.lrs, a.lr_factor, window if as_adam else 1)
        elif self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(a.params, self._max_grad_norm)

    def _apart(self, a: _Adapter, active: tuple[int, ...]) -> int:
        """The planned length, moved so that adapters that are active together do not all fire in one step."""
        if not self._config.stagger:
            return a.wanted
        others = [self._adapters[i] for i in active if i != a.index]
        return self._rules[a.index].apart(a.wanted, [(max(o.planned - o.held, 0), o.wanted) for o in others])

    def _end_window(self, a: _Adapter) -> None:
        a.held, a.flight, a.current, a.agreed = 0, None, None, None
        a.bound = self._config.buffer_capacity
        a.loss.zero_()

    def _rates(self) -> list:
        return learning_rates(self._optimizer) if self._steps_itself else []

    def _step_optimizer(self, a: _Adapter, lrs: list, factor: float, steps: int = 1) -> None:
        """Step the optimizer for one adapter alone, at the given learning rates; its gradients are None afterwards.

        ``steps`` above 1: as that many steps of Adam would, for a gradient that was multiplied by ``factor``, their
        square root.
        """
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(a.params, self._max_grad_norm)
        optimizer, mine = self._optimizer, {id(p) for p in a.params}
        groups = optimizer.param_groups
        touched = []
        for group, lr in zip(groups, lrs):
            params = [p for p in group["params"] if id(p) in mine]
            if params:
                changes = {"params": params, "lr": lr * factor}
                if steps > 1:
                    changes["betas"] = tuple(beta**steps for beta in group["betas"])
                    changes["weight_decay"] = group["weight_decay"] * factor
                touched.append((group, {name: group[name] for name in changes}))
                group.update(changes)
        try:
            optimizer.param_groups = [group for group, _ in touched]
            with _counted_as(steps, optimizer, a.params), torch.enable_grad():  # as a training loop would call it
                optimizer.step()
        finally:
            optimizer.param_groups = groups
            for group, before in touched:
                group.update(before)
        _drop_gradients([a])

    # ---- reports and failure -----------------------------------------------------------------------------------------

    def _summary(self, a: _Adapter, decision: tuple) -> AggregationDecision:
        return AggregationDecision(a.index, decision[0], a.variance, decision[1])

    def _report(self, a: _Adapter, step: int, decision: tuple) -> AggregationDecision:
        if self._diagnostics is not None:
            self._write(a, step, decision, a.held, 0, 0.0)
        return self._summary(a, decision)

    def _write(self, a: _Adapter, step: int, decision: tuple, held: int, sent: int, waited_ms: float) -> None:
        fired, reason, statistic, threshold = decision
        m, variance, signal, power = a.agreed or (None,) * 4
        self._diagnostics.write(
            {
                "step": step,
                "active": list(self._active),
                "adapter": a.index,
                "decision": "FIRE" if fired else "HOLD",
                "reason": reason,
                "V": variance,
                "P": power,
                "signal": signal,
                "statistic": statistic,
                "threshold": threshold,
                "m": held,
                "planned": a.planned or None,
                "bytes": sent,
                "waited_ms": waited_ms,
            }
        )

    def _guard(self, call: Callable, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except SyncError as error:
            self._broken = error
            raise
        except BaseException as error:  # Ctrl-C: the others have been told, and what was held is held
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
        flight, which steps the optimizer. After a failure it finishes nothing, and what was in flight counts as held.

        Args:
            finish: False where the model and the optimizer are saved already: as after a failure.
        """
        if finish and self._broken is None:
            self.finish()
        pending = None
        if self._pending is not None and self._broken is None:
            rows = self._pending_rows()
            pending = (self._pending[0], list(self._pending[1]), rows)
        return {
            "version": 1,
            "world_size": self.world_size,
            "rank": self.rank,
            "hold_action": self._action,
            "epoch": self._epoch,
            "step": self._step,
            "drift_ms": self._stepwise_drift,
            "agreed_losses": list(self.agreed_losses),
            "pending": pending,
            "adapters": [
                {
                    "numel": a.numel,
                    "sum": a.flat.cpu().clone() if a.held else None,
                    "stats": a.stats.cpu().clone(),
                    "loss": a.loss.cpu().clone(),
                    "anchor": None if a.anchor is None else a.anchor.cpu().clone(),
                    **{name: getattr(a, name) for name in _ALIKE},
                }
                for a in self._adapters
            ],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Continue from :meth:`state_dict`: this rank's, or the list of all ranks', in rank order.

        With the list, another number of ranks may continue: rank r of now W takes the buffers of the old ranks r, r + W,
        r + 2W, ... added up, so that no gradient is lost. All ranks load states of one moment.

        Raises:
            ValueError: states that do not fit this pool, or each other.
        """
        states = [state] if isinstance(state, dict) else list(state)
        if not states:
            raise ValueError("state is an empty list: no rank's state is in it")
        head = states[0]
        size = head["world_size"]
        if isinstance(state, dict):
            if (size, head["rank"]) != (self.world_size, self.rank):
                raise ValueError(
                    f"state is of rank {head['rank']} of {size}, but this is rank {self.rank} of {self.world_size}: pass the "
                    "list of all ranks' states"
                )
            mine = states
        else:
            if [s["rank"] for s in states] != list(range(size)):
                raise ValueError(f"state has the ranks {[s['rank'] for s in states]}, not 0 to {size - 1} in order")
            mine = states[self.rank :: self.world_size]
        if [e["numel"] for e in head["adapters"]] != [a.numel for a in self._adapters]:
            raise ValueError(
                f"state has adapters of {[e['numel'] for e in head['adapters']]} elements, but this pool's have "
                f"{[a.numel for a in self._adapters]}"
            )
        if head["hold_action"] != self._action:
            raise ValueError(f"state was made with hold_action={head['hold_action']!r}, but this is {self._action!r}")
        moved = size != self.world_size
        for name in ("version", "world_size", "epoch", "step"):
            if any(s[name] != head[name] for s in states):
                raise ValueError(f"state has ranks that differ in {name}: {[s[name] for s in states]}")
        for i, entry in enumerate(head["adapters"]):
            if any(s["adapters"][i]["held"] != entry["held"] for s in states):
                raise ValueError(f"state has ranks that hold different steps of adapter {i}")
            if moved and self._action == "local" and entry["held"]:
                raise ValueError(
                    f"state holds {entry['held']} local steps of adapter {i}, which another number of ranks "
                    "cannot share: flush before saving"
                )
        self._broken = self._pending = None
        self._epoch, self._step = head["epoch"] + 1, head["step"]
        self._active = ()
        self._stepwise_drift = head["drift_ms"]
        self.agreed_losses = list(head["agreed_losses"])
        if head["pending"] is not None and not moved:
            step, active, rows = head["pending"]
            self._pending = (step, tuple(active), rows, None)
        for i, a in enumerate(self._adapters):
            a.flight = a.current = None
            a.clear()
            a.loss.zero_()
            for s in mine:
                entry = s["adapters"][i]
                if entry["sum"] is not None:
                    a.flat += entry["sum"].to(a.device)
                a.stats += entry["stats"].to(a.device)
                a.loss += entry["loss"].to(a.device)
            entry = head["adapters"][i]
            for name in _ALIKE:
                setattr(a, name, entry[name])
            a.bound = min(a.bound, self._config.buffer_capacity)
            a.trend, a.agreed, a.landed = (None if v is None else tuple(v) for v in (a.trend, a.agreed, a.landed))
            if a.anchor is not None:
                a.anchor.copy_(entry["anchor"])


# What of an adapter is the same on all ranks.
_ALIKE = ("held", "first_step", "bound", "planned", "wanted", "trend", "agreed", "drift_ms", "lr_factor", "landed")


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


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float | Tensor]:
    """That of each parameter group now, which a scheduler does not move any more."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return [lr.clone() if isinstance(lr, Tensor) else lr for lr in rates]


def _drop_gradients(adapters: Iterable[_Adapter]) -> None:
    for a in adapters:
        for p in a.params:
            p.grad = None


def _largest(values: Iterable[float]) -> float | None:
    return max((v for v in values if not math.isnan(v)), default=None)


def _mean_loss(rows: list[list[float]]) -> float | None:
    weight = math.fsum(row[5] for row in rows)
    return math.fsum(row[4] for row in rows) / weight if weight > 0 else None


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


def _check_parameters(adapters: Sequence[Sequence[nn.Parameter]], optimizer: torch.optim.Optimizer | None) -> None:
    if not ops.available():
        raise RuntimeError(ops.unavailable_reason)
    if not adapters:
        raise ValueError("adapters is empty: there is nothing to exchange")
    known = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    seen: set[int] = set()
    for i, params in enumerate(adapters):
        if not params:
            raise ValueError(f"adapters[{i}] has no parameters")
        devices = {p.device for p in params}
        if len(devices) > 1:
            raise ValueError(f"adapters[{i}] lies on {sorted(map(str, devices))}; one device an adapter is needed")
        for p in params:
            if getattr(p, "_fsdp_flattened", False):
                raise TypeError(FSDP1)
            if type(p.data).__name__ == "DTensor":
                raise TypeError(
                    f"adapters[{i}] is sharded: call fully_shard(..., ignored_params=the adapters' parameters), so that "
                    "adapters stay whole on every rank"
                )
            if not p.is_floating_point():
                raise TypeError(f"adapters[{i}] has a parameter of {p.dtype}, not a floating point one")
            if id(p) in seen:
                raise ValueError(f"adapters[{i}] has a parameter that another adapter has too")
            seen.add(id(p))
            if known is not None and id(p) not in known:
                raise ValueError(
                    f"adapters[{i}] has parameters that the optimizer does not hold: build it from all adapters' parameters, "
                    "the inactive ones' too"
                )
