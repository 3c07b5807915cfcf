"""The pool in a training loop: ``attach``, and the eight functions of the 0.1 line on the same object.

pool = tsugi_kpool.attach(model)
for batch in loader:
    with pool.step():
        model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
pool.close()
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from . import ops
from .backend import use_backend
from .config import KPoolLoraConfig
from .pool import adapter_names
from .sync import AggregationDecision, Aggregator

__all__ = [
    "Pool",
    "apply_kpool_step",
    "attach",
    "get_runtime",
    "plesio_init",
    "plesio_shutdown",
    "post_backward_step",
    "pre_forward_step",
]

#: A model's pool, for as long as the model lives. A pool holds the model's layers, never the model.
_pools: weakref.WeakKeyDictionary[nn.Module, Pool] = weakref.WeakKeyDictionary()


class Pool:
    """N adapters of a model, of which K are active in a step. Made by :func:`attach`.

    Attributes:
        config: the :class:`KPoolLoraConfig`.
        names: the N adapters' names inside the layers.
        current_step: the optimizer step that is running, or that comes next.
        active: indices of the active adapters, ascending.
        decisions: what the last step decided, an :class:`AggregationDecision` an active adapter.
        report: of :func:`use_backend`; None with ``backend=None``.
    """

    def __init__(self, model: nn.Module, config: KPoolLoraConfig, names: list[str], group, sender_id: str | None):
        from . import _native

        self.config = config
        self.names = names
        self.sender_id = sender_id
        self.current_step = 0
        self.active: tuple[int, ...] = ()
        self.decisions: list[AggregationDecision] = []
        self.report = None
        self.closed = False
        self._layers = _layers_with(model, names)
        self._adapters = [_parameters_of(self._layers, name) for name in names]
        empty = [name for name, parameters in zip(names, self._adapters) if not parameters]
        if empty:
            raise ValueError(
                f"the model has no adapter {empty[0]!r} ({len(names) - len(empty)} of n_adapters = {len(names)} were found): "
                "build the pool with get_peft_model(base, KPoolLoraConfig(...)), or with get_peft_model(base, LoraConfig(...), "
                "adapter_name='adapter_0') and add_adapter('adapter_1', ...) up to "
                f"'adapter_{len(names) - 1}'"
            )
        #: The same list in every layer: activating is writing into it, whatever N and the number of layers.
        self._active_names: list[str] = []
        self._router = _native.Router(config.routing_strategy, config.n_adapters, config.k_active, config.routing_seed)
        self._aggregator = Aggregator(self._adapters, config, group=group, router_digest=self._router.digest)
        self._losses: list[float | Tensor] = []  # of the running step
        self._running: str | None = None  # the function or method that began the step

    # ---- a step

    @contextlib.contextmanager
    def step(self, loss: float | Tensor | None = None, *, weight: float = 1.0) -> Iterator[tuple[int, ...]]:
        """One optimizer step: activates K of N on entry, aggregates their gradients on exit.

        All micro-batches of the step belong inside, backward passes too; ``optimizer.step()`` comes after it. On exit
        ``.grad`` holds what the optimizer should apply, and None for adapters that were not active, so that no optimizer
        moves them.

        Args:
            loss: a loss for the loss-aware router, of the step before: what is known when a step begins. It counts for
                the adapters that were active then; :meth:`record_loss` inside the block counts for this one.
            weight: tokens or samples of this rank's step, for the mean over ranks.

        Yields:
            The active adapters' indices, ascending. After an exception in the block the same step comes again.

        Raises:
            RuntimeError: inside another step, or after ``close``.
        """
        self._check_open("pool.step()")
        if loss is not None:
            self.record_loss(loss)
        self._begin(self.current_step, "pool.step()")
        try:
            yield self.active
        except BaseException:
            self._running = None
            self._losses.clear()
            raise
        self._finish(self.current_step, self.active, weight)

    def record_loss(self, loss: float | Tensor) -> None:
        """A loss of the running step, for the loss-aware router; the mean of several. Outside of a step: of the last one.

        A tensor is read when the step ends. Ranks average theirs, so that their routers agree: each must record one.
        """
        if self._running:
            self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        elif self.current_step > 0:
            self._record(self.current_step - 1, self.active, loss)
        else:
            raise RuntimeError("record_loss() was called before the first step")

    def _begin(self, step: int, by: str) -> tuple[int, ...]:
        self._check_open(by)
        if self._running:
            raise RuntimeError(f"{by} was called inside of a step that {self._running} began and that has not ended")
        active = self._router.choose(step)
        self._running = by
        self.current_step = step
        self._losses.clear()
        self._activate(active)
        return active

    def _activate(self, active: Sequence[int]) -> None:
        for index in set(self.active).difference(active):
            for parameter in self._adapters[index]:
                parameter.grad = None
        self.active = tuple(active)
        self._active_names[:] = [self.names[index] for index in active]
        for layer in self._layers:
            # PEFT's set_adapter puts a list of its own there.
            if layer._active_adapter is not self._active_names:
                layer._active_adapter = self._active_names

    def _finish(self, step: int, active: Sequence[int], weight: float = 1.0) -> list[AggregationDecision]:
        self._running = None
        self.decisions = self._aggregator.after_backward(step, active, weight)
        losses, self._losses = self._losses, []
        self._record(step, active, sum(losses) / len(losses) if losses else None)
        self.current_step = step + 1
        return self.decisions

    def _record(self, step: int, active: Sequence[int], loss: float | Tensor | None) -> None:
        # Reading a loss waits for the device: only where it is used.
        if loss is not None and self.config.routing_strategy == "loss_aware":
            loss = self._aggregator.agreed(loss)
        else:
            loss = None
        self._router.record(step, list(active), loss)

    def _check_open(self, by: str) -> None:
        if self.closed:
            raise RuntimeError(f"{by} was called on a pool that is closed; attach(model) opens it again")

    # ---- the pool

    @property
    def digest(self) -> int:
        """64 bits of the router's state at the current step; the same on ranks that choose the same."""
        return self._router.digest(self.current_step)

    def choose(self, step: int) -> tuple[int, ...]:
        """The adapters that ``step`` would activate as things stand, without activating them."""
        return self._router.choose(step)

    def parameters(self, index: int) -> list[Parameter]:
        """All parameters of one adapter, in the order of the layers."""
        return list(self._adapters[index])

    def state_dict(self) -> dict:
        """Everything that a resumed run needs beside the model and the optimizer; plain numbers and lists."""
        if self._running:
            raise RuntimeError(
                f"state_dict() was called inside of a step that {self._running} began and that has not ended"
            )
        config = self.config
        return {
            "version": 1,
            "routing": [config.routing_strategy, config.n_adapters, config.k_active, config.routing_seed],
            "step": self.current_step,
            "active": list(self.active),
            "router": [list(record) for record in self._router.records()],
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes over what :meth:`state_dict` of a pool with the same routing gave.

        Raises:
            ValueError: where strategy, N, K or seed differ; nothing is changed then.
        """
        config = self.config
        mine = [config.routing_strategy, config.n_adapters, config.k_active, config.routing_seed]
        if state.get("version") != 1:
            raise ValueError(f"the state has version {state.get('version')!r}, this package reads version 1")
        for name, saved, here in zip(
            ("routing_strategy", "n_adapters", "k_active", "routing_seed"), state["routing"], mine
        ):
            if saved != here:
                raise ValueError(f"{name} is {here!r} here and {saved!r} in the state: the choices would differ")
        self._router.restore([tuple(record) for record in state["router"]])
        self.current_step = state["step"]
        self._activate(state["active"])

    def close(self) -> None:
        """Ends the pool's part: the layers go back to PEFT's own forward, with the last active adapters. Twice is once."""
        if self.closed:
            return
        self.closed = True
        self._running = None
        for layer in self._layers:
            if layer._active_adapter is self._active_names:
                layer._active_adapter = list(self._active_names)
        if self.report is not None:
            self.report.__exit__(None, None, None)
        for model in [model for model, pool in _pools.items() if pool is self]:
            del _pools[model]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __repr__(self) -> str:
        config = self.config
        return (
            f"Pool({config.k_active} of {config.n_adapters} adapters, {config.routing_strategy}, step {self.current_step}, "
            f"active {list(self.active)}{', closed' if self.closed else ''})"
        )


def _layers_with(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    from peft.tuners.lora import LoraLayer

    wanted = set(names)
    return [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer)
        and any(wanted.intersection(getattr(module, attribute).keys()) for attribute in module.adapter_layer_names)
    ]


def _parameters_of(layers: list[nn.Module], name: str) -> list[Parameter]:
    found = {}
    for layer in layers:
        for attribute in layer.adapter_layer_names:
            adapters = getattr(layer, attribute)
            if name in adapters:
                entry = adapters[name]
                for parameter in [entry] if isinstance(entry, Parameter) else entry.parameters():
                    found[id(parameter)] = parameter  # a tied one once
    return list(found.values())


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel, torch.compile and the like."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _find_pool(
    model: nn.Module, config: KPoolLoraConfig | None, adapter_name: str | None
) -> tuple[KPoolLoraConfig, list[str]]:
    """The pool's configuration and the names of its adapters: from the model, or from ``config`` for one built by hand."""
    pools = {
        name: found
        for name, found in getattr(unwrapped(model), "peft_config", {}).items()
        if isinstance(found, KPoolLoraConfig)
    }
    if pools:
        if adapter_name is None:
            active = getattr(unwrapped(model), "active_adapter", None)
            adapter_name = active if isinstance(active, str) and active in pools else next(iter(pools))
        if adapter_name not in pools:
            raise ValueError(f"adapter_name is {adapter_name!r}, expected one of {', '.join(map(repr, pools))}")
        built, config = pools[adapter_name], config or pools[adapter_name]
        if config.n_adapters != built.n_adapters:
            raise ValueError(
                f"config.n_adapters is {config.n_adapters}, but pool {adapter_name!r} was built with {built.n_adapters}"
            )
        return config, adapter_names(adapter_name, config.n_adapters)
    if config is None:
        raise ValueError(
            "config is None, and the model was not built from a KPoolLoraConfig: pass the one that describes its adapters "
            "adapter_0, adapter_1, ..."
        )
    return config, adapter_names("default", config.n_adapters)


def attach(
    model: nn.Module,
    *,
    config: KPoolLoraConfig | None = None,
    adapter_name: str | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = "auto",
) -> Pool:
    """Makes a model's adapters a pool: from here on :meth:`Pool.step` decides which K of N are active.

    Args:
        model: from ``get_peft_model(base, KPoolLoraConfig(...))`` or ``PeftModel.from_pretrained``; or with LoRA adapters
            adapter_0 ... adapter_{N-1} that were built by hand. DDP or torch.compile may be around it.
        config: needed for a pool that was built by hand; otherwise the one the model was built from.
        adapter_name: which pool, where the model has several; None: the active one.
        group: the process group of the ranks that train together; None: all processes.
        backend: as in :func:`use_backend`, undone by ``close``; None leaves the layers as they are.

    Returns:
        The pool. All N adapters are trainable from here on, so an optimizer may be built before or after.

    Raises:
        ValueError: where the model and the configuration do not fit.
        RuntimeError: where the model has a pool already, or the native library is missing. Nothing is changed then.
    """
    return _attach(model, config, adapter_name, group, backend, None)


def _attach(model, config, adapter_name, group, backend, sender_id) -> Pool:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if config is not None and not isinstance(config, KPoolLoraConfig):
        raise TypeError(f"config is a {type(config).__name__}, expected a KPoolLoraConfig")
    if not ops.available():
        raise RuntimeError(f"a pool cannot be attached: {ops.unavailable_reason}")
    core = unwrapped(model)
    if core in _pools:
        raise RuntimeError("the model has a pool already: call its close(), or plesio_shutdown(model), first")
    config, names = _find_pool(model, config, adapter_name)
    pool = Pool(model, config, names, group, sender_id)
    if backend is not None:
        pool.report = use_backend(core, backend)
    for parameters in pool._adapters:
        for parameter in parameters:
            parameter.requires_grad_(True)
    pool._activate(pool.choose(0))
    _pools[core] = pool
    return pool


# ---- the functions of the 0.1 line: the same pool, step by step ------------------------------------------------------


def plesio_init(model: nn.Module, config: KPoolLoraConfig, sender_id: str | None = None) -> None:
    """:func:`attach` under its older name; ``sender_id`` names this process in diagnostics."""
    _attach(model, config, None, None, "auto", sender_id)


def plesio_shutdown(model: nn.Module) -> None:
    """Closes the model's pool; without one nothing happens."""
    pool = _pools.get(unwrapped(model))
    if pool is not None:
        pool.close()


def get_runtime(model: nn.Module) -> Pool:
    """The model's pool.

    Raises:
        RuntimeError: where there is none.
    """
    return _pool_of(model, "get_runtime")


def apply_kpool_step(model: nn.Module, step: int) -> tuple[int, ...]:
    """Activates the K adapters of an optimizer step, before its first micro-batch.

    Returns:
        Their indices, ascending: what :func:`pre_forward_step` and :func:`post_backward_step` take as ``active``.

    Raises:
        RuntimeError: before :func:`plesio_init`.
        ValueError: where ``step`` is not an integer from 0.
    """
    pool = _pool_of(model, "apply_kpool_step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step is {step!r}, expected an integer from 0")
    if pool._running == "apply_kpool_step()":
        pool._running = None  # a step that was given up, as after a skipped batch
    return pool._begin(step, "apply_kpool_step()")


def pre_forward_step(model: nn.Module, step: int, active: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    """A context for the forward and backward passes of the step that :func:`apply_kpool_step` began."""
    _check_step(_pool_of(model, "pre_forward_step"), "pre_forward_step", step, active)
    return contextlib.nullcontext()


def post_backward_step(model: nn.Module, step: int, active: Sequence[int]) -> list[AggregationDecision]:
    """Aggregates the active adapters' gradients; after the last backward pass and before ``optimizer.step()``.

    Returns:
        A decision an active adapter.

    Raises:
        RuntimeError: before :func:`plesio_init`, or without :func:`apply_kpool_step` for this step.
        ValueError: where ``active`` is not what that returned.
    """
    pool = _pool_of(model, "post_backward_step")
    _check_step(pool, "post_backward_step", step, active)
    return pool._finish(step, pool.active)


def _pool_of(model: nn.Module, caller: str) -> Pool:
    pool = _pools.get(unwrapped(model))
    if pool is None:
        raise RuntimeError(f"{caller} was called before plesio_init(model, config) or attach(model)")
    return pool


def _check_step(pool: Pool, caller: str, step: int, active: Sequence[int]) -> None:
    if not pool._running or pool.current_step != step:
        raise RuntimeError(f"{caller} was called for step {step} before apply_kpool_step(model, {step})")
    if tuple(active) != pool.active:
        raise ValueError(f"active is {tuple(active)}, but apply_kpool_step(model, {step}) returned {pool.active}")
