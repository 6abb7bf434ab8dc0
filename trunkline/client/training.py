"""The only torch training loop in the project, and the forward pass that scores.

Inputs of a site lie on the device once; a batch is an index into them, so a step copies nothing from the host.
"""

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from trunkline.client.data import WindowSet
from trunkline.exchange import LocalPlan, seed_of
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel

SCORE_BATCH = 2048  # windows a forward pass; 2048 x 64 x 14 floats is 7 MB


def device() -> torch.device:
    """CUDA where there is one; TRUNKLINE_DEVICE overrides."""
    return torch.device(os.environ.get("TRUNKLINE_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class Resident:
    """A WindowSet as tensors on one device; windows are gathered there, never stored."""

    values: Tensor  # (rows, channels)
    categorical: Tensor  # (rows, k)
    first: Tensor  # (n,)
    ends: Tensor  # (n,)
    window: int | None
    labels: dict[str, Tensor]  # task -> (n,) or (n, k)

    @classmethod
    def of(cls, windows: WindowSet, where: torch.device) -> "Resident":
        return cls(
            values=torch.from_numpy(np.ascontiguousarray(windows.values)).to(where),
            categorical=torch.from_numpy(np.ascontiguousarray(windows.categorical)).to(where),
            first=torch.from_numpy(windows.first).to(where),
            ends=torch.from_numpy(windows.ends).to(where),
            window=windows.window,
            labels={
                task: torch.from_numpy(np.ascontiguousarray(column)).to(where)
                for task, column in windows.labels.items()
            },
        )

    def __len__(self) -> int:
        return len(self.ends)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(b,) positions -> inputs (b, channels, window), or (b, channels) for rows, and categorical codes (b, k)."""
        ends = self.ends[index]
        categorical = self.categorical[ends]
        if self.window is None:
            return self.values[ends], categorical
        back = torch.arange(self.window - 1, -1, -1, device=ends.device)
        rows = torch.maximum(
            ends[:, None] - back, self.first[index][:, None]
        )  # (b, window): before its start a group repeats its first row
        x = self.values.index_select(0, rows.reshape(-1)).view(len(index), self.window, -1)
        return x.transpose(1, 2), categorical


def total_loss(outputs: dict[str, Tensor], labels: dict[str, Tensor], tasks: dict[str, Task]) -> Tensor:
    """The site's one loss: the tasks' own, weighted as site.toml says."""
    return torch.stack(
        [task.config.weight * task.loss(outputs[name].float(), labels[name]) for name, task in tasks.items()]
    ).sum()


def steps_of(plan: LocalPlan, samples: int) -> int:
    """Optimiser steps a round."""
    if plan.epochs is None:
        return plan.steps
    return max(1, round(plan.epochs * samples / min(plan.batch_size, samples)))


def train_site(
    model: TrunkModel, data: Resident, tasks: dict[str, Task], plan: LocalPlan, *, seed: int, done: int, rounds: int
) -> float:
    """One round of local training, in place.

    AdamW starts afresh each round: its memory of the trunk would be of another trunk. The learning rate follows the whole
    run, not the round.

    Args:
        seed: of the batches and the dropout; from (run seed, site, round), so that a repeat is the same to the bit.
        done: rounds behind this one, of `rounds`.

    Returns:
        The mean training loss of the round's steps.
    """
    total = steps_of(plan, len(data))
    where = data.values.device
    draw = np.random.default_rng(seed_of(seed, "batches"))
    order = np.empty(0, np.int64)
    anchor: dict[nn.Parameter, Tensor] = {}
    if plan.proximal:
        anchor = {parameter: parameter.detach().clone() for parameter in model.parameters_of("trunk")}
    losses: list[Tensor] = []
    step = 0
    model.train()
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, "dropout"))
        for position, phase in enumerate(plan.phases):
            rates = {part: plan.learning_rate * (1.0 if part == "trunk" else plan.private_rate) for part in phase.parts}
            groups = [{"params": model.parameters_of(part), "lr": rate} for part, rate in rates.items() if rate > 0.0]
            moving = [
                parameter for part, rate in rates.items() if rate > 0.0 for parameter in model.parameters_of(part)
            ]
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for parameter in moving:
                parameter.requires_grad_(True)
            optimiser = torch.optim.AdamW(groups, weight_decay=plan.weight_decay, fused=True)
            full = [group["lr"] for group in optimiser.param_groups]
            last = total if position == len(plan.phases) - 1 else min(total, step + max(1, round(total * phase.share)))
            while step < last:
                if len(order) < min(plan.batch_size, len(data)):
                    order = np.concatenate([order, draw.permutation(len(data))])
                index, order = order[: plan.batch_size], order[plan.batch_size :]
                if plan.schedule == "cosine":
                    progress = (done + step / total) / rounds
                    for group, rate in zip(optimiser.param_groups, full, strict=True):
                        group["lr"] = rate * 0.5 * (1.0 + math.cos(math.pi * progress))
                place = torch.from_numpy(index).to(where)
                x, categorical = data.batch(place)
                with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
                    outputs = model(x, categorical)
                outputs = {name: task.meet(outputs[name].float(), x) for name, task in tasks.items()}
                loss = total_loss(outputs, {name: column[place] for name, column in data.labels.items()}, tasks)
                pulled = loss
                if anchor:
                    pulled = (
                        loss
                        + 0.5
                        * plan.proximal
                        * torch.stack([(p - start).square().sum() for p, start in anchor.items()]).sum()
                    )
                optimiser.zero_grad(set_to_none=True)
                if pulled.requires_grad:  # a batch without a single label moves nothing
                    pulled.backward()  # type: ignore[no-untyped-call]
                    nn.utils.clip_grad_norm_(moving, plan.clip_norm, foreach=True)
                    optimiser.step()
                losses.append(loss.detach())
                step += 1
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return float(torch.stack(losses).mean()) if losses else 0.0


@torch.inference_mode()
def outputs_of(model: TrunkModel, data: Resident, tasks: dict[str, Task]) -> dict[str, Tensor]:
    """What every task's `predict` takes, for every window, on the CPU in float32: task -> (n, outputs)."""
    where = data.values.device
    model.eval()
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(data), SCORE_BATCH):
        x, categorical = data.batch(torch.arange(start, min(start + SCORE_BATCH, len(data)), device=where))
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            outputs = model(x, categorical)
        for name, task in tasks.items():
            parts.setdefault(name, []).append(task.meet(outputs[name].float(), x).cpu())
    return {task: torch.cat(some) for task, some in parts.items()}
