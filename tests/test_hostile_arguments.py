"""Arguments that no operation can take, and arguments that share memory: a sentence that names both, or the right result."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tsugi_kpool import ops, reference

STATS = [1.0, 2.0, 4.0, 8.0, 0.0, 0.0, 0.0, 0.0]


def normal(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def good(op: str) -> dict:
    """Arguments that fit together, each tensor with memory of its own."""
    lora = {
        "base": normal(5, 4),
        "x": normal(5, 6),
        "y": normal(5, 4),
        "grad": normal(5, 4),
        "h": normal(5, 5),
        "weight": normal(4, 6),
        "bias": normal(4),
        "A": [normal(3, 6), normal(2, 6)],
        "B": [normal(4, 3), normal(4, 2)],
        "scaling": [1.0, 0.5],
        "dropout_p": 0.5,
        "rng": torch.tensor([1, 2]),
    }
    if "experts" in op:
        lora |= {
            "ends": torch.tensor([2, 5]),
            "A": [normal(2, 3, 6), normal(2, 2, 6)],
            "B": [normal(2, 4, 3), normal(2, 4, 2)],
        }
    sideband = {
        "sum": [normal(3), normal(4, 5)],
        "stats": torch.tensor(STATS, dtype=torch.float64),
        "grad": [normal(3), normal(4, 5)],
        "weight": 1.0,
        "zero_grad": False,
        "scale": 0.5,
    }
    values = (
        sideband if op.startswith("sideband") else {"ring": normal(4, 7), "filled": 3} if "variance" in op else lora
    )
    return {name: values[name] for name in names(op)}


def names(op: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.tsugi, op).default._schema.arguments]


def places() -> list[tuple[str, str, int | None]]:
    """(op, argument, index in its list) of every tensor that an operation takes."""
    found = []
    for op in ops.OPERATIONS:
        for name, value in good(op).items():
            if isinstance(value, Tensor):
                found.append((op, name, None))
            elif isinstance(value, list) and isinstance(value[0], Tensor):
                found.append((op, name, 1))
    return found


every_place = pytest.mark.parametrize("op, name, index", places())


def with_changed(op: str, name: str, index: int | None, change) -> dict:
    values = good(op)
    if index is None:
        values[name] = change(values[name])
    else:
        values[name] = [change(t) if k == index else t for k, t in enumerate(values[name])]
    return values


def freed(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)
    return t


def of_dtype(dtype: torch.dtype):
    def change(t):
        try:
            return t.to(dtype)
        except (RuntimeError, NotImplementedError):
            return torch.empty(t.shape, dtype=dtype)

    change.__name__ = str(dtype)
    return change


def sparse(t):
    return t.to_sparse()


def compressed(t):
    return t.reshape(1, -1).to_sparse_csr()


def opaque(t):
    return t.float().to_mkldnn()


def quantised(t):
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8)


def nested(t):
    return torch.nested.nested_tensor([t, t])


def huge(t):
    return t.new_zeros(()).expand(2**50, *t.shape[1:])


REFUSED = [freed, shrunk, sparse, compressed, opaque, quantised, nested, huge]
DTYPES = (
    "bits8",
    "uint16",
    "uint64",
    "int32",
    "bool",
    "complex64",
    "float8_e4m3fn",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
)
REFUSED += [of_dtype(getattr(torch, name)) for name in DTYPES if hasattr(torch, name)]


@pytest.mark.parametrize("change", REFUSED, ids=lambda c: c.__name__)
@every_place
def test_what_cannot_be_read_is_named(op, name, index, change):
    if name == "ends" and change.__name__ == "torch.int32":
        return  # which it may be
    values = with_changed(op, name, index, change)
    label = name if index is None else f"{name}[{index}]"
    if op == "buffer_variance" and change is huge:
        # A window of that size, of which three slots are filled, is in order.
        assert ops.buffer_variance(**values) == 0
        return
    with pytest.raises(RuntimeError) as caught:
        getattr(ops, op)(**values)
    text = str(caught.value)
    assert op in text or "lora_delta" in text, text
    # A huge argument may be refused for what it asks to allocate, or for not fitting what stands beside it.
    assert change is huge or label in text or "adapters are" in text, text


def test_none_is_named():
    for op, name, _ in places():
        argument = next(a for a in getattr(torch.ops.tsugi, op).default._schema.arguments if a.name == name)
        if str(argument.type).startswith("Optional"):
            continue
        for value in (None, "a string", [None]):
            with pytest.raises((RuntimeError, TypeError)) as caught:
                getattr(ops, op)(**{**good(op), name: value})
            text = str(caught.value)
            assert op in text and (name in text or "empty list" in text), text


def test_what_no_memory_holds_is_an_error():
    """Intermediate results that grow with a size which costs the caller nothing, as a view's does."""
    wide = torch.zeros(()).expand(2, 2**50)
    with pytest.raises(RuntimeError, match="buffer_variance: .*no memory for"):
        ops.buffer_variance(wide, 2)
    long, A, B = torch.zeros(()).expand(2**50, 4), [normal(3, 6)], [normal(4, 3)]
    with pytest.raises(RuntimeError, match="lora_backward: .*memory"):
        torch.ops.tsugi._lora_backward(
            long, torch.zeros(()).expand(2**50, 6), None, None, A, B, [1.0], 0.0, None, False, True, False
        )


@pytest.mark.parametrize("op", ["lora_delta", "lora_experts"])
@pytest.mark.parametrize("exotic", ["jagged", "nested", "sparse", "quantised"])
def test_a_base_that_is_no_plain_memory_names_the_operation_under_autocast(op, exotic):
    """Autocast looks at dtype and shape of base, which such tensors may not have."""
    plain = normal(4, 16)
    base = {
        "jagged": lambda: torch.nested.nested_tensor([plain, plain], layout=torch.jagged),
        "nested": lambda: torch.nested.nested_tensor([plain, plain]),
        "sparse": lambda: plain.to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
    }[exotic]()
    x, ends = normal(4, 5), [torch.tensor([1, 4])] if op == "lora_experts" else []
    A, B = [normal(2, 5)], [normal(16, 2)]
    factors = [[t.expand(2, *t.shape) for t in ts] for ts in (A, B)] if ends else [A, B]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=op):
        getattr(ops, op)(base, x, *ends, *factors, [0.5])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_jagged_argument_beside_plain_ones_names_the_operation(requires_grad):
    jagged = torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)
    A, B = [normal(4, 5).requires_grad_(requires_grad)], [normal(16, 4)]
    with pytest.raises((RuntimeError, NotImplementedError), match="lora_linear"):
        ops.lora_linear(normal(1, 5), normal(16, 5), jagged, A, B, [0.5])


def test_a_call_without_any_tensor_is_refused():
    for op in ops.OPERATIONS:
        values = {
            name: None if isinstance(v, Tensor) else [] if isinstance(v, list) else v for name, v in good(op).items()
        }
        with pytest.raises(RuntimeError, match=op):
            getattr(ops, op)(**values)


# ---- right results from odd memory -----------------------------------------------------------------------------------


def misaligned(t: Tensor) -> Tensor:
    """At an odd address. Made of bytes: torch's own copy may end the process at such an address."""
    values = t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(bytearray(b"\0" + values), dtype=t.dtype, offset=1, count=t.numel()).view(t.shape)


def negative(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def imaginary_of_conjugate(t: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2]


def in_a_wide_buffer(t: Tensor) -> Tensor:
    return t.new_zeros(*t.shape[:-1], t.shape[-1] + 5)[..., 2 : 2 + t.shape[-1]].copy_(t)


def copied(values: dict) -> dict:
    def copy(value):
        if isinstance(value, Tensor):
            return value.clone().resolve_neg().contiguous()
        return [copy(v) for v in value] if isinstance(value, list) else value

    return {name: copy(value) for name, value in values.items()}


def flat(values) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for value in values for t in flat(value)] if isinstance(values, (list, tuple)) else []


@pytest.mark.parametrize(
    "change", [misaligned, negative, imaginary_of_conjugate, strided, in_a_wide_buffer], ids=lambda c: c.__name__
)
@every_place
def test_odd_memory_gives_right_results_or_a_sentence(op, name, index, change):
    values = with_changed(op, name, index, lambda t: change(t) if t.is_floating_point() else t)
    mirror = copied(values)
    label = name if index is None else f"{name}[{index}]"
    try:
        result = getattr(ops, op)(**values)
    except RuntimeError as error:
        # What is written, and the buffers of the sideband, must be what they say.
        assert name in ("y", "sum", "stats") or (op, name) in (
            ("sideband_drain_", "grad"),
            ("sideband_accumulate_", "grad"),
        ), error
        assert op in str(error) and (label in str(error) or name in str(error)), error
        assert all(map(torch.equal, flat([*map(clean, flat(list(values.values())))]), flat(list(mirror.values()))))
        return
    wanted = getattr(reference, op)(**mirror)
    written = [n for n in ("y", "sum", "stats", "grad") if n in values and op.endswith("_")]
    actual = flat([result, *(values[n] for n in written)])
    for a, w in zip(actual, flat([wanted, *(mirror[n] for n in written)]), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-5, atol=1e-5)


def clean(t: Tensor) -> Tensor:
    return t.resolve_neg()


def test_an_op_that_returns_nothing_keeps_the_heap_whole():
    """Torch's fallback for lazy bits takes an operation's first result; these have none."""
    probe = """
import torch
from tsugi_kpool import ops
B = [torch.randn(8, 4) for _ in range(2)]
for lazy in (torch.zeros(6, 8, dtype=torch.complex64).conj().imag, torch._neg_view(torch.zeros(6, 8))):
    for call in (lambda: torch.ops.tsugi.lora_expand_(lazy, torch.randn(6, 8), B, [1., 1.]), lambda: ops.lora_expand_(lazy, torch.randn(6, 8), B, [1., 1.])):
        for _ in range(150):
            try:
                call()
            except RuntimeError as error:
                assert "lora_expand_: y is a lazy negative" in str(error)
    h = torch._neg_view(torch.ones(6, 8))
    y = torch.zeros(6, 8)
    ops.lora_expand_(y, h, B, [1., 1.])
    assert torch.allclose(y, -torch.ones(6, 8) @ torch.cat(B, 1).t(), atol=1e-5)
conjugate = torch.zeros(6, 8, dtype=torch.complex64, device="meta").conj()
for _ in range(50):
    try:
        torch.ops.tsugi.lora_expand_(conjugate, torch.empty(6, 8, device="meta"), [b.to("meta") for b in B], [1., 1.])
    except RuntimeError:
        pass
print("whole")
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "whole", done.stderr


# ---- memory that arguments share -------------------------------------------------------------------------------------


def stats() -> Tensor:
    return torch.tensor(STATS, dtype=torch.float64)


def sharing_calls():
    """(what, call, the two arguments that share memory)."""
    s, g, flat_ = torch.ones(6), torch.ones(6), torch.ones(100)
    double = torch.zeros(20, dtype=torch.float64)
    y, B = torch.ones(5, 4), [torch.ones(4, 4)]
    wide = torch.ones(5, 9)
    drain, accumulate = ops.sideband_drain_, ops.sideband_accumulate_
    return [
        ("one S twice", lambda: accumulate([s, s], stats(), [g, g]), ("sum[0]", "sum[1]")),
        ("S overlapping S", lambda: accumulate([flat_[:6], flat_[5:11]], stats(), [g, g]), ("sum[0]", "sum[1]")),
        ("stats in S", lambda: accumulate([double.view(torch.float32)], double[2:10], [torch.ones(40)]), ("sum[0]", "stats")),
        ("grad is S", lambda: accumulate([s], stats(), [s]), ("sum[0]", "grad[0]")),
        ("grad is another S", lambda: accumulate([s, g], stats(), [flat_[:6], s]), ("sum[0]", "grad[1]")),
        ("one grad twice, zeroed", lambda: accumulate([s, g], stats(), [flat_[:6], flat_[:6]], 1.0, True), ("grad[0]", "grad[1]")),
        ("drain: grad is S", lambda: drain([s], stats(), [s], 1.0), ("sum[0]", "grad[0]")),
        ("drain: one grad twice", lambda: drain([s, g], stats(), [flat_[:6], flat_[3:9]], 1.0), ("grad[0]", "grad[1]")),
        ("drain: stats twice", lambda: drain([double.view(torch.float32)], double[:8], [torch.ones(40)], 1.0), ("sum[0]", "stats")),
        ("y over h", lambda: ops.lora_expand_(y, y, B, [1.0]), ("y", "h")),
        ("y over B", lambda: ops.lora_expand_(y, torch.ones(5, 4), [y[:4]], [1.0]), ("y", "B[0]")),
        ("columns that meet", lambda: ops.lora_expand_(wide[:, :4], wide[:, 3:7], B, [1.0]), ("y", "h")),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(12))
def test_written_memory_belongs_to_one_argument(number):
    what, call, labels = sharing_calls()[number]
    with pytest.raises(RuntimeError, match="shares memory") as caught:
        call()
    assert all(label in str(caught.value) for label in labels), (what, caught.value)


@pytest.mark.parametrize("strides", [(3, 1), (0, 1), (1, 1), (4, 0), (2, 2)], ids=str)
def test_elements_that_share_memory_are_not_written(strides):
    def view():
        return torch.ones(60).as_strided((5, 4), strides)

    y = view()
    with pytest.raises(RuntimeError, match=r"lora_expand_: y is \[5, 4\] with strides .*: its elements share memory"):
        ops.lora_expand_(y, torch.ones(5, 3), [torch.ones(4, 3)], [1.0])
    S, kept = [torch.ones(5, 4)], stats()
    with pytest.raises(RuntimeError, match=r"sideband_drain_: grad\[0\] .* share memory"):
        ops.sideband_drain_(S, kept, [view()], 1.0)
    with pytest.raises(RuntimeError, match=r"sideband_accumulate_: grad\[0\] .* share memory"):
        ops.sideband_accumulate_(S, kept, [view()], 1.0, True)
    # Refused before anything was written; and what is only read may share.
    assert y.eq(1).all() and S[0].eq(1).all() and kept.tolist() == STATS
    ops.sideband_accumulate_(S, kept, [view()], 1.0)
    assert S[0].eq(2).all()


def test_disjoint_views_of_one_storage_pass():
    flat_ = torch.zeros(1000)
    S = [flat_[0:40].view(5, 8), flat_[40:43], flat_[100:100]]
    grads = [flat_[200:240].view(8, 5).t(), flat_[50:53], flat_[0:0]]
    for g in grads:
        g.fill_(2.0)
    kept = stats()
    ops.sideband_accumulate_(S, kept, grads, 1.0, True)
    assert all(s.eq(2).all() for s in S) and all(g.eq(0).all() for g in grads)
    ops.sideband_drain_(S, kept, grads, 0.5)
    assert all(s.eq(0).all() for s in S) and all(g.eq(1).all() for g in grads)
    # Interleaved columns: y, h and B lie between each other's rows.
    buffer = torch.randn(6, 64)
    y, h, B = buffer[:, 0:6], buffer[:, 30:34], buffer[:, 60:64]
    expected = y + h @ B.t()
    ops.lora_expand_(y, h, [B], [1.0])
    torch.testing.assert_close(y, expected)
    # Every other row, and the columns of a transposed matrix.
    rows = torch.randn(12, 4)
    expected = rows[::2] + rows[1::2]
    ops.lora_expand_(rows[::2], rows[1::2], [torch.eye(4)], [1.0])
    torch.testing.assert_close(rows[::2], expected)


# ---- transforms that a native kernel cannot follow -------------------------------------------------------------------


def test_forward_mode_and_torch_func_give_right_results():
    v = good("lora_linear")
    v["dropout_p"], v["rng"] = 0.0, None

    def ours(x):
        return ops.lora_linear(**{**v, "x": x})

    def plain(x):
        return reference.lora_linear(**{**v, "x": x})

    x, tangent = v["x"], normal(5, 6) + 1
    for actual, wanted in zip(torch.func.jvp(ours, (x,), (tangent,)), torch.func.jvp(plain, (x,), (tangent,))):
        torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(
        torch.func.grad(lambda x: ours(x).square().sum())(x), torch.func.grad(lambda x: plain(x).square().sum())(x)
    )
    torch.testing.assert_close(torch.func.jacrev(ours)(x), torch.func.jacrev(plain)(x))
    batch = torch.stack([x, x + 1])
    torch.testing.assert_close(torch.vmap(ours)(batch), torch.vmap(plain)(batch))
    with torch.autograd.forward_ad.dual_level():
        y = ops.lora_shrink(torch.autograd.forward_ad.make_dual(x, tangent), v["A"])
        got = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(got, reference.lora_shrink(tangent, v["A"]))
