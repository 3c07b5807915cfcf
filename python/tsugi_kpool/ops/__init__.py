"""The operations, as Python functions over ``torch.ops.tsugi.*``; registers what they need beside the native kernels.

Everywhere below: x is [..., I], a weight [O, I], A[k] [r_k, I], B[k] [O, r_k], y, base and grad are [..., O], h is
[..., R] with R the sum of the r_k, the adapters side by side in the order given. M is the product of x's leading sizes.
x, weight, bias, base, y and grad have one dtype of float32, float64, bfloat16, float16; all A and B have one dtype, x's
or a wider one (float32 adapters under bfloat16 activations are PEFT's default). h has the dtype of both promoted. Sums
are kept in float32, or in float64 where an operand is float64.

Wrong arguments raise ``RuntimeError`` with a sentence that names the argument and its value.

Dropout is a pure function of ``rng`` = (seed, offset), int64 [2] on x's device: the backward pass draws the mask again
instead of storing it. :func:`draw_rng` takes one from torch's generator, so ``torch.manual_seed`` and the recomputation
of gradient checkpointing give the same masks. Each adapter drops independently, as PEFT's layers do. The rate is rounded
to a multiple of 1/65536 and kept elements are scaled by the inverse of the exact keep probability.

Sources: LoRA, Hu et al. 2021 (arXiv:2106.09685); Philox4x32-7, Salmon et al., SC 2011.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import autograd, experts, fakes

__all__ = [
    "available",
    "buffer_variance",
    "draw_rng",
    "lora_backward",
    "lora_delta",
    "lora_expand_",
    "lora_experts",
    "lora_linear",
    "lora_shrink",
    "sideband_accumulate_",
    "sideband_drain_",
    "sideband_stats",
    "unavailable_reason",
]

OPERATIONS = sorted(set(__all__) - {"available", "draw_rng", "unavailable_reason"})

try:
    # By its full name: `from .. import` would hide why the loader refused it. Importing it registers torch.ops.tsugi.
    _native: Any = importlib.import_module("tsugi_kpool._native")
    unavailable_reason: str | None = None
except ImportError as error:
    _native = None
    unavailable_reason = f"the native library of tsugi-kpool could not be loaded: {error}"


def available() -> bool:
    """Whether the native operations are loaded; if not, :data:`unavailable_reason` says why."""
    return unavailable_reason is None


def draw_rng(device: torch.device | str = "cpu") -> Tensor:
    """A fresh (seed, offset) for dropout: int64 [2] on ``device``, from torch's generator of that device."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def _plain_eager() -> bool:
    """Whether the dispatcher would call the autograd kernel next, so that it can be called without the detour.

    The detour through torch.ops costs about 15 us a call: the boxed arguments of a Python kernel.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
    )


def _listed(values: Any) -> Any:
    """A list of what came as another sequence (``nn.ParameterList``) or a generator.

    Autograd looks for what requires grad in lists and tuples only, and the backward pass reads the factors again. What
    is no sequence, and a tensor in place of a list of them, stay as they are: the dispatcher names them.
    """
    if type(values) is list or type(values) is tuple:
        return values
    return list(values) if isinstance(values, Iterable) and not isinstance(values, (str, Tensor)) else values


# ---- the public functions --------------------------------------------------------------------------------------------


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b + sum_k scaling[k] B[k] A[k] drop_k(x): a frozen linear layer with K adapters, in one call.

    Args:
        x: input [..., I].
        weight: frozen weight [O, I]. Requiring its gradient is an error: use ``lora_delta`` on a trained base.
        bias: [O] or None.
        A, B: K >= 1 adapters, [r_k, I] and [O, r_k], in any sequence; ranks may differ.
        scaling: K finite numbers. A tensor that requires grad is an error: no gradient flows to a factor.
        dropout_p: probability in [0, 1) with which each adapter drops an element of x.
        rng: (seed, offset), int64 [2]; needed when ``dropout_p > 0``.

    Returns:
        y [..., O] of x's dtype. Differentiable any number of times in x, bias, A and B. Kept for the backward pass is x
        if an A requires grad, h [M, R] if a B does, and nothing else but arguments that do not grow with M.

    Raises:
        RuntimeError: for arguments that do not fit together.
    """
    kernel = autograd.lora_linear if _plain_eager() else torch.ops.tsugi.lora_linear.default
    return kernel(x, weight, bias, _listed(A), _listed(B), _listed(scaling), dropout_p, rng)


def lora_delta(
    base: Tensor,
    x: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """base + sum_k scaling[k] B[k] A[k] drop_k(x): K adapters on the output of any base layer (quantised, for example).

    ``base`` is [..., O] with x's leading sizes and dtype; it is not written. Differentiable any number of times in base,
    x, A and B. The other arguments, the result and the errors are those of :func:`lora_linear`.
    """
    kernel = autograd.lora_delta if _plain_eager() else torch.ops.tsugi.lora_delta.default
    return kernel(base, x, _listed(A), _listed(B), _listed(scaling), dropout_p, rng)


def lora_experts(
    base: Tensor,
    x: Tensor,
    ends: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """base + sum_k scaling[k] B[k][e] A[k][e] drop_k(x) on each row, e being its expert: adapters on a mixture's experts.

    Args:
        base: the experts' own output [M, O], its rows sorted by expert; it is not written.
        x: those rows' input [M, I], of base's dtype.
        ends: int32 or int64 [E] on x's device: expert e has the rows ends[e-1] to ends[e], as the ``offs`` of
            ``torch.nn.functional.grouped_mm``. Rows from ends[-1] on belong to no expert: the result there is base.
        A, B: K >= 1 adapters, [E, r_k, I] and [E, O, r_k], of any strides: PEFT's ``lora_B`` [O, r E] is taken as the
            view [O, r, E] permuted. Ranks may differ between adapters.
        scaling, dropout_p, rng: those of :func:`lora_linear`. An element of x is dropped by its row as given.

    Returns:
        [M, O] of x's dtype. Differentiable any number of times in base, x, A and B. Kept for the backward pass is x if an
        A requires grad, h [M, R] if a B does, and nothing else that grows with M. The gradients of A and B have their
        layouts, where those are dense.

    Raises:
        RuntimeError: for arguments that do not fit together; on the CPU also for ends that decrease or exceed M, before
            anything is computed.
    """
    kernel = experts.lora_experts if _plain_eager() else torch.ops.tsugi.lora_experts.default
    return kernel(base, x, ends, _listed(A), _listed(B), _listed(scaling), dropout_p, rng)


def lora_shrink(x: Tensor, A: Sequence[Tensor], dropout_p: float = 0.0, rng: Tensor | None = None) -> Tensor:
    """h = drop(x) A_cat^T: x [..., I] and K matrices [r_k, I] to h [..., R]. Differentiable in x and A."""
    return torch.ops.tsugi.lora_shrink.default(x, A, dropout_p, rng)


def lora_expand_(y: Tensor, h: Tensor, B: Sequence[Tensor], scaling: Sequence[float]) -> None:
    """y += h diag(s) B_cat^T, in place: y [..., O], h [..., R], K matrices [O, r_k].

    Not differentiable: with gradients enabled, arguments that require one are an error.
    """
    torch.ops.tsugi.lora_expand_.default(y, h, B, scaling)


def lora_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor | None,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The gradients of :func:`lora_linear` (of :func:`lora_delta` if ``weight`` is None) from grad = dL/dy [..., O].

    With dH_k = s_k grad B_k: dB_k = s_k grad^T h_k, dA_k = dH_k^T drop_k(x), dx = grad W + sum_k mask_k(dH_k A_k).

    Returns:
        (dx [..., I] of x's dtype, [dA_k [r_k, I]], [dB_k [O, r_k]]), the lists in the adapters' dtype. Without
        ``weight``, dx is the adapters' part alone.
    """
    return torch.ops.tsugi.lora_backward.default(grad, x, h, weight, A, B, scaling, dropout_p, rng)


def sideband_accumulate_(
    sum: Sequence[Tensor], stats: Tensor, grad: Sequence[Tensor], weight: float = 1.0, zero_grad: bool = False
) -> None:
    """Add one gradient snapshot of an adapter to its elastic buffer: S += w g, in one pass over all parameters.

    Args:
        sum: S, contiguous float32 tensors, one a parameter.
        stats: float64 [8]: m, n, n2, Q, non-finite snapshots, and room for three: the count of snapshots, the sum of
            weights, of squared weights, of w ||g||^2, and of snapshots left out.
        grad: the snapshot, tensors of the shapes of ``sum`` in any floating dtype and layout.
        weight: w, tokens or samples of the snapshot; finite and positive.
        zero_grad: also set ``grad`` to zero.

    A snapshot that holds a NaN or an infinity changes the count of non-finite snapshots and nothing else (``grad`` is
    still zeroed if asked). Nothing is read back to the host.
    """
    torch.ops.tsugi.sideband_accumulate_.default(sum, stats, grad, weight, zero_grad)


def sideband_stats(sum: Sequence[Tensor], stats: Tensor) -> Tensor:
    """What the trigger looks at, float64 [8]: m, n, Q, ||S||^2, V, P, number of elements, non-finite snapshots.

    V = (Q - ||S||^2 / n) / (n - n2 / n) is the total unbiased variance of one snapshot, infinite while m < 2;
    P = ||S / n||^2 is the squared norm of the mean.
    """
    return torch.ops.tsugi.sideband_stats.default(sum, stats)


def sideband_drain_(sum: Sequence[Tensor], stats: Tensor, grad: Sequence[Tensor], scale: float) -> None:
    """FIRE: grad = scale S in grad's dtype, then S = 0 and stats = 0. ``scale`` is 1 / n for the mean gradient."""
    torch.ops.tsugi.sideband_drain_.default(sum, stats, grad, scale)


def buffer_variance(ring: Tensor, filled: int) -> Tensor:
    """Mean over elements of the unbiased variance over the first ``filled`` slots of ring [window, numel].

    Returns a float64 scalar on ring's device: +inf for fewer than two slots, NaN for slots of no elements.
    """
    return torch.ops.tsugi.buffer_variance.default(ring, filled)


def _register() -> torch.library.Library:
    library = torch.library.Library("tsugi", "IMPL")

    def native(name: str) -> Any:
        return getattr(torch.ops.tsugi, name).default

    for name, kernel in autograd.KERNELS.items():
        library.impl(name, kernel, "Autograd")
    library.impl("lora_experts", experts.lora_experts, "Autograd")
    # Measurements and internal operations: no gradient flows through them.
    internal = ("_lora_apply", "_lora_backward", "_lora_experts_apply", "_lora_experts_backward")
    for name in ("sideband_stats", "buffer_variance", *internal):
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        for name in ("lora_linear", "lora_shrink"):
            library.impl(name, autograd.autocast(native(name), device_type, key), key)
        for name in ("lora_delta", "lora_experts"):
            library.impl(name, autograd.autocast_delta(native(name), device_type, key), key)
    for name, fake in (fakes.KERNELS | experts.FAKES).items():
        torch.library.register_fake(f"tsugi::{name}", fake, lib=library)
        # Sparse, quantised and nested tensors, other devices, and no tensor at all.
        for key in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA"):
            library.impl(name, fakes.refusal(native(name)), key)
    for name in ("lora_expand_", "sideband_accumulate_", "sideband_drain_"):
        for key in ("Negative", "Conjugate", "ZeroTensor"):
            library.impl(name, fakes.without_lazy_bits(native(name)), key)
    # What torch.func batches is composed of torch's operations, which have rules for it.
    for name in OPERATIONS:
        library.impl(name, fakes.composed(native(name)), "FuncTorchBatched")
    return library


def _refusing(function: Callable) -> Callable:
    """The same function, which says why it cannot run."""

    @functools.wraps(function)
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{function.__name__}: {unavailable_reason}")

    return refuse


if available():
    _library = _register()
else:
    for _name in OPERATIONS:
        globals()[_name] = _refusing(globals()[_name])
