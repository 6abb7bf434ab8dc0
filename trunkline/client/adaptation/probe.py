"""New heads on a trunk that stays as it is: solved, not trained, and pulled to the heads that were released with it.

A linear probe learns from the fewest labels, but one fitted to the windows of a single engine fits that engine. So each
head is pulled to the federation's (or, where none was released, to nothing), the harder the fewer groups there are.
"""

import torch
from torch import Tensor, nn

from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.client.training.loop import SCORE_BATCH
from trunkline.models.tasks.regression import Regression
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel

PULL = 1.0  # at one group, in shares of the embedding's own scale; divided by the groups
NEWTON = 30  # steps of the quasi-Newton solver; the problem is convex and has a few hundred unknowns


@torch.no_grad()
def embeddings(model: TrunkModel, data: DeviceDataset) -> Tensor:
    """What the trunk makes of every sample: (n, width)."""
    model.eval()
    parts = []
    for start in range(0, len(data), SCORE_BATCH):
        index = torch.arange(start, min(start + SCORE_BATCH, len(data)), device=data.values.device)
        x, categorical = data.batch(index)
        parts.append(model.embed(x, categorical).float())
    return torch.cat(parts)


def probe(
    model: TrunkModel, data: DeviceDataset, tasks: dict[str, Task], groups: int, *, released: tuple[str, ...] = ()
) -> None:
    """Fit the heads of `model` to `data`, in place; stem and trunk stay to the bit.

    Regression (unless it wants a quantile) is ridge regression in closed form, every other kind its own loss by L-BFGS.
    A task whose head needs more than the embedding (the sample itself) keeps the head it has.

    Args:
        groups: labelled groups behind `data`: samples of one group repeat each other.
        released: heads that were released with the trunk; the others are pulled to zero.
    """
    embedded = embeddings(model, data)
    size = float(embedded.square().mean())
    for name, task in tasks.items():
        if task.combines_inputs:
            continue
        head, labels = model.heads[name], data.labels[name]
        if isinstance(task, Regression) and task.config.loss != "pinball" and isinstance(head, nn.Linear):
            level = labels if task.config.cap is None else labels.clamp(max=task.config.cap)
            ridge(head, embedded, (level - task.mean) / task.std, PULL / groups, released=name in released)
        else:
            _solve(head, embedded, labels, task, size * PULL / groups, released=name in released)


def ridge(head: nn.Linear, x: Tensor, target: Tensor, pull: float, *, released: bool = False) -> None:
    """The weights that minimise mean squared error + pull * scale of x * squared distance to where they are pulled.

    Args:
        x: (n, width); target: (n,), NaN where missing, or (n, outputs).
        released: pull to the weights that `head` has; otherwise to zero.
    """
    labelled = ~(target.isnan() if target.ndim == 1 else target.isnan().any(dim=1))
    wide = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)[labelled].double()
    if not len(wide):
        return
    start = torch.cat([head.weight, head.bias[:, None]], dim=1).detach().double().T  # (width + 1, outputs)
    if not released:
        start = torch.zeros_like(start)
    residual = target[labelled].double().reshape(len(wide), -1) - wide @ start
    gram = wide.T @ wide / len(wide)
    strength = pull * gram.diagonal()[:-1].mean().clamp(min=1e-12)
    # the bias is pulled too: at one engine the level of its labels is that engine's
    step = torch.linalg.solve(gram + strength * torch.eye(len(gram), dtype=gram.dtype), wide.T @ residual / len(wide))
    solved = (start + step).T.float()
    with torch.no_grad():
        head.weight.copy_(solved[:, :-1])
        head.bias.copy_(solved[:, -1])


def _solve(head: nn.Module, x: Tensor, labels: Tensor, task: Task, pull: float, *, released: bool) -> None:
    parameters = list(head.parameters())
    start = [parameter.detach().clone() if released else torch.zeros_like(parameter) for parameter in parameters]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    solver = torch.optim.LBFGS(parameters, max_iter=NEWTON, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        far = torch.stack(
            [(value - other).square().sum() for value, other in zip(parameters, start, strict=True)]
        ).sum()
        loss = task.loss(head(x), labels) + pull * far
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    solver.step(closure)  # type: ignore[no-untyped-call]
    if not all(torch.isfinite(parameter).all() for parameter in parameters):  # a loss without a minimum
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
