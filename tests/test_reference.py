"""The reference itself: against published Philox vectors, against PEFT, against finite differences."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tsugi_kpool import reference

PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
ONES = ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
ZEROS = ((0,) * 4, (0,) * 2)


def rng(seed=1234, offset=5):
    return torch.tensor([seed, offset], dtype=torch.int64)


def adapters(ranks=(2, 3), inputs=7, outputs=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    A = [torch.randn(r, inputs, generator=generator, dtype=dtype, requires_grad=True) for r in ranks]
    B = [torch.randn(outputs, r, generator=generator, dtype=dtype, requires_grad=True) for r in ranks]
    return A, B, [0.5 + k for k in range(len(ranks))]


# The known answers that come with Random123, the authors' own implementation.
@pytest.mark.parametrize(
    ("rounds", "input_words", "expected"),
    [
        (10, ZEROS, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, PI, "d16cfe09 94fdcceb 5001e420 24126ea1"),
        (7, ZEROS, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, ONES, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (7, PI, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
)
def test_philox_known_answers(rounds, input_words, expected):
    counter, key = ([torch.tensor(word) for word in words] for words in input_words)
    words = reference.philox4x32(counter, key, rounds)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_a_draw_is_the_documented_half_word():
    seed, offset, adapter, row, p = 0x0123456789ABCDEF, 0x0000FEDC76543210, 3, 2, 0.5
    keep = reference.dropout_keep(rng(seed, offset), adapter, rows=4, cols=21, p=p)
    for column in range(21):
        words = reference.philox4x32(
            [torch.tensor(w) for w in (column // 8, row, adapter | 0xFEDC << 16, 0x76543210)],
            [torch.tensor(w) for w in (0x89ABCDEF, 0x01234567)],
        )
        j = column % 8
        draw = int(words[j // 2]) >> 16 * (j % 2) & 0xFFFF
        assert bool(keep[row, column]) == (draw >= 32768)


def test_negative_seeds_are_read_as_unsigned():
    keep = reference.dropout_keep(rng(-1, -1), 0xFFFF, rows=1, cols=8, p=0.5)
    words = reference.philox4x32(
        [torch.tensor(w) for w in (0, 0, 0xFFFFFFFF, 0xFFFFFFFF)], [torch.tensor(0xFFFFFFFF)] * 2
    )
    draws = [int(w) >> shift & 0xFFFF for w in words for shift in (0, 16)]
    assert keep[0].tolist() == [draw >= 32768 for draw in draws]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_keep_rate_and_scale_are_unbiased(p):
    rows, cols = 512, 1024
    keep = reference.dropout_keep(rng(), 0, rows, cols, p)
    rate = 1 - reference.dropout_threshold(p) / 65536
    deviation = math.sqrt(rate * (1 - rate) / (rows * cols))
    assert abs(keep.double().mean().item() - rate) < 5 * deviation
    assert reference.dropout_scale(p) * rate == pytest.approx(1.0, abs=1e-12)
    # Rows and columns on their own, so that no stripe hides in the mean.
    assert (keep.double().mean(0) - rate).abs().max() < 6 * math.sqrt(rate * (1 - rate) / rows)
    assert (keep.double().mean(1) - rate).abs().max() < 6 * math.sqrt(rate * (1 - rate) / cols)


def test_thresholds_at_the_ends():
    assert reference.dropout_threshold(0.0) == 0
    assert reference.dropout_threshold(7e-6) == 0
    assert reference.dropout_threshold(8e-6) == 1
    assert reference.dropout_threshold(0.9999999) == 65535
    assert reference.dropout_keep(rng(), 0, 3, 5, 0.0).all()


def test_masks_are_independent_of_each_other():
    def mask(adapter=0, seed=1, offset=0):
        return reference.dropout_keep(rng(seed, offset), adapter, 128, 128, 0.5).double() - 0.5

    base = mask()
    others = (mask(adapter=1), mask(seed=2), mask(offset=1), mask(offset=1 << 32), mask(seed=1 | 1 << 32))
    for other in others:
        assert abs((base * other).mean().item() * 4) < 5 / 128
    assert abs((base[1:] * base[:-1]).mean().item() * 4) < 5 / 127
    assert torch.equal(mask(), base)


def test_a_mask_does_not_depend_on_the_size_asked_for():
    large = reference.dropout_keep(rng(), 1, 40, 50, 0.3)
    assert torch.equal(reference.dropout_keep(rng(), 1, 17, 21, 0.3), large[:17, :21])


class OneLinear(nn.Module):
    def __init__(self, inputs=7, outputs=5):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lora_linear_is_pefts_forward_and_backward(count):
    ranks = [4, 3, 1][:count]
    model = OneLinear().double()
    configs = [
        LoraConfig(r=r, lora_alpha=2 * k + 1, target_modules=["linear"], init_lora_weights=False, use_rslora=k == 1)
        for k, r in enumerate(ranks)
    ]
    model = get_peft_model(model, configs[0], adapter_name="0", autocast_adapter_dtype=False)
    for k, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(k), config, autocast_adapter_dtype=False)
    model.base_model.set_adapter([str(k) for k in range(count)])
    layer = model.base_model.model.linear
    x = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 4, 5, dtype=torch.float64)

    y = model(x)
    A = [layer.lora_A[str(k)].weight for k in range(count)]
    B = [layer.lora_B[str(k)].weight for k in range(count)]
    scaling = [layer.scaling[str(k)] for k in range(count)]
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    torch.testing.assert_close(reference.lora_linear(x, weight, bias, A, B, scaling), y)
    torch.testing.assert_close(reference.lora_delta(layer.base_layer(x), x, A, B, scaling), y)

    expected = torch.autograd.grad(y, [x, *A, *B], grad)
    dx, dA, dB = reference.lora_backward(grad, x, reference.lora_shrink(x, A), weight, A, B, scaling)
    for ours, theirs in zip([dx, *dA, *dB], expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_lora_backward_is_the_gradient(p):
    A, B, scaling = adapters()
    weight = torch.randn(5, 7, dtype=torch.float64)
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(6, 5, dtype=torch.float64)
    y = reference.lora_linear(x, weight, None, A, B, scaling, p, rng())
    expected = torch.autograd.grad(y, [x, *A, *B], grad)
    h = reference.lora_shrink(x, A, p, rng())
    dx, dA, dB = reference.lora_backward(grad, x, h, weight, A, B, scaling, p, rng())
    for ours, theirs in zip([dx, *dA, *dB], expected):
        torch.testing.assert_close(ours, theirs)
    low_rank_only, _, _ = reference.lora_backward(grad, x, h, None, A, B, scaling, p, rng())
    torch.testing.assert_close(low_rank_only + grad @ weight, dx)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    A, B, scaling = adapters()
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    base = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 7, dtype=torch.float64)

    def delta(base, x, *AB):
        return reference.lora_delta(base, x, AB[:2], AB[2:], scaling, p, rng())

    def backward(grad, x, *AB):
        h = reference.lora_shrink(x, AB[:2], p, rng())
        dx, dA, dB = reference.lora_backward(grad, x, h, weight, AB[:2], AB[2:], scaling, p, rng())
        return (dx, *dA, *dB)

    assert torch.autograd.gradcheck(delta, (base, x, *A, *B))
    assert torch.autograd.gradgradcheck(delta, (base, x, *A, *B))
    assert torch.autograd.gradcheck(backward, (grad, x, *A, *B))


def test_dtypes_follow_the_wider_of_input_and_adapter():
    A, B, scaling = adapters(dtype=torch.float32)
    x = torch.randn(3, 7, dtype=torch.bfloat16)
    assert reference.lora_shrink(x, A).dtype is torch.float32
    weight = torch.randn(5, 7, dtype=torch.bfloat16)
    assert reference.lora_linear(x, weight, None, A, B, scaling).dtype is torch.bfloat16
    y = torch.zeros(3, 5, dtype=torch.bfloat16)
    with torch.no_grad():
        reference.lora_expand_(y, reference.lora_shrink(x, A), B, scaling)
        expected = reference.lora_delta(torch.zeros_like(y), x, A, B, scaling)
    assert torch.equal(y, expected)


def snapshots(count=5):
    generator = torch.Generator().manual_seed(2)
    return [
        [torch.randn(4, 3, generator=generator) + 1, torch.randn(6, generator=generator).bfloat16()]
        for _ in range(count)
    ]


def empty_buffer():
    return [torch.zeros(4, 3), torch.zeros(6)], torch.zeros(8, dtype=torch.float64)


def test_variance_from_running_sums_is_the_variance_of_the_snapshots():
    sums, stats = empty_buffer()
    grads = snapshots()
    for grad in grads:
        reference.sideband_accumulate_(sums, stats, grad)
    flat = torch.stack([torch.cat([t.double().flatten() for t in grad]) for grad in grads])
    m, n, q, square, variance, power, numel, nonfinite = reference.sideband_stats(sums, stats).tolist()
    assert (m, n, numel, nonfinite) == (5, 5, 18, 0)
    assert q == pytest.approx(flat.square().sum().item(), rel=1e-6)
    assert square == pytest.approx(flat.sum(0).square().sum().item(), rel=1e-5)
    assert variance == pytest.approx(flat.var(0).sum().item(), rel=1e-4)
    assert power == pytest.approx(flat.mean(0).square().sum().item(), rel=1e-5)
    # The same number from the buffer that keeps every snapshot.
    ring = torch.cat([flat, torch.full((3, 18), math.nan, dtype=torch.float64)])
    assert reference.buffer_variance(ring, filled=5).item() == pytest.approx(variance / 18, rel=1e-4)


def test_a_weight_counts_like_repetition_in_the_mean():
    twice, once = empty_buffer(), empty_buffer()
    grad = snapshots(1)[0]
    reference.sideband_accumulate_(*twice, grad)
    reference.sideband_accumulate_(*twice, grad)
    reference.sideband_accumulate_(*once, grad, weight=2.0)
    for a, b in zip(twice[0], once[0]):
        torch.testing.assert_close(a, b)
    assert once[1][:4].tolist() == pytest.approx([1, 2, 4, twice[1][3].item()])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_snapshot_changes_only_its_count(bad):
    sums, stats = empty_buffer()
    good, spoiled = snapshots(2)
    reference.sideband_accumulate_(sums, stats, good)
    before, stats_before = [s.clone() for s in sums], stats.clone()
    spoiled[1][3] = bad
    reference.sideband_accumulate_(sums, stats, spoiled, zero_grad=True)
    assert all(torch.equal(a, b) for a, b in zip(sums, before))
    assert torch.equal(stats - stats_before, torch.tensor([0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.float64))
    assert all(not g.any() for g in spoiled)


def test_drain_hands_over_the_sum_and_clears():
    sums, stats = empty_buffer()
    grad = snapshots(1)[0]
    reference.sideband_accumulate_(sums, stats, grad)
    out = [torch.empty(4, 3), torch.empty(6, dtype=torch.bfloat16)]
    reference.sideband_drain_(sums, stats, out, scale=0.5)
    for o, g in zip(out, grad):
        torch.testing.assert_close(o, g * 0.5)
    assert not stats.any() and all(not s.any() for s in sums)


def test_too_few_snapshots_have_no_variance():
    sums, stats = empty_buffer()
    assert reference.sideband_stats(sums, stats).tolist()[4:6] == [math.inf, 0.0]
    reference.sideband_accumulate_(sums, stats, snapshots(1)[0])
    assert reference.sideband_stats(sums, stats)[4] == math.inf
    assert reference.buffer_variance(torch.zeros(4, 3), filled=1) == math.inf
