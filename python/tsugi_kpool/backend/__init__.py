"""``use_backend``: the LoRA layers of a PEFT model onto ``torch.ops.tsugi.*`` and back."""

from .report import BackendReport, LayerReport
from .swap import use_backend

__all__ = ["BackendReport", "LayerReport", "use_backend"]
