"""The operations, as Python functions over ``torch.ops.tsugi.*``, with their autograd, autocast and fake kernels.

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
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference

__all__ = [
    "available",
    "buffer_variance",
    "draw_rng",
    "lora_backward",
    "lora_delta",
    "lora_expand_",
    "lora_linear",
    "lora_shrink",
    "sideband_accumulate_",
    "sideband_drain_",
    "sideband_stats",
    "unavailable_reason",
]

try:
    # By its full name: `from . import` would hide why the loader refused it. Importing it registers torch.ops.tsugi.
    _native = importlib.import_module("._native", __package__)
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
        A, B: K >= 1 adapters, [r_k, I] and [O, r_k]; ranks may differ.
        scaling: K finite factors.
        dropout_p: probability in [0, 1) with which each adapter drops an element of x.
        rng: (seed, offset), int64 [2]; needed when ``dropout_p > 0``.

    Returns:
        y [..., O] of x's dtype. Differentiable any number of times in x, bias, A and B; keeps x and h [M, R] for the
        backward pass and nothing else.

    Raises:
        RuntimeError: for arguments that do not fit together.
    """
    kernel = _lora_linear_autograd if _plain_eager() else torch.ops.tsugi.lora_linear.default
    return kernel(x, weight, bias, A, B, scaling, dropout_p, rng)


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
    kernel = _lora_delta_autograd if _plain_eager() else torch.ops.tsugi.lora_delta.default
    return kernel(base, x, A, B, scaling, dropout_p, rng)


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


# ---- autograd --------------------------------------------------------------------------------------------------------


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _LoraApply(torch.autograd.Function):
    """lora_linear and lora_delta: forward by ``_lora_apply``, backward by ``_lora_backward``."""

    @staticmethod
    def forward(ctx, base, x, weight, bias, scaling, dropout_p, rng, count, *adapters):
        A, B = adapters[:count], adapters[count:]
        with torch._C._AutoDispatchBelowAutograd():
            y, h = torch.ops.tsugi._lora_apply.default(base, x, weight, bias, A, B, scaling, dropout_p, rng)
        ctx.save_for_backward(x, h, weight, rng, *adapters)
        ctx.scaling, ctx.dropout_p, ctx.count = scaling, dropout_p, count
        return y

    @staticmethod
    def backward(ctx, grad):
        x, h, weight, rng, *adapters = ctx.saved_tensors
        count = ctx.count
        A, B = adapters[:count], adapters[count:]
        need = ctx.needs_input_grad
        need_x, need_A, need_B = need[1], any(need[8 : 8 + count]), any(need[8 + count :])
        if torch.is_grad_enabled():
            # A gradient of the gradient is wanted: h must carry its own graph, so everything is composed of torch's
            # differentiable operations.
            h = reference.lora_shrink(x, A, ctx.dropout_p, rng)
            dx, dA, dB = reference.lora_backward(grad, x, h, weight, A, B, ctx.scaling, ctx.dropout_p, rng)
        else:
            dx, dA, dB = torch.ops.tsugi._lora_backward.default(
                grad, x, h, weight, A, B, ctx.scaling, ctx.dropout_p, rng, need_x, need_A, need_B
            )
        return (
            grad if need[0] else None,
            dx if need_x else None,
            None,
            grad.sum_to_size(grad.shape[-1:]) if need[3] else None,
            None,
            None,
            None,
            None,
            *(dA if need_A else [None] * count),
            *(dB if need_B else [None] * count),
        )


def _below_autograd(op, *args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _lora_linear_autograd(x, weight, bias, A, B, scaling, dropout_p=0.0, rng=None):
    if _wants_grad(weight):
        raise RuntimeError(
            "lora_linear: weight requires grad, but it is frozen here and would get none; call requires_grad_(False) on "
            "it, or compute the base layer yourself and use lora_delta"
        )
    if not _wants_grad(x, bias, *A, *B):
        return _below_autograd(torch.ops.tsugi.lora_linear.default, x, weight, bias, A, B, scaling, dropout_p, rng)
    return _LoraApply.apply(None, x, weight, bias, scaling, dropout_p, rng, len(A), *A, *B)


def _lora_delta_autograd(base, x, A, B, scaling, dropout_p=0.0, rng=None):
    if not _wants_grad(base, x, *A, *B):
        return _below_autograd(torch.ops.tsugi.lora_delta.default, base, x, A, B, scaling, dropout_p, rng)
    return _LoraApply.apply(base, x, None, None, scaling, dropout_p, rng, len(A), *A, *B)


class _LoraShrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropout_p, rng, *A):
        ctx.save_for_backward(x, rng, *A)
        ctx.dropout_p = dropout_p
        return _below_autograd(torch.ops.tsugi.lora_shrink.default, x, A, dropout_p, rng)

    @staticmethod
    def backward(ctx, grad):
        x, rng, *A = ctx.saved_tensors
        double = torch.is_grad_enabled()
        wanted = [t for t, need in zip((x, *A), (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])) if need]
        with torch.enable_grad():
            h = reference.lora_shrink(x, A, ctx.dropout_p, rng)
            grads = iter(torch.autograd.grad(h, wanted, grad, create_graph=double))
        needs = ctx.needs_input_grad
        return (next(grads) if needs[0] else None, None, None, *(next(grads) if need else None for need in needs[3:]))


def _lora_shrink_autograd(x, A, dropout_p=0.0, rng=None):
    if not _wants_grad(x, *A):
        return _below_autograd(torch.ops.tsugi.lora_shrink.default, x, A, dropout_p, rng)
    return _LoraShrink.apply(x, dropout_p, rng, *A)


def _lora_expand_autograd(y, h, B, scaling):
    if _wants_grad(y, h, *B):
        raise RuntimeError(
            "lora_expand_: an argument requires grad, but this in-place operation is not differentiable; use lora_delta, "
            "or call it under torch.no_grad()"
        )
    _below_autograd(torch.ops.tsugi.lora_expand_.default, y, h, B, scaling)
    torch.autograd.graph.increment_version(y)


def _lora_backward_autograd(grad, x, h, weight, A, B, scaling, dropout_p=0.0, rng=None):
    if _wants_grad(grad, x, h, weight, *A, *B):
        return reference.lora_backward(grad, x, h, weight, A, B, scaling, dropout_p, rng)
    args = (grad, x, h, weight, A, B, scaling, dropout_p, rng)
    return _below_autograd(torch.ops.tsugi.lora_backward.default, *args)


def _sideband_accumulate_autograd(sum, stats, grad, weight=1.0, zero_grad=False):
    _below_autograd(torch.ops.tsugi.sideband_accumulate_.default, sum, stats, grad, weight, zero_grad)
    torch.autograd.graph.increment_version([*sum, stats, *(grad if zero_grad else ())])


def _sideband_drain_autograd(sum, stats, grad, scale):
    _below_autograd(torch.ops.tsugi.sideband_drain_.default, sum, stats, grad, scale)
    torch.autograd.graph.increment_version([*sum, stats, *grad])


# ---- autocast: inputs are cast as torch.nn.functional.linear casts them ---------------------------------------------


def _caster(device_type: str):
    dtype = torch.get_autocast_dtype(device_type)

    def cast(value):
        if isinstance(value, Tensor):
            # float64 is left alone, as autocast does everywhere.
            eligible = value.is_floating_point() and value.dtype != torch.float64 and value.device.type == device_type
            return value.to(dtype) if eligible else value
        return [cast(item) for item in value] if isinstance(value, (list, tuple)) else value

    return cast


def _autocast(op, device_type: str, key: str):
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args):
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*map(_caster(device_type), args))

    return kernel


def _autocast_delta(op, device_type: str, key: str):
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(base, x, A, B, scaling, dropout_p=0.0, rng=None):
        cast = _caster(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            low = cast(x)
            if base.dtype == low.dtype:
                return op(base, low, cast(A), cast(B), scaling, dropout_p, rng)
            # A wider base keeps its dtype, as base + adapters would by promotion.
            zeros = low.new_zeros(base.shape)
            return base + op(zeros, low, cast(A), cast(B), scaling, dropout_p, rng)

    return kernel


# ---- fake kernels: shapes and dtypes for torch.compile and torch.export -----------------------------------------------


def _one_device(op: str, **arguments: Tensor | Sequence[Tensor] | None) -> None:
    """One meta tensor among others sends a call here, where the result would take the device of just one of them."""
    named = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            named.append((name, value))
        elif value is not None:
            named += [(f"{name}[{k}]", tensor) for k, tensor in enumerate(value)]
    (first_name, first), *others = named
    for name, tensor in others:
        if tensor.device != first.device:
            raise RuntimeError(f"{op}: {first_name} is on {first.device} but {name} is on {tensor.device}")


def _check_adapters(op: str, x, A, B, weight=None) -> None:
    features = x.shape[-1]
    torch._check(len(A) > 0, lambda: f"{op}: A is an empty list; at least one adapter (K >= 1) is needed")
    if weight is not None:
        torch._check(weight.shape[1] == features, lambda: f"{op}: x is {[*x.shape]} but weight is {[*weight.shape]}")
    for k, a in enumerate(A):
        torch._check(a.shape[1] == features, lambda: f"{op}: x is {[*x.shape]} but A[{k}] is {[*a.shape]}")
    for k, (a, b) in enumerate(zip(A, B)):
        torch._check(b.shape[1] == a.shape[0], lambda: f"{op}: A[{k}] is {[*a.shape]} but B[{k}] is {[*b.shape]}")


def _fake_h(x, A):
    return x.new_empty((*x.shape[:-1], sum(a.shape[0] for a in A)), dtype=torch.promote_types(x.dtype, A[0].dtype))


def _fake_apply(base, x, weight, bias, A, B, scaling, dropout_p, rng):
    op = "lora_delta" if weight is None else "lora_linear"
    _one_device(op, x=x, base=base, weight=weight, bias=bias, A=A, B=B, rng=rng)
    _check_adapters(op, x, A, B, weight)
    return x.new_empty((*x.shape[:-1], B[0].shape[0])), _fake_h(x, A)


def _fake_linear(x, weight, bias, A, B, scaling, dropout_p=0.0, rng=None):
    return _fake_apply(None, x, weight, bias, A, B, scaling, dropout_p, rng)[0]


def _fake_delta(base, x, A, B, scaling, dropout_p=0.0, rng=None):
    return _fake_apply(base, x, None, None, A, B, scaling, dropout_p, rng)[0]


def _fake_shrink(x, A, dropout_p=0.0, rng=None):
    _one_device("lora_shrink", x=x, A=A, rng=rng)
    _check_adapters("lora_shrink", x, A, ())
    return _fake_h(x, A)


def _fake_expand(y, h, B, scaling):
    _one_device("lora_expand_", y=y, h=h, B=B)


def _fake_backward(grad, x, h, weight, A, B, scaling, dropout_p=0.0, rng=None, need_x=True, need_A=True, need_B=True):
    _one_device("lora_backward", grad=grad, x=x, h=h, weight=weight, A=A, B=B, rng=rng)
    _check_adapters("lora_backward", x, A, B, weight)
    return (
        x.new_empty(x.shape if need_x else (0,)),
        [a.new_empty(a.shape) for a in A] if need_A else [],
        [b.new_empty(b.shape) for b in B] if need_B else [],
    )


def _fake_accumulate(sum, stats, grad, weight=1.0, zero_grad=False):
    _one_device("sideband_accumulate_", stats=stats, sum=sum, grad=grad)


def _fake_drain(sum, stats, grad, scale):
    _one_device("sideband_drain_", stats=stats, sum=sum, grad=grad)


def _fake_stats(sum, stats):
    _one_device("sideband_stats", stats=stats, sum=sum)
    return stats.new_empty((8,))


def _fake_variance(ring, filled):
    return ring.new_empty((), dtype=torch.float64)


def _register() -> torch.library.Library:
    library = torch.library.Library("tsugi", "IMPL")
    differentiable = {
        "lora_linear": _lora_linear_autograd,
        "lora_delta": _lora_delta_autograd,
        "lora_shrink": _lora_shrink_autograd,
        "lora_expand_": _lora_expand_autograd,
        "lora_backward": _lora_backward_autograd,
        "sideband_accumulate_": _sideband_accumulate_autograd,
        "sideband_drain_": _sideband_drain_autograd,
    }
    for name, kernel in differentiable.items():
        library.impl(name, kernel, "Autograd")
    # Measurements and internal operations: no gradient flows through them.
    for name in ("sideband_stats", "buffer_variance", "_lora_apply", "_lora_backward"):
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        for name in ("lora_linear", "lora_shrink"):
            library.impl(name, _autocast(getattr(torch.ops.tsugi, name).default, device_type, key), key)
        library.impl("lora_delta", _autocast_delta(torch.ops.tsugi.lora_delta.default, device_type, key), key)
    fakes = {
        "lora_linear": _fake_linear,
        "lora_delta": _fake_delta,
        "_lora_apply": _fake_apply,
        "lora_shrink": _fake_shrink,
        "lora_expand_": _fake_expand,
        "lora_backward": _fake_backward,
        "_lora_backward": _fake_backward,
        "sideband_accumulate_": _fake_accumulate,
        "sideband_stats": _fake_stats,
        "sideband_drain_": _fake_drain,
        "buffer_variance": _fake_variance,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"tsugi::{name}", fake, lib=library)
    return library


def _refusing(function):
    """The same function, which says why it cannot run."""

    @functools.wraps(function)
    def refuse(*args, **kwargs):
        raise RuntimeError(f"{function.__name__}: {unavailable_reason}")

    return refuse


if available():
    _library = _register()
else:
    for _name in set(__all__) - {"available", "draw_rng", "unavailable_reason"}:
        globals()[_name] = _refusing(globals()[_name])
