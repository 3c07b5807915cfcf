"""The names that scripts import from ``tsugi_kpool.sideband``; ``tsugi_kpool`` itself has ``Sideband`` too."""

from .distributed.sideband import Sideband

__all__ = ["Sideband"]
