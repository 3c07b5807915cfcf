"""Under ``Trainer``, ``model.eval()`` activates the whole pool, which is what is exported, and ``train()`` the K adapters again.

``Trainer`` tells a callback when an evaluation has ended, but not when one begins. What it always does is ``model.eval()``
before an evaluation, and ``model.train()`` before a training step.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..distributed.wrapping import unwrap
from .config import KPoolLoraConfig
from .members import find_members, find_tuner
from .registry import find_pool

__all__ = ["end_evaluation", "evaluate_active", "evaluate_whole"]


class _Train:
    """Stands in the place of ``model.train``. It belongs to the model, so that a copy of the model has its own."""

    def __init__(self, model: nn.Module, config: KPoolLoraConfig | None):
        self.model, self.config = model, config
        self.shown: str | None = None  # the pool that ``eval()`` activated whole

    def __call__(self, mode: bool = True) -> nn.Module:
        type(self.model).train(self.model, mode)
        if mode:
            self.end()
        else:
            self.begin()
        return self.model

    def begin(self) -> None:
        attached = find_pool(self.model)
        if self.shown is not None or (attached is not None and attached.is_open):
            return  # inside a step, eval() is about dropout
        tuner = find_tuner(self.model)
        if tuner is not None and len(tuner.active_adapters) != 1:
            return
        config: Any = self.config if tuner is None else tuner.peft_config[tuner.active_pool]
        members = find_members(self.model, config.n_adapters)
        if not members.whole:
            members.begin_whole(config.k_active / config.n_adapters)
            self.shown = members.pool

    def end(self) -> None:
        shown, self.shown = self.shown, None
        tuner = find_tuner(self.model) if shown is not None else None
        if shown is None or (tuner is not None and shown not in tuner.peft_config):
            return
        n = 0 if tuner is not None or self.config is None else self.config.n_adapters
        members = find_members(self.model, n, shown)
        if members.shows_whole:
            members.end_whole()


def evaluate_whole(model: nn.Module, config: KPoolLoraConfig | None) -> None:
    """Let ``eval()`` activate the whole pool of this model from now on; ``config`` is that of a pool by hand."""
    inner = unwrap(model)
    if not isinstance(inner.__dict__.get("train"), _Train):
        train = _Train(inner, config)
        inner.__dict__["train"] = train
        if not inner.training:
            train.begin()


def evaluate_active(model: nn.Module) -> None:
    """Take back :func:`evaluate_whole`."""
    inner = unwrap(model)
    end_evaluation(inner)
    if isinstance(inner.__dict__.get("train"), _Train):
        del inner.__dict__["train"]


def end_evaluation(model: nn.Module | None) -> None:
    """Activate what was active before ``eval()``, where :func:`evaluate_whole` is on: a step begins."""
    train: Any = None if model is None else model.__dict__.get("train")
    if isinstance(train, _Train):
        train.end()
