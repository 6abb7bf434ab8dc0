"""Pooled training: one model on the rows of all sites, as the upper bound that federation is compared with."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trunkline.client.model_selection.evaluation import Decision, decide_site, score_site
from trunkline.client.round_models import local_plan
from trunkline.client.site import Site, open_site
from trunkline.client.training.device_dataset import DeviceDataset
from trunkline.client.training.loop import steps_of, train_site
from trunkline.config.run import RunConfig
from trunkline.errors import ConfigError
from trunkline.models.tasks import make_task
from trunkline.models.tasks.task import Task
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import seed_of
from trunkline.protocol.messages import ScoreRequest, TaskRow
from trunkline.runtime.events import OnEvent, RoundEnded, RunStarted
from trunkline.server.reporting.records import RoundRecord
from trunkline.server.reporting.report import build_report


def run_central(folders: Sequence[Path], states: Sequence[Path], run: RunConfig, on_event: OnEvent) -> dict[str, Any]:
    """Train one model on the concatenated training windows, each scaled by its own site, and score it at every site.

    It takes as many steps in all as the sites of a federation take together.

    Raises:
        ConfigError: the sites differ in sensors or tasks, so their rows cannot be pooled.
    """
    torch.set_num_threads(1)
    started = time.monotonic()
    sites = [open_site({"site": folder, "state": state}) for folder, state in zip(folders, states, strict=True)]
    _same_inputs(sites)
    tasks = _pooled_tasks(sites)
    pooled = [replace(site, data=replace(site.data, tasks=tasks), _resident={}) for site in sites]
    request = ScoreRequest(
        run=run.name,
        seed=run.seed,
        round=run.total_rounds + 1,
        rounds=run.rounds,
        trunk=run.trunk,
        plan=run.training,
        selection=run.selection,
        lend=(),  # pooled rows are one site's, and its heads may start from its labels
    )
    size = sum(array.size for array in pooled[0].model(request).share(("trunk", "stem", "heads")).values())
    names = [site.name for site in sites]
    on_event(RunStarted(run.name, "central", run.total_rounds, tuple(names), size, resumed_at=None))
    records: list[RoundRecord] = []
    scoring = request.model_copy(update={"plan": run.training.model_copy(update={"finetune_steps": 0})})
    settled: list[dict[str, Decision] | None] = [None] * len(sites)
    for passed in (0, run.rounds)[: 2 if run.refit else 1]:
        now = scoring.model_copy(update={"passed": passed})
        models = _one_pass(pooled, sites, run, now, records, on_event)
        if run.refit and not passed:
            settled = [
                decide_site(site, candidates, now, tasks={"federated": tasks})
                for site, candidates in zip(sites, models, strict=True)
            ]
    rows: list[tuple[str, TaskRow]] = []
    for site, candidates, decided in zip(sites, models, settled, strict=True):
        # the local baseline predicts with its own site's label scale, so that each model is scored as it was trained
        site_rows = score_site(site, candidates, now, tasks={"federated": tasks}, settled=decided)
        rows += [(site.name, row) for row in site_rows]
    return build_report(run=run, rows=rows, rounds=records, trunk_parameters=size, seconds=time.monotonic() - started)


def _one_pass(
    pooled: Sequence[Site], sites: Sequence[Site], run: RunConfig, request: ScoreRequest, records: list[RoundRecord],
    on_event: OnEvent,
) -> list[dict[str, TrunkModel]]:  # fmt: skip
    """The models of each site after `run.rounds` rounds from the start on the rows of `request`: the pooled one, and its local baseline."""
    names = [site.name for site in sites]
    model = pooled[0].model(request)
    for site in sites:
        site.apply_conditions(request)
    parts = [site.resident(site.rows(request)) for site in sites]
    data, tasks = DeviceDataset.joined(parts), pooled[0].data.tasks
    plan = local_plan(run.training)
    plan = plan.model_copy(
        update={"epochs": None, "steps": steps_of(plan, len(data)) * (1 if plan.epochs else len(sites))}
    )
    baselines = [site.model(request) if run.report.baseline else None for site in sites]
    # what balancing remembers: of each site's local baseline, and of the pooled model under the empty name
    balances: dict[str, dict[str, Any]] = {}
    for done in range(run.rounds):
        began, round = time.monotonic(), request.passed + done + 1
        trained = train_site(
            model, data, tasks, plan, seed=seed_of(run.seed, "central", round), done=done, rounds=run.rounds,
            balance=balances.get(""),
        )  # fmt: skip
        balances[""] = trained.balance
        for site, part, baseline in zip(sites, parts, baselines, strict=True):
            if baseline is not None:
                balances[site.name] = train_site(
                    baseline, part, site.data.tasks, local_plan(run.training), seed=seed_of(run.seed, site.name, round), done=done,
                    rounds=run.rounds, balance=balances.get(site.name),
                ).balance  # fmt: skip
        seconds = time.monotonic() - began
        records.append(
            RoundRecord(
                round=round, sites=names, refused=[], seconds=seconds, bytes_up=0, bytes_down=0, train_loss=trained.loss,
            )
        )  # fmt: skip
        on_event(RoundEnded(round, run.total_rounds, sites=len(sites), seconds=seconds, train_loss=trained.loss))
    return [{"federated": model} | ({"local": baseline} if baseline is not None else {}) for baseline in baselines]


def _same_inputs(sites: Sequence[Site]) -> None:
    first = sites[0]
    for site in sites[1:]:
        same = (
            len(site.data.channels),
            site.data.categories,
            site.config.data.window,
            {name: task.kind for name, task in site.data.tasks.items()},
        )
        if same != (
            len(first.data.channels),
            first.data.categories,
            first.config.data.window,
            {name: task.kind for name, task in first.data.tasks.items()},
        ):
            raise ConfigError(
                f"strategy 'central' pools rows, so all sites need the same sensors, window and tasks; {site.name} differs from {first.name}. "
                "Use 'fedper' or 'fedrep' for sites that differ."
            )


def _pooled_tasks(sites: Sequence[Site]) -> dict[str, Task]:
    tasks = {}
    for name, task in sites[0].data.tasks.items():
        tasks[name] = make_task(name, task.config)
        tasks[name].load_state(
            sites[0].data.tasks[name].state()
        )  # the classes; fit then replaces what is learnt from labels
        labels = np.concatenate([site.data.train.labels[name] for site in sites])
        tasks[name].fit(labels)
        if tasks[name].combines_inputs:
            newest = [site.data.train.values[site.data.train.ends] for site in sites]
            tasks[name].fit_inputs(np.concatenate(newest), labels)
    return tasks
