# Two commands do the whole set-up: `make run` and `make test`. The first call installs into .venv;
# later calls work offline.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# `make run TORCH=cpu` installs PyTorch's CPU wheels, which are much smaller on Linux.
TORCH  ?=
# Corrupted inputs of `make fuzz`, and a sixtieth as many kills, at most 100.
FUZZ   ?= 10000
# Seconds in which the kernel of a notebook must have started; a busy machine needs more.
START_TIMEOUT ?= 180
# Options of `make gpu`, for example GPU='--minutes 20'.
GPU    ?=
CPU_WHEELS := https://download.pytorch.org/whl/cpu
LESSONS := $(wildcard notebooks/[0-9]*.ipynb)

# Two processes with one thread each use both cores of a laptop, and never wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: run test test-slow lab lint check-notebooks test-notebooks tables notebooks test-browser
.PHONY: fuzz bench gpu size docs

run: $(VENV)/.installed
	$(BIN)/diffad notebooks --profile lite --out runs/notebooks --start-timeout $(START_TIMEOUT)
	@echo "Executed notebooks are in runs/notebooks; 'make lab' opens the series."

test: lint check-notebooks
	$(PYTEST)
	$(MAKE) test-notebooks

# Slow tests that rarely fail: kills, interruptions, environments, the wheel, Dask, processes.
test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow

lab: $(VENV)/.installed
	$(BIN)/jupyter lab notebooks

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Notebooks equal what their masters generate, were executed from these sources, and follow the rules.
check-notebooks: $(VENV)/.installed-test
	$(BIN)/python notebooks/tools/build.py --check
	$(BIN)/python notebooks/tools/lint.py

# Every notebook runs from start to end; loadfile keeps all cells of a notebook in one process.
test-notebooks: $(VENV)/.installed-test
	DIFFAD_PROFILE=ci DIFFAD_STATIC=1 $(PYTEST) --dist loadfile --nbval-lax \
	    --nbval-kernel-startup-timeout=$(START_TIMEOUT) --nbval-cell-timeout=300 --timeout=600 \
	    $(LESSONS)

# Notebook 09 in a real browser; skipped where Chromium or playwright is missing.
test-browser: $(VENV)/.installed-test
	$(BIN)/pip install --quiet -e '.[browser]'
	$(BIN)/python -m pytest tests/browser -rs --timeout=1800

# The course, the guide and the API as a static site, in build/site/index.html.
docs: $(VENV)/.installed-test
	$(BIN)/pip install --quiet -e '.[docs]'
	$(BIN)/sphinx-build -q -W --keep-going -c docs -d build/doctrees . build/site

# Ten thousand corrupted inputs and a hundred kills; `make test` has 300 of the inputs.
fuzz: $(VENV)/.installed-test
	DIFFAD_FUZZ=$(FUZZ) $(PYTEST) -m "slow or not slow" tests/fuzz/test_fuzz*.py --timeout=3600

# Measure speed, memory and start-up on an otherwise idle machine; writes performance.json and
# speed.json in data/results.
bench: $(VENV)/.installed-test
	$(BIN)/pip install --quiet -e '.[browser]'
	$(BIN)/python tests/bench/run.py $(TOPICS)

# Measure the paper profiles on a GPU for at most eight minutes; writes gpu.json and gpu.png in
# runs/gpu. Without a GPU it is a smoke test of all parts, which takes a minute.
gpu: $(VENV)/.installed-test
	$(BIN)/python tests/bench/gpu.py $(GPU)

# Lines of each room, with their limits.
size:
	@$(PYTHON) tests/bench/size.py

# Render all tables from the result files; no change where they are up to date.
tables: $(VENV)/.installed
	$(BIN)/diffad report README.md data/README.md
	$(BIN)/python tests/bench/performance_tables.py docs/performance.md

# For authors: rebuild the notebooks from their masters and execute them on the lite profile.
notebooks: $(VENV)/.installed-test
	$(BIN)/python notebooks/tools/build.py --execute

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed; try: make PYTHON=python3.12 run"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.python
ifeq ($(TORCH),cpu)
	$(BIN)/pip install --index-url $(CPU_WHEELS) torch torchvision
endif
	$(BIN)/pip install --quiet -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet -e '.[test]'
	@touch $@
