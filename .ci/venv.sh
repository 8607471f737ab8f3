#!/usr/bin/env bash
# Make a virtual environment in the checkout, or reuse it where nothing that went into it has changed.
#
#   .ci/venv.sh NAME STEP...
#
# Each STEP is one `pip install`, in order: the file of that name (`-r`), else pip's own arguments, split at blanks.
# `python FILE` is a step, too: that script, run by the new environment's Python; all that lies beside it counts as its input.
# Relative paths in requirement files count from the checkout. PYTHON names the interpreter (python3).
# A step that moves a torch which an earlier one installed is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LOCK_TIMEOUT_S=1800

die() {
    echo "venv.sh: $*" >&2
    exit 1
}

# The interpreter behind an activated environment: the one that is rebuilt must not be the one that builds.
base_python() {
    local asked=${PYTHON:-python3}
    command -v "$asked" >/dev/null ||
        die "no $asked found; install Python >= 3.10 (Debian, Ubuntu: apt-get install python3 python3-venv) or set PYTHON=/path/to/python"
    "$asked" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$asked is $("$asked" -V 2>&1), Python >= 3.10 is needed; set PYTHON=/path/to/newer/python"
    "$asked" -c 'import sys; print(getattr(sys, "_base_executable", None) or sys.executable)'
}

# What the environment depends on: a change of any of it makes a new one. Scripts hold absolute paths, so the place counts too.
fingerprint() {
    {
        pwd -P
        echo "$python"
        "$python" -VV
        cat .ci/venv.sh
        # the settings of linters and test runners are no reason for a new environment
        awk '/^\[/ { counts = !/^\[+tool\./ || /^\[+tool\.setuptools/ } counts' pyproject.toml
        for step in "$@"; do
            echo "step: $step"
            [[ ! -f $step ]] || cat "$step"
            [[ $step != "python "* ]] || find "$(dirname "${step#python }")" -name '*.py' -print0 | sort -z | xargs -0 cat
        done
    } | sha256sum | cut -d' ' -f1
}

create() {
    [[ ! -e $venv || -f $venv/pyvenv.cfg || -z $(ls -A "$venv") ]] ||
        die "$venv is there but is no virtual environment; move it away"
    rm -rf "$venv"
    "$python" -m venv "$venv" && return
    # Debian and Ubuntu split ensurepip off into a package of its own
    if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
        echo "venv.sh: installing python3-venv, which this machine's Python lacks" >&2
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv </dev/null >&2 &&
            rm -rf "$venv" && "$python" -m venv "$venv" && return
    fi
    rm -rf "$venv"
    die "'$python -m venv' failed (its message is above); on Debian and Ubuntu: sudo apt-get install python3-venv"
}

torch_version() {
    "$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

run_step() {
    local before after
    before=$(torch_version)
    if [[ $1 == "python "* ]]; then script_step "${1#python }"; else install_step "$1"; fi
    after=$(torch_version)
    [[ -z $before || $before == "$after" ]] ||
        die "step '$1' moved torch from $before to ${after:-nowhere}; torch comes first and must stay: see what pulled the other one in"
}

script_step() {
    echo "$venv: $1" >&2
    "$venv/bin/python" "$1" </dev/null >&2 || die "$1 failed (its message is above); mend the cause and run make again"
}

install_step() {
    local arguments quiet=()
    if [[ -f $1 ]]; then arguments=(-r "$1"); else read -ra arguments <<<"$1"; fi
    [[ -t 2 ]] || quiet=(--quiet)
    echo "$venv: pip install ${arguments[*]}" >&2
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "${quiet[@]}" "${arguments[@]}" </dev/null >&2 ||
        die "pip install ${arguments[*]} failed (its message is above); mend the cause and run make again"
}

[[ $# -ge 2 ]] || die "usage: .ci/venv.sh NAME STEP..."
venv=$1
shift
# settings of other Python installations would send packages elsewhere, or make foreign ones look installed
unset PYTHONHOME PYTHONPATH PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_TARGET PIP_USER

python=$(base_python)
stamp=$venv/.stamp
want=$(fingerprint "$@")
is_current() { [[ -x $venv/bin/python && $(cat "$stamp" 2>/dev/null) == "$want" ]]; }
is_current && exit 0

mkdir -p .cache
exec 9>".cache/$venv.lock"
flock -w "$LOCK_TIMEOUT_S" 9 || die "another make has held .cache/$venv.lock for $LOCK_TIMEOUT_S s; is it stuck?"
is_current && exit 0 # made by another make meanwhile
started_s=$SECONDS
create
for step in "$@"; do run_step "$step"; done
echo "$want" >"$stamp"
echo "$venv: ready after $((SECONDS - started_s)) s" >&2
