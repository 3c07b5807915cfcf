"""Stock PEFT, in a process that cannot import this package, computes from an export what the whole pool computes.

Every field of ``LoraConfig`` is decided here: exported right, refused by its name, or without influence.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import config as lora
from torch import nn

from peft_models import tiny_llama
from plain_models import Attention, Convolution, Nested, Tokens
from plain_peft import PlainPeft
from pool_models import pool_by_hand, pool_model, tiny_bert, tiny_gpt2
from tsugi_kpool import KPoolLoraConfig, export, whole_pool

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, about tied weights and embeddings that are saved
IDS = torch.tensor([[3, 1, 7, 60, 5, 3], [63, 0, 2, 9, 9, 11]])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    process = PlainPeft(tmp_path_factory.mktemp("plain"))
    yield process
    process.close()


def output(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = model(inputs)
    return getattr(y, "logits", getattr(y, "last_hidden_state", y))


def pool_on(base: nn.Module, n=3, k=2, autocast_adapter_dtype=True, **config) -> nn.Module:
    """A pool whose every trained tensor is random; ``base`` stays as it is."""
    torch.manual_seed(0)
    settings = dict(r=4, lora_alpha=6, n_adapters=n, k_active=k) | config
    model = get_peft_model(
        copy.deepcopy(base), KPoolLoraConfig(**settings), autocast_adapter_dtype=autocast_adapter_dtype
    ).eval()
    return randomised(model)


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or ".lora_" in name:
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return model


def far_from(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y.double() - expected.double()).norm() / expected.double().norm()).item()


def check(plain, model, base, inputs, folder, modes=("concat", "svd", "per_adapter"), tolerance=1e-5, **arguments):
    """Each export, loaded by stock PEFT on a fresh base, is the whole pool, or the adapter; and is not the base."""
    without = output(base, inputs)
    with whole_pool(model, arguments.get("config")):
        whole = output(model, inputs)
    assert far_from(without, whole) > 1e-3, "the adapters change nothing, so nothing is compared"
    for mode in modes:
        full = dict(r=1000) if mode == "svd" else {}  # a rank that loses nothing
        export(model, folder / mode, mode=mode, **full, **arguments)
        if mode == "per_adapter":
            adapter, expected = folder / mode / "adapter_1", one_adapter(model, inputs)
        else:
            adapter, expected = folder / mode, whole
        assert far_from(plain.output(base, adapter, inputs), expected) < tolerance, mode
    return whole


def one_adapter(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The output with adapter_1 alone."""
    model = copy.deepcopy(model)
    model.base_model.set_adapter(["adapter_1"])
    return output(model, inputs)


# ---- every field of LoraConfig ---------------------------------------------------------------------------------------

EXPORTED = {
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "peft_version": "0.1",
    "base_model_name_or_path": None,  # test_resized_embeddings
    "revision": "main",
    "inference_mode": True,
    "r": 5,
    "target_modules": r".*\.1\.mlp\.(up|down)_proj",
    "target_parameters": ["mlp.up_proj.weight"],
    "exclude_modules": ["layers.0.self_attn.q_proj"],
    "lora_alpha": 11,
    "lora_dropout": 0.5,
    "fan_in_fan_out": True,
    "bias": "lora_only",
    "use_rslora": True,
    "modules_to_save": ["norm", "lm_head"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [1],
    "layers_pattern": "layers",
    "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "v_proj": 6},
    "alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 50, "v_proj": 3},
    "megatron_core": "other",
    "trainable_token_indices": [3, 60],
    "loftq_config": {"loftq_bits": 4},
    "eva_config": lora.EvaConfig(),
    "corda_config": lora.CordaConfig(),
    "lora_ga_config": getattr(lora, "LoraGAConfig", dict)(),
    "qalora_group_size": 4,
    "runtime_config": lora.LoraRuntimeConfig(ephemeral_gpu_offload=True),
    "ensure_weight_tying": True,
}
REFUSED = {
    "use_dora": True,
    "lora_bias": True,
    "velora_config": {"num_groups": 4},
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 2},
    "layer_replication": [(0, 1), (0, 2)],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "kasa_config": {"beta": 1.0},
    "megatron_config": {"layers": 2},
}
WITH = {
    "fan_in_fan_out": dict(target_modules=["c_attn", "c_fc"]),
    "layers_pattern": dict(layers_to_transform=[1]),
    "megatron_config": dict(late=True),  # the others cannot be built without what they are for
    "use_qalora": dict(late=True),
    "arrow_config": dict(late=True),
    "kasa_config": dict(late=True),
    "monteclora_config": dict(late=True),
    "use_bdlora": dict(late=True),
}


def test_every_field_of_lora_config_is_decided():
    fields = {f.name for f in dataclasses.fields(LoraConfig)}
    assert not fields - EXPORTED.keys() - REFUSED.keys(), "a new field of PEFT: is it exported right, or refused?"


@pytest.mark.parametrize("name", [name for name in EXPORTED if name != "base_model_name_or_path"])
def test_a_field_is_exported(name, plain, tmp_path):
    base = tiny_gpt2() if name == "fan_in_fan_out" else tiny_llama(attention_bias=True)
    if name in ("trainable_token_indices", "ensure_weight_tying"):
        base = tiny_llama(tie_word_embeddings=True)
    config = dict(target_modules=["q_proj", "v_proj"]) | WITH.get(name, {}) | {name: EXPORTED[name]}
    if name == "ensure_weight_tying":
        config["target_modules"] = ["q_proj", "embed_tokens"]
    if name in (
        "peft_type",
        "peft_version",
        "auto_mapping",
        "revision",
    ):  # no arguments of KPoolLoraConfig, or unchecked
        config.pop(name)
    model = pool_on(base.eval(), **config)
    if name in ("peft_version", "auto_mapping", "revision"):
        setattr(model.peft_config["default"], name, EXPORTED[name])
    check(plain, model, base, IDS, tmp_path, modes=["concat", "per_adapter"])
    saved = LoraConfig.from_pretrained(tmp_path / "concat")
    assert saved.peft_type == "LORA" and saved.inference_mode
    if name in ("task_type", "revision", "auto_mapping", "bias", "fan_in_fan_out", "modules_to_save"):
        assert getattr(saved, name) == EXPORTED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_is_refused_by_its_name(name, tmp_path):
    config = dict(WITH.get(name, {}))
    late = config.pop("late", False)
    with pytest.raises(ValueError, match=name):
        model = pool_on(
            tiny_llama(), target_modules=["q_proj"], task_type="CAUSAL_LM", **({} if late else {name: REFUSED[name]})
        )
        setattr(model.peft_config["default"], name, REFUSED[name])
        export(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_field_that_nobody_has_heard_of_is_refused(tmp_path, monkeypatch):
    @dataclasses.dataclass
    class Newer(LoraConfig):
        use_magic: bool = False

    model = pool_model()
    monkeypatch.setattr("tsugi_kpool.pool.export_config.LoraConfig", Newer)
    export(model, mode="per_adapter")
    model.peft_config["default"].use_magic = True
    with pytest.raises(ValueError, match="use_magic is True, which is not known to this version"):
        export(model, tmp_path / "lora")


# ---- layers and their names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        dict(target_modules=["foo", "baz", "qux"], rank_pattern={"^foo": 2}),
        dict(target_modules=["foo", "baz", "qux"], alpha_pattern={"^foo": 32}),
        dict(target_modules=["foo", "baz", "barxfoo"], rank_pattern={r"^bar\.foo": 7}, alpha_pattern={r"^bar\.foo": 3}),
        dict(target_modules=["foo", "baz", "qux"], rank_pattern={r"bar\.\w+": 6, "^qux": 3}, use_rslora=True),
        dict(target_modules="foo|qux"),  # and not bar.foo
        dict(target_modules="all-linear", exclude_modules=["bar.foo"], bias="all"),
        dict(target_modules=["foo"], modules_to_save=["qux"], rank_pattern={"^foo": 9}, use_rslora=True, bias="all"),
    ],
    ids=str,
)
def test_names_are_exact(settings, plain, tmp_path):
    base = Nested()
    model = pool_on(base, **settings)
    check(plain, model, base, torch.randn(5, 12), tmp_path)
    for mode in ("concat", "svd", "per_adapter/adapter_0"):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / mode)
        ours, theirs = (
            {name for name, module in m.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
            for m in (model, loaded)
        )
        assert ours == theirs


def test_one_scaling_for_readers_of_no_patterns(tmp_path):
    """vLLM scales every layer by lora_alpha / r of the configuration."""
    model = pool_on(Nested(), target_modules=["foo", "baz"], rank_pattern={"^foo": 2}, alpha_pattern={"baz": 50})
    for mode in ("concat", "per_adapter"):
        result = export(model, mode=mode)
        name = next(iter(result.configs))
        config, tensors = result.configs[name], result.tensors[name]
        share, members = (2 / 3, range(3)) if mode == "concat" else (1.0, [0])
        for path in ("foo", "bar.foo", "bar.baz"):
            layer = model.base_model.model.get_submodule(path)
            whole = sum(share * layer.get_delta_weight(f"adapter_{i}") for i in members)
            A, B = (tensors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
            torch.testing.assert_close(config.lora_alpha / config.r * B @ A, whole)
            assert A.shape[0] <= config.r


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions(dimensions, groups, plain, tmp_path):
    base, x = Convolution(dimensions, groups), torch.randn(2, 8, *[6] * dimensions)
    model = pool_on(base, target_modules=["conv"])
    check(plain, model, base, x, tmp_path, modes=["concat", "per_adapter"] + ["svd"] * (groups == 1))
    if groups > 1:
        with pytest.raises(ValueError, match="conv is a convolution with groups"):
            export(model, mode="svd")


@pytest.mark.parametrize(
    "base, inputs, settings",
    [
        (Attention, torch.randn(2, 3, 16), dict(target_modules=["attention"])),
        (Tokens, torch.arange(8)[None], dict(target_modules=["tokens", "first"], alpha_pattern={"tokens": 31})),
        (tiny_gpt2, IDS[:, :5], dict(target_modules=["c_attn", "wte", "c_proj"], fan_in_fan_out=True)),
        (tiny_bert, IDS, dict(target_modules="all-linear", task_type="TOKEN_CLS")),
    ],
    ids=["attention", "embedding", "gpt2", "bert"],
)
def test_kinds_of_layers(base, inputs, settings, plain, tmp_path):
    base = base().eval()
    check(plain, pool_on(base, **settings), base, inputs, tmp_path)


# ---- what a checkpoint holds beside A and B --------------------------------------------------------------------------


def resized(seed: int, **config) -> nn.Module:
    """Four new tokens; their rows are random, others in each process."""
    model = tiny_llama(**config)
    torch.manual_seed(seed)
    model.resize_token_embeddings(68, mean_resizing=False)
    return model.eval()


@pytest.mark.parametrize(
    "targets", [["q_proj", "embed_tokens", "lm_head"], r".*(embed_tokens|q_proj|lm_head)", ["q_proj"]], ids=str
)
def test_resized_embeddings(targets, plain, tmp_path):
    """PEFT keeps them where they are adapted, or where the base model's own files have another size."""
    name = {}
    if targets == ["q_proj"]:
        tiny_llama().config.save_pretrained(tmp_path / "base")
        name = dict(base_model_name_or_path=str(tmp_path / "base"))
    base = resized(1)
    if name:
        base.name_or_path = name["base_model_name_or_path"]
    model = pool_on(base, target_modules=targets)
    ids = torch.tensor([[65, 1, 67, 5]])
    with whole_pool(model):
        expected = output(model, ids)
    export(model, tmp_path / "lora")
    assert far_from(plain.output(resized(2), tmp_path / "lora", ids), expected) < 1e-5
    assert far_from(output(resized(2), ids), output(base, ids)) > 1e-3
    export(model, tmp_path / "without", save_embedding_layers=False)
    assert far_from(plain.output(resized(2), tmp_path / "without", ids), expected) > 1e-3


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        dict(trainable_token_indices={"embed_tokens": [3, 7, 60]}),
        dict(trainable_token_indices=[3, 7], modules_to_save=["norm"], rank_pattern={"q_proj": 2}, use_rslora=True),
        dict(target_modules=["q_proj", "embed_tokens", "lm_head"]),
        dict(modules_to_save=["embed_tokens", "lm_head"], ensure_weight_tying=True),
        dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True, bias="all"),
        dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        dict(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True, alpha_pattern={"embed_tokens": 40}),
        dict(target_modules=["q_proj", "embed_tokens"], trainable_token_indices=[3, 60]),
    ],
    ids=str,
)
def test_embeddings_and_heads(settings, tie, plain, tmp_path):
    base = tiny_llama(tie_word_embeddings=tie).eval()
    try:
        model = pool_on(base, **(dict(target_modules=["q_proj", "v_proj"]) | settings))
    except (TypeError, ValueError):
        with pytest.raises((TypeError, ValueError)):  # then PEFT has no such model
            get_peft_model(copy.deepcopy(base), LoraConfig(**(dict(target_modules=["q_proj", "v_proj"]) | settings)))
        return
    check(plain, model, base, IDS, tmp_path)


def test_a_classification_head(plain, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    base = LlamaForSequenceClassification(LlamaConfig(**config, num_labels=3, pad_token_id=0)).eval()
    model = pool_on(base, target_modules="all-linear", task_type="SEQ_CLS")
    check(plain, model, base, IDS, tmp_path)


# ---- states of the model ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disabled(model):
    with model.disable_adapter():
        yield


@pytest.mark.parametrize("state", [whole_pool, disabled, None], ids=["whole_pool", "disabled", "one active"])
def test_what_is_active_does_not_matter(state, plain, tmp_path):
    base = Nested()
    model, x = pool_on(base, target_modules=["foo", "baz"]), torch.randn(5, 12)
    with whole_pool(model):
        expected = output(model, x)
    if state is None:
        model.base_model.set_adapter(["adapter_1"])
    with state(model) if state else contextlib.nullcontext():
        export(model, tmp_path / "lora")
        export(model, tmp_path / "each", mode="per_adapter")
    assert far_from(plain.output(base, tmp_path / "lora", x), expected) < 1e-5
    assert far_from(plain.output(base, tmp_path / "each" / "adapter_1", x), one_adapter(model, x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_sixteen_bits(dtype, autocast, plain, tmp_path):
    """Folding a scaling into B must not round it: stock PEFT computes in float32 what the tensors say."""
    base = Nested()
    settings = dict(target_modules=["foo", "baz", "qux"], alpha_pattern={"^foo": 3.3}, use_rslora=True)
    model = pool_on(base.to(dtype), autocast_adapter_dtype=autocast, **settings)
    exact = copy.deepcopy(model).float()
    x = torch.randn(5, 12)
    with whole_pool(exact):
        expected = output(exact, x)
    for mode in ("concat", "svd")[: 2 if autocast else 1]:
        export(model, tmp_path / mode, mode=mode, **(dict(r=12) if mode == "svd" else {}))
        assert far_from(plain.output(copy.deepcopy(base).float(), tmp_path / mode, x), expected) < 1e-5


def test_offloaded_and_compiled_models(plain, tmp_path):
    from accelerate import cpu_offload

    base, x = Nested(), torch.randn(5, 12)
    model = pool_on(base, target_modules=["foo", "baz"], modules_to_save=["qux"])
    check(plain, model, base, x, tmp_path / "before")
    with whole_pool(model):
        expected = output(model, x)
    compiled = copy.deepcopy(model)
    inner = compiled.base_model.model
    inner.bar = torch.compile(inner.bar)  # never run: only its names differ
    export(torch.compile(compiled), tmp_path / "compiled")
    assert far_from(plain.output(base, tmp_path / "compiled", x), expected) < 1e-5
    export(cpu_offload(model, torch.device("cpu")), tmp_path / "offloaded")
    assert far_from(plain.output(base, tmp_path / "offloaded", x), expected) < 1e-5
    with pytest.raises(ValueError, match="has no values"):
        export(copy.deepcopy(compiled).to("meta"))


def test_a_base_of_another_class(plain, tmp_path):
    from transformers import LlamaModel

    base = LlamaModel(tiny_llama().config).eval()
    model = pool_on(base, target_modules=["q_proj", "down_proj"])
    check(plain, model, base, IDS, tmp_path)
    saved = LoraConfig.from_pretrained(tmp_path / "concat")
    assert saved.auto_mapping["base_model_class"] == "LlamaModel"


def test_the_active_pool_of_two_is_exported(plain, tmp_path):
    base, x = Nested(), torch.randn(5, 12)
    model = pool_on(base, target_modules=["foo", "barxfoo"], modules_to_save=["qux"])
    settings = dict(r=2, n_adapters=4, k_active=1, target_modules="bar.foo|foo", modules_to_save=["qux"])
    model.add_adapter("second", KPoolLoraConfig(**settings))
    for name in ("second", "default"):
        model.set_adapter(name)
        check(plain, randomised(model), base, x, tmp_path / name, modes=["concat", "svd"])
    assert LoraConfig.from_pretrained(tmp_path / "second" / "concat").r == 8


def test_an_export_is_a_copy_and_leaves_the_model_alone():
    model = pool_on(Nested(), target_modules=["foo", "baz"], modules_to_save=["qux"], bias="all")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mode in ("concat", "svd", "per_adapter"):
        for tensors in export(model, mode=mode).tensors.values():
            for tensor in tensors.values():
                tensor.fill_(7.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---- pools by hand ---------------------------------------------------------------------------------------------------


def test_a_pool_by_hand(plain, tmp_path):
    config = KPoolLoraConfig(n_adapters=3, k_active=1)
    base = Nested()
    settings = dict(target_modules=["foo", "baz"], alpha_pattern={"^foo": 9}, rank_pattern={"baz": 2})
    check(plain, pool_by_hand(3, copy.deepcopy(base), **settings), base, torch.randn(4, 12), tmp_path, config=config)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_pool_by_hand_of_unlike_adapters(bias, plain, tmp_path):
    base, x, config = Nested(), torch.randn(4, 12), KPoolLoraConfig(n_adapters=2, k_active=1)
    first = LoraConfig(r=2, target_modules=["foo"], bias=bias)
    model = get_peft_model(copy.deepcopy(base), first, adapter_name="adapter_0")
    model.add_adapter("adapter_1", LoraConfig(r=5, lora_alpha=3, target_modules=["baz", "foo"], use_rslora=True))
    modes = ["concat", "svd"] + ["per_adapter"] * (bias == "none")
    check(plain, randomised(model), base, x, tmp_path, modes=modes, config=config)
    if bias == "all":
        with pytest.raises(ValueError, match="bias of 'adapter_0' is 'all'.*use mode='concat'"):
            export(model, mode="per_adapter", config=config)


def test_modules_to_save_of_a_pool_by_hand_go_with_their_adapter(plain, tmp_path):
    base, x = Nested(), torch.randn(4, 12)
    model = randomised(pool_by_hand(2, copy.deepcopy(base), target_modules=["foo"], modules_to_save=["qux"])).eval()
    config = KPoolLoraConfig(n_adapters=2, k_active=1)
    check_one = export(model, tmp_path, mode="per_adapter", config=config)
    assert sorted(check_one.configs) == ["adapter_0", "adapter_1"]
    model.set_adapter("adapter_1")
    assert far_from(plain.output(base, tmp_path / "adapter_1", x), output(model, x)) < 1e-5
    with pytest.raises(ValueError, match="modules_to_save of 'adapter_0'"):
        export(model, config=config)


def test_parameters_of_a_pool_by_hand(plain, tmp_path):
    base = Nested()
    config = LoraConfig(r=2, target_parameters=["qux.weight"], target_modules=[])
    model = get_peft_model(copy.deepcopy(base), config, adapter_name="adapter_0")
    model.add_adapter("adapter_1", config)
    check(
        plain, randomised(model), base, torch.randn(3, 12), tmp_path, config=KPoolLoraConfig(n_adapters=2, k_active=1)
    )
