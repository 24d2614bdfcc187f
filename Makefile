# `make demo` and `make test` do all set-up on a fresh machine: virtual environment, install, run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format bench teacher clean

demo: $(VENV)/.installed
	$(BIN)/bkprune analyze emoji --out demo
	$(BIN)/bkprune profile emoji --out demo --validate 20 --max-seconds 20
	@echo "Look at demo/figures (u_output.png, u_cost.png, importance_cost.png), demo/importance.csv"
	@echo "and demo/cost.csv"

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/latency_methods.py

# Hours on two cores; every stage resumes where it stopped.
teacher: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --constraint constraints.txt -e '.[recipe]'
	cd studies/emoji-teacher && for stage in dataset autoencoder clip unet package report; do \
		../../$(BIN)/python $$stage.py || exit 1; done

clean:
	rm -rf $(VENV) demo build *.egg-info

# torch is named with its exact version first: a looser range may bring a CUDA build of gigabytes.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt -e '.[dev]'
	touch $@
