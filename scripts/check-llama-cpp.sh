#!/usr/bin/env bash
# Adapters that llama.cpp applies at load: the tiny models and PEFT adapters of tests/fixtures, written by `convert --to gguf`, must give
# the logits that they give here, to 1e-4 of the largest, in f32. And models that llama.cpp loads: random ones of every family, with the
# tokenizers of tests/fixtures, written by `fuse --export-gguf` in every type, must have our logits and our tokens; the real SmolLM2, where
# scripts/fetch-test-models.sh brought it, must give our answer through its chat template.
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
cargo build --locked --bins --example logits --example tokens
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

program=target/debug/metal-candle
"$LLAMA_PYTHON" -c 'import json, sys; print(json.dumps(json.load(open(sys.argv[1]))["texts"]))' tests/fixtures/gguf/tokenizers.json >"$work/texts.json"
# llama.cpp's tekken takes marks for no part of a word, and its qwen2 does not compose characters.
"$LLAMA_PYTHON" -c 'import json, sys; print(json.dumps([text for text in json.load(open(sys.argv[1])) if not set(text) & {"\u093f", "\u0301"}]))' \
  "$work/texts.json" >"$work/few.json"
while read -r family tokenizer; do
  folder=$work/$family
  mkdir "$folder"
  target/debug/examples/tokens "tests/fixtures/gguf/tokenizer-$tokenizer.gguf" --save "$folder/tokenizer.json"
  "$LLAMA_PYTHON" scripts/llama_cpp_export.py make "$family" "$folder" "$folder-adapter"
  case $tokenizer in
    tekken | qwen2) texts=$work/few.json ;;
    *) texts=$work/texts.json ;;
  esac
  for kind in f16 bf16 q8_0 q4_k; do
    $program fuse --model "$folder" --export-gguf $kind --output "$work/bare.gguf" --force >/dev/null 2>&1
    $program fuse --model "$folder" --adapter "$folder-adapter" --export-gguf $kind --output "$work/$family.gguf" --force >/dev/null
    target/debug/examples/logits "$work/$family.gguf" 5 17 63 2 40 40 9 33 1 12 >"$work/ours.json"
    target/debug/examples/tokens "$work/$family.gguf" "$texts" >"$work/tokens.json"
    "$LLAMA_PYTHON" scripts/llama_cpp_export.py compare $kind "$work/$family.gguf" "$work/bare.gguf" "$work/ours.json" "$texts" "$work/tokens.json"
  done
done <<END
llama llama-bpe
llama_linear smollm
mistral spm
qwen2 qwen2
qwen3 tekken
END

model=models/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f $model ]; then
  echo "SKIPPED: $model is not there; scripts/fetch-test-models.sh brings it"
  exit 0
fi
mkdir "$work/data"
for i in 1 2 3 4; do
  printf '{"prompt": "What is %s plus %s?", "completion": "Well, my friend, that makes %s."}\n' $i $i $((i + i))
done >"$work/data/train.jsonl"
$program train --model $model --data "$work/data" --iters 6 --batch-size 2 --rank 4 --learning-rate 5e-4 --adapter-path "$work/adapter" >/dev/null
$program fuse --model $model --adapter "$work/adapter" --export-gguf q8_0 --output "$work/smollm2.gguf"
for question in "What is the capital of France?" "Why is the sky blue?"; do
  $program generate --model "$work/smollm2.gguf" -p "$question" -m 48 >"$work/answer"
  "$LLAMA_PYTHON" scripts/llama_cpp_export.py chat "$work/smollm2.gguf" "$question" "$work/answer"
done
