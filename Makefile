# make bench: install, run the quick preset on the CPU, write the report. make test: install, run every test.
# TORCH_INDEX=URL asks another package index for PyTorch too, such as PyTorch's own index of CPU builds (see README).

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin

.PHONY: bench test lint clean

bench: .venv/installed
	$(BIN)/adphys run --preset quick
	$(BIN)/adphys report

test: .venv/installed-test lint
	$(BIN)/pytest -n auto

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable . --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]' --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	touch $@

clean:
	rm -rf .venv .cache reports/latest reports/html results/asv
