"""The pool as a PEFT method: ``get_peft_model(base, KPoolLoraConfig(...))`` builds all N adapters, and PEFT's calls work.

PEFT sees one adapter, the pool: it is saved, loaded, activated and deleted by its name (``members.py`` has the N).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTuner, _delete_auxiliary_adapter
from peft.utils.other import _set_adapter as _set_auxiliary_adapter
from torch import nn

from ..backend.swap import _MARK, use_backend
from ..warn import warn_user
from .config import KPOOL, KPoolLoraConfig
from .copying import copy_parameters, has_learned, is_copy, warn_of_fresh_reference
from .members import WHOLE, PoolTuner, collect, member_names
from .targets import translate_fused_experts, warn_of_unmatched
from .tying import tie_heads, untie_bases
from .watch import UNATTACHED, LookForUnattached, trained_unattached, warn_of_held
from .whole import whole_pool

__all__ = ["KPoolModel"]


class KPoolModel(PoolTuner):
    """PEFT's tuner for ``KPoolLoraConfig``; users reach it as ``model.base_model``."""

    # -- building

    def _check_new_adapter_config(self, config: Any) -> None:
        if not isinstance(config, KPoolLoraConfig):
            raise ValueError(f"a pool is described by a KPoolLoraConfig, this is a {type(config).__name__}")
        super()._check_new_adapter_config(config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        is_new = not config.inference_mode  # a checkpoint that is loaded was told when it was built
        if is_new:
            translate_fused_experts(config, model)
        asked = copy.copy(config)  # PEFT replaces what it resolves
        trained = [pool for pool in self.peft_config if pool != adapter_name and self._has_learned(pool)]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._tie_again()
        if trained:
            self._beside_trained[adapter_name] = trained[0]
        if is_new:
            warn_of_unmatched(asked, model, adapter_name, self.members(adapter_name)[0])

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        parameter = kwargs.get("parameter_name")
        for member in self.members(adapter_name):
            # A parameter's layer may have another's around it, so it is not always where the first member's is put.
            if parameter is None or getattr(target, "parameter_name", None) != parameter:
                target = getattr(parent, target_name)
            super()._create_and_replace(lora_config, member, target, target_name, parent, current_key, **kwargs)

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        super()._post_injection_hook(model, config, adapter_name)
        if getattr(config, "target_modules_to_tie", None):
            self.register_load_state_dict_post_hook(_tie_after_load)
        use_backend(self)
        LookForUnattached.install(self)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        LookForUnattached.remove(self.model)
        return super()._unload_and_optionally_merge(*args, **kwargs)

    # -- heads that are tied to the embedding

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        # With adapters of another pool on it, the tied weight is the base layer's; PEFT looks for the layer.
        return [name.removesuffix(".base_layer") for name in super()._get_module_names_tied_with_embedding()]

    def _tie_again(self) -> None:
        for pool, config in self.peft_config.items():
            tie_heads(self.model, config, self.members(pool))

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._tie_again()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tie_again()
        if self.__dict__.get(_MARK) in ("auto", "tsugi"):  # pickled layers are PEFT's own
            use_backend(self, self.__dict__[_MARK])

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        parameters: dict[str, list[nn.Parameter]] = {name: [] for name in self.members(adapter_name)}
        for layer in self._layers():
            collect(layer, parameters)
        for member, own in parameters.items():
            if any(p.dtype not in (torch.float32, torch.float64) for p in own):  # each call walks the model
                super()._cast_adapter_dtype(member, autocast_adapter_dtype)
        self._tie_again()

    # -- copying

    @property
    def _beside_trained(self) -> dict[str, str]:
        """Maps each pool that was added beside a trained one, and not activated since, to the trained one's name."""
        return self.__dict__.setdefault("_kpool_beside_trained", {})

    def _has_learned(self, pool: str) -> bool:
        return has_learned(self._layers(), self.members(pool))

    def copy_pool(self, source: str, target: str) -> None:
        """Copy all that is trained of one pool into another, as for the reference of DPO or GRPO.

        In a step, ``set_adapter(target)`` then activates the K adapters that correspond to the K of ``source``, so that the
        two compute the same until ``source`` is trained on.

        Args:
            source: name of the pool to copy from.
            target: name of the pool that is overwritten; ``add_adapter(target, config)`` makes it.

        Raises:
            ValueError: there is no such pool, or they differ in n_adapters, scaling, r or layers. Nothing was copied.
        """
        for argument, pool in (("source", source), ("target", target)):
            if pool not in self.peft_config:
                raise ValueError(f"copy_pool: {argument} is {pool!r}; the pools are {list(self.peft_config)}")
        if source == target:
            raise ValueError(f"copy_pool: source and target are both {source!r}")
        ours, theirs = self.peft_config[source], self.peft_config[target]
        for name in ("n_adapters", "k_active", "lora_alpha", "use_rslora", "alpha_pattern"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(
                    f"copy_pool: {name} is {getattr(ours, name)!r} in {source!r} and {getattr(theirs, name)!r} in {target!r}"
                )
        copy_parameters(self.model, self._counterparts(source, target))
        self._beside_trained.pop(target, None)
        self._copied_from[target] = source

    @property
    def _copied_from(self) -> dict[str, str]:
        return self.__dict__.setdefault("_kpool_copied_from", {})

    def _active_of_source(self, pool: str) -> list[str]:
        """For a pool that is a copy: its counterparts of the adapters that are active in its source."""
        source = self._copied_from.get(pool)
        if source is None or source not in self.peft_config or self.active_adapters != [source]:
            return []
        counterparts = self._counterparts(source, pool)
        return [counterparts[name] for name in self.active_members]

    def _counterparts(self, source: str, target: str) -> dict[str, str]:
        return dict(zip(self.members(source), self.members(target))) | {source: target}

    def _check_reference(self, pools: Sequence[str], inference_mode: bool) -> None:
        """Warn where a pool is first used without gradients and is not the copy that it was probably meant to be."""
        for pool in [pool for pool in pools if pool in self._beside_trained]:
            other = self._beside_trained.pop(pool)
            if torch.is_grad_enabled() and not inference_mode:
                continue  # it is going to be trained
            twin = self.peft_config.get(other) is self.peft_config[pool]  # how TRL makes a copy
            if not self._has_learned(pool):
                warn_of_fresh_reference(pool, other, "still has B = 0, so that it computes the base model")
            elif twin and not is_copy(self.model, self._counterparts(other, pool)):
                warn_of_fresh_reference(pool, other, "is no copy of it")

    # -- activating

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate a pool by its name, or single adapters of pools by theirs.

        A pool that is activated to train has K adapters active: those of its last step, which is the open one inside
        ``with pool.step():``. Before any they are the first K, or in a copy that :meth:`copy_pool` made, those that
        correspond to the K of its source. One that is activated for inference, or inside ``with whole_pool(model):``, has
        all N, scaled by K / N. All N require gradients or none does, so that an optimizer made at any time holds them all.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        pools: list[str] = []
        active: list[str] = []
        for name in names:
            owner = name if name in self.peft_config else self._owner(name)
            if owner is None:
                raise ValueError(f"set_adapter: there is no pool or adapter {name!r}; pools: {list(self.peft_config)}")
            if owner not in pools:
                pools.append(owner)
            active += [name] if name != owner else self._meant_by(owner, inference_mode)
        self._check_reference(pools, inference_mode)
        _set_auxiliary_adapter(self.model, pools[0] if len(pools) == 1 else pools, inference_mode=inference_mode)

        whole = inference_mode and any(name in self.peft_config for name in names)
        members = [member for pool in pools for member in self.members(pool)]
        shared = self.active_members
        shared[:] = active
        for layer in self._layers():
            if layer.merged:
                warn_user("set_adapter: the model is merged, and is unmerged first")
                layer.unmerge()
            layer.set_adapter(members, inference_mode=inference_mode)  # who requires gradients
            layer._active_adapter = shared
            for pool, config in self.peft_config.items():
                scale = config.k_active / config.n_adapters if whole and pool in pools else 1.0
                if whole or self.whole:
                    for member in self.members(pool):
                        layer.set_scale(member, scale)
        self.__dict__["_kpool_whole"] = whole
        self.active_adapter = pools[0] if len(pools) == 1 else pools

    def _meant_by(self, pool: str, inference_mode: bool) -> list[str]:
        """The members that are activated by the pool's name."""
        members = self.members(pool)
        evaluated = self.__dict__.get(WHOLE)
        if inference_mode or (evaluated is not None and evaluated.pool == pool):
            return list(members)
        if pool in self.chosen:
            return self.chosen[pool]
        k = self.peft_config[pool].k_active
        now = [name for name in self.active_members if name in members]
        if len(now) == k and not self.whole:
            return now
        return self._active_of_source(pool) or list(members[:k])

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        super().set_requires_grad(
            [member for name in names for member in (self.members(name) if name in self.peft_config else (name,))],
            requires_grad,
        )

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        pools = self.active_adapters
        if not any(self.peft_config[pool].inference_mode for pool in pools):
            self.set_requires_grad(pools)  # PEFT unfreezes the K active ones

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete a pool: all N adapters of it."""
        if adapter_name not in self.peft_config:
            owner = self._owner(adapter_name)
            if owner is None:
                raise ValueError(f"delete_adapter: there is no pool {adapter_name!r}; pools: {list(self.peft_config)}")
            raise ValueError(
                f"delete_adapter: {adapter_name!r} is one of the {self.peft_config[owner].n_adapters} adapters of pool "
                f"{owner!r}, which is deleted whole: delete_adapter({owner!r})"
            )
        members = self.members(adapter_name)
        layers = self._layers()
        if any(set(members) & set(layer.merged_adapters) for layer in layers):
            raise ValueError(f"delete_adapter: pool {adapter_name!r} is merged; unmerge it first")
        was_active = adapter_name in self.active_adapters
        self._beside_trained.pop(adapter_name, None)
        self._copied_from.pop(adapter_name, None)
        del self.peft_config[adapter_name]
        self.chosen.pop(adapter_name, None)
        if WHOLE in self.__dict__ and self.__dict__[WHOLE].pool == adapter_name:
            del self.__dict__[WHOLE]
        remaining = list(self.peft_config)
        for layer in layers:
            layer._active_adapter = []  # nothing for PEFT to choose a successor for
            for member in members:
                layer.delete_adapter(member)
            layer._active_adapter = self.active_members
        _delete_auxiliary_adapter(self.model, adapter_name=adapter_name, new_active_adapters=remaining[:1] or None)
        if not was_active:
            return
        self.active_members.clear()
        if remaining:
            warn_user(f"delete_adapter: pool {adapter_name!r} was active; now {remaining[0]!r} is")
            self.set_adapter(remaining[0], inference_mode=self.peft_config[remaining[0]].inference_mode)
        else:
            self.active_adapter = []

    # -- merging

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The base model with the whole pool, scaled by K / N, merged into its weights."""
        if adapter_names is not None and list(adapter_names) != [self.active_pool]:
            raise ValueError(
                f"merge_and_unload: adapter_names is {adapter_names!r}; a pool is merged whole: leave it out, or call "
                "set_adapter for another pool first"
            )
        if trained_unattached(self):
            warn_user(f"merge_and_unload: {UNATTACHED}")
        heads = untie_bases(self.model, self.peft_config[self.active_pool])
        with whole_pool(self):
            merged = super().merge_and_unload(progressbar, safe_merge, list(self.members(self.active_pool)))
        for key in heads:
            merged.get_submodule(key).weight = merged.get_input_embeddings().weight
        return merged

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        raise NotImplementedError(
            "merge_adapter: a pool whose active adapters change cannot stay merged: call merge_and_unload(), or export()"
        )

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "add_weighted_adapter: to make one adapter of a pool, call export(model, mode='concat' or 'svd')"
        )

    # -- saving and loading: in a checkpoint the adapters are adapter_0, adapter_1, ..., whatever the pool's name

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Any, unwanted_adapter_names: Any
    ) -> dict[str, Any]:
        warn_of_held(model, "save_pretrained")
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return _without_other_pools(model, found, adapter_name)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return _in_checkpoint(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: KPoolLoraConfig, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        return _in_model(model, config, adapter_name, state_dict)


def _tie_after_load(tuner: KPoolModel, incompatible: Any) -> None:
    tuner._tie_again()


def _without_other_pools(model: Any, state: dict[str, Any], pool: str) -> dict[str, Any]:
    others = {
        member
        for name, config in model.peft_config.items()
        if name != pool and isinstance(config, KPoolLoraConfig)
        for member in member_names(name, config.n_adapters)
    }
    return {key: value for key, value in state.items() if others.isdisjoint(key.split("."))}


def _in_checkpoint(key: str, pool: str) -> str:
    """A parameter's name in a checkpoint, from its name in the model."""
    if pool == "default":
        return key
    return re.sub(rf"(\.lora_\w+\.){re.escape(pool)}_(adapter_\d+)(?=\.|$)", r"\1\2", key)


def _in_model(model: nn.Module, config: KPoolLoraConfig, pool: str, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint under the names that its parameters have in the model. Refuses one that does not hold all N adapters."""
    if pool != "default":
        pattern = re.compile(r"(\.lora_\w+\.)(adapter_\d+)(?=\.|$)")
        state = {pattern.sub(rf"\1{pool}_\2", key): value for key, value in state.items()}
    members = set(member_names(pool, config.n_adapters))
    plain = {key.removeprefix("base_model.model.") for key in state}
    missing = [
        key
        for key in (name.removeprefix("base_model.model.") for name in model.state_dict())
        if ".lora_" in key and not members.isdisjoint(key.split(".")) and key not in plain
    ]
    if missing:
        raise ValueError(
            f"the checkpoint does not hold the pool's n_adapters = {config.n_adapters} adapters on every layer: "
            f"{len(missing)} tensors are missing, the first is {missing[0]}"
        )
    return state


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    if PEFT_TYPE_TO_TUNER_MAPPING.get(KPOOL) is KPoolModel:
        return
    try:
        peft.utils.register_peft_method(
            name="kpool", config_cls=KPoolLoraConfig, model_cls=KPoolModel, prefix=KPoolModel.prefix
        )
    except (KeyError, ValueError):
        # It minds that LoRA has the prefix already; that KPOOL is LoRA is the point.
        PEFT_TYPE_TO_PREFIX_MAPPING[KPOOL] = KPoolModel.prefix
        PEFT_TYPE_TO_CONFIG_MAPPING[KPOOL] = KPoolLoraConfig
        PEFT_TYPE_TO_TUNER_MAPPING[KPOOL] = KPoolModel
    if not hasattr(BaseTuner, "_get_adapter_state_dict"):
        _teach_peft_0_20()


def _teach_peft_0_20() -> None:
    """Before 0.21 PEFT does not ask the tuner how its checkpoint is named, but has one function for all methods."""
    import peft.peft_model as user
    import peft.utils.save_and_load as owner

    get, put = owner.get_peft_model_state_dict, owner.set_peft_model_state_dict

    def get_peft_model_state_dict(
        model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        found = get(model, state_dict, adapter_name, *args, **kwargs)
        if model.peft_config[adapter_name].peft_type == KPOOL:
            warn_of_held(model, "save_pretrained")
            found = _without_other_pools(model, found, adapter_name)
            found = {_in_checkpoint(key, adapter_name): value for key, value in found.items()}
        return found

    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        config = model.peft_config[adapter_name]
        if config.peft_type != KPOOL:
            return put(model, peft_model_state_dict, adapter_name, *args, **kwargs)
        state = _in_model(model, config, adapter_name, dict(peft_model_state_dict))
        insert = owner._insert_adapter_name_into_state_dict
        owner._insert_adapter_name_into_state_dict = lambda state_dict, **_: state_dict
        try:
            return put(model, state, adapter_name, *args, **kwargs)
        finally:
            owner._insert_adapter_name_into_state_dict = insert

    for module in (owner, user, peft.utils, peft):
        module.get_peft_model_state_dict = get_peft_model_state_dict
        module.set_peft_model_state_dict = set_peft_model_state_dict


_register()
