"""Seconds and peak memory of the centre's exact sum beside a plain float64 mean and Flower's own aggregation.

    python benchmarks/aggregation.py [--repeats 5] [--arrays 20] [--scale 1.0] [--json FILE]

100 and 1,000 updates of 100,000 parameters, and 10 of 11 million, each in `--arrays` arrays with a weight of its own:

    plain     numpy: arrays times weight into a float64 sum, added and forgotten
    exact     Trunkline's weighted_mean: the same bits in any order, added and forgotten
    records   as `exact`, from messages as they arrive (open_records), which is what a round does
    flower    FedAvg.aggregate_train of Flower, from messages as they arrive

Contestants take turns, after one of each that does not count; seconds are medians, and the ratios are to `plain` and
`flower` of the same run. Making an update or a message does not count. Memory is the peak while aggregating, in copies
of one float32 update; it is measured apart from the time, by tracemalloc, and holds what a contestant keeps of the
messages.
"""

import argparse
import json
import logging
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from trunkline.flower.grid import LoopbackGrid
from trunkline.flower.records import open_records, to_records
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.strategies.streaming import weighted_mean

CASES = {"100x100k": (100, 100_000), "1000x100k": (1000, 100_000), "10x11m": (10, 11_000_000)}


class Source:
    """Updates made as they are asked for; `spent` are the seconds that took.

    Args:
        sites: how many.
        parameters: of each, in `arrays` arrays.
    """

    def __init__(self, sites: int, parameters: int, arrays: int) -> None:
        rng = np.random.default_rng(0)
        flat = rng.normal(size=parameters).astype(np.float32) * 1e-2
        self.base = {f"trunk.{place:03d}": part for place, part in enumerate(np.array_split(flat, arrays))}
        self.sites = sites
        self.spent = 0.0

    def _each(self, make: Callable[[dict[str, np.ndarray], float], Any]) -> Iterator[Any]:
        for site in range(self.sites):
            start = time.perf_counter()
            factor = np.float32(1 + site / self.sites)
            made = make({name: part * factor for name, part in self.base.items()}, float(100 + site))
            self.spent += time.perf_counter() - start
            yield made
            del made

    def arrays(self) -> Iterator[tuple[dict[str, np.ndarray], float]]:
        return self._each(lambda arrays, weight: (arrays, weight))

    def updates(self) -> Iterator[Update]:
        return self._each(lambda arrays, weight: Update("s", "r", 1, Arrays(arrays), weight))

    def records(self) -> Iterator[tuple[RecordDict, float]]:
        return self._each(lambda arrays, weight: (to_records(arrays, "{}"), weight))

    def messages(self) -> Iterator[Message]:
        return self._each(
            lambda arrays, weight: Message(
                RecordDict(
                    {
                        "arrays": ArrayRecord(list(arrays.values())),
                        "metrics": MetricRecord({"num-examples": int(weight)}),
                    }
                ),
                dst_node_id=2,
                message_type="train",
            )
        )


def plain(source: Source) -> list[np.ndarray]:
    total = {name: np.zeros(part.shape) for name, part in source.base.items()}
    weights = 0.0
    for arrays, weight in source.arrays():
        for name, array in arrays.items():
            total[name] += array.astype(np.float64) * weight
        weights += weight
    return [(one / weights).astype(np.float32) for one in total.values()]


def exact(source: Source) -> list[np.ndarray]:
    return list(weighted_mean(source.updates()).delta.values())


def records(source: Source) -> list[np.ndarray]:
    def updates() -> Iterator[Update]:
        for content, weight in source.records():
            yield Update("s", "r", 1, Arrays(open_records(content)[0]), weight)

    return list(weighted_mean(updates()).delta.values())


def flower(source: Source) -> list[np.ndarray]:
    combined, _ = FedAvg().aggregate_train(1, source.messages())
    assert combined is not None
    return combined.to_numpy_ndarrays()


CONTESTANTS: dict[str, Callable[[Source], list[np.ndarray]]] = {
    "plain": plain, "exact": exact, "records": records, "flower": flower,
}  # fmt: skip


def seconds_of(contestant: Callable[[Source], list[np.ndarray]], source: Source) -> float:
    source.spent = 0.0
    start = time.perf_counter()
    contestant(source)
    return time.perf_counter() - start - source.spent


def copies_of(contestant: Callable[[Source], list[np.ndarray]], source: Source) -> float:
    tracemalloc.start()
    contestant(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / sum(part.nbytes for part in source.base.values())


def measure(sites: int, parameters: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    source = Source(sites, parameters, options.arrays)
    truth = plain(source)
    for name, contestant in CONTESTANTS.items():
        for one, other in zip(truth, contestant(source), strict=True):
            if not np.allclose(one, other, rtol=1e-4, atol=1e-6):
                raise SystemExit(f"{name} does not come to the mean; nothing is compared")
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(options.repeats):
        for name, contestant in CONTESTANTS.items():
            seconds[name].append(seconds_of(contestant, source))
    middle = {name: statistics.median(some) for name, some in seconds.items()}
    return {
        name: {
            "seconds": took,
            "ms_an_update": took / sites * 1e3,
            "to_plain": took / middle["plain"],
            "to_flower": took / middle["flower"],
            "copies": copies_of(CONTESTANTS[name], source),
        }
        for name, took in middle.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--arrays", type=int, default=20)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of updates")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    LoopbackGrid(ClientApp(), [{}])  # Flower's messages want to know who sends them
    result = {}
    for case, (sites, parameters) in CASES.items():
        result[case] = measure(max(2, int(sites * options.scale)), parameters, options)
        print(f"{case:12}{'seconds':>9}{'ms an update':>14}{'to plain':>10}{'to flower':>11}{'peak, copies':>14}")
        for name, one in result[case].items():
            print(
                f"  {name:10}{one['seconds']:9.3f}{one['ms_an_update']:14.3f}{one['to_plain']:10.2f}{one['to_flower']:11.2f}{one['copies']:14.1f}"
            )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
