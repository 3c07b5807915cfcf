"""What a configuration asks for, given the optimizer and the ranks there are; what does not fit together, and what is made of it."""

from __future__ import annotations

from typing import Any, cast

import torch

from ..warn import warn_user
from .agreement import Agreement, Planned, Stepwise, StepwiseAtOnce, Synchronous
from .exchanges import Exchanges
from .holding import Defer, Discard, HoldAction, Local
from .stepping import SCALINGS, Awaited, Overlapped

__all__ = ["Modes"]


class Modes:
    """The names of how gradients are agreed on, held and applied. ``alone``: there is nobody to exchange with, and no HOLD.

    Args:
        config, optimizer, max_grad_norm: as the aggregator's.
    """

    def __init__(self, config: Any, optimizer: torch.optim.Optimizer | None, max_grad_norm: float | None, ranks: int):
        self._config, self._optimizer, self._max_grad_norm = config, optimizer, max_grad_norm
        synchronous = config.aggregation_mode == "synchronous"
        decided = config.agreement or ("stepwise" if config.trigger == "variance" else "planned")
        self._agreement = "synchronous" if synchronous else decided
        self._hold_action = "defer" if synchronous else config.hold_action
        self._lr_scaling = "none"  # until it is checked
        # The gradient of several steps is applied in one.
        self._defers = self._hold_action == "defer" and not synchronous
        self.alone = synchronous and ranks == 1
        # What is stepped here, when a FIRE has landed.
        self._stepped = optimizer if config.overlap and not self.alone else None

    def check(self) -> None:
        """ValueError where this rank's arguments do not fit together; warns of a choice that is not known to be good."""
        if self._max_grad_norm is not None and not self._max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self._max_grad_norm}, not above 0")
        if self._hold_action == "local" and self._optimizer is None:
            raise ValueError("hold_action is 'local', which steps the optimizer during HOLD: pass optimizer=")
        self._lr_scaling = self._checked_scaling(self._config.lr_scaling)

    def _checked_scaling(self, asked: str | None) -> str:
        known = isinstance(self._stepped, torch.optim.Adam)  # AdamW is one
        kind = type(self._stepped).__name__
        if asked == "adam" and self._defers and not known:
            what = "there is none to step" if self._stepped is None else f"this is a {kind}"
            raise ValueError(
                f"lr_scaling is 'adam', which sets the betas of a torch.optim.Adam or AdamW, but {what}: pass such an "
                "optimizer= with overlap, or choose 'linear', 'sqrt' or 'none'"
            )
        if asked is None and self._stepped is not None and self._defers and not known:
            if any("betas" in group for group in self._stepped.param_groups):
                warn_user(
                    f"lr_scaling is 'linear' for a {kind}: the recommended 'adam' is known for "
                    "torch.optim.Adam and AdamW only. An Adam takes steps of its rate whatever the gradient's size, so m "
                    "held steps then go up to sqrt(m) times too far: set lr_scaling='sqrt', or 'linear' if that is meant"
                )
        return asked or ("adam" if known else "linear")

    def warn_of_unscaled(self) -> None:
        """Warn where lr_scaling is left to a caller who may not know of it."""
        if self._defers and self._stepped is None and self._lr_scaling != "none":
            warn_user(
                f"lr_scaling is {self._lr_scaling!r}, but the optimizer is yours to step here: a gradient of m held "
                "steps is applied with the rate of one; use lr_factors, or pass optimizer= with overlap"
            )

    def agreement(self, exchanges: Exchanges, adapters: int) -> Agreement:
        if self._agreement == "synchronous":
            return Synchronous(self._config)
        if self._agreement == "planned":
            return Planned(self._config)
        stepwise = {0: StepwiseAtOnce, 1: Stepwise}[self._config.decision_delay]
        return stepwise(self._config, exchanges, adapters)

    def delivery(self) -> Awaited:
        if self._stepped is None:
            return Awaited(self._max_grad_norm)
        return Overlapped(self._stepped, self._max_grad_norm)

    def hold_action(self, delivery: Awaited) -> HoldAction:
        if self._hold_action == "local":
            return Local(cast(torch.optim.Optimizer, self._optimizer), self._max_grad_norm)  # there is one: checked
        if self._hold_action == "discard":
            return Discard(delivery, SCALINGS["none"])
        return Defer(delivery, SCALINGS[self._lr_scaling if self._defers else "none"])
