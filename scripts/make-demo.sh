#!/usr/bin/env bash
# Makes assets/demo again: the texts, the tokenizer, and the base model, trained by this program from random weights (a quarter
# of an hour on two cores). Every draw comes from fixed seeds; another processor, or a changed kernel, rounds otherwise and gives
# another base of the same kind.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-$(mktemp -d)}

cargo build --release --bin metal-candle --example make_demo
target/release/examples/make_demo "$work"
target/release/metal-candle train --config assets/demo/base.yaml \
  --model "$work/start" --data "$work/corpus" --adapter-path "$work/base"

rm -rf assets/demo/base assets/demo/data
mkdir -p assets/demo/base
cp "$work"/base/{config.json,model.safetensors,tokenizer.json,tokenizer_config.json} assets/demo/base/
cp -r "$work/data" assets/demo/data
echo "assets/demo is new; the work is in $work"
