"""The exchanges of one aggregator: what they sent, and that none follows after one that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

from .lines import reason_of
from .ranks import LABEL_BYTES, Exchange, Ranks, SyncError

__all__ = ["Exchanges"]


class Exchanges:
    """Exchanges with the other ranks. ``broken`` is why there are none any more."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.broken: SyncError | None = None
        self.control_bytes = self.payload_bytes = 0

    def check_usable(self) -> None:
        if self.broken is not None:
            raise SyncError(
                f"an exchange failed before, so none is possible: {self.broken}",
                self.broken.missing,
                self.broken.left,
                self.broken.first,
            )

    def gather(self, record: Tensor) -> tuple[Tensor, Exchange | None]:
        """Start to collect ``record`` of every rank; the rows are [ranks, length], once they are waited for."""
        self.control_bytes += (LABEL_BYTES + record.nbytes) * (self.ranks.size - 1)
        return self.guard(self.ranks.gather, record)

    def reduce(self, payload: Tensor) -> Exchange:
        """Start to add up ``payload`` over the ranks, in place."""
        self.payload_bytes += self.bytes_of(payload)
        return self.guard(self.ranks.reduce, payload)

    def bytes_of(self, payload: Tensor) -> int:
        """What a ring sends from each rank to reduce it."""
        return int(2 * (self.ranks.size - 1) / self.ranks.size * payload.nbytes)

    def wait(self, exchange: Exchange) -> None:
        self.guard(self.ranks.wait, exchange)

    def guard(self, call: Callable, *arguments: Any) -> Any:
        """What the call, an exchange, returns. If it fails, there will be no other."""
        try:
            return call(*arguments)
        except SyncError as error:
            self.broken = error
            raise
        except BaseException as error:  # Ctrl-C: the others have been told, and what was held is held
            if self.ranks.size == 1:  # nobody else is in the middle of anything
                raise
            me = self.ranks.me
            self.broken = SyncError(f"rank {me} {reason_of(error)} in an exchange", first=me)
            raise

    def refuse(self, wrong: str) -> NoReturn:
        """Fail closed: what ranks received cannot be used. Every rank has the same rows, and says the same."""
        self.broken = SyncError(wrong)
        raise self.broken
