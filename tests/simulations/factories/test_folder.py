"""Site folders: whole or absent, the same bytes each time, and nobody else's files touched."""

import hashlib
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trunkline.errors import ConfigError, StorageError
from trunkline.simulations.factories import folder as folders
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.folder import SUMS, Plant, toml, write_plants


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def plants(**files: dict[str, bytes]) -> list[Plant]:
    return [Plant(name, lambda held=held: held) for name, held in files.items()]


def test_rewriting_the_same_set_changes_no_byte_and_keeps_the_sites_state(tmp_path: Path) -> None:
    write_plants(tmp_path, plants(a={"site.toml": b"1", "deep/rows.csv": b"2"}))
    before = content(tmp_path)
    (tmp_path / "a" / ".trunkline").mkdir()
    (tmp_path / "a" / ".trunkline" / "split.json").write_bytes(b"{}")
    write_plants(tmp_path, plants(a={"site.toml": b"1", "deep/rows.csv": b"2"}))
    assert content(tmp_path) == {**before, "a/.trunkline/split.json": b"{}"}


def test_an_older_set_of_ours_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_plants(tmp_path, plants(a={"site.toml": b"1", "old.csv": b"2"}))
    write_plants(tmp_path, plants(a={"site.toml": b"3", "new.csv": b"4"}))
    assert sorted(content(tmp_path / "a")) == sorted([SUMS, "new.csv", "site.toml"])
    for line in (tmp_path / "a" / SUMS).read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("foreign", "named"),
    [
        ("notes.txt", "notes.txt"),
        ("b/site.toml", "'b'"),
        ("a/mine.csv", "mine.csv"),
        ("a/site.toml", "an edited 'site.toml'"),
    ],
)
def test_a_foreign_or_edited_file_is_refused_and_kept(tmp_path: Path, foreign: str, named: str) -> None:
    write_plants(tmp_path, plants(a={"site.toml": b"1"}))
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_bytes(b"by hand")
    before = content(tmp_path)
    with pytest.raises(ConfigError, match="--out") as refused:
        write_plants(tmp_path, plants(a={"site.toml": b"2"}))
    assert named in str(refused.value)
    assert content(tmp_path) == before


def test_a_real_plants_folder_of_the_same_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "press-01").mkdir()
    (tmp_path / "press-01" / "site.toml").write_text('name = "press-01"')
    with pytest.raises(ConfigError, match=r"'site\.toml' without SHA256SUMS"):
        write_sites("synthetic", tmp_path, groups=2)
    assert content(tmp_path) == {"press-01/site.toml": b'name = "press-01"'}


def test_a_site_that_has_trained_does_not_get_other_data_under_it(tmp_path: Path) -> None:
    write_plants(tmp_path, plants(a={"site.toml": b"1"}))
    (tmp_path / "a" / ".trunkline").mkdir()
    with pytest.raises(ConfigError, match="has trained already"):
        write_plants(tmp_path, plants(a={"site.toml": b"2"}))
    assert (tmp_path / "a" / "site.toml").read_bytes() == b"1"


def test_out_may_not_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        write_plants(tmp_path / "out", plants(a={"site.toml": b"1"}))


def test_a_disk_that_fails_midway_leaves_whole_sites_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plants(tmp_path, plants(a={"site.toml": b"1", "rows.csv": b"1"}))
    real = folders.write_atomic

    def full(path: Path, data: bytes, mode: int = 0o600) -> None:
        if path.name == "rows.csv" and data == b"2":
            raise StorageError("disk full")
        real(path, data, mode)

    later = plants(a={"site.toml": b"2", "rows.csv": b"2"}, b={"site.toml": b"2", "rows.csv": b"2"})
    monkeypatch.setattr(folders, "write_atomic", full)
    with pytest.raises(StorageError):
        write_plants(tmp_path, later)
    assert (tmp_path / "a" / "site.toml").read_bytes() == b"1"
    assert not (tmp_path / "b").exists()
    monkeypatch.undo()
    write_plants(tmp_path, later)  # what was left aside is in nobody's way
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a" / "rows.csv").read_bytes() == b"2"


def test_an_unknown_set_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown data set 'sinthetic'; did you mean 'synthetic'\?.*cmapss, .*synthetic"
    ):
        write_sites("sinthetic", tmp_path)


scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", exclude_characters="\x7f")),
)
keys = st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True)


@given(
    st.recursive(
        st.dictionaries(keys, st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=4),
        lambda inner: st.dictionaries(keys, st.one_of(scalars, inner), max_size=3),
        max_leaves=8,
    )
)
def test_what_is_written_as_toml_reads_back_equal(table: dict[str, object]) -> None:
    assert tomllib.loads(toml(table, "about\nthis").decode()) == table
