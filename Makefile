# Every target sets up its own environment in .venv; nothing else on the machine is changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE_SOURCES := $(wildcard native/*.cc native/*/*.cc native/*/*.h)

.PHONY: demo computing test image-test vllm-test chaos check format proto wheel images images-twice sbom lock released docs clean

demo: $(STAMP)  ## eight servers and a coordinator on this machine, compared with transformers
	$(BIN)/expertd demo

# Tests that compute, or run commands to their end, and mind no clock. They have what the others, which wait half of their
# time, leave of the processors.
COMPUTING := $(addprefix tests/,kernels/cutile kernels/model kernels/numerics kernels/oracle kernels/weights client/integrations \
  client/placement/test_assignment.py client/stream/test_compiled.py client/test_families.py client/tools/bench/test_sections.py \
  client/tools/test_ports.py docs native/node native/test_build.py native/test_cuda.py native/test_rules.py native/test_wheels.py \
  system/deploy system/test_demo.py)
# What fails, mostly for want of processors, is run once more when there is nothing beside it. But not a wrong result: the
# exit code of that is another one (tests/support/fence/wrong.py).
FAILED := .pytest_cache/failed
PYTEST_COMPUTING := $(BIN)/pytest -rs -o timeout=1800 -o cache_dir=$(FAILED)/computing $(COMPUTING)
PYTEST_WAITING := $(BIN)/pytest -rs -o cache_dir=$(FAILED)/waiting $(COMPUTING:%=--ignore=%)
AGAIN := --last-failed --last-failed-no-failures none
computing: check
	EXPERTD_CRASH_FILE=$${EXPERTD_CRASH_FILE:+$$EXPERTD_CRASH_FILE.computing} $(PYTEST_COMPUTING)

# Not $(MAKE) in the recipe itself: make would run it even where it is only to show it.
BESIDE = $(MAKE) --no-print-directory computing
test: $(STAMP)  ## everything that CI runs; there also image-test, where it is root on Debian
	@rm -rf $(FAILED); log=$$(mktemp); nice -n 19 $(BESIDE) > $$log & \
	beside=$$!; trap "kill $$beside" INT TERM; \
	$(PYTEST_WAITING); status=$$?; \
	echo "waiting for what runs beside"; \
	wait $$beside; failed=$$?; cat $$log; rm $$log; \
	[ $$status != 1 ] || { echo "what failed with others beside it, alone:"; $(PYTEST_WAITING) $(AGAIN); status=$$?; }; \
	[ $$failed = 0 ] || { echo "what failed beside the others, alone:"; $(PYTEST_COMPUTING) $(AGAIN) || status=$$?; }; \
	exit $$status

image-test: $(STAMP)  ## build the images, run them with compose and with network faults, as root on Debian: see docs/deployment.md
	EXPERTD_IMAGE_TEST=1 $(BIN)/pytest -rs tests/system/containers

vllm-test: $(STAMP)  ## vLLM with its experts on servers, in an environment of its own (3.5 GB in ~/.cache/expertd): see docs/engines.md
	EXPERTD_VLLM_TEST=1 $(BIN)/pytest -rs tests/system/vllm

chaos: $(STAMP)  ## faults, kills, restarts, overload, soak and fuzz at full length: about two hours
	EXPERTD_CHAOS=full $(BIN)/pytest -s tests/chaos

# Modules of one folder at most.
ROOM := 14
# A module of tests, or their fixtures, as something to import from or to import.
TEST_IMPORT := ^\s*(from|import) tests\.(\w+\.)*(test_|conftest)|^\s*from tests(\.\w+)* import (.*\W)?(test_|conftest)
check: $(STAMP)  ## style, types, rooms, that the generated code matches the .proto, and that no released caller is broken
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	@git ls-files '*.py' | xargs dirname | sort | uniq -c | awk '$$1 > $(ROOM) { print $$2 " has " $$1 " modules, more than $(ROOM): give them rooms"; bad = 1 } END { exit bad }'
	@! git grep -nE '^(<<<<<<<|>>>>>>>) ' || { echo "a merge was not finished"; exit 1; }
	@! git grep -nE '$(TEST_IMPORT)' -- tests || { echo "tests do not import tests: what they share is in tests/support"; exit 1; }
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_SOURCES)
	$(MAKE) --no-print-directory proto OUT=$$(mktemp -d) CHECK=1
	$(BIN)/buf lint proto
	$(BIN)/buf format --diff --exit-code proto
	$(BIN)/buf breaking proto --against $(RELEASED)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(NATIVE_SOURCES)

# protoc runs from src/ so that the generated imports say expertd.proto.
OUT ?= src
CONTRACTS := expert_admin expert_shard
proto: $(STAMP)  ## regenerate proto/*_pb2.py and .pyi
	cd src && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=$(abspath $(OUT)) --pyi_out=$(abspath $(OUT)) \
	  $(CONTRACTS:%=expertd/proto/%.proto)
	$(if $(CHECK),@for f in $(foreach one,$(CONTRACTS),$(one)_pb2.py $(one)_pb2.pyi); do cmp proto/$$f $(OUT)/expertd/proto/$$f \
	  || { echo "proto/$$f is out of date: run 'make proto' and commit the result"; exit 1; }; done)

RELEASED := proto/released.txtpb
released: $(STAMP)  ## with every release: the contract that later ones must not break
	$(BIN)/buf build proto --exclude-source-info -o $(RELEASED)

docs: $(STAMP)  ## regenerate docs/configuration.md, docs/modules.md, docs/performance.md, the tables of docs/models.md and pictures
	$(BIN)/python -m docs.generate.configuration
	$(BIN)/python -m docs.generate.models
	$(BIN)/python -m docs.generate.modules
	$(BIN)/python -m docs.generate.performance
	$(BIN)/python -m docs.generate.rooms

# The native core is compiled by the package's build, into src/expertd/.
$(STAMP): pyproject.toml setup.py native/building.py $(NATIVE_SOURCES)
	@echo "setting up $(VENV) (about two minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[server,client,test]'
	@touch $@

TOOLS := build/tools
wheel:  ## dist/*.whl as the images have it, with the commit in its version and date: the same bits from any folder
	rm -rf build
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/build.lock
	CXX=none $(TOOLS)/bin/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index --wheel-dir dist .

RELEASE = $(shell sed -n 's/^RELEASE = "\(.*\)"/\1/p' src/expertd/version.py)
COMMIT = $(shell git describe --always --dirty --abbrev=40 '--exclude=*')
SHORT = g$(shell git describe --always --dirty=.dirty --abbrev=12 '--exclude=*')
DATE = $(shell git log -1 --format=%ct)
ORIGIN = --build-arg VERSION=$(RELEASE)+$(SHORT) --build-arg REVISION=$(COMMIT) --build-arg SOURCE_DATE_EPOCH=$(DATE) \
  --build-arg CREATED=$(shell date --utc --date=@$(DATE) +%FT%TZ)
images:  ## expertd:RELEASE-gCOMMIT and expertd-client:RELEASE-gCOMMIT, with their origin; BUILD is more for `docker build`
	docker build $(ORIGIN) $(BUILD) --tag expertd:$(RELEASE)-$(SHORT) .
	docker build $(ORIGIN) $(BUILD) --target client --tag expertd-client:$(RELEASE)-$(SHORT) .

images-twice: $(STAMP)  ## build the client's image twice from nothing and compare its layers, as root on Debian: minutes
	$(BIN)/python -m tests.system.containers.twice

sbom:  ## dist/*.cdx.json: what the images hold of Python, as CycloneDX; each image has its own in /opt/expertd
	mkdir -p dist
	for lock in client server; do $(PYTHON) requirements/sbom.py requirements/$$lock.lock $(RELEASE)+$(SHORT) \
	  > dist/expertd-$$lock.cdx.json || exit 1; done

# torch's CPU build is on no package index: CPU_TORCH is where it is found, a folder or a page of links.
CPU_TORCH ?= $(PIP_FIND_LINKS)
LOCK := uv --no-config pip compile --quiet --upgrade --generate-hashes --no-header --no-annotate \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28
lock: $(STAMP)  ## resolve again what the images install
	$(BIN)/pip install --quiet --disable-pip-version-check uv==0.13.8
	env -u PIP_FIND_LINKS $(BIN)/$(LOCK) requirements/build.in -o requirements/build.lock
	env -u PIP_FIND_LINKS $(BIN)/$(LOCK) pyproject.toml requirements/image.in --extra server \
	  --no-emit-package triton -o requirements/server.lock
	for extra in client demo; do env -u PIP_FIND_LINKS $(BIN)/$(LOCK) pyproject.toml requirements/image.in requirements/cpu.in \
	  --extra $$extra --find-links $(CPU_TORCH) -o requirements/$$extra.lock || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info src/expertd/_native*.so
