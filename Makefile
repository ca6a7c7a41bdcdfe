# Every target sets itself up: `make demo` and `make test` work on a fresh machine with Python 3.10+ and g++.
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-interpreted lint native bench bench-full gpu clean
help:
	@echo "make demo         the main job on real input: BLIP-2's Q-Former, eager against fastxattn (build/demo/)"
	@echo "make test         lint, types and every test"
	@echo "make test-interpreted  the Triton kernels in Triton's interpreter"
	@echo "make bench        CPU benchmarks to benchmarks/results/*.csv, tables and charts"
	@echo "make gpu          everything a GPU proves, on a machine that has one"
	@echo "make clean        remove build products and the virtual environment"

$(VENV)/.demo: requirements/build.txt requirements/demo.txt pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements/demo.txt
	FASTXATTN_BUILD_NATIVE=0 $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.test: $(VENV)/.demo requirements/test.txt
	$(PY) -m pip install -q -r requirements/test.txt
	@touch $@

native: $(VENV)/.demo
	$(PY) build_native.py

demo: native
	$(PY) -m fastxattn demo

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inl' 'csrc/*.cuh' 'csrc/*.cu')
	$(VENV)/bin/mypy

# Triton decides at import whether its interpreter runs, so those tests have a process, and being slow a target, of
# their own.
INTERPRETED := tests/test_attention_triton.py tests/test_importance.py tests/test_bidirectional.py
test: lint native
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile $(addprefix --ignore=,$(INTERPRETED)) tests

test-interpreted: native
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --dist loadfile $(INTERPRETED)

bench: $(VENV)/.test native
	$(PY) -m fastxattn bench

gpu: $(VENV)/.test native
	$(PY) benchmarks/gpu.py

clean:
	rm -rf build dist site $(VENV) fastxattn/_lib *.egg-info
