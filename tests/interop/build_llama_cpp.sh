#!/bin/sh
# Builds the environment in which llama.cpp reads and writes GGUF files: llama-cpp-python, its C API from Python. The wheels on PyPI are of no use
# to us: xllamacpp's has no llama_model_quantize, llama-cpp-py-sync's asks for glibc 2.38. So it is compiled (a C++ compiler; about 20 minutes of a core),
# with this processor's instructions.
# Usage: tests/interop/build_llama_cpp.sh [DIRECTORY [PYTHON]]   (`make interop` says VENV_LLAMA=….venv-llama)
set -eu
target=${1:-${VENV_LLAMA:-.venv-llama}}
python=${2:-${PYTHON:-python3}}
here=$(cd "$(dirname "$0")" && pwd)
if [ -x "$target/bin/python" ] && "$target/bin/python" -c "import llama_cpp" >/dev/null 2>&1; then
    exit 0
fi
[ -x "$target/bin/python" ] || "$python" -m venv "$target"
CMAKE_ARGS="-DLLAVA_BUILD=OFF" "$target/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/llama_cpp.txt"
"$target/bin/python" -c "import llama_cpp; print('llama-cpp-python', llama_cpp.__version__, 'is ready')"
