"""Labels with channels of their own: one set of weights for all of them, past the network."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.models.samples import labels_of
from trunkline.config.site import SiteConfig
from trunkline.config.tasks import TaskConfig
from trunkline.models.tasks import Task, make_task
from trunkline.models.tasks.skip_channels import SkipHead, fit_shared_weights, select_channels
from trunkline.models.tasks.task import Samples
from trunkline.models.trunk import TrunkModel, build_model
from trunkline.protocol.plan import TrunkSpec

NAN = float("nan")
CHANNELS = ("na", "nb", "nc", "ra", "rb", "rc", "speed")
OWN = [["na", "nb", "nc"], ["ra", "rb", "rc"]]


def task(channels: tuple[str, ...] = CHANNELS, window: int | None = None, **settings: object) -> Task:
    config = {"kind": "multilabel", "targets": ["a", "b", "c"], "skip_channels": OWN, **settings}
    made = make_task("alarms", TaskConfig.model_validate(config))
    made.bind_inputs(Samples(channels, window))
    return made


def model(task: Task, lend: tuple[str, ...] = ("trunk",)) -> TrunkModel:
    spec = TrunkSpec(backbone="mlp", width=8)
    return build_model(spec, window=None, channels=len(CHANNELS), tasks={"alarms": task}, seed=0, lend=lend)


def world(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples (rows, 7), and labels that each follow from their own two channels and from nothing else."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, len(CHANNELS))).astype(np.float32)
    odds = 2.0 * x[:, :3] - 1.0 * x[:, 3:6] - 1.0
    return x, (draw.random((rows, 3)) < 1 / (1 + np.exp(-odds))).astype(np.float32)


@pytest.mark.parametrize("window", [None, 4])
@given(st.integers(0, 1000), st.permutations(CHANNELS), st.sets(st.sampled_from(CHANNELS), max_size=4))
@settings(max_examples=25, deadline=None)
def test_meeting_equals_the_slow_oracle(window: int | None, seed: int, order: list[str], gone: set[str]) -> None:
    """Every label takes its own channels, wherever they stand, of the newest row; missing and dropped ones count nothing."""
    channels = tuple(name for name in order if name not in gone)
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(5, len(channels), *([window] if window else []))).astype(np.float32)
    x[draw.random(x.shape) < 0.2] = NAN
    one = task(channels, window)
    given_by_head = torch.from_numpy(draw.normal(size=(5, one.outputs)).astype(np.float32))
    assert one.outputs == 5
    met = one.combine_with_inputs(given_by_head, torch.from_numpy(x))
    for row in range(5):
        for label in range(3):
            total = float(given_by_head[row, label])
            for at, names in enumerate(OWN):
                if names[label] in channels:
                    place = channels.index(names[label])
                    value = x[row, place, -1] if window else x[row, place]
                    total += 0.0 if np.isnan(value) else float(given_by_head[row, 3 + at]) * float(value)
            assert float(met[row, label]) == pytest.approx(total, abs=1e-5)


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.5]))
@settings(max_examples=20, deadline=None)
def test_the_start_is_the_logistic_regression_of_all_cells(seed: int, unknown: float) -> None:
    x, truth = world(120, seed)
    truth[np.random.default_rng(seed).random(truth.shape) < unknown] = NAN
    truth[0] = [0.0, 1.0, NAN]
    own = select_channels(torch.from_numpy(x), torch.tensor([[0, 1, 2], [3, 4, 5]]))
    weights, level = fit_shared_weights(own, torch.from_numpy(truth))
    known = ~np.isnan(truth)
    cells = np.stack([x[:, :3][known], x[:, 3:6][known], np.ones(known.sum())], axis=1)
    slow = np.zeros(3)
    for _ in range(20_000):  # down the slope of the penalised loss, which has one minimum
        slow -= (cells.T @ (1 / (1 + np.exp(-cells @ slow)) - truth[known]) + slow) / (len(cells) + 1)
    np.testing.assert_allclose([*weights.tolist(), level], slow, atol=2e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_few_samples_of_one_answer_do_not_fit_themselves(value: float) -> None:
    weights, level = fit_shared_weights(torch.full((2, 1, 3), 1e3), torch.full((2, 3), value))
    assert abs(level) < 10
    assert abs(float(weights[0])) < 10


@pytest.mark.parametrize("weighting", ["none", "effective"])
def test_a_label_that_hardly_rang_is_predicted_by_what_the_others_teach(weighting: str) -> None:
    """Before any training: what three labels' channels mean is learnt from two of them."""
    one = task(class_weights=weighting)
    x, truth = world(400)
    truth[1:, 2] = 0.0
    truth[0, 2] = 1.0
    one.fit(truth)
    one.fit_inputs(x, np.where(np.arange(3) == 2, np.float32(NAN), truth))
    fresh, then = world(2000, 1)
    with torch.no_grad():
        output = model(one)(torch.from_numpy(fresh))["alarms"]
    guess = one.predict(one.combine_with_inputs(output, torch.from_numpy(fresh)))
    assert ((guess[:, 2] > 0.5) == then[:, 2]).mean() > 0.78  # nobody reaches more than .8 here
    assert abs(guess.mean() - then.mean()) < 0.03  # probabilities, whatever the loss weighs


def test_a_head_that_is_lent_shows_nothing_of_its_labels() -> None:
    heads = []
    for seed in (0, 1):
        one = task()
        x, truth = world(200 + 100 * seed, seed)
        one.fit(truth)
        one.fit_inputs(x, truth)
        heads.append(model(one, ("trunk", "heads")).heads["alarms"].state_dict())
    assert set(heads[0]) == {"weight", "bias", "own"}
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not heads[0]["own"].any()


def test_what_was_looked_up_survives_the_vault() -> None:
    one, other = task(), task()
    x, truth = world(100)
    one.fit(truth)
    one.fit_inputs(x, truth)
    other.load_state(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    assert other.outputs == one.outputs
    for name, value in model(one).heads["alarms"].state_dict().items():
        assert torch.equal(value, model(other).heads["alarms"].state_dict()[name]), name


def test_without_skip_channels_nothing_is_there() -> None:
    one = task(skip_channels=[])
    one.fit(labels_of(make_task("alarms", TaskConfig(kind="multilabel", targets=("a", "b", "c"))), 40))
    assert not one.combines_inputs
    assert type(model(one).heads["alarms"]) is nn.Linear
    assert set(one.state()) == {"kind", "positive", "negative", "thresholds"}
    output = torch.randn(4, 3)
    assert one.combine_with_inputs(output, torch.randn(4, 7)) is output


def test_the_weights_of_skip_channels_train() -> None:
    one = task()
    x, truth = world(200)
    one.fit(truth)
    net = model(one, ("trunk", "heads"))
    head = net.heads["alarms"]
    assert isinstance(head, SkipHead)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(truth)
    one.loss(one.combine_with_inputs(net(inputs)["alarms"], inputs), labels).backward()
    assert head.own.grad is not None
    assert head.own.grad[0] < 0 < head.own.grad[1]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            {"skip_channels": [["na", "nb"]]},
            r"list 1 of `skip_channels` has 2 channels and `targets` 3 columns; each list",
        ),
        ({"skip_channels": [OWN[0], [*OWN[1], "speed"]]}, r"list 2 of `skip_channels` has 4 channels"),
        (
            {"skip_channels": [["na", "nb", "sped"]]},
            r"names `sped`, which is not a channel; did you mean 'speed'\? List it under",
        ),
        ({"kind": "binary", "target": "a", "targets": []}, "`skip_channels` is for kind 'multilabel', not 'binary'"),
    ],
)
def test_skip_channels_that_lead_nowhere_are_refused(table: dict[str, object], words: str) -> None:
    alarms = {"kind": "multilabel", "targets": ["a", "b", "c"], "skip_channels": OWN, **table}
    if not alarms["targets"]:
        del alarms["targets"]
    with pytest.raises(ValueError, match=words):
        SiteConfig.model_validate(
            {"name": "m", "data": {"files": "a.csv", "channels": list(CHANNELS)}, "tasks": {"alarms": alarms}}
        )
