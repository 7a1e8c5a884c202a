#!/bin/sh
# Runs the tests of llama.cpp's own server against `slm serve`, started by a launcher that translates the flags
# (testdata/endpoint/llama-server). Their source comes with PyPI `llama-cpp-python`; no model is downloaded: the one
# of scripts/fetch-model.sh takes the place of all others.
#
# Usage: scripts/interop-llama-tests.sh [--all | PYTEST-ARGUMENTS]
# Without arguments, those that are known to pass (testdata/endpoint/llama-tests.txt); --all tries every one.
# They lie in $SLMOPS_LLAMA_TESTS, or ~/.cache/slmops/llama-tests.
set -eu

cd "$(dirname "$0")/.."
here=$PWD
folder=${SLMOPS_LLAMA_TESTS:-$HOME/.cache/slmops/llama-tests}
version=0.3.36
inside=vendor/llama.cpp/tools/server/tests

if [ ! -x "$folder/venv/bin/pytest" ] || [ ! -d "$folder/tests" ]; then
    echo "Fetching llama.cpp's server tests into $folder (77 MB) ..." >&2
    mkdir -p "$folder/download"
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
        pytest==9.2.0 requests wget openai==3.57.0 numpy prometheus-client aiohttp
    "$folder/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python \
        --dest "$folder/download" "llama-cpp-python==$version"
    tar -xzf "$folder/download/llama_cpp_python-$version.tar.gz" -C "$folder/download" \
        "llama_cpp_python-$version/$inside"
    rm -rf "$folder/tests"
    mv "$folder/download/llama_cpp_python-$version/$inside" "$folder/tests"
    rm -rf "$folder/download"
fi
SLMOPS_MODEL=${SLMOPS_MODEL:-$(scripts/fetch-model.sh)}
SLMOPS_SLM=${SLMOPS_SLM:-${CARGO_TARGET_DIR:-$HOME/.cache/slmops/target}/release/slm}
LLAMA_SERVER_BIN_PATH=$here/testdata/endpoint/llama-server
PYTHONPATH=$here/testdata/endpoint:$folder/tests
export SLMOPS_MODEL SLMOPS_SLM LLAMA_SERVER_BIN_PATH PYTHONPATH PYTHONDONTWRITEBYTECODE=1 no_proxy=127.0.0.1
if [ $# -eq 0 ]; then
    # The names of these tests have no spaces, but characters that would stand for files.
    set -f
    set -- $(grep -v '^#' testdata/endpoint/llama-tests.txt)
elif [ "$1" = --all ]; then
    shift
    set -- unit "$@"
fi
cd "$folder/tests"
exec "$folder/venv/bin/pytest" --noconftest -p llama_tests -p no:cacheprovider -q -rfE --tb=line "$@"
