#!/bin/sh
# Installs PyPI `openai`, the usual client, and `schemathesis`, which asks by an OpenAPI document, in a virtual
# environment of their own, and checks the endpoint with both.
#
# Usage: scripts/interop-endpoint.sh [--install-only]
# The environment lies in $SLMOPS_ENDPOINT_VENV, or ~/.cache/slmops/endpoint.
set -eu

cd "$(dirname "$0")/.."
venv=${SLMOPS_ENDPOINT_VENV:-$HOME/.cache/slmops/endpoint}

if [ ! -x "$venv/bin/schemathesis" ]; then
    echo "Installing openai and schemathesis in $venv (about 140 MB) ..." >&2
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0 schemathesis==4.32.5
fi
if [ "${1:-}" = --install-only ]; then
    exit 0
fi
SLMOPS_ENDPOINT_VENV=$venv
export SLMOPS_ENDPOINT_VENV
exec cargo nextest run --release --workspace -E 'package(slmops-inference) & test(/^clients::/)'
