# `make demo` and `make test` do all set-up on a fresh machine: virtual environment, install, run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format bench teacher clean

demo: $(VENV)/.installed
	$(BIN)/bkprune analyze emoji --out demo
	$(BIN)/bkprune profile emoji --out demo --validate 20 --max-seconds 20
	$(BIN)/bkprune search emoji --out demo --budget 'latency<=0.6x' --trials 60
	$(BIN)/bkprune prune emoji --mask demo/winner.json --out demo/pruned
	$(BIN)/bkprune distill demo/pruned --teacher emoji --out demo/distillation --steps 150 \
		--batch-size 32 --lr 1e-3 --schedule cosine --preview-every 150 --preview-guidance 3
	@echo "The winner: demo/pruned/README.md. Its pictures, teacher, pruned and distilled:"
	@echo "demo/distillation/previews. Tables and figures: demo/*.csv, demo/figures."

# Two tests at a time, one thread each: twice as fast as one test with two threads.
test: $(VENV)/.installed-dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

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
	$(BIN)/python benchmarks/search.py --out build/search
	$(BIN)/python benchmarks/distill.py

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
