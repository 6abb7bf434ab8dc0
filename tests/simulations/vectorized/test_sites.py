"""Sites trained as one stack: the same as each alone, but for rounding. Through the real rounds and vaults."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from trunkline.client.handlers import answer_train
from trunkline.client.site import Site, open_site
from trunkline.client.state.vault import Vault
from trunkline.models.trunk import first_trunk
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import TrainRequest
from trunkline.protocol.plan import LocalPlan, Phase, TrunkSpec
from trunkline.simulations.vectorized.eligibility import kind_of
from trunkline.simulations.vectorized.sites import VectorizedSites

ALIKE = 1e-4  # of the largest change of a round: what float32 leaves of sums in another order, after four steps
SITE = """
name = "{name}"
[data]
files = "rows.csv"
group = "unit"
order = "cycle"
channels = ["a", "b", "c"]
{window}
[tasks.wear]
kind = "regression"
target = "wear"
"""
WORN = '[tasks.worn]\nkind = "binary"\ntarget = "worn"\n'
GRADE = '[tasks.grade]\nkind = "multiclass"\ntarget = "grade"\nclasses = ["0", "1", "2"]\n'
LEVEL = '[tasks.level]\nkind = "ordinal"\ntarget = "grade"\nclasses = ["0", "1", "2"]\n'


def write(root: Path, place: int, *, window: str, more: str, rows: int) -> Path:
    draw = np.random.default_rng(place)
    units, cycles = 8, rows + 3 * place  # no two sites have as many rows
    x = draw.normal(size=(units * cycles, 3)) + place
    x[draw.random(x.shape) < 0.03] = np.nan
    wear = np.nan_to_num(x[:, 0]) * (2.0 + place) + draw.normal(size=len(x))
    table = pl.DataFrame(
        {"unit": np.repeat(np.arange(units), cycles), "cycle": np.tile(np.arange(cycles), units), "a": x[:, 0],
         "b": x[:, 1], "c": x[:, 2], "wear": np.where(draw.random(len(x)) < 0.1, np.nan, wear),
         "worn": (wear > np.median(wear)).astype(int), "grade": np.digitize(wear, np.quantile(wear, [0.3, 0.8]))}
    ).fill_nan(None)  # fmt: skip
    folder = root / f"plant-{place}"
    folder.mkdir(parents=True)
    table.write_csv(folder / "rows.csv")
    (folder / "site.toml").write_text(SITE.format(name=folder.name, window=window) + more)
    return folder


def run(folders: list[Path], state: Path, request: TrainRequest, rounds: int, together: bool) -> list[dict[str, Any]]:
    """Every site's changes and metrics, round by round; the lent arrays move by the plain mean."""
    torch.set_num_threads(1)
    sites = [open_site({"site": str(folder), "state": str(state / folder.name)}) for folder in folders]
    arrays = first_trunk(request.trunk, request.seed) if request.lend else Arrays()
    if "stem" in request.lend:
        arrays = sites[0].model(request).share(request.lend)
    vectorized: VectorizedSites | None = None
    told = []
    for round in range(request.round, request.round + rounds):
        now = request.model_copy(update={"round": round})
        found: dict[str, Any] = {}
        if together:
            vectorized = vectorized or VectorizedSites(sites, now)
            for stack in vectorized.answer([site.name for site in sites], now, arrays):
                for at, (name, one) in enumerate(zip(stack.names, stack.results, strict=True)):
                    found[name] = ({key: rows[at] for key, rows in stack.changes.items()}, one.metrics, one.weight)
        else:
            for site in sites:
                _, entry = answer_train(site, now, arrays)
                found[site.name] = (dict(entry.delta), dict(entry.metrics), entry.weight)
        told.append(found)
        mean = {key: np.mean([one[0][key] for one in found.values()], axis=0) for key in arrays}
        arrays = Arrays({key: (array + mean[key]).astype(np.float32) for key, array in arrays.items()})
    if vectorized is not None:
        vectorized.flush()
    return told


def order_of(**changes: Any) -> TrainRequest:
    plan = LocalPlan(**{"steps": 4, "batch_size": 16, "learning_rate": 0.01, **changes.pop("plan", {})})
    base: dict[str, Any] = {
        "run": "r", "seed": 3, "round": 1, "rounds": 4, "trunk": TrunkSpec(backbone="tcn", width=8), "plan": plan, "lend": ("trunk",),
        "baseline": False,
    }  # fmt: skip
    return TrainRequest(**{**base, **changes})


ROWS = TrunkSpec(backbone="mlp", width=64, dropout=0.2)
CASES = {
    "windows": (order_of(), "window = 6", ""),
    "without dropout": (order_of(trunk=TrunkSpec(backbone="tcn", width=8, dropout=0.0)), "window = 6", ""),
    "rows, every part at its rate": (order_of(trunk=ROWS, plan={"private_rate": 0.1}), "", ""),
    "all kinds of task": (order_of(trunk=ROWS), "", WORN + GRADE + LEVEL),
    "fewer rows than a batch": (order_of(trunk=ROWS, plan={"batch_size": 4096}), "", WORN),
    "phases, and a stem lent": (
        order_of(lend=("trunk", "stem"), plan={"phases": (Phase(parts=("heads",), share=0.5), Phase(parts=("stem", "trunk")))}),
        "window = 6",
        "",
    ),
    "one step a round": (order_of(trunk=ROWS, plan={"steps": 1, "weight_decay": 0.1}), "", ""),
    "with a twin": (order_of(trunk=ROWS, baseline=True), "", WORN),
    "the transformer": (order_of(trunk=TrunkSpec(backbone="transformer", width=64)), "window = 6", ""),
    "nothing lent": (order_of(trunk=ROWS, lend=(), plan={"patience_rounds": 1}), "", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", list(CASES))
def test_trained_together_or_alone_a_site_is_the_same_but_for_rounding(tmp_path: Path, case: str, smooth: None) -> None:
    request, window, more = CASES[case]
    rows = 3 if "fewer" in case else 12
    folders = [write(tmp_path / "sites", place, window=window, more=more, rows=rows) for place in range(5)]
    alone = run(folders, tmp_path / "alone", request, 3, together=False)
    stacked = run(folders, tmp_path / "together", request, 3, together=True)
    moved = False
    for one, other in zip(alone, stacked, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            (change, metrics, weight), (stack, told, counted) = one[name], other[name]
            assert (weight, set(change), set(metrics)) == (counted, set(stack), set(told))
            largest = max((float(np.abs(array).max()) for array in change.values()), default=0.0)
            moved |= largest > 1e-3
            for key, array in change.items():
                np.testing.assert_allclose(
                    stack[key], array, rtol=0, atol=ALIKE * max(largest, 1e-2), err_msg=f"{name} {key}"
                )
            for key, value in metrics.items():
                assert told[key] == pytest.approx(value, rel=2e-3, abs=2e-4), (name, key)
    assert moved or not request.lend
    for folder in folders:  # what the vaults keep, so that either way can go on from the other
        kept = [Vault(tmp_path / way / folder.name, "r").before(4) for way in ("alone", "together")]
        assert kept[0] is not None and kept[1] is not None
        for part in ("private", "local"):
            mine, theirs = getattr(kept[0], part), getattr(kept[1], part)
            assert set(mine) == set(theirs)
            for key in mine:
                np.testing.assert_allclose(theirs[key], mine[key], rtol=0, atol=2e-5, err_msg=key)
        assert kept[0].best_round == kept[1].best_round
        assert kept[0].best.keys() == kept[1].best.keys()


def test_with_the_optimiser_as_it_is_a_round_differs_by_a_hundredth_of_itself_at_most(tmp_path: Path) -> None:
    request = order_of()
    folders = [write(tmp_path / "sites", place, window="window = 6", more="", rows=12) for place in range(5)]
    (alone,), (stacked,) = (run(folders, tmp_path / str(way), request, 1, together=way) for way in (False, True))
    for name, (change, *_) in alone.items():
        flat = [np.concatenate([one[key].ravel() for key in sorted(change) if key != "trunk.attend.bias"])
                for one in (change, stacked[name][0])]  # fmt: skip
        assert np.linalg.norm(flat[0] - flat[1]) < 0.01 * np.linalg.norm(flat[0])


def test_vectorized_sites_go_on_from_the_vaults(tmp_path: Path, smooth: None) -> None:
    """Two rounds, put away, and two more by other stacks: the same as four in one go."""
    request = order_of(trunk=ROWS)
    folders = [write(tmp_path / "sites", place, window="", more="", rows=12) for place in range(3)]
    whole = run(folders, tmp_path / "whole", request, 4, together=True)
    run(folders, tmp_path / "halves", request, 2, together=True)
    sites = [open_site({"site": str(folder), "state": str(tmp_path / "halves" / folder.name)}) for folder in folders]
    arrays = dict(first_trunk(request.trunk, request.seed))
    for found in whole[:2]:
        mean = {key: np.mean([one[0][key] for one in found.values()], axis=0) for key in arrays}
        arrays = {key: (array + mean[key]).astype(np.float32) for key, array in arrays.items()}
    now = request.model_copy(update={"round": 3})
    vectorized = VectorizedSites(sites, now)
    for stack in vectorized.answer([site.name for site in sites], now, Arrays(arrays)):
        for at, name in enumerate(stack.names):
            for key, rows in stack.changes.items():
                np.testing.assert_allclose(rows[at], whole[2][name][0][key], rtol=0, atol=1e-5)


def test_what_cannot_be_stacked_says_so(tmp_path: Path) -> None:
    folder = write(tmp_path, 0, window="", more="", rows=12)
    site: Site = open_site({"site": str(folder), "state": str(tmp_path / "state")})
    assert kind_of(site, order_of(trunk=ROWS)) is not None
    for plan in ({"optimizer": "lbfgs"}, {"balance": "famo"}, {"sampling": "balanced"}, {"proximal": 0.1},
                 {"personal": 0.1}, {"augment": {"jitter": 0.1}}):  # fmt: skip
        assert kind_of(site, order_of(trunk=ROWS, plan=plan)) is None
    assert kind_of(site, order_of(trunk=TrunkSpec(backbone="mlp", width=8, norm="private"))) is None
