#!/bin/sh
# Builds the environment in which auto-gptq 0.7.1, a reader and writer of GPTQ checkpoints that is not ours, still imports.
# It is no longer maintained and does not know transformers 5, so it cannot share our environment.
# Usage: tests/interop/build.sh [DIRECTORY [PYTHON]]   (`make interop` says VENV_INTEROP=….venv-interop)
set -eu
target=${1:-${VENV_INTEROP:-.venv-interop}}
python=${2:-${PYTHON:-python3}}
here=$(cd "$(dirname "$0")" && pwd)
if [ -x "$target/bin/python" ] && "$target/bin/python" -c "import auto_gptq" >/dev/null 2>&1; then
    exit 0
fi
[ -x "$target/bin/python" ] || "$python" -m venv "$target"
"$target/bin/python" -m pip install --quiet --disable-pip-version-check "setuptools<80" wheel
"$target/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
# its setup.py imports torch, so no build isolation; the CUDA extension is of no use on a CPU
BUILD_CUDA_EXT=0 "$target/bin/python" -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps auto-gptq==0.7.1
"$target/bin/python" -c "import auto_gptq; print('auto-gptq', auto_gptq.__version__, 'is ready')"
