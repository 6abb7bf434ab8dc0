"""The running mean of a machine's first rows as inputs: exact, and never of what is still to come."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.client.data.layout import Layout
from trunkline.client.data.preprocess.reference import reference


def layout_of(group: np.ndarray, order: np.ndarray, part: np.ndarray) -> Layout:
    rows = np.lexsort((order, group, part))
    nothing = np.zeros(len(rows), np.int64)
    names = tuple(map(str, range(int(group.max()) + 1)))
    return Layout(rows, part[rows].astype(np.int8), group[rows].astype(np.int32), order[rows], nothing, nothing, names)


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_it_is_the_mean_of_the_groups_first_rows_up_to_now(seed: int, rows: int) -> None:
    draw = np.random.default_rng(seed)
    group = draw.integers(0, 4, 30)
    layout = layout_of(group, draw.permutation(30).astype(float), draw.integers(0, 3, 30))
    scaled = draw.normal(size=(30, 2)).astype(np.float32)
    scaled[draw.random((30, 2)) < 0.2] = np.nan
    got = reference(scaled, layout, rows)
    for row in range(30):
        mine = np.flatnonzero(layout.group == layout.group[row])
        mine = mine[np.argsort(layout.order[mine])][:rows]
        seen = scaled[mine[layout.order[mine] <= layout.order[row]]]
        for channel in range(2):
            heard = seen[:, channel][~np.isnan(seen[:, channel])]
            assert got[row, channel] == pytest.approx(heard.mean() if len(heard) else 0.0, abs=1e-6)


def test_what_comes_later_changes_nothing_before_it() -> None:
    draw = np.random.default_rng(0)
    layout = layout_of(np.zeros(20, int), np.arange(20.0), np.repeat([0, 1], 10))
    scaled = draw.normal(size=(20, 3)).astype(np.float32)
    later = scaled.copy()
    later[7:] += 5.0
    np.testing.assert_array_equal(reference(scaled, layout, 50)[:7], reference(later, layout, 50)[:7])
    assert not np.allclose(reference(scaled, layout, 50)[7:], reference(later, layout, 50)[7:])
