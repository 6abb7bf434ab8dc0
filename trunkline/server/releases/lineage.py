"""The lineage of a release: participation of the sites, losses, and versions of the software."""

import importlib.metadata
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import trunkline
from trunkline.protocol.messages import Offer
from trunkline.release import FEWEST_SITES, Figure, Participation
from trunkline.server.reporting.records import RoundRecord

LOSSES = ("validation_loss", "local_validation_loss")
PACKAGES = ("torch", "numpy", "flwr")  # whose versions can change what a run makes


def parts_of(
    records: Sequence[RoundRecord], offers: Sequence[Offer], contracts: Mapping[str, str]
) -> tuple[Participation, ...]:
    """The participation of the sites; a site that joined and never had an update admitted has 0 rounds."""
    admitted = Counter(site for record in records for site in record.sites)
    alike: dict[tuple[int, str, str], list[str]] = {}
    for offer in sorted(offers, key=lambda offer: offer.site):
        alike.setdefault((admitted[offer.site], contracts[offer.site], offer.version), []).append(offer.site)
    return tuple(
        Participation(sites=tuple(sites), rounds=rounds, contract=contract, version=version)
        for (rounds, contract, version), sites in alike.items()
    )


def figures_of(records: Sequence[RoundRecord]) -> dict[str, Figure]:
    """Loss -> its mean over the sites in the last round with at least FEWEST_SITES reports; absent without such a round.

    Each site counts once: a weighted mean could be close to the value of one large site.
    """
    figures = {}
    for name in LOSSES:
        for record in reversed(records):
            values = [
                metrics[name] for metrics in record.metrics.values() if math.isfinite(metrics.get(name, math.nan))
            ]
            # divided before they are added: large values of a hostile site could overflow the sum
            if len(values) >= FEWEST_SITES and math.isfinite(mean := sum(value / len(values) for value in values)):
                figures[name] = Figure(round=record.round, sites=len(values), mean=mean)
                break
    return figures


def versions() -> dict[str, str]:
    """Versions of Trunkline and its main packages at the server, read without importing them."""
    return {"trunkline": trunkline.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}
