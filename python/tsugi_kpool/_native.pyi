"""The compiled module: importing it registers ``torch.ops.tsugi.*``."""

__version__: str

def build_info() -> dict[str, object]:
    """Version, instruction set in use, which low-precision products torch runs fast here, CUDA kernels or not."""

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
