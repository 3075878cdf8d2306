# Two commands are enough: `make demo` and `make test`. Each builds .venv first, once. `make bench` takes most of an hour.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
DIST := dist
LOCK := UV_CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/uv pip compile --quiet pyproject.toml --extra timm --extra pretrain \
  --constraints .venv/tested.txt --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  --generate-hashes --no-emit-index-url --no-annotate

.PHONY: demo test test-slow bench audit fuzz chaos lint lock sbom format

demo: $(INSTALLED)
	$(BIN)/python jobs/compute_artifacts.py

test: lint audit
	$(BIN)/python -m pytest -n 2 tests/unit
	$(BIN)/python -m pytest -m "not slow" --ignore tests/unit

# What `make test` leaves out: trainings that are killed, whole tables, memory at scale.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks

# Known holes in what an image is made of, and secrets in the repository; ruff's S rules look at the code in `lint`.
audit: $(INSTALLED)
	$(BIN)/python -m tests.audit

# Twenty minutes; what fails lies in fuzz-failures/.
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz

# At least half an hour, on a quiet machine.
chaos: $(INSTALLED)
	$(BIN)/python -m tests.chaos

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The versions that the tests ran with, of a Linux machine with Python 3.11. UV_TORCH_BACKEND=cpu before `make lock` takes
# PyTorch's builds without CUDA, which are not on PyPI: they are installed from PyTorch's own index.
lock: $(INSTALLED)
	$(BIN)/python -m pip list --format=freeze --exclude-editable >.venv/tested.txt
	echo faiss-gpu >.venv/not-on-cpu.txt
	$(LOCK) --output-file cluster/requirements-cuda.txt
	echo "faiss-cpu>=1.9" | $(LOCK) - --excludes .venv/not-on-cpu.txt --output-file cluster/requirements-cpu.txt

# CycloneDX bills of materials of the two images, for a release to carry beside its wheel.
sbom: $(DIST)/sbom-cpu.json $(DIST)/sbom-cuda.json

$(DIST)/sbom-%.json: cluster/requirements-%.txt $(INSTALLED)
	mkdir -p $(DIST)
	$(BIN)/cyclonedx-py requirements $< --pyproject pyproject.toml --output-reproducible --output-file $@

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
