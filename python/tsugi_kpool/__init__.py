"""tsugi-kpool: LoRA fine-tuning with PyTorch and PEFT, faster by one line.

``KPoolLoraConfig`` builds a pool of N adapters as a PEFT method and ``attach`` trains K of them a step;
``use_backend(model)`` moves the LoRA layers of a PEFT model onto ``torch.ops.tsugi.*`` and back;
:mod:`tsugi_kpool.ops` documents the operations themselves.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

import torch as _torch  # noqa: F401  the native library finds libtorch through the process, so torch comes first

from . import ops, reference
from .backend import BackendReport, LayerReport, use_backend
from .config import KPoolLoraConfig, recommend_buffer_convergence_eps
from .export import Exported, export
from .pool import whole_pool
from .runtime import (
    Pool,
    apply_kpool_step,
    attach,
    get_runtime,
    plesio_init,
    plesio_shutdown,
    post_backward_step,
    pre_forward_step,
)

if _TYPE_CHECKING:
    from .trainer import KPoolCallback as KPoolCallback

__version__ = "0.2.0"

__all__ = [
    "BackendReport",
    "Exported",
    "KPoolCallback",
    "KPoolLoraConfig",
    "LayerReport",
    "Pool",
    "__version__",
    "apply_kpool_step",
    "attach",
    "export",
    "get_runtime",
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


def __getattr__(name: str):
    if name == "KPoolCallback":  # it imports transformers' Trainer, which takes seconds
        from .trainer import KPoolCallback

        return KPoolCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
