# Everything a newcomer types. `make help` lists it; each target does its own set-up.

CARGO ?= cargo

.PHONY: help setup packages build try demo test fuzz fuzz-short bench fmt clippy check clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

packages:
	@resources/lab/need packages >/dev/null

build: ## the programs, optimized, in target/release
	$(CARGO) build --release --locked --package runnel --package runnel-vmm --package runnel-agent

setup: ## Debian packages, kernels and guests that tests and the demo use; they do it themselves if need be
	@resources/lab/need kernel/6.1-cloud kernel/6.1 kernel/6.12-cloud host/6.1-cloud host/6.12-cloud host-root \
		guest/6.1-cloud guest/6.1 guest/6.12-cloud registry >/dev/null

try: ## a minute with a machine that runs on any KVM: run, save, verify, serve and resume it
	$(CARGO) build --release --locked --package runnel --package runnel-vmm --package runnel-agent
	$(CARGO) build --release --locked --package runnel-tests --bin bare-guest
	@resources/try/run

demo: packages ## a Debian guest goes on on another host before it has arrived there; report in target/demo (10 to 20 minutes)
	$(CARGO) build --release --locked --package runnel --package runnel-vmm --package runnel-agent --package runnel-tests --bins
	@resources/demo/run

# All targets at once: a build of the programs alone would compile every crate a second time, for other features.
test: packages ## every test of both levels
	$(CARGO) build --locked --workspace --all-targets
	$(CARGO) test --locked --workspace --no-fail-fast

fuzz: packages ## feed each reader of untrusted bytes a million strange inputs; FUZZ_RUNS=<n> changes how many
	@tests/fuzz/run

# From one beginning each time: CI fails for what a change did, and not by chance.
fuzz-short: packages ## what CI does of it: the corpus, and some thousand inputs beyond
	@FUZZ_RUNS=$${FUZZ_RUNS:-5000} FUZZ_SEED=1 tests/fuzz/run

bench: packages build ## measure, into target/bench/report.json; RUNNEL_PEER_FIRECRACKER=<binary> measures Firecracker too
	RUNNEL_PROGRAMS=$(CURDIR)/target/release $(CARGO) run --locked --package runnel-tests --bin bench

fmt: ## format the sources
	$(CARGO) fmt --all

clippy: ## lint, warnings denied
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings

check: ## what CI does before it tests: formatting and lints
	$(CARGO) fmt --all --check
	$(MAKE) --no-print-directory clippy

clean: ## remove target/, built programs, kernels and guests
	$(CARGO) clean
