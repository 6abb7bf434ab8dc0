"""A state folder at rest as a whole: what of it is sealed and with which key, sealing what is plain, a copy to look at.

A sealed file is known by its first bytes, and what it was sealed as by where it lies. The lines of a chain
(`trunkline/security/hash_chain.py`) are sealed one by one and signed, so they stay as they are for ever.
"""

import base64
import binascii
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.numpy

from trunkline.client.state.identity import RECORDS
from trunkline.client.state.permissions import make_private, open_seal, private_files
from trunkline.client.state.vault import Vault, predictions_place
from trunkline.errors import StorageError, TrustError
from trunkline.runtime.lock import Lock
from trunkline.runtime.storage import SET_ASIDE, is_sealed, read_private, write_atomic, write_private
from trunkline.security.encryption import OVERHEAD, SETTINGS, Seal, find_seal, key_name, make_seal, sealing_key_name

if TYPE_CHECKING:
    from rich.console import Console

PRIVATE = (  # what is sealed in a sealed state, by where it lies
    r"split\.json",
    r"contracts/[^/]+\.json",
    r"vault/[^/]+/((asked/)?round-\d+\.safetensors|decisions\.json)",
    r"evaluation/[^/]+/[^/]+\.safetensors",
    r"(.*/)?(model\.safetensors|evidence\.(json|html))",
    rf"identity/{re.escape(RECORDS)}",
)
Tell = Callable[[str], None]


def silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class Kept:
    """One private file of a state folder.

    Args:
        place: where it lies below the folder.
        key: the name of the key that sealed it; empty: it is plain.
        size: in bytes.
    """

    path: Path
    place: str
    key: str
    size: int

    @property
    def about(self) -> str:
        """What it is sealed as: its place, but for what lies beside the site's keys."""
        return self.path.name if self.place.startswith("identity/") else self.place


def kept(state: Path) -> Iterator[Kept]:
    """Every file of `state` that is sealed, or that should be in a sealed state."""
    for path in private_files(state):
        place = path.relative_to(state).as_posix()
        if path.name.startswith(".") or path.suffix == SET_ASIDE:
            continue  # on its way to another name, or left behind on it, or nothing that opens any more
        try:
            with path.open("rb") as file:
                head = file.read(OVERHEAD)
            size = path.stat().st_size
        except FileNotFoundError:
            continue  # a daemon put a newer version in its place
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror}).") from None
        if is_sealed(head):
            yield Kept(path, place, sealing_key_name(head), size)
        elif re.fullmatch("|".join(PRIVATE), place):
            yield Kept(path, place, "", size)


def chains(state: Path) -> dict[str, Counter[str]]:
    """Chain file -> key name -> lines it sealed; under the empty name, lines from before the folder was sealed."""
    found = {}
    for path in private_files(state):
        if path.suffix == ".jsonl":
            found[path.relative_to(state).as_posix()] = Counter(map(_key_of_line, path.read_bytes().splitlines()))
    return found


def _key_of_line(line: bytes) -> str:
    try:
        data = base64.b64decode(json.loads(line)["text"], validate=True)
    except (ValueError, KeyError, TypeError, binascii.Error):
        return ""
    return sealing_key_name(data) if is_sealed(data) else ""


def seal_state(state: Path, source: str | None = None, tasks: Sequence[str] = (), tell: Tell = silent) -> Seal:
    """Seal a state folder and everything private in it that is still plain. Cut short and asked again, it goes on.

    Args:
        source: of the key; None: the one in use, or a new key file outside the folder.
        tasks: those of site.toml, in order.
        tell: called with what was done.

    Raises:
        DeploymentError: a daemon runs on the folder.
        TrustError: as `make_seal`. StorageError: a file cannot be read or written; it is as it was.
    """
    with Lock(state):
        make_seal(state, source)  # before any file: what is sealed can be opened from the first on
        make_private(state)
        seal = open_seal(state, tell)
        assert seal is not None
        for left in (*state.rglob(".*.tmp"), *state.rglob(f"*{SET_ASIDE}")):
            left.unlink(missing_ok=True)  # a write that was killed, or what damage left of a file, in the clear
        plain = [one for one in kept(state) if not one.key]
        for one in plain:
            target = _hidden(one, tasks)
            write_private(state / target.place, one.path.read_bytes(), seal, target.about)
            if target.place != one.place:
                one.path.unlink()
        tell(f"{len(plain)} files sealed with key {seal.name} from {seal.source}.")
        return seal


def _hidden(one: Kept, tasks: Sequence[str]) -> Kept:
    """The same file under a name that says nothing of a task; one that site.toml has no more keeps a number behind the others."""
    kind, _, rest = one.place.partition("/")
    if kind != "evaluation":
        return one
    run, name = rest.split("/")[0], one.path.stem
    if name not in tasks:
        others = sorted(path.stem for path in one.path.parent.glob("*.safetensors") if path.stem not in tasks)
        tasks = (*tasks, *(other for other in others if not re.fullmatch(r"task-\d+", other)))
    place = predictions_place(run, name, tasks, sealed=True)
    return Kept(one.path, place, one.key, one.size)


def open_copy(state: Path, out: Path, *, run: str = "", round: int | None = None, file: str = "") -> None:
    """Put a decrypted copy outside the state folder: of one round of a run as safetensors, or of one file as it was written.

    Args:
        round: None: the newest that is intact.
        file: its place below the folder; instead of `run` and `round`.

    Raises:
        StorageError: there is no such thing, it is damaged, or `out` is taken or lies in the state folder.
        TrustError: its key is not here.
    """
    seal = open_seal(state)
    if out.exists():
        raise StorageError(f"{out}: exists already. Name another file.")
    if out.resolve().is_relative_to(state.resolve()):
        raise StorageError(f"{out}: lies in the state folder, where nothing should be plain. Name a file elsewhere.")
    if file:
        about = Kept(state / file, file, "", 0).about
        try:
            write_atomic(out, read_private(state / file, seal, about))
        except OSError as error:
            raise StorageError(f"{state / file}: cannot be read ({error.strerror}).") from None
        return
    shelf = Vault(state, run, seal=seal).shelf
    there = shelf.rounds()
    if not there or (round is not None and round not in there):
        runs = sorted(path.name for path in (state / "vault").glob("*"))
        what = f"rounds {', '.join(map(str, there))} of it are kept" if there else f"runs: {', '.join(runs) or 'none'}"
        raise StorageError(f"{shelf.folder}: no {'such run' if not there else f'round {round}'} here; {what}.")
    if round is None:
        newest = shelf.newest()
        assert newest is not None
        round, tensors, meta = newest
    else:
        tensors, meta = shelf.get(round)
    about = json.dumps({"run": run, "round": round, "meta": meta})
    write_atomic(out, safetensors.numpy.save(tensors, {"trunkline-vault": about}))


@dataclass(frozen=True)
class Status:
    """What `trunkline client vault status` shows.

    Args:
        source, key: as seal.toml says; empty where the folder is not sealed.
        known: names of the keys the source holds, the newest first.
        problem: why the folder cannot be opened; empty: it can.
        files: key name -> files it sealed; under the empty name those that are plain.
        lines: chain file -> key name -> lines.
        runs: run -> rounds kept and their bytes.
    """

    state: Path
    source: str = ""
    key: str = ""
    known: tuple[str, ...] = ()
    problem: str = ""
    files: dict[str, list[Kept]] = field(default_factory=dict)
    lines: dict[str, Counter[str]] = field(default_factory=dict)
    runs: dict[str, tuple[list[int], int]] = field(default_factory=dict)

    def needed(self) -> set[str]:
        """The keys without which something here could not be opened."""
        return ({*self.files} | {key for lines in self.lines.values() for key in lines}) - {""}


def status(state: Path) -> Status:
    """What lies in `state` and which keys it needs; looks at no content, so it works without the key.

    Raises:
        StorageError: there is no such folder, or a file cannot be read.
    """
    if not state.is_dir():
        raise StorageError(f"{state}: no such folder. --state names another.")
    files: dict[str, list[Kept]] = {}
    for one in kept(state):
        files.setdefault(one.key, []).append(one)
    runs = {}
    for folder in sorted((state / "vault").glob("*")):
        shelf = Vault(state, folder.name).shelf
        runs[folder.name] = (shelf.rounds(), sum(shelf.path(round).stat().st_size for round in shelf.rounds()))
    source = key = problem = ""
    known: tuple[str, ...] = ()
    try:
        said: dict[str, Any] = tomllib.loads((state / SETTINGS).read_text(encoding="utf-8"))
        source, key = str(said.get("source", "")), str(said.get("key", ""))
    except (OSError, ValueError):
        pass  # where the file is there, find_seal says what is wrong with it
    try:
        seal = find_seal(state)
        known = tuple(map(key_name, seal.keys)) if seal is not None else ()
        open_seal(state)
    except TrustError as error:
        problem = str(error)
    return Status(state, source, key, known, problem, files, chains(state), runs)


def print_status(found: Status, console: "Console") -> None:
    """What `status` found, for a person."""
    from rich.table import Table

    if not found.key:
        console.print(f"{found.state}: not sealed. `trunkline client vault seal SITE_DIR` seals it.", markup=False)
    else:
        console.print(f"{found.state}: sealed with key {found.key} from {found.source}", markup=False, highlight=False)
    if found.problem:
        console.print(f"! {found.problem}", style="red", markup=False, highlight=False)
    keys = Table("key", "in the source", "files", "lines of chains", title="Keys", title_justify="left")
    for key in dict.fromkeys([*found.known, *sorted(found.needed()), ""]):
        files = found.files.get(key, [])
        lines = [f"{counts[key]} in {name}" for name, counts in found.lines.items() if counts[key]]
        if key or files or lines:
            place = (
                "-" if not key else "newest" if key in found.known[:1] else "yes" if key in found.known else "missing"
            )
            place += "" if not key or files or lines or place == "newest" else ", not needed here"
            keys.add_row(key or "plain", place, _sum(files), ", ".join(lines) or "-")
    console.print(keys)
    if found.runs:
        runs = Table("run", "rounds kept", "size", title="Runs", title_justify="left")
        for run, (rounds, size) in found.runs.items():
            runs.add_row(run, ", ".join(map(str, rounds)) or "none", f"{size / 1e6:.1f} MB")
        console.print(runs)


def _sum(files: list[Kept]) -> str:
    return f"{len(files)} ({sum(one.size for one in files) / 1e6:.1f} MB)" if files else "-"
