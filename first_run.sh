#!/bin/sh
# Makes the environment and trains a subject on images that ship. Nothing that is done is done again.
# Another Python than python3 for the environment: PYTHON=python3.12 ./first_run.sh
set -eu
cd "$(dirname "$0")"
"${PYTHON:-python3}" set_up.py
exec .venv/bin/python examples/shapes/first_run.py
