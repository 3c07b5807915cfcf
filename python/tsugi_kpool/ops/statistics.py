"""The scalars of an adapter's elastic buffer, by name, in the order of the float64 tensors that the operations take and give."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["LENGTH", "Kept", "Seen"]

LENGTH = 8  # of either tensor


class Kept(NamedTuple):
    """What ``sideband_accumulate_`` keeps in ``stats``; the rest of it is room. The fields are views of it."""

    m: Tensor  # snapshots
    n: Tensor  # sum of weights
    n2: Tensor  # of squared weights
    q: Tensor  # of w ||g||^2
    nonfinite: Tensor  # snapshots that were left out

    @classmethod
    def of(cls, stats: Tensor) -> Kept:
        return cls(*stats[: len(cls._fields)])


class Seen(NamedTuple):
    """What ``sideband_stats`` returns."""

    m: Tensor
    n: Tensor
    q: Tensor
    norm2: Tensor  # ||S||^2
    variance: Tensor  # V
    power: Tensor  # P
    numel: Tensor
    nonfinite: Tensor

    @classmethod
    def of(cls, seen: Tensor) -> Seen:
        return cls(*seen)
