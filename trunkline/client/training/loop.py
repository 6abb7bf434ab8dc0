"""The only torch training loop in the project, and the forward pass that scores.

Inputs of a site lie on the device once; a batch is an index into them, so a step copies nothing from the host.
"""

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trunkline.client.data import WindowSet
from trunkline.client.training.augmentation import Augmenter, Sample
from trunkline.client.training.lbfgs import fit_whole, reseed
from trunkline.client.training.loss_balancing import BALANCES, Conflicts
from trunkline.client.training.sampling import Batches, chances
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.plan import LocalPlan, Part

SCORE_BATCH = 2048  # windows a forward pass; 2048 x 64 x 14 floats is 7 MB
LOOKS = 4  # steps of a round, spread over it, in which the tasks' gradients are compared
# called between two steps, and between two batches that are scored; it may wait, and must change nothing. At a plant only
between_steps: ContextVar[Callable[[], None] | None] = ContextVar("between_steps", default=None)


def device() -> torch.device:
    """CUDA where there is one; TRUNKLINE_DEVICE overrides."""
    return torch.device(os.environ.get("TRUNKLINE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class DeviceDataset:
    """A WindowSet as tensors on one device; windows are gathered there, never stored.

    Rows that would not fit stay in the memory of the host, and batches are gathered there and sent: the host does that
    while the device is still at the step before, because no step waits for the device.
    """

    values: Tensor  # (rows, channels)
    categorical: Tensor  # (rows, k)
    first: Tensor  # (n,)
    ends: Tensor  # (n,)
    window: int | None
    labels: dict[str, Tensor]  # task -> (n,) or (n, k), on `where`
    goes: torch.device | None = None  # where batches of rows that stay in the host's memory are sent

    @classmethod
    def of(cls, windows: WindowSet, where: torch.device) -> "DeviceDataset":
        goes = None if fits(windows.values.nbytes, where) else where
        home = where if goes is None else torch.device("cpu")
        return cls(
            values=torch.from_numpy(np.ascontiguousarray(windows.values)).to(home),
            categorical=torch.from_numpy(np.ascontiguousarray(windows.categorical)).to(home),
            first=torch.from_numpy(windows.first).to(home),
            ends=torch.from_numpy(windows.ends).to(home),
            window=windows.window,
            labels={
                task: torch.from_numpy(np.ascontiguousarray(column)).to(where)
                for task, column in windows.labels.items()
            },
            goes=goes,
        )

    @classmethod
    def joined(cls, parts: Sequence["DeviceDataset"]) -> "DeviceDataset":
        """The samples of several sites, one site behind the other; no window reaches into another's rows."""
        starts = [0, *itertools.accumulate(len(part.values) for part in parts)]
        goes = next((part.goes for part in parts if part.goes is not None), None)  # where one stays at home, all do
        home = parts[0].values.device if goes is None else torch.device("cpu")
        return cls(
            values=torch.cat([part.values.to(home) for part in parts]),
            categorical=torch.cat([part.categorical.to(home) for part in parts]),
            first=torch.cat([part.first.to(home) + start for part, start in zip(parts, starts, strict=False)]),
            ends=torch.cat([part.ends.to(home) + start for part, start in zip(parts, starts, strict=False)]),
            window=parts[0].window,
            labels={name: torch.cat([part.labels[name] for part in parts]) for name in parts[0].labels},
            goes=goes,
        )

    def begun(self, count: int) -> "DeviceDataset":
        """Its first `count` samples."""
        labels = {task: column[:count] for task, column in self.labels.items()}
        return replace(self, first=self.first[:count], ends=self.ends[:count], labels=labels)

    def moved(self, by: Tensor) -> "DeviceDataset":
        """The same samples, each channel moved by its entry of `by`, (channels,)."""
        return replace(self, values=self.values + by)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def where(self) -> torch.device:
        """Where its batches are."""
        return self.goes or self.values.device

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (b, channels, window), or (b, channels) for rows, and categorical codes (b, k), on `where`.

        Args:
            index: (b,) positions, on the device of the rows.
        """
        x, categorical = self._gathered(index)
        if self.goes is None:
            return x, categorical
        if self.goes.type == "cuda":  # from pinned memory a copy does not keep the host waiting
            x, categorical = x.pin_memory(), categorical.pin_memory()
        return x.to(self.goes, non_blocking=True), categorical.to(self.goes, non_blocking=True)

    def _gathered(self, index: Tensor) -> tuple[Tensor, Tensor]:
        ends = self.ends[index]
        categorical = self.categorical[ends]
        if self.window is None:
            return self.values[ends], categorical
        back = torch.arange(self.window - 1, -1, -1, device=ends.device)
        rows = torch.maximum(
            ends[:, None] - back, self.first[index][:, None]
        )  # (b, window): before its start a group repeats its first row
        x = self.values.index_select(0, rows.reshape(-1)).view(len(index), self.window, -1)
        return x.transpose(1, 2).contiguous(), categorical  # once here, or once in every layer that reads it


def fits(nbytes: int, where: torch.device) -> bool:
    """Whether rows may lie on that device: in no more than half of what is free there, because a model needs room too."""
    return where.type != "cuda" or nbytes <= torch.cuda.mem_get_info(where)[0] // 2


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
    pulled_parts: tuple[Part, ...] = ("trunk",),
    speeds: Mapping[Part, float] | None = None,
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
                losses.append(fit_whole(moving, whole, last - step, seed_of(seed, "dropout", position)))
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


def _groups(model: TrunkModel, rates: Mapping[Part, float]) -> list[dict[str, Any]]:
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
