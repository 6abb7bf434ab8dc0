"""The file a new plant starts from, and the statistics in it: exact, consented, and never a row."""

import json
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.client.adaptation.wearing import RUN, plant
from tests.loopback import WatchedGrid, arrays_in, events_of, federate, trunk_of
from trunkline.errors import StorageError
from trunkline.flower.records import open_records, to_records
from trunkline.protocol.arrays import SCALER_ARRAYS, Arrays
from trunkline.protocol.messages import Inputs, Offer
from trunkline.release import RELEASE, read_release, write_release, write_tensors
from trunkline.server.releases.release import merge_scales, pool

SHORT = {**RUN, "rounds": 1}


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_pooled_statistics_are_those_of_all_rows_together(sizes: list[int], scale: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    parts = [scale * random.normal(random.normal(0, 3), 1 + random.random(), size) for size in sizes]
    told = [(len(part), part.mean() if len(part) else 0.0, part.var() if len(part) else 0.0) for part in parts]
    count, mean, variance = pool(*(np.array(one, dtype=float) for one in zip(*told, strict=True)))
    rows = np.concatenate(parts)
    assert count == len(rows)
    np.testing.assert_allclose([mean, variance], [rows.mean(), rows.var()], rtol=1e-9, atol=1e-9 * scale**2)


def told(
    site: str, centres: list[list[float]], channels: tuple[str, ...], mean: float, count: float = 100.0
) -> tuple[Offer, Arrays]:
    table = np.full((len(centres), len(channels)), 1.0)
    arrays = Arrays(
        dict(zip(SCALER_ARRAYS, (count * table, mean * table, table, np.array(centres), np.array([0.4])), strict=True))
    )
    inputs = Inputs(channels=channels, settings=("load",), window=8)
    return Offer(site=site, run="r", version="0", arrays=(), tasks=(), inputs=inputs), arrays


def test_regimes_meet_by_their_centres_and_channels_by_their_names() -> None:
    """A plant with one regime is one of another's two; a channel that only one of them has keeps its figures."""
    one = told("a", [[10.01]], ("p", "q"), 5.0)
    two = told("b", [[0.0], [10.0]], ("q", "r"), 7.0, count=300.0)
    (merged,) = merge_scales([one, two])
    assert merge_scales([two, one]) == (merged,)
    assert merged.channels == ("p", "q", "r")
    assert sorted(centre[0] for centre in merged.centres) == [0.0, 10.01]
    here = next(place for place, centre in enumerate(merged.centres) if centre[0] > 5)
    assert merged.count[here] == (100.0, 400.0, 300.0)
    assert merged.mean[here] == (5.0, 6.5, 7.0)
    assert merged.variance[here][1] == pytest.approx(1.0 + 0.25 * 1.5**2 + 0.75 * 0.5**2)
    assert merged.count[1 - here] == (0.0, 300.0, 300.0)


def test_a_run_releases_its_trunk_with_what_the_sites_agreed_to_lend(tmp_path: Path) -> None:
    allowing = [plant(tmp_path / f"p{seed}", 4, seed) for seed in (1, 2)]
    silent = plant(tmp_path / "p3", 4, 3, policy=("trunk", "stem", "heads"))
    grid = federate([*allowing, silent], tmp_path / "out", **SHORT)
    arrays, card = read_release(tmp_path / "out" / RELEASE)
    assert arrays.digest() == trunk_of(tmp_path / "out").digest()
    assert card.sites == ("plant-1", "plant-2", "plant-3")
    assert card.channels == ("c0", "c1", "c2")
    assert [task.task for task in card.tasks] == ["failing", "rul"]
    assert set(card.labels) == {"rul"}
    sent = {node: set(arrays_in(content)) for kind, node, content in grid.up if kind == "query"}
    assert [any(name.startswith("scaler.") for name in sent[node]) for node in sorted(sent)] == [True, True, False]
    assert any("plant-3 lends no scaler" in one.get("text", "") for one in events_of(tmp_path / "out"))
    for kind, _, content in grid.down + grid.up:
        if kind != "query":
            assert not any(name.startswith("scaler") for name in arrays_in(content))
    rows = np.concatenate(
        [np.loadtxt(folder / "train.csv", delimiter=",", skiprows=1, usecols=(2, 3, 4)) for folder in allowing]
    )
    training = sum(card.scales[0].count[0]) / 3
    assert 0.7 * len(rows) < training < 0.8 * len(rows)  # training machines of the two that allowed it, nobody else's
    np.testing.assert_allclose(card.scales[0].mean[0], rows.mean(axis=0), atol=0.3)


@pytest.mark.parametrize("lend", [["trunk"], ["trunk", "stem", "heads"]])
def test_nothing_of_the_scaler_travels_in_a_run_that_does_not_name_it(tmp_path: Path, lend: list[str]) -> None:
    folders = [plant(tmp_path / f"p{seed}", 3, seed) for seed in (1, 2)]
    grid = federate(folders, tmp_path / "out", **{**SHORT, "lend": lend, "strategy": {"name": "fedper"}})
    for _, _, content in grid.up:
        arrays, header, _ = open_records(content)
        assert not any(name.startswith("scaler") for name in arrays)
        assert ("c0" in header) <= ("stem" in lend)  # names go with a stem, which is of no use without them
    assert read_release(tmp_path / "out" / RELEASE)[1].scales == ()


def test_figures_of_few_values_stay_home(tmp_path: Path) -> None:
    """The mean of one value is that value."""
    from trunkline.client.data.site_data import open_data
    from trunkline.client.data.statistics import FEWEST, lent_statistics

    folder = plant(tmp_path / "p", 3, 1)
    text = (folder / "train.csv").read_text().splitlines()
    for place in range(1, len(text)):  # c0 speaks in the first three rows of each machine only
        cells = text[place].split(",")
        if int(cells[1]) >= 3:
            text[place] = ",".join([*cells[:2], "", *cells[3:]])
    (folder / "train.csv").write_text("\n".join(text))
    arrays = lent_statistics(open_data(folder, tmp_path / "state"))
    assert 0 < 2 * 3 < FEWEST
    assert arrays["scaler.count"][0].tolist() == [0.0, 80.0, 80.0]
    assert arrays["scaler.mean"][0, 0] == arrays["scaler.variance"][0, 0] == 0.0
    assert arrays["scaler.mean"][0, 1] != 0.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("scaler.mean", np.nan), ("scaler.variance", -1.0), ("scaler.secret", 1.0), ("scaler.count", np.zeros((2, 9)))],
)
def test_a_site_with_impossible_statistics_is_left_out_and_the_others_go_on(
    tmp_path: Path, name: str, value: object
) -> None:
    folders = [plant(tmp_path / f"p{seed}", 3, seed) for seed in (1, 2)]

    def lie(message: Message, honest: object) -> Message:
        reply: Message = honest()  # type: ignore[operator]
        if message.metadata.message_type != "query":
            return reply
        arrays, header, metrics = open_records(reply.content)
        bad = value if isinstance(value, np.ndarray) else np.full_like(arrays.get(name, np.zeros(3)), value)
        reply.content = to_records({**arrays, name: bad}, header, metrics)
        return reply

    grid = WatchedGrid(folders, tmp_path / "out")
    grid.tamper = {min(grid.get_node_ids()): lie}
    federate(folders, tmp_path / "out", grid=grid, **SHORT)
    assert read_release(tmp_path / "out" / RELEASE)[1].sites == ("plant-2",)
    notes = [one.get("text", "") for one in events_of(tmp_path / "out")]
    assert any("plant-1 does not take part" in text and "scaler" in text for text in notes)


def test_a_file_that_is_no_intact_trunk_says_what_it_is(tmp_path: Path) -> None:
    federate([plant(tmp_path / "p1", 3, 1)], tmp_path / "out", **SHORT)
    path = tmp_path / "out" / RELEASE
    arrays, card = read_release(path)
    whole = path.read_bytes()
    again = tmp_path / "again.safetensors"
    write_release(again, arrays, card)
    assert again.read_bytes() == whole
    with pytest.raises(StorageError, match="no such file"):
        read_release(tmp_path / "absent.safetensors")
    again.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match="damaged"):
        read_release(again)
    write_tensors(again, arrays, {"trunkline": json.dumps({"card": {"format": 99}, "names": list(arrays)})})
    with pytest.raises(StorageError, match=r"format 99.*reads 1 and 2"):
        read_release(again)
    write_tensors(again, {"weight": np.zeros(3, np.float32)}, {"made": "elsewhere"})
    with pytest.raises(StorageError, match="not a trunk of Trunkline"):
        read_release(again)
    part = arrays.only({name: 0 for name in arrays if name.startswith("trunk.")})
    write_release(again, part, card)
    with pytest.raises(StorageError, match="not the ones its card was written for"):
        read_release(again)
    write_release(again, arrays.only({name: 0 for name in arrays if name.startswith("stem")}), card)
    with pytest.raises(StorageError, match="no array of it belongs to a trunk"):
        read_release(again)
    first = next(iter(arrays))
    write_release(again, Arrays({**arrays, first: np.full_like(arrays[first], np.nan)}), card)
    with pytest.raises(StorageError, match="NaN"):
        read_release(again)
