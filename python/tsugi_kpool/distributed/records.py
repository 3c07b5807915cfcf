"""What ranks tell each other, as rows of float64: the fields, how they are packed, and what must be the same in all of them.

A record is a header, then a part for each adapter of the pool, whichever are active: so its length never depends on
anything that ranks could disagree about. A FIRE carries a header, the part of the adapter that fires, and its fingerprint.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .agree import named, who_has_what
from .buffers import Moment

__all__ = [
    "Arrival",
    "Fire",
    "Header",
    "Part",
    "Payloads",
    "Record",
    "check_fingerprints",
    "check_headers",
    "header_at",
    "largest",
    "mean_loss",
    "pack_fire",
    "pack_part",
    "pack_record",
    "record_length",
    "unpack_fires",
    "upgraded",
]


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

    @property
    def buffer(self) -> tuple[float, ...]:
        """What src/trigger.rs calls a buffer."""
        return self[: self._fields.index("left_out")]


class Fire(NamedTuple):
    """What one rank tells in a FIRE."""

    header: Header
    part: Part
    fingerprint: float


@dataclass(frozen=True)
class Record:
    """What all ranks told of a step: a row each."""

    step: int
    active: tuple[int, ...]
    rows: list[list[float]]

    @property
    def headers(self) -> list[Header]:
        return [_header_of(row) for row in self.rows]

    def parts(self, adapter: int) -> list[Part]:
        return [_part_of(row, adapter) for row in self.rows]


@dataclass(frozen=True)
class Arrival:
    """What all ranks told in a FIRE, and what it brought."""

    fires: list[Fire]
    body: Tensor  # [numel], the sum over ranks
    finite: bool  # all of it
    waited_ms: float

    @property
    def headers(self) -> list[Header]:
        return [fire.header for fire in self.fires]

    @property
    def parts(self) -> list[Part]:
        return [fire.part for fire in self.fires]

    @property
    def total(self) -> float:
        """The weight of the sum."""
        return math.fsum(part.sent for part in self.parts)


# ---- packing and unpacking -------------------------------------------------------------------------------------------

_HEADER, _PART = len(Header._fields), len(Part._fields)
_FIRE = _HEADER + _PART + 1
_LOSS = slice(Header._fields.index("loss"), Header._fields.index("loss_weight") + 1)


def record_length(adapters: int) -> int:
    return _HEADER + adapters * _PART


def header_at(moment: Moment, *more: Any) -> Header:
    """This rank's header; ``more`` is what else must be alike on all ranks."""
    return Header(
        epoch=float(moment.epoch),
        step=float(moment.step),
        active=float(len(moment.active)),
        digest=_digest(moment.step, moment.active, moment.router, *more),
        scaled=moment.scaled,
        drift_ms=moment.drift_ms,
        loss=moment.loss,
        loss_weight=moment.loss_weight,
    )


def pack_part(**fields: Tensor) -> Tensor:
    """The fields of :class:`Part`, float64 scalars, in its order."""
    return torch.stack([fields[name] for name in Part._fields])


def pack_record(header: Header, parts: Mapping[int, Tensor], adapters: int) -> Tensor:
    """float64 [record_length(adapters)] on the CPU; zeros for adapters without a part."""
    rows = torch.zeros(adapters, _PART, dtype=torch.float64)
    for i, part in parts.items():
        rows[i] = part.cpu()
    return torch.cat((torch.tensor(header, dtype=torch.float64), rows.flatten()))


def pack_fire(header: Header, loss: Tensor, part: Tensor, fingerprint: Tensor) -> Tensor:
    """float64 [length of a FIRE's record] on the part's device; ``loss`` takes the place of the header's, and is not read."""
    row = torch.tensor(header, dtype=torch.float64).to(part.device)
    row[_LOSS] = loss
    return torch.cat((row, part, fingerprint.reshape(1)))


def unpack_fires(codes: Tensor, body: Tensor) -> tuple[list[Fire], bool]:
    """Each rank's record of a FIRE, and whether ``body`` is finite; read from the device in one go.

    Args:
        codes: the bytes of all ranks' records, uint8.
    """
    finite = torch.isfinite(body).all().to(torch.uint8).reshape(1)
    read = torch.cat((codes, finite)).cpu()
    rows = read[:-1].clone().view(torch.float64).view(-1, _FIRE).tolist()
    return [Fire(_header_of(row), _part_of(row, 0), row[-1]) for row in rows], bool(read[-1])


def _header_of(row: Sequence[float]) -> Header:
    return Header(*row[:_HEADER])


def _part_of(row: Sequence[float], slot: int) -> Part:
    """The part of adapter ``slot`` in a record; slot 0 in a FIRE."""
    start = _HEADER + slot * _PART
    return Part(*row[start : start + _PART])


class Payloads:
    """How FIREs travel: room for the longest adapter's sum, then a slot a rank with its record, zeros in all others' slots.

    Each byte of a record is one number of the payload's dtype, which a reduce carries exactly.
    """

    def __init__(self, longest: int, ranks: int, rank: int, dtype: torch.dtype):
        self._longest, self._ranks, self._rank, self._dtype = longest, ranks, rank, dtype

    def pack(self, record: Tensor) -> Tensor:
        """A payload [longest + ranks * bytes of a record] with this rank's record, and zeros for the sum."""
        codes = record.view(torch.uint8)
        payload = torch.zeros(self._longest + self._ranks * codes.numel(), dtype=self._dtype, device=record.device)
        start = self._longest + self._rank * codes.numel()
        payload[start : start + codes.numel()] = codes.to(self._dtype)
        return payload

    def codes(self, payload: Tensor) -> Tensor:
        """The bytes of all ranks' records in a reduced payload, uint8."""
        return payload[self._longest :].round().to(torch.uint8)


# ---- what must be the same -------------------------------------------------------------------------------------------


def _digest(*what: Any) -> float:
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
