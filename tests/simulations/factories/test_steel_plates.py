"""Steel plates: two grades, one fault a plate, and nothing in the inputs that names a coil."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from trunkline.client.data import open_data
from trunkline.config.site import read_site
from trunkline.errors import DataError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.steel_plates import CHANNELS, FAULTS, FILE, GRADES, PLACES


def published(rows: int = 210) -> pl.DataFrame:
    """A tiny table with UCI's columns."""
    rng = np.random.default_rng(0)
    fault, grade = np.arange(rows) % len(FAULTS), (np.arange(rows) // len(FAULTS)) % 2
    columns = {name: rng.normal(0.0, 1.0, rows) for name in (*PLACES, *CHANNELS)}
    columns |= {f"TypeOfSteel_{one}": (grade == place).astype(int) for place, one in enumerate(GRADES)}
    return pl.DataFrame(columns | {name: (fault == place).astype(int) for place, name in enumerate(FAULTS)})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "uci" / "steel_plates_faults"
    folder.mkdir(parents=True)
    published().write_csv(folder / FILE)
    return folder


def test_nothing_that_tells_the_coil_is_left_in_the_folder(source: Path, tmp_path: Path) -> None:
    for site in write_sites("steel_plates", tmp_path / "out", data=source.parent):
        config = read_site(site)
        held = set(pl.read_parquet_schema(site / "plates.parquet"))
        assert held == {"plate", "fault", *CHANNELS}  # no X, no Y, no conveyor; nor the grade, which is the plant
        assert not [name for name in held if name.startswith(("X_M", "Y_M", "Length", "TypeOfSteel"))]
        assert config.data.channels == CHANNELS
        assert config.data.order is None


def test_every_plate_is_at_the_plant_of_its_grade_with_its_own_fault(source: Path, tmp_path: Path) -> None:
    raw, faults = published(), list(FAULTS)
    seen = []
    for site, grade in zip(write_sites("steel_plates", tmp_path / "out", data=source), GRADES, strict=True):
        for row in pl.read_parquet(site / "plates.parquet").iter_rows(named=True):
            there = raw.row(int(row["plate"]), named=True)
            assert there[f"TypeOfSteel_{grade}"] == 1
            assert FAULTS[next(name for name in faults if there[name] == 1)] == row["fault"]
            assert all(there[name] == row[name] for name in CHANNELS)
            seen.append(row["plate"])
    assert sorted(seen) == [f"{plate:04d}" for plate in range(len(raw))]


def test_five_seeds_test_every_plate_once(source: Path, tmp_path: Path) -> None:
    tested: list[str] = []
    for seed in range(5):
        for site in write_sites("steel_plates", tmp_path / str(seed), data=source, seed=seed):
            test = open_data(site, tmp_path / "state" / site.name / str(seed)).test
            tested += [test.group_names[code] for code in np.unique(test.groups)]
    assert sorted(tested) == [f"{plate:04d}" for plate in range(len(published()))]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Bumps_Fault": 1}, "line 2: not exactly one fault"),
        ({"TypeOfSteel_A300": 0, "TypeOfSteel_A400": 0}, "line 2: not exactly one grade"),
    ],
)
def test_a_plate_with_two_faults_or_no_grade_is_named_by_its_line(
    source: Path, tmp_path: Path, change: dict[str, int], words: str
) -> None:
    published().with_columns(**{name: pl.lit(value) for name, value in change.items()}).write_csv(source / FILE)
    with pytest.raises(DataError, match=words):
        write_sites("steel_plates", tmp_path / "out", data=source)


def test_another_version_of_the_table_is_refused_by_its_column(source: Path, tmp_path: Path) -> None:
    for table, words in (
        (published().drop("SigmoidOfAreas"), "SigmoidOfAreas"),
        (published().with_columns(x=1), "`x`"),
    ):
        table.write_csv(source / FILE)
        with pytest.raises(DataError, match=words):
            write_sites("steel_plates", tmp_path / "out", data=source)


@pytest.mark.realdata
def test_the_real_plates_have_the_documented_faults(real_data: Path, tmp_path: Path) -> None:
    documented = {"pastry": 158, "z-scratch": 190, "k-scratch": 391, "stains": 72, "dirtiness": 55, "bumps": 402}
    sites = write_sites("steel_plates", tmp_path / "out", data=real_data)
    plates = pl.concat([pl.read_parquet(site / "plates.parquet") for site in sites])
    counts = dict(plates["fault"].value_counts().iter_rows())
    assert counts == documented | {"other": 673}
    assert plates["plate"].n_unique() == len(plates) == 1941
    opened = open_data(sites[0], tmp_path / "state")
    assert len(opened.train) + len(opened.validation) + len(opened.test) == 777
