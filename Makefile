# Every target sets up .venv by itself with plain venv and pip; nothing else is needed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO ?= runs/demo
BENCH ?= runs/bench
DRILL ?= runs/drill
GPU ?= runs/gpu
METHODS := infonce mgca prior mpma medslip place combination
PROTOTYPES := none learned clusters masks
SEEDS ?= 0

.PHONY: help demo test test-floor checks bench bench-methods bench-mpma bench-tasks bench-prototypes bench-shards drill gpu gpu-prepare clean

help:
	@echo "make demo    phantom studies -> shards -> 2-rank ZeRO-2 pre-training -> evaluation -> page, all in $(DEMO)"
	@echo "make test    every test; WORKERS=2: so many at a time"
	@echo "make test-floor  the tests that tell torches apart, on the lowest torch that pyproject.toml allows; in .floor"
	@echo "make checks  format, lint, types, import arrows, sizes, config reference"
	@echo "make bench   benchmarks: ratios against named rivals"
	@echo "make bench-methods  every method beside its ablation: the same phantoms, budget and seeds, and the differences"
	@echo "make bench-mpma  MPMA and its ablations, trained until it reads hidden words"
	@echo "make bench-tasks  every downstream task on a network of each method, one table"
	@echo "make bench-prototypes  MGCA without prototypes, with learned ones, with clusters, with masks; one table"
	@echo "make drill   kill, starve and damage runs; every one must come back as if nothing had happened"
	@echo "make gpu     checks (300 s) and figures (200 s) of a GPU machine into $(GPU); DRY=1: at toy size on the CPU"
	@echo "make gpu-prepare  gather in .gpu what make gpu needs on a machine without a network (tests/cuda/README.md)"
	@echo "make clean   remove $(DEMO), $(BENCH) and $(DRILL)"

$(INSTALLED): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[cpu,dicom,evaluate,dev]'
	touch $@

# Batch-norm statistics over all ranks are the default; on CPU they cost half the speed, which a demo has better use for.
demo: $(INSTALLED)
	$(BIN)/medvlp shards build phantom --out $(DEMO)/shards --studies 4000 --image-size 128 --seed 1 --workers 2
	$(BIN)/medvlp shards view $(DEMO)/shards --out $(DEMO)/samples.png
	$(BIN)/medvlp pretrain configs/demo.yaml data.root=$(DEMO)/shards run.dir=$(DEMO)/run method.batch_norm=local monitor.log_every=10 --nproc 2
	$(BIN)/medvlp evaluate $(DEMO)/run --data $(DEMO)/shards --task zero-shot --task retrieval --task linear-probe
	$(BIN)/medvlp prototypes build $(DEMO)/run --split test
	$(BIN)/medvlp report $(DEMO)/run --out $(DEMO)/report.html

# Tests that wait for processes and clocks leave a core free: one worker more than there are cores, at most 4.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores < 3 ? cores + 1 : 4)))
# Files go to workers whole, in the order of tests/conftest.py: their tests share pools of processes. The tests that need a Slurm share one cluster of
# several nodes, so they come after the others and one by one.
test: $(INSTALLED)
	status=0; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slurm" || status=1; \
	$(BIN)/python -m pytest -m slurm || status=1; \
	exit $$status

# The lowest torch that pyproject.toml allows, in an environment of its own (6 GB), and the tests that tell torches apart.
FLOOR ?= .floor
LOWEST = $(shell sed -nE 's/^ *"(torch|torchvision)>=([0-9.]+)",.*/\1==\2/p' pyproject.toml)
FLOOR_TESTS ?= tests/test_distributed.py tests/losses tests/methods tests/encoders tests/prototypes $(addprefix tests/training/test_, \
  engine.py hangs.py resume.py checkpoint_elastic.py zero_agreement.py phases.py loss_scale.py bad_steps.py)
test-floor: $(FLOOR)/.installed
	$(FLOOR)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slurm" $(FLOOR_TESTS)

$(FLOOR)/.installed: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(FLOOR)
	grep -vE '^(torch|torchvision|sympy)==' .ci/constraints.txt >$(FLOOR)/constraints.txt
	$(FLOOR)/bin/pip install --quiet --disable-pip-version-check --constraint $(FLOOR)/constraints.txt --editable '.[cpu,dev]' $(LOWEST)
	touch $@

checks: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_repository.py

bench: $(INSTALLED)
	status=0; \
	for benchmark in tests/benchmarks/[a-z]*.py; do $(BIN)/python $$benchmark || { echo "failed or below its goal: $$benchmark"; status=1; }; done; \
	exit $$status

# Every method of COMPARED and its ablation, for each of SEEDS (SEEDS="0 1 2"). Two runs at a time, one thread each; finished
# trainings and evaluations are kept, so it goes on where it was stopped. $(OPTIONS) go over the configs. MPMA needs patches
# that it can hide. The combination has MGCA's ablation: its own would be the same, bit for bit.
COMPARED := mgca prior mpma medslip place combination
RUNS = $(BENCH)/methods
ENCODER = $(if $(filter mpma,$(method)),hybrid_phantom,resnet_phantom)
ABLATIONS = $(patsubst combination,mgca,$(COMPARED))
with = $(foreach seed,$(SEEDS),$(COMPARED:%=%-$(seed)))
without = $(foreach seed,$(SEEDS),$(ABLATIONS:%=%-ablation-$(seed)))
bench-methods: $(INSTALLED) bench-shards
	$(MAKE) --no-print-directory -j 2 $(addprefix bench-methods-,$(sort $(with) $(without)))
	$(BIN)/medvlp compare $(addprefix $(RUNS)/,$(with)) \
	  $(addprefix --against $(RUNS)/,$(without)) --markdown
	$(BIN)/python tests/benchmarks/studies/cluster_quality.py \
	  $(foreach seed,$(SEEDS),$(RUNS)/mgca-$(seed) $(RUNS)/mgca-ablation-$(seed))

# MPMA and what is left of it without one of its parts, trained until it reads hidden words.
PARTS := mpma-ablation mpma-no-alignment mpma-no-memory mpma-separate
bench-mpma: RUNS = $(BENCH)/mpma
bench-mpma: $(INSTALLED) bench-shards
	$(MAKE) --no-print-directory -j 2 RUNS=$(RUNS) \
	  OPTIONS="train.steps=1600 optimizer.text_lr_scale=1 $(OPTIONS)" \
	  $(foreach seed,$(SEEDS),$(patsubst %,bench-methods-%-$(seed),mpma $(PARTS)))
	for part in $(PARTS); do $(BIN)/medvlp compare $(SEEDS:%=$(RUNS)/mpma-%) \
	  $(foreach seed,$(SEEDS),--against $(RUNS)/$$part-$(seed)) --markdown || exit 1; done

bench-shards: $(INSTALLED)
	test -e $(BENCH)/shards/index.json || \
	  $(BIN)/medvlp shards build phantom --out $(BENCH)/shards --studies 5000 --image-size 128 --seed 2 --workers 2

# $* is METHOD-SEED or METHOD-PART-SEED.
bench-methods-%: export OMP_NUM_THREADS = 1
bench-methods-%: method = $(firstword $(subst -, ,$*))
bench-methods-%: seed = $(lastword $(subst -, ,$*))
bench-methods-%: kind = $(patsubst %-$(seed),%,$*)
bench-methods-%:
	$(BIN)/medvlp pretrain configs/benchmarks/phantom.yaml configs/benchmarks/methods.yaml configs/models/$(ENCODER).yaml \
	  configs/benchmarks/$(method).yaml $(wildcard configs/benchmarks/$(method)-compared.yaml) \
	  $(if $(filter-out $(method),$(kind)),configs/benchmarks/$(kind).yaml) \
	  data.root=$(BENCH)/shards run.dir=$(RUNS)/$* train.seed=$(seed) $(OPTIONS) --nproc 1
	$(BIN)/medvlp evaluate $(RUNS)/$*

# Every downstream task on a network of each method, pre-trained where it is not there. Two trainings at a time, one thread
# each (configs/benchmarks/tasks.yaml says how heads are trained); finished units are kept, so a second call goes on.
# TASKS="segmentation detection" METHODS="mgca place" choose; STEPS=50 is another length of each training.
TASKS := zero-shot retrieval masked-words linear-probe fine-tuning grounding segmentation detection report vqa
TRAINED := fine-tuning segmentation detection report vqa
TASK_METHODS = $(filter-out infonce combination,$(METHODS))
SHORT = $(if $(STEPS),$(TRAINED:%=evaluation.tasks.%.training.train.min_steps=$(STEPS)))
# First what takes long, each by itself; the last call does the rest and writes all of a method into one file.
TASKS_ALONE = $(foreach task,$(filter $(TRAINED),$(TASKS)),$(TASK_METHODS:%=bench-task-%@$(task)))
bench-tasks: $(INSTALLED) bench-shards
	for kind in "$(TASK_METHODS:%=bench-network-%)" "$(TASKS_ALONE)" "$(TASK_METHODS:%=bench-tasks-%)"; do \
	  test -z "$$kind" || $(MAKE) --no-print-directory -j 2 $$kind || exit 1; done
	$(BIN)/medvlp compare $(TASK_METHODS:%=$(BENCH)/%/tasks.json) --markdown

bench-network-% bench-task-% bench-tasks-%: export OMP_NUM_THREADS = 1
bench-network-%:
	$(BIN)/medvlp pretrain configs/benchmarks/phantom.yaml configs/models/$(if $(filter mpma,$*),vit,resnet)_phantom.yaml \
	  configs/benchmarks/$*.yaml configs/benchmarks/tasks.yaml data.root=$(BENCH)/shards run.dir=$(BENCH)/$* --nproc 1

bench-task-%:
	$(BIN)/medvlp evaluate $(BENCH)/$(firstword $(subst @, ,$*)) --task $(lastword $(subst @, ,$*)) $(SHORT) --nproc 1 \
	  --out $(BENCH)/$(subst @,/tasks-,$*).json

bench-tasks-%:
	$(BIN)/medvlp evaluate $(BENCH)/$* $(TASKS:%=--task %) $(SHORT) --nproc 1 --out $(BENCH)/$*/tasks.json

# SEEDS="0 1 2" trains every kind three times; $(OPTIONS) go over the configs, for instance OPTIONS=train.steps=60.
STUDY = $(foreach seed,$(SEEDS),$(PROTOTYPES:%=$(BENCH)/prototypes-%-$(seed)))
bench-prototypes: $(INSTALLED) bench-shards
	for seed in $(SEEDS); do for kind in $(PROTOTYPES); do \
	  run=prototypes-$$kind-$$seed; \
	  $(BIN)/medvlp pretrain configs/benchmarks/phantom.yaml configs/models/resnet_phantom.yaml configs/benchmarks/mgca.yaml \
	    configs/benchmarks/prototypes-$$kind.yaml data.root=$(BENCH)/shards run.dir=$(BENCH)/$$run run.name=$$run \
	    train.seed=$$seed $(OPTIONS) --nproc 2 && \
	  $(BIN)/medvlp evaluate $(BENCH)/$$run --task zero-shot || exit 1; \
	done; done
	$(BIN)/medvlp compare $(STUDY) --markdown
	$(BIN)/python tests/benchmarks/studies/cluster_quality.py $(STUDY)

drill: $(INSTALLED)
	$(BIN)/python -m tests.drills --out $(DRILL)

# Needs no .venv where .gpu/wheels is: such a machine has a torch of its own.
gpu:
	tests/cuda/run $(GPU) $(if $(DRY),--dry)

gpu-prepare: $(INSTALLED)
	$(BIN)/python -m tests.cuda.prepare

clean:
	rm -rf $(DEMO) $(BENCH) $(DRILL)
