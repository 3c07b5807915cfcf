"""Quantised bases keep their base layer and get lora_delta: PEFT's own layer classes, on the CPU where a library can.

bitsandbytes, torchao and HQQ run here. GPTQ, AWQ, AQLM and TransformerEngine need a GPU to build their base, so there
PEFT's real layer class sits on a stand-in that answers as such a base does.
"""

from functools import partial

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.te import TeLinear
from torch import nn

from peft_models import TwoLinears, assert_same, error, lora_model, run
from tsugi_kpool import use_backend
from tsugi_kpool.backend import plan

AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)


class Quantised(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.first = linear

    def forward(self, x):
        return self.first(x)


def weights(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(64, 48).to(dtype)


def bnb_4bit(dtype):
    bnb = pytest.importorskip("bitsandbytes")
    linear = weights()
    layer = bnb.nn.Linear4bit(64, 48, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    model = Quantised(layer)
    model.is_loaded_in_4bit = True
    return model.to("cpu"), "lora.Linear4bit"


def bnb_8bit(dtype):
    bnb = pytest.importorskip("bitsandbytes")
    linear = weights()
    layer = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    model = Quantised(layer)
    model.is_loaded_in_8bit = True
    return model.to("cpu"), "lora.Linear8bitLt"


def torchao_int8(dtype):
    quantization = pytest.importorskip("torchao.quantization")
    model = Quantised(weights(dtype))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model, "lora.TorchaoLoraLinear"


def hqq_4bit(dtype):
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=16)
    layer = quantize.HQQLinear(weights(), config, compute_dtype=dtype, device="cpu")
    return Quantised(layer), "lora.HqqLoraLinear"


def compare_half(model, x, **kwargs):
    """Both backends against PEFT in float32 on the same quantised base, as exact as PEFT or more."""
    use_backend(model, "peft")
    theirs = run(model, x, **kwargs)
    report = use_backend(model, "tsugi")
    ours = run(model, x, **kwargs)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    for name, value in error(ours, theirs).items():
        assert value < 1e-2, f"{name}: relative error {value:.1e}"
    return report


@pytest.mark.parametrize("make", [bnb_4bit, bnb_8bit, torchao_int8, hqq_4bit])
@pytest.mark.parametrize("active", [1, 3])
@pytest.mark.filterwarnings("ignore")  # each library's own
def test_a_quantised_base(make, active):
    model, kind = make(torch.float32)
    model = lora_model(model, count=4, active=active, dtype=None, targets=["first"])
    x = torch.randn(5, 64)
    use_backend(model, "peft")
    theirs = run(model, x)
    report = use_backend(model, "tsugi")
    assert_same(run(model, x), theirs, 5e-6)
    assert [(layer.kind, layer.op, layer.fast_calls) for layer in report.layers] == [(kind, "lora_delta", 1)]
    assert report.fallback_calls == {}
    assert len(theirs) == 2 + 2 * active


@pytest.mark.parametrize("make", [bnb_4bit, bnb_8bit, torchao_int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_in_half_precision(make, dtype):
    for context in (AUTOCAST, None):
        model, kind = make(dtype)
        model = lora_model(model, count=2, dtype=None, targets=["first"])
        report = compare_half(model, torch.randn(5, 64, dtype=dtype), **({"context": context} if context else {}))
        assert report.fast_calls == 1 and report.fallback_calls == {}


@pytest.mark.filterwarnings("ignore")
def test_merging_into_a_quantised_base():
    model, _ = bnb_8bit(torch.float32)
    model = lora_model(model, dtype=None, targets=["first"])
    report = use_backend(model, "tsugi")
    x = torch.randn(5, 64)
    expected = model(x)
    model.merge_adapter()
    assert error({"y": model(x)}, {"y": expected})["y"] < 2e-2
    assert report.fast_calls == 1 and list(report.fallback_calls) == ["adapters are merged into the base weight"]


class StandIn(nn.Linear):
    """A base that is not exactly nn.Linear and has the attributes that PEFT reads from a quantised one."""

    @property
    def qweight(self):
        return self.weight


@pytest.mark.parametrize("cls", [GPTQLoraLinear, AwqLoraLinear, AqlmLoraLinear, TeLinear])
@pytest.mark.parametrize("context", [None, AUTOCAST])
def test_layer_classes_of_libraries_that_need_a_gpu(cls, context):
    torch.manual_seed(0)
    base = StandIn(12, 20).requires_grad_(False)
    model = lora_model(TwoLinears(), targets=["first"])
    layer = cls(base, "a0", config=LoraConfig(init_lora_weights=False), r=4, lora_alpha=3)
    layer.update_layer("a1", 3, 5, config=LoraConfig(init_lora_weights=False))
    layer.set_adapter(["a0", "a1"])
    model.base_model.model.first = layer
    x = torch.randn(3, 5, 12)
    kwargs = {} if context is None else {"context": context}
    use_backend(model, "peft")
    theirs = run(model, x, **kwargs)
    report = use_backend(model, "tsugi")
    assert_same(run(model, x, **kwargs), theirs, 2e-6 if context is None else 1e-2)
    assert [(item.kind, item.op, item.fast_calls) for item in report.layers] == [
        (f"lora.{cls.__name__}", "lora_delta", 1)
    ]
    assert report.fallback_calls == {}
    layer.enable_adapters(False)
    assert torch.equal(layer(x), base(x))
    assert list(report.fallback_calls) == ["adapters are disabled"]


class KeepsItsDtype(StandIn):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


@pytest.mark.parametrize(("cls", "wide"), [(AwqLoraLinear, True), (GPTQLoraLinear, False)])
@pytest.mark.parametrize("peft_sees_autocast", [True, False])
def test_the_dtype_of_the_sum_under_autocast(cls, wide, peft_sees_autocast):
    # PEFT asks for autocast without naming a device, which means CUDA; only the flag is needed to go both ways.
    model = Quantised(KeepsItsDtype(12, 20, dtype=torch.bfloat16).requires_grad_(False))
    model = lora_model(model, dtype=None, targets=["first"])
    layer = cls(model.base_model.model.first.base_layer, "a0", config=LoraConfig(init_lora_weights=False), r=4)
    model.base_model.model.first = layer.float()
    layer.base_layer.bfloat16()
    torch.set_autocast_enabled("cuda", peft_sees_autocast)
    try:
        report = compare_half(
            model, torch.randn(3, 12, dtype=torch.bfloat16), context=partial(torch.autocast, "cpu", torch.float16)
        )
        with torch.autocast("cpu", torch.float16):
            y = model(torch.randn(3, 12, dtype=torch.bfloat16))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert y.dtype is (torch.float32 if wide and peft_sees_autocast else torch.bfloat16)
    assert report.fast_calls == 2


def test_the_layer_classes_are_the_ones_peft_has():
    # A renamed class would silently lose its acceleration.
    import importlib

    found = set()
    for name in plan.KINDS:
        module, _, cls = name.rpartition(".")
        try:
            if hasattr(importlib.import_module(module), cls):
                found.add(cls)
        except ImportError:  # the module of a library that is not installed
            pass
    assert {"Linear", "TorchaoLoraLinear", "TeLinear", "GPTQLoraLinear", "AqlmLoraLinear", "AwqLoraLinear"} <= found
