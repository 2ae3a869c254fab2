# The course in a few commands; `make` alone lists them. The first use installs into .venv. Later uses need no network.
PYTHON ?= python3
PYTHON313 ?= python3.13
RUN := .venv/bin/python
# XLA takes one large buffer for each training step. In huge pages it costs no page faults, which slow training on a CPU.
# One arena, trimmed, keeps memory that threads have freed from adding to a notebook's peak.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=131072:glibc.malloc.arena_max=1
# Unit tests compile hundreds of programs without optimizations (tests/conftest.py). XLA's older code for a CPU compiles
# them in a third less time; it is slower for the notebooks' optimized programs. The notebooks share one cache of compiled
# programs, and every test process reads the bytecode that the first one kept.
QUICK_COMPILER := XLA_FLAGS="$$XLA_FLAGS --xla_cpu_use_fusion_emitters=false"
test test-slow: export PYTHONDONTWRITEBYTECODE :=
ONE_CACHE := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/build/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
NOTEBOOKS := $(ONE_CACHE) $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval-lax --nbval-current-env \
	-p no:cacheprovider
GPU := $(shell command -v nvidia-smi)
# Compiling all installed modules took a quarter of the installation; Python compiles those that are imported.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

course: .venv/installed  ## run every notebook; the executed pages are in build/course/index.html
	$(RUN) -m clipid_utils prepare
	$(RUN) scripts/course.py

test: .venv/installed  ## ruff, the unit tests except the slow ones, and every notebook
	$(RUN) -m clipid_utils prepare
	$(RUN) -m ruff check
	$(QUICK_COMPILER) $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -p no:nbval -m "not slow"
	rm -rf build/compiled
	$(NOTEBOOKS) notebooks/*.ipynb

test-slow: .venv/installed  ## runs that are killed and resumed, several processes, true networks, the solutions
	$(RUN) -m clipid_utils prepare
	$(QUICK_COMPILER) $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -p no:nbval -m slow
	rm -rf build/compiled
	$(NOTEBOOKS) notebooks/solutions

site: .venv/installed  ## the course as a book, to read in build/site/index.html; every link inside it is checked
	rm -rf build/site build/page
	-$(RUN) -m clipid_utils export page build/page  # the site has it as "Try it here"; without npm it is left out
	$(RUN) site/build.py

indonesian: .venv/installed  ## the Indonesian notebooks from site/locale, after new messages were added to it
	$(RUN) site/indonesian.py update
	$(RUN) site/indonesian.py

lab: .venv/installed  ## open JupyterLab
	$(RUN) -m jupyter lab --ServerApp.root_dir=. notebooks/00_start_here.ipynb

train-mini: .venv/installed  ## train data/checkpoints/mini again, by the recipe that made it
	$(RUN) -m clipid_utils train mini --out runs/mini
	cp runs/mini/model/* data/checkpoints/mini/
	rm -f data/checkpoints/mini/metrics.json

train-photo: .venv/installed  ## make data/checkpoints/photo again from the packages, by the recipe that made it
	$(RUN) -m clipid_utils train photo --out runs/photo
	cp runs/photo/model/* data/checkpoints/photo/
	rm -f data/checkpoints/photo/metrics.json

evaluate: .venv/installed  ## measure both shipped models again into their metrics.json
	$(RUN) -m clipid_utils evaluate data/checkpoints/mini
	$(RUN) -m clipid_utils evaluate data/checkpoints/photo

bench: .venv-bench/installed  ## examples per second beside torch, in turns; installs torch and Ray into .venv-bench
	JAX_PLATFORMS=cpu .venv-bench/bin/python benchmarks/run.py
	$(if $(GPU),.venv-bench/bin/python benchmarks/run.py step translate --gpu)

parity: .venv-bench/installed  ## outputs, gradients and exports beside torch's at true sizes; the translator's recipe
	.venv-bench/bin/python scripts/parity.py
	.venv-bench/bin/python scripts/parity_families.py
	.venv-bench/bin/python -m clipid_utils prepare
	.venv-bench/bin/python -m pytest tests/test_train_translator.py

# Without Ray its tests would be skipped; the import makes that an error.
test-scale: .venv-bench/installed  ## shards through a Ray cluster on this machine, with a worker killed
	.venv-bench/bin/python -c 'import ray.data'
	.venv-bench/bin/python -m pytest tests/data/test_scale.py

test-page: .venv/installed .venv-page/installed  ## the page without a server in Chromium (Debian's, or CHROMIUM=/path/to/it)
	CLIPID_PYTHON=$(CURDIR)/$(RUN) .venv-page/bin/python scripts/try_page.py build/page-shots

test-colab: .venv-colab/installed  ## the unit tests with Colab's own jax, flax, optax, orbax and numpy (Python 3.13)
	.venv-colab/bin/python -m clipid_utils prepare
	.venv-colab/bin/python -m pytest -p no:nbval

test-wheel: .venv/installed  ## build the wheel and try it in an empty environment, outside of any clone
	$(RUN) scripts/try_wheel.py

mutants: .venv/installed  ## small wrong changes of the code, one at a time: which of them does a test notice?
	$(RUN) scripts/mutants.py

notebooks: .venv/installed  ## run every notebook and keep its outputs in notebooks/, as they are committed
	$(RUN) -m clipid_utils prepare
	$(RUN) scripts/course.py --in-place
	$(RUN) site/indonesian.py
	$(RUN) scripts/course.py --in-place --out build/solutions notebooks/solutions/*.ipynb

constraints: .venv/installed  ## make constraints.txt again from requirements.txt: one set for every Python and platform
	$(RUN) scripts/constraints.py

test-constraints: .venv/installed  ## resolve constraints.txt for each Python and platform, without installing
	$(RUN) scripts/constraints.py --check

clean:  ## remove environments and build/; the pictures in data/cache stay
	rm -rf .venv .venv-bench .venv-colab .venv-page build *.egg-info .pytest_cache .ruff_cache .hypothesis

# An environment is finished when its file `installed` exists. A change of the files below installs again.
.venv/installed: requirements.txt constraints.txt pyproject.toml
	$(call environment,$(PYTHON),.venv)
	$(RUN) $(INSTALL) -r requirements.txt -c constraints.txt
	$(call package,$(RUN))

.venv-bench/installed: requirements.txt constraints.txt pyproject.toml
	$(call environment,$(PYTHON),.venv-bench)
	.venv-bench/bin/python $(INSTALL) -r requirements.txt torch "ray[data]" $(if $(GPU),"jax[cuda12]") -c constraints.txt
	$(call package,.venv-bench/bin/python)

# Colab's own six packages at Colab's versions, the others as tested.
.venv-colab/installed: requirements.txt constraints.txt constraints-colab.txt pyproject.toml
	@command -v $(PYTHON313) > /dev/null || { echo "make test-colab needs Python 3.13, as Colab has it: install it, or \
	name it with make test-colab PYTHON313=/path/to/python3.13" >&2; exit 1; }
	$(call environment,$(PYTHON313),.venv-colab)
	grep -vE '^(jax|jaxlib|flax|optax|orbax-checkpoint|numpy)==' constraints.txt > .venv-colab/rest.txt
	.venv-colab/bin/python $(INSTALL) -r requirements.txt -c .venv-colab/rest.txt -c constraints-colab.txt orbax-checkpoint
	$(call package,.venv-colab/bin/python)

.venv-page/installed: constraints.txt
	$(PYTHON) -m venv .venv-page
	.venv-page/bin/python $(INSTALL) playwright==1.65.2
	@touch $@

define environment
	@$(1) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "The course needs Python \
	3.11, 3.12 or 3.13. $(1) is a different version or is missing: name one with make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Installing the tested packages into $(2). This takes a few minutes, once."
	$(1) -m venv $(2)
endef

define package
	$(1) $(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $(dir $(1))../installed
endef

.PHONY: help course test site indonesian lab train-mini train-photo evaluate bench parity test-scale test-colab \
	test-wheel test-slow mutants test-page notebooks constraints test-constraints clean
.DELETE_ON_ERROR:
