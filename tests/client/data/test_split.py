"""Splits: decided once, stable under new data, never in silence."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client.data.sites import fleet, write_site, write_toml
from tests.client.data.test_read import refused
from trunkline.client.data import SiteData, open_data

PARTS = ("train", "validation", "test")


def parts_of(site: SiteData) -> dict[str, str]:
    """Group name -> part."""
    sets = zip(PARTS, (site.train, site.validation, site.test), strict=True)
    return {samples.group_names[code]: part for part, samples in sets for code in np.unique(samples.groups)}


@settings(max_examples=25, deadline=None)
@given(before=st.integers(3, 30), more=st.integers(0, 30), seed=st.integers(0, 3))
def test_appended_groups_move_no_group_and_keep_the_shares(
    tmp_path_factory: pytest.TempPathFactory, before: int, more: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("site")
    split = {"seed": seed, "validation": 0.25, "test": 0.25}
    first = parts_of(open_data(write_site(folder, fleet(before), split=split), folder / "state"))
    second = parts_of(open_data(write_site(folder, fleet(before + more), split=split), folder / "state"))
    assert {name: second[name] for name in first} == first
    assert len(second) == before + more
    for part, share in (("train", 0.5), ("validation", 0.25), ("test", 0.25)):
        assert abs(list(second.values()).count(part) - share * len(second)) <= 1.5
    assert parts_of(open_data(folder, folder / "state")) == second


def test_rows_appended_to_known_groups_move_nothing(tmp_path: Path) -> None:
    first = parts_of(open_data(write_site(tmp_path, fleet(9, rows=10)), tmp_path / "state"))
    assert parts_of(open_data(write_site(tmp_path, fleet(9, rows=25)), tmp_path / "state")) == first


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(6, 20), min_size=1, max_size=4), more=st.integers(1, 15))
def test_rows_appended_to_a_time_split_go_to_the_end(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], more: int
) -> None:
    folder = tmp_path_factory.mktemp("site")
    before = open_data(write_site(folder, fleet(lengths), split={"by": "time"}), folder / "state")
    after = open_data(
        write_site(folder, fleet([size + more for size in lengths]), split={"by": "time"}), folder / "state"
    )
    assert np.array_equal(before.train.order, after.train.order)
    assert np.array_equal(before.validation.order, after.validation.order)
    assert len(after.test) == len(before.test) + more * len(lengths)


def test_a_late_row_joins_the_part_its_moment_belongs_to(tmp_path: Path) -> None:
    frame = fleet([40])
    before = open_data(
        write_site(tmp_path, frame.filter(pl.col("cycle") != 3), split={"by": "time"}), tmp_path / "state"
    )
    after = open_data(write_site(tmp_path, frame, split={"by": "time"}), tmp_path / "state")
    assert set(after.train.order) - set(before.train.order) == {3.0}
    assert np.array_equal(before.test.order, after.test.order)


def test_a_site_without_groups_is_split_by_time(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet([50]), group=None)
    site = open_data(folder, folder / "state")
    assert site.train.group_names == ("all",)
    assert site.train.order.max() < site.validation.order.min() <= site.validation.order.max() < site.test.order.min()
    assert [len(site.train), len(site.validation), len(site.test)] == [30, 10, 10]


def test_a_site_without_groups_and_order_goes_by_the_rows(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet([50]), group=None, order=None, window=None)
    site = open_data(folder, folder / "state")
    assert site.test.order.tolist() == list(range(40, 50))


def test_three_groups_are_one_each(tmp_path: Path) -> None:
    for seed in range(5):
        folder = write_site(tmp_path / str(seed), fleet(3), split={"seed": seed, "validation": 0.4, "test": 0.5})
        assert sorted(parts_of(open_data(folder, folder / "state")).values()) == sorted(PARTS)


@pytest.mark.parametrize("groups", [1, 2])
def test_too_few_groups_are_refused_with_a_way_out_that_works(tmp_path: Path, groups: int) -> None:
    folder = write_site(tmp_path, fleet(groups))
    refused(folder, f"{groups} group", "u000", "training, validation and test", 'by = "time"')
    assert not (folder / "state" / "split.json").exists()
    write_site(tmp_path, fleet(groups), split={"by": "time"})
    assert len(open_data(folder, folder / "state").test)


def test_shares_that_leave_nothing_to_train_are_refused(tmp_path: Path) -> None:
    refused(
        write_site(tmp_path, fleet(9), split={"validation": 0.5, "test": 0.5}),
        "validation 0.5 + test 0.5",
        "nothing to train",
    )


def test_test_files_are_the_test_part_and_the_rest_is_split_in_two(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet(10), test_files="test.csv")
    fleet(4, seed=1).with_columns(unit=pl.lit("test-") + pl.col("unit")).write_csv(folder / "test.csv")
    parts = parts_of(open_data(folder, folder / "state"))
    assert {name for name, part in parts.items() if part == "test"} == {f"test-u00{place}" for place in range(4)}
    assert [list(parts.values()).count(part) for part in PARTS] == [8, 2, 4]
    assert set(json.loads((folder / "state" / "split.json").read_text())["assignment"].values()) == {
        "train",
        "validation",
    }


@pytest.mark.parametrize(("key", "value"), [("seed", 9), ("validation", 0.4), ("test", 0.0), ("by", "time")])
def test_a_changed_setting_keeps_the_stored_split_and_says_so(tmp_path: Path, key: str, value: object) -> None:
    before = parts_of(open_data(write_site(tmp_path, fleet(10)), tmp_path / "state"))
    after = open_data(write_site(tmp_path, fleet(10), split={key: value}), tmp_path / "state")
    assert parts_of(after) == before
    said = [note for note in after.notes if note.level == "warning" and f"{key} = " in note.what]
    assert len(said) == 1
    assert repr(value) in said[0].what
    assert "split.json" in said[0].where
    assert "Delete" in said[0].remedy


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"format": 1, "assignment": {"u000": "tset"}}', b"\xff\x00"])
def test_a_damaged_split_is_refused_not_replaced(tmp_path: Path, content: bytes) -> None:
    folder = write_site(tmp_path, fleet(6))
    (folder / "state").mkdir()
    path = folder / "state" / "split.json"
    path.write_bytes(content)
    refused(folder, "split.json", "damaged", "backup", "Delete")
    assert path.read_bytes() == content


def test_another_group_column_under_a_stored_split_is_refused(tmp_path: Path) -> None:
    open_data(write_site(tmp_path, fleet(6)), tmp_path / "state")
    write_site(tmp_path, fleet(6).with_columns(unit=pl.lit("x") + pl.col("unit")))
    refused(tmp_path, "split.json", "knows none of the groups", "`group`")


def test_the_first_split_seeks_every_class_in_every_part(tmp_path: Path) -> None:
    """Three faulty units of twelve: a random split leaves some part without one more often than not."""
    tasks = {"faulty": {"kind": "binary", "target": "faulty"}}
    frame = fleet(12).with_columns(faulty=pl.col("unit").is_in(["u001", "u002", "u007"]).cast(pl.Int64))
    for seed in range(6):
        folder = write_site(tmp_path / str(seed), frame, tasks, split={"seed": seed})
        site = open_data(folder, folder / "state")
        assert [set(part.labels["faulty"].tolist()) for part in (site.train, site.validation, site.test)] == [
            {0.0, 1.0}
        ] * 3


def test_labelled_groups_keep_labels_and_the_others_still_scale(tmp_path: Path) -> None:
    full = open_data(write_site(tmp_path / "all", fleet(20)), tmp_path / "all" / "state")
    site = open_data(write_site(tmp_path / "few", fleet(20), split={"labelled_groups": 3}), tmp_path / "few" / "state")
    known = ~np.isnan(site.train.labels["rul"])
    assert len(set(site.train.groups[known].tolist())) == 3
    assert len(site.train) == len(full.train)
    assert site.scaler.to_dict() == full.scaler.to_dict()
    assert not np.isnan(site.validation.labels["rul"]).any()
    assert len(site.train.labelled()) == 30
    again = open_data(write_site(tmp_path / "few", fleet(40), split={"labelled_groups": 3}), tmp_path / "few" / "state")
    names = [{one.train.group_names[code] for code in one.train.labelled().groups} for one in (site, again)]
    assert names[0] == names[1]
    more = open_data(write_site(tmp_path / "few", fleet(40), split={"labelled_groups": 5}), tmp_path / "few" / "state")
    assert names[0] < {more.train.group_names[code] for code in more.train.labelled().groups}


def test_more_labelled_groups_than_there_are_is_a_warning(tmp_path: Path) -> None:
    site = open_data(write_site(tmp_path, fleet(5), split={"labelled_groups": 50}), tmp_path / "state")
    assert any("labelled_groups" in note.what and note.level == "warning" for note in site.notes)
    assert not np.isnan(site.train.labels["rul"]).any()


def test_a_label_with_one_class_is_refused(tmp_path: Path) -> None:
    folder = write_toml(tmp_path, {}, {"failing": {"kind": "binary", "target": "failing"}})
    fleet(6).with_columns(failing=0).write_csv(folder / "data.csv")
    refused(folder, str(folder), "`failing`", "training labels", "'0'", "take [tasks.failing] out")
    fleet(6).with_columns(failing=pl.lit(None)).write_csv(folder / "data.csv")
    refused(folder, "failing", "label")
