# Every target sets up its own environment in .venv; nothing else on the machine is changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test chaos check format proto released docs clean

demo: $(STAMP)  ## eight servers and a coordinator on this machine, compared with transformers
	$(BIN)/expertd demo

test: check  ## everything that CI runs
	$(BIN)/pytest

chaos: $(STAMP)  ## faults, kills, restarts, overload, soak and fuzz at full length: about two hours
	EXPERTD_CHAOS=full $(BIN)/pytest -s tests/chaos

check: $(STAMP)  ## style, types, that the generated code matches the .proto, and that no released caller is broken
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory proto OUT=$$(mktemp -d) CHECK=1
	$(BIN)/buf lint proto
	$(BIN)/buf format --diff --exit-code proto
	$(BIN)/buf breaking proto --against $(RELEASED)

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

RELEASED := proto/released.txtpb
released: $(STAMP)  ## with every release: the contract that later ones must not break
	$(BIN)/buf build proto --exclude-source-info -o $(RELEASED)

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
