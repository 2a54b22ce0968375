# make setup | setup-plan | demo | test | test-all | test-beam | test-lmms | clean
#
# TORCH_INDEX=https://download.pytorch.org/whl/cpu says where the tests' torch comes from, where the default
# index would give a build for CUDA.
# PYTHON=python3.12 chooses the interpreter; without it, the first of those below that is at least 3.11 and
# really starts (a shim on PATH may not).

ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
endif

VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
INPUTS := setup.py requirements.txt
# Prints how long a step took: $(call timed,name,command)
timed = @start=$$(date +%s); $(2) || { status=$$?; echo "$(1) failed (status $$status)" >&2; exit $$status; }; \
  echo "$(1): $$(( $$(date +%s) - start )) s"

.PHONY: setup setup-plan demo test test-all test-beam test-lmms clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "umm_jax needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(INPUTS)
	$(call timed,setup,$(PIP) -e .)
	@touch $@

# The TPU compiler (700 MB), for `umm plan`; no TPU is needed.
setup-plan: $(VENV)/.planned

$(VENV)/.planned: $(VENV)/.installed
	$(call timed,setup-plan,$(PIP) -e '.[plan]')
	@touch $@

# Torch comes first and alone, so that its index can be chosen. Without it the tests that need it are skipped.
TORCH := 'torch==2.13.0; python_version < "3.12"'
WITH_TORCH = $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) && $(PIP) -e '.[test]'
WITHOUT_TORCH = echo "no torch could be installed: the tests that need it will be skipped" >&2; \
  $(PIP) -e '.[test-core]'

$(VENV)/.tested: $(VENV)/.installed
	$(call timed,test requirements,{ $(WITH_TORCH); } || { $(WITHOUT_TORCH); })
	@touch $@

demo: setup
	@$(VENV)/bin/umm demo $(ARGS)

# JAX_PLATFORMS=cpu unless the caller chose: the tests compare numbers that are defined on the CPU.
# Two files at a time (some GB each), or as many as JOBS says; the tests of a file share what they set up.
JOBS ?= 2
PYTEST := JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile

test: $(VENV)/.tested
	@$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.tested
	@$(PYTEST) $(ARGS)

# Apache Beam pins much, so it has an environment of its own.
.beam/.installed: $(INPUTS)
	@"$(PYTHON)" -m venv .beam
	$(call timed,beam environment,.beam/bin/python -m pip --disable-pip-version-check install --quiet pytest -e '.[beam]')
	@touch $@

test-beam: .beam/.installed
	@JAX_PLATFORMS=cpu .beam/bin/python -m pytest -q tests/test_beam_runner.py $(ARGS)

# So does lmms-eval, which does not work with a filelock of 3.20 or newer.
.lmms/.installed: $(INPUTS)
	@"$(PYTHON)" -m venv .lmms
	$(call timed,lmms-eval environment,.lmms/bin/python -m pip --disable-pip-version-check install --quiet \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) 'torch==2.13.0' && \
	  .lmms/bin/python -m pip --disable-pip-version-check install --quiet pytest lmms-eval -e . && \
	  .lmms/bin/python -m pip --disable-pip-version-check install --quiet 'filelock<3.20')
	@touch $@

test-lmms: .lmms/.installed
	@JAX_PLATFORMS=cpu .lmms/bin/python -m pytest -q tests/test_plugs.py $(ARGS)

clean:
	rm -rf $(VENV) .beam .lmms build dist *.egg-info
