"""A task that cannot be trained costs that task: it is named with a remedy, and the others go on."""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.client.data.sites import RUL, fleet, write_site
from tests.loopback import events_of, federate
from trunkline.client.check import check_site
from trunkline.client.data import open_data
from trunkline.errors import DataError
from trunkline.server.reporting.report import read_report

BAD: dict[str, tuple[dict[str, Any], pl.Expr | pl.Series, str]] = {
    "words for a number": (
        {"kind": "regression", "target": "odd"},
        pl.lit("soon"),
        r"data\.csv, line 2: target of task 'odd' `odd` holds 'soon' and 119 more such cells; expected a number",
    ),
    "a measurement for classes": (
        {"kind": "multiclass", "target": "odd"},
        pl.Series(np.linspace(0.0, 1.0, 40).repeat(3)),
        r"40 different numbers with fractions.*kind = 'regression'",
    ),
    "a level for a flag": (
        {"kind": "binary", "target": "odd"},
        pl.Series([0, 1, 2] * 40),
        r"column `odd`, data row 3: 2 is no label of task 'odd'; expected 0 or 1",
    ),
    "a level for one of many flags": (
        {"kind": "multilabel", "targets": ["failing", "odd"]},
        pl.Series([0, 1, 2] * 40),
        r"column `odd`, data row 3: 2 is no label.*Write 0 and 1",
    ),
    "words without an order": (
        {"kind": "ordinal", "target": "odd"},
        pl.Series(["new", "old", "dead"] * 40),
        r"holds words, dead, new, old, whose order nobody knows\. List them under `classes` of \[tasks\.odd\]",
    ),
    "no label at all": (
        {"kind": "binary", "target": "odd"},
        pl.lit(None, dtype=pl.Int64),
        r"`odd` has no label in any training row\. Label some training groups.*take \[tasks\.odd\] out of site\.toml",
    ),
    "no flag at all": (
        {"kind": "multilabel", "targets": ["odd"]},
        pl.lit(None, dtype=pl.Int64),
        r"`targets` \(`odd`\) has no label in any training row",
    ),
    "one class": (
        {"kind": "ordinal", "target": "odd"},
        pl.lit(3),
        r"all \d+ training labels of column `odd` are '3'; there is nothing to tell apart\. Add groups",
    ),
    "a metric that means nothing here": (
        {"kind": "regression", "target": "c0", "metric": "nasa_score", "unit": "mm"},
        pl.lit(0),
        r"\[tasks\.odd\]: `metric = 'nasa_score'` means nothing for this task",
    ),
}


def site(folder: Path, bad: str, *, others: bool = True) -> Path:
    task, column, _ = BAD[bad]
    frame = fleet(10, rows=12).with_columns(odd=column, mm=pl.col("rul") / 3)
    tasks = {"odd": {**task, **({"target": "mm"} if task.get("target") == "c0" else {})}}
    failing = {"kind": "binary", "target": "failing"}
    return write_site(folder, frame, {"rul": RUL, **tasks, "failing": failing} if others else tasks)


@pytest.mark.parametrize("bad", BAD)
def test_a_task_that_cannot_be_trained_is_named_and_the_others_go_on(tmp_path: Path, bad: str) -> None:
    data = open_data(site(tmp_path / "site", bad), tmp_path / "state")
    assert list(data.tasks) == ["rul", "failing"]
    for part in (data.train, data.validation, data.test):
        assert list(part.labels) == ["rul", "failing"]
    (said,) = (note for note in data.notes if note.where == "task odd")
    assert said.level == "warning"
    assert said.what.startswith("is set aside, and the others go on.")
    assert re.search(BAD[bad][2], said.what), said.what
    report = check_site(tmp_path / "site")
    assert report.ok
    assert report.survey is not None
    assert list(report.survey.findings.aside) == ["odd"]


@pytest.mark.parametrize("bad", BAD)
def test_a_site_without_any_task_left_is_refused(tmp_path: Path, bad: str) -> None:
    with pytest.raises(DataError, match=BAD[bad][2]):
        open_data(site(tmp_path / "site", bad, others=False), tmp_path / "state")
    assert not check_site(tmp_path / "site").ok


def test_every_reason_is_given_where_no_task_is_left(tmp_path: Path) -> None:
    frame = fleet(10).with_columns(one=pl.lit(1), none=pl.lit(None, dtype=pl.Int64))
    tasks = {name: {"kind": "binary", "target": name} for name in ("one", "none")}
    with pytest.raises(DataError) as error:
        open_data(write_site(tmp_path / "site", frame, tasks), tmp_path / "state")
    assert [f"'{name}'" in line for name, line in zip(tasks, str(error.value).splitlines(), strict=True)] == [
        True,
        True,
    ]


def test_a_column_that_is_an_input_too_still_stops_the_site(tmp_path: Path) -> None:
    """A forecast may read its own past; where that cannot be read, there is no input either."""
    frame = fleet(10).with_columns(c0=pl.lit("off"))
    tasks = {"rul": RUL, "ahead": {"kind": "forecast", "target": "c0"}}
    with pytest.raises(DataError, match="`c0` holds 'off'"):
        open_data(write_site(tmp_path / "site", frame, tasks), tmp_path / "state")


def test_a_class_that_only_the_test_has_is_a_warning(tmp_path: Path) -> None:
    frame = fleet(10, rows=12)
    folder = write_site(tmp_path / "site", frame)
    tested = set(
        np.array(open_data(folder, tmp_path / "state").test.group_names)[
            open_data(folder, tmp_path / "state").test.groups
        ]
    )
    stage = pl.when(pl.col("rul") > 5).then(pl.lit("new")).otherwise(pl.lit("worn"))
    stage = pl.when(pl.col("unit").is_in(tested) & (pl.col("rul") < 2)).then(pl.lit("dead")).otherwise(stage)
    write_site(
        folder, frame.with_columns(stage=stage), {"rul": RUL, "stage": {"kind": "multiclass", "target": "stage"}}
    )
    data = open_data(folder, tmp_path / "state")
    assert list(data.tasks) == ["rul", "stage"]
    said = [note.what for note in data.notes if note.where == "task stage"]
    assert len(said) == 1
    assert "test has labels that no training sample has: 'dead' (4)" in said[0]


def test_a_federation_goes_on_without_the_task_that_one_site_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders = [site(tmp_path / "a", "no label at all"), site(tmp_path / "b", "words without an order")]
    (folders[1] / "site.toml").write_text((folders[1] / "site.toml").read_text().replace("press-07", "press-08"))
    with caplog.at_level(logging.WARNING):
        federate(folders, tmp_path / "out", rounds=2)
    assert events_of(tmp_path / "out")
    rows = {(row["site"], row["task"]) for row in read_report(tmp_path / "out")["sites"]}
    assert rows == {(name, task) for name in ("press-07", "press-08") for task in ("rul", "failing")}
    assert sum("press-07: task odd is set aside" in one for one in caplog.messages) == 1
