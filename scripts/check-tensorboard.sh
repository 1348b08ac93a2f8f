#!/usr/bin/env bash
# Trains the demo with --report-to tensorboard, continues it from an older checkpoint, and reads the event files back with
# TensorBoard's own reader: every scalar must be the one in metrics.jsonl.
#
# check-tensorboard.sh PROGRAM (default: target/release/metal-candle). Needs python3 with venv and pip; TensorBoard from PyPI goes
# into target/tensorboard-venv.
set -euo pipefail
cd "$(dirname "$0")/.."
program=$(realpath "${1:-target/release/metal-candle}")
venv=$PWD/target/tensorboard-venv
if ! [ -x "$venv/bin/tensorboard" ]; then
  python3 -m venv "$venv"
  # pkg_resources, which TensorBoard imports, left setuptools with 81.
  "$venv/bin/pip" install --quiet 'tensorboard==2.*' 'setuptools<81'
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
options=(--iters 20 --steps-per-report 3 --steps-per-eval 10 --val-batches 2 --save-every 10 --report-to tensorboard)
"$program" train "${options[@]}" >first.log
run=metal-candle-demo/adapter
# Steps 11 to 20 are done again, and TensorBoard must forget the first ones.
rm -r "$run/checkpoints/step-0000020"
"$program" train "${options[@]}" --resume >second.log
[ "$(ls "$run/runs" | wc -l)" = 2 ]

"$venv/bin/python" - "$run" <<'PYTHON'
import json
import math
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

run = sys.argv[1]
TAGS = {
    "train/loss": "train_loss", "train/learning_rate": "learning_rate", "train/tokens_per_second": "tokens_per_second",
    "train/grad_norm": "grad_norm", "eval/loss": "val_loss",
}
events = EventAccumulator(f"{run}/runs", size_guidance={"scalars": 0})
events.Reload()
found = events.Tags()["scalars"]
if sorted(found) != sorted(TAGS):
    sys.exit(f"the tags are {found}")
with open(f"{run}/metrics.jsonl") as lines:
    rows = [json.loads(line) for line in lines]
for tag, key in TAGS.items():
    scalars = [(event.step, event.value) for event in events.Scalars(tag)]
    wanted = [(row["step"], row[key]) for row in rows if key in row]
    # Event files hold f32.
    same = [a[0] == b[0] and math.isclose(a[1], b[1], rel_tol=1e-6) for a, b in zip(scalars, wanted)]
    if len(scalars) != len(wanted) or not all(same):
        sys.exit(f"{tag}: {scalars} in the event files, {wanted} in metrics.jsonl")
    print(f"{tag}: {len(scalars)} scalars, as in metrics.jsonl")
PYTHON
