#!/bin/sh
# Installs other servers of the same engine, which `slm bench serve` then measures beside ours: PyPI `xllamacpp` (wheels)
# and `llama-cpp-python` (a source package, whose llama.cpp is compiled: 10 to 60 minutes on two cores).
#
# Usage: scripts/bench-peers.sh [xllamacpp | llama-cpp-python]   both if none is named
# They lie in $SLMOPS_PEERS, or ~/.cache/slmops/peers; compiled wheels in ~/.cache/slmops/peer-wheels.
set -eu

cd "$(dirname "$0")/peers"
peers=${SLMOPS_PEERS:-$HOME/.cache/slmops/peers}
wheels=$HOME/.cache/slmops/peer-wheels

install() {
    name=$1
    shift
    venv=$peers/environments/$name
    if [ ! -e "$venv/installed" ]; then
        echo "Installing $name in $venv ..." >&2
        mkdir -p "$wheels"
        python3 -m venv "$venv"
        nice "$venv/bin/pip" install --quiet --disable-pip-version-check --find-links "$wheels" "$@"
        : > "$venv/installed"
    fi
    # Under a name that hides no module.
    cp peer.py "$venv/peer.py"
    cp "$name.py" "$venv/serve.py"
    printf '#!/bin/sh\nexec "%s/bin/python" "%s/serve.py" "$@"\n' "$venv" "$venv" > "$peers/$name"
    chmod +x "$peers/$name"
}

for peer in ${1:-xllamacpp llama-cpp-python}; do
    case $peer in
    xllamacpp) install xllamacpp xllamacpp==2026.10.11549 ;;
    llama-cpp-python)
        mkdir -p "$wheels"
        if ! ls "$wheels"/llama_cpp_python-0.3.36-*.whl >/dev/null 2>&1; then
            echo "Compiling llama-cpp-python ..." >&2
            nice python3 -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$wheels" llama-cpp-python==0.3.36
        fi
        install llama-cpp-python 'llama-cpp-python[server]==0.3.36'
        ;;
    *)
        echo "error: there is no peer \`$peer\`" >&2
        echo "hint: xllamacpp or llama-cpp-python" >&2
        exit 1
        ;;
    esac
done
