"""The operations against plain torch: values, gradients, dispatch, and what they say of wrong arguments."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections import deque

import pytest
import torch

from cases import CASES, DTYPES, TOLERANCE, Case, arguments, relative_error
from tsugi_kpool import ops, reference

dtypes = pytest.mark.parametrize("dtype, adapter_dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
cases = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_op_has_a_function_a_reference_and_a_cpu_kernel():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "tsugi::" in name}
    public = {name for name in names if not name.startswith("_")}
    assert public == set(ops.__all__) - {"available", "draw_rng", "unavailable_reason"}
    assert public == set(reference.__all__) - {"philox4x32", "dropout_keep", "dropout_scale", "dropout_threshold"}
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tsugi::{name}", "CPU"), name


def layer(module, args, with_bias=True):
    bias = args.bias if with_bias else None
    return module.lora_linear(args.x, args.weight, bias, args.A, args.B, args.scaling, args.dropout_p, args.rng)


def delta(module, args):
    return module.lora_delta(args.base, args.x, args.A, args.B, args.scaling, args.dropout_p, args.rng)


def gradients(output, args, *extra):
    return torch.autograd.grad(output, [args.x, *extra, *args.A, *args.B], args.grad)


def close(actual, expected, eager, case):
    """Within the dtype's tolerance, and at most twice as far from float64 as eager torch is."""
    assert actual.dtype == eager.dtype and actual.shape == eager.shape
    error = relative_error(actual, expected)
    # A sum of two roundings may be this far off where they cancel, whatever computes it.
    limit = max(TOLERANCE[actual.dtype], 2.0 * relative_error(eager, expected))
    assert error <= limit, f"{case}: {error:.2e} > {limit:.2e}"


@dtypes
@cases
def test_layer_and_all_gradients(case, dtype, adapter_dtype):
    args = arguments(case, dtype, adapter_dtype)
    exact = args.to(torch.float64)
    results = [layer(module, a) for module, a in ((ops, args), (reference, exact), (reference, args))]
    close(*results, case)
    grads = [gradients(y, a) for y, a in zip(results, (args, exact, args))]
    for actual, expected, eager in zip(*grads):
        close(actual, expected, eager, case)


@dtypes
@cases
def test_delta_and_all_gradients(case, dtype, adapter_dtype):
    args = arguments(case, dtype, adapter_dtype)
    exact = args.to(torch.float64)
    results = [delta(module, a) for module, a in ((ops, args), (reference, exact), (reference, args))]
    close(*results, case)
    grads = [gradients(y, a, a.base) for y, a in zip(results, (args, exact, args))]
    for actual, expected, eager in zip(*grads):
        close(actual, expected, eager, case)


@dtypes
@cases
def test_the_pieces(case, dtype, adapter_dtype):
    args = arguments(case, dtype, adapter_dtype)
    exact = args.to(torch.float64)
    with torch.no_grad():
        shrink = [
            m.lora_shrink(a.x, a.A, a.dropout_p, a.rng) for m, a in ((ops, args), (reference, exact), (reference, args))
        ]
        close(*shrink, case)
        outputs = []
        for module, a in ((ops, args), (reference, exact), (reference, args)):
            y = a.base.clone()
            module.lora_expand_(y, shrink[2].to(torch.promote_types(a.x.dtype, a.A[0].dtype)), a.B, a.scaling)
            outputs.append(y)
        close(*outputs, case)
        h = shrink[2]
        for with_weight in (True, False):
            grads = []
            for module, a in ((ops, args), (reference, exact), (reference, args)):
                weight = a.weight if with_weight else None
                hs = h.to(torch.promote_types(a.x.dtype, a.A[0].dtype))
                dx, dA, dB = module.lora_backward(a.grad, a.x, hs, weight, a.A, a.B, a.scaling, a.dropout_p, a.rng)
                grads.append([dx, *dA, *dB])
            for actual, expected, eager in zip(*grads):
                close(actual, expected, eager, case)


def test_low_precision_by_torchs_own_product():
    """The path for CPUs with matrix units gives the same results where it is forced."""
    probe = """
import sys
sys.path.insert(0, sys.argv[1])
import test_ops as t
for case in t.CASES:
    for dtype in (t.torch.bfloat16, t.torch.float16):
        t.test_layer_and_all_gradients(case, dtype, dtype)
        t.test_the_pieces(case, dtype, dtype)
print("checked", len(t.CASES))
"""
    environment = {**os.environ, "TSUGI_CPU_PRODUCT": "torch"}
    here = os.path.dirname(__file__)
    done = subprocess.run([sys.executable, "-c", probe, here], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"checked {len(CASES)}" in done.stdout


def test_inputs_of_any_layout_give_the_same_bits():
    args = arguments(Case((6, 10), 24, 20, (4, 8)), torch.float32, torch.float32)
    expected = layer(ops, args)
    expected_grads = gradients(expected, args)

    def strided(t):
        return t.repeat_interleave(2, -1)[..., ::2]

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def misaligned(t):
        flat = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
        return flat.view(t.shape).copy_(t)

    for change in (strided, transposed, misaligned):
        with torch.no_grad():
            other = arguments(Case((6, 10), 24, 20, (4, 8)), torch.float32, torch.float32)
            for name in ("x", "weight", "grad"):
                setattr(other, name, change(getattr(other, name).detach()))
            other.A = [change(a.detach()) for a in other.A]
            other.B = [change(b.detach()) for b in other.B]
        for tensor in (other.x, *other.A, *other.B):
            tensor.requires_grad_()
        y = layer(ops, other)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        for actual, wanted in zip(gradients(y, other), expected_grads):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    y = layer(ops, args)
    assert all(map(torch.equal, gradients(y, args), gradients(layer(ops, args), args)))
    expanded = torch.autograd.grad(layer(ops, args).sum(), args.x)[0]
    dense = torch.autograd.grad(layer(ops, args), args.x, torch.ones_like(args.grad))[0]
    torch.testing.assert_close(expanded, dense)


def test_results_do_not_depend_on_the_thread_count():
    args = arguments(Case((300,), 257, 130, (16, 8), 0.2), torch.float32, torch.float32)
    threads = torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with torch.no_grad():
                h = ops.lora_shrink(args.x, args.A, args.dropout_p, args.rng)
                _, dA, dB = ops.lora_backward(
                    args.grad, args.x, h, None, args.A, args.B, args.scaling, args.dropout_p, args.rng
                )
            outcomes.append([h, *dA, *dB])
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], other))


# ---- dropout -------------------------------------------------------------------------------------------------------


def test_masks_are_the_references_bit_for_bit():
    x = torch.ones(37, 131, dtype=torch.float64)
    eye = [torch.eye(131, dtype=torch.float64)] * 3
    for p in (0.05, 0.5, 0.99):
        rng = ops.draw_rng()
        dropped = ops.lora_shrink(x, eye, p, rng).reshape(37, 3, 131)
        for k in range(3):
            keep = reference.dropout_keep(rng, k, 37, 131, p)
            assert torch.equal(dropped[:, k], keep.double() * reference.dropout_scale(p))


def test_the_seed_reproduces_masks_and_the_next_draw_differs():
    x, A = torch.randn(20, 30), [torch.randn(4, 30)]
    torch.manual_seed(3)
    first = ops.draw_rng()
    h = ops.lora_shrink(x, A, 0.5, first)
    assert not torch.equal(h, ops.lora_shrink(x, A, 0.5, ops.draw_rng()))
    torch.manual_seed(3)
    assert torch.equal(h, ops.lora_shrink(x, A, 0.5, ops.draw_rng()))


# ---- autograd and dispatch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck_and_gradgradcheck(dropout_p):
    case = Case((2, 3), 5, 4, (2, 1), dropout_p)
    args = arguments(case, torch.float64, torch.float64)
    args.bias.requires_grad_()

    def linear(x, bias, *ab):
        return ops.lora_linear(x, args.weight, bias, ab[:2], ab[2:], args.scaling, dropout_p, args.rng)

    def of_base(base, x, *ab):
        return ops.lora_delta(base, x, ab[:2], ab[2:], args.scaling, dropout_p, args.rng)

    def shrink(x, *A):
        return ops.lora_shrink(x, A, dropout_p, args.rng)

    ab = (*args.A, *args.B)
    for function, inputs in (
        (linear, (args.x, args.bias, *ab)),
        (of_base, (args.base, args.x, *ab)),
        (shrink, (args.x, *args.A)),
    ):
        # Batches of gradients too, as is_grads_batched and vectorised Hessians take them.
        assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


@pytest.mark.parametrize("sequence", [list, tuple, torch.nn.ParameterList, deque, iter], ids=lambda s: s.__name__)
def test_adapters_in_any_sequence_get_their_gradients(sequence):
    args = arguments(Case((3,), 5, 4, (2, 1)), torch.float32, torch.float32)
    wanted = gradients(layer(reference, args), args)
    for op in (ops.lora_linear, ops.lora_delta):
        A, B = sequence(args.A), sequence(args.B)
        if sequence is torch.nn.ParameterList:
            # A list of parameters makes its own of tensors that are none.
            args = dataclasses.replace(args, A=list(A), B=list(B))
        first = (args.x, args.weight, args.bias) if op is ops.lora_linear else (args.base, args.x)
        y = op(*first, A, B, iter(args.scaling))
        # But for that of x, which with a given base has the adapters' part alone.
        for got, want in zip(gradients(y, args)[1:], wanted[1:], strict=True):
            torch.testing.assert_close(got, want)


def test_a_factor_that_changes_after_the_forward_pass_does_not_count():
    args = arguments(Case((3,), 5, 4, (2, 1)), torch.float32, torch.float32)
    wanted = gradients(layer(reference, args), args)
    y = layer(ops, args)
    args.scaling[0] = 100.0
    for got, want in zip(gradients(y, args), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_a_factor_that_requires_grad_is_refused():
    args = arguments(Case((3,), 5, 4, (2, 1)), torch.float32, torch.float32)
    scaling = [1.0, torch.tensor(2.0, requires_grad=True)]
    with pytest.raises(RuntimeError, match=r"lora_linear: scaling\[1\] requires grad"):
        ops.lora_linear(args.x, args.weight, None, args.A, args.B, scaling)
    with pytest.raises(RuntimeError, match=r"lora_delta: scaling\[1\] requires grad"):
        ops.lora_delta(args.base, args.x, args.A, args.B, scaling)


def test_only_the_wanted_gradients_are_computed():
    args = arguments(Case((9,), 12, 7, (2, 3)), torch.float32, torch.float32)
    everything = gradients(layer(ops, args), args)
    for wanted in ([0], [1], [3], [2, 4]):
        tensors = [args.x, *args.A, *args.B]
        fresh = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        y = ops.lora_linear(fresh[0], args.weight, None, fresh[1:3], fresh[3:], args.scaling)
        y.backward(args.grad)
        for i, tensor in enumerate(fresh):
            assert (tensor.grad is not None) == (i in wanted)
            if i in wanted:
                torch.testing.assert_close(tensor.grad, everything[i], rtol=1e-5, atol=1e-6)


def test_nothing_but_x_and_h_is_kept():
    args = arguments(Case((64,), 32, 48, (4, 4), 0.25), torch.float32, torch.float32)
    saved = []
    known = {t.data_ptr() for t in (args.x, args.weight, args.rng, *args.A, *args.B)}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(ops, args)
    assert [tuple(t.shape) for t in saved] == [(64, 8)]


OPCHECK = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    args = arguments(Case((2, 5), 12, 7, (2, 3), 0.5), dtype, torch.float32)
    drop = (args.dropout_p, args.rng)
    check = torch.library.opcheck
    tsugi = torch.ops.tsugi
    check(
        tsugi.lora_linear.default,
        (args.x, args.weight, args.bias, args.A, args.B, args.scaling, *drop),
        test_utils=OPCHECK,
    )
    check(tsugi.lora_delta.default, (args.base, args.x, args.A, args.B, args.scaling, *drop), test_utils=OPCHECK)
    check(tsugi.lora_shrink.default, (args.x, args.A, *drop), test_utils=OPCHECK)
    plain = arguments(Case((2, 5), 12, 7, (2, 3), 0.5), dtype, torch.float32)
    for tensor in (plain.x, plain.base, *plain.A, *plain.B):
        tensor.requires_grad_(False)
    h = ops.lora_shrink(plain.x, plain.A, *drop)
    check(tsugi.lora_expand_.default, (plain.base, h, plain.B, plain.scaling), test_utils=OPCHECK)
    backward = (plain.grad, plain.x, h, plain.weight, plain.A, plain.B, plain.scaling, *drop)
    check(tsugi.lora_backward.default, backward, test_utils=OPCHECK)
    check(tsugi._lora_backward.default, (*backward, True, False, True), test_utils=OPCHECK)
    check(
        tsugi._lora_apply.default,
        (None, plain.x, plain.weight, None, plain.A, plain.B, plain.scaling, *drop),
        test_utils=OPCHECK,
    )
    sums, stats = [torch.zeros(3, 4), torch.zeros(5)], torch.zeros(8, dtype=torch.float64)
    grads = [torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype)]
    check(tsugi.sideband_accumulate_.default, (sums, stats, grads, 2.0, True), test_utils=OPCHECK)
    check(tsugi.sideband_stats.default, (sums, stats), test_utils=OPCHECK)
    check(tsugi.sideband_drain_.default, (sums, stats, grads, 0.5), test_utils=OPCHECK)
    check(tsugi.buffer_variance.default, (torch.randn(4, 9).to(dtype), 3), test_utils=OPCHECK)


def test_one_meta_tensor_among_others_is_refused():
    args = arguments(Case((9,), 12, 7, (2, 3)), torch.float32, torch.float32)
    A = [args.A[0], args.A[1].detach().to("meta")]
    with pytest.raises(RuntimeError, match=r"lora_linear: x is on cpu but A\[1\] is on meta"):
        ops.lora_linear(args.x, args.weight, None, A, args.B, args.scaling)
    with pytest.raises(RuntimeError, match=r"lora_delta: x is on cpu but A\[1\] is on meta"):
        ops.lora_delta(args.base, args.x, A, args.B, args.scaling)
    with pytest.raises(RuntimeError, match=r"lora_shrink: x is on cpu but A\[1\] is on meta"):
        ops.lora_shrink(args.x, A)
    stats = torch.zeros(8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"sideband_accumulate_: stats is on cpu but grad\[0\] is on meta"):
        ops.sideband_accumulate_([torch.zeros(3)], stats, [torch.zeros(3, device="meta")])


def test_shapes_are_checked_without_data_too():
    with torch.device("meta"):
        x, weight, A, B = torch.empty(9, 12), torch.empty(7, 12), [torch.empty(2, 12)], [torch.empty(7, 2)]
    assert ops.lora_linear(x, weight, None, A, B, [1.0]).shape == (9, 7)
    with pytest.raises(RuntimeError, match=r"lora_shrink: x is \[9, 7\] but A\[0\] is \[2, 12\]"):
        ops.lora_shrink(x.new_empty(9, 7), A)
    with pytest.raises(RuntimeError, match="A is an empty list"):
        ops.lora_linear(x, weight, None, [], [], [])


def test_compiles_as_one_graph_and_trains_the_same():
    args = arguments(Case((4, 6), 20, 16, (4, 2), 0.5), torch.float32, torch.float32)

    def step(x, base, A, B):
        y = ops.lora_linear(x, args.weight, args.bias, A, B, args.scaling, args.dropout_p, args.rng)
        return torch.nn.functional.gelu(y + ops.lora_delta(base, x, A, B, args.scaling)).sum()

    inputs = [args.x, args.base, *args.A, *args.B]
    eager = step(args.x, args.base, args.A, args.B)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(args.x, args.base, args.A, args.B)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_autocast_casts_as_linear_does():
    args = arguments(Case((4, 6), 20, 16, (4,)), torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(ops, args)
        of_base = ops.lora_delta(args.base, args.x, args.A, args.B, args.scaling)
        linear = torch.nn.functional.linear(args.x, args.weight)
    assert y.dtype == linear.dtype == torch.bfloat16
    assert of_base.dtype == torch.float32
    low = args.to(torch.bfloat16)
    torch.testing.assert_close(y, layer(ops, low))
    y.float().sum().backward()
    assert args.A[0].grad.dtype == torch.float32 and args.x.grad.dtype == torch.float32
    assert relative_error(of_base, delta(reference, args)) < 1e-2


def test_checkpointing_recomputes_with_the_same_mask():
    from torch.utils.checkpoint import checkpoint

    args = arguments(Case((8,), 10, 10, (2,)), torch.float64, torch.float64)

    def block(x):
        return ops.lora_linear(x, args.weight, None, args.A, args.B, args.scaling, 0.5, ops.draw_rng())

    torch.manual_seed(0)
    direct = gradients(block(args.x), args)
    torch.manual_seed(0)
    again = gradients(checkpoint(block, args.x, use_reentrant=False), args)
    assert all(map(torch.equal, direct, again))


def test_inference_mode_and_threads():
    args = arguments(Case((4,), 6, 5, (2,)), torch.float32, torch.float32)
    with torch.inference_mode():
        y = layer(ops, args)
        ops.lora_expand_(y, ops.lora_shrink(args.x, args.A), args.B, [0.0])
    assert torch.equal(y, layer(ops, args).detach())


def test_an_in_place_write_is_seen_by_autograd():
    y, w = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    product = (y * w).sum()
    ops.lora_expand_(y, torch.randn(3, 2), [torch.randn(4, 2)], [1.0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


# ---- the elastic buffer's operations -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_sideband_against_the_reference(dtype):
    sizes = [(3, 5), (40_000,), (0,), (7, 1)]
    generator = torch.Generator().manual_seed(1)
    sums = [torch.zeros(s) for s in sizes]
    ref_sums = [torch.zeros(s) for s in sizes]
    stats, ref_stats = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for step, weight in enumerate((1.0, 3.0, 2.5, 1.0)):
        grads = [torch.randn(s, generator=generator).to(dtype) for s in sizes]
        if step == 2:
            grads[1][123] = float("nan")
        grads[0] = grads[0].t().contiguous().t()
        mirror = [g.clone() for g in grads]
        ops.sideband_accumulate_(sums, stats, grads, weight, step % 2 == 1)
        reference.sideband_accumulate_(ref_sums, ref_stats, mirror, weight, step % 2 == 1)
        for g, m in zip(grads, mirror):
            assert torch.equal(g.nan_to_num(), m.nan_to_num())
    assert stats[4] == 1 and stats[0] == 3
    torch.testing.assert_close(stats, ref_stats, rtol=1e-12, atol=0)
    for s, r in zip(sums, ref_sums):
        torch.testing.assert_close(s, r, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        ops.sideband_stats(sums, stats), reference.sideband_stats(ref_sums, ref_stats), rtol=1e-6, atol=0
    )
    out = [torch.full(s, float("nan")).to(dtype) for s in sizes]
    out[0] = out[0].t().contiguous().t()
    expected = [(0.25 * s).to(dtype) for s in sums]
    ops.sideband_drain_(sums, stats, out, 0.25)
    assert all(map(torch.equal, out, expected))
    assert not any(s.any() for s in sums) and not stats.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_buffer_variance_against_torch(dtype):
    ring = (torch.randn(8, 3001, generator=torch.Generator().manual_seed(0)) + 100).to(dtype)
    for filled in (2, 5, 8):
        expected = ring[:filled].double().var(0, unbiased=True).mean()
        torch.testing.assert_close(ops.buffer_variance(ring, filled), expected, rtol=1e-9, atol=0)
    assert ops.buffer_variance(ring, 1) == float("inf")
    torch.testing.assert_close(
        ops.buffer_variance(ring.t().contiguous().t(), 8), ops.buffer_variance(ring, 8), rtol=1e-9, atol=0
    )


# ---- wrong arguments -----------------------------------------------------------------------------------------------


def good(**changes):
    args = {
        "x": torch.randn(5, 6),
        "weight": torch.randn(4, 6),
        "bias": None,
        "A": [torch.randn(3, 6)],
        "B": [torch.randn(4, 3)],
        "scaling": [1.0],
        "dropout_p": 0.0,
        "rng": None,
    }
    return {**args, **changes}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"A": [torch.randn(3, 7)]}, r"x is \[5, 6\] but A\[0\] is \[3, 7\]"),
        ({"B": [torch.randn(5, 3)]}, r"weight.T is \[6, 4\] but B\[0\] is \[5, 3\]"),
        ({"B": [torch.randn(4, 2)]}, r"A\[0\] is \[3, 6\] but B\[0\] is \[4, 2\]: their ranks r differ"),
        ({"A": [], "B": [], "scaling": []}, r"A is an empty list; at least one adapter"),
        ({"B": []}, r"A has 1 adapters but B has 0"),
        ({"scaling": [1.0, 2.0]}, r"scaling has 2 factors but A has 1 adapters"),
        ({"scaling": [float("nan")]}, r"scaling\[0\] is NaN"),
        ({"weight": torch.randn(4, 7)}, r"x is \[5, 6\] but weight is \[4, 7\]"),
        ({"weight": torch.randn(4, 6).double()}, r"weight is float64 but x is float32"),
        ({"weight": torch.randn(24)}, r"weight is \[24\]; it must be a matrix"),
        ({"bias": torch.randn(5)}, r"bias is \[5\]; it must be \[4\]"),
        ({"x": torch.ones(5, 6, dtype=torch.int64)}, r"x is int64; it must be float32"),
        ({"x": torch.tensor(1.0)}, r"x is a scalar"),
        ({"A": [torch.ones(3, 6, dtype=torch.int32)]}, r"A\[0\] is int32"),
        (
            {"A": [torch.randn(3, 6).half()], "B": [torch.randn(4, 3).half()]},
            r"the adapters are float16 under x of float32",
        ),
        (
            {"A": [torch.randn(3, 6)], "B": [torch.randn(4, 3).double()]},
            r"B\[0\] is float64 but the first adapter is float32",
        ),
        ({"dropout_p": 1.0}, r"dropout_p is 1; it must be in \[0, 1\)"),
        ({"dropout_p": -0.5}, r"dropout_p is -0.5"),
        ({"dropout_p": float("nan")}, r"dropout_p is NaN"),
        ({"dropout_p": 0.5}, r"dropout_p is 0.5 but rng is None"),
        (
            {"dropout_p": 0.5, "rng": torch.zeros(3, dtype=torch.int64)},
            r"rng is int64 of \[3\]; it must be int64 \[2\]",
        ),
        ({"dropout_p": 0.5, "rng": torch.zeros(2)}, r"rng is float32"),
    ],
    ids=lambda value: None,
)
def test_a_wrong_argument_of_the_layer_is_named(changes, sentence):
    with pytest.raises(RuntimeError, match=f"lora_linear: .*{sentence}"):
        ops.lora_linear(**good(**changes))


def test_other_wrong_calls_are_named():
    raises = pytest.raises
    x, A, B = torch.randn(5, 6), [torch.randn(3, 6)], [torch.randn(4, 3)]
    with raises(RuntimeError, match="weight requires grad"):
        ops.lora_linear(**good(weight=torch.randn(4, 6, requires_grad=True)))
    with raises(RuntimeError, match=r"lora_delta: base is \[4, 4\] but x is \[5, 6\]"):
        ops.lora_delta(torch.randn(4, 4), x, A, B, [1.0])
    with raises(RuntimeError, match="not differentiable"):
        ops.lora_expand_(torch.randn(5, 4), torch.randn(5, 3, requires_grad=True), B, [1.0])
    with raises(RuntimeError, match=r"lora_expand_: h is \[5, 2\] but the ranks of B add up to 3"):
        ops.lora_expand_(torch.randn(5, 4), torch.randn(5, 2), B, [1.0])
    with raises(RuntimeError, match=r"y is \[5, 4\] with strides \[0, 1\]: its elements share memory"):
        ops.lora_expand_(torch.randn(4).expand(5, 4), torch.randn(5, 3), B, [1.0])
    with raises(RuntimeError, match=r"lora_backward: grad is \[4, 4\], x is \[5, 6\]"):
        ops.lora_backward(torch.randn(4, 4), x, torch.randn(5, 3), None, A, B, [1.0])
    stats = torch.zeros(8, dtype=torch.float64)
    with raises(RuntimeError, match=r"sum\[0\] is \[3\] but grad\[0\] is \[4\]"):
        ops.sideband_accumulate_([torch.zeros(3)], stats, [torch.zeros(4)])
    with raises(RuntimeError, match=r"weight is -1"):
        ops.sideband_accumulate_([torch.zeros(3)], stats, [torch.zeros(3)], -1.0)
    with raises(RuntimeError, match=r"sum\[0\] is bfloat16"):
        ops.sideband_stats([torch.zeros(3, dtype=torch.bfloat16)], stats)
    with raises(RuntimeError, match=r"stats is float32 of \[8\]"):
        ops.sideband_stats([torch.zeros(3)], stats.float())
    with raises(RuntimeError, match="scale is inf"):
        ops.sideband_drain_([torch.zeros(3)], stats, [torch.zeros(3)], float("inf"))
    with raises(RuntimeError, match=r"filled is 5; it must be in \[0, 4\]"):
        ops.buffer_variance(torch.zeros(4, 2), 5)
    with raises(RuntimeError, match=r"ring is \[4\]; it must be \[window, numel\]"):
        ops.buffer_variance(torch.zeros(4), 1)


def test_an_output_in_any_layout_is_written_in_place():
    h, B = torch.randn(2, 3, 4, 5), [torch.randn(6, 5)]
    for order in ((0, 1, 2, 3), (2, 1, 0, 3), (3, 2, 1, 0)):
        y = torch.randn(2, 3, 4, 6).permute(order).contiguous().permute(*map(order.index, range(4)))
        expected = y.clone()
        reference.lora_expand_(expected, h, B, [0.5])
        ops.lora_expand_(y, h, B, [0.5])
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_failed_call_writes_nothing():
    sums, stats = [torch.ones(3), torch.ones(2)], torch.ones(8, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        ops.sideband_accumulate_(sums, stats, [torch.ones(3), torch.ones(5)])
    assert all(s.eq(1).all() for s in sums) and stats.eq(1).all()
