#!/usr/bin/env bash
# Sets everything up (a virtual environment in .venv, packages from pip) and runs the linter and the tests.
# The slow tests run too with --all. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh test
if ! command -v chromedriver > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "Installing Chromium, in which the report page is tested"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium chromium-driver; } > /dev/null ||
        echo "It could not be installed: the tests that need it are skipped"
fi
ruff check .
ruff format --check .
# each test file in one of three processes, of which one often waits: the tests of a file share what it makes once
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
