"""Sites kept out of a simulated federation and onboarded at its end."""

from pathlib import Path

import pytest
from rich.console import Console

from tests.client.adaptation.wearing import RUN, machines, plant, write_plant
from tests.loopback import federate
from trunkline.client.adaptation import adapt as adapt_module
from trunkline.config.run import NewcomersConfig
from trunkline.errors import ConfigError
from trunkline.release import RELEASE, read_release
from trunkline.simulations.newcomers import onboard, print_newcomers, set_apart


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TUNE", "FULL", "LEARN", "SCRATCH", "LOW_RANK"):
        plan = getattr(adapt_module, name)
        monkeypatch.setattr(adapt_module, name, plan.model_copy(update={"steps": 5, "batch_size": 16}))


def test_newcomers_take_no_part_and_are_onboarded_with_so_many_labels_each(tmp_path: Path) -> None:
    folders = [plant(tmp_path / f"p{seed}", 4, seed) for seed in (1, 2, 3)]
    wanted = NewcomersConfig(sites=("plant-2",), labelled_groups=(1, 3))
    members, apart = set_apart(folders, wanted)
    assert (members, apart) == ([folders[0], folders[2]], [folders[1]])
    federate(members, tmp_path / "out", **{**RUN, "rounds": 1})
    assert read_release(tmp_path / "out" / RELEASE)[1].sites == ("plant-1", "plant-3")
    rows = onboard(apart, tmp_path / "out" / RELEASE, wanted, tmp_path / "out")
    assert [(row["site"], row["labelled_groups"], row["task"]) for row in rows] == [
        ("plant-2", 1, "rul"), ("plant-2", 1, "failing"), ("plant-2", 3, "rul"), ("plant-2", 3, "failing"),
    ]  # fmt: skip
    assert all(row[who] is not None for row in rows if row["task"] == "rul" for who in ("adapted", "as_is", "scratch"))
    assert (tmp_path / "out" / "newcomers" / "p2" / "evidence.json").exists()
    console = Console(record=True, width=160)
    print_newcomers(rows, console)
    assert "interpolated 0.09" in console.export_text()


def test_a_newcomer_without_labels_costs_itself_only(tmp_path: Path) -> None:
    import polars as pl

    federate([plant(tmp_path / "p1", 3, 1)], tmp_path / "out", **{**RUN, "rounds": 1})
    silent = machines(3, 5).with_columns(rul=pl.lit(None), failing=pl.lit(None))
    folders = [
        write_plant(tmp_path / "silent", silent, machines(2, 6, name="t"), name="silent"),
        plant(tmp_path / "p4", 1, 4),
    ]
    rows = onboard(folders, tmp_path / "out" / RELEASE, NewcomersConfig(), tmp_path / "out")
    assert "label" in rows[0]["problem"]
    assert {row["site"] for row in rows[1:]} == {"plant-4"}
    print_newcomers(rows, Console(quiet=True))


def test_what_cannot_be_meant_is_refused_by_name(tmp_path: Path) -> None:
    folders = [plant(tmp_path / "p1", 3, 1)]
    with pytest.raises(ConfigError, match=r"plant-9.*plant-1"):
        set_apart(folders, NewcomersConfig(sites=("plant-9",)))
    with pytest.raises(ConfigError, match="every site"):
        set_apart(folders, NewcomersConfig(sites=("plant-1",)))
    with pytest.raises(ConfigError, match="released no trunk"):
        onboard(folders, tmp_path / RELEASE, NewcomersConfig(), tmp_path)
