# make test, make demo: everything from a fresh clone on; a second call starts at once. make help lists the rest.
# Needs Python >= 3.10 with venv; with a C++17 compiler the fast CPU kernels are built, without one plain torch serves.
# CUDA kernels are built where nvcc is found, GPU or not (LOCKIN_FAST_CUDA=0 leaves them out, =1 insists).

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SAY = @printf '\n==> %s\n'
TRAINERS := tests/blocking tests/test_resuming.py tests/steering tests/test_train.py tests/test_quantized.py tests/test_examples.py
BUILD_INPUTS := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: setup help test slow report-test lint demo robustness reemergence mutations bench bench-micro peers clean

setup: $(VENV)/.built  ## the Python environment and the C++ kernels, in .venv

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

$(VENV)/.torch:
	$(SAY) "Setting up in $(VENV): 1/3 Python environment and $(TORCH) (a minute or two; once)"
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.10 is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 10) else 0'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet '$(TORCH)'
	@touch $@

$(VENV)/.pinned: requirements-ci.txt $(VENV)/.torch
	$(SAY) "Setting up in $(VENV): 2/3 the other packages, at the versions of requirements-ci.txt (about a minute; once)"
	@$(PIP) install --quiet -r requirements-ci.txt
	@touch $@

$(VENV)/.built: $(VENV)/.pinned $(BUILD_INPUTS)
	$(SAY) "Setting up in $(VENV): 3/3 lockin_fast with its C++ and CUDA kernels (a minute; again when csrc/ changes)"
	@PYTHONWARNINGS=ignore $(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@$(PY) -c 'from lockin_fast import _native as n; i = n.build_info(); print("    built:", i["units"], "- this machine runs", \
		n.isa(), "- CUDA:", i["cuda"])' \
		2>/dev/null || $(PY) -c 'import lockin_fast as lf; print("    NOT EVERYTHING WAS COMPILED. The CPU ops are served by:", \
		*sorted({f"{row.backend} ({row.why})" for row in lf.backends() if row.device == "cpu"}))'
	@touch $@

test: setup  ## the everyday tests, a few minutes
	$(SAY) "Everyday tests (a few minutes)"
	@$(PY) -m pytest -n $(WORKERS) -rs

slow: setup  ## SLOW: the tests that the everyday run leaves out
	@$(PY) -m pytest -m slow -rs

mutations: setup  ## SLOW: breaks every kernel in several ways and shows that the tests notice
	@$(PY) tests/mutate.py

report-test: setup  ## the HTML report in headless Chromium
	@$(PY) -m pytest -m browser -rs

lint: setup  ## ruff
	@$(PY) -m ruff check .

demo: setup  ## about 7 minutes: a model becomes emergently misaligned, blocking prevents it; see demo/report.html
	$(SAY) "Demo: grow a small model, make it emergently misaligned, block that, and draw the picture in demo/"
	@$(VENV)/bin/lockin-fast demo --out demo

robustness: setup  ## SLOW, about 50 minutes: the demo on four organisms x three fine-tuning seeds, in one table
	$(SAY) "Robustness: four organisms, three fine-tuning seeds each, in demo-robustness/ (DEMO=--small for fewer lambdas)"
	@for seed in 0 1 2 3; do \
		$(VENV)/bin/lockin-fast demo --out demo-robustness/organism$$seed --seed $$seed --seeds 3 $(DEMO) || exit; \
	done
	@$(VENV)/bin/lockin-fast report demo-robustness/organism0 --beside demo-robustness/organism[123]

reemergence: setup  ## SLOW, about 20 minutes: 20 epochs at three lambdas, then the union with latents found again
	@$(PY) -m benchmarks.reemergence demo-reemergence

bench: setup  ## SLOW, half an hour with nothing else running: every benchmark, then the tables of benchmarks/README.md
	@$(PY) -m benchmarks.run
	@$(PY) -m benchmarks.report

bench-micro: setup  ## the overhead of single calls on small problems
	@$(PY) -m pytest benchmarks/micro.py -q --benchmark-only --benchmark-columns=min,median,iqr,rounds --benchmark-sort=name

peers:  ## other libraries for comparison, in .venv-peers: .venv-peers/bin/python -m benchmarks.run
	@test -d .venv-peers || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/pip install --quiet '$(TORCH)'
	@echo '$(TORCH)' > .venv-peers/constraints
	@.venv-peers/bin/pip install --quiet -c .venv-peers/constraints sae-lens dictionary-learning eai-sparsify bitsandbytes \
		liger-kernel matplotlib pytest
	@.venv-peers/bin/pip uninstall --quiet --yes torchvision  # its build does not fit the CPU build of torch

oldest: setup  ## SLOW: the tests of what leans on them most, with the oldest transformers, peft, accelerate, trl and bitsandbytes allowed
	$(SAY) "Oldest supported versions, in .venv-oldest"
	@test -d .venv-oldest || $(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/pip install --quiet '$(TORCH)' $$($(PY) tests/oldest.py) pytest pyyaml rich typer matplotlib jinja2
	@PYTHONPATH=. .venv-oldest/bin/python -m pytest $(TRAINERS) -rs

clean:  ## take away what was built
	rm -rf build $(VENV)/.built lockin_fast/_build lockin_fast/_native*.so
