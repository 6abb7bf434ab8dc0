"""The release of a run: the trunk of all sites, and one for each cohort of a clustered strategy."""

from pathlib import Path

from trunkline.privacy.guards import guards_of
from trunkline.protocol.arrays import Arrays
from trunkline.release import COHORT_RELEASE, RELEASE, Figure, GuardUsed
from trunkline.security.signatures import Sign
from trunkline.server.releases.lineage import figures_of, parts_of
from trunkline.server.releases.release import release
from trunkline.server.rounds.cohort import Member
from trunkline.server.rounds.context import RunContext
from trunkline.server.rounds.round import sites_by_cohort
from trunkline.strategies import StrategyState


def publish(context: RunContext, out: Path, state: StrategyState, sign: Sign | None) -> None:
    """Write the trunk of all sites to `out`, and each cohort's with the statistics and parts of its own sites."""
    requests, members = context.requests, context.cohort.members
    run = context.config.model_copy(update={"trunk": requests.trunk})
    guards = tuple(
        GuardUsed(name=guard.NAME, parameters=guard.parameters()) for guard in guards_of(context.config.guards)
    )

    def write(trunk: Arrays, sites: list[Member], file: str, figures: dict[str, Figure]) -> None:
        contracts = {member.site: member.digest for member in sites}
        release(
            out, trunk, run, requests.key, requests.lend, [(member.offer, member.once) for member in sites], file,
            rounds=state.round, parts=parts_of(context.records, [member.offer for member in sites], contracts),
            figures=figures, guards=guards, sign=sign,
        )  # fmt: skip

    # figures go with this one only: a cohort's mean beside that of all sites would reveal the difference, which may be one site
    write(state.trunk, [member for _, member in sorted(members.items())], RELEASE, figures_of(context.records))
    for cohort, sites in sites_by_cohort(state.notes.get("cohorts", {})):
        present = [members[site] for site in sites if site in members]
        trunk = context.strategy.serve(state, sites[0]).only({name for member in present for name in member.lends})
        write(trunk, present, COHORT_RELEASE.format(cohort), {})
