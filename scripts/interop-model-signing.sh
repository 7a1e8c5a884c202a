#!/bin/sh
# Installs PyPI `model-signing`, the reference implementation of OpenSSF Model Signing, in a
# virtual environment of its own, and checks that it and slmops verify each other's signatures.
#
# Usage: scripts/interop-model-signing.sh [--install-only]
# The environment lies in $SLMOPS_VENV, or ~/.cache/slmops/venv.
set -eu

cd "$(dirname "$0")/.."
venv=${SLMOPS_VENV:-$HOME/.cache/slmops/venv}

if [ ! -x "$venv/bin/model_signing" ]; then
    echo "Installing model-signing in $venv ..." >&2
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check \
        'model-signing==1.1.1' 'pyopenssl>=24'
fi
if [ "${1:-}" = --install-only ]; then
    exit 0
fi
SLMOPS_MODEL_SIGNING=$venv/bin/model_signing
export SLMOPS_MODEL_SIGNING
exec cargo nextest run --release -p slmops-artifact -E 'test(/^interop::/)'
