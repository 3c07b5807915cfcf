"""Two ranks in network namespaces, with a link of 50 Mbit/s and 20 ms between them: that it is one, and that they agree.

How fast anything is on it, ``python -m benches link`` says.
"""

from types import SimpleNamespace

import pytest
from benches.training import link, small_gpt


def test_ranks_agree_over_a_slow_link(tmp_path):
    reason = link.unavailable()
    if reason:
        pytest.skip(reason)
    size = SimpleNamespace(width=16, layers=1, length=16, rows=2, base_steps=2, steps=12)
    base = tmp_path / "base.pt"
    small_gpt.pretrained(size, base)
    chosen = [
        "synchronous, waited",
        "synchronous, hidden",
        "noise scale 2",
        "noise scale 2, stepwise",
        "no communication",
    ]
    options = {"methods": chosen, "seeds": [0], "lr": 1e-3}
    rtt, rows = link.measure(size, base, mbit=50.0, rtt_ms=20.0, options=options)
    assert rtt >= 20.0
    results = {name: ranks for name, _, ranks in rows}
    assert list(results) == chosen
    for name, (first, second) in results.items():
        assert (first["loss"] == second["loss"]) == (name != "no communication")
        assert (first["fires"], first["holds"]) == (second["fires"], second["holds"])
    assert results["synchronous, hidden"][0]["loss"] == results["synchronous, waited"][0]["loss"]
    assert results["noise scale 2"][0]["control_bytes_a_step"] == 0
    assert 0 < results["noise scale 2, stepwise"][0]["control_bytes_a_step"] < 1000
    assert 0 < results["noise scale 2"][0]["megabytes"] <= results["synchronous, waited"][0]["megabytes"]
