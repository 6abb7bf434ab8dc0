"""The only torch training loop in the project, and the forward pass that scores."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trunkline.client.training.augmentation import Augmenter, Sample
from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.client.training.lbfgs import fit_lbfgs, reseed
from trunkline.client.training.loss_balancing import BALANCES, Conflicts
from trunkline.client.training.sampling import Batches, chances
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.plan import LocalPlan, ModelPart

SCORE_BATCH = 2048  # windows a forward pass; 2048 x 64 x 14 floats is 7 MB
LOOKS = 4  # steps of a round, spread over it, in which the tasks' gradients are compared
# called between two steps, and between two batches that are scored; it may wait, and must change nothing. At a plant only
between_steps: ContextVar[Callable[[], None] | None] = ContextVar("between_steps", default=None)


def task_losses(outputs: dict[str, Tensor], labels: dict[str, Tensor], tasks: dict[str, Task]) -> list[Tensor]:
    """Each task's loss times its weight in site.toml, in the tasks' order; 0 where a batch has no label of it."""
    return [task.config.weight * task.loss(outputs[name].float(), labels[name]) for name, task in tasks.items()]


def total_loss(outputs: dict[str, Tensor], labels: dict[str, Tensor], tasks: dict[str, Task]) -> Tensor:
    """The site's one loss: the tasks' own, weighted as site.toml says. What curves and the best round go by, however a
    step balances."""
    return torch.stack(task_losses(outputs, labels, tasks)).sum()


def steps_of(plan: LocalPlan, samples: int) -> int:
    """Optimiser steps a round."""
    if plan.epochs is None:
        return plan.steps
    return max(1, round(plan.epochs * samples / min(plan.batch_size, samples)))


@dataclass(frozen=True)
class Trained:
    """What one round of local training has to tell, beside the model it changed."""

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
    """One round of local training, in place.

    AdamW starts afresh each round: its memory of the trunk would be of another trunk. The learning rate follows the whole
    run, not the round.

    Args:
        seed: of the batches, the dropout and the augmentation; from (run seed, site, round), so that a repeat is the same
            to the bit.
        done: rounds behind this one, of `rounds`.
        toward: what `plan.proximal` pulls the trunk's parameters to, in their order; None: to where they start.
        pulled_parts: what it pulls; L2-SP (Li et al. 2018, arXiv:1802.01483) pulls everything that was learnt elsewhere.
        speeds: part -> its learning rate, as a multiple of the plan's; None: 1 for the trunk, `private_rate` for the rest.
        balance: `Trained.balance` of this model's round before; None starts afresh.
    """
    total = steps_of(plan, len(data))
    where, home = data.where, data.values.device
    drawn = {name: column.cpu().numpy() for name, column in data.labels.items()} if plan.sampling == "balanced" else {}
    batches = Batches(len(data), plan.batch_size, seed, home, chances(drawn, tasks) if drawn else None)
    codes = data.categorical.shape[1]
    vary = Augmenter(plan.augment, tasks, codes, where, seed) if Augmenter.wanted(plan.augment) else None
    balancing = BALANCES[plan.balance](tasks, where, balance or {})
    conflicts = Conflicts(tasks)
    every = math.ceil(total / LOOKS) if len(tasks) > 1 else 0
    anchor: dict[nn.Parameter, Tensor] = {}
    if plan.proximal:
        trunk = [parameter for part in pulled_parts for parameter in model.parameters_of(part)]
        start = [parameter.detach().clone() for parameter in trunk] if toward is None else toward
        anchor = dict(zip(trunk, start, strict=True))
    pace = speeds or {"trunk": 1.0, "stem": plan.private_rate, "heads": plan.private_rate}
    losses: list[Tensor] = []
    hold = between_steps.get()
    step = 0
    model.train()
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        reseed(seed_of(seed, "dropout"), where)
        for position, phase in enumerate(plan.phases):
            rates = {part: plan.learning_rate * pace[part] for part in phase.parts}
            moving = [
                parameter for part, rate in rates.items() if rate > 0.0 for parameter in model.parameters_of(part)
            ]
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in moving:
                parameter.requires_grad_(True)
            last = total if position == len(plan.phases) - 1 else min(total, step + max(1, round(total * phase.share)))
            if plan.optimizer == "lbfgs":
                x, categorical = data.batch(torch.arange(len(data), device=home))
                everything = Sample(x, x, ((1.0, data.labels),))
                whole = partial(_whole_loss, model, everything, categorical, tasks, anchor, plan.proximal)
                losses.append(fit_lbfgs(moving, whole, last - step, seed_of(seed, "dropout", position)))
                step = last
                continue
            optimiser = torch.optim.AdamW(_groups(model, rates), weight_decay=plan.weight_decay, fused=True)
            full = [group["lr"] for group in optimiser.param_groups]
            while step < last:
                if hold is not None:
                    hold()
                if plan.schedule == "cosine":
                    progress = (done + step / total) / rounds
                    for group, rate in zip(optimiser.param_groups, full, strict=True):
                        group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * progress))
                place = batches.next()
                x, categorical = data.batch(place)
                there = place.to(where, non_blocking=True)
                labels = {name: column[there] for name, column in data.labels.items()}
                sample = vary(x, labels) if vary else Sample(x, x, ((1.0, labels),))
                again = _Again(model, where) if balancing.looks_back else None
                embedded, each = _forward(model, sample, categorical, tasks)
                if every and step % every == 0 and embedded.requires_grad:
                    conflicts.see(each, embedded)
                pull = None
                if anchor:
                    pull = (
                        0.5
                        * plan.proximal
                        * torch.stack([(p - start).square().sum() for p, start in anchor.items()]).sum()
                    )
                optimiser.zero_grad(set_to_none=True)
                balancing.backward(each, pull, embedded)
                if any(parameter.grad is not None for parameter in moving):  # not for a batch without a single label
                    nn.utils.clip_grad_norm_(moving, plan.clip_norm, foreach=True)
                    optimiser.step()
                if again is not None:
                    with again:
                        balancing.look_back(_forward(model, sample, categorical, tasks)[1])
                losses.append(torch.stack(each).sum().detach())
                step += 1
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    loss = float(torch.stack(losses).mean()) if losses else 0.0
    return Trained(loss, conflicts.mean(), balancing.state())


def _whole_loss(
    model: TrunkModel,
    everything: Sample,
    categorical: Tensor,
    tasks: dict[str, Task],
    anchor: dict[nn.Parameter, Tensor],
    proximal: float,
) -> Tensor:
    """The site's loss on all its training rows, with the pull where there is one."""
    if (hold := between_steps.get()) is not None:
        hold()
    each = _forward(model, everything, categorical, tasks)[1]
    pulls = [0.5 * proximal * (parameter - start).square().sum() for parameter, start in anchor.items()]
    return torch.stack([*each, *pulls]).sum()


def _forward(
    model: TrunkModel, sample: Sample, categorical: Tensor, tasks: dict[str, Task]
) -> tuple[Tensor, list[Tensor]]:
    """The trunk's output (batch, width), and each task's weighted loss on it."""
    where = sample.x.device
    with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
        embedded = model.embed(sample.x, categorical)
        outputs = {name: head(embedded) for name, head in model.heads.items()}
    outputs = {name: task.combine_with_inputs(outputs[name].float(), sample.clean) for name, task in tasks.items()}
    if len(sample.terms) == 1:
        return embedded, task_losses(outputs, sample.terms[0][1], tasks)
    parts = [[share * loss for loss in task_losses(outputs, labels, tasks)] for share, labels in sample.terms]
    return embedded, [torch.stack(terms).sum() for terms in zip(*parts, strict=True)]


def _groups(model: TrunkModel, rates: Mapping[ModelPart, float]) -> list[dict[str, Any]]:
    """What moves, by learning rate: parts with the same one are one group, which is the same arithmetic in fewer calls."""
    groups: dict[float, list[nn.Parameter]] = {}
    for part, rate in rates.items():
        if rate > 0.0:
            groups.setdefault(rate, []).extend(model.parameters_of(part))
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


class _Again:
    """Within it the model runs as it did when this was made: the same dropout, no gradient, and no trace left behind."""

    def __init__(self, model: TrunkModel, where: torch.device) -> None:
        self.model = model
        self.where = where if where.type == "cuda" else None
        self.drawn = self._generator()

    def __enter__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.buffers = [
            (buffer, buffer.clone()) for buffer in self.model.buffers()
        ]  # private norms count what they see
        self._set(self.drawn)  # the same draws end where they ended before, so nothing is put back
        torch.set_grad_enabled(False)

    def __exit__(self, *failure: object) -> None:
        for buffer, was in self.buffers:
            buffer.copy_(was)
        torch.set_grad_enabled(self.grad)

    def _generator(self) -> Tensor:
        return torch.get_rng_state() if self.where is None else torch.cuda.get_rng_state(self.where)

    def _set(self, state: Tensor) -> None:
        if self.where is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, self.where)


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
    return {task: torch.cat(some) for task, some in parts.items()}
