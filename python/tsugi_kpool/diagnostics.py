"""What was decided and why: one JSON line a decision and rank, and scalars for trackers.

Fields of a line: step, active (the step's adapters), adapter, decision ("HOLD" or "FIRE"), reason, V (total variance of
one snapshot), P (squared norm of the mean), signal (P less the share of noise), statistic and threshold (the two numbers
compared), m (steps in the buffer), planned (length of the next window), bytes (sent by this rank, as a ring reduce sends
them), waited_ms (blocked in the exchange). A number that is not known is null. A FIRE stands where its reduce was finished,
so steps are not in order.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Diagnostics"]


class Diagnostics:
    """Writes ``decisions-rank<rank>.jsonl`` in ``folder`` and keeps the sums that :meth:`scalars` returns."""

    def __init__(self, folder: str | Path, rank: int = 0):
        self.path = Path(folder) / f"decisions-rank{rank}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        self._counts: Counter[str] = Counter()
        self._bytes, self._waited_ms, self._fired_steps = 0, 0.0, 0

    def write(self, row: Mapping[str, Any]) -> None:
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
        }
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        self._counts[row["decision"]] += 1
        self._bytes += row["bytes"]
        self._waited_ms += row["waited_ms"]
        self._fired_steps += row["m"] if row["decision"] == "FIRE" else 0

    def scalars(self) -> dict[str, float]:
        """For a tracker (TensorBoard, W&B): counts so far, steps a FIRE carried in the mean, bytes, time waited."""
        fires = self._counts["FIRE"]
        return {
            "kpool/fire": float(fires),
            "kpool/hold": float(self._counts["HOLD"]),
            "kpool/steps_a_fire": self._fired_steps / fires if fires else 0.0,
            "kpool/bytes_sent": float(self._bytes),
            "kpool/waited_ms": self._waited_ms,
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
        self._file.close()
