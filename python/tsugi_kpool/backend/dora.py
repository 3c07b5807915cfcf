"""DoRA on linear layers: what PEFT computes, without its identity matrix and its second base product.

With u = W x, an adapter without a variant adds s B A x to u, and DoRA makes (m / n) (u + s B A x) of it, n being the norms
of the rows of W + s B A and a constant to the gradient. The bias comes last. With dropout, PEFT multiplies W with the
dropped input too, and so does this, in the same product as the input.

A base layer that is no plain frozen ``nn.Linear`` gives u itself, less its bias; a quantised one is dequantised at each
call, as PEFT does.

The norms come from ||w + s b A||^2 = ||w||^2 + 2 s b (A w) + s^2 b (A A^T) b^T, in float32 or wider. On a CPU they are
kept until W, A or B changes, which its address, its version or a checksum shows: all of A and B, and a sample of W, since
an edit through ``.data`` leaves the version as it is.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from .. import ops
from .plan import ADAPTER_DTYPES, DTYPES, INACTIVE, Kind, is_dense, is_dora, read_adapters, variant_name

__all__ = ["DoraPlan", "adapted", "read_dora", "refuse_rows"]

_HALF = (torch.bfloat16, torch.float16)

_BASE = "DoRA on a base layer that is neither nn.Linear nor bitsandbytes' Linear4bit"
_COMPILED = "DoRA inside torch.compile"
_MAGNITUDE = "DoRA whose magnitude is not a plain nn.Parameter on the base layer's device, or has hooks"
_ONE_ROW = "DoRA on an input without rows"


@dataclass(slots=True)
class Part:
    """One active adapter, with DoRA where it has a magnitude."""

    name: str
    a: Tensor
    b: Tensor
    scaling: float
    p: float
    magnitude: Tensor | None
    own_base: bool  # PEFT multiplies with W anew for this adapter, instead of taking the sum so far


@dataclass(slots=True)
class DoraPlan:
    """A call with DoRA, as :func:`adapted` takes it."""

    base: Any
    dense: bool  # W x is computed here, else the base layer is called
    widen: bool  # under CUDA's autocast the result keeps the magnitudes' dtype
    parts: list[Part]


def read_dora(layer: Any, kind: Kind) -> DoraPlan | str:
    """The active adapters of a layer of which one has DoRA, or the reason why PEFT's forward must run."""
    if torch.compiler.is_compiling():
        return _COMPILED
    base = layer._modules[kind.base]
    weight, dense = base._parameters.get("weight"), is_dense(base)
    if getattr(layer, "fan_in_fan_out", False) or not (dense or _is_known(base)):
        return _BASE
    parts: list[Part] = []
    for name in layer.active_adapters:
        if name not in layer._modules["lora_A"]._modules:
            continue
        plain = read_adapters(layer, name)
        if isinstance(plain, str):
            return plain
        (a,), (b,), (scaling,), p = plain
        variant, magnitude, own_base = layer.lora_variant.get(name), None, False
        if variant is not None:
            if not is_dora(variant):
                return variant_name(variant)
            magnitude = _magnitude(layer, name)
            if magnitude is None or magnitude.device != weight.device:
                return _MAGNITUDE
            # PEFT asks the layer here, and not its dropout.
            own_base = layer.training and type(layer._modules["lora_dropout"]._modules[name]) is not nn.Identity
            p = p if own_base else 0.0
        if parts and parts[0].a.dtype is not a.dtype:
            return DTYPES
        parts.append(Part(name, a, b, scaling, p, magnitude, own_base))
    return DoraPlan(base, dense, kind.widen, parts) if parts else INACTIVE


def _is_known(base: Any) -> bool:
    if "forward" in base.__dict__ or base._parameters.get("weight") is None:
        return False
    cls = type(base)
    if cls is nn.Linear:
        return type(base._parameters["weight"]) is Parameter
    # Not Linear8bitLt: on a CPU, dequantising it as PEFT does spoils it for the next call.
    return cls.__name__ == "Linear4bit" and cls.__module__.startswith("bitsandbytes.")


def refuse_rows(x: Tensor) -> str | None:
    """The reason why an input that the ops take is left to PEFT with DoRA, or None."""
    return _ONE_ROW if x.dim() < 2 else None


def _magnitude(layer: Any, name: str) -> Tensor | None:
    module = layer._modules["lora_magnitude_vector"]._modules.get(name)
    cls = type(module)
    if cls.__name__ != "DoraLinearLayer" or cls.__module__ != "peft.tuners.lora.dora" or "forward" in module.__dict__:
        return None
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    magnitude = module._parameters.get("weight")
    return magnitude if type(magnitude) is Parameter else None


# ---- the forward -------------------------------------------------------------------------------------------------


def adapted(layer: nn.Module, x: Tensor, plan: DoraPlan) -> Tensor:
    """The layer's output [..., O] for x [..., I], by one adapter after another as PEFT does."""
    base, bias = plan.base, plan.base._parameters["bias"]
    weight, kept = base._parameters["weight"], True
    u: Tensor | None = None  # W x without the bias, with the adapters so far
    if not plan.dense:
        u = base(x)
        assert u is not None
        u = u if bias is None else (u - bias).to(u.dtype)
        if type(base) is not nn.Linear:
            weight, kept = _dequantised(base, x, plan.parts[0].a), False
    for part in plan.parts:
        dropped = F.dropout(x, part.p) if part.p else x
        if part.magnitude is None:
            if u is None and part.p:
                u = F.linear(x, weight)
            u = _plus(u, dropped, weight, part)
            continue
        scale = part.magnitude
        if scale.dtype in _HALF:
            scale = scale.float()
        scale = scale / _norm(layer if kept else None, weight, part)
        if not part.own_base or (u is None and not part.p):
            u = _plus(u, x, weight, part)
            if part is plan.parts[-1] and bias is not None:
                u, bias = torch.addcmul(bias, u, scale).to(u.dtype), None
            else:
                u = (u * scale).to(u.dtype)
        elif u is None:
            rest, of_dropped = F.linear(torch.stack([x - dropped, dropped]), weight).unbind()
            u = torch.addcmul(rest, _plus(of_dropped, dropped, weight, part), scale).to(rest.dtype)
        else:
            of_dropped = F.linear(dropped, weight.to(x.dtype))
            delta = torch.addcmul(-of_dropped, _plus(of_dropped, dropped, weight, part), scale)
            u = (u + delta).to(u.dtype)
    assert u is not None  # there is a part
    if bias is not None:
        u = (u + bias).to(u.dtype)
    if plan.widen and torch.is_autocast_enabled():
        for part in plan.parts:
            if part.magnitude is not None:
                u = u.to(torch.promote_types(u.dtype, part.magnitude.dtype))
    return u


def _dequantised(base: Any, x: Tensor, a: Tensor) -> Tensor:
    """The weight of a quantised base layer in a dtype that the ops take together with ``a``."""
    from peft.utils.integrations import dequantize_module_weight

    with torch.no_grad():
        weight = dequantize_module_weight(base).detach()
    return weight if a.dtype in ADAPTER_DTYPES.get(weight.dtype, ()) else weight.to(x.dtype)


def _plus(u: Tensor | None, x: Tensor, weight: Tensor, part: Part) -> Tensor:
    """u + s B A x, where u is W x if it is None."""
    factors = [part.a], [part.b], [part.scaling]
    if u is None:
        return ops.lora_linear(x, weight, None, *factors)
    return ops.lora_delta(u, x, *factors).to(u.dtype)


# ---- the norms ---------------------------------------------------------------------------------------------------

# A tensor's address, identity, version and checksum.
_Stamp = tuple[int, int, int, float]

# Below this part of ||w||^2 the three terms cancel too much in float32, and the rows are formed instead.
_CANCELLED = 1e-2
# Elements of W that its checksum reads, in different rows and columns.
_SAMPLE = 64


@dataclass(slots=True)
class _Known:
    """What is known of one layer's weight."""

    stamp: _Stamp
    squares: Tensor
    norms: dict[str, tuple[_Stamp, _Stamp, float, Tensor]] = field(default_factory=dict)


_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def _norm(layer: nn.Module | None, weight: Tensor, part: Part) -> Tensor:
    """The norms of the rows of W + s B A, rounded to the adapter's dtype as PEFT's are, without a gradient.

    They are kept for ``layer``, if there is one.
    """
    a, b, s = part.a.detach(), part.b.detach(), part.scaling
    # Elsewhere a checksum would make the host wait for the device, and tensors of inference mode have no version.
    if layer is None or not weight.is_cpu or weight.is_inference() or a.is_inference() or b.is_inference():
        with _plain_mode(weight, inference=torch.is_inference_mode_enabled()):
            return _norms(weight, _squares(weight), a, b, s)
    stamp = _stamp(weight, weight.detach().reshape(-1)[:: weight.numel() // _SAMPLE | 1])
    stamp_a, stamp_b = _stamp(part.a, a), _stamp(part.b, b)
    known = _known.get(layer)
    if known is not None and known.stamp == stamp:
        norm = known.norms.get(part.name)
        if norm is not None and norm[:3] == (stamp_a, stamp_b, s):
            return norm[3]
    else:
        known = None
    # What is kept outlives an inference mode that this call may be in.
    with _plain_mode(weight, inference=False):
        if known is None:
            known = _known[layer] = _Known(stamp, _squares(weight))
        norms = _norms(weight, known.squares, a, b, s)
    known.norms[part.name] = stamp_a, stamp_b, s, norms
    return norms


def _stamp(tensor: Tensor, read: Tensor) -> _Stamp:
    total = read.sum(dtype=torch.float32) if read.dtype in _HALF else read.sum()
    return tensor.data_ptr(), id(tensor), tensor._version, total.item()


def _plain_mode(like: Tensor, inference: bool) -> ExitStack:
    """Neither gradients nor autocast, and inference mode as said."""
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(inference))
    stack.enter_context(torch.no_grad())
    if torch.is_autocast_enabled(like.device.type):
        stack.enter_context(torch.autocast(like.device.type, enabled=False))
    return stack


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _squares(weight: Tensor) -> Tensor:
    """||w||^2 of each row in float64. The terms are summed in it, too, since they cancel."""
    wide = torch.float32 if weight.dtype in _HALF else weight.dtype
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=wide).double().square()


def _norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, s: float) -> Tensor:
    weight = weight.detach()
    dtype, a, b = a.dtype, _wide(a), _wide(b)
    if s == 0.0:
        return squares.sqrt().to(dtype)
    # 2 A w + s A A^T b of each row, whose product with s b is what is added to the square.
    inner = torch.addmm(ops.lora_shrink(weight, [a]), b, a @ a.mT, beta=2.0, alpha=s)
    total = squares + inner.mul_(b).sum(dim=1).double().mul_(s)
    if weight.is_cpu and not bool(torch.all(total >= _CANCELLED * squares)):
        return torch.linalg.vector_norm(torch.addmm(_wide(weight), b, a, alpha=s), dim=1).to(dtype)
    return total.clamp_(min=0.0).sqrt_().to(dtype)
