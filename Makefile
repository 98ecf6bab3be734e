# make setup   a .venv with everything that the scripts and the tests need
# make test    sets up what is missing, then runs the tests
# make lint    checks style and formatting

ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif
READY := .venv/ready

.PHONY: setup test lint

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --requirement requirements.txt --requirement requirements-dev.txt
	$(BIN)/python -c "open('$(READY)', 'w').close()"

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
