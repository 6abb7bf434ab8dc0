"""Private inputs: silence is data, columns must be those of the site."""

import pytest
import torch
from torch.nn import functional as F

from trunkline.errors import SensorMismatch
from trunkline.models.stems.channels import ChannelStem
from trunkline.models.stems.columns import ColumnStem

NAN = float("nan")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_without_silence_a_channel_stem_is_one_linear_mix() -> None:
    stem, x = ChannelStem(5, 8), randn(2, 5, 9)
    torch.nn.init.normal_(stem.silent.weight)
    assert torch.equal(stem(x), F.conv1d(x, stem.values.weight, stem.values.bias))


def test_a_silent_sensor_counts_as_its_mean_until_its_silence_is_learnt() -> None:
    stem, x = ChannelStem(5, 8), randn(2, 5, 9)
    silent, mean = x.clone(), x.clone()
    silent[:, 2, 4:], mean[:, 2, 4:] = NAN, 0.0
    torch.testing.assert_close(stem(silent), stem(mean))
    with torch.no_grad():
        stem.silent.weight[:, 2] = 1.5
    # weight over [values, mask]: each silent step adds its sensor's own vector, and no other step changes
    difference = stem(silent) - stem(mean)
    torch.testing.assert_close(difference[..., 4:], torch.full_like(difference[..., 4:], 1.5))
    assert difference[..., :4].abs().max() < 1e-6


def test_silence_is_learnt_only_for_sensors_that_were_silent() -> None:
    stem, x = ChannelStem(5, 8), randn(2, 5, 9)
    x[0, 3, 1] = NAN
    stem(x).square().sum().backward()
    assert stem.silent.weight.grad is not None
    moved = stem.silent.weight.grad.abs().sum(dim=(0, 2)) > 0
    assert moved.tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("kernel", [1, 2, 3, 8])
@pytest.mark.parametrize("time", [1, 2, 7])
def test_a_short_convolution_keeps_the_length(kernel: int, time: int) -> None:
    assert ChannelStem(3, 8, kernel=kernel)(randn(2, 3, time)).shape == (2, 8, time)


@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 6, 9), (2, 5), (5, 9)])
def test_another_number_of_sensors_is_refused_with_both_numbers(shape: tuple[int, ...]) -> None:
    with pytest.raises(SensorMismatch, match=r"batch, 5 channels, time\)\. Found \(" + ", ".join(map(str, shape))):
        ChannelStem(5, 8)(randn(*shape))


def test_categories_beside_a_window_are_refused_rather_than_ignored() -> None:
    with pytest.raises(SensorMismatch, match=r"no categorical columns\. Found 2"):
        ChannelStem(5, 8)(randn(2, 5, 9), torch.zeros(2, 2, dtype=torch.int64))


def test_without_gaps_a_column_stem_is_a_linear_map_plus_one_vector_a_code() -> None:
    stem, x = ColumnStem(3, (4, 2), 8), randn(5, 3)
    codes = torch.tensor([[1, 1], [3, 0], [2, 1], [0, 0], [1, 0]])
    expected = [
        stem.values(x[row]) + stem.codes[0].weight[codes[row, 0]] + stem.codes[1].weight[codes[row, 1]]
        for row in range(5)
    ]
    torch.testing.assert_close(stem(x, codes), torch.stack(expected))


def test_unknown_and_never_seen_codes_add_nothing_to_an_untrained_stem() -> None:
    stem, x = ColumnStem(3, (4,), 8), randn(4, 3)
    for code in (0, 4, 99, -1):
        assert torch.equal(stem(x, torch.full((4, 1), code)), stem.values(x))


def test_a_missing_number_is_its_mean_until_its_absence_is_learnt() -> None:
    stem, x = ColumnStem(3, (), 8), randn(4, 3)
    gap, mean = x.clone(), x.clone()
    gap[1, 2], mean[1, 2] = NAN, 0.0
    torch.testing.assert_close(stem(gap), stem(mean))
    stem(gap).square().sum().backward()
    assert stem.silent.weight.grad is not None
    assert (stem.silent.weight.grad.abs().sum(dim=0) > 0).tolist() == [False, False, True]


def test_rows_with_other_columns_are_refused() -> None:
    stem = ColumnStem(3, (4,), 8)
    for x, codes in (
        (randn(2, 4), torch.zeros(2, 1).long()),
        (randn(2, 3), None),
        (randn(2, 3), torch.zeros(2, 2).long()),
    ):
        with pytest.raises(SensorMismatch, match=r"3 columns\) and 1 categorical columns\. Found"):
            stem(x, codes)
