# Every target sets up .venv by itself with plain venv and pip; nothing else is needed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO ?= runs/demo
BENCH ?= runs/bench
DRILL ?= runs/drill
METHODS := infonce mgca prior mpma medslip place combination

.PHONY: help demo test checks bench bench-methods drill clean

help:
	@echo "make demo    phantom studies -> shards -> 2-rank ZeRO-2 pre-training -> evaluation, all in $(DEMO)"
	@echo "make test    every test"
	@echo "make checks  format, lint, types, import arrows, sizes, config reference"
	@echo "make bench   benchmarks: ratios against named rivals"
	@echo "make bench-methods  every method trained on the same phantoms with the same budget, evaluated, one table"
	@echo "make drill   kill, starve and damage runs; every one must come back as if nothing had happened"
	@echo "make clean   remove $(DEMO), $(BENCH) and $(DRILL)"

$(INSTALLED): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[cpu,dev]'
	touch $@

# Batch-norm statistics over all ranks are the default; on CPU they cost half the speed, which a demo has better use for.
demo: $(INSTALLED)
	$(BIN)/medvlp shards build phantom --out $(DEMO)/shards --studies 5000 --image-size 128 --seed 1 --workers 2
	$(BIN)/medvlp shards view $(DEMO)/shards --out $(DEMO)/samples.png
	$(BIN)/medvlp pretrain configs/demo.yaml data.root=$(DEMO)/shards run.dir=$(DEMO)/run method.batch_norm=local monitor.log_every=10 --nproc 2
	$(BIN)/medvlp evaluate $(DEMO)/run --data $(DEMO)/shards --task zero-shot --task retrieval --task linear-probe

# Files go to workers whole: their tests share pools of processes.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

checks: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_repository.py

bench: $(INSTALLED)
	for benchmark in tests/benchmarks/[a-z]*.py; do $(BIN)/python $$benchmark || exit 1; done

bench-methods: $(INSTALLED)
	$(BIN)/medvlp shards build phantom --out $(BENCH)/shards --studies 5000 --image-size 128 --seed 2 --workers 2
	for method in $(METHODS); do \
	  case $$method in mpma) encoder=vit_phantom;; *) encoder=resnet_phantom;; esac; \
	  $(BIN)/medvlp pretrain configs/benchmarks/phantom.yaml configs/models/$$encoder.yaml configs/benchmarks/$$method.yaml \
	    data.root=$(BENCH)/shards run.dir=$(BENCH)/$$method --nproc 2 && \
	  $(BIN)/medvlp evaluate $(BENCH)/$$method || exit 1; \
	done
	$(BIN)/medvlp compare $(METHODS:%=$(BENCH)/%) --markdown

drill: $(INSTALLED)
	$(BIN)/python -m tests.drills --out $(DRILL)

clean:
	rm -rf $(DEMO) $(BENCH) $(DRILL)
