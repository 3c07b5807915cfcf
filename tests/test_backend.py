"""The backend swap computes what PEFT computes: outputs and all gradients, over dtypes, K, shapes, modes and bases."""

import copy
import io
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.nn.utils import parametrizations

from peft_models import TwoLinears, assert_same, compare, error, exact, lora_model, run, tiny_llama
from tsugi_kpool import ops, reference, use_backend
from tsugi_kpool.backend import swap
from tsugi_kpool.ops import selftest


def calls(report):
    return report.fast_calls, sum(report.fallback_calls.values())


def layer_of(model, name="first"):
    return getattr(model.base_model.model, name)


@pytest.fixture
def x():
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(swap, "_warned", set())


# ---- equality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_are_pefts(x, dtype, active):
    model = lora_model(count=4, active=active, dtype=dtype, cast_adapters=False)
    report = compare(model, x.to(dtype))
    assert calls(report) == (2, 0)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 2 * active
    assert all(f".a{k}." in name for name in trained for k in range(4) if f".a{k}." in name and k < active)


@pytest.mark.parametrize("active", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast_adapters", [True, False], ids=["fp32 adapters", "adapters in the model's dtype"])
def test_half_precision_is_at_least_as_exact_as_peft(x, dtype, active, cast_adapters):
    model = lora_model(count=4, active=active, dtype=dtype, cast_adapters=cast_adapters)
    adapter_dtype = torch.float32 if cast_adapters else dtype
    assert layer_of(model).lora_A["a0"].weight.dtype is adapter_dtype
    x = x.to(dtype)
    truth = exact(model, x)
    theirs = run(model, x)
    report = use_backend(model, "tsugi")
    ours = run(model, x)
    assert calls(report) == (2, 0)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    our_error, their_error = error(ours, truth), error(theirs, truth)
    for name in ours:
        assert our_error[name] <= 2 * their_error[name] + 1e-3, name


@pytest.mark.parametrize("active", [1, 2, 3, 4])
def test_a_llama_with_all_linear_layers(active):
    model = lora_model(tiny_llama(), count=4, active=active, targets="all-linear")
    ids = torch.randint(0, 64, (2, 9))
    report = compare(model, ids, tolerance=2e-5)
    assert calls(report) == (14, 0)
    assert all(layer.op == "lora_linear" and layer.fast_calls == 1 for layer in report.layers)


def test_generation_with_a_cache():
    model = lora_model(tiny_llama(), targets="all-linear").eval()
    ids = torch.randint(0, 60, (2, 5))
    generate = partial(model.generate, input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    theirs = generate()
    report = use_backend(model, "tsugi")
    assert torch.equal(generate(), theirs)
    assert calls(report) == (14 * 6, 0)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (0, 12), (2, 0, 12), (2, 3, 4, 12)])
def test_any_leading_shape(shape):
    report = compare(lora_model(), torch.randn(shape))
    assert calls(report) == (2, 0)


def test_non_contiguous_input():
    wide = torch.randn(5, 4, 24)
    for x in (wide.transpose(0, 1)[..., ::2], wide[:, :1, :12].expand(5, 3, 12), torch.randn(12, 5).t()):
        model = lora_model()
        theirs = run(model, x)
        report = use_backend(model, "tsugi")
        model.zero_grad()
        leaf = x.detach()[...].requires_grad_()  # keeps the strides, which run() would not
        y = model(leaf)
        torch.testing.assert_close(y.detach(), theirs["output"])
        assert calls(report) == (2, 0)


def test_non_contiguous_adapters(x):
    # As PEFT makes them for tied layers.
    model = lora_model()
    for parts, shape in ((layer_of(model).lora_A, (12, 4)), (layer_of(model).lora_B, (4, 20))):
        parts["a0"].weight = nn.Parameter(torch.randn(shape).t())
    assert calls(compare(model, x)) == (2, 0)


def test_rank_stabilised_scaling_and_set_scale(x):
    model = lora_model(use_rslora=True)
    assert calls(compare(model, x)) == (2, 0)
    for name in ("first", "second"):
        layer_of(model, name).set_scale("a0", 0.25)
        layer_of(model, name).scale_layer(3.0)
    compare(model, x)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "all", "a0"])
def test_frozen_adapters_get_no_gradient(x, frozen):
    model = lora_model()
    for name, p in model.named_parameters():
        if "lora_" in name and (frozen == "all" or frozen in name):
            p.requires_grad_(False)
    report = compare(model, x)
    assert calls(report) == (2, 0)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_under_no_grad_and_inference_mode(x):
    model = lora_model()
    expected = run(model, x)["output"]
    report = use_backend(model, "tsugi")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(model(x), expected)
    assert calls(report) == (4, 0)


def test_gradients_of_gradients():
    model = lora_model(dtype=torch.float64, cast_adapters=False)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def penalty():
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), parameters)

    theirs = penalty()
    report = use_backend(model, "tsugi")
    torch.testing.assert_close(penalty(), theirs)
    assert calls(report) == (2, 0)


# ---- autocast ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast(x, dtype, base_dtype):
    model = lora_model(dtype=base_dtype)
    x = x.to(dtype)
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    truth = exact(model, x)
    theirs = run(model, x, context=context)
    report = use_backend(model, "tsugi")
    ours = run(model, x, context=context)
    assert calls(report) == (2, 0)
    assert ours["output"].dtype is torch.bfloat16
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    our_error, their_error = error(ours, truth), error(theirs, truth)
    for name in ours:
        assert our_error[name] <= 2 * their_error[name] + 1e-3, name


class NoAutocast(nn.Linear):
    """Answers in its input's dtype under autocast, as quantised layers do."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def test_autocast_on_a_base_that_keeps_float32(x):
    base = TwoLinears()
    base.first = NoAutocast(12, 20)
    model = lora_model(base)
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    report = compare(model, x, tolerance=2e-2, context=context)
    assert [layer.op for layer in report.layers] == ["lora_delta", "lora_linear"]
    with context():
        assert layer_of(model)(x).dtype is torch.float32
    assert calls(report) == (3, 0)


def test_autocast_elsewhere_changes_nothing(x):
    compare(lora_model(), x, context=partial(torch.autocast, "cuda", torch.float16, enabled=False))


# ---- dropout -----------------------------------------------------------------------------------------------------


def test_dropout_in_evaluation_is_off(x):
    model = lora_model(lora_dropout=0.5).eval()
    assert calls(compare(model, x)) == (2, 0)


def test_dropout_is_the_ops_with_a_draw_of_torchs_generator(x):
    model = lora_model(lora_dropout=0.4, count=3)
    layer = layer_of(model)
    report = use_backend(model, "tsugi")
    torch.manual_seed(5)
    ours = run(layer, x)
    torch.manual_seed(5)
    rng = ops.draw_rng("cpu")
    x = x.clone().requires_grad_()
    A, B = ([getattr(layer, n)[f"a{k}"].weight for k in range(3)] for n in ("lora_A", "lora_B"))
    scaling = [layer.scaling[f"a{k}"] for k in range(3)]
    y = reference.lora_linear(x, layer.base_layer.weight, layer.base_layer.bias, A, B, scaling, 0.4, rng)
    torch.testing.assert_close(ours["output"], y)
    weights = torch.linspace(-1.0, 1.0, y.numel()).reshape(y.shape)
    expected = torch.autograd.grad(y, [x, *A, *B], weights)
    names = ["x"] + [f"lora_{n}.a{k}.weight" for n in "AB" for k in range(3)]
    for name, gradient in zip(names, expected):
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
    assert calls(report) == (1, 0)


def test_dropout_has_pefts_mean_and_variance():
    model = lora_model(lora_dropout=0.3, count=2)
    layer = layer_of(model)
    x = torch.randn(1, 12)

    def moments():
        with torch.no_grad():
            y = layer(x.expand(40_000, 12)).double()
        return y.mean(0), y.var(0)

    mean, var = moments()
    report = use_backend(model, "tsugi")
    our_mean, our_var = moments()
    assert calls(report) == (1, 0)
    assert (our_mean - mean).abs().max() < 6 * (2 * var / 40_000).sqrt().max()
    assert ((our_var - var).abs() / var).max() < 0.1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_masks_again(reentrant):
    base = tiny_llama()
    ids = torch.randint(0, 64, (2, 9))
    results = []
    for checkpointing in (False, True):
        model = lora_model(copy.deepcopy(base), targets="all-linear", lora_dropout=0.3)
        report = use_backend(model, "tsugi")
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(7)
        results.append(run(model, ids))
        # Each layer once more in the backward pass.
        assert calls(report) == (28 if checkpointing else 14, 0)
    assert_same(*results)


# ---- bases that are not a plain frozen nn.Linear -----------------------------------------------------------------


def test_a_trained_base_gets_its_gradient(x):
    model = lora_model()
    layer_of(model).base_layer.weight.requires_grad_(True)
    report = compare(model, x)
    assert [layer.op for layer in report.layers] == ["lora_delta", "lora_linear"]
    assert calls(report) == (2, 0)
    assert layer_of(model).base_layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("shape", [(4, 12), (12,)])
def test_a_trained_bias_gets_its_gradient(bias, shape):
    model = lora_model(count=1, bias=bias)
    report = compare(model, torch.randn(shape))
    assert calls(report) == (2, 0)
    assert layer_of(model).base_layer.bias.grad.abs().sum() > 0


def test_hooks_on_the_base_layer_run(x):
    model = lora_model()
    base = layer_of(model).base_layer
    base.register_forward_hook(lambda module, args, output: output * 3)
    base.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    seen = []
    base.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0].shape))
    report = compare(model, x)
    assert [layer.op for layer in report.layers] == ["lora_delta", "lora_linear"]
    assert calls(report) == (2, 0)
    assert len(seen) == 2


def test_a_parametrised_base(x):
    base = TwoLinears()
    parametrizations.weight_norm(base.first)
    torch.nn.utils.spectral_norm(base.second)
    model = lora_model(base).eval()
    report = compare(model, x)
    assert [layer.op for layer in report.layers] == ["lora_delta", "lora_delta"]
    assert calls(report) == (2, 0)


def test_a_base_with_its_own_forward(x):
    base = TwoLinears()
    base.first.forward = lambda x: torch.sin(nn.Linear.forward(base.first, x))
    report = compare(lora_model(base), x)
    assert [layer.op for layer in report.layers] == ["lora_delta", "lora_linear"]


def test_transposed_weights_of_gpt2():
    from transformers.pytorch_utils import Conv1D

    base = TwoLinears()
    base.first = Conv1D(20, 12)
    model = lora_model(base, targets=["first"])
    assert layer_of(model).fan_in_fan_out
    report = compare(model, torch.randn(3, 4, 12))
    assert [layer.op for layer in report.layers] == ["lora_delta"]
    assert calls(report) == (1, 0)


def test_a_base_that_changes_the_dtype(x):
    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    base = TwoLinears()
    base.first = Wide(12, 20)
    base.second = nn.Linear(20, 7, dtype=torch.float64)
    model = lora_model(base, dtype=None, targets=["first"])
    report = compare(model, x)
    assert calls(report) == (1, 0)
    assert layer_of(model)(x).dtype is torch.float64


# ---- nothing is cached -------------------------------------------------------------------------------------------


def test_parameters_and_dtypes_may_be_replaced(x):
    model = lora_model()
    report = use_backend(model, "tsugi")
    model(x)
    model.to(torch.float64)
    for name, p in list(layer_of(model).lora_A["a0"].named_parameters()):
        setattr(layer_of(model).lora_A["a0"], name, nn.Parameter(torch.randn_like(p)))
    layer_of(model).base_layer.weight = nn.Parameter(torch.randn(20, 12, dtype=torch.float64), requires_grad=False)
    ours = run(model, x.double())
    assert calls(report) == (4, 0)
    use_backend(model, "peft")
    assert_same(ours, run(model, x.double()), 1e-14)


def test_active_adapters_may_change_between_calls(x):
    model = lora_model(count=4)
    report = use_backend(model, "tsugi")
    results = {}
    for active in (["a0"], ["a1", "a3"], ["a3", "a1"], ["a0", "a1", "a2", "a3"]):
        model.base_model.set_adapter(active)
        results[tuple(active)] = run(model, x)
    assert calls(report) == (8, 0)
    use_backend(model, "peft")
    for active, ours in results.items():
        model.base_model.set_adapter(list(active))
        assert_same(ours, run(model, x))


def test_hotswapping_an_adapter(x, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    other = lora_model(count=1, seed=9)
    other.save_pretrained(tmp_path)
    model = lora_model(count=1)
    report = use_backend(model, "tsugi")
    before = model(x)
    hotswap_adapter(model, tmp_path / "a0", adapter_name="a0")
    ours = run(model, x)
    assert not torch.equal(ours["output"], before)
    assert calls(report) == (4, 0)
    use_backend(model, "peft")
    assert_same(ours, run(model, x))


def test_merging_weighting_deleting_and_unloading(x):
    model = lora_model(count=3)
    report = use_backend(model, "tsugi")
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.add_weighted_adapter(["a0", "a1"], [1.0, 1.0], "both", combination_type="cat")
    model.base_model.set_adapter(["both", "a2"])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model.delete_adapter("a2")
    assert calls(report) == (4, 2)
    merged = model.merge_and_unload()
    assert type(merged.first) is nn.Linear


# ---- copies and files --------------------------------------------------------------------------------------------


def test_deepcopy_stays_accelerated_and_counts_for_itself(x):
    model = lora_model()
    report = use_backend(model, "tsugi")
    model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    ours = run(twin, x)
    twin_report = use_backend(twin, "tsugi")
    assert (report.fast_calls, twin_report.fast_calls) == (2, 2)
    use_backend(twin, "peft")
    assert_same(ours, run(twin, x))
    assert layer_of(model).forward.__func__ is not lora.Linear.forward


def test_pickles_hold_pefts_classes(x):
    model = lora_model()
    use_backend(model, "tsugi")
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"tsugi_kpool" not in file.getvalue()
    assert b"tsugi_kpool" not in pickle.dumps(model)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(layer_of(loaded)) is lora.Linear
    torch.testing.assert_close(loaded(x), expected)
    assert calls(use_backend(loaded, "tsugi")) == (0, 0)
    assert torch.equal(loaded(x), expected)


def test_adapters_saved_and_loaded_give_identical_logits(tmp_path):
    base = tiny_llama()
    model = lora_model(copy.deepcopy(base), count=2, targets="all-linear").eval()
    use_backend(model, "tsugi")
    state = model.state_dict()
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (2, 9))
    expected = model(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a0", adapter_name="a0")
    loaded.load_adapter(tmp_path / "a1", adapter_name="a1")
    loaded.base_model.set_adapter(["a0", "a1"])
    report = use_backend(loaded.eval(), "tsugi")
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert calls(report) == (14, 0)
    assert loaded.state_dict().keys() == state.keys()


def test_the_class_keeps_its_name(x):
    model = lora_model()
    text = repr(model)
    use_backend(model, "tsugi")
    assert repr(model) == text
    assert type(layer_of(model)).__name__ == "Linear"
    assert isinstance(layer_of(model), lora.Linear)


# ---- torch.compile, accelerate, training loops -------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_without_a_graph_break(x, dropout):
    torch._dynamo.reset()
    model = lora_model(lora_dropout=dropout)
    use_backend(model, "tsugi")
    graphs = []

    def count_ops(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if "tsugi" in str(node.target)])
        return graph.forward

    torch.manual_seed(11)
    ours = run(torch.compile(model, fullgraph=True, backend=count_ops), x)
    assert graphs == [[torch.ops.tsugi.lora_linear.default] * 2]
    torch.manual_seed(11)
    eager = run(model, x)
    assert_same({k.removeprefix("_orig_mod."): v for k, v in ours.items()}, eager, 0)


def test_compiled_through_aot_autograd(x):
    torch._dynamo.reset()
    model = lora_model()
    use_backend(model, "tsugi")
    eager = run(model, x)
    compiled = run(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert_same({k.removeprefix("_orig_mod."): v for k, v in compiled.items()}, eager)


def test_a_compiled_model_follows_the_active_adapters(x):
    torch._dynamo.reset()
    model = lora_model(count=3)
    use_backend(model, "tsugi")
    compiled = torch.compile(model, backend="eager")
    for active in (["a0"], ["a1", "a2"], ["a0"]):
        model.base_model.set_adapter(active)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


class Recording:
    """Made into an accelerate hook below: runs, and changes nothing."""

    def __init__(self):
        self.calls = 0


def recording_hook():
    from accelerate.hooks import ModelHook

    class Hook(Recording, ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    return Hook()


@pytest.mark.parametrize("first", ["hook", "swap"])
def test_an_accelerate_hook_on_the_lora_layer(x, first):
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    model = lora_model()
    expected = run(model, x)
    hook = recording_hook()
    report = use_backend(model, "tsugi") if first == "swap" else None
    add_hook_to_module(layer_of(model), hook)
    report = report or use_backend(model, "tsugi")
    assert_same(run(model, x), expected)
    assert calls(report) == (2, 0) and hook.calls == 1
    # Taken off again: accelerate leaves a bound forward behind.
    remove_hook_from_module(layer_of(model))
    assert "forward" in layer_of(model).__dict__
    assert_same(run(model, x), expected)
    assert calls(report) == (4, 0) and hook.calls == 1
    use_backend(model, "peft")
    assert_same(run(model, x), expected, 0)
    assert layer_of(model).forward.__func__ is lora.Linear.forward
    assert calls(use_backend(model, "tsugi")) == (0, 0)
    model(x)
    assert use_backend(model, "tsugi").fast_calls == 2


def test_restoring_under_an_accelerate_hook(x):
    from accelerate.hooks import add_hook_to_module

    model = lora_model()
    expected = run(model, x)
    with use_backend(model, "tsugi"):
        add_hook_to_module(layer_of(model), recording_hook())
    assert layer_of(model)._old_forward.__func__ is lora.Linear.forward
    assert_same(run(model, x), expected, 0)


def test_a_dispatched_model_stays_fast(x):
    # dispatch_model puts such a hook on every module, A, B and base included.
    from accelerate.hooks import attach_execution_device_hook

    model = lora_model()
    expected = run(model, x)
    attach_execution_device_hook(model, torch.device("cpu"))
    assert "_hf_hook" in layer_of(model).lora_A["a0"].__dict__
    report = use_backend(model, "tsugi")
    assert [layer.op for layer in report.layers] == ["lora_linear", "lora_linear"]
    assert_same(run(model, x), expected)
    assert calls(report) == (2, 0)


def test_adapters_that_accelerate_offloads_are_left_to_peft(x):
    from accelerate import cpu_offload

    model = lora_model()
    with torch.no_grad():
        expected = model(x)
        use_backend(model)
        cpu_offload(model)
        with pytest.warns(UserWarning, match="hooks on a submodule of an adapter"):
            torch.testing.assert_close(model(x), expected)
    assert use_backend(model).fast_calls == 0


def test_a_training_loop_with_accelerate(x):
    from accelerate import Accelerator

    losses = []
    for name in ("peft", "tsugi"):
        model = lora_model()
        report = use_backend(model, name)
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        trace = []
        for _ in range(5):
            loss = model(x).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            trace.append(loss.item())
        losses.append(trace)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][-1] < losses[1][0]
    assert calls(report) == (10, 0)


@pytest.fixture
def one_process_mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_data_parallel(x, one_process_mesh):
    model = lora_model()
    expected = run(model, x)
    report = use_backend(model, "tsugi")
    ours = run(nn.parallel.DistributedDataParallel(model), x)
    assert_same({k.removeprefix("module."): v for k, v in ours.items()}, expected)
    assert calls(report) == (2, 0)


@pytest.mark.parametrize("first", ["shard", "swap"])
@pytest.mark.parametrize("whole_adapters", [True, False])
def test_fully_sharded_data_parallel(x, one_process_mesh, first, whole_adapters):
    from torch.distributed.fsdp import fully_shard

    model = lora_model()
    expected = run(model, x)
    if first == "swap":
        use_backend(model, "auto")
    ignored = {p for name, p in model.named_parameters() if "lora_" in name} if whole_adapters else set()
    fully_shard(model.base_model.model, mesh=one_process_mesh, ignored_params=ignored)
    report = use_backend(model, "auto")
    ours = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in run(model, x).items()}
    assert_same(ours, expected)
    assert calls(report) == (2, 0)


def test_a_layer_that_is_sharded_by_itself(x, one_process_mesh):
    from torch.distributed.fsdp import fully_shard

    model = lora_model()
    expected = model(x)
    report = use_backend(model, "tsugi")
    fully_shard(layer_of(model), mesh=one_process_mesh)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected)
        assert [layer.kind for layer in report.layers] == ["lora.Linear"] * 2
        assert calls(report) == (2, 0)
        use_backend(model, "peft")
        torch.testing.assert_close(model(x), expected)
        assert type(layer_of(model)).__name__ == "FSDPLinear"
        report = use_backend(model)


def test_transformers_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    data = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (16, 8)).tolist()]
    losses = []
    for name in ("peft", "tsugi"):
        model = lora_model(tiny_llama(), targets="all-linear")
        report = use_backend(model, name)
        arguments = TrainingArguments(
            output_dir=tmp_path / name,
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            gradient_checkpointing=True,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        trainer.save_model(tmp_path / name)
    assert len(losses[1]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert report.fast_calls == 4 * 14 * 2 and report.fallback_calls == {}
    assert (tmp_path / "tsugi" / "a0" / "adapter_model.safetensors").exists()


# ---- the call, its report, and its undoing -----------------------------------------------------------------------


def test_context_manager_restores_what_was_there(x):
    model = lora_model()
    classes = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    with use_backend(model) as report:
        model(x)
        assert [type(m) for m in model.modules()] != classes
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    # The report keeps what it saw.
    assert calls(report) == (2, 0)
    assert "2 of 2 LoRA layers accelerated" in str(report)
    model(x)
    assert calls(report) == (2, 0)


def test_contexts_nest(x):
    model = lora_model()
    outer = use_backend(model)
    with use_backend(model, "peft") as inner:
        model(x)
        assert type(layer_of(model)) is lora.Linear
        assert calls(inner) == (0, 0)
    with use_backend(model, "tsugi"):
        model(x)
    model(x)
    assert calls(outer) == (4, 0)
    hook = layer_of(model).lora_A["a0"].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning):  # no longer strict
        model(x)
    hook.remove()
    use_backend(model, "peft")
    assert type(layer_of(model)) is lora.Linear


def test_calling_twice_changes_nothing(x):
    model = lora_model()
    first = use_backend(model)
    model(x)
    cls = type(layer_of(model))
    second = use_backend(model)
    assert type(layer_of(model)) is cls
    model(x)
    assert calls(first) == calls(second) == (4, 0)
    use_backend(model, "peft")
    use_backend(model, "peft")
    assert type(layer_of(model)) is lora.Linear


def test_adapters_and_layers_added_later_are_covered(x):
    model = lora_model(targets=["first"])
    report = use_backend(model)
    assert len(report.layers) == 1
    model.add_adapter("late", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    model.base_model.set_adapter(["a0", "late"])
    ours = run(model, x)
    assert calls(report) == (2, 0)
    assert [layer.accelerated for layer in report.layers] == [True, True]
    use_backend(model, "peft")
    assert_same(ours, run(model, x))
    model.add_adapter("later", LoraConfig(r=2, target_modules=["first", "second"]))
    assert type(layer_of(model, "second")) is lora.Linear


def test_layers_of_a_model_that_has_none_yet(x):
    base = TwoLinears()
    with pytest.warns(UserWarning, match="this TwoLinears has no LoRA layer"):
        report = use_backend(base)
    assert "no LoRA layer yet; those added later are covered" in str(report)
    bystander = lora_model()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["first"]))
    model(x)
    bystander(x)
    assert calls(report) == (1, 0)
    assert type(layer_of(bystander)) is lora.Linear


def test_layers_of_a_transformers_model_with_its_own_adapter_interface():
    model = tiny_llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), adapter_name="a")
    report = use_backend(model, "tsugi")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False), adapter_name="b")
    model.set_adapter(["a", "b"])
    ids = torch.randint(0, 64, (2, 9))
    ours = model(input_ids=ids).logits
    assert len(report.layers) == 4 and calls(report) == (4, 0)
    use_backend(model, "peft")
    torch.testing.assert_close(model(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-6)


def test_a_mixed_model(x):
    base = TwoLinears()
    with pytest.warns(UserWarning, match="has no LoRA layer"):
        use_backend(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["first"], init_lora_weights=False), mixed=True)
    ours = run(model, x)
    assert use_backend(model).fast_calls == 1
    use_backend(model, "peft")
    assert_same(ours, run(model, x))


def test_a_copy_covers_later_layers_too(x):
    model = lora_model(targets=["first"])
    use_backend(model)
    twin = copy.deepcopy(model)
    twin.add_adapter("late", LoraConfig(r=2, target_modules=["second"]))
    twin.base_model.set_adapter(["a0", "late"])
    twin(x)
    assert use_backend(twin).fast_calls == 2


def test_without_a_model_every_new_layer_is_covered(x):
    old = lora_model()
    with use_backend() as report:
        model = lora_model()
        refused = lora_model(targets=["first"])
        use_backend(refused, "peft")
        refused.add_adapter("late", LoraConfig(r=2, target_modules=["second"]))
        for m in (old, model, copy.deepcopy(model), refused):
            m(x)
        assert calls(report) == (4, 0)
        assert "every LoRA layer created from now on" in str(report)
        assert [type(layer_of(m)) is lora.Linear for m in (old, model, refused)] == [True, False, True]
    assert type(layer_of(model)) is lora.Linear
    model(x)
    assert calls(report) == (4, 0)
    assert type(layer_of(lora_model())) is lora.Linear


def test_everywhere_can_be_switched_off(x):
    use_backend()
    model = lora_model()
    named = lora_model()
    use_backend(named)
    use_backend(None, "peft")
    assert type(layer_of(model)) is lora.Linear
    assert type(layer_of(named)) is not lora.Linear
    assert type(layer_of(lora_model())) is lora.Linear


def test_report_groups_like_layers():
    model = lora_model(tiny_llama(layers=12), count=4, active=2, targets="all-linear")
    report = use_backend(model)
    text = str(report)
    assert text.startswith("tsugi_kpool backend 'auto': 84 of 84 LoRA layers accelerated")
    assert len(text.splitlines()) == 9
    (row,) = [line for line in text.splitlines() if "down_proj" in line]
    assert row.split("  ") and all(
        piece in row
        for piece in ("model.layers.*.mlp.down_proj", "x12", "lora.Linear", "48 -> 32", "2 of 4, r=4,3", "lora_linear")
    )
    layer = report.layers[0]
    assert (layer.kind, layer.in_features, layer.out_features) == ("lora.Linear", 32, 32)
    assert (layer.adapters, layer.active, layer.ranks, layer.reason) == (4, 2, (4, 3), "")
    assert repr(report) == "<BackendReport 'auto': 84 of 84 layers accelerated>"


def test_report_says_who_computed_what(x):
    model = lora_model()
    report = use_backend(model)
    model(x)
    with model.disable_adapter():
        model(x)
        assert "adapters are disabled" in str(report)
    assert "calls: 2 by tsugi, 2 by PEFT\n  2: adapters are disabled" in str(report)
    assert report.layers[0].fast_calls == 1
    assert report.layers[0].fallback_calls == {"adapters are disabled": 1}


def test_report_does_not_keep_the_model_alive(x):
    import gc
    import weakref

    model = lora_model()
    report = use_backend(model)
    model(x)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    assert calls(report) == (2, 0) and len(report.layers) == 2
    with report:  # and leaving the context is harmless
        pass


def test_wrong_arguments():
    with pytest.raises(ValueError, match="backend is 'triton', expected one of 'auto', 'tsugi', 'peft'"):
        use_backend(nn.Linear(2, 2), "triton")
    with pytest.raises(TypeError, match="model is a str, expected a torch.nn.Module"):
        use_backend("auto")


def test_without_the_native_library_everything_is_left_to_peft(x, monkeypatch):
    monkeypatch.setattr(ops, "unavailable_reason", "the native library could not be loaded: no such file")
    model = lora_model()
    with pytest.raises(RuntimeError, match="cannot accelerate 2 of 2 layers: the native library could not be loaded"):
        use_backend(model, "tsugi")
    with pytest.warns(UserWarning, match="the native library could not be loaded"):
        report = use_backend(model)
    assert not report.accelerated
    model(x)


def test_the_op_is_really_called(x, monkeypatch):
    # The counters above are this module's own; here the op itself is watched.
    selftest.fault("cpu")  # calls them too, once a process
    seen = []
    for name in ("lora_linear", "lora_delta"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, op=op, name=name: (seen.append(name), op(*args))[1])
    model = lora_model()
    layer_of(model).base_layer.weight.requires_grad_(True)
    with use_backend(model):
        model(x)
    with nullcontext():
        model(x)
    assert seen == ["lora_delta", "lora_linear"]
