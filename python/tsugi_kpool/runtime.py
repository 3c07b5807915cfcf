"""The training loop's side of a pool: ``attach`` and ``Pool``, and the eight functions of the 0.1 releases.

A ``Pool`` holds what a model's pool needs while it trains: the router, the list of active adapters and the aggregator.
It is found from the model through a weak reference, so copies and pickles of the model know nothing of it.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import ops
from .config import KPoolLoraConfig
from .diagnostics import Diagnostics
from .pool import Members, find_members, find_tuner, unwrap
from .sync import AggregationDecision, Aggregator, check_wrapping

if TYPE_CHECKING:
    from .sideband import Sideband

__all__ = [
    "Pool",
    "apply_kpool_step",
    "attach",
    "get_runtime",
    "plesio_init",
    "plesio_shutdown",
    "post_backward_step",
    "pre_forward_step",
]

Loss = float | Tensor | Callable[[], float | Tensor]

_pools: weakref.WeakKeyDictionary[nn.Module, Pool] = weakref.WeakKeyDictionary()


class Pool:
    """A pool that trains; ``attach`` makes it. One optimizer step is one ``with pool.step():`` block."""

    def __init__(
        self,
        model: nn.Module,
        config: KPoolLoraConfig,
        members: Members,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        group: Any = None,
        max_grad_norm: float | None = None,
    ):
        from . import _native

        self.config = config
        #: How far the other nodes are in phase (:class:`tsugi_kpool.sideband.Sideband`); None where it is off, or has no peers.
        self.sideband: Sideband | None = None
        self._model = weakref.ref(model)
        self._members = members
        self._router = _native.Router(config.routing_strategy, len(members.names), config.k_active, config.routing_seed)
        self._step = 0
        self._active: tuple[int, ...] = ()
        self._losses: list[float | Tensor] = []
        self._open = False  # between the choice of a step and what is done with its gradients
        self._closed = False
        self._found_inf: bool | Tensor = False
        self._boundary: float | None = None
        self._counts = [0, 0]  # HOLD, FIRE
        self._diagnostics = None
        if config.diagnostics_dir is not None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            self._diagnostics = Diagnostics(config.diagnostics_dir, rank)
        try:
            self._aggregator = Aggregator(
                members.parameters,
                config,
                group=group,
                optimizer=optimizer,
                max_grad_norm=max_grad_norm,
                router_digest=self._router.digest,
                drift_ms=lambda: None if self.sideband is None else self.sideband.max_drift_ms_across_peers(),
                diagnostics=self._diagnostics,
            )
        except BaseException:
            if self._diagnostics is not None:
                self._diagnostics.close()
            raise
        self._aggregator.on_agreed_loss = self._take_agreed_loss
        try:
            self.sideband = _started_sideband(config, group)
        except BaseException as error:
            self._aggregator.close(error)
            raise
        #: What was decided at the end of the last step.
        self.decisions: list[AggregationDecision] = []

    # -- a step

    @contextlib.contextmanager
    def step(self, loss: Loss | None = None, weight: float = 1.0) -> Iterator[tuple[int, ...]]:
        """One optimizer step: activates K adapters, and when the block ends sees to their gradients.

        All micro-batches of the step go into the block; ``opt.step()`` comes after it. A block that raises leaves the
        pool at the same step.

        Args:
            loss: the step's loss, for ``routing_strategy="loss_aware"``: a number or a one-element tensor that is read
                when the block ends, or a function that is called then. ``record_loss`` in the block does the same.
            weight: tokens or samples in this step, where they differ between steps or ranks. 0 on a rank whose data ran
                out: it takes part in the step without a forward or backward pass, and a gradient it has is left out.

        Yields:
            The indices of the active adapters, ascending.

        Raises:
            RuntimeError: the pool is closed, or in another step.
            ValueError: ``weight`` is not a finite number of at least 0.
        """
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"pool.step: weight is {weight!r}, expected a finite number of at least 0")
        active = self._begin(self._step)
        try:
            yield active
            if loss is not None:
                self.record_loss(loss() if callable(loss) else loss)
        except BaseException:
            self._abandon()
            raise
        self._finish(self._step, active, weight)

    def _abandon(self) -> None:
        """Leave an open step as if it had not begun."""
        self._open, self._found_inf = False, False
        self._losses.clear()

    def _begin(self, step: int) -> tuple[int, ...]:
        self._check_open("step")
        if self._open:
            raise RuntimeError(f"pool.step: step {self._step} has not ended; one step cannot be inside another")
        if step < 0:
            raise ValueError(f"step is {step}, expected at least 0")
        active = self._router.select(step)
        # A gradient that the last step left behind, zeroed or not, would move an adapter that is not active now.
        for i in set(self._active) - set(active):
            for parameter in self._members.parameters[i]:
                parameter.grad = None
        self._aggregator.before_step(step, active)
        self._members.activate(active)
        self._step, self._active, self._open = step, active, True
        return active

    def _finish(self, step: int, active: Sequence[int], weight: float) -> list[AggregationDecision]:
        losses, self._losses, self._open = self._losses, [], False
        used = losses and self.config.routing_strategy == "loss_aware"  # reading a loss waits for the device
        loss = sum(losses) / len(losses) if used else None
        found_inf, self._found_inf = self._found_inf, False
        self.decisions = self._aggregator.after_backward(step, active, weight=weight, loss=loss, found_inf=found_inf)
        self._step = step + 1
        self._tell_sideband()
        return self.decisions

    def _tell_sideband(self) -> None:
        """The step's boundary is now."""
        if self.sideband is None:
            return
        now = time.monotonic()
        duration_ms = 0.0 if self._boundary is None else (now - self._boundary) * 1e3
        self._boundary = now
        for decision in self.decisions:
            self._counts[decision.fired] += 1
        fill = max(self._aggregator.held) / self.config.buffer_capacity
        holds, fires = self._counts
        self.sideband.report_step(self._step - 1, duration_ms, fill, fires, holds)

    def record_loss(self, loss: float | Tensor) -> None:
        """Tell the router the loss of the step that is open; several micro-batches are averaged.

        Args:
            loss: a number or a tensor with one element, which is not read before the step ends.

        Raises:
            RuntimeError: no step is open.
            ValueError: ``loss`` is a tensor with more or less than one element.
        """
        if not self._open:
            raise RuntimeError("record_loss: no step is open; call it inside `with pool.step():`")
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"record_loss: loss has shape {list(loss.shape)}, expected one element")
            loss = loss.detach().reshape(())
        self._losses.append(loss)

    def record_found_inf(self, found_inf: bool | Tensor) -> None:
        """Tell that gradients of the open step overflowed (AMP), so that the step is left out.

        Args:
            found_inf: not 0 where they did. A tensor is agreed on by all ranks and overwritten with what they agreed, so
                hand in the scaler's own, after ``scaler.unscale_(optimizer)``; True leaves out this rank's gradients.

        Raises:
            RuntimeError: no step is open.
        """
        if not self._open:
            raise RuntimeError("record_found_inf: no step is open; call it inside `with pool.step():`")
        self._found_inf = found_inf

    def _take_agreed_loss(self, step: int, active: Sequence[int], loss: float) -> None:
        if self.config.routing_strategy == "loss_aware":
            self._router.record_loss(list(active), loss)

    # -- what it is

    @property
    def active(self) -> tuple[int, ...]:
        """The adapters that are active, or were last."""
        return self._active

    @property
    def current_step(self) -> int:
        """The step that is open, or comes next."""
        return self._step

    @property
    def adapter_params(self) -> dict[int, list[nn.Parameter]]:
        """The A and B parameters of each adapter, layer by layer."""
        return dict(enumerate(self._members.parameters))

    def select(self, step: int) -> tuple[int, ...]:
        """The adapters that the router chooses for a step, as things stand."""
        return self._router.select(step)

    def digest(self, step: int) -> int:
        """64 bits that are equal on ranks whose routers choose alike from ``step`` on."""
        return self._router.digest(step)

    # -- its life

    def flush(self) -> list[AggregationDecision]:
        """Fire every gradient that is held, and finish what is in flight: before an evaluation, an export, the end.

        All ranks must call it. Without an optimizer handed to ``attach``, ``.grad`` is then the caller's to step with.
        """
        self._check_open("flush")
        return self._aggregator.flush()

    def finish(self) -> None:
        """Finish what is in flight, which may step the optimizer, and leave held what is held. All ranks must call it."""
        self._check_open("finish")
        self._aggregator.finish()

    @property
    def rank(self) -> int:
        """This process among those that exchange gradients."""
        return self._aggregator.rank

    @property
    def world_size(self) -> int:
        """How many processes exchange gradients."""
        return self._aggregator.world_size

    @property
    def lr_factors(self) -> list[float]:
        """By what ``lr_scaling`` multiplies the learning rate of each adapter's last FIRE; applied already with an optimizer."""
        return self._aggregator.lr_factors

    @property
    def held(self) -> list[int]:
        """Steps whose gradients each adapter holds back."""
        return self._aggregator.held

    def scalars(self) -> dict[str, float]:
        """Counts and sums for trackers, since the start; empty without ``diagnostics_dir``."""
        return {} if self._diagnostics is None else self._diagnostics.scalars()

    def state_dict(self, *, finish: bool = True) -> dict[str, Any]:
        """Everything a resumed run needs beside the model and the optimizer, of this rank.

        Finishes what is in flight, which may step the optimizer: call it before the model and the optimizer are saved.

        Args:
            finish: False where they are saved already: what is in flight then counts as held in the state.
        """
        return {
            "step": self._step,
            "active": list(self._active),
            "aggregator": self._aggregator.state_dict(finish=finish),  # first: what it finishes may carry losses
            "router": self._routing(),
        }

    def _routing(self) -> dict[str, Any]:
        return {
            "strategy": self.config.routing_strategy,
            "n": len(self._members.names),
            "k": self.config.k_active,
            "seed": self.config.routing_seed,
            "losses": self._router.losses,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned, and go on as if the run had not stopped.

        Raises:
            ValueError: the state is of a pool with another router; the sentence names what differs.
        """
        self._check_open("load_state_dict")
        own, other = self._routing(), state["router"]
        for key in ("strategy", "n", "k", "seed"):
            if own[key] != other[key]:
                raise ValueError(
                    f"load_state_dict: the router's {key} is {other[key]!r} in the state, {own[key]!r} here"
                )
        self._aggregator.load_state_dict(state["aggregator"])
        self._router.losses = other["losses"]
        self._step, self._active = state["step"], tuple(state["active"])
        if self._active:
            self._members.activate(self._active)

    def close(self, *, flush: bool = True) -> None:
        """Flush what is held and let go of the model. The adapters that were active last stay active.

        Args:
            flush: False where other ranks may be gone: what is held is then dropped with the pool. Leaving a
                ``with attach(...)`` block by an exception does that.
        """
        self._close(flush, None)

    def _close(self, flush: bool, error: BaseException | None) -> None:
        if self._closed:
            return
        try:
            if flush:
                self._aggregator.flush_and_close()
            else:
                self._aggregator.close(error)
        finally:
            if self.sideband is not None:
                self.sideband.stop()
            self._closed, self._open = True, False
            model = self._model()
            if model is not None and _pools.get(model) is self:
                del _pools[model]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        self._close(kind is None, error)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"step {self._step}, active {self._active}"
        return (
            f"<Pool K={self.config.k_active} of N={len(self._members.names)}, {self.config.routing_strategy}, {state}>"
        )

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise RuntimeError(f"pool.{call}: this pool is closed; call attach(model) for a new one")


def _started_sideband(config: KPoolLoraConfig, group: Any) -> Sideband | None:
    if not config.sideband_enabled:
        return None
    if not config.sideband_peers and not (dist.is_available() and dist.is_initialized()):
        return None  # one process: there is nobody to be out of phase with
    from .sideband import Sideband  # its names are in the native library

    return Sideband.from_config(config, group).start()


def find_pool(model: nn.Module) -> Pool | None:
    """The pool attached to this model, or None."""
    inner = unwrap(model)
    return _pools.get(inner)


def attach(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    group: Any = None,
    max_grad_norm: float | None = None,
    config: KPoolLoraConfig | None = None,
) -> Pool:
    """Make a pool train: ``with pool.step():`` then activates K of N adapters a step.

    Args:
        model: a PEFT model with a pool, from ``KPoolLoraConfig`` or by hand; wrapped by torch.compile or not.
        optimizer: given it, reductions may run past the end of a step, until their adapters are needed.
        group: the ranks that train together; None for all.
        max_grad_norm: clip each adapter's aggregated gradient to this norm.
        config: routing, trigger and sideband; None for that of the model's pool. A pool by hand has none.

    Returns:
        The pool. ``pool.close()`` ends it; it is also a context manager.

    Raises:
        RuntimeError: the model has a pool attached already, the pool was loaded for inference, the native library is
            missing.
        TypeError: the model is wrapped in FSDP1, or in DDP that would exchange gradients itself.
        ValueError: there is no pool, ``config`` is missing or describes another pool, or the optimizer does not hold
            all of its parameters. Nothing is installed then.
    """
    inner = unwrap(model)
    if inner in _pools:
        raise RuntimeError("attach: this model has a pool attached already; call its close() first")
    if not ops.available():
        raise RuntimeError(f"attach: {ops.unavailable_reason}")
    check_wrapping(model)
    tuner = find_tuner(inner)
    own = None if tuner is None else tuner.peft_config[tuner.active_pool]
    if config is None:
        config = own
    if config is None:
        raise ValueError(
            "attach: this model has no KPoolLoraConfig; build it with get_peft_model(base, KPoolLoraConfig(...)), or "
            "pass config= for adapters adapter_0, adapter_1, ... that were added by hand"
        )
    if own is not None and own.n_adapters != config.n_adapters:
        raise ValueError(f"attach: config.n_adapters is {config.n_adapters}, the model's pool has {own.n_adapters}")
    if tuner is not None and tuner.whole:
        raise RuntimeError(
            "attach: this pool was loaded for inference; load it with PeftModel.from_pretrained(..., is_trainable=True), "
            "or call model.set_adapter(name) before the optimizer is made"
        )
    members = find_members(inner, config.n_adapters)
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"attach: max_grad_norm is {max_grad_norm!r}, expected a number above 0")
    if optimizer is not None:
        held = {id(p) for group_ in optimizer.param_groups for p in group_["params"]}
        left_out = [
            name for name, own_ in zip(members.names, members.parameters) if any(id(p) not in held for p in own_)
        ]
        if left_out:
            raise ValueError(
                f"attach: the optimizer does not hold all parameters of {len(left_out)} of {len(members.names)} adapters "
                f"(first: {left_out[0]!r}). Adapters added by hand start frozen: attach first, then give the optimizer "
                "the parameters that require gradients, and attach again with it"
            )
    pool = Pool(inner, config, members, optimizer=optimizer, group=group, max_grad_norm=max_grad_norm)
    for adapter in members.parameters:
        for parameter in adapter:
            parameter.requires_grad_(True)
    members.activate(pool.select(0))
    _pools[inner] = pool
    return pool


# ---- the functions of the 0.1 releases -------------------------------------------------------------------------------


def plesio_init(model: nn.Module, config: KPoolLoraConfig, sender_id: str | None = None) -> None:
    """``attach`` without an optimizer. ``sender_id`` names this process in telemetry.

    Raises:
        RuntimeError: called before for this model, or the model has no pool.
    """
    if find_pool(model) is not None:
        raise RuntimeError("plesio_init: called before for this model; call plesio_shutdown(model) first")
    try:
        pool = attach(model, config=config)
    except ValueError as error:
        raise RuntimeError(f"plesio_init: {error}") from error
    pool.sender_id = sender_id


def plesio_shutdown(model: nn.Module) -> None:
    """``pool.close()``; nothing where no pool is attached."""
    pool = find_pool(model)
    if pool is not None:
        pool.close()


def apply_kpool_step(model: nn.Module, step: int) -> tuple[int, ...]:
    """Activate the adapters of a step; the first call of a step.

    Returns:
        Their indices, ascending.
    """
    pool = _attached(model, "apply_kpool_step")
    pool._abandon()  # these functions may leave a step without ending it
    return pool._begin(step)


def pre_forward_step(model: nn.Module, step: int, active: tuple[int, ...]) -> contextlib.AbstractContextManager[None]:
    """A context for the forward and backward passes of the step that ``apply_kpool_step`` began."""
    _began(_attached(model, "pre_forward_step"), "pre_forward_step", step, active)
    return contextlib.nullcontext()


def post_backward_step(model: nn.Module, step: int, active: tuple[int, ...]) -> list[AggregationDecision]:
    """Decide about the active adapters' gradients; after the backward pass and before ``optimizer.step()``.

    Returns:
        One decision for each active adapter.
    """
    pool = _attached(model, "post_backward_step")
    _began(pool, "post_backward_step", step, active)
    return pool._finish(step, pool.active, 1.0)


def get_runtime(model: nn.Module) -> Pool:
    """The ``Pool`` of a model."""
    return _attached(model, "get_runtime")


def _attached(model: nn.Module, call: str) -> Pool:
    pool = find_pool(model)
    if pool is None:
        raise RuntimeError(f"{call}: no pool is attached to this model; call plesio_init(model, config) first")
    return pool


def _began(pool: Pool, call: str, step: int, active: Sequence[int]) -> None:
    if not pool._open or pool.current_step != step:
        raise RuntimeError(f"{call}: step {step} has not begun; call apply_kpool_step(model, {step}) first")
    if tuple(active) != pool.active:
        raise ValueError(f"{call}: active is {tuple(active)}, but apply_kpool_step returned {pool.active}")
