"""A pool's N adapters as they lie in a model, and which of them are active.

In a layer the N adapters are N ordinary LoRA adapters with parameters of their own, so that an inactive one has no
gradient. All layers share one list, ``_active_adapter``: writing K names into it activates them everywhere at once.
The adapters of the pool ``default`` are named ``adapter_0``, ``adapter_1``, ..., those of any other pool
``NAME_adapter_0``, ...
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

__all__ = ["WHOLE", "Members", "PoolTuner", "Whole", "collect", "find_members", "find_tuner", "member_names"]


def member_names(pool: str, n: int) -> tuple[str, ...]:
    """The names of a pool's adapters in the layers."""
    prefix = "adapter_" if pool == "default" else f"{pool}_adapter_"
    return tuple(f"{prefix}{i}" for i in range(n))


@dataclass
class Members:
    """A pool's adapters as they lie in a model: looked up once, so that no step has to search for them."""

    names: tuple[str, ...]
    layers: list[LoraLayer]
    parameters: list[list[nn.Parameter]]  # of each adapter: layer by layer, A before B
    active: list[str]  # the one list that every layer holds
    pool: str = "default"
    tuner_reference: weakref.ref[PoolTuner] | None = None  # weak, since the registry of pools must not hold the model

    @property
    def tuner(self) -> PoolTuner | None:
        """None for a pool by hand."""
        return None if self.tuner_reference is None else self.tuner_reference()

    def activate(self, indices: Sequence[int]) -> None:
        """Make these adapters the active ones, in every layer. Costs nothing for the other N - K."""
        names = [self.names[i] for i in indices]
        if self.tuner is not None:
            self.tuner.choose(self.pool, names)
        else:
            self.active[:] = names
        self._share_the_list()
        for i in indices:
            for parameter in self.parameters[i]:
                if not parameter.requires_grad:  # disable_adapter() freezes what is not active when it ends
                    parameter.requires_grad_(True)

    def _share_the_list(self) -> None:
        for layer in self.layers:
            # PEFT's own set_adapter gives a layer a list of its own.
            if layer._active_adapter is not self.active:
                layer._active_adapter = self.active

    def now_active(self) -> list[str]:
        """The names that the layers compute with now, of this pool or of another."""
        active = self.layers[0]._active_adapter
        return [active] if isinstance(active, str) else list(active)

    def now_computing(self) -> list[nn.Parameter]:
        """The parameters of this pool's adapters that the layers compute with now."""
        active = set(self.now_active())
        return [p for name, own in zip(self.names, self.parameters) if name in active for p in own]

    def computes(self) -> tuple:
        """A value that is equal when the layers compute the same function, apart from the parameters' values."""
        layer = self.layers[0]
        names = tuple(self.now_active())
        scaling = tuple(layer.scaling.get(name) for name in names)
        return names, scaling, bool(layer._disable_adapters)

    def come_back(self, in_step: bool) -> None:
        """For a pool by hand, in a step or an evaluation: if one of its adapters was activated by name, activate all that belong to it.

        Code that switches to a reference adapter and back, as TRL does, can name only one adapter on its way back. So the
        name of one stands for the step's K, or for the whole pool.
        """
        if not (in_step or self.shows_whole):
            return
        wanted, active = list(self.names) if self.shows_whole else self.active, self.now_active()
        if self.tuner is not None or active == wanted or not set(active) <= set(self.names):
            return
        if self.shows_whole:
            for layer in self.layers:
                layer._active_adapter = wanted
        else:
            self.activate([self.names.index(name) for name in wanted])

    # -- the whole pool, for an evaluation

    @property
    def shows_whole(self) -> bool:
        """Whether :meth:`begin_whole` was called last."""
        return WHOLE in self._owner.__dict__

    @property
    def whole(self) -> bool:
        """Whether all N adapters are active and scaled by K / N already."""
        return self.shows_whole or (self.tuner is not None and self.tuner.whole)

    @property
    def _owner(self) -> nn.Module:
        """Where it is noted that the whole pool is active: in the model, so that a copy knows it too."""
        return self.layers[0] if self.tuner is None else self.tuner

    def begin_whole(self, factor: float) -> None:
        """Activate all N adapters, each scaled by ``factor``, until :meth:`end_whole`."""
        before = [layer._active_adapter for layer in self.layers]
        scaling = [dict(layer.scaling) for layer in self.layers]
        self._owner.__dict__[WHOLE] = Whole(self.pool, list(self.active), before, scaling)
        for layer in self.layers:
            for name in self.names:
                if name in layer.scaling:
                    layer.scaling[name] *= factor
        if self.tuner is None:
            self.active = []  # the layers' former list is one of `before`
        self.active[:] = self.names
        self._share_the_list()

    def end_whole(self) -> None:
        """Put back what :meth:`begin_whole` changed; what was activated by name meanwhile stays active."""
        whole = self._owner.__dict__.pop(WHOLE)
        for layer, scaling in zip(self.layers, whole.scaling):
            layer.scaling.update(scaling)
        if self.tuner is None:
            for layer, active in zip(self.layers, whole.before):
                layer._active_adapter = active
        elif self.tuner.active_adapters == [self.pool]:
            self.active[:] = whole.active


@dataclass
class Whole:
    """What was active before the whole pool was."""

    pool: str
    active: list[str]
    before: list[Any]  # of each layer, its ``_active_adapter``
    scaling: list[dict[str, float]]


#: Where a tuner, or the first layer of a pool by hand, notes that the whole pool is active.
WHOLE = "_kpool_whole_pool"


def find_tuner(model: nn.Module) -> PoolTuner | None:
    return next((module for module in model.modules() if isinstance(module, PoolTuner)), None)


def find_members(model: nn.Module, n: int, pool: str | None = None) -> Members:
    """The adapters of a pool of a KPOOL model, or ``adapter_0`` ... ``adapter_{n - 1}`` of any LoRA model.

    Args:
        model: a model with a pool.
        n: how many adapters a pool by hand has.
        pool: the name of one of a KPOOL model's pools; None for the active one.

    Raises:
        ValueError: the model has no such adapters, or not all of them.
    """
    tuner = find_tuner(model)
    name = "default" if tuner is None else pool or tuner.active_pool
    names = member_names(name, n) if tuner is None else tuner.members(name)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    parameters: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    layers = [layer for layer in layers if collect(layer, parameters)]
    missing = [name for name in names if not parameters[name]]
    if missing:
        raise ValueError(
            f"the model has no LoRA adapter named {missing[0]!r} ({len(missing)} of {len(names)} are missing): build the "
            "pool with get_peft_model(base, KPoolLoraConfig(...)), or by hand with get_peft_model(base, lora_config, "
            "adapter_name='adapter_0') and model.add_adapter('adapter_1', lora_config) and so on"
        )
    if tuner is None:
        return Members(names, layers, list(parameters.values()), [])
    return Members(names, layers, list(parameters.values()), tuner.active_members, name, weakref.ref(tuner))


def collect(layer: LoraLayer, parameters: dict[str, list[nn.Parameter]]) -> bool:
    """Append the layer's parameters to those of their adapters. Returns whether there were any."""
    found = False
    for attribute in dict.fromkeys(layer.adapter_layer_names):  # PEFT repeats DoRA's, once for each adapter added
        adapters = getattr(layer, attribute)
        for name in adapters:
            if name in parameters:
                value = adapters[name]
                parameters[name] += [value] if isinstance(value, nn.Parameter) else list(value.parameters())
                found = True
    return found


# ---- the tuner's part -------------------------------------------------------------------------------------------------


class PoolTuner(LoraModel):
    """What a PEFT model knows of its pools: their members, and which of them are active. :class:`.tuner.KPoolModel` builds it."""

    @property
    def active_members(self) -> list[str]:
        """The list of active adapters that all layers share."""
        return self.__dict__.setdefault("_kpool_active", [])

    @property
    def chosen(self) -> dict[str, list[str]]:
        """The members that each pool's name stands for: those that a step chose last."""
        return self.__dict__.setdefault("_kpool_chosen", {})

    def choose(self, pool: str, members: Sequence[str]) -> None:
        """Activate these members of a pool. Its name brings them back, whatever is activated in between."""
        self.chosen[pool] = list(members)
        if self.whole or self.active_adapters != [pool]:
            self.set_adapter(pool)
        else:
            self.active_members[:] = members

    @property
    def whole(self) -> bool:
        """Whether all N adapters are active, scaled by K / N, as in a pool loaded for inference."""
        return self.__dict__.get("_kpool_whole", False)

    @property
    def active_pool(self) -> str:
        """The name of the one active pool."""
        pools = self.active_adapters
        if len(pools) != 1:
            raise ValueError(f"the active pools are {list(pools)}, expected one: call model.set_adapter(name)")
        return pools[0]

    def members(self, pool: str) -> tuple[str, ...]:
        """The names of a pool's adapters."""
        return member_names(pool, self.peft_config[pool].n_adapters)

    def _owner(self, member: str) -> str | None:
        return next((pool for pool in self.peft_config if member in self.members(pool)), None)

    def _layers(self) -> list[LoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]
