"""What a site measures at the end: its candidates, its gate, its intervals; through the real client and server."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors

from tests.loopback import federate
from trunkline.client.model_selection.candidates import MIXES, finish, mixed, versions
from trunkline.client.model_selection.evaluation import FEWEST, RESAMPLES, Scored, curve, paired_bootstrap
from trunkline.client.site import open_site
from trunkline.config.tasks import TaskConfig
from trunkline.models.tasks import make_task
from trunkline.protocol.messages import TrainRequest
from trunkline.protocol.plan import LocalPlan, TrunkSpec
from trunkline.server.reporting.plots import Predictions, drawings
from trunkline.server.reporting.report import read_report
from trunkline.simulations.simulate import predictions_below

pytestmark = pytest.mark.xdist_group("evaluation")  # one worker: the six plants train once

UNITS, ROWS = 40, 20  # machines a plant, rows a machine
SITE = """
name = "{name}"
[data]
files = "rows.csv"
group = "unit"
channels = ["a", "b", "c", "d"]
[tasks.wear]
kind = "regression"
target = "wear"
loss = "mse"
"""
RUN: dict[str, Any] = {
    "name": "six",
    "rounds": 3,
    "seed": 3,
    "trunk": {"backbone": "mlp", "width": 16},
    "training": {"steps": 30, "batch_size": 64, "learning_rate": 1e-2},
    "strategy": {"name": "fedavg"},
    "lend": ["trunk", "stem", "heads"],
    "report": {"baseline": True},
}


def write_plant(root: Path, name: str, seed: int, *, unrelated: bool = False, more: str = "") -> Path:
    """A plant whose wear follows from its four sensors as at every other; or, permuted, from nothing at all."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(UNITS * ROWS, 4))
    wear = 3.0 * np.tanh(x[:, 0] + x[:, 1]) + 2.0 * x[:, 2] * (x[:, 3] > 0)
    wear = wear + np.repeat(draw.normal(0.0, 0.4, UNITS), ROWS) + draw.normal(0.0, 0.6, len(x))
    if unrelated:
        wear = draw.permutation(wear)
    folder = root / name
    folder.mkdir(parents=True)
    grade = (wear > -1.0).astype(int) + (wear > 1.5)
    classes = {"worn": (wear > 1.5).astype(int), "grade": grade, "hot": (x[:, 0] + x[:, 3] > 2.0).astype(int)}
    table = {"unit": np.repeat(np.arange(UNITS), ROWS), **dict(zip("abcd", x.T, strict=True))}
    pl.DataFrame({**table, "wear": wear, **classes}).write_csv(folder / "rows.csv")
    (folder / "site.toml").write_text(SITE.format(name=name) + more)
    return folder


def rows_of(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["site"], row["task"]): row for row in read_report(out)["sites"]}


@pytest.fixture(scope="module")
def with_stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five plants alike and one whose labels are permuted, with every candidate there is."""
    root = tmp_path_factory.mktemp("six")
    folders = [write_plant(root / "sites", f"plant-{seed}", seed) for seed in range(5)]
    folders.append(write_plant(root / "sites", "stranger", 9, unrelated=True))
    federate(folders, root / "out", **{**RUN, "training": {**RUN["training"], "finetune_steps": 16}})
    return root


def test_an_unrelated_plant_is_kept_local_by_its_own_gate(with_stranger: Path) -> None:
    stranger = rows_of(with_stranger / "out")["stranger", "wear"]
    assert stranger["federated"] > 1.1 * stranger["local"]  # it would have lost by joining
    assert stranger["chosen"] == "local"
    assert stranger["gated"] == stranger["local"] and stranger["gated_interval"] == [0.0, 0.0]


def test_the_others_lose_nothing_measurable_by_an_unrelated_plant(with_stranger: Path, tmp_path: Path) -> None:
    """Its updates point elsewhere, so it gets a trunk of its own, and the five do as well as a federation without it.

    Over four run seeds, because one run's figure moves by some percent with the arithmetic of the machine alone.
    """
    plants = sorted((with_stranger / "sites").glob("plant-*"))
    short = {**RUN, "rounds": 6, "training": {**RUN["training"], "steps": 15}, "report": {"baseline": False}}
    losses = []
    for seed in range(4):
        among, without = (tmp_path / f"{name}-{seed}" for name in ("among", "without"))
        cohorts = {"strategy": {"name": "clustered", "warm_rounds": 2}}
        federate([*plants, with_stranger / "sites" / "stranger"], among, **{**short, "seed": seed, **cohorts})
        federate(plants, without, **{**short, "seed": seed})
        assigned = read_report(among)["cohorts"]
        assert {name for name, one in assigned.items() if one == assigned["stranger"]} == {"stranger"}
        mine, theirs = rows_of(among), rows_of(without)
        ratios = [mine[one.name, "wear"]["federated"] / theirs[one.name, "wear"]["federated"] for one in plants]
        losses.append(np.mean(ratios) - 1.0)
    standard_error = np.std(losses, ddof=1) / np.sqrt(len(losses))
    assert np.mean(losses) < max(2.0 * standard_error, 0.03)


def test_every_candidate_is_scored_on_test_rows_and_the_chosen_one_is_the_gated_figure(with_stranger: Path) -> None:
    for row in rows_of(with_stranger / "out").values():
        assert set(row["candidates"]) == {"local", "federated", "finetuned", "fused", "ensemble"}
        assert row["gated"] == row["candidates"][row["chosen"]]
        assert (row["local"], row["federated"]) == (row["candidates"]["local"], row["candidates"]["federated"])
        assert len(set(row["candidates"].values())) == 5  # five models, not one under five names
        if row["chosen"] == "federated":
            assert row["gated_interval"] == row["interval"]


def test_an_ensemble_predicts_the_mean_of_the_two_models(with_stranger: Path) -> None:
    """Squared error is convex: the mean of two predictions never misses by more than they do on average."""
    for (_, task), row in rows_of(with_stranger / "out").items():
        if task == "wear":
            found = row["candidates"]
            assert found["ensemble"] ** 2 <= (found["local"] ** 2 + found["federated"] ** 2) / 2.0 + 1e-6


def test_a_gate_that_holds_what_a_plant_has_alone_leaves_it_only_beyond_noise(
    with_stranger: Path, tmp_path: Path
) -> None:
    folders = sorted((with_stranger / "sites").iterdir())
    holding = {**RUN, "rounds": 1, "selection": {"default": "local"}}
    federate(folders, tmp_path / "local", **holding)
    federate(folders, tmp_path / "federated", **{**holding, "selection": {"default": "federated"}})
    kept, other = rows_of(tmp_path / "local"), rows_of(tmp_path / "federated")
    assert {at: row["candidates"] for at, row in kept.items()} == {at: row["candidates"] for at, row in other.items()}
    assert kept["stranger", "wear"]["chosen"] == "local"
    moved = {at for at, row in kept.items() if row["chosen"] != other[at]["chosen"]}
    assert moved  # the same models and the same noise, and each rule keeps its own
    assert all(other[at]["chosen"] == "federated" for at in moved)


def test_a_gate_that_holds_the_ensemble_leaves_it_only_beyond_noise(with_stranger: Path, tmp_path: Path) -> None:
    folders = sorted((with_stranger / "sites").iterdir())
    federate(folders, tmp_path / "held", **{**RUN, "selection": {"default": "ensemble"}})
    rows = rows_of(tmp_path / "held")
    alike = [row["chosen"] for (site, _), row in rows.items() if site != "stranger"]
    assert (
        alike.count("ensemble") >= 3
    )  # by the rule that holds the federated one it would be none or all of them by luck
    assert rows["stranger", "wear"]["chosen"] in ("local", "ensemble")
    for default in ("ensemble", "local"):  # neither is there where nobody trained alone
        out = tmp_path / f"without {default}"
        federate(folders, out, **{**RUN, "report": {"baseline": False}, "selection": {"default": default}})
        assert {row["chosen"] for row in rows_of(out).values()} == {"federated"}


def test_what_a_site_keeps_of_its_test_rows_is_enough_to_draw_them(with_stranger: Path) -> None:
    for file in (with_stranger / "out" / "state" / "stranger" / "evaluation").rglob("*.safetensors"):
        with safetensors.safe_open(file, framework="numpy") as kept:
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
            about = json.loads(kept.metadata()["about"])
        assert {"truth", "groups", "order", "federated", "local", about["chosen"]} <= set(tensors)
        one = Predictions.from_stored(tensors, about, unit="mm", kind=about["task"]["kind"])
        assert drawings(one)


ALL_KINDS = """
[tasks.worn]
kind = "binary"
target = "worn"
[tasks.grade]
kind = "ordinal"
target = "grade"
[tasks.stage]
kind = "multiclass"
target = "grade"
[tasks.flags]
kind = "multilabel"
targets = ["worn", "hot"]
[tasks.next]
kind = "forecast"
target = "a"
horizons = [1, 3]
[tasks.odd]
kind = "anomaly"
target = "hot"
"""


def test_every_task_kind_is_gated_kept_and_drawn(tmp_path: Path) -> None:
    folder = write_plant(tmp_path, "plant", 0, more=ALL_KINDS)
    federate([folder], tmp_path / "out", **{**RUN, "rounds": 1, "training": {"steps": 4, "finetune_steps": 4}})
    rows = rows_of(tmp_path / "out")
    assert {task for _, task in rows} == {"wear", "worn", "grade", "stage", "flags", "next", "odd"}
    for (_, task), row in rows.items():
        assert set(row["candidates"]) == {"local", "federated", "finetuned", "fused", "ensemble"}, task
        assert row["chosen"] in row["candidates"]
        assert row["federated"] is not None and row["interval"] is not None, task
    drawn = predictions_below(tmp_path / "out")
    assert len(drawn) == 7
    for (_, task), one in drawn.items():
        assert len(drawings(one)) == (2 if task == "next" else 1), task
    assert drawn["plant", "grade"].names == ("0", "1", "2")
    assert set(drawn["plant", "odd"].thresholds) >= {"federated", "local"}


def test_without_fine_tuning_steps_only_what_is_there_anyway_is_a_candidate(tmp_path: Path) -> None:
    folder = write_plant(tmp_path, "plant", 0)
    federate([folder], tmp_path / "out", **{**RUN, "rounds": 1})
    assert set(rows_of(tmp_path / "out")["plant", "wear"]["candidates"]) == {"local", "federated", "ensemble"}
    federate([folder], tmp_path / "bare", **{**RUN, "rounds": 1, "report": {"baseline": False}})
    row = rows_of(tmp_path / "bare")["plant", "wear"]
    assert set(row["candidates"]) == {"federated"} and row["chosen"] == "federated" and row["gated_interval"] is None


def test_fine_tuned_and_fused_models_leave_the_federated_one_as_it_was(tmp_path: Path) -> None:
    site = open_site({"site": write_plant(tmp_path, "plant", 0), "state": tmp_path / "state"})
    plan = LocalPlan(finetune_steps=8, finetune_rate=1.0)
    spec = TrunkSpec(backbone="mlp", width=16, norm="private")
    request = TrainRequest(run="r", seed=1, round=2, rounds=1, trunk=spec, plan=plan, lend=("trunk",))
    model = site.model(request)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = versions(site, model, request)
    assert {name: len(some) for name, some in found.items()} == {"finetuned": 3, "fused": len(MIXES)}
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())
    tuned = list(found["finetuned"].values())[-1].state_dict()
    for share, fused in zip(MIXES, found["fused"].values(), strict=True):
        for name, tensor in fused.state_dict().items():
            if tensor.is_floating_point():
                expected = (1.0 - share) * before[name] + share * tuned[name]
                assert np.allclose(tensor, expected, atol=1e-6), name
    assert all((tensor == before[name]).all() for name, tensor in mixed(model, model, 0.5).state_dict().items())
    again = versions(site, model, request)["finetuned"]
    assert all((tuned[name] == tensor).all() for name, tensor in list(again.values())[-1].state_dict().items())


def test_finishing_trains_the_named_parts_alone_before_anything_is_scored(tmp_path: Path) -> None:
    """FedBABU leaves the heads as they started; without its last steps its figure would be that of a random head."""
    folder = write_plant(tmp_path, "plant", 0)
    site = open_site({"site": folder, "state": tmp_path / "state"})
    plan = LocalPlan(finish_steps=60, finish_parts=("heads",), learning_rate=3e-2)
    spec = TrunkSpec(backbone="mlp", width=16)
    request = TrainRequest(run="r", seed=1, round=2, rounds=1, trunk=spec, plan=plan, lend=("trunk",))
    model = site.model(request)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    raw = curve(model, site.resident("train"), site.data.tasks).loss
    finish(site, model, request)
    moved = {name for name, tensor in model.state_dict().items() if not (tensor == before[name]).all()}
    assert moved == {name for name in before if name.startswith("heads.")}
    assert curve(model, site.resident("train"), site.data.tasks).loss < 0.8 * raw
    gentle, moves = site.model(request), []
    for rate in (1.0, 0.1):
        gentle.load_state_dict(before)
        finish(site, gentle, request.model_copy(update={"plan": plan.model_copy(update={"finish_rate": rate})}))
        moves.append(sum(float((one - before[name]).abs().sum()) for name, one in gentle.state_dict().items()))
    assert moves[1] < 0.3 * moves[0]

    still = {**RUN["training"], "steps": 1, "phases": [{"parts": ["stem"]}]}
    for name, more in (("raw", {}), ("finished", {"finish_steps": 60, "finish_parts": ["heads"]})):
        federate([folder], tmp_path / name, **{**RUN, "rounds": 1, "training": {**still, **more}})
    unfinished, finished = (rows_of(tmp_path / name)["plant", "wear"] for name in ("raw", "finished"))
    assert finished["federated"] < 0.95 * unfinished["federated"]
    assert finished["local"] == unfinished["local"]  # the twin is nobody's to finish


def scored(prediction: np.ndarray) -> Scored:
    return Scored(make_task("y", TaskConfig(kind="regression", target="y")), prediction)


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    held = 0
    for seed in range(60):
        groups = np.repeat(np.arange(30, dtype=np.int32), 5)
        noise = np.repeat(draw.normal(0.0, 1.0, (2, 30)), 5, axis=1)
        low, high = paired_bootstrap(  # type: ignore[misc]
            scored(1.2 * noise[0]), scored(noise[1]), np.zeros(150, np.float32), groups, seed
        )
        held += low <= 0.2 <= high  # rmse of 1.2 against 1.0
    assert 50 <= held <= 60


def test_a_very_large_test_set_is_drawn_less_often_and_never_below_the_fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"small": 0, "large": 0}
    for name, rows in (("small", 200), ("large", 400_000)):
        one = scored(np.zeros(rows, np.float32))
        monkeypatch.setattr(
            one.task, "score", lambda *_, name=name: calls.__setitem__(name, calls[name] + 1) or 0.0, raising=True
        )
        groups = np.arange(rows, dtype=np.int32) % 7
        paired_bootstrap(one, Scored(one.task, one.prediction), np.zeros(rows, np.float32), groups, 0)
    assert calls == {"small": 2 * RESAMPLES, "large": 2 * FEWEST}
