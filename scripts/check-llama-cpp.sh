#!/usr/bin/env bash
# Adapters that llama.cpp applies at load: the tiny models and PEFT adapters of tests/fixtures, written by `convert --to gguf`, must give
# the logits that they give here, to 1e-4 of the largest, in f32.
#
# LLAMA_PYTHON names a Python that has llama-cpp-python; without it a virtual environment is made in target/llama-cpp, where pip builds
# llama.cpp (a C++ compiler, some minutes).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${LLAMA_PYTHON:-}" ]; then
  venv=target/llama-cpp
  [ -x $venv/bin/python ] || python3 -m venv $venv
  $venv/bin/python -c 'import llama_cpp' 2>/dev/null || $venv/bin/pip install -q llama-cpp-python
  LLAMA_PYTHON=$venv/bin/python
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cargo build --locked --bins --example logits
for family in llama llama_linear mistral qwen2 qwen3; do
  model=tests/fixtures/gguf/$family.gguf adapter=tests/fixtures/$family/adapter
  # llama.cpp computes these two without a window, so the row stays within it.
  case $family in
    mistral | qwen2) tokens="5 17 63 2" ;;
    *) tokens="5 17 63 2 40 40 9 33 1 12" ;;
  esac
  target/debug/metal-candle convert "$adapter" --to gguf --model "$model" --output "$work/$family.gguf" >/dev/null
  # shellcheck disable=SC2086
  target/debug/examples/logits "$model" --adapter "$adapter" $tokens >"$work/ours.json"
  # shellcheck disable=SC2086
  "$LLAMA_PYTHON" scripts/llama_cpp_logits.py "$model" "$work/$family.gguf" "$work/ours.json" $tokens
done
