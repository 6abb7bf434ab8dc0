# Each target makes its own .venv and installs with the exact pins of constraints.txt.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check bench chaos clean help

help:
	@echo "make demo   train 4 built-in factories and write the worth-it report to out/demo"
	@echo "make test   every check and every test"
	@echo "make check  lint, types, formatting"
	@echo "make chaos  30 runs of a real federation with faults drawn from a seed, then outages (an hour)"
	@echo "make bench  the measurements behind the claims (minutes)"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/trunkline sites synthetic --out out/demo-sites
	$(BIN)/trunkline simulate examples/demo.toml --sites out/demo-sites --out out/demo --overwrite

test: check
	$(BIN)/python -m pytest -n 2 --dist loadgroup

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
