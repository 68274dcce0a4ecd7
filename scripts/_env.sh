# What every script here needs: a virtual environment with dbop_raw and its tools in it. Source it; it changes to the checkout's root.
#
# Where it is made: $DBOP_RAW_VENV if set; else .venv in the checkout; else, where this user may not write there, in the user's own cache.
# Which Python makes it: $PYTHON if set; else the first of python3, python3.14 … python3.11 that is new enough.
# It is filled once, and again when pyproject.toml changes.

set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
cd "$root"

say() { printf '%s\n' "$*" >&2; }
die() { say "$0: $*"; exit 1; }

# A folder of this user alone, for when the checkout is somebody else's. In /tmp another user may have made it first: then refuse it.
own_folder() {
    local folder
    for folder in "${XDG_CACHE_HOME:-}" "${HOME:+$HOME/.cache}" "${TMPDIR:-/tmp}"; do
        [ -n "$folder" ] || continue
        folder="$folder/dbop_raw-$(id -u)"
        (umask 077 && mkdir -p "$folder") 2>/dev/null || continue
        [ -O "$folder" ] && [ ! -L "$folder" ] && [ -w "$folder" ] && { printf '%s\n' "$folder"; return; }
    done
    die "found no folder to write to: set DBOP_RAW_VENV to one for the virtual environment, and TMPDIR"
}

choose_folders() {
    venv="${DBOP_RAW_VENV:-$root/.venv}"
    if [ -w "$root" ] && { [ ! -e "$root/.venv" ] || [ -w "$root/.venv" ]; }; then
        return
    fi
    # Nothing can be written into the checkout: neither the environment nor what the tools remember.
    local own
    own="$(own_folder)" # by itself: bash sees the failure of the last substitution only
    own="$own/$(printf '%s' "$root" | cksum | cut -d ' ' -f 1)"
    mkdir -p "$own"
    venv="${DBOP_RAW_VENV:-$own/venv}"
    export MYPY_CACHE_DIR="$own/mypy" RUFF_CACHE_DIR="$own/ruff" HYPOTHESIS_STORAGE_DIRECTORY="$own/hypothesis"
    export PYTEST_ADDOPTS="-o 'cache_dir=$own/pytest' ${PYTEST_ADDOPTS:-}" PYTHONDONTWRITEBYTECODE=1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

make_venv() {
    local python found="" candidates=(python3 python3.14 python3.13 python3.12 python3.11)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for python in "${candidates[@]}"; do
        new_enough "$python" || continue
        found="$python"
        "$python" -c 'import ensurepip, venv' 2>/dev/null || continue
        say "making $venv with $("$python" --version) …"
        "$python" -m venv --clear "$venv" && return
        rm -rf "$venv"
        die "$python -m venv failed"
    done
    [ -n "$found" ] || die "needs Python 3.11 or newer, and found none (tried ${candidates[*]}): install one, or set PYTHON"
    die "$found has no venv or no ensurepip: install them (on Debian and Ubuntu: apt install python3-venv), or set PYTHON or DBOP_RAW_VENV"
}

stamp() { { cat pyproject.toml; printf '%s\n' "$root"; "$venv/bin/python" --version; } | cksum; }

fill_venv() {
    local log
    log="$(mktemp)"
    say "installing dbop_raw and its tools into $venv …"
    # A stamp from an earlier fill must not outlive a fill that fails.
    rm -f "$venv/.dbop_raw-stamp"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --quiet -e ".[dev,cli,embedded,bench,peers]" >"$log" 2>&1; then
        cat "$log" >&2
        rm -f "$log"
        die "pip could not install dbop_raw and its tools (above): is there a package index that can be reached?"
    fi
    rm -f "$log"
    stamp >"$venv/.dbop_raw-stamp"
}

prepare() {
    if ! new_enough "$venv/bin/python"; then
        make_venv
    fi
    if [ "$(cat "$venv/.dbop_raw-stamp" 2>/dev/null)" != "$(stamp)" ]; then
        fill_venv
    fi
}

choose_folders
mkdir -p "$(dirname "$venv")" || die "can't write $(dirname "$venv"): set DBOP_RAW_VENV to another place"
# Two scripts started together must not both fill it. Not every system has flock; there the second may have to be started again.
if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    flock 9
fi
prepare
exec 9>&-

export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
unset PYTHONHOME
