"""What becomes of the active adapters' gradients: one process, every step fires."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["AggregationDecision", "Aggregator"]


class AggregationDecision(NamedTuple):
    """What was decided about one adapter in one step."""

    adapter_idx: int
    fired: bool  # whether .grad is to be stepped on
    variance: float
    reason: str  # "fire", "empty_buffer"


class Aggregator:
    """Decides, for each adapter that was active in a step, whether its gradient is stepped on.

    Args:
        adapters: all A and B parameters of each adapter, in one fixed order.
        config: anything with the fields of ``KPoolLoraConfig``.
    """

    def __init__(
        self,
        adapters: Sequence[Sequence[nn.Parameter]],
        config: Any,
        *,
        group: Any = None,
        optimizer: Any = None,
        max_grad_norm: float | None = None,
        router_digest: Callable[[int], int] | None = None,
        drift_ms: Callable[[], float | None] | None = None,
        diagnostics: Any = None,
    ):
        if config.aggregation_mode != "synchronous":
            raise ValueError(f"aggregation_mode is {config.aggregation_mode!r}, expected 'synchronous'")
        self.adapters = adapters
        self.on_agreed_loss: Callable[[int, Sequence[int], float], None] | None = None

    def before_step(self, step: int, active: Sequence[int]) -> None:
        """Finish what is in flight for these adapters."""

    def after_backward(
        self,
        step: int,
        active: Sequence[int],
        *,
        weight: float = 1.0,
        loss: float | Tensor | None = None,
        found_inf: bool = False,
    ) -> list[AggregationDecision]:
        """Leave in ``.grad`` what the optimizer shall step on, or None."""
        if loss is not None and self.on_agreed_loss is not None:
            self.on_agreed_loss(step, active, float(loss))
        decisions = []
        for i in active:
            fired = any(parameter.grad is not None for parameter in self.adapters[i])
            decisions.append(AggregationDecision(i, fired, 0.0, "fire" if fired else "empty_buffer"))
        return decisions

    def flush(self) -> list[AggregationDecision]:
        """Fire what is held: nothing."""
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"the state holds {sorted(state)}, expected that of aggregation_mode='synchronous'")

    def close(self) -> None:
        pass
