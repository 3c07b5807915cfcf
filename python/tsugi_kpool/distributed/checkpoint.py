"""An aggregator's part of a pool's state: what is saved of an adapter, whether states fit, and how an adapter goes on from them.

state.py says what a state looks like, and has checked each for itself. Here states are held against each other, and against
the aggregator that is to go on from them. Nothing is changed before all ranks have said that theirs fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import state as state_
from .buffers import Agreed, Buffered, Flight, Landed, Trend
from .nonfinite import NonFinite
from .ranks import Ranks
from .records import record_length, upgraded

__all__ = ["Kind", "Resumed", "compared", "fitting", "put_back", "rates_on", "saved_adapter"]

#: What of an adapter's state each rank has for itself, or what is no attribute that is put back as it was.
_OTHERS = {"numel", "sum", "stats", "loss", "anchor", "flight"}
#: The rest is an attribute that all ranks have alike.
_ALIKE = tuple(name for name in state_.ADAPTER_FIELDS if name not in _OTHERS)
_TUPLES = {"trend": Trend, "agreed": Agreed, "landed": Landed}
#: What all ranks have alike of a state beside its adapters, as far as it is compared.
_COMMON = ("world_size", "hold_action", "agreement", "epoch")


@dataclass(frozen=True)
class Kind:
    """What a state has to fit: the ranks, the modes by name, and how many parameter groups there are to step, if any."""

    world_size: int
    rank: int
    hold_action: str
    agreement: str
    groups: int | None


@dataclass
class Buffers:
    """One adapter's part of a state to continue from."""

    flat: Tensor  # S: float32 [numel]
    stats: Tensor  # float64 [8]
    loss: Tensor  # float64 [2]


@dataclass
class Resumed:
    """A state to continue from, checked: ``head`` has what is alike on all ranks."""

    head: dict[str, Any]
    pending: list[Any] | None  # the record that was on its way
    buffers: list[Buffers]  # of each adapter

    @property
    def step(self) -> int:
        return self.head["step"]


class _Answer(NamedTuple):
    """What a rank says of its state; ``step`` is None where it refuses it."""

    problem: str
    step: int | None  # that comes next
    alike: str | None  # a checksum
    has_pending: bool


# ---- saving ----------------------------------------------------------------------------------------------------------


def saved_adapter(a: Buffered, with_flight: bool) -> dict[str, Any]:
    """Everything of an adapter, on the CPU; what is in flight only where it can be sent again."""
    return {
        "numel": a.numel,
        "sum": a.flat.cpu().clone() if a.held else None,
        "stats": a.stats.cpu().clone(),
        "loss": a.loss.cpu().clone(),
        "anchor": None if a.anchor is None else a.anchor.cpu().clone(),
        "flight": _saved_flight(a.flight) if with_flight and a.flight is not None else None,
        **{name: _plain(getattr(a, name)) for name in _ALIKE},
    }


def _saved_flight(flight: Flight) -> dict[str, Any]:
    return {
        "step": flight.moment.step,
        "active": list(flight.moment.active),
        "decision": list(flight.decision),
        "rates": [lr.detach().cpu().clone() if isinstance(lr, Tensor) else lr for lr in flight.rates],
    }


def _plain(value: Any) -> Any:
    """A named tuple as a plain one: a file of states holds no class."""
    return tuple(value) if isinstance(value, tuple) else value


# ---- whether states fit ----------------------------------------------------------------------------------------------


def compared(ranks: Ranks, read: Callable[[], Resumed]) -> Resumed:
    """What ``read`` returns, once all ranks have one of the same moment.

    Raises:
        ValueError: what ``read`` raised; or another rank refused its state, or has one of another moment.
        SyncError: the ranks could not compare their states.
    """
    try:
        resumed = read()
        answer = _Answer("", resumed.step + 1, _checksum(resumed), resumed.pending is not None)
    except Exception as error:
        _everyones(ranks, _Answer(str(error), None, None, False))
        raise
    everyone = _everyones(ranks, answer)
    steps = {}
    for rank, each in zip(ranks.names, everyone):
        if each.step is None:
            raise ValueError(f"rank {rank} refused its state, so no rank loaded any: {each.problem}")
        steps[rank] = each.step
    state_.moment(steps)
    if len({each.alike for each in everyone}) > 1:
        raise ValueError(
            f"the ranks' states are all of step {resumed.step + 1}, but not of one moment: an exchange had landed on some "
            "ranks alone. Nothing was loaded: use an earlier checkpoint"
        )
    if not all(each.has_pending for each in everyone):
        resumed.pending = None  # a record counts on all ranks or on none
    return resumed


def _everyones(ranks: Ranks, answer: _Answer) -> list[_Answer]:
    return [_Answer(*each) for each in ranks.gather_objects("compare the states to load", tuple(answer))]


def _checksum(resumed: Resumed) -> str:
    """A checksum of what must be alike on all ranks."""
    head = resumed.head
    common = {name: head[name] for name in (*_COMMON, "agreed_losses")}
    adapters = [{name: entry[name] for name in ("flight", *_ALIKE)} for entry in head["adapters"]]
    return state_.checksum({**common, "adapters": adapters})


def fitting(states: list[dict[str, Any]], kind: Kind, adapters: Sequence[Buffered]) -> Resumed:
    """What these states add up to for this rank; ValueError where they do not fit it or each other."""
    head, size = states[0], states[0]["world_size"]
    _check_complete(states, kind)
    state_.moment({s["rank"]: s["step"] + 1 for s in states})
    _check_fit(head, kind, adapters)
    _check_alike(states)
    if len(states) == 1 or size == kind.world_size:
        mine = [s for s in states if s["rank"] == kind.rank]  # none on a rank that did not exist then
    else:
        mine = states[kind.rank :: kind.world_size]
    pending = head["pending"] if size == kind.world_size and all(s["pending"] is not None for s in states) else None
    return Resumed(head, pending, [_added_up(a, [s["adapters"][a.index] for s in mine]) for a in adapters])


def _check_complete(states: list[dict[str, Any]], kind: Kind) -> None:
    head, size = states[0], states[0]["world_size"]
    ranks = [s["rank"] for s in states]
    if len(states) == 1 < size and (size, head["rank"]) != (kind.world_size, kind.rank):
        raise ValueError(
            f"state is of rank {head['rank']} of {size}, but this is rank {kind.rank} of {kind.world_size}, "
            f"and there are the ranks {ranks}, not 0 to {size - 1}: pass the list of all ranks' states (pool.load takes "
            "their folder). Where one file is written for all ranks, save "
            "pool.state_dict(all_ranks=True) in it"
        )
    if len(states) > 1 and ranks != list(range(size)):
        raise ValueError(f"state has the ranks {ranks}, not 0 to {size - 1} in order")


def _check_alike(states: list[dict[str, Any]]) -> None:
    head = states[0]
    for s in states:
        for name in _COMMON:
            if s[name] != head[name]:
                raise ValueError(f"state has ranks that differ in {name}: {[each[name] for each in states]}")
        for i, (entry, first) in enumerate(zip(s["adapters"], head["adapters"])):
            for name in ("numel", *_ALIKE):
                if state_.checksum({name: entry[name]}) != state_.checksum({name: first[name]}):  # NaN is not NaN
                    raise ValueError(
                        f"state has ranks that differ in adapters[{i}].{name}: rank {s['rank']} has {entry[name]}, rank "
                        f"{head['rank']} {first[name]}. They are not of one moment: use an earlier checkpoint"
                    )


def _check_fit(head: dict[str, Any], kind: Kind, adapters: Sequence[Buffered]) -> None:
    """ValueError if a state is of another kind of pool than this."""
    numels, own = [e["numel"] for e in head["adapters"]], [a.numel for a in adapters]
    if numels != own:
        raise ValueError(f"state has adapters of {numels} elements, but this pool's have {own}: {state_.OTHER_POOL}")
    for name, here in (("hold_action", kind.hold_action), ("agreement", kind.agreement)):
        if head[name] not in (None, here):
            raise ValueError(f"state was made with {name}={head[name]!r}, but this is {here!r}: {state_.OTHER_POOL}")
    for a, entry in zip(adapters, head["adapters"]):
        _check_adapter_fits(a, entry, kind, head["world_size"])
    if head["pending"] is not None:
        _, active, rows = head["pending"]
        if any(len(row) != record_length(len(adapters)) for row in upgraded(rows, active, len(adapters))):
            raise ValueError(
                f"state's pending has rows that are no records of {len(active)} adapters: {state_.DAMAGED}"
            )


def _check_adapter_fits(a: Buffered, entry: dict[str, Any], kind: Kind, world_size: int) -> None:
    name = f"state's adapters[{a.index}]"
    if (entry["anchor"] is None) != (a.anchor is None):
        raise ValueError(f"{name}.anchor is there with hold_action='local' alone: {state_.DAMAGED}")
    if kind.agreement == "planned" and not entry["planned"]:
        raise ValueError(f"{name}.planned is 0, but this pool plans its windows: {state_.OTHER_POOL}")
    if entry["flight"] is not None and kind.groups is not None:
        rates = len(entry["flight"]["rates"])
        if rates != kind.groups:
            raise ValueError(
                f"{name}.flight has the learning rates of {rates} parameter groups, but this optimizer has {kind.groups}: "
                f"{state_.OTHER_POOL}"
            )
    if world_size != kind.world_size and kind.hold_action == "local" and entry["held"]:
        raise ValueError(
            f"state holds {entry['held']} local steps of adapter {a.index}, which another number of ranks cannot share: "
            "flush before saving"
        )


def _added_up(a: Buffered, entries: list[dict[str, Any]]) -> Buffers:
    """The adapter's buffers in these ranks' states, on its device."""
    added = Buffers(torch.zeros_like(a.flat), torch.zeros_like(a.stats), torch.zeros_like(a.loss))
    for entry in entries:
        if entry["sum"] is not None:
            added.flat += entry["sum"].to(a.device)
        added.stats += entry["stats"].to(a.device)
        added.loss += entry["loss"].to(a.device)
    return added


# ---- going on --------------------------------------------------------------------------------------------------------


def put_back(a: Buffered, entry: dict[str, Any], buffers: Buffers, capacity: int, nonfinite: NonFinite) -> None:
    """Everything of an adapter but what was in flight."""
    ranks = len(a.rows_without_finite)
    a.flight = a.current = None
    a.flat.copy_(buffers.flat)
    a.stats.copy_(buffers.stats)
    a.loss.copy_(buffers.loss)
    for name in _ALIKE:
        value = entry[name]
        setattr(a, name, value if value is None or name not in _TUPLES else _TUPLES[name](*value))
    a.bound, a.planned, a.wanted = (min(length, capacity) for length in (a.bound, a.planned, a.wanted))
    rows = entry["rows_without_finite"]
    fits = rows is not None and len(rows) == ranks  # else it was not saved, or is of other ranks
    nonfinite.put_rows(a, list(rows) if fits else [0] * ranks)
    if a.anchor is not None:
        a.anchor.copy_(entry["anchor"])


def rates_on(rates: Sequence[float | Tensor], now: Sequence[float | Tensor]) -> list[float | Tensor]:
    """Saved learning rates, those that are tensors where the optimizer has its own."""
    return [
        lr.to(here.device) if isinstance(lr, Tensor) and isinstance(here, Tensor) else lr
        for lr, here in zip(rates, now)
    ]
