"""C-MAPSS plants: no engine twice, and labels equal to what a slow reading of the raw files says."""

from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from trunkline.config.site import read_site
from trunkline.errors import ConfigError, DataError
from trunkline.simulations.factories import write_sites
from trunkline.simulations.factories.cmapss import CHANNELS, FLEETS, SENSORS, SETTINGS

SMALL = {"FD001": (9, 3), "FD002": (11, 4), "FD003": (8, 2), "FD004": (10, 3)}  # engines in train and test


def raw(fleet: str, part: str) -> list[list[float]]:
    """A tiny fleet as NASA prints it: engine, cycle, 3 settings, 21 sensors."""
    rng = np.random.default_rng([int(fleet[-1]), part == "test"])
    rows: list[list[float]] = []
    for unit in range(1, SMALL[fleet][part == "test"] + 1):
        life = int(rng.integers(20, 220))
        rows += [[unit, cycle, *np.round(rng.normal(0, 1, 24), 4)] for cycle in range(1, life + 1)]
    return rows


def write_raw(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for fleet in FLEETS:
        for part in ("train", "test"):
            lines = (" ".join(f"{value:g}" for value in row) + "  \n" for row in raw(fleet, part))  # NASA's own blanks
            (folder / f"{part}_{fleet}.txt").write_text("".join(lines))
        left = np.random.default_rng(int(fleet[-1])).integers(5, 150, SMALL[fleet][1])
        (folder / f"RUL_{fleet}.txt").write_text("".join(f"{value} \n" for value in left))
    return folder


@pytest.fixture
def nasa(tmp_path: Path) -> Path:
    return write_raw(tmp_path / "nasa" / "cmapss")


def engines(site: Path, part: str) -> set[str]:
    return set(pl.read_parquet(site / f"{part}.parquet")["unit"])


def stage(rul: float) -> str:
    return "healthy" if rul > 125 else "worn" if rul >= 50 else "critical"


def oracle(rows: list[list[float]], fleet: str, part: str, left: list[int]) -> list[tuple[str, int, int, int, str]]:
    """(unit, cycle, rul, failing, stage) of every row, one engine and one row at a time."""
    expected = []
    for unit in range(1, int(rows[-1][0]) + 1):
        own = [row for row in rows if row[0] == unit]
        after = left[unit - 1] if part == "test" else 0
        for place, row in enumerate(own):
            rul = len(own) - 1 - place + after
            name = f"{fleet.lower()}-{part}-{unit:03d}"
            expected.append((name, int(row[1]), rul, int(rul <= 30), stage(rul)))
    return expected


def test_labels_of_every_row_equal_the_slow_oracle(nasa: Path, tmp_path: Path) -> None:
    for site, fleet in zip(write_sites("cmapss", tmp_path / "out", data=nasa), FLEETS, strict=True):
        left = [int(line) for line in (nasa / f"RUL_{fleet}.txt").read_text().split()]
        for part in ("train", "test"):
            table = pl.read_parquet(site / f"{part}.parquet")
            found = table.select("unit", "cycle", "rul", "failing", "stage").rows()
            assert found == oracle(raw(fleet, part), fleet, part, left)
            assert np.allclose(table.select(*SETTINGS, *SENSORS).to_numpy(), np.array(raw(fleet, part))[:, 2:])


def test_text_and_parquet_sources_give_equal_bytes(nasa: Path, tmp_path: Path) -> None:
    columns = ["unit", "cycle", *SETTINGS, *SENSORS]
    other = tmp_path / "parquet"
    other.mkdir()
    for fleet in FLEETS:
        (other / f"RUL_{fleet}.txt").write_bytes((nasa / f"RUL_{fleet}.txt").read_bytes())
        for part in ("train", "test"):
            table = pl.DataFrame(np.array(raw(fleet, part)), schema=columns, orient="row")
            table.sample(fraction=1.0, shuffle=True, seed=0).write_parquet(other / f"{part}_{fleet}.parquet")
    one = write_sites("cmapss", tmp_path / "one", data=nasa.parent)  # the folder above `cmapss` will do
    two = write_sites("cmapss", tmp_path / "two", data=other)
    for left, right in zip(one, two, strict=True):
        assert (left / "SHA256SUMS").read_bytes() == (right / "SHA256SUMS").read_bytes()


@pytest.mark.parametrize(("plants", "groups"), [(4, None), (8, None), (12, 2), (16, None), (8, 3)])
def test_no_engine_is_in_two_plants_or_on_both_sides(
    nasa: Path, tmp_path: Path, plants: int, groups: int | None
) -> None:
    sites = write_sites("cmapss", tmp_path / "out", data=nasa, plants=plants, groups=groups)
    assert len(sites) == plants
    trained = {site: engines(site, "train") for site in sites}
    for left, right in combinations(sites, 2):
        assert not trained[left] & trained[right]
    for site in sites:
        fleet = site.name[:5].upper()
        assert engines(site, "test") == {f"{site.name[:5]}-test-{unit:03d}" for unit in range(1, SMALL[fleet][1] + 1)}
        assert not trained[site] & set().union(*(engines(other, "test") for other in sites))
        assert groups is None or len(trained[site]) == groups
    if groups is None:
        for fleet in FLEETS:
            own = [len(trained[site]) for site in sites if site.name.startswith(fleet.lower())]
            assert sum(own) == SMALL[fleet][0]
            assert max(own) - min(own) <= 1


def test_names_are_the_fleet_and_a_letter(nasa: Path, tmp_path: Path) -> None:
    names = [site.name for site in write_sites("cmapss", tmp_path / "4", data=nasa)]
    assert names == ["fd001", "fd002", "fd003", "fd004"]
    names = [site.name for site in write_sites("cmapss", tmp_path / "8", data=nasa, plants=8)]
    assert names == [f"fd00{fleet}-{letter}" for fleet in range(1, 5) for letter in "ab"]


def test_the_same_seed_deals_the_same_and_another_seed_does_not(nasa: Path, tmp_path: Path) -> None:
    def sums(out: str, seed: int) -> list[bytes]:
        sites = write_sites("cmapss", tmp_path / out, data=nasa, plants=8, groups=3, seed=seed)
        return [(site / "SHA256SUMS").read_bytes() for site in sites]

    assert sums("one", 1) == sums("two", 1)
    assert sums("one-again", 1) != sums("three", 2)


def test_fewer_engines_are_a_part_of_more_engines(nasa: Path, tmp_path: Path) -> None:
    few, more = (write_sites("cmapss", tmp_path / str(k), data=nasa, groups=k) for k in (2, 5))
    for left, right in zip(few, more, strict=True):
        assert engines(left, "train") < engines(right, "train")


def test_every_site_reads_as_a_site_with_the_usual_protocol(nasa: Path, tmp_path: Path) -> None:
    for site in write_sites("cmapss", tmp_path / "out", data=nasa):
        config = read_site(site)
        assert config.name == site.name
        assert (config.data.window, config.data.test_at, config.data.regime) == (64, "last", SETTINGS)
        assert config.data.channels == CHANNELS
        assert list(config.tasks) == ["rul", "failing", "stage"]
        assert config.tasks["rul"].cap == 125
        columns = pl.read_parquet_schema(site / config.data.files)
        assert {*config.data.channels, *config.data.regime, "unit", "cycle"} <= set(columns)
        assert {task.target for task in config.tasks.values()} <= set(columns)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"plants": 6}, "multiple of 4"),
        ({"plants": 0}, "multiple of 4"),
        ({"plants": 20}, "at most 16 plants"),
        ({"groups": 1}, "Ask for 2 to 9"),
        ({"groups": 10}, "a plant of FD001 owns 9 training engines"),
        ({"plants": 8, "groups": 5}, "owns 4 training engines"),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_what_can(
    nasa: Path, tmp_path: Path, wish: dict[str, int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        write_sites("cmapss", tmp_path / "out", data=nasa, **wish)
    assert not (tmp_path / "out").exists()


def test_absent_and_damaged_files_are_named(nasa: Path, tmp_path: Path) -> None:
    def refusal(data: Path | None) -> str:
        with pytest.raises(DataError) as refused:
            write_sites("cmapss", tmp_path / "out", data=data)
        return str(refused.value)

    assert "NASA Prognostics Data Repository" in refusal(None)
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "train_FD001.txt" in refusal(tmp_path)
    (nasa / "RUL_FD003.txt").write_text("12\n")
    assert "1 engines; test_FD003 has 2" in refusal(nasa)
    (nasa / "RUL_FD003.txt").write_text("twelve\n13\n")
    assert "RUL_FD003.txt" in refusal(nasa)
    (nasa / "RUL_FD003.txt").unlink()
    assert "RUL_FD003.txt: no such file" in refusal(nasa)
    (nasa / "test_FD002.txt").write_text("1 2 3\n")
    assert "test_FD002.txt: not a C-MAPSS table (3 columns, expected 26)" in refusal(nasa)
    (nasa / "test_FD002.txt").unlink()
    assert "test_FD002.txt: no such file" in refusal(nasa)
    (nasa / "train_FD001.parquet").write_bytes(b"PAR1 cut short")
    assert "train_FD001.parquet: not a C-MAPSS table" in refusal(nasa)
    assert not (tmp_path / "out").exists()


@pytest.mark.realdata
def test_the_real_fleets_have_the_documented_engines_and_labels(real_data: Path, tmp_path: Path) -> None:
    documented = {"FD001": (100, 100), "FD002": (260, 259), "FD003": (100, 100), "FD004": (249, 248)}
    source = real_data / "cmapss"
    for site, fleet in zip(write_sites("cmapss", tmp_path / "out", data=real_data), FLEETS, strict=True):
        assert (len(engines(site, "train")), len(engines(site, "test"))) == documented[fleet]
        left = [int(line) for line in (source / f"RUL_{fleet}.txt").read_text().split()]
        test = pl.read_parquet(site / "test.parquet")
        assert test.group_by("unit", maintain_order=True).last()["rul"].to_list() == left
        train = pl.read_parquet(site / "train.parquet")
        assert train.group_by("unit").last()["rul"].unique().to_list() == [0]
        for part, table in (("train", train), ("test", test)):
            rows = pl.read_parquet(source / f"{part}_{fleet}.parquet")
            for unit in (1, 17, 100):
                own = rows.filter(pl.col("unit") == unit).select("unit", "cycle").rows()
                after = left[unit - 1] if part == "test" else 0
                last = max(cycle for _, cycle in own)
                expected = [(cycle, last - cycle + after) for _, cycle in own]
                name = f"{fleet.lower()}-{part}-{unit:03d}"
                found = table.filter(pl.col("unit") == name).sort("cycle")
                assert found.select("cycle", "rul").rows() == expected
                assert found["failing"].to_list() == [int(rul <= 30) for _, rul in expected]
                assert found["stage"].to_list() == [stage(rul) for _, rul in expected]


@pytest.mark.realdata
def test_sixteen_plants_of_ten_engines_as_the_benchmark_wants_them(real_data: Path, tmp_path: Path) -> None:
    sites = write_sites("cmapss", tmp_path / "out", data=real_data / "cmapss", plants=16, groups=10)
    owned = [engines(site, "train") for site in sites]
    assert [len(units) for units in owned] == [10] * 16
    assert len(set().union(*owned)) == 160
    assert {len(engines(site, "test")) for site in sites} == {100, 259, 248}
