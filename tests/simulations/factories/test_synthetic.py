"""The built-in plants: alike in physics, different in everything a plant can see, and worth learning."""

import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.windows import batch_of
from trunkline.client.data import SiteData, WindowSet, open_data
from trunkline.config.site import read_site
from trunkline.errors import ConfigError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.synthetic import CAP, HORIZON, STEPS, wear_out

Matrix = NDArray[np.float64]


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four plants of `make demo`."""
    return {site.name: site for site in write_sites("synthetic", tmp_path_factory.mktemp("built-in"))}


@pytest.fixture(scope="module")
def opened(built_in: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, SiteData]:
    return {name: open_data(site, tmp_path_factory.mktemp(name)) for name, site in built_in.items()}


def groups(part: WindowSet) -> set[str]:
    return {part.group_names[code] for code in np.unique(part.groups)}


def features(part: WindowSet) -> Matrix:
    """(n, 4 * channels + 1): last value, mean, spread and slope of every channel over the window, and a constant."""
    windows = np.nan_to_num(batch_of(part, np.arange(len(part)))).astype(np.float64)  # (n, channels, window)
    clock = np.linspace(-1, 1, windows.shape[2])
    columns = [windows[:, :, -1], windows.mean(axis=2), windows.std(axis=2), windows @ clock]
    return np.hstack([*columns, np.ones((len(part), 1))])


def ridge(part: WindowSet, label: Matrix, penalty: float = 30.0) -> Matrix:
    known = ~np.isnan(label)
    x = features(part)[known]
    return np.asarray(np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ label[known]))


def test_every_unit_wears_without_healing_and_fails_in_time() -> None:
    world = wear_out(2000, 3, np.random.default_rng(0))
    wear, alive = world["wear"], world["alive"] > 0
    assert (np.diff(wear, axis=1) >= 0).all()
    assert (alive == (wear < 1.0)).all()
    life = alive.sum(axis=1)
    assert life.min() >= 10
    assert life.max() < STEPS  # so the last row of each unit is its failure, not the end of the simulation
    assert {0.0, 1.0, 2.0} == set(np.unique(world["regime"]))


def test_harder_driven_units_fail_sooner() -> None:
    world = wear_out(2000, 1, np.random.default_rng(1))
    alive = world["alive"] > 0
    load = np.nanmean(np.where(alive, world["load"], np.nan), axis=1)
    assert np.corrcoef(load, alive.sum(axis=1))[0, 1] < -0.5


def test_the_plants_differ_in_sensors_tasks_and_file_formats(built_in: dict[str, Path]) -> None:
    sites = {name: read_site(folder) for name, folder in built_in.items()}
    assert list(sites) == ["press-01", "kiln-02", "pump-03", "mill-04"]
    assert [len(site.data.channels) for site in sites.values()] == [4, 6, 9, 12]
    assert [list(site.tasks) for site in sites.values()] == [
        ["rul"],
        ["rul", "failing", "stage"],
        ["efficiency", "leak"],
        ["rul", "failing"],
    ]
    suffixes = {path.suffix for folder in built_in.values() for path in folder.rglob("history*/*")} | {
        path.suffix for folder in built_in.values() for path in folder.glob("history.*")
    }
    assert suffixes == {".csv", ".parquet", ".h5", ".npz"}
    assert {len(site.data.regime) for site in sites.values()} == {0, 1}
    assert sites["kiln-02"].tasks["stage"].ordinal


def test_no_plant_is_heavier_than_a_demo_can_bear(opened: dict[str, SiteData]) -> None:
    for data in opened.values():
        assert sum(len(part) for part in (data.train, data.validation, data.test)) < 18_000


def test_every_plant_opens_as_a_site_and_no_unit_is_on_two_sides(opened: dict[str, SiteData]) -> None:
    for name, data in opened.items():
        parts = [groups(part) for part in (data.train, data.validation, data.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)), name
        assert all(parts), name
        assert not [note for note in data.notes if "duplicate" in note.what], name
        for task in data.tasks:
            for part in (data.train, data.validation, data.test):
                assert np.isfinite(part.labels[task]).any(), (name, task)


def test_the_mill_has_sixty_labelled_units_and_is_the_small_one(opened: dict[str, SiteData]) -> None:
    learn = {name: len(groups(data.train) | groups(data.validation)) for name, data in opened.items()}
    assert learn.pop("mill-04") == 60
    assert opened["mill-04"].config.data.test_files  # its own acceptance run, so that all sixty are there to learn from
    assert min(learn.values()) >= 2.5 * 60
    assert all(len(groups(data.test)) >= 75 for data in opened.values())  # enough for a tight interval


def test_regimes_and_silent_sensors_are_where_the_module_says(opened: dict[str, SiteData]) -> None:
    assert {name: len(data.scaler.regimes) for name, data in opened.items()} == {
        "press-01": 1,
        "kiln-02": 3,
        "pump-03": 1,
        "mill-04": 3,
    }


def test_remaining_life_falls_by_one_interval_a_row_and_failing_agrees_with_it(opened: dict[str, SiteData]) -> None:
    hours = {"press-01": 2.0, "kiln-02": 8.0, "mill-04": 1.0}
    for name, step in hours.items():
        part = opened[name].test
        rul, same = part.labels["rul"], np.diff(part.groups) == 0
        assert (np.diff(rul)[same] == -step).all()
        assert (rul[np.append(~same, True)] == step).all()  # the last row is one interval before failure
        assert opened[name].config.tasks["rul"].cap == CAP * step
        if "failing" in part.labels:
            assert (part.labels["failing"] == (rul <= HORIZON * step)).all()


def test_only_inspected_rows_of_the_pump_know_of_a_leak(opened: dict[str, SiteData]) -> None:
    known = np.isfinite(opened["pump-03"].train.labels["leak"])
    assert 0.25 < known.mean() < 0.4
    assert np.isfinite(opened["pump-03"].train.labels["efficiency"]).all()


@pytest.mark.parametrize("site", ["press-01", "kiln-02", "pump-03", "mill-04"])
def test_simple_window_features_predict_clearly_better_than_the_mean(opened: dict[str, SiteData], site: str) -> None:
    data = opened[site]
    target = "efficiency" if site == "pump-03" else "rul"
    cap = data.config.tasks[target].cap or np.inf
    train, test = (np.minimum(part.labels[target].astype(np.float64), cap) for part in (data.train, data.test))
    error = test - features(data.test) @ ridge(data.train, train)
    plain = test - train.mean()
    assert np.sqrt((error**2).mean()) < 0.88 * np.sqrt((plain**2).mean())


def test_the_pattern_over_time_says_what_the_last_row_does_not(opened: dict[str, SiteData]) -> None:
    data = opened["press-01"]
    cap = data.config.tasks["rul"].cap or np.inf
    train, test = (np.minimum(part.labels["rul"].astype(np.float64), cap) for part in (data.train, data.test))
    channels = len(data.channels)
    x, z = features(data.train), features(data.test)
    last = [*range(channels), x.shape[1] - 1]
    weights = np.linalg.lstsq(x[:, last], train, rcond=None)[0]
    of_row = np.sqrt(((test - z[:, last] @ weights) ** 2).mean())
    of_window = np.sqrt(((test - z @ ridge(data.train, train)) ** 2).mean())
    assert of_window < 0.97 * of_row


def test_equal_arguments_give_equal_bytes_and_another_seed_gives_others(tmp_path: Path) -> None:
    def sums(out: str, **wish: int) -> list[bytes]:
        return [(site / "SHA256SUMS").read_bytes() for site in write_sites("synthetic", tmp_path / out, **wish)]

    assert sums("one", plants=5, groups=4) == sums("two", plants=5, groups=4)
    assert not set(sums("three", plants=5, groups=4)) & set(sums("four", plants=5, groups=4, seed=1))


def test_a_plant_is_the_same_whoever_else_was_asked_for(tmp_path: Path) -> None:
    few = write_sites("synthetic", tmp_path / "few", plants=2, groups=4)
    many = write_sites("synthetic", tmp_path / "many", plants=9, groups=4)
    for left, right in zip(few, many[:2], strict=True):
        assert (left / "SHA256SUMS").read_bytes() == (right / "SHA256SUMS").read_bytes()


def test_groups_caps_what_each_plant_may_learn_from(tmp_path: Path) -> None:
    for site in write_sites("synthetic", tmp_path / "out", plants=8, groups=10):
        data = open_data(site, tmp_path / "state" / site.name)
        assert len(groups(data.train) | groups(data.validation)) == 10
        assert len(groups(data.test)) >= 75


def test_sixty_plants_take_little_work_and_no_two_see_alike(tmp_path: Path) -> None:
    start = time.process_time()
    sites = write_sites("synthetic", tmp_path / "out", plants=60, groups=4)
    assert time.process_time() - start < 10  # 0.02 s each on an idle core
    assert [site.name for site in sites[3:9]] == ["mill-04", "press-05", "kiln-06", "pump-07", "mill-08", "press-09"]
    seen = [read_site(site).data.channels for site in sites]
    assert len({*seen}) >= 59
    assert {len(channels) for channels in seen} == {4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}


@pytest.mark.parametrize("wish", [{"plants": 0}, {"plants": -1}, {"groups": 1}])
def test_what_cannot_be_made_is_refused(tmp_path: Path, wish: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(wish))} "):
        write_sites("synthetic", tmp_path / "out", **wish)
    assert not (tmp_path / "out").exists()
