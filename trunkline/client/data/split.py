"""Which rows train, validate and test: decided once, written to split.json, and never revised by new data.

By group (the default): a group is on one side as a whole. New groups go where the shares are most short; a group that
has a part keeps it. By time (`by = "time"`, or a site without `group`): within each group the first rows train, the next
validate, the last test. The two boundaries are stored as order values (without `order`: as row numbers), so rows appended
later lie behind the last boundary and become test rows (validation rows where there is no test share), and rows that
arrive late for an old moment join the part that moment belongs to.

By fold (`folds = 5`, `fold = 0 .. 4`): the groups are dealt to equal shares that hold every class alike, and one share is
the test. The deal depends on `seed` and the groups only, so that five sites that differ in `fold` test every group once.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trunkline.client.data.folds import SplitInput, assign_folds, validation_cost
from trunkline.client.data.notes import Findings
from trunkline.config.site import SplitConfig
from trunkline.errors import DataError, StorageError
from trunkline.protocol.arrays import seed_of
from trunkline.runtime.storage import Sealing, read_private, write_private

FORMAT = 1
PARTS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)
ATTEMPTS = 20  # seeded shuffles tried so that every class is in every part
DELETE = "Delete {path} to split again; models trained before must then be trained again too."


@dataclass(frozen=True)
class Split:
    """What split.json holds.

    Args:
        by, seed, validation, test: the settings it was made with.
        assignment: group -> part, for by = "group".
        until: group -> (last order of training, last order of validation), for by = "time".
        labelled: training groups that keep their labels, in the order they were drawn; empty: all of them.
        folds, fold: how many shares the groups were dealt to, and which one tests; None: no folds.
        share: group -> its share, for folds.
    """

    by: Literal["group", "time"]
    seed: int
    validation: float
    test: float
    assignment: dict[str, str]
    until: dict[str, tuple[float, float]]
    labelled: tuple[str, ...] = ()
    folds: int | None = None
    fold: int = 0
    share: dict[str, int] = field(default_factory=dict)


def read_split(path: Path, seal: Sealing | None = None) -> Split | None:
    """The split stored at `path`; None when there is none yet.

    Raises:
        DataError: the file is damaged or of another format.
        TrustError: `seal` cannot open it.
    """
    try:
        stored = json.loads(read_private(path, seal, path.name))
        if stored["format"] != FORMAT:
            raise DataError(
                f"{path}: format {stored['format']}; this Trunkline reads {FORMAT}. Update Trunkline to read it."
            )
        assignment = {str(group): str(part) for group, part in stored["assignment"].items()}
        if wrong := [part for part in assignment.values() if part not in PARTS]:
            raise ValueError(f"no part is called {wrong[0]!r}")
        if stored["by"] not in ("group", "time"):
            raise ValueError(f"cannot split by {stored['by']!r}")
        until = {str(group): (float(entry[0]), float(entry[1])) for group, entry in stored["until"].items()}
        shares = (float(stored["validation"]), float(stored["test"]))
        split = Split(
            stored["by"],
            int(stored["seed"]),
            *shares,
            assignment,
            until,
            tuple(str(entry) for entry in stored["labelled"]),
        )
        if "folds" not in stored:
            return split
        share = {str(group): int(fold) for group, fold in stored["share"].items()}
        split = replace(split, folds=int(stored["folds"]), fold=int(stored["fold"]), share=share)
        if any(fold not in range(int(stored["folds"])) for fold in (split.fold, *share.values())):
            raise ValueError(f"a share is none of 0 to {int(stored['folds']) - 1}")
        return split
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, StorageError) as error:
        raise DataError(
            f"{path}: damaged ({type(error).__name__}: {error}). Restore it from a backup, so that no test row is trained on. "
            + DELETE.format(path=path)
        ) from error


def write_split(path: Path, split: Split, seal: Sealing | None = None) -> None:
    """Store `split` where it differs from what is there; a crash leaves the old file or the new one."""
    table = asdict(split)
    if split.folds is None:
        table = {key: value for key, value in table.items() if key not in ("folds", "fold", "share")}
    data = json.dumps({"format": FORMAT, **table}, indent=1).encode()
    if not path.is_file() or read_private(path, seal, path.name) != data:
        write_private(path, data, seal, path.name, mode=0o644)


def divide(
    data: SplitInput,
    config: SplitConfig,
    by: Literal["group", "time"],
    test_apart: bool,
    stored: Split | None,
    path: Path,
    findings: Findings,
) -> tuple[Split, NDArray[np.int8]] | None:
    """The split, grown to the groups of `data`, and the part of each row; None (and a problem) where none is possible.

    Args:
        test_apart: the test rows come from `test_files`; these rows are for training and validation only.
        stored: what `path` holds; it wins over a changed `config`.
    """
    test = 0.0 if test_apart else 1.0 / config.folds if config.folds else config.test
    wanted = Split(by, config.seed, config.validation, test, {}, {}, folds=config.folds, fold=config.fold)
    if wanted.validation + wanted.test >= 1.0:
        findings.problem(
            "site.toml",
            f"`data.split`: validation {wanted.validation} + test {wanted.test} leave nothing to train on.",
            "Lower one of them.",
        )
        return None
    if stored is not None:
        if stored.by == "group" and not any(group in stored.assignment for group in data.names):
            findings.problem(
                str(path),
                f"knows none of the groups in the data, such as {data.names[0]!r}.",
                "Is `group` the same column as before? " + DELETE.format(path=path),
            )
            return None
        folded = stored.folds is not None or wanted.folds is not None
        for key in ("by", "seed", "validation", *(("folds", "fold") if folded else ("test",))):
            if (old := getattr(stored, key)) != (new := getattr(wanted, key)):
                findings.warn(
                    str(path),
                    f"was made with {key} = {old!r}; site.toml now says {new!r}. The stored split is kept.",
                    DELETE.format(path=path),
                )
    base = stored or wanted
    split: Split | None
    if base.by == "time":
        split = _by_time(data, base)
    elif base.folds is not None:
        split = _by_fold(data, base, base.folds, fresh=stored is None, findings=findings)
    else:
        split = _by_group(data, base, fresh=stored is None, findings=findings)
    if split is None:
        return None
    part = _parts(data, split)
    for code, name in enumerate(PARTS[: 2 if split.test == 0.0 else 3]):
        if not (part == code).any():
            findings.problem(
                str(path) if stored else "data",
                f"no row is left for {name}.",
                "The site has too few rows or groups. " + (DELETE.format(path=path) if stored else ""),
            )
            return None
    split = replace(split, labelled=_labelled(data, split, part, config.labelled_groups, findings))
    return split, part


def _ranked(names: tuple[str, ...], *seed: object) -> NDArray[np.intp]:
    """The groups in a seeded order in which each one's rank is its own: another group coming or going moves no other."""
    return np.argsort(np.array([seed_of(*seed, name) for name in names], dtype=np.int64), kind="stable")


def _by_group(data: SplitInput, base: Split, fresh: bool, findings: Findings) -> Split | None:
    groups = len(data.names)
    need = 3 if base.test > 0.0 else 2
    if groups < need and fresh:
        parts = "training, validation and test" if need == 3 else "training and validation"
        findings.problem(
            "data", f"{groups} group{'s' if groups != 1 else ''} ({', '.join(data.names)}) cannot be split into {parts}: it takes {need}.",
            '`by = "time"` under [data.split] splits each group along its order instead.',
        )  # fmt: skip
        return None
    if fresh:
        return replace(base, assignment=_first_assignment(data, base))
    assignment = dict(base.assignment)
    count = [sum(assignment.get(name) == part for name in data.names) for part in PARTS]
    share = [1.0 - base.validation - base.test, base.validation, base.test]
    for index in _ranked(data.names, base.seed, "split"):
        if (name := data.names[index]) not in assignment:
            total = sum(count) + 1
            part = int(np.argmax([share[code] * total - count[code] for code in range(3)]))
            assignment[name] = PARTS[part]
            count[part] += 1
    return replace(base, assignment=assignment)


def _by_fold(data: SplitInput, base: Split, folds: int, fresh: bool, findings: Findings) -> Split | None:
    ranked = _ranked(data.names, base.seed, "folds").tolist()
    share = assign_folds(data, ranked, folds, base.share)
    learning = [index for index in ranked if share[data.names[index]] != base.fold]
    if fresh and (len(data.names) < folds or len(learning) < 2):
        findings.problem(
            "data",
            f"{len(data.names)} group{'s' if len(data.names) != 1 else ''} cannot be dealt to `folds = {folds}`: "
            "each share needs a group, and two must be left to train and to validate.",
            "Lower `folds` under [data.split].",
        )
        return None
    wanted = [1.0 - base.validation - base.test, base.validation]
    assignment = dict(base.assignment)
    if fresh:
        # of the rest another such deal, so that validation looks like the whole too
        shares = min(max(2, round(sum(wanted) / base.validation)), len(learning))
        validation_folds = assign_folds(data, learning, shares, {})
        validate = min(range(shares), key=lambda fold: validation_cost(data, learning, validation_folds, fold))
        assignment = {data.names[index]: PARTS[TEST] for index in ranked if index not in learning}
        for name, fold in validation_folds.items():
            assignment[name] = PARTS[VALIDATION if fold == validate else TRAIN]
    count = [sum(assignment.get(name) == part for name in data.names) for part in PARTS[:TEST]]
    for name in [data.names[index] for index in ranked if data.names[index] not in assignment]:
        if share[name] == base.fold:
            assignment[name] = PARTS[TEST]
            continue
        part = int(
            np.argmax([wanted[code] / sum(wanted) * (sum(count) + 1) - count[code] for code in (TRAIN, VALIDATION)])
        )
        assignment[name] = PARTS[part]
        count[part] += 1
    return replace(base, assignment=assignment, share=share)


def _first_assignment(data: SplitInput, base: Split) -> dict[str, str]:
    """Shares of a seeded shuffle; of up to 20 shuffles the first in which the parts miss the fewest classes."""
    groups = len(data.names)
    validation = max(1, round(base.validation * groups))
    test = max(1, round(base.test * groups)) if base.test > 0.0 else 0
    while validation + test >= groups:  # three groups: one each
        validation, test = (validation - 1, test) if validation >= test else (validation, test - 1)
    best: tuple[int, dict[str, str]] | None = None
    for attempt in range(ATTEMPTS):
        ranks = _ranked(data.names, base.seed, "split", *([attempt] if attempt else []))
        pieces = (ranks[validation + test :], ranks[:validation], ranks[validation : validation + test])
        # a class no training group has cannot be learnt at all, so that counts more than one that cannot be scored
        missing = [int((~data.present[piece].any(axis=0)).sum()) if len(piece) else 0 for piece in pieces]
        cost = 100 * missing[TRAIN] + missing[VALIDATION] + missing[TEST]
        if best is None or cost < best[0]:
            best = (
                cost,
                {data.names[index]: PARTS[part] for part, piece in enumerate(pieces) for index in np.sort(piece)},
            )
        if cost == 0:
            break
    assert best is not None  # ATTEMPTS >= 1
    return best[1]


def _by_time(data: SplitInput, base: Split) -> Split:
    until = dict(base.until)
    starts = np.searchsorted(data.group, np.arange(len(data.names) + 1))
    for index, name in enumerate(data.names):
        if name in until:
            continue
        order = data.order[starts[index] : starts[index + 1]]
        training = max(1, round((1.0 - base.validation - base.test) * len(order)))
        ahead = max(training + 1, round((1.0 - base.test) * len(order)))
        last = len(order) - 1
        if base.test > 0.0 and last >= 2:  # a row of each, where there are three
            training, ahead = min(training, last - 1), min(ahead, last)
        until[name] = (float(order[min(training - 1, last)]), float(order[min(ahead - 1, last)]))
    return replace(base, until=until)


def _parts(data: SplitInput, split: Split) -> NDArray[np.int8]:
    if split.by == "group":
        return np.array([PARTS.index(split.assignment[name]) for name in data.names], dtype=np.int8)[data.group]
    boundary = np.array([split.until[name] for name in data.names])[data.group]  # (rows, 2)
    part = (data.order > boundary[:, 0]).astype(np.int8) + (data.order > boundary[:, 1])
    return np.minimum(part, TEST if split.test > 0.0 else VALIDATION).astype(np.int8)


def _labelled(
    data: SplitInput, split: Split, part: NDArray[np.int8], wanted: int | None, findings: Findings
) -> tuple[str, ...]:
    """The training groups that keep their labels: those stored first, then further ones in seeded order."""
    if wanted is None:
        return ()
    training = set(np.unique(data.group[part == TRAIN]).tolist())
    if wanted > len(training):
        findings.warn(
            "site.toml",
            f"`labelled_groups` = {wanted}, but the site has {len(training)} training groups; all keep their labels.",
        )
    code = {name: index for index, name in enumerate(data.names)}
    kept = [name for name in split.labelled if name in code]
    drawn: list[tuple[int, list[str]]] = []
    for attempt in range(1 if kept else ATTEMPTS):
        ranked = [
            index
            for index in _ranked(data.names, split.seed, "labelled", *([attempt] if attempt else []))
            if index in training
        ]
        chosen = (kept + [data.names[index] for index in ranked if data.names[index] not in kept])[:wanted]
        places = [code[name] for name in chosen]
        drawn.append((int((~data.present[places].any(axis=0)).sum()), chosen))
        if drawn[-1][0] == 0:
            break
    return tuple(min(drawn, key=lambda attempt_result: attempt_result[0])[1])


def describe(split: Split | None) -> dict[str, Any]:
    """The settings of a split for a person: by what, which shares, how many labelled groups."""
    if split is None:
        return {}
    return {
        "by": split.by,
        "seed": split.seed,
        "validation": split.validation,
        "test": split.test,
        "labelled": len(split.labelled) or None,
        **({} if split.folds is None else {"folds": split.folds, "fold": split.fold}),
    }
