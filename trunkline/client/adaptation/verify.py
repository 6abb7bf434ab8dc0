"""`trunkline trunk verify`: the card of a release for a person, and what vouches for it."""

from pathlib import Path

from cryptography import x509
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trunkline.client.state.identity import Identity
from trunkline.errors import ConfigError, TrustError
from trunkline.protocol.plan import TrunkSpec
from trunkline.release import Card, Figure, Lineage
from trunkline.security.keys import group_digits, read_certificate
from trunkline.security.signatures import Verdict

MOST = 40  # sites listed one by one
NAMES = {"validation_loss": "federated", "local_validation_loss": "alone"}


def authority_of(file: Path | None, site: Path | None) -> x509.Certificate | None:
    """The authority a release is checked against: of a file, or of the federation that the site of a folder has joined.

    Raises:
        TrustError: the file is no certificate, or the site has not joined.
        ConfigError: both were given.
    """
    if file is not None and site is not None:
        raise ConfigError("--authority and --site both say whose signature is expected; drop one of the two.")
    if file is not None:
        if not file.exists():
            raise TrustError(
                f"{file}: no such file. The server has it in its state folder, each of its plants under `identity`."
            )
        return read_certificate(file)
    if site is None:
        return None
    authority = Identity.of(site / ".trunkline").read_authority()
    if authority is None:
        raise TrustError(
            f"{site}: has not joined a federation (no {Identity.of(site / '.trunkline').authority}). Give --authority instead."
        )
    return authority


def render(card: Card, verdict: Verdict, console: Console) -> None:
    """Card and verdict, the verdict last, where the eye ends."""
    table = Table.grid(padding=(0, 2))
    for key, value in _facts(card, verdict):
        table.add_row(Text(key, "dim"), Text(_plain(value), overflow="fold"))
    console.print()
    console.print(Text(f"A trunk of run {_plain(card.run)}", "bold"))
    console.print(Padding(table, (0, 0, 1, 0)))
    if card.lineage is not None:
        console.print(Padding(_parts(card.lineage), (0, 0, 1, 0)))
    console.print(Text(_plain(verdict.line), "bold green" if verdict.right else "bold red"), soft_wrap=True)


def _facts(card: Card, verdict: Verdict) -> list[tuple[str, str]]:
    lineage = card.lineage
    facts = [
        ("key", card.key),
        ("strategy", f"{card.strategy}, seed {card.seed}"),
        ("trunk", _trunk(card.trunk)),
        ("lent", ", ".join(card.lend)),
    ]
    if card.tasks:
        facts.append(("heads", ", ".join(f"{entry.task} ({entry.kind})" for entry in card.tasks)))
    if lineage is None:
        facts += [("rounds", str(card.rounds)), ("sites", _some(card.sites)), ("Trunkline", ", ".join(card.versions))]
    else:
        sites = len({*card.sites})
        facts += [
            ("rounds", f"{lineage.rounds} done"),
            (
                "sites",
                f"{sites}, of which {sum(len(entry.sites) for entry in lineage.parts if entry.rounds == lineage.rounds)} in every round",
            ),
            ("server ran", ", ".join(f"{name} {version}" for name, version in lineage.versions.items())),
            ("speaks", f"protocol {lineage.protocol}, site.toml schema {lineage.site_schema}"),
            *_figures(lineage.figures),
            ("guards", "; ".join(_guard(entry.name, entry.parameters) for entry in lineage.guards) or "none"),
            ("privacy budget", _guard("", lineage.budget) or "none spent"),
            ("digest", lineage.digest),
            ("made", lineage.created),
        ]
    if verdict.signed_at:
        claimed = "" if verdict.right else " (its own words)"
        facts += [
            ("signed", f"{verdict.signed_at} for {verdict.federation or 'nobody'}{claimed}"),
            ("certificate", group_digits(verdict.signer)),
        ]
    else:
        facts.append(("signed", "no"))
    return facts


def _trunk(spec: TrunkSpec) -> str:
    width = f", width {spec.width}" if spec.width is not None else ""
    return f"{spec.backbone} {spec.size}{width}, norm {spec.norm}"


def _figures(figures: dict[str, Figure]) -> list[tuple[str, str]]:
    if not figures:
        return [("metrics", "none (fewer than three sites told any)")]
    return [
        (
            f"loss {NAMES.get(name, name)}",
            f"{figure.mean:.4g} (mean of {figure.sites} sites on validation rows, round {figure.round})",
        )
        for name, figure in figures.items()
    ]


def _guard(name: str, parameters: dict[str, bool | int | float | str] | dict[str, float | str]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in parameters.items())
    return f"{name} ({text})" if name and text else name or text


def _parts(lineage: Lineage) -> Table:
    parts = lineage.by_site()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("site")
    table.add_column("admitted", justify="right")
    table.add_column("contract")
    table.add_column("Trunkline")
    for site, part in list(parts.items())[:MOST]:
        cells = (site, f"{part.rounds} of {lineage.rounds}", part.contract[:16], part.version)
        table.add_row(*(Text(_plain(cell)) for cell in cells))
    if (hidden := len(parts) - MOST) > 0:
        table.add_row(Text(f"... and {hidden} further", "dim"))
    return table


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} further" if len(names) > MOST else "")


def _plain(text: str) -> str:
    """Without control characters: a card that nobody vouches for must not steer the reader's terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
