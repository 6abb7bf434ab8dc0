"""Samples a second of the training loop beside a hand-tuned bare loop, and where the rest goes.

    python benchmarks/training.py [--device cpu|cuda] [--repeats 5] [--steps N] [--graph] [--json FILE]

The same network (tcn, small and base), device, data (200,000 rows that lie on it, windows of 30 rows of 14 sensors) and
arithmetic: AdamW (fused), clipped gradients, Huber loss, bf16 autocast on CUDA. The bare loop is what one would write
by hand for just this: windows are a view, one gather a batch, nothing waits for the device. Rungs between the two add
one thing of `train_site` at a time, each with its ratio to the bare loop. All take turns after a warm-up; figures are
medians, and the device has finished when the clock is read. On a CPU the clock is the one thread's own processor time,
so that what else runs there does not count. `--graph` adds the bare step as one CUDA graph: what is left when the host
costs nothing. The profile beside it counts, a step, the host's time in operators and the device's own.

Second table: 64 small sites of 32 samples, one after another with `train_site`, and all at once by torch.func.vmap over
stacked parameters, which is the reference of what batching can give. `difference` is how far the two end apart, in
lengths of what training changed; a first step of Adam is a sign, so gradients about zero may differ in it.

Building models and data does not count, and no file is read. Needs torch, numpy, pydantic, safetensors and h5py; where
polars is missing an empty stand-in takes its place, which does for annotations and nothing else. No flwr, no ray.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class _Absent(type):
    """A name of a package that is not there: good for an annotation, an error when called."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *arguments: object, **named: object) -> object:
        raise ModuleNotFoundError("polars is not installed; this benchmark reads no file")


if importlib.util.find_spec("polars") is None:
    sys.modules["polars"] = _Absent("polars", (), {})  # type: ignore[assignment]

from trunkline.client.data import WindowSet  # noqa: E402
from trunkline.client.training.device_dataset import DeviceDataset  # noqa: E402
from trunkline.client.training.loop import train_site  # noqa: E402
from trunkline.client.training.single_model import task_losses  # noqa: E402
from trunkline.config.tasks import TaskConfig  # noqa: E402
from trunkline.models.tasks.regression import Regression  # noqa: E402
from trunkline.models.trunk import TrunkModel, build_model  # noqa: E402
from trunkline.protocol.plan import LocalPlan, TrunkSpec  # noqa: E402

ROWS, CHANNELS, WINDOW, COLUMNS = 200_000, 14, 30, 64
SITES, SAMPLES = 64, 32
RUNGS = ("bare", "+ windows", "+ losses", "+ schedule", "train_site")


def data_of(
    rows: int, window: int | None, channels: int, seed: int, where: torch.device
) -> tuple[DeviceDataset, Regression]:
    """One group of `rows` rows, of which each that a whole window ends at is a sample; and the task fitted to it."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, channels)).astype(np.float32)
    labels = (values @ rng.normal(size=channels)).astype(np.float32)
    ends = np.arange((window or 1) - 1, rows, dtype=np.int64)
    task = Regression("level", TaskConfig(kind="regression", target="level"))
    task.fit(labels)
    windows = WindowSet(
        values=values, categorical=np.zeros((rows, 0), np.int64), first=np.zeros(len(ends), np.int64), ends=ends,
        window=window, labels={"level": labels[ends]}, groups=np.zeros(len(ends), np.int32),
        order=ends.astype(np.float64), group_names=("all",),
    )  # fmt: skip
    return DeviceDataset.of(windows, where), task


def on_host(data: DeviceDataset) -> DeviceDataset:
    """The same rows as they are kept where they do not fit on the device: in the host's memory, sent batch by batch."""
    rows = {name: getattr(data, name).cpu() for name in ("values", "categorical", "first", "ends")}
    return replace(data, **rows, goes=data.values.device)


def model_of(spec: TrunkSpec, window: int | None, channels: int, task: Regression, where: torch.device) -> TrunkModel:
    return build_model(spec, window=window, channels=channels, tasks={"level": task}, seed=0).to(where)


def autocast(where: torch.device) -> torch.autocast:
    return torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda")


def bare(model: TrunkModel, data: DeviceDataset, task: Regression, plan: LocalPlan, rung: int) -> None:
    """`plan.steps` steps; `rung` counts what of train_site is in them, as RUNGS says."""
    where = data.values.device
    view = data.values.unfold(0, data.window or 1, 1)  # (samples, channels, window), nothing copied
    truth = (data.labels["level"] - task.mean) / task.std
    codes = data.categorical[: plan.batch_size]
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True)
    order = torch.randperm(len(data), device=where)
    total = torch.zeros((), device=where)
    model.train()
    for step in range(plan.steps):
        place = order[step * plan.batch_size : (step + 1) * plan.batch_size]
        if rung >= 3:
            for group in optimiser.param_groups:
                group["lr"] = plan.learning_rate * 0.5 * (1.0 + np.cos(np.pi * step / plan.steps))
        x = data.batch(place)[0] if rung >= 1 else view[place]
        with autocast(where):
            out = model(x, codes)
        if rung >= 2:
            labels = {name: column[place] for name, column in data.labels.items()}
            loss = torch.stack(task_losses(out, labels, {"level": task})).sum()
        else:
            loss = F.huber_loss(out["level"][:, 0].float(), truth[place])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, plan.clip_norm, foreach=True)
        optimiser.step()
        total += loss.detach()
    float(total)


def graphed(model: TrunkModel, data: DeviceDataset, task: Regression, plan: LocalPlan) -> Callable[[], None]:
    """The bare steps, each one replay of a CUDA graph."""
    where = data.values.device
    view = data.values.unfold(0, data.window or 1, 1)
    truth = (data.labels["level"] - task.mean) / task.std
    codes = data.categorical[: plan.batch_size]
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=plan.learning_rate, fused=True, capturable=True)
    place = torch.zeros(plan.batch_size, dtype=torch.int64, device=where)
    model.train()

    def step() -> None:
        optimiser.zero_grad(set_to_none=False)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            out = model(view[place], codes)
        F.huber_loss(out["level"][:, 0].float(), truth[place]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, plan.clip_norm, foreach=True)
        optimiser.step()

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def run() -> None:
        order = torch.randperm(len(data), device=where)
        for number in range(plan.steps):
            place.copy_(order[number * plan.batch_size : (number + 1) * plan.batch_size])
            graph.replay()

    return run


def timed(run: Callable[[], Any], where: torch.device) -> float:
    if where.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(runs: dict[str, Callable[[], Any]], repeats: int, where: torch.device) -> dict[str, list[float]]:
    """Seconds of every run, A B C A B C ..., after one of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            took = timed(run, where)
            if repeat:
                seconds[name].append(took)
    return seconds


def profile(run: Callable[[], Any], steps: int, where: torch.device) -> dict[str, Any]:
    """Milliseconds a step in operators on the host, on the device, and the operators the host spends most in."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if where.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        timed(run, where)
    rows = seen.key_averages()
    host = sum(row.self_cpu_time_total for row in rows) / steps / 1e3
    device = sum(row.self_device_time_total for row in rows) / steps / 1e3 if where.type == "cuda" else 0.0
    most = sorted(rows, key=lambda row: -row.self_cpu_time_total)[:6]
    return {
        "host_ms": host,
        "device_ms": device,
        "operators": sum(row.count for row in rows) / steps,
        "most": {row.key: row.self_cpu_time_total / steps / 1e3 for row in most},
    }


def one_site(where: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The first table."""
    cuda = where.type == "cuda"
    result = []
    data, task = data_of(ROWS, WINDOW, CHANNELS, 0, where)
    for size, batch in [("small", 128), ("base", 128), *([("small", 512), ("base", 512)] if cuda else [])]:
        spec = TrunkSpec(backbone="tcn", size=size, dropout=0.0)  # type: ignore[arg-type]
        steps = options.steps or (200 if cuda else 10)
        plan = LocalPlan(steps=steps, batch_size=batch)
        models = {name: model_of(spec, WINDOW, CHANNELS, task, where) for name in (*RUNGS, "graph")}
        runs: dict[str, Callable[[], Any]] = {
            name: partial(bare, models[name], data, task, plan, rung) for rung, name in enumerate(RUNGS[:-1])
        }
        tasks = {"level": task}
        runs["train_site"] = partial(train_site, models["train_site"], data, tasks, plan, seed=0, done=0, rounds=1)
        if cuda:
            models["rows on the host"] = model_of(spec, WINDOW, CHANNELS, task, where)
            runs["rows on the host"] = partial(
                train_site, models["rows on the host"], on_host(data), tasks, plan, seed=0, done=0, rounds=1
            )
        if options.graph and cuda:
            runs["graph"] = graphed(models["graph"], data, task, plan)
        seconds = in_turn(runs, options.repeats, where)
        middle = {name: statistics.median(some) for name, some in seconds.items()}
        print(f"tcn {size}, batch {batch}, {steps} steps{'':6}{'samples/s':>12}{'ms a step':>11}{'to bare':>9}")
        for name, took in middle.items():
            print(f"  {name:31}{steps * batch / took:12.0f}{took / steps * 1e3:11.3f}{middle['bare'] / took:9.3f}")
        apart = (
            max(
                float((models["train_site"].state_dict()[name] - tensor).abs().max())
                for name, tensor in models["rows on the host"].state_dict().items()
            )
            if cuda
            else 0.0
        )
        if cuda:
            print(f"  rows on the host end {apart:.2e} away from rows on the device, after as many steps")
        seen = {name: profile(runs[name], steps, where) for name in ("bare", "train_site")}
        for name, one in seen.items():
            most = ", ".join(f"{key} {value:.2f}" for key, value in one["most"].items())
            print(
                f"  {name}, ms a step under the profiler: host {one['host_ms']:.2f}, device {one['device_ms']:.2f}, "
                f"{one['operators']:.0f} operators; most: {most}"
            )
        result.append(
            {
                "size": size, "batch": batch, "steps": steps,
                "samples_s": {name: steps * batch / took for name, took in middle.items()},
                "train_site_to_bare": middle["bare"] / middle["train_site"], "profile": seen,
            }
        )  # fmt: skip
        sys.stdout.flush()
    return result


def stacked(models: list[TrunkModel], x: Tensor, y: Tensor, plan: LocalPlan) -> Callable[[], None]:
    """`plan.steps` steps of all sites at once from where the models are; afterwards the models hold the result.

    Args:
        x: (sites, samples, ...) inputs; y: (sites, samples) labels as they are learnt.
    """
    where = x.device
    each = [dict(one.named_parameters()) for one in models]
    begin = {name: torch.stack([one[name].detach() for one in each]) for name in each[0]}
    codes = torch.zeros((x.shape[1], 0), dtype=torch.int64, device=where)
    first = models[0]
    first.train()

    def loss_of(parameters: dict[str, Tensor], inputs: Tensor, truth: Tensor) -> Tensor:
        out = torch.func.functional_call(first, parameters, (inputs, codes))
        return F.huber_loss(out["level"][:, 0].float(), truth)

    def run() -> None:
        held = {name: tensor.clone().requires_grad_(True) for name, tensor in begin.items()}
        moving = list(held.values())
        optimiser = torch.optim.AdamW(moving, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True)
        for _ in range(plan.steps):
            with autocast(where):
                losses = torch.func.vmap(loss_of)(held, x, y)  # (sites,)
            optimiser.zero_grad(set_to_none=True)
            losses.sum().backward()
            with torch.no_grad():
                norms = torch.stack([one.grad.flatten(1).norm(dim=1) for one in moving]).norm(dim=0)  # (sites,)
                scale = (plan.clip_norm / (norms + 1e-6)).clamp(max=1.0)
                for one in moving:
                    one.grad.mul_(scale.view(-1, *[1] * (one.ndim - 1)))
            optimiser.step()
        with torch.no_grad():
            for place, model in enumerate(models):
                for name, parameter in model.named_parameters():
                    parameter.copy_(held[name][place])

    return run


def small_sites(where: torch.device, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The second table."""
    result = []
    print(
        f"{SITES} sites of {SAMPLES} samples{'':6}{'one by one, ms':>16}{'at once, ms':>13}{'ratio':>8}{'difference':>12}"
    )
    for label, spec, window, channels in (
        ("mlp width 64", TrunkSpec(backbone="mlp", width=64, dropout=0.0), None, COLUMNS),
        ("tcn width 16", TrunkSpec(backbone="tcn", width=16, dropout=0.0), WINDOW, CHANNELS),
        ("tcn width 64", TrunkSpec(backbone="tcn", width=64, dropout=0.0), WINDOW, CHANNELS),
    ):
        plan = LocalPlan(steps=1, batch_size=SAMPLES, schedule="constant")
        sites = [data_of(SAMPLES + (window or 1) - 1, window, channels, place, where) for place in range(SITES)]
        models = [model_of(spec, window, channels, task, where) for _, task in sites]
        begin = [{name: one.clone() for name, one in model.state_dict().items()} for model in models]
        everything = torch.arange(SAMPLES, device=where)
        x = torch.stack([data.batch(everything)[0] for data, _ in sites])
        y = torch.stack([(data.labels["level"] - task.mean) / task.std for data, task in sites])

        def one_by_one(sites=sites, models=models, begin=begin, plan=plan) -> None:  # type: ignore[no-untyped-def]
            for (data, task), model, was in zip(sites, models, begin, strict=True):
                model.load_state_dict(was)
                train_site(model, data, {"level": task}, plan, seed=0, done=0, rounds=1)

        at_once = stacked(models, x, y, plan)
        one_by_one()
        alone = [torch.cat([one.detach().reshape(-1) for one in model.parameters()]) for model in models]
        at_once()
        together = [torch.cat([one.detach().reshape(-1) for one in model.parameters()]) for model in models]
        start = torch.cat([one.detach().reshape(-1) for one in begin[0].values()])
        apart = max(float((one - two).norm() / (one - start).norm()) for one, two in zip(alone, together, strict=True))
        seconds = in_turn({"alone": one_by_one, "together": at_once}, options.repeats, where)
        alone_s, together_s = (statistics.median(seconds[name]) for name in ("alone", "together"))
        print(f"  {label:26}{alone_s * 1e3:16.1f}{together_s * 1e3:13.1f}{alone_s / together_s:8.2f}{apart:12.1e}")
        result.append(
            {
                "network": label, "one_by_one_ms": alone_s * 1e3, "at_once_ms": together_s * 1e3,
                "ratio": alone_s / together_s, "difference": apart,
            }
        )  # fmt: skip
        sys.stdout.flush()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, help="a run; default 200 on CUDA, 10 on a CPU")
    parser.add_argument("--graph", action="store_true", help="CUDA: also the bare step as a graph")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    where = torch.device(options.device)
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if where.type == "cuda" else "CPU, one thread"
    print(f"{name}, torch {torch.__version__}")
    if where.type == "cpu":
        print("Needs a GPU: batches of 512, bf16 autocast, the CUDA graph, and the device's share of a step.")
    result = {
        "device": name, "torch": torch.__version__, "one_site": one_site(where, options),
        "small_sites": small_sites(where, options),
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
