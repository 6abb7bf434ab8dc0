# Each target makes its own .venv and installs with the exact pins of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all slow coverage check bench chaos clean help

help:
	@echo "make demo      train 4 built-in factories and write the worth-it report to out/demo"
	@echo "make test      every check, and every test but the long process tests (under 8 minutes)"
	@echo "make test-all  the same, then the long process tests and the coverage gate (under 25 minutes)"
	@echo "make check     lint, types, formatting"
	@echo "make chaos     30 runs of a real federation with faults drawn from a seed, then outages (an hour)"
	@echo "make bench     the measurements behind the claims (minutes)"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/trunkline sites synthetic --out out/demo-sites
	$(BIN)/trunkline simulate examples/demo.toml --sites out/demo-sites --out out/demo --overwrite

# three workers on two cores: tests of processes wait more than they compute
test: check
	$(BIN)/python -m pytest -n 3 --dist loadgroup -m "not slow"

test-all: test slow coverage

slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

# Branch coverage of the small pure packages, each held to 95 % by the tests of its own room and of its neighbours
GATED := protocol strategies security client/policy client/data
coverage: $(READY)
	COVERAGE_FILE=.coverage $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not processes" --cov --cov-report= \
	  tests/protocol tests/config tests/strategies tests/security tests/client/policy tests/client/data tests/client/state \
	  tests/server/membership tests/server/rounds tests/server/releases tests/formats
	for room in $(GATED); do \
	  $(BIN)/python -m coverage report --fail-under=95 --skip-covered --include="trunkline/$$room/*" || exit 1; done

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# DATA=DIR adds the real data sets
bench: $(READY)
	$(BIN)/python benchmarks/exchange.py
	$(BIN)/python benchmarks/simulate.py
	$(BIN)/python benchmarks/commands.py
	if [ -n "$(DATA)" ]; then $(BIN)/python benchmarks/cmapss.py --data "$(DATA)"; fi

chaos: $(READY)
	$(BIN)/python -m tests.chaos.drill --runs 30 --seed 0
	$(BIN)/python -m tests.chaos.drill --outages

clean:
	rm -rf $(VENV) out build *.egg-info
