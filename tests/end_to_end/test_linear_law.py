"""The FedRep law (Collins et al. 2021, arXiv:2102.07078, section 6.1) through the real client, intake and strategy.

100 sites with 10 rows each: y = <w, B x> + noise, x ~ N(0, I), B the same everywhere and of rank 2 in 20 columns, w each
site's own. No site can find B alone, and no single w fits two sites. What the figures below mean:

- *missed*: mean squared error on fresh rows over the label's variance; 0 is perfect, 1 is predicting nothing. (Theory
  writes the loss as half the squared error: one global model's 1 and local training's 1/2 are 0.5 and 0.25 there.)
- *angle*: sine of the largest principal angle between the learnt rows and those of B.

Noise has a standard deviation of 1e-3, heads of 10. The size of the heads is ours to choose and has to be said: with heads
of 1 nobody who sees these 1,000 rows gets below an angle of about 2e-4 (36 free directions, each known to
1e-3 / sqrt(1000)).
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tests.loopback import trunk_of
from tests.typed_requests import as_kind
from trunkline.client.app import app as client_app
from trunkline.client.handlers import answer_score, answer_train
from trunkline.client.site import open_site
from trunkline.config.run import parse_run
from trunkline.flower.grid import LoopbackGrid
from trunkline.models.trunk import first_trunk
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import ScoreRequest, TrainRequest
from trunkline.protocol.plan import LocalPlan, Phase, TrunkSpec
from trunkline.server.rounds.run import run_rounds

pytestmark = pytest.mark.xdist_group("linear-law")  # one worker: the law is learnt once

D, K, SITES, ROWS, NOISE, HEADS = 20, 2, 100, 10, 1e-3, 10.0
SPEC = {"backbone": "linear", "columns": D, "width": K}


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    """(K, D) with orthonormal rows."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(D, K)))[0].T


def write_site(folder: Path, truth: np.ndarray, seed: int, rows: int = ROWS) -> Path:
    """`rows` to train on, two to validate, and a file of 40 fresh ones to test."""
    rng = np.random.default_rng([5, seed])
    head = rng.normal(size=K)
    head *= HEADS / np.linalg.norm(head)
    folder.mkdir(parents=True)
    for name, count in (("log", rows + 2), ("fresh", 40)):
        x = rng.normal(size=(count, D))
        y = x @ truth.T @ head + NOISE * rng.normal(size=count)
        pl.DataFrame({**{f"x{column}": x[:, column] for column in range(D)}, "y": y}).write_parquet(
            folder / f"{name}.parquet"
        )
    channels = ", ".join(f'"x{column}"' for column in range(D))
    (folder / "site.toml").write_text(
        f'name = "{folder.name}"\n[data]\nfiles = "log.parquet"\ntest_files = "fresh.parquet"\nchannels = [{channels}]\n'
        f'scale = "none"\n[data.split]\nby = "time"\nvalidation = {2 / (rows + 2):.6f}\n'
        '[tasks.y]\nkind = "regression"\ntarget = "y"\nloss = "mse"\nintercept = false\n'
    )
    return folder


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory, truth: np.ndarray) -> list[Path]:
    root = tmp_path_factory.mktemp("linear")
    return [write_site(root / f"site-{number:03d}", truth, number) for number in range(SITES)]


def angle(trunk: Arrays, truth: np.ndarray) -> float:
    learnt = np.linalg.qr(trunk["trunk.matrix.weight"].astype(np.float64).T)[0]  # (D, K)
    return float(np.linalg.norm(truth - truth @ learnt @ learnt.T, 2))


def missed(rows: list[dict[str, Any]], folders: list[Path]) -> float:
    """Mean over sites of the squared test error over the variance of the site's test labels around 0."""
    power = {folder.name: float((pl.read_parquet(folder / "fresh.parquet")["y"] ** 2).mean()) for folder in folders}
    return float(np.mean([row["federated"] ** 2 / power[row["site"]] for row in rows]))


def run(sites: list[Path], out: Path, strategy: dict[str, Any], rounds: int, **training: Any) -> float:
    plan = {"optimizer": "lbfgs", "keep": "last", "steps": 20, **training}
    table = {
        "name": "linear", "rounds": rounds, "seed": 5, "trunk": SPEC, "training": plan, "strategy": strategy,
        "report": {"baseline": False}, "cohort": {"min_sites": len(sites)},
    }  # fmt: skip
    torch.set_num_threads(1)
    grid = LoopbackGrid(
        client_app, [{"site": str(folder), "state": str(out / "state" / folder.name)} for folder in sites]
    )
    # without the ServerApp around it, which would draw the report's page: a hundred sites' curves take longer than the run
    report = run_rounds(grid, parse_run(table, "test"), out, resume=False, on_event=lambda event: None)
    return missed(report["sites"], sites)


@pytest.fixture(scope="module")
def learnt(sites: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `fedrep` ended: four iterations of the head, three of the matrix a round; the mean goes five times as far."""
    out = tmp_path_factory.mktemp("fedrep")
    fedrep = {"name": "fedrep", "head_share": 4 / 7, "server_rate": 5.0}
    (out / "missed").write_text(str(run(sites, out, fedrep, 12, steps=7)))
    return out


def test_together_sites_find_what_none_of_them_can_find_alone(
    learnt: Path, sites: list[Path], tmp_path: Path, truth: np.ndarray
) -> None:
    some = sites[:40]
    one_for_all = run(some, tmp_path / "fedavg", {"name": "fedavg"}, 2)
    alone = run(some, tmp_path / "local", {"name": "local"}, 1)
    assert angle(trunk_of(learnt), truth) < 1e-4
    assert float((learnt / "missed").read_text()) < 1e-6
    assert 0.9 < one_for_all < 1.2  # as loss: 0.5; it predicts nothing
    assert 0.4 < alone < 0.7  # as loss: 0.25; half of the 20 directions have been seen


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_a_new_site_needs_as_many_rows_as_the_trunk_has_outputs(
    learnt: Path, tmp_path: Path, truth: np.ndarray, rows: int
) -> None:
    """A probe (heads alone) on the learnt trunk, against the same network from scratch, through the client's own rounds."""
    folders = [write_site(tmp_path / f"new-{seed}", truth, 1000 + seed, rows) for seed in range(4)]
    probe = LocalPlan(optimizer="lbfgs", steps=30, keep="last", phases=(Phase(parts=("heads",)),))
    scratch = LocalPlan(optimizer="lbfgs", steps=30, keep="last", phases=(Phase(parts=("trunk", "heads")),))
    found = {}
    for name, plan, trunk in (
        ("probe", probe, trunk_of(learnt)),
        ("scratch", scratch, first_trunk(TrunkSpec(**SPEC), 5)),
    ):
        results = []
        for folder in folders:
            site = open_site({"site": str(folder), "state": str(tmp_path / name / folder.name)})
            assert len(site.data.train) == rows
            request = TrainRequest(
                run="new",
                seed=5,
                round=1,
                rounds=1,
                trunk=TrunkSpec(**SPEC),
                plan=plan,
                lend=("trunk",),
                baseline=False,
            )
            _, entry = answer_train(site, request, trunk)
            moved = Arrays({key: array + entry.delta[key] for key, array in trunk.items()})
            card = answer_score(site, as_kind(ScoreRequest, request, round=2), moved)
            results.append({"site": folder.name, "federated": card.rows[0].federated})
        found[name] = missed(results, folders)
    assert found["probe"] < 1e-2
    assert found["scratch"] > 0.5
