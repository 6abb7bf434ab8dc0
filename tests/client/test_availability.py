"""A pause stands training still within seconds, wherever it is, and changes no byte of what comes out."""

import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.client.small import learnable, model_for, resident, tasks_for
from tests.federation import within
from trunkline.cli.app import app as command_line
from trunkline.client import availability as pausing
from trunkline.client.availability import PAUSE, Pauses
from trunkline.client.training.loop import between_steps, outputs_of, train_site
from trunkline.config.site import read_site
from trunkline.errors import Away, DeploymentError
from trunkline.protocol import opening_hours as hours
from trunkline.protocol.plan import LocalPlan

SITE = 'name = "press-07"\n[data]\nfiles = "*.csv"\nchannels = ["a"]\n[tasks.t]\nkind = "regression"\ntarget = "t"\n'


@pytest.fixture
def plant(tmp_path: Path) -> Path:
    (tmp_path / "site.toml").write_text(SITE)
    (tmp_path / ".trunkline").mkdir()
    return tmp_path


def pauses_of(plant: Path) -> Pauses:
    return Pauses(read_site(plant), plant, plant / ".trunkline")


def command(*arguments: str) -> str:
    from typer.testing import CliRunner

    done = CliRunner().invoke(command_line, ["client", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def trained(plan: LocalPlan, hold: object = None) -> bytes:
    """What a round of training leaves, all parameters in a row."""
    labels = learnable()
    tasks = tasks_for(labels)
    model, token = model_for(tasks), between_steps.set(hold)  # type: ignore[arg-type]
    try:
        train_site(model, resident(labels), tasks, plan, seed=3, done=0, rounds=2)
    finally:
        between_steps.reset(token)
    return b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())


@pytest.mark.parametrize("by", ["request", "hours"])
def test_training_stands_within_5_s_and_goes_on_to_the_same_bytes(
    plant: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = LocalPlan(steps=60, batch_size=32)
    undisturbed = trained(plan)
    held, looked, monday = pauses_of(plant), [], datetime(2026, 11, 23, 13, 59, tzinfo=UTC)
    if by == "hours":
        (plant / "site.toml").write_text(f'{SITE}[hours]\nhours = [[6, 14]]\nzone = "UTC"\n')
        held, time_is = pauses_of(plant), [monday]
        monkeypatch.setattr(hours, "now", lambda: time_is[0])

    def hold() -> None:
        looked.append(time.monotonic())
        held.wait_if_paused()
        time.sleep(0.02)  # a larger model

    came: list[bytes] = []
    worker = threading.Thread(target=lambda: came.append(trained(plan, hold)), daemon=True)
    worker.start()
    within(10.0, "it trains", lambda: len(looked) > 3)
    asked = time.monotonic()
    if by == "request":
        assert "within 5 s" in command("pause", str(plant))
        assert "by request of" in pausing.in_words(plant, plant / ".trunkline")
    else:
        time_is[0] = monday + timedelta(minutes=1)
        assert pausing.in_words(plant, plant / ".trunkline") == "outside its hours until Tue 2026-11-24 06:00 UTC"
    within(5.0, "it stands", lambda: time.monotonic() - looked[-1] > 0.7)
    assert looked[-1] - asked < 5.0
    assert not came
    steps = len(looked)
    if by == "request":
        assert "is over" in command("resume", str(plant))
        assert "no pause" in command("resume", str(plant))
    else:
        time_is[0] = monday + timedelta(hours=17)
    worker.join(30.0)
    assert 3 < steps < len(looked) == plan.steps
    assert came == [undisturbed]


def test_whatever_takes_long_looks_whether_it_should_wait() -> None:
    looks: list[float] = []
    trained(LocalPlan(optimizer="lbfgs", steps=4), lambda: looks.append(0.0))
    assert len(looks) >= 4
    looks.clear()
    labels = learnable(rows=5000)
    tasks = tasks_for(labels)
    token = between_steps.set(lambda: looks.append(0.0))
    try:
        outputs_of(model_for(tasks), resident(labels), tasks)
    finally:
        between_steps.reset(token)
    assert len(looks) == 3


def test_a_look_costs_nothing_that_shows(plant: Path) -> None:
    (plant / "site.toml").write_text(f'{SITE}[hours]\nzone = "Europe/Berlin"\n')
    held = pauses_of(plant)
    began = time.perf_counter()
    for _ in range(10_000):
        held.wait_if_paused()
    assert time.perf_counter() - began < 0.1  # 10 us each; a step takes a hundred times that and more


def test_an_order_waits_for_a_short_pause_and_is_told_of_a_long_one(
    plant: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, held = plant / ".trunkline", pauses_of(plant)
    monkeypatch.setattr(pausing, "LOOK_S", 0.05)
    held.admit()
    began = time.monotonic()
    pausing.pause(state, minutes=0.005)
    held.admit()
    assert 0.3 <= time.monotonic() - began < 5.0
    assert pausing.in_words(plant, state) == ""  # it is over, though its file is still there
    pausing.pause(state, minutes=90)
    with pytest.raises(Away, match=r"^press-07: paused until 20\S+ by request at the plant$"):
        held.admit()
    pausing.pause(state, by="the night shift")  # without an end: told once it has lasted a minute
    monkeypatch.setattr(pausing, "SHORT_S", 0.2)
    with pytest.raises(Away, match=r"^press-07: paused by request at the plant$") as told:
        held.admit()
    assert "night shift" not in str(told.value)  # a person's name stays at the plant
    assert "night shift" in pausing.in_words(plant, state)
    assert pausing.resume(state)
    held.admit()


def test_a_request_that_cannot_be_read_is_a_pause(plant: Path) -> None:
    (plant / ".trunkline" / PAUSE).write_text('{"since": ')
    assert "a file that cannot be read" in pausing.in_words(plant, plant / ".trunkline")
    assert pausing.resume(plant / ".trunkline")
    assert pausing.in_words(plant, plant / ".trunkline") == ""


def test_a_site_toml_that_cannot_be_read_leaves_the_hours_as_they_were(
    plant: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hours, "now", lambda: datetime(2026, 11, 23, 15, tzinfo=UTC))
    held = pauses_of(plant)
    held.admit()
    (plant / "site.toml").write_text(f'{SITE}[hours]\nhours = [[6, 14]]\nzone = "Europe/Berlin"\n')
    with pytest.raises(Away, match=r"^press-07: closed until 2026-11-24T06:00:00\+01:00 by its hours$"):
        held.admit()
    (plant / "site.toml").write_text(SITE[:40])
    for _ in range(2):
        with pytest.raises(Away):
            held.admit()
    assert caplog.text.count("The hours from before hold") == 1
    (plant / "site.toml").write_text(SITE)
    held.admit()


def test_a_folder_without_a_daemon_cannot_be_paused(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match="no such state folder"):
        pausing.pause(tmp_path / "nowhere")
