# Every target sets up its own environment in .venv; nothing else on the machine is changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check format proto docs clean

demo: $(STAMP)  ## eight servers and a coordinator on this machine, compared with transformers
	$(BIN)/expertd demo

test: check  ## everything that CI runs
	$(BIN)/pytest

check: $(STAMP)  ## style, types, and that the generated code matches the .proto
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory proto OUT=$$(mktemp -d) CHECK=1

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# protoc runs from src/ so that the generated imports say expertd.proto.
OUT ?= src
proto: $(STAMP)  ## regenerate proto/expert_shard_pb2.py and .pyi
	cd src && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=$(abspath $(OUT)) --pyi_out=$(abspath $(OUT)) \
	  expertd/proto/expert_shard.proto
	$(if $(CHECK),@for f in expert_shard_pb2.py expert_shard_pb2.pyi; do cmp proto/$$f $(OUT)/expertd/proto/$$f \
	  || { echo "proto/$$f is out of date: run 'make proto' and commit the result"; exit 1; }; done)

docs: $(STAMP)  ## regenerate docs/configuration.md, docs/performance.md and its plot
	$(BIN)/python -m docs.generate.configuration
	$(BIN)/python -m docs.generate.performance

$(STAMP): pyproject.toml
	@echo "setting up $(VENV) (about two minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[server,client,test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
