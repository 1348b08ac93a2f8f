#!/usr/bin/env python3
"""The work of benches/mlx_comparison.rs in MLX: the same shapes and dtype, every output evaluated in every call.

`pip install mlx` (on Linux `mlx[cpu]` or `mlx[cuda]`), then `python3 benches/mlx_baseline.py`: one JSON line a shape, microseconds a call (the fastest run, as
scripts/bench-report takes criterion's fastest sample: other work on a machine only adds time).
MLX is lazy: without mx.eval in the timed loop nothing is computed.
"""

import json
import time

import mlx.core as mx

# Rows of x, k = n, r: SHAPES of mlx_comparison.rs.
SHAPES = [(128, 512, 8), (128, 1024, 8), (128, 2048, 8), (128, 2048, 16), (1, 2048, 16)]
SCALING = 2.0
CALLS, RUNS, WARM_UP = 200, 10, 50


def delta(x, a, b):
    return SCALING * ((x @ a) @ b)


def microseconds(call):
    for _ in range(WARM_UP):
        mx.eval(call())
    runs = []
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(CALLS):
            mx.eval(call())
        runs.append((time.perf_counter() - start) / CALLS * 1e6)
    return min(runs)


def main():
    mx.random.seed(0)
    for rows, width, rank in SHAPES:
        x = mx.random.uniform(-1, 1, (1, rows, width))
        a = mx.random.uniform(-1, 1, (width, rank))
        b = mx.random.uniform(-1, 1, (rank, width))
        g = mx.random.uniform(-1, 1, (1, rows, width))
        mx.eval(x, a, b, g)
        backward = mx.value_and_grad(lambda x, a, b: (delta(x, a, b) * g).sum(), argnums=(0, 1, 2))
        print(
            json.dumps(
                {
                    "shape": f"{rows}x{width} r{rank}",
                    "device": str(mx.default_device()),
                    "mlx": mx.__version__,
                    "forward_us": round(microseconds(lambda: delta(x, a, b)), 2),
                    "forward_backward_us": round(microseconds(lambda: backward(x, a, b)), 2),
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
