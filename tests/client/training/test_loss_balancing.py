"""Laws of balancing: no task drowns another, none is harmed without need, and one that is absent is not felt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn
from torchjd.aggregation import UPGradWeighting

from tests.client.small import learnable, model_for, resident, tasks_for
from trunkline.client.training import loop as training
from trunkline.client.training.dual_cone import NonNegativeProjector
from trunkline.client.training.loop import train_site
from trunkline.client.training.loss_balancing import BALANCES, Conflicts, Famo, Uncertainty, gradients
from trunkline.client.training.single_model import task_losses
from trunkline.models.tasks import Task
from trunkline.protocol.contract import conflict_name
from trunkline.protocol.plan import LocalPlan

CPU = torch.device("cpu")
LEARNT = sorted(set(BALANCES) - {"fixed"})


@st.composite
def jacobians(draw: st.DrawFn) -> np.ndarray:
    """(m, n) task gradients: of any rank, with rows from 1e-3 to 1e3 long, equal and zero rows among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    rank = draw(st.integers(0, min(m, n)))
    rows = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))
    if m > 1 and draw(st.booleans()):
        rows[0] = -rows[1]
    return rows * 10.0 ** rng.uniform(-3, 3, size=(m, 1))


def upgrad(rows: np.ndarray) -> np.ndarray:
    """(m, n) -> (n,) UPGrad's combination, as a mean."""
    matrix = torch.from_numpy(rows)
    weights = UPGradWeighting(projector=NonNegativeProjector())(matrix @ matrix.T)
    return np.asarray((weights @ matrix).numpy())


@given(jacobians())
@settings(max_examples=150, deadline=None)
def test_upgrad_goes_against_no_task(rows: np.ndarray) -> None:
    combined = upgrad(rows)
    lengths = np.linalg.norm(rows, axis=1)
    assert (rows @ combined >= -1e-11 * lengths * lengths.sum()).all()  # up to rounding: opposite rows cancel


@given(jacobians())
@settings(max_examples=50, deadline=None)
def test_upgrad_is_the_mean_where_nothing_conflicts(rows: np.ndarray) -> None:
    rows = np.abs(rows)  # no two rows of one orthant conflict
    np.testing.assert_allclose(upgrad(rows), rows.mean(axis=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(12))
def test_the_projection_is_the_nearest_vector_that_no_row_objects_to(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(rng.integers(2, 5), rng.integers(2, 6)))
    if seed % 3 == 0:
        rows[-1] = -0.5 * rows[0] + 0.1 * rows[1]  # dependent
    wish = rng.uniform(0.1, 1.0, len(rows))
    target = wish @ rows
    slow = minimize(
        lambda v: 0.5 * np.square(v - target).sum(), target, jac=lambda v: v - target, method="SLSQP",
        constraints={"type": "ineq", "fun": lambda v: rows @ v, "jac": lambda v: rows}, options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    gramian = torch.from_numpy(rows @ rows.T)
    weights = NonNegativeProjector()(torch.from_numpy(wish), gramian).numpy()  # type: ignore[arg-type]
    assert (weights >= wish - 1e-12).all()
    np.testing.assert_allclose(weights @ rows, slow.x, atol=1e-6)


def test_gradients_that_are_not_finite_pass_through_to_the_checks_behind() -> None:
    weights = NonNegativeProjector()(torch.ones(2), torch.full((2, 2), torch.nan))  # type: ignore[arg-type]
    assert weights.tolist() == [1.0, 1.0]


class Toy:
    """Two heads on one embedding, losses as given by scales of their squared outputs."""

    def __init__(self, *directions: list[float]) -> None:
        torch.manual_seed(0)
        self.trunk = nn.Linear(5, 2)
        self.heads = [nn.Linear(2, 1, bias=False) for _ in directions]
        for head, direction in zip(self.heads, directions, strict=True):
            head.weight.data = torch.tensor([direction])
        self.x = torch.eye(5)  # so that the gradient of the trunk's weight is that at its output

    def losses(self, *scales: float) -> tuple[list[Tensor], Tensor]:
        embedded = self.trunk(self.x)
        each = [s * (h(embedded) - 3.0).square().mean() for h, s in zip(self.heads, scales, strict=True)]
        return each, embedded

    def clear(self) -> None:
        for parameter in (*self.trunk.parameters(), *(p for head in self.heads for p in head.parameters())):
            parameter.grad = None


def two(**weights: float) -> dict[str, Task]:
    labels = learnable()
    return tasks_for({"wear": labels["wear"], "heat": labels["heat"]}, **weights)


@pytest.mark.parametrize("name", LEARNT)
def test_equal_losses_weigh_alike(name: str) -> None:
    """Then every method is the plain sum."""
    toy = Toy([1.0, 0.5], [1.0, 0.5])
    steps = {}
    for method in ("fixed", name):
        toy.clear()
        each, embedded = toy.losses(1.0, 1.0)
        BALANCES[method](two(), CPU, {}).backward(each, None, embedded)
        steps[method] = [toy.trunk.weight.grad, *(head.weight.grad for head in toy.heads)]
    for plain, balanced in zip(steps["fixed"], steps[name], strict=True):
        torch.testing.assert_close(balanced, plain)


@pytest.mark.parametrize("name", LEARNT)
def test_the_unit_of_a_loss_does_not_turn_the_step(name: str) -> None:
    steps = []
    for scale in (1.0, 1000.0):
        toy = Toy([1.0, 0.5], [-1.0, 0.4])
        each, embedded = toy.losses(1.0, scale)
        BALANCES[name](two(), CPU, {}).backward(each, None, embedded)
        steps.append(nn.functional.normalize(toy.trunk.weight.grad.flatten(), dim=0))
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("name", LEARNT)
def test_site_weights_hold_under_every_method(name: str) -> None:
    toy = Toy([1.0, 0.5], [1.0, 0.5])
    each, embedded = toy.losses(3.0, 1.0)  # the loop hands over weighted losses
    BALANCES[name](two(wear=3.0), CPU, {}).backward(each, None, embedded)
    torch.testing.assert_close(toy.heads[0].weight.grad, 3.0 * toy.heads[1].weight.grad)


@pytest.mark.parametrize("name", LEARNT)
def test_a_task_without_a_label_is_not_felt(name: str) -> None:
    tasks = two()
    toy = Toy([1.0, 0.5], [-1.0, 0.3])
    remembered = {f"{name}.{task}": np.array([0.5], np.float32) for task in tasks}
    balance = BALANCES[name](tasks, CPU, remembered)
    each, embedded = toy.losses(1.0, 0.0)
    balance.backward(each, None, embedded)
    balance.look_back([one.detach() * 0.9 for one in each])
    assert not toy.heads[1].weight.grad.any()
    alone = toy.trunk.weight.grad.clone()
    toy.clear()
    each, _ = toy.losses(1.0, 0.0)
    each[0].backward()
    torch.testing.assert_close(alone, toy.trunk.weight.grad)
    after = balance.state()[f"{name}.heat"]
    if name == "famo":  # its logits decay together; only their differences mean something
        np.testing.assert_allclose(after, 0.5, atol=0.03)
    else:
        np.testing.assert_array_equal(after, [0.5])


def test_nothing_is_learnt_from_a_batch_without_any_label() -> None:
    for name in BALANCES:
        toy = Toy([1.0, 0.5], [-1.0, 0.3])
        each, embedded = toy.losses(0.0, 0.0)
        balance = BALANCES[name](two(), CPU, {})
        balance.backward(each, None, embedded)
        balance.look_back(each)
        assert torch.equal(toy.trunk.weight.grad, torch.zeros_like(toy.trunk.weight))


def test_upgrad_combines_at_the_trunks_output_and_leaves_heads_their_own_gradient() -> None:
    toy = Toy([1.0, 0.2], [-4.0, 0.3])  # both want an output of 3: their pulls on the embedding conflict
    each, embedded = toy.losses(1.0, 1.0)
    rows = gradients(each, embedded)
    alone = [
        torch.autograd.grad(one, head.weight, retain_graph=True)[0] for one, head in zip(each, toy.heads, strict=True)
    ]
    sized = rows / torch.stack(each).detach()[:, None]
    assert float((sized @ sized.sum(dim=0)).min()) < -0.1  # the sum would go against one of them
    BALANCES["upgrad"](two(), CPU, {}).backward(each, None, embedded)
    combined = toy.trunk.weight.grad.T.flatten()
    assert (sized @ combined >= -1e-5).all()
    for own, head in zip(alone, toy.heads, strict=True):
        torch.testing.assert_close(torch.cosine_similarity(head.weight.grad, own), torch.ones(1))


def test_famo_turns_to_whoever_improves_least() -> None:
    toy = Toy([1.0, 0.5], [-1.0, 0.4])
    balance = Famo(two(), CPU, {})
    each, embedded = toy.losses(1.0, 1.0)
    balance.backward(each, None, embedded)
    balance.look_back([0.5 * each[0], 0.99 * each[1]])
    fast, slow = (float(balance.state()[f"famo.{task}"][0]) for task in ("wear", "heat"))
    assert fast < 0.0 < slow


def test_a_log_variance_settles_at_the_logarithm_of_its_loss() -> None:
    toy = Toy([1.0, 0.5], [-1.0, 0.4])
    balance = Uncertainty(two(), CPU, {})
    for scale in (1.0, *[20.0] * 300):
        each, embedded = toy.losses(scale, 1.0)
        balance.backward(each, None, embedded)
    for task, loss in zip(("wear", "heat"), each, strict=True):
        assert float(balance.state()[f"uncertainty.{task}"][0]) == pytest.approx(float(loss.detach().log()), abs=1e-3)


@pytest.mark.parametrize("name", BALANCES)
def test_a_loss_in_other_units_does_not_dominate(name: str) -> None:
    """The same site twice, one task's loss times 1000 in the second: the trunk learns the same, except under plain weights.

    Not to the bit: what the weights sum to is held, so the whole step is longer or shorter, and its norm is clipped.
    """
    labels = {task: label for task, label in learnable().items() if task != "failing"}
    trunks = []
    for scale in (1.0, 1000.0):
        tasks = tasks_for(labels)
        honest = tasks["heat"].loss
        tasks["heat"].loss = lambda output, truth, honest=honest, scale=scale: scale * honest(output, truth)  # type: ignore[method-assign]
        model = model_for(tasks)
        start = model.share()
        plan = LocalPlan(steps=20, batch_size=64, balance=name)  # type: ignore[arg-type]
        train_site(model, resident(labels), tasks, plan, seed=1, done=0, rounds=2)
        trunks.append(np.concatenate([(array - start[key]).ravel() for key, array in model.share().items()]))
    apart = float(np.linalg.norm(trunks[0] - trunks[1]) / np.linalg.norm(trunks[0]))
    assert apart > 0.5 if name == "fixed" else apart < 0.15


@pytest.mark.parametrize("name", LEARNT)
def test_every_method_learns_all_tasks(name: str) -> None:
    labels = learnable()
    tasks = tasks_for(labels)
    model, data = model_for(tasks), resident(labels)

    def losses() -> np.ndarray:
        outputs = training.outputs_of(model, data, tasks)
        return np.array([float(one) for one in task_losses(outputs, data.labels, tasks)])

    before = losses()
    plan = LocalPlan(steps=100, batch_size=64, balance=name)  # type: ignore[arg-type]
    memory = train_site(model, data, tasks, plan, seed=1, done=0, rounds=2).balance
    assert (losses() < 0.7 * before).all()
    assert sorted(memory) == sorted(f"{name}.{task}" for task in tasks)


def test_what_balancing_remembers_goes_from_round_to_round_through_the_vault(
    plants: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trunkline.client import handlers as rounds
    from trunkline.client.handlers import answer_train
    from trunkline.client.site import open_site
    from trunkline.client.state.vault import Vault
    from trunkline.models.trunk import first_trunk
    from trunkline.protocol.messages import TrainRequest
    from trunkline.protocol.plan import TrunkSpec

    sites = [open_site({"site": str(folder), "state": str(tmp_path / folder.name)}) for folder in plants]
    site = next(one for one in sites if len(one.data.tasks) > 1 and one.config.data.window)
    spec = TrunkSpec(width=8)
    honest, given = rounds.train_site, []

    def watched(*args: object, balance: object = None, **kwargs: object) -> training.Trained:
        given.append(balance)
        return honest(*args, balance=balance, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(rounds, "train_site", watched)
    entries = []
    for round in (1, 2):
        plan = LocalPlan(steps=3, batch_size=16, balance="uncertainty")
        request = TrainRequest(run="r", seed=1, round=round, rounds=3, trunk=spec, plan=plan, lend=("trunk",))
        answer_train(site, request, first_trunk(spec, 1))
        found = Vault(site.state, "r").before(round + 1)
        assert found is not None
        entries.append(found)
    assert given == [None, None, entries[0].balance["federated"], entries[0].balance["local"]]
    for who in ("federated", "local"):
        first, second = entries[0].balance[who], entries[1].balance[who]
        assert all(abs(float(second[task][0] - first[task][0])) > 0.0 for task in first)
    names = {conflict_name(one, other) for one in site.data.tasks for other in site.data.tasks if one < other}
    assert names <= set(entries[0].metrics)
    assert all(-1.0 <= entries[0].metrics[name] <= 1.0 for name in names)


def test_memory_of_one_round_is_where_the_next_begins() -> None:
    labels = learnable()
    tasks = tasks_for(labels)
    plan = LocalPlan(steps=4, batch_size=32, balance="famo")

    def trunk(balance: dict[str, np.ndarray] | None) -> str:
        model = model_for(tasks)
        train_site(model, resident(labels), tasks, plan, seed=2, done=0, rounds=2, balance=balance)
        return model.share().digest()

    kept = {f"famo.{task}": np.array([value], np.float32) for task, value in zip(tasks, (2.0, -2.0, 0.0), strict=True)}
    assert trunk(kept) != trunk(None) == trunk({})


def test_cosines_are_those_of_the_gradients_at_the_trunks_output() -> None:
    toy = Toy([1.0, 0.0], [2.0, 0.0], [-1.0, 0.0])
    embedded = torch.zeros(4, 2, requires_grad=True)
    each = [(head(embedded) - 3.0).square().mean() for head in toy.heads]
    conflicts = Conflicts(("a", "b", "c"))
    conflicts.see(each, embedded)
    conflicts.see([each[0], each[1], 0.0 * each[2]], embedded)  # c has no label here, and the batch counts for a and b
    (found,) = conflicts.means()
    assert found == pytest.approx({"conflict.a.b": 1.0, "conflict.a.c": -1.0, "conflict.b.c": -1.0})
    silent = Conflicts(("a", "b"))
    silent.see([each[0], 0.0 * each[1]], embedded)
    assert silent.means() == [{}]


def test_looking_at_conflicts_changes_no_trained_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = learnable()
    tasks = tasks_for(labels)

    def trained() -> tuple[str, int]:
        model = model_for(tasks)
        found = train_site(model, resident(labels), tasks, LocalPlan(steps=5), seed=2, done=0, rounds=2)
        return model.share(("trunk", "stem", "heads")).digest(), len(found.conflicts)

    digest, pairs = trained()
    assert pairs == 3
    monkeypatch.setattr(training.Conflicts, "see", lambda self, losses, embedded: None)
    assert trained() == (digest, 0)


def test_tasks_of_one_cause_help_each_other_and_noise_helps_nobody() -> None:
    labels = learnable()
    noise = np.random.default_rng(5).normal(size=len(labels["wear"]))
    given_labels = {"wear": labels["wear"], "again": labels["wear"] * 2.0 - 7.0, "noise": noise}
    tasks, data = tasks_for(given_labels), resident(given_labels)
    model = model_for(tasks)
    for done in range(3):
        found = train_site(model, data, tasks, LocalPlan(steps=20), seed=done, done=done, rounds=3).conflicts
    assert found["conflict.again.wear"] > 0.2
    assert abs(found["conflict.noise.wear"]) < 0.1 and abs(found["conflict.again.noise"]) < 0.1
