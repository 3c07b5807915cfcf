"""The other ranks: two process groups of our own, a time limit on every exchange, and who failed when one does."""

from __future__ import annotations

import collections
import ctypes
import json
import os
import pickle
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from multiprocessing import util
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..warn import warn_user
from .lines import Failure, Lines, connect_all, listen, reason_of
from .meeting import Absence, Meeting, in_background, own_address

__all__ = ["LABEL_BYTES", "Ranks", "SyncError"]

_ROLL_CALL_S = 2.0
_LINES_S = 30.0
# An exchange in which a rank took part before it left may still complete: its last bytes are on their way.
_GRACE_S = 1.0
# A wait goes back to Python this often, to hear of Ctrl-C and of ranks that left.
_SLICE = timedelta(milliseconds=20)
# Of the text at the start of every record, which says what it is.
LABEL_BYTES = 48


class SyncError(RuntimeError):
    """An exchange failed or ranks differ; what was held is still held.

    Attributes:
        missing: the ranks that do not answer: killed, stopped, or cut off.
        left: rank -> why, for the ranks that said so when they left.
        first: the rank that failed first, as far as is known; None where every rank still takes part.
    """

    def __init__(
        self,
        message: str,
        missing: Sequence[int] = (),
        left: dict[int, str] | None = None,
        first: int | None = None,
    ):
        super().__init__(message)
        self.missing, self.left, self.first = tuple(missing), dict(left or {}), first


@dataclass
class Exchange:
    """A collective on its way: which one of this rank's, counted from 1, and the work that torch gave for it."""

    number: int
    what: str
    work: Any
    polled: bool  # its work cannot wait for a moment only
    labels: Tensor | None = None  # of records: what each rank says that it exchanges, int64 [ranks, 6]


class Ranks:
    """The other ranks: two process groups of our own, and a line to each rank, on which it says why it leaves."""

    def __init__(self, group: Any, timeout_s: float):
        self.size, self.rank, self.names, self._timeout_s = 1, 0, [0], timeout_s
        #: Numbers in the longest record. Ranks that have compared their settings set it, all at the same exchange.
        self.longest_record = 1
        self._lines: Lines | None = None
        if not (dist.is_available() and dist.is_initialized()):
            return
        if hasattr(group, "get_group"):  # a DeviceMesh of one dimension
            group = group.get_group()
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if self.rank < 0:
            raise ValueError(f"group is {group}, which this process is not in")
        self.names = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
        if self.size == 1:
            return
        self._process = os.getpid()
        self._in_flight: set[int] = set()  # numbers of the exchanges that nobody has waited for yet
        self._lines = self._meet()
        # At the end of the process, or of this object: whoever did not close says why. Not in a forked child.
        self._goodbye = util.Finalize(self, _leave, (self._lines,), exitpriority=100)
        try:
            self._make_groups(group)
        except BaseException as error:
            self.leave(error)
            raise

    @property
    def me(self) -> int:
        """This process by its global number, as all ranks are named in errors."""
        return self.names[self.rank]

    # ---- how it begins -----------------------------------------------------------------------------------------------

    def _meet(self) -> Lines:
        """Wait until all ranks have come, and connect a line to each."""
        store = dist.distributed_c10d._get_default_store()
        token = secrets.token_hex(16)
        server = listen(own_address(store))
        me = self.me
        try:
            value = json.dumps([*server.getsockname()[:2], token])
            came = Meeting(store, _meeting_name(self.names), self.names, me).hold(value, self._timeout_s)
        except Absence as absence:
            server.close()
            raise self._nobody_came(absence) from None
        except BaseException:
            server.close()
            raise
        others = {r: json.loads(v) for r, v in came.items()}
        addresses = {r: (host, port) for r, (host, port, _) in others.items()}
        tokens = {r: t for r, (_, _, t) in others.items()}
        sockets, without = connect_all(me, addresses, server, tokens, min(_LINES_S, self._timeout_s))
        if without:
            warn_user(
                f"rank {me} has no connection of its own to rank {', '.join(map(str, without))} (from {addresses[me][0]} to "
                f"{', '.join(addresses[r][0] for r in without)}): training goes on, but a failure is noticed late and its "
                "rank may not be named. GLOO_SOCKET_IFNAME chooses the interface"
            )
        return Lines(me, sockets)

    def _nobody_came(self, absence: Absence) -> SyncError:
        who = f"rank {self.me} waited at attach for the other ranks (limit {self._timeout_s:g} s): "
        if absence.store_is_gone:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                return SyncError(who + "the job's store, in the launcher, does not answer", absence.missing)
            return SyncError(who + "rank 0 does not answer; the job's store is in it", (0,), first=0)
        first = absence.first or Failure(absence.missing[0], "did not come", silent=True)
        if first.silent:
            return SyncError(f"{who}{first}; every rank has to call attach", absence.missing, first=first.rank)
        return SyncError(f"{who}{first}", absence.missing, {first.rank: first.reason}, first.rank)

    def _make_groups(self, group: Any) -> None:
        # The members of a part of the world make their groups alone. torch derives those groups' names from their ranks, so
        # a second group after a destroyed one would read the first one's addresses: such groups are left to the exit.
        self._part = self.size < dist.get_world_size()
        backend = dist.get_backend(group)
        # torch's own limit is there for waits that are not ours; ours come first, and know who is missing.
        limit = timedelta(seconds=self._timeout_s + _ROLL_CALL_S)
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def new_group(backend: str, use: str) -> Any:
            if device is not None:  # each thread has its own
                torch.cuda.set_device(device)
            made = dist.new_group(
                self.names,
                limit,
                backend,
                use_local_synchronization=self._part,
                group_desc=f"tsugi_kpool_{use}",
            )
            _keep(made)
            return made

        self._data = self._background("make the group for gradients", lambda: new_group(backend, "data"))
        self._control = self._background("make the group for records", lambda: new_group("gloo", "control"))
        # gloo can wait for a moment; the work of others only orders a stream, so that completion is looked at.
        self._polled = backend != "gloo"

    def _background(self, what: str, function: Callable[[], Any]) -> Any:
        """One of the steps that torch has no asynchronous form of; it counts as an exchange."""
        number = self._next(what)
        with self._guarded(what, number):
            result = in_background(function, self._timeout_s, lambda: self._culprit(number) is not None)
        self._open_lines.finished = number
        return result

    @property
    def _open_lines(self) -> Lines:
        """The lines to the other ranks, which are there from the meeting until this is closed."""
        if self._lines is None:
            raise RuntimeError("the pool is closed")
        return self._lines

    # ---- exchanges ---------------------------------------------------------------------------------------------------

    def gather_objects(self, what: str, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order. Pickled; any length.

        Raises:
            SyncError: it did not end within the limit, or a rank left.
        """
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        lengths, exchange = self.gather(torch.tensor([data.numel()], dtype=torch.float64), what)
        if exchange is not None:
            self.wait(exchange)
        sizes = [int(n) for n in lengths.flatten().tolist()]
        rows = data.new_empty(self.size * max(sizes))
        padded = torch.nn.functional.pad(data, (0, max(sizes) - data.numel()))
        self.wait(self._launch(what, dist.all_gather_into_tensor, rows, padded, group=self._control))
        return [pickle.loads(row[:n].numpy().tobytes()) for row, n in zip(rows.view(self.size, -1), sizes)]

    def broadcast(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Overwrite ``tensors`` with those of the lowest rank; shapes and dtypes are alike on all ranks.

        Raises:
            SyncError: it did not end within the limit, or a rank left.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            self.wait(self._launch(what, dist.broadcast, whole, src=self.names[0], group=self._data))
            if whole.data_ptr() != tensor.data_ptr():
                with torch.no_grad():
                    tensor.copy_(whole)

    def gather(self, record: Tensor, what: str = "exchange the records of a step") -> tuple[Tensor, Exchange | None]:
        """Start to collect ``record``, float64 [n], of every rank into [size, n], n at most :attr:`longest_record`.

        What is sent has one length, whatever it is, and says what it is: a rank that calls something else than the others
        is then named, where messages of different lengths would be mixed up or end the process.
        """
        if self.size == 1:
            return record.unsqueeze(0), None
        label = _label(what)
        sent = record.new_zeros(len(label) + self.longest_record)
        sent[: len(label)] = label
        sent[len(label) : len(label) + record.numel()] = record
        out = sent.new_empty(self.size * sent.numel())
        exchange = self._launch(what, dist.all_gather_into_tensor, out, sent, group=self._control)
        rows = out.view(self.size, -1)
        exchange.labels = rows[:, : len(label)].view(torch.int64)
        return rows[:, len(label) : len(label) + record.numel()], exchange

    def reduce(self, payload: Tensor) -> Exchange:
        """Start to add up ``payload`` over the ranks, in place."""
        return self._launch("reduce a gradient", dist.all_reduce, payload, group=self._data)

    def wait(self, exchange: Exchange) -> None:
        """Wait until the exchange has ended, at most for the limit.

        Raises:
            SyncError: it cannot end, or did not in time; or ranks exchange different things.
        """
        with self._guarded(exchange.what, exchange.number):
            self._wait(exchange)
        self._in_flight.discard(exchange.number)
        lines = self._open_lines
        lines.finished = max(lines.finished, exchange.number)
        if exchange.labels is not None and bool((exchange.labels != exchange.labels[0]).any()):
            raise self._apart(exchange.labels)

    def _apart(self, labels: Tensor) -> SyncError:
        """Every rank has the same labels, and so says the same."""
        said = [_text_of(row) for row in labels]
        each = ", ".join(f"rank {name} to {what}" for name, what in zip(self.names, said))
        error = SyncError(
            f"the ranks do not call the same: their exchanges are {each}. Steps, flush, load, state_dict(all_ranks=True) and "
            "close are calls of all ranks, in one order; what was held is kept"
        )
        self.leave(error)
        return error

    def _launch(self, what: str, collective: Callable, *arguments: Any, **keywords: Any) -> Exchange:
        number = self._next(what)
        with self._guarded(what, number):
            work = collective(*arguments, async_op=True, **keywords)
        self._in_flight.add(number)
        return Exchange(number, what, work, self._polled and keywords["group"] is self._data)

    def _next(self, what: str) -> int:
        """The number of the exchange that begins now."""
        if self._lines is None:
            raise RuntimeError(f"could not {what}: this pool is closed")
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this pool belongs to process {self._process}, and process {os.getpid()} was forked from it: a forked "
                "child, as a DataLoader's worker is, must not train"
            )
        number = self._lines.launched + 1
        if self._culprit(number) is not None:
            with self._guarded(what, number):
                raise TimeoutError("it was not begun, since it could not end")
        self._lines.launched, self._lines.doing = number, what
        self._lines.old_error = _last_error_id()
        return number

    def _wait(self, exchange: Exchange) -> None:
        work = exchange.work
        deadline, pause = time.monotonic() + self._timeout_s, 2e-5
        while not work.is_completed():
            if self._culprit(exchange.number) is not None:
                raise TimeoutError("it was given up, since it could not end any more")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not complete after {self._timeout_s:g} s")
            if exchange.polled:
                time.sleep(pause)
                pause = min(pause * 1.5, 1e-3)
            else:
                with suppress(RuntimeError):  # the moment is over; or it failed, which the last wait says
                    work.wait(_SLICE)
        work.wait()

    # ---- who failed --------------------------------------------------------------------------------------------------

    @contextmanager
    def _guarded(self, what: str, number: int) -> Iterator[None]:
        """Turn an error in the block into a SyncError that says which rank failed, and tell the other ranks."""
        try:
            try:
                yield
            except (RuntimeError, TimeoutError) as error:
                raise self._failure(what, number, error) from error
        except SyncError:
            raise
        except BaseException as error:  # Ctrl-C, or what a handler of another signal raises: the exchange is lost
            self.leave(error)
            raise

    def _culprit(self, number: int) -> Failure | None:
        """Why exchange ``number`` cannot end any more; None while it can."""
        lines = self._open_lines
        if not (lines.departures or lines.closing):  # as long as all is well
            return None
        now = time.monotonic()
        for gone in lines.departures.copy().values():
            if number > gone.launched or (number > gone.finished and now - gone.noticed > _GRACE_S):
                return gone.why
        if self.me not in lines.closing:
            for closing in lines.closing.copy().values():
                if number > closing.launched:
                    return closing.why
        return None

    def _failure(self, what: str, number: int, error: BaseException) -> SyncError:
        """What to raise about exchange ``number``; the other ranks are told."""
        lines = self._open_lines
        missing, elsewhere = self._find_first(number)
        first, gone = lines.first, lines.departures.copy().values()
        missing |= {departure.why.rank for departure in gone if departure.why.silent}
        left = {departure.why.rank: departure.why.reason for departure in gone if not departure.why.silent}
        if first is not None and first.silent and first.rank not in left:
            missing.add(first.rank)
        lines.say_left(f"gave up: it could not {what}")
        reported = (str(error).strip() or type(error).__name__).splitlines()[0]
        return SyncError(
            f"rank {self.me} could not {what} (limit {self._timeout_s:g} s): {self._who(first, missing, elsewhere)}; what was held is "
            f"kept. The exchange reported: {reported}",
            sorted(missing - {self.me}),
            left,
            None if first is None else first.rank,
        )

    def _find_first(self, number: int) -> tuple[set[int], dict[int, str]]:
        """See to it that ``lines.first`` is known, if anybody failed.

        Returns:
            The ranks that do not answer, and rank -> what it does, of those that are in another exchange than this rank;
            if that was asked.
        """
        lines = self._open_lines
        if lines.first is None and (culprit := self._culprit(number)) is not None:
            lines.blame(culprit)
        if lines.first is not None:
            return set(), {}
        answers, silent = lines.roll_call(_ROLL_CALL_S)
        late = sorted(r for r, answer in answers.items() if answer.launched < number)
        if silent:
            lines.blame(Failure(silent[0], f"did not answer for {_ROLL_CALL_S:g} s", silent=True))
        elif late:
            lines.blame(Failure(late[0], f"answers, but did not come to an exchange within {self._timeout_s:g} s"))
        return set(silent), {r: each.doing for r, each in answers.items() if each.doing != lines.doing}

    def _who(self, first: Failure | None, missing: set[int], elsewhere: dict[int, str]) -> str:
        if first is None:
            if not elsewhere:
                return "every rank still answers"
            each = ", ".join(f"rank {r} to {what}" for r, what in sorted(elsewhere.items()))
            return f"every rank still answers, but not all wait for the same: {each}"
        who = f"{first}" if first.rank != self.me else f"the others went on without it, since {first}"
        others = ", ".join(map(str, sorted(missing - {first.rank, self.me})))
        return f"{who}; rank {others} does not answer either" if others else who

    # ---- how it ends -------------------------------------------------------------------------------------------------

    def closing(self) -> None:
        """Tell the others that the exchanges that follow are the last ones, so that nobody takes them for a step's."""
        if self._lines is not None:
            error = sys.exc_info()[1]  # close() in a finally clause
            why = "" if error is None else f" (it {reason_of(error)})"
            self._lines.say_closing(f"closed its pool, while others go on with training{why}")

    def leave(self, error: BaseException | None) -> None:
        """Tell the others that this rank takes part in nothing more, and why. Returns at once."""
        if self._lines is not None:
            self._lines.say_left(reason_of(error))

    def close(self, broken: bool, error: BaseException | None = None) -> None:
        """Say goodbye, and let go of the groups.

        Args:
            broken: an exchange failed, so that others in the same groups may never end.
            error: why this rank leaves, where it is not the orderly end.
        """
        if self._lines is None or os.getpid() != self._process:
            return
        lines, self._lines = self._lines, None
        orderly = error is None and not self._in_flight
        try:
            lines.close("closed its pool" if error is None else reason_of(error), orderly)
        finally:
            self._goodbye.cancel()
            # torch waits in a group's destructor for exchanges that are on their way, which may never end.
            if not (broken or self._part or self._in_flight):
                for group in (self._data, self._control):
                    dist.destroy_process_group(group)
                    _keep(group, False)


@lru_cache(maxsize=32)
def _label(what: str) -> Tensor:
    """The text's first bytes as float64 [6], which all_gather carries to the bit."""
    text = what.encode()[:LABEL_BYTES].ljust(LABEL_BYTES, b"\0")
    return torch.frombuffer(bytearray(text), dtype=torch.float64)


def _text_of(label: Tensor) -> str:
    return label.contiguous().numpy().tobytes().rstrip(b"\0").decode(errors="replace")


def _leave(lines: Lines) -> None:
    """At the end of the process, or of a pool that nobody closed."""
    # In a notebook the last error may be of long ago: it is not why this rank leaves if exchanges came after it.
    error = getattr(sys, "last_value", None) if _last_error_id() != lines.old_error else None
    lines.close(reason_of(error or sys.exc_info()[1]))


def _last_error_id() -> int:
    """Of the last error that nobody caught; the object itself would keep all frames of its traceback."""
    return id(getattr(sys, "last_value", None))


_meetings: collections.Counter[tuple[int, ...]] = collections.Counter()


def _meeting_name(names: Sequence[int]) -> str:
    """Alike on all ranks, which make their pools in one order, as they make their groups."""
    _meetings[tuple(names)] += 1
    return f"tsugi_kpool/meeting/{'-'.join(map(str, names))}/{_meetings[tuple(names)]}"


def _keep(group: Any, keep: bool = True) -> None:
    """Keep a group from being destroyed when the interpreter ends: gloo's destructor waits for collectives to end.

    It has no abort for them (torch 2.11), so after a Ctrl-C the process would stay as long as a stopped peer does. A
    reference that Python does not know of is the one kind that the end of the interpreter leaves alone.
    """
    (ctypes.pythonapi.Py_IncRef if keep else ctypes.pythonapi.Py_DecRef)(ctypes.py_object(group))
