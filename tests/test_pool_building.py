"""What a pool's configuration names, tied heads, and copies of a pool."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from peft_models import tiny_llama
from plain_models import Nested
from pool_models import loss_of, pool_model
from tsugi_kpool import KPoolLoraConfig, attach, use_backend, whole_pool

IDS = torch.tensor([[3, 1, 7, 60, 5, 3]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def build(base, **config):
    return get_peft_model(base, KPoolLoraConfig(**(dict(r=4, n_adapters=3, k_active=2) | config)))


# ---- names that match nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, says",
    [
        (dict(target_modules=["q_proj", "w1", "c_attn"]), r"target_modules: 'c_attn', 'w1' matched no module"),
        (dict(target_modules=["q_proj", "proj"]), "target_modules: 'proj' matched no module"),
        (
            dict(target_parameters=["up_proj.weight", "up.weight"]),
            "target_parameters: 'up.weight' matched no parameter",
        ),
        (dict(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]), "target_modules: 'v_proj' matched"),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head", "score"]), "modules_to_save: 'score' matched"),
        (dict(target_modules=["q_proj"], layers_to_transform=[1, 7]), "layers_to_transform: 7 matched no module"),
        (dict(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]), "target_modules: 'lm_head' matched"),
    ],
    ids=str,
)
def test_an_entry_that_matches_nothing_is_said(config, says):
    with pytest.warns(UserWarning, match=says) as caught:
        build(tiny_llama(), **config)
    assert __file__ in [w.filename for w in caught if "matched no " in str(w.message)], "not at the user's line"


@pytest.mark.parametrize(
    "config",
    [
        dict(target_modules=["q_proj", "layers.1.mlp.up_proj"], layers_to_transform=[0, 1]),
        dict(target_modules="all-linear"),
        dict(target_modules=r".*q_proj"),
        dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True),
        dict(target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM"),
    ],
    ids=str,
)
def test_nothing_is_said_where_all_match(config, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = build(tiny_llama(tie_word_embeddings=True), **config)
        model.add_adapter("second", KPoolLoraConfig(**(dict(r=4, n_adapters=2, k_active=1) | config)))
        model.save_pretrained(tmp_path)
        PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path)
    assert not [w for w in caught if "matched no module" in str(w.message)]


def test_the_heads_that_peft_adds_by_itself_are_not_missed():
    from transformers import LlamaForSequenceClassification

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*matched no module.*")
        build(LlamaForSequenceClassification(tiny_llama().config), target_modules=["q_proj"], task_type="SEQ_CLS")


# ---- experts that newer transformers fuse into one parameter ---------------------------------------------------------


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    return MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=32, num_local_experts=2))


def qwen_moe():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    experts = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, mlp_only_layers=[0], head_dim=8)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, vocab_size=32))


def adapted(model, member):
    """The layers that have this adapter, with its rank and scaling in each."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    return {name: (layer.r[member], layer.scaling[member]) for name, layer in layers}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize(
    "make, targets",
    [
        (mixtral, ["q_proj", "w1", "w2", "w3"]),
        (mixtral, ["q_proj", "experts.w2"]),
        (mixtral, "all-linear"),
        (mixtral, r".*\.(q_proj|w2)"),
        (qwen_moe, ["q_proj", "gate_proj", "up_proj"]),
    ],
)
def test_targets_that_are_fused_into_parameters_are_what_lora_adapts(make, targets):
    lora = get_peft_model(make(), LoraConfig(target_modules=copy.copy(targets), r=4, lora_alpha=32))
    model = build(make(), target_modules=targets)
    assert any(isinstance(layer, ParamWrapper) for layer in model.modules())
    assert adapted(model, "adapter_2") == adapted(lora, "default")


def test_a_part_without_what_it_is_fused_with_is_refused():
    base = mixtral()
    with pytest.raises(ValueError, match="w1 without also targeting w3"):
        build(base, target_modules=["q_proj", "w1"])
    assert not any("lora" in name for name, _ in base.named_modules()), "half a pool was left in the model"


@pytest.mark.parametrize(
    "make, targets, count",
    [
        (mixtral, ["q_proj", "o_proj"], 2),
        (mixtral, r".*self_attn\.[qv]_proj", 2),
        (qwen_moe, ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"], 2),
    ],
)
def test_other_modules_of_such_models_are_adapted(make, targets, count):
    model = build(make(), target_modules=targets)
    assert sum(name.endswith("lora_A.adapter_2") for name, _ in model.named_modules()) == count


# ---- a head that is tied to the embedding ----------------------------------------------------------------------------


def tied(**config):
    settings = dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    return build(tiny_llama(tie_word_embeddings=True).eval(), **(settings | config))


def are_tied(model, members=("adapter_0", "adapter_1", "adapter_2")):
    embedding, head = model.get_base_model().get_input_embeddings(), model.get_base_model().get_output_embeddings()
    return [
        head.lora_A[name].weight.data_ptr() == embedding.lora_embedding_B[name].data_ptr()
        and head.lora_B[name].weight.data_ptr() == embedding.lora_embedding_A[name].data_ptr()
        and torch.equal(head.lora_A[name].weight, embedding.lora_embedding_B[name].t())
        for name in members
    ]


@torch.no_grad()
def randomise(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        lambda model: model.double(),
        lambda model: copy.deepcopy(model),
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to(torch.bfloat16).float(),
    ],
    ids=["built", "double", "deepcopy", "pickle", "bfloat16"],
)
def test_all_adapters_of_a_tied_head_are_tied(change):
    model = change(randomise(tied()))
    assert are_tied(model) == [True] * 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_a_tied_pool_begins_as_the_base_and_as_peft_does(init):
    base = tiny_llama(tie_word_embeddings=True).eval()
    expected = logits(base)
    model = tied(init_lora_weights=init)
    with whole_pool(model):
        assert torch.equal(logits(model), expected) == (init is not False)
    assert are_tied(model) == [True] * 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["default", "other"])
def test_a_tied_pool_is_saved_loaded_and_merged(name, low_cpu_mem_usage, tmp_path):
    config = KPoolLoraConfig(
        r=4, n_adapters=3, k_active=2, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True
    )
    base = tiny_llama(tie_word_embeddings=True).eval()
    model = randomise(get_peft_model(copy.deepcopy(base), config, adapter_name=name))
    with whole_pool(model):
        expected = logits(model)
    use_backend(model, "peft")
    with whole_pool(model):
        torch.testing.assert_close(logits(model), expected)
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    torch.testing.assert_close(logits(loaded), expected)
    assert are_tied(loaded) == [True] * 3
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    if not low_cpu_mem_usage:  # PEFT gives each its own when it loads embeddings so
        assert merged.lm_head.weight is merged.get_input_embeddings().weight


@pytest.mark.filterwarnings("ignore")
def test_a_second_pool_is_tied_too():
    model = tied()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    randomise(model)
    assert are_tied(model) == [True] * 3
    assert are_tied(model, [f"second_adapter_{i}" for i in range(3)]) == [True] * 3


@pytest.mark.filterwarnings("ignore")
def test_a_tied_adapter_stays_tied_while_it_is_trained():
    model = tied(k_active=1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for member in ("adapter_0", "adapter_2"):
        model.base_model.set_adapter([member])
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert are_tied(model) == [True] * 3
    moved = model.get_base_model().get_input_embeddings().lora_embedding_A
    assert moved["adapter_2"].any() and not moved["adapter_1"].any()


# ---- a second pool as a reference ------------------------------------------------------------------------------------


def copy_as_trl_does(model, default="default"):
    model.add_adapter("ref", model.peft_config[default])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def use(model, pool):
    with torch.no_grad():
        model.set_adapter(pool)
        model.set_adapter("default")


@pytest.mark.parametrize("init, says", [(True, "still has B = 0"), (False, "is no copy of it")])
def test_a_reference_that_trl_could_not_copy_is_noticed(init, says):
    model = pool_model(
        n=4, base=Nested(), target_modules=["foo", "baz"], modules_to_save=["qux"], init_lora_weights=init
    )
    randomise(model)
    copy_as_trl_does(model)
    with pytest.warns(UserWarning, match=rf"pool 'ref' .*{says}.*copy_pool\('default', 'ref'\)") as caught:
        use(model, "ref")
    assert caught[-1].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(model, "ref")  # said once


@pytest.mark.parametrize("case", ["copied", "untrained", "to train", "loaded", "deleted"])
def test_no_false_alarm(case, tmp_path):
    model = pool_model(n=4, base=Nested(), target_modules=["foo", "baz"], init_lora_weights=True)
    if case != "untrained":
        randomise(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case == "loaded":
            model.save_pretrained(tmp_path)
            model.load_adapter(tmp_path, "ref")
        else:
            copy_as_trl_does(model)
        if case == "copied":
            model.base_model.copy_pool("default", "ref")
        if case == "deleted":
            model.delete_adapter("ref")
            model.add_adapter("ref", model.peft_config["default"])
            model.base_model.copy_pool("default", "ref")
        if case == "to train":
            model.set_adapter("ref")
            randomise(model)
        use(model, "ref")


def test_copy_pool_copies_everything_that_is_trained():
    base = tiny_llama(tie_word_embeddings=False)
    model = build(
        base,
        target_modules=["q_proj"],
        modules_to_save=["norm"],
        trainable_token_indices={"embed_tokens": [3]},
    )
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    model.add_adapter("ref", model.peft_config["default"])
    model.base_model.copy_pool("default", "ref")
    model.eval()
    with whole_pool(model):
        expected = logits(model)
    model.set_adapter("ref")
    with whole_pool(model):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("step", range(3))
def test_a_copy_is_the_reference_of_whatever_is_active(step):
    """The first loss of DPO is log 2 and the first KL of GRPO 0, in any step."""
    model, x = pool_model(n=6, k=2, base=Nested(), target_modules=["foo", "baz"]), torch.randn(3, 12)
    model.add_adapter("ref", model.peft_config["default"])
    model.base_model.copy_pool("default", "ref")
    model.base_model.set_adapter([f"adapter_{2 * step}", f"adapter_{2 * step + 1}"])
    expected = model(x)
    for _ in range(2):
        model.set_adapter("ref")
        model.set_adapter("ref")
        assert torch.equal(model(x), expected)
        model.base_model.set_adapter([f"adapter_{2 * step}", f"adapter_{2 * step + 1}"])
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "arguments, settings, says",
    [
        (("default", "nobody"), {}, "target is 'nobody'; the pools are"),
        (("nobody", "ref"), {}, "source is 'nobody'"),
        (("ref", "ref"), {}, "both 'ref'"),
        (("default", "ref"), dict(n_adapters=3), "n_adapters is 4 in 'default' and 3 in 'ref'"),
        (("default", "ref"), dict(r=5), "same r needed"),
        (("default", "ref"), dict(target_modules=["foo"]), "same target_modules"),
        (("default", "ref"), dict(lora_alpha=7), "lora_alpha is 5 in 'default' and 7 in 'ref'"),
    ],
)
def test_copy_pool_refuses_pools_that_differ(arguments, settings, says):
    model = pool_model(n=4, base=Nested(), target_modules=["foo", "baz"])
    same = dict(r=3, lora_alpha=5, n_adapters=4, k_active=2, target_modules=["foo", "baz"])
    model.add_adapter("ref", KPoolLoraConfig(**(same | settings)))
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=says):
        model.base_model.copy_pool(*arguments)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_pool_of_dora_trains_its_magnitudes():
    """PEFT names them once for each adapter that is added."""
    model = pool_model(n=3, k=2, use_dora=True)
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    with attach(model, optimizer=optimizer) as pool:
        for step in range(3):
            with pool.step():
                loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sum("magnitude" in name for name in trained) == 3 * 2
    assert not [name for name, p in trained.items() if torch.equal(p, before[name])]
