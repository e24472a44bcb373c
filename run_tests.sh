#!/bin/sh
# Makes the environment with what the tests need, then runs every check. Arguments go to pytest: ./run_tests.sh tests/options -x
# In a minute: ./run_tests.sh --quick
# Another Python than python3 for the environment: PYTHON=python3.12 ./run_tests.sh
set -u
cd "$(dirname "$0")" || exit 1
"${PYTHON:-python3}" set_up.py --dev || exit 1
failed=
.venv/bin/python -m ruff check || failed="$failed ruff"
# Beside the tests, whose processes do not end together.
types=$(mktemp) && trap 'rm -f "$types"' EXIT
.venv/bin/python -m mypy >"$types" 2>&1 &
mypy=$!
.venv/bin/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@" || failed="$failed pytest"
wait "$mypy" || failed="$failed mypy"
cat "$types"
[ -z "$failed" ] && exit 0
echo "Failed:$failed" >&2
exit 1
