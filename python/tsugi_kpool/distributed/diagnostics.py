"""What was decided and why: one JSON line a decision and rank, and scalars for trackers.

Fields of a line: step, active (the step's adapters), adapter, decision ("HOLD" or "FIRE"), reason, V (total variance of
one snapshot), P (squared norm of the mean), signal (P less the share of noise), statistic and threshold (the two numbers
compared), m (steps in the buffer), planned (length of the next window), nonfinite (gradients of all ranks that were left
out for a NaN or an infinity), bytes (sent by this rank, as a ring reduce sends them), waited_ms (blocked in the exchange).
sender (the name that plesio_init was given, if any). A number that is not known is null. A FIRE stands where its reduce was finished, so steps are not in order.

Writing never stops training: where a line cannot be written (the disk is full, the folder is gone), that is said once, the
line is dropped and counted, and the file is tried again later.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..warn import warn_user
from .buffers import Agreed, Buffered, Decision

__all__ = ["Diagnostics", "row_of"]

_RETRY_S = 10.0  # between attempts to write, where one failed


def row_of(
    a: Buffered,
    step: int,
    active: Sequence[int],
    decision: Decision,
    *,
    held: int | None = None,
    agreed: Agreed | None = None,
    left_out: int = 0,
    sent: int = 0,
    waited_ms: float = 0.0,
) -> dict[str, Any]:
    """The fields of a line.

    Args:
        a: the adapter, after the decision.
        held, agreed: of the window that a FIRE has ended; None for those of the adapter.
        left_out: gradients of all ranks that were not finite.
        sent: bytes.
    """
    agreed = agreed or a.agreed or Agreed()
    return {
        "step": step,
        "active": list(active),
        "adapter": a.index,
        "decision": "FIRE" if decision.fires else "HOLD",
        "reason": decision.reason,
        "V": agreed.variance,
        "P": agreed.power,
        "signal": agreed.signal,
        "statistic": decision.statistic,
        "threshold": decision.threshold,
        "m": a.held if held is None else held,
        "planned": a.planned or None,
        "nonfinite": left_out,
        "bytes": sent,
        "waited_ms": waited_ms,
    }


class Diagnostics:
    """Writes ``decisions-rank<rank>.jsonl`` in ``folder`` and keeps the sums that :meth:`scalars` returns."""

    def __init__(self, folder: str | Path, rank: int = 0):
        self.path = Path(folder) / f"decisions-rank{rank}.jsonl"
        #: Lines that could not be written.
        self.dropped = 0
        #: Stands in every line as ``sender``; None for none.
        self.sender_id: str | None = None
        self._file: BinaryIO | None = None
        self._closed = self._warned = False
        self._again_at = 0.0
        self._counts: Counter[str] = Counter()
        self._bytes, self._waited_ms, self._fired_steps, self._nonfinite = 0, 0.0, 0, 0
        self._append(b"")  # a folder that does not serve is said now

    def write(self, row: Mapping[str, Any]) -> None:
        """Count a decision and append its line; never raises for what the file system does."""
        self._counts[row["decision"]] += 1
        self._bytes += row["bytes"]
        self._waited_ms += row["waited_ms"]
        self._fired_steps += row["m"] if row["decision"] == "FIRE" else 0
        self._nonfinite += row.get("nonfinite", 0)
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        if self.sender_id is not None:
            finite["sender"] = self.sender_id
        if not self._append((json.dumps(finite) + "\n").encode()):
            self.dropped += 1

    def scalars(self) -> dict[str, float]:
        """For a tracker (TensorBoard, W&B): counts so far, steps a FIRE carried in the mean, bytes, time waited.

        ``kpool/nonfinite`` counts gradients left out for a NaN or an infinity, ``kpool/dropped_lines`` lines of this
        rank's file that could not be written.
        """
        fires = self._counts["FIRE"]
        return {
            "kpool/fire": float(fires),
            "kpool/hold": float(self._counts["HOLD"]),
            "kpool/steps_a_fire": self._fired_steps / fires if fires else 0.0,
            "kpool/nonfinite": float(self._nonfinite),
            "kpool/bytes_sent": float(self._bytes),
            "kpool/waited_ms": self._waited_ms,
            "kpool/dropped_lines": float(self.dropped),
        }

    def state_dict(self) -> dict[str, float]:
        """The sums, for :meth:`load_state_dict` of a run that goes on."""
        sums = {"bytes": self._bytes, "waited_ms": self._waited_ms, "fired_steps": self._fired_steps}
        return {**sums, **{f"counts.{kind}": count for kind, count in self._counts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from these sums; what a later version may have added is left out."""
        self._bytes, self._waited_ms = int(state.get("bytes", 0)), float(state.get("waited_ms", 0.0))
        self._fired_steps = int(state.get("fired_steps", 0))
        kinds = {key.removeprefix("counts."): value for key, value in state.items() if key.startswith("counts.")}
        self._counts = Counter({kind: int(count) for kind, count in kinds.items()})

    def close(self) -> None:
        self._closed = True
        self._let_go()

    # ---- the file ------------------------------------------------------------------------------------------------

    def _append(self, line: bytes) -> bool:
        """Whether the whole line is in the file."""
        if self._closed or time.monotonic() < self._again_at:
            return False
        try:
            self._write_whole(self._opened(), line)
        except (OSError, ValueError) as error:  # ValueError: somebody closed the file
            self._again_at = time.monotonic() + _RETRY_S
            self._let_go()
            self._say(error)
            return False
        return True

    def _opened(self) -> BinaryIO:
        if self._file is not None and os.fstat(self._file.fileno()).st_nlink == 0:
            self._let_go()  # deleted: what is written to it would be nowhere
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        return self._file

    @staticmethod
    def _write_whole(file: BinaryIO, line: bytes) -> None:
        """Append the line, or nothing of it: half a line would make the next one unreadable too."""
        end = os.fstat(file.fileno()).st_size
        try:
            written = file.write(line)
            if written != len(line):  # a disk that fills up takes what still fits
                raise OSError(f"only {written} of {len(line)} bytes could be written: is the disk full?")
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise

    def _let_go(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _say(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        warn_user(
            f"diagnostics: {self.path} cannot be written ({error}); training goes on without these lines. They are counted "
            f"in scalars() as kpool/dropped_lines, and the file is tried again every {_RETRY_S:g} s",
            RuntimeWarning,
        )
