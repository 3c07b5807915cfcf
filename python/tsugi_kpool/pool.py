"""The pool as a PEFT method: ``get_peft_model(base, KPoolLoraConfig(...))`` builds N LoRA adapters on every target layer.

In PEFT's books the pool is one adapter ("default", or the name it was given). Inside the layers it is N of PEFT's own
LoRA adapters, adapter_0 ... adapter_{N-1}, each with parameters of its own, so that everything PEFT and the backend do
for LoRA layers holds for them. Which K of them are active is set by :func:`tsugi_kpool.attach`; until then, the first K.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from peft import mapping
from peft.tuners.lora import LoraModel
from peft.utils.peft_types import register_peft_method
from torch import nn

from ._peft_type import KPOOL
from .config import KPoolLoraConfig

__all__ = ["KPoolModel", "adapter_names"]


def adapter_names(pool: str, n_adapters: int) -> list[str]:
    """What the N adapters of a pool are called inside the layers; a pool that is not "default" puts its name in front."""
    prefix = "" if pool == "default" else f"{pool}_"
    return [f"{prefix}adapter_{index}" for index in range(n_adapters)]


_SAVED_NAME = re.compile(r"(?<=\.)adapter_(\d+)(?=\.|$)")


class KPoolModel(LoraModel):
    """LoraModel whose adapters are pools of N."""

    def __init__(self, model, config, adapter_name, *args, **kwargs):
        super().__init__(model, config, adapter_name, *args, **kwargs)
        # PEFT 0.20 loads by inserting the adapter's name into each key, where a pool has several.
        self.register_load_state_dict_pre_hook(_rename_loaded)

    def pool_names(self, pool: str) -> list[str]:
        """What a pool's adapters are called inside the layers."""
        return adapter_names(pool, self.peft_config[pool].n_adapters)

    def _inner(self, names: str | Iterable[str], *, active: bool) -> list[str]:
        """Adapters inside the layers for names of pools, of which only the first K if ``active``, or of adapters."""
        inner: list[str] = []
        known = {name for pool in self.peft_config for name in self.pool_names(pool)}
        for name in [names] if isinstance(names, str) else names:
            if name in self.peft_config:
                inner += self.pool_names(name)[: self.peft_config[name].k_active if active else None]
            elif name in known:
                inner.append(name)
            else:
                pools = ", ".join(map(repr, self.peft_config))
                raise ValueError(f"adapter {name!r} is neither a pool ({pools}) nor an adapter of one")
        return inner

    def _pools_of(self, inner: list[str]) -> list[str]:
        return [pool for pool in self.peft_config if not set(inner).isdisjoint(self.pool_names(pool))]

    # ---- what PEFT does with an adapter, done with the N of a pool

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, *args, **kwargs):
        for name in adapter_names(adapter_name, lora_config.n_adapters):
            super()._create_and_replace(lora_config, name, target, target_name, parent, *args, **kwargs)
            target = getattr(parent, target_name)  # the first one puts the LoRA layer there

    def set_adapter(self, adapter_name, inference_mode: bool = False) -> None:
        """Makes a pool's first K adapters the active ones, or just the adapters that are named one by one.

        All N adapters of the pools concerned become trainable, unless in inference mode: an adapter that is not active
        takes part in no forward, so it gets no gradient, and an optimizer that was built at any time holds it.
        """
        inner = self._inner(adapter_name, active=True)
        super().set_adapter(inner, inference_mode)
        pools = self._pools_of(inner)
        if not inference_mode:
            self.set_requires_grad(pools)
        self.active_adapter = pools[0] if isinstance(adapter_name, str) and len(pools) == 1 else pools

    def set_requires_grad(self, adapter_names, requires_grad: bool = True) -> None:
        super().set_requires_grad(self._inner(adapter_names, active=False), requires_grad)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for name in self.pool_names(adapter_name):
            super()._cast_adapter_dtype(name, autocast_adapter_dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes a pool with all its adapters."""
        if adapter_name not in self.peft_config:
            pools = ", ".join(map(repr, self.peft_config))
            raise ValueError(f"adapter {adapter_name!r} is no pool of this model (it has {pools})")
        names = self.pool_names(adapter_name)
        layers = self._lora_layers()
        if any(set(layer.merged_adapters) & set(names) for layer in layers):
            raise ValueError(f"adapter {adapter_name!r} is merged into the base weights; call unmerge_adapter() first")
        others = [pool for pool in self.peft_config if pool != adapter_name]
        active = [pool for pool in self.active_adapters if pool != adapter_name] or others[:1]
        super().set_adapter(self._inner(active, active=True))
        for layer in layers:
            for name in names:
                layer.delete_adapter(name)
        del self.peft_config[adapter_name]
        if active:
            self.set_adapter(active)
        else:
            self.active_adapter = []

    def _lora_layers(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    # ---- merging: the pool as it is on average

    def merge_adapter(self, adapter_names=None, safe_merge: bool = False) -> None:
        raise ValueError(
            "merge_adapter: which adapters of a pool are active changes from step to step, so there is no one sum to merge "
            "for the time being; merge_and_unload() merges all N with the weight K/N that they have on average, and "
            "tsugi_kpool.export() writes ordinary LoRA"
        )

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if not merge:
            return super()._unload_and_optionally_merge(False, progressbar, safe_merge, None)
        pools = list(self.active_adapters) if adapter_names is None else list(adapter_names)
        before = []
        for pool in pools:
            if pool not in self.peft_config:
                known = ", ".join(map(repr, self.peft_config))
                raise ValueError(
                    f"merge_and_unload: adapter_names has {pool!r}, which is no pool of this model ({known})"
                )
            config = self.peft_config[pool]
            for layer in self._lora_layers():
                for name in self.pool_names(pool):
                    if name in layer.scaling:
                        before.append((layer.scaling, name, layer.scaling[name]))
                        layer.scaling[name] *= config.k_active / config.n_adapters
        try:
            return super()._unload_and_optionally_merge(True, progressbar, safe_merge, self._inner(pools, active=False))
        except BaseException:
            for scaling, name, value in before:
                scaling[name] = value
            raise

    def add_weighted_adapter(self, *args, **kwargs):
        raise ValueError(
            "add_weighted_adapter: a pool is not combined with other adapters; tsugi_kpool.export() turns it into ordinary "
            "LoRA, which can be"
        )

    # ---- checkpoints: one file with all N, under names that do not depend on the pool's

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        names = set(adapter_names(adapter_name, config.n_adapters))
        kept = {
            key: value for key, value in state_dict.items() if "lora_" in key and not names.isdisjoint(key.split("."))
        }
        kept.update(cls._get_learnable_bias_state_dict(model, state_dict, config))
        return kept

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        inner = re.compile(rf"(?<=\.){re.escape(adapter_names(adapter_name, 1)[0][:-1])}(\d+)(?=\.|$)")
        return inner.sub(r"adapter_\1", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        names = adapter_names(adapter_name, config.n_adapters)
        return {_named(key, names): value for key, value in state_dict.items()}


def _named(key: str, names: list[str]) -> str:
    def name(match: re.Match) -> str:
        index = int(match[1])
        if index >= len(names):
            raise ValueError(
                f"the checkpoint has adapter_{index} ({key}), and the pool {len(names)} adapters: n_adapters differs"
            )
        return names[index]

    return _SAVED_NAME.sub(name, key) if "lora_" in key else key


def _rename_loaded(module: KPoolModel, state_dict: dict, prefix: str, *_) -> None:
    for pool in module.peft_config:
        names = adapter_names(pool, module.peft_config[pool].n_adapters)
        marker = re.compile(rf"\.{re.escape(pool)}\.(adapter_\d+)(?=\.|$)")
        for key in [key for key in state_dict if marker.search(key) and "lora_" in key]:
            state_dict[_named(marker.sub(r".\1", key), names)] = state_dict.pop(key)


def _register() -> None:
    try:
        register_peft_method(name="kpool", config_cls=KPoolLoraConfig, model_cls=KPoolModel, prefix="lora_")
    except (KeyError, ValueError):
        # A PEFT that checks more than it needs to, LoRA's prefix for one.
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[KPOOL] = KPoolLoraConfig
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[KPOOL] = KPoolModel
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[KPOOL] = "lora_"


_register()
