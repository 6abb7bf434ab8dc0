"""Flowmeters: four meters that share little, and folds that test every row once."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from trunkline.client.data import SiteData, open_data
from trunkline.config.site import read_site
from trunkline.errors import ConfigError, DataError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.flowmeters import CONDITIONS, METERS

ROWS = {"A": 30, "B": 36, "C": 48, "D": 44}


def published(meter: str) -> np.ndarray:
    """A tiny meter as UCI prints it: numbers, then the condition."""
    numbers, conditions = METERS[meter]
    rng = np.random.default_rng(ord(meter))
    condition = np.sort(np.arange(ROWS[meter]) % conditions + 1)  # the files are sorted by condition
    return np.column_stack([rng.normal(condition[:, None], 1.0, (len(condition), numbers)), condition])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "uci" / "flowmeters"
    folder.mkdir(parents=True)
    for meter in METERS:
        np.savetxt(folder / f"Meter{meter}.txt", published(meter), delimiter="\t", fmt="%.14f")
    return folder


def groups(site: SiteData) -> dict[str, set[str]]:
    parts = {"train": site.train, "validation": site.validation, "test": site.test}
    return {name: {part.group_names[code] for code in np.unique(part.groups)} for name, part in parts.items()}


def test_every_row_arrives_as_published(source: Path, tmp_path: Path) -> None:
    for site, meter in zip(write_sites("flowmeters", tmp_path / "out", data=source.parent), METERS, strict=True):
        rows, raw = pl.read_parquet(site / "rows.parquet"), published(meter)
        assert site.name == f"meter-{meter.lower()}"
        assert np.allclose(rows.drop("sample", "condition").to_numpy(), raw[:, :-1])
        assert rows["condition"].to_list() == [CONDITIONS[int(code) - 1] for code in raw[:, -1]]
        assert rows["sample"].n_unique() == len(raw)
        config = read_site(site)
        assert config.tasks["condition"].classes == CONDITIONS[: METERS[meter][1]]
        assert len(config.data.channels) == METERS[meter][0]


def test_seeds_0_to_4_test_every_row_once_and_never_train_on_it(source: Path, tmp_path: Path) -> None:
    tested: dict[str, list[str]] = {meter: [] for meter in METERS}
    for seed in range(5):
        sites = write_sites("flowmeters", tmp_path / str(seed), data=source, seed=seed)
        for site, meter in zip(sites, METERS, strict=True):
            part = groups(open_data(site, tmp_path / "state" / site.name / str(seed)))
            assert not part["test"] & (part["train"] | part["validation"])
            tested[meter] += sorted(part["test"])
    for meter, rows in ROWS.items():
        assert sorted(tested[meter]) == [f"{row:03d}" for row in range(rows)]


def test_each_meter_is_scaled_by_its_own_training_rows(source: Path, tmp_path: Path) -> None:
    for site in write_sites("flowmeters", tmp_path / "out", data=source):
        opened = open_data(site, tmp_path / "state" / site.name)
        assert np.allclose(opened.train.values.mean(axis=0), 0.0, atol=1e-5)
        assert np.allclose(opened.train.values.std(axis=0), 1.0, atol=1e-5)


def test_what_is_not_the_published_set_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    def refusal(**wish: int) -> str:
        with pytest.raises((ConfigError, DataError)) as refused:
            write_sites("flowmeters", tmp_path / "out", data=source, **wish)
        return str(refused.value)

    assert "comes from 4 plants" in refusal(plants=8)
    assert "labelled_groups" in refusal(groups=3)
    raw = published("C")
    np.savetxt(source / "MeterC.txt", raw[:, 1:])
    assert "MeterC.txt: 43 columns, expected 43 and the condition" in refusal()
    raw[-1, -1] = 5
    np.savetxt(source / "MeterC.txt", raw)
    assert "condition 5 in the last column" in refusal()
    (source / "MeterC.txt").write_text("a b c\n")
    assert "MeterC.txt: not a table of numbers" in refusal()
    (source / "MeterC.txt").unlink()
    assert "MeterC.txt: no such file" in refusal()
    assert not (tmp_path / "out").exists()


@pytest.mark.realdata
def test_the_real_meters_have_the_documented_conditions(real_data: Path, tmp_path: Path) -> None:
    documented = {"A": [35, 52], "B": [19, 24, 49], "C": [54, 23, 54, 50], "D": [51, 23, 55, 51]}
    for site, meter in zip(write_sites("flowmeters", tmp_path / "out", data=real_data), METERS, strict=True):
        counts = pl.read_parquet(site / "rows.parquet")["condition"].value_counts()
        found = dict(zip(counts["condition"], counts["count"], strict=True))
        assert [found[name] for name in CONDITIONS if name in found] == documented[meter]
        opened = open_data(site, tmp_path / "state" / site.name)
        for part in (opened.train, opened.validation, opened.test):  # the folds deal every condition to every part
            assert len(np.unique(part.labels["condition"])) == len(documented[meter])
