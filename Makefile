# Every target sets itself up: `make demo` and `make test` work on a fresh machine with Python 3.10+ and g++.
VENV   ?= .venv
PYTHON ?= python3
PY     := $(VENV)/bin/python
# Another torch than the pinned one, for example `make test TORCH=2.10.0`.
TORCH  ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-full test-interpreted lint native cuda docs pages bench bench-full bench-regression report soak gpu
.PHONY: wheels check-wheels check-version clean
help:
	@echo "make demo         the main job on real input: BLIP-2's Q-Former, eager against fastxattn (build/demo/)"
	@echo "make test         lint, types, the documentation site, every operation on every backend that needs no GPU"
	@echo "make test-full    the tests beyond: sanitizers, simulated CUDA kernels, random problems, whole models"
	@echo "make test-interpreted  of make test, the Triton kernels alone"
	@echo "make native       the CPU kernels; only what changed is compiled"
	@echo "make cuda         the CUDA kernels, where nvcc is (fastxattn/_lib/libfastxattn_cuda.so)"
	@echo "make docs         the documentation site (site/); make pages runs the examples that have a page"
	@echo "make bench        CPU benchmarks to benchmarks/results/*.csv, tables and charts, in under 10 minutes"
	@echo "make bench-full   more shapes, slower rivals, whole models"
	@echo "make bench-regression  a quick set, times stored in build/benchmarks for pytest-benchmark compare"
	@echo "make report       one HTML page of every result (build/report.html)"
	@echo "make soak         random problems, sanitizers, killed processes, broken files; SOAK_MINUTES=20"
	@echo "make wheels       sdist and wheel in dist/; make check-wheels installs them into clean environments"
	@echo "make gpu          everything a GPU proves, on a machine that has one; CUDA kernels too where nvcc is"
	@echo "make clean        remove build products and the virtual environment"

$(VENV)/.demo: requirements/build.txt requirements/demo.txt pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -r requirements/demo.txt
	$(if $(TORCH),$(PY) -m pip install -q torch==$(TORCH))
	FASTXATTN_BUILD_NATIVE=0 $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.test: $(VENV)/.demo requirements/test.txt
	$(PY) -m pip install -q -r requirements/test.txt
	$(if $(TORCH),$(PY) -m pip install -q torch==$(TORCH))
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

# A case of every operation of the regression set, checked and untimed; `make bench-regression` times them all.
REGRESSION := benchmarks/test_regression.py
# Triton decides at import whether its interpreter runs, so those tests have a process of their own.
INTERPRETED := $(foreach name,attention_triton importance co_attention contrastive_gpu foreign_memory \
	late_interaction_gpu pruning_gpu retrieval_triton,tests/test_$(name).py)
NOT_INTERPRETED := $(addprefix --ignore=,$(INTERPRETED))
test: lint native
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not full" -n 2 --dist loadfile $(NOT_INTERPRETED) tests $(REGRESSION)
	$(MAKE) test-interpreted

# What tests/conftest.py marks as full: the rest of the gate, .ci/run.
test-full: $(VENV)/.test native
	OMP_NUM_THREADS=1 $(PY) -m pytest -m full -n 2 --dist loadfile $(NOT_INTERPRETED) tests

test-interpreted: $(VENV)/.test native
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest -n 2 --dist loadfile $(INTERPRETED)

# Needs nvcc and no GPU; `make demo` or `make test` first set the environment up.
cuda: $(VENV)/.demo
	$(PY) build_native.py --cuda

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

pages: $(VENV)/.test native
	$(PY) -m benchmarks.pages

# Every operation, and as many whole models as ten minutes allow; what is left out is listed.
bench: $(VENV)/.test native
	$(PY) -m fastxattn bench --minutes 9.5
	$(PY) -m benchmarks.tables

bench-full: $(VENV)/.test native
	$(PY) -m fastxattn bench --full
	$(PY) -m benchmarks.bench_contrastive --memory --full
	$(PY) -m benchmarks.errors
	$(PY) -m benchmarks.tables

# Times are stored, and none is asserted: machines differ. `pytest-benchmark compare` reads the folder.
bench-regression: $(VENV)/.test native
	$(PY) -m pytest benchmarks/test_regression.py --benchmark-storage=build/benchmarks --benchmark-autosave

report: $(VENV)/.test native
	$(PY) -m fastxattn report

SOAK_MINUTES ?= 20
soak: $(VENV)/.test native
	$(PY) -m benchmarks.soak --minutes $(SOAK_MINUTES) --write

wheels: $(VENV)/.demo
	rm -rf dist && mkdir -p build
	mkdir dist
	$(PY) -c "from setuptools.build_meta import build_sdist; build_sdist('dist')" > build/sdist.log
	FASTXATTN_BUILD_NATIVE=1 $(PY) -m pip wheel -q --no-build-isolation --no-deps --wheel-dir dist .

check-wheels: $(VENV)/.demo
	$(PY) .ci/check_wheels.py dist

check-version:
	$(PYTHON) .ci/check_wheels.py --tag $(TAG)

gpu: $(VENV)/.test native
	command -v nvcc > /dev/null && FASTXATTN_CUDA_ARCHS=native $(PY) build_native.py --cuda || echo "gpu: no CUDA kernels"
	$(PY) -m benchmarks.gpu

clean:
	rm -rf build dist site $(VENV) fastxattn/_lib *.egg-info
