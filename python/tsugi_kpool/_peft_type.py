"""PEFT's method type KPOOL: a new member of its enum, made here because the configuration and the model both name it."""

from __future__ import annotations

from peft.utils.peft_types import PeftType

__all__ = ["KPOOL"]


def _member(name: str) -> PeftType:
    """The member of this name, added where PEFT has none: enums that are str are looked up by their value."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


KPOOL = _member("KPOOL")
