# The whole project's verbs. `make help` lists them.
# One profile (release) builds, tests and lints, and one target folder outside the checkout is
# shared by every clone, so that llama.cpp is compiled once on a machine.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
export PATH := $(HOME)/.cargo/bin:$(PATH)
export CARGO_TARGET_DIR ?= $(HOME)/.cache/slmops/target
BIN := $(CARGO_TARGET_DIR)/release
PREFIX ?= $(HOME)/.local
MODEL ?=
.DEFAULT_GOAL := help

.PHONY: help
help: ## Lists these targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-8s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: ## Installs what building and testing need and this machine lacks (says what first)
	@scripts/setup.sh build model test

.PHONY: build
build: ## Builds slm and slm-agent
	@scripts/setup.sh build
	cargo build --release -p slmops-cli -p slmops-agent

.PHONY: demo
demo: ## Runs the whole product on a real model; KEEP=1 leaves it running; MODEL=path.gguf for your own
	@scripts/setup.sh build model
	cargo build --release -p slmops-cli -p slmops-agent
	@model="$(MODEL)"; test -n "$$model" || model=$$(scripts/fetch-model.sh); \
	  exec $(BIN)/slm demo --model "$$model" $(if $(KEEP),--keep)

.PHONY: test
test: fmt-check lint deny nextest ## Formatting, lints, dependency rules and every test

.PHONY: fmt-check
fmt-check:
	cargo fmt --all --check

.PHONY: lint
lint:
	cargo clippy --release --workspace --all-targets -- -D warnings

.PHONY: deny
deny:
	@scripts/deny.sh

.PHONY: nextest
nextest:
	@# The whole-program tests start slm-agent, which belongs to another crate than they do.
	cargo build --release --workspace --bins
	@# Signatures are checked against the reference implementation, imports against the real model.
	@scripts/interop-model-signing.sh --install-only
	@# The endpoint is scored by the usual evaluation harness.
	@scripts/interop-lm-eval.sh --install-only
	@# It is asked by the usual client, and by its own OpenAPI document.
	@scripts/interop-endpoint.sh --install-only
	@# What it pushes is decoded by OpenTelemetry's own messages.
	@scripts/interop-otlp.sh --install-only
	@# The blob store is tested against a server of the S3 protocol.
	@scripts/s3-server.sh
	SLMOPS_SMOLLM2="$$(scripts/fetch-model.sh)" cargo nextest run --release --workspace

SEEDS ?= 2000
FIRST_SEED ?= $(shell date +%s)
FUZZ_CASES ?= 1000000

.PHONY: nightly
nightly: ## Simulates SEEDS=2000 random fleets from FIRST_SEED=time, saves and shrinks what fails; FUZZ_CASES hostile deltas; hostile requests; real deltas over bad networks
	@echo "random fleets: SEEDS=$(SEEDS) FIRST_SEED=$(FIRST_SEED)" >&2
	SLM_SIM_SEEDS=$(SEEDS) SLM_SIM_FIRST_SEED=$(FIRST_SEED) \
	  cargo test --release -p slmops-sim --test simulation -- --nocapture random_seeds
	SLM_NETWORK_ROUNDS=10 cargo nextest run --release --workspace --no-capture -E 'test(bad_networks)'
	SLM_FUZZ_CASES=$(FUZZ_CASES) cargo test --release -p slmops-delta --test delta -- hostile
	cargo build --release --workspace --bins && scripts/interop-llama-tests.sh
	SLM_FUZZ_CASES=20000 SLM_SERVE_REQUESTS=10000 cargo nextest run --release --workspace --no-capture -E 'test(/^hostile::(damaged_requests|many_requests|equals_wait)/)'
	SLM_KILL_ROUNDS=500 cargo nextest run --release --workspace --no-capture -E 'test(a_kill_at_any_moment)'
	SLM_DELTA_KILLS=500 cargo test --release -p slmops-agent --test agent -- --nocapture no_kill_costs a_kill_while

.PHONY: bench
bench: build ## Measures the reference model and its variants on this machine
	@model="$(MODEL)"; test -n "$$model" || model=$$(scripts/fetch-model.sh); \
	  exec $(BIN)/slm optimize "$$model" --quantisation Q8_0,Q4_K_M,Q3_K_M --evaluate --out "$(CARGO_TARGET_DIR)/bench"

.PHONY: bench-delta
bench-delta: build ## Measures deltas between versions of the model, next to other tools (docs/benchmarks.md)
	@scripts/setup.sh bench
	@model="$(MODEL)"; test -n "$$model" || model=$$(scripts/fetch-model.sh); \
	  exec $(BIN)/slm bench delta "$$model" --weights 24000000

.PHONY: bench-serve
bench-serve: build ## Measures the endpoint next to the engine's own loop and other servers (docs/benchmarks.md)
	@scripts/bench-peers.sh
	@model="$(MODEL)"; test -n "$$model" || model=$$(scripts/fetch-model.sh); \
	  exec $(BIN)/slm bench serve "$$model"

.PHONY: guess-table
guess-table: ## Measures where guessing tokens ahead pays (docs/endpoint.md)
	@model="$(MODEL)"; test -n "$$model" || model=$$(scripts/fetch-model.sh); \
	  SLMOPS_SMOLLM2="$$model" exec cargo nextest run --release --workspace --no-capture \
	  --run-ignored only -E 'test(guesses_pay)'

.PHONY: gate-curves
gate-curves: ## Measures how soon the gate between waves sees an effect (docs/gates.md)
	cargo test --release -p slmops-fleet-core --lib curves -- --ignored --nocapture

.PHONY: install
install: build ## Installs slm and slm-agent into PREFIX/bin (default ~/.local/bin)
	install -d "$(PREFIX)/bin"
	install -m 755 $(BIN)/slm $(BIN)/slm-agent "$(PREFIX)/bin/"
	@echo "installed slm and slm-agent into $(PREFIX)/bin" >&2

.PHONY: generate
generate: ## Rewrites the generated files (docs/cli.md, snapshots)
	SLM_REGENERATE=1 TRYCMD=overwrite cargo nextest run --release -p slmops-cli
