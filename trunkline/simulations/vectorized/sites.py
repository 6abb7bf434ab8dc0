"""Sites of one process whose networks have the same shape, trained as one: the same arithmetic on a stack of models.

A small network on a small batch spends its time in the calls, not in the sums; a stack makes one call of many sites'.
The loop and the step are those of `client.training`. Each site keeps its own rows, draws, optimiser state, gradient norm
and numbers of its labels; batched matrix products add in another order, so a site trained here and one trained alone
differ by rounding, and by nothing else (tests/simulations/vectorized/test_sites.py says how much).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trunkline.client.round_models import local_request
from trunkline.client.site import Site
from trunkline.client.state.vault import Entry, State, Vault
from trunkline.client.training.device_dataset import device
from trunkline.client.training.loop import SCORE_BATCH, steps_of, train
from trunkline.client.training.loss_balancing import Balance, Conflicts
from trunkline.client.training.step import Pull
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import Arrays, seed_of
from trunkline.protocol.messages import TrainRequest
from trunkline.simulations.vectorized.learner import StackLearner
from trunkline.simulations.vectorized.rows import JoinedRows
from trunkline.simulations.vectorized.stack_size import StackSize
from trunkline.simulations.vectorized.stacked_model import StackedModel, Tensors, stacked_losses

STACK_BYTES = 1 << 30  # that a stack may take: eight numbers a parameter, with gradients, moments and copies


@dataclass
class SiteResult:
    """What one site reports of a round; see `Update`."""

    weight: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class StackResult:
    """What a stack of sites came to in one round.

    Args:
        names: of the sites, in order; so are `results`.
        changes: lent name -> (sites, ...) after minus before.
    """

    names: list[str]
    results: list[SiteResult]
    changes: dict[str, NDArray[np.float32]]


@dataclass
class _Role:
    """The models of one role ("federated" or "local") of all vectorized sites, but what is lent.

    Args:
        request: as this role takes it.
        model: the code of one of them.
        kept: name of `TrunkModel.private` -> (sites, ...) values.
        best: name -> (sites, ...) of what is not lent of each site's best model so far; empty before the first.
        arrived: round -> what is lent of the best models of that round, the same at every site.
        stored: site's index -> the whole best model, of a site whose vault had one.
        loss, round: (sites,) of the best model; infinite and 0 before the first.
    """

    request: TrainRequest
    model: StackedModel
    kept: Tensors
    best: Tensors = field(default_factory=dict)
    arrived: dict[int, Tensors] = field(default_factory=dict)
    stored: dict[int, State] = field(default_factory=dict)
    loss: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    round: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def keep_as_best(self, indices: list[int], models: Tensors, arrived: Tensors, losses: list[float]) -> None:
        """Keep these models as the best of their sites; what is lent of them is the same at all, and kept once."""
        if not self.best:
            self.best = {name: torch.empty_like(value) for name, value in self.kept.items()}
        for name in self.best:
            self.best[name][indices] = models[name]
        done = self.request.done
        self.arrived[done] = arrived
        for index, loss in zip(indices, losses, strict=True):
            self.loss[index], self.round[index] = loss, done
            self.stored.pop(index, None)
        in_use = set(self.round.tolist())
        self.arrived = {round: values for round, values in self.arrived.items() if round in in_use}

    def best_of(self, index: int) -> State:
        if index in self.stored:
            return self.stored[index]
        lent = {name: value.cpu().numpy() for name, value in self.arrived[int(self.round[index])].items()}
        return {**_row(self.best, index), **lent}


class VectorizedSites:
    """Sites of equal kind (`eligibility.kind_of`) in one run, with all they need between two rounds in memory.

    Their state reaches the vaults by `flush`. Until then it is what would be lost with this process.

    Args:
        sites: of one kind.
        request: the first they are to answer; they go on from what their vaults hold before it.
    """

    def __init__(self, sites: Sequence[Site], request: TrainRequest) -> None:
        self.sites = list(sites)
        self.request = request
        self.where = device()
        self.index_of = {site.name: index for index, site in enumerate(self.sites)}
        self.tasks = self.sites[0].data.tasks
        self.train_rows = JoinedRows.of([site.resident(site.rows(request)) for site in self.sites])
        self.curve_rows = JoinedRows.of([site.resident("curve") for site in self.sites])
        self.numbers = {
            name: _stack_tensors([site.data.tasks[name].loss_numbers() or {} for site in self.sites], self.where)
            for name in self.tasks
        }
        self.lent: tuple[str, ...] = ()
        self.lent_size = 0
        self.planned: list[Mapping[str, int]] = [{}] * len(self.sites)
        self.roles: dict[str, _Role] = {}
        self.rounds = np.zeros(len(self.sites), np.int64)  # the last each site has answered, and not yet put away
        self._load()
        kept = sum(value[0].numel() for value in self.roles["federated"].kept.values()) + self.lent_size
        clock = time.thread_time if self.where.type == "cpu" else time.perf_counter
        self.stack_size = StackSize(max(1, STACK_BYTES // (32 * max(kept, 1))), clock)
        for site in self.sites:
            site.forget()  # its rows are here now

    # --- state ---------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """What the vaults hold, stacked; a site new to the run starts as `site.model` does."""
        requests = {"federated": self.request} | (
            {"local": local_request(self.request)} if self.request.baseline else {}
        )
        entries: list[Entry | None] = []
        for index, site in enumerate(self.sites):
            vault = Vault(site.state, self.request.run, site.tell, site.seal, site.name)
            entries.append(vault.before(self.request.round, self.request.passed))
            if self.request.passed:
                self.planned[index] = (vault.decisions() or {}).get("planned", {})
        for name, request in requests.items():
            states: list[State] = []
            for site, entry in zip(self.sites, entries, strict=True):
                model = site.model(request)
                if entry is not None:
                    model.restore(entry.private if name == "federated" else entry.local, request.lend)
                states.append(model.private(request.lend))
            if name == "federated":
                lent = model.share(request.lend)
                self.lent, self.lent_size = tuple(lent), sum(array.size for array in lent.values())
            self.roles[name] = self._role(name, request, model, states, entries)

    def _role(
        self, name: str, request: TrainRequest, model: TrunkModel, states: list[State], entries: list[Entry | None]
    ) -> _Role:
        role = _Role(request, StackedModel(model), _stack(states, self.where))
        role.model.trace_dropouts(*self.train_rows.data.batch(torch.zeros(1, dtype=torch.int64, device=self.where)))
        role.loss, role.round = np.full(len(self.sites), np.inf), np.zeros(len(self.sites), np.int64)
        for index, entry in enumerate(entries):
            if entry is not None and name in entry.best:
                role.stored[index] = entry.best[name]
                role.loss[index], role.round[index] = entry.best_loss[name], entry.best_round[name]
        return role

    def flush(self) -> None:
        """Put every site's state into its vault, as if it had just answered the last round it took part in.

        Raises:
            StorageError: a vault cannot be written.
        """
        for index in np.flatnonzero(self.rounds).tolist():
            site = self.sites[index]
            best = {name: role for name, role in self.roles.items() if np.isfinite(role.loss[index])}
            entry = Entry(
                question="",  # nobody can ask it again
                private=_row(self.roles["federated"].kept, index),
                local=_row(self.roles["local"].kept, index) if "local" in self.roles else {},
                best={name: role.best_of(index) for name, role in best.items()},
                best_loss={name: float(role.loss[index]) for name, role in best.items()},
                best_round={name: int(role.round[index]) for name, role in best.items()},
            )
            Vault(site.state, self.request.run, site.tell, site.seal, site.name).put(int(self.rounds[index]), entry)
            self.rounds[index] = 0

    # --- a round -------------------------------------------------------------------------------------------------------

    def answer(self, names: Sequence[str], request: TrainRequest, arrays: Arrays) -> Iterator[StackResult]:
        """Train these sites in stacks, one after the other."""
        waiting = [self.index_of[name] for name in names]
        for name, role in self.roles.items():
            role.request = request if name == "federated" else local_request(request)
        while waiting:
            size = self.stack_size.next(len(waiting), len(self.sites))
            indices, waiting = waiting[:size], waiting[size:]
            yield self.stack_size.timed(len(indices), partial(self._answer_stack, indices, request, arrays))

    def _answer_stack(self, indices: list[int], request: TrainRequest, arrays: Arrays) -> StackResult:
        arrived = {name: torch.from_numpy(np.array(array)).to(self.where) for name, array in arrays.items()}
        results = [SiteResult(float(min(self.train_rows.sizes[index], request.weight_cap)), {}) for index in indices]
        change: dict[str, NDArray[np.float32]] = {}
        for name, role in self.roles.items():
            models = {key: value[indices] for key, value in role.kept.items()}
            lent = arrived if name == "federated" else {}
            self._score(name, role, indices, models, lent, results)
            models |= {key: value.expand(len(indices), *value.shape).clone() for key, value in lent.items()}
            hopeful = [self._hopeful(role, index, name) for index in indices]
            if name == "federated" and request.lend:
                hopeful = [True] * len(indices)  # who lends trains on for the others
            if any(hopeful):
                reported = [
                    result if trains and name == "federated" else None
                    for result, trains in zip(results, hopeful, strict=True)
                ]
                before = {} if all(hopeful) else {key: value.clone() for key, value in models.items()}
                models = self._train(role, indices, models, reported)  # in place
                goes_on = torch.tensor(hopeful, device=self.where)
                for key, value in before.items():
                    models[key] = torch.where(_over(goes_on, value), models[key], value)
            for key, value in role.kept.items():
                value[indices] = models[key]
            if name == "federated":
                change = {key: (models[key] - value).cpu().numpy() for key, value in arrived.items()}
        self.rounds[indices] = request.round
        return StackResult([self.sites[index].name for index in indices], results, change)

    def _hopeful(self, role: _Role, index: int, name: str) -> bool:
        """As `_Best.hopeful` in client/handlers.py."""
        request = role.request
        if request.passed:
            return request.done < self.planned[index].get(name, request.rounds)
        patience = request.plan.patience_rounds
        return not patience or not np.isfinite(role.loss[index]) or request.done - role.round[index] < patience

    def _train(self, role: _Role, indices: list[int], models: Tensors, reported: list[SiteResult | None]) -> Tensors:
        """One round of local training of the stacked `models`, in place; as `train_site` does it with each. Their new values.

        Args:
            reported: where loss and conflicts are written, for each site that reports them.
        """
        request = role.request
        plan = request.plan
        seeds = [seed_of(request.seed, self.sites[index].name, request.round) for index in indices]
        learner = StackLearner(
            role.model, models, self.train_rows, self.tasks, self._numbers(indices),
            indices=indices, batch_size=plan.batch_size, seeds=seeds, where=self.where,
        )  # fmt: skip
        conflicts = Conflicts(self.tasks if any(reported) else ())
        losses = train(
            learner, plan, total=steps_of(plan, self.train_rows.sizes[indices[0]]), done=request.done,
            rounds=request.rounds, balancing=Balance(self.tasks, self.where, {}), conflicts=conflicts,
            pull=Pull(plan.proximal),
        )  # fmt: skip
        for result, loss, cosines in zip(reported, losses.cpu().tolist(), conflicts.means(len(indices)), strict=True):
            if result is not None:
                result.metrics |= {"train_loss": float(loss), **cosines}
        return learner.values

    def _score(
        self, name: str, role: _Role, indices: list[int], models: Tensors, lent: Tensors, results: list[SiteResult]
    ) -> None:
        """Validation loss and metrics of the models as they are, and the best of each kept; as `_train` in client/handlers.py.

        Args:
            name: of the role.
            models: what is not lent, stacked.
            lent: what has arrived, one for all.
        """
        request = role.request
        if request.passed:
            due = [row for row, index in enumerate(indices) if self.planned[index].get(name) == request.done]
            if due:
                kept = {key: value[due] for key, value in models.items()}
                role.keep_as_best([indices[row] for row in due], kept, lent, [0.0] * len(due))
            return
        if request.done <= 0:
            return
        outputs, labels, counts = self._outputs(role, indices, models, lent)
        numbers = self._numbers(indices)
        stacked = torch.stack(stacked_losses(self.tasks, numbers, outputs, labels)).sum(dim=0)
        losses = stacked.cpu().numpy().astype(np.float64)  # (sites,)
        outputs = {task: output.cpu() for task, output in outputs.items()}
        columns = {task: column.cpu().numpy() for task, column in labels.items()}
        quick = {key: task.scores(outputs[key], columns[key], numbers[key]) for key, task in self.tasks.items()}
        better = []
        for row, (index, count) in enumerate(zip(indices, counts, strict=True)):
            metrics = results[row].metrics
            metrics["validation_loss" if name == "federated" else "local_validation_loss"] = float(losses[row])
            for key, task in self.sites[index].data.tasks.items():
                scores = quick[key]
                if scores is not None:
                    value: float | None = float(scores[row])
                else:
                    value = task.score(task.predict(outputs[key][row, :count]), columns[key][row, :count])
                if value is not None and np.isfinite(value):
                    metrics[f"{key}.{name}"] = value
            if request.plan.keep == "best" and np.isfinite(losses[row]) and losses[row] < role.loss[index]:
                better.append(row)
        if better:
            kept = {key: value[better] for key, value in models.items()}
            role.keep_as_best([indices[row] for row in better], kept, lent, [float(losses[row]) for row in better])

    @torch.no_grad()
    def _outputs(
        self, role: _Role, indices: list[int], models: Tensors, lent: Tensors
    ) -> tuple[Tensors, Tensors, list[int]]:
        """On the rows a curve is drawn from: task -> (sites, rows, outputs), their labels, and how many rows a site has."""
        role.model.clear_masks(training=False)
        rows, counts = self.curve_rows.all_of(indices)
        batches: dict[str, list[Tensor]] = {name: [] for name in self.tasks}
        width = max(1, SCORE_BATCH // max(1, len(indices)))
        for start in range(0, rows.shape[1], width):
            x, codes = self.curve_rows.batch(rows[:, start : start + width])
            _, outputs = role.model.forward(models, x, codes, [], lent)
            for name in self.tasks:
                batches[name].append(outputs[name].float())
        padding = torch.arange(rows.shape[1], device=self.where)[None, :] >= counts[:, None]
        labels = self.curve_rows.labels_at(rows, padding)
        return {name: torch.cat(parts, dim=1) for name, parts in batches.items()}, labels, counts.tolist()

    def _numbers(self, indices: list[int]) -> dict[str, Tensors]:
        """What the losses read of these sites' labels; see `Task.loss_numbers`."""
        return {task: {key: value[indices] for key, value in self.numbers[task].items()} for task in self.tasks}


def _over(values: Tensor, like: Tensor) -> Tensor:
    """(sites,) shaped so that it goes over the first dimension of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _stack(states: Sequence[State], where: torch.device) -> Tensors:
    """Each site's arrays by name -> name -> (sites, ...)."""
    return {
        name: torch.from_numpy(np.stack([np.asarray(state[name]) for state in states])).to(where) for name in states[0]
    }


def _stack_tensors(numbers: Sequence[Mapping[str, Tensor]], where: torch.device) -> Tensors:
    return {name: torch.stack([site[name] for site in numbers]).to(where) for name in numbers[0]}


def _row(stacked: Tensors, index: int) -> dict[str, Any]:
    return {name: value[index].cpu().numpy().copy() for name, value in stacked.items()}
