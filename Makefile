# Every target works on a fresh clone with Python 3.11, make and git: it makes .venv by itself, with
# uv where that is on the PATH and with venv and pip where it isn't. A stamp file in .venv remembers
# what is installed, so that a second call starts at once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
SEED ?= 0
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
CORE := .
DEV := .[test,dev]
LIST := pyproject.toml constraints.txt

.PHONY: install quickstart test lint bench clean

install: $(VENV)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/agentx quickstart --seed $(SEED)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.train_step
	$(BIN)/python -m benchmarks.sample
	$(BIN)/python -m benchmarks.grpo_step

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .aot_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call pip-install,REQUIREMENT,OPTIONS OF PIP)
define pip-install
	@echo "installing '$(1)' into $(VENV): a minute or two, once"
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
		uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '$(1)'; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet $(2) --constraint constraints.txt --editable '$(1)'; \
	fi
endef

# libtpu, the TPU compiler, for tests/aot, where it runs. In a folder of its own: among the packages
# it would be loaded, and would warn, wherever JAX starts.
ifeq ($(shell uname -sm),Linux x86_64)
define install-libtpu
	@if command -v uv >/dev/null; then \
		uv pip install --quiet --python $(BIN)/python --constraint constraints.txt \
			--no-deps --target $(VENV)/aot libtpu; \
	else \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt \
			--no-deps --upgrade --target $(VENV)/aot libtpu; \
	fi
endef
endif

$(VENV)/.installed: $(LIST)
	$(call pip-install,$(CORE))
	@touch $@

# Of the libraries that only tests need most modules are never imported: Python compiles the others.
$(VENV)/.installed-dev: $(LIST)
	$(call pip-install,$(DEV),--no-compile)
	$(install-libtpu)
	@touch $(VENV)/.installed $@
