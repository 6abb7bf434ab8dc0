"""How good the models are on rows nobody trained on, with an interval over what belongs together."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from torch import Tensor

from trunkline.client.model_selection.candidates import versions
from trunkline.client.model_selection.gate import Tried, choose
from trunkline.client.site import RowSubset, Site
from trunkline.client.state.vault import predictions_place
from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.client.training.loop import outputs_of
from trunkline.client.training.single_model import total_loss
from trunkline.models.labels import known
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.messages import AgreedRequest, TaskRow
from trunkline.runtime.storage import write_private

RESAMPLES = 1000  # of the bootstrap; the ends of a 95 % interval then rest on 25 resamples each
FEWEST = 200  # of a test set so large that a site's evaluation would take minutes; its interval is the surer anyway
WORK = 100_000_000  # numbers a bootstrap may look at, about a second

Tasks = Mapping[str, Task]


@dataclass(frozen=True)
class Curve:
    """A model's validation loss and each task's primary metric, for one point of the learning curves."""

    loss: float
    metrics: dict[str, float]


def curve(model: TrunkModel, data: DeviceDataset, tasks: dict[str, Task]) -> Curve:
    outputs = outputs_of(model, data, tasks)
    labels = {name: column.cpu() for name, column in data.labels.items()}
    metrics: dict[str, float] = {}
    for name, task in tasks.items():
        value = task.score(task.predict(outputs[name]), labels[name].numpy())
        if value is not None and np.isfinite(value):
            metrics[name] = value
    return Curve(float(total_loss(outputs, labels, tasks)), metrics)


@dataclass(frozen=True)
class Scored:
    """One model on one task: what it predicts on the test rows.

    `task` is a copy of the site's, calibrated for this model: two models decide at two thresholds.
    """

    task: Task
    prediction: NDArray[Any]


def paired_bootstrap(
    first: Scored, second: Scored, labels: NDArray[np.float32], groups: NDArray[np.int32], seed: int
) -> tuple[float, float] | None:
    """95 % interval of (one minus other) of the primary metric, resampling whole test groups (Efron 1979).

    Rows of one engine or coil are not independent, so groups are drawn, not rows; both models are scored on the same draw.
    A very large test set is drawn less often, see FEWEST.

    Returns:
        None below two labelled groups: there is nothing to resample.
    """
    judged = np.flatnonzero(first.task.scored_mask(labels))
    codes, member = np.unique(groups[judged], return_inverse=True)
    if len(codes) < 2:
        return None
    by_group = np.split(judged[np.argsort(member, kind="stable")], np.cumsum(np.bincount(member))[:-1])
    draw = np.random.default_rng(seed)
    numbers = 2 * len(judged) * first.prediction[:1].size
    resamples = min(RESAMPLES, max(FEWEST, WORK // numbers))
    differences = []
    for _ in range(resamples):
        rows = np.concatenate([by_group[index] for index in draw.integers(0, len(codes), len(codes))])
        score = first.task.score(first.prediction[rows], labels[rows])
        other_score = second.task.score(second.prediction[rows], labels[rows])
        if score is not None and other_score is not None:  # a draw without a single failure has no F1
            differences.append(score - other_score)
    if len(differences) < resamples // 2:
        return None
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


@dataclass
class _Judge:
    """One model before the site's validation and test rows, task by task; each forward pass is made once."""

    site: Site
    model: TrunkModel
    tasks: dict[str, Task]
    rows: RowSubset  # what it was trained on
    _settled: dict[str, Task] = field(default_factory=dict)
    _outputs: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def settled(self, name: str) -> Task:
        """A copy of the task, settled for this model; `outputs` of training rows are looked at by kinds that want them only."""
        if not self._settled:
            self._settled = {task_name: copy.copy(task) for task_name, task in self.tasks.items()}
            wanting = {task_name: task for task_name, task in self._settled.items() if task.fits_outputs}
            if wanting:
                train = self.site.resident(self.rows)
                for task_name, output in outputs_of(self.model, train, wanting).items():
                    wanting[task_name].fit_outputs(output, train.labels[task_name].cpu().numpy())
        return self._settled[name]

    def outputs(self, part: str, name: str) -> Tensor:
        if part not in self._outputs:
            resident = self.site.resident("test" if part == "test" else "validation")
            self._outputs[part] = outputs_of(self.model, resident, self.tasks)
        return self._outputs[part][name]


@dataclass(frozen=True)
class _Single:
    """A single model's predictions."""

    judge: _Judge
    name: str

    @property
    def task(self) -> Task:
        return self.judge.settled(self.name)

    def predict(self, task: Task, part: str) -> NDArray[np.float32]:
        return task.predict(self.judge.outputs(part, self.name))


@dataclass(frozen=True)
class _Ensemble:
    """An ensemble's predictions: the mean of what two models say, in values, probabilities, quantiles or scores."""

    first: _Single
    second: _Single

    @property
    def task(self) -> Task:
        return self.first.task

    def predict(self, task: Task, part: str) -> NDArray[np.float32]:
        mean: NDArray[np.float32] = (
            self.first.predict(self.first.task, part) + self.second.predict(self.second.task, part)
        ) / 2.0
        return mean


Predictor = _Single | _Ensemble


@dataclass(frozen=True)
class Decision:
    """What a site has settled for one task by its validation rows.

    Args:
        chosen: the candidate to use.
        versions: candidate -> which of its versions it stands for.
        decisions: candidate -> where it decides (`Task.decisions`).
    """

    chosen: str
    versions: dict[str, int]
    decisions: dict[str, dict[str, Any]]


class _Lineup:
    """The models a site's gate chooses from, each in one or several versions.

    They are those given, fine-tuned and fused versions of the federated one where the plan has steps for them
    (`candidates.versions`), and the ensemble of federated and local.
    """

    def __init__(
        self,
        site: Site,
        models: Mapping[str, TrunkModel],
        request: AgreedRequest,
        tasks: Mapping[str, dict[str, Task]] | None,
    ) -> None:
        own_tasks, rows = tasks or {}, site.rows(request)
        self.judges = {
            name: [_Judge(site, model, own_tasks.get(name, site.data.tasks), rows)] for name, model in models.items()
        }
        for candidate, models_by_version in versions(site, models["federated"], request).items():
            self.judges[candidate] = [
                _Judge(site, model, site.data.tasks, rows) for model in models_by_version.values()
            ]
        self.together = "local" in models and not own_tasks

    def of(self, name: str) -> dict[str, list[Predictor]]:
        """candidate -> its versions, for one task."""
        lineup: dict[str, list[Predictor]] = {
            candidate: [_Single(judge, name) for judge in judges] for candidate, judges in self.judges.items()
        }
        if self.together:
            first, second = (_Single(self.judges[candidate][0], name) for candidate in ("federated", "local"))
            lineup["ensemble"] = [_Ensemble(first, second)]
        return lineup


def decide_site(
    site: Site,
    models: Mapping[str, TrunkModel],
    request: AgreedRequest,
    *,
    tasks: Mapping[str, dict[str, Task]] | None = None,
) -> dict[str, Decision]:
    """What the site settles by its validation rows, task by task; no test row is looked at. Arguments as in `score_site`."""
    return _decide(site, _Lineup(site, models, request, tasks), request.selection.default)


def _decide(site: Site, lineup: _Lineup, hold: str) -> dict[str, Decision]:
    data, settled = site.data.validation, {}
    for name in site.data.tasks:
        tried: dict[str, Tried] = {}
        candidates = lineup.of(name)
        held = hold if hold in candidates else "federated"  # neither local nor ensemble where nobody trained alone
        picked: dict[str, int] = {}
        for candidate, predictors in candidates.items():
            results = [_try(site, name, predictor) for predictor in predictors]
            picked[candidate] = _best(results)
            tried[candidate] = replace(
                results[picked[candidate]], tries=len(results), half=candidate == "ensemble" and held != "ensemble"
            )
        chosen = choose(tried, data.labels[name], data.groups, held)
        if trouble := tried[chosen].task.trouble:
            site.tell(f"task {name}, model {chosen}: {trouble}")
        settled[name] = Decision(
            chosen, picked, {candidate: predictor.task.decisions() for candidate, predictor in tried.items()}
        )
    return settled


def score_site(
    site: Site, models: Mapping[str, TrunkModel], request: AgreedRequest, *,
    tasks: Mapping[str, dict[str, Task]] | None = None, settled: Mapping[str, Decision] | None = None,
) -> tuple[TaskRow, ...]:  # fmt: skip
    """The site's rows of the worth-it report; its row-level predictions stay in its state folder.

    Args:
        models: name -> model. "federated" is what the strategy made for this site; "local", the local baseline that trained alone,
            is absent where the run wanted no baseline. "shared", with a personal model, is the one that was averaged.
        order: of the run; its seed is the bootstrap's and its plan says whether and how to fine-tune.
        tasks: name of a model -> the tasks it was trained with, where they are not the site's own.
        settled: task -> what was decided before these models saw the validation rows; None: they never did, and decide now.
    """
    lineup = _Lineup(site, models, request, tasks)
    settled = settled or _decide(site, lineup, request.selection.default)
    rows = []
    for name in site.data.tasks:
        decision = settled[name]
        scored: dict[str, Scored] = {}
        for candidate, predictors in lineup.of(name).items():
            if candidate in decision.versions:  # else it was not there when the others were judged
                predictor = predictors[decision.versions[candidate]]
                task = copy.copy(predictor.task)
                task.take_decisions(decision.decisions[candidate])
                scored[candidate] = Scored(task, predictor.predict(task, "test"))
        rows.append(_row(site, name, scored, decision.chosen, request))
        _keep_predictions(site, request.run, name, scored, decision.chosen)
    return tuple(rows)


def _try(site: Site, name: str, predictor: Predictor) -> Tried:
    task, labels = copy.copy(predictor.task), site.data.validation.labels[name]
    prediction = predictor.predict(task, "validation")
    task.calibrate(prediction, labels)
    return Tried(task, prediction, task.score(prediction, labels))


def _best(results: list[Tried]) -> int:
    """The first with the best validation figure; the first of all where there is none."""
    better = 1.0 if results[0].task.card.better == "higher" else -1.0
    values = [-np.inf if result.score is None else better * result.score for result in results]
    return int(np.argmax(values))


def _row(site: Site, name: str, scored: dict[str, Scored], chosen: str, request: AgreedRequest) -> TaskRow:
    data, task = site.data, site.data.tasks[name]
    truth, groups = data.test.labels[name], data.test.groups
    trained = (data.train, data.validation) if site.rows(request) == "all" else (data.train,)
    shown = {candidate: result for candidate, result in scored.items() if candidate in ("local", "federated", chosen)}
    measured = {candidate: result.task.measure(result.prediction, truth) for candidate, result in shown.items()}
    primary, local = task.card.metric, scored.get("local")
    intervals = {
        candidate: paired_bootstrap(result, local, truth, groups, seed_of(request.seed, site.name, name))
        for candidate, result in shown.items()
        if local is not None and candidate != "local"
    }
    interval = intervals.get("federated")
    if chosen == "local":
        intervals["local"] = (0.0, 0.0) if interval is not None else None  # the same model: not a question of chance
    secondary = sorted({metric for result in measured.values() for metric in result} - {primary})
    candidates = {candidate: result.task.score(result.prediction, truth) for candidate, result in scored.items()}
    return TaskRow(
        **task.card.model_dump(),
        n_train=sum(int(known(part.labels[name]).sum()) for part in trained),
        n_validation=int(task.scored_mask(data.validation.labels[name]).sum()),
        n_test=int(task.scored_mask(truth).sum()),
        n_groups=len(np.unique(groups[task.scored_mask(truth)])),
        local=candidates.get("local"),
        federated=candidates["federated"],
        chosen=chosen,
        interval=interval,
        more={
            metric: {candidate: result.get(metric) for candidate, result in measured.items()} for metric in secondary
        },
        candidates=candidates,
        gated=candidates[chosen],
        gated_interval=intervals.get(chosen),
    )


def _keep_predictions(site: Site, run: str, name: str, scored: dict[str, Scored], chosen: str) -> None:
    """Row-level results for the plant's own plots. They are data: they lie beside the vault and no message has a type for them."""
    test = site.data.test
    kept = {candidate: result for candidate, result in scored.items() if candidate in ("local", "federated", chosen)}
    tensors: dict[str, NDArray[Any]] = {
        "truth": np.ascontiguousarray(test.labels[name]),
        "groups": np.ascontiguousarray(test.groups),
        "order": np.ascontiguousarray(test.order),
        **{candidate: np.ascontiguousarray(result.prediction, dtype=np.float32) for candidate, result in kept.items()},
    }
    about = {
        "chosen": chosen,
        "task": site.data.tasks[name].config.model_dump(mode="json"),
        "states": {candidate: result.task.state() for candidate, result in kept.items()},
    }
    path = predictions_place(run, name, tuple(site.config.tasks), sealed=site.seal is not None)
    write_private(site.state / path, safetensors.numpy.save(tensors, {"about": json.dumps(about)}), site.seal, path)
