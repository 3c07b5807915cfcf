"""What ranks tell each other, as rows of float64: the fields, and what must be the same in all of them.

A record is a header, then a part for each adapter of the pool, whichever are active: so its length never depends on
anything that ranks could disagree about. A FIRE carries a header, the part of the adapter that fires, and its fingerprint.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from .agree import named, who_has_what

__all__ = ["FIRE_LENGTH", "Header", "Part", "check_fingerprints", "check_headers", "digest", "largest", "mean_loss"]


class Header(NamedTuple):
    """Of a step. A drift of NaN means that none is known; ``scaled`` is 1 with a GradScaler's tensor, NaN without data."""

    epoch: float
    step: float
    active: float  # how many adapters
    digest: float  # of the router's choice
    scaled: float
    drift_ms: float
    loss: float  # times its weight
    loss_weight: float


class Part(NamedTuple):
    """Of one adapter: what the statistic needs, the gradients that were not finite, the weight of what is sent."""

    m: float
    n: float
    n2: float
    q: float
    norm2: float
    left_out: float
    sent: float


FIRE_LENGTH = len(Header._fields) + len(Part._fields) + 1

_LOSS = slice(Header._fields.index("loss"), Header._fields.index("loss_weight") + 1)


def record_length(adapters: int) -> int:
    return len(Header._fields) + adapters * len(Part._fields)


def header_of(row: Sequence[float]) -> Header:
    return Header(*row[: len(Header._fields)])


def part_of(row: Sequence[float], slot: int = 0) -> Part:
    """The part of adapter ``slot`` in a record; slot 0 in a FIRE."""
    start = len(Header._fields) + slot * len(Part._fields)
    return Part(*row[start : start + len(Part._fields)])


def digest(*what: Any) -> float:
    """48 bits, which a float64 holds exactly."""
    return float(int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=6).digest(), "little"))


def largest(values: Iterable[float]) -> float | None:
    return max((v for v in values if not math.isnan(v)), default=None)


def mean_loss(headers: Sequence[Header]) -> float | None:
    weight = math.fsum(h.loss_weight for h in headers)
    return math.fsum(h.loss for h in headers) / weight if weight > 0 else None


_MUST_AGREE = {
    "epoch": "were restarted from different states",
    "step": "are at different steps",
    "active": "have different numbers of active adapters",
    "digest": "chose different adapters",
    "scaled": "do not all give found_inf as a tensor (1: with one; give the GradScaler's on every rank that has data)",
}


def check_headers(headers: Sequence[Header], names: Sequence[int]) -> str | None:
    """What is wrong, in a sentence; every rank has the same headers and so says the same."""
    for field, wrong in _MUST_AGREE.items():
        values = [getattr(h, field) for h in headers]
        known = [v for v in values if not math.isnan(v)]
        if any(v != known[0] for v in known):
            each = who_has_what(["no data" if math.isnan(v) else f"{v:.0f}" for v in values], names)
            return f"the ranks {wrong}: {field}: {each}"
    return None


def check_fingerprints(values: Sequence[float], names: Sequence[int], adapter: int, step: int) -> str | None:
    """What is wrong, in a sentence, where ranks had different parameters before a FIRE."""
    (most, count), *others = Counter(values).most_common()
    if not others:
        return None
    if 2 * count > len(values):
        odd = [name for name, value in zip(names, values) if value != most]
        who = f"{named(odd)} {'has' if len(odd) == 1 else 'have'} other parameters than the other {count}"
    else:  # nobody can say who is right
        each = who_has_what([f"{int(v):012x}" for v in values], names)
        who = f"{each} as fingerprints of its parameters"
    return (
        f"adapter {adapter} is not the same on all ranks, as its FIRE of step {step} shows: {who}. Something else than the "
        "pool's steps changed it there: an edit by hand, an optimizer that is stepped otherwise (another learning rate), "
        "code that differs, or hardware that fails. Nothing of this FIRE was applied"
    )


def upgraded(rows: Sequence[Sequence[float]], active: Sequence[int], adapters: int) -> list[list[float]]:
    """Rows of a record as saved by version 1 of the state, (6 + 6 K fields), in today's fields; others as they are."""
    current = []
    for row in rows:
        if len(row) == 6 + 6 * len(active) != record_length(adapters):
            epoch, step, choice, drift_ms, loss, loss_weight = row[:6]
            fields = [epoch, step, float(len(active)), choice, math.nan, drift_ms, loss, loss_weight]
            parts = [[0.0] * len(Part._fields) for _ in range(adapters)]
            for k, i in enumerate(active):
                m, n, n2, q, norm2, sent = row[6 + 6 * k : 12 + 6 * k]
                parts[i] = [m, n, n2, q, norm2, 0.0, sent]
            row = fields + [value for part in parts for value in part]
        current.append(list(row))
    return current
