"""tsugi-kpool: LoRA fine-tuning with PyTorch and PEFT, faster by one line, with K of N adapters active in a step.

``use_backend(model)`` moves the LoRA layers of a PEFT model onto ``torch.ops.tsugi.*`` and back; :mod:`tsugi_kpool.ops`
documents the operations themselves. ``get_peft_model(base, KPoolLoraConfig(...))`` builds a pool of N adapters,
``attach(model)`` trains K of them a step, and ``export(model, folder)`` makes ordinary LoRA of it. Importing this package
is what teaches PEFT to build and to load pools.
"""

import torch as _torch  # noqa: F401  the native library finds libtorch through the process, so torch comes first

from . import ops, reference
from .backend import BackendReport, LayerReport, use_backend
from .config import KPoolLoraConfig
from .export import ExportReport, export
from .pool import KPoolModel
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
from .sync import AggregationDecision, recommend_buffer_convergence_eps

__version__ = "0.2.0"

__all__ = [
    "AggregationDecision",
    "BackendReport",
    "ExportReport",
    "KPoolLoraConfig",
    "KPoolModel",
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
]
