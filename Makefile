# What CI runs is `make check`. Quoted: a checkout's path may hold spaces.
PYTHON ?= .venv/bin/python
SHELL_FILES := $(shell git ls-files '*.sh') .ci/run

.PHONY: check lint shell test
check: lint shell test

lint:
	"$(PYTHON)" -m ruff check .
	"$(PYTHON)" -m ruff format --check .

shell:
	"$$(dirname "$(PYTHON)")/shellcheck" -x $(SHELL_FILES)

test:
	"$(PYTHON)" -m pytest
