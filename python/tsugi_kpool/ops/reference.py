"""Every op in plain torch: the test oracle and the benchmark baseline.

One function an op, with the name, the arguments and the result of ``torch.ops.tsugi.<name>``. Nothing here is fast and
nothing here is checked; what an op computes is written down once, in these docstrings.

Shapes: x is [..., I], a weight [O, I], A[k] [r_k, I], B[k] [O, r_k], y, base and grad [..., O], h [..., R] with
R = sum of r_k, the adapters side by side in the order given. x, weight, bias, base, y and grad share one dtype, all A
and B share another; products of the two run in ``torch.promote_types`` of both, and h has that dtype.

``lora_shrink``, ``lora_linear``, ``lora_delta`` and ``lora_backward`` are composed of differentiable torch operations,
so autograd can go through them any number of times.

Sources: LoRA (Hu et al. 2021, arXiv:2106.09685); Philox (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy
as 1, 2, 3", SC 2011); the unbiased variance from running sums (Chan, Golub, LeVeque, 1983).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .statistics import Kept, Seen

__all__ = [
    "buffer_variance",
    "dropout_keep",
    "dropout_scale",
    "dropout_threshold",
    "lora_backward",
    "lora_delta",
    "lora_expand_",
    "lora_experts",
    "lora_linear",
    "lora_shrink",
    "philox4x32",
    "sideband_accumulate_",
    "sideband_drain_",
    "sideband_stats",
]

_U32 = 0xFFFFFFFF


# ---- dropout -----------------------------------------------------------------------------------------------------


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int = 7) -> tuple[Tensor, ...]:
    """Philox4x32, a counter-based random generator: four 32-bit words from a counter of four and a key of two.

    One round, with (hi, lo) the 64-bit product of two words:

        hi0, lo0 = M0 * c0;   hi1, lo1 = M1 * c2
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0

    and between two rounds k0 += W0, k1 += W1. M0 = D2511F53, M1 = CD9E8D57, W0 = 9E3779B9, W1 = BB67AE85.

    Words are int64 tensors in [0, 2^32) that broadcast against each other. int64 products wrap modulo 2^64, which
    leaves both halves exact.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for i in range(rounds):
        if i > 0:
            k0 = (k0 + 0x9E3779B9) & _U32
            k1 = (k1 + 0xBB67AE85) & _U32
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (p1 >> 32) & _U32 ^ c1 ^ k0,
            p1 & _U32,
            (p0 >> 32) & _U32 ^ c3 ^ k1,
            p0 & _U32,
        )
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """T = round(65536 p) in [0, 65535]: a 16-bit draw below T drops the element. T = 0 is no dropout."""
    return min(max(math.floor(p * 65536 + 0.5), 0), 65535)


def dropout_scale(p: float) -> float:
    """65536 / (65536 - T): what a kept element is multiplied by. Unbiased for the rate T / 65536 that is drawn."""
    return 65536 / (65536 - dropout_threshold(p))


def dropout_keep(rng: Tensor, adapter: int, rows: int, cols: int, p: float) -> Tensor:
    """Which elements of x the adapter sees: bool [rows, cols], True is kept.

    rng is int64 [2], (seed, offset), read as unsigned. Element (row m, column c) of adapter k takes the 16 bits
    j = c % 8 of

        w = Philox4x32-7(counter = (c / 8, m, k | (offset >> 32 & ffff) << 16, offset & ffffffff),
                         key     = (seed & ffffffff, seed >> 32))
        draw = w[j / 2] >> 16 (j % 2) & ffff

    and is kept where draw >= T. The mask depends on nothing else: neither on the device nor on how work is split.
    """
    device = rng.device
    seed, offset = rng[0], rng[1]
    block = torch.arange((cols + 7) // 8, device=device)
    row = torch.arange(rows, device=device)[:, None] & _U32
    adapter_word = (adapter & 0xFFFF) | ((offset >> 32) & 0xFFFF) << 16
    words = philox4x32(
        counter=(block, row, adapter_word, offset & _U32),
        key=(seed & _U32, (seed >> 32) & _U32),
    )
    drawn = torch.stack(torch.broadcast_tensors(*words), dim=-1)  # [rows, blocks, 4]
    draws = torch.stack((drawn & 0xFFFF, drawn >> 16), dim=-1)  # [rows, blocks, 4, 2]: low half first
    return draws.reshape(rows, 8 * block.numel())[:, :cols] >= dropout_threshold(p)


def _rows(t: Tensor) -> Tensor:
    """[..., C] as [M, C]; sizes of zero included, which reshape(-1, C) cannot infer."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _dropped(x: Tensor, adapter: int, dropout_p: float, rng: Tensor | None) -> Tensor:
    """drop_k(x) of a flat x [M, I]: kept elements times the scale, the others zero."""
    if dropout_threshold(dropout_p) == 0:
        return x
    if rng is None:
        raise RuntimeError(f"dropout_p is {dropout_p}, which needs rng, (seed, offset) as int64 [2]")
    keep = dropout_keep(rng, adapter, x.shape[0], x.shape[1], dropout_p)
    return torch.where(keep, x * dropout_scale(dropout_p), 0.0)


# ---- low-rank products -------------------------------------------------------------------------------------------


def lora_shrink(x: Tensor, A: Sequence[Tensor], dropout_p: float = 0.0, rng: Tensor | None = None) -> Tensor:
    """H = [drop_0(x) A_0^T | drop_1(x) A_1^T | ...], shape [..., R]. Each adapter drops independently."""
    dtype = torch.promote_types(x.dtype, A[0].dtype)
    flat = _rows(x).to(dtype)
    h = torch.cat([F.linear(_dropped(flat, k, dropout_p, rng), a.to(dtype)) for k, a in enumerate(A)], dim=1)
    return h.reshape(*x.shape[:-1], h.shape[-1])


def _expand(h: Tensor, B: Sequence[Tensor], scaling: Sequence[float]) -> Tensor:
    """H diag(s) B_cat^T in h's dtype."""
    ranks = [b.shape[1] for b in B]
    scaled = torch.cat([part * s for part, s in zip(h.split(ranks, dim=-1), scaling)], dim=-1)
    return F.linear(scaled, torch.cat([b.to(h.dtype) for b in B], dim=1))


def lora_expand_(y: Tensor, h: Tensor, B: Sequence[Tensor], scaling: Sequence[float]) -> None:
    """y += H diag(s) B_cat^T, in place, rounded once to y's dtype."""
    y.add_(_expand(h, B, scaling))


def lora_delta(
    base: Tensor,
    x: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """base + sum_k s_k B_k A_k drop_k(x): the adapters on top of any base layer's output."""
    return (base + _expand(lora_shrink(x, A, dropout_p, rng), B, scaling)).to(base.dtype)


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
    """y = x W^T + b + sum_k s_k B_k A_k drop_k(x): a linear layer with K adapters summed on the same tokens."""
    return lora_delta(F.linear(x, weight, bias), x, A, B, scaling, dropout_p, rng)


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
    """The gradients (dx, [dA_0, ...], [dB_0, ...]) of ``lora_linear``; without a weight, of ``lora_delta``.

        dH = s dY B_cat                    [M, R]
        dB_k = s_k dY^T H_k                [O, r_k]
        dA_k = dH_k^T drop_k(x)            [r_k, I]
        dx = dY W + sum_k mask_k(dH_k A_k) [M, I], the first term only with a weight

    h is what ``lora_shrink`` returned in forward, and the mask is drawn again from rng. dx has x's dtype, dA and dB
    have the adapters'. The derivative of this function with respect to x and A is complete only where h is a function
    of them, as ``lora_shrink(x, A, ...)`` is.
    """
    dtype = torch.promote_types(x.dtype, A[0].dtype)
    dh = grad_h(grad, B, scaling, dtype)
    dx = grad_x(dh, A, dropout_p, rng)
    if weight is not None:
        dx = grad @ weight + dx
    ranks = [a.shape[0] for a in A]
    return (
        dx.to(x.dtype),
        grad_A(dh, x, ranks, A[0].dtype, dropout_p, rng),
        grad_B(grad, h.to(dtype), ranks, B[0].dtype, scaling),
    )


def grad_h(grad: Tensor, B: Sequence[Tensor], scaling: Sequence[float], dtype: torch.dtype) -> Tensor:
    """dH = s dY B_cat, [..., R] of ``dtype``, from grad = dY."""
    dy = grad.to(dtype)
    return torch.cat([(dy @ b.to(dtype)) * s for b, s in zip(B, scaling)], dim=-1)


def grad_B(grad: Tensor, h: Tensor, ranks: Sequence[int], dtype: torch.dtype, scaling: Sequence[float]) -> list[Tensor]:
    """dB_k = s_k dY^T H_k, [O, r_k] of ``dtype``."""
    dy = _rows(grad).to(h.dtype)
    parts = _rows(h).split(list(ranks), dim=1)
    return [((dy.t() @ part) * s).to(dtype) for part, s in zip(parts, scaling)]


def grad_A(
    dh: Tensor, x: Tensor, ranks: Sequence[int], dtype: torch.dtype, dropout_p: float, rng: Tensor | None
) -> list[Tensor]:
    """dA_k = dH_k^T drop_k(x), [r_k, I] of ``dtype``."""
    flat = _rows(x).to(dh.dtype)
    parts = _rows(dh).split(list(ranks), dim=1)
    return [(part.t() @ _dropped(flat, k, dropout_p, rng)).to(dtype) for k, part in enumerate(parts)]


def grad_x(dh: Tensor, A: Sequence[Tensor], dropout_p: float, rng: Tensor | None) -> Tensor:
    """sum_k mask_k(dH_k A_k): the adapters' part of dx, [..., I] of dh's dtype."""
    parts = _rows(dh).split([a.shape[0] for a in A], dim=1)
    terms = [_dropped(part @ a.to(dh.dtype), k, dropout_p, rng) for k, (part, a) in enumerate(zip(parts, A))]
    return functools.reduce(torch.add, terms).reshape(*dh.shape[:-1], A[0].shape[1])


# ---- low-rank products of experts ---------------------------------------------------------------------------------


def _rows_of_experts(ends: Tensor, rows: int) -> list[Tensor]:
    """For each expert e the rows ends[e-1] <= m < ends[e] that it has: bool [rows, 1]. Nothing is read to the host."""
    row = torch.arange(rows, device=ends.device)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    return [((row >= start) & (row < end))[:, None] for start, end in zip(starts.unbind(), ends.unbind())]


def _by_expert(rows: Tensor, ends: Tensor, factor: Tensor) -> Tensor:
    """Each row times its expert's matrix: rows [M, n], factor [E, p, n] to [M, p]; zero for rows of no expert."""
    out = rows.new_zeros(rows.shape[0], factor.shape[1])
    for mine, matrix in zip(_rows_of_experts(ends, rows.shape[0]), factor.unbind()):
        out = torch.where(mine, F.linear(rows, matrix), out)
    return out


def _sum_by_expert(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """left^T right over the rows of each expert: [M, p] and [M, n] to [E, p, n]."""
    sums = [
        torch.where(mine, left, 0.0).t() @ torch.where(mine, right, 0.0)
        for mine in _rows_of_experts(ends, left.shape[0])
    ]
    return torch.stack(sums) if sums else left.new_zeros(0, left.shape[1], right.shape[1])


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
    """K adapters on the experts of a mixture: base [M, O] and x [M, I], their rows sorted by expert.

        y[m] = base[m] + sum_k s_k B_ke A_ke drop_k(x)[m],   e the expert with ends[e-1] <= m < ends[e]

    A[k] is [E, r_k, I], B[k] is [E, O, r_k], ends is int32 or int64 [E]. Rows from ends[E-1] on have no expert: y is base.
    """
    dtype = torch.promote_types(x.dtype, A[0].dtype)
    y = base.to(dtype)
    for k, (a, b, s) in enumerate(zip(A, B, scaling)):
        h = _by_expert(_dropped(x.to(dtype), k, dropout_p, rng), ends, a.to(dtype))
        y = y + _by_expert(h * s, ends, b.to(dtype))
    return y.to(base.dtype)


def experts_grad_h(
    grad: Tensor, ends: Tensor, B: Sequence[Tensor], scaling: Sequence[float], dtype: torch.dtype
) -> Tensor:
    """dH_k = s_k dY B_ke, [M, R] of ``dtype``, from grad = dY."""
    dy = grad.to(dtype)
    return torch.cat([_by_expert(dy, ends, b.to(dtype).mT) * s for b, s in zip(B, scaling)], dim=-1)


def experts_grad_x(dh: Tensor, ends: Tensor, A: Sequence[Tensor], dropout_p: float, rng: Tensor | None) -> Tensor:
    """sum_k mask_k(dH_k A_ke), [M, I] of dh's dtype."""
    parts = dh.split([a.shape[1] for a in A], dim=1)
    terms = [
        _dropped(_by_expert(part, ends, a.to(dh.dtype).mT), k, dropout_p, rng)
        for k, (part, a) in enumerate(zip(parts, A))
    ]
    return functools.reduce(torch.add, terms)


def experts_grad_A(
    dh: Tensor,
    x: Tensor,
    ends: Tensor,
    ranks: Sequence[int],
    dtype: torch.dtype,
    dropout_p: float,
    rng: Tensor | None,
) -> list[Tensor]:
    """dA_ke = dH_k^T drop_k(x) over the rows of e, [E, r_k, I] of ``dtype``."""
    parts = dh.split(list(ranks), dim=1)
    dropped = [_dropped(x.to(dh.dtype), k, dropout_p, rng) for k in range(len(parts))]
    return [_sum_by_expert(part, right, ends).to(dtype) for part, right in zip(parts, dropped)]


def experts_grad_B(
    grad: Tensor, h: Tensor, ends: Tensor, ranks: Sequence[int], dtype: torch.dtype, scaling: Sequence[float]
) -> list[Tensor]:
    """dB_ke = s_k dY^T H_k over the rows of e, [E, O, r_k] of ``dtype``."""
    dy = grad.to(h.dtype)
    parts = h.split(list(ranks), dim=1)
    return [(_sum_by_expert(dy, part, ends) * s).to(dtype) for part, s in zip(parts, scaling)]


def lora_experts_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    ends: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(dx, dA, dB) of ``lora_experts``; h is [M, R] as the forward pass computed it."""
    ranks, dtype = [a.shape[1] for a in A], A[0].dtype
    dh = experts_grad_h(grad, ends, B, scaling, torch.promote_types(grad.dtype, dtype))
    return (
        experts_grad_x(dh, ends, A, dropout_p, rng).to(x.dtype),
        experts_grad_A(dh, x, ends, ranks, dtype, dropout_p, rng),
        experts_grad_B(grad, h, ends, ranks, dtype, scaling),
    )


# ---- sideband ----------------------------------------------------------------------------------------------------


def sideband_accumulate_(
    sum: Sequence[Tensor],
    stats: Tensor,
    grad: Sequence[Tensor],
    weight: float = 1.0,
    zero_grad: bool = False,
) -> None:
    """Add one snapshot of an adapter's gradient, of weight w, to what is held:

        S += w g,   m += 1,   n += w,   n2 += w^2,   Q += w ||g||^2 over all tensors

    S (``sum``) is float32. A snapshot with a NaN or an infinity anywhere adds 1 to the count of non-finite snapshots
    and changes nothing else. With ``zero_grad`` the gradients are zero afterwards in either case.
    """
    kept = Kept.of(stats)
    if all(bool(torch.isfinite(g).all()) for g in grad):
        for s, g in zip(sum, grad):
            s.add_(g.to(s.dtype), alpha=weight)
            kept.q.add_(weight * g.double().square().sum())
        kept.m.add_(1)
        kept.n.add_(weight)
        kept.n2.add_(weight * weight)
    else:
        kept.nonfinite.add_(1)
    if zero_grad:
        for g in grad:
            g.zero_()


def sideband_stats(sum: Sequence[Tensor], stats: Tensor) -> Tensor:
    """float64 [8]: m, n, Q, ||S||^2, V, P, numel, non-finite snapshots.

    V = (Q - ||S||^2 / n) / (n - n2 / n)   total unbiased variance of one snapshot; +inf for m < 2, never below 0
    P = ||S / n||^2                        squared norm of the mean;                 0 for m = 0
    """
    m, n, n2, q, nonfinite = Kept.of(stats)
    square = stats.new_zeros(())
    for s in sum:
        square = square + s.double().square().sum()
    numel = stats.new_tensor(float(_numel(sum)))
    variance = torch.where(m < 2, math.inf, ((q - square / n) / (n - n2 / n)).clamp_min(0.0))
    power = torch.where(m == 0, 0.0, square / (n * n))
    return torch.stack(Seen(m, n, q, square, variance, power, numel, nonfinite))


def _numel(tensors: Sequence[Tensor]) -> int:
    total = 0
    for t in tensors:
        total += t.numel()
    return total


def sideband_drain_(sum: Sequence[Tensor], stats: Tensor, grad: Sequence[Tensor], scale: float) -> None:
    """FIRE: grad = scale S, rounded to grad's dtype; then S = 0 and stats = 0, the non-finite count included."""
    for s, g in zip(sum, grad):
        g.copy_(s * scale)
        s.zero_()
    stats.zero_()


def buffer_variance(ring: Tensor, filled: int) -> Tensor:
    """Mean over elements of the unbiased variance over the first ``filled`` slots of ring [window, numel].

    A float64 scalar tensor, +inf where fewer than two slots are filled.
    """
    if filled < 2:
        return torch.full((), math.inf, dtype=torch.float64, device=ring.device)
    return ring[:filled].double().var(dim=0, unbiased=True).mean()
