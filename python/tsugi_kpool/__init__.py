"""tsugi-kpool: LoRA fine-tuning with PyTorch and PEFT, faster by one line.

``KPoolLoraConfig`` builds a pool of N adapters as a PEFT method and ``attach`` trains K of them a step;
``use_backend(model)`` moves the LoRA layers of a PEFT model onto ``torch.ops.tsugi.*`` and back;
:mod:`tsugi_kpool.ops` documents the operations themselves.
"""

import importlib as _importlib
import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING

from ._version import __version__


def _starts_the_command_line() -> bool:
    """Whether this import is the first part of ``python -m tsugi_kpool``: until the module is found, argv[0] is "-m"."""
    return _sys.argv[:1] == ["-m"] and " -m tsugi_kpool " in f"{' '.join(_sys.orig_argv)} "


# Torch and PEFT take seconds to import. The command line reads its options first; __getattr__ below then loads this file
# again, whole.
_without_torch = "_without_torch" not in globals() and _starts_the_command_line()
if _TYPE_CHECKING or not _without_torch:
    import torch as _torch  # noqa: F401  the native library finds libtorch through the process, so torch comes first

    from . import ops
    from .backend import BackendReport, LayerReport, use_backend
    from .distributed.aggregator import AggregationDecision
    from .distributed.nonfinite import NonFiniteError
    from .distributed.ranks import SyncError
    from .ops import reference
    from .pool import tuner as _tuner  # noqa: F401  it registers the PEFT method
    from .pool.attach import attach
    from .pool.config import KPoolLoraConfig, recommend_buffer_convergence_eps
    from .pool.ddp import keep_ddp_local
    from .pool.export import Exported, export
    from .pool.legacy import (
        apply_kpool_step,
        get_runtime,
        plesio_init,
        plesio_shutdown,
        post_backward_step,
        pre_forward_step,
    )
    from .pool.training import Pool
    from .pool.whole import whole_pool

# Imported when they are asked for: the one takes seconds (transformers' Trainer), the other needs the native library.
_LAZY = {"KPoolCallback": ".pool.trainer", "Sideband": ".distributed.sideband"}

if _TYPE_CHECKING:
    from .distributed.sideband import Sideband as Sideband
    from .pool.trainer import KPoolCallback as KPoolCallback

__all__ = [
    "AggregationDecision",
    "BackendReport",
    "Exported",
    "KPoolCallback",
    "KPoolLoraConfig",
    "LayerReport",
    "NonFiniteError",
    "Pool",
    "Sideband",
    "SyncError",
    "__version__",
    "apply_kpool_step",
    "attach",
    "export",
    "get_runtime",
    "keep_ddp_local",
    "ops",
    "plesio_init",
    "plesio_shutdown",
    "post_backward_step",
    "pre_forward_step",
    "recommend_buffer_convergence_eps",
    "reference",
    "use_backend",
    "whole_pool",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(_importlib.import_module(_LAZY[name], __name__), name)
    if _without_torch and name in __all__:
        _importlib.reload(_sys.modules[__name__])
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
