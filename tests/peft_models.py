"""Small PEFT models for the backend's tests, and the comparison of two backends on one of them."""

from __future__ import annotations

import contextlib
import copy
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tsugi_kpool import use_backend

RANKS = (4, 3, 8, 1)


class TwoLinears(nn.Module):
    def __init__(self, inputs=12, hidden=20, outputs=7):
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, outputs, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def lora_model(
    base: nn.Module | None = None,
    count: int = 2,
    active: int | None = None,
    dtype: torch.dtype = torch.float32,
    targets: list[str] | str = ("first", "second"),
    cast_adapters: bool = True,
    seed: int = 0,
    **config,
):
    """A PEFT model with ``count`` adapters a0, a1, ... of ranks 4, 3, 8, 1, of which the first ``active`` are active."""
    torch.manual_seed(seed)
    base = TwoLinears() if base is None else base
    base = base.to(dtype)
    targets = targets if isinstance(targets, str) else list(targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about tied weights, fan_in_fan_out and others
        for k in range(count):
            settings = dict(r=RANKS[k], lora_alpha=2 * k + 3, target_modules=targets, init_lora_weights=False)
            adapter = LoraConfig(**(settings | config))
            if k == 0:
                model = get_peft_model(base, adapter, adapter_name="a0", autocast_adapter_dtype=cast_adapters)
            else:
                model.add_adapter(f"a{k}", adapter, autocast_adapter_dtype=cast_adapters)
    model.base_model.set_adapter([f"a{k}" for k in range(count if active is None else active)])
    return model


def tiny_llama(layers=2, **config):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | config)))


def run(model: nn.Module, x: torch.Tensor, context=contextlib.nullcontext, **kwargs) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the input and of everything trainable, of a weighted sum of the output."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone()
    if x.is_floating_point():
        x.requires_grad_()
    with context():
        y = model(x, **kwargs)
    y = getattr(y, "logits", y)
    weights = torch.linspace(-1.0, 1.0, y.numel(), dtype=torch.float64).to(y.dtype).reshape(y.shape)
    if y.requires_grad:
        (y * weights).sum().backward()
    result = {"output": y.detach()}
    if x.grad is not None:
        result["x"] = x.grad
    result |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return result


def error(result: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative Frobenius error of each tensor."""
    assert result.keys() == exact.keys()
    errors = {}
    for name, value in result.items():
        norm = exact[name].double().norm().item()
        errors[name] = (value.double() - exact[name].double()).norm().item() / (norm or 1.0)
    return errors


TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 2e-6) -> None:
    """Same tensors, same dtypes, same values to ``tolerance``."""
    for name, value in error(ours, theirs).items():
        assert value <= tolerance, f"{name}: relative error {value:.1e}"
    for name in theirs:
        assert ours[name].dtype is theirs[name].dtype, name
        assert ours[name].shape == theirs[name].shape, name


def compare(model: nn.Module, x: torch.Tensor, backend="tsugi", tolerance: float | None = None, **kwargs):
    """Run one model on PEFT and on tsugi, compare everything, and return the report of the second run."""
    use_backend(model, "peft")
    theirs = run(model, x, **kwargs)
    report = use_backend(model, backend)
    ours = run(model, x, **kwargs)
    assert_same(ours, theirs, TOLERANCE.get(x.dtype, 2e-6) if tolerance is None else tolerance)
    return report


def exact(model: nn.Module, x: torch.Tensor, **kwargs) -> dict[str, torch.Tensor]:
    """The same run in float64 on PEFT, from the same rounded parameters and input."""
    model = copy.deepcopy(model)
    use_backend(model, "peft")
    return run(model.double(), x.double() if x.is_floating_point() else x, **kwargs)
