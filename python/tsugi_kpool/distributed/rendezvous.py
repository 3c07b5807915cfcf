"""A meeting in torch.distributed's store: every rank says something to every other. It has a time limit, and Ctrl-C ends it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from .ranks import SyncError

__all__ = ["Rendezvous"]

_POLL_S = 0.02
#: How often the same ranks met for the same purpose. They count alike, so this names a meeting.
_meetings: Counter[tuple[str, tuple[int, ...]]] = Counter()


class Rendezvous:
    """A meeting of ``ranks`` in the job's store.

    A call of the store blocks until its host answers, and Ctrl-C does not reach it. So a thread makes the calls, over a
    connection of its own if the store has connections, and the caller waits for the thread a moment at a time.

    Args:
        purpose: What the ranks meet for, as an error names it: "the sideband".
        ranks: Their global numbers, in the same order on all.
        rank: This one.
        timeout_s: Seconds for the whole meeting.
        advice: What to look at if a rank does not come.
    """

    def __init__(self, purpose: str, ranks: Sequence[int], rank: int, timeout_s: float, advice: str) -> None:
        self._purpose, self._ranks, self._rank, self._advice = purpose, list(ranks), rank, advice
        self._timeout_s, self._end = timeout_s, time.monotonic() + timeout_s
        self._meeting, self._met = (purpose, tuple(ranks)), False
        who = hashlib.blake2b(repr(self._meeting).encode(), digest_size=8).hexdigest()
        self._prefix = f"tsugi/{who}/{_meetings[self._meeting]}"
        self._shared: Any = dist.distributed_c10d._get_default_store()
        self._store: Store | None = None

    def say(self, what: str, value: str, ranks: Sequence[int] | None = None) -> dict[int, str]:
        """Says ``value`` and returns what each of ``ranks`` (default: all, who come first) said under the name ``what``.

        After an error it is as if this rank had not come, so that all can try again.

        Raises:
            SyncError: a rank did not come in time, or the store does not answer; ``missing`` has who.
        """
        call = _Call(self, what, value, self._ranks if ranks is None else list(ranks))
        thread = threading.Thread(target=call.run, name="tsugi_kpool rendezvous", daemon=True)
        thread.start()
        try:
            while thread.is_alive() and time.monotonic() < self._end:
                thread.join(0.1)
        finally:
            call.over.set()
        if call.error is not None:
            raise SyncError(f"{self._purpose} could not start: the job's store failed: {call.error}") from call.error
        if call.missing:
            raise self._absent(call)
        if not self._met:
            self._met = True
            _meetings[self._meeting] += 1
        return call.heard

    def _absent(self, call: _Call) -> SyncError:
        limit = f"within {self._timeout_s:g} s (sync_timeout_s)"
        if not call.reached:
            return SyncError(
                f"{self._purpose} could not start: the job's store did not answer {limit}; the rank that holds it, "
                "usually rank 0, is stopped or cannot be reached",
            )
        missing = sorted(call.missing)
        who = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}"
        return SyncError(f"{self._purpose} could not start: {who} did not come {limit}. {self._advice}", missing)

    def open(self) -> Store:
        """A connection of our own, so that a call that hangs keeps no lock of the job's."""
        if self._store is None:
            try:
                own = self._shared.clone()
            except (RuntimeError, NotImplementedError, AttributeError):
                own = self._shared  # a store without connections, in a file or in this process
            self._store = PrefixStore(self._prefix, own)
        return self._store

    @property
    def rank(self) -> int:
        """This rank's global number."""
        return self._rank


class _Call:
    """One :meth:`Rendezvous.say`, for the thread that makes it."""

    def __init__(self, meeting: Rendezvous, what: str, value: str, ranks: Sequence[int]) -> None:
        self._meeting, self._what, self._value = meeting, what, value
        self.missing: set[int] = set(ranks)
        self.heard: dict[int, str] = {}
        self.error: Exception | None = None
        self.reached, self.over = False, threading.Event()

    def run(self) -> None:
        own = f"{self._what}/{self._meeting.rank}"
        try:
            store = self._meeting.open()
            store.set(own, self._value)
            while self.missing and not self.over.is_set():
                for rank in sorted(self.missing):
                    if store.check([f"{self._what}/{rank}"]):
                        self.heard[rank] = store.get(f"{self._what}/{rank}").decode()
                        self.missing.discard(rank)
                self.reached = True
                self.over.wait(_POLL_S if self.missing else 0)
            if self.missing:
                store.delete_key(own)
        except Exception as error:  # the store has no error class of its own
            self.error = error
