"""What is left to PEFT: each reason by its name, with PEFT's own result, and what "tsugi" makes of it."""

import contextlib
import copy
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn

from peft_models import assert_same, lora_model, run
from tsugi_kpool import use_backend
from tsugi_kpool.backend import plan, swap

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(swap, "_warned", set())


def first(model):
    return model.base_model.model.first


def hooked(register, part="lora_A"):
    def change(model):
        getattr(getattr(first(model), part)["a0"], register)(lambda *args: None)

    return change


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def swap_part(part, make):
    def change(model):
        parts = getattr(first(model), part)
        old = parts["a0"]
        parts["a0"] = make(old)
        if isinstance(old, nn.Linear):
            parts["a0"].load_state_dict(old.state_dict(), strict=False)

    return change


def set_dropout(model, dropout):
    first(model).lora_dropout["a0"] = dropout


def patch_forward(model):
    part = first(model).lora_B["a0"]
    part.forward = lambda h: nn.Linear.forward(part, h) + 1


def tie_scaling_to_a_tensor(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare_model_for_compiled_hotswap(model, target_rank=8)


def disable(model):
    model.base_model.disable_adapter_layers()


def deactivate(model):
    model.base_model.set_adapter([])


IDLE = {
    "disabled": (disable, {}, "adapters are disabled"),
    "merged": (lambda m: m.merge_adapter(), {}, "adapters are merged into the base weight"),
    "inactive": (deactivate, {}, "no active adapter on this layer"),
}

# name: (how the model is made, what is done to it, the reason)
ADAPTERS = {
    "MiCA": ({"init_lora_weights": "mica"}, None, "LoRA variant MiCALinearVariant"),
    "forward hook on A": ({}, hooked("register_forward_hook"), "hooks on a submodule of an adapter"),
    "pre-hook on B": ({}, hooked("register_forward_pre_hook", "lora_B"), "hooks on a submodule of an adapter"),
    "backward hook on A": ({}, hooked("register_full_backward_hook"), "hooks on a submodule of an adapter"),
    "backward pre-hook on B": (
        {},
        hooked("register_full_backward_pre_hook", "lora_B"),
        "hooks on a submodule of an adapter",
    ),
    "hook on dropout": ({}, hooked("register_forward_hook", "lora_dropout"), "hooks on a submodule of an adapter"),
    "patched B": ({}, patch_forward, "hooks on a submodule of an adapter"),
    "patched dropout": (
        {},
        lambda m: setattr(first(m).lora_dropout["a0"], "forward", lambda x: x * 2),
        "hooks on a submodule of an adapter",
    ),
    "bias in B": ({"lora_bias": True}, None, "an adapter has a bias (lora_bias)"),
    "bias in A": (
        {},
        swap_part("lora_A", lambda old: nn.Linear(12, 4)),
        "an adapter has a bias (lora_bias)",
    ),
    "A of another class": (
        {},
        swap_part("lora_A", lambda old: Scaled(12, 4, bias=False)),
        "an adapter's A or B is not a plain nn.Linear",
    ),
    "parametrised B": (
        {},
        lambda m: nn.utils.parametrizations.weight_norm(first(m).lora_B["a0"]),
        "an adapter's A or B is not a plain nn.Linear",
    ),
    "scaling as a tensor": ({}, tie_scaling_to_a_tensor, "scaling is a tensor (prepare_model_for_compiled_hotswap)"),
    "p of 1": ({}, partial(set_dropout, dropout=nn.Dropout(1.0)), "lora_dropout is not nn.Dropout with p below 1"),
    "dropout in place": (
        {},
        partial(set_dropout, dropout=nn.Dropout(0.0, inplace=True)),
        "lora_dropout is not nn.Dropout with p below 1",
    ),
    "another dropout": (
        {},
        partial(set_dropout, dropout=nn.Sequential()),
        "lora_dropout is not nn.Dropout with p below 1",
    ),
    "adapters in two dtypes": (
        {},
        lambda m: first(m).lora_A["a1"].double() and first(m).lora_B["a1"].double(),
        "the active adapters differ in dtype",
    ),
    "narrower adapters": (
        {},
        lambda m: [part.bfloat16() for name, part in m.named_modules() if name.endswith((".a0", ".a1"))],
        "bfloat16 adapters on float32 input",
    ),
    "wider adapters": (
        {},
        lambda m: [part.double() for name, part in m.named_modules() if name.endswith((".a0", ".a1"))],
        "float64 adapters on float32 input",
    ),
}


def check_fallback(model, reason, run_both, expected_fast=0):
    """PEFT's result bit for bit, counted under its reason, with one warning for each reason."""
    use_backend(model, "peft")
    theirs = run_both(model)
    report = use_backend(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = run_both(model)
        run_both(model)
    told = [str(w.message) for w in caught if "tsugi_kpool" in str(w.message)]
    assert_same(ours, theirs, 0)
    layer = report.layers[0]
    assert (layer.fast_calls, set(layer.fallback_calls)) == (expected_fast, {reason})
    assert layer.fallback_calls[reason] >= 2
    assert told == [f"tsugi_kpool leaves calls of LoRA layers to PEFT: {reason}"] or reason in plan.IDLE
    assert reason in str(report)
    return report


def in_first_layer(**kwargs):
    return lora_model(targets=["first"], **kwargs)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_are_left_to_peft(name):
    config, change, reason = ADAPTERS[name]
    model = in_first_layer(**config)
    if change is not None:
        change(model)
    report = check_fallback(model, reason, lambda m: run(m, X))
    assert [layer.op for layer in report.layers] == [None] or "input" in reason
    # The same again where falling back is an error, at once where no input is needed to see it.
    if report.layers[0].op is None:
        use_backend(model, "peft")
        with pytest.raises(RuntimeError) as error:
            use_backend(model, "tsugi")
        assert str(error.value) == (
            f"use_backend(model, \"tsugi\") cannot accelerate 1 of 1 layers: {reason} (1, first 'base_model.model.first')"
        )
        assert type(first(model)) is lora.Linear  # and nothing has changed
    else:
        use_backend(model, "tsugi")
        with pytest.raises(RuntimeError, match=f"lora.Linear .12 -> 20. cannot be accelerated: {reason}"):
            model(X)


@pytest.mark.parametrize("name", IDLE)
def test_layers_with_nothing_to_compute_are_no_error(name):
    change, kwargs, reason = IDLE[name]
    model = in_first_layer()
    change(model)
    check_fallback(model, reason, lambda m: run(m, X))
    report = use_backend(model, "tsugi")
    model(X)
    # Back to work: the layer was accelerated all along.
    assert report.layers[0].op == "lora_linear" and report.layers[0].reason == reason
    model.base_model.enable_adapter_layers()
    model.base_model.set_adapter(["a0"])
    if first(model).merged:
        model.unmerge_adapter()
    model(X)
    assert report.fast_calls == 1


def test_different_dropout_rates():
    model = in_first_layer()
    first(model).lora_dropout["a0"] = nn.Dropout(0.5)

    def seeded(m):
        torch.manual_seed(0)
        return run(m, X)

    check_fallback(model, "the active adapters differ in lora_dropout", seeded)
    report = use_backend(model.eval(), "tsugi")  # in evaluation they do not
    model(X)
    assert report.fast_calls == 1


def test_adapter_names():
    model = in_first_layer().eval()
    names = ["a0", "a1", "__base__", "a0"]
    check_fallback(
        model,
        "called with more than the input (adapter_names, alora_offsets or others)",
        lambda m: {"output": m(X, adapter_names=names).detach()},
    )


def test_global_module_hooks():
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(handle.remove)
        check_fallback(in_first_layer(), "global module hooks are registered", lambda m: run(m, X))


def test_flops_are_counted_through_peft():
    from torch.utils.flop_counter import FlopCounterMode

    model = in_first_layer()

    def flops():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(X)
        return counter.get_total_flops()

    expected = flops()
    use_backend(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counted = flops()
    # Through PEFT or through the op; never a silent zero for the adapters.
    assert counted == expected


def test_casting_turned_off():
    model = in_first_layer(dtype=torch.bfloat16)
    use_backend(model)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        with pytest.warns(UserWarning, match="casting the input is turned off"):
            model(X.bfloat16())
    assert model(X.bfloat16()).dtype is torch.bfloat16
    assert use_backend(model).fast_calls == 1


def test_wrong_input_gets_pefts_own_error():
    model = in_first_layer()
    messages = []
    for name in ("peft", "auto"):
        use_backend(model, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for bad in (X.long(), X.to(torch.complex64)):
                with pytest.raises(RuntimeError) as error:
                    first(model)(bad)
                messages.append(str(error.value))
    assert messages[:2] == messages[2:]


def test_input_that_does_not_fit_the_layer_gets_the_ops_sentence():
    model = in_first_layer()
    use_backend(model, "tsugi")
    with pytest.raises(RuntimeError, match="lora_linear: weight is float32 but x is bfloat16"):
        model(X.bfloat16())
    with pytest.raises(RuntimeError, match=r"lora_linear: .*\[4, 5\]"):
        model(X[:, :5])


def test_adapters_on_another_device_get_pefts_own_error():
    model = in_first_layer()
    first(model).to("meta")
    use_backend(model)
    with (
        pytest.warns(UserWarning, match="the adapters are on another device"),
        pytest.raises(RuntimeError, match="meta"),
    ):
        model(X)


def test_sparse_input():
    model = in_first_layer()
    sparse = (X * (X > 0)).to_sparse()
    check_fallback(model, "the input is not a plain strided tensor", lambda m: {"output": first(m)(sparse).detach()})


def test_tensor_subclasses():
    class Tagged(torch.Tensor):
        pass

    model = in_first_layer()
    tagged = X.as_subclass(Tagged)
    check_fallback(model, "the input is not a plain strided tensor", lambda m: {"output": first(m)(tagged).detach()})


def test_meta_tensors():
    model = in_first_layer().to("meta")
    use_backend(model)
    with pytest.warns(UserWarning, match="no kernel for device type 'meta'"):
        assert model(X.to("meta")).shape == (4, 7)


def test_functional_call_differentiates_what_was_passed():
    model = in_first_layer()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    def through(m):
        y = torch.func.functional_call(m, parameters, (X,))
        grads = torch.autograd.grad(y.square().sum(), [p for n, p in parameters.items() if "lora_" in n])
        return dict(enumerate(grads)) | {"output": y.detach()}

    reason = "an adapter's weight is not a plain nn.Parameter (sharded, replicated or substituted)"
    check_fallback(model, reason, through)


def test_torch_func_and_forward_mode():
    model = in_first_layer(dtype=torch.float64, cast_adapters=False)
    x, tangent = X.double(), torch.randn(4, 12, dtype=torch.float64)

    def transformed(m):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, tangent)
            forward_mode = torch.autograd.forward_ad.unpack_dual(m(dual)).tangent.detach()
        return {
            "forward mode": forward_mode,
            "jvp": torch.func.jvp(m, (x,), (tangent,))[1].detach(),
            "vmap": torch.vmap(m)(x).detach(),
            "jacobian": torch.func.jacrev(m)(x[0]).detach(),
        }

    check_fallback(model, "inside a torch.func transform or forward-mode differentiation", transformed)


def test_data_parallel_replicas():
    # What nn.DataParallel makes on each device: parameters become plain attributes.
    model = in_first_layer()
    use_backend(model)
    layer = first(model)
    replica = layer._replicate_for_data_parallel()
    for name, child in layer.named_children():
        replica._modules[name] = child
    replica._modules["lora_A"] = copy.copy(layer.lora_A)
    part = layer.lora_A["a0"]._replicate_for_data_parallel()
    part.weight = layer.lora_A["a0"].weight * 1.0
    part._parameters["bias"] = None
    replica.lora_A._modules = dict(layer.lora_A._modules, a0=part)
    with pytest.warns(UserWarning, match="not a plain nn.Parameter"):
        torch.testing.assert_close(replica(X), layer(X))


def test_sharded_adapters():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    model = in_first_layer()
    expected = model(X)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for parameter in first(model).parameters():
            owner, name = next(
                (m, n) for m in first(model).modules() for n, p in m.named_parameters(recurse=False) if p is parameter
            )
            sharded = nn.Parameter(distribute_tensor(parameter.data, mesh, [Replicate()]), parameter.requires_grad)
            setattr(owner, name, sharded)
        report = use_backend(model)
        with pytest.warns(UserWarning, match="not a plain nn.Parameter"):
            y = first(model)(distribute_tensor(X, mesh, [Replicate()]))
        assert isinstance(y, DTensor)
        y = model.base_model.model.second(torch.tanh(y.full_tensor()))
        torch.testing.assert_close(y, expected)
        assert report.fast_calls == 0
    finally:
        dist.destroy_process_group()


def test_tracing_and_exporting_give_programs_without_our_ops():
    model = in_first_layer().eval()
    expected = model(X)
    use_backend(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, X)
        exported = [torch.export.export(model, (X,), strict=strict) for strict in (False, True)]
    assert "tsugi::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(X), expected)
    for program in exported:
        assert "tsugi" not in str(program.graph)
        torch.testing.assert_close(program.module()(X), expected)


def test_a_patched_layer():
    model = in_first_layer()
    layer = first(model)
    layer.forward = lambda x: lora.Linear.forward(layer, x) * 2
    expected = run(model, X)
    with pytest.warns(UserWarning, match="forward is replaced on the instance"):
        report = use_backend(model)
    assert [item.op for item in report.layers] == [None]
    assert_same(run(model, X), expected, 0)


def test_a_patched_class(monkeypatch):
    def faster(self, x):
        return lora.Linear.original(self, x)

    monkeypatch.setattr(lora.Linear, "original", lora.Linear.forward, raising=False)
    monkeypatch.setattr(lora.Linear, "forward", faster)
    with pytest.warns(UserWarning, match="Linear.forward was replaced by test_backend_fallback"):
        report = use_backend(in_first_layer())
    assert not report.accelerated


def test_a_subclass_of_pefts_layer():
    class Special(lora.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = in_first_layer()
    first(model).__class__ = Special
    expected = run(model, X)
    with pytest.warns(UserWarning, match="no op for LoRA on this kind of layer .Special."):
        use_backend(model)
    assert_same(run(model, X), expected, 0)


class Assorted(nn.Module):
    """Each kind of layer that PEFT puts LoRA on, besides linear ones."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 4)

    def forward(self, tokens):
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        x, _ = self.attention(x, x, x)
        return self.linear(x)


def test_other_kinds_of_layers_are_named():
    model = lora_model(Assorted(), count=1, targets=["embed", "conv", "attention", "linear"])
    tokens = torch.randint(0, 10, (2, 5))
    expected = run(model, tokens)
    with pytest.warns(UserWarning) as caught:
        report = use_backend(model)
    told = sorted(str(w.message) for w in caught)
    prefix = "tsugi_kpool leaves LoRA layers to PEFT: "
    assert told == [
        f"{prefix}lora.MultiheadAttention merges this layer's weight instead of calling it "
        "(1, first 'base_model.model.attention.base_layer.out_proj')",
        f"{prefix}no op for LoRA on this kind of layer (Conv1d) (1, first 'base_model.model.conv')",
        f"{prefix}no op for LoRA on this kind of layer (Embedding) (1, first 'base_model.model.embed')",
        f"{prefix}no op for LoRA on this kind of layer (MultiheadAttention) (1, first 'base_model.model.attention')",
    ]
    assert_same(run(model, tokens), expected)
    assert {layer.name.rpartition("model.")[2]: layer.op for layer in report.layers} == {
        "embed": None,
        "conv": None,
        "attention": None,
        "attention.base_layer.out_proj": None,
        "linear": "lora_linear",
    }
    assert report.fast_calls == 1
    use_backend(model, "peft")
    with pytest.raises(RuntimeError, match="cannot accelerate 4 of 5 layers: no op for LoRA on this kind of layer"):
        use_backend(model, "tsugi")
    assert type(model.base_model.model.linear) is lora.Linear


def test_a_new_layer_that_strict_cannot_take():
    model = lora_model(Assorted(), count=1, targets=["linear"])
    use_backend(model, "tsugi")
    with pytest.raises(RuntimeError, match="the new layer 'embed' cannot be accelerated: no op for LoRA"):
        model.add_adapter("late", LoraConfig(target_modules=["embed"]))


def test_a_new_layer_that_auto_leaves_is_told_once():
    model = lora_model(Assorted(), count=1, targets=["linear"])
    report = use_backend(model)
    with pytest.warns(UserWarning, match="first: 'embed'") as caught:
        model.add_adapter("b", LoraConfig(target_modules=["embed"]))
        model.add_adapter("c", LoraConfig(target_modules=["embed"]))
    assert len([w for w in caught if "tsugi_kpool" in str(w.message)]) == 1
    assert [layer.op for layer in report.layers] == [None, "lora_linear"]
