"""Garments: twelve teams, tested on days that come later, and a target that is hard to beat."""

from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from trunkline.client.data import open_data
from trunkline.config.site import read_site
from trunkline.errors import DataError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.garments import CATEGORICAL, CHANNELS, FILE, TEAMS

DAYS = 30


def published() -> pl.DataFrame:
    """A tiny factory with UCI's columns: every team sews and finishes every day; nobody waits before finishing."""
    rng = np.random.default_rng(0)
    rows = []
    for day in range(DAYS):
        when = date(2015, 1, 15) + timedelta(days=day)  # over the end of a month
        for team in range(1, TEAMS + 1):
            for department in ("sewing", "finishing"):
                target = float(rng.choice([0.7, 0.75, 0.8]))
                rows.append(
                    {
                        "date": f"{when.month}/{when.day}/{when.year}",
                        "quarter": f"Quarter{(when.day - 1) // 7 + 1}",
                        "department": department,
                        "day": when.strftime("%A"),
                        "team": team,
                        "targeted_productivity": target,
                        "smv": float(rng.normal(20.0, 5.0)),
                        "wip": float(rng.integers(100, 2000)) if department == "sewing" else None,
                        "over_time": int(rng.integers(0, 8000)),
                        "incentive": int(rng.integers(0, 100)),
                        "idle_time": 0.0 if team > 6 else float(rng.random()),
                        "idle_men": 0 if team > 6 else int(rng.integers(0, 30)),
                        "no_of_style_change": int(rng.integers(0, 2)),
                        "no_of_workers": float(rng.integers(10, 60)),
                        "actual_productivity": target + float(rng.normal(0.0, 0.1)),
                    }
                )
    return pl.DataFrame(rows)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "uci" / "garments"
    folder.mkdir(parents=True)
    published().write_csv(folder / FILE)
    return folder


def test_no_date_is_on_two_sides_and_test_days_come_last(source: Path, tmp_path: Path) -> None:
    first = set()
    for site in write_sites("garments", tmp_path / "out", data=source.parent):
        train, test = (pl.read_parquet(site / f"{part}.parquet")["date"] for part in ("train", "test"))
        assert train.max() < test.min()  # ISO dates: the order of text is that of time
        assert test.n_unique() == round(0.2 * DAYS)
        first.add(test.min())
        opened = open_data(site, tmp_path / "state" / site.name)
        sides = [
            {part.group_names[code] for code in np.unique(part.groups)} for part in (opened.train, opened.validation)
        ]
        assert not sides[0] & sides[1]
    assert len(first) == 1  # the same days at every team: none knows what another's test day brought


def test_every_row_is_at_its_team_with_labels_of_its_own(source: Path, tmp_path: Path) -> None:
    raw, seen = published(), 0
    for team, site in enumerate(write_sites("garments", tmp_path / "out", data=source), start=1):
        own = raw.filter(pl.col("team") == team)
        found = pl.concat([pl.read_parquet(site / f"{part}.parquet") for part in ("train", "test")])
        assert found["targeted_productivity"].to_list() == own["targeted_productivity"].to_list()
        for there, here in zip(own.iter_rows(named=True), found.iter_rows(named=True), strict=True):
            assert here["below_target"] == int(there["actual_productivity"] < there["targeted_productivity"])
            assert (here["wip"] is None) == (there["department"] == "finishing")
        assert not {"team", "test"} & set(found.columns)
        seen += len(found)
    assert seen == len(raw)


def test_all_teams_have_one_stem_whatever_they_never_did(source: Path, tmp_path: Path) -> None:
    shapes = set()
    for site in write_sites("garments", tmp_path / "out", data=source):
        config = read_site(site)
        assert (config.data.channels, config.data.categorical) == (CHANNELS, CATEGORICAL)
        opened = open_data(site, tmp_path / "state" / site.name)  # teams 7 to 12 were never idle: kept, not refused
        shapes.add((opened.channels, opened.categories))
        wip = opened.train.values[:, opened.channels.index("wip")]
        assert 0.3 < np.isnan(wip).mean() < 0.7  # what was not there stays missing; nothing is invented for it
    assert len(shapes) == 1


def test_a_damaged_date_is_refused_with_the_file(source: Path, tmp_path: Path) -> None:
    published().with_columns(date=pl.lit("2015-13-45")).write_csv(source / FILE)
    with pytest.raises(DataError, match="month/day/year"):
        write_sites("garments", tmp_path / "out", data=source)


@pytest.mark.realdata
def test_the_target_alone_is_the_baseline_to_beat(real_data: Path, tmp_path: Path) -> None:
    sites = write_sites("garments", tmp_path / "out", data=real_data)
    test = pl.concat([pl.read_parquet(site / "test.parquet") for site in sites])
    train = pl.concat([pl.read_parquet(site / "train.parquet") for site in sites])
    assert (len(train) + len(test), train["date"].n_unique() + test["date"].n_unique()) == (1197, 59)
    actual = test["actual_productivity"]
    assert (test["targeted_productivity"] - actual).abs().mean() == pytest.approx(0.0893, abs=5e-5)
    assert (train["actual_productivity"].mean() - actual).abs().mean() == pytest.approx(0.1181, abs=5e-5)
