"""What every task kind keeps, whatever it predicts; a new kind is tested by being in `samples.CONFIGS`."""

import copy
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.models.samples import CONFIGS, labels_of, tasks_of, unlabelled
from trunkline.config.tasks import CLASSED, TaskConfig
from trunkline.errors import ConfigError, DataError, StorageError
from trunkline.models.tasks import TASKS, Task, make_task
from trunkline.models.trunk import build_model
from trunkline.protocol.plan import TrunkSpec

NAN = float("nan")
every_task = pytest.mark.parametrize("name", CONFIGS)


def outputs(task: Task, rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, task.outputs, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_every_kind_is_among_the_samples() -> None:
    assert {config.kind for config in CONFIGS.values()} == set(TASKS)


@every_task
def test_every_metric_has_a_unit_and_a_direction(name: str) -> None:
    task = tasks_of(name)[name]
    assert task.primary in task.metrics
    for metric, (unit, better) in task.metrics.items():
        assert better in ("lower", "higher"), metric
        assert unit or CONFIGS[name].unit, metric
    card = task.card
    assert (card.task, card.kind, card.metric, card.better) == (
        name, task.kind, task.primary, task.metrics[task.primary].better,
    )  # fmt: skip
    assert card.unit == (task.metrics[task.primary].unit or CONFIGS[name].unit)
    assert task.primary == (CONFIGS[name].metric or type(task).primary)


@every_task
def test_a_missing_label_gives_no_loss_and_no_gradient(name: str) -> None:
    task, out = tasks_of(name)[name], outputs(tasks_of(name)[name], 4)
    loss = task.loss(out, torch.from_numpy(unlabelled(task, 4)))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert out.grad is not None
    assert torch.equal(out.grad, torch.zeros_like(out))


@every_task
def test_rows_without_a_label_change_neither_loss_nor_gradient_of_the_others(name: str) -> None:
    task = tasks_of(name)[name]
    truth = torch.from_numpy(labels_of(task, 6))
    few, many = outputs(task, 6), outputs(task, 6)
    gaps = torch.cat([truth, torch.from_numpy(unlabelled(task, 3))])
    task.loss(few, truth).backward()
    loss = task.loss(torch.cat([many, torch.full((3, task.outputs), 1e4)]), gaps)
    loss.backward()
    torch.testing.assert_close(loss.detach(), task.loss(few, truth).detach())
    torch.testing.assert_close(many.grad, few.grad)


@every_task
def test_loss_is_finite_however_wrong_the_output_is(name: str) -> None:
    task = tasks_of(name)[name]
    truth = torch.from_numpy(labels_of(task, 6))
    for far in (-1e4, 1e4):
        out = torch.full((6, task.outputs), far, requires_grad=True)
        loss = task.loss(out, truth)
        loss.backward()
        assert loss.isfinite()
        assert out.grad is not None
        assert out.grad.isfinite().all()


@every_task
def test_loss_of_half_precision_outputs_is_full_precision(name: str) -> None:
    task = tasks_of(name)[name]
    assert task.loss(outputs(task, 6).bfloat16(), torch.from_numpy(labels_of(task, 6))).dtype == torch.float32


@every_task
def test_a_head_learns_what_its_input_says(name: str) -> None:
    """Loss falls, and the primary metric gets better than a guess, on labels that follow from the embedding."""
    task, rows = tasks_of(name)[name], 120
    truth = labels_of(task, rows)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = task.head(8)
        x = torch.randn(rows, 8)
    if truth.ndim == 1:
        x[:, 0] = torch.from_numpy(truth) / truth.max() * 4 - 2  # an order
    says = truth if truth.ndim == 2 else truth[:, None] == np.arange(int(truth.max()) + 1)  # and which
    for place in range(says.shape[1]):
        x[:, 1 + place % 7] += torch.from_numpy(says[:, place]) * 3.0
    optimiser = torch.optim.Adam(head.parameters(), lr=0.05)
    losses, scores = [], []
    for _ in range(150):
        out = head(x)
        loss = task.loss(out, torch.from_numpy(truth))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        scores.append(task.score(task.predict(out), truth))
    assert losses[-1] < 0.5 * losses[0]
    first, last = scores[0], scores[-1]
    assert first is not None
    assert last is not None
    assert last < first if task.card.better == "lower" else last > first


@every_task
def test_a_lent_head_shows_nothing_of_the_labels_and_is_the_same_at_every_site(name: str) -> None:
    """What the centre gets before the first round; a head that stays home may begin where its own labels say."""
    rare, common = (make_task(name, CONFIGS[name]) for _ in range(2))
    rare.fit(labels_of(rare, 60))
    common.fit(_other_labels(common, 60))

    def first(task: Task, lend: tuple[str, ...]) -> bytes:
        model = build_model(TrunkSpec(width=4), window=3, channels=1, tasks={name: task}, seed=0, lend=lend)
        return b"".join(array.tobytes() for array in model.share((f"head.{name}",)).values())

    for lend in ((f"head.{name}",), ("trunk", "heads")):
        assert first(rare, lend) == first(common, lend) == first(make_task(name, CONFIGS[name]), lend)
    if "init_head" in vars(type(rare)):
        assert first(rare, ("trunk",)) != first(common, ("trunk",))


def _other_labels(task: Task, rows: int) -> np.ndarray:
    """Labels of a site where the first class, or the first of many, is the common one, and numbers are larger."""
    labels = labels_of(task, rows, seed=1)
    if task.kind in ("regression", "forecast"):
        return labels * 7.0 + 100.0
    if task.kind == "multilabel":
        return np.maximum(labels, np.arange(rows)[:, None] % np.array([1, 9, 2]) > 0)
    if task.kind == "anomaly":
        return labels
    labels[: rows // 2] = 0.0
    return labels


@every_task
def test_all_labels_missing_is_refused_with_what_to_do(name: str) -> None:
    task = make_task(name, CONFIGS[name])
    column = CONFIGS[name].columns[0]
    with pytest.raises(DataError, match=rf"'{name}'.*`{column}`.* has no label in any training row.*site\.toml"):
        task.fit(unlabelled(task, 9))


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.kind in CLASSED])
def test_labels_of_one_class_are_refused_by_name(name: str) -> None:
    task = make_task(name, CONFIGS[name])
    word = (CONFIGS[name].classes or ("0", "1"))[1]
    with pytest.raises(DataError, match=rf"all 3 training labels of column `{name}` are '{word}'"):
        task.fit(np.array([1, 1, NAN, 1], np.float32))


@every_task
def test_a_task_from_its_stored_state_behaves_the_same(name: str) -> None:
    task = tasks_of(name)[name]
    task.calibrate(task.predict(outputs(task, 40)), labels_of(task, 40))
    other = make_task(name, CONFIGS[name])
    other.load_state(json.loads(json.dumps(task.state())))
    out, truth = outputs(task, 40, seed=1), labels_of(task, 40, seed=1)
    assert torch.equal(task.loss(out, torch.from_numpy(truth)), other.loss(out, torch.from_numpy(truth)))
    assert task.measure(task.predict(out), truth) == other.measure(other.predict(out), truth)


def test_state_of_another_kind_is_refused() -> None:
    tasks = tasks_of("rul", "failing")
    with pytest.raises(StorageError, match=r"'rul' is of kind 'regression'.*of kind 'binary'"):
        tasks["rul"].load_state(tasks["failing"].state())


@every_task
def test_a_copy_calibrated_for_one_model_leaves_the_task_alone(name: str) -> None:
    task = tasks_of(name)[name]
    before = task.state()
    own = copy.copy(task)
    own.calibrate(own.predict(outputs(own, 40)), labels_of(own, 40))
    assert task.state() == before


@every_task
def test_without_labels_every_metric_is_undefined(name: str) -> None:
    task = tasks_of(name)[name]
    prediction = task.predict(outputs(task, 4))
    for truth in (unlabelled(task, 4), unlabelled(task, 4)[:0]):
        assert task.measure(prediction[: len(truth)], truth) == dict.fromkeys(task.metrics)
        assert task.score(prediction[: len(truth)], truth) is None


@every_task
def test_rows_without_a_label_do_not_count_in_any_metric(name: str) -> None:
    task = tasks_of(name)[name]
    prediction, truth = task.predict(outputs(task, 30)), labels_of(task, 30)
    keep = np.arange(30) % 3 > 0
    gaps = truth.copy()
    gaps[~keep] = NAN
    assert task.measure(prediction, gaps) == task.measure(prediction[keep], truth[keep])


@every_task
def test_a_model_that_answers_nan_has_no_score_and_stops_nobody(name: str) -> None:
    task = tasks_of(name)[name]
    truth = labels_of(task, 12)
    measured = task.measure(np.full_like(task.predict(outputs(task, 12)), NAN), truth)
    assert set(measured) == set(task.metrics)
    assert all(value is None or np.isfinite(value) for value in measured.values())
    if task.kind == "regression":
        assert measured["rmse"] is None


@every_task
def test_the_primary_metric_is_the_score(name: str) -> None:
    task = tasks_of(name)[name]
    prediction, truth = task.predict(outputs(task, 30)), labels_of(task, 30)
    assert task.measure(prediction, truth)[task.primary] == task.score(prediction, truth)


@every_task
def test_any_metric_can_take_the_lead(name: str) -> None:
    """`metric` in site.toml: card, score and measure follow, and the value is what it was in its old place."""
    plain = tasks_of(name)[name]
    out = plain.predict(outputs(plain, 30))
    truth = labels_of(plain, 30)
    for metric in plain.metrics:
        task = make_task(name, CONFIGS[name].model_copy(update={"metric": metric}))
        task.load_state(plain.state())
        measured = task.measure(out, truth)
        assert task.card.metric == metric
        assert task.card.better == plain.metrics[metric].better
        assert task.score(out, truth) == measured[metric]
        assert measured == pytest.approx(plain.measure(out, truth))


@every_task
def test_a_metric_of_no_kind_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[tasks\.{name}\]: `metric = 'acuracy'`.*Known: "):
        make_task(name, CONFIGS[name].model_copy(update={"metric": "acuracy"}))


@every_task
def test_labels_are_described_in_one_line(name: str) -> None:
    task = tasks_of(name)[name]
    truth = labels_of(task, 40)
    text = task.describe(truth)
    assert text
    assert "\n" not in text
    assert "unlabelled" not in text
    truth[:10] = NAN
    assert "25% unlabelled" in task.describe(truth)
    assert task.describe(unlabelled(task, 5)).startswith("no labels")
    assert task.describe(truth[:0]) == "no samples"


@pytest.mark.parametrize("name", ["type", "train", "keys", "half"])
def test_a_task_name_that_torch_would_shadow_is_refused_early(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[tasks\.{name}\].*Rename the table; `target` may stay"):
        make_task(name, TaskConfig(kind="binary", target=name))


@settings(deadline=None)
@given(st.from_regex(r"^[A-Za-z][A-Za-z0-9_-]{0,63}\Z"))
def test_every_other_task_name_is_a_head_and_a_card(name: str) -> None:
    if hasattr(nn.ModuleDict(), name):
        return
    task = make_task(name, CONFIGS["failing"])
    assert task.card.task == name
    model = build_model(TrunkSpec(width=4), window=3, channels=1, tasks={name: task}, seed=0)
    assert f"head.{name}.weight" in model.share((f"head.{name}",))
    out = torch.func.functional_call(model, dict(model.named_parameters()), (torch.zeros(2, 1, 3),))
    assert list(out) == [name]


PAGE = Path(__file__).parents[2] / "docs" / "site-toml.md"


def test_every_task_table_of_the_page_can_be_meant() -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    tables = {name: table for block in blocks for name, table in tomllib.loads(block).get("tasks", {}).items()}
    assert {"rul", "valve", "modes"} <= set(tables)
    for name, table in tables.items():
        assert make_task(name, TaskConfig.model_validate(table)).card.kind == table["kind"]


@pytest.mark.parametrize("kind", TASKS)
def test_the_page_names_every_metric(kind: str) -> None:
    text = PAGE.read_text()
    assert [metric for metric in TASKS[kind].METRICS if f"`{metric}`" not in text] == []


def test_an_unknown_kind_names_the_nearest() -> None:
    config = CONFIGS["rul"].model_copy(update={"kind": "regresion"})
    with pytest.raises(ConfigError, match=r"'regresion'; did you mean 'regression'\? Known: regression, binary"):
        make_task("rul", config)
