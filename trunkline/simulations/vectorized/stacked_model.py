"""One model's code, run on stacks of values: `torch.func.vmap` makes one call of many sites' (functorch, 2021).

A dropout draws from a generator that a stack cannot split, so its masks are drawn outside, for each site the very ones it
would draw alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel, tensors_of
from trunkline.protocol.plan import ModelPart

Tensors = dict[str, Tensor]
MODEL_PARTS: tuple[ModelPart, ...] = ("stem", "trunk", "heads")


class StackedModel:
    """The code of one model, for values that are stacked along a first dimension of sites.

    Args:
        model: whose code it is; values have the names of `TrunkModel.share` and `private`. Its own values are never used.
    """

    def __init__(self, model: TrunkModel) -> None:
        names = {id(tensor): name for name, tensor in tensors_of(model)}
        self.dropouts: list[MaskedDropout] = []
        _replace_dropouts(model, self.dropouts)
        self.module = _EmbedAndHeads(model)
        parameters = {name: parameter for name, parameter in self.module.named_parameters() if id(parameter) in names}
        self.inner_names = {names[id(parameter)]: name for name, parameter in parameters.items()}
        part_of = {id(parameter): part for part in MODEL_PARTS for parameter in model.parameters_of(part)}
        self.part_of = {names[id(parameter)]: part_of[id(parameter)] for parameter in self.module.parameters()}
        self.calls: list[tuple[MaskedDropout, tuple[int, ...]]] = []  # dropouts in the order in which a pass meets them

    def clear_masks(self, *, training: bool) -> None:
        self.module.train(training)
        for dropout in self.dropouts:
            dropout.masks = None

    def forward(
        self,
        models: Mapping[str, Tensor],
        x: Tensor,
        codes: Tensor,
        masks: Sequence[Tensor],
        same: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensors]:
        """Stacked values and inputs -> what the trunk gave, and task -> what its head gave.

        Args:
            masks: of `draw_masks`; none where no dropout is at work.
            same: values that all sites share, not stacked.

        Shape:
            models (sites, ...), x (sites, batch, ...), codes (sites, batch, k) -> (sites, batch, width), and
            (sites, batch, outputs) each.
        """
        values = {self.inner_names[name]: value for name, value in models.items()}
        shared = {self.inner_names[name]: value for name, value in (same or {}).items()}

        def forward_of_site(values: Tensors, x: Tensor, codes: Tensor, drawn: list[Tensor]) -> tuple[Tensor, Tensors]:
            for module in self.dropouts:
                if masks:
                    calls = zip(self.calls, drawn, strict=True)
                    module.masks = iter([mask for (owner, _), mask in calls if owner is module])
                else:
                    module.masks = None
            result: tuple[Tensor, Tensors] = torch.func.functional_call(self.module, {**values, **shared}, (x, codes))
            return result

        result: tuple[Tensor, Tensors] = torch.func.vmap(forward_of_site)(values, x, codes, list(masks))
        return result

    def draw_masks(self, seeds: Sequence[int], where: torch.device) -> Callable[[int, Sequence[int]], list[Tensor]]:
        """A function that draws the dropout masks of the next step, (sites, batch, ...) each, in the order of the calls.

        Alone, a site's generator is started once a round, and every dropout of every step takes its next numbers. So here.
        """
        # on a GPU a dropout draws by a rule of its own kernel: there the masks only have the same chances
        draws = [torch.Generator(where).manual_seed(seed) for seed in seeds] if self.dropouts else []

        def next_masks(batch: int, sizes: Sequence[int]) -> list[Tensor]:
            if not self.dropouts:
                return []
            masks = []
            for module, shape in self.calls:
                mask = torch.ones((len(draws), batch, *shape), device=where)
                for site, draw, size in zip(mask, draws, sizes, strict=True):
                    kept = torch.empty((size, *shape), device=where).bernoulli_(1.0 - module.p, generator=draw)
                    site[:size] = kept.div_(1.0 - module.p)
                masks.append(mask)
            return masks

        return next_masks

    def trace_dropouts(self, x: Tensor, codes: Tensor) -> None:
        """Record which dropouts one forward pass meets, in order, and with what shapes."""
        self.clear_masks(training=False)
        for module in self.dropouts:
            module.trace = self.calls
        with torch.no_grad():
            self.module(x, codes)
        for module in self.dropouts:
            module.trace = None


def stacked_losses(
    tasks: Mapping[str, Task], numbers: Mapping[str, Tensors], outputs: Tensors, labels: Tensors
) -> list[Tensor]:
    """Each task's weighted loss at each site.

    Args:
        numbers: task -> name of `Task.loss_numbers` -> (sites, ...).

    Shape:
        outputs (sites, rows, outputs), labels (sites, rows, ...) with NaN where missing -> (sites,) a task.
    """
    return [
        torch.func.vmap(_loss_of(task))(numbers[name], outputs[name].float(), labels[name])
        for name, task in tasks.items()
    ]


def _loss_of(task: Task) -> Callable[[Tensors, Tensor, Tensor], Tensor]:
    def loss(numbers: Tensors, output: Tensor, labels: Tensor) -> Tensor:
        weighted: Tensor = task.config.weight * task.with_numbers(numbers).loss(output, labels)
        return weighted

    return loss


class _EmbedAndHeads(nn.Module):
    """A model whose forward pass also gives what the trunk gave."""

    def __init__(self, model: TrunkModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensors]:
        embedded = self.model.embed(x, codes)
        return embedded, {name: head(embedded) for name, head in self.model.heads.items()}


class MaskedDropout(nn.Module):
    """Stands where a dropout stood: multiplies by masks that were drawn outside, one a call."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.masks: Iterator[Tensor] | None = None  # None: evaluation, or a trace of the shapes
        self.trace: list[tuple[MaskedDropout, tuple[int, ...]]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.trace is not None:
            self.trace.append((self, tuple(x.shape[1:])))
        return x if self.masks is None else x * next(self.masks)


def _replace_dropouts(module: nn.Module, replaced: list[MaskedDropout]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            if child.p > 0.0:
                dropout = MaskedDropout(child.p)
                replaced.append(dropout)
                setattr(module, name, dropout)
        else:
            _replace_dropouts(child, replaced)
