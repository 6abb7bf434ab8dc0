"""One training step, for one model and for a stack of models alike.

A `Learner` knows how to draw a batch, how to compute its losses, and which tensors a phase moves. `TrainingStep` does the
rest: schedule, balancing of the tasks, proximal pull, clipping, optimiser. The losses of one model are scalars, those of a
stack (sites,); nothing here depends on which of the two it is.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from trunkline.client.training.loss_balancing import Balance, Conflicts
from trunkline.protocol.plan import LocalPlan, ModelPart

Batch = TypeVar("Batch")


class Learner(ABC, Generic[Batch]):
    """What a step trains: one model (`SingleModel`), or a stack of models (`simulations.vectorized`).

    Args:
        where: the device that losses and gradients are on.
        tasks: names in the order of the losses.
    """

    where: torch.device
    tasks: Sequence[str]

    @abstractmethod
    def begin_phase(self, parts: Sequence[ModelPart]) -> dict[ModelPart, list[Tensor]]:
        """Let these parts collect gradients, and no other; the tensors of each."""

    @abstractmethod
    def next_batch(self) -> Batch:
        """The samples of the next step, with everything random that its forward pass needs."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The trunk's output, and each task's loss times its site weight; a loss is exactly 0 without a label.

        Shape:
            one model: (batch, width), and scalars; a stack: (sites, batch, width), and (sites,) each.
        """

    @abstractmethod
    def replay(self) -> AbstractContextManager[None]:
        """Within it `forward` repeats the last batch's pass: the same dropout, no gradient, no trace left behind.

        To be made before that pass.
        """

    @abstractmethod
    def clip(self, moving: Sequence[Tensor], most: float) -> None:
        """Scale each model's gradients, all its tensors together, to a norm of at most `most`."""

    def update(self, optimiser: torch.optim.AdamW, *, only: bool) -> None:
        """One step of the optimiser; `only`: no other follows in its life."""
        optimiser.step()


@dataclass(frozen=True)
class Pull:
    """A proximal term: half of `strength` times the squared distance of some tensors to where they are pulled.

    Args:
        anchors: tensor that trains -> values of the same shape.
    """

    strength: float
    anchors: Mapping[Tensor, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.anchors)

    def distances(self) -> list[Tensor]:
        """The squared distance of each tensor, scalars."""
        return [(tensor - anchor).square().sum() for tensor, anchor in self.anchors.items()]

    def __call__(self) -> Tensor:
        """A scalar."""
        return 0.5 * self.strength * torch.stack(self.distances()).sum()


class TrainingStep(Generic[Batch]):
    """One step of a phase, again and again.

    AdamW starts afresh in each phase of each round: its memory of the trunk would be of another trunk.

    Args:
        rates: part -> learning rate before the schedule; a part at 0 stays as it is.
        steps: of the phase.
    """

    def __init__(
        self,
        learner: Learner[Batch],
        plan: LocalPlan,
        rates: Mapping[ModelPart, float],
        balancing: Balance,
        conflicts: Conflicts,
        pull: Pull,
        steps: int,
    ) -> None:
        self.learner, self.plan = learner, plan
        self.balancing, self.conflicts, self.pull = balancing, conflicts, pull
        self.only = steps == 1
        tensors = learner.begin_phase([part for part, rate in rates.items() if rate > 0.0])
        self.moving = [tensor for part in tensors.values() for tensor in part]
        groups: dict[float, list[Tensor]] = {}  # parts with one rate are one group: the same arithmetic in fewer calls
        for part, members in tensors.items():
            groups.setdefault(rates[part], []).extend(members)
        self.rates = list(groups)
        self.optimiser = (
            torch.optim.AdamW(
                [{"params": members, "lr": rate} for rate, members in groups.items()],
                weight_decay=plan.weight_decay,
                fused=True,
            )
            if self.moving
            else None
        )  # no part moves where every rate is 0: the losses are still reported

    def __call__(self, progress: float, *, compare_tasks: bool) -> Tensor:
        """Train on the next batch; the plainly weighted loss before the step, a scalar or (sites,), detached.

        Args:
            progress: share of the whole run that is done, which the schedule follows.
            compare_tasks: look at the angles between the tasks' gradients too.
        """
        learner, balancing = self.learner, self.balancing
        if self.optimiser is not None and self.plan.schedule == "cosine":
            for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
                group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * progress))
        batch = learner.next_batch()
        replay = learner.replay() if balancing.looks_back else None
        embedded, losses = learner.forward(batch)
        if compare_tasks and embedded.requires_grad:
            self.conflicts.see(losses, embedded)
        pull = self.pull() if self.pull else None
        if self.optimiser is not None:
            self.optimiser.zero_grad(set_to_none=True)
            balancing.backward(losses, pull, embedded)
            if any(tensor.grad is not None for tensor in self.moving):  # not for a batch without a single label
                learner.clip(self.moving, self.plan.clip_norm)
                learner.update(self.optimiser, only=self.only)
        if replay is not None:
            with replay:
                balancing.look_back(learner.forward(batch)[1])
        return torch.stack(losses).sum(dim=0).detach()
