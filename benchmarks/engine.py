"""Site-rounds a second of the simulation, beside bare torch loops and Flower's own engine, on hundreds of small sites.

    python benchmarks/engine.py [--quick] [--repeats 3] [--rounds 6] [--workers 2] [--cases NAME ...] [--json FILE]
                                [--who NAME ...] [--scale 1.0] [--pfl FOLDER]

Training cases (`mlp_500x32`, `cnn16_500x32`, `cnn64_500x32`): 500 sites of 32 training samples, all of them every
round, one task, one step of one batch a round, everything lent, no local twin. Compared, each in processes of its own:

    bare_1      one process, one torch thread: copy the shared model in, one step, add the change to a float64 sum
    bare_n      the same over `--workers` processes at once; sites over the seconds of the slowest
    flower      Flower's run_simulation and its FedAvg, a ClientApp that takes the bare step, one actor a worker
    sequential  `trunkline simulate` with one site at a time (TRUNKLINE_BATCH=0)
    auto        `trunkline simulate` as a user gets it
    pfl         pfl-research, one process a worker, where `--pfl` names a folder with it (pip install --no-deps --target
                FOLDER pfl multiprocess dill prv-accountant 'dp-accounting<0.6' absl-py attrs dm-tree mpmath)

`noop_100` and `noop_1000` train nothing: a ClientApp answers with 100,000 float32, and the centre averages. There
`bare_1` and `bare_n` both are a loopback call in one process, and Trunkline's two are its grid on Ray.

Contestants take turns (A B C A B C ...), `--repeats` times; figures are medians over the repeats of the median round
without the first, so starting Ray, reading sites and the report do not count. Data are read before a bare loop and by
Flower's actors in round 1. What Trunkline does beside the step does count: validation, vault, checkpoint, messages.
`MiB` is the peak of the memory of all processes of a contestant, shared pages counted once (PSS), looked at once a
second. `apart` is how far a contestant's shared model ended from that of `bare_1`, in lengths of the way it went: all
contestants do the same work, and where a first step of Adam is a sign, rounding can turn it.

`--cases big` are two more: `sites_10000` (10,000 sites, a tenth of them a round) and `stream_11m` (1,000 replies of
11 million float32 through the grid; the driver's peak of private memory in copies of the trunk; `--scale` for less).
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
MARK = "TRUNKLINE_BENCHMARK"  # an environment variable that tells the processes of one contestant
CONTESTANTS = ("bare_1", "bare_n", "flower", "sequential", "auto", "pfl")
TRUNKS: dict[str, dict[str, Any]] = {
    "mlp_500x32": {"backbone": "mlp", "size": "small", "width": 32, "dropout": 0.0},  # 14,000 parameters, as 64-128-64
    "cnn16_500x32": {"backbone": "tcn", "size": "small", "width": 16, "dropout": 0.0},
    "cnn64_500x32": {"backbone": "tcn", "size": "small", "width": 64, "dropout": 0.0},
}
NOOPS = {"noop_100": 100, "noop_1000": 1000}
BIG = ("sites_10000", "stream_11m")
SITES, ANSWER, BIG_ANSWER, REPLIES = 500, 100_000, 11_000_000, 1000
COLUMNS, CHANNELS, WINDOW = 64, 14, 30
UNITS, EACH = 40, 4  # groups a site, and how many of them validate and test: 32 are left to train
LIMIT_S = 1800.0  # longest one contestant may take


# --- sites ------------------------------------------------------------------------------------------------------------


def write_sites(root: Path, sites: int, windows: bool) -> list[Path]:
    """Site folders of `UNITS` units each, one sample a unit; numbers without a meaning, so written quickly."""
    rng = np.random.default_rng(0)
    rows = WINDOW if windows else 1
    names = [f"c{place:02d}" for place in range(CHANNELS if windows else COLUMNS)]
    law = rng.normal(size=len(names))
    about = {
        "data": {
            "files": "rows.npz", "group": "unit", "channels": names,
            **({"window": WINDOW, "stride": WINDOW, "order": "step"} if windows else {}),
        },
        "data.split": {"validation": EACH / UNITS, "test": EACH / UNITS},
        "tasks.level": {"kind": "regression", "target": "level"},
    }  # fmt: skip
    tables = "".join(
        f"\n[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for table, keys in about.items()
    )
    folders = []
    for place in range(sites):
        folder = root / f"site-{place:05d}"
        folder.mkdir(parents=True)
        values = rng.normal(size=(UNITS * rows, len(names))).astype(np.float32)
        columns: dict[str, Any] = {name: values[:, number] for number, name in enumerate(names)}
        columns["unit"] = np.repeat(np.arange(UNITS), rows)
        columns["step"] = np.tile(np.arange(rows), UNITS)
        columns["level"] = (values @ law + 0.1 * rng.normal(size=len(values))).astype(np.float32)
        np.savez(folder / "rows.npz", **columns)
        (folder / "site.toml").write_text(f'name = "{folder.name}"\n{tables}')
        folders.append(folder)
    return folders


def table_of(case: str, rounds: int) -> dict[str, Any]:
    """The run.toml of a training case."""
    return {
        "name": "bench",
        "rounds": rounds,
        "seed": 7,
        "lend": ["trunk", "stem", "heads"],
        "trunk": TRUNKS[case],
        "training": {"epochs": 1.0, "batch_size": UNITS - 2 * EACH, "schedule": "constant"},
        "strategy": {"name": "fedavg"},
        "report": {"baseline": False},
        "cohort": {"min_sites": 1},
    }


def model_and_rows(case: str, root: Path, rounds: int) -> Path:
    """One file for the bare loops and the others' clients: the model, and every site's samples as they are trained on."""
    import torch

    from trunkline.client.site import open_site
    from trunkline.config.run import parse_run
    from trunkline.protocol.messages import TrainRequest

    run = parse_run(table_of(case, rounds), "benchmark")
    request = TrainRequest(
        run="bench", seed=run.seed, round=1, rounds=rounds, trunk=run.trunk, plan=run.training, lend=run.lend
    )
    inputs, labels = [], []
    model = None
    for folder in sorted((root / "sites").iterdir()):
        site = open_site({"site": str(folder), "state": str(root / "read" / folder.name)})
        model = model or site.model(request)
        data = site.resident("train")
        x, _ = data.batch(torch.arange(len(data)))
        task = site.data.tasks["level"]
        inputs.append(x)
        # as Regression learns them
        labels.append((data.labels["level"] - task.mean) / task.std)  # type: ignore[attr-defined]
    file = root / "bare.pt"
    torch.save({"model": model, "x": torch.stack(inputs), "y": torch.stack(labels), "plan": run.training}, file)
    return file


# --- the bare step, also what Flower's and pfl's clients do -----------------------------------------------------------


class Bare:
    """The model and the data of `model_and_rows`, and one site's round: nothing but torch."""

    def __init__(self, file: Path) -> None:
        import torch

        torch.set_num_threads(1)
        self.torch = torch
        held = torch.load(file, weights_only=False)
        self.model, self.x, self.y, self.plan = held["model"], held["x"], held["y"], held["plan"]
        self.parameters = list(self.model.parameters())
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.shared = [parameter.detach().clone() for parameter in self.parameters]
        self.codes = torch.zeros((self.x.shape[1], 0), dtype=torch.int64)
        self.model.train()

    def train(self, site: int) -> None:
        """One step of `site` from wherever the model is."""
        torch = self.torch
        optimiser = torch.optim.AdamW(
            self.parameters, lr=self.plan.learning_rate, weight_decay=self.plan.weight_decay, fused=True
        )
        miss = self.y[site] - self.model(self.x[site], self.codes)["level"][:, 0]
        optimiser.zero_grad(set_to_none=True)
        torch.nn.functional.huber_loss(miss, torch.zeros_like(miss)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.plan.clip_norm, foreach=True)
        optimiser.step()

    def round(self, sites: range) -> None:
        """Every site once from the shared model, and the shared model moved by the mean of their changes."""
        torch = self.torch
        with torch.no_grad():
            flat = torch.cat([one.reshape(-1) for one in self.shared])
            total = torch.zeros(len(flat), dtype=torch.float64)
        for site in sites:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.shared)
            self.train(site)
            with torch.no_grad():
                total += torch.cat([one.reshape(-1) for one in self.parameters]) - flat
        with torch.no_grad():
            moved = (total / len(sites)).to(torch.float32)
            for one, part in zip(self.shared, moved.split([one.numel() for one in self.shared]), strict=True):
                one += part.view_as(one)

    def timed(self, sites: range, rounds: int, wait: Callable[[], Any] = lambda: None) -> list[float]:
        seconds = []
        for _ in range(rounds):
            wait()
            start = time.perf_counter()
            self.round(sites)
            seconds.append(time.perf_counter() - start)
        return seconds


def apart_of(ended: Mapping[str, np.ndarray], job: dict[str, Any]) -> float | None:
    """How far a contestant's last model is from `bare_1`'s, in lengths of its way; None where it did not run."""
    file = Path(job["keep"]) / "bare.npz"
    if not file.exists():
        return None
    held = np.load(file)
    ways = [float(np.square(held[name] - held[f"start/{name}"]).sum()) for name in ended]
    misses = [float(np.square(held[name] - array).sum()) for name, array in ended.items()]
    return float((sum(misses) / sum(ways)) ** 0.5)


def _share(file: Path, sites: range, rounds: int, barrier: Any, answers: Any) -> None:
    answers.put(Bare(file).timed(sites, rounds, barrier.wait))


def bare(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds a round of the slowest of `processes`."""
    file, processes = Path(job["bare"]), job["processes"]
    if processes == 1:
        held = Bare(file)
        seconds = held.timed(range(job["sites"]), job["rounds"])
        names = [name for name, _ in held.model.named_parameters()]
        ends = {name: one.numpy() for name, one in zip(names, held.shared, strict=True)}
        starts = {f"start/{name}": one.numpy() for name, one in zip(names, held.start, strict=True)}
        np.savez(Path(job["keep"]) / "bare.npz", **ends, **starts)
        return {"seconds": seconds}
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(processes), spawn.Queue()
    shares = np.array_split(np.arange(job["sites"]), processes)
    children = [
        spawn.Process(target=_share, args=(file, range(int(one[0]), int(one[-1]) + 1), job["rounds"], barrier, answers))
        for one in shares
    ]
    for child in children:
        child.start()
    each = [answers.get(timeout=LIMIT_S) for _ in children]
    for child in children:
        child.join()
    return {"seconds": [max(one) for one in zip(*each, strict=True)]}


# --- Flower's own engine ----------------------------------------------------------------------------------------------

_held: dict[str, Any] = {}  # of an actor's process: what a careful user of Flower would keep there


def flower(job: dict[str, Any]) -> dict[str, Any]:
    """Flower's engine with the bare step in a ClientApp, or with an answer that is ready."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    file, answer, sites, rounds = job.get("bare"), job.get("answer"), job["sites"], job["rounds"]
    client, server = ClientApp(), ServerApp()
    starts: list[float] = []
    seconds: list[float] = []
    ended: list[np.ndarray] = []
    failed = 0

    @client.train()
    def train(message: Message, context: Context) -> Message:
        if file is None:
            back = _held.setdefault("answer", [np.full(answer, 0.5, np.float32)])
        else:
            import engine
            import torch

            if "bare" not in engine._held:
                engine._held["bare"] = engine.Bare(Path(file))
            held = engine._held["bare"]
            arrived = message.content.array_records["arrays"].to_numpy_ndarrays()
            with torch.no_grad():
                for parameter, array in zip(held.parameters, arrived, strict=True):
                    parameter.copy_(torch.from_numpy(array))
            held.train(int(context.node_config["partition-id"]))
            back = [parameter.detach().numpy() for parameter in held.parameters]
        records = {"arrays": ArrayRecord(back), "metrics": MetricRecord({"num-examples": UNITS - 2 * EACH})}
        return Message(RecordDict(records), reply_to=message)

    class Timed(FedAvg):
        def configure_train(self, server_round: int, *rest: Any) -> Any:
            starts.append(time.perf_counter())
            return super().configure_train(server_round, *rest)

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            nonlocal failed
            replies = list(replies)
            failed += sites - sum(not one.has_error() for one in replies)
            combined = super().aggregate_train(server_round, replies)
            seconds.append(time.perf_counter() - starts[-1])
            return combined

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        first = (
            [np.zeros(answer, np.float32)]
            if file is None
            else [parameter.detach().numpy() for parameter in Bare(Path(file)).parameters]
        )
        strategy = Timed(fraction_evaluate=0.0, min_evaluate_nodes=0, min_available_nodes=sites, min_train_nodes=sites)
        result = strategy.start(grid, ArrayRecord(first), num_rounds=rounds, timeout=LIMIT_S)
        ended.extend(result.arrays.to_numpy_ndarrays())

    run_simulation(
        server, client, num_supernodes=sites,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": job["workers"], "include_dashboard": False, "log_to_driver": False},
        },
    )  # fmt: skip
    if file is None:
        return {"seconds": seconds, "failed": failed}
    names = [name for name, _ in Bare(Path(file)).model.named_parameters()]
    return {"seconds": seconds, "failed": failed, "apart": apart_of(dict(zip(names, ended, strict=True)), job)}


# --- Trunkline --------------------------------------------------------------------------------------------------------


def trunkline(job: dict[str, Any]) -> dict[str, Any]:
    """`trunkline simulate` without the page of plots, which is drawn after the last round."""
    import trunkline.server.reporting.html

    trunkline.server.reporting.html.page = lambda report, predictions: ""  # type: ignore[assignment]
    from trunkline.config.run import parse_run
    from trunkline.server.reporting.report import read_report
    from trunkline.simulations.simulate import simulate

    out = Path(job["out"])
    folders = sorted(Path(job["folders"]).iterdir())
    start = time.perf_counter()
    simulate(parse_run(job["run"], "benchmark"), folders, out, workers=job["workers"])
    whole = time.perf_counter() - start
    rounds = read_report(out)["rounds"]
    seconds = [one["seconds"] for one in rounds]
    failed = sum(len(one["refused"]) for one in rounds)
    apart = None
    if "keep" in job:
        from trunkline.server.rounds.checkpoint import Checkpoint

        last = Checkpoint(out).load()
        assert last is not None
        # the names of the wire -> the model's own
        ended = {
            name.replace("trunk.norms.", "norms.").replace("head.", "heads."): a for name, a in last[0].trunk.items()
        }
        apart = apart_of(ended, job)
    return {"seconds": seconds, "failed": failed, "around": whole - sum(seconds), "apart": apart}


def use_noop() -> None:
    """In a worker of the grid: the app that answers at once, in the place of the site's own."""
    import sys
    import types

    module = types.ModuleType("trunkline.client.app")
    module.app = noop_app()  # type: ignore[attr-defined]
    sys.modules["trunkline.client.app"] = module


def noop_app() -> Any:
    """A ClientApp whose answer is ready: as many float32 as the environment says."""
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    from trunkline.flower.records import to_records

    app, answer = ClientApp(), np.full(int(os.environ["TRUNKLINE_BENCHMARK_ANSWER"]), 0.5, np.float32)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(to_records({"trunk.w": answer}, "{}"), reply_to=message)

    return app


def noop(job: dict[str, Any]) -> dict[str, Any]:
    """Rounds over a grid without training: asked, answered, summed."""
    from trunkline.flower.grid import LoopbackGrid
    from trunkline.flower.records import open_records, to_records
    from trunkline.protocol.arrays import Arrays
    from trunkline.protocol.messages import Update
    from trunkline.server.rounds.messaging import ask
    from trunkline.strategies.streaming import weighted_mean

    os.environ["TRUNKLINE_BENCHMARK_ANSWER"] = str(job["answer"])
    sites = [Path(job["out"]) / f"site-{place:05d}" for place in range(job["sites"])]
    for site in sites:
        site.mkdir()
    if job["grid"] == "loopback":
        grid: Any = LoopbackGrid(noop_app(), [{"site": str(site)} for site in sites])
    else:
        import ray

        from trunkline.simulations.ray.grid import RayGrid

        # the grid starts Ray as always, but for the hook
        ray.init = partial(ray.init, runtime_env={"worker_process_setup_hook": "engine.use_noop"})
        grid = RayGrid(sites, sites, workers=job["workers"])
    trunk = {"trunk.w": np.zeros(job["answer"], np.float32)}

    def updates(round: int) -> Iterator[Update]:
        content = to_records(trunk, "{}")
        requests = {node: lambda: content for node in grid.get_node_ids()}
        for answer in ask(grid, "train", requests, round=round, deadline_s=LIMIT_S, resend_s=LIMIT_S):
            if answer.content is None:
                raise RuntimeError(f"node {answer.node}: {answer.failure}")
            arrays, _, _ = open_records(answer.content)
            yield Update(str(answer.node), "noop", round, Arrays(arrays), 1.0)

    seconds = []
    watched = (
        Own() if job.get("watch") else contextlib.nullcontext()
    )  # looking takes time too, so only where it is asked
    with watched as own:
        for round in range(job["rounds"]):
            start = time.perf_counter()
            mean = weighted_mean(updates(round))
            seconds.append(time.perf_counter() - start)
            if mean.weight != len(sites):
                raise RuntimeError(f"{mean.weight:g} of {len(sites)} answered")
    if job["grid"] != "loopback":
        grid.close()
        ray.shutdown()
    return {"seconds": seconds, "failed": 0, **({"driver_mib": own.peak - own.start} if own else {})}


class Own:
    """The peak of this process's private memory above what it was, MiB, looked at every 20 ms.

    Pages of Ray's object store are shared and not among it: that store has a size of its own, however many the replies.
    """

    def __enter__(self) -> "Own":
        self.start = self.peak = self._now()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1024


# --- pfl-research -----------------------------------------------------------------------------------------------------


def pfl(job: dict[str, Any]) -> dict[str, Any]:
    """pfl-research's SimulatedBackend with the bare step; as its manual says one process a worker, joined by gloo."""
    if "RANK" not in os.environ:
        return _ranks(job)
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    held = Bare(Path(job["bare"]))
    samples = held.x.shape[1]

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = held.model

        def loss(self, x: Any, y: Any) -> Any:
            return torch.nn.functional.huber_loss(self.inner(x, held.codes)["level"][:, 0], y)

        @torch.no_grad()
        def metrics(self, x: Any, y: Any) -> dict[str, Any]:
            return {"loss": Weighted(float(self.loss(x, y)) * len(x), len(x))}

    stamps = [time.perf_counter()]

    class Clock(TrainingProcessCallback):
        def after_central_iteration(self, metrics: Any, model: Any, *, central_iteration: int) -> Any:
            stamps.append(time.perf_counter())
            return False, Metrics()

    net = Net()
    model = PyTorchModel(
        net,
        partial(torch.optim.AdamW, weight_decay=held.plan.weight_decay, fused=True),
        torch.optim.SGD(net.parameters(), lr=1.0),
    )
    data = FederatedDataset(
        lambda site: Dataset((held.x[site], held.y[site])), MinimizeReuseUserSampler(list(range(job["sites"])))
    )
    rounds = job["rounds"]
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=rounds + 1, train_cohort_size=job["sites"],
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(
            local_batch_size=samples, local_num_epochs=1, local_learning_rate=held.plan.learning_rate,
            local_max_grad_norm=held.plan.clip_norm,
        ),
        NNEvalHyperParams(local_batch_size=samples),
        callbacks=[Clock()],
    )  # fmt: skip
    ended = {name: one.detach().numpy() for name, one in held.model.named_parameters()}
    return {"seconds": np.diff(stamps).tolist(), "apart": apart_of(ended, job)}


def _ranks(job: dict[str, Any]) -> dict[str, Any]:
    """The answer of rank 0 of `workers` processes."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    request = Path(job["out"]) / "job.json"
    request.write_text(json.dumps(job))
    children = []
    for rank in range(job["workers"]):
        places = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["workers"], "LOCAL_WORLD_SIZE": job["workers"],
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "bench",
        }  # fmt: skip
        code = "import engine, sys; engine.child(*sys.argv[1:])"
        command = [sys.executable, "-c", code, "pfl", str(request), f"{request}.{rank}"]
        settings = {**os.environ, **{name: str(value) for name, value in places.items()}}
        children.append(subprocess.Popen(command, env=settings))
    if any(one.wait(LIMIT_S) for one in children):
        raise RuntimeError("a rank of pfl failed; its own words are above")
    found: dict[str, Any] = json.loads(Path(f"{request}.0").read_text())
    return found


# --- running them -----------------------------------------------------------------------------------------------------

ROLES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "bare": bare, "flower": flower, "trunkline": trunkline, "noop": noop, "pfl": pfl,
}  # fmt: skip


class Memory:
    """The peak of what all processes with one mark hold together, looked at once a second."""

    def __init__(self, mark: str) -> None:
        self.mark = f"{MARK}={mark}".encode()
        self.peak = 0.0
        self._known: dict[str, bool] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._end.set()
        self._thread.join()

    def _ours(self) -> Iterator[Path]:
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if entry.name not in self._known:
                    self._known[entry.name] = self.mark in (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended, or belongs to somebody else
                continue
            if self._known[entry.name]:
                yield entry

    def _watch(self) -> None:
        while not self._end.wait(1.0):
            total = 0
            for entry in self._ours():
                try:
                    total += int((entry / "smaps_rollup").read_text().split("\nPss:")[1].split()[0])
                except (OSError, IndexError):  # it has just ended
                    continue
            self.peak = max(self.peak, total / 1024)

    def end_what_is_left(self) -> None:
        """Ray's own processes outlive a driver that was killed."""
        self._known = {}
        for entry in list(self._ours()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(entry.name), signal.SIGKILL)


def contest(role: str, job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """One contestant in processes of its own; with its peak memory."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        request, answer, log = (Path(scratch) / name for name in ("job.json", "answer.json", "log"))
        request.write_text(json.dumps({**job, "out": str(out)}))
        mark = Path(scratch).name
        settings = {
            **{name: value for name, value in os.environ.items() if name != "TRUNKLINE_BATCH"}, **environment,
            MARK: mark, "FLWR_HOME": str(Path(scratch) / "flwr"), "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PYTHONPATH": os.pathsep.join(
                [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", ""), environment.get("PYTHONPATH", "")]
            ),
        }  # fmt: skip
        command = [sys.executable, "-c", "import engine, sys; engine.child(*sys.argv[1:])", role, request, answer]
        with Memory(mark) as memory, log.open("w") as said:
            code = subprocess.run(
                command, env=settings, stdout=said, stderr=said, timeout=LIMIT_S, check=False
            ).returncode
        if code or not answer.exists():
            raise SystemExit(f"{role} ended with {code}:\n" + "\n".join(log.read_text().splitlines()[-25:]))
        found: dict[str, Any] = json.loads(answer.read_text())
        return {**found, "peak_mib": memory.peak}


def child(role: str, request: str, answer: str) -> None:
    """Entry of a contestant's process."""
    Path(answer).write_text(json.dumps(ROLES[role](json.loads(Path(request).read_text()))))


def rate_of(found: dict[str, Any], sites: int) -> float:
    """Site-rounds a second of the median round after the first."""
    return sites / statistics.median(found["seconds"][1:])


def jobs_of(
    case: str, options: argparse.Namespace, root: Path
) -> dict[str, tuple[str, dict[str, Any], dict[str, str]]]:
    """contestant -> (role, job, environment) of one case; writes the case's sites."""
    sites = options.sites or NOOPS.get(case, SITES)
    job: dict[str, Any] = {"sites": sites, "rounds": options.rounds, "workers": options.workers}
    if case in NOOPS:
        job["answer"] = ANSWER
        loopback, ray = ("noop", {**job, "grid": "loopback"}), ("noop", {**job, "grid": "ray"})
        return {
            "bare_1": (*loopback, {}), "bare_n": (*loopback, {}), "flower": ("flower", job, {}),
            "sequential": (*ray, {"TRUNKLINE_BATCH": "0"}), "auto": (*ray, {}),
        }  # fmt: skip
    start = time.perf_counter()
    write_sites(root / "sites", sites, windows=TRUNKS[case]["backbone"] == "tcn")
    written = time.perf_counter()
    file = model_and_rows(case, root, options.rounds)
    print(
        f"{case}: {sites} sites written in {written - start:.1f} s, read in {time.perf_counter() - written:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    job |= {"bare": str(file), "folders": str(root / "sites"), "run": table_of(case, options.rounds), "keep": str(root)}
    return {
        "bare_1": ("bare", {**job, "processes": 1}, {}),
        "bare_n": ("bare", {**job, "processes": options.workers}, {}),
        "flower": ("flower", job, {}),
        "sequential": ("trunkline", job, {"TRUNKLINE_BATCH": "0"}),
        "auto": ("trunkline", job, {}),
        "pfl": ("pfl", job, {"PYTHONPATH": str(options.pfl)}),
    }


def run_case(case: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """contestant -> its rate (site-rounds a second), peak MiB and failed site-rounds; medians over the repeats."""
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-sites-") as folder:
        jobs = jobs_of(case, options, Path(folder))
        for repeat in range(options.repeats):
            for name in options.who:
                if name not in jobs:
                    continue
                if case in NOOPS and name == "bare_n" and "bare_1" in options.who:
                    continue  # the same loopback call
                role, job, environment = jobs[name]
                one = contest(role, job, environment)
                found.setdefault(name, []).append(one)
                told = f"{case} {repeat + 1}/{options.repeats} {name}: {rate_of(one, job['sites']):.1f} site-rounds a second"
                print(told, file=sys.stderr, flush=True)
        sites = next(iter(jobs.values()))[1]["sites"]
    if case in NOOPS and "bare_1" in found and "bare_n" in options.who:
        found["bare_n"] = found["bare_1"]
    return {
        name: {
            "rate": statistics.median(rate_of(one, sites) for one in some),
            "peak_mib": statistics.median(one["peak_mib"] for one in some),
            "failed": sum(one.get("failed", 0) for one in some),
            "apart": max((one["apart"] for one in some if one.get("apart") is not None), default=None),
        }
        for name, some in found.items()
    }


def show(case: str, found: dict[str, dict[str, Any]]) -> None:
    print(
        f"{case:14}{'site-rounds/s':>15}{'ms a site':>11}{'to bare_1':>11}{'to flower':>11}{'MiB':>8}{'failed':>8}{'apart':>9}"
    )
    for name, one in found.items():
        ratios = "".join(
            f"{one['rate'] / found[other]['rate']:11.3f}" if other in found else f"{'-':>11}"
            for other in ("bare_1", "flower")
        )
        apart = f"{'-':>9}" if one["apart"] is None else f"{one['apart']:9.0e}"
        print(
            f"  {name:12}{one['rate']:15.1f}{1e3 / one['rate']:11.3f}{ratios}{one['peak_mib']:8.0f}{one['failed']:8}{apart}"
        )
    sys.stdout.flush()


# --- big --------------------------------------------------------------------------------------------------------------


def sites_10000(options: argparse.Namespace) -> dict[str, float] | None:
    """Ten thousand sites, a tenth of them a round, as a user gets it."""
    from trunkline.config.run import CohortConfig

    if "share" not in CohortConfig.model_fields:
        print("sites_10000: needs [cohort] share")
        return None
    sites = options.sites or int(10_000 * options.scale)
    run = table_of("mlp_500x32", options.rounds)
    run["cohort"] |= {"share": 0.1}
    with tempfile.TemporaryDirectory(prefix="bench-sites-") as folder:
        write_sites(Path(folder), sites, windows=False)
        job = {"sites": sites, "rounds": options.rounds, "workers": options.workers, "run": run, "folders": folder}
        found = contest("trunkline", job, {})
    asked = sites // 10
    rounds = found["seconds"]
    result = {
        "sites": sites, "rate": rate_of(found, asked), "peak_mib": found["peak_mib"], "around_s": found["around"],
        "second_s": rounds[1], "median_s": statistics.median(rounds[1:]), "last_s": rounds[-1],
    }  # fmt: skip
    print(
        f"sites_10000: {len(rounds)} rounds of {asked} sites: the second {rounds[1]:.2f} s, the median {result['median_s']:.2f} s, the last "
        f"{rounds[-1]:.2f} s; {result['rate']:.0f} site-rounds a second; {found['peak_mib']:.0f} MiB in all processes; "
        f"{found['failed']} failed; {found['around']:.0f} s for opening, checkpoints, scoring and report"
    )
    return result


def stream_11m(options: argparse.Namespace) -> dict[str, float]:
    """The driver's memory while large replies stream through the grid into the sum."""
    answer, sites = int(BIG_ANSWER * options.scale), options.sites or int(REPLIES * options.scale)
    job = {"sites": sites, "answer": answer, "rounds": 1, "workers": options.workers, "grid": "ray", "watch": True}
    found = contest("noop", job, {})
    copy = answer * 4 / 2**20
    result = {
        "replies": sites, "parameters": answer, "ms_a_reply": found["seconds"][0] / sites * 1e3,
        "driver_copies": found["driver_mib"] / copy, "peak_mib": found["peak_mib"],
    }  # fmt: skip
    print(
        f"stream_11m: {sites} replies of {answer:,} float32, {result['ms_a_reply']:.1f} ms each; the driver's peak is "
        f"{result['driver_copies']:.1f} copies of the trunk; all processes {found['peak_mib']:.0f} MiB"
    )
    return result


# --- the command ------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"cpus": os.cpu_count(), "model": models[0].partition(": ")[2] if models else ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=[*TRUNKS, *NOOPS], choices=[*TRUNKS, *NOOPS, *BIG, "big"])
    parser.add_argument("--who", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sites", type=int, help="instead of each case's own number")
    parser.add_argument("--scale", type=float, default=1.0, help="of the big cases")
    parser.add_argument("--quick", action="store_true", help="40 sites, 1 repeat, 3 rounds: does it run at all")
    parser.add_argument("--pfl", type=Path, help="folder that pfl-research was installed in")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.sites, options.repeats, options.rounds = options.sites or 40, 1, 3
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    if options.rounds < 2:
        parser.error("--rounds: the first is not counted; take 2 or more")
    if "pfl" in options.who and not (options.pfl and (options.pfl / "pfl").is_dir()):
        print("pfl: not installed (--pfl names no folder with it)", file=sys.stderr)
        options.who.remove("pfl")
    cases: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    big: dict[str, dict[str, float]] = {}
    for case in options.cases:
        if case in BIG or case == "big":
            for name, measure in zip(BIG, (sites_10000, stream_11m), strict=True):
                if case in (name, "big") and (result := measure(options)) is not None:
                    big[name] = result
            continue
        found = run_case(case, options)
        show(case, found)
        cases[case] = {name: found[name]["rate"] for name in CONTESTANTS if name in found and name != "pfl"}
        if "auto" in found:
            cases[case]["peak_mib"] = found["auto"]["peak_mib"]
            ratios[case] = {
                f"auto_to_{name}": found["auto"]["rate"] / one["rate"] for name, one in found.items() if name != "auto"
            }
            if "flower" in found:
                ratios[case]["peak_auto_to_flower"] = found["auto"]["peak_mib"] / found["flower"]["peak_mib"]
                ratios[case]["failed_flower"] = found["flower"]["failed"]
    if options.json:
        result = {"cases": cases, "machine": machine(), "ratios": ratios, **({"big": big} if big else {})}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
