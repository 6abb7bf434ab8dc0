"""Two of eight sites lie, with lies that intake admits: what the robust rules are for, over the whole system."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from flwr.app import Message

from tests.loopback import federate
from trunkline.flower.records import open_records, to_records
from trunkline.server.reporting.report import read_report

SITES, LIARS = 8, (3, 7)  # node ids count from 2
RULES = {"median": {}, "trimmed_mean": {"share": 0.25}, "multikrum": {"f": 2}}
TRAINING = {"steps": 8, "batch_size": 32, "learning_rate": 5e-2, "keep": "last"}
LARGEST = 9000.0  # intake refuses a change of one weight beyond 1e4


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight benches that measure the same thing: six inputs, one answer, and noise that nobody can predict."""
    root = tmp_path_factory.mktemp("benches")
    for number in range(SITES):
        rng = np.random.default_rng(number)
        x = rng.normal(size=(160, 6))
        y = x @ np.array([2.0, -1.0, 0.5, 0.0, 1.0, -0.5]) + rng.normal(size=160)
        folder = root / f"bench-{number}"
        folder.mkdir()
        pl.DataFrame({**{f"x{column}": x[:, column] for column in range(6)}, "y": y}).write_parquet(
            folder / "log.parquet"
        )
        channels = ", ".join(f'"x{column}"' for column in range(6))
        (folder / "site.toml").write_text(
            f'name = "bench-{number}"\n[data]\nfiles = "log.parquet"\nchannels = [{channels}]\n'
            '[tasks.y]\nkind = "regression"\ntarget = "y"\nloss = "mse"\n'
        )
    return sorted(root.iterdir())


def _flipped(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: -array for name, array in arrays.items()}


def _hundredfold(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: np.clip(-100.0 * array, -LARGEST, LARGEST).astype(array.dtype) for name, array in arrays.items()}


def _random(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=array.shape).astype(array.dtype) for name, array in arrays.items()}


# a flipped sign alone slows a mean down, so those liars also claim all the weight there is
LIES = {"sign-flipped": (_flipped, 100_000.0), "scaled 100 x": (_hundredfold, None), "random": (_random, None)}


def liar(lie: Callable[..., dict[str, np.ndarray]], weight: float | None, node: int):
    def tamper(message: Message, honest: Callable[[], Message]) -> Message:
        reply = honest()
        if message.metadata.message_type != "train":
            return reply
        arrays, header, metrics = open_records(reply.content)
        table = json.loads(header)
        rng = np.random.default_rng([node, table["round"]])
        if weight is not None:
            table["weight"] = weight
        return Message(to_records(lie(arrays, rng), json.dumps(table), metrics), reply_to=message)

    return tamper


def honest_loss(sites: list[Path], out: Path, strategy: dict[str, object], lie: str | None) -> float:
    """Mean test error of the honest sites at the end; nobody is refused, so the rule alone stands between."""
    tamper = {node: liar(*LIES[lie], node) for node in LIARS} if lie else {}
    federate(
        sites, out, tamper=tamper, lend=["trunk", "heads"], trunk={"backbone": "linear", "columns": 6, "width": 4}, strategy=strategy,
        training=TRAINING, rounds=8,
    )  # fmt: skip
    report = read_report(out)
    assert all(not one["refused"] for one in report["rounds"])
    lying = {f"bench-{node - 2}" for node in LIARS}
    return float(np.mean([row["federated"] for row in report["sites"] if row["site"] not in lying]))


@pytest.fixture(scope="module")
def clean(sites: list[Path], tmp_path_factory: pytest.TempPathFactory) -> float:
    return honest_loss(sites, tmp_path_factory.mktemp("clean"), {"name": "fedper"}, None)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lie", LIES)
def test_with_two_of_eight_sites_lying_the_others_learn_as_if_nobody_did(
    sites: list[Path], tmp_path: Path, clean: float, lie: str, rule: str
) -> None:
    got = honest_loss(sites, tmp_path, {"name": rule, **RULES[rule]}, lie)
    assert got < 1.1 * clean


@pytest.mark.parametrize("lie", LIES)
def test_the_plain_mean_fails_under_the_same_lies(sites: list[Path], tmp_path: Path, clean: float, lie: str) -> None:
    got = honest_loss(sites, tmp_path, {"name": "fedper"}, lie)
    assert got > 1.3 * clean
