"""Many task losses -> one step: a method a class, behind `LocalPlan.balance`.

Site weights (`weight` in site.toml) hold under every method: they say how much a task is worth once all losses are on one
scale. A task without a label in a batch takes no part in that batch's step.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trunkline.models.tasks.task import Task
from trunkline.protocol.contract import conflict_name

PACE = 0.05  # of a log-variance: it follows a loss that changes within some 20 steps
RATE, DECAY = 0.025, 1e-3  # of FAMO's logits, as in its paper
MEMORY = 0.9  # of UPGrad's loss scales: a batch tells a tenth of them
SMALLEST = 1e-8  # a loss below counts as this much where its logarithm is taken


class Balance:
    """The plain weighted sum: the control, and what the other methods build on.

    Args:
        tasks: of the site, in the order of the losses.
        where: the device the losses are on.
        memory: what `state` gave after the round before; what it lacks starts afresh.
    """

    name: ClassVar[str] = "fixed"
    looks_back: ClassVar[bool] = False  # whether `look_back` wants the same batch's losses after the step

    def __init__(self, tasks: Mapping[str, Task], where: torch.device, memory: Mapping[str, NDArray[Any]]) -> None:
        self.tasks = tuple(tasks)
        self.weights = torch.tensor([task.config.weight for task in tasks.values()], device=where)  # (m,)

    def backward(self, losses: Sequence[Tensor], pull: Tensor | None, embedded: Tensor) -> None:
        """Put the gradients of one step where an optimiser looks for them.

        Args:
            losses: m scalars, or m times (sites,) in a stack: the tasks' losses times their site weights; exactly 0
                where a batch has no label.
            pull: a scalar that is no task's, such as a proximal term; it is not balanced.
            embedded: (batch, width) what the trunk gave and the heads read.
        """
        _backward(torch.stack(list(losses)).sum(), pull)

    def look_back(self, losses: Sequence[Tensor]) -> None:
        """The m losses of the same batch after the step, where `looks_back` asks for them."""

    def state(self) -> dict[str, NDArray[Any]]:
        """One number a task to go on from in the next round; empty for a method without memory."""
        return {}


class _Learning(Balance):
    """A method that remembers one number a task, on the device, so that no step waits for it."""

    start: ClassVar[float] = float("nan")  # NaN: not seen yet

    def __init__(self, tasks: Mapping[str, Task], where: torch.device, memory: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(tasks, where, memory)
        remembered = [memory.get(f"{self.name}.{task}") for task in self.tasks]
        values = [self.start if value is None else float(value[0]) for value in remembered]
        self.memory = torch.tensor(values, dtype=torch.float32, device=where)

    def state(self) -> dict[str, NDArray[Any]]:
        values = self.memory.detach().cpu().numpy().astype(np.float32)
        return {f"{self.name}.{task}": values[index : index + 1].copy() for index, task in enumerate(self.tasks)}

    def _dealt(self, worth: Tensor, present: Tensor) -> Tensor:
        """(m,) factors of the weighted losses, in proportion to `worth`, 0 where a task is absent.

        Weighted as site.toml says they sum to what the weights of those present sum to, as in the plain sum, so that a
        proximal pull and a gradient's largest norm mean the same under every method.
        """
        worth = torch.where(present, worth, 0.0)
        weights = torch.where(present, self.weights, 0.0)
        return worth * weights.sum() / (worth * weights).sum().clamp(min=torch.finfo(worth.dtype).tiny)


class Uncertainty(_Learning):
    """Each loss divided by its task's learnt noise (Kendall et al. 2018, arXiv:1705.07115).

    Minimises sum of w (exp(-s) L + s) over the model and the log-variances s alike. A log-variance starts at its first
    loss, where it would settle, and then descends at its own pace: with the model's learning rate it would need thousands
    of steps to learn that one task's losses are a thousand times another's.
    """

    name = "uncertainty"

    def backward(self, losses: Sequence[Tensor], pull: Tensor | None, embedded: Tensor) -> None:
        whole = torch.stack(list(losses))
        unweighted = whole.detach() / self.weights
        present = unweighted > 0.0
        first = torch.where(present, unweighted.clamp(min=SMALLEST).log(), self.memory)
        self.memory = torch.where(self.memory.isnan(), first, self.memory)
        least = torch.where(present, self.memory, torch.inf).min()  # before exp, which would overflow
        _backward((self._dealt((least - self.memory).exp(), present) * whole).sum(), pull)
        downhill = ((unweighted.clamp(min=SMALLEST).log() - self.memory).exp() - 1.0).clamp(max=1.0)  # exp(-s) L - 1
        self.memory = torch.where(present, self.memory + PACE * downhill, self.memory)


class Famo(_Learning):
    """Equal relative progress of all tasks, at the cost of one more forward pass (Liu et al. 2023, arXiv:2306.03792).

    Descends the logarithms of the losses, mixed by a softmax whose logits go down for whoever just improved most.
    """

    name = "famo"
    start = 0.0
    looks_back = True

    def __init__(self, tasks: Mapping[str, Task], where: torch.device, memory: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(tasks, where, memory)
        self.optimiser = torch.optim.Adam([self.memory], lr=RATE, weight_decay=DECAY)
        self.before = self.shares = torch.zeros_like(self.memory)

    def backward(self, losses: Sequence[Tensor], pull: Tensor | None, embedded: Tensor) -> None:
        whole = torch.stack(list(losses))
        self.before = whole.detach() / self.weights
        present = self.before > 0.0
        logits = torch.where(present, self.memory + self.weights.log(), -torch.inf)
        self.shares = torch.where(present, logits.softmax(dim=0), 0.0)  # not NaN where nobody is present
        worth = self.shares / self.before.clamp(min=SMALLEST) / self.weights
        _backward((self._dealt(worth, present) * whole).sum(), pull)

    def look_back(self, losses: Sequence[Tensor]) -> None:
        after = torch.stack(list(losses)).detach() / self.weights
        gain = self.before.clamp(min=SMALLEST).log() - after.clamp(min=SMALLEST).log()
        gain = torch.where(self.shares > 0.0, gain, 0.0)
        self.memory.grad = self.shares * (gain - (self.shares * gain).sum())  # through the softmax
        self.optimiser.step()


class UpGrad(_Learning):
    """A step at the trunk's output that no task objects to (UPGrad, Quinton and Rey 2024, arXiv:2406.16232).

    Each task's gradient there is projected onto the directions that raise no other task's loss, and the projections are
    added; without conflict that is the plain sum. Only the trunk's output is differentiated a task; one backward pass
    carries the combined gradient through the trunk, and every head gets its own task's. Losses are first divided by their
    own running size, because a projection keeps a large task from harming a small one but not from drowning it.

    The small projection problem is solved on the CPU: on a GPU each step waits for it.
    """

    name = "upgrad"

    def __init__(self, tasks: Mapping[str, Task], where: torch.device, memory: Mapping[str, NDArray[Any]]) -> None:
        super().__init__(tasks, where, memory)
        # here and not above: nobody else needs torchjd and scipy, and they take a second to import
        from torchjd.aggregation import UPGradWeighting

        from trunkline.client.training.dual_cone import NonNegativeProjector

        equal_weights = torch.ones(len(self.tasks), dtype=torch.float64)  # a sum, not torchjd's mean
        self.weighting = UPGradWeighting(equal_weights, projector=NonNegativeProjector())

    def backward(self, losses: Sequence[Tensor], pull: Tensor | None, embedded: Tensor) -> None:
        whole = torch.stack(list(losses))
        unweighted = whole.detach() / self.weights
        present = unweighted > 0.0
        blend = torch.where(self.memory.isnan(), unweighted, MEMORY * self.memory + (1.0 - MEMORY) * unweighted)
        self.memory = torch.where(present, blend, self.memory)
        factors = self._dealt(1.0 / self.memory.clamp(min=SMALLEST), present)
        if not embedded.requires_grad:  # only heads train, and each has its own task
            _backward((factors * whole).sum(), pull)
            return
        rows = factors[:, None] * gradients(losses, embedded)
        exact = rows.double()  # weights of rows that are nearly opposite are large and cancel
        agreed = self.weighting((exact @ exact.T).cpu()).to(exact)
        combined = (agreed @ exact).view_as(embedded).to(embedded.dtype)
        # in place of the sum that the heads send back
        hook = embedded.register_hook(lambda summed: combined)  # type: ignore[no-untyped-call]
        _backward((factors * whole).sum(), pull)
        hook.remove()


BALANCES: dict[str, type[Balance]] = {method.name: method for method in (Balance, Uncertainty, Famo, UpGrad)}


class Conflicts:
    """Cosines of the tasks' gradients at the trunk's output, averaged over a few batches: who helps whom.

    Below 0 a step for one task undoes another's. Nothing is drawn and no gradient is kept, so training is the same to the
    bit whether the cosines are collected or not.
    """

    def __init__(self, tasks: Iterable[str]) -> None:
        self.tasks = tuple(tasks)
        self.cosines: list[Tensor] = []  # (m, m) or (sites, m, m) each, NaN where a task has no gradient

    def see(self, losses: Sequence[Tensor], embedded: Tensor) -> None:
        """One batch, before the backward pass frees its graph.

        Shape:
            m scalars and (batch, width) of one model; m times (sites,) and (sites, batch, width) of a stack.
        """
        rows = gradients(losses, embedded)
        rows = rows / rows.norm(dim=-1, keepdim=True)  # 0 / 0 is NaN: no direction
        self.cosines.append(rows @ rows.mT)

    def means(self, models: int = 1) -> list[dict[str, float]]:
        """For each model: `conflict_name` of two tasks -> mean cosine; a pair that shares no batch is left out."""
        if not self.cosines:
            return [{} for _ in range(models)]
        mean = torch.stack(self.cosines).nanmean(dim=0).clamp(-1.0, 1.0).cpu()
        pairs = list(itertools.combinations(range(len(self.tasks)), 2))
        names = [conflict_name(self.tasks[row], self.tasks[column]) for row, column in pairs]
        return [
            {
                name: site[row][column]
                for name, (row, column) in zip(names, pairs, strict=True)
                if site[row][column] == site[row][column]
            }
            for site in mean.reshape(-1, len(self.tasks), len(self.tasks)).tolist()
        ]


def gradients(losses: Sequence[Tensor], embedded: Tensor) -> Tensor:
    """Each task's gradient at the trunk's output, float32; the graph is kept. A site's losses reach its own output only.

    Shape:
        m scalars, (batch, width) -> (m, batch x width); m times (sites,), (sites, batch, width) -> (sites, m, batch x width).
    """
    return torch.stack(
        [
            torch.autograd.grad(loss.sum(), embedded, retain_graph=True)[0].float().reshape(*loss.shape, -1)
            for loss in losses
        ],
        dim=-2,
    )


def _backward(total: Tensor, pull: Tensor | None) -> None:
    total = total if pull is None else total + pull
    if total.requires_grad:  # a batch without a single label moves nothing
        total.backward()  # type: ignore[no-untyped-call]
