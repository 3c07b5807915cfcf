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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(not _native.build_info()["cuda_kernels"], reason="built without the cuda feature")
@pytest.mark.parametrize("check", cuda_checks.CHECKS.values(), ids=cuda_checks.CHECKS)
def test_on_a_device(check):
    check()


def test_the_device_benchmark_runs_without_a_device(tmp_path):
    from benches import gpu

    results = gpu.main(["--device", "cpu", "--tiny", "--adapters", "1", "2", "--results", str(tmp_path)])
    assert [(row["K"], row["dropout"]) for row in results["layer"]] == [(1, 0.0), (1, 0.1), (2, 0.0), (2, 0.1)]
    assert all(row["ours"] > 0 and row["peft"] > 0 for row in results["layer"])
    assert len(results["sideband"]) == 3
    assert (tmp_path / "cpu.json").stat().st_size > 500
