"""``Pool``, the training loop's side of a pool: its router, its active adapters and its aggregator.

``attach`` makes one and enters it into the registry, from where it is found by its model.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..distributed import state as state_
from ..distributed.aggregator import AggregationDecision, Aggregator
from ..distributed.diagnostics import Diagnostics
from ..distributed.wrapping import watch_for_ddp
from . import registry
from .config import KPoolLoraConfig
from .evaluation import end_evaluation
from .members import Members
from .step import Loss, Step, StepChecks, is_number

if TYPE_CHECKING:
    from ..distributed.sideband import Sideband

__all__ = ["Pool"]


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
        from .. import _native

        self.config = config
        #: How far the other nodes are in phase (:class:`tsugi_kpool.Sideband`); None where it is off, or has no peers.
        self.sideband: Sideband | None = None
        self._model = weakref.ref(model)
        self.members = members
        self._parameters = _names_and_shapes(model, members)
        self._router = _native.Router(config.routing_strategy, len(members.names), config.k_active, config.routing_seed)
        self._wrappers: RemovableHandle | None = None  # looks for DDP in the first step
        self._opened = 0  # the step that is open
        self._active: tuple[int, ...] = ()
        self._losses: list[float | Tensor] = []
        self._open = False  # between the choice of a step and what is done with its gradients
        self.is_closed = False
        self.checks = StepChecks(members, needs_loss=config.routing_strategy == "loss_aware")
        self._state_of_step: int | None = None  # when state_dict was called last
        self.state_is_saved = False  # whoever saves the model saves the pool's state too
        self._watched: weakref.ref[nn.Module] | None = None
        self._handles: list[Any] = []
        self._found_inf: bool | Tensor = False
        self._boundary: float | None = None
        #: How many decisions were FIRE and HOLD; a run that is resumed counts on.
        self.counts = {"fire": 0, "hold": 0}
        self._diagnostics = None
        if config.diagnostics_dir is not None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            self._diagnostics = Diagnostics(config.diagnostics_dir, rank)
        try:
            self._aggregator = Aggregator(
                members.parameters,
                config,
                group=group,
                model=model,
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

    def step(self, loss: Loss | None = None, weight: float = 1.0) -> Step:
        """One optimizer step: ``with pool.step() as active:`` activates K adapters; the end of the block exchanges their gradients.

        All micro-batches of the step go into the block, forward and backward; ``opt.step()`` comes after it, once. A
        block that raises leaves the pool at the same step, without the gradients that it got so far. ``break``,
        ``continue`` and ``return`` end the step as the end of the block does. ``active`` are the indices of the active
        adapters, ascending.

        Args:
            loss: the step's loss, for ``routing_strategy="loss_aware"``: a number or a one-element tensor that is read
                when the block ends, or a function that is called then. ``record_loss`` in the block does the same.
            weight: tokens or samples in this step, where they differ between steps or ranks. 0 on a rank whose data ran
                out: it takes part in the step without a forward or backward pass, and a gradient it has is left out.

        Raises:
            RuntimeError: the pool is closed or in another step; the model is inside ``whole_pool``; the gradients of the
                step before were never applied; inside the block the optimizer stepped, gradients were cleared, or the
                adapters of the forward pass were not active in the backward pass; three steps without a loss under
                ``"loss_aware"``.
            ValueError: ``weight`` is not a finite number of at least 0.
        """
        if not (is_number(weight) and 0.0 <= weight < float("inf")):
            raise ValueError(f"pool.step: weight is {weight!r}, expected a finite number of at least 0")
        return Step(self, loss, weight)

    def abandon(self) -> None:
        """Leave an open step as if it had not begun. Gradients stay where they are."""
        self._open, self._found_inf = False, False
        self.checks.active = ()
        self._losses.clear()

    def drop_gradients(self, adapters: Iterable[int]) -> None:
        for i in adapters:
            for parameter in self.members.parameters[i]:
                parameter.grad = None

    def begin(self, step: int) -> tuple[int, ...]:
        self._check_open("step")
        if self._open:
            raise RuntimeError(f"pool.step: step {self._opened} has not ended; one step cannot be inside another")
        if step < 0:
            raise ValueError(f"step is {step}, expected at least 0")
        end_evaluation(self._model())
        if self.members.shows_whole:
            raise RuntimeError(
                "pool.step: the whole pool is active, inside `with whole_pool(model):`; begin the step outside of it"
            )
        self.checks.check_applied()
        active = self._router.select(step)
        # A gradient that the last step left behind, zeroed or not, would move an adapter that is not active now.
        self.drop_gradients(set(self._active) - set(active))
        self._aggregator.before_step(step, active)
        self.activate(active)
        model = self._model()
        if self._wrappers is None and self.world_size > 1 and model is not None:
            self._wrappers = watch_for_ddp(model, [p for own in self.members.parameters for p in own])
        self._opened, self._active, self._open = step, active, True
        self.checks.begin(step, active)
        return active

    def activate(self, active: Sequence[int]) -> None:
        members, model = self.members, self._model()
        if members.tuner is not None and members.pool not in members.tuner.peft_config:
            raise RuntimeError(
                f"pool.step: the pool {members.pool!r} was deleted from the model; call pool.close(flush=False), then attach(model)"
            )
        if members.tuner is not None and members.tuner.active_adapters != [members.pool]:
            if isinstance(model, PeftModel):  # which has a note of its own of what is active
                model.set_adapter(members.pool)
        members.activate(active)

    def end(self, step: int, active: Sequence[int], weight: float) -> list[AggregationDecision]:
        self._check_open("step")
        self.checks.check_end(weight, has_loss=bool(self._losses))
        losses, self._losses, self._open = self._losses, [], False
        self.checks.active = ()
        used = losses and self.config.routing_strategy == "loss_aware"  # reading a loss waits for the device
        loss = sum(losses) / len(losses) if used else None
        found_inf, self._found_inf = self._found_inf, False
        self.decisions = self._aggregator.after_backward(step, active, weight=weight, loss=loss, found_inf=found_inf)
        self._count(self.decisions)
        self._leave_to_caller(self.decisions)
        self._tell_sideband()
        return self.decisions

    def _leave_to_caller(self, decisions: Sequence[AggregationDecision]) -> None:
        if not self._aggregator.steps_itself:
            self.checks.left = tuple(d.adapter_idx for d in decisions if d.fired)

    def _tell_sideband(self) -> None:
        """The step's boundary is now."""
        if self.sideband is None:
            return
        now = time.monotonic()
        duration_ms = 0.0 if self._boundary is None else (now - self._boundary) * 1e3
        self._boundary = now
        fill = max(self._aggregator.held) / self.config.buffer_capacity
        self.sideband.report_step(self._aggregator.step, duration_ms, fill, self.counts["fire"], self.counts["hold"])

    def _count(self, decisions: list[AggregationDecision]) -> None:
        for decision in decisions:
            self.counts["fire" if decision.fired else "hold"] += 1

    def record_loss(self, loss: float | Tensor) -> None:
        """Tell the router the loss of the open step. Losses of several micro-batches are averaged.

        Args:
            loss: a number or a tensor with one element, which is not read before the step ends.

        Raises:
            RuntimeError: no step is open.
            ValueError: ``loss`` is neither a number nor a tensor with one element.
        """
        if not self._open:
            raise RuntimeError("record_loss: no step is open; call it inside `with pool.step():`")
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"record_loss: loss has shape {list(loss.shape)}, expected one element")
            loss = loss.detach().reshape(())
        elif not is_number(loss):
            raise ValueError(f"record_loss: loss is {loss!r}, expected a number or a tensor with one element")
        self._losses.append(loss)

    def record_found_inf(self, found_inf: bool | Tensor) -> None:
        """Say that gradients of the open step overflowed (AMP), so that the step is left out.

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
    def is_open(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._open

    @property
    def current_step(self) -> int:
        """The step that is open, or comes next."""
        # The aggregator counts a step when its gradients are taken, whatever interrupts what follows.
        return self._opened if self._open else self._aggregator.step + 1

    @property
    def adapter_params(self) -> dict[int, list[nn.Parameter]]:
        """The A and B parameters of each adapter, layer by layer."""
        return dict(enumerate(self.members.parameters))

    def select(self, step: int) -> tuple[int, ...]:
        """The adapters that the router chooses for a step, as things stand."""
        return self._router.select(step)

    def digest(self, step: int) -> int:
        """64 bits that are equal on ranks whose routers choose alike from ``step`` on."""
        return self._router.digest(step)

    # -- its life

    def flush(self) -> list[AggregationDecision]:
        """Fire every gradient that is held, and finish what is in flight. Call it before an evaluation, an export or the end.

        All ranks must call it. Without an optimizer handed to ``attach``, ``.grad`` is then the caller's to step with.

        Raises:
            RuntimeError: a step is open.
        """
        self._check_open("flush")
        self._check_between_steps("flush")
        decisions = self._aggregator.flush()
        self._count(decisions)
        self._leave_to_caller(decisions)
        return decisions

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
        """For each adapter, the factor by which ``lr_scaling`` multiplies the learning rate of its last FIRE.

        Where the optimizer was handed to ``attach`` it has been applied already.
        """
        return self._aggregator.lr_factors

    @property
    def held(self) -> list[int]:
        """For each adapter, how many steps' gradients it holds back."""
        return self._aggregator.held

    def scalars(self) -> dict[str, float]:
        """Counts and sums for trackers, since the start; empty without ``diagnostics_dir``."""
        return {} if self._diagnostics is None else self._diagnostics.scalars()

    def state_dict(self, *, finish: bool = True, all_ranks: bool = False) -> dict[str, Any]:
        """This rank's state: everything a resumed run needs beside the model and the optimizer, with a checksum.

        Finishes what is in flight, which may step the optimizer: call it before the model and the optimizer are saved.
        It raises nothing after a failed exchange or Ctrl-C, and what could not be finished is in the state.

        Args:
            finish: False if model and optimizer are saved already. What is in flight is then kept in the state, and lands
                after a resume where it would have landed.
            all_ranks: put the states of all ranks in it, for where one rank alone writes a file; all ranks must call it
                then. accelerate's ``save_state`` gets this, with ``finish=False``, by itself.

        Raises:
            SyncError: with ``all_ranks``, a rank did not answer.
        """
        if _asked_by_accelerate():
            finish, all_ranks = False, True
        own = self._own_state(finish, {})
        if not all_ranks or self.world_size == 1:
            return own
        return {"version": state_.VERSION, "ranks": self._aggregator.gather_objects("collect all states", own)}

    def holds_what_is_saved_nowhere(self) -> bool:
        """Whether gradients are held that neither the weights nor a state of this step contain."""
        is_saved = self.state_is_saved or self._state_of_step == self.current_step
        return not self.is_closed and any(self.held) and not is_saved

    def _own_state(self, finish: bool, extra: dict[str, Any]) -> dict[str, Any]:
        self._state_of_step = self.current_step
        aggregator = self._aggregator.state_dict(finish=finish)  # first: what it finishes may carry losses
        state = {
            "version": state_.VERSION,
            "step": aggregator["step"] + 1,
            "active": list(self._active),
            "parameters": self._parameters,
            "aggregator": aggregator,
            "router": self._routing(),
            "counts": dict(self.counts),
            "telemetry": None if self._diagnostics is None else self._diagnostics.state_dict(),
            "extra": extra,
        }
        return {**state, "checksum": state_.checksum(state)}

    def _routing(self) -> dict[str, Any]:
        return {
            "strategy": self.config.routing_strategy,
            "n": len(self.members.names),
            "k": self.config.k_active,
            "seed": self.config.routing_seed,
            "losses": list(self._router.losses),
        }

    def load_state_dict(self, state: dict[str, Any] | Sequence[dict[str, Any]]) -> None:
        """Put back what ``state_dict`` returned, and go on as if the run had not stopped. All ranks must call it.

        Args:
            state: this rank's; or the list of all ranks' in rank order, or one made with ``all_ranks=True``, from which
                another number of ranks may go on too.

        Raises:
            ValueError: a state is damaged, made by a later version, or does not fit this pool or the other ranks'; the
                sentence names the field and its value. No rank has changed then.
            RuntimeError: the pool is closed, or a step is open.
            SyncError: the ranks could not compare their states.
        """
        self._load("load_state_dict", lambda: [state_.checked(part) for part in state_.parts(state)])

    def _load(self, call: str, read: Callable[[], list[dict[str, Any]]]) -> None:
        self._check_open(call)
        self._check_between_steps(call)
        states: list[dict[str, Any]] = []

        def aggregators() -> list[dict[str, Any]]:
            states.extend(read())
            for each in states:
                self._check_fit(each)
            return [each["aggregator"] for each in states]

        resumed = self._aggregator.prepare(aggregators)
        head = next((each for each in states if each["aggregator"]["rank"] == self.rank), states[0])
        # Nothing below can be refused.
        self._router.losses = head["router"]["losses"]
        self.counts = dict(head["counts"] or self.counts)
        if self._diagnostics is not None and head["telemetry"] is not None:
            self._diagnostics.load_state_dict(head["telemetry"])
        self._active = tuple(head["active"])
        if self._active:
            self.members.activate(self._active)
        self._aggregator.resume(resumed)

    def _check_fit(self, state: dict[str, Any]) -> None:
        """ValueError if a state is of another pool than this."""
        own, other = self._routing(), state["router"]
        for key in ("strategy", "n", "k", "seed"):
            if own[key] != other[key]:
                raise ValueError(
                    f"state: the router's {key} is {other[key]!r} in the state, {own[key]!r} here: {state_.OTHER_POOL}"
                )
        if state["parameters"] is None:
            return
        for i, (here, there) in enumerate(zip(self._parameters, state["parameters"])):
            if len(here) != len(there):
                raise ValueError(
                    f"state: adapter {i} has {len(there)} parameters in the state, {len(here)} here: {state_.OTHER_POOL}"
                )
            for (name, shape), (other_name, other_shape) in zip(here, there):
                if (name, shape) != (other_name, list(other_shape)):
                    raise ValueError(
                        f"state: a parameter of adapter {i} is {other_name} of shape {list(other_shape)} in the state, {name} "
                        f"of shape {shape} here: {state_.OTHER_POOL}"
                    )

    def save(
        self, path: str | os.PathLike, *, finish: bool = True, extra: dict[str, float | str | None] | None = None
    ) -> Path:
        """Write this rank's state to a file of its own. All ranks call it, each with the same path.

        The file is written under another name and renamed when it is on the disk: what was there before stays whole
        until then, whatever happens.

        Args:
            path: a folder, in which the file is ``kpool_state_rank{rank}.pt``; or a file, to whose name several ranks add
                theirs: ``state.pt`` becomes ``state_rank0.pt``.
            finish: as in ``state_dict``.
            extra: numbers and strings of your own to keep in the state.

        Returns:
            The file.

        Raises:
            OSError: it could not be written; the sentence names the file.
            ValueError: ``extra`` has something else in it.
        """
        extra = dict(extra or {})
        state_.check_extra(extra, "extra")
        file = state_.file_of(path, self.rank, self.world_size)
        state_.write(self._own_state(finish, extra), file)
        return file

    def load(self, path: str | os.PathLike | Sequence[str | os.PathLike]) -> None:
        """Go on from what ``save`` wrote. All ranks must call it; nothing in the files is run as code.

        Args:
            path: what ``save`` was given, on this number of ranks or another; or one file; or the list of all ranks'
                files, in rank order.

        Raises:
            OSError: a file cannot be read.
            ValueError, RuntimeError, SyncError: as ``load_state_dict``; the sentence names the file.
        """
        self._load("load", lambda: state_.read_all(path, self.rank, self.world_size))

    def close(self, *, flush: bool = True) -> None:
        """Flush what is held and let go of the model. The adapters that were active last stay active.

        Args:
            flush: False where other ranks may be gone: what is held is then dropped with the pool. Leaving a
                ``with attach(...)`` block by an exception does that.

        Raises:
            RuntimeError: gradients are held that would be lost, since the optimizer is the caller's to step; or a step
                is open. The pool stays as it is.
        """
        self._close(flush, None)

    def _close(self, flush: bool, error: BaseException | None) -> None:
        if self.is_closed:
            return
        if flush:
            self._check_between_steps("close")
            if self.has_gradients_for_the_caller():
                raise RuntimeError(
                    f"close: gradients of {self.held} steps are held, and the optimizer is yours to step: call "
                    "pool.flush(), opt.step(), then pool.close(); or drop them with pool.close(flush=False)"
                )
        self.let_go(flush, error)

    def has_gradients_for_the_caller(self) -> bool:
        """Whether a flush would leave gradients that the caller has to step with."""
        return self.config.hold_action == "defer" and not self._aggregator.steps_itself and any(self.held)

    def let_go(self, flush: bool, error: BaseException | None = None) -> None:
        if self._wrappers is not None:
            self._wrappers.remove()
        try:
            if flush:
                self._aggregator.flush_and_close()
            else:
                self._aggregator.close(error)
        finally:
            if self.sideband is not None:
                self.sideband.stop()
            self.is_closed, self._open = True, False
            for handle in self._handles:
                handle.remove()
            registry.leave(self._model(), None if self._watched is None else self._watched(), self)

    def name_sender(self, sender_id: str | None) -> None:
        """Name this process in the rows of ``diagnostics_dir``."""
        if self._diagnostics is not None:
            self._diagnostics.sender_id = sender_id

    def watched_by(self, module: nn.Module, handles: list[Any]) -> None:
        """``attach`` says what watches the passes of ``module``; the handles are removed when the pool is closed."""
        self._watched, self._handles = weakref.ref(module), handles

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        self._close(kind is None, error)

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else f"step {self.current_step}, active {self._active}"
        return (
            f"<Pool K={self.config.k_active} of N={len(self.members.names)}, {self.config.routing_strategy}, {state}>"
        )

    def _check_between_steps(self, call: str) -> None:
        if self._open:
            raise RuntimeError(f"pool.{call}: step {self._opened} is open; call it after `with pool.step():`")

    def _check_open(self, call: str) -> None:
        if self.is_closed:
            raise RuntimeError(f"pool.{call}: this pool is closed; call attach(model) for a new one")


def _names_and_shapes(model: nn.Module, members: Members) -> list[list[list[Any]]]:
    """[name, shape] of each adapter's parameters, alike for a pool of any name and under torch.compile."""
    names = {id(p): name.replace("_orig_mod.", "") for name, p in model.named_parameters()}
    return [
        [
            [names[id(p)].removeprefix("base_model.model.").replace(f".{member}", f".adapter_{i}"), list(p.shape)]
            for p in parameters
        ]
        for i, (member, parameters) in enumerate(zip(members.names, members.parameters))
    ]


def _asked_by_accelerate() -> bool:
    """Whether ``state_dict`` was called by ``Accelerator.save_state``.

    It calls on every rank but writes the main process's answer alone, after the model and the optimizer; and no argument
    can be passed through it.
    """
    return sys._getframe(2).f_globals.get("__name__") == "accelerate.checkpointing"


def _started_sideband(config: KPoolLoraConfig, group: Any) -> Sideband | None:
    if not config.sideband_enabled:
        return None
    if not config.sideband_peers and not (dist.is_available() and dist.is_initialized()):
        return None  # one process: there is nobody to be out of phase with
    from ..distributed.sideband import Sideband  # its names are in the native library

    return Sideband.from_config(config, group).start()
