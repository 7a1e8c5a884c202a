#!/bin/sh
# Installs PyPI `moto`, a server of the S3 protocol that the tests of the blob store run against, in
# a virtual environment of its own: $SLMOPS_S3_VENV, or ~/.cache/slmops/s3-server.
set -eu

venv=${SLMOPS_S3_VENV:-$HOME/.cache/slmops/s3-server}
if [ ! -x "$venv/bin/moto_server" ]; then
    echo "Installing an S3 server for the tests (moto) in $venv ..." >&2
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check \
        'moto[s3]==5.2.5' 'flask>=3,<4' 'flask-cors>=6,<7'
fi
