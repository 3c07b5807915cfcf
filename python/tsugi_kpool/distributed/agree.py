"""What must be the same on all ranks when a pool is attached: how it is found, compared, and, for adapters, made the same.

Nothing is listed by hand that can be read from the objects themselves: all fields of the configuration, all entries of the
optimizer's parameter groups, all modules, parameters and buffers of the model. What ranks may have each for themselves is
listed, with the reason.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from .. import ops
from ..warn import warn_user
from .fingerprint import adapter_fingerprint, fingerprint
from .ranks import Ranks
from .wrapping import FSDP1

__all__ = ["Facts", "check_parameters", "compare", "facts_of", "refused_by_none"]

#: Fields of the configuration that ranks may have each for themselves.
LOCAL_FIELDS = {
    # Folders, files and addresses of this host.
    "diagnostics_dir",
    "sideband_addr",
    "sideband_peers",
    "sideband_psk_file",
    # Where the model came from; its parameters are compared instead.
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    # Of how PEFT loads and saves: nothing that is computed depends on it.
    "inference_mode",
    "runtime_config",
}
#: Entries of a parameter group that do not change the result of a step. ``fused`` does, in the last bits.
LOCAL_GROUP_ENTRIES = {"params", "foreach"}
#: Attributes of a LoRA layer that do not change what it computes.
LOCAL_LAYER_ATTRIBUTES = {"training", "ephemeral_gpu_offload"}
#: Entries of a transformers configuration that do not change what a forward pass with labels computes.
LOCAL_MODEL_ENTRIES = {"transformers_version", "use_cache", "name_or_path"}
#: Statistics of the data a rank has seen: each rank's own once it has trained, as under DistributedDataParallel without
#: ``broadcast_buffers``.
RUNNING_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}

_SHOWN = 6  # differences that are written out
_WIDTH = 120  # characters of one value
_ABSENT = "nothing"


@dataclass
class Facts:
    """What one rank has: in each part name -> value, as text that is the same wherever the value is."""

    settings: dict[str, str] = field(default_factory=dict)
    model: dict[str, str] = field(default_factory=dict)
    optimizer_state: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    """Of each adapter the bits of its parameters: the one part that is made the same where it differs."""
    remarks: dict[str, str] = field(default_factory=dict)
    """What is worth a warning where it differs, and no error."""


_ADVICE = {
    "settings": "give every rank the same settings",
    "model": "load the same checkpoint on every rank, and call torch.manual_seed before anything of it is drawn at random",
    "optimizer_state": "load the same optimizer state on every rank, or on none",
}


def facts_of(
    adapters: Sequence[Sequence[nn.Parameter]],
    config: Any,
    *,
    model: nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    settings: Mapping[str, Any],
) -> Facts:
    """This rank's facts.

    Args:
        adapters: the parameters of each adapter.
        config: a dataclass, or any object with attributes.
        model: the model around the adapters; None compares the adapters alone.
        optimizer: what steps the adapters, as far as it is known.
        settings: more that must be the same, by name.
    """
    from .._version import __version__

    facts = Facts(settings={"the version of tsugi-kpool": __version__})
    # In this order they are named: what a user wrote before what follows from it.
    facts.settings |= {name: plain(value) for name, value in _fields(config) if name not in LOCAL_FIELDS}
    facts.settings |= _optimizer_settings(optimizer)
    facts.settings |= {name: plain(value) for name, value in settings.items()}
    facts.remarks["the version of torch"] = torch.__version__
    names = _names(adapters, model)
    groups = _groups(optimizer)
    for i, parameters in enumerate(adapters):
        for p in parameters:
            where = "" if optimizer is None else f", group {groups.get(id(p))} of the optimizer"
            facts.model[f"parameter {names[id(p)]}"] = _layout(p) + where
        facts.adapters[f"adapter {i}"] = _hex(adapter_fingerprint(parameters))
    if optimizer is not None and getattr(config, "hold_action", "defer") != "local":  # there it is each rank's own
        facts.optimizer_state |= _optimizer_state(optimizer, adapters, names)
    if model is not None:
        _add_model(facts, model, {id(p) for parameters in adapters for p in parameters})
    return facts


def refused_by_none(ranks: Ranks, look: Callable[[], Facts | None]) -> Facts | None:
    """What ``look`` returns; where it raises on this rank the others are told, where it does on another this one raises.

    Raises:
        ValueError: another rank refused its arguments.
        SyncError: a rank did not take part within the time limit.
    """
    try:
        facts = look()
    except Exception as error:
        ranks.gather_objects("compare ranks", f"{type(error).__name__}: {error}")
        raise
    everyone = zip(ranks.names, ranks.gather_objects("compare ranks", None))
    refused = {name: said for name, said in everyone if said is not None}
    if refused:
        first, said = next(iter(refused.items()))
        raise ValueError(f"{named(list(refused))} could not attach. Rank {first}: {said}")
    return facts


def compare(ranks: Ranks, facts: Facts, adapters: Sequence[Sequence[nn.Parameter]]) -> None:
    """Make sure that all ranks have the same; where only parameters of adapters differ, copy the lowest rank's.

    Raises:
        ValueError: on every rank, naming what differs, the ranks and their values.
        SyncError: a rank did not take part within the time limit.
    """
    parts = [part.name for part in dataclasses.fields(Facts)]
    digest = {name: _digest(getattr(facts, name)) for name in parts}
    digests = ranks.gather_objects("compare ranks", digest)
    apart = [name for name in parts if any(each[name] != digests[0][name] for each in digests)]
    if not apart:
        return
    everyone = ranks.gather_objects("compare ranks", {name: getattr(facts, name) for name in apart})
    differences = {name: _differences([each[name] for each in everyone], ranks.names) for name in apart}
    remarks, moved = differences.pop("remarks", {}), differences.pop("adapters", {})
    if any(differences.values()):
        raise ValueError(_sentence(differences))
    if ranks.rank == 0:
        for name, who in remarks.items():
            warn_user(f"the ranks differ in {name}: {who}; see whether that is meant")
    if moved:
        if ranks.rank == 0:
            warn_user(_copied(len(moved), len(adapters), ranks.names[0]))
        copy_from_lowest(ranks, [adapters[int(name.split()[1])] for name in moved])


@torch.no_grad()
def copy_from_lowest(ranks: Ranks, adapters: Sequence[Sequence[nn.Parameter]]) -> None:
    """Give these adapters the parameters that the lowest rank has; one message an adapter and dtype."""
    for parameters in adapters:
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            alike = [p for p in parameters if p.dtype == dtype]
            flat = torch.cat([p.detach().flatten() for p in alike])
            ranks.broadcast("copy the adapters", [flat.view(torch.uint8)])
            for p, part in zip(alike, flat.split([p.numel() for p in alike])):
                p.copy_(part.view(p.shape))


def _digest(part: Mapping[str, str]) -> bytes:
    return hashlib.blake2b(repr(sorted(part.items())).encode(), digest_size=16).digest()


def check_parameters(adapters: Sequence[Sequence[nn.Parameter]], optimizer: torch.optim.Optimizer | None) -> None:
    """Raise for adapters that cannot be exchanged, on this rank alone."""
    if not ops.available():
        raise RuntimeError(ops.unavailable_reason)
    if not adapters:
        raise ValueError("adapters is empty: there is nothing to exchange")
    known = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    seen: set[int] = set()
    for i, params in enumerate(adapters):
        if not params:
            raise ValueError(f"adapters[{i}] has no parameters")
        devices = {p.device for p in params}
        if len(devices) > 1:
            raise ValueError(f"adapters[{i}] lies on {sorted(map(str, devices))}; one device an adapter is needed")
        for p in params:
            if getattr(p, "_fsdp_flattened", False):
                raise TypeError(FSDP1)
            if type(p.data).__name__ == "DTensor":
                raise TypeError(
                    f"adapters[{i}] is sharded: call fully_shard(..., ignored_params=the adapters' parameters), so that "
                    "adapters stay whole on every rank"
                )
            if not p.is_floating_point():
                raise TypeError(f"adapters[{i}] has a parameter of {p.dtype}, not a floating point one")
            if id(p) in seen:
                raise ValueError(f"adapters[{i}] has a parameter that it, or another adapter, has already")
            seen.add(id(p))
            if known is not None and id(p) not in known:
                raise ValueError(
                    f"adapters[{i}] has parameters that the optimizer does not hold: build it from all adapters' parameters, "
                    "the inactive ones' too"
                )


# ---- reading ---------------------------------------------------------------------------------------------------------


def plain(value: Any) -> str:
    """Text that is the same in every process for values that mean the same."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Tensor):
        return plain(value.tolist()) if value.numel() <= 16 else _hex(fingerprint(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{plain(k)}: {plain(v)}" for k, v in value.items())) + "}"
    if isinstance(value, (set, frozenset)):  # their order differs from process to process
        return "{" + ", ".join(sorted(map(plain, value))) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(plain, value)) + "]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dict(_fields(value)))
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype)):
        return repr(value)
    name = getattr(value, "__qualname__", None)
    return f"{type(value).__qualname__} {name}" if name else _without_addresses(repr(value))


def _fields(config: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(config):
        return [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    return [(name, value) for name, value in vars(config).items() if not name.startswith("_")]


def _without_addresses(text: str) -> str:
    """Without what differs from rank to rank by nature: addresses in memory, and numbers of devices."""
    return re.sub(r"\b(cuda|xpu|npu|hpu):\d+", r"\1", re.sub(r"0x[0-9a-f]{6,}", "0x", text))


def _hex(value: Tensor) -> str:
    return f"{int(value) % 2**64:016x}"


def _layout(tensor: Tensor) -> str:
    frozen = "requires grad" if tensor.requires_grad else "frozen"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device.type}, {frozen}"


def _names(adapters: Sequence[Sequence[nn.Parameter]], model: nn.Module | None) -> dict[int, str]:
    names = {id(p): f"{k} of adapter {i}" for i, parameters in enumerate(adapters) for k, p in enumerate(parameters)}
    if model is not None:
        names |= {id(p): name for name, p in model.named_parameters()}
    return names


def _groups(optimizer: torch.optim.Optimizer | None) -> dict[int, int]:
    groups = [] if optimizer is None else optimizer.param_groups
    return {id(p): number for number, group in enumerate(groups) for p in group["params"]}


def _optimizer_settings(optimizer: torch.optim.Optimizer | None) -> dict[str, str]:
    if optimizer is None:
        return {"optimizer": "none"}
    settings = {"optimizer": type(optimizer).__qualname__, "parameter groups": str(len(optimizer.param_groups))}
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name not in LOCAL_GROUP_ENTRIES:
                settings[f"{name} of the optimizer's group {number}"] = plain(value)
    return settings


def _optimizer_state(
    optimizer: torch.optim.Optimizer, adapters: Iterable[Iterable[nn.Parameter]], names: Mapping[int, str]
) -> dict[str, str]:
    state = {}
    for parameters in adapters:
        for p in parameters:
            for key, value in optimizer.state.get(p, {}).items():
                bits = _bits(value) if isinstance(value, Tensor) else plain(value)
                state[f"the optimizer's {key} of {names[id(p)]}"] = bits
    return state


def _add_model(facts: Facts, model: nn.Module, adapters: set[int]) -> None:
    seen: set[int] = set()
    for name, module in model.named_modules():
        facts.model[f"module {name or '(the model)'}"] = _module(module)
        if isinstance(module, BaseTunerLayer):
            facts.settings |= _layer_settings(name, module)
        config = vars(module).get("config")
        if hasattr(config, "to_dict") and id(config) not in seen:  # of transformers: what modules read when they run
            seen.add(id(config))
            for key, value in config.to_dict().items():
                if key not in LOCAL_MODEL_ENTRIES and not key.startswith("_"):
                    facts.settings[f"{key} of the model's configuration"] = plain(value)
        for key, buffer in module.named_buffers(recurse=False):
            if key in RUNNING_STATISTICS:
                continue
            # A buffer that no checkpoint holds may be a cache that has seen other data.
            part = facts.remarks if key in module._non_persistent_buffers_set else facts.model
            part[f"buffer {name}.{key}".replace(" .", " ")] = f"{_layout(buffer)}: {_bits(buffer)}"
    for name, p in model.named_parameters():
        if id(p) not in adapters:
            facts.model[f"parameter {name}"] = f"{_layout(p)}: {_bits(p)}"


def _module(module: nn.Module) -> str:
    # Whether this package's backend computes a layer is each rank's own choice: PEFT's class is what counts.
    kind = next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("tsugi_kpool."))
    return _without_addresses(f"{kind.__qualname__}({module.extra_repr()})")


def _layer_settings(name: str, layer: nn.Module) -> dict[str, str]:
    """A LoRA layer's scaling, r, alpha and their like, which nothing prints."""
    settings = {}
    for attribute, value in vars(layer).items():
        if attribute.startswith("_") or attribute in LOCAL_LAYER_ATTRIBUTES or not _is_plain(value):
            continue
        entries = value.items() if isinstance(value, Mapping) else [(None, value)]
        for key, entry in entries:
            place = attribute if key is None else f"{attribute}[{key!r}]"
            settings[f"{place} of {name}"] = plain(entry)
    return settings


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _bits(tensor: Any) -> str:
    """The tensor's fingerprint, as far as this rank has its bits.

    A sharded tensor (DTensor) has another part on each rank by design, so only its layout is compared; so it is for a
    tensor without memory (meta), and for layouts that no fingerprint is made of. A quantised weight is compared with the
    tensors that it carries along: its scales.
    """
    if hasattr(tensor, "placements"):
        return f"in parts, {tensor.placements} of {list(tensor.device_mesh.shape)}"
    if isinstance(tensor, UninitializedTensorMixin):
        return "not initialised"
    if tensor.is_meta:
        return "without memory"
    try:
        return " ".join(_hex(fingerprint(part)) for part in _parts(tensor))
    except (RuntimeError, NotImplementedError, TypeError):
        return f"of a {type(tensor).__qualname__} of layout {tensor.layout}, which is not looked into"


def _parts(tensor: Tensor) -> list[Tensor]:
    if hasattr(tensor, "__tensor_flatten__") and type(tensor) not in (Tensor, nn.Parameter):  # torchao and its like
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    if tensor.is_quantized:
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            return [tensor, torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
        return [tensor, tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()]
    extra = [getattr(tensor, "SCB", None)]  # bitsandbytes, 8 bits
    state = getattr(tensor, "quant_state", None)  # and 4 bits
    while state is not None:
        extra += [getattr(state, "absmax", None), getattr(state, "code", None), getattr(state, "offset", None)]
        state = getattr(state, "state2", None)
    return [tensor, *(part for part in extra if isinstance(part, Tensor))]


# ---- saying ----------------------------------------------------------------------------------------------------------


def _differences(everyone: Sequence[Mapping[str, str]], names: Sequence[int]) -> dict[str, str]:
    """name -> who has what, of all that is not the same on all ranks."""
    differences = {}
    for name in dict.fromkeys(name for each in everyone for name in each):
        values = [each.get(name, _ABSENT) for each in everyone]
        if any(value != values[0] for value in values):
            differences[name] = who_has_what(values, names)
    return differences


def who_has_what(values: Sequence[str], names: Sequence[int]) -> str:
    """``rank 0 has 6, rank 1 has 7``; ranks with the same value stand together."""
    holders: dict[str, list[int]] = {}
    for value, name in zip(values, names):
        holders.setdefault(value, []).append(name)
    each = [
        f"{named(ranks)} {'has' if len(ranks) == 1 else 'have'} {_short(value)}" for value, ranks in holders.items()
    ]
    return ", ".join(each[:_SHOWN]) + (f" and {len(each) - _SHOWN} other values" if len(each) > _SHOWN else "")


def named(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0, 1, 2``, ``ranks 0, 1, 2 and 60 more``."""
    shown = ", ".join(map(str, ranks[:_SHOWN]))
    more = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _short(value: str) -> str:
    return value if len(value) <= _WIDTH else f"{value[: _WIDTH - 20]}... ({len(value)} characters, another end)"


def _sentence(differences: Mapping[str, Mapping[str, str]]) -> str:
    differences = {part: names for part, names in differences.items() if names}
    every = [f"{name}: {who}" for part in differences.values() for name, who in part.items()]
    shown = "; ".join(every[:_SHOWN])
    more = f"; and in {len(every) - _SHOWN} things more" if len(every) > _SHOWN else ""
    advice = "; ".join(_ADVICE[name] for name in differences)
    return f"the ranks differ in {shown}{more}. Ranks that differ would train different models: {advice}"


def _copied(moved: int, count: int, lowest: int) -> str:
    return (
        f"{moved} of {count} adapters had other parameters on other ranks than on rank {lowest}, whose parameters were "
        "copied to all. PEFT draws them at random: call torch.manual_seed with one seed on every rank before get_peft_model"
    )
