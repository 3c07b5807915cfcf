"""``KPoolCallback``: a pool under the real ``Trainer`` does what the loop by hand does."""

from __future__ import annotations

import ast
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import tsugi_kpool
from peft_models import tiny_llama
from pool_models import adapters, pool_model
from sync_worker import launch
from tsugi_kpool import KPoolCallback, KPoolLoraConfig, attach, get_runtime
from tsugi_kpool.pool.registry import find_pool

HELD = dict(aggregation_mode="buffer_convergence", trigger="relative", relative_theta=1.0, buffer_capacity=4)
FULL = dict(aggregation_mode="buffer_convergence", buffer_convergence_eps=1e-12, buffer_capacity=3, stagger=False)
NEVER_BELOW = dict(aggregation_mode="buffer_convergence", buffer_convergence_eps=1e-12, buffer_capacity=32)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that threads cost more than they gain, above all where others run too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(**settings):
    settings = dict(n=4, k=2, target_modules=["q_proj", "down_proj"]) | settings
    return pool_model(base=tiny_llama(layers=1), **settings)


def rows(count=22, seed=5):
    """Sequences in which each token follows from the one before; the last labels of some do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randint(64, (count, 1), generator=generator) + 7 * torch.arange(8)) % 64
    labels = ids.clone()
    labels[::3, 5:] = -100
    return [{"input_ids": i, "labels": l} for i, l in zip(ids.tolist(), labels.tolist())]


def arguments(folder, **settings):
    settings = (
        dict(
            num_train_epochs=2,
            per_device_train_batch_size=4,
            learning_rate=2e-2,
            weight_decay=0.1,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        | settings
    )
    return TrainingArguments(output_dir=str(folder), **settings)


def trainer_of(model, folder, callback=None, *others, data=None, **settings):
    callbacks = [callback or KPoolCallback(), *others]
    data = rows() if data is None else data
    args = arguments(folder, **settings)
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=rows(8, seed=6), callbacks=callbacks)


class Recorder(TrainerCallback):
    """What Trainer fed to the model: the keyword arguments of each micro-batch, step by step."""

    def __init__(self, model):
        self.steps, self.pool = [], None
        model.register_forward_pre_hook(self._record, with_kwargs=True)

    def on_step_begin(self, *_, model, **__):
        self.steps.append([])
        self.pool = find_pool(model)

    def _record(self, model, _, kwargs):
        if model.training:
            self.steps[-1].append(dict(kwargs))


class Events(TrainerCallback):
    """Calls ``function(callback arguments)`` at one event."""

    def __init__(self, event, function):
        setattr(self, event, lambda args, state, control, **kwargs: function(args, state, control, **kwargs))


def by_hand(model, args, steps, *, max_grad_norm=None, flush_after=(), config=None, record=False):
    """The loop of docs/pool.md over the same batches, with Trainer's optimizer and scheduler.

    Returns the loss of each step, and what the router knows at the end.
    """
    trainer = Trainer(model=model, args=args)
    with attach(model, config=config):
        trainer.create_optimizer_and_scheduler(len(steps))
    optimizer, scheduler, losses = trainer.optimizer, trainer.lr_scheduler, []
    model.train()
    with attach(model, optimizer=optimizer, max_grad_norm=max_grad_norm, config=config) as pool:
        for done, step in enumerate(steps, 1):
            with pool.step():
                # Trainer counts the step's tokens, of all ranks, and DDP would take the mean; or it takes the mean itself.
                share = pool.world_size if "num_items_in_batch" in step[0] else 1 / len(step)
                parts = [model(**kwargs).loss * share for kwargs in step]
                for loss in parts:
                    loss.backward()
                losses.append(sum(parts).item())
                if record:
                    pool.record_loss(losses[-1])
            optimizer.step()
            optimizer.zero_grad()
            if done in flush_after or done == len(steps):
                pool.flush()
                optimizer.step()  # where it is the caller's to step
                optimizer.zero_grad()
            scheduler.step()
    return losses, known(pool)


def known(pool):
    """The router's losses; -1 for an adapter without."""
    return [-1.0 if loss is None else loss for loss in pool._router.losses]


def same(model, other):
    ours, theirs = adapters(model), adapters(other)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def logged(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CASES = {
    "plain": (dict(), dict(max_grad_norm=0.0)),
    "accumulation": (dict(), dict(gradient_accumulation_steps=4)),
    "clipped": (dict(), dict(max_grad_norm=0.02)),
    "constant rate": (dict(routing_strategy="random"), dict(lr_scheduler_type="constant", max_steps=9)),
    "loss-aware": (dict(routing_strategy="loss_aware"), dict(gradient_accumulation_steps=2)),
    "loss-aware, means": (dict(routing_strategy="loss_aware"), dict(gradient_accumulation_steps=4, max_steps=6)),
    "held": (HELD, dict()),
    "held, accumulation": (HELD, dict(gradient_accumulation_steps=4, max_grad_norm=0.05)),
    "held to the end": (NEVER_BELOW, dict(max_grad_norm=0.01)),
    "held, yours to step": (HELD | dict(overlap=False, lr_scaling="none"), dict(max_grad_norm=0.02)),
}


@pytest.mark.parametrize("name", CASES)
def test_trainer_trains_as_the_loop_by_hand(name, tmp_path):
    """Bit for bit: batches, clipping, weight decay and a rate that falls to zero, at the end of which gradients are held."""
    settings, training = CASES[name]
    model, twin = make(**settings), make(**settings)
    recorder = Recorder(model)
    trainer = trainer_of(model, tmp_path, None, recorder, **training)
    if "means" in name:  # as for a model that takes no num_items_in_batch
        trainer.model_accepts_loss_kwargs = False
    trainer.train()
    clip = trainer.args.max_grad_norm
    assert clip == training.get("max_grad_norm", 1.0), "args were left changed"
    assert find_pool(model) is None and not model._forward_hooks
    args = arguments(tmp_path, **training)
    losses, theirs = by_hand(twin, args, recorder.steps, max_grad_norm=clip or None, record=True)
    assert known(recorder.pool) == pytest.approx(theirs, rel=1e-6)
    assert len(losses) == trainer.state.global_step and not same(model, make(**settings))
    assert logged(trainer) == pytest.approx(losses, rel=1e-6)
    assert same(model, twin)


def test_an_epoch_that_does_not_divide_ends_with_a_shorter_step(tmp_path):
    recorder = Recorder(model := make())
    trainer_of(model, tmp_path, None, recorder, gradient_accumulation_steps=4).train()
    assert [len(step) for step in recorder.steps] == [4, 2] * 2  # 22 rows, 4 in a batch


def test_a_pool_by_hand_trains_with_its_config(tmp_path):
    def build():
        torch.manual_seed(0)
        lora = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(tiny_llama(layers=1), lora, adapter_name="adapter_0")
        for i in range(1, 4):
            model.add_adapter(f"adapter_{i}", lora)
        return model

    config = KPoolLoraConfig(n_adapters=4, k_active=2, **HELD)
    model, twin, resumed = build(), build(), build()
    recorder = Recorder(model)
    training = dict(save_strategy="steps", save_steps=7)
    trainer_of(model, tmp_path, KPoolCallback(config), recorder, **training).train()
    by_hand(twin, arguments(tmp_path), recorder.steps, max_grad_norm=1.0, config=config, flush_after=(7,))
    assert same(model, twin)
    trainer = trainer_of(resumed, tmp_path, KPoolCallback(config), **training)
    trainer.create_optimizer()  # PEFT freezes all but one adapter when Trainer loads them
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert same(model, resumed)


# ---- checkpoints and evaluations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [HELD, NEVER_BELOW | dict(routing_strategy="loss_aware")], ids=["planned", "stepwise"]
)
@pytest.mark.parametrize("flush", [True, False])
def test_a_resumed_run_is_the_run_that_never_stopped(flush, settings, tmp_path):
    settings = settings | dict(lora_dropout=0.1)
    training = dict(save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=3, max_steps=13)
    model = make(**settings)
    whole = trainer_of(model, tmp_path, KPoolCallback(flush_on_save=flush, flush_on_evaluate=flush), **training)
    whole.train()
    saved = torch.load(tmp_path / "checkpoint-5" / "kpool_state_rank0.pt", weights_only=True)
    held = [entry["held"] for entry in saved["aggregator"]["adapters"]]
    assert (sum(held) == 0) == flush
    last = torch.load(tmp_path / "checkpoint-13" / "kpool_state_rank0.pt", weights_only=True)
    assert not any(entry["held"] for entry in last["aggregator"]["adapters"]), "the end is a flush"

    resumed = make(**settings)
    trainer = trainer_of(resumed, tmp_path, KPoolCallback(flush_on_save=flush, flush_on_evaluate=flush), **training)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainer.state.global_step == 13 and same(resumed, model)
    counted, counted_on = ([log for log in t.state.log_history if "kpool/fire" in log][-1] for t in (whole, trainer))
    for name in ("kpool/fire", "kpool/hold", "kpool/held"):
        assert counted[name] == counted_on[name], name


def test_what_is_held_fires_before_a_checkpoint_an_evaluation_and_the_end(tmp_path):
    model = make(**NEVER_BELOW, diagnostics_dir=str(tmp_path))
    twin = make(**NEVER_BELOW)
    held, weights = {}, {}

    def look(what):
        def function(args, state, control, **kwargs):
            held[what, state.global_step] = sum(get_runtime(model).held)
            weights[what, state.global_step] = adapters(model)

        return Events(f"on_{what}", function)

    recorder = Recorder(model)
    training = dict(eval_strategy="steps", eval_steps=3, save_strategy="epoch", max_steps=10)
    trainer_of(model, tmp_path, None, look("evaluate"), look("save"), look("step_end"), recorder, **training).train()
    by_hand(twin, arguments(tmp_path), recorder.steps, max_grad_norm=1.0, flush_after=(3, 6, 9))
    assert same(model, twin)
    assert {key for key, count in held.items() if count == 0} == {
        *(("evaluate", step) for step in (3, 6, 9, 10)),
        *(("save", step) for step in (6, 10)),
        *(("step_end", step) for step in (3, 6, 9, 10)),
    }
    lines = [json.loads(line) for line in (tmp_path / "decisions-rank0.jsonl").read_text().splitlines()]
    fired = {(line["step"], line["reason"]) for line in lines if line["decision"] == "FIRE"}
    assert fired == {(step - 1, "fire_flush") for step in (3, 6, 9, 10)}
    saved = make()
    saved.load_adapter(tmp_path / "checkpoint-6", "default")
    assert all(torch.equal(value, weights["save", 6][name]) for name, value in adapters(saved).items())


def test_windows_stay_whole_where_nothing_is_flushed(tmp_path):
    """Checkpoints and evaluations then change nothing, but the optimizer has done all that was in flight."""
    models = make(**HELD), make(**HELD)
    callback = KPoolCallback(flush_on_save=False, flush_on_evaluate=False)
    recorder, flights = Recorder(models[0]), []

    def look(*_, **__):
        flights.append([a.flight for a in callback.pool._aggregator._adapters if a.flight is not None])

    training = dict(eval_strategy="steps", eval_steps=3, save_strategy="steps", save_steps=5, max_steps=12)
    trainer_of(models[0], tmp_path, callback, recorder, Events("on_evaluate", look), **training).train()
    by_hand(models[1], arguments(tmp_path, max_steps=12), recorder.steps, max_grad_norm=1.0)
    assert same(*models) and flights == [[]] * 4


def test_a_checkpoint_that_a_later_callback_asked_for_loses_nothing(tmp_path):
    """Its model is saved with a reduce in flight, which the state then holds."""

    def ask(args, state, control, **kwargs):
        control.should_save = state.global_step == 4

    model = make(**NEVER_BELOW | dict(buffer_capacity=2))
    trainer_of(model, tmp_path, None, Events("on_step_end", ask), max_steps=9).train()
    saved = torch.load(tmp_path / "checkpoint-4" / "kpool_state_rank0.pt", weights_only=True)
    assert sum(entry["held"] for entry in saved["aggregator"]["adapters"]) > 0
    resumed = make(**NEVER_BELOW | dict(buffer_capacity=2))
    trainer_of(resumed, tmp_path, max_steps=9).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert not same(resumed, make(**NEVER_BELOW))


def test_the_best_model_stays_the_best_model(tmp_path):
    """Also where training ends unforeseen, with gradients held."""
    training = dict(
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True
    )
    pools = []

    def stop(args, state, control, **kwargs):
        pools.append(get_runtime(kwargs["model"]))
        control.should_epoch_stop = state.global_step == 5

    model = make(**NEVER_BELOW)
    trainer = trainer_of(model, tmp_path, None, Events("on_step_end", stop), num_train_epochs=1, **training)
    worse = iter([1, 2])
    trainer.compute_metrics = lambda _: {"worse": next(worse)}
    trainer.args.metric_for_best_model, trainer.args.greater_is_better = "worse", False
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2") and sum(pools[-1].held) > 0
    best = make()
    best.load_adapter(tmp_path / "checkpoint-2", "default")
    assert same(model, best) and not same(model, make())
    trainer.compute_metrics = trainer.args.metric_for_best_model = None
    trainer.args.load_best_model_at_end = False
    trainer.train()  # and it trains again
    assert trainer.state.global_step == 5 and not same(model, best)
    assert sum(pools[-1].held) == 0


@pytest.mark.parametrize("strategy", ["best", "epoch"])
def test_other_strategies_save_what_can_be_resumed(strategy, tmp_path):
    training = dict(eval_strategy="epoch", save_strategy=strategy, metric_for_best_model="loss")
    model = make(**HELD)
    trainer_of(model, tmp_path, **training).train()
    resumed = make(**HELD)
    trainer_of(resumed, tmp_path, **training).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same(resumed, model)


def test_a_state_that_is_missing_or_another_runs_is_an_error(tmp_path):
    training = dict(save_strategy="steps", save_steps=4, max_steps=6)
    trainer_of(make(**HELD), tmp_path / "a", **training).train()
    trainer_of(make(**HELD, seed=1), tmp_path / "b", **training).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    model = make(**HELD)

    trainer = trainer_of(model, tmp_path / "b", **training)
    with pytest.raises(ValueError, match="b/checkpoint-4/kpool_state_rank0.pt is of step 4 and of other parameters"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert find_pool(model) is None
    trainer = trainer_of(model, tmp_path / "b", **training, resume_from_checkpoint=checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 6

    os.remove(tmp_path / "a" / "checkpoint-4" / "kpool_state_rank0.pt")
    trainer = trainer_of(model, tmp_path / "a", **training)
    with pytest.raises(ValueError, match="from step 4, .*a/checkpoint-4/kpool_state_rank0.pt does not exist"):
        trainer.train(resume_from_checkpoint=checkpoint)


# ---- what goes wrong, and what is looked at ----------------------------------------------------------------------


@pytest.mark.parametrize("event", ["on_substep_end", "on_pre_optimizer_step", "on_step_end"])
def test_after_an_interrupted_run_the_next_one_starts_anew(event, tmp_path):
    def stop(args, state, control, **kwargs):
        if state.global_step == 2 and stop.armed:
            raise KeyboardInterrupt

    model, uninterrupted = make(**HELD), make(**HELD)
    start = adapters(model)
    training = dict(gradient_accumulation_steps=2, max_steps=5)
    trainer_of(uninterrupted, tmp_path, **training).train()
    trainer = trainer_of(model, tmp_path, None, Events(event, stop), **training)
    for again in (trainer_of(model, tmp_path, **training), trainer):
        stop.armed = True
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert find_pool(model) is not None
        stop.armed = False
        model.load_state_dict(start, strict=False)
        again.optimizer = None
        again.train()
        assert again.args.max_grad_norm == 1.0 and find_pool(model) is None
        assert same(model, uninterrupted)


def test_a_pool_that_somebody_else_attached_is_left_alone(tmp_path):
    model = make()
    with attach(model) as pool:
        with pytest.raises(RuntimeError, match="KPoolCallback: .*attached already, and the callback"):
            trainer_of(model, tmp_path).train()
        assert find_pool(model) is pool


def test_evaluating_and_predicting_outside_of_training(tmp_path):
    trainer = trainer_of(make(**HELD), tmp_path, max_steps=3)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.predict(rows(4)).predictions.shape == (4, 8, 64)


def test_counts_are_logged(tmp_path, caplog):
    model = make(**HELD)
    seen = []
    log = Events("on_log", lambda args, state, control, logs, **_: seen.append(dict(logs)))
    with caplog.at_level(logging.INFO, logger="tsugi_kpool.pool.trainer"):
        trainer = trainer_of(model, tmp_path, None, log, max_steps=6)
        trainer.train()
    assert [record.getMessage() for record in caplog.records] == [
        "max_grad_norm = 1 clips each adapter's gradient by itself, after it was exchanged"
    ]
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["kpool/fire"] for entry in entries] == [logs["kpool/fire"] for logs in seen if "loss" in logs]
    assert entries[0]["kpool/held"] == 2 and entries[-1]["kpool/held"] == 0
    assert entries[-1]["kpool/fire"] > 0 and entries[-1]["kpool/hold"] > 0


def test_an_epoch_that_stops_within_a_step(tmp_path):
    """The step is repeated, and keeps what its micro-batches left, as without a pool."""

    def stop(args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 2

    model = make(**NEVER_BELOW)
    pools = []
    active = []

    def look(*_, **__):
        pools.append(get_runtime(model))
        active.append(pools[-1].active)

    others = Events("on_substep_end", stop), Events("on_step_begin", look)
    trainer = trainer_of(model, tmp_path, None, *others, gradient_accumulation_steps=2)
    trainer.train()
    assert active == [(0, 1), (2, 3), (0, 1), (0, 1)]
    assert sum(pools[-1].held) == 0, "training ended before max_steps, and what was held was dropped"
    assert trainer.args.max_grad_norm == 1.0


def test_loss_aware_routing_needs_a_loss_that_can_be_seen(tmp_path):
    model = make(routing_strategy="loss_aware")
    with pytest.raises(ValueError, match="no loss .*get_runtime.model..record_loss"):
        trainer_of(model, tmp_path, label_smoothing_factor=0.1, max_steps=2).train()

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**inputs).loss
            if model.training:
                get_runtime(model).record_loss(7.0)
            return loss

    callback, losses = KPoolCallback(), []
    look = Events("on_step_end", lambda *_, **__: losses.append(callback.pool.state_dict()["router"]["losses"]))
    args = arguments(tmp_path, max_steps=2)
    Own(model=model, args=args, train_dataset=rows(), callbacks=[callback, look]).train()
    assert set(losses[-1]) == {7.0, None}


def test_what_trains_beside_the_pool(tmp_path):
    model = make(**HELD, modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    before, norms = head.detach().clone(), []
    look = Events("on_optimizer_step", lambda *_, **__: norms.append(head.grad.norm().item()))
    trainer_of(model, tmp_path, None, look, max_steps=4, max_grad_norm=1e-3).train()
    assert not torch.equal(head, before)
    assert norms == pytest.approx([1e-3] * 4, rel=1e-2)


@pytest.mark.parametrize("overflow", [False, True])
def test_fp16_leaves_out_a_step_that_overflowed(overflow, tmp_path):
    """accelerate takes fp16 to GPUs only; its scaler is put in by hand here, and is a real one."""
    model = make(n=2, k=1, **HELD)
    decisions = []

    def look(*_, **__):
        decisions.append([d.reason for d in callback.pool.decisions])

    def spoil(gradient):
        return gradient * float("inf") if overflow and callback.pool.current_step == 2 else gradient

    callback = KPoolCallback()
    trainer = trainer_of(model, tmp_path, callback, Events("on_step_end", look), max_steps=6, max_grad_norm=0.02)
    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(spoil)
    try:
        trainer.train()
    finally:
        accelerator.state._mixed_precision = "no"
    assert (decisions[2] == ["hold_nonfinite"]) == overflow
    assert sum(step == ["hold_nonfinite"] for step in decisions) == overflow
    assert accelerator.scaler.get_scale() == (128.0 if overflow else 256.0)
    assert all(torch.isfinite(value).all() for value in adapters(model).values())
    assert not same(model, make(n=2, k=1, **HELD))


def test_bf16_trains(tmp_path):
    model = make(**HELD)
    trainer = trainer_of(model, tmp_path, bf16=True, num_train_epochs=4)
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="config is 3, expected a KPoolLoraConfig or None"):
        KPoolCallback(3)
    for name in ("flush_on_save", "flush_on_evaluate", "evaluate_whole_pool"):
        with pytest.raises(ValueError, match=f"{name} is 'yes', expected True or False"):
            KPoolCallback(**{name: "yes"})


def test_what_cannot_be_trained_under_is_refused(tmp_path):
    trainer = trainer_of(model := make(), tmp_path, max_steps=1)
    trainer.args._n_gpu = 2  # nn.DataParallel, which is a passage without GPUs
    with pytest.raises(ValueError, match="n_gpu is 2, .*one process a GPU"):
        trainer.train()
    assert find_pool(model) is None
    trainer.args._n_gpu = 0
    optimizer = SimpleNamespace(accelerator_state=SimpleNamespace(distributed_type=DistributedType.DEEPSPEED))
    with pytest.raises(ValueError, match="distributed by DEEPSPEED"):
        KPoolCallback().on_train_begin(trainer.args, None, None, model=model, optimizer=optimizer)


def test_models_without_a_pool_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no KPoolLoraConfig"):
        trainer_of(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), tmp_path).train()


def test_the_package_imports_trainer_only_when_asked():
    """It takes seconds."""
    for path in Path(tsugi_kpool.__file__).parent.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names}
            assert path.name == "trainer.py" or not {"trainer", "transformers", "accelerate"} & roots, path
    assert tsugi_kpool.KPoolCallback is KPoolCallback
    with pytest.raises(AttributeError, match="no attribute 'KPoolCallBack'"):
        tsugi_kpool.KPoolCallBack  # noqa: B018


# ---- several ranks -----------------------------------------------------------------------------------------------


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def ranks_environment(rank):
    size = dist.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")


def train_ranks(rank, folder, settings, training, resume=None, callback=None):
    """Trainer on this rank; its parameters, and those of the loop by hand over the batches that this rank had."""
    ranks_environment(rank)
    model, twin = make(**settings), make(**settings)
    recorder = Recorder(model)
    training = dict(ddp_backend="gloo", per_device_train_batch_size=2) | training
    trainer = trainer_of(model, folder, KPoolCallback(**(callback or {})), recorder, **training)
    trainer.train(resume_from_checkpoint=resume)
    result = {"steps": trainer.state.global_step, "losses": logged(trainer), "ours": flat(model)}
    if resume is None and callback is None:
        args = arguments(folder, **training)
        _, theirs = by_hand(twin, args, recorder.steps, max_grad_norm=args.max_grad_norm or None, record=True)
        result["theirs"] = flat(twin)
        assert known(recorder.pool) == pytest.approx(theirs, rel=1e-6)
    return result


@pytest.mark.parametrize(
    ("settings", "training"),
    [
        (dict(), dict(gradient_accumulation_steps=2)),
        (HELD | dict(routing_strategy="loss_aware"), dict(max_grad_norm=0.02)),
        (NEVER_BELOW | dict(overlap=False, lr_scaling="none", buffer_capacity=3), dict(max_grad_norm=0.02)),
    ],
    ids=["synchronous", "held", "held, yours to step"],
)
def test_two_ranks_are_the_loop_by_hand_on_two_ranks(settings, training, tmp_path):
    first, second = launch(2, train_ranks, str(tmp_path), settings, training)
    assert torch.equal(first["ours"], second["ours"]) and first["losses"] == second["losses"]
    assert torch.equal(first["ours"], first["theirs"]) and not torch.equal(first["ours"], flat(make(**settings)))


def train_plain(rank, folder, settings, training):
    """An ordinary LoRA under Trainer's DDP, and a pool of that one adapter."""
    ranks_environment(rank)
    training = dict(ddp_backend="gloo", per_device_train_batch_size=2, gradient_accumulation_steps=2) | training
    results = []
    for callbacks in ([], [KPoolCallback()]):
        model = make(n=1, k=1, **settings)
        args = arguments(folder, **training)
        trainer = Trainer(model=model, args=args, train_dataset=rows(), callbacks=callbacks)
        trainer.train()
        results.append((logged(trainer), flat(model)))
    return results


@pytest.mark.parametrize(
    ("settings", "training"),
    [(dict(), dict(max_grad_norm=0.05)), (dict(modules_to_save=["lm_head"]), dict(max_grad_norm=0.0))],
    ids=["clipped", "with a head that trains beside it"],
)
def test_a_pool_of_one_on_two_ranks_is_plain_lora_under_ddp(settings, training, tmp_path):
    (plain, ours), (_, other) = launch(2, train_plain, str(tmp_path), settings, training)
    assert torch.equal(ours[1], other[1]), "the ranks differ"
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    # The gradients' sum over ranks is divided at another place than DDP divides.
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-5, atol=1e-6)


def train_and_resume(rank, folder):
    ranks_environment(rank)
    training = dict(ddp_backend="gloo", per_device_train_batch_size=2, save_strategy="steps", save_steps=4, max_steps=9)
    results = []
    for resume in (None, f"{folder}/checkpoint-4"):
        model = make(**FULL, lora_dropout=0.1)
        trainer = trainer_of(model, folder, KPoolCallback(flush_on_save=False), **training)
        trainer.train(resume_from_checkpoint=resume)
        trainer.train(resume_from_checkpoint=resume)  # twice: DDP is the first time's
        results.append(flat(model))
    sentences = []
    for refused in (dict(ddp_find_unused_parameters=False), dict(ddp_static_graph=True)):
        try:
            trainer_of(make(**HELD), folder, **training, **refused).train()
        except ValueError as error:
            sentences.append(str(error))
    try:
        trainer_of(make(**HELD, hold_action="local"), folder, KPoolCallback(flush_on_save=False), **training).train()
    except ValueError as error:
        sentences.append(str(error))
    return results, sentences


def test_two_ranks_resume_and_so_does_one_from_two(tmp_path):
    ((first, resumed), sentences), ((second, other), _) = launch(2, train_and_resume, str(tmp_path))
    assert torch.equal(first, second) and torch.equal(resumed, other) and torch.equal(first, resumed)
    assert "ddp_find_unused_parameters" in sentences[0] and "ddp_static_graph" in sentences[1]
    assert "flush_on_save is False with hold_action='local'" in sentences[2]

    checkpoint, held = tmp_path / "checkpoint-4", []
    states = [torch.load(checkpoint / f"kpool_state_rank{r}.pt", weights_only=True)["aggregator"] for r in (0, 1)]
    sums = [torch.stack([s["adapters"][i]["sum"] for s in states]).sum(0) for i in (0, 1)]

    def look(*_, **__):
        held[:] = [a.flat.clone() for a in callback.pool._aggregator._adapters[:2]]

    callback = KPoolCallback()
    training = dict(per_device_train_batch_size=4, max_steps=9, save_strategy="steps", save_steps=4)
    trainer = trainer_of(make(**FULL, lora_dropout=0.1), tmp_path, callback, Events("on_train_begin", look), **training)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 9
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(held, sums)) and held[0].any()
