"""The contract of a run as it lies at the plant: what the run would take, and what was decided about it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from trunkline.errors import ContractError, StorageError
from trunkline.privacy.guards import words as guard_words
from trunkline.protocol.arrays import ArraySpec
from trunkline.protocol.contract import Contract, TaskCard, terms_digest
from trunkline.protocol.frozen import Frozen
from trunkline.protocol.messages import Inputs, OfferRequest, open_stored_terms
from trunkline.runtime.storage import read_private, write_private
from trunkline.security.encryption import Seal, find_seal

if TYPE_CHECKING:
    from rich.console import Console

HEADER_BYTES = 512  # at most, of an update's header: site, run, round, digest of the contract, weight
Verdict = Literal["accepted", "pending", "refused"]


class Consent(Frozen):
    """What a run would take from this site, and what was decided about it.

    Args:
        terms: what `RoundRequest.terms` gave at round 0.
        arrays, metrics: of every update; once: with the offer, and never again.
        inputs: names of the sensors, where the run needs them.
        report: whether results by task leave at the end.
        by: "policy", or the person who decided; empty while nobody has.
        why: of a refusal, in words.
        asked, decided: ISO 8601, UTC.
    """

    site: str
    run: str
    terms: dict[str, Any]
    arrays: tuple[ArraySpec, ...]
    once: tuple[ArraySpec, ...]
    metrics: tuple[str, ...]
    tasks: tuple[TaskCard, ...]
    inputs: Inputs | None
    report: bool
    verdict: Verdict
    by: str = ""
    why: str = ""
    asked: str = ""
    decided: str = ""

    @property
    def contract(self) -> Contract:
        return Contract(arrays=self.arrays, metrics=self.metrics)

    @property
    def digest(self) -> str:
        return terms_digest(self.terms)

    @property
    def request(self) -> OfferRequest:
        """The request of round 0."""
        return open_stored_terms(self.terms)

    @property
    def bytes_round(self) -> int:
        """At most, of what leaves in a round."""
        return bytes_round(self.arrays, self.metrics)

    def same_question(self, other: "Consent") -> bool:
        """Whether the same is asked for, whatever was decided."""
        answer = {"verdict", "by", "why", "asked", "decided"}
        return self.model_dump(exclude=answer) == other.model_dump(exclude=answer)


def bytes_round(arrays: tuple[ArraySpec, ...], metrics: tuple[str, ...]) -> int:
    return sum(spec.nbytes for spec in arrays) + 8 * len(metrics) + HEADER_BYTES


def read(state: Path, run: str, seal: Seal | None = None) -> Consent | None:
    """What is on disk of a run; None where nothing is.

    Raises:
        StorageError: the file is damaged. TrustError: it is sealed with another key, or plain where it should be sealed.
    """
    path = _path(state, run)
    try:
        data = read_private(path, seal or find_seal(state), _about(run))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        found = Consent.model_validate_json(data)
        found = found.model_copy(update={"terms": found.request.terms()})  # with today's names and defaults
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{path}: damaged ({type(error).__name__}). Remove it; the run asks anew when it is started again."
        ) from None
    if found.run != run:
        raise StorageError(
            f"{path}: is about run {found.run!r}. Remove it; the run asks anew when it is started again."
        )
    return found


def known(state: Path, run: str) -> Consent:
    """What is on disk of a run.

    Raises:
        ContractError: nothing is; the text lists what is there.
    """
    found = read(state, run)
    if found is None:
        others = ", ".join(one.run for one in every(state)) or "none"
        raise ContractError(f"{state / 'contracts'}: no contract of a run {run!r}. There are: {others}.")
    return found


def write(state: Path, consent: Consent) -> None:
    """Raises StorageError when it cannot be kept; what was there is intact."""
    data = consent.model_dump_json(indent=2).encode()
    write_private(_path(state, consent.run), data, find_seal(state), _about(consent.run))


def every(state: Path) -> Iterator[Consent]:
    """All contracts of a site, the latest asked first."""
    folder = state / "contracts"
    names_ = [path.stem for path in folder.glob("*.json")] if folder.is_dir() else []
    found = [one for name in names_ if (one := read(state, name)) is not None]
    yield from sorted(found, key=lambda one: one.asked, reverse=True)


def _path(state: Path, run: str) -> Path:
    if "/" in run or run.startswith("."):  # of a command line; a wire type has checked those that come over the wire
        raise ContractError(f"{run!r}: not the name of a run.")
    return state / _about(run)


def _about(run: str) -> str:
    """Its place below the state, which is what it is sealed as."""
    return f"contracts/{run}.json"


def in_bytes(count: int) -> str:
    """3.2 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def in_words(consent: Consent) -> list[tuple[str, str]]:
    """The contract as (what, in words), for a person at the plant."""
    request, about = consent.request, consent.request.about
    parts = {spec.name.split(".")[0]: 0 for spec in consent.arrays}
    for spec in consent.arrays:
        parts[spec.name.split(".")[0]] += spec.nbytes
    arrays = ", ".join(f"{part} {in_bytes(size)}" for part, size in parts.items()) or "none"
    plan = request.plan
    work = f"{plan.epochs:g} passes over the rows" if plan.epochs else f"{plan.steps} steps"
    words = [
        ("run", f"{consent.run} ({about.name or 'without a name'})"),
        ("operator", about.operator or "not said"),
        ("site", consent.site),
        ("strategy", f"{about.strategy or 'not said'}, trunk {request.trunk.backbone} ({request.trunk.size})"),
        ("rounds", f"{request.total_rounds}, in each {work} of up to {plan.batch_size} rows"),
        ("lends", ", ".join(request.lend) or "nothing"),
        ("a round takes", f"at most {in_bytes(consent.bytes_round)}: {len(consent.arrays)} arrays ({arrays})"),
        ("metrics", ", ".join(consent.metrics) or "none"),
        ("once", ", ".join(spec.name for spec in consent.once) or "nothing"),
        ("sensor names", ", ".join(consent.inputs.channels) if consent.inputs else "none"),
        ("guards", ", ".join(guard_words(about.guards)) or "none"),
        ("at the end", _cards(consent)),
        ("verdict", f"{consent.verdict}{f' by {consent.by}' if consent.by else ''}{f': {consent.why}' if consent.why else ''}"),
        ("asked", consent.asked),
        ("decided", consent.decided or "not yet"),
    ]  # fmt: skip
    return [(what, plain(text)) for what, text in words]


def _cards(consent: Consent) -> str:
    if not consent.report:
        return "no results leave"
    tasks = ", ".join(f"{card.task} ({card.metric})" for card in consent.tasks)
    return f"results by task on the test rows, and how many rows there are: {tasks}"


def plain(text: str) -> str:
    """`text` without what a terminal would obey: a server's words are shown, never followed."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def print_contract(consent: Consent, console: "Console") -> None:
    """One contract in words."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for what, text in in_words(consent):
        table.add_row(what, _text(text))
    console.print(table)


def print_contracts(found: list[Consent], console: "Console") -> None:
    """All contracts, a line each."""
    from rich.table import Table

    table = Table("run", "operator", "rounds", "a round", "verdict", "by", "asked")
    for one in found:
        request = one.request
        cells = (
            one.run,
            request.about.operator,
            str(request.total_rounds),
            in_bytes(one.bytes_round),
            one.verdict,
            one.by,
            one.asked,
        )
        table.add_row(*(_text(plain(cell)) for cell in cells))
    console.print(table if found else "No run has asked yet.")


def _text(text: str) -> Any:
    from rich.text import Text

    return Text(text)  # not a str: those are read for markup, and some of these words are the server's
