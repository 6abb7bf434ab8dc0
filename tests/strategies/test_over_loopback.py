"""Every strategy through the real apps: a run ends with figures, and a run that was cut and resumed with the same bytes."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.test_resume import PowerCut, cut_at
from tests.loopback import WatchedGrid, arrays_in, events_of, federate, trunk_of
from trunkline.client.state.vault import Vault
from trunkline.flower.records import open_records
from trunkline.server.reporting.report import read_report
from trunkline.server.rounds.checkpoint import Checkpoint
from trunkline.strategies import STRATEGIES

OPTIONS = {
    "clustered": {"count": 2, "warm_rounds": 1, "assign": "validation", "every": 1},
    "fedbabu": {"finish_steps": 5},
    "multikrum": {"f": 0},
    "fedbn": {"norm": "private-group"},
}
NEW = [
    "clustered",
    "conflict_averse",
    "ditto",
    "fedavgm",
    "fedbabu",
    "fedbn",
    "fedyogi",
    "median",
    "multikrum",
    "trimmed_mean",
]


def settings_of(name: str) -> dict[str, object]:
    return {"strategy": {"name": name, **OPTIONS.get(name, {})}, "training": {"steps": 2, "batch_size": 16}}


@pytest.mark.parametrize("name", NEW)
def test_a_run_cut_in_its_third_round_and_resumed_equals_an_undisturbed_one(
    plants: list[Path], tmp_path: Path, name: str
) -> None:
    """All that an algorithm remembers is in the checkpoint (moments, notes) or the vault (personal models)."""
    three = plants[:3]
    federate(three, tmp_path / "whole", **settings_of(name))
    with pytest.raises(PowerCut):
        federate(three, tmp_path / "cut", tamper=cut_at(3, 4), **settings_of(name))
    federate(three, tmp_path / "cut", resume=True, grid=WatchedGrid(three, tmp_path / "cut"), **settings_of(name))
    whole, cut = (Checkpoint(tmp_path / one).load() for one in ("whole", "cut"))
    assert whole is not None
    assert cut is not None
    assert cut[0].trunk.digest() == whole[0].trunk.digest()
    assert {key: one.digest() for key, one in cut[0].moments.items()} == {
        key: one.digest() for key, one in whole[0].moments.items()
    }
    assert cut[0].notes == whole[0].notes
    reports = [read_report(tmp_path / one) for one in ("whole", "cut")]
    assert reports[0]["sites"] == reports[1]["sites"]
    assert all(row["federated"] is not None for row in reports[0]["sites"])


def test_every_new_strategy_is_tried_here() -> None:
    assert set(NEW) == set(STRATEGIES) - {"central", "fedadam", "fedavg", "fedper", "fedprox", "fedrep", "local"}


def test_cohorts_get_trunks_of_their_own_and_the_report_says_who_is_where(plants: list[Path], tmp_path: Path) -> None:
    grid = federate(plants, tmp_path, **settings_of("clustered"))
    cohorts = read_report(tmp_path)["cohorts"]
    assert sorted(cohorts) == sorted(folder.name for folder in plants)
    assert set(cohorts.values()) == {0, 1}
    last = {
        node: np.concatenate([array.ravel() for array in arrays_in(content).values()]).tobytes()
        for kind, node, content in grid.down
        if kind == "train" and json.loads(open_records(content)[1])["round"] == 3
    }
    by_cohort = [{last[node] for node in last if cohorts[plants[node - 2].name] == number} for number in (0, 1)]
    assert [len(trunks) for trunks in by_cohort] == [1, 1]
    assert by_cohort[0] != by_cohort[1]
    assert any("Cohorts: 0: " in event.get("text", "") for event in events_of(tmp_path) if event["event"] == "note")


def test_dittos_personal_trunk_stays_home_and_follows_the_shared_one(plants: list[Path], tmp_path: Path) -> None:
    """The shared trunk is that of FedPer, to the bit: the personal one takes from it and gives nothing.

    A strong pull holds the personal trunk to what arrived last, and not to where it started itself.
    """
    rounds, two = 3, plants[:2]
    training = {"steps": 6, "batch_size": 16, "keep": "last", "schedule": "constant"}
    federate(two, tmp_path / "fedper", strategy={"name": "fedper"}, training=training, rounds=rounds)

    def distances(pull: float) -> tuple[float, float]:
        """Of the first plant's personal trunk from what arrived in the last round, and from where all began."""
        out = tmp_path / f"pull-{pull:g}"
        grid = federate(two, out, strategy={"name": "ditto", "pull": pull}, training=training, rounds=rounds)
        assert trunk_of(out).digest() == trunk_of(tmp_path / "fedper").digest()
        came = [arrays_in(content) for kind, node, content in grid.down if kind == "train" and node == 2]
        state = out / "state" / plants[0].name
        entry = Vault(state, next((state / "vault").iterdir()).name).before(rounds + 1)
        assert entry is not None
        first, last = (
            sum(float(np.square(entry.personal[name] - trunk[name]).sum()) for name in trunk)
            for trunk in (came[0], came[-1])
        )
        return last, first

    held, free = distances(1000.0), distances(1e-6)
    assert held[0] < 0.5 * held[1]
    assert held[0] < 0.5 * free[0]


def test_fedbabu_leaves_heads_at_their_common_start_until_the_end(plants: list[Path], tmp_path: Path) -> None:
    federate(plants, tmp_path, **settings_of("fedbabu"))
    for folder in plants:
        shelf = tmp_path / "state" / folder.name / "vault"
        run = next(shelf.iterdir()).name
        first, last = (Vault(shelf.parent, run).before(round) for round in (2, 4))
        assert first is not None
        assert last is not None
        heads = [name for name in last.private if name.startswith("head.")]
        assert heads
        assert all(first.private[name].tobytes() == last.private[name].tobytes() for name in heads)
        assert any(first.private[name].tobytes() != last.private[name].tobytes() for name in last.private)


@pytest.mark.parametrize("norm", ["private", "private-group"])
def test_under_fedbn_no_norm_crosses_the_wire(plants: list[Path], tmp_path: Path, norm: str) -> None:
    grid = federate(plants, tmp_path, strategy={"name": "fedbn", "norm": norm}, rounds=1)
    crossed = {name for _, _, content in (*grid.up, *grid.down) for name in arrays_in(content)}
    assert crossed
    assert not [name for name in crossed if "norm" in name]


def test_a_lent_head_is_averaged_over_the_sites_that_have_that_task(plants: list[Path], tmp_path: Path) -> None:
    """Plants of different tasks lend their heads: every array of the new trunk moved by the mean of those who sent it."""
    grid = federate(plants, tmp_path, lend=["trunk", "heads"], strategy={"name": "fedper"}, rounds=1)
    start = {}
    for kind, _, content in grid.down:
        if kind == "train":
            start |= arrays_in(content)
    sent = [
        (arrays_in(content), json.loads(open_records(content)[1])["weight"])
        for kind, _, content in grid.up
        if kind == "train"
    ]
    holders = {name: [(arrays[name], weight) for arrays, weight in sent if name in arrays] for name in start}
    heads = {name for name in start if name.startswith("head.")}
    assert heads
    assert any(len(holders[name]) < len(plants) for name in heads)
    after = trunk_of(tmp_path)
    for name, told in holders.items():
        mean = np.average([array for array, _ in told], axis=0, weights=[weight for _, weight in told])
        np.testing.assert_allclose(after[name], start[name] + mean, rtol=1e-5, atol=1e-7)
