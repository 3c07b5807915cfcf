"""What a layer keeps for its backward pass: for every choice of what requires grad, no more than plain torch keeps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tsugi_kpool import ops

TOKENS, INPUTS, OUTPUTS, RANKS, SCALING = 50, 12, 10, (3, 2), (0.5, 2.0)


@dataclass
class Layer:
    """The tensors of a layer, by name; `A` and `B` are lists."""

    tensors: dict[str, Tensor | list[Tensor]]

    @classmethod
    def make(cls, trained: frozenset[str], dtype: torch.dtype = torch.float64) -> Layer:
        generator = torch.Generator().manual_seed(0)

        def normal(name, *sizes):
            return torch.randn(*sizes, generator=generator, dtype=dtype).requires_grad_(name in trained)

        return cls(
            {
                "x": normal("x", TOKENS, INPUTS),
                "base": normal("base", TOKENS, OUTPUTS),
                "bias": normal("bias", OUTPUTS),
                "weight": normal("weight", OUTPUTS, INPUTS),
                "A": [normal("A", r, INPUTS) for r in RANKS],
                "B": [normal("B", OUTPUTS, r) for r in RANKS],
            }
        )

    def __getitem__(self, name):
        return self.tensors[name]

    def flat(self, *names) -> list[Tensor]:
        return [t for name in names for t in (self[name] if isinstance(self[name], list) else [self[name]])]

    def leaves(self) -> list[Tensor]:
        return [t for t in self.flat(*self.tensors) if t.requires_grad]


def by_torch(op: str, layer: Layer, x: Tensor) -> Tensor:
    if op == "lora_shrink":
        return torch.cat([F.linear(x, a) for a in layer["A"]], dim=-1)
    y = F.linear(x, layer["weight"], layer["bias"]) if op == "lora_linear" else layer["base"]
    for a, b, s in zip(layer["A"], layer["B"], SCALING):
        y = y + F.linear(F.linear(x, a), b) * s
    return y


def by_ops(op: str, layer: Layer, x: Tensor) -> Tensor:
    if op == "lora_shrink":
        return ops.lora_shrink(x, layer["A"])
    if op == "lora_linear":
        return ops.lora_linear(x, layer["weight"], layer["bias"], layer["A"], layer["B"], SCALING)
    return ops.lora_delta(layer["base"], x, layer["A"], layer["B"], SCALING)


def choices(*names: str) -> list[frozenset[str]]:
    """Every choice of at least one."""
    return [frozenset(c) for n in range(1, len(names) + 1) for c in itertools.combinations(names, n)]


CHOICES = [
    *(("lora_linear", trained) for trained in choices("x", "bias", "A", "B")),
    *(("lora_delta", trained) for trained in choices("x", "base", "A", "B")),
    *(("lora_shrink", trained) for trained in choices("x", "A")),
]
every_choice = pytest.mark.parametrize(
    "op, trained", CHOICES, ids=lambda v: v if isinstance(v, str) else "+".join(sorted(v))
)


def kept_bytes(compute, op: str, trained: frozenset[str]) -> int:
    """Bytes that autograd keeps, without the layer's own matrices, which stay anyway."""
    layer = Layer.make(trained, torch.float32)
    own = {t.untyped_storage().data_ptr() for t in layer.flat("weight", "bias", "A", "B")}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = compute(op, layer, layer["x"])
    assert output.requires_grad
    return sum(kept.values())


@every_choice
def test_no_more_is_kept_than_torch_keeps(op, trained):
    assert kept_bytes(by_ops, op, trained) <= kept_bytes(by_torch, op, trained)


@every_choice
def test_gradients_of_every_order(op, trained):
    def derivatives(compute):
        layer = Layer.make(trained)
        leaves = layer.leaves()
        output = compute(op, layer, layer["x"])
        first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), leaves, allow_unused=True)
        return [output, *first, *second, *third]

    for actual, wanted in zip(derivatives(by_ops), derivatives(by_torch), strict=True):
        assert (actual is None) == (wanted is None)
        torch.testing.assert_close(actual, wanted)


def after_overwriting(compute, op: str, trained: frozenset[str], overwritten: str) -> list[Tensor] | None:
    """The gradients where an argument is overwritten before the backward pass; None where autograd refuses that."""
    layer = Layer.make(trained)
    x = layer["x"] * 1.0
    output = compute(op, layer, x)
    with torch.no_grad():
        for tensor in [x] if overwritten == "x" else layer.flat(overwritten):
            tensor.mul_(2.0)
    try:
        return list(torch.autograd.grad(output.sin().sum(), layer.leaves()))
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None


@pytest.mark.parametrize("overwritten", ["x", "A", "B", "weight", "base"])
@every_choice
def test_an_argument_may_be_overwritten_where_torch_allows_it(op, trained, overwritten):
    wanted = after_overwriting(by_torch, op, trained, overwritten)
    actual = after_overwriting(by_ops, op, trained, overwritten)
    if wanted is None:
        return
    assert actual is not None
    for a, w in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, w)


def test_a_frozen_a_under_peft_keeps_what_peft_keeps():
    """LoRA-FA, and a frozen model of which only the input is differentiated."""
    from peft import LoraConfig, get_peft_model

    from tsugi_kpool import use_backend

    def kept(backend: str, frozen: tuple[str, ...], input_grad: bool) -> int:
        torch.manual_seed(0)
        model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), LoraConfig(r=4, target_modules=["0"]))
        for name, parameter in model.named_parameters():
            if any(part in name for part in frozen):
                parameter.requires_grad_(False)
        use_backend(model, backend)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        total = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in parameters:
                total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(512, 64, requires_grad=input_grad))
        return sum(total.values())

    for frozen, input_grad in (
        (("lora_A",), False),
        (("lora_A",), True),
        (("lora_A", "lora_B"), True),
        (("lora_B",), True),
    ):
        assert kept("tsugi", frozen, input_grad) <= kept("peft", frozen, input_grad), (frozen, input_grad)


def test_the_native_backward_takes_none_for_what_it_does_not_need():
    layer = Layer.make(frozenset())
    grad, x = torch.randn(TOKENS, OUTPUTS, dtype=torch.float64), layer["x"]
    h = ops.lora_shrink(x, layer["A"])
    backward = torch.ops.tsugi._lora_backward.default
    shared = (layer["weight"], layer["A"], layer["B"], list(SCALING), 0.0, None)
    dx, dA, dB = backward(grad, x, h, *shared, True, True, True)
    only_x = backward(grad, None, None, *shared, True, False, False)
    assert torch.equal(only_x[0], dx) and only_x[1] == only_x[2] == []
    only_A = backward(grad, x, None, *shared, False, True, False)
    assert all(map(torch.equal, only_A[1], dA)) and only_A[0].numel() == 0
    only_B = backward(grad, None, h, *shared, False, False, True)
    assert all(map(torch.equal, only_B[2], dB))
    with pytest.raises(RuntimeError, match="lora_backward: x is None, but dA is wanted"):
        backward(grad, None, h, *shared, False, True, True)
    with pytest.raises(RuntimeError, match="lora_backward: h is None, but dB is wanted"):
        backward(grad, x, None, *shared, False, True, True)
