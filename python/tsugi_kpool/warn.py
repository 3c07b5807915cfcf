"""Warnings that point at the user's line, however many frames of libraries lie between."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["warn_user"]

#: Top-level packages whose frames are nobody's own code: ours, and those through which our code is called.
_LIBRARIES = frozenset(
    "tsugi_kpool torch peft transformers accelerate trl lightning pytorch_lightning contextlib functools threading "
    "concurrent".split()
)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, with file and line of the nearest caller outside of the libraries: as ``stacklevel``, without counting.

    A fixed ``stacklevel`` is right for one way to a warning only; a layer's forward is reached through any number of
    torch's and transformers' frames.
    """
    frame = _users_frame(sys._getframe(1))
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _users_frame(frame: FrameType) -> FrameType:
    while _is_library(frame) and frame.f_back is not None:
        frame = frame.f_back
    return frame  # the outermost, in a thread that a library started


def _is_library(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _LIBRARIES
