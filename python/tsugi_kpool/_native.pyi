"""The compiled module: importing it registers ``torch.ops.tsugi.*``."""

__version__: str

def build_info() -> dict[str, object]:
    """Version, instruction set in use, which low-precision products torch runs fast here, CUDA kernels or not."""

class Router:
    """Which K of N adapters are active in a step; a pure function of the step and of what was recorded."""

    def __init__(self, strategy: str, n_adapters: int, k_active: int, seed: int) -> None: ...
    def choose(self, step: int) -> tuple[int, ...]:
        """The active adapters, ascending."""

    def record(self, step: int, active: list[int], loss: float | None = None) -> None: ...
    def digest(self, step: int) -> int:
        """64 bits that are equal where the next choices are."""

    def records(self) -> list[tuple[int, float | None]]:
        """An adapter: one more than its last active step, and the moving average of its loss."""

    def restore(self, records: list[tuple[int, float | None]]) -> None: ...

class SidebandAgent:
    """A bound port, then a running agent; :class:`tsugi_kpool.sideband.Sideband` is its public face."""

    port: int

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
    def snapshot(self) -> dict[str, object]: ...
    def stop(self) -> bool: ...

def read_sideband_key(path: str) -> str:
    """The key in a file that its owner alone can read, as 64 hexadecimal digits."""
