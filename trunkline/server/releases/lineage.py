"""What a run knows of its own making, as the card of its release says it: who was in how often, with what, and how it went."""

import importlib.metadata
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import trunkline
from trunkline.protocol.messages import Offer
from trunkline.release import FEWEST_SITES, Figure, Membership
from trunkline.server.reporting.records import RoundRecord

LOSSES = ("validation_loss", "local_validation_loss")
PACKAGES = ("torch", "numpy", "flwr")  # whose versions can change what a run makes


def parts_of(
    records: Sequence[RoundRecord], offers: Sequence[Offer], contracts: Mapping[str, str]
) -> tuple[Membership, ...]:
    """The sites by the part they had in the rounds; one that joined and was never admitted has 0."""
    admitted = Counter(site for record in records for site in record.sites)
    alike: dict[tuple[int, str, str], list[str]] = {}
    for offer in sorted(offers, key=lambda one: one.site):
        alike.setdefault((admitted[offer.site], contracts[offer.site], offer.version), []).append(offer.site)
    return tuple(
        Membership(sites=tuple(sites), rounds=rounds, contract=contract, version=version)
        for (rounds, contract, version), sites in alike.items()
    )


def figures_of(records: Sequence[RoundRecord]) -> dict[str, Figure]:
    """Loss -> its mean over the sites of the last round in which FEWEST_SITES of them told it; absent where none did.

    Each site counts once: a mean by weight could be nearly that of one large site.
    """
    figures = {}
    for name in LOSSES:
        for record in reversed(records):
            told = [metrics[name] for metrics in record.metrics.values() if math.isfinite(metrics.get(name, math.nan))]
            # divided before they are added: finite numbers of a hostile site could add up to infinity
            if len(told) >= FEWEST_SITES and math.isfinite(mean := sum(one / len(told) for one in told)):
                figures[name] = Figure(round=record.round, sites=len(told), mean=mean)
                break
    return figures


def versions() -> dict[str, str]:
    """Of what runs at the centre; nothing of it is imported for that."""
    return {"trunkline": trunkline.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
