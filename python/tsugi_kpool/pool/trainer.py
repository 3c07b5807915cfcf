"""``KPoolCallback``: a pool that trains under transformers' ``Trainer``. docs/pool.md says what it does and when."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..distributed.state import file_of, read_all
from ..distributed.stepping import learning_rates
from ..distributed.wrapping import unwrap
from .attach import attach
from .config import KPoolLoraConfig
from .evaluation import evaluate_active, evaluate_whole
from .members import find_members, find_tuner
from .registry import find_pool
from .training import Pool

__all__ = ["KPoolCallback"]

_log = logging.getLogger(__name__)
_attached: weakref.WeakSet[Pool] = weakref.WeakSet()  # by a callback, so that one may close what a failed run left


class KPoolCallback(TrainerCallback):
    """Trains a pool under ``Trainer``: each optimizer step is a ``pool.step()``, and checkpoints hold the pool's state.

    The pool is attached when training begins and closed when it ends. Before a checkpoint, an evaluation and the end, what
    is held fires, at the learning rate of the step before. ``args.max_grad_norm`` clips each adapter's aggregated gradient,
    in the place of ``Trainer``'s own clipping, which comes before gradients are exchanged.

    From the moment the ``Trainer`` is made, ``model.eval()`` activates the whole pool and ``model.train()`` the K active
    adapters again, so that ``evaluate``, ``predict``, the best model and ``generate`` are those of the exported adapter.

    Args:
        config: of a pool that was built by hand from ``LoraConfig``; None for the configuration of the model's pool.
        flush_on_save: flush before a checkpoint. False: the checkpoint's state file has what is held, its weights do not.
        flush_on_evaluate: flush before an evaluation. False: it evaluates without what is held.
        evaluate_whole_pool: False evaluates the K adapters that happen to be active.

    Raises:
        ValueError: an argument has a value it cannot have.
    """

    def __init__(
        self,
        config: KPoolLoraConfig | None = None,
        *,
        flush_on_save: bool = True,
        flush_on_evaluate: bool = True,
        evaluate_whole_pool: bool = True,
    ):
        if not isinstance(config, (KPoolLoraConfig, type(None))):
            raise ValueError(f"config is {config!r}, expected a KPoolLoraConfig or None")
        flags = {
            "flush_on_save": flush_on_save,
            "flush_on_evaluate": flush_on_evaluate,
            "evaluate_whole_pool": evaluate_whole_pool,
        }
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, expected True or False")
        self.config = config
        self.flush_on_save, self.flush_on_evaluate = flush_on_save, flush_on_evaluate
        self.evaluate_whole_pool = evaluate_whole_pool
        #: The pool while it trains, else None.
        self.pool: Pool | None = None
        self._args: TrainingArguments | None = None  # while max_grad_norm is taken from them
        self._handles: list[Any] = []

    # -- the run

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.config is not None:  # by hand all but one are frozen, and the optimizer takes what is not
            for parameters in find_members(unwrap(kwargs["model"]), self.config.n_adapters).parameters:
                for parameter in parameters:
                    parameter.requires_grad_(True)
        self._choose_what_is_evaluated(kwargs["model"])

    def _choose_what_is_evaluated(self, model: nn.Module) -> None:
        if self.config is None and find_tuner(unwrap(model)) is None:
            return  # no pool: on_train_begin will say so
        if self.evaluate_whole_pool:
            evaluate_whole(model, self.config)
        else:
            evaluate_active(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._release()
        left_over = find_pool(model)
        if isinstance(left_over, Pool) and left_over in _attached:
            left_over.close(flush=False)
        elif left_over is not None:
            raise RuntimeError(
                "KPoolCallback: this model has a pool attached already, and the callback attaches one by itself: leave out "
                "attach(model), or call that pool's close() before train()"
            )
        _check(args, optimizer)
        self._args, self._max_grad_norm = args, args.max_grad_norm or 0.0
        # accelerate's wrapper steps in the last micro-batch only, but what is in flight lands before the first.
        self._scaler = getattr(optimizer, "scaler", None)
        self._optimizer = optimizer.optimizer
        clip = self._max_grad_norm if self._max_grad_norm > 0 else None
        pool = self.pool = attach(model, optimizer=self._optimizer, max_grad_norm=clip, config=self.config)
        _attached.add(pool)
        pool.state_is_saved = True
        self._choose_what_is_evaluated(model)  # Trainer may have made another model than at on_init_end
        try:
            if pool.config.hold_action == "local" and pool.world_size > 1 and not self.flush_on_save:
                raise ValueError(
                    "flush_on_save is False with hold_action='local', but a checkpoint holds the parameters of rank 0 alone"
                )
            if state.global_step > 0:
                self._load(pool, args, state)
        except BaseException:
            self._release()
            raise
        pooled = {id(p) for parameters in pool.adapter_params.values() for p in parameters}
        self._others = [p for p in model.parameters() if p.requires_grad and id(p) not in pooled]
        self._rates: list[float | Tensor] | None = None
        self._losses: list[Tensor] = []
        if pool.config.routing_strategy == "loss_aware":
            self._handles.append(model.register_forward_hook(self._take_loss, with_kwargs=True))
        if clip is not None:
            _log.info("max_grad_norm = %g clips each adapter's gradient by itself, after it was exchanged", clip)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pool is None:
            return
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            self._flush(self.pool)
        self._release()

    def _release(self) -> None:
        """Let go of everything; what is held is dropped."""
        if self._args is not None:
            self._args.max_grad_norm = self._max_grad_norm
        for handle in self._handles:
            handle.remove()
        pool, self.pool, self._args, self._handles = self.pool, None, None, []
        if pool is not None:
            pool.close(flush=False)

    # -- a step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pool is None:
            return
        self.pool.abandon()  # an epoch may stop within a step
        self._losses.clear()
        self.pool.begin(self.pool.current_step)
        args.max_grad_norm = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.pool is None:
            return
        args.max_grad_norm = self._max_grad_norm
        self._record_loss(self.pool, args)
        overflowed = self._record_found_inf(self.pool)
        self._clip_others()
        self.pool.end(self.pool.current_step, self.pool.active, 1.0)
        for flag in overflowed[1:]:
            flag.copy_(overflowed[0])
        # The scheduler goes on before anything is flushed.
        self._rates = learning_rates(self._optimizer)

    def _record_found_inf(self, pool: Pool) -> list[Tensor]:
        """Under fp16, tell the pool of an overflow; the flags of all devices, the first of which becomes the ranks' own."""
        if self._scaler is None or not self._scaler.is_enabled():
            return []
        flags = list(self._scaler._found_inf_per_device(self._optimizer).values())
        if not flags:  # Trainer unscales to log the norm
            self._scaler.unscale_(self._optimizer)
            flags = list(self._scaler._found_inf_per_device(self._optimizer).values())
        for flag in flags[1:]:
            flags[0] += flag.to(flags[0].device)
        pool.record_found_inf(flags[0])
        return flags

    def _clip_others(self) -> None:
        """What trains beside the pool (``modules_to_save``), and was averaged by DDP, is clipped by itself."""
        if self._others and self._max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._others, self._max_grad_norm)

    def _take_loss(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not model.training:
            return
        loss = output.get("loss") if isinstance(output, dict) else output[0]
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._losses.append(loss.detach())
        self._is_share = kwargs.get("num_items_in_batch") is not None

    def _record_loss(self, pool: Pool, args: TrainingArguments) -> None:
        """The mean loss of the step's tokens or micro-batches, unless ``record_loss`` was called."""
        if pool.config.routing_strategy != "loss_aware" or pool._losses:
            return
        if not self._losses:
            raise ValueError(
                "routing_strategy is 'loss_aware', but the model's output has no loss (Trainer may have been given "
                "compute_loss_func or label_smoothing_factor): call tsugi_kpool.get_runtime(model).record_loss(loss) where "
                "the loss is computed"
            )
        loss = sum(self._losses[1:], self._losses[0])
        if not self._is_share:
            loss = loss / len(self._losses)
        elif args.average_tokens_across_devices:
            loss = loss * pool.world_size
        pool.record_loss(loss)

    # -- what the model is looked at for

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.pool is None:
            return
        flush = (
            control.should_training_stop
            or (control.should_save and self.flush_on_save)
            or (control.should_evaluate and self.flush_on_evaluate)
        )
        if flush:
            self._flush(self.pool)
        elif control.should_save or control.should_evaluate:
            self.pool.finish()

    on_epoch_end = on_step_end

    def _flush(self, pool: Pool) -> None:
        pool.abandon()  # an epoch may stop within a step
        with _at(self._optimizer, self._rates):
            decisions = pool.flush()
            left = [p for d in decisions for p in pool.adapter_params[d.adapter_idx] if p.grad is not None]
            if left:  # with overlap=False
                self._optimizer.step()
                for parameter in left:
                    parameter.grad = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.pool is None or state.is_hyper_param_search:  # a trial's folder is not known here
            return
        folder = _folder(args, state)
        folder.mkdir(parents=True, exist_ok=True)
        # The model is saved already, so what a later callback's wish for a checkpoint found in flight is in the state.
        extra = {"step": state.global_step, "parameters": _fingerprint(self.pool)}
        self.pool.save(folder, finish=False, extra=extra)

    def _load(self, pool: Pool, args: TrainingArguments, state: TrainerState) -> None:
        """Continue from the state in the checkpoint that ``Trainer`` has loaded; a callback is not told which it was."""
        folders = [_folder(args, state)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        here = {"step": state.global_step, "parameters": _fingerprint(pool)}
        # Looked for inside, so that what one rank does not find is heard of on all.
        pool._load("load", lambda: _states_of(pool, here, folders))

    # -- the log

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self.pool is None or "loss" not in logs or self.pool.config.aggregation_mode == "synchronous":
            return
        counts = {f"kpool/{name}": count for name, count in self.pool.counts.items()}
        numbers = {**counts, "kpool/held": sum(self.pool.held)}
        logs.update(numbers)
        state.log_history[-1].update(numbers)


def _check(args: TrainingArguments, optimizer: Any) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"KPoolCallback: n_gpu is {args.n_gpu}, for which Trainer copies the model in every step (DataParallel): start "
            "one process a GPU with torchrun, or let CUDA_VISIBLE_DEVICES name one"
        )
    kind = optimizer.accelerator_state.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"KPoolCallback: the run is distributed by {kind.value}, which keeps gradients to itself; use DDP"
        )


def _states_of(pool: Pool, here: dict[str, int], folders: list[Path]) -> list[dict[str, Any]]:
    """The states in the first of these folders that holds one of this step and of these parameters."""
    reasons = []
    for folder in folders:
        try:
            states = read_all(folder, pool.rank, pool.world_size)
        except FileNotFoundError:
            reasons.append(f"{file_of(folder, pool.rank, pool.world_size)} does not exist")
            continue
        saved = states[0]["extra"]
        if saved == here:
            return states
        file = file_of(folder, states[0]["aggregator"]["rank"], len(states))
        reasons.append(f"{file} is of step {saved.get('step')} and of other parameters")
    raise ValueError(
        f"the run goes on from step {here['step']}, but the pool's state was not found: {'; '.join(reasons)}. For "
        "a checkpoint outside of output_dir set TrainingArguments(resume_from_checkpoint=its folder) too"
    )


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _fingerprint(pool: Pool) -> int:
    """Tells the adapters' parameters of one checkpoint from those of another; the same on all ranks and devices."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for parameters in pool.adapter_params.values():
        sums = [p.detach().contiguous().view(kinds[p.element_size()]).sum() for p in parameters]
        total += int(torch.stack(sums).sum())
    return total


@contextlib.contextmanager
def _at(optimizer: torch.optim.Optimizer, rates: list[float | Tensor] | None) -> Iterator[None]:
    """The optimizer with these learning rates."""
    groups = optimizer.param_groups
    now = [group["lr"] for group in groups]
    for group, lr in zip(groups, rates or now):
        group["lr"] = lr
    try:
        yield
    finally:
        for group, lr in zip(groups, now):
            group["lr"] = lr
