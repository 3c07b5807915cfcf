"""The names that scripts import from ``tsugi_kpool.sync``; ``tsugi_kpool`` itself has them too."""

from .distributed.aggregator import AggregationDecision
from .distributed.nonfinite import NonFiniteError
from .distributed.ranks import SyncError
from .pool.ddp import keep_ddp_local

__all__ = ["AggregationDecision", "NonFiniteError", "SyncError", "keep_ddp_local"]
