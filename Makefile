# All targets create and use a virtual environment; you need not activate one.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
DEMO ?=
REPLAY ?=

.PHONY: demo test test-slow fuzz soak check format docs wheel docker-replay clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/msf-faiss pretrain demo --out $(RUN) --resume auto $(DEMO)
	$(BIN)/msf-faiss eval-all $(RUN) --fast
	$(BIN)/msf-faiss inspect-neighbors $(RUN) --clusters 10 --map pca
	$(BIN)/msf-faiss report $(RUN)
	@echo
	@$(BIN)/msf-faiss results $(RUN)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow and not soak and not fuzz" -n 2 --dist loadfile

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m fuzz

soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m soak

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open site/index.html"

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --no-isolation

# As root, with debootstrap: run the Dockerfile's steps in clean root file systems (9 GB), then test the image.
docker-replay:
	$(PYTHON) docker/replay.py build/replay $(REPLAY)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "msf-faiss needs Python 3.11 or newer; pass one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
