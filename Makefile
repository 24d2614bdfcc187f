# `make demo` and `make test` do all set-up on a fresh machine: virtual environment, install, run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format docs bench teacher clean

demo: $(VENV)/.installed
	$(BIN)/bkprune run studies/emoji --out demo
	@echo "Everything on one page: $$(pwd)/demo/report.html"

# Two tests at a time, one thread each: twice as fast as one test with two threads.
test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=10

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every command of the README and the docs, on the built-in model: about a quarter of an hour.
docs: $(VENV)/.installed-dev
	$(BIN)/python -m tests.run_docs

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/latency_methods.py
	$(BIN)/python benchmarks/search.py --out build/search
	$(BIN)/python benchmarks/distill.py
	$(BIN)/python benchmarks/evaluate.py
	$(BIN)/python benchmarks/race.py

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
