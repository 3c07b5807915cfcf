"""Lines between ranks: each pair keeps a TCP connection, over which a rank learns who has left, and why.

A line is silent as long as all is well; a thread listens on all of them while training computes or waits. A rank that
leaves says so on its lines. A rank that is killed says nothing, but its lines break at once. The first rank to notice
tells the others, so that all ranks name the rank that failed first, and not one that failed because of it. The gradients
are right without any of this, and nothing here waits for a rank without a limit.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "Departure", "Failure", "Lines", "connect_all", "listen", "reason_of"]

KILLED = "was killed, or ended without a word: its connection broke"
_LONGEST_MESSAGE = 1 << 16
_GOODBYE_S = 1.0


@dataclass(frozen=True)
class Failure:
    """``f"rank {rank} {reason}"`` is a sentence. ``silent``: the rank did not say so itself."""

    rank: int
    reason: str
    silent: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} {self.reason}"


@dataclass(frozen=True)
class Departure:
    """A rank takes part in no further exchange.

    ``launched`` and ``finished`` count the exchanges that it began and saw end; those after ``launched`` cannot complete.
    """

    why: Failure
    launched: int
    finished: int
    noticed: float = field(default_factory=time.monotonic, compare=False)


def reason_of(error: BaseException | None) -> str:
    """Why a rank leaves, as it continues the sentence "rank 1 ..."."""
    if error is None:
        return "ended without closing its pool"
    if isinstance(error, KeyboardInterrupt):
        return "was interrupted (Ctrl-C)"
    if isinstance(error, SystemExit):
        return f"called sys.exit({'' if error.code is None else repr(error.code)[:200]})"
    return f"left: {type(error).__name__}: {error}".removesuffix(": ")[:400]


@dataclass(frozen=True)
class Answer:
    """A rank's answer to a roll call: how many exchanges it had begun, and what the last one was to do."""

    launched: int
    doing: str


class Lines:
    """The connections of one rank, and what was heard on them.

    Args:
        rank: of this process, by its global number, as all ranks here.
        sockets: rank -> connected socket, for each other rank.
    """

    def __init__(self, rank: int, sockets: dict[int, socket.socket]):
        self.rank = rank
        self.departures: dict[int, Departure] = {}
        self.first: Failure | None = None  # the first one that is known
        self.closing: dict[int, Departure] = {}  # rank -> where it was when it began to close its pool
        self.launched = self.finished = 0  # of this rank
        self.doing = ""  # what its last exchange is to do
        self.old_error = 0  # id of the last error that nobody caught, before the last exchange began
        self._sockets = dict(sockets)
        self._unread = {r: b"" for r in sockets}
        self._answers: dict[int, Answer] = {}  # to the last roll call
        self._noted: set[int] = set()  # ranks that have read this rank's goodbye
        self._changed = threading.Condition()
        self._ended = False
        self._said_goodbye = False
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        for r, s in self._sockets.items():
            s.settimeout(_GOODBYE_S)  # for sending; what is received was announced by the selector
            self._selector.register(s, selectors.EVENT_READ, r)
        _open_lines.add(self)
        self._thread = threading.Thread(target=self._listen, name="tsugi_kpool lines", daemon=True)
        self._thread.start()

    # ---- what this rank says ------------------------------------------------------------------------------------------

    def roll_call(self, seconds: float) -> tuple[dict[int, Answer], tuple[int, ...]]:
        """Asks every rank to answer. Returns the answers that came in time, and the ranks that neither answered nor left."""
        with self._changed:
            self._answers.clear()
        self._send_all({"ask": 1})
        with self._changed:
            self._changed.wait_for(lambda: not self._silent(), seconds)
            return dict(self._answers), tuple(sorted(self._silent()))

    def _silent(self) -> set[int]:
        return set(self._sockets) - set(self._answers) - set(self.departures)

    def say_closing(self, reason: str) -> None:
        """The next exchanges of this rank are the last ones, of ``close()``."""
        self.closing[self.rank] = Departure(Failure(self.rank, reason), self.launched, self.launched)
        self._send_all({"closing": reason[:1000], "launched": self.launched})

    def say_left(self, reason: str, orderly: bool = False) -> None:
        """Tell the others that this rank takes part in no further exchange. Only the first call counts: later ones are consequences.

        ``orderly``: all its exchanges have ended, which is no failure until somebody needs it.
        """
        if self._said_goodbye:
            return
        self._said_goodbye = True
        first = self.first
        if first is None and not orderly:
            first = Failure(self.rank, reason[:1000])
        self._send_all(
            {
                "left": reason[:1000],
                "launched": self.launched,
                "finished": self.finished,
                "first": None if first is None else [first.rank, first.reason, first.silent],
            }
        )

    def blame(self, failure: Failure) -> None:
        """Note which rank failed, as this rank found out. It counts only if no earlier failure is known."""
        with self._changed:
            self.first = self.first or failure

    def close(self, reason: str, orderly: bool = False) -> None:
        """Say goodbye, wait a moment until the others have read it, and end the thread."""
        if self._ended:
            return
        try:
            self.say_left(reason, orderly)
            if threading.current_thread() is not self._thread:  # the garbage collector may run in any thread
                with self._changed:
                    self._changed.wait_for(self._all_noted, _GOODBYE_S)
        finally:
            self._ended = True
            with contextlib.suppress(OSError):
                self._wake.send(b"x")
            if threading.current_thread() is not self._thread:
                self._thread.join(_GOODBYE_S)

    def _all_noted(self) -> bool:
        return not set(self._sockets) - self._noted - set(self.departures)

    def _send_all(self, message: dict) -> None:
        for r in list(self._sockets):
            self._send(r, message)

    def _send(self, rank: int, message: dict) -> None:
        with contextlib.suppress(OSError, KeyError):  # a line that is broken: the thread sees it too
            self._sockets[rank].sendall(json.dumps(message).encode() + b"\n")

    # ---- what it hears, in the thread ---------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while not self._ended:
                for key, _ in self._selector.select():
                    if key.data is not None:
                        self._read(key.data)
        finally:
            for s in (*self._sockets.values(), self._wake, self._woken):
                s.close()
            self._selector.close()

    def _read(self, rank: int) -> None:
        try:
            data = self._sockets[rank].recv(_LONGEST_MESSAGE)
        except TimeoutError:
            return
        except OSError:
            data = b""
        if not data:
            return self._broke(rank)
        *messages, rest = (self._unread[rank] + data).split(b"\n")
        self._unread[rank] = rest
        for message in messages:
            try:
                self._take(rank, json.loads(message))
            except (ValueError, TypeError, KeyError, AttributeError):
                return self._broke(rank)  # not one of ours
        if len(rest) > _LONGEST_MESSAGE:
            self._broke(rank)

    def _broke(self, rank: int) -> None:
        self._selector.unregister(self._sockets[rank])
        with self._changed:
            if rank not in self.departures:
                why = Failure(rank, KILLED, silent=True)
                # Nobody knows how far it came.
                self.departures[rank] = Departure(why, launched=1 << 62, finished=-1)
                self.first = self.first or why
            self._changed.notify_all()

    def _take(self, rank: int, message: Any) -> None:
        if not isinstance(message, dict):
            raise TypeError(f"a message is {message!r:.40}, not an object")
        if "ask" in message:
            self._send(rank, {"here": self.launched, "doing": self.doing})
        with self._changed:
            if "here" in message:
                self._answers[rank] = Answer(int(message["here"]), str(message["doing"]))
            if "closing" in message:
                launched = int(message["launched"])
                self.closing[rank] = Departure(Failure(rank, str(message["closing"])), launched, launched)
            if "noted" in message:
                self._noted.add(rank)
            if "left" in message:
                self._take_goodbye(rank, message)
            self._changed.notify_all()
        if "left" in message:
            self._send(rank, {"noted": 1})

    def _take_goodbye(self, rank: int, message: dict) -> None:
        why = Failure(rank, str(message["left"]))
        self.departures[rank] = Departure(why, int(message["launched"]), int(message["finished"]))
        if message["first"] is not None:
            culprit, reason, silent = message["first"]
            self.first = self.first or Failure(int(culprit), str(reason), bool(silent))


# ---- a forked child is not the rank ----------------------------------------------------------------------------------

_open_lines: weakref.WeakSet[Lines] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A child that kept the lines open would hide its parent's death from the other ranks."""
    for lines in list(_open_lines):
        lines._ended = lines._said_goodbye = True
        lines._selector.close()
        for s in (*lines._sockets.values(), lines._wake, lines._woken):
            with contextlib.suppress(OSError):
                s.close()


os.register_at_fork(after_in_child=_let_go_in_child)


# ---- making the connections ------------------------------------------------------------------------------------------


def listen(host: str) -> socket.socket:
    """A listening socket on a free port of ``host``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=128)


def connect_all(
    rank: int, addresses: dict[int, tuple[str, int]], server: socket.socket, tokens: dict[int, str], seconds: float
) -> tuple[dict[int, socket.socket], tuple[int, ...]]:
    """Dial the lower ranks, accept the higher ones: (rank -> socket, the ranks with which no line came about).

    ``tokens`` keep strangers out: each rank's came through the job's store, and who does not say it is hung up on.
    """
    found: dict[int, socket.socket] = {}
    deadline = time.monotonic() + seconds
    try:
        for other in sorted(r for r in addresses if r < rank):
            left = max(deadline - time.monotonic(), 0.1)
            with contextlib.suppress(OSError):
                line = socket.create_connection(addresses[other], timeout=left)
                found[other] = line
                line.sendall(f"{tokens[other]} {rank}\n".encode())
        higher = {r for r in addresses if r > rank}
        for other, line in _callers(server, tokens[rank], deadline, higher):
            found[other] = line
    except BaseException:
        for line in found.values():
            line.close()
        raise
    finally:
        server.close()
    for line in found.values():
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found, tuple(sorted(set(addresses) - {rank} - set(found)))


def _callers(
    server: socket.socket, token: str, deadline: float, wanted: Sequence[int] | set[int]
) -> Iterator[tuple[int, socket.socket]]:
    """The ranks of ``wanted`` as they call, until all have or the time is up."""
    wanted = set(wanted)
    while wanted and (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            line, _ = server.accept()
        except TimeoutError:
            return
        line.settimeout(min(left, 2.0))
        said, _, number = _first_line(line).partition(" ")
        if hmac.compare_digest(said.encode(), token.encode()) and number.isdigit() and int(number) in wanted:
            wanted.discard(int(number))
            yield int(number), line
        else:
            line.close()


def _first_line(line: socket.socket) -> str:
    """Read byte by byte: what follows belongs to the thread."""
    said = b""
    with contextlib.suppress(OSError):
        while len(said) < 200 and (byte := line.recv(1)) not in (b"", b"\n"):
            said += byte
    return said.decode("ascii", "replace")
