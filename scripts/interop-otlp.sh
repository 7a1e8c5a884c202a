#!/bin/sh
# Installs PyPI `opentelemetry-proto`, OpenTelemetry's own messages, in a virtual environment of their own, and
# checks that they decode what the endpoint pushes.
#
# Usage: scripts/interop-otlp.sh [--install-only]
# The environment lies in $SLMOPS_OTLP_VENV, or ~/.cache/slmops/otlp.
set -eu

cd "$(dirname "$0")/.."
venv=${SLMOPS_OTLP_VENV:-$HOME/.cache/slmops/otlp}

if [ ! -e "$venv/installed" ]; then
    echo "Installing opentelemetry-proto in $venv (about 20 MB) ..." >&2
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check opentelemetry-proto==1.45.2
    : > "$venv/installed"
fi
if [ "${1:-}" = --install-only ]; then
    exit 0
fi
SLMOPS_OTLP_VENV=$venv
export SLMOPS_OTLP_VENV
exec cargo nextest run --release --workspace -E 'package(slmops-inference) & test(/^otlp::/)'
