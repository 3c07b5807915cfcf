"""``python -m tsugi_kpool doctor``: says what is on and why. It tries things out where it can, rather than look them up."""

from __future__ import annotations

import argparse
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import ops
from .._version import __version__
from ..backend.plan import DEVICE_TYPES
from ..backend.swap import use_backend
from ..ops import selftest
from ..ops.selftest import dtype_name
from .machine import cpu_flags, gpus, libc, processor, threads, version

# What PEFT's adapters may be beside activations of a dtype; the first is PEFT's default.
TRIED = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float64, torch.float64),
)
PACKAGES = (("peft", "0.20"), ("transformers", None), ("accelerate", None), ("numpy", None))
FLAGS = ("avx2", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_fp16")


def main(options: argparse.Namespace) -> int:
    for name, value in facts():
        print(f"{name:<13} {value}")
    print()
    healthy = ops.available()
    for line, good in trials():
        print(line)
        healthy &= good
    return 0 if healthy else 1


# ---- what was found --------------------------------------------------------------------------------------------------


def facts() -> Iterator[tuple[str, str]]:
    yield "tsugi-kpool", f"{__version__} in {Path(__file__).parent.parent}"
    if ops.available():
        info = ops._native.build_info()
        yield "native", f"loaded, version {info['version']}, computing with {info['instruction_set']}"
        kernels = "in this build" if info["cuda_kernels"] else "not in this build: on a GPU, layers are left to PEFT"
        yield "CUDA kernels", kernels
    else:
        yield "native", f"NOT LOADED, so every layer is left to PEFT: {ops.unavailable_reason}"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {libc()}"
    yield "torch", torch.__version__
    for package, floor in PACKAGES:
        yield package, version(package) + (f" (at least {floor} is needed)" if floor else "")
    yield "processor", processor()
    yield "features", " ".join(flag for flag in FLAGS if flag in cpu_flags()) or "none of those that matter here"
    if ops.available():
        for name in ("bfloat16", "float16"):
            fast = info[f"torch_{name}_product_is_fast"]
            yield (
                name,
                "torch multiplies it fast here" if fast else "torch multiplies it slowly here; float32 is faster",
            )
    yield "threads", threads()
    yield "GPU", gpus()


# ---- trying it out ---------------------------------------------------------------------------------------------------


def trials() -> Iterator[tuple[str, bool]]:
    """For each device and dtype, a line that says whether a LoRA layer is accelerated there, and whether it is right."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        for dtype, adapter_dtype in TRIED:
            name = f"{device}, {dtype_name(dtype)} with {dtype_name(adapter_dtype)} adapters"
            result, good = trial(device, dtype, adapter_dtype)
            yield f"{name:<36} {result}", good


def trial(device: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> tuple[str, bool]:
    why = why_not(device, dtype, adapter_dtype)
    if why:
        return f"left to PEFT: {why}", ops.available() and not wrong_device(device)
    model, x = small_model(device, dtype, adapter_dtype)
    with use_backend(model, "peft"):  # it may be on for the whole process
        expected = model(x)
    with use_backend(model):
        result = model(x)
    error = ((result.double() - expected.double()).norm() / expected.double().norm()).item()
    if error > 4 * torch.finfo(dtype).eps:
        return f"WRONG: differs from PEFT's result by {error:.1e}", False
    return f"accelerated; differs from PEFT's result by {error:.1e}", True


def wrong_device(device: str) -> bool:
    """Whether PEFT keeps the layers there because the operations do not do what they should."""
    where = torch.device(device)
    return where.type in DEVICE_TYPES and selftest.fault("cpu" if where.type == "cpu" else where) is not None


def why_not(device: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> str:
    """Why an ordinary LoRA layer is left to PEFT there, found by running one; empty if it is accelerated."""
    if not ops.available():
        return str(ops.unavailable_reason)
    model, x = small_model(device, dtype, adapter_dtype)
    with warnings.catch_warnings(), use_backend(model) as report:
        warnings.simplefilter("ignore")  # the answer is the warning
        model(x)
        return "; ".join(dict.fromkeys([*(layer.reason for layer in report.left_to_peft), *report.fallback_calls]))


def small_model(device: str, dtype: torch.dtype, adapter_dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor]:
    """One linear layer with two active adapters, and an input."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(64, 48)).to(dtype)
        config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
        model = get_peft_model(base, config, adapter_name="first")
        model.add_adapter("second", config)
        model.base_model.set_adapter(["first", "second"])
        x = torch.randn(16, 64).to(device, dtype)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype)
    return model.to(device), x
