"""Swap the backend of PEFT's LoRA layers, and back.

``use_backend(model)`` gives each LoRA layer that PEFT built a subclass of its own class. The subclass asks, at every
call, whether the ops compute what PEFT's forward would; if so it calls ``lora_linear`` (a plain ``nn.Linear`` below) or
the base layer followed by ``lora_delta`` (any other base: quantised, hooked, trainable, transposed), and if not it
calls PEFT's forward. Nothing is cached between calls: parameters, adapters, hooks, dtypes and modes may change at any
time.
"""

from __future__ import annotations

import copy
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _nn_module
from torch.nn.parameter import Parameter

from . import ops, selftest
from .selftest import dtype_name

__all__ = ["BackendReport", "LayerReport", "use_backend"]

BACKENDS = ("auto", "tsugi", "peft")


# ---- what can be accelerated -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """How one of PEFT's LoRA layers computes base(x) + sum of s B(A(drop(x))), where they differ."""

    base: str = "base_layer"  # the attribute whose module is called
    widen: bool = False  # under autocast the sum keeps the wider dtype, else always the base output's


# By name, so that bitsandbytes and the like are not imported to find out whether they are there. All of these are
# "the base layer's output plus LoRA of the layer's input"; what is not in here is left to PEFT.
_KINDS = {
    "peft.tuners.lora.layer.Linear": _Kind(),
    "peft.tuners.lora.torchao.TorchaoLoraLinear": _Kind(),
    "peft.tuners.lora.inc.IncLoraLinear": _Kind(),
    "peft.tuners.lora.te.TeLinear": _Kind(),
    "peft.tuners.lora.gptq.GPTQLoraLinear": _Kind(base="quant_linear_module"),
    "peft.tuners.lora.aqlm.AqlmLoraLinear": _Kind(),
    "peft.tuners.lora.bnb.Linear8bitLt": _Kind(widen=True),
    "peft.tuners.lora.bnb.Linear4bit": _Kind(widen=True),
    "peft.tuners.lora.hqq.HqqLoraLinear": _Kind(widen=True),
    "peft.tuners.lora.awq.AwqLoraLinear": _Kind(base="quant_linear_module", widen=True),
    "peft.tuners.lora.eetq.EetqLoraLinear": _Kind(base="quant_linear_module", widen=True),
}

# Reasons why a call runs PEFT's forward although nothing is wrong: there is no adapter to compute.
_DISABLED = "adapters are disabled"
_MERGED = "adapters are merged into the base weight"
_INACTIVE = "no active adapter on this layer"
_IDLE = frozenset({_DISABLED, _MERGED, _INACTIVE})

_ARGUMENTS = "called with more than the input (adapter_names, alora_offsets or others)"
_HOOKED = "hooks on a submodule of an adapter"
_GLOBAL_HOOKS = "global module hooks are registered"
_NOT_LINEAR = "an adapter's A or B is not a plain nn.Linear"
_BIAS = "an adapter has a bias (lora_bias)"
_PARAMETER = "an adapter's weight is not a plain nn.Parameter (sharded, replicated or substituted)"
_SCALING = "scaling is a tensor (prepare_model_for_compiled_hotswap)"
_DROPOUT = "lora_dropout is not nn.Dropout with p below 1"
_DROPOUTS = "the active adapters differ in lora_dropout"
_INPUT = "the input is not a plain strided tensor"
_TRANSFORM = "inside a torch.func transform or forward-mode differentiation"
_TRACE = "inside torch.jit tracing or torch.export"

_ADAPTER_DTYPES = {
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}

_Plan = tuple[list[Tensor], list[Tensor], list[float], float]


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


def _read_adapters(layer: nn.Module) -> _Plan | str:
    """The active adapters as the ops take them, (A, B, scaling, p), or the reason why PEFT's forward must run."""
    if layer._disable_adapters:
        return _DISABLED
    if layer.merged_adapters:
        return _MERGED
    active = layer._active_adapter
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
        if variants and name in variants:
            return f"LoRA variant {type(variants[name]).__name__}"
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
            return _PARAMETER
        s = layer.scaling[name]
        if not isinstance(s, (float, int)):
            return _SCALING
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
        return _INACTIVE
    dtype = A[0].dtype
    for a, b in zip(A, B):
        if a.dtype is not dtype or b.dtype is not dtype:
            return "the active adapters differ in dtype"
    return A, B, scaling, p


def _dense(base: nn.Module) -> bool:
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
_DEVICE_TYPES = frozenset(
    device_type
    for device_type, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if ops.available() and torch._C._dispatch_has_kernel_for_dispatch_key("tsugi::_lora_apply", key)
)


def _refuse_input(layer: nn.Module, x: Any, A: list[Tensor]) -> str | None:
    """The reason why the ops do not take this input with these adapters now, or None."""
    if type(x) is not Tensor and type(x) is not Parameter:
        return _INPUT
    if x.layout is not torch.strided or x.is_nested:
        return _INPUT
    device = "cpu" if x.is_cpu else x.device.type
    if device not in _DEVICE_TYPES:
        return f"no kernel for device type {device!r}"
    if A[0].device != x.device:
        return "the adapters are on another device than the input"
    if (
        _nn_module._global_forward_hooks or _nn_module._global_forward_pre_hooks
        or _nn_module._global_backward_hooks or _nn_module._global_backward_pre_hooks
    ):  # fmt: skip
        return _GLOBAL_HOOKS
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
    x_dtype, dtype = x.dtype, A[0].dtype
    if torch.is_autocast_enabled(device):
        # The ops cast as F.linear does. PEFT casts the input to the adapters' dtype first, which is a rounding of its
        # own where that is the other 16-bit type.
        if (
            x_dtype in (torch.float32, torch.bfloat16, torch.float16)
            and (dtype is torch.float32 or dtype is torch.get_autocast_dtype(device))
        ):  # fmt: skip
            return None
    elif dtype in _ADAPTER_DTYPES.get(x_dtype, ()):
        if x_dtype is dtype or getattr(layer, "cast_input_dtype_enabled", True):
            return None
        return "casting the input is turned off (disable_input_dtype_casting)"
    return f"{dtype_name(dtype)} adapters on {dtype_name(x_dtype)} input"


# ---- the forward -------------------------------------------------------------------------------------------------


class _State:
    """What a swapped layer carries: whether falling back is an error, and its counters."""

    __slots__ = ("strict", "shared", "linear", "delta", "fallback")

    def __init__(self, strict: bool, shared: bool = False):
        self.strict = strict
        self.shared = shared
        self.linear = 0
        self.delta = 0
        self.fallback: Counter[str] = Counter()

    def __deepcopy__(self, memo: dict) -> _State:
        # A copied layer counts for itself.
        return self if self.shared else _State(self.strict)


_STATE = "_tsugi_state"
_warned: set[str] = set()


def _accelerated_forward(peft_class: type, kind: _Kind) -> Callable[..., Tensor]:
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = self.__dict__.get(_STATE)
        if state is None:
            return peft_class.forward(self, x, *args, **kwargs)
        if args or kwargs:
            plan = _ARGUMENTS
        else:
            plan = _read_adapters(self)
            if type(plan) is not str:
                A, B, scaling, p = plan
                refused = _refuse_input(self, x, A)
                if refused is None:
                    base = self._modules[kind.base]
                    if _dense(base):
                        if not torch.compiler.is_compiling():
                            state.linear += 1
                        weight, bias = base._parameters["weight"], base._parameters["bias"]
                        if p == 0.0:
                            return ops.lora_linear(x, weight, bias, A, B, scaling)
                        return ops.lora_linear(x, weight, bias, A, B, scaling, p, ops.draw_rng(x.device))
                    if not torch.compiler.is_compiling():
                        state.delta += 1
                    return _add_delta(base(x), x, plan, kind)
                plan = refused
        if state.strict or not torch.compiler.is_compiling():
            _count_fallback(self, state, plan)
        return peft_class.forward(self, x, *args, **kwargs)

    return forward


def _add_delta(result: Tensor, x: Tensor, plan: _Plan, kind: _Kind) -> Tensor:
    """result + sum of s B(A(drop(x))), with PEFT's dtypes."""
    A, B, scaling, p = plan
    rng = None if p == 0.0 else ops.draw_rng(x.device)
    dtype = result.dtype
    if torch.is_autocast_enabled(x.device.type):
        # bitsandbytes answers in its input's dtype under autocast too. The sum then is in the wider one; PEFT casts it
        # back for some kinds, and for the others only where its own look at autocast, which means CUDA, says so.
        y = ops.lora_delta(result, x, A, B, scaling, p, rng)
        return y if kind.widen and torch.is_autocast_enabled() else y.to(dtype)
    if dtype is x.dtype:
        return ops.lora_delta(result, x, A, B, scaling, p, rng)
    # A base layer that changes the dtype: PEFT computes the low-rank part in the adapters', adds, and casts back.
    x = x.to(A[0].dtype)
    zeros = torch.zeros_like(result, dtype=x.dtype, requires_grad=False)
    return (result + ops.lora_delta(zeros, x, A, B, scaling, p, rng)).to(dtype)


def _count_fallback(layer: nn.Module, state: _State, reason: str) -> None:
    state.fallback[reason] += 1
    if reason in _IDLE:
        return
    if state.strict:
        raise RuntimeError(
            f'use_backend(model, "tsugi"): a layer of type lora.{type(layer).__name__} '
            f"({layer.in_features} -> {layer.out_features}) cannot be accelerated: {reason}"
        )
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"tsugi_kpool leaves calls of LoRA layers to PEFT: {reason}", stacklevel=4)


# ---- the class swap ----------------------------------------------------------------------------------------------

_classes: dict[type, type] = {}


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _accelerated_class(peft_class: type) -> type:
    """The subclass of one of PEFT's layer classes whose forward calls the ops; one a class."""
    if peft_class in _classes:
        return _classes[peft_class]

    def reduce_ex(self, protocol):
        # Pickles hold PEFT's own class, so that they load where this package is not installed. The form of protocol 1,
        # which all later ones read, may name another class than the object's.
        rebuild, (_, *args), state = super(cls, self).__reduce_ex__(1)
        return rebuild, (peft_class, *args), {k: v for k, v in state.items() if k != _STATE}

    def deep_copy(self, memo):
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(super(cls, self).__reduce_ex__(4)[2], memo))
        if _STATE in new.__dict__:
            _swap(new, new.__dict__[_STATE])
        return new

    # The name stays: PEFT, transformers and users print it and look for it.
    cls = type(peft_class)(
        peft_class.__name__,
        (peft_class,),
        {
            "__module__": __name__,
            "__qualname__": peft_class.__qualname__,
            "__doc__": f"{_class_name(peft_class)} with the forward of torch.ops.tsugi.",
            "_tsugi_peft_class": peft_class,
            "__reduce_ex__": reduce_ex,
            "__deepcopy__": deep_copy,
            "forward": _accelerated_forward(peft_class, _KINDS[_class_name(peft_class)]),
        },
    )
    _classes[peft_class] = cls
    return cls


def _peft_class(layer: nn.Module) -> type:
    """The class PEFT gave this layer."""
    return getattr(type(layer), "_tsugi_peft_class", type(layer))


def _unsupported(layer: nn.Module, inside_attention: bool) -> str | None:
    """The reason why this layer cannot be swapped at all, or None."""
    from peft.tuners.lora import LoraLayer

    if not ops.available():
        return ops.unavailable_reason
    cls = _peft_class(layer)
    if not isinstance(layer, LoraLayer):
        return f"{cls.__module__.rpartition('.')[0].rpartition('.')[2]}.{cls.__name__} is not LoRA"
    if _class_name(cls) not in _KINDS:
        return f"no op for LoRA on this kind of layer ({cls.__name__})"
    if inside_attention:
        return "lora.MultiheadAttention merges this layer's weight instead of calling it"
    if cls.forward.__module__ != cls.__module__ and not cls.forward.__module__.startswith("peft."):
        return f"{cls.__name__}.forward was replaced by {cls.forward.__module__}"
    if "forward" in layer.__dict__:
        bound = layer.__dict__.get("_old_forward" if "_hf_hook" in layer.__dict__ else "forward")
        own = (cls.forward, _classes[cls].forward if cls in _classes else None)
        if getattr(bound, "__self__", None) is not layer or bound.__func__ not in own:
            return "forward is replaced on the instance (X-LoRA or a patch)"
    # Asked here for compiled models, which do not ask at each call.
    where = next((p.device for p in layer.parameters() if p.device.type in _DEVICE_TYPES), None)
    return None if where is None else selftest.fault("cpu" if where.type == "cpu" else where)


def _set_class(layer: nn.Module, cls: type) -> None:
    old, layer.__class__ = type(layer), cls
    # accelerate keeps the bound forward it found, and leaves it on the instance when its hook is removed.
    for name in ("forward", "_old_forward"):
        bound = layer.__dict__.get(name)
        if isinstance(bound, types.MethodType) and bound.__self__ is layer and bound.__func__ is old.forward:
            layer.__dict__[name] = types.MethodType(cls.forward, layer)


def _swap(layer: nn.Module, state: _State) -> None:
    if not hasattr(type(layer), "_tsugi_peft_class"):
        _set_class(layer, _accelerated_class(type(layer)))
    layer.__dict__[_STATE] = state
    if state.shared:
        _everywhere_layers.add(layer)


def _restore(layer: nn.Module) -> None:
    if _STATE in layer.__dict__:
        # fully_shard puts a class of its own on top, which stays; without a state the forward below it is PEFT's.
        if "_tsugi_peft_class" in type(layer).__dict__:
            _set_class(layer, _peft_class(layer))
        del layer.__dict__[_STATE]


# ---- layers that are created later -------------------------------------------------------------------------------

# On the model, on PEFT's tuner and on what the tuner wraps: the backend of layers that will be added to it. A plain
# string, so that copies keep it and pickles do not need this package.
_MARK = "_tsugi_backend"

# The same for models that nobody named: use_backend() without a model.
_everywhere: tuple[str, _State] | None = None
_everywhere_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _marked_modules(model: nn.Module) -> Iterator[nn.Module]:
    from peft.tuners.tuners_utils import BaseTuner

    yield model
    for module in model.modules():
        if isinstance(module, BaseTuner):
            yield module
            yield module.model
        elif "peft_config" in module.__dict__:
            yield module


def _get_mark(model: nn.Module) -> str | None:
    return next((m.__dict__[_MARK] for m in _marked_modules(model) if _MARK in m.__dict__), None)


def _set_mark(model: nn.Module, backend: str | None) -> None:
    for module in list(_marked_modules(model)):
        if backend is None:
            module.__dict__.pop(_MARK, None)
        else:
            module.__dict__[_MARK] = backend


def _watch_new_layers() -> None:
    """Wrap the function through which PEFT puts a new LoRA layer into a model, once."""
    from peft.tuners.lora import LoraModel
    from peft.tuners.mixed import MixedModel

    for tuner_class in (LoraModel, MixedModel):
        original = tuner_class.__dict__["_replace_module"]
        if not hasattr(original, "_tsugi_original"):
            tuner_class._replace_module = _watched(original)


def _watched(original: Callable) -> Callable:
    def _replace_module(self, parent, child_name, new_module, child):
        original(self, parent, child_name, new_module, child)
        backend, state = self.__dict__.get(_MARK) or self.model.__dict__.get(_MARK), None
        if backend is None and _everywhere is not None:
            backend, state = _everywhere
        if backend in ("auto", "tsugi"):
            _swap_new_layer(getattr(parent, child_name), child_name, backend, state)

    _replace_module._tsugi_original = original
    return _replace_module


def _swap_new_layer(layer: nn.Module, name: str, backend: str, state: _State | None) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(layer, BaseTunerLayer):
        return
    reason = _unsupported(layer, inside_attention=False)
    if reason is None:
        _swap(layer, state or _State(strict=backend == "tsugi"))
    elif backend == "tsugi":
        raise RuntimeError(f'use_backend(model, "tsugi"): the new layer {name!r} cannot be accelerated: {reason}')
    elif reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"tsugi_kpool leaves LoRA layers to PEFT: {reason} (first: {name!r})", stacklevel=2)


# ---- the report --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerReport:
    """One LoRA layer: who computes it as things stand, and its calls so far."""

    name: str
    kind: str  # PEFT's class, e.g. "lora.Linear"
    in_features: int | None
    out_features: int | None
    adapters: int  # N on this layer
    active: int  # K
    ranks: tuple[int, ...]  # r of each active adapter; of all of them when none is active
    op: str | None  # "lora_linear", "lora_delta", or None: left to PEFT
    reason: str  # why it is left to PEFT, or why it has nothing to do now; empty otherwise
    fast_calls: int = 0
    fallback_calls: dict[str, int] = field(default_factory=dict)  # reason -> calls that ran PEFT's forward

    @property
    def accelerated(self) -> bool:
        return self.op is not None


class BackendReport:
    """What ``use_backend`` did, live: each access looks at the model as it is.

    ``print(report)`` shows a table of like layers. As a context manager it puts the model back on exit to what it was
    before the call; the report then keeps the last state it saw. It does not keep the model alive.
    """

    def __init__(self, model: nn.Module | None, backend: str, undo: Callable[[], None], state: _State | None = None):
        self.backend = backend
        self._model = None if model is None else weakref.ref(model)
        self._undo = undo
        self._state = state
        self._open = model is not None
        self._seen: list[tuple[LayerReport, _State | None]] = []
        self._look()

    def _look(self) -> None:
        model = self._model() if self._open else None
        if model is not None:
            self._seen = [(_describe(*entry), entry[1].__dict__.get(_STATE)) for entry in _tuner_layers(model)]

    @property
    def layers(self) -> list[LayerReport]:
        """Each tuner layer of the model. Empty for ``use_backend()`` without a model, which counts calls only."""
        self._look()
        return [_with_calls(layer, state if self._open else None) for layer, state in self._seen]

    @property
    def accelerated(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.accelerated]

    @property
    def left_to_peft(self) -> list[LayerReport]:
        return [layer for layer in self.layers if not layer.accelerated]

    @property
    def fast_calls(self) -> int:
        """Layer forwards that ran an op. Calls inside a compiled region are not counted."""
        if self._state is not None:
            return self._state.linear + self._state.delta
        return sum(layer.fast_calls for layer in self.layers)

    @property
    def fallback_calls(self) -> dict[str, int]:
        """Layer forwards that ran PEFT's code instead, by reason."""
        total: Counter[str] = Counter() if self._state is None else Counter(self._state.fallback)
        for layer in self.layers:
            total.update(layer.fallback_calls)
        return dict(total.most_common())

    def __enter__(self) -> BackendReport:
        return self

    def __exit__(self, *exc: object) -> None:
        self._seen = [(layer, None) for layer in self.layers]
        self._open = False
        self._undo()

    def __repr__(self) -> str:
        return f"<BackendReport {self.backend!r}: {len(self.accelerated)} of {len(self.layers)} layers accelerated>"

    def __str__(self) -> str:
        return _format(self)


def _tuner_layers(model: nn.Module) -> list[tuple[str, nn.Module, bool]]:
    """(name, layer, whether it is the unused output projection of a lora.MultiheadAttention) of each tuner layer."""
    from peft.tuners.lora.layer import MultiheadAttention
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside = set()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            if isinstance(module, MultiheadAttention):
                inside.add(getattr(module.get_base_layer(), "out_proj", None))
            found.append((name, module, module in inside))
    return found


def _describe(name: str, layer: nn.Module, inside_attention: bool) -> LayerReport:
    cls = _peft_class(layer)
    ranks = getattr(layer, "r", {})
    if not isinstance(ranks, dict):
        ranks = {}
    active = [a for a in layer.active_adapters if a in ranks]
    op, reason = _expect(layer, inside_attention)
    return LayerReport(
        name=name,
        kind=f"{cls.__module__.removeprefix('peft.tuners.').partition('.')[0]}.{cls.__name__}",
        in_features=getattr(layer, "in_features", None),
        out_features=getattr(layer, "out_features", None),
        adapters=len(ranks),
        active=len(active),
        ranks=tuple(ranks[a] for a in active or ranks),
        op=op,
        reason=reason,
    )


def _with_calls(layer: LayerReport, state: _State | None) -> LayerReport:
    if state is None or state.shared:
        return layer
    return replace(layer, fast_calls=state.linear + state.delta, fallback_calls=dict(state.fallback))


def _expect(layer: nn.Module, inside_attention: bool) -> tuple[str | None, str]:
    """The op that a call of this layer will run, or None, and the reason."""
    reason = _unsupported(layer, inside_attention)
    if reason is None and _STATE not in layer.__dict__:
        return None, ""
    if reason is not None:
        return None, reason
    plan = _read_adapters(layer)
    if type(plan) is str and plan not in _IDLE:
        return None, plan
    op = "lora_linear" if _dense(layer._modules[_KINDS[_class_name(_peft_class(layer))].base]) else "lora_delta"
    return op, plan if type(plan) is str else ""


def _format(report: BackendReport) -> str:
    layers = report.layers
    if report._state is not None:
        lines = [f"tsugi_kpool backend {report.backend!r} for every LoRA layer created from now on"]
    elif not layers:
        lines = [f"tsugi_kpool backend {report.backend!r}: no LoRA layer yet; those added later are covered"]
    else:
        done = sum(layer.accelerated for layer in layers)
        lines = [f"tsugi_kpool backend {report.backend!r}: {done} of {len(layers)} LoRA layers accelerated"]
        groups: dict[tuple, int] = {}
        for layer in layers:
            shape = "" if layer.in_features is None else f"{layer.in_features} -> {layer.out_features}"
            ranks = ",".join(map(str, layer.ranks if len(set(layer.ranks)) > 1 else layer.ranks[:1]))
            adapters = f"{layer.active} of {layer.adapters}" + (f", r={ranks}" if ranks else "")
            how = (layer.op or "PEFT") + (f": {layer.reason}" if layer.reason else "")
            key = (_pattern(layer.name), layer.kind, shape, adapters, how)
            groups[key] = groups.get(key, 0) + 1
        head = ("layers", "", "kind", "in -> out", "active", "computed by")
        rows = [head] + [(k[0], f"x{n}", *k[1:]) for k, n in groups.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines += [
            "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[5]]).rstrip()
            for row in rows
        ]
    fallback = report.fallback_calls
    if report.fast_calls or fallback:
        lines.append(f"calls: {report.fast_calls:,} by tsugi, {sum(fallback.values()):,} by PEFT")
        lines += [f"  {count:,}: {reason}" for reason, count in fallback.items()]
    return "\n".join(lines)


def _pattern(name: str) -> str:
    """A layer's name with numbers as *, without the wrappers that PEFT puts in front."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join("*" if part.isdigit() else part for part in parts)


# ---- the entry ---------------------------------------------------------------------------------------------------


def use_backend(model: nn.Module | None = None, backend: str = "auto") -> BackendReport:
    """Run the LoRA layers of a PEFT model on ``torch.ops.tsugi``, or give them back to PEFT.

    Args:
        model: any module with PEFT LoRA layers in it, or a model that will get some. Layers and adapters that PEFT
            adds to it later are covered too. Without a model, every LoRA layer that PEFT creates from now on in this
            process, in whatever model that was not named.
        backend: ``"auto"`` accelerates what it can, warns once for each reason and leaves the rest to PEFT.
            ``"tsugi"`` raises RuntimeError with a sentence that names what cannot be accelerated, now or at a later
            call, and changes nothing in that case. ``"peft"`` undoes it.

    Returns:
        A report; print it. It is also a context manager: ``with use_backend(model): ...`` puts the model back on exit
        to what it was before the call.

    The layers compute what PEFT's do with the same adapters active, to rounding; with dropout, from a mask of the same
    rate that torch's own generator seeds. Saved models and checkpoints are unaffected: they hold PEFT's classes.
    """
    if backend not in BACKENDS:
        raise ValueError(f"use_backend: backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if model is None:
        return _use_everywhere(backend)
    if not isinstance(model, nn.Module):
        raise TypeError(f"use_backend: model is a {type(model).__name__}, expected a torch.nn.Module")

    layers = _tuner_layers(model)
    reference, mark_before = weakref.ref(model), _get_mark(model)
    before: weakref.WeakKeyDictionary[nn.Module, tuple[_State, bool]] = weakref.WeakKeyDictionary()
    for _, layer, _ in layers:
        if _STATE in layer.__dict__:
            before[layer] = layer.__dict__[_STATE], layer.__dict__[_STATE].strict

    def undo() -> None:
        model = reference()
        if model is None:
            return
        for _, layer, _ in _tuner_layers(model):
            if layer in before:
                state, state.strict = before[layer]
                _swap(layer, state)
            else:
                _restore(layer)
        _set_mark(model, mark_before)

    if backend == "peft":
        for _, layer, _ in layers:
            _restore(layer)
        # "peft" is worth keeping only where it has something to say no to.
        _set_mark(model, "peft" if _everywhere is not None else None)
        return BackendReport(model, backend, undo)

    _watch_new_layers()
    unsupported: dict[str, list[str]] = {}
    accelerated = []
    for name, layer, inside_attention in layers:
        reason = _unsupported(layer, inside_attention)
        if reason is None and backend == "tsugi":
            plan = _read_adapters(layer)
            reason = plan if type(plan) is str and plan not in _IDLE else None
        if reason is None:
            accelerated.append(layer)
        else:
            unsupported.setdefault(reason, []).append(name)
    sentences = [f"{reason} ({len(names)}, first {names[0]!r})" for reason, names in unsupported.items()]
    if backend == "tsugi" and unsupported:
        raise RuntimeError(
            f'use_backend(model, "tsugi") cannot accelerate {len(layers) - len(accelerated)} of {len(layers)} layers: '
            + "; ".join(sentences)
        )
    for layer in accelerated:
        state = layer.__dict__.get(_STATE)
        if state is None or state.shared:
            state = _State(strict=False)
        state.strict = backend == "tsugi"
        _swap(layer, state)
    _set_mark(model, backend)
    for sentence in sentences:
        warnings.warn(f"tsugi_kpool leaves LoRA layers to PEFT: {sentence}", stacklevel=2)
    _warned.update(unsupported)
    return BackendReport(model, backend, undo)


def _use_everywhere(backend: str) -> BackendReport:
    global _everywhere
    if backend == "peft":
        for layer in list(_everywhere_layers):
            if layer.__dict__.get(_STATE) is not None and layer.__dict__[_STATE].shared:
                _restore(layer)
        _everywhere, before = None, None
    else:
        if not ops.available():
            if backend == "tsugi":
                raise RuntimeError(f'use_backend(None, "tsugi"): {ops.unavailable_reason}')
            warnings.warn(f"tsugi_kpool leaves all LoRA layers to PEFT: {ops.unavailable_reason}", stacklevel=3)
        _watch_new_layers()
        _everywhere, before = (backend, _State(strict=backend == "tsugi", shared=True)), _everywhere
    state = _State(strict=False, shared=True) if _everywhere is None else _everywhere[1]

    def undo() -> None:
        global _everywhere
        for layer in list(_everywhere_layers):
            if layer.__dict__.get(_STATE) is state:
                _restore(layer)
        _everywhere = before

    return BackendReport(None, backend, undo, state)
