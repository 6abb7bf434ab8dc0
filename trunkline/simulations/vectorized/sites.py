"""Sites of one process whose networks have the same shape, trained as one: the same arithmetic on a stack of models.

A small network on a small batch spends its time in the calls, not in the sums. `torch.func.vmap` makes one call of many
sites' (Horace He and Richard Zou, functorch, 2021). Each site keeps its own rows, draws, optimiser state, gradient norm
and numbers of its labels; batched matrix products add in another order, so a site trained here and one trained alone
differ by rounding, and by nothing else (tests/simulations/vectorized/test_sites.py says how much).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trunkline.client.handlers import apart
from trunkline.client.site import Site
from trunkline.client.state.vault import Entry, State, Vault
from trunkline.client.training.device_dataset import DeviceDataset, device
from trunkline.client.training.loop import LOOKS, SCORE_BATCH, steps_of
from trunkline.client.training.sampling import Batches
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel, tensors_of
from trunkline.protocol.arrays import Arrays, seed_of
from trunkline.protocol.contract import conflict_name
from trunkline.protocol.messages import TrainRequest
from trunkline.protocol.plan import Augment, GuardSettings, LocalPlan

SIZES = (64, 128, 256, 32, 8, 1)  # sites in one stack: which is fastest depends on network and machine, so it is tried
TRIES = 3  # stacks of each size in that trial: one to warm up, and the better of the others counts
STACK_BYTES = 1 << 30  # that a stack may take: eight numbers a parameter, with gradients, moments and copies
Key = tuple[object, ...]
Tensors = dict[str, Tensor]


def kind_of(site: Site, request: TrainRequest) -> Key | None:
    """Sites with equal kinds can be trained together; None: this one is trained alone, as `answer_train` does it."""
    orders = [request] + ([apart(request)] if request.baseline else [])
    if request.about.guards != GuardSettings() or site.config.policy.metrics is not True:
        return None  # guards and policies are kept where each site answers for itself
    if request.plan.personal or not all(_plain(one.plan, one) for one in orders):
        return None
    site.meet(request)
    data = site.resident(site.rows(request))
    if not len(data) or data.goes is not None:
        return None
    tasks = []
    for name, task in site.data.tasks.items():
        numbers = task.loss_numbers()
        if numbers is None:
            return None
        shapes = tuple((key, tuple(value.shape)) for key, value in numbers.items())
        tasks.append((name, task.config.model_dump_json(), task.outputs, shapes))
    steps = tuple(steps_of(one.plan, len(data)) for one in orders)
    reads = (site.config.data.window, len(site.data.channels), site.data.categories)
    return (*reads, tuple(tasks), steps)


def _plain(plan: LocalPlan, request: TrainRequest) -> bool:
    return (
        plan.optimizer == "adamw"
        and plan.balance == "fixed"
        and plan.sampling == "uniform"
        and plan.augment == Augment()
        and not plan.proximal
        and request.trunk.norm != "private"  # its running statistics follow one site's batches
    )


@dataclass
class Trained:
    """What one site's training has to tell; see `Update`."""

    weight: float
    metrics: dict[str, float]


@dataclass(frozen=True)
class Stack:
    """What a stack of sites came to in one round.

    Args:
        names: of the sites, in order; told: of each.
        changes: lent name -> (sites, ...) after minus before.
    """

    names: list[str]
    told: list[Trained]
    changes: dict[str, NDArray[np.float32]]


@dataclass
class _Role:
    """The models of one role ("federated" or "local") of all vectorized sites, but what is lent.

    Args:
        order: as this role takes it.
        template: one model, for its code; its own values are never used.
        kept: name of `TrunkModel.private` -> (sites, ...) values.
        best: name -> (sites, ...) of what is not lent of each site's best model so far; empty before the first.
        arrived: round -> what is lent of the best models of that round, the same at every site.
        loss, round: (sites,) of that model; infinite, 0.
        own: place -> the whole best model, of a site whose vault had one.
    """

    request: TrainRequest
    template: _Template
    kept: Tensors
    best: Tensors = field(default_factory=dict)
    arrived: dict[int, Tensors] = field(default_factory=dict)
    own: dict[int, State] = field(default_factory=dict)
    loss: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    round: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


class VectorizedSites:
    """Sites of equal kind (`kind_of`) in one run, with all they need between two rounds in memory.

    Their state reaches the vaults by `flush`. Until then it is what would be lost with this process.

    Args:
        sites: of one kind.
        order: the first they are to answer; they go on from what their vaults hold before it.
    """

    def __init__(self, sites: Sequence[Site], request: TrainRequest) -> None:
        self.sites = list(sites)
        self.request = request
        self.where = device()
        self.place = {site.name: place for place, site in enumerate(self.sites)}
        self.tasks = self.sites[0].data.tasks
        self.train = _Joined.of([site.resident(site.rows(request)) for site in self.sites])
        self.curve = _Joined.of([site.resident("curve") for site in self.sites])
        self.numbers = {
            name: _stacked([site.data.tasks[name].loss_numbers() or {} for site in self.sites], self.where)
            for name in self.tasks
        }
        self.lent: tuple[str, ...] = ()
        self.lent_size = 0
        self.planned: list[Mapping[str, int]] = [{}] * len(self.sites)
        self.roles: dict[str, _Role] = {}
        self.rounds = np.zeros(len(self.sites), np.int64)  # the last each site has answered, and not yet put away
        self.trial = list(SIZES)  # sizes still to be tried
        self.tries = 0  # of the first of them
        self.seconds: dict[int, float] = {}  # size -> of a site in a stack of so many
        self._load()
        each = sum(value[0].numel() for value in self.roles["federated"].kept.values()) + self.lent_size
        self.most = max(1, STACK_BYTES // (32 * max(each, 1)))
        for site in self.sites:
            site.forget()  # its rows are here now

    # --- state ---------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """What the vaults hold, stacked; a site new to the run starts as `site.model` does."""
        orders = {"federated": self.request} | ({"local": apart(self.request)} if self.request.baseline else {})
        entries: list[Entry | None] = []
        for place, site in enumerate(self.sites):
            vault = Vault(site.state, self.request.run, site.tell, site.seal, site.name)
            entries.append(vault.before(self.request.round, self.request.passed))
            if self.request.passed:
                self.planned[place] = (vault.decisions() or {}).get("planned", {})
        for who, request in orders.items():
            states: list[State] = []
            for site, entry in zip(self.sites, entries, strict=True):
                model = site.model(request)
                if entry is not None:
                    model.restore(entry.private if who == "federated" else entry.local, request.lend)
                states.append(model.private(request.lend))
            if who == "federated":
                lent = model.share(request.lend)
                self.lent, self.lent_size = tuple(lent), sum(array.size for array in lent.values())
            role = _Role(request, _Template(model), _stack(states, self.where))
            role.template.look(*self.train.data.batch(torch.zeros(1, dtype=torch.int64, device=self.where)))
            number = len(self.sites)
            role.loss, role.round = np.full(number, np.inf), np.zeros(number, np.int64)
            for place, entry in enumerate(entries):
                if entry is not None and who in entry.best:
                    role.own[place] = entry.best[who]
                    role.loss[place], role.round[place] = entry.best_loss[who], entry.best_round[who]
            self.roles[who] = role

    def _see(self, role: _Role, places: list[int], models: Tensors, arrived: Tensors, losses: list[float]) -> None:
        """Keep these models as the best of their sites; what is lent of them is the same at all, and kept once."""
        if not role.best:
            role.best = {name: torch.empty_like(value) for name, value in role.kept.items()}
        for name in role.best:
            role.best[name][places] = models[name]
        done = role.request.done
        role.arrived[done] = arrived
        for place, loss in zip(places, losses, strict=True):
            role.loss[place], role.round[place] = loss, done
            role.own.pop(place, None)
        still = set(role.round.tolist())
        role.arrived = {round: values for round, values in role.arrived.items() if round in still}

    @staticmethod
    def _best(role: _Role, place: int) -> State:
        if place in role.own:
            return role.own[place]
        lent = {name: value.cpu().numpy() for name, value in role.arrived[int(role.round[place])].items()}
        return {**_row(role.best, place), **lent}

    def flush(self) -> None:
        """Put every site's state into its vault, as if it had just answered the last round it took part in.

        Raises:
            StorageError: a vault cannot be written.
        """
        for place in np.flatnonzero(self.rounds).tolist():
            site, best = self.sites[place], [role for role in self.roles.values() if np.isfinite(role.loss[place])]
            names = {id(role): who for who, role in self.roles.items()}
            entry = Entry(
                question="",  # nobody can ask it again
                private=_row(self.roles["federated"].kept, place),
                local=_row(self.roles["local"].kept, place) if "local" in self.roles else {},
                best={names[id(role)]: self._best(role, place) for role in best},
                best_loss={names[id(role)]: float(role.loss[place]) for role in best},
                best_round={names[id(role)]: int(role.round[place]) for role in best},
            )
            Vault(site.state, self.request.run, site.tell, site.seal, site.name).put(int(self.rounds[place]), entry)
            self.rounds[place] = 0

    # --- a round -------------------------------------------------------------------------------------------------------

    def answer(self, names: Sequence[str], request: TrainRequest, arrays: Arrays) -> Iterator[Stack]:
        """Train these sites in stacks, one after the other."""
        places = [self.place[name] for name in names]
        for who, role in self.roles.items():
            role.request = request if who == "federated" else apart(request)
        left = places
        while left:
            size = self._next_size(len(left))
            some, left = left[:size], left[size:]
            yield self._timed(some, request, arrays)

    def _next_size(self, left: int) -> int:
        """How many sites the next stack takes: one of the sizes on trial, as far as there are sites for it, or the fastest."""
        while self.trial and self.trial[0] > min(len(self.sites), self.most):
            self.trial.pop(0)
        if self.trial and (self.trial[0] <= left or not self.seconds):
            return self.trial[0]
        return min(self.seconds, key=lambda size: self.seconds[size]) if self.seconds else min(left, self.most)

    def _timed(self, places: list[int], request: TrainRequest, arrays: Arrays) -> Stack:
        """One stack; while sizes are tried, with a clock beside it.

        On a CPU it is the thread's own time that counts, so that what else runs there decides nothing.
        """
        if not self.trial or len(places) != self.trial[0]:
            return self._stack_of(places, request, arrays)
        clock = time.thread_time if self.where.type == "cpu" else time.perf_counter
        began, size = clock(), len(places)
        done = self._stack_of(places, request, arrays)  # its changes are on the CPU: a GPU has finished too
        self.tries += 1
        if self.tries > 1:
            self.seconds[size] = min(self.seconds.get(size, math.inf), (clock() - began) / size)
        if self.tries == TRIES:
            self.trial.pop(0)
            self.tries = 0
            best = min(self.seconds, key=lambda one: self.seconds[one])
            # where more were slower, still more will be, and likewise fewer
            larger, smaller = (any(one > best for one in self.seconds), any(one < best for one in self.seconds))
            self.trial = [one for one in self.trial if not (larger if one > best else smaller)]
        return done

    def _stack_of(self, places: list[int], request: TrainRequest, arrays: Arrays) -> Stack:
        arrived = {name: torch.from_numpy(np.array(array)).to(self.where) for name, array in arrays.items()}
        told = [Trained(float(min(self.train.sizes[place], request.weight_cap)), {}) for place in places]
        change: dict[str, NDArray[np.float32]] = {}
        for who, role in self.roles.items():
            models = {name: value[places] for name, value in role.kept.items()}
            lent = arrived if who == "federated" else {}
            self._judge(who, role, places, models, lent, told)
            models |= {name: value.expand(len(places), *value.shape).clone() for name, value in lent.items()}
            hopeful = [self._hopeful(role, place, who) for place in places]
            if who == "federated" and request.lend:
                hopeful = [True] * len(places)  # who lends trains on for the others
            if any(hopeful):
                before = {name: value.clone() for name, value in models.items()} if not all(hopeful) else {}
                self._train(
                    role,
                    places,
                    models,
                    [one if yes and who == "federated" else None for one, yes in zip(told, hopeful, strict=True)],
                )
                for name, value in before.items():
                    models[name] = torch.where(_over(torch.tensor(hopeful), value), models[name], value)
            for name, value in role.kept.items():
                value[places] = models[name]
            if who == "federated":
                for name, value in arrived.items():
                    change[name] = (models[name] - value).cpu().numpy()
        self.rounds[places] = request.round
        return Stack([self.sites[place].name for place in places], told, change)

    def _hopeful(self, role: _Role, place: int, who: str) -> bool:
        request = role.request
        if request.passed:
            return request.done < self.planned[place].get(who, request.rounds)
        patience = request.plan.patience_rounds
        return not patience or not np.isfinite(role.loss[place]) or request.done - role.round[place] < patience

    def _judge(
        self, who: str, role: _Role, places: list[int], models: Tensors, lent: Tensors, told: list[Trained]
    ) -> None:
        """Validation loss and metrics of the models as they are, and the best of each kept; as `_train` in rounds.py.

        Args:
            models: what is not lent, stacked.
            lent: what has arrived, one for all.
        """
        request = role.request
        if request.passed:
            here = [at for at, place in enumerate(places) if self.planned[place].get(who) == request.done]
            if here:
                kept = {name: one[here] for name, one in models.items()}
                self._see(role, [places[at] for at in here], kept, lent, [0.0] * len(here))
            return
        if request.done <= 0:
            return
        outputs, labels, there = self._outputs(role, places, models, lent)
        losses = self._losses(outputs, labels, places).sum(dim=0).cpu().numpy().astype(np.float64)  # (sites,)
        outputs = {name: output.cpu() for name, output in outputs.items()}
        columns = {name: column.cpu().numpy() for name, column in labels.items()}
        own = there.tolist()
        quick = {
            name: task.scores(
                outputs[name], columns[name], {key: one[places] for key, one in self.numbers[name].items()}
            )
            for name, task in self.tasks.items()
        }
        better = []
        for at, place in enumerate(places):
            told[at].metrics["validation_loss" if who == "federated" else "local_validation_loss"] = float(losses[at])
            for name, task in self.sites[place].data.tasks.items():
                scores = quick[name]
                value = (
                    task.score(task.predict(outputs[name][at, : own[at]]), columns[name][at, : own[at]])
                    if scores is None
                    else float(scores[at])
                )
                if value is not None and np.isfinite(value):
                    told[at].metrics[f"{name}.{who}"] = value
            if request.plan.keep == "best" and np.isfinite(losses[at]) and losses[at] < role.loss[place]:
                better.append(at)
        if better:
            kept = {name: one[better] for name, one in models.items()}
            self._see(role, [places[at] for at in better], kept, lent, [float(losses[at]) for at in better])

    @torch.no_grad()
    def _outputs(
        self, role: _Role, places: list[int], models: Tensors, lent: Tensors
    ) -> tuple[Tensors, Tensors, Tensor]:
        """task -> (sites, rows, outputs) on the rows a curve is drawn from, their labels, and how many are a site's own."""
        role.template.silence(training=False)
        rows, there = self.curve.all_of(places)  # (sites, rows) positions; how many of them count
        parts: dict[str, list[Tensor]] = {name: [] for name in self.tasks}
        wide = max(1, SCORE_BATCH // max(1, len(places)))
        for start in range(0, rows.shape[1], wide):
            x, codes = self.curve.batch(rows[:, start : start + wide])
            _, outputs = role.template.forward(models, x, codes, [], lent)
            for name in self.tasks:
                parts[name].append(outputs[name].float())
        outputs = {name: torch.cat(some, dim=1) for name, some in parts.items()}
        beyond = torch.arange(rows.shape[1], device=self.where)[None, :] >= there[:, None]
        return outputs, self.curve.labels_at(rows, beyond), there.cpu()

    def _losses(self, outputs: Tensors, labels: Tensors, places: list[int]) -> Tensor:
        """(tasks, sites) weighted losses of stacked outputs (sites, rows, ...)."""
        each = []
        for name, task in self.tasks.items():
            numbers = {key: value[places] for key, value in self.numbers[name].items()}
            each.append(torch.func.vmap(_loss_of(task))(numbers, outputs[name], labels[name]))
        return torch.stack(each)

    def _train(self, role: _Role, places: list[int], models: Tensors, told: list[Trained | None]) -> None:
        """One round of local training of the stacked `models`, in place; `train_site` on each of them.

        Args:
            told: where loss and conflicts are written, for each site that is to tell them.
        """
        request, template = role.request, role.template
        plan, count = request.plan, len(places)
        template.silence(training=True)
        seeds = [seed_of(request.seed, self.sites[place].name, request.round) for place in places]
        total = steps_of(plan, self.train.sizes[places[0]])
        batches = _Draws(self.train, places, plan.batch_size, seeds, still=not template.dropouts)
        masks = template.masks([seed_of(seed, "dropout") for seed in seeds], self.where)
        speeds = {"trunk": 1.0, "stem": plan.private_rate, "heads": plan.private_rate}
        every = math.ceil(total / LOOKS) if len(self.tasks) > 1 and any(told) else 0
        cosines: list[Tensor] = []
        losses: list[Tensor] = []
        step = 0
        for position, phase in enumerate(plan.phases):
            rates = {part: plan.learning_rate * speeds[part] for part in phase.parts}
            groups: dict[float, list[Tensor]] = {}
            moving: list[Tensor] = []
            for name, value in models.items():
                models[name] = value = value.detach()
                rate = rates.get(template.part_of[name], 0.0)
                if rate > 0.0:
                    moving.append(value.requires_grad_(True))
                    groups.setdefault(rate, []).append(value)
            last = total if position == len(plan.phases) - 1 else min(total, step + max(1, round(total * phase.share)))
            optimiser = torch.optim.AdamW(
                [{"params": some, "lr": rate} for rate, some in groups.items()],
                weight_decay=plan.weight_decay, fused=True,
            ) if groups else None  # fmt: skip
            full = [group["lr"] for group in optimiser.param_groups] if optimiser else []
            begun = step
            while step < last:
                if plan.schedule == "cosine" and optimiser:
                    progress = (request.done + step / total) / request.rounds
                    for group, highest in zip(optimiser.param_groups, full, strict=True):
                        group["lr"] = highest * 0.5 * (1.0 + math.cos(math.pi * progress))
                rows, beyond = batches.next()
                x, codes = self.train.batch(rows)
                labels = self.train.labels_at(rows, beyond)
                with torch.autocast(self.where.type, torch.bfloat16, enabled=self.where.type == "cuda"):
                    embedded, outputs = template.forward(models, x, codes, masks(rows.shape[1], batches.sizes))
                each = self._losses({name: one.float() for name, one in outputs.items()}, labels, places)
                if every and step % every == 0 and embedded.requires_grad:
                    cosines.append(_cosines(each, embedded, count))
                if optimiser and each.requires_grad:
                    optimiser.zero_grad(set_to_none=True)
                    each.sum().backward()  # type: ignore[no-untyped-call]
                    _clip(moving, plan.clip_norm)
                    if last - begun == 1:
                        _only_step(optimiser)
                    else:
                        optimiser.step()
                losses.append(each.sum(dim=0).detach())
                step += 1
        for name, value in models.items():
            models[name] = value.detach()
        means = torch.stack(losses).mean(dim=0).cpu().tolist()
        for one, loss in zip(told, means, strict=True):
            if one is not None:
                one.metrics["train_loss"] = float(loss)
        if cosines:
            mean = torch.stack(cosines).nanmean(dim=0).clamp(-1.0, 1.0).cpu().numpy()  # (sites, m, m)
            names = list(self.tasks)
            for at, one in enumerate(told):
                for row, task in enumerate(names):
                    for column in range(row + 1, len(names)):
                        cosine = float(mean[at, row, column])
                        if one is not None and cosine == cosine:
                            one.metrics[conflict_name(task, names[column])] = cosine


def _loss_of(task: Task) -> Callable[[Tensors, Tensor, Tensor], Tensor]:
    def loss(numbers: Tensors, output: Tensor, labels: Tensor) -> Tensor:
        weighted: Tensor = task.config.weight * task.with_numbers(numbers).loss(output, labels)
        return weighted

    return loss


def _clip(moving: list[Tensor], most: float) -> None:
    """Scale each site's gradients, all its tensors together, to a norm of at most `most`."""
    there = [one.grad for one in moving if one.grad is not None]
    if not there:
        return
    norm = torch.stack([torch.linalg.vector_norm(one.flatten(1), dim=1) for one in there]).square().sum(dim=0).sqrt()
    scale = (most / (norm + 1e-6)).clamp(max=1.0)
    for one in there:
        one.mul_(_over(scale, one))


@torch.no_grad()
def _only_step(optimiser: torch.optim.AdamW) -> None:
    """The first step of AdamW where no second follows: its moments are the gradient itself, and nothing has to remember them."""
    for group in optimiser.param_groups:
        there = [one for one in group["params"] if one.grad is not None]
        gradients = [one.grad for one in there]
        size = torch._foreach_abs(gradients)
        torch._foreach_add_(size, group["eps"])
        torch._foreach_mul_(there, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(there, gradients, size, -group["lr"])


def _cosines(each: Tensor, embedded: Tensor, count: int) -> Tensor:
    """(sites, m, m) cosines of the tasks' gradients at the trunk's output; a site's losses reach its own output only."""
    rows = []
    for task in range(len(each)):
        (gradient,) = torch.autograd.grad(each[task].sum(), embedded, retain_graph=True)
        rows.append(gradient.float().reshape(count, -1))
    directions = torch.stack(rows, dim=1)  # (sites, m, batch x width)
    directions = directions / directions.norm(dim=2, keepdim=True)
    cosines: Tensor = directions @ directions.transpose(1, 2)
    return cosines


def _over(values: Tensor, like: Tensor) -> Tensor:
    """(sites,) shaped so that it goes over the first dimension of `like`."""
    return values.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def _stack(states: Sequence[State], where: torch.device) -> Tensors:
    return {
        name: torch.from_numpy(np.stack([np.asarray(state[name]) for state in states])).to(where) for name in states[0]
    }


def _stacked(numbers: Sequence[Mapping[str, Tensor]], where: torch.device) -> Tensors:
    return {name: torch.stack([one[name] for one in numbers]).to(where) for name in numbers[0]}


def _row(stacked: Tensors, place: int) -> dict[str, Any]:
    return {name: value[place].cpu().numpy().copy() for name, value in stacked.items()}


class _Whole(nn.Module):
    """A model whose forward pass also gives what the trunk gave."""

    def __init__(self, model: TrunkModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensors]:
        embedded = self.model.embed(x, codes)
        return embedded, {name: head(embedded) for name, head in self.model.heads.items()}


class _Dropped(nn.Module):
    """Stands where a dropout stood: multiplies by masks that were drawn outside, one a call."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.masks: Iterator[Tensor] | None = None  # None: evaluation, or a look at the shapes
        self.met: list[tuple[_Dropped, tuple[int, ...]]] | None = None  # where a look writes that it was here

    def forward(self, x: Tensor) -> Tensor:
        if self.met is not None:
            self.met.append((self, tuple(x.shape[1:])))
        return x if self.masks is None else x * next(self.masks)


class _Template:
    """One model's code, run on stacks of values.

    Args:
        model: whose code it is; values and names are those of `TrunkModel.share` and `private`.
    """

    def __init__(self, model: TrunkModel) -> None:
        names = {id(tensor): name for name, tensor in tensors_of(model)}
        self.dropouts: list[_Dropped] = []
        _replace_dropouts(model, self.dropouts)
        self.whole = _Whole(model)
        self.inside = {names[id(one)]: name for name, one in self.whole.named_parameters() if id(one) in names}
        parts: dict[int, str] = {}
        for part in ("stem", "trunk", "heads"):
            parts |= {id(one): part for one in model.parameters_of(part)}
        self.part_of: dict[str, Any] = {names[id(one)]: parts[id(one)] for one in self.whole.parameters()}
        self.calls: list[tuple[_Dropped, tuple[int, ...]]] = []  # dropouts in the order in which a pass meets them

    def silence(self, *, training: bool) -> None:
        self.whole.train(training)
        for one in self.dropouts:
            one.masks = None

    def forward(
        self,
        models: Tensors,
        x: Tensor,
        codes: Tensor,
        masks: Sequence[tuple[_Dropped, Tensor]],
        same: Tensors | None = None,
    ) -> tuple[Tensor, Tensors]:
        """Stacked values and inputs (sites, batch, ...) -> (sites, batch, width), task -> (sites, batch, outputs).

        Args:
            same: values that all sites share, not stacked.
        """
        values = {self.inside[name]: value for name, value in models.items()}
        shared = {self.inside[name]: value for name, value in (same or {}).items()}

        def one(values: Tensors, x: Tensor, codes: Tensor, drawn: list[Tensor]) -> tuple[Tensor, Tensors]:
            for module in self.dropouts:
                own = [mask for (owner, _), mask in zip(masks, drawn, strict=True) if owner is module]
                module.masks = iter(own) if masks else None
            made: tuple[Tensor, Tensors] = torch.func.functional_call(self.whole, {**values, **shared}, (x, codes))
            return made

        found: tuple[Tensor, Tensors] = torch.func.vmap(one)(values, x, codes, [mask for _, mask in masks])
        return found

    def masks(
        self, seeds: Sequence[int], where: torch.device
    ) -> Callable[[int, Tensor], list[tuple[_Dropped, Tensor]]]:
        """Draws the dropout masks of a step, for each site the very ones it would draw alone.

        Alone, a site's generator is started once a round, and every dropout of every step takes the next numbers of it.
        """
        # on a GPU a dropout draws by a rule of its own kernel: there the masks only have the same chances
        draws = [torch.Generator(where).manual_seed(seed) for seed in seeds] if self.dropouts else []

        def next_masks(batch: int, sizes: Tensor) -> list[tuple[_Dropped, Tensor]]:
            if not self.dropouts:
                return []
            made = []
            for module, shape in self.calls:
                mask = torch.ones((len(draws), batch, *shape), device=where)
                for at, (draw, size) in enumerate(zip(draws, sizes.tolist(), strict=True)):
                    own = torch.empty((size, *shape), device=where).bernoulli_(1.0 - module.p, generator=draw)
                    mask[at, :size] = own.div_(1.0 - module.p)
                made.append((module, mask))
            return made

        return next_masks

    def look(self, x: Tensor, codes: Tensor) -> None:
        """See which dropouts one forward pass meets, in order, and with what shapes."""
        self.silence(training=False)
        for module in self.dropouts:
            module.met = self.calls
        with torch.no_grad():
            self.whole(x, codes)
        for module in self.dropouts:
            module.met = None


def _replace_dropouts(module: nn.Module, found: list[_Dropped]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            if child.p > 0.0:
                dropped = _Dropped(child.p)
                found.append(dropped)
                setattr(module, name, dropped)
        else:
            _replace_dropouts(child, found)


@dataclass(frozen=True)
class _Joined:
    """The rows of several sites as one DeviceDataset, and where each site's samples begin."""

    data: DeviceDataset
    starts: NDArray[np.int64]
    sizes: list[int]

    @classmethod
    def of(cls, parts: Sequence[DeviceDataset]) -> _Joined:
        sizes = [len(part) for part in parts]
        return cls(DeviceDataset.joined(parts), np.cumsum([0, *sizes])[:-1], sizes)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(sites, batch) positions -> inputs (sites, batch, ...) and codes (sites, batch, k)."""
        x, codes = self.data.batch(rows.reshape(-1))
        return x.reshape(*rows.shape, *x.shape[1:]), codes.reshape(*rows.shape, codes.shape[1])

    def labels_at(self, rows: Tensor, beyond: Tensor | None) -> Tensors:
        """task -> (sites, batch, ...) labels, missing where `beyond` says that a position only fills up."""
        found = {}
        for name, column in self.data.labels.items():
            labels = column[rows]
            if beyond is not None:
                labels = torch.where(beyond.reshape(*beyond.shape, *[1] * (labels.ndim - 2)), torch.nan, labels)
            found[name] = labels
        return found

    def all_of(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(sites, most) positions of all samples of these sites, filled up with each one's first, and (sites,) how many."""
        sizes = np.array([self.sizes[place] for place in places])
        most = max(1, int(sizes.max(initial=0)))
        offsets = np.minimum(np.arange(most)[None, :], np.maximum(sizes[:, None] - 1, 0))
        rows = self.starts[list(places)][:, None] + offsets
        where = self.data.ends.device
        rows = np.minimum(rows, max(len(self.data) - 1, 0))
        return torch.from_numpy(rows).to(where), torch.from_numpy(sizes).to(where)


class _Draws:
    """The batches of several sites, each site's own, filled up to one length.

    Args:
        still: a site that sees all its rows in every step may see them in their own order, where nothing else is drawn.
    """

    def __init__(self, data: _Joined, places: Sequence[int], size: int, seeds: Sequence[int], *, still: bool) -> None:
        where = data.data.ends.device
        self.data, self.places = data, list(places)
        self.lengths = [min(size, data.sizes[place]) for place in places]
        self.sizes = torch.tensor(self.lengths)
        self.fixed: tuple[Tensor, Tensor | None] | None = None
        most = max(self.lengths)
        if still and all(data.sizes[place] <= size for place in places):
            rows, there = data.all_of(places)
            beyond = torch.arange(most, device=where)[None, :] >= there[:, None]
            self.fixed = rows, beyond if min(self.lengths) < most else None
            return
        cpu = torch.device("cpu")
        self.draws = [Batches(data.sizes[place], size, seed, cpu) for place, seed in zip(places, seeds, strict=True)]
        self.most, self.where = most, where
        beyond = torch.arange(most)[None, :] >= self.sizes[:, None]
        self.beyond = beyond.to(where) if min(self.lengths) < most else None

    def next(self) -> tuple[Tensor, Tensor | None]:
        """(sites, batch) positions in the joined rows, and which of them only fill up."""
        if self.fixed is not None:
            return self.fixed
        rows = torch.empty((len(self.places), self.most), dtype=torch.int64)
        for at, (place, draw) in enumerate(zip(self.places, self.draws, strict=True)):
            own = draw.next() + int(self.data.starts[place])
            rows[at, : len(own)] = own
            rows[at, len(own) :] = own[0]
        return rows.to(self.where), self.beyond
