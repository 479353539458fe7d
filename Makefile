# What CI runs is `make check`.
PYTHON ?= .venv/bin/python
SHELL_FILES := $(shell git ls-files '*.sh') .ci/run

.PHONY: check lint shell test
check: lint shell test

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

shell:
	$(dir $(PYTHON))shellcheck -x $(SHELL_FILES)

test:
	$(PYTHON) -m pytest
