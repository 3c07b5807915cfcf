"""The other ranks: two process groups of our own, a time limit on every exchange, and who is missing when one fails."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "SyncError"]

_ROLL_CALL_S = 2.0


class SyncError(RuntimeError):
    """An exchange failed or ranks differ; what was held is still held. ``missing``: the ranks that did not answer."""

    def __init__(self, message: str, missing: Sequence[int] = ()):
        super().__init__(message)
        self.missing = tuple(missing)


class Ranks:
    """The other ranks: two groups of our own, and who is missing when one of them fails."""

    def __init__(self, group: Any, timeout_s: float):
        self.size, self.rank, self.names, self._timeout_s = 1, 0, [0], timeout_s
        self._roll_call: _RollCall | None = None
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
        # The members of a part of the world make their groups alone. torch derives those groups' names from their ranks, so
        # a second group after a destroyed one would read the first one's addresses: such groups are left to the exit.
        self._part = self.size < dist.get_world_size()
        make = {"ranks": self.names, "timeout": timedelta(seconds=timeout_s), "use_local_synchronization": self._part}
        self._data = dist.new_group(backend=dist.get_backend(group), group_desc="tsugi_kpool_data", **make)
        self._control = dist.new_group(backend="gloo", group_desc="tsugi_kpool_control", **make)
        # gloo's wait ends at the group's time limit; others only order a stream, so completion is looked at.
        self._poll = dist.get_backend(group) != "gloo"
        self._roll_call = _RollCall(f"tsugi_kpool/{self._control.group_name}", self.names, self.rank)

    def gather_objects(self, what: str, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order; of any type that pickles, and any length."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        self._call(what, dist.all_gather_object, everyone, value, group=self._control)
        return everyone

    def broadcast(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Overwrite ``tensors`` with those of the lowest rank."""
        for tensor in tensors if self.size > 1 else ():
            work = self._call(what, dist.broadcast, tensor, self.names[0], group=self._data, async_op=True)
            self._call(what, _Work(work, self._poll).wait, self._timeout_s)

    def gather_objects(self, what: str, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order. ``what`` says in errors what could not be done."""
        if self.size == 1:
            return [value]
        everyone: list[Any] = [None] * self.size
        self._call(what, dist.all_gather_object, everyone, value, group=self._control)
        return everyone

    def any(self, flag: Tensor) -> bool:
        """Whether ``flag`` is not 0 on any rank; it holds 1.0 or 0.0 afterwards, alike on all."""
        seen = (flag.detach() != 0).any().float().cpu().reshape(1)
        if self.size > 1:
            self._call("agree on found_inf", dist.all_reduce, seen, op=dist.ReduceOp.MAX, group=self._control)
        flag.fill_(seen.item())
        return bool(seen.item())

    def gather(self, record: Tensor) -> tuple[Tensor, Any]:
        """Start to collect ``record`` of every rank into [size, len]."""
        if self.size == 1:
            return record.unsqueeze(0), None
        out = record.new_empty(self.size * record.numel())
        work = self._call(
            "exchange records", dist.all_gather_into_tensor, out, record, group=self._control, async_op=True
        )
        return out.view(self.size, -1), _Work(work, False)

    def reduce(self, payload: Tensor) -> Any:
        work = self._call("reduce a gradient", dist.all_reduce, payload, group=self._data, async_op=True)
        return _Work(work, self._poll)

    def wait(self, work: _Work) -> None:
        self._call("wait for the other ranks", work.wait, self._timeout_s)

    def _call(self, what: str, function: Callable, *arguments: Any, **keywords: Any) -> Any:
        try:
            return function(*arguments, **keywords)
        except (RuntimeError, TimeoutError) as error:
            missing = self._roll_call.missing() if self._roll_call is not None else ()
            who = f"rank {', '.join(map(str, missing))} did not answer" if missing else "every rank still answers"
            raise SyncError(
                f"rank {self.names[self.rank]} could not {what} (limit {self._timeout_s:g} s): {who}; what was held is kept. "
                f"The exchange reported: {str(error).strip().splitlines()[0]}",
                missing,
            ) from error

    def close(self, broken: bool) -> None:
        if self._roll_call is not None:
            self._roll_call.close()
            self._roll_call = None
            # A group with an exchange that never ended would wait for it here.
            for group in () if broken or self._part else (self._data, self._control):
                dist.destroy_process_group(group)


class _Work:
    def __init__(self, work: Any, poll: bool):
        self._work, self._poll, self._started = work, poll, time.monotonic()

    def wait(self, timeout_s: float) -> None:
        while self._poll and not self._work.is_completed():
            if time.monotonic() - self._started > timeout_s:
                raise TimeoutError(f"not complete after {timeout_s:g} s")
            time.sleep(1e-4)
        self._work.wait()


class _RollCall:
    """Who is still there: each rank answers from a thread of its own, even while it is blocked in a collective.

    It uses the job's store and sends nothing until somebody asks. A rank that was stopped does not answer; a rank that
    was killed does not either.
    """

    def __init__(self, prefix: str, names: Sequence[int], rank: int):
        self._names, self._rank, self._prefix = names, rank, prefix
        self._thread: threading.Thread | None = None
        store = dist.distributed_c10d._get_default_store()
        try:
            self._listener, self._asker = store.clone(), store.clone()
        except (RuntimeError, NotImplementedError, AttributeError):
            return  # a store of one connection: nobody can be named
        self._thread = threading.Thread(target=self._answer, name="tsugi_kpool roll call", daemon=True)
        self._thread.start()
        # A thread that is inside the store when the interpreter ends would take the process down.
        atexit.register(self.close)

    def _key(self, what: str, rank: int) -> str:
        return f"{self._prefix}/{what}/{rank}"

    def _answer(self) -> None:
        try:
            self._listener.wait([self._key("ask", self._rank)], timedelta(days=365))
            self._listener.set(self._key("here", self._rank), "1")
        except RuntimeError:
            pass  # the store is gone, and with it everybody who could ask

    def missing(self) -> tuple[int, ...]:
        """The ranks, by their global number, that do not answer within two seconds."""
        if self._thread is None:
            return ()
        silent = set(range(len(self._names)))
        reached = threading.Event()

        def ask() -> None:
            try:
                for r in range(len(self._names)):
                    self._asker.set(self._key("ask", r), "1")
                deadline = time.monotonic() + _ROLL_CALL_S
                while silent and time.monotonic() < deadline:
                    for r in tuple(silent):
                        if self._asker.check([self._key("here", r)]):
                            silent.discard(r)
                    reached.set()
                    time.sleep(0.02)
            except RuntimeError:
                reached.clear()

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_ROLL_CALL_S + 1.0)
        if not reached.is_set():
            # The store itself does not answer. Its host is rank 0, or a launcher that is no rank.
            return () if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else (0,)
        return tuple(self._names[r] for r in sorted(silent))

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._thread is not None and self._thread.is_alive():
            try:
                self._asker.set(self._key("ask", self._rank), "1")
            except RuntimeError:
                pass
            self._thread.join(_ROLL_CALL_S)
