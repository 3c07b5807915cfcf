"""What the commands share: errors as one sentence."""

from __future__ import annotations

__all__ = ["DemoError", "first_line"]


class DemoError(Exception):
    """What went wrong, in one sentence."""


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
