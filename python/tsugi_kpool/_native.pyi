"""The compiled module: importing it registers ``torch.ops.tsugi.*``."""

__version__: str

def build_info() -> dict[str, object]:
    """Version, instruction set in use, which low-precision products torch runs fast here, CUDA kernels or not."""

class Router:
    """Which K of N adapters are active in a step: a pure function of the settings, the step and the recorded losses."""

    losses: list[float | None]
    """The moving average of each adapter's loss; None where none was recorded."""

    def __init__(self, strategy: str, n: int, k: int, seed: int) -> None: ...
    def select(self, step: int) -> tuple[int, ...]:
        """The K adapters of a step, ascending."""

    def record_loss(self, active: list[int], loss: float) -> None:
        """Fold the loss of a step into the averages of its active adapters; one that is not finite is left out."""

    def digest(self, step: int) -> int:
        """64 bits that are equal where the routers choose alike from ``step`` on."""
