"""KPoolLoraConfig: defaults, errors, and the way through JSON."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
from peft import LoraConfig, PeftConfig
from peft.utils.peft_types import PeftType

from tsugi_kpool import KPoolLoraConfig, recommend_buffer_convergence_eps
from tsugi_kpool.config import parse_tcp_address

PROMISED = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "bias": "none",
    "n_adapters": 8,
    "k_active": 2,
    "routing_strategy": "round_robin",
    "routing_seed": 0,
    "sideband_enabled": False,
    "sideband_addr": "tcp://127.0.0.1:51820",
    "sideband_peers": (),
    "sideband_heartbeat_ms": 50,
    "max_drift_ms": 250,
    "aggregation_mode": "synchronous",
    "buffer_capacity": 32,
    "buffer_convergence_eps": 1e-3,
    "diagnostics_dir": None,
}


def test_the_fields_of_the_older_line_keep_their_names_and_defaults():
    config = KPoolLoraConfig()
    assert {name: getattr(config, name) for name in PROMISED} == PROMISED
    assert config.target_modules == {"q_proj", "v_proj"}
    assert isinstance(config, LoraConfig) and config.peft_type is PeftType("KPOOL")


def test_every_field_of_loraconfig_is_there():
    assert {f.name for f in dataclasses.fields(LoraConfig)} < {f.name for f in dataclasses.fields(KPoolLoraConfig)}
    assert KPoolLoraConfig(use_rslora=True, rank_pattern={"q_proj": 4}).rank_pattern == {"q_proj": 4}


def test_a_saved_config_comes_back_whole(tmp_path):
    config = KPoolLoraConfig(
        n_adapters=5,
        k_active=3,
        routing_strategy="loss_aware",
        sideband_peers=("tcp://[fe80::1]:7", "tcp://host-2.example:51820"),
        trigger="relative",
        relative_theta=0.5,
        target_modules="all-linear",
    )
    config.save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), pickle.loads(pickle.dumps(config))):
        assert type(loaded) is KPoolLoraConfig
        assert loaded == config and loaded.peft_type is config.peft_type


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"k_active": 9}, "k_active is 9, expected at most n_adapters = 8"),
        ({"k_active": 0}, "k_active is 0, expected an integer from 1"),
        ({"n_adapters": 2.0}, "n_adapters is 2.0, expected an integer"),
        ({"r": 0}, "r is 0, expected an integer from 1"),
        ({"r": True}, "r is True, expected an integer"),
        ({"routing_seed": -1}, "routing_seed is -1"),
        (
            {"routing_strategy": "robin"},
            "routing_strategy is 'robin', expected one of 'round_robin', 'random', 'loss_aware'",
        ),
        ({"aggregation_mode": "never"}, "aggregation_mode is 'never'"),
        ({"hold_action": "keep"}, "hold_action is 'keep'"),
        ({"buffer_capacity": 1}, "buffer_capacity is 1, expected an integer from 2"),
        ({"buffer_convergence_eps": 0.0}, "buffer_convergence_eps is 0.0, expected a finite number above 0"),
        ({"buffer_convergence_eps": float("nan")}, "buffer_convergence_eps is nan"),
        ({"max_drift_ms": -1}, "max_drift_ms is -1, expected a finite number from 0"),
        ({"sideband_heartbeat_ms": float("inf")}, "sideband_heartbeat_ms is inf"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5, expected at most 1"),
        ({"decision_delay": 2}, "decision_delay is 2, expected an integer from 0 to 1"),
        ({"max_hold_steps": 0}, "max_hold_steps is 0"),
        ({"overlap": "yes"}, "overlap is 'yes', expected True or False"),
        ({"sideband_enabled": True}, "sideband_enabled is True, but aggregation_mode is 'synchronous'"),
        ({"sideband_addr": "udp://a:1"}, "sideband_addr is 'udp://a:1', which does not start with 'tcp://'"),
        ({"sideband_peers": ["tcp://a:1", "tcp://a"]}, r"sideband_peers\[1\] is 'tcp://a', which has no port"),
    ],
)
def test_a_wrong_value_is_named(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        KPoolLoraConfig(**wrong)


def test_addresses():
    assert parse_tcp_address("tcp://127.0.0.1:0") == ("127.0.0.1", 0)
    assert parse_tcp_address("tcp://[::1]:51820") == ("::1", 51820)
    assert parse_tcp_address("tcp://node-3.cluster:65535") == ("node-3.cluster", 65535)
    for wrong, sentence in [
        ("tcp://:1", "which has no host"),
        ("tcp://a:65536", "whose port '65536' is not a number from 0 to 65535"),
        ("tcp://a:-1", "whose port '-1'"),
        ("tcp://a:²", "whose port"),
        ("tcp://[::1]", "which has no port"),
        ("tcp://[::g]:1", "where '::g' is no IPv6 address"),
        ("tcp://::1:1", "whose host '::1' is no host name"),
        ("tcp://a b:1", "whose host 'a b'"),
        (7, "which does not start with"),
    ]:
        with pytest.raises(ValueError, match=f"^here is {wrong!r}".replace("[", r"\[") + f", {sentence}"):
            parse_tcp_address(wrong, "here")


def test_the_recommended_threshold():
    assert recommend_buffer_convergence_eps([3.0, 1.0, 2.0]) == 2.0
    assert recommend_buffer_convergence_eps([1.0, 2.0], quantile=0.25) == 1.25
    assert recommend_buffer_convergence_eps([float("inf"), float("nan"), 4.0]) == 4.0
    assert recommend_buffer_convergence_eps(iter([])) == 1e-12
    assert recommend_buffer_convergence_eps([0.0], floor=0.5) == 0.5
    with pytest.raises(ValueError, match="quantile is 1.5"):
        recommend_buffer_convergence_eps([1.0], quantile=1.5)
    with pytest.raises(ValueError, match="floor is 0"):
        recommend_buffer_convergence_eps([1.0], floor=0)
