"""One model as the training loop sees it: its batches, its forward pass, its dropout."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trunkline.client.training.augmentation import Augmenter, Sample
from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.client.training.lbfgs import reseed
from trunkline.client.training.sampling import Batches, chances
from trunkline.client.training.step import Learner
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.plan import LocalPlan, ModelPart


def task_losses(outputs: dict[str, Tensor], labels: dict[str, Tensor], tasks: dict[str, Task]) -> list[Tensor]:
    """Each task's loss times its weight in site.toml, in the tasks' order; 0 where a batch has no label of it."""
    return [task.config.weight * task.loss(outputs[name].float(), labels[name]) for name, task in tasks.items()]


def total_loss(outputs: dict[str, Tensor], labels: dict[str, Tensor], tasks: dict[str, Task]) -> Tensor:
    """The site's one loss: the tasks' own, weighted as site.toml says. What curves and the best round go by, however a
    step balances."""
    return torch.stack(task_losses(outputs, labels, tasks)).sum()


@dataclass(frozen=True)
class SampleBatch:
    """The samples of one step.

    Args:
        sample: inputs (batch, channels, time) or (batch, columns), standardised, with their labels.
        codes: (batch, k) categorical codes.
    """

    sample: Sample
    codes: Tensor


class SingleModel(Learner[SampleBatch]):
    """One site's model and training rows.

    Args:
        model: trained in place.
        data: the training samples, resident on `data.where` or sent there batch by batch.
        seed: of the batches, the dropout and the augmentation.
    """

    def __init__(
        self, model: TrunkModel, data: DeviceDataset, tasks: Mapping[str, Task], plan: LocalPlan, seed: int
    ) -> None:
        self.model, self.data, self.by_name, self.seed = model, data, dict(tasks), seed
        self.where, self.tasks = data.where, tuple(tasks)
        labels = {name: column.cpu().numpy() for name, column in data.labels.items()}
        chance = chances(labels, tasks) if plan.sampling == "balanced" and labels else None
        self.batches = Batches(len(data), plan.batch_size, seed, data.values.device, chance)
        codes = data.categorical.shape[1]
        self.augment = (
            Augmenter(plan.augment, tasks, codes, self.where, seed) if Augmenter.wanted(plan.augment) else None
        )

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within it the model trains on random numbers of its own; afterwards all of it may collect gradients again."""
        self.model.train()
        with torch.random.fork_rng(devices=[self.where] if self.where.type == "cuda" else []):
            reseed(seed_of(self.seed, "dropout"), self.where)
            yield
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)

    def begin_phase(self, parts: Sequence[ModelPart]) -> dict[ModelPart, list[Tensor]]:
        moving: dict[ModelPart, list[Tensor]] = {part: [*self.model.parameters_of(part)] for part in parts}
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        for tensors in moving.values():
            for tensor in tensors:
                tensor.requires_grad_(True)
        return moving

    def next_batch(self) -> SampleBatch:
        index = self.batches.next()
        x, codes = self.data.batch(index)
        index = index.to(self.where, non_blocking=True)
        labels = {name: column[index] for name, column in self.data.labels.items()}
        sample = self.augment(x, labels) if self.augment else Sample(x, x, ((1.0, labels),))
        return SampleBatch(sample, codes)

    def all_rows(self) -> SampleBatch:
        """Every training sample as one batch, as it is."""
        x, codes = self.data.batch(torch.arange(len(self.data), device=self.data.values.device))
        return SampleBatch(Sample(x, x, ((1.0, self.data.labels),)), codes)

    def forward(self, batch: SampleBatch) -> tuple[Tensor, list[Tensor]]:
        sample, tasks = batch.sample, self.by_name
        with torch.autocast(self.where.type, torch.bfloat16, enabled=self.where.type == "cuda"):
            embedded = self.model.embed(sample.x, batch.codes)
            outputs = {name: head(embedded) for name, head in self.model.heads.items()}
        outputs = {name: task.combine_with_inputs(outputs[name].float(), sample.clean) for name, task in tasks.items()}
        if len(sample.terms) == 1:
            return embedded, task_losses(outputs, sample.terms[0][1], tasks)
        terms = [[share * loss for loss in task_losses(outputs, labels, tasks)] for share, labels in sample.terms]
        return embedded, [torch.stack(shares).sum() for shares in zip(*terms, strict=True)]

    def replay(self) -> "_Replay":
        return _Replay(self.model, self.where)

    def clip(self, moving: Sequence[Tensor], most: float) -> None:
        nn.utils.clip_grad_norm_(moving, most, foreach=True)


class _Replay:
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
