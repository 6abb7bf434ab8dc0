"""The hydraulic rig: cycles of one condition stay together, and a split that tears them apart is flagged."""

import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.windows import batch_of
from trunkline.client.check import check_site
from trunkline.client.data import SiteData, open_data
from trunkline.config.site import read_site
from trunkline.errors import ConfigError, DataError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.hydraulic import FLOWS, SECONDS, SLOW, TASKS, read_cycles

SET = ("cooler_pct", "valve_pct", "pump_leak", "accumulator_bar")  # by the experimenter; the flag was measured
CYCLES = 12  # of each cooler state, in runs of three


def write_raw(folder: Path, cycles: int = CYCLES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    total = 3 * cycles
    place = np.arange(total)
    profile = {
        "cycle": place,
        "cooler_pct": np.repeat([3, 20, 100], cycles),
        "valve_pct": np.array([100, 90, 80, 73])[place // 3 % 4],
        "pump_leak": place // 6 % 3,
        "accumulator_bar": np.full(total, 130),
        "stable_flag": place % 2,  # not set by anybody, so it makes no run
    }
    pl.DataFrame(profile).write_csv(folder / "profile.csv")
    sensors = {name: random.normal(5, 1, (total, 600)).astype(np.float32) for name in FLOWS}
    sensors |= {name: random.normal(5, 1, (total, 60)).astype(np.float32) for name in SLOW}
    np.savez(folder / "sensors.npz", **sensors)
    return folder


@pytest.fixture
def rig(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "uci" / "hydraulic")


def test_a_run_is_where_nothing_that_was_set_changes(rig: Path) -> None:
    rows = read_cycles(rig)
    profile = pl.read_csv(rig / "profile.csv")
    runs: list[list[int]] = []
    before = None
    for cycle, *state in profile.select("cycle", *SET).iter_rows():
        if state != before:
            runs.append([])
        runs[-1].append(cycle)
        before = state
    found = rows.group_by("run", maintain_order=True).agg(pl.col("cycle").unique().sort())["cycle"].to_list()
    assert found == runs
    assert rows["second"].to_list() == list(range(3 * CYCLES * SECONDS))


def test_a_signal_is_its_level_and_its_shape_and_flows_are_told_once_a_second(rig: Path) -> None:
    rows = read_cycles(rig)
    with np.load(rig / "sensors.npz") as sensors:
        fast = sensors["FS2"][7].reshape(60, 10).astype(np.float64)
        slow = sensors["TS3"][7]
    cycle = rows.filter(pl.col("cycle") == 7)
    assert np.allclose(cycle["FS2_mean"], fast.mean(axis=1), atol=1e-5)
    assert np.allclose(cycle["FS2_spread"], fast.std(axis=1), atol=1e-5)
    assert np.array_equal(cycle["TS3"], slow)
    assert np.allclose(cycle["TS3_shape"], slow - slow.mean(), atol=1e-5)
    channels = [name for name in rows.columns if name not in ("run", "cycle", "second", *TASKS.values())]
    assert len(channels) == 26


def test_three_plants_are_the_cooler_states_and_one_plant_has_the_cooler_as_a_task(rig: Path, tmp_path: Path) -> None:
    three = write_sites("hydraulic", tmp_path / "three", data=rig.parent)
    assert [site.name for site in three] == ["cooler-003", "cooler-020", "cooler-100"]
    for site, state in zip(three, (3, 20, 100), strict=True):
        assert list(read_site(site).tasks) == ["valve", "pump", "accumulator", "stable"]
        assert pl.read_parquet(site / "cycles.parquet")["cooler_pct"].unique().to_list() == [state]
    (one,) = write_sites("hydraulic", tmp_path / "one", data=rig, plants=1)
    assert list(read_site(one).tasks) == list(TASKS)
    assert {task.metric for task in read_site(one).tasks.values()} == {"accuracy"}


def test_no_label_is_an_input(rig: Path, tmp_path: Path) -> None:
    for site in write_sites("hydraulic", tmp_path / "out", data=rig):
        channels = set(read_site(site).data.channels)
        assert not channels & {"run", "cycle", "second", *TASKS.values()}


def test_five_seeds_are_one_cross_validation(rig: Path, tmp_path: Path) -> None:
    splits = [
        read_site(write_sites("hydraulic", tmp_path / str(seed), data=rig, seed=seed)[0]).data.split
        for seed in range(7)
    ]
    assert [(split.fold, split.seed) for split in splits] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 1), (1, 1)]
    assert {split.folds for split in splits} == {5}


def test_few_labelled_runs_can_be_asked_for(rig: Path, tmp_path: Path) -> None:
    for site in write_sites("hydraulic", tmp_path / "out", data=rig, groups=7):
        assert read_site(site).data.split.labelled_groups == 7


@pytest.mark.parametrize("plants", [0, 2, 4])
def test_other_numbers_of_plants_are_refused(rig: Path, tmp_path: Path, plants: int) -> None:
    with pytest.raises(ConfigError, match="ask for 3, or for 1"):
        write_sites("hydraulic", tmp_path / "out", data=rig, plants=plants)


def test_absent_and_altered_files_are_named(rig: Path, tmp_path: Path) -> None:
    def refusal(data: Path | None) -> str:
        with pytest.raises(DataError) as refused:
            write_sites("hydraulic", tmp_path / "out", data=data)
        return str(refused.value)

    assert "id 447" in refusal(None)
    assert "profile.csv" in refusal(tmp_path)
    with np.load(rig / "sensors.npz") as sensors:
        np.savez(rig / "sensors.npz", **{**sensors, "TS2": sensors["TS2"][:, :59]})
    assert "TS2 has shape (36, 59), expected (36, 60)" in refusal(rig)
    (rig / "sensors.npz").unlink()
    assert "sensors.npz" in refusal(rig)
    pl.read_csv(rig / "profile.csv").drop("valve_pct").write_csv(rig / "profile.csv")
    assert "valve_pct" in refusal(rig)


def runs_of(site: SiteData) -> list[set[int]]:
    return [set(part.groups.tolist()) for part in (site.train, site.validation, site.test)]


@pytest.mark.realdata
def test_the_real_rig_has_194_runs_and_one_sample_a_cycle(real_data: Path, tmp_path: Path) -> None:
    (rig,) = write_sites("hydraulic", tmp_path / "out", data=real_data, plants=1)
    data = open_data(rig, tmp_path / "state")
    parts = (data.train, data.validation, data.test)
    assert sum(map(len, parts)) == 2205
    assert sum(map(len, runs_of(data))) == len(set().union(*runs_of(data))) == 194
    rows = pl.read_parquet(rig / "cycles.parquet", columns=["second", "cycle", *TASKS.values()])
    for part in parts:
        assert (part.order % SECONDS == SECONDS - 1).all()  # a sample is a whole cycle: it ends with its last second
        assert (np.diff(part.ends) >= SECONDS).all()
        for task, column in TASKS.items():
            classes = np.array([int(name) for name in data.tasks[task].classes])  # type: ignore[attr-defined]
            assert np.array_equal(
                classes[part.labels[task].astype(int)], rows[column].to_numpy()[part.order.astype(int)]
            )
    counts = {
        column: dict(rows.filter(pl.col("second") % 60 == 0).group_by(column).len().rows()) for column in TASKS.values()
    }
    assert counts["valve_pct"] == {73: 360, 80: 360, 90: 360, 100: 1125}
    assert counts["stable_flag"] == {0: 1449, 1: 756}


@pytest.mark.realdata
def test_five_folds_of_the_real_rig_test_every_cycle_once_and_train_on_every_class(
    real_data: Path, tmp_path: Path
) -> None:
    tested: list[float] = []
    (rig,) = write_sites("hydraulic", tmp_path / "out", data=real_data, plants=1)
    path = rig / "site.toml"
    text = path.read_text()
    for fold in range(5):
        path.write_text(text.replace("fold = 0", f"fold = {fold}"))
        data = open_data(rig, tmp_path / "state" / str(fold))
        tested += data.test.order.tolist()
        assert 0.1 < len(data.test) / 2205 < 0.3
        assert 0.05 < len(data.validation) / 2205 < 0.3
        for task in TASKS:
            for part in (data.train, data.validation, data.test):
                assert set(part.labels[task].tolist()) == set(range(len(data.tasks[task].classes)))  # type: ignore[attr-defined]
    assert sorted(tested) == list(range(SECONDS - 1, 2205 * SECONDS, SECONDS))


@pytest.mark.realdata
@pytest.mark.parametrize("plants", [1, 3])
def test_a_split_of_the_real_rig_by_cycle_is_flagged_and_the_one_by_run_is_not(
    real_data: Path, tmp_path: Path, plants: int
) -> None:
    for site in write_sites("hydraulic", tmp_path / "out", data=real_data, plants=plants):
        assert not [note for note in check_site(site).notes if note.level == "warning"]
        path = site / "site.toml"
        whole = path.read_text()
        by_cycle = whole.replace('group = "run"', 'group = "cycle"')
        assert by_cycle != whole
        path.write_text(by_cycle)
        (note,) = [note for note in check_site(site).notes if note.level == "warning"]
        assert "rows that belong together are on both sides of the split" in note.what
        assert "`cycle` looks too fine" in note.remedy
        path.write_text(re.sub(r"folds = .*\nfold = .*\n", 'by = "time"\n', by_cycle))
        (note,) = [note for note in check_site(site).notes if note.level == "warning"]
        assert "knows a group again" in note.what


@pytest.mark.realdata
def test_nearest_neighbour_shows_what_the_split_by_cycle_hides(real_data: Path, tmp_path: Path) -> None:
    """The trap in figures: by cycle the valve is told nearly always, by run it is not."""

    def told(site: Path, state: Path) -> float:
        data = open_data(site, state)
        train, test = (batch_of(part, np.arange(len(part))) for part in (data.train, data.test))
        x, z = (part[:, :13].mean(axis=2) for part in (train, test))  # the mean level of each signal
        nearest = np.square(z[:, None] - x[None]).sum(axis=2).argmin(axis=1)
        return float((data.train.labels["valve"][nearest] == data.test.labels["valve"]).mean())

    (rig,) = write_sites("hydraulic", tmp_path / "out", data=real_data, plants=1)
    by_run = told(rig, tmp_path / "run")
    path = rig / "site.toml"
    path.write_text(path.read_text().replace('group = "run"', 'group = "cycle"'))
    assert told(rig, tmp_path / "cycle") > by_run + 0.15
