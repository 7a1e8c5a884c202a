#!/usr/bin/env bash
# Dependency rules (deny.toml). Bans, licences and sources need no network; the advisory database
# does: where it cannot be fetched that part is skipped, and said so.
set -euo pipefail
if ! cargo deny --version >/dev/null 2>&1; then
  echo "error: cargo-deny is not installed" >&2
  echo "hint: make setup" >&2
  exit 1
fi
cargo deny --log-level error check --hide-inclusion-graph bans licenses sources
if cargo deny --log-level error fetch db >/dev/null 2>&1; then
  cargo deny --log-level error check advisories
else
  echo "note: advisories were NOT checked: the database could not be fetched" >&2
fi
