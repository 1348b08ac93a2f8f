#!/usr/bin/env bash
# Makes assets/demo again: the texts, the tokenizer, and the base model, trained by this program from random weights in two
# cosine cycles (40 minutes on two cores). The same processor gives the same bytes; another one the same but for rounding.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$(mktemp -d)}

cargo build --release --bin metal-candle --example make_demo
target/release/examples/make_demo "$work"
cycle() { # model, result, the rest as flags
  local model=$1 result=$2
  shift 2
  target/release/metal-candle train --config assets/demo/base.yaml \
    --model "$work/$model" --data "$work/corpus" --adapter-path "$work/$result" "$@"
}
cycle start first
cycle first second --seed 7 --iters 1500

rm -rf assets/demo/base assets/demo/data
mkdir -p assets/demo/base
cp "$work"/second/{config.json,model.safetensors,tokenizer.json,tokenizer_config.json} assets/demo/base/
cp -r "$work/data" assets/demo/data
echo "assets/demo is new; the work is in $work"
