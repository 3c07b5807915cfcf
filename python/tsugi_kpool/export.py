"""A pool as ordinary LoRA, which PEFT loads without this package, and so does whatever else reads its checkpoints.

The pool's layer, averaged over the sets of K that are active in turn, is W x + K/N sum over all N of s_i B_i A_i x: each
adapter is there in K of N steps. (Dropout is treated the same way at inference.) That sum is what is exported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftType
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import KPoolLoraConfig
from .runtime import _find_pool, _layers_with, unwrapped

__all__ = ["ExportReport", "export"]

MODES = ("concat", "svd", "per_adapter")


@dataclass
class ExportReport:
    """What :func:`export` wrote.

    Attributes:
        folders: the checkpoints, one, or N for ``"per_adapter"``.
        r: the rank that most layers have.
        energy: for ``"svd"``, a layer's share of the sum's squared norm that was kept, from 0 to 1.
    """

    folders: list[Path]
    r: int
    energy: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        where = (
            str(self.folders[0])
            if len(self.folders) == 1
            else f"{len(self.folders)} folders in {self.folders[0].parent}"
        )
        text = f"ordinary LoRA of rank {self.r} in {where}"
        if self.energy:
            kept = list(self.energy.values())
            text += f", keeping {min(kept):.2%} to {max(kept):.2%} of each layer's sum"
        return text


def export(
    model: nn.Module,
    folder: str | os.PathLike,
    mode: str = "concat",
    *,
    r: int | None = None,
    config: KPoolLoraConfig | None = None,
    adapter_name: str | None = None,
) -> ExportReport:
    """Writes a pool as ordinary LoRA: ``PeftModel.from_pretrained(base, folder)`` loads it without this package.

    Args:
        model: a model with a pool, attached or not; as for :func:`attach`.
        folder: where to; made if it is missing.
        mode: ``"concat"``: one adapter of rank N r, exactly K/N times the sum of all N. ``"svd"``: the best approximation
            of that of rank ``r`` in each layer (Eckart-Young), linear layers only. ``"per_adapter"``: each of the N as it
            is, in a subfolder of its name.
        r: the rank of ``"svd"``; None: that of one adapter.
        config, adapter_name: as for :func:`attach`.

    Raises:
        ValueError: for an unknown mode, an ``r`` that does not fit, or adapters that plain LoRA cannot express.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}, expected one of {', '.join(map(repr, MODES))}")
    config, names = _find_pool(model, config, adapter_name)
    if r is not None and (mode != "svd" or isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ValueError(f"r is {r!r}, expected an integer from 1, and only with mode='svd' (mode is {mode!r})")
    core = unwrapped(model)
    layers = [(name, layer) for name, layer in _named_layers(core, names)]
    if not layers:
        raise ValueError(f"the model has no adapter {names[0]!r}: there is no pool to export")
    folder = Path(folder)
    if mode == "per_adapter":
        for index, name in enumerate(names):
            parts = {at: _parts(at, layer, [name], 1.0) for at, layer in layers}
            _write(folder / f"adapter_{index}", config, {at: _concatenated(p) for at, p in parts.items()}, core)
        return ExportReport([folder / f"adapter_{index}" for index in range(len(names))], config.r)
    share = config.k_active / config.n_adapters
    parts = {at: _parts(at, layer, names, share) for at, layer in layers}
    energy: dict[str, float] = {}
    if mode == "concat":
        merged = {at: _concatenated(p) for at, p in parts.items()}
    else:
        merged = {}
        for at, p in parts.items():
            merged[at], energy[at] = _compressed(at, p, r or config.r)
    ranks = [low.rank for low in merged.values()]
    _write(folder, config, merged, core)
    return ExportReport([folder], max(set(ranks), key=ranks.count), energy)


@dataclass
class _Part:
    """One adapter of a layer: A [r, ...], B [O, r, ...], the factor, and what the two are called in a checkpoint."""

    A: Tensor
    B: Tensor
    factor: float
    keys: tuple[str, str]


@dataclass
class _LowRank:
    A: Tensor
    B: Tensor
    keys: tuple[str, str]

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def _named_layers(core: nn.Module, names: list[str]) -> Iterator[tuple[str, nn.Module]]:
    ours = set(map(id, _layers_with(core, names)))
    for name, module in core.named_modules():
        if id(module) in ours:
            yield name, module


def _parts(at: str, layer: nn.Module, names: list[str], share: float) -> list[_Part]:
    parts = []
    for name in names:
        if layer.lora_variant.get(name) is not None or name in getattr(layer, "lora_magnitude_vector", {}):
            raise ValueError(
                f"{at}: adapter {name!r} is not plain LoRA (DoRA or another variant), which has no such sum"
            )
        if name in layer.lora_A:
            a, b = layer.lora_A[name], layer.lora_B[name]
            if getattr(b, "bias", None) is not None:
                raise ValueError(f"{at}: adapter {name!r} has a bias (lora_bias), which is not exported")
            if getattr(a, "groups", 1) != 1:
                raise ValueError(f"{at}: adapter {name!r} is a grouped convolution, whose adapters do not concatenate")
            keys = ("lora_A.weight", "lora_B.weight")
            parts.append(_Part(a.weight.detach(), b.weight.detach(), float(layer.scaling[name]) * share, keys))
        elif name in layer.lora_embedding_A:
            keys = ("lora_embedding_A", "lora_embedding_B")
            a, b = layer.lora_embedding_A[name].detach(), layer.lora_embedding_B[name].detach()
            parts.append(_Part(a, b, float(layer.scaling[name]) * share, keys))
    return parts


def _concatenated(parts: list[_Part]) -> _LowRank:
    # The factors go into B; written with a scaling of one.
    return _LowRank(
        torch.cat([part.A for part in parts], dim=0),
        torch.cat([part.B * part.factor for part in parts], dim=1),
        parts[0].keys,
    )


def _compressed(at: str, parts: list[_Part], r: int) -> tuple[_LowRank, float]:
    """The best rank-r approximation of B A, from the QR decompositions of both: nothing of size [O, I] is made."""
    whole = _concatenated(parts)
    if whole.A.ndim != 2 or whole.keys[0] != "lora_A.weight":
        raise ValueError(f"{at}: mode 'svd' is for linear layers; use 'concat'")
    qb, rb = torch.linalg.qr(whole.B.double())
    qa, ra = torch.linalg.qr(whole.A.double().T)
    u, s, v = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    kept = min(r, len(s))
    root = s[:kept].sqrt()
    a = (qa @ v[:kept].T * root).T
    b = qb @ u[:, :kept] * root
    if kept < r:  # a layer whose sizes allow no more; PEFT wants the rank that the configuration says
        a, b = nn.functional.pad(a, (0, 0, 0, r - kept)), nn.functional.pad(b, (0, r - kept))
    total = s.square().sum()
    energy = 1.0 if total == 0 else (s[:kept].square().sum() / total).item()
    return _LowRank(a.to(whole.A.dtype), b.to(whole.B.dtype), whole.keys), energy


def _write(folder: Path, config: KPoolLoraConfig, layers: dict[str, _LowRank], core: nn.Module) -> None:
    ranks = [layer.rank for layer in layers.values()]
    common = max(set(ranks), key=ranks.count)
    plain = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init}
    # PEFT matches these as patterns at the end of a module's name.
    other = {
        at.removeprefix("base_model.model.").replace(".", r"\."): low.rank
        for at, low in layers.items()
        if low.rank != common
    }
    plain.update(
        peft_type=PeftType.LORA,
        r=common,
        lora_alpha=common,
        rank_pattern=other,
        alpha_pattern=other,
        use_rslora=False,
        init_lora_weights=True,
        inference_mode=True,
    )
    tensors = {}
    for at, low in layers.items():
        name = at if at.startswith("base_model.model.") else f"base_model.model.{at}"
        for key, tensor in zip(low.keys, (low.A, low.B)):
            tensors[f"{name}.{key}"] = tensor.contiguous().cpu()
    for name, module in core.named_modules():
        saved = getattr(module, "modules_to_save", None)
        if isinstance(saved, nn.ModuleDict) and len(saved):
            raise ValueError(
                f"{name} was trained whole (modules_to_save), which is not exported: save_pretrained keeps it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    LoraConfig(**plain).save_pretrained(str(folder))
