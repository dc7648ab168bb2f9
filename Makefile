# Needs Python 3.10 or newer (with the venv module) and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
# What to install beside the package: `make test EXTRAS=test,cuda12` compiles the GPU kernels too.
EXTRAS ?= test
comma := ,
INSTALLED := $(VENV)/installed-$(subst $(comma),-,$(EXTRAS))
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

# Quantise the bundled data to every registered format and print a table.
demo: $(INSTALLED)
	$(BIN)/python -m tools.demo

# Lint, then run the test suite.
test: lint
	$(BIN)/python -m pytest -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Measure this machine; not a test.
bench: $(INSTALLED)
	$(BIN)/python -m tools.tbq_bench

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, $(PYTHON) is" `$(PYTHON) --version`; \
	  echo "try: make PYTHON=python3.12 demo"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
