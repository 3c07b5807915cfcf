"""Aggregation of the active adapters' gradients across ranks, over torch.distributed.

In this version every step aggregates (``aggregation_mode="synchronous"``): the weighted mean over ranks, as data
parallelism computes it. With one process nothing is communicated and gradients stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

__all__ = ["AggregationDecision", "Aggregator", "recommend_buffer_convergence_eps"]


class AggregationDecision(NamedTuple):
    """What was decided for one adapter after a step.

    ``variance`` is that of the snapshots in its buffer, infinite where there are fewer than two.
    """

    adapter_idx: int
    fired: bool
    variance: float
    reason: str


class Aggregator:
    """Turns the gradients of a step into those that the optimizer applies.

    Args:
        adapters: the parameters of each adapter, in one order that is the same on all ranks.
        config: a :class:`tsugi_kpool.KPoolLoraConfig`.
        group: the process group; None: all processes, or none where torch.distributed is not initialised.
        router_digest: 64 bits of the router's state at a step, which must agree on all ranks.
    """

    def __init__(
        self,
        adapters: Sequence[Sequence[Parameter]],
        config,
        *,
        group: dist.ProcessGroup | None = None,
        router_digest: Callable[[int], int],
    ):
        if config.aggregation_mode != "synchronous":
            raise ValueError(
                f"aggregation_mode is {config.aggregation_mode!r}, and this version aggregates in every step: set it to "
                "'synchronous' (holding gradients back comes with a later one)"
            )
        self._adapters = adapters
        self._group = group
        self._router_digest = router_digest
        self.world_size = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1

    def after_backward(self, step: int, active: Sequence[int], weight: float = 1.0) -> list[AggregationDecision]:
        """The mean over ranks, weighted by ``weight`` (tokens or samples), into ``.grad`` of the active adapters.

        A parameter that got no gradient on any rank keeps None; one that got one on some counts as zero on the others.

        Raises:
            RuntimeError: where a rank's router differs, on every rank.
        """
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight is {weight!r}, expected a finite number above 0")
        if self.world_size > 1:
            self._reduce(step, [p for index in active for p in self._adapters[index]], weight)
        return [AggregationDecision(index, True, math.inf, "fire") for index in active]

    def agreed(self, loss: float | Tensor) -> float:
        """The mean of a loss over ranks, the same bits on each."""
        if self.world_size == 1:
            return float(loss)
        # On the parameters' device: that is where the group's backend communicates.
        mean = torch.as_tensor(loss, dtype=torch.float64, device=self._adapters[0][0].device).clone()
        dist.all_reduce(mean, group=self._group)
        return mean.item() / self.world_size

    def _reduce(self, step: int, parameters: list[Parameter], weight: float) -> None:
        device = parameters[0].device
        digest = self._router_digest(step)
        # Halves, because gloo and nccl have signed integers.
        mine = torch.tensor([digest & 0xFFFFFFFF, digest >> 32, step], device=device)
        everyone = mine.new_empty(self.world_size, 3)
        dist.all_gather_into_tensor(everyone, mine, group=self._group)
        if not (everyone == everyone[0]).all():
            steps = everyone[:, 2].tolist()
            raise RuntimeError(
                f"the ranks disagree on which adapters are active (steps {steps}, router states differ): every rank needs "
                "the same configuration, the same step and the same recorded losses"
            )
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([piece.flatten().float() * weight for piece in pieces])
        has = torch.tensor([float(p.grad is not None) for p in parameters] + [weight], device=device)
        flat = torch.cat([flat, has])
        dist.all_reduce(flat, group=self._group)
        total = flat[-1]
        counts = flat[-1 - len(parameters) : -1].tolist()
        sums = flat[: -1 - len(parameters)].split([p.numel() for p in parameters])
        for parameter, sum_, count in zip(parameters, sums, counts):
            parameter.grad = (sum_ / total).view_as(parameter).to(parameter.dtype) if count else None


def recommend_buffer_convergence_eps(samples: Iterable[float], *, quantile: float = 0.5, floor: float = 1e-12) -> float:
    """A ``buffer_convergence_eps`` from logged variances: their ``quantile``, interpolated linearly, at least ``floor``.

    Samples that are not finite are left out; without any left the answer is ``floor``.

    Raises:
        ValueError: where ``quantile`` is outside [0, 1] or ``floor`` is not a finite number above 0.
    """
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile is {quantile!r}, expected a number from 0 to 1")
    if not (math.isfinite(floor) and floor > 0.0):
        raise ValueError(f"floor is {floor!r}, expected a finite number above 0")
    finite = [value for value in map(float, samples) if math.isfinite(value)]
    return max(float(numpy.quantile(finite, quantile)), floor) if finite else floor
