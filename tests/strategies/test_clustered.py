import weakref

import numpy as np
import pytest

from tests import laws
from trunkline.errors import ConfigError
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.protocol.plan import LocalPlan
from trunkline.strategies import build_strategy
from trunkline.strategies.clustered import cluster_sketches, sketch
from trunkline.strategies.strategy import StrategyState

TRUNK = Arrays({"trunk.a": np.zeros((40, 30), np.float32), "trunk.b": np.zeros(500, np.float32)})
WAYS = 3


def pulls(round: int, sites: list[str], way_of: dict[str, int]) -> list[Update]:
    """All sites share a strong common change; each also has its cohort's and some of its own."""
    updates = []
    for site in sites:
        own = np.random.default_rng([round, *site.encode()])
        delta = {}
        for name, array in TRUNK.items():
            common = 3.0 * np.random.default_rng([7, len(name)]).normal(size=array.shape)
            way = np.random.default_rng([way_of[site], len(name), 11]).normal(size=array.shape)
            delta[name] = (common + way + own.normal(size=array.shape)).astype(np.float32)
        updates.append(laws.update(site, delta, float(own.integers(1, 100))))
    return updates


@pytest.fixture
def way_of() -> dict[str, int]:
    return {f"plant-{number:02d}": number % WAYS for number in range(12)}


def test_sites_that_learn_alike_share_a_trunk_though_most_of_every_update_is_common(way_of: dict[str, int]) -> None:
    strategy = build_strategy("clustered", {"count": WAYS, "warm_rounds": 2}, LocalPlan())
    state = strategy.start(TRUNK)
    for round in (1, 2):
        assert "cohorts" not in state.notes
        state = laws.step(strategy, state, pulls(round, sorted(way_of), way_of))
    found = state.notes["cohorts"]
    assert {frozenset(site for site in found if found[site] == number) for number in range(WAYS)} == {
        frozenset(site for site in way_of if way_of[site] == number) for number in range(WAYS)
    }
    assert {strategy.serve(state, site).digest() for site in way_of} == {state.trunk.digest()}
    state = laws.step(strategy, state, pulls(3, sorted(way_of), way_of))
    assert len({strategy.serve(state, site).digest() for site in way_of}) == WAYS


def test_a_cohorts_trunk_is_the_weighted_mean_of_its_own_sites(way_of: dict[str, int]) -> None:
    strategy = build_strategy("clustered", {"count": WAYS, "warm_rounds": 1}, LocalPlan())
    state = laws.step(strategy, strategy.start(TRUNK), pulls(1, sorted(way_of), way_of))
    before, updates = state.trunk, pulls(2, sorted(way_of), way_of)
    state = laws.step(strategy, state, updates)
    own = [one for one in updates if way_of[one.site] == way_of["plant-04"]]
    for name in TRUNK:
        mean = np.average([one.delta[name] for one in own], axis=0, weights=[one.weight for one in own])
        np.testing.assert_allclose(strategy.serve(state, "plant-04")[name], before[name] + mean, atol=1e-5)


def test_a_late_site_starts_from_the_common_trunk_and_goes_where_its_update_points(way_of: dict[str, int]) -> None:
    strategy = build_strategy("clustered", {"count": WAYS, "warm_rounds": 2}, LocalPlan())
    late = "plant-04"
    early = [site for site in sorted(way_of) if site != late]
    state = strategy.start(TRUNK)
    for round in (1, 2):
        state = laws.step(strategy, state, pulls(round, early, way_of))
    common = state.trunk.digest()
    state = laws.step(strategy, state, pulls(3, early, way_of))
    assert strategy.serve(state, late).digest() == common
    without = laws.step(strategy, state, pulls(4, early, way_of))
    state = laws.step(strategy, state, pulls(4, sorted(way_of), way_of))
    fellow = next(site for site in early if way_of[site] == way_of[late])
    assert state.notes["cohorts"][late] == state.notes["cohorts"][fellow]
    assert (
        strategy.serve(state, fellow).digest() == strategy.serve(without, fellow).digest()
    )  # its first is not averaged
    assert strategy.serve(state, late).digest() == strategy.serve(state, fellow).digest()


def test_sites_are_asked_every_so_many_rounds_after_the_split(way_of: dict[str, int]) -> None:
    options = {"count": WAYS, "warm_rounds": 2}
    asked = {}
    for every in (None, 1, 3):
        more = {"assign": "validation", "every": every} if every else {}
        strategy = build_strategy("clustered", {**options, **more}, LocalPlan())
        state, asked[every] = strategy.start(TRUNK), []
        for round in range(1, 9):
            state = laws.step(strategy, state, pulls(round, sorted(way_of), way_of))
            if queries := strategy.fit_queries(state):
                asked[every].append(round)
                assert {name: arrays.digest() for name, arrays in queries.items()} == {
                    f"cohort-{number}": state.moments[f"cohort-{number}"].digest() for number in range(WAYS)
                }
    assert asked == {None: [], 1: [3, 4, 5, 6, 7, 8], 3: [5, 8]}


def test_a_site_moves_to_the_lowest_loss_and_stays_on_a_tie_or_without_a_vote(way_of: dict[str, int]) -> None:
    strategy = build_strategy("clustered", {"count": WAYS, "warm_rounds": 1, "assign": "validation"}, LocalPlan())
    state = laws.step(strategy, strategy.start(TRUNK), pulls(1, sorted(way_of), way_of))
    was = state.notes["cohorts"]
    mover, tied, torn = (next(site for site in sorted(was) if was[site] == number) for number in (0, 1, 2))
    fits = {
        mover: {"cohort-0": 3.0, "cohort-1": 2.0, "cohort-2": 1.0},
        tied: {"cohort-0": 1.0, "cohort-1": 1.0, "cohort-2": 2.0},
        torn: {"cohort-0": 1.0, "cohort-1": 1.0, "cohort-2": 2.0},  # to the first of two that are alike
        "came later": {"cohort-0": 1.0, "cohort-1": 2.0, "cohort-2": 3.0},
    }
    after = strategy.reassign(state, fits)
    assert after.notes["cohorts"] == {**was, mover: 2, torn: 0}
    assert (after.trunk, after.moments, after.round) == (state.trunk, state.moments, state.round)
    assert strategy.reassign(state, {}).notes == state.notes


def test_a_cohort_that_all_have_left_keeps_its_trunk_and_is_asked_for_again(way_of: dict[str, int]) -> None:
    strategy = build_strategy(
        "clustered", {"count": 2, "warm_rounds": 1, "assign": "validation", "every": 1}, LocalPlan()
    )
    state = strategy.start(TRUNK)
    for round in (1, 2):
        state = laws.step(strategy, state, pulls(round, sorted(way_of), way_of))
    left = state.moments["cohort-0"].digest()
    state = strategy.reassign(state, {site: {"cohort-0": 2.0, "cohort-1": 1.0} for site in way_of})
    assert set(state.notes["cohorts"].values()) == {1}
    state = laws.step(strategy, state, pulls(3, sorted(way_of), way_of))
    assert strategy.fit_queries(state)["cohort-0"].digest() == left
    assert state.trunk.digest() == state.moments["cohort-1"].digest()


def test_every_without_validation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"every = 3 for 'clustered'.*only `assign = 'validation'`"):
        build_strategy("clustered", {"every": 3}, LocalPlan())


def test_clusters_are_numbered_by_first_appearance_and_takes_any_rows() -> None:
    rows = np.array([[9.0, 1], [9, -1], [9, -1.1], [9, 0.9]])
    assert cluster_sketches(rows, 2).tolist() == [0, 1, 1, 0]
    assert cluster_sketches(rows, 1).tolist() == [0, 0, 0, 0]
    assert cluster_sketches(rows[:2], 3).tolist() == [0, 1]
    assert cluster_sketches(np.zeros((5, 4)), 2).tolist() == sorted(cluster_sketches(np.zeros((5, 4)), 2).tolist())


def test_a_sketch_keeps_cosines() -> None:
    rng = np.random.default_rng(0)
    for wanted in (-0.8, 0.0, 0.5):
        one = rng.normal(size=50_000)
        other = wanted * one + np.sqrt(1 - wanted**2) * rng.normal(size=one.shape)
        first, second = (sketch(Arrays({"w": array.astype(np.float32)})) for array in (one, other))
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        assert cosine == pytest.approx(wanted, abs=0.12)


def test_memory_grows_with_cohorts_and_not_with_sites(way_of: dict[str, int]) -> None:
    strategy = build_strategy("clustered", {"count": 2, "warm_rounds": 1}, LocalPlan())
    alive: list[weakref.ref[object]] = []

    def stream():
        for one in pulls(1, sorted(way_of), way_of):
            fresh = laws.update(one.site, dict(one.delta), one.weight)
            alive.append(weakref.ref(fresh))
            del one
            yield fresh
            del fresh
            assert sum(ref() is not None for ref in alive) <= 1

    state: StrategyState = strategy.start(TRUNK)
    for _ in range(3):
        state, _mean = strategy.advance(state, stream())
    assert sum(arrays.nbytes for arrays in state.moments.values()) < 3 * TRUNK.nbytes + 12 * 8192 + 1


def test_a_second_pass_keeps_the_cohorts_and_nothing_they_learnt(way_of: dict[str, int]) -> None:
    options = {"count": WAYS, "warm_rounds": 1, "assign": "validation", "every": 1}
    strategy = build_strategy("clustered", options, LocalPlan())
    state = strategy.start(TRUNK)
    for round in (1, 2):
        state = laws.step(strategy, state, pulls(round, sorted(way_of), way_of))
    assert strategy.fit_queries(state)
    again = strategy.restart(state, TRUNK)
    assert (again.round, again.notes["cohorts"]) == (state.round, state.notes["cohorts"])
    assert {strategy.serve(again, site).digest() for site in way_of} == {TRUNK.digest()}
    again = laws.step(strategy, again, pulls(3, sorted(way_of), way_of))
    assert len({strategy.serve(again, site).digest() for site in way_of}) == WAYS
    assert not strategy.fit_queries(again)  # by rows that now train, everything would fit
