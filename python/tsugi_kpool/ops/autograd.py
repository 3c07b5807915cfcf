"""How the operations are differentiated and cast: their kernels for torch's autograd and autocast keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fakes, reference


def wants_grad(*arguments) -> bool:
    """Whether autograd is on and a tensor among the arguments, or in a list of them, requires grad."""
    if not torch.is_grad_enabled():
        return False
    # Plain loops and getattr: this is part of every call, and generators and isinstance would cost twice as much.
    for argument in arguments:
        if type(argument) is list or type(argument) is tuple:
            for item in argument:
                if getattr(item, "requires_grad", False):
                    return True
        elif getattr(argument, "requires_grad", False):
            return True
    return False


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is on, which a native kernel cannot follow."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def below_autograd(op, *args):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def shape_only(shape: torch.Size, like: Tensor) -> Tensor:
    """Stands for a matrix of which only the shape matters: one row, repeated."""
    return like.new_zeros(shape[-1]).expand(shape)


def must_be_composed(grad, grad_of_h) -> bool:
    """Whether a backward pass is itself differentiated or transformed, so that it must consist of torch's operations."""
    # With gradients enabled a gradient of the gradient is wanted, and only then can h have one of its own.
    twice = torch.is_grad_enabled() or grad_of_h is not None
    return twice or transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)


class _LoraApply(torch.autograd.Function):
    """(y, h) of lora_linear and lora_delta: forward by ``_lora_apply``, backward by ``_lora_backward``.

    Nobody outside uses h. It is an output because a saved output knows how it came about: differentiating a second
    time reaches x and A through it, so that x need not be kept for that. Kept is what the wanted gradients need and
    nothing else:

        dA needs x, B     dB needs h     dx needs A, B, weight     dbase and dbias need nothing
    """

    @staticmethod
    def forward(ctx, base, x, weight, bias, scaling, dropout_p, rng, count, *adapters):
        A, B = adapters[:count], adapters[count:]
        args = (base, x, weight, bias, A, B, scaling, dropout_p, rng)
        try:
            y, h = below_autograd(torch.ops.tsugi._lora_apply.default, *args)
        except NotImplementedError:  # of a tensor subclass, which knows the internal name alone
            fakes.refusal(torch.ops.tsugi._lora_apply.default)(*args)
        need = ctx.needs_input_grad
        ctx.need_x, ctx.need_A, ctx.need_B = need[1], any(need[8 : 8 + count]), any(need[8 + count :])
        need_dh = ctx.need_x or ctx.need_A
        ctx.save_for_backward(
            x if ctx.need_A else None,
            h if ctx.need_B else None,
            weight if ctx.need_x else None,
            rng if need_dh else None,
            *(A if ctx.need_x else [None] * count),
            *(B if need_dh else [None] * count),
        )
        # A copy: the caller's list may change before the backward pass.
        ctx.scaling, ctx.dropout_p, ctx.count = tuple(scaling), dropout_p, count
        ctx.shapes, ctx.adapter_dtype, ctx.x_dtype = [t.shape for t in adapters], adapters[0].dtype, x.dtype
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx, grad, grad_of_h):
        if grad is None and grad_of_h is None:
            return (None,) * (8 + 2 * ctx.count)
        composed = must_be_composed(grad, grad_of_h)
        dx, dA, dB = (_LoraApply._composed if composed else _LoraApply._native)(ctx, grad, grad_of_h)
        need = ctx.needs_input_grad
        return (
            grad if need[0] else None,
            dx,
            None,
            grad.sum_to_size(grad.shape[-1:]) if need[3] and grad is not None else None,
            None,
            None,
            None,
            None,
            *(dA if ctx.need_A else [None] * ctx.count),
            *(dB if ctx.need_B else [None] * ctx.count),
        )

    @staticmethod
    def _native(ctx, grad, _):
        if not (ctx.need_x or ctx.need_A or ctx.need_B):
            return None, None, None
        x, h, weight, rng, *adapters = ctx.saved_tensors
        if not ctx.need_x:
            like = grad.new_empty((), dtype=ctx.adapter_dtype)
            adapters = [shape_only(s, like) if t is None else t for t, s in zip(adapters, ctx.shapes)]
        A, B = adapters[: ctx.count], adapters[ctx.count :]
        dropout_p = ctx.dropout_p if rng is not None else 0.0
        args = (grad, x, h, weight, A, B, ctx.scaling, dropout_p, rng, ctx.need_x, ctx.need_A, ctx.need_B)
        dx, dA, dB = torch.ops.tsugi._lora_backward.default(*args)
        return dx if ctx.need_x else None, dA, dB

    @staticmethod
    def _composed(ctx, grad, grad_of_h):
        """The same of torch's differentiable operations."""
        x, h, weight, rng, *adapters = ctx.saved_tensors
        A, B = adapters[: ctx.count], adapters[ctx.count :]
        ranks, dtype = [shape[0] for shape in ctx.shapes[: ctx.count]], ctx.adapter_dtype
        dx: Any = None
        dA: Any = None
        dB: Any = None
        dh: Any = None
        if (ctx.need_x or ctx.need_A) and grad is not None:
            dh = reference.grad_h(grad, B, ctx.scaling, torch.promote_types(grad.dtype, dtype))
        if grad_of_h is not None:
            dh = grad_of_h if dh is None else dh + grad_of_h
        if ctx.need_x:
            dx = reference.grad_x(dh, A, ctx.dropout_p, rng)
            if weight is not None and grad is not None:
                dx = grad @ weight + dx
            dx = dx.to(ctx.x_dtype)
        if ctx.need_A:
            dA = reference.grad_A(dh, x, ranks, dtype, ctx.dropout_p, rng)
        if ctx.need_B:
            dB = reference.grad_B(grad, h, ranks, dtype, ctx.scaling) if grad is not None else [None] * ctx.count
        return dx, dA, dB


def refuse_grad(op: str, weight, scaling) -> None:
    """Says what requires grad and would get none."""
    if wants_grad(weight):
        raise RuntimeError(
            f"{op}: weight requires grad, but it is frozen here and would get none; call requires_grad_(False) on it, or "
            "compute the base layer yourself and use lora_delta"
        )
    factors = scaling if isinstance(scaling, (list, tuple)) else [scaling]
    k = next(k for k, factor in enumerate(factors) if wants_grad(factor))
    raise RuntimeError(
        f"{op}: scaling[{k}] requires grad, but it is a number here and would get none; pass scaling[{k}].item(), or train "
        f"it as a part of B[{k}]"
    )


def lora_linear(x, weight, bias, A, B, scaling, dropout_p=0.0, rng=None):
    if wants_grad(weight, scaling):
        refuse_grad("lora_linear", weight, scaling)
    args = (x, weight, bias, A, B, scaling, dropout_p, rng)
    if transformed():
        return fakes.composed(torch.ops.tsugi.lora_linear.default)(*args)
    if not (wants_grad(x, bias, A, B) and are_lists(A, B) and isinstance(weight, Tensor)):
        return below_autograd(torch.ops.tsugi.lora_linear.default, *args)
    return _LoraApply.apply(None, x, weight, bias, scaling, dropout_p, rng, len(A), *A, *B)[0]


def lora_delta(base, x, A, B, scaling, dropout_p=0.0, rng=None):
    if wants_grad(scaling):
        refuse_grad("lora_delta", None, scaling)
    args = (base, x, A, B, scaling, dropout_p, rng)
    if transformed():
        return fakes.composed(torch.ops.tsugi.lora_delta.default)(*args)
    if not (wants_grad(base, x, A, B) and are_lists(A, B) and isinstance(base, Tensor)):
        return below_autograd(torch.ops.tsugi.lora_delta.default, *args)
    return _LoraApply.apply(base, x, None, None, scaling, dropout_p, rng, len(A), *A, *B)[0]


def are_lists(*arguments) -> bool:
    """Lists that hold something; anything else goes on to the native operation, which says what is wrong with it."""
    return all(isinstance(argument, (list, tuple)) and len(argument) > 0 for argument in arguments)


class _LoraShrink(torch.autograd.Function):
    """h = drop(x) A_cat^T: dA needs x, dx needs A."""

    @staticmethod
    def forward(ctx, x, dropout_p, rng, *A):
        ctx.need_x, ctx.need_A = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:])
        ctx.save_for_backward(x if ctx.need_A else None, rng, *(A if ctx.need_x else [None] * len(A)))
        ctx.dropout_p, ctx.x_dtype = dropout_p, x.dtype
        ctx.ranks, ctx.adapter_dtype = [a.shape[0] for a in A], A[0].dtype
        return below_autograd(torch.ops.tsugi.lora_shrink.default, x, A, dropout_p, rng)

    @staticmethod
    def backward(ctx, grad):
        x, rng, *A = ctx.saved_tensors
        dx: Any = None
        dA: list[Any] = [None] * len(A)
        if ctx.need_x:
            dx = reference.grad_x(grad, A, ctx.dropout_p, rng).to(ctx.x_dtype)
        if ctx.need_A:
            dA = reference.grad_A(grad, x, ctx.ranks, ctx.adapter_dtype, ctx.dropout_p, rng)
        return (dx, None, None, *dA)


def lora_shrink(x, A, dropout_p=0.0, rng=None):
    if transformed():
        return fakes.composed(torch.ops.tsugi.lora_shrink.default)(x, A, dropout_p, rng)
    if not (wants_grad(x, A) and are_lists(A)):
        return below_autograd(torch.ops.tsugi.lora_shrink.default, x, A, dropout_p, rng)
    return _LoraShrink.apply(x, dropout_p, rng, *A)


def lora_expand_(y, h, B, scaling):
    if wants_grad(y, h, B):
        raise RuntimeError(
            "lora_expand_: an argument requires grad, but this in-place operation is not differentiable; use lora_delta, "
            "or call it under torch.no_grad()"
        )
    if transformed():
        fakes.composed(torch.ops.tsugi.lora_expand_.default)(y, h, B, scaling)
        return
    below_autograd(torch.ops.tsugi.lora_expand_.default, y, h, B, scaling)
    torch.autograd.graph.increment_version(y)


def lora_backward(grad, x, h, weight, A, B, scaling, dropout_p=0.0, rng=None):
    args = (grad, x, h, weight, A, B, scaling, dropout_p, rng)
    if transformed():
        return fakes.composed(torch.ops.tsugi.lora_backward.default)(*args)
    # First of all for its checks, which the reference has none of.
    result = below_autograd(torch.ops.tsugi.lora_backward.default, *args)
    return reference.lora_backward(*args) if wants_grad(grad, x, h, weight, A, B) else result


def sideband_accumulate_(sum, stats, grad, weight=1.0, zero_grad=False):
    below_autograd(torch.ops.tsugi.sideband_accumulate_.default, sum, stats, grad, weight, zero_grad)
    torch.autograd.graph.increment_version([*sum, stats, *(grad if zero_grad else ())])


def sideband_drain_(sum, stats, grad, scale):
    below_autograd(torch.ops.tsugi.sideband_drain_.default, sum, stats, grad, scale)
    torch.autograd.graph.increment_version([*sum, stats, *grad])


KERNELS = {
    "lora_linear": lora_linear,
    "lora_delta": lora_delta,
    "lora_shrink": lora_shrink,
    "lora_expand_": lora_expand_,
    "lora_backward": lora_backward,
    "sideband_accumulate_": sideband_accumulate_,
    "sideband_drain_": sideband_drain_,
}


# ---- autocast: inputs are cast as torch.nn.functional.linear casts them ---------------------------------------------


def caster(device_type: str):
    dtype = torch.get_autocast_dtype(device_type)

    def cast(value):
        if isinstance(value, Tensor):
            # float64 is left alone, as autocast does everywhere.
            eligible = value.is_floating_point() and value.dtype != torch.float64 and value.device.type == device_type
            return value.to(dtype) if eligible else value
        return [cast(item) for item in value] if isinstance(value, (list, tuple)) else value

    return cast


def autocast(op, device_type: str, key: str):
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args):
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return op(*map(caster(device_type), args))

    return kernel


def is_wider(base: Any, low: Any) -> bool:
    """Whether autocast leaves ``base`` another dtype than x: it keeps its own then, as base + adapters would by promotion.

    What is no plain tensor is left to the operation, which refuses it by its name.
    """
    plain = all(
        isinstance(t, Tensor) and t.layout is torch.strided and not (t.is_quantized or t.is_nested) for t in (base, low)
    )
    return plain and base.dtype != low.dtype


def autocast_delta(op, device_type: str, key: str):
    """For operations that add onto ``base``, their first argument."""
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(base, *args):
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            low, *others = map(caster(device_type), args)
            if not is_wider(base, low):
                return op(base, low, *others)
            return base + op(low.new_zeros(base.shape), low, *others)

    return kernel
