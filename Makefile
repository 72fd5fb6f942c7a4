# make demo    the main job, end to end, at toy scale on this machine; writes runs/demo/
# make test    the fast suite, the linters and the floors
# make check   the longer suite: everything in `make test`, and the slow tests; where there is a Python 3.12, most of `make
#              test`'s with it and the newest JAX within the bounds, in .venv312
# make lint    the linters, the types and the floors alone
# make support runs the tests that are evidence of what is supported; writes docs/support.json and docs/support.md
# make format  rewrites the code in the project's style
#
# Needs Python 3.11 or newer and nothing else: everything is installed into .venv here. `make PYTHON=... test` chooses the
# Python that makes .venv, `make PYTHON312=... check` the one that makes .venv312.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test check check-312 lint support format clean help

CANDIDATES := python3.11 python3.12 python3.13 python3 python
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
BIN := .venv/bin
PYTHON312 ?=
# Sets `found` to a Python 3.12 that runs and can make a virtual environment, empty if there is none: the one asked for and
# no other, else the one on the path or a version manager's.
IS_312 := import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))
FIND_312 = found=; for candidate in $(or $(PYTHON312),python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python)); do \
	  if "$$candidate" -c '$(IS_312)' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
	done; \
	if [[ -z "$$found" && -n "$(PYTHON312)" ]]; then \
	  echo "PYTHON312=$(PYTHON312) is no Python 3.12 that runs and has the venv module; name another." >&2; exit 1; \
	fi
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
JOBS ?= 2
CHECK_JOBS ?= 3
# A worker that crashes ends the run: tests that it had left would be given to nobody, and waited for.
PARALLEL := --dist loadgroup --max-worker-restart 0

demo: .venv/.installed
	$(BIN)/qwenvl-jax demo

test: .venv/.installed-test lint
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) $(PARALLEL)

# What is compared with the reference is compiled as users compile it; the rest as by `make test`, see tests/compiling.py.
# Of the rest, tests of several processes wait for one another: three at a time on two cores.
COMPARED := tests/parity tests/models tests/ops
OPTIMIZED := XLA_FLAGS=--xla_backend_optimization_level=3

check: .venv/.installed-tpu lint
	$(OPTIMIZED) $(BIN)/python -m pytest $(COMPARED) -n $(JOBS) $(PARALLEL)
	$(BIN)/python -m pytest $(addprefix --ignore=,$(COMPARED)) -n $(CHECK_JOBS) $(PARALLEL)
	@$(MAKE) --no-print-directory check-312

# Python 3.12 and the newest JAX within the bounds, without the reference: torch may be a build of several GB there; and
# without what `check` has just run and what hardly knows of JAX: the slow tests, data, the launchers and the demo.
check-312:
	@$(FIND_312); \
	if [[ -z "$$found" ]]; then \
	  echo "No Python 3.12 runs here, so its suite was left out; 'make PYTHON312=/path/to/python check' names one."; \
	else \
	  if [[ pyproject.toml -nt .venv312/.installed-test ]]; then \
	    echo "Making .venv312 with $$("$$found" --version), and installing qwenvl_jax and what its tests need into it"; \
	    rm -rf .venv312; \
	    "$$found" -m venv .venv312; \
	    .venv312/bin/python -m pip --disable-pip-version-check install --quiet --editable '.[test]'; \
	    touch .venv312/.installed-test; \
	  fi; \
	  .venv312/bin/python -m pytest -m "not slow" $(addprefix --ignore=tests/,data demo launch) \
	    -n $(JOBS) $(PARALLEL); \
	fi

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh .ci/run
	$(BIN)/pre-commit validate-config

# The slow tests are left out, as in `make test`. Failures are recorded too; the page says so.
support: .venv/.installed-test
	$(BIN)/python -m pytest -p tests.support --support-results docs/support.json -m "not slow" -n $(JOBS) \
	  --dist loadgroup || status=$$?; \
	$(BIN)/python -m tools.support; \
	exit $${status:-0}

format: .venv/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv312 .pytest_cache .ruff_cache .import_linter_cache .mypy_cache

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | sed '/^$$/q'

# A candidate counts only if it runs (a version manager may put names on the path that do not), is new enough, and can
# make a virtual environment.
.venv/bin/python:
	@python="$(PYTHON)"; \
	for candidate in $${python:-$(CANDIDATES)}; do \
	  if $$candidate -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then python=$$candidate; found=yes; break; fi; \
	done; \
	if [[ -z "$${found:-}" ]]; then \
	  echo "No usable Python: 3.11 or newer with the venv module is needed, and none of these is:" \
	    "$${python:-$(CANDIDATES)}. Install one (on Debian: python3 and python3-venv), or say" \
	    "'make PYTHON=/path/to/python ...'." >&2; \
	  exit 1; \
	fi; \
	echo "Making .venv with $$($$python --version)"; \
	rm -rf .venv; \
	$$python -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	@echo "Installing qwenvl_jax into .venv"
	$(PIP) --editable .
	@touch $@

# The longer suite compiles for TPU slices, where libtpu can be had.
.venv/.installed-tpu: .venv/.installed-test
	$(PIP) --editable '.[tpu]' || echo "libtpu cannot be installed here: the tests that compile for TPUs say so"
	@touch $@

# torchvision's wheels are tied to one build of torch each; without its dependencies it leaves the installed torch alone.
# The tests use its Python code only.
.venv/.installed-test: pyproject.toml | .venv/bin/python
	@echo "Installing qwenvl_jax and what its tests need into .venv"
	$(PIP) --editable '.[test,reference]'
	$(PIP) --no-deps torchvision==0.28.0
	@touch $@ .venv/.installed
