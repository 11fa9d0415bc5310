#!/usr/bin/env bash
# The environment $VENV_VLLM with vLLM for the CPU, whose 4-bit kernel needs AVX-512: without it there is nothing to build. Nothing is done when it
# is there and unchanged.
set -euo pipefail
cd "$(dirname "$0")"
if ! grep -qw avx512f /proc/cpuinfo; then
  echo "vLLM: this machine has no AVX-512, so its environment is not built and its tests are skipped"
  exit 0
fi
venv=${VENV_VLLM:?"give the place of the environment"}
cmp -s vllm.txt "$venv/.installed" && exit 0
rm -rf "$venv"
"${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r vllm.txt
"$venv/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
cp vllm.txt "$venv/.installed"
