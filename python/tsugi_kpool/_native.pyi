"""The compiled module: importing it registers ``torch.ops.tsugi.*``."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__version__: str

def build_info() -> dict[str, object]:
    """Version, instruction set in use, which low-precision products torch runs fast here, CUDA kernels or not."""

def kernel_names() -> list[str]:
    """The names of the CUDA kernels that the operations launch."""

def kernel_resources() -> list[tuple[str, str, int, int, int]]:
    """(name, architecture, registers, bytes spilled, bytes of static shared memory) of each kernel that is built in.

    Only in a build with CUDA kernels.
    """

class Router:
    """Which K of N adapters are active in a step: a pure function of the settings, the step and the recorded losses."""

    losses: list[float | None]
    """The moving average of each adapter's loss; None where none was recorded."""

    def __init__(self, strategy: str, n: int, k: int, seed: int) -> None: ...
    def select(self, step: int) -> tuple[int, ...]:
        """The K adapters of a step, ascending."""

    def table(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """The adapters of ``count`` steps from ``first`` on, ``[count, k]``."""

    def record_loss(self, active: list[int], loss: float) -> None:
        """Fold the loss of a step into the averages of its active adapters; one that is not finite is left out."""

    def digest(self, step: int) -> int:
        """64 bits that are equal where the routers choose alike from ``step`` on."""

class Agreed(NamedTuple):
    """What all ranks know of an adapter: src/statistics.rs."""

    m: float
    variance: float | None
    signal: float | None
    power: float

class Decision(NamedTuple):
    """HOLD or FIRE, why, and the two numbers that were compared; NaN where nothing was."""

    fires: bool
    reason: str
    statistic: float
    threshold: float

class Trend(NamedTuple):
    """The moving averages of V and ||E g||^2."""

    variance: float
    signal: float

class Plan(NamedTuple):
    """The averages after a window, and the length of the next one."""

    trend: Trend | None
    length: int

_Agreed = tuple[float, float | None, float | None, float]  # an Agreed, or its numbers from a checkpoint

class TriggerRule:
    """What decides HOLD or FIRE for one adapter: a pure function of agreed numbers."""

    def __new__(
        cls,
        trigger: str,
        threshold: float,
        *,
        capacity: int,
        max_hold_steps: int | None,
        max_drift_ms: float,
        world_size: int,
        numel: int,
    ) -> TriggerRule: ...
    def decide(
        self,
        *,
        held: int,
        age: int,
        bound: int,
        flush: bool,
        drift_ms: float | None,
        planned: int | None,
        agreed: _Agreed | None,
        nothing_finite: bool = False,
    ) -> Decision: ...
    def plan(self, trend: tuple[float, float] | None, window: _Agreed, held: int) -> Plan: ...
    def apart(self, length: int, others: list[tuple[int, int]]) -> int:
        """A length about this one, so that the window ends between the others', (steps left, length) each."""
    def first_window(self, adapter: int, planned: bool, stagger: bool) -> int: ...

def trigger_fold(ranks: list[tuple[float, float, float, float, float]]) -> Agreed:
    """The mean over ranks of V and P of rows (m, n, n2, Q, ||S||^2)."""

def trigger_pool(ranks: list[tuple[float, float, float, float, float]], norm2: float) -> Agreed:
    """V and P of all ranks' snapshots together; norm2 is ||sum over ranks of S||^2."""

def trigger_nothing_to_apply(ranks: list[tuple[float, float]], sum_is_finite: bool) -> str | None:
    """Why a FIRE has nothing to apply, or None where it has; rows are each rank's (weight sent, gradients left out)."""

def trigger_rows_without_finite(before: list[int], ranks: list[tuple[float, float]]) -> list[int]:
    """Each rank's steps in a row without a finite gradient, with this window's (weight sent, gradients left out) added."""

class SidebandAgent:
    """A bound port, then a running agent; :class:`tsugi_kpool.Sideband` is its public face."""

    port: int
    forked: bool
    """True in a child that was forked since this was made: the agent, its port and its connections are the parent's."""

    def __init__(self, address: str) -> None: ...
    def start(
        self,
        *,
        node: int,
        peers: list[str],
        key: str,
        job: int,
        epoch: int,
        heartbeat_ms: int,
        dead_after_ms: int,
        expire_after_ms: int,
    ) -> None: ...
    def report_step(self, step: int, duration_ms: float, fill: float, fires: int, holds: int) -> None: ...
    def snapshot(self) -> dict[str, Any]:
        """Arrays over the peers in order of node, and counts: :meth:`tsugi_kpool.sideband.Sideband.snapshot`."""

    def stop(self) -> bool: ...

def read_sideband_key(path: str) -> str:
    """The key in a file that its owner alone can read, as 64 hexadecimal digits."""

def sideband_constants() -> dict[str, bytes | int | float]:
    """What the wire format fixes: magic, version, and the sizes in bytes of openings, first messages and records."""
