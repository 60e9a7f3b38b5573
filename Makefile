# make report GPU=h100 · make explore · make test · make help
# Works with GNU make 3.81, which macOS ships.

override GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))

# What the environment or a command line calls as something here is called doesn't count, with `make -e` neither.
override MAKEOVERRIDES :=
override VPATH :=
override GPATH :=
override v :=
override GOALS := $(value MAKECMDGOALS)

GPU ?= cpu
BASE_PYTHON ?= python3
override GPUS := $(sort $(filter-out base,$(basename $(notdir $(wildcard params/*.yaml)))))

# A variable that nothing here reads is a misspelled one. (UV_TORCH_BACKEND, HF_HOME and the like are the tools'.)
override TAKEN := GPU ONLY FORCE THOROUGH REPLAY LAUNCH SLURM_OPTIONS MODEL SIZE TOKENS STEPS HOST PYTHON BASE_PYTHON ARGS PRICES UPGRADE
override STRANGE := $(filter-out $(TAKEN) SHELL PIP_% UV_% HF_% CUDA_% FLUXNB_% TORCH% TRITON% OMP_% PYTHON%,$(GIVEN))
ifneq ($(STRANGE),)
$(error $(firstword $(STRANGE))= is no variable of this Makefile: choose from $(TAKEN))
endif

# HOST= of the command line only: some shells have a variable of that name.
ifneq ($(origin HOST),command line)
override HOST :=
endif

# What is given is text: neither make nor a shell looks for commands in it. (A line of a recipe is one line.)
override define NEWLINE


endef
$(foreach v,$(TAKEN) FLUXNB_MODEL FLUXNB_THOROUGH $(filter-out MAKEFLAGS MAKEOVERRIDES,$(GIVEN)),$(eval override $v := $$(value $v)))
$(foreach v,$(filter-out HOST PYTHON MAKE%,$(GIVEN)) ARGS SLURM_OPTIONS,$(eval export $v))
$(foreach v,$(TAKEN),$(if $(findstring $(NEWLINE),$($v)),$(error $v= has several lines: give it one)))
override quoted = '$(subst ','\'',$1)'

# With PYTHON=… everything runs on that interpreter as it is; otherwise on .venv, made from the lock file.
ifneq ($(strip $(PYTHON)),)
override PY := $(call quoted,$(PYTHON))
override READY :=
else
override PY := .venv/bin/python
override READY := .venv/.ready
endif

# Says in a sentence what a target's tools lack, or runs what follows, with ARGS.
override FIT = @$(PY) -m fluxnb.report.preflight $@

# Notebooks and their kernels import fluxnb from here, whatever the interpreter has installed.
export PYTHONPATH := $(value CURDIR)$(if $(value PYTHONPATH),:$(value PYTHONPATH))

ifneq ($(HOST),)
override FLUXNB_HOST := $(HOST)
export FLUXNB_HOST
endif

# What is asked for of a model of one's own goes to whatever runs, as it was written: no shell reads it.
ifneq ($(filter report render reference explore,$(GOALS)),)
override FLUXNB_MODEL := $(MODEL)
export FLUXNB_MODEL
override FLUXNB_GPU := $(GPU)
export FLUXNB_GPU
override FLUXNB_THOROUGH := $(THOROUGH)
export FLUXNB_THOROUGH
endif
ifneq ($(strip $(FLUXNB_MODEL)),)
override FLUXNB_SIZE := $(SIZE)
export FLUXNB_SIZE
override FLUXNB_TOKENS := $(TOKENS)
export FLUXNB_TOKENS
override FLUXNB_STEPS := $(STEPS)
export FLUXNB_STEPS
endif

ifneq ($(filter-out 0 1,$(FLUXNB_THOROUGH)),)
$(error THOROUGH=$(FLUXNB_THOROUGH) isn't allowed: give 1 for all that the study measures, or leave it out)
endif
ifeq ($(strip $(MODEL)),)
override ABOUT := $(filter SIZE TOKENS STEPS,$(GIVEN))
ifneq ($(ABOUT),)
$(error $(firstword $(ABOUT))= is about a model of yours: give MODEL= as well, a hub id or a folder)
endif
endif

# A model that is written as a folder has to be one. (A path with blanks is looked at later.)
ifneq ($(filter report render explore,$(GOALS)),)
ifeq ($(words $(FLUXNB_MODEL)),1)
ifneq ($(filter / ./% ../% ~% /%,$(FLUXNB_MODEL))$(if $(findstring /,$(FLUXNB_MODEL))$(filter flux2-%-random flux2-%-tiny,$(FLUXNB_MODEL)),,no hub id),)
ifeq ($(wildcard $(FLUXNB_MODEL)/model_index.json),)
$(error MODEL=$(FLUXNB_MODEL) is no folder with a model_index.json: give one that diffusers' save_pretrained wrote, or a hub id such as black-forest-labs/FLUX.1-dev)
endif
endif
endif
endif

# A misspelled GPU is answered here, before an environment is made. (Brackets: the whole word, no patterns.)
ifneq ($(filter report render reference,$(GOALS)),)
ifeq ($(findstring <$(GPU)>,$(patsubst %,<%>,$(GPUS))),)
$(error GPU=$(GPU) has no file in params/: choose one of $(GPUS), or have one written for the GPU that is here: make params GPU=…)
endif
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help report render site reference analysis params explore test soak lint train-embedded lock clean clean-caches

help: ## show this list
	@echo "make <target> [VARIABLE=value]"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s%s\n", $$1, $$2 }' Makefile
	@echo
	@printf '%s\n' $(call quoted,  GPU=$(GPU)$(if $(filter cpu,$(GPU)), (default))  one of: $(GPUS))
	@echo "  MODEL=id or folder       report, render, explore: a FLUX of yours instead of the study's models, in reports/own/…/;"
	@echo "                           SIZE=1024x1024 TOKENS=512 STEPS=28 where its files don't say them"
	@echo "  THOROUGH=1               report: also what takes long (the section thorough: of params/*.yaml)"
	@echo "  LAUNCH=slurm             every notebook as a job of Slurm (SLURM_OPTIONS=\"partition=gpu time=600\")"
	@echo "  HOST=name                what this machine is called in its rows, instead of a name made up for it"
	@echo "  PYTHON=/path/python      run on this interpreter and install nothing"
	@echo "  BASE_PYTHON=python3.12   the Python (3.11 or newer) that .venv is made with, when it is made"
	@echo
	@echo "make report writes below reports/own/, which git ignores; the committed reference is the rest of reports/."
	@echo
	@echo "The environment is made by itself the first time. pip's configured package locations are used; where"
	@echo "they offer a CPU build of torch it is taken, and UV_TORCH_BACKEND=cpu asks PyTorch's own site for one."

report: $(READY) ## run the notebooks on this GPU and render the reports (ONLY=05: one notebook; FORCE=1: all measured again, on any GPU; REPLAY=1: the reference's pages from its rows, on any machine)
	$(PY) -m fluxnb report --gpu $(GPU)$(if $(ONLY), --only=$(call quoted,$(ONLY)))$(if $(filter-out 0,$(FORCE)), --force)$(if $(filter-out 0,$(REPLAY)), --replay)$(if $(LAUNCH), --launch=$(call quoted,$(LAUNCH)))

render: $(READY) ## render the reports again from the notebooks last run; needs no GPU
	$(PY) -m fluxnb render --gpu $(GPU)

site: $(READY) ## make the front page, the ledger and the progress files again from the committed tables
	$(PY) -m fluxnb site

reference: $(READY) ## take your own run of GPU=… over into the committed reference (for maintainers)
	$(PY) -m fluxnb reference --gpu $(GPU)

analysis: $(READY) ## set the configurations beside each other (PRICES="h200=3.5": what a GPU hour costs)
	$(PY) -m fluxnb analysis $(foreach price,$(PRICES),$(call quoted,$(price)))

params: $(READY) ## write the file in params/ of a GPU that has none, from the card that is here (GPU=4090)
	$(PY) -m fluxnb params --new=$(call quoted,$(GPU))

explore: $(READY) ## open the live explorer in JupyterLab (ARGS=… is passed on)
	$(FIT) -m jupyterlab notebooks/explore.ipynb

test: $(READY) ## run the tests, two files at a time (ARGS=… is passed on to pytest)
	$(FIT) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: $(READY) ## kill, fuzz and fill the disk for up to 20 minutes: the long forms of what the tests try shortly
	$(FIT) -m pytest -n 2 --dist loadfile -m soak

lint: $(READY) ## look through the code: ruff and mypy
	$(FIT) && $(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy fluxnb

train-embedded: $(READY) ## train the embedded model, its probe and its ControlNet from nothing; needs a GPU, resumes where it stopped
	$(PY) -m fluxnb.training.train && $(PY) -m fluxnb.training.train_probe && $(PY) -m fluxnb.training.train_control

lock: $(READY) ## re-make requirements.lock and the versions in environment.yml (UPGRADE=1: the newest versions)
	$(PY) -I fluxnb/_setup.py lock $(if $(filter-out 0,$(UPGRADE)),--upgrade)

clean: ## remove build/ (executed notebooks and logs); results and reports stay
	rm -rf build

clean-caches: $(READY) ## list downloaded models and compiled code with their sizes, ask, and delete; never results
	$(PY) -m fluxnb clean-caches

.venv/.ready: requirements.lock pyproject.toml fluxnb/_setup.py
	@$(call quoted,$(BASE_PYTHON)) -I fluxnb/_setup.py
