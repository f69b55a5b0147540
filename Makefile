# `make help` lists what can be made. State lies in ~/mmagent, or where MMAGENT_STORAGE says.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
TORCH_INDEX ?=
BUNDLE ?= demo
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed-here
LINTED := mmagent jobs serve docs tests

# A venv holds absolute paths: one that was moved, or whose Python is gone, is made anew.
ifneq ($(shell cat $(STAMP) 2>/dev/null && $(PY) -c 'print("runs")' 2>/dev/null),$(CURDIR) runs)
$(shell rm -f $(STAMP))
endif

.PHONY: help setup demo demo-search serve stop test test-long test-slow lint format docs doctor bench-train bench-freeze bench-pretrain bench-quality bench-data bench-memory bench-mfu bench-search bench-serve bench-soak bench-confidence bench-continual bench-cluster bench-scale test-abuse test-faults figures clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.11     the Python that .venv is made from"
	@echo "  TORCH_INDEX=URL       an index to take PyTorch from, e.g. https://download.pytorch.org/whl/cpu"
	@echo "  MMAGENT_STORAGE=DIR   where data, runs and bundles lie (default ~/mmagent)"

setup: $(STAMP) ## .venv with everything, as tested together (done by the others when needed)

demo: $(STAMP) ## from nothing to a served agent that reads, sees and hears: data, training, bundle, three answers
	@$(PY) -m jobs.demo run

demo-search: $(STAMP) ## the same recipe searched over: trials, the winner served, the same three questions
	@$(PY) -m jobs.demo search

serve: $(STAMP) ## serve a bundle: make serve BUNDLE=demo (a run's name or a bundle folder)
	@$(PY) -m jobs.demo serve --bundle "$(BUNDLE)"

stop: ## end what the demo started, and nothing else
	@if [ -x $(PY) ]; then cluster/local.sh down; else echo "no .venv here, so nothing was started from here"; fi

test: $(STAMP) ## the tests; they start a Ray of their own, beside a running demo
	@$(PY) -m pytest

test-long: $(STAMP) ## the tests that take longer, which the check of every change runs too
	@$(PY) -m pytest -m "long and not slow and not gpu" --timeout 900

test-slow: $(STAMP) ## the tests that take minutes
	@$(PY) -m pytest -m slow --timeout 1800

test-faults: $(STAMP) ## 100 trainings hurt at random, by kill -9 and more, and what is lost (under an hour): writes runs/bench/faults.json
	@$(PY) -m tests.bench.faults

lint: $(STAMP) ## ruff, mypy, the import rules
	$(VENV)/bin/ruff check $(LINTED)
	$(VENV)/bin/ruff format --check $(LINTED)
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

format: $(STAMP) ## let ruff order and format the code
	$(VENV)/bin/ruff check --fix $(LINTED)
	$(VENV)/bin/ruff format $(LINTED)

docs: $(STAMP) ## the site of the docs, its reference made of the code: build/site/index.html
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "build/site/index.html"

doctor: $(STAMP) ## what this machine lacks, and the command that mends it
	@$(PY) -m jobs.doctor

bench-train: $(STAMP) ## samples per second beside plain PyTorch and the Trainer, and what packing gains: writes runs/bench/train.json
	@$(PY) -m tests.bench.train

bench-freeze: $(STAMP) ## speed, memory and trained share of each way of freezing: writes runs/bench/freeze.json
	@$(PY) -m tests.bench.freeze

bench-pretrain: $(STAMP) ## what plain text gains a task of few labels, before and after: writes runs/bench/pretrain.json
	@$(PY) -m tests.bench.pretrain

bench-quality: $(STAMP) ## what the default recipe reaches on tasks of several kinds: writes runs/bench/quality.json
	@$(PY) -m tests.bench.quality

bench-data: $(STAMP) ## rows per second of the stream beside other data loaders: writes runs/bench/data.json
	@$(PY) -m tests.bench.data

bench-search: $(STAMP) ## what a search costs and finds, beside full runs and Tune over a trainer for each trial: writes runs/bench/search.json
	@$(PY) -m tests.bench.search

bench-memory: $(STAMP) ## memory by ZeRO stage beside its formula, and by size of the data: writes runs/bench/memory.json
	@$(PY) -m tests.bench.memory

bench-mfu: $(STAMP) ## share of a GPU's arithmetic that a LoRA fine-tune of a decoder uses: writes runs/bench/mfu.json
	@$(PY) -m tests.bench.mfu

bench-serve: $(STAMP) ## requests per second beside the bare model and other servers; swaps, scaling, faults (15 min): writes runs/bench/serve.json
	@$(PY) -m tests.bench.serve

bench-soak: $(STAMP) ## the service's memory over ten minutes of mixed load: writes runs/bench/soak.json
	@$(PY) -m tests.bench.soak

bench-confidence: $(STAMP) ## what confidence and evidence are worth: writes runs/bench/confidence.json
	@$(PY) -m tests.bench.confidence

bench-continual: $(STAMP) ## learning from corrections: gained, forgotten, for how much, and poisoned (an hour): writes runs/bench/continual.json
	@$(PY) -m tests.bench.continual

bench-cluster: $(STAMP) ## machines of a Ray that die, restart, lose their link: what is lost (20 min; root for links): writes runs/bench/cluster.json
	@$(PY) -m tests.bench.cluster

bench-scale: $(STAMP) ## what the control plane costs as it grows, extended to 1,000 nodes (10 min): writes runs/bench/scale.json
	@$(PY) -m tests.bench.scale

test-abuse: $(STAMP) ## 400 hostile and broken requests, each with its right status: writes runs/bench/abuse.json
	@$(PY) -m tests.bench.abuse

figures: $(STAMP) ## paste the figures of runs/bench/*.json into README.md and docs/
	@$(PY) -m tests.bench.figures

clean: stop ## end the demo; remove .venv, caches and runs/ of this checkout (the storage root stays)
	rm -rf $(VENV) runs *.egg-info build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find $(LINTED) -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "make: $(PYTHON) is not on the PATH. Install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv;" >&2; \
	  echo "      or pyenv install 3.11, or uv python install 3.11), or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; ok = (3, 11) <= sys.version_info[:2] < (3, 14); \
	  sys.exit(None if ok else f"make: {sys.executable} is Python {sys.version.split()[0]}; 3.11 is wanted (3.12, 3.13: untested)")'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "make: $(PYTHON) has no venv module. Debian, Ubuntu: apt-get install python3.11-venv" >&2; exit 1; }
	@# An interrupted install is finished by pip; a venv that does not run, or that lay elsewhere, is thrown away.
	@if ! $(PY) -m pip --version >/dev/null 2>&1 || ! grep -qF "$(CURDIR)/$(VENV)" $(VENV)/bin/activate; then \
	  rm -rf $(VENV); echo "making $(VENV) with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv $(VENV); fi
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PY) -m pip install -qq --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  -c constraints.txt torch
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[cluster,speech,demo,hub,docs,track,dev]'
	@printf '%s\n' "$(CURDIR)" > $@
