# shellcheck shell=bash
# Sourced by the scripts beside it, never run. Gives: root, work (removed at exit), and the functions below.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/inferos-ci.XXXXXX")
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1

say() { printf '\n=== [%4d s] %s\n' "$SECONDS" "$*"; }

# copy_tree DIR: what git tracks, as it stands in the work tree. A file that was never added is missing there, as it would be in a clone.
copy_tree() {
  mkdir -p "$1"
  (cd "$root" && git ls-files -z | tar -c --null -T -) | tar -x -C "$1"
}

# readme_command N: the text of the N-th ```sh block of README.md.
readme_command() {
  awk -v wanted="$1" '/^```sh$/ { n++; inside = 1; next } /^```$/ { inside = 0 } inside && n == wanted' "$root/README.md"
}

# requirements EXTRA...: the requirements of these extras of pyproject.toml, one a line.
requirements() {
  python3 - "$root/pyproject.toml" "$@" <<'PY'
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print("\n".join(requirement for extra in sys.argv[2:] for requirement in extras[extra]))
PY
}

# make_venv DIR EXTRA...: a fresh virtual environment with the requirements of these extras, inferos itself not among them.
make_venv() {
  local venv=$1
  shift
  python3 -m venv "$venv"
  if [ $# -gt 0 ]; then
    requirements "$@" >"$work/requirements.txt"
    "$venv/bin/pip" install --quiet -r "$work/requirements.txt"
  fi
}

# build_cpp DIR TARGET CMAKE_OPTION...: one of the C++ test programs, without Python.
build_cpp() {
  local build=$1 target=$2
  shift 2
  if ! command -v cmake >/dev/null; then
    python3 -m venv "$work/cmake"
    "$work/cmake/bin/pip" install --quiet cmake ninja
    PATH=$work/cmake/bin:$PATH
  fi
  cmake -S "$root" -B "$build" -DINFEROS_PYTHON=OFF -DINFEROS_CPP_TESTS=ON "$@" >"$work/cmake.log" || { cat "$work/cmake.log"; return 1; }
  cmake --build "$build" --target "$target" --parallel 2
}
