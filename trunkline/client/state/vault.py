"""What a site keeps of a run: stem, heads, the local baseline and its last answers, on the plant's disk before a reply leaves.

Flower's `Context.state` is memory and dies with its process, so nothing of value is put there.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline.errors import ForeignState, StorageError
from trunkline.protocol.arrays import Arrays
from trunkline.runtime.storage import Shelf, read_private, write_private
from trunkline.security.encryption import Seal

State = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Entry:
    """One round of one run at one site.

    Args:
        private: everything of the federated model that is not lent.
        local: the whole local baseline; empty when the run wants no baseline.
        best: who ("federated", "local") -> the whole model of the round with the lowest validation loss so far.
        best_loss: who -> that loss; best_round: who -> rounds behind it.
        personal: the whole personal model (Ditto), and balance: what balancing many losses remembers, who -> its numbers.
        delta: the answer that was sent, so that a repeated question gets the same bytes.
        question: digest of the order and the arrays that were answered.
    """

    question: str
    private: State
    local: State
    best: Mapping[str, State] = field(default_factory=dict)
    best_loss: Mapping[str, float] = field(default_factory=dict)
    best_round: Mapping[str, int] = field(default_factory=dict)
    personal: State = field(default_factory=dict)
    balance: Mapping[str, State] = field(default_factory=dict)
    delta: Arrays = field(default_factory=Arrays)
    metrics: Mapping[str, float] = field(default_factory=dict)
    weight: float = 0.0


@dataclass(frozen=True)
class Question:
    """What a site was asked in a round, as it came.

    Args:
        order: the RoundRequest, as JSON. arrays: what was lent to the site for the round.
        first: the site began with it, so nothing of an earlier round is needed to answer it again.
    """

    round: int
    request: str
    arrays: Arrays
    first: bool


class Vault:
    """The rounds of one run under `state`/vault/`run`, and the questions they answer; the last three are kept.

    Args:
        state: the site's own folder.
        run: key of the run, checked by the wire type to be a plain name.
        tell: called with a sentence when a damaged version is passed over.
        seal: of `state`, where it is sealed. A key that does not open what is there is refused (TrustError) whatever is
            asked: nothing starts afresh because of it.
        site: its name; what another site has put here is refused (ForeignState). "": whoever's it is.
    """

    def __init__(
        self,
        state: Path,
        run: str,
        tell: Callable[[str], None] = lambda text: None,
        seal: Seal | None = None,
        site: str = "",
    ) -> None:
        place = f"vault/{run}"
        self.shelf = Shelf(state / place, keep=3, tell=tell, seal=seal, place=place, kind="vault", owner=site)
        self._asked = Shelf(
            state / place / "asked", keep=3, tell=tell, seal=seal, place=f"{place}/asked", kind="question", owner=site
        )

    def put(self, round: int, entry: Entry) -> None:
        """Raises StorageError (a full disk, say); what was there stays, and no reply may leave."""
        tensors = {f"private/{name}": array for name, array in entry.private.items()}
        tensors |= {f"local/{name}": array for name, array in entry.local.items()}
        tensors |= {f"delta/{name}": array for name, array in entry.delta.items()}
        tensors |= {f"personal/{name}": array for name, array in entry.personal.items()}
        for who, state in entry.balance.items():
            tensors |= {f"balance-{who}/{name}": array for name, array in state.items()}
        for who, state in entry.best.items():
            tensors |= {f"best-{who}/{name}": array for name, array in state.items()}
        meta = {
            "question": entry.question,
            "metrics": dict(entry.metrics),
            "weight": entry.weight,
            "delta": list(entry.delta),
            "balance": list(entry.balance),
            "best_loss": dict(entry.best_loss),
            "best_round": dict(entry.best_round),
        }
        self.shelf.put(round, tensors, meta)

    def answered(self, round: int, question: str) -> Entry | None:
        """The entry of `round` if it answers exactly this question and is intact."""
        if round not in self.shelf.rounds():
            return None
        try:
            entry = self._entry(*self.shelf.get(round))
        except ForeignState:
            raise
        except StorageError as error:
            self.shelf.passed_over(round)
            self.shelf.tell(f"{error} Round {round} is trained again from the version before it.")
            return None
        return entry if entry.question == question else None

    def keep_question(self, round: int, request: str, arrays: Arrays, first: bool) -> None:
        """Before the answer, so that `round` can be answered again should its version be damaged. Raises StorageError."""
        self._asked.put(round, dict(arrays), {"order": request, "names": list(arrays), "first": first})

    def _question(self, round: int) -> Question | None:
        try:
            tensors, meta = self._asked.get(round)
        except StorageError:
            return None
        kept: Any = meta
        arrays = Arrays({name: np.asarray(tensors[name]) for name in kept["names"]})
        return Question(round, kept["order"], arrays, kept["first"])

    def before(
        self, round: int, passed: int = 0, again: Callable[[Question, Entry | None], Entry] | None = None
    ) -> Entry | None:
        """What `round` starts from: the newest intact version of an earlier round; None for a site that is new to the run.

        Args:
            passed: rounds that belong to the pass before: nothing starts from them.
            again: makes the version of a round anew of what was asked then and what it started from; called where the newest
                one is damaged. Nothing is stored: whoever is killed meanwhile finds all as it was. Without it, or where the
                question is damaged too, the version before is returned, and what was learnt in between is lost.

        Raises:
            StorageError: earlier versions are there but damaged, or only later ones are: training on would silently
                start stem and heads afresh.
        """
        kept = [one for one in self.shelf.rounds() if passed < one < round]
        if again is not None and kept:
            try:
                return self._entry(*self.shelf.get(kept[-1]))
            except ForeignState:
                raise
            except StorageError as error:
                asked = self._question(kept[-1])
                if asked is not None and (asked.first or len(kept) > 1):
                    self.shelf.tell(f"{error} Round {kept[-1]} is trained again from what was asked then.")
                    return again(asked, None if asked.first else self.before(kept[-1], passed, again))
        found = self.shelf.newest(below=round, above=passed)
        if found is not None:
            return self._entry(found[1], found[2])
        if later := [one for one in self.shelf.rounds() if one > round]:
            raise StorageError(
                f"{self.shelf.folder}: round {round} was asked, but only rounds {later[0]} and later are kept here. The server went back "
                "further than this site remembers; start the run anew under another --out."
            )
        return None

    def keep_decisions(self, question: str, decisions: Mapping[str, Any]) -> None:
        """What this site has chosen by its validation rows, for the second pass of a run that refits."""
        data = json.dumps({"question": question, **decisions}).encode()
        write_private(self._decisions, data, self.shelf.seal, self._about_decisions)

    def decisions(self, question: str | None = None) -> dict[str, Any] | None:
        """What `keep_decisions` was given last; None where nothing was, or (with `question`) to another question.

        Raises:
            StorageError: the file is there and cannot be read.
        """
        try:
            found = json.loads(read_private(self._decisions, self.shelf.seal, self._about_decisions))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{self._decisions}: damaged or unreadable ({type(error).__name__}: {error}). Restore a backup, or start the "
                "run anew under another --out."
            ) from None
        return dict(found) if question in (None, found.get("question")) else None

    @property
    def _decisions(self) -> Path:
        return self.shelf.folder / "decisions.json"

    @property
    def _about_decisions(self) -> str:
        return f"{self.shelf.place}/{self._decisions.name}"

    @staticmethod
    def _entry(tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> Entry:
        parts: dict[str, State] = {"private": {}, "local": {}, "delta": {}}
        for name, array in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = np.asarray(array)
        return Entry(
            question=meta["question"],
            private=parts["private"],
            local=parts["local"],
            best={who: parts[f"best-{who}"] for who in meta["best_loss"]},
            best_loss=meta["best_loss"],
            best_round=meta["best_round"],
            personal=parts.get("personal", {}),
            balance={who: parts[f"balance-{who}"] for who in meta.get("balance", [])},
            delta=Arrays({name: parts["delta"][name] for name in meta["delta"]}),
            metrics=meta["metrics"],
            weight=meta["weight"],
        )


def check_whose(state: Path, site: str, seal: Seal | None = None) -> None:
    """Raise ForeignState when what `state` keeps of any run is another site's."""
    for folder in sorted((state / "vault").glob("*")):
        Vault(state, folder.name, seal=seal, site=site).shelf.check()


def predictions_place(run: str, task: str, tasks: Sequence[str], *, sealed: bool) -> str:
    """Where the test predictions of a task lie below a state; a sealed one calls a task by its place in site.toml."""
    name = f"task-{tasks.index(task):02d}" if sealed else task
    return f"evaluation/{run}/{name}.safetensors"
