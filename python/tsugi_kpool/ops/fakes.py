"""The operations on tensors that are no plain memory: shapes for torch.compile and torch.export, refusals for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from .statistics import LENGTH

# ---- tensors that are no plain memory -------------------------------------------------------------------------------


def _labelled(op, args, kwargs):
    """(label, argument of the schema, value) of every argument that takes tensors, entries of lists one by one."""
    for argument, value in zip(op._schema.arguments, args):
        yield from _entries(argument, value)
    for argument in op._schema.arguments[len(args) :]:
        if argument.name in kwargs:
            yield from _entries(argument, kwargs[argument.name])


def _entries(argument, value):
    if isinstance(value, (list, tuple)):
        for k, item in enumerate(value):
            yield f"{argument.name}[{k}]", argument, item
    elif isinstance(value, Tensor) or str(argument.type) == "Tensor":
        yield argument.name, argument, value


def _is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _what_is_odd(value) -> str | None:
    """What keeps a native operation from reading a value as a tensor, and what to pass instead."""
    if value is None:
        return "None; it must be a tensor"
    if not isinstance(value, Tensor):
        return None
    if value.is_nested:
        return "a nested tensor; pass its parts one by one"
    if value.layout != torch.strided:
        return f"of layout {value.layout}; pass to_dense() of it"
    if value.is_quantized:
        return f"{value.dtype}; pass dequantize() of it"
    if value.device.type not in ("cpu", "cuda"):
        return f"on {value.device}; it must be on the CPU or on a CUDA device"
    return None


def refusal(op):
    """The kernel for every kind of tensor that has no kernel: it names the argument."""

    def refuse(*args, **kwargs):
        name = op._opname.removeprefix("_")
        if name == "lora_apply":
            name = "lora_delta" if args[2] is None else "lora_linear"
        elif name.startswith("lora_experts"):
            name = "lora_experts"
        for label, _, value in _labelled(op, args, kwargs):
            what = _what_is_odd(value)
            if what is None and isinstance(value, Tensor) and value.device.type == "cuda":
                what = f"on {value.device}, but this build computes on the CPU only"
            if what is not None:
                raise NotImplementedError(f"{name}: {label} is {what}")
        raise NotImplementedError(f"{name}: there is no kernel for tensors of this kind")

    return refuse


def composed(op):
    """The reference, for transforms that a native kernel cannot follow. It checks nothing, so odd tensors end here."""

    def kernel(*args, **kwargs):
        for label, _, value in _labelled(op, args, kwargs):
            what = _what_is_odd(value)
            if what is not None:
                raise NotImplementedError(f"{op._opname}: {label} is {what}")
        return getattr(reference, op._opname)(*args, **kwargs)

    return kernel


def without_lazy_bits(op):
    """For tensors whose memory does not hold their values: lazy negatives, lazy conjugates and lazy zeros.

    Torch's own kernel writes back to an argument what the operation returns for it, and these operations return
    nothing. So what is read is resolved here, and what is written must be plain.
    """

    def kernel(*args, **kwargs):
        for label, argument, value in _labelled(op, args, kwargs):
            if isinstance(value, Tensor) and _is_written(argument) and _is_lazy(value):
                raise RuntimeError(
                    f"{op._opname}: {label} is a lazy negative, conjugate or zero, whose memory does not hold its values, "
                    "and cannot be written in place; pass resolve_neg(), resolve_conj() or clone() of it"
                )
        return op(*map(_resolved, args), **{name: _resolved(value) for name, value in kwargs.items()})

    return kernel


def _is_lazy(tensor: Tensor) -> bool:
    return tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor()


def _resolved(value):
    if isinstance(value, Tensor):
        return (value.clone() if value._is_zerotensor() else value).resolve_conj().resolve_neg()
    return [_resolved(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---- fake kernels: shapes and dtypes for torch.compile and torch.export -----------------------------------------------


def one_device(op: str, **arguments: Tensor | Sequence[Tensor] | None) -> None:
    """One meta tensor among others sends a call here, where the result would take the device of just one of them."""
    named = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            named.append((name, value))
        elif value is not None:
            named += [(f"{name}[{k}]", tensor) for k, tensor in enumerate(value)]
    if not named:
        return
    (first_name, first), *others = named
    for name, tensor in others:
        if tensor.device != first.device:
            raise RuntimeError(f"{op}: {first_name} is on {first.device} but {name} is on {tensor.device}")


def of_dimensions(op: str, least: int, most: int | None = None, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            raise RuntimeError(f"{op}: {name} is None; it must be a tensor")
        if tensor.dim() < least or tensor.dim() > (tensor.dim() if most is None else most):
            wanted = f"{least}" if most == least else f"at least {least}"
            raise RuntimeError(f"{op}: {name} is {[*tensor.shape]}; it must have {wanted} dimensions")


def _check_adapters(op: str, x, A, B, weight=None) -> None:
    of_dimensions(op, 1, x=x)
    features = x.shape[-1]
    torch._check(len(A) > 0, lambda: f"{op}: A is an empty list; at least one adapter (K >= 1) is needed")
    for name, list_ in (("A", A), ("B", B)):
        for k, matrix in enumerate(list_):
            of_dimensions(op, 2, 2, **{f"{name}[{k}]": matrix})
    if weight is not None:
        of_dimensions(op, 2, 2, weight=weight)
        torch._check(weight.shape[1] == features, lambda: f"{op}: x is {[*x.shape]} but weight is {[*weight.shape]}")
    for k, a in enumerate(A):
        torch._check(a.shape[1] == features, lambda: f"{op}: x is {[*x.shape]} but A[{k}] is {[*a.shape]}")
    for k, (a, b) in enumerate(zip(A, B)):
        torch._check(b.shape[1] == a.shape[0], lambda: f"{op}: A[{k}] is {[*a.shape]} but B[{k}] is {[*b.shape]}")


def _fake_h(x, A):
    return x.new_empty((*x.shape[:-1], sum(a.shape[0] for a in A)), dtype=torch.promote_types(x.dtype, A[0].dtype))


def _fake_apply(base, x, weight, bias, A, B, scaling, dropout_p, rng):
    op = "lora_delta" if weight is None else "lora_linear"
    torch._check(len(A) == len(B), lambda: f"{op}: A has {len(A)} adapters but B has {len(B)}")
    one_device(op, x=x, base=base, weight=weight, bias=bias, A=A, B=B, rng=rng)
    _check_adapters(op, x, A, B, weight)
    return x.new_empty((*x.shape[:-1], B[0].shape[0])), _fake_h(x, A)


def _fake_linear(x, weight, bias, A, B, scaling, dropout_p=0.0, rng=None):
    return _fake_apply(None, x, weight, bias, A, B, scaling, dropout_p, rng)[0]


def _fake_delta(base, x, A, B, scaling, dropout_p=0.0, rng=None):
    return _fake_apply(base, x, None, None, A, B, scaling, dropout_p, rng)[0]


def _fake_shrink(x, A, dropout_p=0.0, rng=None):
    one_device("lora_shrink", x=x, A=A, rng=rng)
    _check_adapters("lora_shrink", x, A, ())
    return _fake_h(x, A)


def _fake_expand(y, h, B, scaling):
    one_device("lora_expand_", y=y, h=h, B=B)


def _fake_backward(grad, x, h, weight, A, B, scaling, dropout_p=0.0, rng=None, need_x=True, need_A=True, need_B=True):
    op = "lora_backward"
    of_dimensions(op, 1, grad=grad)
    one_device(op, grad=grad, x=x, h=h, weight=weight, A=A, B=B, rng=rng)
    like_x = grad.new_empty((*grad.shape[:-1], A[0].shape[1])) if x is None and A else x
    _check_adapters(op, like_x, A, B, weight)
    return (
        like_x.new_empty(like_x.shape if need_x else (0,)),
        [a.new_empty(a.shape) for a in A] if need_A else [],
        [b.new_empty(b.shape) for b in B] if need_B else [],
    )


def _fake_accumulate(sum, stats, grad, weight=1.0, zero_grad=False):
    one_device("sideband_accumulate_", stats=stats, sum=sum, grad=grad)


def _fake_drain(sum, stats, grad, scale):
    one_device("sideband_drain_", stats=stats, sum=sum, grad=grad)


def _fake_stats(sum, stats):
    of_dimensions("sideband_stats", 1, 1, stats=stats)
    one_device("sideband_stats", stats=stats, sum=sum)
    return stats.new_empty((LENGTH,))


def _fake_variance(ring, filled):
    of_dimensions("buffer_variance", 2, 2, ring=ring)
    return ring.new_empty((), dtype=torch.float64)


KERNELS: dict[str, Callable[..., Any]] = {
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
