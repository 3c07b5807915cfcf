"""A step is all or nothing: an exception at any line of it loses no gradient and applies none twice.

Gradients are small whole numbers and SGD steps at rate 1 with ``lr_scaling="linear"``, so that what was applied and what is
held add up to what went in, and a gradient that is lost or applied twice shows.
"""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys

import pytest
import torch
from torch import nn

import tsugi_kpool.distributed
from sync_worker import config
from tsugi_kpool.distributed.aggregator import Aggregator
from tsugi_kpool.distributed.buffers import all_or_nothing
from tsugi_kpool.distributed.stepping import learning_rates, restorer, step_optimizer

NUMEL, COUNT, STEPS = 3, 3, 6
TRACED = 3  # the first steps only fill the buffers
# Every line with TSUGI_LONG=1. Else every 17th, which is another one in each step, since the lines of a step are more.
EVERY = 1 if os.environ.get("TSUGI_LONG") == "1" else 17
NAMES = ("aggregator", "agreement", "buffers", "exchanges", "holding", "nonfinite", "records", "stepping")
FILES = {tsugi_kpool.distributed.__file__.replace("__init__", name) for name in NAMES}


class Injected(BaseException):
    """As KeyboardInterrupt, which no handler of ours may take for its own."""


class Injector:
    """Raises at the ``at``-th line of the files; counts lines where ``at`` is None."""

    def __init__(self, at: int | None):
        self.at, self.seen = at, 0

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                raise Injected
        return self

    def __enter__(self):
        sys.settrace(self)

    def __exit__(self, *_):
        sys.settrace(None)


def gradient(step: int, i: int) -> torch.Tensor:
    return torch.arange(1.0, 1 + NUMEL) * (1 + step % 3) + i


def active(step: int) -> tuple[int, int]:
    return step % COUNT, (step + 1) % COUNT


class Run:
    def __init__(self, fields: dict, params=None, state=None):
        self.fields = {"lr_scaling": "linear", "buffer_capacity": 3, **fields}
        self.params = params or [nn.Parameter(torch.zeros(NUMEL)) for _ in range(COUNT)]
        self.optimizer = torch.optim.SGD(self.params, lr=1.0)
        self.aggregator = Aggregator([[p] for p in self.params], config(**self.fields), optimizer=self.optimizer)
        if state is not None:
            self.aggregator.load_state_dict(state)

    def step(self, step: int) -> None:
        self.aggregator.before_step(step, active(step))
        for i in active(step):
            self.params[i].grad = gradient(step, i)
        self.aggregator.after_backward(step, active(step))

    def entered(self, i: int) -> torch.Tensor:
        """What went in, by the steps that are done."""
        return sum((gradient(s, i) for s in range(self.aggregator.step + 1) if i in active(s)), torch.zeros(NUMEL))

    def check(self) -> None:
        for i, p in enumerate(self.params):
            a = self.aggregator._adapters[i]
            applied, held = -p.detach(), a.flat
            if self.fields.get("hold_action") == "local":
                torch.testing.assert_close(applied, self.entered(i), rtol=0, atol=1e-3)
            else:
                torch.testing.assert_close(applied + held, self.entered(i), rtol=0, atol=1e-3)
            assert a.stats[0] == a.held
        assert self.optimizer.param_groups[0]["lr"] == 1.0 and len(self.optimizer.param_groups[0]["params"]) == COUNT


MODES = {
    "planned": {"trigger": "noise_scale"},
    "stepwise": {"buffer_convergence_eps": 20.0},
    "at once": {"buffer_convergence_eps": 20.0, "decision_delay": 0},
    "local": {"hold_action": "local"},
}


@pytest.mark.parametrize("name", MODES)
def test_an_exception_at_any_line_loses_no_gradient_and_applies_none_twice(name):
    whole = Run(MODES[name])
    lines = Injector(None)
    for step in range(STEPS):
        with lines if step >= TRACED else contextlib.nullcontext():
            whole.step(step)
    with lines:
        whole.aggregator.flush()
    whole.check()
    assert whole.aggregator.held == [0] * COUNT and lines.seen > 300
    for at in range(1, lines.seen, EVERY):
        run = Run(MODES[name])
        for step in range(TRACED):
            run.step(step)
        with pytest.raises(Injected), Injector(at):
            for step in range(TRACED, STEPS):
                run.step(step)
            step = STEPS
            run.aggregator.flush()
        assert run.aggregator.step in (step - 1, step)
        run.check()
        # It goes on, from the state or from where it is, to where it would have been.
        run = Run(MODES[name], run.params, run.aggregator.state_dict(finish=False)) if at % 2 else run
        run.check()
        for step in range(run.aggregator.step + 1, STEPS):
            run.step(step)
        run.aggregator.flush()
        run.check()
        for p, q in zip(run.params, whole.params):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-3)


def test_an_exception_at_any_line_of_a_step_of_adam_leaves_its_state_as_it_was():
    """Where m steps count as one, Adam's own count of steps is changed before the step and after it."""

    def started():
        params = [nn.Parameter(torch.ones(NUMEL)), nn.Parameter(torch.ones(NUMEL))]
        optimizer = torch.optim.AdamW([{"params": params}, {"params": [nn.Parameter(torch.ones(1))]}])
        for p in params:
            p.grad = torch.ones(NUMEL)
        optimizer.step()
        return params, optimizer

    def step(params, optimizer):
        for p in params:
            p.grad = torch.arange(1.0, 1 + NUMEL)
        undo = [restorer(optimizer, params)]
        with all_or_nothing(undo=undo):
            step_optimizer(optimizer, params[:1], learning_rates(optimizer), 2.0, steps=4)

    counted = Injector(None)
    with counted:
        step(*started())
    assert counted.seen > 30
    for at in range(1, counted.seen + 1):
        params, optimizer = started()
        before = copy.deepcopy((params, optimizer.state_dict()))
        with pytest.raises(Injected), Injector(at):
            step(params, optimizer)
            raise Injected  # where `at` was behind the step
        done = not torch.equal(params[0], before[0][0])
        whole_params, whole = started()
        if done:
            step(whole_params, whole)
        assert all(torch.equal(p, q) for p, q in zip(params, whole_params)), at
        assert str(optimizer.state_dict()) == str(whole.state_dict()), at


def test_a_second_ctrl_c_does_not_tear_what_is_put_back_after_the_first():
    class Thing:
        value = ""

    thing, put_back = Thing(), []
    thing.value = "before"

    def pressed_again():
        os.kill(os.getpid(), signal.SIGINT)
        put_back.append("first")

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            with all_or_nothing(thing, undo=[pressed_again, lambda: put_back.append("second")]):
                thing.value = "torn"
                raise KeyError
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert thing.value == "before" and put_back == ["first", "second"]


def raising(*_):
    raise RuntimeError("of the user")


@pytest.mark.parametrize("what", ["router_digest", "drift_ms", "on_agreed_loss", "optimizer hook", "diagnostics"])
def test_what_others_raise_tears_no_step(what):
    run = Run({"trigger": "noise_scale"})
    for step in range(3):
        run.step(step)
    undo = None
    if what == "router_digest":
        run.aggregator._router_digest, undo = raising, lambda: setattr(run.aggregator, "_router_digest", lambda step: 0)
    elif what == "drift_ms":
        run.aggregator._drift_ms, undo = raising, lambda: setattr(run.aggregator, "_drift_ms", lambda: None)
    elif what == "on_agreed_loss":
        run.aggregator.on_agreed_loss = raising
        run.aggregator._losses = [(2, (0,), 1.0)]
    elif what == "optimizer hook":
        undo = run.optimizer.register_step_post_hook(raising).remove
    else:
        run.aggregator._diagnostics = type("Broken", (), {"write": raising, "close": lambda self: None})()
        with pytest.warns(UserWarning, match="diagnostics.write raised RuntimeError"):
            run.step(3)
    if what != "diagnostics":
        with pytest.raises(RuntimeError, match="of the user"):
            for step in range(3, 6):
                run.step(step)
    run.check()
    if undo is not None:
        undo()
    for step in range(run.aggregator.step + 1, STEPS):
        run.step(step)
    run.aggregator.flush()
    run.check()
    assert run.aggregator.held == [0] * COUNT
