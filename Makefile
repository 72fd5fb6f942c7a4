# make demo    the main job, end to end, at toy scale on this machine; writes runs/demo/
# make test    the fast suite, the linters and the floors
# make check   the longer suite: everything in `make test`, and the slow tests
# make lint    the linters and the floors alone
# make support runs the tests that are evidence of what is supported; writes docs/support.json and docs/support.md
# make format  rewrites the code in the project's style
#
# Needs Python 3.11 or newer and nothing else: everything is installed into .venv here. `make PYTHON=... test` chooses the
# Python that makes .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test check lint support format clean help

CANDIDATES := python3.11 python3.12 python3.13 python3 python
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
JOBS ?= 2

demo: .venv/.installed
	$(BIN)/qwenvl-jax demo

test: .venv/.installed-test lint
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist loadgroup

check: .venv/.installed-test lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

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
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache

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

# torchvision's wheels are tied to one build of torch each; without its dependencies it leaves the installed torch alone.
# The tests use its Python code only.
.venv/.installed-test: pyproject.toml | .venv/bin/python
	@echo "Installing qwenvl_jax and what its tests need into .venv"
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps torchvision==0.28.0
	@touch $@ .venv/.installed
