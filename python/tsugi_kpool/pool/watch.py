"""Watches a pool's model around its steps (forward and backward passes, optimizers that step) for code that loses gradients.

A pool's gradients are right under three conditions: the adapters of the forward pass are active in the backward pass too; both
run inside ``with pool.step():``; and the optimizer steps after the block, once. Code that does otherwise would train something
else without a sign, so it gets an error here. Three places are watched: the output of a forward pass, whose graph gets a hook;
the beginning and the end of the backward pass, through that hook; and every ``optimizer.step()`` of the process.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..warn import warn_user
from .members import Members, PoolTuner, find_members
from .registry import AttachedPool, attached_pools, attached_to, watched_module

__all__ = [
    "UNATTACHED", "LookForUnattached", "exporting", "gradients_now", "holds", "trained_unattached", "warn_of_held", "watch",
]  # fmt: skip

UNATTACHED = (
    "this pool was trained without attach (or KPoolCallback under Trainer): only the adapters that were active moved, and "
    "what is exported is all of them, scaled by K / N, which is not what was trained"
)


def watch(pool: AttachedPool, module: nn.Module) -> list[Any]:
    """Begin to watch the passes of a module, for a pool that is in the registry; returns handles that end it."""
    _watch_optimizers()
    tuner = pool.members.tuner
    if tuner is not None and not trained_unattached(tuner):
        _unattached.pop(tuner, None)
    return [module.register_forward_pre_hook(_before_forward), module.register_forward_hook(_after_forward)]


# ---- passes ----------------------------------------------------------------------------------------------------------

# These are functions of the module and find the pool through it, so that a copy of the model, which has no pool, is
# watched by nobody although it has the hooks.


def _before_forward(module: nn.Module, _: Any) -> None:
    pool = None if torch.compiler.is_compiling() else attached_to(module)
    if pool is not None:
        pool.members.come_back(pool.is_open)


def _after_forward(module: nn.Module, _: Any, output: Any) -> None:
    if torch.compiler.is_compiling():  # what is compiled recomputes what it traced
        return
    pool = attached_to(module)
    if pool is not None:
        _on_backward(output, _Forward(weakref.ref(pool), pool.members.computes()))


def _on_backward(output: Any, forward: _Forward | _Unattached) -> None:
    if not torch.is_grad_enabled() or torch._C._get_tracing_state() is not None:
        return
    for node in {tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None}:
        node.register_prehook(forward)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output: one, or in tuples, lists and dicts."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, dict)):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)


def _when_backward_ends(function: Any) -> None:
    """For a hook in the backward pass. An error in ``function`` is raised by ``backward()``."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


@dataclass
class _Forward:
    """A forward pass of an attached pool; called when a backward pass through it begins."""

    pool: weakref.ref[AttachedPool]
    computed: tuple  # Members.computes()
    running: bool = False

    def __call__(self, _: Any) -> None:
        pool = self.pool()
        if self.running or pool is None or pool.is_closed:
            return
        pool.members.come_back(pool.is_open)
        _check_same_adapters(pool, self.computed)
        pool.checks.check_not_cleared()
        self.running = True
        params = pool.members.now_computing()
        before = gradients_now(params)

        def after() -> None:
            self.running = False
            if pool.is_open:
                pool.checks.note_backward()
            elif gradients_now(params) != before:
                raise RuntimeError(
                    f"backward: step {pool.current_step} of the pool has not begun, so this rank's gradients would not be "
                    "exchanged, or be lost: call loss.backward() inside `with pool.step():`, after the forward pass (under "
                    "transformers' Trainer: pass callbacks=[KPoolCallback()] and leave out attach)"
                )

        _when_backward_ends(after)


def gradients_now(params: Iterable[nn.Parameter]) -> list:
    """Something that is equal as long as no gradient of these was written, set or cleared."""
    return [None if p.grad is None else (id(p.grad), p.grad._version) for p in params]


def _check_same_adapters(pool: AttachedPool, computed: tuple) -> None:
    now = pool.members.computes()
    if now == computed:
        return
    (names, _, disabled), (active, _, now_disabled) = computed, now
    states = [
        "no adapter (they are disabled)" if off else ", ".join(n)
        for n, off in ((names, disabled), (active, now_disabled))
    ]
    if states[0] == states[1]:
        states[1] += " with another scaling"
    raise RuntimeError(
        f"backward: the forward pass was computed by {states[0]}, but active is now {states[1]}. Adapters that were "
        "switched off get no gradient, and gradient checkpointing would compute the forward pass again with the others. "
        "Switch back before loss.backward(), and keep the forward and the backward pass of a step in one "
        "`with pool.step():`"
    )


# ---- optimizers ------------------------------------------------------------------------------------------------------

_optimizer_hook: Any = None


def _watch_optimizers() -> None:
    global _optimizer_hook
    if _optimizer_hook is None:
        _optimizer_hook = register_optimizer_step_pre_hook(_before_optimizer_step)


def _before_optimizer_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    for pool in attached_pools():
        pool.checks.before_optimizer_step(optimizer, closure is not None)
    for tuner, unattached in list(_unattached.items()):
        if attached_to(tuner.model) is not None:
            continue
        unattached.stepped |= holds(optimizer, unattached.params)


def holds(optimizer: torch.optim.Optimizer, params: Iterable[nn.Parameter], with_gradient: bool = True) -> bool:
    """Whether the optimizer, as it stands, would step one of these parameters."""
    wanted = {id(p) for p in params if p.grad is not None or not with_gradient}
    return bool(wanted) and any(id(p) in wanted for group in optimizer.param_groups for p in group["params"])


# ---- pools that nobody attached --------------------------------------------------------------------------------------


class _Unattached:
    """A pool that got gradients although nobody attached it; called when a backward pass through it begins."""

    def __init__(self, members: Members):
        self.params = [p for params in members.parameters for p in params]
        self.pool, self.active = members.pool, ", ".join(members.now_active())
        self.stepped = False  # an optimizer has moved it
        self.told = False
        self._running = False

    def __call__(self, _: Any) -> None:
        if self.told or self._running:
            return
        self._running = True
        before = gradients_now(self.params)

        def after() -> None:
            self._running = False
            if not self.told and gradients_now(self.params) != before:
                self.told = True
                _watch_optimizers()
                warn_user(
                    f"the pool {self.pool!r} gets gradients, but is not attached: {self.active} train, and the others "
                    "never do. Call pool = tsugi_kpool.attach(model, optimizer=...) and train inside `with pool.step():`, "
                    "or pass callbacks=[KPoolCallback()] to transformers' Trainer"
                )

        _when_backward_ends(after)


_unattached: weakref.WeakKeyDictionary[PoolTuner, _Unattached] = weakref.WeakKeyDictionary()


class LookForUnattached:
    """A forward hook of the module below a KPOOL tuner. It holds the tuner, so that a copy of the model has its own."""

    def __init__(self, tuner: PoolTuner):
        self.tuner = tuner

    @staticmethod
    def install(tuner: PoolTuner) -> None:
        if not any(isinstance(hook, LookForUnattached) for hook in tuner.model._forward_hooks.values()):
            tuner.model.register_forward_hook(LookForUnattached(tuner))

    @staticmethod
    def remove(module: nn.Module) -> None:
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, LookForUnattached):
                del module._forward_hooks[key]

    def __call__(self, module: nn.Module, _: Any, output: Any) -> None:
        _look_for_unattached(self.tuner, output)


def _look_for_unattached(tuner: PoolTuner, output: Any) -> None:
    """After a forward pass of a KPOOL model: warn at the first backward pass of one that trains unattached."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or attached_to(tuner.model) is not None:
        return
    known = _unattached.get(tuner)
    if known is None:
        if tuner.whole or len(tuner.active_adapters) != 1:
            return
        known = _unattached[tuner] = _Unattached(find_members(tuner, 0))
    if not known.told:
        _on_backward(output, known)


def trained_unattached(tuner: PoolTuner | None) -> bool:
    """Whether an optimizer moved this pool while it was not attached."""
    known = None if tuner is None else _unattached.get(tuner)
    return known is not None and known.told and known.stepped


# ---- what a file would lack ------------------------------------------------------------------------------------------


#: Whether the weights are being read for an export, which has told of held gradients itself.
_exporting: contextvars.ContextVar[bool] = contextvars.ContextVar("exporting", default=False)


@contextlib.contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """Warns as :func:`warn_of_held`, once, however many of PEFT's savers are called inside."""
    warn_of_held(model, "export")
    token = _exporting.set(True)
    try:
        yield
    finally:
        _exporting.reset(token)


def warn_of_held(model: nn.Module, call: str) -> None:
    """Warn where the weights are about to be saved without gradients that the pool holds, and these are saved nowhere."""
    pool = attached_to(watched_module(model))
    if pool is not None and not _exporting.get() and pool.holds_what_is_saved_nowhere():
        warn_user(
            f"{call}: the pool holds gradients of {pool.held} steps that are not in the weights: call pool.flush() before "
            "(and opt.step(), where the optimizer is yours to step), or pool.state_dict() to save them beside"
        )
