#!/bin/sh
# Builds the environment in which auto-gptq 0.7.1, the strangest reader of our GPTQ checkpoints, still imports.
# It is no longer maintained and does not know transformers 5, so it cannot share ours.
# Usage: tests/interop/build.sh DIRECTORY [PYTHON]   (make interop calls it with .venv-interop)
set -eu
target=${1:?usage: build.sh DIRECTORY [PYTHON]}
python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
[ -x "$target/bin/python" ] || "$python" -m venv "$target"
"$target/bin/python" -m pip install --quiet --upgrade pip "setuptools<80" wheel
"$target/bin/python" -m pip install --quiet -r "$here/requirements.txt"
# its setup.py imports torch, so no build isolation; the CUDA extension is of no use on a CPU
BUILD_CUDA_EXT=0 "$target/bin/python" -m pip install --quiet --no-build-isolation --no-deps auto-gptq==0.7.1
"$target/bin/python" -c "import auto_gptq; print('auto-gptq', auto_gptq.__version__, 'ready')"
