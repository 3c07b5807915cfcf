"""What must hold on a CUDA device, as plain functions: pytest runs them (test_cuda.py) and so does ``python -m benches gpu``."""

from __future__ import annotations

import torch
from torch import Tensor

from cases import CASES, DTYPES, EXPERT_CASES, TOLERANCE, Case, ExpertCase, arguments, expert_arguments, relative_error
from tsugi_kpool import ops, reference

#: Beside the shared cases: large enough that every reduction is split, and more columns of R than one block takes.
LARGE = [
    Case((2, 1025), 1032, 776, (16, 16)),
    Case((1500,), 1027, 513, (16, 3, 8), 0.1),
    Case((700,), 512, 384, (64, 128, 64)),
]


def _close(actual: Tensor, expected: Tensor, eager: Tensor, what: str) -> None:
    assert actual.dtype == eager.dtype and actual.shape == eager.shape, what
    error = relative_error(actual, expected)
    limit = max(TOLERANCE[actual.dtype], 2.0 * relative_error(eager, expected))
    assert error <= limit, f"{what}: {error:.2e} > {limit:.2e}"


def _run(module, args, linear: bool) -> list[Tensor]:
    common = (args.A, args.B, args.scaling, args.dropout_p, args.rng)
    if linear:
        y = module.lora_linear(args.x, args.weight, args.bias, *common)
        leaves = [args.x, *args.A, *args.B]
    else:
        y = module.lora_delta(args.base, args.x, *common)
        leaves = [args.x, args.base, *args.A, *args.B]
    return [y, *torch.autograd.grad(y, leaves, args.grad)]


def check_layers_and_gradients(device: str = "cuda") -> None:
    for dtype, adapter_dtype in DTYPES:
        for case in CASES + LARGE:
            for linear in (True, False):
                args = arguments(case, dtype, adapter_dtype, device=device)
                exact = arguments(case, dtype, adapter_dtype).to(torch.float64)
                actual, eager, expected = (
                    _run(ops, args, linear),
                    _run(reference, args, linear),
                    _run(reference, exact, linear),
                )
                again = _run(ops, args, linear)
                for i, (a, x, e, b) in enumerate(zip(actual, expected, eager, again)):
                    what = f"{case} {dtype}/{adapter_dtype} linear={linear} result {i}"
                    assert a.device.type == "cuda", what
                    assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{what}: two runs differ"
                    _close(a, x, e, what)


def _run_experts(module, args) -> list[Tensor]:
    y = module.lora_experts(args.base, args.x, args.ends, args.A, args.B, args.scaling, args.dropout_p, args.rng)
    leaves = [args.base, args.x, *args.A, *args.B]
    return [y, *torch.autograd.grad(y, leaves, args.grad, allow_unused=True, materialize_grads=True)]


def check_experts(device: str = "cuda") -> None:
    large = ExpertCase((700, 0, 1, 300), 5, 1032, 776, (16, 3), 0.1)
    for dtype, adapter_dtype in DTYPES:
        for case in [*EXPERT_CASES, large]:
            args = expert_arguments(case, dtype, adapter_dtype, device=device)
            eager, expected = _run_experts(reference, args), _run_experts(reference, args.exact())
            torch.cuda.set_sync_debug_mode("error")  # ends is not read to the host
            try:
                actual, again = _run_experts(ops, args), _run_experts(ops, args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            for i, (a, x, e, b) in enumerate(zip(actual, expected, eager, again)):
                what = f"experts {case} {dtype}/{adapter_dtype} result {i}"
                assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"{what}: two runs differ"
                _close(a, x, e, what)
                assert i < 3 or a.stride() == [*args.A, *args.B][i - 3].stride(), what


def check_ends_out_of_order_are_seen(device: str = "cuda") -> None:
    args = expert_arguments(ExpertCase((2, 1, 5), 0, 6, 5, (2,)), torch.float32, torch.float32, device=device)
    for wrong in ([5, 3, 8], [2, 3, 9], [-1, 3, 8], [2, 3, 2**31 - 1]):
        args.ends.copy_(torch.tensor(wrong))
        with torch.no_grad():
            assert _run_experts_forward(args).isnan().any(), wrong


def _run_experts_forward(args) -> Tensor:
    return ops.lora_experts(args.base, args.x, args.ends, args.A, args.B, args.scaling)


def check_strides_and_alignment(device: str = "cuda") -> None:
    case = Case((129,), 127, 130, (8, 3))
    for dtype, adapter_dtype in DTYPES:
        args = arguments(case, dtype, adapter_dtype, device=device)
        with torch.no_grad():
            want = ops.lora_shrink(args.x, args.A)

            def shifted(t: Tensor) -> Tensor:
                storage = torch.zeros(t.numel() + 1, dtype=t.dtype, device=t.device)
                storage[1:] = t.flatten()
                return storage[1:].view_as(t)

            def strided(t: Tensor) -> Tensor:
                wide = torch.full((t.shape[0], t.shape[1] + 5), float("nan"), dtype=t.dtype, device=t.device)
                wide[:, : t.shape[1]] = t
                return wide[:, : t.shape[1]]

            def turned(t: Tensor) -> Tensor:
                return t.t().contiguous().t()

            for change in (shifted, strided, turned):
                got = ops.lora_shrink(change(args.x), [change(a) for a in args.A])
                assert relative_error(got, want) <= TOLERANCE[got.dtype], (change.__name__, dtype)
                y = change(args.base)
                expected = args.base.clone()
                h = ops.lora_shrink(args.x, args.A)
                ops.lora_expand_(expected, h, args.B, args.scaling)
                ops.lora_expand_(y, change(h), [change(b) for b in args.B], args.scaling)
                assert relative_error(y, expected) <= TOLERANCE[y.dtype], (change.__name__, dtype)


def check_masks_are_those_of_the_cpu(device: str = "cuda") -> None:
    """A single column of A at a time reads the mask off H: 0 where X was dropped."""
    inputs, rng = 203, torch.tensor([7, (5 << 32) + 3])
    x = torch.ones(37, inputs)
    adapters = [torch.eye(inputs) for _ in range(2)]
    on_cpu = ops.lora_shrink(x, adapters, 0.3, rng)
    on_device = ops.lora_shrink(x.to(device), [a.to(device) for a in adapters], 0.3, rng.to(device)).cpu()
    assert torch.equal(on_cpu != 0, on_device != 0)
    assert torch.allclose(on_cpu, on_device, rtol=1e-6)


def check_sideband(device: str = "cuda") -> None:
    torch.manual_seed(1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        sizes = [(1,), (127, 129), (0,), (4096,), (9001,)] + [(3,)] * 600
        sums = {d: [torch.zeros(s, device=d) for s in sizes] for d in ("cpu", device)}
        stats = {d: torch.zeros(8, dtype=torch.float64, device=d) for d in ("cpu", device)}
        for step in range(4):
            grads = [torch.randn(s).to(dtype) for s in sizes]
            if step == 2:
                grads[300][1] = float("nan")
            for d in ("cpu", device):
                there = [g.to(d).clone() for g in grads]
                ops.sideband_accumulate_(sums[d], stats[d], there, 1.5, step == 1)
                assert step != 1 or not any(g.any() for g in there)
        assert stats[device][4] == 1
        for got, want in zip(sums[device], sums["cpu"]):
            assert torch.allclose(got.cpu(), want, rtol=1e-6, atol=1e-6)
        got, want = (ops.sideband_stats(sums[d], stats[d]).cpu() for d in (device, "cpu"))
        assert torch.allclose(got, want, rtol=1e-6), (got, want)
        grads = [torch.empty(s, dtype=dtype, device=device) for s in sizes]
        expected = [(0.5 * s).to(dtype) for s in sums[device]]
        ops.sideband_drain_(sums[device], stats[device], grads, 0.5)
        assert all(torch.equal(g, e) for g, e in zip(grads, expected))
        assert not stats[device].any() and not any(s.any() for s in sums[device])


def check_variance(device: str = "cuda") -> None:
    torch.manual_seed(2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for window, filled, numel in ((4, 4, 1), (32, 20, 70_001), (3, 1, 129), (5, 0, 4)):
            ring = (torch.randn(window, numel) * 2 + 50).to(dtype)
            got, want = ops.buffer_variance(ring.to(device), filled).cpu(), ops.buffer_variance(ring, filled)
            assert torch.equal(got, want) or torch.allclose(got, want, rtol=1e-5), (
                dtype,
                window,
                filled,
                numel,
                got,
                want,
            )


def check_graph_capture(device: str = "cuda") -> None:
    """A captured call replays with what its inputs hold then, the random state among them."""
    case = Case((256,), 512, 384, (16, 8), 0.25)
    args = arguments(case, torch.bfloat16, torch.float32, device=device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    sums, stats = (
        [torch.zeros_like(a, dtype=torch.float32) for a in args.A],
        torch.zeros(8, dtype=torch.float64, device=device),
    )
    with torch.cuda.stream(stream):
        _run(ops, args, True)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(ops, args, True)
        ops.sideband_accumulate_(sums, stats, captured[2 : 2 + len(args.A)])
    with torch.no_grad():
        args.x.copy_(torch.randn_like(args.x))
        args.rng.add_(1)
    graph.replay()
    torch.cuda.synchronize(device)
    for got, want in zip(captured, _run(ops, args, True)):
        assert torch.equal(got, want)
    assert stats[0] == 1


def check_streams_and_devices(device: str = "cuda") -> None:
    """Another current stream, and every device of the machine while another is current."""
    for index in range(torch.cuda.device_count()):
        args = arguments(Case((300,), 256, 200, (16,)), torch.bfloat16, torch.bfloat16, device=f"cuda:{index}")
        want = _run(reference, args, True)
        with torch.cuda.stream(torch.cuda.Stream(index)):
            got = _run(ops, args, True)
        torch.cuda.synchronize(index)
        for a, b in zip(got, want):
            assert a.device.index == index and relative_error(a, b) < 2e-2


def check_errors(device: str = "cuda") -> None:
    args = arguments(Case((4,), 8, 8, (2,)), torch.float32, torch.float32, device=device)

    def sentence(call) -> str:
        try:
            call()
        except RuntimeError as error:
            return str(error)
        raise AssertionError("no error")

    with torch.no_grad():
        text = sentence(lambda: ops.lora_shrink(args.x, [a.cpu() for a in args.A]))
        assert "A[0] is on cpu but x is on cuda:0" in text, text
        text = sentence(lambda: ops.lora_shrink(args.x, [a.double() for a in args.A]))
        assert "float64 adapters under float32" in text, text
        text = sentence(lambda: ops.lora_shrink(args.x, args.A, 0.5, torch.tensor([1, 2])))
        assert "rng is on cpu" in text, text
        # Out of memory is an error of the allocation, and the next call works.
        free, _ = torch.cuda.mem_get_info()
        huge = torch.empty(1, dtype=torch.bfloat16, device=device).expand(free // 2 + 2**30, 1)
        text = sentence(lambda: ops.lora_shrink(huge, [torch.ones(64, 1, dtype=torch.bfloat16, device=device)]))
        assert text.startswith("lora_shrink: torch reported") and "empty" in text, text
        assert ops.lora_shrink(args.x, args.A).isfinite().all()


CHECKS = {name.removeprefix("check_"): check for name, check in dict(globals()).items() if name.startswith("check_")}
