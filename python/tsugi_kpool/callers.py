"""Warnings that point at the user's line, not at one of a library that called us."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn_user"]

_LIBRARIES = {"tsugi_kpool", "torch", "peft", "transformers", "accelerate", "trl", "contextlib"}


def warn_user(message: str) -> None:
    """Issue a UserWarning for the innermost caller that is none of ``_LIBRARIES``."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=2 if frame is None else level)
