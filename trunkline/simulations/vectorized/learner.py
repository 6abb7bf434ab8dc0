"""A stack of models as the training loop sees it (`client.training.step.Learner`)."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from trunkline.client.training.step import Learner
from trunkline.models.tasks.task import Task
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.plan import ModelPart
from trunkline.simulations.vectorized.rows import JoinedBatches, JoinedRows
from trunkline.simulations.vectorized.stacked_model import StackedModel, Tensors, stacked_losses


@dataclass(frozen=True)
class StackBatch:
    """The samples of one step of every site: x (sites, batch, ...), codes (sites, batch, k), labels (sites, batch, ...)."""

    x: Tensor
    codes: Tensor
    labels: Tensors
    masks: list[Tensor]


class StackLearner(Learner[StackBatch]):
    """The models of several sites, trained as one; each keeps its own draws, gradient norm and optimiser state.

    Args:
        model: the code of all of them.
        models: name -> (sites, ...) values; after the round `values` holds the trained ones.
        numbers: task -> what its loss reads of each site's labels, (sites, ...).
        indices: of the sites in `data`.
        seeds: of each site's round, as `train_site` gets it.
    """

    def __init__(
        self,
        model: StackedModel,
        models: Mapping[str, Tensor],
        data: JoinedRows,
        tasks: Mapping[str, Task],
        numbers: Mapping[str, Tensors],
        *,
        indices: Sequence[int],
        batch_size: int,
        seeds: Sequence[int],
        where: torch.device,
    ) -> None:
        self.model, self.models, self.data, self.by_name, self.numbers = model, dict(models), data, tasks, numbers
        self.where, self.tasks = where, tuple(tasks)
        model.clear_masks(training=True)
        self.batches = JoinedBatches(data, indices, batch_size, seeds, in_order=not model.dropouts)
        self.next_masks = model.draw_masks([seed_of(seed, "dropout") for seed in seeds], where)

    def begin_phase(self, parts: Sequence[ModelPart]) -> dict[ModelPart, list[Tensor]]:
        moving: dict[ModelPart, list[Tensor]] = {part: [] for part in parts}
        for name, value in self.models.items():
            self.models[name] = value = value.detach()
            if (part := self.model.part_of[name]) in moving:
                moving[part].append(value.requires_grad_(True))
        return moving

    def next_batch(self) -> StackBatch:
        rows, padding = self.batches.next()
        x, codes = self.data.batch(rows)
        return StackBatch(
            x, codes, self.data.labels_at(rows, padding), self.next_masks(rows.shape[1], self.batches.sizes)
        )

    def forward(self, batch: StackBatch) -> tuple[Tensor, list[Tensor]]:
        with torch.autocast(self.where.type, torch.bfloat16, enabled=self.where.type == "cuda"):
            embedded, outputs = self.model.forward(self.models, batch.x, batch.codes, batch.masks)
        return embedded, stacked_losses(self.by_name, self.numbers, outputs, batch.labels)

    def replay(self) -> AbstractContextManager[None]:
        return torch.no_grad()  # the batch carries its masks, and a stack has no buffers

    def clip(self, moving: Sequence[Tensor], most: float) -> None:
        gradients = [tensor.grad for tensor in moving if tensor.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients])
        scale = (most / (norms.square().sum(dim=0).sqrt() + 1e-6)).clamp(max=1.0)  # (sites,)
        for gradient in gradients:
            gradient.mul_(scale.reshape(-1, *[1] * (gradient.ndim - 1)))

    def update(self, optimiser: torch.optim.AdamW, *, only: bool) -> None:
        if only:
            _step_without_moments(optimiser)
        else:
            optimiser.step()

    @property
    def values(self) -> Tensors:
        """name -> (sites, ...) values as they are now."""
        return {name: value.detach() for name, value in self.models.items()}


@torch.no_grad()
def _step_without_moments(optimiser: torch.optim.AdamW) -> None:
    """The first step of AdamW where no second follows: its moments are the gradient itself, so nothing remembers them."""
    for group in optimiser.param_groups:
        moving = [tensor for tensor in group["params"] if tensor.grad is not None]
        gradients = [tensor.grad for tensor in moving]
        size = torch._foreach_abs(gradients)
        torch._foreach_add_(size, group["eps"])
        torch._foreach_mul_(moving, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(moving, gradients, size, -group["lr"])
