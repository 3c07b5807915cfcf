"""A pool's state: what it looks like, how it is checked before anything of it is used, and the file it is kept in.

A state is a dictionary of numbers, strings, lists and tensors. It has a version and a checksum over its content, so it is
protected wherever it is stored. The functions here only look: they raise ValueError with the field, its value and what to
do, or return what may be loaded. docs/pool.md says how states are used.
"""

from __future__ import annotations

import errno
import hashlib
import io
import math
import os
import pickle
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops.statistics import LENGTH

__all__ = [
    "ADAPTER_FIELDS",
    "LATER",
    "VERSION",
    "check_extra",
    "checked",
    "checked_aggregator",
    "checksum",
    "file_of",
    "moment",
    "parts",
    "read",
    "read_all",
    "write",
]

#: Of the states that are made here. Version 1 had no checksum, and the version stood in the aggregator's part alone.
VERSION = 2

Path_ = str | os.PathLike
Check = Callable[[Any, str], None]  # (value, its name in errors); raises ValueError

DAMAGED = "the state is damaged or was edited, and nothing of it was loaded: use an earlier checkpoint"
OTHER_POOL = "nothing was loaded: load it into a pool that is built like the one that was saved"


# ---- checks of one value ---------------------------------------------------------------------------------------------


def _refuse(name: str, value: Any, expected: str) -> None:
    raise ValueError(f"{name} is {_shown(value)}, expected {expected}")


def _shown(value: Any) -> str:
    """Short enough for a sentence."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and {value.dtype}"
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of length {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def whole(least: int, most: int | None = None) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) is not int or value < least or (most is not None and value > most):
            limits = f"of at least {least}" if most is None else f"from {least} to {most}"
            _refuse(name, value, f"a whole number {limits}")

    return check


def number(least: float = -math.inf, *, finite: bool = True) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) is not float or (finite and not math.isfinite(value)) or value < least:
            kind = "a finite float" if finite else "a float"
            _refuse(name, value, kind if least == -math.inf else f"{kind} of at least {least:g}")

    return check


def of_type(kind: type) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) is not kind:
            _refuse(name, value, f"a {kind.__name__}")

    return check


def maybe(check: Check) -> Check:
    return lambda value, name: None if value is None else check(value, name)


def items(check: Check, length: int | None = None) -> Check:
    """A list, or a tuple, all of one kind."""

    def check_all(value: Any, name: str) -> None:
        if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
            _refuse(name, value, "a list" if length is None else f"a list of length {length}")
        for i, item in enumerate(value):
            check(item, f"{name}[{i}]")

    return check_all


def row(*checks: Check) -> Check:
    """A list, or a tuple, with a kind for each place."""

    def check_each(value: Any, name: str) -> None:
        items(lambda *_: None, len(checks))(value, name)
        for i, (check, item) in enumerate(zip(checks, value)):
            check(item, f"{name}[{i}]")

    return check_each


def table(fields: Mapping[str, Check]) -> Check:
    """A dictionary with just these keys."""

    def check(value: Any, name: str) -> None:
        if not isinstance(value, dict):
            _refuse(name, value, "a dict")
        dot = f"{name}." if name else ""
        for key in fields:
            if key not in value:
                raise ValueError(f"{dot}{key} is missing")
        for key in value:
            if key not in fields:
                raise ValueError(f"{dot}{key} is not known to this version")
            fields[key](value[key], f"{dot}{key}")

    return check


def floats(dtype: torch.dtype, length: int | None = None, least: float = -math.inf) -> Check:
    """A plain tensor of one dimension, finite."""

    def check(value: Any, name: str) -> None:
        shape = "[any]" if length is None else f"[{length}]"
        plain = type(value) is Tensor and value.layout == torch.strided and value.device.type != "meta"
        if not plain or value.dtype != dtype or value.dim() != 1 or (length is not None and value.numel() != length):
            _refuse(name, value, f"a tensor of shape {shape} and {dtype}")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} has {int((~torch.isfinite(value)).sum())} elements that are not finite")
        if bool((value < least).any()):
            raise ValueError(f"{name} has elements below {least:g}")

    return check


def rate(value: Any, name: str) -> None:
    """A learning rate: a float, or the one-element tensor that a capturable optimizer has."""
    if isinstance(value, Tensor):
        floats(value.dtype, 1)(value.reshape(-1) if type(value) is Tensor else value, name)
        if not value.is_floating_point():
            _refuse(name, value, "a floating point number")
    elif type(value) is not int:  # 1, as users write
        number()(value, name)


def simple(value: Any, name: str) -> None:
    """A caller's own: a number, a string, None."""
    if type(value) not in (int, float, str, bool, type(None)):
        _refuse(name, value, "a number, a string, True, False or None")


# ---- what a state looks like -----------------------------------------------------------------------------------------

_step = whole(-1)
_adapters = items(whole(0))

_FLIGHT = table(
    {
        "step": _step,
        "active": _adapters,
        "decision": row(of_type(bool), of_type(str), number(finite=False), number(finite=False)),
        "rates": items(rate),
    }
)

_ADAPTER: dict[str, Check] = {
    "numel": whole(1),
    "sum": maybe(floats(torch.float32)),
    "stats": floats(torch.float64, LENGTH, least=0.0),
    "loss": floats(torch.float64, 2),
    "anchor": maybe(floats(torch.float32)),
    "flight": maybe(_FLIGHT),
    "held": whole(0),
    "first_step": whole(0),
    "bound": whole(1),
    "planned": whole(0),
    "wanted": whole(0),
    # Statistics may be infinite, as after gradients of 1e200; what is added up may not.
    "trend": maybe(items(number(finite=False), 2)),
    "agreed": maybe(row(number(0.0), *[maybe(number(finite=False))] * 3)),
    "drift_ms": maybe(number(finite=False)),
    "lr_factor": number(0.0),
    "landed": maybe(row(whole(0), number())),
    "nothing_finite": of_type(bool),
    "came_to_nothing": of_type(bool),
    "rows_without_finite": maybe(items(whole(0))),  # None: not saved then
}
#: The fields of an adapter, by name.
ADAPTER_FIELDS = tuple(_ADAPTER)
#: Fields of an adapter that came later in version 2: what a state without them means.
LATER = {"nothing_finite": False, "came_to_nothing": False, "rows_without_finite": None}

_AGGREGATOR = table(
    {
        "version": whole(VERSION, VERSION),
        "world_size": whole(1),
        "rank": whole(0),
        "hold_action": of_type(str),
        "agreement": maybe(of_type(str)),  # None, and of the capacity too: version 1 did not say
        "capacity": maybe(whole(1)),
        "epoch": whole(0),
        "step": _step,
        "drift_ms": maybe(number(finite=False)),
        "agreed_losses": items(maybe(number())),
        "pending": maybe(row(whole(0), _adapters, items(items(number(finite=False))))),
        "adapters": items(table(_ADAPTER)),
    }
)

_ROUTER = table(
    {
        "strategy": of_type(str),
        "n": whole(1),
        "k": whole(1),
        "seed": whole(0, 2**64 - 1),
        "losses": items(maybe(number())),
    }
)


def check_extra(value: Any, name: str) -> None:
    of_type(dict)(value, name)
    for key, item in value.items():
        of_type(str)(key, f"a key of {name}")
        simple(item, f"{name}[{key!r}]")


_POOL = table(
    {
        "version": whole(VERSION, VERSION),
        "checksum": maybe(of_type(str)),
        "step": whole(0),
        "active": _adapters,
        "parameters": maybe(items(items(row(of_type(str), items(whole(0)))))),
        "aggregator": _AGGREGATOR,
        "router": _ROUTER,
        "counts": maybe(table({"fire": whole(0), "hold": whole(0)})),
        "telemetry": maybe(check_extra),
        "extra": check_extra,
    }
)


def _check_adapter(entry: dict[str, Any], name: str, step: int, n: int) -> None:
    """What fields of an adapter say about each other."""
    numel, held = entry["numel"], entry["held"]
    for field in ("sum", "anchor"):
        if entry[field] is not None:
            floats(torch.float32, numel)(entry[field], f"{name}.{field}")
    if held > 0 and entry["sum"] is None:
        raise ValueError(f"{name}.sum is None, but {name}.held is {held}")
    if held > 0 and not 1 <= held <= step - entry["first_step"] + 1:
        raise ValueError(
            f"{name}.held is {held}, which is more than the steps from first_step = {entry['first_step']} to {step}"
        )
    if entry["flight"] is not None and held == 0:
        raise ValueError(f"{name}.flight is there, but {name}.held is 0")
    if entry["flight"] is not None:
        _check_active(entry["flight"]["active"], f"{name}.flight.active", n)


def _check_capacity(entry: dict[str, Any], name: str, capacity: int) -> None:
    for field in ("bound", "planned", "wanted"):
        if entry[field] > capacity:
            raise ValueError(f"{name}.{field} is {entry[field]}, above the capacity of {capacity}")
    # A window whose FIRE was interrupted goes on with what it held.
    if entry["held"] > 2 * capacity:
        raise ValueError(f"{name}.held is {entry['held']}, which a capacity of {capacity} does not allow")


def _check_active(active: Sequence[int], name: str, n: int) -> None:
    if len(set(active)) != len(active) or any(i >= n for i in active):
        raise ValueError(f"{name} is {list(active)}, expected different adapters below {n}")


def _check_aggregator(state: Any, name: str) -> None:
    _AGGREGATOR(state, name)
    dot = f"{name}." if name else ""
    size, n = state["world_size"], len(state["adapters"])
    whole(0, size - 1)(state["rank"], f"{dot}rank")
    items(lambda *_: None, n)(state["agreed_losses"], f"{dot}agreed_losses")
    for i, entry in enumerate(state["adapters"]):
        _check_adapter(entry, f"{dot}adapters[{i}]", state["step"], n)
        if entry["rows_without_finite"] is not None:
            items(lambda *_: None, size)(entry["rows_without_finite"], f"{dot}adapters[{i}].rows_without_finite")
        if state["capacity"] is not None:
            _check_capacity(entry, f"{dot}adapters[{i}]", state["capacity"])
    if state["pending"] is not None:
        step, active, rows = state["pending"]
        _check_active(active, f"{dot}pending[1]", n)
        items(lambda *_: None, size)(rows, f"{dot}pending[2]")
        if len({len(each) for each in rows}) > 1 or step > state["step"]:
            raise ValueError(f"{dot}pending is no record of {size} ranks at or before step {state['step']}")


def _check_pool(state: dict[str, Any]) -> None:
    _POOL(state, "")
    _check_aggregator(state["aggregator"], "aggregator")
    n = state["router"]["n"]
    items(lambda *_: None, n)(state["router"]["losses"], "router.losses")
    items(lambda *_: None, n)(state["aggregator"]["adapters"], "aggregator.adapters")
    _check_active(state["active"], "active", n)
    if len(state["active"]) not in (0, state["router"]["k"]):
        raise ValueError(f"active is {list(state['active'])}, expected router.k = {state['router']['k']} adapters")
    if state["step"] != state["aggregator"]["step"] + 1:
        raise ValueError(f"step is {state['step']}, but aggregator.step is {state['aggregator']['step']}")
    if state["parameters"] is not None:
        for i, (own, entry) in enumerate(zip(state["parameters"], state["aggregator"]["adapters"])):
            numel = sum(math.prod(shape) for _, shape in own)
            if numel != entry["numel"]:
                raise ValueError(f"aggregator.adapters[{i}].numel is {entry['numel']}, but its parameters have {numel}")


# ---- versions and the checksum ---------------------------------------------------------------------------------------


def checksum(state: dict[str, Any]) -> str:
    """Of everything in a state but its field ``checksum``."""
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, {key: value for key, value in state.items() if key != "checksum"})
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Each value with its kind and its length, so that different states never give the same bytes. A tuple is a list."""
    if isinstance(value, dict):
        digest.update(b"d%d:" % len(value))
        for key in sorted(value):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(b"l%d:" % len(value))
        for item in value:
            _feed(digest, item)
    elif isinstance(value, Tensor):
        digest.update(f"t{value.dtype}{list(value.shape)}:".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif type(value) is float:
        digest.update(b"f" + struct.pack("<d", value))
    else:
        text = repr(value).encode()
        digest.update(f"{type(value).__name__}{len(text)}:".encode() + text)


def _check_version(version: Any, name: str) -> None:
    if type(version) is int and version > VERSION:
        raise ValueError(
            f"{name} is {version}, and this tsugi-kpool reads up to {VERSION}: the state was made by a newer tsugi-kpool; "
            "install it. Nothing was loaded"
        )


def _upgraded_aggregator(state: dict[str, Any]) -> dict[str, Any]:
    if state.get("version") != 1:
        return _filled_up(state, LATER)
    state = {"agreement": None, "capacity": None, **state, "version": VERSION}
    return _filled_up(state, {"flight": None, **LATER})


def _filled_up(state: dict[str, Any], unknown: dict[str, Any]) -> dict[str, Any]:
    """An aggregator's state whose adapters have these fields too, where they are absent."""
    adapters = state.get("adapters")
    if isinstance(adapters, (list, tuple)):
        adapters = [{**unknown, **entry} if isinstance(entry, dict) else entry for entry in adapters]
        state = {**state, "adapters": adapters}
    return state


def _upgraded(state: dict[str, Any]) -> dict[str, Any]:
    """An older state as one of today that does not know what was not saved then."""
    aggregator = state.get("aggregator")
    if not isinstance(aggregator, dict):
        return state
    if "version" in state or aggregator.get("version") != 1:
        return {**state, "aggregator": _filled_up(aggregator, LATER)}
    aggregator = _upgraded_aggregator(aggregator)
    unknown: dict[str, Any] = {"checksum": None, "parameters": None, "counts": None, "telemetry": None, "extra": {}}
    state = {**unknown, **state, "version": VERSION, "aggregator": aggregator}
    # Interrupted in the exchange, version 1 had counted the step in the aggregator only.
    if type(state.get("step")) is int and type(aggregator.get("step")) is int:
        if state["step"] in (aggregator["step"], aggregator["step"] + 1):
            state["step"] = aggregator["step"] + 1
    return state


def checked(state: Any, source: str = "state") -> dict[str, Any]:
    """A rank's state of a pool, as of this version.

    Args:
        state: what ``Pool.state_dict`` made, here or in an earlier version.
        source: what errors call it.

    Raises:
        ValueError: it is no such state, or it is damaged, or of a later version.
    """
    if not isinstance(state, dict):
        raise ValueError(f"{source} is {_shown(state)}, expected what pool.state_dict() returned")
    if not {"aggregator", "router"} <= state.keys() and "version" not in state:
        raise ValueError(f"{source} has no aggregator and no router: it is not the state of a pool")
    inner = state.get("aggregator")
    old = isinstance(inner, dict) and inner.get("version") == 1 and "version" not in state
    try:
        _check_version(state.get("version"), "version")
        if "version" not in state and isinstance(inner, dict):
            _check_version(inner.get("version"), "aggregator.version")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    given, state = state, _upgraded(state)
    try:
        _check_pool(state)
        if not old and given["checksum"] != checksum(given):
            raise ValueError(f"checksum is {given['checksum']!r}, but the content has {checksum(given)!r}")
    except ValueError as error:
        raise ValueError(f"{source}: {error}: {DAMAGED}") from None
    return state


def checked_aggregator(state: Any, source: str = "state") -> dict[str, Any]:
    """The same of ``Aggregator.state_dict`` alone, which has no checksum."""
    if not isinstance(state, dict):
        raise ValueError(f"{source} is {_shown(state)}, expected what Aggregator.state_dict() returned")
    _check_version(state.get("version"), f"{source}: version")
    state = _upgraded_aggregator(state)
    try:
        _check_aggregator(state, "")
    except ValueError as error:
        raise ValueError(f"{source}: {error}: {DAMAGED}") from None
    return state


def parts(state: Any) -> list[Any]:
    """The ranks' states in what a user hands in: one, a list of them, or what ``state_dict(all_ranks=True)`` made."""
    if isinstance(state, dict) and "ranks" in state:
        _check_version(state.get("version"), "state: version")
        state = state["ranks"]
    if isinstance(state, (list, tuple)):
        if not state:
            raise ValueError("state is an empty list: no rank's state is in it")
        return list(state)
    return [state]


def moment(steps: Mapping[int, int]) -> None:
    """ValueError unless all ranks' states are of the same step. ``steps``: rank -> the step that comes next there."""
    if len(set(steps.values())) > 1:
        each = ", ".join(f"rank {rank} is at step {step}" for rank, step in steps.items())
        raise ValueError(
            f"the ranks' states differ in step: {each}. Nothing was loaded: use an earlier checkpoint, in "
            "which all ranks are at one step"
        )


# ---- files -----------------------------------------------------------------------------------------------------------


def file_of(path: Path_, rank: int, world_size: int) -> Path:
    """Where the state of a rank is: in a folder, under a name of its own; beside other ranks' with its number."""
    folder = os.fspath(path).endswith(os.sep)
    path = Path(path)
    if folder or path.is_dir():
        return path / f"kpool_state_rank{rank}.pt"
    return path if world_size == 1 else path.with_name(f"{path.stem}_rank{rank}{path.suffix}")


def write(state: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all: what was there before stays until the new one is on the disk.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
            text = f"the pool's state could not be written to {path} ({reason}); what was there before is as it was"
            raise OSError(error.errno or errno.EIO, text) from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """The new name, too, is on the disk; where a file system cannot say so, it comes there by itself."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def read(path: Path_) -> dict[str, Any]:
    """The state in one file, checked. Nothing in the file is run.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no state, or a damaged one; the sentence names the file and the field.
    """
    path = Path(path)
    data = _bytes(path)
    if not data:
        raise ValueError(f"{path} is empty: {DAMAGED}")
    try:
        held = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise ValueError(
                f"{path} holds objects that only code can make, which is not run: it is not the state of a pool"
            ) from error
        raise ValueError(f"{path} cannot be read as a file of torch.save: {DAMAGED}") from error
    except Exception as error:  # what torch raises about foreign bytes is of every kind
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        what = "is cut off or damaged" if data[:2] == b"PK" else "is not a file that pool.save() wrote, or is cut off"
        raise ValueError(f"{path} {what} ({first}): {DAMAGED}") from error
    if isinstance(held, dict) and held.keys() == {"step", "parameters", "pool"}:  # KPoolCallback's, with version 1
        state = checked(held["pool"], str(path))
        check_extra({"step": held["step"], "parameters": held["parameters"]}, f"{path}: file")
        return {**state, "extra": {"step": held["step"], "parameters": held["parameters"]}}
    return checked(held, str(path))


def _bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EISDIR if path.is_dir() else errno.EINVAL, "not a file")
        return path.read_bytes()
    except OSError as error:
        raise type(error)(
            error.errno or errno.EIO,
            f"the pool's state could not be read from {path} ({error.strerror or error}); nothing was loaded",
        ) from error


def read_all(path: Path_ | Iterable[Path_], rank: int, world_size: int) -> list[dict[str, Any]]:
    """The states that a rank loads: its own, or those of all ranks where their number was another.

    Args:
        path: what ``pool.save`` was given, one file, or all ranks' files in rank order.
    """
    if not isinstance(path, (str, os.PathLike)):
        files = list(path)
        if not files:
            raise ValueError("path is an empty list, expected all ranks' files")
        return [read(file) for file in files]
    own, alone, first = (file_of(path, *each) for each in ((rank, world_size), (0, 1), (0, 2)))
    if alone.exists() and first.exists() and alone != first:
        raise ValueError(f"both {alone} and {first} exist, of one process and of several: remove the older one's files")
    # Another number of ranks may have saved; the first one's file is always there.
    found = next((file for file in (own, alone, first) if file.exists()), own)
    state = read(found)
    saved = state["aggregator"]["world_size"]
    if saved == 1 or Path(path).is_file():
        return [state]
    if saved == world_size:
        return [state if found == own else read(own)]
    return [read(file_of(path, r, saved)) for r in range(saved)]
