"""KPoolLoraConfig: its defaults, what it refuses, and that it survives being saved."""

from __future__ import annotations

import json

import peft
import pytest
from peft import LoraConfig, PeftConfig

from tsugi_kpool import KPoolLoraConfig, recommend_buffer_convergence_eps

DEFAULTS = dict(
    r=16, lora_alpha=32, lora_dropout=0.0, bias="none", n_adapters=8, k_active=2, routing_strategy="round_robin",
    routing_seed=0, sideband_enabled=False, sideband_addr="tcp://127.0.0.1:51820", sideband_peers=(),
    sideband_heartbeat_ms=50, max_drift_ms=250, aggregation_mode="synchronous", buffer_capacity=32,
    buffer_convergence_eps=1e-3, diagnostics_dir=None, trigger="variance", relative_theta=1.5, fire_cost=2.0,
    agreement=None, decision_delay=1, hold_action="defer", lr_scaling=None, wire_dtype="float32", overlap=True,
    max_hold_steps=None, stagger=True, sync_timeout_s=600.0, sideband_psk_file=None,
)  # fmt: skip


def test_the_defaults():
    config = KPoolLoraConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.target_modules == {"q_proj", "v_proj"}
    assert isinstance(config, LoraConfig) and config.peft_type == "KPOOL"
    assert KPoolLoraConfig(use_rslora=True, rank_pattern={"x": 3}).rank_pattern == {"x": 3}


def test_it_is_registered_with_peft():
    assert peft.PeftType("KPOOL") is peft.PeftType.KPOOL
    assert "KPOOL" in peft.PeftType.__members__ and peft.PeftType.KPOOL in list(peft.PeftType)
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.KPOOL] is KPoolLoraConfig
    assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.LORA] is LoraConfig, "LoRA itself was replaced"


OTHER_VALUES = dict(
    n_adapters=5, k_active=3, routing_strategy="loss_aware", routing_seed=2**64 - 1, sideband_enabled=True,
    sideband_addr="tcp://[::1]:0", sideband_peers=("tcp://node-1:65535", "tcp://[fe80::2]:9"), max_drift_ms=1.5,
    aggregation_mode="buffer_convergence", buffer_capacity=2, trigger="relative", agreement="stepwise",
    decision_delay=0, hold_action="local", lr_scaling="sqrt", wire_dtype="bfloat16", overlap=False, max_hold_steps=4,
    stagger=False, sync_timeout_s=1.0, sideband_psk_file="key", diagnostics_dir="log", r=2, lora_dropout=0.5,
)  # fmt: skip


def test_it_round_trips(tmp_path):
    config = KPoolLoraConfig(**OTHER_VALUES, target_modules=("b", "a"))
    config.save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), KPoolLoraConfig.from_pretrained(tmp_path)):
        assert type(loaded) is KPoolLoraConfig
        for name, value in OTHER_VALUES.items():
            assert getattr(loaded, name) == value, name
            assert type(getattr(loaded, name)) is type(value), name
        assert loaded.target_modules == {"a", "b"}
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "KPOOL"


@pytest.mark.parametrize(
    "field, value",
    [
        ("r", 0), ("r", 1.5), ("lora_dropout", -0.1), ("lora_dropout", float("nan")), ("lora_dropout", 1.1),
        ("n_adapters", 0), ("n_adapters", True), ("k_active", 0), ("k_active", 9), ("routing_strategy", "best"),
        ("routing_seed", -1), ("routing_seed", 2**64), ("aggregation_mode", "async"), ("buffer_capacity", 1),
        ("buffer_convergence_eps", 0.0), ("buffer_convergence_eps", float("inf")), ("trigger", "norm"),
        ("relative_theta", 0.0), ("fire_cost", 0.0), ("agreement", "none"), ("decision_delay", 2), ("hold_action", "drop"),
        ("lr_scaling", "log"), ("max_hold_steps", 0), ("wire_dtype", "int8"), ("overlap", 1), ("stagger", None),
        ("sync_timeout_s", 0.0), ("max_drift_ms", -1), ("max_drift_ms", "250"), ("sideband_heartbeat_ms", 0),
        ("sideband_enabled", "yes"), ("sideband_enabled", True), ("sideband_psk_file", 3), ("diagnostics_dir", 3),
        ("sideband_addr", "127.0.0.1:1"), ("sideband_addr", "tcp://host"), ("sideband_addr", "tcp://host:"),
        ("sideband_addr", "tcp://:1"), ("sideband_addr", "tcp://host:65536"), ("sideband_addr", "tcp://::1:80"),
        ("sideband_addr", "tcp://[::1:80"), ("sideband_addr", "tcp://[::g]:80"), ("sideband_addr", "tcp://[::1]"),
        ("sideband_addr", "tcp://a b:1"), ("sideband_addr", "tcp://host:+1"), ("sideband_addr", None),
        ("sideband_peers", "tcp://host:1"), ("sideband_peers", ("tcp://host:1", "host")),
        ("init_lora_weights", "pissa"), ("layer_replication", [(0, 1)]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(field, value):
    with pytest.raises(ValueError) as caught:
        KPoolLoraConfig(**{field: value})
    shown = value[1] if field == "sideband_peers" and isinstance(value, tuple) else value
    assert field in str(caught.value) and repr(shown) in str(caught.value)


def test_eps_is_recommended_from_samples():
    recommend = recommend_buffer_convergence_eps
    assert recommend([4.0, 1.0, float("nan"), 3.0, 2.0, float("inf")]) == 2.5
    assert recommend(iter([1.0, 2.0]), quantile=0.25) == 1.25
    assert recommend([3.0], quantile=1.0) == 3.0
    assert recommend([]) == 1e-12 and recommend([0.0], floor=0.5) == 0.5
    for wrong in (dict(quantile=1.5), dict(quantile=float("nan")), dict(floor=0.0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            recommend([1.0], **wrong)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_the_limit_of_steps_that_are_not_finite_is_a_whole_number_or_none(value):
    with pytest.raises(ValueError, match="nonfinite_limit is"):
        KPoolLoraConfig(nonfinite_limit=value)
    assert KPoolLoraConfig(nonfinite_limit=None).nonfinite_limit is None
