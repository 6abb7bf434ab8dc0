"""How soon the commands answer that a person waits for, as ratios to `python -c pass` of the same interpreter.

python benchmarks/commands.py [--site SITE_DIR] [--out FILE.json]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def seconds(command: list[str], repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path, help="a site folder for `trunkline check`, FD004 say")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    trunkline = [sys.executable, "-m", "trunkline.cli"]
    nothing = seconds([sys.executable, "-c", "pass"])
    result = {
        "python -c pass": nothing,
        "import trunkline": seconds([sys.executable, "-c", "import trunkline"]),  # at most 0.3 s: its parts load at use
        "trunkline --help": seconds([*trunkline, "--help"]),
    }
    if options.site:
        result["trunkline check"] = seconds([*trunkline, "check", str(options.site)], repeats=3)
    for name, value in result.items():
        print(f"{name:20}{value:8.2f} s{value / nothing:8.1f} x")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
