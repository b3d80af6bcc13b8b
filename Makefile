PYTHON ?= python3
RESOLVE_FOR ?= $(BIN)/python
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint types tests docs figures browser evidence conformance hosts torches resolve floor clients deepspeed outside derived quantised release clean

demo: $(READY)
	rm -rf demo-output
	$(BIN)/kromhc demo --output demo-output

test: lint types docs tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# Whole files to a process, so that a fixture of a module is made once, and what a file imports is imported once.
tests: $(READY) browser
	$(BIN)/python -m pytest -n auto --dist loadfile

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The pictures in docs/figures, which are kept in the repository.
figures: $(READY)
	$(BIN)/python scripts/draw_figures.py

# The test of the report looks at it in a browser.
browser:
	@command -v chromium > /dev/null || command -v google-chrome > /dev/null || \
	{ [ "$$(id -u)" = 0 ] && apt-get update --quiet=2 && apt-get install --quiet=2 --yes chromium > /dev/null; } || \
	echo "no browser, and it could not be installed: get the Debian package chromium to run the browser test"

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable ".[dev]"
	@touch $@

# The small study of docs/evidence.md again, held against what is published there.
evidence: $(READY)
	$(BIN)/python -m benchmarks.study benchmarks/studies/small.yaml --output evidence-output \
		--compare docs/evidence/small.json

conformance: $(READY)
	$(BIN)/python tests/conformance/run.py --write docs/conformance.md

# Whether pip installs the package beside other tools, each for the first of the Pythons that it has versions for.
resolve: $(READY)
	$(BIN)/python scripts/resolve.py $(foreach python,$(RESOLVE_FOR),--python $(python)) --write docs/installs-beside.md

# The tests that lean on other packages most, on the lowest version of each that pyproject.toml allows.
# PEFT's own suite is run by `make test` alone, on the newest.
floor: .venv-floor/.ready
	.venv-floor/bin/python -m pytest tests/peft tests/conversion tests/test_applying.py tests/test_training.py \
		--ignore tests/peft/test_peft_suite.py

.venv-floor/.ready: pyproject.toml constraints.txt constraints-floor.txt
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install --constraint constraints.txt --constraint constraints-floor.txt --editable ".[peft]" \
		accelerate bitsandbytes parameterized pillow pytest setuptools
	@touch $@

# Every family on every release of transformers that is tested, each installed into a folder of its own.
hosts: $(READY)
	$(BIN)/python tests/hosts/run.py --write docs/hosts.md

# The arithmetic on every release of torch, each installed into a folder of its own while it is needed.
torches: $(READY)
	PYTHONPATH=.:tests $(BIN)/python tests/torches/run.py --write docs/torch-releases.md

# The tools that people already use, each in an environment of its own: `make clients CLIENTS="lm_eval mergekit"` for some.
clients: $(READY)
	PYTHONPATH=.:tests $(BIN)/python -m clients.run $(CLIENTS) --write docs/works-with.md

# The tests under DeepSpeed, which makes every import of accelerate slower and wants a compiler.
deepspeed: $(READY)
	PYTHONPATH=.:tests $(BIN)/python -m clients.run deepspeed

# A model of flash-linear-attention, whose Triton kernels are interpreted on the CPU.
outside: .venv-outside/.ready
	TRITON_INTERPRET=1 .venv-outside/bin/python -m pytest tests/test_linear_attention.py

.venv-outside/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-outside
	.venv-outside/bin/pip install --constraint constraints.txt --editable ".[triton]" pytest flash-linear-attention
	@touch $@

# Rows read from source against those of the table, on the oldest release of transformers and the newest.
derived: $(READY)
	$(BIN)/python tests/hosts/derived.py

# Bases of every quantisation that transformers knows, as far as a CPU goes: `make quantised SCHEMES="--scheme gptq"` for some.
# What only this needs lies in a folder of its own; pip builds one of the packages against torch.
quantised: .quantised/.ready
	PYTHONPATH=.:.quantised $(BIN)/python tests/quantised/run.py $(SCHEMES) --write docs/quantised-bases.md

.quantised/.ready: $(READY) tests/quantised/packages.txt
	rm -rf .quantised
	$(BIN)/pip install --target .quantised wheel
	BUILD_CUDA_EXT=0 PYTHONPATH=.quantised $(BIN)/pip install --target .quantised --no-deps --no-build-isolation \
		--requirement tests/quantised/packages.txt
	@touch $@

# Wheel and source distribution in dist, checked as a package index would.
release: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) .venv-floor .venv-outside .quantised .hosts .torches .clients demo-output evidence-output example-output site dist build .pytest_cache .mypy_cache .ruff_cache
