"""Dropout masks: the promised probability, and independent wherever a name differs."""

import math
from dataclasses import replace

import pytest
import torch

from loracle.model.layers.dropout import (
    _GAMMA,
    DropoutStream,
    _mixed,
    keep_bits,
    threshold_of,
    zero_dropped,
    zero_dropped_,
)
from tiny_engine import CPU

STREAM = DropoutStream(threshold_of(0.1), seed=0, step=0, slots=(0,), lengths=(400,))
FEATURES = 512


def mask(stream=STREAM, *, module="q_proj", features=FEATURES):
    return keep_bits((stream,), module=module, features=features, device=CPU).bool()


def within(count: int, *, p: float, sigmas: float = 5.0) -> float:
    """The deviation of a frequency that chance exceeds once in two million."""
    return sigmas * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_every_16_bit_lane_drops_with_the_realised_probability(p):
    stream = replace(STREAM, threshold=threshold_of(p))
    lanes = (~mask(stream)).view(-1, 4).double()
    realised = stream.threshold / 32768
    assert abs(realised - p) <= 0.5 / 32768
    for lane in range(4):
        mean = lanes[:, lane].mean().item()
        assert abs(mean - realised) < within(len(lanes), p=realised), lane
    assert abs(lanes.mean().item() - realised) < within(lanes.numel(), p=realised)


def test_counts_per_row_vary_like_a_binomial():
    dropped = (~mask()).double().sum(dim=1)
    variance = FEATURES * 0.1 * 0.9
    # The variance of a sample variance of n normal values is 2 v^2 / (n - 1).
    assert abs(dropped.var().item() - variance) < 5 * variance * math.sqrt(2 / (len(dropped) - 1))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, FEATURES])
def test_neighbouring_elements_are_independent(lag):
    flat = (~mask()).flatten().double()
    both = (flat[:-lag] * flat[lag:]).mean().item()
    assert abs(both - 0.01) < within(len(flat), p=0.01)


@pytest.mark.parametrize(
    ("other", "module"),
    [
        (STREAM, "k_proj"),
        (replace(STREAM, seed=1), "q_proj"),
        (replace(STREAM, step=1), "q_proj"),
        (replace(STREAM, slots=(1,)), "q_proj"),
    ],
    ids=["module", "seed", "step", "slot"],
)
def test_masks_of_different_names_are_independent(other, module):
    first, second = (~mask()).double(), (~mask(other, module=module)).double()
    assert abs((first * second).mean().item() - 0.01) < within(first.numel(), p=0.01)
    assert abs(second.mean().item() - 0.1) < within(first.numel(), p=0.1)


def test_a_mask_is_a_function_of_its_name():
    torch.manual_seed(0)
    first = mask()
    torch.rand(10)
    assert torch.equal(first, mask())


def test_drawing_a_mask_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    mask()
    assert torch.equal(before, torch.get_rng_state())


def test_the_mask_does_not_depend_on_how_the_step_is_cut():
    lengths = (7, 30, 1, 12)
    whole = mask(replace(STREAM, slots=(0, 1, 2, 3), lengths=lengths), features=33)
    assert whole.shape == (50, 33)
    cuts = [((0, 1), (7, 30)), ((2,), (1,)), ((3,), (12,))]
    parts = [mask(replace(STREAM, slots=slots, lengths=cut), features=33) for slots, cut in cuts]
    assert torch.equal(whole, torch.cat(parts))


def test_a_longer_sequence_starts_with_the_same_mask():
    short, long = (mask(replace(STREAM, lengths=(length,))) for length in (10, 400))
    assert torch.equal(short, long[:10])


@pytest.mark.parametrize("p", [0.1, 0.3, 1 / 32768])
def test_the_scale_belongs_to_the_realised_probability(p):
    stream = replace(STREAM, threshold=threshold_of(p))
    assert stream.scale == 1 / (1 - stream.threshold / 32768)


def test_dropped_and_scaled_is_unbiased():
    x = torch.linspace(-1, 3, FEATURES, dtype=torch.float64)
    count = 200
    total = torch.zeros(FEATURES, dtype=torch.float64)
    stream = replace(STREAM, threshold=threshold_of(0.3))
    for step in range(count // 50):
        kept = mask(replace(stream, step=step, lengths=(50,)))
        total += (kept * x * stream.scale).sum(dim=0)
    error = (total / count - x).abs()
    # sd of one kept-and-scaled element: |x| sqrt(p / (1 - p))
    assert (error <= 5 * x.abs() * math.sqrt(0.3 / 0.7 / count) + 1e-12).all()


@pytest.mark.parametrize(
    ("probability", "threshold"), [(0.0, 0), (0.1, 3277), (0.5, 16384), (0.9999999, 32767)]
)
def test_thresholds(probability, threshold):
    assert threshold_of(probability) == threshold
    assert mask(replace(STREAM, threshold=0)).all()


def test_words_are_those_of_splitmix64():
    """The first five outputs of the published generator from seed 1234567."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    words = _mixed(1234567 + torch.arange(1, 6) * _GAMMA)
    assert [word % 2**64 for word in words.tolist()] == published


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_applying_a_mask_keeps_bits_or_zeroes(dtype):
    bits = keep_bits((STREAM,), module="m", features=6, device=CPU)
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = torch.nan
    dropped = bits == 0
    assert 0 < dropped.sum() < dropped.numel()
    for masked in (zero_dropped(x, bits), zero_dropped_(x.clone(), bits)):
        assert masked.dtype == dtype
        assert not masked[dropped].any()
        assert torch.equal(masked[~dropped].nan_to_num(), x[~dropped].nan_to_num())


def test_features_of_one_token_are_as_independent_as_those_of_different_tokens():
    """Pairs of any two features, over many tokens: the counter leaves no pattern along a row."""
    dropped = (~mask(features=64)).double()
    pairs = dropped.T @ dropped / len(dropped)
    off_diagonal = pairs[~torch.eye(64, dtype=torch.bool)]
    assert (off_diagonal - 0.01).abs().max() < within(len(dropped), p=0.01, sigmas=6.0)


def test_modules_of_one_token_are_independent_of_each_other():
    """Every pair of 60 modules, the layers of a model among them."""
    names = [
        f"model.layers.{layer}.mlp.{m}" for layer in range(30) for m in ("up_proj", "down_proj")
    ]
    dropped = torch.stack([(~mask(module=name, features=64)).flatten() for name in names]).double()
    pairs = dropped @ dropped.T / dropped.shape[1]
    off_diagonal = pairs[~torch.eye(len(names), dtype=torch.bool)]
    assert (off_diagonal - 0.01).abs().max() < within(dropped.shape[1], p=0.01, sigmas=5.5)
