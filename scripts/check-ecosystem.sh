#!/usr/bin/env bash
# Adapters and fused models, both ways, against the libraries that others use: PEFT with transformers, and mlx-lm.
#
#   scripts/check-ecosystem.sh            installs what is missing, and compares
#   scripts/check-ecosystem.sh install    only installs
# A tiny model's logits must agree to 1e-4 of the largest one, in f32. PEFT_PYTHON and MLX_PYTHON name Pythons that have the
# packages; without them a virtual environment is made in target/ecosystem. PyTorch is taken from its index for CPUs or, where that is out of
# reach, from PyPI with some gigabytes of CUDA libraries.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PEFT_PYTHON:-}" ] || [ -z "${MLX_PYTHON:-}" ]; then
  venv=target/ecosystem
  [ -x $venv/bin/python ] || python3 -m venv $venv
  pip() { $venv/bin/pip install -q --no-cache-dir "$@"; }
  $venv/bin/python -c 'import torch' 2>/dev/null || pip torch --index-url https://download.pytorch.org/whl/cpu || pip torch
  # On Linux mlx needs its CPU part; on a Mac there is none.
  mlx=mlx; [ "$(uname)" = Darwin ] || mlx='mlx[cpu]'
  $venv/bin/python -c 'import peft, mlx_lm' 2>/dev/null || pip transformers peft "$mlx" mlx-lm
  : "${PEFT_PYTHON:=$venv/bin/python}" "${MLX_PYTHON:=$venv/bin/python}"
fi
[ "${1:-}" != install ] || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
peft() { "$PEFT_PYTHON" -W ignore scripts/ecosystem.py "$@" 2>"$work/peft.log" || { cat "$work/peft.log" >&2; return 1; }; }
mlx() { "$MLX_PYTHON" scripts/ecosystem.py "$@"; }
compare() { python3 scripts/ecosystem.py compare "$@"; }

cargo build --locked --bins --example logits
candle() { target/debug/metal-candle "$@"; }
tokens=$(python3 scripts/ecosystem.py tokens)
ours() { mkdir -p "$work/ours"; target/debug/examples/logits "$1" ${2:+--adapter "$2"} $tokens >"$work/ours/${3:-$(basename "${2:-$1}")}.json"; }

echo "== the model itself"
python3 scripts/ecosystem.py model "$work"
model=$work/model
ours "$model"
peft peft-logits "$model" "$work/peft"
mlx mlx-logits "$model" "$work/mlx"
for library in peft mlx; do compare "$work/ours/model.json" "$work/$library/model.json"; done

echo "== adapters that were trained here"
train() { # NAME OPTION...
  local name=$1
  shift
  candle train --model "$model" --data "$work/data" --iters 6 --batch-size 4 --learning-rate 0.02 --max-seq-length 64 \
    --adapter-path "$work/adapters/$name" "$@" >"$work/train.log"
}
train trained --rank 3 --alpha 5 --target-modules all-linear
train trained-last --rank 2 --alpha 7 --target-modules q_proj,up_proj --num-layers 1
train trained-rslora --rank 3 --alpha 2 --use-rslora --init-lora-weights gaussian
train trained-dora --rank 3 --alpha 5 --fine-tune-type dora --loraplus-ratio 4
train trained-pissa --rank 3 --alpha 5 --init-lora-weights pissa
train trained-olora --rank 3 --alpha 5 --init-lora-weights olora --use-rslora
train trained-pissa-dora --rank 3 --alpha 5 --init-lora-weights pissa --fine-tune-type dora

echo "== adapters by PEFT and mlx-lm"
peft peft-make "$model" "$work/adapters"
mlx mlx-make "$model" "$work/adapters"

# What a form cannot hold is refused: tensors that were trained whole, in MLX's.
mkdir -p "$work/as-peft" "$work/as-mlx"
for adapter in "$work"/adapters/*; do
  name=$(basename "$adapter")
  candle convert "$adapter" --to peft --output "$work/as-peft/$name" >/dev/null
  if [[ $name == saved* ]]; then
    if candle convert "$adapter" --to mlx --output "$work/as-mlx/$name" 2>/dev/null; then
      echo "whole tensors were written in MLX's form" >&2; exit 1
    fi
  else
    candle convert "$adapter" --to mlx --output "$work/as-mlx/$name" >/dev/null
  fi
done
peft peft-logits "$model" "$work/peft" "$work"/as-peft/*
mlx mlx-logits "$model" "$work/mlx" "$work"/as-mlx/*
# Each library's answer to its own files, before they went through ours.
own=$(for adapter in "$work"/adapters/*; do [[ $(basename "$adapter") == mlx-* ]] || echo "$adapter"; done)
peft peft-logits "$model" "$work/own" $own
mlx mlx-logits "$model" "$work/own" "$work"/adapters/mlx-*
for adapter in "$work"/adapters/*; do
  name=$(basename "$adapter")
  compare "$work/ours/model.json" "$work/own/$name.json" differ
  compare "$work/own/$name.json" "$work/peft/$name.json"
  ours "$model" "$adapter"
  compare "$work/ours/$name.json" "$work/own/$name.json"
  if [[ $name != saved* ]]; then
    compare "$work/own/$name.json" "$work/mlx/$name.json"
    ours "$model" "$work/as-mlx/$name" "$name-as-mlx"
    compare "$work/ours/$name-as-mlx.json" "$work/own/$name.json"
  fi
done

echo "== fused models"
for name in trained patterns saved mlx-last trained-dora trained-pissa saved-head saved-embedding; do
  candle fuse --model "$model" --adapter "$work/adapters/$name" --output "$work/fused/$name" | tail -1
  peft peft-logits "$work/fused/$name" "$work/fused-peft"
  mlx mlx-logits "$work/fused/$name" "$work/fused-mlx"
  for library in peft mlx; do compare "$work/own/$name.json" "$work/fused-$library/$name.json"; done
done
echo "everything agrees"
