"""What use_backend says: of layers that are not LoRA, of models without any, in notebooks, and at which line."""

from __future__ import annotations

import contextlib
import html.parser
import sys
import threading
import typing
import warnings

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_models import TwoLinears, assert_same, lora_model, run, tiny_llama
from tsugi_kpool import ops, use_backend
from tsugi_kpool.backend import swap
from tsugi_kpool.warn import warn_user

X = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
IDS = torch.tensor([[3, 1, 7, 60]])


@pytest.fixture(autouse=True)
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(swap, "_warned", set())


@contextlib.contextmanager
def told():
    """The warnings of this package, as a list."""
    ours = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield ours
    ours += [w for w in caught if "tsugi_kpool" in str(w.message) or "use_backend" in str(w.message)]


# ---- strict means LoRA -----------------------------------------------------------------------------------------------

#: LoRA beside something of PEFT's that is not LoRA, and what the report calls that.
BESIDE = {
    "trained tokens": (
        {"trainable_token_indices": {"embed_tokens": [3, 7]}},
        ["trainable_tokens.TrainableTokensLayer"],
    ),
    "trained tokens, tied": (
        {"trainable_token_indices": {"embed_tokens": [3]}, "base": tiny_llama(tie_word_embeddings=True)},
        ["trainable_tokens.TrainableTokensLayer"] * 2,
    ),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, []),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_not_lora_is_neither_refused_nor_told(name):
    config, kinds = BESIDE[name]
    config = dict(config)
    model = lora_model(config.pop("base", None) or tiny_llama(), count=1, targets=["q_proj", "v_proj"], **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_()
    theirs = run(model, IDS)
    with told() as warned:
        for choice in ("auto", "tsugi"):
            report = use_backend(model, choice)
            assert_same(run(model, IDS), theirs)
    assert not warned
    assert len(report.layers) == len(report.accelerated) == 4
    assert [layer.kind for layer in report.not_lora] == kinds
    assert ("not LoRA, left as it is: " in str(report)) == bool(kinds)
    assert report.fast_calls == 8


def test_another_method_on_the_same_model_is_neither_refused_nor_told():
    model = get_peft_model(TwoLinears(), LoraConfig(r=4, target_modules=["first"]), adapter_name="lora", mixed=True)
    with told() as warned:
        report = use_backend(model, "tsugi")
        model.add_adapter("loha", LoHaConfig(r=4, target_modules=["second"]))
    assert not warned
    assert [layer.kind for layer in report.layers] == ["lora.Linear"]
    assert [layer.kind for layer in report.not_lora] == ["loha.Linear"]
    assert [layer.reason for layer in report.not_lora] == ["not LoRA"]


def test_lora_that_has_no_op_is_refused_still():
    model = get_peft_model(TwoLinears(), AdaLoraConfig(r=4, target_modules=["first"], total_step=10))
    with pytest.raises(RuntimeError, match="cannot accelerate 1 of 1 layers: no op .* .SVDLinear."):
        use_backend(model, "tsugi")


WITHOUT_LORA = {
    "plain": (None, ""),
    "IA3": (IA3Config(target_modules=["first"], feedforward_modules=[]), "1 x ia3.Linear"),
    "LoKr": (LoKrConfig(target_modules=["first", "second"]), "2 x lokr.Linear"),
    "VeRA": (VeraConfig(target_modules=["first"]), "1 x vera.Linear"),
    "OFT": (OFTConfig(target_modules=["first"], oft_block_size=4), "1 x oft.Linear"),
}


@pytest.mark.parametrize("choice", ["auto", "tsugi"])
@pytest.mark.parametrize("name", WITHOUT_LORA)
def test_a_model_without_lora_gets_a_warning_that_says_what_to_write(name, choice):
    config, what = WITHOUT_LORA[name]
    model = TwoLinears() if config is None else get_peft_model(TwoLinears(), config)
    expected = run(model, X)
    with pytest.warns(UserWarning, match="has no LoRA layer.*after get_peft_model.*later will be covered") as caught:
        report = use_backend(model, choice)
    (warning,) = caught
    assert (f"is not LoRA: {what}." in str(warning.message)) == bool(what)
    assert_same(run(model, X), expected, 0)
    assert report.layers == [] and "no LoRA layer yet; those added later are covered" in str(report)


@pytest.mark.parametrize(
    "config",
    [
        TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]),
        PrefixTuningConfig(num_virtual_tokens=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_methods_without_layers_of_their_own_get_it_too(config):
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(tiny_llama(), config)
    with pytest.warns(UserWarning, match="has no LoRA layer"):
        assert use_backend(model).layers == []


def test_giving_a_model_back_needs_no_lora():
    with told() as warned:
        report = use_backend(TwoLinears(), "peft")
    assert not warned and "those added later stay PEFT's" in str(report)


# ---- at which line ---------------------------------------------------------------------------------------------------


def hooked():
    """A model of which one layer is left to PEFT at each call."""
    model = lora_model(nn.Sequential(nn.Linear(12, 7)), targets=["0"])
    use_backend(model)
    model.base_model.model[0].lora_A["a0"].register_forward_hook(lambda *args: None)
    return model


def conv_config():
    return LoraConfig(target_modules=["0"])


def convolution(config=None):
    base = nn.Sequential(nn.Conv1d(4, 4, 3))
    return base if config is None else get_peft_model(base, config)


def used_everywhere(action):
    def run():
        with use_backend():
            return action()

    return run


def in_with(model):
    with use_backend(model): pass  # fmt: skip # noqa: E701


# What is called, on one line of this file; what it warns about. The line is that of the lambda.
WAYS = {
    "the call": (lambda: use_backend(convolution(conv_config())), "no op for LoRA"),
    "by name": (lambda: use_backend(model=convolution(conv_config()), backend="auto"), "no op for LoRA"),
    "no LoRA": (lambda: use_backend(TwoLinears()), "has no LoRA layer"),
    "a forward": (lambda: hooked()(X), "hooks on a submodule"),
    "a forward in a container": (lambda: nn.Sequential(hooked(), nn.ReLU())(X), "hooks on a submodule"),
    "under a checkpoint": (lambda: checkpoint(hooked(), X, use_reentrant=False), "hooks on a submodule"),
    "in vmap": (lambda: torch.vmap(hooked())(X), "hooks on a submodule"),
    "a new adapter": (lambda: lora_on_convolution(use_backend), "first: '0'"),
}


def lora_on_convolution(use):
    base = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4))
    model = get_peft_model(base, LoraConfig(target_modules=["1"]))
    use(model)
    model.add_adapter("b", conv_config())  # the line


def line_of(function) -> int:
    lines = open(__file__).read().splitlines()
    return next(i for i in range(function.__code__.co_firstlineno, len(lines) + 1) if "# the line" in lines[i - 1])


@pytest.mark.parametrize("way", WAYS)
def test_a_warning_points_at_the_users_line(way):
    function, about = WAYS[way]
    with told() as warned:
        function()
    (warning,) = [w for w in warned if about in str(w.message)]
    line = line_of(lora_on_convolution) if way == "a new adapter" else function.__code__.co_firstlineno
    assert (warning.filename, warning.lineno) == (__file__, line)


def test_a_with_statement_and_get_peft_model_point_at_the_users_line():
    with told() as warned:
        in_with(convolution(conv_config()))
    (warning,) = warned
    assert (warning.filename, warning.lineno) == (__file__, in_with.__code__.co_firstlineno + 1)
    base, config = convolution(), conv_config()
    swap._warned.clear()
    with told() as warned, use_backend():
        line = sys._getframe().f_lineno + 1
        get_peft_model(base, config)
    assert [(w.filename, w.lineno) for w in warned] == [(__file__, line)]


def test_without_the_native_library_the_process_wide_call_points_there_too(monkeypatch):
    monkeypatch.setattr(ops, "unavailable_reason", "the native library could not be loaded")
    with told() as warned:
        line = sys._getframe().f_lineno + 1
        use_backend().__exit__()
    assert [(w.filename, w.lineno) for w in warned] == [(__file__, line)]


def test_a_forward_in_a_thread_of_its_own_warns():
    model = hooked()
    with told() as warned:
        thread = threading.Thread(target=model, args=(X,))
        thread.start()
        thread.join()
    assert len(warned) == 1


def test_a_warning_can_be_filtered_at_the_users_module():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "tsugi_kpool leaves", module=__name__)
        use_backend(convolution(conv_config()))
        with pytest.raises(UserWarning, match="something else"):
            warn_user("something else")


# ---- the report and the arguments ------------------------------------------------------------------------------------


class Table(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.rows, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag != "br":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_notebook_shows_the_table():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<b>&", nn.Linear(12, 7))
            self.conv = nn.Conv1d(12, 7, 1)

        def forward(self, x):
            return self._modules["<b>&"](x)

    model = get_peft_model(Net(), LoraConfig(r=4, target_modules=["<b>&", "conv"]))
    with pytest.warns(UserWarning, match="no op"):
        report = use_backend(model)
    model(X)
    table = Table()
    table.feed(report._repr_html_())
    assert table.open == []
    assert table.rows[0] == ["layers", "", "kind", "in -> out", "active", "computed by"]
    assert table.rows[1] == ["<b>&", "x1", "lora.Linear", "12 -> 7", "1 of 1, r=4", "lora_linear"]
    assert table.rows[2][-1] == "PEFT: no op for LoRA on this kind of layer (Conv1d)"
    assert "tsugi_kpool backend 'auto': 1 of 2 LoRA layers accelerated" in table.text
    assert "calls: 1 by tsugi, 0 by PEFT" in table.text
    assert repr(report) == "<BackendReport 'auto': 1 of 2 layers accelerated>"


@pytest.mark.parametrize("model", [None, TwoLinears()], ids=["process-wide", "no layers"])
def test_a_notebook_shows_a_report_without_a_table(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with use_backend(model) as report:
            shown = report._repr_html_()
    assert shown.startswith("<p>tsugi_kpool backend &#x27;auto&#x27;") and "<table>" not in shown


def test_the_choices_are_known_to_type_checkers():
    choices = typing.get_args(typing.get_type_hints(use_backend)["backend"])
    assert choices == swap.BACKENDS
    for choice in choices:
        use_backend(lora_model(), choice)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((TwoLinears(), "Auto"), ValueError, "backend is 'Auto', expected one of 'auto', 'tsugi', 'peft'"),
        ((TwoLinears(), None), ValueError, "backend is None, expected one of"),
        ((TwoLinears(), True), ValueError, "backend is True, expected one of"),
        ((None, "TSUGI"), ValueError, "backend is 'TSUGI', expected one of"),
        (("tsugi",), TypeError, "model is a str, expected a torch.nn.Module; write use_backend.model, 'tsugi'."),
        (("gpt2",), TypeError, "model is a str, expected a torch.nn.Module$"),
        (([TwoLinears()],), TypeError, "model is a list, expected a torch.nn.Module$"),
        ((LoraConfig(),), TypeError, "model is a LoraConfig, expected a torch.nn.Module$"),
        ((TwoLinears,), TypeError, "model is a type, expected a torch.nn.Module$"),
    ],
)
def test_wrong_arguments(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        use_backend(*arguments)
