"""One plant that wants everything at once from one network, and plants that have almost nothing to say."""

import math
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from tests.loopback import federate
from trunkline.client.check import check_site
from trunkline.client.data import open_data
from trunkline.client.site import Site
from trunkline.client.training.loop import outputs_of, train_site
from trunkline.models.tasks import TASKS as KINDS
from trunkline.protocol.messages import TrainRequest
from trunkline.protocol.plan import LocalPlan, TrunkSpec
from trunkline.server.reporting.report import read_report

SEASON = 8
TASKS = {
    "left": 'kind = "regression"\ntarget = "left"\nunit = "h"',
    "failing": 'kind = "binary"\ntarget = "failing"',
    "fault": 'kind = "multiclass"\ntarget = "fault"',
    "grade": 'kind = "ordinal"\ntarget = "grade"\nclasses = ["new", "worn", "old"]',
    "alarms": 'kind = "multilabel"\ntargets = ["hot", "loud"]',
    "load": f'kind = "forecast"\ntarget = "load"\nhorizons = [1, {SEASON}]\nseason = {SEASON}',
    "leak": 'kind = "anomaly"\ntarget = "leak"\nlatent = 4',
}


def mill(folder: Path, *, tasks: tuple[str, ...] = tuple(TASKS), leaks: str = "some", groups: int = 20) -> Path:
    """A machine that wears by the hour, with a daily load; a leak lets the pressure fall for ten hours.

    Args:
        leaks: "some" groups leak, "none" does, or "unknown": the column is there and empty.
    """
    draw = np.random.default_rng(6)
    rows, length = groups * 60, 60
    row = np.tile(np.arange(length), groups)
    wear = row / length
    unit = np.repeat(np.arange(groups), length)
    leaking = (unit % 2 == 0) & (row >= 35) & (row < 45) & (leaks == "some")
    fault = np.where(unit % 3 == 0, "fan", "belt")

    def noise(size: float) -> np.ndarray:
        return draw.normal(scale=size, size=rows)

    load = 10.0 + 3.0 * np.sin(2 * np.pi * row / SEASON) + noise(0.8)
    frame = {
        "unit": unit,
        "at": [datetime(2026, 1, 1) + timedelta(days=int(one), hours=int(hour)) for one, hour in zip(unit * 9, row, strict=True)],
        "load": load,
        "heat": 40.0 + 20.0 * wear + noise(1.0),
        "noise": (fault == "fan") * 2.0 + wear + noise(0.2),
        "pressure": 5.0 + 0.2 * load - 4.0 * leaking + noise(0.1),
        "left": (length - row).astype(float),
        "failing": (wear > 0.7).astype(int),
        "fault": fault,
        "grade": np.array(["new", "worn", "old"])[np.minimum((3 * wear).astype(int), 2)],
        "hot": (wear > 0.5).astype(int),
        "loud": (fault == "fan").astype(int),
        "leak": leaking.astype(float) if leaks != "unknown" else np.full(rows, np.nan),
    }  # fmt: skip
    folder.mkdir(parents=True)
    pl.DataFrame(frame).write_parquet(folder / "log.parquet")
    text = "".join(f"[tasks.{name}]\n{TASKS[name]}\n" for name in tasks)
    (folder / "site.toml").write_text(
        f'name = "{folder.name}"\n[data]\nfiles = "log.parquet"\ngroup = "unit"\norder = "at"\n'
        f'channels = ["load", "heat", "noise", "pressure"]\nwindow = 12\n[data.split]\ntest = 0.3\n{text}'
    )
    return folder


def test_every_kind_at_once_learns_and_is_judged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    training = {"steps": 32, "batch_size": 64, "learning_rate": 1e-2}
    federate([mill(tmp_path / "mill")], out, rounds=3, training=training, report={"baseline": True})
    report = read_report(out)
    losses = [one["train_loss"] for one in report["rounds"]]
    assert losses[-1] < 0.6 * losses[0]
    rows = {row["task"]: row for row in report["sites"]}
    assert {row["kind"] for row in rows.values()} == set(KINDS), "a kind of task is missing in TASKS above"
    for row in rows.values():
        for who in ("local", "federated", "gated"):
            assert math.isfinite(row[who]), (row["task"], who)
        assert all(math.isfinite(end) for end in row["interval"]), row["task"]
        assert row["n_train"] > 0
        assert row["n_test"] > 0
        for metric, values in row["more"].items():
            assert math.isfinite(values["federated"]), (row["task"], metric)
    assert rows["load"]["federated"] < 1.0  # better than yesterday's load, whose noise it does not repeat
    assert rows["leak"]["federated"] > 0.7
    assert rows["leak"]["more"]["auroc"]["federated"] > 0.95
    assert "false_alarms_per_day" in rows["leak"]["more"]  # the order column is a time
    assert rows["left"]["federated"] < 8.0


@pytest.mark.parametrize("leaks", ["none", "unknown"])
def test_unlabelled_windows_are_what_an_anomaly_task_trains_on(tmp_path: Path, leaks: str) -> None:
    folder = mill(tmp_path / "mill", tasks=("leak",), leaks=leaks)
    if leaks == "unknown":  # no column at all is the same
        text = (folder / "site.toml").read_text().replace('target = "leak"\n', "")
        (folder / "site.toml").write_text(text)
    assert check_site(folder).ok
    site = Site(folder, tmp_path / "state", open_data(folder, tmp_path / "state"))
    train = site.resident("train")
    assert len(train) == len(site.data.train) > 300
    request = TrainRequest(
        run="r", seed=0, round=1, rounds=1, trunk=TrunkSpec(width=8), plan=LocalPlan(), lend=("trunk",)
    )  # fmt: skip
    model = site.model(request)
    first = train_site(model, train, site.data.tasks, LocalPlan(steps=5, learning_rate=1e-2), seed=0, done=0, rounds=1)
    last = train_site(model, train, site.data.tasks, LocalPlan(steps=40, learning_rate=1e-2), seed=1, done=0, rounds=1)
    assert last.loss < 0.9 * first.loss
    leak = site.data.tasks["leak"]
    leak.fit_outputs(outputs_of(model, train, site.data.tasks)["leak"], train.labels["leak"].numpy())
    held = leak.predict(outputs_of(model, site.resident("validation"), site.data.tasks)["leak"])
    leak.calibrate(held, site.data.validation.labels["leak"])
    assert (held > leak.threshold).mean() <= 0.02  # type: ignore[attr-defined]


def test_flagged_training_windows_do_not_move_the_network(tmp_path: Path) -> None:
    """A window that holds a flagged row anywhere has no loss and no gradient, whatever is in it."""
    folder = mill(tmp_path / "mill", tasks=("leak",))
    site = Site(folder, tmp_path / "state", open_data(folder, tmp_path / "state"))
    labels = site.data.train.labels["leak"]
    touched = labels[:, 1] == 1.0
    assert 0.1 < touched.mean() < 0.5
    assert touched.sum() > (labels[:, 0] == 1.0).sum()  # windows behind a leak still hold it
    request = TrainRequest(
        run="r", seed=0, round=1, rounds=1, trunk=TrunkSpec(width=8), plan=LocalPlan(), lend=("trunk",)
    )
    model, train = site.model(request), site.resident("train")
    x, categorical = train.batch(torch.from_numpy(np.flatnonzero(touched)))
    task = site.data.tasks["leak"]
    loss = task.loss(task.combine_with_inputs(model(x, categorical)["leak"], x), train.labels["leak"][touched])
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
