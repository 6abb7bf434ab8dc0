"""Laws of augmentation: what each variation does, what it leaves alone, and that off is as if it were not there."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.client.small import learnable, model_for, resident, tasks_for
from trunkline.client.training.augmentation import Augmenter
from trunkline.client.training.loop import train_site
from trunkline.client.training.single_model import task_losses
from trunkline.config.tasks import TaskConfig
from trunkline.models.tasks import Task, make_task
from trunkline.protocol.plan import Augment, LocalPlan

CPU = torch.device("cpu")
WINDOWS = torch.from_numpy(np.random.default_rng(0).normal(size=(400, 6, 20)).astype(np.float32))
ROWS = WINDOWS[:, :, 0]


def vary(x: Tensor, *, seed: int = 0, **plan: float) -> Tensor:
    return Augmenter(Augment(**plan), {}, 0, CPU, seed)(x, {}).x


def test_off_leaves_the_batch_as_it_is() -> None:
    assert not Augmenter.wanted(Augment()) and Augmenter.wanted(Augment(jitter=0.1))
    assert vary(WINDOWS) is WINDOWS


def test_jitter_adds_noise_of_its_size_and_nothing_else() -> None:
    noise = vary(WINDOWS, jitter=0.3) - WINDOWS
    assert noise.std() == pytest.approx(0.3, rel=0.02)
    assert abs(noise.mean()) < 0.01
    assert abs(np.corrcoef(noise.flatten()[:-1], noise.flatten()[1:])[0, 1]) < 0.02


def test_scaling_is_one_factor_a_sample_and_channel() -> None:
    factor = vary(WINDOWS, scaling=0.2) / WINDOWS
    torch.testing.assert_close(factor, factor[:, :, :1].expand_as(factor), rtol=1e-4, atol=1e-4)
    assert factor[:, :, 0].std() == pytest.approx(0.2, rel=0.1)
    assert factor[:, :, 0].mean() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("share", "rows"), [(0.001, 1), (0.25, 5), (0.99, 20)])
def test_a_time_mask_silences_one_stretch_of_all_sensors(share: float, rows: int) -> None:
    silent = vary(WINDOWS, time_mask=share).isnan()
    assert (silent == silent[:, :1]).all()
    assert (silent[:, 0].sum(dim=1) == rows).all()
    assert (silent[:, 0].int().diff(dim=1).abs().sum(dim=1) <= 2).all()  # one stretch
    if rows < 20:
        assert silent[:, 0, 0].any() and silent[:, 0, -1].any()  # anywhere, the ends included


def test_a_dropped_channel_is_silent_throughout_and_about_as_often_as_asked() -> None:
    for x in (WINDOWS, ROWS):
        silent = vary(x, channel_drop=0.3).isnan().view(400, 6, -1)
        assert (silent.all(dim=2) == silent.any(dim=2)).all()
        assert silent.float().mean() == pytest.approx(0.3, abs=0.03)


def test_table_rows_have_no_time_to_mask() -> None:
    assert vary(ROWS, time_mask=0.5) is ROWS


def test_what_was_silent_stays_silent_and_the_batch_itself_is_not_written_to() -> None:
    x = WINDOWS.masked_fill(torch.rand(WINDOWS.shape, generator=torch.Generator().manual_seed(1)) < 0.2, torch.nan)
    before = x.clone()
    every = Augment(jitter=0.1, scaling=0.1, time_mask=0.1, channel_drop=0.1, mixup=0.4)
    varied = Augmenter(every, {}, 0, CPU, 3)(x, {}).x
    assert varied.isnan()[before.isnan()].all()
    torch.testing.assert_close(x, before, equal_nan=True, rtol=0, atol=0)


def test_equal_seeds_vary_alike_and_others_do_not() -> None:
    every = {"jitter": 0.1, "scaling": 0.1, "time_mask": 0.1, "channel_drop": 0.1, "mixup": 0.4}
    torch.manual_seed(1)
    one = vary(WINDOWS, seed=1, **every)
    torch.manual_seed(2)  # the global generator is no part of it
    torch.testing.assert_close(one, vary(WINDOWS, seed=1, **every), equal_nan=True, rtol=0, atol=0)
    assert not torch.equal(one.nan_to_num(), vary(WINDOWS, seed=2, **every).nan_to_num())


def mixed(labels: dict[str, Tensor], tasks: dict[str, Task], x: Tensor = ROWS[:8], categorical: int = 0):  # type: ignore[no-untyped-def]
    return Augmenter(Augment(mixup=0.5), tasks, categorical, CPU, 0)(x, labels)


def test_mixup_is_the_published_mixture_of_inputs_and_labels() -> None:
    """For cross entropy: the loss on soft labels, worked out the other way round."""
    task = make_task(
        "fault", TaskConfig(kind="multiclass", target="fault", classes=("a", "b", "c"), class_weights="none")
    )
    labels = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 2.0, 1.0])
    task.fit(labels.numpy())
    sample = mixed({"fault": labels}, {"fault": task})
    (share, one), (rest, other) = sample.terms
    assert share + rest == pytest.approx(1.0) and 0.0 < share < 1.0
    partner = torch.cat([torch.tensor([7]), torch.arange(7)])
    torch.testing.assert_close(sample.x, share * ROWS[:8] + rest * ROWS[:8][partner])
    output = torch.randn(8, 3, generator=torch.Generator().manual_seed(4))
    soft = share * F.one_hot(labels.long(), 3) + rest * F.one_hot(labels[partner].long(), 3)
    uniform = torch.tensor(task.emphasis)  # type: ignore[attr-defined]
    expected = -(soft * uniform * output.log_softmax(dim=1)).sum(dim=1).mean()
    found = sum(part * task_losses({"fault": output}, given, {"fault": task})[0] for part, given in sample.terms)
    torch.testing.assert_close(found, expected)
    assert one["fault"].equal(labels) and other["fault"].equal(labels[partner])


def test_mixup_learns_only_where_both_samples_are_labelled() -> None:
    tasks = tasks_for({"wear": np.arange(8.0)})
    labels = {"wear": torch.tensor([1.0, torch.nan, 3.0, 4.0, torch.nan, 6.0, 7.0, 8.0])}
    (_, one), (_, other) = mixed(labels, tasks).terms
    both = [False, False, False, True, False, False, True, True]
    both[0] = True  # its partner is the last one
    assert (~one["wear"].isnan()).tolist() == (~other["wear"].isnan()).tolist() == both


def test_a_mixture_with_an_anomaly_is_one() -> None:
    """A task that reconstructs its input must not take half an anomaly for a normal, unlabelled sample."""

    class Reconstructs(type(tasks_for({"flag": np.array([0.0, 1.0])})["flag"])):  # type: ignore[misc]
        def combine_with_inputs(self, output: Tensor, x: Tensor) -> Tensor:
            return output - x

    flags = {"flag": torch.tensor([1.0, torch.nan, 0.0, torch.nan, 0.0, 0.0, 1.0, 0.0])}
    task = Reconstructs("flag", TaskConfig(kind="binary", target="flag"))
    (_, one), (_, other) = mixed(flags, {"flag": task}).terms
    torch.testing.assert_close(one["flag"], other["flag"], equal_nan=True)
    assert one["flag"].nan_to_num(-1).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_codes_are_not_mixed() -> None:
    assert mixed({}, {}, categorical=2).x is not None
    assert len(mixed({}, {}, categorical=2).terms) == 1
    torch.testing.assert_close(mixed({}, {}, categorical=2).x, ROWS[:8])


def test_what_is_to_be_reconstructed_carries_no_noise() -> None:
    sample = Augmenter(Augment(jitter=0.5, time_mask=0.2), {}, 0, CPU, 0)(WINDOWS, {})
    assert sample.clean is WINDOWS and not torch.equal(sample.x, WINDOWS)


def trunk(plan: LocalPlan) -> str:
    labels = learnable()
    tasks = tasks_for(labels)
    model = model_for(tasks)
    train_site(model, resident(labels), tasks, plan, seed=1, done=0, rounds=2)
    return model.share(("trunk", "stem", "heads")).digest()


def test_augmenting_draws_from_a_generator_of_its_own() -> None:
    """A chance that never comes true costs random numbers and changes no batch and no dropout."""
    plain = LocalPlan(steps=4, batch_size=32)
    never = plain.model_copy(update={"augment": Augment(channel_drop=1e-30)})
    always = plain.model_copy(update={"augment": Augment(channel_drop=0.5)})
    assert trunk(plain) == trunk(never) != trunk(always)


@pytest.mark.parametrize("name", ["jitter", "scaling", "channel_drop", "mixup"])
def test_each_variation_reaches_the_training_and_repeats_to_the_bit(name: str) -> None:
    plan = LocalPlan(steps=3, batch_size=32, augment=Augment(**{name: 0.3}))
    assert trunk(plan) == trunk(plan) != trunk(LocalPlan(steps=3, batch_size=32))
