"""A new plant: from a released trunk and a few labelled groups to the model this plant should use.

What is tried, and what was measured on turbofans that decided how the choice is made: with up to five labelled engines
probing and fine-tuning were worse than the released model as it is; averaging the weights of the two was not, on average over draws
(Wortsman et al. 2022, arXiv:2109.01903). So the released model is the one to beat, and something else is taken only
where groups that were held out say so beyond their noise.

    as_is         the released stem, trunk and heads; needs all three lent and the same channels
    probe         new heads on the frozen trunk (and a new stem, where none was lent)
    lp_ft         probe, then everything, pulled to where it starts (Kumar et al. 2022, arXiv:2202.10054; L2-SP, arXiv:1802.01483)
    lora          probe, then thin matrices beside the trunk's weights (arXiv:2106.09685)
    full          everything at once, from what was released
    interpolated  weights (1 - a) as_is + a full
    scratch       the same network without the release
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trunkline.client.adaptation.choice import Choice, Tried, choose_by_losses
from trunkline.client.adaptation.probe import probe
from trunkline.client.data import SiteData, WindowSet
from trunkline.client.data.site_data import open_newcomer
from trunkline.client.data.statistics import label_scale, set_label_scale
from trunkline.client.state.identity import Identity
from trunkline.client.state.permissions import open_seal
from trunkline.client.training.device_dataset import DeviceDataset, device
from trunkline.client.training.loop import outputs_of, train_site
from trunkline.client.training.single_model import total_loss
from trunkline.errors import DataError
from trunkline.models.lora import add_low_rank, merge_low_rank
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel, build_model
from trunkline.protocol.arrays import Arrays, seed_of
from trunkline.protocol.plan import Augment, LocalPlan, ModelPart, Phase
from trunkline.release import Card, open_release
from trunkline.security.signatures import Verdict

Groups = NDArray[np.int64]
ALL: tuple[ModelPart, ...] = ("stem", "trunk", "heads")
TRAINED = ("probe", "lp_ft", "lora", "full", "scratch")
LATE = ("probe", "lp_ft", "lora", "scratch")
BLENDS = (0.25, 0.5, 0.75)  # shares of the fine-tuned weights that are tried beside the prior one
HALF = 10.0  # groups at which the prior trusts the fine-tuned weights as much as the released ones
HONEST = 3  # labelled groups from which on groups can be held out to choose by
FOLDS = 6  # three learn from too few: with fifty turbofans six chose 1 % less error on engines outside the draw, twelve no less
HOPELESS = 2.0  # times the reference's loss on the first fold: such a candidate is not made for the others
ROWS = 150  # samples of a held-out group that are scored; neighbouring windows say the same
BLOCKS = 10  # stretches that stand for groups at a site without any

# A tenth of the federation's rate and few steps, the head faster than what it stands on: what was released is to be kept
TUNE = LocalPlan(
    phases=(Phase(parts=("heads",), share=0.2), Phase(parts=("trunk", "heads"), share=0.3), Phase(parts=ALL, share=0.5)),
    steps=80, batch_size=64, learning_rate=5e-4, proximal=1e-2, weight_decay=0.0,
)  # fmt: skip
# silent channels keep a network from knowing its few machines by one sensor: 1.5 % less error with 20 and 50 engines
FULL = LocalPlan(
    phases=(Phase(parts=ALL),), steps=100, batch_size=64, learning_rate=3e-4, augment=Augment(channel_drop=0.1)
)
LEARN = LocalPlan(phases=(Phase(parts=("stem", "heads")),), steps=150, batch_size=64, learning_rate=5e-3)
SCRATCH = LocalPlan(phases=(Phase(parts=ALL),), steps=200, batch_size=64, learning_rate=5e-3)
LOW_RANK = LocalPlan(
    phases=(Phase(parts=("trunk", "heads")),), steps=80, batch_size=64, learning_rate=2e-3, weight_decay=0.0
)
FASTEST = 1e-3  # of FULL, however many labels
SPEEDS: Mapping[ModelPart, float] = {"stem": 0.5, "trunk": 0.5, "heads": 1.0}


def _longer(plan: LocalPlan, groups: Groups) -> LocalPlan:
    """More labels are worth more steps: two percent more a group, tenfold at most."""
    return plan.model_copy(update={"steps": round(plan.steps * min(10.0, 1.0 + 0.02 * len(groups)))})


def _farther(plan: LocalPlan, groups: Groups) -> LocalPlan:
    """And larger ones: five percent more a group, up to FASTEST. With ten turbofans FASTEST cost as much as it brought, with
    twenty and fifty it brought 1 %; twice that for 300 steps lost nearly all that fine-tuning gains."""
    rate = min(FASTEST, plan.learning_rate * (1.0 + 0.05 * len(groups)))
    return _longer(plan, groups).model_copy(update={"learning_rate": rate})


@dataclass(frozen=True)
class Fit:
    """What of a release fits a site, and what not and why, in words."""

    stem: bool
    heads: tuple[str, ...]
    norms: bool
    notes: tuple[str, ...]

    @property
    def as_is(self) -> bool:
        """Whether the released model can be used here without a single label."""
        return self.stem and self.norms and bool(self.heads)


@dataclass(frozen=True)
class Adapted:
    """What `adapt` made of a release for one site."""

    site: SiteData
    card: Card
    fit: Fit
    choice: Choice
    model: TrunkModel
    workshop: "CandidateBuilder"
    verdict: Verdict | None = None  # on the release, where it was read from a file


class CandidateBuilder:
    """One site and one release: makes candidates out of any of its labelled groups.

    Args:
        data: of the site, opened as a newcomer: nothing held out.
        arrays, card: the release.
        labelled: keep the labels of this many groups only, drawn by `draw`; None: all of them.

    Raises:
        DataError: no training row has a label.
        ContractError: the release has no trunk for this kind of data.
    """

    def __init__(
        self, data: SiteData, arrays: Arrays, card: Card, *, labelled: int | None = None, draw: int = 0
    ) -> None:
        self.data = data
        self.card = card
        self.seed = seed_of(card.seed, data.config.name, "adapt")
        self.window = data.config.data.window
        with_labels = data.train.labelled()
        if not len(with_labels):
            raise DataError(
                f"{data.config.name}: no training row has a label, so there is nothing to adapt to or to judge by. "
                "Label one group at least; which one would tell most, `trunkline check` cannot know."
            )
        grouped = groups_of(with_labels, in_time=data.config.data.group is None or data.config.data.split.by == "time")
        names = np.unique(grouped)
        order = np.random.default_rng(seed_of(self.seed, "groups", draw)).permutation(len(names))
        self.labelled: Groups = names[order][:labelled]  # in the order in which fewer of them would be taken
        self.samples: WindowSet = with_labels.subset(np.isin(grouped, self.labelled))
        self.groups: Groups = grouped[np.isin(grouped, self.labelled)]
        self.resident = DeviceDataset.of(self.samples, device())
        self.tasks = {name: copy.copy(task) for name, task in data.tasks.items()}
        self.fit, self._start = self._begin(arrays)

    def _model(self) -> TrunkModel:
        model = build_model(
            self.card.trunk, window=self.window, channels=len(self.data.channels), categories=self.data.categories,
            tasks=self.tasks, seed=self.card.seed,
        )  # fmt: skip
        return model.to(device())

    def _begin(self, arrays: Arrays) -> tuple[Fit, TrunkModel]:
        """The model with everything of the release that fits, its labels scaled as the released heads speak."""
        model, card, notes = self._model(), self.card, []
        parts: list[str] = ["trunk"]
        wanted = model.share(("stem",))
        stem = all(name in arrays and arrays[name].shape == array.shape for name, array in wanted.items())
        if not any(name.startswith("stem.") for name in arrays):
            notes.append("No stem was released: one is learnt here.")
        elif card.channels != self.data.channels:
            stem = False
            released_channels = ", ".join(card.channels) if card.channels else "called differently at each of its sites"
            notes.append(
                f"The released stem reads other channels: {released_channels}. This site has {', '.join(self.data.channels)}. "
                "A stem is learnt here; were they the same in the same order, the released one could be used."
            )
        elif not stem:
            notes.append("The released stem has other shapes than this site builds; one is learnt here.")
        if stem:
            parts.append("stem")
            if card.window not in (None, self.window):
                notes.append(f"The release was trained on windows of {card.window} rows; this site has {self.window}.")
        cards = {entry.task: entry for entry in card.tasks}
        heads = []
        for name, task in sorted(self.tasks.items()):
            shapes = {key: array.shape for key, array in model.share((f"head.{name}",)).items()}
            released_shapes = {key: arrays[key].shape for key in arrays if key.startswith(f"head.{name}.")}
            if not released_shapes:
                notes.append(f"No head for task {name!r} was released: one is learnt here.")
            elif (
                name not in cards
                or (cards[name].kind, cards[name].unit) != (task.kind, task.card.unit)
                or released_shapes != shapes
            ):
                notes.append(
                    f"The released head {name!r} is of another kind, unit or number of outputs: one is learnt here."
                )
            else:
                heads.append(name)
                parts.append(f"head.{name}")
                notes += self._speak_alike(task)
        norms = card.trunk.norm == "group"
        if not norms:
            notes.append("The run's sites kept their norm layers, so the trunk starts with fresh ones here.")
        used = {key: arrays[key] for key in model.share(tuple(parts)) if key in arrays}
        model.adopt(used, tuple(parts))
        return Fit(stem, tuple(heads), norms, tuple(notes)), model

    def _speak_alike(self, task: Task) -> list[str]:
        if label_scale(task) is None:
            return []
        if task.name not in self.card.labels:
            return [
                f"The release does not say by what its sites scaled {task.name!r}; this site's own scale is used. "
                'A run that lends "scaler" says it.'
            ]
        scale = self.card.labels[task.name]
        set_label_scale(task, scale.mean, scale.std)
        return []

    def released(self) -> TrunkModel:
        """What came, with fresh parts where nothing did; not to be changed."""
        return self._start

    # --- candidates --------------------------------------------------------------------------------------------------

    def part(self, groups: Groups) -> DeviceDataset:
        """The labelled samples of `groups`."""
        return DeviceDataset.of(self.samples.subset(np.isin(self.groups, groups)), device())

    def as_is(self, groups: Groups) -> TrunkModel:
        """The released model; heads that were not released are probed, which changes nothing about the others."""
        model = copy.deepcopy(self._start)
        missing = {name: task for name, task in self.tasks.items() if name not in self.fit.heads}
        if missing:
            probe(model, self.part(groups), missing, len(groups))
        return model

    def make(self, name: str, groups: Groups) -> TrunkModel:
        """Candidate `name` (not "interpolated") from the labels of `groups`, the same bits for the same groups."""
        if name == "as_is":
            return self.as_is(groups)
        model = copy.deepcopy(self._start)
        data = self.part(groups)
        seed = seed_of(self.seed, name, *sorted(groups.tolist()))

        def train(plan: LocalPlan, **how: object) -> None:
            train_site(model, data, self.tasks, plan, seed=seed, done=0, rounds=1, **how)  # type: ignore[arg-type]

        if name == "scratch":
            model = self._model()
            train(_longer(SCRATCH, groups))
            return model
        if name == "full":
            train(_farther(FULL, groups) if self.fit.as_is else _longer(SCRATCH, groups))
            return model
        self._probe(model, data, len(groups), train)
        if name == "lp_ft":
            train(TUNE, pulled_parts=ALL, speeds=SPEEDS)
        elif name == "lora":
            add_low_rank(model, seed=seed)
            train(LOW_RANK, speeds={"stem": 0.0, "trunk": 1.0, "heads": 0.1})
            merge_low_rank(model)
        return model

    def _probe(self, model: TrunkModel, data: DeviceDataset, groups: int, train: Callable[[LocalPlan], None]) -> None:
        if not self.fit.stem:
            train(LEARN)  # a stem cannot be solved for: it is learnt below the frozen trunk, together with the heads
            probe(model, data, self.tasks, groups, released=tuple(self.tasks))
        else:
            probe(model, data, self.tasks, groups, released=self.fit.heads)

    def blend(self, tuned: TrunkModel, share: float) -> TrunkModel:
        """(1 - share) of the released weights and `share` of `tuned`'s."""
        model = copy.deepcopy(self._start)
        with torch.no_grad():
            for ours, tuned_values in zip(model.parameters(), tuned.parameters(), strict=True):
                ours.lerp_(tuned_values, share)
            for name in self.tasks:  # nothing was released to stay near to
                if name not in self.fit.heads:
                    model.heads[name].load_state_dict(tuned.heads[name].state_dict())
        return model

    def build(self, name: str, share: float, groups: Groups) -> TrunkModel:
        """Candidate `name`, interpolated ones included."""
        return self.blend(self.make("full", groups), share) if name == "interpolated" else self.make(name, groups)

    # --- the choice --------------------------------------------------------------------------------------------------

    def choose(self) -> Choice:
        """The candidate to use, by groups held out; by a prior where there are too few of them for an honest choice."""
        count = len(self.labelled)
        name, share = self.prior(count)
        if count >= HONEST:
            return choose_by_losses(self._held_out(share), share, as_is=self.fit.as_is)
        too_few = f"{count} labelled group{'s' if count != 1 else ''} cannot be held out and learnt from at once"
        if name == "interpolated":
            how = f"{share:.0%} of the way from the released weights to fine-tuned ones, a share that cost nothing on average where it was measured."
        else:
            how = "the trunk stays as it came, and only what was not released is learnt."
        return Choice(name, share, f"{too_few}: {how}")

    def prior(self, groups: int) -> tuple[str, float]:
        """The candidate and share for so few labelled groups that no choice between candidates would be honest."""
        return ("interpolated", groups / (groups + HALF)) if self.fit.as_is else ("probe", 1.0)

    def _held_out(self, prior: float) -> dict[tuple[str, float], Tried]:
        """Every candidate on groups it was not made from."""
        shuffled = self.labelled
        folds = [shuffled[start::FOLDS] for start in range(min(FOLDS, len(shuffled)))]
        tried: dict[tuple[str, float], Tried] = {}
        for held in folds:
            remaining = shuffled[~np.isin(shuffled, held)]
            rows = self._spread(held)
            data = DeviceDataset.of(self.samples.subset(rows), device())
            candidates = {
                (name, 1.0): self.make(name, remaining) for name in TRAINED if not tried or (name, 1.0) in tried
            }
            if self.fit.as_is:
                candidates["as_is", 0.0] = self.as_is(remaining)
                for share in BLENDS:
                    candidates["interpolated", share] = self.blend(candidates["full", 1.0], share)
                # judged as it would be used: with the share that so few groups as a fold leaves are worth
                candidates["interpolated", prior] = self.blend(candidates["full", 1.0], self.prior(len(remaining))[1])
            for key, model in candidates.items():
                outputs = outputs_of(model, data, self.tasks)
                tried.setdefault(key, Tried()).add(rows, outputs, self._losses(outputs, rows))
            if self.fit.as_is:
                least = HOPELESS * float(tried["as_is", 0.0].losses.mean())
                tried = {
                    key: result for key, result in tried.items() if key[0] not in LATE or result.losses.mean() <= least
                }
        return tried

    def _spread(self, held: Groups) -> NDArray[np.int64]:
        """At most ROWS samples of each held-out group, evenly over its time."""
        rows = [np.flatnonzero(self.groups == group) for group in held.tolist()]
        return np.concatenate(
            [
                members[np.unique(np.linspace(0, len(members) - 1, min(ROWS, len(members))).round().astype(int))]
                for members in rows
            ]
        )

    def _losses(self, outputs: dict[str, Tensor], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The site's training loss, one figure a group: what is compared is the plant's whole wish, not one task of it."""
        labels = {name: torch.from_numpy(column[rows]) for name, column in self.samples.labels.items()}
        losses = []
        for group in np.unique(self.groups[rows]).tolist():
            members = torch.from_numpy(np.flatnonzero(self.groups[rows] == group))
            loss = total_loss(
                {name: output[members] for name, output in outputs.items()},
                {name: column[members] for name, column in labels.items()},
                self.tasks,
            )
            losses.append(float(loss))
        return np.array(losses)


def groups_of(samples: WindowSet, *, in_time: bool) -> Groups:
    """(n,) which group each sample belongs to; `in_time`: each group is cut into stretches that stand for groups."""
    groups = samples.groups.astype(np.int64)
    if not in_time:
        return groups
    _, start, size = np.unique(groups, return_index=True, return_counts=True)
    position = np.arange(len(groups)) - np.repeat(start, size)  # samples are sorted by group, then order
    return groups * BLOCKS + position * BLOCKS // np.repeat(size, size)


def adapt(
    folder: Path, trunk: Path, *, state: Path | None = None, labelled: int | None = None, draw: int = 0, unsigned: bool = False,
) -> Adapted:  # fmt: skip
    """The model that the site in `folder` should use, given the release at `trunk` and the labels it has.

    Args:
        state: where the site's identity and split.json lie, if it has them; nothing is written there.
        labelled: use the labels of this many groups only (drawn by `draw`), as if the others had none.
        unsigned: at a site of a federation, take a release too that its server did not sign.

    Raises:
        TrustError: the site is of a federation, whose server did not sign this release. TamperError: it was altered.
        StorageError: the release cannot be read. ConfigError, DataError: the site cannot. ContractError: the two do not
            fit together. TrustError: `state` is sealed and cannot be opened.
    """
    state = state if state is not None else folder / ".trunkline"
    authority = Identity.of(state).read_authority()
    release = open_release(trunk, authority)
    release.verdict.demand(authority, unsigned)
    data = open_newcomer(folder, state, release.card.scales, open_seal(state))
    adapted = adapt_data(data, release.arrays, release.card, labelled=labelled, draw=draw)
    return replace(adapted, verdict=release.verdict)


def adapt_data(data: SiteData, arrays: Arrays, card: Card, *, labelled: int | None = None, draw: int = 0) -> Adapted:
    """As `adapt`, of what was read already."""
    workshop = CandidateBuilder(data, arrays, card, labelled=labelled, draw=draw)
    choice = workshop.choose()
    model = workshop.build(choice.name, choice.share, workshop.labelled)
    return Adapted(data, card, workshop.fit, choice, model, workshop)


__all__: Sequence[str] = ("Adapted", "CandidateBuilder", "Choice", "Fit", "adapt", "adapt_data")
