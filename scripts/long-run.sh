#!/usr/bin/env bash
# A long run whose memory must stay flat: 2,000 steps, passes of 256 tokens. From step 200 on the memory in use may grow by 1 %.
#
#   scripts/long-run.sh PROGRAM MODEL DATA FOLDER [option of train]...
#
# e.g. scripts/long-run.sh target/release/metal-candle models/SmolLM2-135M-Instruct.Q4_1.gguf DATA /tmp/long --dtype bf16
# DATA is a folder with train.jsonl and valid.jsonl (scripts/tldr-dataset.py makes one). The adapter and metrics.jsonl are in FOLDER.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
program=$1 model=$2 data=$3 folder=$4
shift 4
"$program" train --model "$model" --data "$data" --adapter-path "$folder" --iters 2000 --pack --batch-size 1 --max-seq-length 256 \
  --steps-per-report 20 --steps-per-eval 500 --val-batches 8 --save-every 500 "$@"
python3 - "$folder/metrics.jsonl" <<'CHECK'
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
reports = [line for line in lines if "train_loss" in line and line["step"] >= 200]
memory = [report["memory_bytes"] for report in reports]
peak = [report["peak_memory_bytes"] for report in reports]
losses = [line["val_loss"] for line in lines if "val_loss" in line]
growth = max(memory) / memory[0] - 1
print(f"{len(reports)} reports from step 200 to {reports[-1]['step']}: memory {memory[0] / 1e9:.3f} GB, then {min(memory) / 1e9:.3f} to "
      f"{max(memory) / 1e9:.3f} GB, {100 * growth:+.2f} %; peak {peak[0] / 1e9:.3f} to {peak[-1] / 1e9:.3f} GB")
print(f"validation loss {losses[0]:.4f} before, {losses[-1]:.4f} after")
sys.exit(growth > 0.01 or peak[-1] > 1.01 * peak[0] or reports[-1]["step"] != 2000)
CHECK
