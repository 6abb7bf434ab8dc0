"""The Tennessee Eastman process: three sites that share no fault, trained and tested on different runs."""

from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.windows import batch_of
from trunkline.client.data import open_data
from trunkline.config.site import read_site
from trunkline.errors import ConfigError, DataError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.tep import FILE, ONSET, READINGS


def write_raw(folder: Path, label_from: int = ONSET) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    frames = []
    for fault in range(22):
        for part, length in (("train", 80), ("test", 200)):
            t = np.arange(length)
            on = fault * ((t >= label_from) | (part == "train"))
            columns = {
                "file": [f"d{fault:02d}" + "_te" * (part == "test")] * length,
                "fault": fault,
                "t": t,
                "split": part,
            }
            readings = {name: random.normal(0, 1, length).astype(np.float32) for name in READINGS}
            frames.append(pl.DataFrame({**columns, "label": on, **readings}))
    pl.concat(frames).write_parquet(folder / FILE)
    return folder


@pytest.fixture
def process(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "uiuc" / "tep")


def faults(site: Path) -> set[str]:
    return set(pl.read_parquet(site / "train.parquet")["state"]) - {"normal"}


def test_sites_share_no_fault_and_together_have_all(process: Path, tmp_path: Path) -> None:
    sites = write_sites("tep", tmp_path / "out", data=process.parent)
    assert [site.name for site in sites] == ["faults-01-07", "faults-08-14", "faults-15-21"]
    for left, right in combinations(sites, 2):
        assert not faults(left) & faults(right)
    assert set().union(*map(faults, sites)) == {f"fault-{fault:02d}" for fault in range(1, 22)}
    for site in sites:
        config = read_site(site)
        assert config.tasks["fault"].classes == ("normal", *sorted(faults(site)))
        assert len(config.data.channels) == 52
        text = (site / "site.toml").read_text()
        assert sum(f"Fault {hidden} is one of 3, 9 and 15" in text for hidden in (3, 9, 15)) == 1


def test_runs_are_trained_on_or_tested_never_both(process: Path, tmp_path: Path) -> None:
    for site in write_sites("tep", tmp_path / "out", data=process):
        train, test = (pl.read_parquet(site / f"{part}.parquet") for part in ("train", "test"))
        assert all(not run.endswith("_te") for run in train["run"].unique())
        assert all(run.endswith("_te") for run in test["run"].unique())
        assert train["run"].n_unique() == test["run"].n_unique() == 8


def test_a_test_run_is_normal_until_its_fault_is_let_in(process: Path, tmp_path: Path) -> None:
    for site in write_sites("tep", tmp_path / "out", data=process):
        for run, sample, state, faulty in (
            pl.read_parquet(site / "test.parquet").select("run", "sample", "state", "faulty").iter_rows()
        ):
            on = run != "d00_te" and sample >= ONSET
            assert state == (f"fault-{run[1:3]}" if on else "normal")
            assert faulty == int(on)
        train = pl.read_parquet(site / "train.parquet")
        assert ((train["run"] == "d00") == (train["state"] == "normal")).all()


def test_no_window_crosses_from_one_run_or_part_into_another(process: Path, tmp_path: Path) -> None:
    (site, *_) = write_sites("tep", tmp_path / "out", data=process)
    data = open_data(site, tmp_path / "state")
    assert len(data.train) == 8 * 60
    assert len(data.validation) == 8 * 20
    for part in (data.train, data.validation, data.test):
        starts = np.flatnonzero(np.diff(part.groups, prepend=-1))
        for start in starts:
            window = batch_of(part, np.array([start]))[0]
            assert (window == window[:, :1]).all()  # before a run's first row there is only that row


def test_what_cannot_be_dealt_and_altered_files_are_refused(process: Path, tmp_path: Path) -> None:
    for wish in ({"plants": 21}, {"groups": 2}):
        with pytest.raises(ConfigError, match=f"--{next(iter(wish))} "):
            write_sites("tep", tmp_path / "out", data=process, **wish)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="Chiang, Russell and Braatz"):
        write_sites("tep", tmp_path / "out", data=tmp_path)
    with pytest.raises(DataError, match="run d01_te, t = 150 has label 1"):  # somebody labelled the quiet rows
        write_sites("tep", tmp_path / "out", data=write_raw(tmp_path / "altered", label_from=150))
    pl.read_parquet(process / FILE).drop("XMV03").write_parquet(process / FILE)
    with pytest.raises(DataError, match="XMV03"):
        write_sites("tep", tmp_path / "out", data=process)


@pytest.mark.realdata
def test_the_real_runs_have_the_published_lengths(real_data: Path, tmp_path: Path) -> None:
    for site in write_sites("tep", tmp_path / "out", data=real_data):
        train, test = (pl.read_parquet(site / f"{part}.parquet") for part in ("train", "test"))
        assert (train.height, test.height) == (500 + 7 * 480, 8 * 960)
        assert test.filter(pl.col("faulty") == 1).height == 7 * 800
        data = open_data(site, tmp_path / "state" / site.name)
        assert sum(map(len, (data.train, data.validation, data.test))) == train.height + test.height
