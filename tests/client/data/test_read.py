"""Reading: four formats are one table, and what cannot be read is named by file, line, column and value."""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest

from tests.client.data.sites import fleet, write_hdf5, write_npz, write_site, write_toml
from trunkline.client.data import SiteData, open_data
from trunkline.client.data.formats import load
from trunkline.errors import ConfigError, DataError


def refused(folder: Path, *words: str) -> str:
    """The text of the DataError that opening raises; each of `words` must be in it."""
    with pytest.raises(DataError) as caught:
        open_data(folder, folder / "state")
    text = str(caught.value)
    assert [word for word in words if word not in text] == [], text
    return text


def same(one: SiteData, two: SiteData) -> bool:
    return one.scaler.to_dict() == two.scaler.to_dict() and all(
        a.values.tobytes() == b.values.tobytes()
        and a.group_names == b.group_names
        and all(np.array_equal(x, y) for x, y in ((a.ends, b.ends), (a.groups, b.groups), (a.order, b.order)))
        and all(a.labels[task].tobytes() == b.labels[task].tobytes() for task in one.tasks)
        for a, b in ((one.train, two.train), (one.validation, two.validation), (one.test, two.test))
    )


def test_csv_parquet_hdf5_and_npz_of_the_same_rows_are_the_same_site(tmp_path: Path) -> None:
    frame = fleet(8).with_columns(
        unit=pl.col("unit").str.slice(1).cast(pl.Int64),
        wear=pl.when(pl.col("rul") > 4).then(pl.lit("fresh")).otherwise(pl.lit("none")),
        c0=pl.when(pl.col("cycle") == 3).then(None).otherwise(pl.col("c0")),
    )
    tasks = {
        "rul": {"kind": "regression", "target": "rul"},
        "failing": {"kind": "binary", "target": "failing"},
        "wear": {"kind": "multiclass", "target": "wear"},
    }
    names = ("data.csv", "semicolons.csv", "data.parquet", "data.h5", "grouped.h5", "matrix.h5", "data.npz")
    opened = {}
    for name in names:
        folder = write_toml(tmp_path / name.replace(".", "-"), {"files": name}, tasks)
        path = folder / name
        if name == "semicolons.csv":
            frame.write_csv(path, separator=";")
        elif name.endswith("csv"):
            frame.write_csv(path)
        elif name.endswith("parquet"):
            frame.write_parquet(path)
        elif name == "matrix.h5":
            numbers = ["unit", "cycle", "rul", "failing", "c0", "c1"]
            write_hdf5(path, frame.select("wear"))
            with h5py.File(path, "a") as file:
                file["table"] = frame.select(numbers).to_numpy()
                file["table"].attrs["columns"] = numbers
        elif name.endswith("h5"):
            write_hdf5(path, frame, "run" if name == "grouped.h5" else None)
        else:
            write_npz(path, frame)
        opened[name] = open_data(folder, folder / "state")
    # a matrix stores whole numbers as 3.0: its groups are called so, and nothing else may differ
    assert opened["matrix.h5"].train.group_names[0] == "0.0"
    assert [name for name in names if name != "matrix.h5" and not same(opened[name], opened["data.csv"])] == []
    assert opened["matrix.h5"].scaler.channels == opened["data.csv"].scaler.channels
    assert len(opened["data.csv"].train) == 40


def test_many_files_are_one_table_in_sorted_order(tmp_path: Path) -> None:
    frame = fleet(9)
    one = write_site(tmp_path / "one", frame)
    many = write_toml(tmp_path / "many", {"files": ["logs/*.csv", "logs/b*"]})
    (many / "logs").mkdir()
    for place, name in enumerate("cab"):
        frame.filter(pl.col("unit").str.slice(1).cast(pl.Int32) // 3 == place).write_csv(many / "logs" / f"{name}.csv")
    assert same(open_data(one, one / "state"), open_data(many, many / "state"))


def test_groups_named_by_numbers_keep_their_zeros(tmp_path: Path) -> None:
    frame = fleet(6).with_columns(unit=pl.lit("00") + pl.col("unit").str.slice(3))
    folder = write_site(tmp_path, frame)
    assert open_data(folder, folder / "state").train.group_names[:2] == ("000", "001")


def test_only_the_columns_asked_for_are_loaded(tmp_path: Path) -> None:
    rows = 20_000
    wide = pl.DataFrame({"a": np.arange(rows, dtype=np.float64), "huge": [os.urandom(200).hex() for _ in range(rows)]})
    wide.write_parquet(tmp_path / "w.parquet")
    wide.write_csv(tmp_path / "w.csv")
    np.savez(tmp_path / "w.npz", a=wide["a"].to_numpy(), huge=np.array(wide["huge"].to_list()))
    write_hdf5(tmp_path / "w.h5", wide)
    # the unused column is damaged beyond reading, so touching it would show
    body = bytearray((tmp_path / "w.npz").read_bytes())
    place = body.find(b"huge.npy") + 100_000
    body[place : place + 1000] = bytes(1000)
    (tmp_path / "w.npz").write_bytes(bytes(body))
    with pytest.raises(DataError, match="damaged"):
        load(tmp_path / "w.npz", {"huge": "text"})
    body = bytearray((tmp_path / "w.parquet").read_bytes())
    middle = len(body) // 2
    body[middle : middle + 100_000] = bytes(100_000)
    (tmp_path / "w.parquet").write_bytes(bytes(body))
    with pytest.raises(DataError, match="damaged"):
        load(tmp_path / "w.parquet", {"huge": "text"})
    for name in ("w.csv", "w.parquet", "w.npz", "w.h5"):
        loaded = load(tmp_path / name, {"a": "number"})
        assert loaded.columns == ["a"]
        assert loaded.equals(wide.select("a")), name


def test_a_missing_folder_and_a_missing_site_toml_are_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        open_data(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ConfigError, match=r"site.toml: no such file"):
        open_data(tmp_path, tmp_path)


def test_a_misspelt_key_names_the_nearest(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet(5), chanels=["c0"])
    with pytest.raises(ConfigError, match=r"unknown key `data.chanels`; did you mean 'channels'"):
        open_data(folder, folder / "state")


def test_a_glob_without_files_says_what_is_there(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet(5), files="sensors/*.parquet")
    refused(folder, "'sensors/*.parquet'", "`data.files`", str(folder), "data.csv", "Mend the pattern")


def test_an_absolute_glob_is_refused(tmp_path: Path) -> None:
    refused(write_site(tmp_path, fleet(5), files="/data/*.csv"), "'/data/*.csv'", "relative")


@pytest.mark.parametrize(("wrong", "used_as", "near"), [("C0", "channel", "'c0'"), ("cycel", "order column", "'cycle'"), ("units", "group column", "'unit'")])  # fmt: skip
def test_an_unknown_column_names_file_nearest_and_the_columns_there(
    tmp_path: Path, wrong: str, used_as: str, near: str
) -> None:
    data: dict[str, Any] = {
        "channel": {"channels": [wrong, "c1"]},
        "order column": {"order": wrong},
        "group column": {"group": wrong},
    }[used_as]
    folder = write_site(tmp_path, fleet(5), **data)
    text = refused(folder, "data.csv", f"no {used_as} `{wrong}`", "Columns there: unit, cycle, rul")
    assert near in text


def test_every_missing_column_is_named_at_once(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet(5), channels=["x1", "x2"], regime=["x3"])
    text = refused(folder, "`x1`", "`x2`", "`x3`")
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("column", "cell", "used_as"),
    [("c1", "off", "channel"), ("cycle", "x17", "order column"), ("rul", "soon", "target of task 'rul'"), ("c0", "1,5", "channel")],
)  # fmt: skip
def test_text_in_a_number_column_names_file_line_column_and_value(
    tmp_path: Path, column: str, cell: str, used_as: str
) -> None:
    frame = fleet(5).cast({column: pl.String})
    frame = frame.with_columns(
        pl.Series(column, [cell if row == 15 else value for row, value in enumerate(frame[column])])
    )
    folder = write_site(tmp_path, frame)
    assert (folder / "data.csv").read_text().splitlines()[16].count(cell) >= 1
    refused(folder, "data.csv, line 17", f"{used_as} `{column}`", repr(cell), "number", "Mend or empty the cell")


def test_text_in_a_parquet_column_names_the_row(tmp_path: Path) -> None:
    folder = write_toml(tmp_path, {"files": "d.parquet"})
    frame = fleet(5).cast({"c1": pl.String})
    frame.with_columns(pl.Series("c1", ["1.0"] * 20 + ["??"] + ["1.0"] * 29)).write_parquet(folder / "d.parquet")
    refused(folder, "d.parquet, row 21", "`c1`", "'??'")


def test_blanks_and_the_usual_words_for_missing_are_missing(tmp_path: Path) -> None:
    words = ["", "NA", " n/a ", "NaN", "null", "-", "?", "None"]
    frame = fleet(6).cast({"c1": pl.String})
    frame = frame.with_columns(pl.Series("c1", words + list(frame["c1"][len(words) :])))
    folder = write_site(tmp_path, frame, clean={"missing": "keep"})
    site = open_data(folder, folder / "state")
    silent = sum(int(np.isnan(part.values[:, 1]).sum()) for part in (site.train, site.validation, site.test))
    assert silent == len(words)


@pytest.mark.parametrize("content", ["", "unit,cycle,c0,c1,rul\n"])
def test_an_empty_table_is_named(tmp_path: Path, content: str) -> None:
    folder = write_toml(tmp_path, {})
    (folder / "data.csv").write_text(content)
    refused(folder, "data.csv", "empty" if not content else "holds no rows", "xport it again")


def test_one_empty_file_among_many_is_a_warning(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet(5), files="*.csv")
    (folder / "later.csv").write_text("unit,cycle,c0,c1,rul\n")
    notes = open_data(folder, folder / "state").notes
    assert [note.level for note in notes if "later.csv" in note.where] == ["warning"]


@pytest.mark.parametrize("name", ["d.csv", "d.parquet", "d.h5", "d.npz"])
def test_a_corrupt_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_toml(tmp_path, {"files": name})
    (folder / name).write_bytes(b"unit,cycle\n\xff\xfe\x00\x81 not what it says\n" * 50)
    refused(folder, name, "xport it again" if name != "d.csv" else "d.csv")


def test_a_truncated_parquet_is_named(tmp_path: Path) -> None:
    folder = write_toml(tmp_path, {"files": "d.parquet"})
    fleet(30).write_parquet(folder / "d.parquet")
    body = (folder / "d.parquet").read_bytes()
    (folder / "d.parquet").write_bytes(body[: len(body) // 2])
    refused(folder, "d.parquet", "cannot be read as parquet")


def test_columns_of_unequal_length_are_named(tmp_path: Path) -> None:
    folder = write_toml(tmp_path, {"files": "d.npz"})
    columns = {name: np.array(fleet(5)[name].to_list()) for name in fleet(5).columns}
    columns["c1"] = columns["c1"][:-3]
    np.savez(folder / "d.npz", **columns)
    refused(folder, "d.npz", "`c1`", "has 47", "`c0` has 50 rows")


def test_a_pickled_npz_is_refused_and_never_run(tmp_path: Path) -> None:
    folder = write_toml(tmp_path, {"files": "d.npz"})
    columns = {
        name: np.array(fleet(5)[name].to_list(), dtype=object if name == "unit" else None) for name in fleet(5).columns
    }
    np.savez(folder / "d.npz", **columns)
    refused(folder, "d.npz", "pickle")


def test_files_with_other_columns_or_kinds_name_both(tmp_path: Path) -> None:
    folder = write_toml(tmp_path, {"files": "*.parquet"}, {"failing": {"kind": "binary", "target": "failing"}})
    fleet(3).write_parquet(folder / "a.parquet")
    other = fleet(6).filter(pl.col("unit") >= "u003")
    other.drop("c1").write_parquet(folder / "b.parquet")
    refused(folder, "b.parquet", "no channel `c1`", f"{folder / 'a.parquet'} has it")
    other.with_columns(
        failing=pl.when(pl.col("failing") == 1).then(pl.lit("yes")).otherwise(pl.lit("no"))
    ).write_parquet(folder / "b.parquet")
    refused(folder, "b.parquet", "holds text, but numbers in", "a.parquet", "`failing`")


def test_an_unknown_suffix_lists_the_known(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet(5), files="*.xlsx")
    (folder / "d.xlsx").write_bytes(b"PK")
    refused(folder, "d.xlsx", "'.xlsx'", ".parquet", ".csv")


def test_a_group_in_training_and_test_files_is_refused(tmp_path: Path) -> None:
    folder = write_site(tmp_path, fleet(5), files="train.csv", test_files="test.csv")
    fleet(5).write_csv(folder / "train.csv")
    fleet(9).filter(pl.col("unit") >= "u004").write_csv(folder / "test.csv")
    refused(folder, "group u004 is in", "train.csv", "test.csv", "two names")


def test_a_file_matched_for_training_and_test_is_refused(tmp_path: Path) -> None:
    refused(
        write_site(tmp_path, fleet(5), files="*.csv", test_files="d*.csv"),
        "data.csv",
        "`data.files` and by `data.test_files`",
    )


def test_rows_without_group_or_order_name_the_line(tmp_path: Path) -> None:
    frame = fleet(5)
    hole = frame.with_columns(
        unit=pl.when(pl.int_range(pl.len()) == 6).then(None).otherwise(pl.col("unit")),
        cycle=pl.when(pl.int_range(pl.len()) == 9).then(None).otherwise(pl.col("cycle")),
    )
    refused(
        write_site(tmp_path, hole), "data.csv, line 8", "no group", "`unit`", "data.csv, line 11", "no order", "`cycle`"
    )


def test_timestamps_order_a_group(tmp_path: Path) -> None:
    frame = fleet(5).with_columns(cycle=pl.datetime(2024, 5, 1) + pl.duration(minutes=pl.col("cycle")))
    (tmp_path / "p").mkdir()
    text = write_site(tmp_path / "c", frame)
    binary = write_toml(tmp_path / "p", {"files": "d.parquet"})
    frame.write_parquet(binary / "d.parquet")
    one, two = open_data(text, text / "state"), open_data(binary, binary / "state")
    assert same(one, two)
    assert np.diff(one.train.order[:10]).tolist() == [60.0] * 9
