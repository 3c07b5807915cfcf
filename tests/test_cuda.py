"""The operations on a CUDA device; and what of them can be said without one."""

from __future__ import annotations

import pytest
import torch

import cuda_checks
from tsugi_kpool import _native

OPS = [name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "tsugi::" in name]


def test_a_build_with_kernels_registers_every_op_for_the_device():
    with_kernels = _native.build_info()["cuda_kernels"]
    for name in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tsugi::{name}", "CUDA") == bool(with_kernels), name


needs_kernels = pytest.mark.skipif(not _native.build_info()["cuda_kernels"], reason="built without the cuda feature")


@needs_kernels
def test_every_kernel_that_is_launched_is_built_in_for_each_architecture_and_no_other():
    built = [(name, architecture) for name, architecture, *_ in _native.kernel_resources()]
    architectures = {architecture for _, architecture in built}
    assert architectures == {"sm_80", "sm_90a"}
    assert sorted(built) == sorted((name, arch) for name in _native.kernel_names() for arch in architectures)


@needs_kernels
def test_no_kernel_spills():
    for name, architecture, registers, spilled, shared in _native.kernel_resources():
        assert spilled == 0, f"{name} for {architecture} spills {spilled} bytes"
        assert 0 < registers <= 255 and shared <= 768, (name, architecture, registers, shared)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@needs_kernels
@pytest.mark.parametrize("check", cuda_checks.CHECKS.values(), ids=cuda_checks.CHECKS)
def test_on_a_device(check):
    check()


def test_the_device_benchmark_runs_without_a_device(tmp_path):
    from benches.kernels import gpu

    results = gpu.main(["--device", "cpu", "--tiny", "--adapters", "1", "2", "--results", str(tmp_path)])
    assert [(row["K"], row["dropout"]) for row in results["layer"]] == [(1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1)]
    assert all(row["ours"] > 0 and row["peft"] > 0 for row in results["layer"])
    assert len(results["sideband"]) == 3
    assert (tmp_path / "cpu.json").stat().st_size > 500
