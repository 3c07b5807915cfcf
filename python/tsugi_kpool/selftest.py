"""The operations tried once on each device before a layer is moved onto them there.

Which kernel runs depends on the processor or the GPU, and no build has met them all. A device on which the result is not
that of plain torch in float64, or on which the operations fail, keeps PEFT's layers, and the reason says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, reference

__all__ = ["dtype_name", "fault"]

#: Of x, of the adapters, and the relative error that rounding may cause. Wrong is far beyond: a missing term is above 0.1.
_TRIED = (
    (torch.float32, torch.float32, 5e-3),  # the frozen product may use TF32 where the user allows it
    (torch.bfloat16, torch.float32, 4e-2),
    (torch.bfloat16, torch.bfloat16, 4e-2),
    (torch.float16, torch.float32, 5e-3),
)
_ROWS, _IN, _OUT, _RANKS = 65, 96, 80, (8, 3)

_faults: dict[torch.device | str, str | None] = {}


def fault(device: torch.device | str) -> str | None:
    """What is wrong with the operations on ``device``, or None. Tried at the first call for it, then remembered."""
    if device not in _faults:
        _faults[device] = None  # the trial itself must not start another one
        _faults[device] = _try(torch.device(device))
    return _faults[device]


def _try(device: torch.device) -> str | None:
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for dtype, adapter_dtype, limit in _TRIED:
            what = f"{dtype_name(dtype)} with {dtype_name(adapter_dtype)} adapters"
            try:
                error = _error(device, dtype, adapter_dtype)
            except RuntimeError as failure:
                return f"the operations fail on {device} ({what}): {failure}"
            if not error <= limit:  # also where it is NaN
                return f"the operations are wrong on {device}: {what} differ from torch's result by {error:.1e}"
    return None


def _error(device: torch.device, dtype: torch.dtype, adapter_dtype: torch.dtype) -> float:
    """The largest relative error of y, dx, dA and dB against float64 with the same dropout masks."""
    generator = torch.Generator().manual_seed(0)  # not the user's

    def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(of)

    weight, grad = draw(_OUT, _IN), draw(_ROWS, _OUT)
    leaves = [draw(_ROWS, _IN)]
    leaves += [draw(r, _IN, of=adapter_dtype) for r in _RANKS] + [draw(_OUT, r, of=adapter_dtype) for r in _RANKS]
    rng = torch.tensor([1, 2])

    def run(module, to: dict) -> list[Tensor]:
        fresh = [leaf.to(**to).requires_grad_() for leaf in leaves]
        K = len(_RANKS)
        moved = {name: value for name, value in to.items() if name == "device"}
        y = module.lora_linear(
            fresh[0], weight.to(**to), None, fresh[1 : 1 + K], fresh[1 + K :], [2.0, 0.5], 0.25, rng.to(**moved)
        )
        return [y, *torch.autograd.grad(y, fresh, grad.to(**to))]

    ours, exact = run(ops, {"device": device}), run(reference, {"dtype": torch.float64})
    errors = [(a.detach().cpu().double() - b).norm() / b.norm() for a, b in zip(ours, exact)]
    return torch.stack(errors).max().item()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
