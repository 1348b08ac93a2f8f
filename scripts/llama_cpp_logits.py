#!/usr/bin/env python3
"""llama_cpp_logits.py MODEL ADAPTER OURS TOKEN...: llama.cpp's logits, with the adapter and without, against ours. Run by
check-llama-cpp.sh."""

import json
import sys

import llama_cpp
import numpy as np

F32 = 0


def logits(model, adapter, tokens):
    llama = llama_cpp.Llama(model, lora_path=adapter, logits_all=True, n_ctx=64, n_batch=64, type_k=F32, type_v=F32, verbose=False)
    llama.eval(tokens)
    return np.array(llama.scores[: len(tokens)], np.float64)


model, adapter, ours = sys.argv[1:4]
tokens = [int(token) for token in sys.argv[4:]]
ours = np.array(json.load(open(ours))["logits"], np.float64)
theirs, bare = logits(model, adapter, tokens), logits(model, None, tokens)
largest = np.abs(theirs).max()
error, effect = np.abs(ours - theirs).max() / largest, np.abs(bare - theirs).max() / largest
print(f"{model}: {error:.1e} from llama.cpp {llama_cpp.__version__}; the adapter changes {effect:.1e}")
if not (error < 1e-4 < 1e-2 < effect):
    sys.exit("the adapter is not the same in llama.cpp")
