# Needs Python 3.10 or newer (with the venv module) and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
# What to install beside the package: `make test EXTRAS=test,cuda12` compiles the GPU kernels too.
EXTRAS ?= test
comma := ,
INSTALLED := $(VENV)/installed-$(subst $(comma),-,$(EXTRAS))
BIN := $(VENV)/bin

.PHONY: demo test test-versions lint bench vectors-release clean

# What the main types of each fork lose of the bundled keys and values; needs no linters. 141: nobody
# reads on.
demo: $(if $(wildcard $(INSTALLED)),$(INSTALLED),$(VENV)/installed-progress)
	@$(BIN)/python -m tools.demo || [ $$? = 141 ]

# Lint, then run the test suite.
test: lint
	$(BIN)/python -m pytest -n auto

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Test under every Python from 3.10 to 3.14 that is here, and with the oldest packages that are
# allowed; SUBSET="tests/test_errors.py" for a few files of the suite.
test-versions:
	$(PYTHON) .ci/versions.py $(SUBSET)

# Pack golden vectors of all formats for a release: the same bytes on every machine.
vectors-release: $(INSTALLED)
	$(BIN)/python -m tools.vectors_release

# Measure this machine; not a test.
bench: $(INSTALLED)
	$(BIN)/python -m tools.tbq_bench

# The name says which extras, so that each set is installed once.
$(VENV)/installed-%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, $(PYTHON) is" `$(PYTHON) --version`; \
	  echo "try: make PYTHON=python3.12 demo"; exit 1; }
	@echo "Setting up $(VENV), once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$(subst -,$(comma),$*)]'
	@touch $@

clean:
	rm -rf $(VENV) .versions build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
