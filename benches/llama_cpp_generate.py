#!/usr/bin/env python3
"""llama_cpp_generate.py MODEL.gguf [TOKENS]: how fast llama.cpp generates on two threads, greedily, after the prompt that BENCHMARKS.md's
`metal-candle generate` has. Needs llama-cpp-python."""

import sys
import time

import llama_cpp

count = int(sys.argv[2]) if len(sys.argv) > 2 else 200
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads=2, n_threads_batch=2, verbose=False)
prompt = "<|im_start|>user\nWrite a story about a dog in a town.<|im_end|>\n<|im_start|>assistant\n"
model.eval(model.tokenize(prompt.encode(), special=True))
start = time.time()
for _ in range(count):
    model.eval([model.sample(temp=0.0)])
print(f"llama.cpp by llama-cpp-python {llama_cpp.__version__}: {count / (time.time() - start):.1f} tokens/s")
