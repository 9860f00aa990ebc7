# GNU make 3.81 or newer, a POSIX shell, Linux or macOS on Apple silicon. Start with `make help`.
.DEFAULT_GOAL := help
.PHONY: help setup reproduce results site record data bench figures gpu test coverage lint export new lock FORCE

## PAPER=slug          a folder of papers/, e.g. pc_darts; for reproduce also all, one after the other
## TIER=quick          quick (no data, no GPU, minutes), short (real data, one GPU) or full (the paper's protocol)
## CLAIM=id            only this claim of papers/<slug>/paper.yaml
## SEEDS="0 1 2"       instead of seed 0 alone
## DEVICE=auto         auto (CUDA if there is one), cpu or cuda
## RESUME=never        run again from the start what runs/ already holds
## DATA=data           where the datasets are or go; also the environment variable REPRO_DATA
## DATASET=name        which dataset to fetch
## RUN=runs/...        which run to record; "runs/pc_darts/*-quick-s*" for several
## DEST=dir            where the exported folder goes
## BUDGET=25           minutes that make gpu may take
## OUT=dir             where make site puts the page, and make gpu a copy of each record as well
## PYTHON=python3      run on this interpreter as it is, without .venv and without installing anything
## TORCH_BACKEND=cpu   other builds of torch in .venv: cpu (small), auto, cu130, ...; locked goes back to the default
TIER ?= quick
DEVICE ?= auto
BUDGET ?= 25
override DATA := $(patsubst ~/%,$(HOME)/%,$(DATA))
override DEST := $(patsubst ~/%,$(HOME)/%,$(DEST))
override OUT := $(patsubst ~/%,$(HOME)/%,$(OUT))
ifneq ($(DATA),)
export REPRO_DATA := $(DATA)
endif

ifneq ($(PYTHON),)
PY := $(PYTHON)
READY :=
else
PY := .venv/bin/python
READY := .venv/.ready
endif

# What a target needs is checked before anything is installed. $(call need,target,VARIABLE,example value)
need = $(if $(strip $($2)),,$(error $2 is missing; for example: make $1 $2=$3))
papers := $(patsubst papers/%/__init__.py,%,$(wildcard papers/*/__init__.py))
paper = $(call need,$1,PAPER,pc_darts)$(if $(wildcard papers/$(PAPER)/$2),,\
  $(error there is no papers/$(PAPER)/$2; the papers: $(papers)))
asked = $(filter $1,$(MAKECMDGOALS))
$(if $(call asked,reproduce),$(if $(filter all,$(PAPER)),,$(call paper,reproduce,paper.yaml)))
$(if $(call asked,figures),$(call paper,figures,figures.py))
$(if $(call asked,export),$(call paper,export,__init__.py)$(call need,export PAPER=$(PAPER),DEST,~/my_project))
$(if $(call asked,new),$(call need,new,PAPER,my_paper))
$(if $(call asked,site),$(call need,site,OUT,site))
$(if $(call asked,data),$(call need,data,DATASET,cifar10))
$(if $(call asked,record),$(call need,record,RUN,runs/pc_darts/c10-short-s0))
$(if $(and $(call asked,bench),$(PAPER)),$(call paper,bench,bench.py))

help:  ## this text
	@echo "Targets (each installs what it needs the first time)"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo "Variables"
	@awk '/^## / { print "  " substr($$0, 4) }' Makefile

setup: $(READY)  ## create .venv and install the locked requirements

reproduce: $(READY)  ## PAPER= [TIER= CLAIM= SEEDS= DEVICE= RESUME= DATA=]: run claims; ends in reported against reproduced
	@$(PY) -m common.results.$(if $(filter all,$(PAPER)),reproduce_all,reproduce --paper $(PAPER)) \
	  --tier $(TIER) $(if $(CLAIM),--claim $(CLAIM)) $(if $(SEEDS),--seeds "$(SEEDS)") --device $(DEVICE) \
	  $(if $(RESUME),--resume $(RESUME)) $(if $(DATA),--data "$(DATA)")

results: $(READY)  ## compute the verdicts and write all generated tables
	@$(PY) -m common.results

site: $(READY)  ## OUT=: write claims, verdicts, records and figures as a static web page
	@$(PY) -m common.results.site --out "$(OUT)"

record: $(READY)  ## RUN=: promote a run's record to evidence in its paper's results/
	@$(PY) -m common.results.record $(RUN)

data: $(READY)  ## DATASET= [DATA=]: fetch or find, verify and convert a dataset
	@$(PY) -m common.datasets $(DATASET) $(if $(DATA),--root "$(DATA)")

bench: $(READY)  ## [PAPER= DEVICE=]: speed of a paper's method and kernels; without PAPER, of data loading
	@$(PY) -m $(if $(PAPER),papers.$(PAPER).bench --device $(DEVICE),common.datasets.bench)

figures: $(READY)  ## PAPER=: draw the figures of a paper
	@$(PY) -m papers.$(PAPER).figures

gpu: $(READY)  ## [BUDGET= DATA= OUT=]: on a CUDA machine, the steps of papers/gpu.yaml that fit into BUDGET minutes
	@$(PY) -m common.results.gpu --budget "$(BUDGET)" $(if $(DATA),--data "$(DATA)") $(if $(OUT),--out "$(OUT)")

test: $(READY)  ## the fast test suite (pytest -m slow trains for minutes)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

coverage: $(READY)  ## lines of common/ that its tests do not reach
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m "not slow and not gpu" --cov --cov-report=term-missing tests/common tests/test_house.py

lint: $(READY)  ## ruff check and ruff format --check
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

export: $(READY)  ## PAPER= DEST=: copy a paper's folder and the part of common it uses
	@$(PY) -m common.results.export --paper $(PAPER) --dest "$(DEST)"

new: $(READY)  ## PAPER=: start the folder of a new paper
	@$(PY) -m common.results.new $(PAPER)

lock:  ## recompile requirements.txt from pyproject.toml (needs uv)
	@PATH="$$PATH:.venv/bin"; command -v uv >/dev/null || { echo "make lock: needs uv; install it" >&2; exit 2; }; \
	uv pip compile pyproject.toml --extra dev --universal --generate-hashes --python-version 3.11 \
	  --no-annotate --no-header --quiet -o requirements.txt

# The stamp holds the torch backend. Without one, or with a dead interpreter (say, after a system upgrade), or when
# another backend is asked for: set up again.
recorded := $(shell test -x .venv/bin/python && cat .venv/.ready 2>/dev/null)
.venv/.ready: requirements.txt $(if $(filter $(recorded),$(or $(TORCH_BACKEND),$(recorded))),,FORCE)
	@TORCH_BACKEND="$(TORCH_BACKEND)" .ci/bootstrap
