"""Pooling: the bound that federation is compared with."""

from pathlib import Path

import pytest

from tests.end_to_end.test_site_life import write_site
from trunkline.config.run import parse_run
from trunkline.errors import ConfigError
from trunkline.server.reporting.report import read_report
from trunkline.simulations.folders import prepare, site_folders
from trunkline.simulations.simulate import simulate

RUN = {
    "name": "pooled", "rounds": 6, "trunk": {"width": 16}, "training": {"steps": 10, "batch_size": 32, "learning_rate": 0.01},
    "strategy": {"name": "central"}, "cohort": {"min_sites": 1},
}  # fmt: skip


def plants_alike(root: Path, channels: tuple[int, ...]) -> list[Path]:
    for place, count in enumerate(channels):
        folder = write_site(
            root / f"plant-{place}", groups=12, length=30, channels=count, window=8, missing=0.0, seed=7
        )
        config = folder / "site.toml"
        config.write_text(config.read_text().replace('name = "plant"', f'name = "plant-{place}"'))
    return site_folders(root)


def test_pooled_rows_teach_one_model_that_is_scored_at_every_site(tmp_path: Path) -> None:
    folders = plants_alike(tmp_path / "sites", (3, 3))
    prepare(tmp_path / "out", resume=False, overwrite=False)
    simulate(parse_run(dict(RUN), "test"), folders, tmp_path / "out", workers=1)
    report = read_report(tmp_path / "out")
    assert report["run"]["strategy"] == "central"
    assert [row["site"] for row in report["sites"]] == ["plant-0", "plant-1"]
    for row in report["sites"]:
        assert row["federated"] < 6.0  # hours; predicting the mean of 0..30 would miss by 8.7
        assert row["local"] is not None
    losses = [one["train_loss"] for one in report["rounds"]]
    assert losses[-1] < losses[0]


def test_sites_with_other_sensors_cannot_be_pooled(tmp_path: Path) -> None:
    folders = plants_alike(tmp_path / "sites", (3, 4))
    prepare(tmp_path / "out", resume=False, overwrite=False)
    with pytest.raises(ConfigError, match=r"same sensors.*plant-1 differs from plant-0"):
        simulate(parse_run(dict(RUN), "test"), folders, tmp_path / "out", workers=1)


def test_with_refit_the_pooled_rows_come_twice_and_then_with_those_that_validated(tmp_path: Path) -> None:
    folders = plants_alike(tmp_path / "sites", (3, 3))
    reports = {}
    for refit in (False, True):
        out = tmp_path / f"out-{refit}"
        prepare(out, resume=False, overwrite=False)
        simulate(parse_run({**RUN, "refit": refit}, "test"), folders, out, workers=1)
        reports[refit] = read_report(out)
    assert [one["round"] for one in reports[True]["rounds"]] == list(range(1, 13))
    once, twice = (reports[refit]["sites"][0] for refit in (False, True))
    assert twice["n_train"] == once["n_train"] + once["n_validation"]
    assert twice["federated"] < 6.0
    assert twice["federated"] != once["federated"]
