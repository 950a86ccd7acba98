#!/usr/bin/env bash
# Sets everything up (a virtual environment in .venv, packages from pip) and runs the linter and the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
ruff check .
ruff format --check .
python -m pytest "$@"
