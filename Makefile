# make demo: train and compare.  make test: all tests.  make check: lint, types, fast tests.  make setup: .venv alone.
# make clients: the tests of LangChain, LiteLLM and llm, in .venv-clients.
# make soak: 10 minutes of mixed load on a server (MINUTES=3: three).
PYTHON ?= python3
TORCH ?= auto
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.maltu-$(TORCH)
CLIENTS := .venv-clients
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test check lint types clients soak wheel clean
.DEFAULT_GOAL := demo

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" VENV="$(VENV)" sh scripts/setup.sh
	@rm -f $(VENV)/.maltu-* && touch $(STAMP)

demo: setup
	$(PY) -m toolkit.train recipes/casual_chat.yaml

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: setup
	$(VENV)/bin/mypy

check: lint types
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow and not soak" -n 2 --dist worksteal

test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not soak" -n 2 --dist worksteal

$(CLIENTS)/.ready: tests/serve/clients.txt
	$(PYTHON) -m venv $(CLIENTS) && $(CLIENTS)/bin/python -m pip --disable-pip-version-check -q install -r $< && touch $@

clients: setup $(CLIENTS)/.ready
	MALTU_CLIENTS=$(CURDIR)/$(CLIENTS)/bin/python OMP_NUM_THREADS=1 $(PY) -m pytest tests/serve/test_clients.py

soak: setup
	MALTU_SOAK_MINUTES=$(or $(MINUTES),10) $(PY) -m pytest -m soak -s

wheel: setup
	$(PY) -m build --wheel --outdir dist

clean:
	rm -rf dist build .mypy_cache .ruff_cache
