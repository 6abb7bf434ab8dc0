"""What it costs a plant to encrypt what it keeps of a round, beside writing it plain.

    python benchmarks/vault.py [--repeats 9] [--megabytes 50] [--json FILE]

One entry of `--megabytes` float32 in 40 arrays, through the vault as a round writes it (checksum, fsync, rename) and as
the next round reads it. Plain and sealed take turns, after one of each that does not count; seconds are medians, and the
ratio is to plain. `sealing` is the encryption alone, without a file.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trunkline.client.state.vault import Entry, Vault
from trunkline.security.encryption import make_seal


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    flat = np.random.default_rng(0).normal(size=int(options.megabytes * 1e6 / 4)).astype(np.float32)
    entry = Entry("q", {f"stem.{place}": part for place, part in enumerate(np.array_split(flat, 40))}, {})
    with tempfile.TemporaryDirectory() as folder:
        seal = make_seal(Path(folder) / "sealed", f"file:{folder}/key")
        vaults = {"plain": Vault(Path(folder) / "plain", "r"), "sealed": Vault(Path(folder) / "sealed", "r", seal=seal)}
        spent: dict[str, list[float]] = {}
        for round in range(1, options.repeats + 2):
            for name, vault in vaults.items():
                spent.setdefault(f"{name} write", []).append(seconds(lambda v=vault, r=round: v.put(r, entry)))
                spent.setdefault(f"{name} read", []).append(seconds(lambda v=vault, r=round: v.before(r + 1)))
            data = flat.tobytes()
            spent.setdefault("sealing", []).append(seconds(lambda content=data: seal.close(content, "x")))
    median = {name: statistics.median(values[1:]) for name, values in spent.items()}
    ratio = {what: median[f"sealed {what}"] / median[f"plain {what}"] for what in ("write", "read")}
    print(f"{'':8}{'plain s':>10}{'sealed s':>10}{'ratio':>8}")
    for what in ("write", "read"):
        print(f"{what:8}{median[f'plain {what}']:10.3f}{median[f'sealed {what}']:10.3f}{ratio[what]:8.2f}")
    print(
        f"sealing {options.megabytes:g} MB alone: {median['sealing']:.3f} s, {options.megabytes / median['sealing'] / 1e3:.1f} GB/s"
    )
    if options.json:
        options.json.write_text(json.dumps({"seconds": median, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
