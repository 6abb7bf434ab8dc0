"""What the exact, order-free sum costs beside a plain float sum, and that its memory does not grow with sites.

python benchmarks/exchange.py [--parameters 1000000] [--sites 20 200] [--out FILE.json]
"""

import argparse
import json
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import Update
from trunkline.strategies.streaming import weighted_mean


def updates(sites: int, parameters: int) -> Iterator[Update]:
    """Made as they are asked for, as replies are: a list of them would be the memory that is measured."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=parameters).astype(np.float32) * 1e-2
    for site in range(sites):
        yield Update(f"s{site}", "r", 1, Arrays({"trunk.w": base * np.float32(1 + site / sites)}), float(100 + site))


def plain_mean(stream: Iterator[Update]) -> np.ndarray:
    total, weight = np.zeros(1), 0.0
    for one in stream:
        total = total + one.delta["trunk.w"].astype(np.float64) * one.weight
        weight += one.weight
    return (total / weight).astype(np.float32)


def listed_mean(stream: Iterator[Update]) -> np.ndarray:
    """As Flower 1.41's strategies do: collect every reply, then average."""
    replies = list(stream)
    total = sum(one.delta["trunk.w"].astype(np.float64) * one.weight for one in replies)
    return np.asarray(total / sum(one.weight for one in replies), dtype=np.float32)


def measure(function, sites: int, parameters: int, repeats: int = 3) -> tuple[float, float]:
    """Best seconds of `repeats`, and the peak of one traced call in MB."""
    best = min(_seconds(function, sites, parameters) for _ in range(repeats))
    tracemalloc.start()
    function(updates(sites, parameters))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return best, peak / 1e6


def _seconds(function, sites: int, parameters: int) -> float:
    start = time.perf_counter()
    function(updates(sites, parameters))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--sites", type=int, nargs=2, default=[20, 200])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for sites in options.sites:
        plain, plain_peak = measure(plain_mean, sites, options.parameters)
        for name, function in (
            ("exact, streamed", weighted_mean),
            ("float, streamed", plain_mean),
            ("float, collected", listed_mean),
        ):
            seconds, peak = measure(function, sites, options.parameters)
            rows.append(
                {
                    "sum": name,
                    "sites": sites,
                    "time_ratio": seconds / plain,
                    "peak_ratio": peak / plain_peak,
                    "peak_mb": peak,
                    "ms_a_site": seconds / sites * 1e3,
                }
            )
    print(
        f"{'sum':18}{'sites':>7}{'time':>8}{'peak':>8}{'peak MB':>10}{'ms a site':>11}   ({options.parameters:,} parameters; ratios to the streamed float sum)"
    )
    for row in rows:
        print(
            f"{row['sum']:18}{row['sites']:7}{row['time_ratio']:8.2f}{row['peak_ratio']:8.2f}{row['peak_mb']:10.1f}{row['ms_a_site']:11.2f}"
        )
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
