"""Swap the backend of PEFT's LoRA layers, and back.

``use_backend(model)`` gives each LoRA layer that PEFT built a subclass of its own class. The subclass asks, at every
call, whether the ops compute what PEFT's forward would; if so it calls ``lora_linear`` (a plain ``nn.Linear`` below) or
the base layer followed by ``lora_delta`` (any other base: quantised, hooked, trainable, transposed), and if not it
calls PEFT's forward. Layers with DoRA go through ``dora.py``. Nothing is cached between calls, but for the norms that it
checks for change at each one: parameters, adapters, hooks, dtypes and modes may change at any time.
"""

from __future__ import annotations

import copy
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import selftest
from ..warn import warn_user
from .dora import DoraPlan, adapted, read_dora, refuse_rows
from .experts import PARAM_WRAPPER, ParameterPlan, Use, read_parameter, refuse_call, refuse_module, standing_in
from .plan import ARGUMENTS, DEVICE_TYPES, DORA, IDLE, KINDS, Kind, Plan, is_dense, read_adapters, refuse_input
from .report import BackendReport, LayerReport, Seen

__all__ = ["BackendReport", "LayerReport", "use_backend"]

BACKENDS = ("auto", "tsugi", "peft")


# ---- the forward -------------------------------------------------------------------------------------------------


class _State:
    """What a swapped layer carries: whether falling back is an error, and its counters."""

    __slots__ = ("strict", "shared", "linear", "delta", "experts", "fallback")

    def __init__(self, strict: bool, shared: bool = False):
        self.strict = strict
        self.shared = shared
        self.linear = 0
        self.delta = 0
        self.experts = 0
        self.fallback: Counter[str] = Counter()

    def __deepcopy__(self, memo: dict) -> _State:
        # A copied layer counts for itself.
        return self if self.shared else _State(self.strict)


_STATE = "_tsugi_state"
_warned: set[str] = set()


def _accelerated_forward(peft_class: Any, kind: Kind) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = self.__dict__.get(_STATE)
        if state is None:
            return peft_class.forward(self, x, *args, **kwargs)
        plan: Plan | DoraPlan | str
        if args or kwargs:
            plan = ARGUMENTS
        else:
            plan = read_adapters(self)
            if plan is DORA:
                plan = read_dora(self, kind)
            if isinstance(plan, DoraPlan):
                refused = refuse_input(self, x, [plan.parts[0].a]) or refuse_rows(x)
                if refused is None:
                    if plan.dense:
                        state.linear += 1
                    else:
                        state.delta += 1
                    return adapted(self, x, plan)
                plan = refused
            elif not isinstance(plan, str):
                A, B, scaling, p = plan
                refused = refuse_input(self, x, A)
                if refused is None:
                    base = self._modules[kind.base]
                    if is_dense(base):
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


def _parameter_forward(peft_class: Any) -> Callable[..., Tensor]:
    """The forward of a ``lora.ParamWrapper``: what is below it, with a stand-in for the parameter."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = self.__dict__.get(_STATE)
        if state is None:
            return peft_class.forward(self, x, *args, **kwargs)
        plan: ParameterPlan | str = ARGUMENTS if "adapter_names" in kwargs else read_parameter(self)
        if isinstance(plan, ParameterPlan):
            refused = refuse_call(self, x, plan)
            if refused is None:
                return _with_parameter(self, state, plan, x, args, kwargs)
            plan = refused
        if state.strict or not torch.compiler.is_compiling():
            _count_fallback(self, state, plan)
        return peft_class.forward(self, x, *args, **kwargs)

    return forward


@torch.compiler.disable
def _with_parameter(layer: Any, state: _State, plan: ParameterPlan, x: Tensor, args: tuple, kwargs: dict) -> Any:
    use = Use(x, lambda reason: _count_fallback(layer, state, reason))
    with standing_in(plan, use):
        result = layer._modules["base_layer"](x, *args, **kwargs)
    if not use.formed:
        state.experts += 1
    return result


def _add_delta(result: Tensor, x: Tensor, plan: Plan, kind: Kind) -> Tensor:
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
    if reason in IDLE:
        return
    if state.strict:
        of = f" of {layer.parameter_name!r}" if hasattr(layer, "parameter_name") else ""
        raise RuntimeError(
            f'use_backend(model, "tsugi"): a layer of type lora.{type(layer).__name__}{of} '
            f"({layer.in_features} -> {layer.out_features}) cannot be accelerated: {reason}"
        )
    if reason not in _warned:
        _warned.add(reason)
        warn_user(f"tsugi_kpool leaves calls of LoRA layers to PEFT: {reason}")


# ---- the class swap ----------------------------------------------------------------------------------------------

_classes: dict[type, type] = {}


def _class_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _accelerated_class(peft_class: Any) -> Any:
    """The subclass of one of PEFT's layer classes whose forward calls the ops; one a class."""
    if peft_class in _classes:
        return _classes[peft_class]

    def reduce_ex(self: Any, protocol: Any) -> Any:
        # Pickles hold PEFT's own class, so that they load where this package is not installed. The form of protocol 1,
        # which all later ones read, may name another class than the object's.
        rebuild, (_, *args), state = super(cls, self).__reduce_ex__(1)
        return rebuild, (peft_class, *args), {k: v for k, v in state.items() if k != _STATE}

    def deep_copy(self: Any, memo: Any) -> Any:
        new: Any = object.__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(super(cls, self).__reduce_ex__(4)[2], memo))
        if _STATE in new.__dict__:
            _swap(new, new.__dict__[_STATE])
        return new

    # The name stays: PEFT, transformers and users print it and look for it.
    cls: Any = type(peft_class)(
        peft_class.__name__,
        (peft_class,),
        {
            "__module__": __name__,
            "__qualname__": peft_class.__qualname__,
            "__doc__": f"{_class_name(peft_class)} with the forward of torch.ops.tsugi.",
            "_tsugi_peft_class": peft_class,
            "__reduce_ex__": reduce_ex,
            "__deepcopy__": deep_copy,
            "forward": _forward_of(peft_class),
        },
    )
    _classes[peft_class] = cls
    return cls


def _forward_of(peft_class: type) -> Callable[..., Tensor]:
    name = _class_name(peft_class)
    return _parameter_forward(peft_class) if name == PARAM_WRAPPER else _accelerated_forward(peft_class, KINDS[name])


def _peft_class(layer: nn.Module) -> type:
    """The class PEFT gave this layer."""
    return getattr(type(layer), "_tsugi_peft_class", type(layer))


def _adapts_parameter(layer: nn.Module) -> bool:
    return _class_name(_peft_class(layer)) == PARAM_WRAPPER


def _read(layer: nn.Module) -> Plan | DoraPlan | ParameterPlan | str:
    if _adapts_parameter(layer):
        return read_parameter(layer)
    plan = read_adapters(layer)
    return read_dora(layer, _kind(layer)) if plan is DORA else plan


def _kind(layer: nn.Module) -> Kind:
    return KINDS[_class_name(_peft_class(layer))]


def _unsupported(layer: nn.Module, inside_attention: bool) -> str | None:
    """The reason why this LoRA layer cannot be swapped at all, or None."""
    if not ops.available():
        return ops.unavailable_reason
    cls: Any = _peft_class(layer)
    if not _adapts_parameter(layer) and _class_name(cls) not in KINDS:
        return f"no op for LoRA on this kind of layer ({cls.__name__})"
    if inside_attention:
        return "lora.MultiheadAttention merges this layer's weight instead of calling it"
    if cls.forward.__module__ != cls.__module__ and not cls.forward.__module__.startswith("peft."):
        return f"{cls.__name__}.forward was replaced by {cls.forward.__module__}"
    if "forward" in layer.__dict__:
        bound = layer.__dict__.get("_old_forward" if "_hf_hook" in layer.__dict__ else "forward")
        own = (cls.forward, vars(_classes[cls])["forward"] if cls in _classes else None)
        if getattr(bound, "__self__", None) is not layer or getattr(bound, "__func__", None) not in own:
            return "forward is replaced on the instance (X-LoRA or a patch)"
    if _adapts_parameter(layer) and (reason := refuse_module(layer)):
        return reason
    # Asked here for compiled models, which do not ask at each call. Where the operations could not be tried, calls ask
    # again.
    where = next((p.device for p in layer.parameters() if p.device.type in DEVICE_TYPES), None)
    return None if where is None else selftest.lasting_fault("cpu" if where.type == "cpu" else where)


def _set_class(layer: nn.Module, cls: Any) -> None:
    old: Any = type(layer)
    layer.__class__ = cls
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
    def _replace_module(self: Any, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        original(self, parent, child_name, new_module, child)
        backend, state = self.__dict__.get(_MARK) or self.model.__dict__.get(_MARK), None
        if backend is None and _everywhere is not None:
            backend, state = _everywhere
        if backend in ("auto", "tsugi"):
            _swap_new_layer(getattr(parent, child_name), child_name, backend, state)

    _replace_module.__dict__["_tsugi_original"] = original
    return _replace_module


def _swap_new_layer(layer: nn.Module, name: str, backend: str, state: _State | None) -> None:
    from peft.tuners.lora import LoraLayer

    if not isinstance(layer, LoraLayer):
        return
    reason = _unsupported(layer, inside_attention=False)
    if reason is None:
        _swap(layer, state or _State(strict=backend == "tsugi"))
    elif backend == "tsugi":
        raise RuntimeError(f'use_backend(model, "tsugi"): the new layer {name!r} cannot be accelerated: {reason}')
    elif reason not in _warned:
        _warned.add(reason)
        warn_user(f"tsugi_kpool leaves LoRA layers to PEFT: {reason} (first: {name!r})")


# ---- what the report sees ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _TunerLayer:
    """One of PEFT's layers in a model."""

    name: str
    module: nn.Module
    is_lora: bool
    inside_attention: bool  # the unused output projection of a lora.MultiheadAttention


def _tuner_layers(model: nn.Module) -> list[_TunerLayer]:
    from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside = set()
    found = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            if isinstance(module, MultiheadAttention):
                inside.add(getattr(module.get_base_layer(), "out_proj", None))
            found.append(_TunerLayer(name, module, isinstance(module, LoraLayer), module in inside))
    return found


def _look(model: nn.Module) -> list[Seen]:
    return [Seen(_describe(layer), layer.is_lora, layer.module.__dict__.get(_STATE)) for layer in _tuner_layers(model)]


def _describe(layer: _TunerLayer) -> LayerReport:
    module: Any = layer.module
    r = getattr(module, "r", {}) if layer.is_lora else {}
    active = [a for a in module.active_adapters if a in r]
    op, reason = _expect(layer)
    return LayerReport(
        name=layer.name,
        kind=_short_name(module),
        parameter=getattr(module, "parameter_name", None),
        in_features=getattr(module, "in_features", None),
        out_features=getattr(module, "out_features", None),
        adapters=len(r),
        active=len(active),
        ranks=tuple(r[a] for a in active or r),
        op=op,
        reason=reason,
    )


def _short_name(layer: nn.Module) -> str:
    """PEFT's class with its method, e.g. lora.Linear."""
    cls = _peft_class(layer)
    return f"{cls.__module__.removeprefix('peft.tuners.').partition('.')[0]}.{cls.__name__}"


def _expect(layer: _TunerLayer) -> tuple[str | None, str]:
    """The op that a call of this layer will run, or None, and the reason."""
    module = layer.module
    if not layer.is_lora:
        return None, "not LoRA"
    reason = _unsupported(module, layer.inside_attention)
    if reason is not None:
        return None, reason
    if _STATE not in module.__dict__:
        return None, ""
    plan = _read(module)
    if isinstance(plan, str) and plan not in IDLE:
        return None, plan
    if _adapts_parameter(module):
        return "lora_experts", plan if isinstance(plan, str) else ""
    if isinstance(plan, DoraPlan):
        return f"{'lora_linear' if plan.dense else 'lora_delta'} (DoRA)", ""
    base: Any = module._modules[_kind(module).base]
    op = "lora_linear" if is_dense(base) else "lora_delta"
    return op, plan if isinstance(plan, str) else ""


# ---- the entry ---------------------------------------------------------------------------------------------------


def use_backend(model: nn.Module | None = None, backend: Literal["auto", "tsugi", "peft"] = "auto") -> BackendReport:
    """Run the LoRA layers of a PEFT model on ``torch.ops.tsugi``, or give them back to PEFT.

    Args:
        model: any module with PEFT LoRA layers in it. LoRA layers and adapters that PEFT adds to it later are covered
            too. Where it has none yet, a warning says so: usually ``get_peft_model`` should have come first. Without a
            model, every LoRA layer that PEFT creates from now on in this process, in whatever model that was not named.
        backend: ``"auto"`` accelerates what it can, warns once for each reason and leaves the rest to PEFT.
            ``"tsugi"`` raises RuntimeError with a sentence that names the LoRA layers that cannot be accelerated, now or
            at a later call, and changes nothing in that case. ``"peft"`` undoes it. Layers of PEFT that are not LoRA
            (IA3, trained tokens, ...) are left as they are by all three, without a warning.

    Returns:
        A report; print it. It is also a context manager: ``with use_backend(model): ...`` puts the model back on exit
        to what it was before the call.

    Raises:
        ValueError: for another ``backend``.
        TypeError: where ``model`` is not a ``torch.nn.Module``.
        RuntimeError: with ``"tsugi"``, as above.

    The layers compute what PEFT's do with the same adapters active, to rounding; with dropout, from a mask of the same
    rate that torch's own generator seeds. Saved models and checkpoints are unaffected: they hold PEFT's classes.
    """
    if backend not in BACKENDS:
        raise ValueError(f"use_backend: backend is {backend!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    if model is None:
        return _use_everywhere(backend)
    if not isinstance(model, nn.Module):
        hint = f"; write use_backend(model, {model!r})" if model in BACKENDS else ""
        raise TypeError(f"use_backend: model is a {type(model).__name__}, expected a torch.nn.Module{hint}")

    tuner_layers = _tuner_layers(model)
    layers = [layer for layer in tuner_layers if layer.is_lora]
    undo = _undoing(model, [layer.module for layer in layers])
    if backend == "peft":
        for layer in layers:
            _restore(layer.module)
        # "peft" is worth keeping only where it has something to say no to.
        _set_mark(model, "peft" if _everywhere is not None else None)
        return BackendReport(model, backend, _look, undo)

    _watch_new_layers()
    unsupported: dict[str, list[str]] = {}
    accelerated = []
    for layer in layers:
        reason = _unsupported(layer.module, layer.inside_attention)
        if reason is None and backend == "tsugi":
            plan = _read(layer.module)
            reason = plan if isinstance(plan, str) and plan not in IDLE else None
        if reason is None:
            accelerated.append(layer.module)
        else:
            unsupported.setdefault(reason, []).append(layer.name)
    sentences = [f"{reason} ({len(names)}, first {names[0]!r})" for reason, names in unsupported.items()]
    if backend == "tsugi" and unsupported:
        raise RuntimeError(
            f'use_backend(model, "tsugi") cannot accelerate {len(layers) - len(accelerated)} of {len(layers)} layers: '
            + "; ".join(sentences)
        )
    for module in accelerated:
        state = module.__dict__.get(_STATE)
        if state is None or state.shared:
            state = _State(strict=False)
        state.strict = backend == "tsugi"
        _swap(module, state)
    _set_mark(model, backend)
    if not layers:
        warn_user(_no_lora_yet(model, tuner_layers))
    for sentence in sentences:
        warn_user(f"tsugi_kpool leaves LoRA layers to PEFT: {sentence}")
    _warned.update(unsupported)
    return BackendReport(model, backend, _look, undo)


def _undoing(model: nn.Module, layers: list[nn.Module]) -> Callable[[], None]:
    """A function that puts the model's layers back to what they are now."""
    reference, mark_before = weakref.ref(model), _get_mark(model)
    before: weakref.WeakKeyDictionary[nn.Module, tuple[_State, bool]] = weakref.WeakKeyDictionary()
    for layer in layers:
        if _STATE in layer.__dict__:
            before[layer] = layer.__dict__[_STATE], layer.__dict__[_STATE].strict

    def undo() -> None:
        model = reference()
        if model is None:
            return
        for layer in _tuner_layers(model):
            if layer.module in before:
                state, strict = before[layer.module]
                state.strict = strict
                _swap(layer.module, state)
            else:
                _restore(layer.module)
        _set_mark(model, mark_before)

    return undo


def _no_lora_yet(model: nn.Module, others: list[_TunerLayer]) -> str:
    """The warning about a model without LoRA layers; ``others`` are those that PEFT did put into it."""
    sentence = (
        f"use_backend: this {type(model).__name__} has no LoRA layer, so there is nothing to accelerate. Call use_backend "
        "after get_peft_model(model, LoraConfig(...)). LoRA layers that PEFT adds to this model later will be covered."
    )
    kinds = Counter(_short_name(layer.module) for layer in others)
    if kinds:
        sentence += (
            f" What PEFT has put into it is not LoRA: {', '.join(f'{n} x {kind}' for kind, n in kinds.items())}."
        )
    return sentence


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
            warn_user(f"tsugi_kpool leaves all LoRA layers to PEFT: {ops.unavailable_reason}")
        _watch_new_layers()
        _everywhere, before = (backend, _State(strict=backend == "tsugi", shared=True)), _everywhere
    state = _State(strict=False, shared=True) if _everywhere is None else _everywhere[1]

    def undo() -> None:
        global _everywhere
        for layer in list(_everywhere_layers):
            if layer.__dict__.get(_STATE) is state:
                _restore(layer)
        _everywhere = before

    return BackendReport(None, backend, _look, undo, state)
