# Each target sets itself up in a virtual environment of its own: nothing but Python 3.11+ is needed (and a C++ compiler for .pt2).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check docs bench clean

demo: $(VENV)/demo.stamp          ## the main job on built-in data: train, pack, verify, relax + MD, report
	$(BIN)/carryall demo

test: $(VENV)/dev.stamp           ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/dev.stamp          ## lint, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/docs.stamp          ## the documentation as a site, in site/
	$(BIN)/mkdocs build --strict

bench: $(VENV)/dev.stamp         ## benchmark tables, see benchmarks/; PEER, NVALCHEMI, TORCHSIM, LAMMPS: pythons of environments with these compare with them
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/dpa1.py $(if $(PEER),--peer $(PEER))
	$(BIN)/python benchmarks/package.py $(if $(PEER),--peer $(PEER))
	$(BIN)/python benchmarks/dynamics.py $(if $(NVALCHEMI),--nvalchemi $(NVALCHEMI)) $(if $(TORCHSIM),--torchsim $(TORCHSIM)) $(if $(LAMMPS),--lammps $(LAMMPS))
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/exchange.py
	$(BIN)/python benchmarks/lammps.py $(if $(PEER),--deepmd $(PEER))

clean:
	rm -rf $(VENV) build dist site demo

# torch first: a package that depends on torch without bounds would otherwise bring a newer one
$(VENV)/torch.stamp: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "carryall needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "torch>=2.11,<2.14"
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp
	$(BIN)/python -m pip install -q -e ".[demo]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp
	$(BIN)/python -m pip install -q -e ".[dev]"
	$(BIN)/python -m pip install -q -e plugin --no-deps
	touch $@

$(VENV)/docs.stamp: $(VENV)/torch.stamp
	$(BIN)/python -m pip install -q -e ".[docs]"
	touch $@
