"""A site's statistics beside the federation's: matched by regime, and pulled to them where there is little data."""

import numpy as np
import pytest

from trunkline.client.data.preprocess.regimes import Regimes
from trunkline.client.data.preprocess.shrinkage import BLOCK, WORTH, PooledPrior, groups_seen, match_pooled
from trunkline.release import PooledScale

# two regimes, at load 10 and 50; the channel `still` never moves
POOLED = PooledScale(
    settings=("load",), widths=(40.0,), centres=((10.0,), (50.0,)), channels=("speed", "still"),
    count=((900.0, 900.0), (100.0, 0.0)), mean=((5.0, 1.0), (20.0, 0.0)), variance=((4.0, 0.0), (9.0, 0.0)),
)  # fmt: skip


def regimes_at(*loads: float) -> Regimes:
    """Regimes of one setting with these centres, as training rows with these loads give them."""
    rows = np.repeat(np.array(loads), 100)[:, None]
    return Regimes.find(("load",), rows)


def test_rows_of_one_group_count_as_one_group_until_they_are_many() -> None:
    group = np.repeat([0, 1, 2], [10, 3, 4 * BLOCK])
    regime = np.repeat([0, 1, 1], [10, 3, 4 * BLOCK])
    np.testing.assert_array_equal(groups_seen(group, regime, 3), [1.0, 1.0 + 4.0, 0.0])


def test_regimes_are_matched_by_centre_and_one_without_a_match_keeps_its_own() -> None:
    prior = match_pooled([POOLED], regimes_at(50.5, 10.2), np.ones(2))
    assert prior is not None
    assert prior.nearest.tolist() == [0, 1]  # in the site's ascending order of load
    alone = match_pooled([POOLED], regimes_at(10.0, 30.0, 50.0), np.ones(3))
    assert alone is not None
    assert alone.nearest.tolist() == [0, -1, 1]
    mean, std = alone.shrink("speed", np.full(3, 5), np.full(3, 6.0), np.ones(3))
    assert (mean[1], std[1]) == (6.0, 1.0)
    assert mean[0] != 6.0


def test_sites_with_other_settings_have_nothing_to_match() -> None:
    assert match_pooled([POOLED], Regimes.find((), np.zeros((5, 0))), np.ones(1)) is None
    assert match_pooled([], regimes_at(10.0, 50.0), np.ones(2)) is None


@pytest.mark.parametrize("groups", [1.0, 9.0])
def test_the_federation_counts_as_one_more_group(groups: float) -> None:
    prior = PooledPrior(POOLED, np.array([0]), np.array([groups]))
    mean, std = prior.shrink("speed", np.array([50]), np.array([6.0]), np.array([1.0]))
    share = groups / (groups + WORTH)
    assert mean[0] == pytest.approx(share * 6.0 + (1.0 - share) * 5.0)
    # the variance of the two together, around their common mean
    expected = share * (1.0 + (6.0 - mean[0]) ** 2) + (1.0 - share) * (4.0 + (5.0 - mean[0]) ** 2)
    assert std[0] ** 2 == pytest.approx(expected)


def test_a_regime_without_a_value_takes_the_federations_figures() -> None:
    prior = PooledPrior(POOLED, np.array([0]), np.array([3.0]))
    mean, std = prior.shrink("speed", np.array([0]), np.array([1000.0]), np.array([0.0]))
    assert (mean[0], std[0]) == (5.0, 2.0)


def test_another_unit_under_the_same_name_keeps_its_own() -> None:
    prior = PooledPrior(POOLED, np.array([0]), np.array([3.0]))
    mean, std = prior.shrink("speed", np.array([50]), np.array([5000.0]), np.array([2000.0]))
    assert (mean[0], std[0]) == (5000.0, 2000.0)


def test_a_channel_that_no_other_site_has_keeps_its_own() -> None:
    prior = PooledPrior(POOLED, np.array([0]), np.array([1.0]))
    mean, std = np.array([3.0]), np.array([0.5])
    assert prior.shrink("torque", np.array([50]), mean, std) == (mean, std)
    assert prior.knows("speed") and not prior.knows("torque")
    assert not prior.knows("still")  # it moves at no site
    assert not PooledPrior(POOLED, np.array([-1]), np.array([1.0])).knows("speed")
