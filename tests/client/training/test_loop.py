"""Laws of the training loop: with everything off it is the plain loop, and what it draws is drawn fairly."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.client.small import learnable, model_for, resident, tasks_for
from trunkline.client.data import open_data
from trunkline.client.training import loop as training
from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.client.training.loop import train_site
from trunkline.client.training.sampling import Batches, chances
from trunkline.client.training.single_model import SingleModel
from trunkline.config.tasks import TaskConfig
from trunkline.models.labels import known
from trunkline.models.tasks import Task, make_task
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import Arrays, seed_of
from trunkline.protocol.plan import LocalPlan, Phase, TrunkSpec

CPU = torch.device("cpu")
EVERYTHING = ("trunk", "stem", "heads")


def plain_loop(model: TrunkModel, data: DeviceDataset, tasks: dict[str, Task], plan: LocalPlan, seed: int) -> None:
    """What a round is, without options: a dozen lines against which the real loop is held."""
    parts = [{"params": model.parameters_of(part)} for part in ("stem", "trunk", "heads")]
    optimiser = torch.optim.AdamW(parts, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True)
    draw = np.random.default_rng(seed_of(seed, "batches"))
    order = np.empty(0, np.int64)
    model.train()
    torch.manual_seed(seed_of(seed, "dropout"))
    for step in range(plan.steps):
        while len(order) < plan.batch_size:
            order = np.concatenate([order, draw.permutation(len(data))])
        index, order = torch.from_numpy(order[: plan.batch_size]), order[plan.batch_size :]
        for group in optimiser.param_groups:
            group["lr"] = plan.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step / plan.steps) / 2))
        outputs = model(*data.batch(index))
        loss = torch.stack([task.loss(outputs[name], data.labels[name][index]) for name, task in tasks.items()]).sum()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for part in parts for p in part["params"]], plan.clip_norm)
        optimiser.step()


@pytest.mark.parametrize("window", [None, 6])
def test_with_everything_off_a_round_is_the_plain_loop_to_the_bit(window: int | None) -> None:
    labels = learnable()
    tasks = tasks_for(labels)
    spec = TrunkSpec(backbone="mlp" if window is None else "tcn", width=32)
    data = resident(labels, window=window)
    plan = LocalPlan(steps=9, batch_size=48)
    real, slow = (model_for(tasks, spec=spec, window=window) for _ in range(2))
    train_site(real, data, tasks, plan, seed=3, done=0, rounds=2)
    plain_loop(slow, data, tasks, plan, 3)
    assert real.share(EVERYTHING).digest() == slow.share(EVERYTHING).digest()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("optimizer", ["adamw", "lbfgs"])
def test_rows_sent_batch_by_batch_train_to_the_same_bits(window: int | None, optimizer: str) -> None:
    labels = learnable()
    tasks = tasks_for(labels)
    spec = TrunkSpec(backbone="mlp" if window is None else "tcn", width=32)
    plan = LocalPlan(steps=5, batch_size=48, optimizer=optimizer)
    ends = []
    for goes in (None, CPU):
        data = replace(resident(labels, window=window), goes=goes)
        model = model_for(tasks, spec=spec, window=window)
        train_site(model, data, tasks, plan, seed=3, done=0, rounds=2)
        outputs = training.outputs_of(model, data, tasks)
        ends.append((model.share(EVERYTHING).digest(), {name: one.numpy().tobytes() for name, one in outputs.items()}))
    assert ends[0] == ends[1]


def test_rows_that_do_not_fit_on_the_device_stay_and_are_sent(
    plants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(plants[0], tmp_path).train
    plain = DeviceDataset.of(data, CPU)
    monkeypatch.setattr(
        "trunkline.client.training.device_dataset.fits", lambda nbytes, where: nbytes < data.values.nbytes
    )
    sent = DeviceDataset.of(data, CPU)
    assert (plain.goes, sent.goes, sent.where) == (None, CPU, CPU)
    both = DeviceDataset.joined([plain, sent])
    assert both.goes == CPU  # a site whose rows fit goes with those whose rows do not
    assert torch.equal(both.batch(torch.tensor([len(data)]))[0], plain.batch(torch.tensor([0]))[0])
    index = torch.tensor([3, 0, len(data) - 1])
    for one, other in zip(plain.batch(index), sent.batch(index), strict=True):
        assert torch.equal(one, other)


def test_a_uniform_pass_sees_every_sample_once() -> None:
    batches = Batches(60, 20, 1, CPU)
    seen = torch.cat([batches.next() for _ in range(6)])
    assert sorted(seen[:60].tolist()) == sorted(seen[60:].tolist()) == list(range(60))
    assert seen[:60].tolist() != seen[60:].tolist()


def test_a_site_smaller_than_a_batch_gets_all_its_samples() -> None:
    batches = Batches(7, 128, 1, CPU)
    assert sorted(batches.next().tolist()) == list(range(7))


def drawn(chance: np.ndarray | None, size: int, batches: int = 400) -> np.ndarray:
    source = Batches(size, 32, 5, CPU, chance)
    return np.bincount(torch.cat([source.next() for _ in range(batches)]).numpy(), minlength=size)


def test_balanced_sampling_shows_rare_classes_as_often_as_common_ones() -> None:
    labels = np.repeat([0.0, 1.0, 2.0], [170, 20, 10]).astype(np.float32)
    task = make_task("fault", TaskConfig(kind="multiclass", target="fault", classes=("a", "b", "c")))
    chance = chances({"fault": labels}, {"fault": task})
    assert chance is not None and chance.sum() == pytest.approx(1.0)
    often = drawn(chance, 200)
    shares = np.array([often[labels == one].sum() for one in range(3)]) / often.sum()
    # the effective number of 170 samples is a little under 170, so the common class stays a little under a third
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)
    assert often[labels == 2].std() < 0.2 * often[labels == 2].mean()  # within a class all alike


def test_very_common_classes_count_as_equally_common() -> None:
    """Effective numbers: beyond some thousand samples more of them say nothing new."""
    labels = np.repeat([0.0, 1.0], [20_000, 10_000]).astype(np.float32)
    task = make_task("late", TaskConfig(kind="binary", target="late"))
    chance = chances({"late": labels}, {"late": task})
    assert chance is not None
    assert chance[0] == pytest.approx(chance[-1], rel=1e-3)


def test_several_tasks_have_an_equal_say_and_a_missing_label_has_none() -> None:
    rare, other = np.zeros(100, np.float32), np.zeros(100, np.float32)
    rare[:10], other[50:] = 1.0, 1.0
    rare[90:] = np.nan
    tasks = {name: make_task(name, TaskConfig(kind="binary", target=name)) for name in ("rare", "other")}
    both = chances({"rare": rare, "other": other}, tasks)
    one = chances({"rare": rare}, {"rare": tasks["rare"]})
    assert one is not None and both is not None
    np.testing.assert_allclose(one[90:], 0.01)
    assert one.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(both, (one + 0.01) / 2, atol=1e-9)  # `other` is balanced as it is
    assert one[0] / one[20] == pytest.approx(8.0, rel=0.05)


def test_a_row_of_several_labels_counts_as_its_rarest() -> None:
    rows = np.zeros((100, 3), np.float32)
    rows[:60, 0] = 1.0
    rows[:6, 1] = 1.0
    rows[0, 2] = np.nan
    task = make_task("alarms", TaskConfig(kind="multilabel", targets=("a", "b", "c")))
    chance = chances({"alarms": rows}, {"alarms": task})
    assert chance is not None
    assert chance[:6].sum() == pytest.approx(chance[6:60].sum(), rel=0.05) == pytest.approx(chance[60:].sum(), rel=0.05)


def test_without_classes_sampling_is_uniform() -> None:
    labels = {"wear": learnable()["wear"]}
    tasks = tasks_for(labels)
    assert chances(labels, tasks) is None  # type: ignore[arg-type]

    def trunk(sampling: str) -> str:
        model = model_for(tasks)
        plan = LocalPlan(steps=3, batch_size=32, sampling=sampling)  # type: ignore[arg-type]
        train_site(model, resident(labels), tasks, plan, seed=1, done=0, rounds=2)
        return model.share().digest()

    assert trunk("balanced") == trunk("uniform")


def test_balanced_sampling_reaches_the_training_and_repeats_to_the_bit() -> None:
    labels = learnable()
    tasks = tasks_for(labels)
    assert known(labels["failing"]).all() and labels["failing"].mean() < 0.3

    def trunk(sampling: str) -> str:
        model = model_for(tasks)
        plan = LocalPlan(steps=3, batch_size=32, sampling=sampling)  # type: ignore[arg-type]
        train_site(model, resident(labels), tasks, plan, seed=1, done=0, rounds=2)
        return model.share().digest()

    assert trunk("balanced") == trunk("balanced") != trunk("uniform")


def test_a_look_back_sees_the_same_batch_the_same_way_and_leaves_no_trace() -> None:
    """FAMO compares a batch's losses before and after a step: same dropout, and private norms that count it once."""
    labels = learnable()
    tasks = tasks_for(labels)
    spec = TrunkSpec(backbone="mlp", width=32, norm="private", dropout=0.4)
    model, data = model_for(tasks, spec=spec), resident(labels)
    model.train()
    learner = SingleModel(model, data, tasks, LocalPlan(batch_size=50), seed=1)
    batch = learner.next_batch()
    replay = learner.replay()
    first = learner.forward(batch)[1]
    buffers = [buffer.clone() for buffer in model.buffers()]
    generator = torch.get_rng_state()
    with replay:
        second = learner.forward(batch)[1]
    assert [float(one.detach()) for one in first] == [float(one) for one in second]
    assert not any(one.requires_grad for one in second)
    assert all(torch.equal(one, other) for one, other in zip(buffers, model.buffers(), strict=True))
    assert torch.equal(generator, torch.get_rng_state()) and torch.is_grad_enabled()


@pytest.mark.parametrize("balance", ["fixed", "uncertainty", "famo", "upgrad"])
def test_every_method_moves_only_the_parts_of_its_phase(balance: str) -> None:
    labels = learnable()
    tasks = tasks_for(labels)
    for parts in (("heads",), ("trunk",), ("stem", "heads")):
        model = model_for(tasks)
        before = model.share(EVERYTHING)
        plan = LocalPlan(steps=2, batch_size=32, phases=(Phase(parts=parts),), balance=balance)  # type: ignore[arg-type]
        train_site(model, resident(labels), tasks, plan, seed=1, done=0, rounds=2)
        after: Arrays = model.share(EVERYTHING)
        moved = {name.split(".")[0] for name in before if before[name].tobytes() != after[name].tobytes()}
        assert moved == {"head" if part == "heads" else part for part in parts}
