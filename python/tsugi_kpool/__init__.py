"""tsugi-kpool: LoRA fine-tuning with PyTorch and PEFT, faster by one line.

``use_backend(model)`` moves the LoRA layers of a PEFT model onto ``torch.ops.tsugi.*`` and back;
:mod:`tsugi_kpool.ops` documents the operations themselves.
"""

import torch as _torch  # noqa: F401  the native library finds libtorch through the process, so torch comes first

from . import ops, reference
from .backend import BackendReport, LayerReport, use_backend

__version__ = "0.2.0"

__all__ = ["BackendReport", "LayerReport", "__version__", "ops", "reference", "use_backend"]
