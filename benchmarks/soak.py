"""A day of a federation in some minutes: does anything grow that should not? Real daemons on loopback, plants in shifts.

python benchmarks/soak.py [--plants 20] [--minutes 12] [--hours 24] [--steps 40] [--before S] [--root DIR] [--out FILE.json]

One centre and so many plants, made and joined by the commands that ship. Once they have done three rounds together, the clock of
their calendars (TRUNKLINE_CLOCK) runs fast: `--hours` pass in `--minutes`. Each plant trains in one of three shifts, and in the first
hour too, so that by its end every process has done what it will do again. One run goes on all the time. Every half hour is sampled: memory
(RSS, which counts what processes share once for each), open files and sockets of every process, files and bytes of every
state folder, the SuperLink's database.

Printed: a line an hour; by kind, the growth from the end of the first hour to the end; and what grows most, by name. Growth of memory,
of open files and sockets, and of the number of files is held to 5 %: exit code 1 beyond it. Bytes are only shown: a
manifest, an audit log and a run's events have a line for everything that happens, which is what they are for.
20 plants take about 9 GB.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.federation import Federation, events, rounds, within  # noqa: E402 - the tests' harness lies beside this folder
from trunkline.protocol.opening_hours import lasts, now  # noqa: E402

LIMIT = 0.05
HELD = ("memory", "open files", "sockets", "files")  # kinds that may not grow by more
SHIFTS = ((6.0, 14.0), (14.0, 22.0), (22.0, 6.0))
SITE = """
name = "{name}"
[data]
files = "log.csv"
channels = ["a", "b", "c"]
group = "unit"
window = 16
[tasks.wear]
kind = "regression"
target = "wear"
unit = "mm"
"""
RUN = """
name = "soak"
rounds = 100000
seed = 5
[trunk]
width = 16
[training]
steps = {steps}
batch_size = 32
[cohort]
min_sites = {plants}
quorum = 0.5
deadline_s = 30
gather_s = 300
resend_s = 10
[report]
baseline = false
"""


@dataclass
class Sample:
    """What there was at one moment.

    Args:
        hour: of the fast clock, since the run began.
        memory, open_files, sockets: by process (`centre/gateway`, `plant/executor`, all plants together), MB and numbers.
        files, sizes: number and MB by place, `*` for what plants and rounds differ in.
    """

    hour: float
    rounds: int
    sites: int
    memory: Counter[str] = field(default_factory=Counter)
    open_files: Counter[str] = field(default_factory=Counter)
    sockets: Counter[str] = field(default_factory=Counter)
    files: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)

    def kinds(self) -> dict[str, Counter[str]]:
        return {
            "memory": self.memory, "open files": self.open_files, "sockets": self.sockets, "files": self.files,
            "MB on disk": self.sizes,
        }  # fmt: skip

    @property
    def database(self) -> float:
        return sum(size for place, size in self.sizes.items() if "superlink.db" in place)


def write_plant(folder: Path, number: int) -> None:
    """A few hundred rows of three sensors and of wear that follows from them."""
    draw = np.random.default_rng(number)
    folder.mkdir(parents=True)
    (folder / "site.toml").write_text(SITE.format(name=folder.name))
    lines = ["unit,a,b,c,wear"]
    for unit in range(12):
        walk = draw.normal(size=(60, 3)).cumsum(0)
        lines += [f"{unit},{a:.4f},{b:.4f},{c:.4f},{a - 0.5 * b + 0.1 * c:.4f}" for a, b, c in walk]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")


def give_hours(folders: list[Path], begins: datetime) -> None:
    """Three shifts; and everybody from an hour before the measurement begins to an hour after, every day."""
    at = begins.hour + begins.minute / 60.0
    everybody = [(at - 1.0) % 24.0, (at + 1.0) % 24.0]
    for number, folder in enumerate(folders):
        own = json.dumps([list(SHIFTS[number % 3]), everybody])
        with (folder / "site.toml").open("a") as file:
            file.write(f'\n[hours]\nzone = "UTC"\nhours = {own}\n')


def descendants(pid: int) -> list[int]:
    """The process and all below it."""
    found, below = [pid], {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        below.setdefault(parent, []).append(int(path.parent.name))
    for one in found:
        found += below.get(one, [])
    return found


PARTS = (
    "superlink",
    "superexec",
    "registrar",
    "gateway",
    "serverapp",
    "supernode",
    "executor",
    "server start",
    "client start",
)


def part_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return next((part for part in PARTS if part in words), "other")


def look(made: Federation, hour: float, out: Path) -> Sample:
    done = rounds(out)
    sample = Sample(hour, len(done), done[-1]["sites"] if done else 0)
    for name in ("server", *made.states):
        for pid in descendants(made.running[name].pid):
            try:
                part = f"{'centre' if name == 'server' else 'plant'}/{part_of(pid)}"
                memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
                links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
            except OSError:  # it has just ended
                continue
            sample.memory[part] += int(memory[1]) / 1024 if memory else 0
            sample.sockets[part] += sum(link.startswith("socket:") for link in links)
            sample.open_files[part] += sum(not link.startswith("socket:") for link in links)
    for top in (made.server, made.root / "plants", out):
        for path in top.rglob("*"):
            try:
                if not path.is_file():
                    continue
                size = path.stat().st_size
            except OSError:
                continue
            place = re.sub(r"^plants/[^/]+", "plants/*", str(path.relative_to(made.root)))
            place = re.sub(r"\d{3,}|[0-9a-f]{16,}", "*", place)
            sample.files[place] += 1
            sample.sizes[place] += size / 1e6
    return sample


def mean(some: list[Sample]) -> Sample:
    """What there was in the middle of several samples, on average."""
    middle = Sample(sum(one.hour for one in some) / len(some), some[-1].rounds, some[-1].sites)
    for one in some:
        for kind, counted in one.kinds().items():
            for name, number in counted.items():
                middle.kinds()[kind][name] += number / len(some)
    return middle


def growth(before: Counter[str], after: Counter[str]) -> float:
    whole = sum(before.values())
    return (sum(after.values()) - whole) / whole if whole else 0.0


def print_table(samples: list[Sample]) -> None:
    print(f"\n{'hour':>5} {'rounds':>7} {'sites':>6} {'memory MB':>10} {'centre MB':>10} {'open files':>11} {'sockets':>8} {'files':>7} {'disk MB':>8} {'db MB':>7}")  # fmt: skip
    shown = [one for one in samples if abs(one.hour - round(one.hour)) < 0.2]
    for one in shown:
        centre = sum(size for part, size in one.memory.items() if part.startswith("centre"))
        print(
            f"{one.hour:5.1f} {one.rounds:7d} {one.sites:6d} {one.memory.total():10.0f} {centre:10.0f} {one.open_files.total():11d} "
            f"{one.sockets.total():8d} {one.files.total():7d} {one.sizes.total():8.2f} {one.database:7.2f}"
        )


def print_growth(first: Sample, last: Sample) -> list[str]:
    """The growth by kind and what makes it; the kinds that grew by more than they may."""
    beyond = []
    print(f"\ngrowth from hour {first.hour:.1f} to hour {last.hour:.1f}, {last.rounds - first.rounds} rounds")
    for kind, after in last.kinds().items():
        before = first.kinds()[kind]
        share = growth(before, after)
        verdict = ""
        if kind in HELD:
            verdict = "within 5 %" if share <= LIMIT else "BEYOND 5 %"
            if share > LIMIT:
                beyond.append(kind)
        print(
            f"  {kind:12} {sum(before.values()):10.1f} -> {sum(after.values()):10.1f}  {100 * share:+7.1f} %  {verdict}"
        )
        more = Counter({name: after[name] - before[name] for name in after.keys() | before.keys()})
        for name, size in more.most_common(6):
            if size > 0.005 * max(1.0, sum(before.values())):
                print(f"      {name:50} {before[name]:9.2f} -> {after[name]:9.2f}")
    return beyond


def soak(
    root: Path, plants: int, minutes: float, hours: float, steps: int, before_s: float
) -> tuple[list[Sample], list[str]]:
    # up to then it is the machine's own clock, so that nothing closes while everything starts
    begins = (datetime.now(UTC) + timedelta(seconds=before_s)).replace(microsecond=0)
    os.environ["TRUNKLINE_CLOCK"] = f"{begins.isoformat()} x{hours * 60.0 / minutes:g}"
    folders = [root / "sites" / f"plant-{number:02d}" for number in range(plants)]
    for number, folder in enumerate(folders):
        write_plant(folder, number)
    made = Federation(root)
    try:
        made.start()
        for folder in folders:
            made.join(folder)
            made.plant(folder)
        within(
            120.0 + 10.0 * plants, lambda: f"everybody is online\n{made.logs()}", lambda: len(made.online()) == plants
        )
        give_hours(folders, begins)
        out = root / "run"
        made.run(RUN.format(steps=steps, plants=plants), out)
        within(300.0, lambda: f"three rounds\n{made.logs()}", lambda: len(rounds(out)) >= 3)
        early = (begins - datetime.now(UTC)).total_seconds()
        if early < 0.0:
            raise SystemExit(f"everything was ready {-early:.0f} s too late: give --before {before_s - early + 30:.0f}")
        time.sleep(early + 0.1)
        print(
            f"{plants} plants, {len(rounds(out))} rounds so far; an hour takes {lasts(timedelta(hours=1)):.0f} s",
            flush=True,
        )
        samples: list[Sample] = []
        while (hour := (now() - begins) / timedelta(hours=1)) <= hours + 0.01:
            due = len(samples) / 2
            if hour < due:
                time.sleep(min(1.0, lasts(timedelta(hours=due - hour)) + 0.01))
                continue
            samples.append(look(made, hour, out))
            if made.running["run"].poll() is not None:
                raise SystemExit(f"the run ended by itself after {hour:.1f} h\n{made.log('run')}\n{made.logs()}")
        told = [one["text"] for one in events(out) if one["event"] in ("note", "waiting", "recovered", "late")]
        return samples, told
    finally:
        made.end()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plants", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=12.0, help="that the measurement takes, after the start")
    parser.add_argument("--hours", type=float, default=24.0, help="of the plants' clock that pass in them")
    parser.add_argument("--steps", type=int, default=40, help="of training a round")
    parser.add_argument("--before", type=float, help="seconds for the start of everything; default: by the plants")
    parser.add_argument("--root", type=Path, help="folder for everything, kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="all samples, JSON")
    options = parser.parse_args()
    root = options.root or Path(tempfile.mkdtemp(prefix="trunkline-soak-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        samples, told = soak(
            root,
            options.plants,
            options.minutes,
            options.hours,
            options.steps,
            options.before or 90.0 + 15.0 * options.plants,
        )
    finally:
        if options.root is None:
            shutil.rmtree(root, ignore_errors=True)
    print_table(samples)
    # of three samples each: a connection that is being made, or a round that is being written, is no growth
    beyond = print_growth(mean([one for one in samples if one.hour >= 0.9][:3]), mean(samples[-3:]))
    half = [one for one in samples if one.hour >= options.hours / 2]
    if len(half) > 1:
        each = 1000 * (half[-1].database - half[0].database) / max(1, half[-1].rounds - half[0].rounds)
        print(f"  the database: {each:+.1f} kB a round in the second half")
    print(f"\ntold: {len(told)} notes, {len(set(told))} different; the first 12:")
    for text in list(dict.fromkeys(told))[:12]:
        print(f"  {text}")
    if options.out:
        options.out.write_text(json.dumps([vars(one) for one in samples], indent=1))
    if beyond:
        sys.exit(f"\ngrew by more than {100 * LIMIT:.0f} %: {', '.join(beyond)}")


if __name__ == "__main__":
    main()
