"""The only torch training loop in the project, for one model and for stacks; and the forward pass that scores."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.client.training.lbfgs import fit_lbfgs
from trunkline.client.training.loss_balancing import BALANCES, Balance, Conflicts
from trunkline.client.training.single_model import SingleModel
from trunkline.client.training.step import Learner, Pull, TrainingStep
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.plan import LocalPlan, ModelPart

SCORE_BATCH = 2048  # windows a forward pass; 2048 x 64 x 14 floats is 7 MB
LOOKS = 4  # steps of a round, spread over it, in which the tasks' gradients are compared
# called between two steps, and between two batches that are scored; it may wait, and must change nothing. At a plant only
between_steps: ContextVar[Callable[[], None] | None] = ContextVar("between_steps", default=None)
Batch = TypeVar("Batch")


def steps_of(plan: LocalPlan, samples: int) -> int:
    """Optimiser steps a round."""
    if plan.epochs is None:
        return plan.steps
    return max(1, round(plan.epochs * samples / min(plan.batch_size, samples)))


class Stretch(NamedTuple):
    """One phase of a round: steps `first` to `last` (exclusive), and each part's learning rate before the schedule."""

    first: int
    last: int
    rates: dict[ModelPart, float]


def stretches(plan: LocalPlan, total: int, speeds: Mapping[ModelPart, float] | None = None) -> Iterator[Stretch]:
    """The phases of a round of `total` steps; the last one takes what the shares of the others leave.

    Args:
        speeds: part -> its learning rate, as a multiple of the plan's; None: 1 for the trunk, `private_rate` for the rest.
    """
    pace = speeds or {"trunk": 1.0, "stem": plan.private_rate, "heads": plan.private_rate}
    first = 0
    for position, phase in enumerate(plan.phases):
        final = position == len(plan.phases) - 1
        last = total if final else min(total, first + max(1, round(total * phase.share)))
        yield Stretch(first, last, {part: plan.learning_rate * pace[part] for part in phase.parts})
        first = last


def train(
    learner: Learner[Batch],
    plan: LocalPlan,
    *,
    total: int,
    done: int,
    rounds: int,
    speeds: Mapping[ModelPart, float] | None = None,
    balancing: Balance,
    conflicts: Conflicts,
    pull: Pull,
) -> Tensor:
    """One round of local training by AdamW: THE loop, for one model and for a stack.

    The learning rate follows the whole run, not the round.

    Args:
        total: steps of the round.
        done: rounds behind this one, of `rounds`.
        conflicts: where the angles between the tasks' gradients are collected, in `LOOKS` steps; of no task: nowhere.

    Returns:
        The mean of the plainly weighted training loss over the steps: a scalar, or (sites,) for a stack.
    """
    every = math.ceil(total / LOOKS) if len(conflicts.tasks) > 1 else 0
    wait = between_steps.get()
    losses: list[Tensor] = []
    for first, last, rates in stretches(plan, total, speeds):
        step = TrainingStep(learner, plan, rates, balancing, conflicts, pull, last - first)
        for index in range(first, last):
            if wait is not None:
                wait()
            compare = bool(every) and index % every == 0
            losses.append(step((done + index / total) / rounds, compare_tasks=compare))
    return torch.stack(losses).mean(dim=0)


@dataclass(frozen=True)
class Trained:
    """What one round of local training reports, beside the model it changed."""

    loss: float  # mean over the steps of the plainly weighted training loss
    conflicts: Mapping[str, float]  # `conflict_name` of two tasks -> cosine of their gradients at the trunk's output
    balance: dict[str, NDArray[Any]]  # what balancing remembers: `balance` of the next round


def train_site(
    model: TrunkModel,
    data: DeviceDataset,
    tasks: dict[str, Task],
    plan: LocalPlan,
    *,
    seed: int,
    done: int,
    rounds: int,
    toward: Sequence[Tensor] | None = None,
    pulled_parts: tuple[ModelPart, ...] = ("trunk",),
    speeds: Mapping[ModelPart, float] | None = None,
    balance: Mapping[str, NDArray[Any]] | None = None,
) -> Trained:
    """One round of local training of one model, in place.

    Args:
        seed: of the batches, the dropout and the augmentation; from (run seed, site, round), so that a repeat is the same
            to the bit.
        done: rounds behind this one, of `rounds`.
        toward: what `plan.proximal` pulls the trunk's parameters to, in their order; None: to where they start.
        pulled_parts: what it pulls; L2-SP (Li et al. 2018, arXiv:1802.01483) pulls everything that was learnt elsewhere.
        speeds: part -> its learning rate, as a multiple of the plan's; None: 1 for the trunk, `private_rate` for the rest.
        balance: `Trained.balance` of this model's round before; None starts afresh.
    """
    learner = SingleModel(model, data, tasks, plan, seed)
    total = steps_of(plan, len(data))
    balancing = BALANCES[plan.balance](tasks, learner.where, balance or {})
    conflicts = Conflicts(tasks)
    pull = Pull(plan.proximal)
    if plan.proximal:
        pulled = [parameter for part in pulled_parts for parameter in model.parameters_of(part)]
        anchors = [parameter.detach().clone() for parameter in pulled] if toward is None else toward
        pull = Pull(plan.proximal, dict(zip(pulled, anchors, strict=True)))
    with learner.training():
        if plan.optimizer == "lbfgs":
            loss = _train_full_batch(learner, plan, total, speeds, pull)
        else:
            loss = train(
                learner, plan, total=total, done=done, rounds=rounds, speeds=speeds,
                balancing=balancing, conflicts=conflicts, pull=pull,
            )  # fmt: skip
    (cosines,) = conflicts.means()
    return Trained(float(loss), cosines, balancing.state())


def _train_full_batch(
    learner: SingleModel, plan: LocalPlan, total: int, speeds: Mapping[ModelPart, float] | None, pull: Pull
) -> Tensor:
    """A round in which every step is an iteration of L-BFGS on all training rows; the mean loss before each phase."""
    batch = learner.all_rows()

    def loss_of() -> Tensor:
        if (wait := between_steps.get()) is not None:
            wait()
        losses = learner.forward(batch)[1]
        return torch.stack([*losses, *(0.5 * pull.strength * distance for distance in pull.distances())]).sum()

    losses = []
    for position, (first, last, rates) in enumerate(stretches(plan, total, speeds)):
        moving = learner.begin_phase([part for part, rate in rates.items() if rate > 0.0])
        tensors = [tensor for part in moving.values() for tensor in part]
        losses.append(fit_lbfgs(tensors, loss_of, last - first, seed_of(learner.seed, "dropout", position)))
    return torch.stack(losses).mean()


@torch.inference_mode()
def outputs_of(model: TrunkModel, data: DeviceDataset, tasks: dict[str, Task]) -> dict[str, Tensor]:
    """What every task's `predict` takes, for every window, on the CPU in float32: task -> (n, outputs)."""
    where, home = data.where, data.values.device
    model.eval()
    hold = between_steps.get()
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(data), SCORE_BATCH):
        if hold is not None:
            hold()
        x, categorical = data.batch(torch.arange(start, min(start + SCORE_BATCH, len(data)), device=home))
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            outputs = model(x, categorical)
        for name, task in tasks.items():
            parts.setdefault(name, []).append(task.combine_with_inputs(outputs[name].float(), x).cpu())
    return {task: torch.cat(batches) for task, batches in parts.items()}
