# Sourced by the scripts beside it, with the names of extras: makes .venv once, installs this package, activates.
extras=$1
torch=torch==2.13.0
cpu_index=https://download.pytorch.org/whl/cpu

# On Linux, PyPI's torch is the CUDA build of several GB.
install_torch() {
    if [ "$(uname -s)" = Linux ] && ! nvidia-smi > /dev/null 2>&1; then
        # an index that does not answer is left within seconds; what torch needs comes with the package
        pip install -qq --disable-pip-version-check --timeout 5 --retries 1 --no-deps --index-url "$cpu_index" \
            "$torch" > /dev/null 2>&1 && return
        echo "$cpu_index gives no $torch: taking PyPI's, which may be the CUDA build of several GB"
    fi
    pip install -qq --disable-pip-version-check "$torch"
}

if [ ! -x .venv/bin/python ]; then
    echo "Making a virtual environment in .venv"
    python3 -m venv .venv
fi
source .venv/bin/activate
stamp=".venv/.installed-$extras"
if [ ! -f "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "Installing litgpt-akl[$extras] into .venv, which takes some minutes"
    # torch first and by number: left to choose, pip may take another build or another version
    install_torch
    pip install -qq --disable-pip-version-check "$torch" -e ".[$extras]"
    touch "$stamp"
fi
