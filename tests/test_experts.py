"""LoRA on experts and routers (``lora.ParamWrapper``) on the ops: PEFT's numbers, PEFT's states, and what is left to PEFT."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.hotswap import hotswap_adapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moe_models import FAMILIES, IMPLEMENTATIONS, adapted_moe, experts_of, small_moe
from peft_models import assert_same, compare, error, run, tiny_llama
from tsugi_kpool import use_backend

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:tsugi_kpool leaves"),
]


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(3,), (3, 2)], ids=str)
@pytest.mark.parametrize("family, implementation", IMPLEMENTATIONS)
def test_a_model_computes_what_peft_computes(family, implementation, ranks):
    model = adapted_moe(family, implementation, ranks)
    report = compare(model, IDS, tolerance=1e-5)
    assert report.fast_calls == len(wrappers(model)) and report.fallback_calls == {}
    assert {layer.op for layer in report.layers} == {"lora_experts"}


def route(experts, tokens=9, choose=None):
    """What a router tells experts: the experts of each token, and their weights."""
    module = experts.get_base_layer()
    dtype = module.down_proj.dtype
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, COLUMNS, generator=generator, dtype=torch.float64).to(dtype)
    if type(module).__name__ == "Llama4TextExperts":
        return (x.repeat(module.num_experts, 1),)
    scores = torch.rand(tokens, module.num_experts, generator=generator, dtype=torch.float64)
    ids = scores.topk(min(2, module.num_experts)).indices if choose is None else choose
    return x, ids, torch.rand(ids.shape, generator=generator, dtype=torch.float64).to(dtype)


COLUMNS = 32  # hidden_size


def run_experts(experts, x, *routing):
    """The output, and the gradients of the tokens, the routing weights and everything trainable."""
    experts.zero_grad(set_to_none=True)
    leaf = x.detach().clone().requires_grad_()
    x = leaf * 1.0  # as in a model, where something has made them
    routing = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in routing]
    y = experts(x, *routing)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    found = {"output": y.detach(), "x": leaf.grad} | {
        str(i): t.grad for i, t in enumerate(routing) if t.is_floating_point()
    }
    return found | {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}


def same_experts(experts, inputs, tolerance=1e-14):
    theirs = run_experts(experts, *inputs)
    with use_backend(experts, "tsugi") as report:
        ours = run_experts(experts, *inputs)
        assert report.fast_calls == 2 and report.fallback_calls == {}
    assert_same(ours, theirs, tolerance)
    return ours


@pytest.mark.parametrize("ranks", [(3,), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("family, implementation", IMPLEMENTATIONS)
def test_experts_are_exact_in_float64(family, implementation, ranks):
    if implementation == "grouped_mm":
        pytest.skip("torch has no grouped product in float64")
    experts = experts_of(adapted_moe(family, implementation, ranks, dtype=torch.float64))
    same_experts(experts, route(experts))


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    "choose",
    [
        torch.tensor([[0, 2], [2, 0], [0, 3]]),  # none for one
        torch.full((5, 1), 1),  # all for one
        torch.tensor([[3]]),  # one token
        torch.empty(0, 2, dtype=torch.int64),  # no token
    ],
    ids=["none for 1", "all for 1", "one token", "no token"],
)
def test_whatever_the_router_chooses(family, implementation, choose):
    experts = experts_of(adapted_moe(family, implementation, (3, 2)))
    inputs = route(experts, len(choose), choose)
    if not len(choose):
        use_backend(experts, "tsugi")
        assert experts(*inputs).shape == (0, COLUMNS)
        return
    ours = same_experts(experts, inputs, 1e-5)
    others = sorted(set(range(4)) - set(choose.flatten().tolist()))
    b = ours["lora_B.a0.weight"].unflatten(1, (-1, 4))
    assert b[:, :, others].abs().max() == 0 < b.abs().max()


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_rows_of_experts_on_another_rank(implementation):
    experts = experts_of(adapted_moe("qwen3_moe", implementation, (3, 2)))
    experts.get_base_layer()._is_expert_parallel = True
    x, ids, weights = route(experts)
    ids[2:5, 1], weights[2:5, 1] = 4, 0.0  # as transformers marks them
    same_experts(experts, (x, ids, weights), 1e-5)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_one_expert(implementation):
    config = dict(num_experts=1, num_experts_per_tok=1)
    experts = experts_of(adapted_moe("qwen3_moe", implementation, (3, 2), router=False, **config))
    same_experts(experts, route(experts), 1e-5)


def test_one_expert_of_a_transposed_module_is_peft_s():
    config = dict(num_local_experts=1, num_experts_per_tok=1)
    report = use_backend(adapted_moe("gpt_oss", router=False, **config))
    assert {layer.reason for layer in report.left_to_peft} == {
        "the one expert of a transposed module, which PEFT adapts in its own way"
    }


def worst(result, truth):
    return max(error({k: v.double() for k, v in result.items()}, truth).values())


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [None, torch.float32], ids=["16-bit adapters", "float32 adapters"])
def test_16_bit_is_no_further_from_the_truth_than_peft(low, adapters, implementation):
    experts = experts_of(adapted_moe("qwen3_moe", implementation, (3, 2)).to(low))
    if adapters is not None:
        for name, p in experts.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(adapters)
    inputs = route(experts)
    truth = copy.deepcopy(experts).double()
    truth.get_base_layer().config = copy.copy(truth.get_base_layer().config)
    truth.get_base_layer().config._experts_implementation = "eager"
    truth = run_experts(truth, *[t.double() if t.is_floating_point() else t for t in inputs])
    theirs = run_experts(experts, *inputs)
    use_backend(experts, "tsugi")
    ours = run_experts(experts, *inputs)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert worst(ours, truth) <= 1.5 * worst(theirs, truth)


@pytest.mark.parametrize("family, implementation", IMPLEMENTATIONS)
def test_autocast(family, implementation):
    model = adapted_moe(family, implementation, (3, 2))
    experts = experts_of(model)
    inputs = route(experts)
    truth = run_experts(copy.deepcopy(experts), *inputs)
    truth = {name: t.double() for name, t in truth.items()}
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run_experts(experts, *inputs)
        use_backend(experts, "tsugi")
        ours = run_experts(experts, *inputs)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert worst(ours, truth) <= 2 * worst(theirs, truth) + 1e-6


def test_trained_experts_get_their_gradient():
    experts = experts_of(adapted_moe("qwen3_moe", "eager", (3, 2), dtype=torch.float64))
    experts.get_base_layer().down_proj.requires_grad_()
    assert "base_layer.base_layer.down_proj" in same_experts(experts, route(experts))


# ---- what it costs ---------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements that a floating-point tensor has that torch's operations make."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and isinstance(result, torch.Tensor) and result.is_floating_point():
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_no_tensor_of_a_step_has_the_size_of_a_weight(implementation):
    experts = experts_of(adapted_moe("qwen3_moe", implementation, (3, 2)))
    inputs = route(experts, tokens=4)
    smallest = experts.get_base_layer().down_proj.numel()
    with Largest() as theirs:
        run_experts(experts, *inputs)
    use_backend(experts, "tsugi")
    with Largest() as ours:
        run_experts(experts, *inputs)
    assert ours.elements < smallest <= theirs.elements


def kept_by(experts, inputs):
    """The elements of what autograd keeps of a forward pass, parameters aside, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    kept = {}
    x, *routing = inputs
    y = experts(x.detach().clone().requires_grad_() * 1.0, *routing)
    nodes, seen = [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        found = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for t in [*found, *getattr(node, "saved_tensors", ())]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in parameters:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
    return sum(kept.values())


def test_the_tokens_are_kept_once_and_not_for_each_expert():
    tokens, top_k, inner, rank = 40, 2, 24, 3
    experts = experts_of(adapted_moe("qwen3_moe", ranks=(rank,)))
    inputs = route(experts, tokens)
    use_backend(experts, "tsugi")
    experts.requires_grad_(False)
    frozen = kept_by(experts, inputs)
    for name, p in experts.named_parameters():
        p.requires_grad_("lora_" in name)
    more = kept_by(experts, inputs) - frozen
    assert more <= tokens * (COLUMNS + top_k * (inner + 2 * rank) + top_k) + 4, "x, H, the rows and their ends"


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_gradients_of_gradients(implementation):
    experts = experts_of(adapted_moe("qwen3_moe", implementation, (3, 2)))
    x, ids, weights = route(experts)
    wanted = [p for name, p in experts.named_parameters() if "lora_" in name]

    def second():
        tokens = x.clone().requires_grad_()
        first = torch.autograd.grad(
            experts(tokens * 1.0, ids, weights).square().sum(), [tokens, *wanted], create_graph=True
        )
        return torch.autograd.grad(sum(g.square().sum() for g in first), [tokens, *wanted])

    theirs = second()
    use_backend(experts, "tsugi")
    for ours, expected in zip(second(), theirs, strict=True):
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_tokens_that_change_before_the_backward_are_autograd_s_error():
    experts = experts_of(adapted_moe("qwen3_moe"))
    use_backend(experts, "tsugi")
    x, *routing = route(experts)
    tokens = x.requires_grad_() * 1.0
    loss = experts(tokens, *routing).sum()
    with torch.no_grad():
        tokens.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


def test_what_is_saved_may_lie_elsewhere():
    experts = experts_of(adapted_moe("qwen3_moe", ranks=(3, 2)))
    inputs = route(experts)
    theirs = run_experts(experts, *inputs)
    use_backend(experts, "tsugi")
    with torch.autograd.graph.save_on_cpu():
        ours = run_experts(experts, *inputs)
    assert_same(ours, theirs, 1e-5)


# ---- states ----------------------------------------------------------------------------------------------------------


def test_adapters_come_and_go():
    model = adapted_moe("mixtral", ranks=(3, 2, 4))
    use_backend(model, "tsugi")
    for active in (["a1"], ["a2", "a0"], ["a0", "a1", "a2"]):
        model.base_model.set_adapter(active)
        compare(model, IDS)
    model.delete_adapter("a1")
    model.base_model.set_adapter(["a0", "a2"])
    compare(model, IDS)
    model.add_adapter("late", copy.copy(model.peft_config["a0"]))
    model.base_model.set_adapter(["late", "a0"])
    compare(model, IDS)


def test_disabled_and_merged_adapters():
    model = adapted_moe("gpt_oss", ranks=(3, 2))
    report = use_backend(model, "tsugi")
    with model.disable_adapter():
        compare(model, IDS)
        assert {layer.reason for layer in report.layers} == {"adapters are disabled"}
    before = run(model, IDS)
    model.merge_adapter()
    assert_same({"output": run(model, IDS)["output"]}, {"output": before["output"]}, 2e-5)
    assert {layer.reason for layer in report.layers} == {"adapters are merged into the base weight"}
    model.unmerge_adapter()
    assert_same(run(model, IDS), before, 2e-5)
    assert set(report.fallback_calls) == {"adapters are disabled", "adapters are merged into the base weight"}
    merged = model.merge_and_unload()
    assert not wrappers(merged)
    assert_same({"output": run(merged, IDS)["output"]}, {"output": before["output"]}, 2e-5)


def test_saved_and_loaded_and_swapped_while_hot(tmp_path):
    model = adapted_moe("qwen3_moe", ranks=(3,))
    use_backend(model, "tsugi")
    model.save_pretrained(tmp_path / "first", selected_adapters=["a0"])
    expected = run(model, IDS)["output"]
    loaded = PeftModel.from_pretrained(small_moe("qwen3_moe"), tmp_path / "first" / "a0").train()
    report = use_backend(loaded, "tsugi")
    assert torch.equal(run(loaded, IDS)["output"], expected) and report.fast_calls == 6

    other = adapted_moe("qwen3_moe", ranks=(3,))
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "lora_" in name:
                p.mul_(0.5)
    other.save_pretrained(tmp_path / "second", selected_adapters=["a0"])
    hotswap_adapter(model, tmp_path / "second" / "a0", adapter_name="a0")
    assert_same({"output": run(model, IDS)["output"]}, {"output": run(other, IDS)["output"]})


def test_copied_and_pickled():
    model = adapted_moe("qwen3_moe", ranks=(3, 2))
    use_backend(model, "tsugi")
    expected = run(model, IDS)
    twin = copy.deepcopy(model)
    assert_same(run(twin, IDS), expected, 0.0)
    assert use_backend(twin).fast_calls == 6, "a copy counts for itself, on the ops"
    rebuilt = pickle.loads(pickle.dumps(experts_of(model)))
    assert type(rebuilt) is ParamWrapper
    assert_same(run_experts(rebuilt, *route(rebuilt)), run_experts(experts_of(model), *route(rebuilt)))


def test_given_back_to_peft():
    model = adapted_moe("qwen3_moe")
    with use_backend(model, "tsugi") as report:
        run(model, IDS)
    assert all(type(wrapper) is ParamWrapper for wrapper in wrappers(model))
    assert report.fast_calls == 6
    assert not any(isinstance(v, torch.Tensor) for w in wrappers(model) for v in vars(w.get_base_layer()).values())


def test_nothing_stays_behind_where_the_experts_fail():
    experts = experts_of(adapted_moe("qwen3_moe"))
    use_backend(experts, "tsugi")
    x, ids, weights = route(experts)
    with pytest.raises(RuntimeError):
        experts(x[:, :5], ids, weights)
    assert isinstance(experts.get_base_layer().down_proj, nn.Parameter)


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(implementation, reentrant):
    model = adapted_moe("qwen3_moe", implementation, (3, 2))
    expected = run(model, IDS)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    report = use_backend(model, "tsugi")
    assert_same(run(model, IDS), expected)
    assert report.fast_calls > 6, "forward and again for the backward"


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_a_factor_that_changes_before_the_backward_is_autograd_s_error(implementation):
    experts = experts_of(adapted_moe("qwen3_moe", implementation))
    use_backend(experts, "tsugi")
    x, *routing = route(experts)
    loss = experts(x.requires_grad_(), *routing).sum()
    with torch.no_grad():
        experts.lora_A["a0"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        loss.backward()


def test_the_implementation_is_asked_at_each_call():
    model = adapted_moe("qwen3_moe", "grouped_mm", (3, 2))
    report = use_backend(model, "tsugi")
    outputs = []
    for implementation in ("grouped_mm", "eager", "batched_mm"):
        model.set_experts_implementation(implementation)
        outputs.append(run(model, IDS))
    assert report.fast_calls == 18
    assert_same(outputs[1], outputs[0])
    assert_same(outputs[2], outputs[0])


def test_a_compiled_model_runs_the_ops_too():
    model = adapted_moe("qwen3_moe", ranks=(3,), num_hidden_layers=1)
    expected = run(model, IDS)
    report = use_backend(model, "tsugi")
    ours = run(torch.compile(model, backend="aot_eager"), IDS)
    assert_same({name.removeprefix("_orig_mod."): value for name, value in ours.items()}, expected, 2e-5)
    assert report.fast_calls == 3
    torch._dynamo.reset()


# ---- what is left to PEFT --------------------------------------------------------------------------------------------


class OwnExperts(nn.Module):
    """Experts of somebody's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        return torch.einsum("ti,eoi->to", x, self.weight)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def adapted(inner, parameter, **config):
    torch.manual_seed(0)
    settings = dict(r=2, target_modules=[], target_parameters=[parameter], init_lora_weights=False) | config
    return get_peft_model(Around(inner), LoraConfig(**settings))


def test_a_forward_of_somebody_s_own_is_left_by_name():
    model = adapted(OwnExperts(), "inner.weight")
    report = compare(model, torch.randn(6, 4), backend="auto")
    (layer,) = report.left_to_peft
    assert layer.parameter == "weight" and layer.reason.startswith("the forward of OwnExperts is ")
    with pytest.raises(RuntimeError, match="the forward of OwnExperts is"):
        use_backend(model, "tsugi")


def test_a_linear_layer_s_weight():
    model = adapted(nn.Linear(6, 3), "inner.weight")
    report = compare(model, torch.randn(2, 5, 6))
    assert report.fast_calls == 1
    model.train().requires_grad_()
    compare(model, torch.randn(6))


def test_a_use_that_is_no_product_gets_the_sum_and_is_counted_as_peft_s():
    model = adapted(nn.Embedding(6, 3), "inner.weight")
    report = compare(model, torch.tensor([[1, 5, 1]]), backend="auto")
    reason = "the parameter is used in embedding, which is not a product of tokens with it"
    assert report.fallback_calls == {reason: 1} and report.fast_calls == 0
    use_backend(model, "tsugi")
    with pytest.raises(RuntimeError, match="of 'weight' .* is used in embedding"):
        model(torch.tensor([1]))


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_parametrised_otherwise():
    linear = nn.Linear(4, 3)
    nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())
    model = adapted(linear, "inner.weight")
    report = compare(model, torch.randn(2, 4), backend="auto")
    assert "parametrised" in report.left_to_peft[0].reason and not report.fast_calls


def test_another_implementation_of_experts(monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    @functools.wraps(grouped_mm_experts_forward)
    def own(self, *args):
        return grouped_mm_experts_forward(self, *args)

    own.__module__ = "mine"
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "mine", own)
    experts = experts_of(adapted_moe("qwen3_moe"))
    experts.get_base_layer().config._experts_implementation = "mine"
    theirs = run_experts(experts, *route(experts))
    report = use_backend(experts, "auto")
    assert {layer.reason for layer in report.left_to_peft} == {"the experts implementation is 'mine'"}
    assert_same(run_experts(experts, *route(experts)), theirs, 0.0)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda w: setattr(w, "scaling", {"a0": torch.tensor(1.0)}), "scaling is a tensor"),
        (lambda w: setattr(w.lora_A["a0"], "weight", nn.Parameter(torch.randn(12, 5))), "parameter's shape"),
        (lambda w: w.lora_A["a0"].to(torch.float64), "differ in dtype"),
        (lambda w: w.to("meta"), "device type 'meta'"),
    ],
)
def test_reasons(change, reason):
    experts = experts_of(adapted_moe("qwen3_moe", "eager"))
    use_backend(experts, "tsugi")
    change(experts)
    x, *routing = route(experts)
    device = experts.get_base_layer().down_proj.device
    with pytest.raises(RuntimeError, match=reason):
        experts(x.to(device), *[t.to(device) for t in routing])


def test_adapter_names_are_peft_s_error():
    experts = experts_of(adapted_moe("qwen3_moe"))
    use_backend(experts)
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        experts(*route(experts), adapter_names=["a0"] * 9)


def test_inside_of_a_transform_it_is_peft_s_error():
    model = adapted(nn.Linear(4, 3), "inner.weight")
    report = use_backend(model)
    with pytest.raises(RuntimeError, match="requires_grad_"):
        torch.func.vmap(model)(torch.randn(5, 2, 4))
    assert list(report.fallback_calls) == ["inside a torch.func transform or forward-mode differentiation"]


def test_half_of_a_nest_may_be_peft_s():
    experts = experts_of(adapted_moe("qwen3_moe", "grouped_mm", (3,)))
    theirs = run_experts(experts, *route(experts))
    use_backend(experts)
    for name in ("scaling", "base_layer"):
        layer = experts if name == "scaling" else experts.base_layer
        layer.scaling = {"a0": torch.tensor(layer.scaling["a0"])}
        assert_same(run_experts(experts, *route(experts)), theirs)
        layer.scaling = {"a0": layer.scaling["a0"].item()}


def test_the_report_names_each_parameter():
    report = use_backend(adapted_moe("qwen3_moe", ranks=(3, 2)), "tsugi")
    assert [layer.parameter for layer in report.layers][:3] == ["down_proj", "gate_up_proj", "weight"]
    text = str(report)
    assert "6 of 6 LoRA layers accelerated" in text and "mlp.experts.base_layer [gate_up_proj]" in text


def test_layers_that_are_made_later():
    model = tiny_llama()
    with use_backend() as report:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=["up_proj.weight"]))
        run(model, IDS)
        assert report.fast_calls == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_is_what_peft_generates(family):
    model = adapted_moe(family, ranks=(3,)).eval()
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=2)
    theirs = model.generate(input_ids=IDS, **settings)
    report = use_backend(model, "tsugi")
    assert torch.equal(model.generate(input_ids=IDS, **settings), theirs) and report.fast_calls >= 4 * 3
