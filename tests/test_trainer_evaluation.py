"""Under ``Trainer`` what is evaluated, chosen as the best, predicted and generated is what is exported: the whole pool."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from peft_models import tiny_llama
from pool_models import adapters
from sync_worker import launch
from test_trainer import (
    HELD,
    Events,
    arguments,
    flat,
    logged,
    make,
    one_thread,  # noqa: F401  a fixture
    ranks_environment,
    rows,
    same,
    trainer_of,
)
from tsugi_kpool import KPoolCallback, KPoolLoraConfig, attach, export, whole_pool

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
EVERY_OTHER = dict(eval_strategy="steps", eval_steps=2)
CONFIG = KPoolLoraConfig(n_adapters=4, k_active=2, **HELD)


def pool_of(kind):
    """A pool on a tiny Llama, and a callback for it."""
    if kind == "pool":
        return make(**HELD), KPoolCallback()
    torch.manual_seed(0)
    lora = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(layers=1), lora, adapter_name="adapter_0")
    for i in range(1, 4):
        model.add_adapter(f"adapter_{i}", lora)
    return model, KPoolCallback(CONFIG)


def stock(folder):
    """The exported adapter on a base of its own: PEFT's LoRA."""
    model = PeftModel.from_pretrained(tiny_llama(layers=1), folder)
    assert type(model.peft_config["default"]) is LoraConfig
    return model


def eval_loss(model, folder, **settings):
    return Trainer(model=model, args=arguments(folder, **settings), eval_dataset=rows(8, seed=6)).evaluate()[
        "eval_loss"
    ]


def metrics(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize("kind", ["pool", "by hand"])
def test_the_metric_is_that_of_the_exported_adapter(kind, tmp_path):
    """Before training, in the middle of it, after it, and of the best model, which a later evaluation gives again."""
    model, callback = pool_of(kind)
    exported = []

    def ship(args, state, control, **kwargs):
        exported.append(tmp_path / f"lora-{len(exported)}")
        export(model, exported[-1], config=CONFIG if kind == "by hand" else None)

    settings = dict(save_strategy="steps", save_steps=2, load_best_model_at_end=True, max_steps=6) | EVERY_OTHER
    trainer = trainer_of(model, tmp_path, callback, Events("on_evaluate", ship), **settings)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    best = trainer.evaluate()["eval_loss"]
    seen = [first, *metrics(trainer)[-4:-1], best]
    assert len(exported) == 5 and len(set(seen)) > 3
    for folder, loss in zip(exported, seen):
        assert eval_loss(stock(folder), tmp_path) == pytest.approx(loss, rel=1e-5)
    assert best == pytest.approx(trainer.state.best_metric, rel=1e-6) and best == min(seen[1:])


@pytest.mark.parametrize("kind", ["pool", "by hand"])
def test_predictions_and_generated_text_are_those_of_the_exported_adapter(kind, tmp_path):
    model, callback = pool_of(kind)
    trainer = trainer_of(model, tmp_path, callback, max_steps=3)
    trainer.train()
    data = rows(4, seed=7)
    ours = torch.tensor(trainer.predict(data).predictions)
    export(model, tmp_path / "lora", config=CONFIG if kind == "by hand" else None)
    plain = stock(tmp_path / "lora")
    theirs = torch.tensor(Trainer(model=plain, args=arguments(tmp_path)).predict(data).predictions)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ids = torch.tensor([row["input_ids"] for row in data])
    settings = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    ours, theirs = (torch.stack(m.generate(input_ids=ids, **settings).logits) for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    model.train()
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["pool", "by hand"])
def test_an_evaluation_changes_nothing_of_the_training(kind, tmp_path):
    """Nor does one of several data sets, nor one that raises."""
    (model, callback), (twin, other) = pool_of(kind), pool_of(kind)
    callback.flush_on_evaluate = other.flush_on_evaluate = False
    trainer_of(twin, tmp_path, other, max_steps=7).train()
    start, raises = adapters(model), [True]

    def metric(_):
        if raises:
            raise KeyError(raises.pop())
        return {}

    trainer = trainer_of(model, tmp_path, callback, max_steps=7, **EVERY_OTHER)
    trainer.eval_dataset, trainer.compute_metrics = {"a": rows(8, seed=6), "b": rows(8, seed=6)}, metric
    with pytest.raises(KeyError):
        trainer.train()
    model.load_state_dict(start, strict=False)
    trainer.optimizer = None
    trainer.train()
    assert same(model, twin)
    losses = {name: value for entry in trainer.state.log_history for name, value in entry.items() if "eval_" in name}
    assert losses["eval_a_loss"] == losses["eval_b_loss"]


def test_the_active_adapters_are_evaluated_where_that_is_asked_for(tmp_path):
    model, _ = pool_of("pool")
    trainer_of(model, tmp_path, KPoolCallback(), max_steps=1)  # what another Trainer asked for is taken back
    trainer = trainer_of(model, tmp_path, KPoolCallback(evaluate_whole_pool=False), max_steps=3)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert loss == eval_loss(model, tmp_path) and "train" not in model.__dict__
    with whole_pool(model):
        assert loss != eval_loss(model, tmp_path)


class WithReference(Trainer):
    """As DPO does: another adapter computes too, and the one before is activated again by its name."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        before = model.active_adapter
        model.set_adapter("ref")
        with torch.no_grad():
            model(**inputs)
        model.set_adapter(before)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize("kind", ["pool", "by hand"])
def test_a_look_at_a_reference_adapter_changes_neither_training_nor_metric(kind, tmp_path):
    results = []
    for trainer_class in (Trainer, WithReference):
        model, callback = pool_of(kind)
        model.add_adapter("ref", copy.deepcopy(model.peft_config[model.active_adapter]))
        args = arguments(tmp_path, max_steps=4, **EVERY_OTHER)
        trainer = trainer_class(
            model=model, args=args, train_dataset=rows(), eval_dataset=rows(8, seed=6), callbacks=[callback]
        )
        if kind == "by hand":
            callback.on_init_end(args, None, None, model=model)  # add_adapter froze it
        trainer.train()
        own = {name: value for name, value in adapters(model).items() if ".ref" not in name}
        results.append((metrics(trainer), logged(trainer), own))
    assert results[0][:2] == results[1][:2]
    for name, value in results[0][2].items():
        assert torch.equal(results[1][2][name], value), name


def test_a_copy_made_in_an_evaluation_trains_and_evaluates_as_the_model():
    model, callback = pool_of("pool")
    callback.on_init_end(None, None, None, model=model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        k_active = model.train()(input_ids=ids).logits
        whole = model.eval()(input_ids=ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(input_ids=ids).logits, whole)
            assert torch.equal(other.train()(input_ids=ids).logits, k_active)
            assert torch.equal(other.eval()(input_ids=ids).logits, whole)
        assert torch.equal(model(input_ids=ids).logits, whole) and not torch.equal(whole, k_active)
        model.set_adapter("default")
        assert torch.equal(model(input_ids=ids).logits, whole)
        with whole_pool(model):
            assert torch.equal(model(input_ids=ids).logits, whole)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with attach(model, optimizer=optimizer) as pool, pool.step(weight=0):
            assert torch.equal(model(input_ids=ids).logits, k_active)
        assert torch.equal(model.eval()(input_ids=ids).logits, whole)


def evaluate_on_ranks(rank, folder):
    ranks_environment(rank)
    model, callback = pool_of("pool")
    training = dict(ddp_backend="gloo", per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=4)
    trainer = trainer_of(model, folder, callback, **training, **EVERY_OTHER)
    trainer.train()
    losses = [*metrics(trainer), trainer.evaluate()["eval_loss"]]
    return losses, export(model, f"{folder}/lora-{rank}").mode, flat(model)


def test_two_ranks_evaluate_what_is_exported(tmp_path):
    (first, _, ours), (second, _, theirs) = launch(2, evaluate_on_ranks, str(tmp_path), timeout=120.0)
    assert first == second and torch.equal(ours, theirs) and first[-1] == first[-2]
    loss = eval_loss(
        stock(tmp_path / "lora-1"), tmp_path, per_device_eval_batch_size=4
    )  # tokens are counted across ranks
    assert loss == pytest.approx(first[-1], rel=1e-5)
