"""LoRA on a parameter (``lora.ParamWrapper``: the experts of a mixture, routers) as two more products, at the place of each.

PEFT replaces the parameter by W + s B A, of all experts and in every call. Here the module that reads it finds a
:class:`FactoredWeight`: what it does with it, transformers' ``grouped_mm``, ``batched_mm`` and eager experts as well as
Llama4's and gpt-oss's own, is done with W as it stands, and ``lora_experts`` adds the adapters to each product. What is no
product gets W + s B A after all, and is counted as PEFT's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.parameter import Parameter
from torch.utils._pytree import tree_map

from .. import ops
from ..ops.selftest import dtype_name
from .plan import ADAPTER_DTYPES, DISABLED, INACTIVE, MERGED, PARAMETER, SCALING, refuse_place

__all__ = ["PARAM_WRAPPER", "ParameterPlan", "Use", "read_parameter", "refuse_call", "refuse_module", "standing_in"]

PARAM_WRAPPER = "peft.tuners.lora.layer.ParamWrapper"

_PARAMETRISED = (
    "the parameter is not a plain nn.Parameter of its module (parametrised, quantised, sharded or offloaded)"
)
_TURNED = "the one expert of a transposed module, which PEFT adapts in its own way"
_SHAPE = "the adapters do not have the parameter's shape (sharded)"

# Whose forwards are known to differentiate through what they read: what an autograd.Function of somebody's own makes of a
# weight that it is handed cannot be seen from here.
_KNOWN_FORWARDS = ("transformers.models.", "torch.nn.modules.")


@dataclass(frozen=True)
class ParameterPlan:
    """The active adapters of one parameter W, as W + sum of scaling left right; the factors are views of PEFT's.

    left: [E, p, r] and right: [E, r, q] of each adapter, for W of [E, p, q], or of [p, q] with E = 1.
    """

    module: nn.Module
    name: str
    weight: Parameter
    left: list[Tensor]
    right: list[Tensor]
    scaling: list[float]


def read_parameter(layer: Any) -> ParameterPlan | str:
    """The active adapters of a ``lora.ParamWrapper``, or the reason why PEFT's forward must run."""
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    active = layer._active_adapter
    active = (active,) if type(active) is str else active
    lora_A, lora_B = layer._modules["lora_A"]._modules, layer._modules["lora_B"]._modules
    names = [name for name in active if name in lora_A]
    if not names:
        return INACTIVE
    if layer.lora_variant:
        variants = [type(layer.lora_variant[name]).__name__ for name in names if name in layer.lora_variant]
        if variants:
            return f"LoRA variant {variants[0]}"
    module = layer._modules["base_layer"]
    while "base_layer" in module._modules:
        module = module._modules["base_layer"]
    weight = module._parameters.get(layer.parameter_name)
    if type(weight) is not Parameter or weight.layout is not torch.strided:
        return _PARAMETRISED
    if weight.dtype not in ADAPTER_DTYPES:
        return f"the parameter is {dtype_name(weight.dtype)}"
    experts = layer.num_experts
    if weight.ndim == 3 and experts == 1 and not layer._did_swap_in_out_features:
        return _TURNED
    plan = ParameterPlan(module, layer.parameter_name, weight, [], [], [])
    for name in names:
        a, b = lora_A[name]._parameters.get("weight"), lora_B[name]._parameters.get("weight")
        if type(a) is not Parameter or type(b) is not Parameter:
            return PARAMETER
        if a.device != weight.device or b.device != weight.device:
            return "the adapters are on another device than the parameter"
        if not isinstance(layer.scaling[name], (float, int)):
            return SCALING
        # As PEFT stores them: the expert is slowest in A, [E r, in], and fastest in B, [out, r E].
        a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
        # The in and out of a module that keeps its weight as [E, in, out] are PEFT's, where the module says so.
        turned = weight.ndim == 3 and not layer._did_swap_in_out_features
        left, right = (a.mT, b.mT) if turned else (b, a)
        plan.left.append(left)
        plan.right.append(right)
        plan.scaling.append(float(layer.scaling[name]))
        if weight.shape != (*(left.shape[:1] if weight.ndim == 3 else ()), left.shape[1], right.shape[2]):
            return _SHAPE
    if len({factor.dtype for factor in [*plan.left, *plan.right]}) > 1:
        return "the active adapters differ in dtype"
    return _refuse_now(module) or plan


def refuse_module(layer: Any) -> str | None:
    """The reason why what reads this parameter cannot be given a stand-in for it, or None."""
    module = layer.get_base_layer()
    forward = type(module).forward
    if not forward.__module__.startswith(_KNOWN_FORWARDS):
        return f"the forward of {type(module).__name__} is {forward.__module__}'s own"
    bound = module.__dict__.get("_old_forward" if "_hf_hook" in module.__dict__ else "forward")
    if bound is not None and getattr(bound, "__func__", None) is not forward:
        return "the forward of the module that has the parameter was replaced on the instance"
    return None


def _refuse_now(module: Any) -> str | None:
    """What may change from call to call: PEFT's own way, and which function transformers' experts run."""
    from peft.tuners.lora import layer as peft_layer

    for name in ("_LoraParameterProxy", "_LoraFactorsProxy"):
        proxy = getattr(peft_layer, name, None)  # PEFT 0.20 has the first alone
        if proxy is not None and not proxy.forward.__module__.startswith("peft."):
            return f"PEFT's {name}.forward was replaced by {proxy.forward.__module__}"
    if not hasattr(module, "_apply_gate"):
        return None
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    implementation = getattr(module.config, "_experts_implementation", None)
    function = None if implementation is None else ALL_EXPERTS_FUNCTIONS.get(implementation)
    if function is None or function.__module__ == "transformers.integrations.moe":
        return None
    return f"the experts implementation is {implementation!r}"


def refuse_call(layer: Any, x: Any, plan: ParameterPlan) -> str | None:
    """The reason why ``lora_experts`` does not take this call now, or None."""
    reason = refuse_place(x)
    if reason is None and plan.weight.device != x.device:
        reason = "the adapters are on another device than the input"
    return reason or refuse_module(layer)


class Use:
    """What one call of the module did with the parameter.

    Args:
        tokens: what the module was called with.
        refuse: called with the reason before W + s B A is formed; it may raise.
    """

    __slots__ = ("tokens", "refuse", "formed")

    def __init__(self, tokens: Tensor, refuse: Callable[[str], None]):
        self.tokens = tokens
        self.refuse = refuse
        self.formed = False

    def form(self, what: str) -> None:
        if not self.formed:
            self.formed = True
            self.refuse(f"the parameter is used in {what}, which is not a product of tokens with it")


@contextlib.contextmanager
def standing_in(plan: ParameterPlan, use: Use) -> Iterator[None]:
    """Let the module find a stand-in in place of the parameter. The parameter itself stays where it is registered."""
    attributes = plan.module.__dict__  # found before what is registered, and nothing that walks parameters looks there
    attributes[plan.name] = FactoredWeight(plan.weight, plan.left, plan.right, plan.scaling, use)
    try:
        yield
    finally:
        del attributes[plan.name]


# ---- the stand-in ----------------------------------------------------------------------------------------------------


class FactoredWeight:
    """W + sum of scaling left right, without being formed: a stand-in for the tensor where it is multiplied with tokens.

    base: W, [E, p, q], or [p, q] of one expert, or [S, p, q] where ``ids`` [S] says which expert each is of.
    left, right: of each adapter [E, p, r] and [E, r, q]; E is 1 for [p, q].
    """

    __slots__ = ("base", "left", "right", "scaling", "use", "ids", "_experts", "_formed")

    def __init__(
        self,
        base: Tensor,
        left: list[Tensor],
        right: list[Tensor],
        scaling: list[float],
        use: Use,
        ids: Tensor | None = None,
    ):
        self.base, self.left, self.right, self.scaling, self.use, self.ids = base, left, right, scaling, use, ids
        self._experts: list[list[tuple[Tensor, Tensor]]] | None = None
        self._formed: Tensor | None = None

    # -- what it looks like

    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)
    device = property(lambda self: self.base.device)
    ndim = property(lambda self: self.base.ndim)
    is_cuda = property(lambda self: self.base.is_cuda)
    is_cpu = property(lambda self: self.base.is_cpu)

    def dim(self) -> int:
        return self.base.dim()

    def size(self, *args: Any) -> Any:
        return self.base.size(*args)

    def __len__(self) -> int:
        return len(self.base)

    def __repr__(self) -> str:
        return f"FactoredWeight({[*self.shape]}, {self.dtype}, {len(self.left)} adapters)"

    # -- views

    def transpose(self, a: int, b: int) -> Any:
        n = self.base.ndim
        if {a % n, b % n} != {n - 2, n - 1}:
            return self.formed("transpose").transpose(a, b)
        return self._like(self.base.mT, [r.mT for r in self.right], [left.mT for left in self.left])

    mT = property(lambda self: self.transpose(-2, -1))

    def t(self) -> Any:
        return self.transpose(0, 1)

    T = property(lambda self: self.transpose(0, 1) if self.base.ndim == 2 else self.formed("T").T)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        dtype = kwargs.get("dtype") if not args else args[0] if not kwargs and len(args) == 1 else None
        if not isinstance(dtype, torch.dtype) or len(kwargs) > 1:
            return self.formed("to").to(*args, **kwargs)
        return self if dtype is self.dtype else self._like(self.base.to(dtype), self.left, self.right)

    def type(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
            return self.to(args[0])
        return self.formed("type").type(*args, **kwargs)

    def float(self) -> Any:
        return self.to(torch.float32)

    def _like(self, base: Tensor, left: list[Tensor], right: list[Tensor]) -> FactoredWeight:
        return FactoredWeight(base, left, right, self.scaling, self.use, self.ids)

    def __getitem__(self, index: Any) -> Any:
        if self.base.ndim == 3 and self.ids is None:
            if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32):
                if index.ndim == 1:
                    return FactoredWeight(self.base[index], self.left, self.right, self.scaling, self.use, index)
                if index.ndim == 0:
                    index = int(index)
            if type(index) is int:
                left, right = zip(*(pair[index] for pair in self._by_expert()))
                return self._like(self.base[index], list(left), list(right))
        return self.formed("indexing")[_formed(index)]

    def _by_expert(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Of each adapter, of each expert, its factors as [1, p, r] and [1, r, q].

        All of them at once, because the gradient of one view of n is as large as that of all n.
        """
        if self._experts is None or _lost_gradient(self._experts[0][0][0], self.left[0]):
            self._experts = [list(zip(a.split(1), b.split(1))) for a, b in zip(self.left, self.right)]
        return self._experts

    # -- products

    def add_to(self, y: Tensor, x: Tensor, ends: Tensor, turned: bool) -> Tensor:
        """y + the adapters of x W, or of x W^T where ``turned``; x and y are rows sorted by expert."""
        A, B = self._factors(y.dtype, turned)
        with _without_autocast(y.device.type):
            return ops.lora_experts(y, x.to(y.dtype), ends, A, B, self.scaling)

    def add_grouped(self, y: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        """As :meth:`add_to`, of x W; what is kept of rows that are the module's tokens, sorted, is the tokens."""
        A, B = self._factors(y.dtype, turned=False)
        rows = _rows_of(x, self.use.tokens) if any(a.requires_grad for a in A) and x.dtype is y.dtype else None
        if rows is None or not torch.is_grad_enabled():
            return self.add_to(y, x, ends, turned=False)
        with _without_autocast(y.device.type):
            return _OfRows.apply(y, x, self.use.tokens, rows, ends, self.scaling, len(A), *A, *B)

    def _factors(self, dtype: torch.dtype, turned: bool) -> tuple[list[Tensor], list[Tensor]]:
        A, B = (self.right, self.left) if turned else ([a.mT for a in self.left], [b.mT for b in self.right])
        if A[0].dtype not in ADAPTER_DTYPES[dtype]:
            A, B = [a.to(dtype) for a in A], [b.to(dtype) for b in B]
        return A, B

    def add_one(self, y: Tensor, x: Tensor, turned: bool) -> Tensor:
        """All rows belong to the one expert; [..., n] each."""
        rows = x.reshape(-1, x.shape[-1])
        ends = torch.full((1,), rows.shape[0], dtype=torch.int32, device=x.device)
        return self.add_to(y.reshape(-1, y.shape[-1]), rows, ends, turned).view(y.shape)

    def add_batches(self, y: Tensor, x: Tensor) -> Tensor:
        """Each expert has a batch of its own: [E, T, n]."""
        experts, tokens, _ = x.shape
        ends = torch.arange(1, experts + 1, dtype=torch.int32, device=x.device) * tokens
        return self.add_to(y.flatten(0, 1), x.flatten(0, 1), ends, turned=False).view(y.shape)

    def add_chosen(self, y: Tensor, x: Tensor, ids: Tensor, turned: bool) -> Tensor:
        """Row i has expert ids[i]: x and y are [S, n]."""
        experts = self.left[0].shape[0]
        ids, order = torch.sort(ids % experts)  # W[-1] is the last expert
        ends = torch.searchsorted(ids, torch.arange(experts, dtype=ids.dtype, device=ids.device), right=True)
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(order.shape[0], device=order.device))
        return self.add_to(y[order], x[order], ends, turned)[back]

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    # -- everything else

    def formed(self, what: str) -> Tensor:
        """W + sum of scaling left right."""
        if self._formed is None or _lost_gradient(self._formed, self.left[0]):
            self.use.form(what)
            with torch.autocast(self.device.type, enabled=False):
                left, right = self.left, self.right
                if self.ids is not None:
                    left, right = [a[self.ids] for a in left], [b[self.ids] for b in right]
                self._formed = self.base
                for a, b, s in zip(left, right, self.scaling):
                    self._formed = self._formed + ((a @ b) * s).to(self.dtype).view(self.shape)
        return self._formed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.formed(name), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        multiply = _PRODUCTS.get(function, _grouped if _is_grouped_fallback(function) else None)
        # Nothing but a plain tensor times the stand-in, in this order.
        if (
            multiply is not None
            and len(args) >= 2
            and all(not isinstance(a, cls) for a in (*args[2:], *kwargs.values()))
        ):
            weights = [isinstance(a, cls) for a in args[:2]]
            other = args[weights.index(False)] if False in weights else None
            if type(other) in (Tensor, Parameter):
                product = multiply(function, *args, **kwargs)
                if product is not None:
                    return product
        what = getattr(function, "__name__", str(function))
        return function(*_formed(args, what), **_formed(kwargs, what))


def _lost_gradient(made: Tensor, source: Tensor) -> bool:
    """Whether ``made`` was made without gradients, and they are wanted now."""
    return torch.is_grad_enabled() and source.requires_grad and not made.requires_grad


def _formed(arguments: Any, what: str = "indexing") -> Any:
    return tree_map(lambda a: a.formed(what) if isinstance(a, FactoredWeight) else a, arguments)


def _operator(name: str) -> Callable:
    def apply(self: FactoredWeight, *others: Any) -> Any:
        return getattr(self.formed(name), name)(*_formed(others, name))

    return apply


for _name in ("add", "sub", "mul", "truediv", "pow"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(FactoredWeight, _form, _operator(_form))
for _name in ("neg", "abs", "iter", "lt", "le", "gt", "ge"):
    setattr(FactoredWeight, f"__{_name}__", _operator(f"__{_name}__"))


def _without_autocast(device_type: str) -> Any:
    """Autocast has chosen the dtype in the product with W already."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# ---- what is kept of gathered rows -----------------------------------------------------------------------------------


_hooks_on_what_is_saved = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _rows_of(x: Tensor, tokens: Tensor) -> Tensor | None:
    """The rows [M] with x = tokens[rows], where autograd has seen that x was made so; else None."""
    made: Any = x.grad_fn
    if type(made).__name__ != "IndexBackward0" or not tokens.requires_grad or tokens.ndim != 2:
        return None
    # Hooks (checkpointing, offloading) are run by a look at what is saved, and decide themselves what is kept.
    if _hooks_on_what_is_saved is None or _hooks_on_what_is_saved(True) is not None:
        return None
    edge = get_gradient_edge(tokens)
    if made.next_functions[0] != (edge.node, edge.output_nr):
        return None
    rows = made._saved_indices
    return rows[0] if len(rows) == 1 and rows[0].dtype is torch.int64 and rows[0].ndim == 1 else None


class _OfRows(torch.autograd.Function):
    """``lora_experts`` of x = tokens[rows], which keeps the tokens for its backward instead of x: each is in x top-k times."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        tokens: Tensor,
        rows: Tensor,
        ends: Tensor,
        scaling: list[float],
        count: int,
        *factors: Tensor,
    ) -> Tensor:
        A, B = factors[:count], factors[count:]
        result, h = torch.ops.tsugi._lora_experts_apply.default(y, x, ends, A, B, scaling, 0.0, None)
        ctx.save_for_backward(tokens, rows, h, ends, *factors)
        ctx.scaling, ctx.count = scaling, count
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        tokens, rows, h, ends, *factors = ctx.saved_tensors
        need = ctx.needs_input_grad
        x = tokens[rows]
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            wanted = [t for t, needed in zip((x, *factors), (need[1], *need[7:])) if needed]
            result = ops.lora_experts(grad.new_zeros(grad.shape), x, ends, *_halves(factors), ctx.scaling)
            found = iter(torch.autograd.grad(result, wanted, grad, create_graph=True))
            dx, *others = [next(found) if needed else None for needed in (need[1], *need[7:])]
        else:
            of_A, of_B = any(need[7 : 7 + ctx.count]), any(need[7 + ctx.count :])
            dx, dA, dB = torch.ops.tsugi._lora_experts_backward.default(
                grad, x, h, ends, *_halves(factors), ctx.scaling, 0.0, None, need[1], of_A, of_B
            )
            dx = dx if need[1] else None
            others = [*(dA if of_A else [None] * ctx.count), *(dB if of_B else [None] * ctx.count)]
        return grad if need[0] else None, dx, None, None, None, None, None, *others


def _halves(factors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return factors[: len(factors) // 2], factors[len(factors) // 2 :]


# ---- the products ----------------------------------------------------------------------------------------------------

# Each gets the call as it was made, and returns None where it is of another form.


def _linear(function: Callable, x: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    if not isinstance(weight, FactoredWeight) or weight.ndim != 2:
        return None
    return weight.add_one(function(x, weight.base, bias), x, turned=True)


def _matmul(function: Callable, x: Any, weight: Any) -> Tensor | None:
    if not isinstance(weight, FactoredWeight) or weight.ids is not None:
        return None
    if weight.ndim == 2:
        return weight.add_one(function(x, weight.base), x, turned=False) if x.ndim >= 2 else None
    if x.ndim == 3 and x.shape[0] == weight.shape[0]:
        return weight.add_batches(function(x, weight.base), x)
    return None


def _bmm(function: Callable, left: Any, right: Any) -> Tensor | None:
    if isinstance(right, FactoredWeight) and right.ids is None:
        return _matmul(function, left, right)
    if isinstance(right, FactoredWeight) and right.ids is not None and left.ndim == 3 and left.shape[1] == 1:
        y = function(left, right.base)  # [S, 1, p] times [S, p, q]
        return right.add_chosen(y.squeeze(1), left.squeeze(1), right.ids, turned=False).unsqueeze(1)
    if isinstance(left, FactoredWeight) and left.ids is not None and right.ndim == 3 and right.shape[2] == 1:
        y = function(left.base, right)  # [S, p, q] times [S, q, 1]
        return left.add_chosen(y.squeeze(2), right.squeeze(2), left.ids, turned=True).unsqueeze(2)
    return None


def _grouped(function: Callable, x: Any, weight: Any, **kwargs: Any) -> Tensor | None:
    ends = kwargs.get("offs")
    if (
        not isinstance(weight, FactoredWeight)
        or weight.ndim != 3
        or weight.ids is not None
        or x.ndim != 2
        or ends is None
    ):
        return None
    return weight.add_grouped(function(x, weight.base, **kwargs), x, ends)


def _is_grouped_fallback(function: Any) -> bool:
    """transformers' own operation for where torch has no grouped product."""
    return getattr(function, "_qualified_op_name", None) == "transformers::grouped_mm_fallback"


_PRODUCTS: dict[Any, Callable] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _matmul,
    Tensor.mm: _matmul,
    torch.bmm: _bmm,
    Tensor.bmm: _bmm,
    torch._grouped_mm: _grouped,
}
