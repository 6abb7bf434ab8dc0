"""Windows: equal to a slow obvious oracle, and never from two parts at once."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client.data.sites import fleet, write_site
from tests.windows import batch_of
from trunkline.client.data import WindowSet, open_data
from trunkline.client.data.windows import ends_of, segments


def window_set(lengths: list[int], window: int | None, stride: int = 1, channels: int = 3) -> WindowSet:
    random = np.random.default_rng(len(lengths))
    group = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    first, last = segments(group)
    ends = ends_of(first, last, stride, only_last=False)
    order = np.arange(len(group), dtype=np.float64)
    values = random.normal(size=(len(group), channels)).astype(np.float32)
    labels = {"rul": random.normal(size=len(ends)).astype(np.float32)}
    names = tuple(str(one) for one in range(len(lengths)))
    codes = random.integers(0, 5, (len(group), 2))
    return WindowSet(values, codes, first[ends], ends, window, labels, group[ends], order[ends], names)


def by_hand(lengths: list[int], values: np.ndarray, window: int, stride: int) -> list[list[list[float]]]:
    """The windows of each group one value at a time, the first row repeated in front."""
    found, start = [], 0
    for length in lengths:
        rows = values[start : start + length].tolist()
        for end in range(length):
            if (length - 1 - end) % stride == 0:
                cut = [rows[max(0, moment)] for moment in range(end - window + 1, end + 1)]
                found.append([[row[channel] for row in cut] for channel in range(values.shape[1])])
        start += length
    return found


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    window=st.integers(1, 130),
    stride=st.integers(1, 7),
    channels=st.integers(1, 5),
)
def test_windows_equal_the_slow_obvious_ones(lengths: list[int], window: int, stride: int, channels: int) -> None:
    samples = window_set(lengths, window, stride, channels)
    expected = by_hand(lengths, samples.values, window, stride)
    batch = batch_of(samples)
    assert batch.shape == (len(expected), channels, window)
    assert batch.flags.c_contiguous
    assert batch.dtype == np.float32
    assert batch.tolist() == expected
    shuffled = np.random.default_rng(0).permutation(len(samples))
    assert np.array_equal(batch_of(samples, shuffled), batch[shuffled])


def test_rows_are_samples_without_a_window() -> None:
    samples = window_set([5, 3], None)
    assert np.array_equal(batch_of(samples, np.array([7, 0])), samples.values[[7, 0]])
    assert np.array_equal(samples.codes(np.array([7, 0])), samples.categorical[[7, 0]])


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), most=st.integers(1, 50))
def test_spread_takes_as_many_as_asked_evenly_and_always_the_same(lengths: list[int], most: int) -> None:
    samples = window_set(lengths, 4)
    some = samples.spread(most)
    assert len(some) == min(most, len(samples))
    assert np.array_equal(some.ends, samples.spread(most).ends)
    assert np.all(np.diff(some.ends) > 0)
    # evenly: no stretch without a sample is more than about twice the fair share
    assert np.diff(np.concatenate([[-1], some.ends, [len(samples.values)]])).max() <= 2 * (sum(lengths) / len(some)) + 1
    assert np.array_equal(batch_of(some), batch_of(samples, some.ends))


def test_a_subset_keeps_labels_groups_and_order_together() -> None:
    samples = window_set([6, 4], 3)
    picked = samples.subset(np.array([9, 2]))
    assert picked.groups.tolist() == [1, 0]
    assert picked.order.tolist() == [9.0, 2.0]
    assert picked.labels["rul"].tolist() == samples.labels["rul"][[9, 2]].tolist()


def test_labelled_leaves_out_samples_without_any_label() -> None:
    samples = window_set([4], 2)
    samples.labels["rul"][[0, 3]] = np.nan
    assert samples.labelled().ends.tolist() == [1, 2]


def test_the_last_row_of_every_group_ends_a_window_whatever_the_stride() -> None:
    for stride in (1, 2, 5, 100):
        samples = window_set([7, 1, 12], 3, stride)
        assert {6, 7, 19} <= set(samples.ends.tolist())


def test_test_at_last_scores_each_test_group_once_at_its_end(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet([9, 12, 7, 10, 11, 8]), test_at="last", stride=3)
    site = open_data(folder, folder / "state")
    assert len(site.test) == len(set(site.test.groups.tolist())) == 1
    assert site.test.labels["rul"].tolist() == [0.0]
    assert len(site.train) > 4


def test_a_label_is_that_of_the_last_row_even_when_rows_come_unsorted(tmp_path: Path) -> None:
    frame = fleet([9, 12, 7]).sample(fraction=1.0, shuffle=True, seed=3)
    folder = write_site(tmp_path, frame)
    site = open_data(folder, folder / "state")
    rul = {(unit, cycle): left for unit, cycle, left in frame.select("unit", "cycle", "rul").iter_rows()}
    for part in (site.train, site.validation, site.test):
        expected = [
            rul[part.group_names[group], int(order)] for group, order in zip(part.groups, part.order, strict=True)
        ]
        assert part.labels["rul"].tolist() == expected


@pytest.mark.parametrize("by", ["group", "time"])
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(6, 30), min_size=3, max_size=8), window=st.integers(1, 40), seed=st.integers(0, 5))
def test_no_measurement_is_in_the_windows_of_two_parts(
    tmp_path_factory: pytest.TempPathFactory, by: str, lengths: list[int], window: int, seed: int
) -> None:
    """Train, validation and test, by group and by time: every value is unique, so a shared one would be a leak."""
    lengths = lengths[:1] if by == "time" and seed % 2 else lengths  # one group: its parts lie side by side
    size = sum(lengths)
    frame = fleet(lengths).with_columns(
        c0=pl.Series(np.random.default_rng(seed).permutation(size) * 1.0), c1=pl.int_range(size) * 2.0
    )
    folder = write_site(
        tmp_path_factory.mktemp("site"), frame, channels=["c0"], window=window, split={"by": by, "seed": seed}
    )
    site = open_data(folder, folder / "state")
    parts = {"train": site.train, "validation": site.validation, "test": site.test}
    seen = {name: set(batch_of(part).ravel().tolist()) for name, part in parts.items()}
    assert all(seen.values())
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    assert sum(len(part.values) for part in parts.values()) == size
    moments = {
        name: [(int(g), float(o)) for g, o in zip(part.groups, part.order, strict=True)] for name, part in parts.items()
    }
    assert len({one for all_of in moments.values() for one in all_of}) == size
    if by == "time":  # time goes forward within each group
        for group in range(len(lengths)):
            last = [max((o for g, o in moments[name] if g == group), default=None) for name in ("train", "validation")]
            first = [min((o for g, o in moments[name] if g == group), default=None) for name in ("validation", "test")]
            assert all(a < b for a, b in zip(last, first, strict=True) if a is not None and b is not None)


def test_one_to_two_hundred_channels(tmp_path: Path) -> None:
    for channels in (1, 37, 200):
        names = [f"c{place}" for place in range(channels)]
        folder = write_site(tmp_path / str(channels), fleet(5, channels), channels=names, window=130)
        site = open_data(folder, folder / "state")
        assert batch_of(site.train, np.arange(4)).shape == (4, channels, 130)
        assert site.channels == tuple(names)


def test_three_thousand_groups(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet(3000, rows=5))
    site = open_data(folder, folder / "state")
    sizes = [len(set(part.groups.tolist())) for part in (site.train, site.validation, site.test)]
    assert sum(sizes) == 3000
    assert sizes[1:] == [600, 600]
