"""``lora_experts`` against plain torch: values, gradients, layouts, dispatch, and what it says of wrong arguments."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from cases import DTYPES, EXPERT_CASES, TOLERANCE, ExpertCase, expert_arguments, relative_error
from tsugi_kpool import ops, reference

dtypes = pytest.mark.parametrize("dtype, adapter_dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
cases = pytest.mark.parametrize("case", EXPERT_CASES, ids=str)

SMALL = ExpertCase((3, 0, 4), 2, 6, 5, (2, 1))


def experts(module, args):
    return module.lora_experts(args.base, args.x, args.ends, args.A, args.B, args.scaling, args.dropout_p, args.rng)


def gradients(y, args):
    # Where there is no expert at all, the reference has no use for the factors.
    inputs = [args.base, args.x, *args.A, *args.B]
    return torch.autograd.grad(y, inputs, args.grad, allow_unused=True, materialize_grads=True)


def close(actual, expected, eager, case):
    """Within the dtype's tolerance, and at most twice as far from float64 as eager torch is."""
    assert actual.dtype == eager.dtype and actual.shape == eager.shape
    error = relative_error(actual, expected)
    limit = max(TOLERANCE[actual.dtype], 2.0 * relative_error(eager, expected))
    assert error <= limit, f"{case}: {error:.2e} > {limit:.2e}"


def float32(case=SMALL):
    return expert_arguments(case, torch.float32, torch.float32)


# ---- values and gradients --------------------------------------------------------------------------------------------


@dtypes
@cases
def test_values_and_all_gradients(case, dtype, adapter_dtype):
    args = expert_arguments(case, dtype, adapter_dtype)
    exact = args.exact()
    results = [experts(module, a) for module, a in ((ops, args), (reference, exact), (reference, args))]
    close(*results, case)
    grads = [gradients(y, a) for y, a in zip(results, (args, exact, args))]
    for actual, expected, eager in zip(*grads, strict=True):
        close(actual, expected, eager, case)


def test_the_reference_is_a_loop_over_the_experts():
    args = expert_arguments(ExpertCase((5, 0, 7), 3, 6, 4, (2, 3)), torch.float64, torch.float64)
    y, start = args.base.detach().clone(), 0
    for e, end in enumerate(args.ends.tolist()):
        for a, b, s in zip(args.A, args.B, args.scaling):
            y[start:end] += s * (args.x[start:end] @ a[e].mT @ b[e].mT)
        start = end
    torch.testing.assert_close(experts(reference, args), y)


def test_one_expert_is_lora_delta():
    args = expert_arguments(ExpertCase((30,), 0, 40, 24, (4, 2), 0.3), torch.float32, torch.float32)
    y = ops.lora_delta(
        args.base, args.x, [a[0] for a in args.A], [b[0] for b in args.B], args.scaling, args.dropout_p, args.rng
    )
    torch.testing.assert_close(experts(ops, args), y)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ends_of_either_dtype_and_any_stride(dtype):
    args = float32()
    wanted = experts(ops, args)
    ends = args.ends.to(dtype).repeat_interleave(2)[1::2]
    assert ends.stride() == (2,)
    assert torch.equal(experts(ops, dataclasses.replace(args, ends=ends)), wanted)


def test_rows_of_no_expert_keep_base_and_get_no_gradient():
    args = expert_arguments(ExpertCase((3, 2), 4, 8, 6, (2,)), torch.float32, torch.float32)
    y = experts(ops, args)
    assert torch.equal(y[5:], args.base[5:]) and not torch.equal(y[:5], args.base[:5])
    dbase, dx, *_ = gradients(y, args)
    assert torch.equal(dbase, args.grad) and not dx[5:].any() and dx[:5].any()


def test_an_expert_without_rows_gets_zeros():
    args = float32()
    _, _, *of_factors = gradients(experts(ops, args), args)
    for gradient in of_factors:
        assert not gradient[1].any() and gradient[0].any() and gradient[2].any()


def test_a_row_that_is_nan_stays_in_its_row():
    args = float32(ExpertCase((5, 4), 2, 40, 24, (2, 1), 0.2))
    with torch.no_grad():
        args.x[2] = math.nan
    clean = torch.ones(11, dtype=torch.bool)
    clean[2] = False
    y = experts(ops, args)
    assert y[2].isnan().all() and y[clean].isfinite().all()
    _, dx, dA, _, dB, _ = gradients(y, args)
    assert dx.isfinite().all()
    # Its expert's factors meet it, nobody else's.
    for gradient in (dA, dB):
        assert gradient[0].isnan().any() and gradient[1].isfinite().all()


def test_results_do_not_depend_on_the_thread_count():
    args = float32(ExpertCase((100, 0, 300, 1), 5, 257, 130, (16, 8), 0.2))
    threads = torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = experts(ops, args)
            outcomes.append([y, *gradients(y, args)])
    finally:
        torch.set_num_threads(threads)
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], other))


# ---- layouts ---------------------------------------------------------------------------------------------------------


def test_any_layout_gives_the_same_numbers():
    wanted_args = float32(ExpertCase((20, 0, 30), 3, 48, 40, (4, 8), peft=False))
    wanted = experts(ops, wanted_args)
    wanted_grads = gradients(wanted, wanted_args)

    def strided(t):
        return t.repeat_interleave(2, -1)[..., ::2]

    def swapped(t):
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    def expert_fastest(t):
        return t.movedim(0, -1).contiguous().movedim(-1, 0)

    for change in (strided, swapped, expert_fastest):
        args = dataclasses.replace(
            wanted_args,
            x=strided(wanted_args.x.detach()).requires_grad_(),
            base=swapped(wanted_args.base.detach()).requires_grad_(),
            grad=swapped(wanted_args.grad),
            A=[change(a.detach()).requires_grad_() for a in wanted_args.A],
            B=[change(b.detach()).requires_grad_() for b in wanted_args.B],
        )
        y = experts(ops, args)
        torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
        for actual, expected in zip(gradients(y, args), wanted_grads, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradients_have_the_factors_layouts_and_reach_pefts_weights_without_a_copy():
    args = float32(ExpertCase((20, 0, 30), 3, 48, 40, (4, 8)))
    assert args.B[0].stride() == (1, 4 * 3, 3)
    y = experts(ops, args)
    _, _, *of_factors = gradients(y, args)
    for gradient, factor in zip(of_factors, [*args.A, *args.B], strict=True):
        assert gradient.stride() == factor.stride()
    operations = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(str(func))
            return func(*args, **(kwargs or {}))

    y = experts(ops, args)
    with Spy():
        y.backward(args.grad)
    for weight in args.factors:
        assert weight.grad.shape == weight.shape and weight.grad.is_contiguous()
    assert sum("_lora_experts_backward" in name for name in operations) == 1
    # The gradients of base and grad itself are one tensor, which autograd copies; nothing else is.
    copies = [name for name in operations if "clone" in name or "copy" in name]
    assert len(copies) <= 1, operations


# ---- autograd and dispatch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck_and_gradgradcheck(dropout_p):
    case = ExpertCase((2, 0, 3), 1, 5, 4, (2, 1), dropout_p)
    args = expert_arguments(case, torch.float64, torch.float64)
    A, B = ([t.detach().requires_grad_() for t in factors] for factors in (args.A, args.B))

    def function(base, x, *factors):
        return ops.lora_experts(base, x, args.ends, factors[:2], factors[2:], args.scaling, dropout_p, args.rng)

    inputs = (args.base, args.x, *A, *B)
    # Batches of gradients too, as is_grads_batched and vectorised Hessians take them.
    assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_batched_grad=True)


def test_transforms_follow_the_reference():
    args = float32(ExpertCase((3, 2), 1, 6, 5, (2,)))

    def loss(x, module=ops):
        return experts(module, dataclasses.replace(args, x=x)).square().sum()

    x = args.x.detach()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(loss)(x, reference))
    batch = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(x), loss(2 * x)]))


@pytest.mark.parametrize("trained", ["base", "x", "A", "B"])
def test_only_what_is_wanted_is_computed_and_kept(trained):
    args = float32(ExpertCase((20, 0, 30), 3, 48, 40, (4, 8)))
    wanted = gradients(experts(reference, args), args)
    names = ["base", "x", "A", "A", "B", "B"]
    frozen = dataclasses.replace(
        args,
        base=args.base.detach().requires_grad_(trained == "base"),
        x=args.x.detach().requires_grad_(trained == "x"),
        A=[a.detach().requires_grad_(trained == "A") for a in args.A],
        B=[b.detach().requires_grad_(trained == "B") for b in args.B],
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = experts(ops, frozen)
    tensors = [frozen.base, frozen.x, *frozen.A, *frozen.B]
    leaves = [(t, g) for t, g, name in zip(tensors, wanted, names, strict=True) if name == trained]
    sizes = {"base": 0, "x": 0, "A": frozen.x.numel(), "B": 53 * 12}
    factors = {t.data_ptr() for t in (*frozen.A, *frozen.B)}
    of_rows = [t for t in kept if t.is_floating_point() and t.data_ptr() not in factors]
    assert sum(t.numel() for t in of_rows) == sizes[trained]
    for got, want in zip(torch.autograd.grad(y, [t for t, _ in leaves], args.grad), [g for _, g in leaves]):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_factor_changed_in_place_between_forward_and_backward_is_refused():
    for name in ("A", "B", "x", "ends"):
        args = float32()
        y = experts(ops, args)
        with torch.no_grad():
            tensor = getattr(args, name)
            (tensor[0] if name in "AB" else tensor).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(y, args)


def test_opcheck():
    args = float32(ExpertCase((3, 0, 4), 2, 6, 5, (2, 1), 0.25))
    call = (args.base, args.x, args.ends, args.A, args.B, args.scaling, args.dropout_p, args.rng)
    torch.library.opcheck(torch.ops.tsugi.lora_experts.default, call)
    with torch.no_grad():
        h = torch.ops.tsugi._lora_experts_apply.default(*call)[1]
        rest = (args.ends, args.A, args.B, args.scaling, args.dropout_p, args.rng, True, True, True)
        detached = [
            [t.detach() for t in value] if isinstance(value, list) and torch.is_tensor(value[0]) else value
            for value in rest
        ]
        internal = torch.ops.tsugi._lora_experts_backward.default
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(internal, (args.grad, args.x.detach(), h, *detached), test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    def loss(base, x, ends, A, B):
        return ops.lora_experts(base, x, ends, A, B, [2.0, 0.5]).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in ((3, 0, 4), (2, 6, 1)):
        args = float32(ExpertCase(rows, 2, 6, 5, (2, 1)))
        got = torch.autograd.grad(compiled(args.base, args.x, args.ends, args.A, args.B), [args.x, *args.factors])
        want = torch.autograd.grad(loss(args.base, args.x, args.ends, args.A, args.B), [args.x, *args.factors])
        for actual, expected in zip(got, want, strict=True):
            torch.testing.assert_close(actual, expected)


def test_autocast_casts_as_for_lora_delta():
    args = float32()
    with torch.autocast("cpu", torch.bfloat16):
        wide = experts(ops, args)
        low = experts(ops, dataclasses.replace(args, base=args.base.bfloat16()))
    assert wide.dtype == torch.float32 and low.dtype == torch.bfloat16
    wanted = experts(reference, args)
    torch.testing.assert_close(wide, wanted, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(low.float(), wanted, rtol=2e-2, atol=4e-2)
    assert all(g.dtype == torch.float32 for g in gradients(wide, args))


# ---- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ends, words",
    [
        ([3, 2, 7], r"ends\[1\] is 2; it must be at least 3"),
        ([-1, 2, 7], r"ends\[0\] is -1; it must be at least 0"),
        ([3, 3, 10], r"ends\[2\] is 10; .* at most the 9 rows of x"),
        ([3, 3, 2**40], r"ends\[2\] is 1099511627776"),
    ],
)
def test_ends_out_of_range_are_refused_before_anything_is_computed(ends, words):
    args = float32()
    wrong = dataclasses.replace(args, ends=torch.tensor(ends))
    with pytest.raises(RuntimeError, match="lora_experts: " + words):
        experts(ops, wrong)
    with torch.no_grad(), pytest.raises(RuntimeError, match="lora_experts: " + words):
        h = torch.zeros(9, 3)
        torch.ops.tsugi._lora_experts_backward.default(
            args.grad, args.x, h, wrong.ends, args.A, args.B, args.scaling, 0.0, None, True, True, True
        )


def test_a_wrong_argument_is_named_with_its_value():
    args = float32()

    def says(words, **change):
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled), pytest.raises((RuntimeError, NotImplementedError), match=words):
                experts(ops, dataclasses.replace(args, **change))

    says(r"ends is float32 of \[3\]; it must be int32 or int64", ends=args.ends.float())
    says(r"ends is int32 of \[3, 1\]", ends=args.ends[:, None])
    says(r"A\[0\] is \[3, 2, 6\]; it must be \[experts, r, in_features\] with ends' 2 experts", ends=args.ends[:2])
    says(r"A\[0\] is \[2, 6\]", A=[a[0] for a in args.A])
    says(r"A has 1 adapters but B has 2", A=args.A[:1])
    says(r"A is an empty list", A=[], B=[])
    says(r"B\[1\] is \[5, 3\]: their ranks r differ", B=[args.B[0], torch.zeros(3, 5, 3)])
    says(r"base is \[8, 5\] but x is \[9, 6\]: they must have the same rows", base=torch.zeros(8, 5))
    says(r"base is \[9, 4\] but B\[0\] is \[5, 2\]", base=torch.zeros(9, 4))
    says(r"base is float64 but x is float32", base=args.base.double())
    says(r"x is \[9, 7\] but A\[0\] is \[2, 6\]", x=torch.zeros(9, 7))
    says(r"x is \[3, 3, 6\]; it must be a matrix", x=torch.zeros(3, 3, 6))
    says(
        r"the adapters are bfloat16 under x of float32",
        A=[a.bfloat16() for a in args.A],
        B=[b.bfloat16() for b in args.B],
    )
    says(r"scaling has 1 factors", scaling=[1.0])
    says(r"scaling\[1\] is NaN", scaling=[1.0, math.nan])
    says(r"dropout_p is 1; it must be in \[0, 1\)", dropout_p=1.0)
    says(r"dropout_p is 0.5 but rng is None", dropout_p=0.5)
    says(r"on meta|on cpu", ends=args.ends.to("meta"))
    says(r"x is of layout torch.sparse_coo", x=torch.zeros(9, 6).to_sparse())
    with pytest.raises(RuntimeError, match=r"lora_experts: scaling\[0\] requires grad"):
        experts(ops, dataclasses.replace(args, scaling=[torch.tensor(1.0, requires_grad=True), 1.0]))


def test_a_rank_of_zero_is_taken_as_lora_delta_takes_it():
    args = float32(ExpertCase((3, 2), 1, 6, 5, (2, 0)))
    only = dataclasses.replace(args, A=args.A[:1], B=args.B[:1], scaling=args.scaling[:1])
    assert torch.equal(experts(ops, args), experts(ops, only))
    _, _, _, dA, _, dB = gradients(experts(ops, args), args)
    assert dA.shape == (2, 0, 6) and dB.shape == (2, 5, 0)
