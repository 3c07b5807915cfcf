"""Whether the ops compute what PEFT's forward of a LoRA layer would, and why not.

Everything here is asked at each call, so it reads plain attributes and returns at the first reason. A reason is a
sentence for warnings and reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _nn_module
from torch.nn.parameter import Parameter

from .. import ops
from ..ops import selftest
from ..ops.selftest import dtype_name

__all__ = [
    "ADAPTER_DTYPES", "ARGUMENTS", "DEVICE_TYPES", "DISABLED", "DORA", "DTYPES", "IDLE", "INACTIVE", "KINDS", "Kind", "MERGED",
    "PARAMETER", "Plan", "SCALING", "is_dense", "is_dora", "read_adapters", "refuse_input", "refuse_place", "variant_name",
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How one of PEFT's LoRA layers computes base(x) + sum of s B(A(drop(x))), where they differ."""

    base: str = "base_layer"  # the attribute whose module is called
    widen: bool = False  # under autocast the sum keeps the wider dtype, else always the base output's


# By name, so that bitsandbytes and the like are not imported to find out whether they are there. All of these are
# "the base layer's output plus LoRA of the layer's input"; what is not in here is left to PEFT.
KINDS = {
    "peft.tuners.lora.layer.Linear": Kind(),
    "peft.tuners.lora.torchao.TorchaoLoraLinear": Kind(),
    "peft.tuners.lora.inc.IncLoraLinear": Kind(),
    "peft.tuners.lora.te.TeLinear": Kind(),
    "peft.tuners.lora.gptq.GPTQLoraLinear": Kind(base="quant_linear_module"),
    "peft.tuners.lora.aqlm.AqlmLoraLinear": Kind(),
    "peft.tuners.lora.bnb.Linear8bitLt": Kind(widen=True),
    "peft.tuners.lora.bnb.Linear4bit": Kind(widen=True),
    "peft.tuners.lora.hqq.HqqLoraLinear": Kind(widen=True),
    "peft.tuners.lora.awq.AwqLoraLinear": Kind(base="quant_linear_module", widen=True),
    "peft.tuners.lora.eetq.EetqLoraLinear": Kind(base="quant_linear_module", widen=True),
}

# Reasons why a call runs PEFT's forward although nothing is wrong: there is no adapter to compute.
DISABLED = "adapters are disabled"
MERGED = "adapters are merged into the base weight"
INACTIVE = "no active adapter on this layer"
IDLE = frozenset({DISABLED, MERGED, INACTIVE})

ARGUMENTS = "called with more than the input (adapter_names, alora_offsets or others)"
_HOOKED = "hooks on a submodule of an adapter"
_GLOBAL_HOOKS = "global module hooks are registered"
_NOT_LINEAR = "an adapter's A or B is not a plain nn.Linear"
_BIAS = "an adapter has a bias (lora_bias)"
PARAMETER = "an adapter's weight is not a plain nn.Parameter (sharded, replicated or substituted)"
SCALING = "scaling is a tensor (prepare_model_for_compiled_hotswap)"
_DROPOUT = "lora_dropout is not nn.Dropout with p below 1"
DTYPES = "the active adapters differ in dtype"
DORA = "an adapter has DoRA"  # not a reason to fall back: backend/dora.py reads the layer on
_DROPOUTS = "the active adapters differ in lora_dropout"
_INPUT = "the input is not a plain strided tensor"
_TRANSFORM = "inside a torch.func transform or forward-mode differentiation"
_TRACE = "inside torch.jit tracing or torch.export"

ADAPTER_DTYPES = {
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}

Plan = tuple[list[Tensor], list[Tensor], list[float], float]


def _plain_forward(module: nn.Module) -> bool:
    """Whether calling a nn.Linear whose ``forward`` is set on the instance still is only F.linear.

    accelerate's ``dispatch_model`` puts such a forward on every module: it moves the input to where the weight already
    is. Its removal leaves the bound method behind.
    """
    forward = module.__dict__["forward"]
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        if type(hook).__name__ != "AlignDevicesHook" or hook.offload or hook.io_same_device or hook.no_grad:
            return False
        device = hook.execution_device
        if device is not None and torch.device(device) != module.weight.device:
            return False
        forward = module.__dict__.get("_old_forward")
    return getattr(forward, "__func__", None) is nn.Linear.forward and forward.__self__ is module


def is_dora(variant: Any) -> bool:
    cls = type(variant)
    return cls.__name__ == "DoraLinearVariant" and cls.__module__ == "peft.tuners.lora.variants"


def variant_name(variant: Any) -> str:
    """The reason to leave an adapter of this variant to PEFT."""
    return f"LoRA variant {type(variant).__name__}"


def read_adapters(layer: Any, only: str | None = None) -> Plan | str:
    """The active adapters as the ops take them, (A, B, scaling, p), or the reason why PEFT's forward must run.

    ``only`` reads that one adapter, whatever its variant.
    """
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    active = only or layer._active_adapter
    if type(active) is str:
        active = (active,)
    modules = layer._modules
    lora_A, lora_B = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts = modules["lora_dropout"]._modules
    variants = layer.lora_variant
    A: list[Tensor] = []
    B: list[Tensor] = []
    scaling: list[float] = []
    p = 0.0
    for name in active:
        if name not in lora_A:
            continue
        if variants and name in variants and only is None:
            return DORA if is_dora(variants[name]) else variant_name(variants[name])
        a, b, dropout = lora_A[name], lora_B[name], dropouts[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear:
            return _NOT_LINEAR
        if (
            a._forward_hooks or a._forward_pre_hooks or a._backward_hooks or a._backward_pre_hooks
            or b._forward_hooks or b._forward_pre_hooks or b._backward_hooks or b._backward_pre_hooks
            or dropout._forward_hooks or dropout._forward_pre_hooks
            or dropout._backward_hooks or dropout._backward_pre_hooks
            or ("forward" in a.__dict__ and not _plain_forward(a))
            or ("forward" in b.__dict__ and not _plain_forward(b))
            or "forward" in dropout.__dict__
        ):  # fmt: skip
            return _HOOKED
        if a._parameters.get("bias") is not None or b._parameters.get("bias") is not None:
            return _BIAS
        a, b = a._parameters.get("weight"), b._parameters.get("weight")
        if type(a) is not Parameter or type(b) is not Parameter:
            return PARAMETER
        s = layer.scaling[name]
        if not isinstance(s, (float, int)):
            return SCALING
        if type(dropout) is nn.Identity:
            rate = 0.0
        elif type(dropout) is nn.Dropout and dropout.p < 1.0 and not dropout.inplace:
            rate = float(dropout.p) if dropout.training else 0.0
        else:
            return _DROPOUT
        if A and rate != p:
            return _DROPOUTS
        p = rate
        A.append(a)
        B.append(b)
        scaling.append(float(s))
    if not A:
        return INACTIVE
    dtype = A[0].dtype
    for a, b in zip(A, B):
        if a.dtype is not dtype or b.dtype is not dtype:
            return DTYPES
    return A, B, scaling, p


def is_dense(base: nn.Module) -> bool:
    """Whether calling ``base`` is F.linear(x, weight, bias) with a frozen weight and nothing else."""
    if type(base) is not nn.Linear:
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return False
    if "forward" in base.__dict__ and not _plain_forward(base):
        return False
    # A parameter that something else computes (weight norm and the like) is missing here.
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias", base)
    return type(weight) is Parameter and not weight.requires_grad and (bias is None or type(bias) is Parameter)


# The device types that this build has kernels for.
DEVICE_TYPES = frozenset(
    device_type
    for device_type, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if ops.available() and torch._C._dispatch_has_kernel_for_dispatch_key("tsugi::_lora_apply", key)
)


def refuse_place(x: Any) -> str | None:
    """The reason why no op takes this input where this call is made, or None."""
    if type(x) is not Tensor and type(x) is not Parameter:
        return _INPUT
    if x.layout is not torch.strided or x.is_nested:
        return _INPUT
    device = "cpu" if x.is_cpu else x.device.type
    if device not in DEVICE_TYPES:
        return f"no kernel for device type {device!r}"
    if torch.compiler.is_compiling():
        # An exported program must run where this package is not installed.
        if getattr(torch.compiler, "_is_exporting_flag", False):
            return _TRACE
    elif forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return _TRANSFORM
    elif torch._C._get_tracing_state() is not None:
        return _TRACE
    elif wrong := selftest.fault("cpu" if device == "cpu" else x.device):
        return wrong
    return None


def refuse_input(layer: nn.Module, x: Any, A: list[Tensor]) -> str | None:
    """The reason why the ops do not take this input with these adapters now, or None."""
    if (
        _nn_module._global_forward_hooks or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks or _nn_module._global_backward_pre_hooks
    ):  # fmt: skip
        return _GLOBAL_HOOKS
    if refused := refuse_place(x):
        return refused
    if A[0].device != x.device:
        return "the adapters are on another device than the input"
    device, x_dtype, dtype = x.device.type, x.dtype, A[0].dtype
    if torch.is_autocast_enabled(device):
        # The ops cast as F.linear does. PEFT casts the input to the adapters' dtype first, which is a rounding of its
        # own where that is the other 16-bit type.
        if (
            x_dtype in (torch.float32, torch.bfloat16, torch.float16)
            and (dtype is torch.float32 or dtype is torch.get_autocast_dtype(device))
        ):  # fmt: skip
            return None
    elif dtype in ADAPTER_DTYPES.get(x_dtype, ()):
        if x_dtype is dtype or getattr(layer, "cast_input_dtype_enabled", True):
            return None
        return "casting the input is turned off (disable_input_dtype_casting)"
    return f"{dtype_name(dtype)} adapters on {dtype_name(x_dtype)} input"
