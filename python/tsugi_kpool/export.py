"""A pool as ordinary LoRA, for everything that loads LoRA and knows nothing of pools.

The exported function is that of ``whole_pool``: all N adapters, each scaled by K / N,

    y = W x + sum over i of f_i B_i A_i x,    f_i = s_i K / N.

``concat`` puts the adapters side by side: A = [A_1; ...; A_N], B = [B_1 ... B_N], rank N r, the same function. ``svd``
keeps the r largest singular values of the sum, which is the closest there is of that rank in the Frobenius norm (Eckart,
Young, 1936). The sum is never formed: with Q_A R_A = A^T and Q_B R_B = B, its singular values are those of R_B R_A^T.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from . import watch
from .config import KPoolLoraConfig
from .pool import Members, find_members, find_tuner, is_whole, unwrap

__all__ = ["Exported", "export"]

MODES = ("concat", "svd", "per_adapter")


@dataclass
class Exported:
    """Adapters as PEFT stores them: for each a configuration and its tensors."""

    mode: str
    configs: dict[str, LoraConfig]
    tensors: dict[str, dict[str, Tensor]]
    #: The part of the squared singular values that was kept, of all layers together; 1 but for ``svd``.
    energy: float = 1.0
    #: The same of each layer.
    layer_energy: dict[str, float] = field(default_factory=dict)

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
        trained_unattached: True exports a pool that an optimizer moved while it was not attached.

    Returns:
        The configurations and tensors, and the energy that was kept.

    Raises:
        RuntimeError: the pool was trained without ``attach``, and ``trained_unattached`` is not set.
        ValueError: an argument is wrong, there is no pool, or the pool is not linear in its adapters (DoRA and other
            variants, biases), so that no LoRA equals it.
    """
    if mode not in MODES:
        raise ValueError(f"export: mode is {mode!r}, expected one of {', '.join(map(repr, MODES))}")
    if r is not None and (mode != "svd" or r < 1):
        raise ValueError(f"export: r is {r!r} with mode {mode!r}; it is the rank, at least 1, of mode 'svd'")
    inner = unwrap(model)
    tuner = find_tuner(inner)
    if not trained_unattached and watch.trained_unattached(tuner):
        raise RuntimeError(f"export: {watch.UNATTACHED}. Pass trained_unattached=True if that is meant")
    watch.warn_of_held(inner, "export")
    if tuner is not None:
        config = tuner.peft_config[tuner.active_pool]
        source = config
    else:
        if config is None:
            from .runtime import find_pool

            pool = find_pool(model)
            if pool is None:
                raise ValueError("export: the pool was built by hand; pass its config=, or attach(model, config=...)")
            config = pool.config
    members = find_members(inner, config.n_adapters)
    if tuner is None:
        source = next(module.peft_config for module in inner.modules() if "peft_config" in module.__dict__)["adapter_0"]
    names = {layer: name for name, layer in inner.named_modules() if isinstance(layer, LoraLayer)}
    layers = {_path(names[layer]): layer for layer in members.layers}
    for path, layer in layers.items():
        _check_linear(path, layer, members)

    extra = _other_tensors(inner, tuner, source)
    plain = _plain_config(source)
    with torch.no_grad():
        if mode == "per_adapter":
            return _write(_each(layers, members, plain, extra), folder)
        factor = 1.0 if is_whole(tuner, members) else config.k_active / config.n_adapters
        if mode == "concat":
            return _write(_concat(layers, members, plain, extra, factor), folder)
        return _write(_svd(layers, members, plain, extra, factor, source.r if r is None else r), folder)


def _write(result: Exported, folder: str | Path | None) -> Exported:
    if folder is not None:
        result.save_pretrained(folder)
    return result


def _path(name: str) -> str:
    """A module's name in the base model."""
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.model.") else name


def _check_linear(path: str, layer: LoraLayer, members: Members) -> None:
    for name in members.names:
        if name in layer.lora_variant:
            raise ValueError(
                f"export: {path} has the variant {type(layer.lora_variant[name]).__name__}, not plain LoRA"
            )
        if layer.lora_bias.get(name):
            raise ValueError(
                f"export: {path} has lora_bias, whose sum over adapters is no LoRA; call merge_and_unload()"
            )
    if layer.merged:
        raise ValueError(f"export: {path} is merged; unmerge it first")


def _other_tensors(model: nn.Module, tuner: nn.Module | None, config: LoraConfig) -> dict[str, Tensor]:
    """What a checkpoint holds beside A and B: modules_to_save, trained biases."""
    if config.bias == "none" and not config.modules_to_save:
        return {}
    if tuner is None:
        raise ValueError("export: bias and modules_to_save of a pool built by hand belong to one adapter each")
    state = get_peft_model_state_dict(model, adapter_name=tuner.active_pool, save_embedding_layers=False)
    return {key: value for key, value in state.items() if ".lora_" not in key}


def _plain_config(source: LoraConfig) -> LoraConfig:
    values = {f.name: getattr(source, f.name) for f in fields(LoraConfig) if f.init and hasattr(source, f.name)}
    values |= {"lora_dropout": 0.0, "use_rslora": False, "init_lora_weights": True, "inference_mode": True}
    values |= {"rank_pattern": {}, "alpha_pattern": {}}
    config = LoraConfig(**copy.deepcopy(values))
    config.base_model_name_or_path = source.base_model_name_or_path
    return config


def _matrices(layer: LoraLayer, name: str) -> tuple[str, str, Tensor, Tensor] | None:
    """(name of A, name of B, A, B) as they are stored; None where the layer has no such adapter."""
    if name in layer.lora_A:
        return "lora_A.weight", "lora_B.weight", layer.lora_A[name].weight, layer.lora_B[name].weight
    if name in layer.lora_embedding_A:
        return "lora_embedding_A", "lora_embedding_B", layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return None


def _stack(layer: LoraLayer, members: Members, factor: float) -> tuple[str, str, Tensor, Tensor, float]:
    """All adapters of a layer side by side, and the one scaling that is left to apply."""
    found = [(name, matrices) for name in members.names if (matrices := _matrices(layer, name)) is not None]
    scalings = [layer.scaling[name] * factor for name, _ in found]
    common = scalings[0] if len(set(scalings)) == 1 else 1.0
    key_a, key_b = found[0][1][:2]
    A = torch.cat([matrices[2] for _, matrices in found])
    B = torch.cat([m[3] if s == common else m[3] * s for (_, m), s in zip(found, scalings)], dim=1)
    return key_a, key_b, A, B, common


def _set_ranks(config: LoraConfig, ranks: dict[str, int], alphas: dict[str, float]) -> None:
    """The commonest rank and alpha as the configuration's own, the others by the layer's name."""
    (config.r, config.lora_alpha), _ = Counter((ranks[path], alphas[path]) for path in ranks).most_common(1)[0]
    config.rank_pattern = {path: rank for path, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}


def _concat(layers, members, config, extra, factor) -> Exported:
    tensors, ranks, alphas = dict(extra), {}, {}
    for path, layer in layers.items():
        key_a, key_b, A, B, scaling = _stack(layer, members, factor)
        tensors[f"base_model.model.{path}.{key_a}"], tensors[f"base_model.model.{path}.{key_b}"] = A, B
        ranks[path], alphas[path] = A.shape[0], scaling * A.shape[0]
    _set_ranks(config, ranks, alphas)
    return Exported("concat", {"default": config}, {"default": tensors})


def _svd(layers, members, config, extra, factor, r) -> Exported:
    tensors, ranks, alphas = dict(extra), {}, {}
    kept, total = {}, {}
    for path, layer in layers.items():
        key_a, key_b, A, B, scaling = _stack(layer, members, factor)
        if A.dim() != 2:
            raise ValueError(f"export: {path} is a convolution, which mode 'svd' does not compress; use 'concat'")
        q_a, r_a = torch.linalg.qr(A.double().t())
        q_b, r_b = torch.linalg.qr(B.double() * scaling)
        u, s, vh = torch.linalg.svd(r_b @ r_a.t())
        rank = min(r, len(s))
        root = s[:rank].sqrt()
        tensors[f"base_model.model.{path}.{key_a}"] = (root[:, None] * (vh[:rank] @ q_a.t())).to(A.dtype)
        tensors[f"base_model.model.{path}.{key_b}"] = ((q_b @ u[:, :rank]) * root).to(B.dtype)
        ranks[path], alphas[path] = rank, float(rank)
        kept[path], total[path] = s[:rank].square().sum().item(), s.square().sum().item()
    _set_ranks(config, ranks, alphas)
    energy = {path: kept[path] / total[path] if total[path] else 1.0 for path in kept}
    whole = sum(total.values())
    return Exported(
        "svd", {"default": config}, {"default": tensors}, sum(kept.values()) / whole if whole else 1.0, energy
    )


def _each(layers, members, config, extra) -> Exported:
    configs, tensors = {}, {}
    for i, name in enumerate(members.names):
        own, ranks, alphas = dict(extra), {}, {}
        for path, layer in layers.items():
            found = _matrices(layer, name)
            if found is None:
                continue
            key_a, key_b, A, B = found
            own[f"base_model.model.{path}.{key_a}"], own[f"base_model.model.{path}.{key_b}"] = A.clone(), B.clone()
            ranks[path] = A.shape[0]
            # The adapter's own scaling, whatever the pool is doing now.
            rs = layer.use_rslora.get(name, False)
            alphas[path] = layer.lora_alpha[name] * (A.shape[0] ** 0.5 if rs else 1)
        configs[f"adapter_{i}"], tensors[f"adapter_{i}"] = copy.deepcopy(config), own
        _set_ranks(configs[f"adapter_{i}"], ranks, alphas)
    return Exported("per_adapter", configs, tensors)
