"""A new plant: what it may start from, how it chooses, and that it never loses by it."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import nn

from tests.client.adaptation.wearing import RUN, machines, plant, write_plant
from tests.client.data.sites import fleet, write_site
from tests.loopback import federate
from trunkline.client.adaptation import adapt as adapt_module
from trunkline.client.adaptation import evidence
from trunkline.client.adaptation.adapt import BLENDS, Adapted, CandidateBuilder, adapt, adapt_data
from trunkline.client.adaptation.model_file import MODEL, read_model
from trunkline.client.adaptation.probe import ridge
from trunkline.client.data.preprocess.shrinkage import PooledPrior
from trunkline.client.data.site_data import open_data, open_newcomer
from trunkline.client.training.device_dataset import DeviceDataset, device
from trunkline.client.training.loop import outputs_of
from trunkline.errors import DataError, StorageError, TrustError
from trunkline.models.trunk import TrunkModel, first_trunk
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.plan import TrunkSpec
from trunkline.release import RELEASE, Card, PooledScale, read_release

pytestmark = pytest.mark.xdist_group("adapt")  # one worker: the release is trained once


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the steps: these plants are small, and what is tested holds at any number."""
    for name in ("TUNE", "FULL", "LEARN", "SCRATCH", "LOW_RANK"):
        plan = getattr(adapt_module, name)
        monkeypatch.setattr(adapt_module, name, plan.model_copy(update={"steps": plan.steps // 8, "batch_size": 32}))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trunk of three plants of ten machines each, everything lent."""
    folder = tmp_path_factory.mktemp("release")
    federate([plant(folder / f"p{seed}", 10, seed) for seed in (1, 2, 3)], folder / "out", **RUN)
    return folder / "out" / RELEASE


@pytest.fixture(scope="module")
def read(release: Path) -> tuple[Arrays, Card]:
    return read_release(release)


def rmse(adapted: Adapted, model: TrunkModel) -> float:
    test, task = adapted.site.test, adapted.workshop.tasks["rul"]
    output = outputs_of(model, DeviceDataset.of(test, device()), {"rul": task})["rul"]
    found = task.score(task.predict(output), test.labels["rul"])
    assert found is not None
    return found


def same(one: TrunkModel, other: TrunkModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


# --- what a release is worth at a site -------------------------------------------------------------------------


def test_as_is_is_the_released_model_to_the_bit(tmp_path: Path, read: tuple[Arrays, Card]) -> None:
    arrays, card = read
    shop = CandidateBuilder(open_newcomer(plant(tmp_path / "n", 3, 9), None, card.scales), arrays, card)
    assert shop.fit.as_is
    assert not shop.fit.notes
    assert shop.as_is(shop.labelled).share(("trunk", "stem", "heads")).digest() == arrays.digest()
    assert shop.tasks["rul"].state()["mean"] == card.labels["rul"].mean  # it speaks in the release's unit


def test_other_sensors_or_units_are_said_and_only_what_fits_is_taken(tmp_path: Path, read: tuple[Arrays, Card]) -> None:
    arrays, card = read
    folder = plant(tmp_path / "n", 4, 9, channels=("c1", "c0", "c2"), unit="hours")
    shop = CandidateBuilder(open_newcomer(folder, None, card.scales), arrays, card)
    assert not shop.fit.stem
    assert shop.fit.heads == ("failing",)
    assert any("reads other channels: c0, c1, c2" in note for note in shop.fit.notes)
    assert any("'rul' is of another kind, unit" in note for note in shop.fit.notes)
    trunk = {name: array for name, array in arrays.items() if name.startswith("trunk.")}
    assert shop.released().share().digest() == Arrays(trunk).digest()
    frozen = shop.make("probe", shop.labelled)
    assert frozen.share().digest() == Arrays(trunk).digest()  # a stem is learnt below it, the trunk stays
    assert shop.choose().name in ("probe", "lp_ft", "lora", "full", "scratch")


def test_one_machine_is_enough_and_the_test_rows_are_those_of_a_member(
    tmp_path: Path, read: tuple[Arrays, Card]
) -> None:
    arrays, card = read
    one = adapt_data(open_newcomer(plant(tmp_path / "one", 1, 9), None, card.scales), arrays, card)
    assert (one.choice.name, one.choice.share) == ("interpolated", pytest.approx(1 / 11))
    folder = plant(tmp_path / "many", 8, 9)
    text = (folder / "site.toml").read_text().replace('test_files = "test.csv"\n', "")
    (folder / "site.toml").write_text(text)
    member, newcomer = open_data(folder, tmp_path / "state"), open_newcomer(folder, None, card.scales)
    names = [{data.test.group_names[group] for group in data.test.groups} for data in (member, newcomer)]
    assert names[0] == names[1]
    assert len(newcomer.validation) == 0
    assert len(newcomer.train) == len(member.train) + len(member.validation)


def test_no_label_at_all_is_named(tmp_path: Path, read: tuple[Arrays, Card]) -> None:

    arrays, card = read
    train = machines(3, 9).with_columns(rul=pl.lit(None), failing=pl.lit(None))
    folder = write_plant(tmp_path / "n", train, machines(3, 10, name="t"), name="silent")
    with pytest.raises(DataError, match=r"label"):
        adapt_data(open_newcomer(folder, None, card.scales), arrays, card)


# --- candidates ------------------------------------------------------------------------------------------------


def test_interpolating_goes_from_the_release_to_the_fine_tuned_model(tmp_path: Path, read: tuple[Arrays, Card]) -> None:
    arrays, card = read
    shop = CandidateBuilder(open_newcomer(plant(tmp_path / "n", 3, 9), None, card.scales), arrays, card)
    tuned = shop.make("full", shop.labelled)
    assert same(shop.blend(tuned, 0.0), shop.released())
    assert same(shop.blend(tuned, 1.0), tuned)
    half = shop.blend(tuned, 0.5).share()
    for name, array in shop.released().share().items():
        np.testing.assert_allclose(half[name], (array + tuned.share()[name]) / 2, atol=1e-6)


def test_a_probe_moves_the_heads_and_nothing_else(tmp_path: Path, read: tuple[Arrays, Card]) -> None:
    arrays, card = read
    shop = CandidateBuilder(open_newcomer(plant(tmp_path / "n", 3, 9), None, card.scales), arrays, card)
    probed = shop.make("probe", shop.labelled).share(("trunk", "stem", "heads"))
    moved = {name for name in arrays if not np.array_equal(arrays[name], probed[name])}
    assert moved == {name for name in arrays if name.startswith("head.")}


@pytest.mark.parametrize("pull", [1e-6, 0.3, 1e6])
def test_ridge_is_the_minimum_that_a_slow_descent_finds(pull: float) -> None:
    random = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 3, generator=random), torch.randn(40, generator=random)
    head = nn.Linear(3, 1)
    start = torch.cat([head.weight[0], head.bias]).detach().double()
    ridge(head, x, torch.where(torch.arange(40) == 7, torch.nan, y), pull, released=True)
    solved = torch.cat([head.weight[0], head.bias]).detach().double()
    keep = torch.arange(40) != 7
    wide = torch.cat([x, torch.ones(40, 1)], dim=1)[keep].double()
    strength = pull * float(wide[:, :3].square().mean())
    w = start.clone().requires_grad_(True)
    solver = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = (wide @ w - y[keep].double()).square().mean() + strength * (w - start).square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    torch.testing.assert_close(solved, w.detach(), atol=1e-4, rtol=1e-4)


# --- the choice ------------------------------------------------------------------------------------------------


def test_what_is_not_labelled_and_what_is_tested_change_nothing(tmp_path: Path, read: tuple[Arrays, Card]) -> None:
    """The same model, to the bit, whatever the labels of other groups and of test rows are."""

    arrays, card = read
    train, test = machines(6, 9), machines(3, 10, name="t")
    honest = adapt_data(
        open_newcomer(write_plant(tmp_path / "a", train, test, name="n"), None, card.scales), arrays, card, labelled=3
    )
    kept = {honest.site.train.group_names[group] for group in honest.workshop.labelled}
    assert len(kept) == 3
    wrong = pl.when(pl.col("unit").is_in(kept)).then(pl.col("rul")).otherwise(pl.col("rul") + 7.0)
    folder = write_plant(
        tmp_path / "b", train.with_columns(rul=wrong), test.with_columns(rul=pl.col("rul") * 3.0), name="n"
    )
    data = open_newcomer(folder, None, card.scales)
    tricked = adapt_data(data, arrays, card, labelled=3)
    assert tricked.choice.label == honest.choice.label
    assert same(tricked.model, honest.model)


def test_never_worse_than_the_release_as_it_is(tmp_path: Path, read: tuple[Arrays, Card]) -> None:
    """Over draws and numbers of labels, on plants that are like the others and on plants that are not."""
    arrays, card = read
    for strange in (0.0, 1.5):
        data = open_newcomer(plant(tmp_path / f"n{strange}", 6, 21, strange=strange), None, card.scales)
        for labelled in (1, 4):
            found = [adapt_data(data, arrays, card, labelled=labelled, draw=draw) for draw in range(2)]
            as_is = np.mean([rmse(one, one.workshop.as_is(one.workshop.labelled)) for one in found])
            assert np.mean([rmse(one, one.model) for one in found]) <= 1.03 * as_is


def test_a_release_that_misleads_is_left(tmp_path: Path, read: tuple[Arrays, Card]) -> None:
    """Heads that say the opposite: with labels to see it by, something else is taken, and it is much better."""
    arrays, card = read
    turned = Arrays({name: -array if name.startswith("head.") else array for name, array in arrays.items()})
    data = open_newcomer(plant(tmp_path / "n", 8, 9), None, card.scales)
    adapted = adapt_data(data, turned, card)
    as_is = adapted.workshop.as_is(adapted.workshop.labelled)
    assert adapted.choice.name != "as_is"
    assert rmse(adapted, adapted.model) < 0.5 * rmse(adapted, as_is)
    assert len(adapted.choice.losses) >= 4 + len(BLENDS)


def test_with_few_labels_the_release_beats_training_from_scratch(tmp_path: Path, release: Path) -> None:
    adapted = adapt(plant(tmp_path / "n", 2, 9), release)
    scratch = adapted.workshop.make("scratch", adapted.workshop.labelled)
    assert rmse(adapted, adapted.model) < 0.9 * rmse(adapted, scratch)


# --- scaling ---------------------------------------------------------------------------------------------------

POOLED = PooledScale(
    settings=(), widths=(), centres=((),), channels=("p",), count=((1000.0,),), mean=((10.0,),), variance=((4.0,),)
)


def lean(groups: float, mean: float = 11.0, std: float = 1.0, channel: str = "p") -> tuple[float, float]:
    prior = PooledPrior(POOLED, np.zeros(1, np.int64), np.array([groups]))
    middle, spread = prior.shrink(channel, np.array([50]), np.array([mean]), np.array([std]))
    return float(middle[0]), float(spread[0])


def test_few_groups_lean_on_the_federation_and_many_stand_alone() -> None:
    assert lean(0.0) == (10.0, 2.0)
    assert lean(1e9) == pytest.approx((11.0, 1.0))
    means = [lean(groups)[0] for groups in (0.0, 0.5, 1.0, 5.0, 50.0)]
    assert means == sorted(means)
    # one group weighs as much as the federation: the spread is that of both together, between-means term included
    assert lean(1.0) == pytest.approx((10.5, np.sqrt((1.0 + 4.0) / 2 + 0.25)))


def test_a_channel_in_another_unit_or_unknown_keeps_its_own_scale() -> None:
    assert lean(1.0, mean=283.0) == (283.0, 1.0)  # kelvin where the others write degrees
    assert lean(1.0, channel="q") == (11.0, 1.0)


def test_a_few_machines_see_the_world_more_like_everybody(tmp_path: Path, read: tuple[Arrays, Card]) -> None:
    """The released model as it is, at one machine: leaning on the federation's statistics helps it."""
    arrays, card = read
    own, leaning = [], []
    for seed in (31, 32, 33):
        folder = plant(tmp_path / f"n{seed}", 1, seed)
        for scales, found in (((), own), (card.scales, leaning)):
            shop = CandidateBuilder(open_newcomer(folder, None, scales), arrays, card)
            test = DeviceDataset.of(shop.data.test, device())
            task = shop.tasks["rul"]
            output = outputs_of(shop.released(), test, {"rul": task})["rul"]
            found.append(task.score(task.predict(output), shop.data.test.labels["rul"]))
    assert np.mean(leaning) < 0.95 * np.mean(own)


# --- evidence --------------------------------------------------------------------------------------------------


def test_the_card_and_the_model_are_written_and_the_model_predicts_alike(tmp_path: Path, release: Path) -> None:
    adapted = adapt(plant(tmp_path / "n", 4, 9), release)
    found = evidence.collect(adapted)
    evidence.write(adapted, found, tmp_path / "out")
    assert [point["groups"] for point in found["curve"]] == [1, 2, 4]
    row = next(row for row in found["tasks"] if row["task"] == "rul")
    assert row["figures"]["adapted"] == pytest.approx(rmse(adapted, adapted.model))
    low, high = row["gains"]["scratch"]["interval"]
    assert low <= row["gains"]["scratch"]["difference"] <= high
    assert found["label_next"] == []
    page = (tmp_path / "out" / evidence.PAGE).read_text()
    assert "<svg" in page
    assert "http-equiv" not in page
    assert "src=" not in page
    stored = read_model(tmp_path / "out" / MODEL)
    test = adapted.site.test
    predicted = stored.predict(test)
    output = outputs_of(adapted.model, DeviceDataset.of(test, device()), adapted.workshop.tasks)
    np.testing.assert_allclose(
        predicted["rul"], adapted.workshop.tasks["rul"].predict(output["rul"]), rtol=1e-4, atol=1e-3
    )
    path = tmp_path / "out" / MODEL
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StorageError, match="damaged"):
        read_model(path)
    with pytest.raises(StorageError, match="not a model"):
        read_model(release)


def test_a_stored_model_gives_the_figures_of_the_evidence_at_a_site_with_categorical_columns(tmp_path: Path) -> None:
    """Codes are inputs like any other, and a task that settles on its model predicts as it did when it was judged."""
    frame = fleet(14, rows=8).with_columns(recipe=pl.Series([("A", "B", "C")[row % 3] for row in range(14 * 8)]))
    shift = pl.col("recipe").replace_strict({"A": 0.0, "B": 40.0, "C": -25.0})
    frame = frame.with_columns(rul=pl.col("rul") + shift)  # only the recipe tells the level
    tasks = {
        "rul": {"kind": "regression", "target": "rul"},
        "failing": {"kind": "binary", "target": "failing"},
        "odd": {"kind": "anomaly", "target": "failing"},
    }
    folder = write_site(
        tmp_path / "n", frame[: 10 * 8], tasks, window=None, categorical=["recipe"], test_files="test.csv"
    )
    frame[10 * 8 :].write_csv(folder / "test.csv")
    spec = TrunkSpec(backbone="mlp", width=16)
    card = Card(run="r", key="r", rounds=1, seed=1, strategy="fedavg", trunk=spec, lend=("trunk",), window=None,
                sites=("a", "b"), tasks=(), channels=None, versions=("0",))  # fmt: skip
    adapted = adapt_data(open_newcomer(folder, None, ()), first_trunk(spec, 1), card)
    found = evidence.collect(adapted, curve=False)
    evidence.write(adapted, found, tmp_path / "out")
    stored = read_model(tmp_path / "out" / MODEL)
    test = adapted.site.test
    predicted = stored.predict(test)
    figures = {row["task"]: row["figures"]["adapted"] for row in found["tasks"]}
    assert figures.keys() == tasks.keys()
    for name, task in stored.tasks.items():
        assert task.score(predicted[name], test.labels[name]) == pytest.approx(figures[name], rel=1e-5)
    shuffled = replace(test, categorical=(test.categorical + 1) % 4)
    assert not np.allclose(stored.predict(shuffled)["rul"], predicted["rul"])  # another recipe, another prediction


def test_the_group_least_like_the_labelled_ones_is_to_be_labelled_next(
    tmp_path: Path, read: tuple[Arrays, Card]
) -> None:

    arrays, card = read
    train = machines(6, 9)
    odd = pl.when(pl.col("unit") == "m03").then(pl.col("c1") + 8.0).otherwise(pl.col("c1"))
    blank = [
        pl.when(pl.col("unit").is_in(["m00", "m01"])).then(pl.col(name)).alias(name) for name in ("rul", "failing")
    ]
    folder = write_plant(
        tmp_path / "n", train.with_columns(odd.alias("c1"), *blank), machines(3, 8, name="t"), name="n"
    )
    shop = CandidateBuilder(open_newcomer(folder, None, card.scales), arrays, card)
    found = evidence.label_next(shop)
    assert found[0]["group"] == "m03"
    assert {one["group"] for one in found} == {"m02", "m03", "m04", "m05"}
    assert [one["distance"] for one in found] == sorted((one["distance"] for one in found), reverse=True)


def test_without_labelled_test_rows_the_evidence_comes_from_groups_held_out(
    tmp_path: Path, read: tuple[Arrays, Card]
) -> None:

    arrays, card = read
    test = machines(2, 8, name="t").with_columns(rul=pl.lit(None, pl.Float64), failing=pl.lit(None, pl.Int64))
    folder = write_plant(tmp_path / "n", machines(5, 9), test, name="n")
    adapted = adapt_data(open_newcomer(folder, None, card.scales), arrays, card)
    found = evidence.collect(adapted)
    row = next(row for row in found["tasks"] if row["task"] == "rul")
    assert (row["on"], row["groups"]) == ("held-out groups", 5)
    assert row["figures"]["adapted"] is not None
    assert [point["groups"] for point in found["curve"]] == [1, 2, 4]


def test_the_command_says_what_to_use(tmp_path: Path, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from trunkline.cli.app import app

    folder = plant(tmp_path / "n", 1, 9)
    result = CliRunner().invoke(app, ["adapt", str(folder), "--trunk", str(release), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "interpolated 0.09" in result.output
    assert (tmp_path / "out" / MODEL).exists()
    assert not (folder / ".trunkline").exists()
    shutil.rmtree(tmp_path / "out")


def test_below_a_sealed_state_the_adapted_model_is_sealed_with_its_evidence(tmp_path: Path, release: Path) -> None:
    from typer.testing import CliRunner

    from trunkline.cli.app import app
    from trunkline.security.encryption import is_sealed, make_seal

    folder, plain = plant(tmp_path / "n", 1, 9), plant(tmp_path / "m" / "n", 1, 9)
    make_seal(folder / ".trunkline", f"file:{tmp_path / 'keys' / 'key'}")
    said = {}
    for site in (folder, plain):
        result = CliRunner().invoke(app, ["adapt", str(site), "--trunk", str(release)])
        assert result.exit_code == 0, result.output
        said[site] = result.output
    assert "trunkline client report" in said[folder]
    assert "trunkline client report" not in said[plain]
    written, clear = (
        {path.name: path.read_bytes() for path in (site / ".trunkline" / "adapted").iterdir()}
        for site in (folder, plain)
    )
    assert written.keys() == clear.keys() == {MODEL, evidence.EVIDENCE, evidence.PAGE}
    for name, data in written.items():
        assert is_sealed(data)
        assert b"rul" in clear[name]
        assert not [word for word in (b'"failing', b"numeric", b"failing<", b"<html", b"__metadata__") if word in data]
    one, other = (read_model(site / ".trunkline" / "adapted" / MODEL) for site in (folder, plain))
    assert same(one.model, other.model)
    assert one.card["tasks"] == other.card["tasks"]
    shutil.copyfile(folder / ".trunkline" / "adapted" / MODEL, tmp_path / MODEL)
    with pytest.raises(TrustError, match="encrypted"):
        read_model(tmp_path / MODEL)
    (folder / ".trunkline" / "adapted" / MODEL).rename(folder / ".trunkline" / MODEL)
    with pytest.raises(StorageError, match="moved"):
        read_model(folder / ".trunkline" / MODEL)
    page = tmp_path / "copy.html"
    result = CliRunner().invoke(app, ["client", "report", str(folder), "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert "Use: interpolated" in result.output
    assert page.read_bytes() == clear[evidence.PAGE]
    assert page.stat().st_mode & 0o777 == 0o600
    with pytest.raises(StorageError, match="trunkline adapt"):
        evidence.read(tmp_path / "nowhere")
