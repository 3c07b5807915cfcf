"""``export``: writes a pool as ordinary LoRA, for everything that loads LoRA and knows nothing of pools.

The exported function is that of ``whole_pool``: all N adapters, each scaled by K / N,

    y = W x + sum over i of f_i B_i A_i x,    f_i = s_i K / N.

``concat`` puts the adapters side by side: A = [A_1; ...; A_N], B = [B_1 ... B_N], rank N r, the same function. ``svd``
keeps the r largest singular values of the sum, which is the closest there is of that rank in the Frobenius norm (Eckart,
Young, 1936). The sum is never formed: with Q_A R_A = A^T and Q_B R_B = B, its singular values are those of R_B R_A^T.

What a checkpoint holds beside A and B (trained biases, modules and tokens, resized embeddings) is taken from PEFT's own
``get_peft_model_state_dict`` and goes along as it is. The configuration is written anew (:mod:`.export_config`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from ..distributed.wrapping import unwrap
from . import watch
from .config import KPoolLoraConfig
from .export_config import check_fields, commonest_scaling, plain_config
from .members import Members, find_members, find_tuner
from .registry import find_pool
from .targets import adapted_parameter

__all__ = ["Exported", "export"]

MODES = ("concat", "svd", "per_adapter")
PREFIX = "base_model.model."  # of every name in a PEFT checkpoint


@dataclass
class Exported:
    """Adapters as PEFT stores them: for each a configuration and its tensors, which are copies."""

    mode: str
    configs: dict[str, LoraConfig] = field(repr=False)
    tensors: dict[str, dict[str, Tensor]] = field(repr=False)
    #: The part of the squared singular values that was kept, of all layers together; 1 but for ``svd``.
    energy: float = 1.0
    #: The same of each layer.
    layer_energy: dict[str, float] = field(default_factory=dict, repr=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what ``PeftModel.from_pretrained`` reads: into ``folder``, or a folder an adapter in it."""
        for name, config in self.configs.items():
            target = Path(folder) / name if len(self.configs) > 1 or self.mode == "per_adapter" else Path(folder)
            target.mkdir(parents=True, exist_ok=True)
            tensors = {key: value.contiguous().cpu() for key, value in self.tensors[name].items()}
            save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(target)


def export(
    model: nn.Module,
    folder: str | Path | None = None,
    *,
    mode: str = "concat",
    r: int | None = None,
    config: KPoolLoraConfig | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    trained_unattached: bool = False,
) -> Exported:
    """Turn a pool into ordinary LoRA that stock PEFT, vLLM and others load.

    Args:
        model: a model with a pool, attached or not; it stays as it is.
        folder: where to write it; None writes nothing.
        mode: ``"concat"``, one adapter of rank N r, the whole pool exactly. ``"svd"``, one adapter of rank ``r``, as
            close as that rank allows; ``energy`` says how close. ``"per_adapter"``, N adapters of rank r as they are,
            each with its own scaling, one folder each.
        r: rank of ``"svd"``; None for the pool's r.
        config: for K and N of a pool that was built by hand.
        save_embedding_layers: as in PEFT's ``save_pretrained``: whether the base's embeddings go along. ``"auto"`` does
            so where they are adapted, or have another size than in the base model's own files.
        trained_unattached: True exports a pool that an optimizer moved while it was not attached.

    Returns:
        The configurations and tensors, and the energy that was kept.

    Raises:
        RuntimeError: the pool was trained without ``attach``, and ``trained_unattached`` is not set.
        ValueError: an argument is wrong, there is no pool, or no LoRA equals the pool (DoRA and other variants,
            biases of adapters); the sentence names the field or the layer.
    """
    if mode not in MODES:
        raise ValueError(f"export: mode is {mode!r}, expected one of {', '.join(map(repr, MODES))}")
    if r is not None and (mode != "svd" or isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ValueError(f"export: r is {r!r} with mode {mode!r}; it is the rank, at least 1, of mode 'svd'")
    if save_embedding_layers not in (True, False, "auto"):
        raise ValueError(f"export: save_embedding_layers is {save_embedding_layers!r}, expected True, False or 'auto'")
    inner = unwrap(model)
    if not trained_unattached and watch.trained_unattached(find_tuner(inner)):
        raise RuntimeError(f"export: {watch.UNATTACHED}. Pass trained_unattached=True if that is meant")
    source = _Source.of(model, config)
    with torch.no_grad(), watch.exporting(inner):
        if mode == "per_adapter":
            result = _per_adapter(source, save_embedding_layers)
        elif mode == "concat":
            result = _concat(source, save_embedding_layers)
        else:
            result = _svd(source, source.configs[0].r if r is None else r, save_embedding_layers)
    if folder is not None:
        result.save_pretrained(folder)
    return result


# ---- what is exported ------------------------------------------------------------------------------------------------


@dataclass
class _Adapter:
    """One adapter of one layer. A: [r, in], B: [out, r], for convolutions with the kernel's dimensions behind.

    Of a parameter of E experts they are [E r, in] with the expert slowest, and [out, r E] with the expert fastest.
    """

    key_a: str
    key_b: str
    A: Tensor
    B: Tensor
    scaling: float  # its own, without K / N


@dataclass
class _Source:
    """A pool, checked and looked up: nothing below asks the model again."""

    model: nn.Module
    pool: str | None  # its name in PEFT; None for one that was built by hand
    members: Members
    configs: list[LoraConfig]  # of a pool one, of a pool by hand one an adapter
    share: float  # K / N
    layers: dict[str, LoraLayer]  # by the name a checkpoint has for them
    adapters: dict[str, dict[str, _Adapter]]  # by layer, then by member
    state: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, config: KPoolLoraConfig | None) -> _Source:
        inner = _peft_model(unwrap(model))
        tuner = find_tuner(inner)
        if tuner is None:
            config = config or _config_by_hand(model)
        else:
            config = tuner.peft_config[tuner.active_pool]
        members = find_members(inner, config.n_adapters)
        configs = [config] if tuner is not None else _configs_by_hand(inner, members)
        for each in configs:
            check_fields(each)
        share = config.k_active / config.n_adapters
        names = {module: name for name, module in inner.named_modules()}
        layers = {_path(names[layer]): layer for layer in members.layers}
        state = _state_dict(inner)
        applied = share if members.whole else 1.0  # what the scalings contain of K / N already
        adapters = {
            path: _adapters(path, names[layer], layer, members, state, applied) for path, layer in layers.items()
        }
        pool = None if tuner is None else tuner.active_pool
        return cls(inner, pool, members, configs, share, layers, adapters, state)

    def rest(self, save_embedding_layers: bool | str, member: str | None = None) -> dict[str, Tensor]:
        """Copies of what PEFT's checkpoint holds beside A and B; of a pool by hand, of one member's checkpoint or all."""
        owners = [self.pool] if self.pool is not None else [member] if member else list(self.members.names)
        found: dict[str, Tensor] = {}
        for owner in owners:
            found |= peft.get_peft_model_state_dict(
                self.model, state_dict=self.state, adapter_name=owner, save_embedding_layers=save_embedding_layers
            )
        found = {_key(name): tensor for name, tensor in found.items()}
        lora = tuple(f"{PREFIX}{path}.lora_" for path in self.layers)
        return {name: _copy(name, tensor) for name, tensor in found.items() if not name.startswith(lora)}

    def plain_config(self, config: LoraConfig, r: dict[str, int], scaling: float) -> LoraConfig:
        names = {_path(name) for name in _names_without_adapters(self.model)}
        parameters = {
            path: name for path, layer in self.layers.items() if (name := adapted_parameter(path, layer)) is not None
        }
        return plain_config(config, r, scaling, self.model, names, parameters)


def _peft_model(model: nn.Module) -> nn.Module:
    """PEFT's model in a module of the user's own; or the model itself, where PEFT put adapters in without wrapping it."""
    return next((module for module in model.modules() if isinstance(module, peft.PeftModel)), model)


def _names_without_adapters(module: nn.Module, name: str = "") -> Iterator[str]:
    """The names of all modules but those inside of adapters, of which there may be very many."""
    yield name
    for child_name, child in module.named_children():
        if not (isinstance(module, LoraLayer) and child_name != "base_layer"):
            yield from _names_without_adapters(child, f"{name}.{child_name}" if name else child_name)


def _config_by_hand(model: nn.Module) -> KPoolLoraConfig:
    pool = find_pool(model)
    if pool is None:
        raise ValueError(
            "export: this model has no KPoolLoraConfig; build it with get_peft_model(base, KPoolLoraConfig(...)). Of a pool "
            "that was built by hand pass config=, or attach(model, config=...)"
        )
    return pool.config


def _configs_by_hand(model: nn.Module, members: Members) -> list[LoraConfig]:
    known: dict[str, LoraConfig] = next(
        (module.__dict__["peft_config"] for module in model.modules() if "peft_config" in module.__dict__), {}
    )
    missing = [name for name in members.names if name not in known]
    if missing:
        raise ValueError(
            f"export: the model's peft_config has no {missing[0]!r}, only {list(known)}: build the pool with PEFT"
        )
    return [known[name] for name in members.names]


_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def _path(name: str) -> str:
    """A module's name in the base model, from its name in this one."""
    name = _WRAPPERS.sub("", name)
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else name


def _key(name: str) -> str:
    """A tensor's name in a PEFT checkpoint."""
    return PREFIX + _path(name)


def _state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors; those that accelerate moved off the device, from where it keeps them."""
    state = model.state_dict()
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        state = state | get_state_dict_offloaded_model(model)
    return state


def _copy(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise ValueError(
            f"export: {name} has no values (it is on the meta device): load or materialise the model first"
        )
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _adapters(
    path: str, name: str, layer: LoraLayer, members: Members, state: dict[str, Tensor], applied: float
) -> dict[str, _Adapter]:
    """A layer's adapters, after checking that each is plain LoRA."""
    if layer.merged:
        raise ValueError(f"export: {path} is merged; unmerge it first")
    found = {}
    for member in members.names:
        if member in layer.lora_A:
            keys, suffix = ("lora_A.weight", "lora_B.weight"), f"{member}.weight"
        elif member in layer.lora_embedding_A:
            keys, suffix = ("lora_embedding_A", "lora_embedding_B"), member
        else:
            continue
        if member in layer.lora_variant:
            variant = type(layer.lora_variant[member]).__name__
            raise ValueError(f"export: {path} has the variant {variant}, not plain LoRA")
        key_a, key_b = keys
        stems = (key_a.removesuffix(".weight"), key_b.removesuffix(".weight"))
        A, B = (state[f"{name}.{stem}.{suffix}"].detach() for stem in stems)
        if A.is_meta or B.is_meta:
            raise ValueError(f"export: the adapter {member} of {path} has no values (meta device): load it first")
        found[member] = _Adapter(key_a, key_b, A, B, layer.scaling[member] / applied)
    return found


# ---- the three modes -------------------------------------------------------------------------------------------------


def _folded(B: Tensor, factor: float) -> Tensor:
    """B times the factor. 16 bits would round the product, so it is kept in 32."""
    if factor == 1.0:
        return B.clone()
    return (B.float() if B.dtype in (torch.float16, torch.bfloat16) else B) * factor


def _experts(layer: LoraLayer) -> int:
    """How many matrices A and B hold."""
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1


def _side_by_side(layer: LoraLayer, adapters: list[_Adapter], factors: list[float]) -> tuple[Tensor, Tensor]:
    """A and B of all adapters as one, B_i times its factor.

    A grouped convolution has r / groups rows of each A_i a group: the first group's rows of all adapters come first. A
    parameter of experts has r rows of each A_i an expert.
    """
    groups = _experts(layer) if isinstance(layer, ParamWrapper) else getattr(layer.get_base_layer(), "groups", 1)
    A = torch.cat([a.A.unflatten(0, (groups, -1)) for a in adapters], dim=1).flatten(0, 1)
    scaled = [_folded(a.B, factor) for a, factor in zip(adapters, factors)]
    widest = max(scaled, key=lambda B: B.element_size()).dtype
    return A, torch.cat([B.to(widest) for B in scaled], dim=1)


def _concat(source: _Source, save_embedding_layers: bool | str) -> Exported:
    _check_shared(source, "concat")
    tensors, r = source.rest(save_embedding_layers), {}
    # One scaling for all layers, the rest of each adapter's in its B: other consumers read no alpha_pattern.
    scaling = commonest_scaling(a.scaling * source.share for layer in source.adapters.values() for a in layer.values())
    for path, adapters in source.adapters.items():
        own = list(adapters.values())
        A, B = _side_by_side(source.layers[path], own, [a.scaling * source.share / scaling for a in own])
        tensors[f"{PREFIX}{path}.{own[0].key_a}"], tensors[f"{PREFIX}{path}.{own[0].key_b}"] = A, B
        r[path] = A.shape[0] // _experts(source.layers[path])
    return Exported("concat", {"default": source.plain_config(source.configs[0], r, scaling)}, {"default": tensors})


def _svd(source: _Source, most: int, save_embedding_layers: bool | str) -> Exported:
    _check_shared(source, "svd")
    tensors, r = source.rest(save_embedding_layers), {}
    kept, total = {}, {}
    for path, adapters in source.adapters.items():
        layer, own = source.layers[path], list(adapters.values())
        if not isinstance(layer, ParamWrapper) and getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise ValueError(
                f"export: {path} is a convolution with groups, which mode 'svd' does not compress; use mode='concat'"
            )
        A, B = _side_by_side(layer, own, [a.scaling * source.share for a in own])
        # A convolution of A's kernel and one of B's single point are the product of the flattened matrices.
        experts = _experts(layer)
        q_a, r_a = torch.linalg.qr(A.double().flatten(1).unflatten(0, (experts, -1)).mT)
        q_b, r_b = torch.linalg.qr(B.double().flatten(1).unflatten(1, (-1, experts)).permute(2, 0, 1))
        u, s, vh = torch.linalg.svd(r_b @ r_a.mT)
        rank = min(most, s.shape[1])
        root = s[:, :rank].sqrt()
        new_a = (root[:, :, None] * (vh[:, :rank] @ q_a.mT)).reshape(experts * rank, *A.shape[1:])
        new_b = (q_b @ u[:, :, :rank]) * root[:, None]
        new_b = new_b.permute(1, 2, 0).reshape(B.shape[0], rank * experts, *B.shape[2:])
        tensors[f"{PREFIX}{path}.{own[0].key_a}"] = new_a.to(own[0].A.dtype)
        tensors[f"{PREFIX}{path}.{own[0].key_b}"] = new_b.to(own[0].B.dtype)
        r[path] = rank
        kept[path], total[path] = s[:, :rank].square().sum().item(), s.square().sum().item()
    whole = sum(total.values())
    return Exported(
        "svd",
        {"default": source.plain_config(source.configs[0], r, 1.0)},
        {"default": tensors},
        sum(kept.values()) / whole if whole else 1.0,
        {path: kept[path] / total[path] if total[path] else 1.0 for path in kept},
    )


def _per_adapter(source: _Source, save_embedding_layers: bool | str) -> Exported:
    _check_shared(source, "per_adapter")
    shared = source.rest(save_embedding_layers) if source.pool is not None else {}
    configs, tensors = {}, {}
    for i, member in enumerate(source.members.names):
        own = {path: adapters[member] for path, adapters in source.adapters.items() if member in adapters}
        scaling = commonest_scaling(a.scaling for a in own.values())
        folder = f"adapter_{i}"
        tensors[folder] = source.rest(save_embedding_layers, member) if source.pool is None else dict(shared)
        for path, a in own.items():
            tensors[folder][f"{PREFIX}{path}.{a.key_a}"] = a.A.clone()
            tensors[folder][f"{PREFIX}{path}.{a.key_b}"] = _folded(a.B, a.scaling / scaling)
        config = source.configs[i if source.pool is None else 0]
        configs[folder] = source.plain_config(
            config, {path: a.A.shape[0] // _experts(source.layers[path]) for path, a in own.items()}, scaling
        )
    return Exported("per_adapter", configs, tensors)


def _check_shared(source: _Source, mode: str) -> None:
    """What is not one adapter's own in a pool by hand cannot be put into one, nor what is one's own into all."""
    other = "concat" if mode == "per_adapter" else "per_adapter"
    for member, config in zip(source.members.names, source.configs if source.pool is None else []):
        for name in ("bias",) if mode == "per_adapter" else ("modules_to_save", "trainable_token_indices"):
            value = getattr(config, name, None)
            if value and value != "none":
                whose = "trains the base's, which all share" if name == "bias" else "is its own"
                raise ValueError(
                    f"export: {name} of {member!r} is {value!r}; in a pool built by hand that {whose}, so mode {mode!r} "
                    f"would lose it: use mode={other!r}"
                )
