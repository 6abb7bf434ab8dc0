"""A site's side: what it lends, keeps, and refuses, on real site folders of every size."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.typed_requests import as_kind, request_of
from trunkline.client.handlers import answer_offer, answer_score, answer_train, contract_of
from trunkline.client.site import Site, open_site
from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.client.training.loop import train_site
from trunkline.errors import StorageError
from trunkline.models.trunk import first_trunk
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import ScoreRequest
from trunkline.protocol.plan import LocalPlan, TrunkSpec

SPEC = TrunkSpec(width=8)


def write_site(
    folder: Path, *, groups: int, length: int, channels: int, window: int, missing: float, seed: int = 0
) -> Path:
    """A plant with a learnable label; every `missing` share of its cells is empty."""
    rng = np.random.default_rng(seed)
    rows = groups * length
    wear = np.tile(np.linspace(0, 1, length), groups)
    columns = {
        "unit": np.repeat(np.arange(groups), length),
        "t": np.tile(np.arange(length), groups),
        "rul": (1 - wear) * length,
    }
    for channel in range(channels):
        column = wear * rng.normal() + rng.normal(size=rows) * 0.3
        column[rng.random(rows) < missing] = np.nan
        columns[f"c{channel}"] = column
    folder.mkdir(parents=True)
    pl.DataFrame(columns).write_parquet(folder / "log.parquet")
    names = ", ".join(f'"c{channel}"' for channel in range(channels))
    (folder / "site.toml").write_text(
        f'name = "plant"\n[data]\nfiles = "log.parquet"\ngroup = "unit"\norder = "t"\nchannels = [{names}]\nwindow = {window}\n'
        '[data.clean]\nmissing = "keep"\n[tasks.rul]\nkind = "regression"\ntarget = "rul"\nunit = "h"\n'
    )
    return folder


def order_of(round: int, rounds: int = 2, **changes: object) -> Any:
    return request_of(
        round, run="r", seed=1, rounds=rounds, trunk=SPEC, plan=LocalPlan(steps=2, batch_size=16), lend=("trunk",)
    ).model_copy(update=changes)


def live_a_life(site: Site) -> None:
    trunk = first_trunk(SPEC, 1)
    offer, first = answer_offer(site, order_of(0))
    assert [spec.name for spec in offer.arrays] == list(trunk)
    assert not first
    for round in (1, 2):
        _, entry = answer_train(site, order_of(round), trunk)
        assert list(entry.delta) == list(trunk)
        assert all(np.isfinite(array).all() for array in entry.delta.values())
        assert entry.weight == len(site.data.train)
        trunk = Arrays({name: array + entry.delta[name] for name, array in trunk.items()})
    card = answer_score(site, as_kind(ScoreRequest, order_of(3)), trunk)
    (row,) = card.rows
    assert row.federated is not None
    assert row.local is not None
    assert row.n_test == len(site.data.test)


@given(
    groups=st.sampled_from([3, 4, 11]), length=st.integers(16, 40), channels=st.sampled_from([1, 2, 17, 200]),
    window=st.sampled_from([1, 2, 7, 64]), missing=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plants_of_any_shape_live_through_a_run(
    tmp_path_factory: pytest.TempPathFactory, groups: int, length: int, channels: int, window: int, missing: float
) -> None:
    torch.set_num_threads(1)
    folder = write_site(
        tmp_path_factory.mktemp("any") / "plant",
        groups=groups,
        length=length,
        channels=channels,
        window=window,
        missing=missing,
    )
    live_a_life(open_site({"site": str(folder), "state": str(folder.parent / "state")}))


def test_a_plant_with_3000_groups_lives_through_a_run(tmp_path: Path) -> None:
    folder = write_site(tmp_path / "plant", groups=3000, length=6, channels=2, window=4, missing=0.1)
    live_a_life(open_site({"site": str(folder), "state": str(tmp_path / "state")}))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = write_site(
        tmp_path_factory.mktemp("one") / "plant", groups=12, length=30, channels=3, window=8, missing=0.1
    )
    return open_site({"site": str(folder), "state": str(folder.parent / "state")})


def test_resident_windows_are_the_lazy_windows(site: Site) -> None:
    samples = site.data.train
    index = np.array([0, 1, 5, len(samples) - 1])
    x, _ = DeviceDataset.of(samples, torch.device("cpu")).batch(torch.from_numpy(index))
    rows = np.maximum(samples.ends[index][:, None] + np.arange(-7, 1), samples.first[index][:, None])
    np.testing.assert_array_equal(x.numpy(), samples.values[rows].swapaxes(1, 2))


def test_a_phase_moves_its_own_parts_only(site: Site) -> None:
    from trunkline.protocol.plan import Phase

    model = site.model(order_of(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = LocalPlan(steps=3, batch_size=16, phases=(Phase(parts=("heads",)),))
    train_site(model, site.resident("train"), site.data.tasks, plan, seed=1, done=0, rounds=2)
    moved = {name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"heads"}


def test_training_is_the_same_to_the_bit_whatever_ran_before(site: Site) -> None:
    digests = set()
    for noise in range(2):
        torch.manual_seed(noise)
        torch.rand(noise * 7)
        model = site.model(order_of(1))
        train_site(
            model, site.resident("train"), site.data.tasks, LocalPlan(steps=3, batch_size=16), seed=4, done=0, rounds=2
        )
        digests.add(model.share(("trunk", "stem", "heads")).digest())
    assert len(digests) == 1


def test_a_strong_pull_keeps_the_trunk_near_what_arrived(site: Site) -> None:
    def distance(proximal: float) -> float:
        model = site.model(order_of(1))
        start = model.share()
        plan = LocalPlan(steps=20, batch_size=16, proximal=proximal)
        train_site(model, site.resident("train"), site.data.tasks, plan, seed=4, done=0, rounds=2)
        return sum(float(np.square(array - start[name]).sum()) for name, array in model.share().items())

    assert distance(100.0) < 0.5 * distance(0.0)


def test_early_stopping_keeps_the_best_round_and_spares_the_rest(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation losses 5, 1, 9, 9, 9, ...: round 3's start is the best, and after two worse ones the twin rests."""
    from trunkline.client import handlers as rounds
    from trunkline.client.model_selection.evaluation import Curve

    trained: list[int] = []
    losses = {2: 5.0, 3: 1.0}
    now = [0]
    monkeypatch.setattr(rounds, "curve", lambda model, data, tasks: Curve(losses.get(now[0], 9.0), {}))
    honest = rounds.train_site

    def counted(model: object, *args: object, **kwargs: object) -> float:
        trained.append(now[0])
        return honest(model, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(rounds, "train_site", counted)
    lone = Site(site.folder, tmp_path, site.data)
    plan = LocalPlan(steps=1, batch_size=16, patience_rounds=2)
    twin_at: dict[int, bytes] = {}
    for round in range(1, 8):
        now[0] = round
        _, entry = answer_train(lone, order_of(round, 8, plan=plan), first_trunk(SPEC, 1))
        twin_at[round] = b"".join(entry.local[name].tobytes() for name in sorted(entry.local))
    assert [trained.count(round) for round in range(1, 8)] == [2, 2, 2, 2, 1, 1, 1]
    assert entry.best_round == {"federated": 2, "local": 2}
    best = b"".join(entry.best["local"][name].tobytes() for name in sorted(entry.best["local"]))
    assert best == twin_at[2]


def test_a_full_disk_at_the_plant_sends_nothing(site: Site, tmp_path: Path) -> None:
    from trunkline.errors import StorageError

    (tmp_path / "state").write_text("a file where the folder should be")
    lone = Site(site.folder, tmp_path / "state", site.data)
    with pytest.raises(StorageError, match="could not be written"):
        answer_train(lone, order_of(1), first_trunk(SPEC, 1))


def test_a_private_rate_of_zero_moves_the_trunk_alone(site: Site) -> None:
    model = site.model(order_of(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = LocalPlan(steps=3, batch_size=16, private_rate=0.0)
    train_site(model, site.resident("train"), site.data.tasks, plan, seed=1, done=0, rounds=2)
    assert {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    } == {"trunk", "norms"}


@pytest.mark.parametrize("damaged", [(3,), (1,), (1, 2, 3)], ids=str)
def test_versions_that_are_damaged_are_trained_again_and_the_next_round_is_the_same(
    site: Site, tmp_path: Path, damaged: tuple[int, ...]
) -> None:
    """A plant's last rounds may be damaged once they are counted: what follows must not start from older stem and heads."""
    plant, same = (Site(site.folder, tmp_path / name, site.data, plant=True) for name in ("plant", "same"))
    trunk = first_trunk(SPEC, 1)
    for one in (plant, same):
        answer_offer(one, order_of(0, 6))
    for round in range(1, max(damaged) + 2):
        for file in plant.state.glob("vault/*/round-*") if round == max(damaged) + 1 else ():
            if int(file.stem[-6:]) in damaged:
                data = bytearray(file.read_bytes())
                data[len(data) // 2] ^= 1
                file.write_bytes(data)
        entries = []
        for one in (plant, same):
            request = order_of(round, 6)
            request = request.model_copy(update={"contract": contract_of(one, trunk).digest()})
            entries.append(answer_train(one, request, trunk)[1])
        assert entries[0].delta.digest() == entries[1].delta.digest(), round
        for name, array in entries[1].private.items():
            np.testing.assert_array_equal(entries[0].private[name], array)
        trunk = Arrays({name: array + entries[1].delta[name] for name, array in trunk.items()})


def test_where_what_was_asked_is_damaged_too_the_plant_says_so_and_goes_back(site: Site, tmp_path: Path) -> None:
    plant = Site(site.folder, tmp_path / "plant", site.data, plant=True)
    trunk = first_trunk(SPEC, 1)
    answer_offer(plant, order_of(0, 6))
    request = order_of(1, 6).model_copy(update={"contract": contract_of(plant, trunk).digest()})
    answer_train(plant, request, trunk)
    for file in plant.state.glob("vault/*/**/round-*"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StorageError, match="none of its 1 versions is intact"):
        answer_train(plant, request.model_copy(update={"round": 2}), trunk)
