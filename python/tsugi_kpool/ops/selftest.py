"""The operations tried once on each device before a layer is moved onto them there.

Which kernel runs depends on the processor or the GPU, and no build has met them all. A device on which the result is not
that of plain torch in float64, or on which the operations fail, keeps PEFT's layers, and the reason says so.

The trial leaves nothing behind, and nothing of its caller reaches it. It runs in a thread of its own, because what may be
switched on around a call belongs to the caller's thread: inference mode, autocast, dispatch and function modes (fake
tensors, default devices), functorch's transforms, tracing, saved-tensor hooks. The OpenMP threads that its products start
belong to that thread too and end with it: had the caller's thread started them, a process forked from it would wait for
them for ever. The caller goes on when they have all ended, not before (see ``_wait_until_gone``). It calls the backward operations itself, because autograd's engine would start threads that forbid a fork
on a machine with a GPU. It draws from a generator of its own, and names each dtype and device.

Only what is the device's fault is remembered. Where plain torch fails just as well (a setting, no memory), the next call
tries again.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import reference
from .experts import lora_experts_backward

__all__ = ["dtype_name", "fault", "lasting_fault"]


@dataclass(frozen=True)
class _Trial:
    """One combination of dtypes to try."""

    dtype: torch.dtype  # of x, the weight and y
    adapter_dtype: torch.dtype
    limit: float  # the relative error that rounding may cause; wrong is far beyond: a missing term is above 0.1

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} with {dtype_name(self.adapter_dtype)} adapters"


_TRIALS = (
    _Trial(torch.float32, torch.float32, 5e-3),  # the frozen product may use TF32 where the user allows it
    _Trial(torch.bfloat16, torch.float32, 4e-2),
    _Trial(torch.bfloat16, torch.bfloat16, 4e-2),
    _Trial(torch.float16, torch.float32, 5e-3),
)
_ROWS, _IN, _OUT, _RANKS = 65, 96, 80, (8, 3)
_SCALING, _DROPOUT = (2.0, 0.5), 0.25
_WAIT_S = 5.0  # 30 ms were the longest that 124 waits took on two cores with 48 processes ready
_numbers = itertools.count()


@dataclass(frozen=True)
class _Verdict:
    fault: str | None
    lasting: bool  # whether it is the device's, and so will be the same next time


#: device -> what is wrong with the operations there, for ever; None: nothing. Only whole verdicts get in, so two threads
#: that try at the same time both try, find the same and store the same: no lock that a fork could leave locked.
_faults: dict[torch.device | str, str | None] = {}


def fault(device: torch.device | str) -> str | None:
    """What is wrong with the operations on ``device`` now, or None. Tried at the first call for it, then remembered.

    What is not the device's fault (``the operations could not be tried on ...``) is not remembered.
    """
    if device in _faults:
        return _faults[device]
    return _find(device).fault


def lasting_fault(device: torch.device | str) -> str | None:
    """The same, but None where the operations could not be tried: a later call will."""
    if device in _faults:
        return _faults[device]
    verdict = _find(device)
    return verdict.fault if verdict.lasting else None


def _find(device: torch.device | str) -> _Verdict:
    if getattr(device, "type", device) == "cuda" and torch.cuda.is_current_stream_capturing():
        # Another thread's allocations would spoil the capture.
        return _untried(device, "a CUDA graph is being captured; run the model once before")
    verdict = _try_in_own_thread(device)
    if verdict.lasting:
        _faults[device] = verdict.fault
    return verdict


def _untried(device: torch.device | str, why: str) -> _Verdict:
    return _Verdict(f"the operations could not be tried on {device}: {why}", lasting=False)


def _try_in_own_thread(device: torch.device | str) -> _Verdict:
    outcome: list[_Verdict | BaseException] = []

    def run() -> None:
        _name_for_the_system(name)
        try:
            outcome.append(_try(torch.device(device)))
        except BaseException as error:
            outcome.append(error)

    name = f"tsugi-try-{next(_numbers)}"
    thread = threading.Thread(target=run, name=name)
    try:
        thread.start()
    except RuntimeError as error:  # too many threads, or the interpreter is ending
        return _untried(device, str(error))
    thread.join()
    _wait_until_gone(name)
    (result,) = outcome
    if isinstance(result, Exception):
        return _untried(device, _sentence(result))
    if isinstance(result, BaseException):  # an interrupt is the caller's
        raise result
    return result


def _name_for_the_system(name: str) -> None:
    """Names the calling thread. On Linux the threads that it starts, OpenMP's among them, inherit the name."""
    with contextlib.suppress(OSError):  # no such file on other systems
        Path("/proc/thread-self/comm").write_text(name)


def _wait_until_gone(name: str) -> None:
    """Waits until no thread of that name is left: ``join`` returns before the system's thread ends.

    A thread that has used MKL, which torch multiplies with, ends by taking all locks of MKL's memory. A process that is
    forked at that moment gets them locked, and its first product waits for them for ever. A library may have started a
    thread that stays, so the wait has a limit.
    """
    deadline = time.monotonic() + _WAIT_S
    while _is_running(name) and time.monotonic() < deadline:
        time.sleep(0.001)


def _is_running(name: str) -> bool:
    for file in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # the thread has ended meanwhile
            if file.read_text().rstrip("\n") == name:
                return True
    return False


def _try(device: torch.device) -> _Verdict:
    for trial in _TRIALS:
        try:
            error = _error(ops, device, trial)
        except RuntimeError as failure:
            if _out_of_memory(failure):
                return _untried(device, _sentence(failure))
            found = f"the operations fail on {device} ({trial}): {failure}"
        else:
            if error <= trial.limit:  # not where it is NaN
                continue
            found = f"the operations are wrong on {device}: {trial} differ from torch's result by {error:.1e}"
        # What troubles plain torch too, in the same dtypes and the same place, is not the operations' doing.
        common = _trouble_of_plain_torch(device, trial)
        return _Verdict(found, lasting=True) if common is None else _untried(device, common)
    return _Verdict(None, lasting=True)


def _trouble_of_plain_torch(device: torch.device, trial: _Trial) -> str | None:
    try:
        error = _error(reference, device, trial)
    except RuntimeError as failure:
        return f"plain torch fails there too ({trial}): {_sentence(failure)}"
    return None if error <= trial.limit else f"plain torch is wrong there too: {trial} differ by {error:.1e}"


def _out_of_memory(failure: RuntimeError) -> bool:
    # torch's allocator for the CPU raises a plain RuntimeError.
    text = str(failure).lower()
    return isinstance(failure, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def _sentence(error: Exception) -> str:
    """The first line of an error: torch puts traces of its own below."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _error(module: ModuleType, device: torch.device, trial: _Trial) -> float:
    """The largest relative error of y, dx, dA and dB, of a layer and of experts, against float64 with the same masks.

    ``module`` has the operations: ``ops`` or ``reference``.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # not the user's

    def draw(*shape: int, of: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(of)

    weight, grad, x = (draw(*shape, of=trial.dtype) for shape in ((_OUT, _IN), (_ROWS, _OUT), (_ROWS, _IN)))
    A = [draw(r, _IN, of=trial.adapter_dtype) for r in _RANKS]
    B = [draw(_OUT, r, of=trial.adapter_dtype) for r in _RANKS]
    rng = torch.tensor([1, 2], dtype=torch.int64, device="cpu")

    def run(module: ModuleType, rng: Tensor, **to: Any) -> list[Tensor]:
        weight_, grad_, x_ = (t.to(**to) for t in (weight, grad, x))
        A_, B_ = [a.to(**to) for a in A], [b.to(**to) for b in B]
        y = module.lora_linear(x_, weight_, None, A_, B_, _SCALING, _DROPOUT, rng)
        h = module.lora_shrink(x_, A_, _DROPOUT, rng)
        dx, dA, dB = module.lora_backward(grad_, x_, h, weight_, A_, B_, _SCALING, _DROPOUT, rng)
        return [y, dx, *dA, *dB, *_of_experts(module, grad_, x_, A_, B_, rng)]

    results = run(module, rng.to(device), device=device)
    exact = run(reference, rng, dtype=torch.float64)
    errors = [(a.detach().cpu().double() - b).norm() / b.norm() for a, b in zip(results, exact)]
    return torch.stack(errors).max().item()


def _of_experts(
    module: ModuleType, grad: Tensor, x: Tensor, A: list[Tensor], B: list[Tensor], rng: Tensor
) -> list[Tensor]:
    """The same of two experts, the second with the first one's factors turned; ``grad`` is their output as well."""
    A, B = [torch.stack([t, -t.flip(0)]) for t in A], [torch.stack([t, t.flip(0)]) for t in B]
    ends = torch.tensor([_ROWS // 3, _ROWS], device=x.device)
    first = (torch.arange(_ROWS, device=x.device) < _ROWS // 3)[:, None]
    of_first, of_second = (module.lora_shrink(x, [a[e] for a in A], _DROPOUT, rng) for e in (0, 1))
    h = torch.where(first, of_first, of_second)
    y = module.lora_experts(grad, x, ends, A, B, _SCALING, _DROPOUT, rng)
    backward = reference.lora_experts_backward if module is reference else lora_experts_backward
    dx, dA, dB = backward(grad, x, h, ends, A, B, _SCALING, _DROPOUT, rng)
    return [y, dx, *dA, *dB]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
