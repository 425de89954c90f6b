# Sourced by the scripts: finds a Python, makes .venv ready with the given extras, and sets python.
# Usage: root=...; . "$root/scripts/_venv.sh"; ready test,dev

usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 15))' >/dev/null 2>&1
}

find_python() {
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.14 python3.10 python; do
        if usable "$name"; then
            echo "$name"
            return
        fi
    done
    echo "No usable Python found: 3.10 to 3.14 with its venv module is needed, and ${PYTHON:-python3} is" >&2
    echo "$("${PYTHON:-python3}" --version 2>&1 || true). Install one (Debian and Ubuntu: apt install python3-venv," >&2
    echo "macOS: brew install python) or name it: PYTHON=/path/to/python3.12 $0" >&2
    return 1
}

ready() {
    # A .venv that is a link belongs to someone else: it is used as it is.
    if [ -L "$root/.venv" ]; then
        PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
        export PYTHONPATH
    else
        found=$(find_python) || exit 1
        "$found" "$root/scripts/_venv.py" "$root" "$1" || exit 1
    fi
    python="$root/.venv/bin/python"
}

bitnet_mlx() {
    if [ -L "$root/.venv" ]; then
        "$python" -m bitnet_mlx "$@"
    else
        "$root/.venv/bin/bitnet-mlx" "$@"
    fi
}
