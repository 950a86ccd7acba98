# Sourced by the scripts beside it, with the names of extras: makes .venv once, installs this package, activates.
extras=$1
if [ ! -x .venv/bin/python ]; then
    echo "Making a virtual environment in .venv"
    python3 -m venv .venv
fi
source .venv/bin/activate
stamp=".venv/.installed-$extras"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "Installing litgpt-akl[$extras] into .venv, which takes some minutes"
    # torch first and by number: left to choose, pip may take a build of several GB
    pip install -qq --disable-pip-version-check torch==2.13.0
    pip install -qq --disable-pip-version-check torch==2.13.0 -e ".[$extras]"
    touch "$stamp"
fi
