"""``lora_experts`` for torch's dispatcher: how it is differentiated and cast, and its shapes for torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import autograd, fakes, reference


class _LoraExperts(torch.autograd.Function):
    """(y, h): forward by ``_lora_experts_apply``, backward by ``_lora_experts_backward``.

    What is kept, and why h is an output, is the same as for ``lora_delta``: dA needs x and B, dB needs h, dx needs A
    and B, dbase needs nothing. ends is kept for all of them.
    """

    @staticmethod
    def forward(ctx, base, x, ends, scaling, dropout_p, rng, count, *adapters):
        A, B = adapters[:count], adapters[count:]
        args = (base, x, ends, A, B, scaling, dropout_p, rng)
        native = torch.ops.tsugi._lora_experts_apply.default
        try:
            y, h = autograd.below_autograd(native, *args)
        except NotImplementedError:  # of a tensor subclass, which knows the internal name alone
            fakes.refusal(native)(*args)
        need = ctx.needs_input_grad
        ctx.need_x, ctx.need_A, ctx.need_B = need[1], any(need[7 : 7 + count]), any(need[7 + count :])
        need_dh = ctx.need_x or ctx.need_A
        ctx.save_for_backward(
            x if ctx.need_A else None,
            h if ctx.need_B else None,
            ends,
            rng if need_dh else None,
            *(A if ctx.need_x else [None] * count),
            *(B if need_dh else [None] * count),
        )
        ctx.scaling, ctx.dropout_p, ctx.count = tuple(scaling), dropout_p, count
        ctx.shapes, ctx.adapter_dtype, ctx.x_dtype = [t.shape for t in adapters], adapters[0].dtype, x.dtype
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx, grad, grad_of_h):
        if grad is None and grad_of_h is None:
            return (None,) * (7 + 2 * ctx.count)
        composed = autograd.must_be_composed(grad, grad_of_h)
        dx, dA, dB = (_LoraExperts._composed if composed else _LoraExperts._native)(ctx, grad, grad_of_h)
        return (
            grad if ctx.needs_input_grad[0] else None,
            dx,
            *[None] * 5,
            *(dA if ctx.need_A else [None] * ctx.count),
            *(dB if ctx.need_B else [None] * ctx.count),
        )

    @staticmethod
    def _native(ctx, grad, _):
        if not (ctx.need_x or ctx.need_A or ctx.need_B):
            return None, None, None
        x, h, ends, rng, *adapters = ctx.saved_tensors
        like = grad.new_empty((), dtype=ctx.adapter_dtype)
        adapters = [autograd.shape_only(shape, like) if t is None else t for t, shape in zip(adapters, ctx.shapes)]
        A, B = adapters[: ctx.count], adapters[ctx.count :]
        dropout_p = ctx.dropout_p if rng is not None else 0.0
        args = (grad, x, h, ends, A, B, ctx.scaling, dropout_p, rng, ctx.need_x, ctx.need_A, ctx.need_B)
        dx, dA, dB = torch.ops.tsugi._lora_experts_backward.default(*args)
        return dx if ctx.need_x else None, dA, dB

    @staticmethod
    def _composed(ctx, grad, grad_of_h):
        """The same of torch's differentiable operations."""
        x, h, ends, rng, *adapters = ctx.saved_tensors
        A, B = adapters[: ctx.count], adapters[ctx.count :]
        ranks, dtype = [shape[1] for shape in ctx.shapes[: ctx.count]], ctx.adapter_dtype
        dx: Any = None
        dA: Any = None
        dB: Any = None
        dh: Any = None
        if (ctx.need_x or ctx.need_A) and grad is not None:
            dh = reference.experts_grad_h(grad, ends, B, ctx.scaling, torch.promote_types(grad.dtype, dtype))
        if grad_of_h is not None:
            dh = grad_of_h if dh is None else dh + grad_of_h
        if ctx.need_x:
            dx = reference.experts_grad_x(dh, ends, A, ctx.dropout_p, rng).to(ctx.x_dtype)
        if ctx.need_A:
            dA = reference.experts_grad_A(dh, x, ends, ranks, dtype, ctx.dropout_p, rng)
        if ctx.need_B:
            dB = [None] * ctx.count
            if grad is not None:
                dB = reference.experts_grad_B(grad, h, ends, ranks, dtype, ctx.scaling)
        return dx, dA, dB


def lora_experts_backward(grad, x, h, ends, A, B, scaling, dropout_p=0.0, rng=None):
    """(dx, dA, dB) of ``lora_experts``, from h as the forward pass computed it; not differentiable."""
    args = (grad, x, h, ends, A, B, scaling, dropout_p, rng, True, True, True)
    return torch.ops.tsugi._lora_experts_backward.default(*args)


def lora_experts(base, x, ends, A, B, scaling, dropout_p=0.0, rng=None):
    if autograd.wants_grad(scaling):
        autograd.refuse_grad("lora_experts", None, scaling)
    args = (base, x, ends, A, B, scaling, dropout_p, rng)
    if autograd.transformed():
        return fakes.composed(torch.ops.tsugi.lora_experts.default)(*args)
    tensors = isinstance(base, Tensor) and isinstance(ends, Tensor)
    if not (autograd.wants_grad(base, x, A, B) and autograd.are_lists(A, B) and tensors):
        return autograd.below_autograd(torch.ops.tsugi.lora_experts.default, *args)
    return _LoraExperts.apply(base, x, ends, scaling, dropout_p, rng, len(A), *A, *B)[0]


# ---- fake kernels ----------------------------------------------------------------------------------------------------


def _check(ends, A, B, **rows) -> None:
    op = "lora_experts"
    torch._check(len(A) == len(B), lambda: f"{op}: A has {len(A)} adapters but B has {len(B)}")
    torch._check(len(A) > 0, lambda: f"{op}: A is an empty list; at least one adapter (K >= 1) is needed")
    fakes.one_device(op, **rows, ends=ends, A=A, B=B)
    fakes.of_dimensions(op, 1, 1, ends=ends)
    for k, (a, b) in enumerate(zip(A, B)):
        fakes.of_dimensions(op, 3, 3, **{f"A[{k}]": a, f"B[{k}]": b})
        for name, factor in (("A", a), ("B", b)):
            torch._check(
                factor.shape[0] == ends.shape[0],
                lambda: f"{op}: {name}[{k}] is {[*factor.shape]} but ends is {[*ends.shape]}",
            )
        torch._check(b.shape[2] == a.shape[1], lambda: f"{op}: A[{k}] is {[*a.shape]} but B[{k}] is {[*b.shape]}")


def _fake_apply(base, x, ends, A, B, scaling, dropout_p, rng):
    _check(ends, A, B, x=x, base=base, rng=rng)
    fakes.of_dimensions("lora_experts", 2, 2, base=base, x=x)
    for k, a in enumerate(A):
        torch._check(a.shape[2] == x.shape[1], lambda: f"lora_experts: x is {[*x.shape]} but A[{k}] is {[*a.shape]}")
    r = sum(a.shape[1] for a in A)
    dtype = torch.promote_types(x.dtype, A[0].dtype)
    return x.new_empty((x.shape[0], B[0].shape[1])), x.new_empty((x.shape[0], r), dtype=dtype)


def _fake_experts(base, x, ends, A, B, scaling, dropout_p=0.0, rng=None):
    return _fake_apply(base, x, ends, A, B, scaling, dropout_p, rng)[0]


def _fake_backward(grad, x, h, ends, A, B, scaling, dropout_p, rng, need_x, need_A, need_B):
    _check(ends, A, B, grad=grad, x=x, h=h, rng=rng)
    return (
        grad.new_empty((grad.shape[0], A[0].shape[2]) if need_x else (0,)),
        [_gradient_like(a) for a in A] if need_A else [],
        [_gradient_like(b) for b in B] if need_B else [],
    )


def _gradient_like(factor: Tensor) -> Tensor:
    """Of the factor's layout if that has no holes and shares nothing, else contiguous."""
    step = 1
    for stride, size in sorted(zip(factor.stride(), factor.shape)):
        if size > 1:
            if stride != step:
                return factor.new_empty(factor.shape)
            step = step * size
    return factor.new_empty_strided(factor.shape, factor.stride())


FAKES: dict[str, Callable[..., Any]] = {
    "lora_experts": _fake_experts,
    "_lora_experts_apply": _fake_apply,
    "_lora_experts_backward": _fake_backward,
}
