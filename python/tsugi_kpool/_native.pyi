"""The compiled module: importing it registers ``torch.ops.tsugi.*``."""

__version__: str

def build_info() -> dict[str, object]:
    """Version, instruction set in use, which low-precision products torch runs fast here, CUDA kernels or not."""
