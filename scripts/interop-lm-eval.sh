#!/bin/sh
# Installs PyPI `lm_eval`, the usual evaluation harness, in a virtual environment of its own, and checks
# that its `local-completions` model scores our endpoint as we score ourselves.
#
# Usage: scripts/interop-lm-eval.sh [--install-only]
# The environment lies in $SLMOPS_LM_EVAL_VENV, or ~/.cache/slmops/lm-eval.
set -eu

cd "$(dirname "$0")/.."
venv=${SLMOPS_LM_EVAL_VENV:-$HOME/.cache/slmops/lm-eval}

if [ ! -x "$venv/bin/lm_eval" ]; then
    echo "Installing lm_eval in $venv (about 500 MB) ..." >&2
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check 'lm_eval[api]==0.4.13'
fi
if [ "${1:-}" = --install-only ]; then
    exit 0
fi
SLMOPS_LM_EVAL=$venv/bin/lm_eval
export SLMOPS_LM_EVAL
exec cargo nextest run --release -p slmops-inference -E 'test(/^lm_eval::/)'
