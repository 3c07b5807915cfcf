"""DoRA on the ops computes what PEFT's DoRA does: outputs, all gradients, and every state a layer can be in."""

import contextlib
import copy
import io
import pickle
import re
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.dora import DoraLinearLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_models import TwoLinears, assert_same, error, lora_model, run
from test_backend_quantised import bnb_4bit, bnb_8bit
from tsugi_kpool import use_backend
from tsugi_kpool.backend import dora, swap

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))
DOUBLE = {"dtype": torch.float64, "cast_adapters": False}


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(swap, "_warned", set())


def dora_model(count=1, variants=None, p=0.0, **kwargs):
    """A model whose adapters have DoRA, or those that ``variants`` says, with magnitudes that are not the norms."""
    variants = [True] * count if variants is None else variants
    model = lora_model(count=1, use_dora=variants[0], lora_dropout=p, **kwargs)
    cast = kwargs.get("cast_adapters", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, use_dora in enumerate(variants[1:], 1):
            config = LoraConfig(
                r=3 + k,
                lora_alpha=2 * k + 3,
                target_modules=kwargs.get("targets", ["first", "second"]),
                init_lora_weights=False,
                use_dora=use_dora,
                lora_dropout=p,
            )
            model.add_adapter(f"a{k}", config, autocast_adapter_dtype=cast)
    model.base_model.set_adapter([f"a{k}" for k in range(len(variants))])
    stretch(model)
    return model


def stretch(model):
    generator = torch.Generator().manual_seed(9)
    for module in model.modules():
        if isinstance(module, DoraLinearLayer):
            stretched = module.weight.data * (0.5 + torch.rand(module.weight.shape, generator=generator))
            module.weight.data = stretched.to(module.weight.dtype)


def first(model):
    return model.base_model.model.first


def seeded(model, x, **kwargs):
    torch.manual_seed(5)
    return run(model, x, **kwargs)


def check(model, x=X, tolerance=None, calls=2, **kwargs):
    """PEFT's numbers, from the ops, with dropout from the same state of the generator."""
    tolerance = tolerance or {torch.float32: 2e-6, torch.float64: 1e-13}[x.dtype]
    use_backend(model, "peft")
    theirs = seeded(model, x, **kwargs)
    report = use_backend(model, "tsugi")
    before = report.fast_calls
    assert_same(seeded(model, x, **kwargs), theirs, tolerance)
    assert (report.fast_calls - before, report.fallback_calls) == (calls, {})
    return report


BASE = "DoRA on a base layer that is neither nn.Linear nor bitsandbytes' Linear4bit"


# ---- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_are_pefts(dtype, count, training, p):
    model = dora_model(count, p=p, dtype=dtype, cast_adapters=False).train(training)
    check(model, X.to(dtype))
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(trained) == 2 * 3 * count and sum("magnitude" in name for name in trained) == 2 * count


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "variants",
    [(True, False), (False, True), (False, True, False), (True, False, True), (False, False, True)],
)
def test_mixed_with_plain_lora(variants, p):
    check(dora_model(variants=variants, p=p, dtype=torch.float64, cast_adapters=False), X.double())


@pytest.mark.parametrize("rates", [(0.0, 0.4), (0.4, 0.0), (0.2, 0.6)])
@pytest.mark.parametrize("training", [True, False])
def test_adapters_that_differ_in_dropout(rates, training):
    model = dora_model(2, dtype=torch.float64, cast_adapters=False)
    for layer in (first(model), model.base_model.model.second):
        for k, p in enumerate(rates):
            layer.lora_dropout[f"a{k}"] = nn.Dropout(p) if p else nn.Identity()
    check(model.train(training), X.double())


@pytest.mark.parametrize("frozen", ["layer", "dropout", "rate"])
def test_peft_asks_the_layer_for_its_mode(frozen):
    # PEFT multiplies with W anew when the layer trains and its dropout is not an Identity, whatever that drops.
    model = dora_model(2, p=0.3, dtype=torch.float64, cast_adapters=False)
    for layer in (first(model), model.base_model.model.second):
        if frozen == "layer":
            layer.training = False
        for dropout in layer.lora_dropout.values():
            if frozen == "dropout":
                dropout.eval()
            elif frozen == "rate":
                dropout.p = 0.0
    check(model, X.double())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast_adapters", [True, False], ids=["fp32 adapters", "adapters in the model's dtype"])
def test_half_precision_is_about_as_exact_as_peft(dtype, cast_adapters, count, p):
    model = dora_model(count, p=p, dtype=dtype, cast_adapters=cast_adapters)
    x = X.to(dtype)
    theirs = seeded(model, x)
    use_backend(model, "peft")
    double = copy.deepcopy(model).double()
    truth = seeded(double, x.double())
    report = use_backend(model, "tsugi")
    ours = seeded(model, x)
    assert (report.fast_calls, report.fallback_calls) == (2, {})
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    our_error, their_error = error(ours, truth), error(theirs, truth)
    for name in ours:
        assert our_error[name] <= 2 * their_error[name] + 2e-3, (name, our_error[name], their_error[name])


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast(p):
    model = dora_model(p=p)

    def context():
        return torch.autocast("cpu", torch.bfloat16)

    theirs = seeded(model, X, context=context)
    truth = seeded(copy.deepcopy(model).double(), X.double())
    report = use_backend(model, "tsugi")
    ours = seeded(model, X, context=context)
    assert (report.fast_calls, report.fallback_calls) == (2, {})
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    our_error, their_error = error(ours, truth), error(theirs, truth)
    for name in ours:
        assert our_error[name] <= 2 * their_error[name] + 2e-3, (name, our_error[name], their_error[name])


def test_a_new_adapter_changes_nothing():
    # B is zero and the magnitude is the norm, rounded: their quotient must be one, in every dtype.
    for dtype in (torch.float32, torch.bfloat16):
        model = lora_model(count=1, use_dora=True, init_lora_weights=True, dtype=dtype, cast_adapters=False)
        use_backend(model, "tsugi")
        x = X.to(dtype)
        ours = model(x)
        with model.disable_adapter():
            torch.testing.assert_close(ours, model(x), rtol=2e-2 if dtype is torch.bfloat16 else 1e-6, atol=1e-2)


def test_second_derivatives():
    model = dora_model(dtype=torch.float64, cast_adapters=False)

    def curvature():
        x = X.double().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [p for p in model.parameters() if p.requires_grad])

    theirs = curvature()
    report = use_backend(model, "tsugi")
    for our, their in zip(curvature(), theirs, strict=True):
        torch.testing.assert_close(our, their)
    assert report.fast_calls == 2


# ---- other base layers -------------------------------------------------------------------------------------------


def train_the_base(model):
    first(model).base_layer.weight.requires_grad_()
    first(model).base_layer.bias.requires_grad_()


def hook_the_base(model):
    first(model).base_layer.register_forward_hook(lambda module, args, result: result * 1)


@pytest.mark.parametrize("change", [train_the_base, hook_the_base])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("variants", [(True,), (False, True), (True, True)])
def test_a_base_that_is_called(variants, p, change):
    model = dora_model(variants=variants, p=p, targets=["first"], **DOUBLE)
    change(model)
    report = check(model, X.double(), calls=1)
    assert report.layers[0].op == "lora_delta (DoRA)"
    with torch.no_grad():
        first(model).base_layer.weight.mul_(1.2)
    check(model, X.double(), calls=1)


def quantised(make, count=1, p=0.0, dtype=torch.float32):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lora_model(make(dtype)[0], count, dtype=None, targets=["first"], use_dora=True, lora_dropout=p)
    stretch(model)
    return model


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_quantised_base(count, p):
    model = quantised(bnb_4bit, count, p)
    x = torch.randn(5, 64)
    report = check(model, x, 5e-6, calls=1)
    assert report.layers[0].op == "lora_delta (DoRA)"
    with torch.no_grad():
        check(model.eval(), x, 5e-6, calls=1)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_quantised_base_in_half_precision(p):
    report = check(quantised(bnb_4bit, p=p, dtype=torch.bfloat16), torch.randn(5, 64).bfloat16(), 1e-2, calls=1)
    assert report.layers[0].op == "lora_delta (DoRA)"


@contextlib.contextmanager
def autocast(cuda):
    """On the CPU, and with the flag of CUDA's, which PEFT asks whatever the device is."""
    with torch.autocast("cpu", torch.bfloat16):
        torch.set_autocast_enabled("cuda", cuda)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["4 bits", "hooked"])
def test_autocast_on_a_base_that_is_called(base, x_dtype, p, cuda):
    if base == "4 bits":
        model, x = quantised(bnb_4bit, 2, p), torch.randn(5, 64)
    else:
        model, x = dora_model(2, p=p, targets=["first"]), X
        hook_the_base(model)
    check(model, x.to(x_dtype), 1e-2, calls=1, context=partial(autocast, cuda))


def test_eight_bits_are_left_to_peft():
    with pytest.warns(UserWarning, match="tsugi_kpool leaves calls"):
        model = quantised(bnb_8bit)
        report = use_backend(model)
        model(torch.randn(5, 64))
    assert report.layers[0].op is None
    assert report.fallback_calls == {BASE: 1}


# ---- the norm ----------------------------------------------------------------------------------------------------


def norm_of(weight, a, b, scaling):
    part = dora.Part("a0", a, b, scaling, 0.0, None, False)
    return dora._norm(nn.Module(), weight, part)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_in_float64(dtype, size):
    torch.manual_seed(0)
    weight = (torch.randn(64, 96) * size).to(dtype)
    a, b = torch.randn(8, 96), torch.randn(64, 8)
    wanted = torch.linalg.vector_norm(weight.double() + 1.5 * (b.double() @ a.double()), dim=1)
    norm = norm_of(weight, a, b, 1.5)
    assert norm.dtype is torch.float32
    assert ((norm - wanted).abs() / wanted).max() < 1e-6


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-5])
def test_the_norm_of_rows_that_cancel(left):
    torch.manual_seed(0)
    a, b = torch.randn(8, 96), torch.randn(64, 8)
    weight = -1.5 * (b @ a) + left * torch.randn(64, 96)
    wanted = torch.linalg.vector_norm(weight.double() + 1.5 * (b.double() @ a.double()), dim=1)
    # What float32 can say of the sum, PEFT's sum as well.
    limit = 1e-6 + 1e-6 * (torch.linalg.vector_norm(weight, dim=1) / wanted).max()
    assert ((norm_of(weight, a, b, 1.5) - wanted).abs() / wanted).max() < limit


def test_a_scaling_of_zero():
    weight = torch.randn(6, 5)
    a, b = torch.full((2, 5), torch.inf), torch.randn(6, 2)
    assert not norm_of(weight, a, b, 1.0).isfinite().any()
    model = dora_model(dtype=torch.float64, cast_adapters=False)
    first(model).set_scale("a0", 0.0)
    check(model, X.double())


# ---- changes of state --------------------------------------------------------------------------------------------


def add_in_place(layer, part):
    with torch.no_grad():
        part.add_(torch.linspace(0.0, 1.0, part.numel(), dtype=part.dtype).view_as(part))


def add_to_data(layer, part):
    part.data.mul_(1.5)


def replace_data(layer, part):
    part.data = part.data * 1.5


@pytest.mark.parametrize("change", [add_in_place, add_to_data, replace_data])
@pytest.mark.parametrize("what", ["weight", "A", "B", "magnitude"])
def test_parameters_that_change(what, change):
    model = dora_model(2, **DOUBLE).eval()
    layer = first(model)
    part = {
        "weight": layer.base_layer,
        "A": layer.lora_A["a1"],
        "B": layer.lora_B["a1"],
        "magnitude": layer.lora_magnitude_vector["a1"],
    }[what]
    check(model, X.double())
    change(layer, part.weight)
    check(model, X.double())
    part.weight = nn.Parameter(part.weight.detach() * 1.1, requires_grad=what != "weight")
    check(model, X.double())
    layer.set_scale("a1", 3.0)
    check(model, X.double())


def test_norms_are_kept_while_nothing_changes(monkeypatch):
    model = dora_model(**DOUBLE)
    formed = []
    monkeypatch.setattr(dora, "_norms", lambda *a, original=dora._norms: formed.append(0) or original(*a))
    squared = []
    monkeypatch.setattr(dora, "_squares", lambda *a, original=dora._squares: squared.append(0) or original(*a))
    use_backend(model, "tsugi")
    x = X.double()
    with torch.inference_mode():
        model(x)
    run(model, x)
    assert (len(formed), len(squared)) == (2, 2)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    run(model, x)
    assert (len(formed), len(squared)) == (4, 2)


def test_the_norm_carries_no_gradient_and_no_graph():
    model = dora_model(**DOUBLE)
    use_backend(model, "tsugi")
    model(X.double())
    kept = dora._known[first(model)]
    assert not kept.squares.requires_grad and not kept.norms["a0"][3].requires_grad


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("safe", [False, True])
def test_merged_and_back(count, safe):
    model = dora_model(count, **DOUBLE).eval()
    x = X.double()
    check(model, x)
    before = model(x)
    report = use_backend(model, "tsugi")
    model.merge_adapter(safe_merge=safe)
    merged = model(x)
    assert report.fallback_calls == {"adapters are merged into the base weight": 2}
    if count == 1:
        torch.testing.assert_close(merged, before)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), before)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), model.get_base_model()(x))
    assert report.layers[0].op == "lora_linear (DoRA)"


def test_saved_and_loaded(tmp_path):
    model = dora_model(**DOUBLE)
    use_backend(model, "tsugi")
    x = X.double()
    wanted = model(x)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(TwoLinears().double(), tmp_path / "a0", autocast_adapter_dtype=False)
    use_backend(loaded, "tsugi")
    torch.testing.assert_close(loaded(x), wanted)
    # Over an adapter that was used before.
    other = dora_model(seed=0, **DOUBLE)
    use_backend(other, "tsugi")
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    assert not torch.allclose(other(x), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.load_adapter(tmp_path / "a0", "a0", autocast_adapter_dtype=False)
    torch.testing.assert_close(other(x), wanted)


def test_copies_and_pickles():
    model = dora_model(**DOUBLE)
    use_backend(model, "tsugi")
    x = X.double()
    wanted = model(x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), wanted, rtol=0, atol=0)
    buffer = io.BytesIO(pickle.dumps(model))
    torch.testing.assert_close(pickle.load(buffer)(x), wanted)


def test_deleted_and_switched_adapters():
    model = dora_model(3, variants=(True, True, False), **DOUBLE)
    for name in ("a1", "a2", "a0"):
        model.set_adapter(name)
        check(model, X.double())
    model.delete_adapter("a1")
    model.base_model.set_adapter(["a0", "a2"])
    check(model, X.double())


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, p):
    model = dora_model(p=p, **DOUBLE)
    inner = model.base_model.model
    use_backend(model, "tsugi")
    plain = seeded(model, X.double())
    forward = inner.forward
    inner.forward = lambda x: checkpoint(forward, x, use_reentrant=use_reentrant)
    assert_same(seeded(model, X.double()), plain, 1e-14)


def test_frozen_magnitudes_and_no_grad():
    model = dora_model(**DOUBLE)
    first(model).lora_magnitude_vector["a0"].weight.requires_grad_(False)
    check(model, X.double())
    use_backend(model, "peft")
    with torch.no_grad():
        theirs = model(X.double())
        use_backend(model, "tsugi")
        ours = model(X.double())
    assert not ours.requires_grad
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    check(dora_model(p=0.3, **DOUBLE), X.double().reshape(-1, 12)[:rows])


def test_no_identity_and_one_product_with_the_weight():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket._qualified_op_name)
            return func(*args, **(kwargs or {}))

    names = []
    model = dora_model(targets=["first"])
    use_backend(model, "tsugi")
    model(X)
    with Seen():
        first(model)(X)
    assert "aten::eye" not in names
    assert sum(name.startswith("tsugi::") for name in names) == 1
    assert not any("mm" in name or name == "aten::linear" for name in names)


# ---- what is left to PEFT ----------------------------------------------------------------------------------------


def hook(model):
    first(model).lora_magnitude_vector["a0"].register_forward_hook(lambda *args: None)


class Other(nn.Linear):
    pass


def replace_the_base(model):
    first(model).base_layer.__class__ = Other


def trainable_variant(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("mica", LoraConfig(target_modules=["first"], init_lora_weights="mica"))
    model.base_model.set_adapter(["a0", "mica"])


MAGNITUDE = "DoRA whose magnitude is not a plain nn.Parameter on the base layer's device, or has hooks"


@pytest.mark.parametrize(
    "change, reason",
    [
        (hook, MAGNITUDE),
        (replace_the_base, BASE),
        (trainable_variant, "LoRA variant MiCALinearVariant"),
    ],
)
def test_left_to_peft_by_name(change, reason):
    model = dora_model(targets=["first"])
    change(model)
    theirs = run(model, X)
    report = use_backend(model)
    with pytest.warns(UserWarning, match=re.escape(reason)):
        assert_same(run(model, X), theirs, 0)
    assert (report.fast_calls, report.fallback_calls) == (0, {reason: 1})
    assert report.layers[0].op is None
    use_backend(model, "peft")
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        use_backend(model, "tsugi")


def test_an_input_without_rows_is_left_to_peft():
    model = dora_model(targets=["first"])
    theirs = first(model)(X[0, 0])
    report = use_backend(model)
    with pytest.warns(UserWarning, match="DoRA on an input without rows"):
        torch.testing.assert_close(first(model)(X[0, 0]), theirs)
    assert report.fast_calls == 0


def test_compiled_models_run_peft():
    model = dora_model()
    theirs = run(model, X)
    use_backend(model)
    compiled = torch.compile(model, backend="eager")
    ours = run(compiled, X)
    assert_same({name.removeprefix("_orig_mod."): t for name, t in ours.items()}, theirs, 2e-6)


def test_the_report_names_dora():
    report = use_backend(dora_model(2), "tsugi")
    assert {layer.op for layer in report.layers} == {"lora_linear (DoRA)"}
    assert "lora_linear (DoRA)" in str(report)
