"""How ranks meet before they have a group in common: through the job's store, within a limit, and ended by Ctrl-C."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .lines import Failure, reason_of

__all__ = ["Absence", "Meeting", "in_background", "own_address"]

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the address of an interface


@dataclass
class Absence(Exception):
    """Some ranks did not come. ``first`` is the rank that failed, if that is known; ``store_is_gone``: the store does not answer."""

    missing: tuple[int, ...] = ()
    first: Failure | None = None
    store_is_gone: bool = False


def in_background(function: Callable[[], Any], seconds: float, hopeless: Callable[[], bool] = lambda: False) -> Any:
    """Run ``function`` in a thread and return its result. Ctrl-C ends this wait; it cannot end torch's own waits in C++.

    Raises:
        TimeoutError: it has not returned after ``seconds``, or ``hopeless()`` was true. The thread is left to its own
            time limit; it does not keep the process from ending.
    """
    results: list[Any] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        done.set()

    threading.Thread(target=run, name="tsugi_kpool background", daemon=True).start()
    deadline = time.monotonic() + seconds
    while not done.wait(0.02):
        if hopeless():
            raise TimeoutError("it was given up, since it could not end any more")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not complete after {seconds:g} s")
    if errors:
        raise errors[0]
    return results[0]


class Meeting:
    """One meeting of ranks: each brings a string and takes home everybody's.

    Args:
        store: of the job; a ``torch.distributed`` store.
        prefix: of this meeting, alike on all ranks and used once.
        ranks: all that are to come, by their global number; ``rank`` is this process's.
    """

    def __init__(self, store: Any, prefix: str, ranks: Sequence[int], rank: int):
        try:
            store = store.clone()  # a connection of our own: a wait on it blocks nobody else
        except (RuntimeError, NotImplementedError, AttributeError):
            pass
        self._store, self._prefix, self._ranks, self._rank = store, prefix, ranks, rank
        self._came: dict[int, str] = {}
        self._first: Failure | None = None  # why another rank left before all had come
        self._given_up: Failure | None = None  # why this one does
        self._asked_at = 0.0  # when the store was asked what it has not answered yet; 0 when it has

    def hold(self, value: str, seconds: float) -> dict[int, str]:
        """rank -> its value, once all have come.

        Raises:
            Absence: some have not come within ``seconds``, or have left.
        """
        done = threading.Event()
        failed: list[BaseException] = []

        def meet() -> None:
            try:
                self._meet(value)
            except Exception as error:  # the store is gone
                failed.append(error)
            done.set()

        threading.Thread(target=meet, name="tsugi_kpool meeting", daemon=True).start()
        try:
            done.wait(seconds)
        except BaseException as error:
            self._given_up = Failure(self._rank, reason_of(error))
            done.wait(0.5)
            raise
        if len(self._came) == len(self._ranks) and self._first is None:
            return self._came
        silent = bool(failed) or (self._asked_at > 0 and time.monotonic() - self._asked_at > 1.0)
        missing = tuple(r for r in self._ranks if r not in self._came)
        if silent:
            raise Absence(missing, store_is_gone=True)
        if self._first is None:
            self._given_up = Failure(missing[0], f"did not come to attach within {seconds:g} s", silent=True)
            done.wait(0.5)
        raise Absence(missing, self._first or self._given_up)

    def _meet(self, value: str) -> None:
        self._ask("set", f"{self._prefix}/here/{self._rank}", value)
        pause = 1e-3
        while len(self._came) < len(self._ranks) and self._first is None:
            if self._given_up is not None:
                why = [self._given_up.rank, self._given_up.reason, self._given_up.silent]
                self._ask("set", f"{self._prefix}/left/{self._rank}", json.dumps(why))
                return
            for r in self._ranks:
                if r not in self._came and self._ask("check", [f"{self._prefix}/here/{r}"]):
                    self._came[r] = self._ask("get", f"{self._prefix}/here/{r}").decode()
                if self._ask("check", [f"{self._prefix}/left/{r}"]):
                    self._first = Failure(*json.loads(self._ask("get", f"{self._prefix}/left/{r}")))
            time.sleep(pause)
            pause = min(2 * pause, 0.05)

    def _ask(self, call: str, *arguments: Any) -> Any:
        self._asked_at = time.monotonic()
        answer = getattr(self._store, call)(*arguments)
        self._asked_at = 0.0
        return answer


def own_address(store: Any) -> str:
    """Where the other ranks reach this host: at the interface that GLOO_SOCKET_IFNAME names, or that leads to the store."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if name:
        request = struct.pack("256s", name.encode()[:15])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    host = getattr(store, "host", None) or os.environ.get("MASTER_ADDR") or socket.gethostname()
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing
        return probe.getsockname()[0]
