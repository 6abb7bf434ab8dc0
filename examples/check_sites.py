"""Check every site folder below a folder; the exit code is 1 if a site cannot train.

trunkline sites synthetic --out sites
python examples/check_sites.py sites
"""

import sys
from pathlib import Path

import trunkline as tl


def main(sites: Path) -> int:
    checks = [tl.check_site(path.parent) for path in sorted(sites.glob("*/site.toml"))]
    for check in checks:
        print(check)
        for channel in check.report["channels"]:
            if channel["missing"] > 0.2:
                print(f"  look at {channel['channel']}: {channel['missing']:.0%} of its rows are missing")
    return 0 if all(check.ok for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
