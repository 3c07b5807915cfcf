"""What this machine is, for reports of what was measured on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

__all__ = ["cpu_flags", "gpus", "libc", "machine", "processor", "threads", "version"]


def libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "unknown C library"
    except (OSError, ValueError):
        return "unknown C library"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_info(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(field)), "")


def processor() -> str:
    return cpu_info("model name") or platform.processor() or "unknown processor"


def cpu_flags() -> list[str]:
    return cpu_info("flags").split()


def threads() -> str:
    cores, used = len(os.sched_getaffinity(0)), torch.get_num_threads()
    text = f"torch uses {used} on {cores} available processors"
    if "OMP_NUM_THREADS" in os.environ:
        text += f" (OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']})"
    return text


def gpus() -> str:
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"none that torch can use (this torch is {built})"


def machine(device: str = "cpu") -> str:
    """The machine in one line, for reports of what was measured on it."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else processor()
    widest = torch.backends.cpu.get_cpu_capability().replace("DEFAULT", "no vector extension")
    used = torch.get_num_threads()
    host = f"{used} thread{'s' if used > 1 else ''}, {widest}"
    return f"{name}, {host}, torch {torch.__version__}, PEFT {version('peft')}, Python {platform.python_version()}"
