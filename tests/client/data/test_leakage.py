"""Rows that belong together on both sides are said out loud; sites that are split well hear nothing of it."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.client.data.sites import fleet, write_site
from trunkline.client.check import check_site
from trunkline.client.data import Note, survey
from trunkline.simulations.factories import write_sites

VALVE = {"valve": {"kind": "multiclass", "target": "valve"}}


def rig(runs: int, cycles: int = 10, rows: int = 4, drift: float = 1.0, seed: int = 0) -> pl.DataFrame:
    """A rig that holds one of three valve states for a run of cycles, while its oil warms and cools as it will."""
    random = np.random.default_rng(seed)
    number = runs * cycles
    state = np.repeat(np.arange(runs) % 3, cycles)
    oil = drift * np.cumsum(random.normal(0, 1, number)) + random.normal(0, 0.3, number)
    columns: dict[str, Any] = {
        "unit": np.repeat([f"cycle-{place}" for place in range(number)], rows),
        "run": np.repeat([f"run-{place // cycles}" for place in range(number)], rows),
        "cycle": np.tile(np.arange(rows), number),
        "valve": np.repeat(state, rows),
        "c0": np.repeat(oil, rows) + random.normal(0, 0.1, number * rows),
        "c1": np.repeat(state, rows) + random.normal(0, 1.0, number * rows),
    }
    return pl.DataFrame(columns)


def leaks(folder: Path) -> list[Note]:
    notes = survey(folder).findings.notes
    return [one for one in notes if "belong together" in one.what or "knows a group again" in one.what]


def test_neighbouring_cycles_of_one_condition_on_both_sides_are_said_out_loud(tmp_path: Path) -> None:
    (note,) = leaks(write_site(tmp_path, rig(30), VALVE))
    assert note.level == "warning"
    assert "300 groups follow each other in 30 runs of equal labels (10 groups a run)" in note.what
    assert "`unit` looks too fine" in note.remedy
    assert any("belong together" in one.what for one in check_site(tmp_path).notes)


def test_whole_runs_as_groups_are_fine(tmp_path: Path) -> None:
    assert not leaks(write_site(tmp_path, rig(40), VALVE, group="run", order=None))  # the rows lie in order of time


@pytest.mark.parametrize("order", ["numbers", "clock"])
def test_shuffled_files_do_not_hide_it(tmp_path: Path, order: str) -> None:
    frame = rig(30).with_columns(clock=pl.int_range(pl.len()))
    if order == "clock":  # names that say nothing
        frame = frame.with_columns(unit=pl.col("unit").hash(seed=0).cast(pl.String) + "x")
        frame = frame.with_columns(
            unit=pl.col("unit").str.replace_all(r"\d", "a") + pl.col("unit").rank("dense").cast(pl.String)
        )
    shuffled = frame.sample(fraction=1.0, shuffle=True, seed=1)
    assert leaks(write_site(tmp_path, shuffled, VALVE, order="clock" if order == "clock" else "cycle"))


def test_units_sorted_by_class_are_no_kin(tmp_path: Path) -> None:
    """A file that lists its bearings by fault has long runs of equal labels too, but neighbours are strangers."""
    for seed in range(5):
        frame = rig(3, cycles=60, drift=0.0, seed=seed)
        assert not leaks(write_site(tmp_path / str(seed), frame, VALVE))


def test_a_commonplace_label_alone_makes_no_run(tmp_path: Path) -> None:
    """Ninety-seven of a hundred batches are good: long runs by chance, however the temperature wanders."""
    for seed in range(5):
        frame = rig(30, seed=seed)
        bad = np.random.default_rng(seed).random(300) < 0.03
        frame = frame.with_columns(valve=pl.Series(np.repeat(bad, 4).astype(np.int64)))
        assert not leaks(write_site(tmp_path / str(seed), frame, VALVE))


def test_units_that_run_to_failure_are_no_kin(tmp_path: Path) -> None:
    tasks = {"failing": {"kind": "binary", "target": "failing"}}
    assert not leaks(write_site(tmp_path / "binary", fleet(60), tasks))
    assert not leaks(write_site(tmp_path / "rul", fleet(60)))


def test_the_built_in_plants_are_split_well(plants: list[Path]) -> None:
    for plant in plants:
        assert not leaks(plant), plant.name


def test_a_split_in_time_through_groups_of_one_label_is_said(tmp_path: Path) -> None:
    (note,) = leaks(write_site(tmp_path, rig(30, rows=10), VALVE, split={"by": "time"}))
    assert note.level == "warning"
    assert "300 groups" in note.what


def test_a_split_in_time_through_labels_that_change_is_fine(tmp_path: Path) -> None:
    tasks = {"failing": {"kind": "binary", "target": "failing"}}
    assert not leaks(write_site(tmp_path / "many", fleet(12, rows=30), tasks, split={"by": "time"}))
    assert not leaks(write_site(tmp_path / "one", rig(30), VALVE, group=None, order=None))
    turning = rig(30, rows=10).with_columns(valve=pl.col("valve") + (pl.col("cycle") >= 5))
    assert not leaks(write_site(tmp_path / "turning", turning, VALVE, split={"by": "time"}))


def test_few_labels_do_not_hide_it(tmp_path: Path) -> None:
    assert leaks(write_site(tmp_path, rig(30), VALVE, split={"labelled_groups": 5}))


@pytest.mark.realdata
def test_c_mapss_is_split_well(real_data: Path, tmp_path: Path) -> None:
    for plant in write_sites("cmapss", tmp_path, data=real_data, plants=4, groups=40):
        assert not leaks(plant), plant.name
