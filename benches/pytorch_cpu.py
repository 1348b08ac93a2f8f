"""PyTorch's times on the CPU for the shapes of benches/fused_lora.rs and benches/decoder_ops.rs.

    pip install torch --index-url https://download.pytorch.org/whl/cpu
    python benches/pytorch_cpu.py [--threads N]

Prints the median in microseconds of each row. Run it on a quiet machine right after the Rust benchmarks: only times from one
machine and one hour can be compared.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

TOKENS, HIDDEN, WIDE, HEADS, KV_HEADS, DIM, VOCAB = 512, 576, 1536, 9, 3, 64, 49152


def row(name, run, seconds=1.0):
    for _ in range(5):
        run()
    times, start = [], time.perf_counter()
    while len(times) < 10 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    print(f"{name:<44}{statistics.median(times) * 1e6:>12.1f} µs")


def with_backward(inputs, forward):
    """Runs forward and backward; `inputs` get gradients."""
    for tensor in inputs:
        tensor.requires_grad_(True)
    g = torch.randn_like(forward())

    def run():
        for tensor in inputs:
            tensor.grad = None
        forward().backward(g)

    return run


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")

    for m, k, r, n, dtype in [
        (128, 512, 8, 512, torch.float32),
        (128, 512, 8, 512, torch.bfloat16),
        (512, 576, 8, 576, torch.float32),
        (512, 2048, 16, 2048, torch.float32),
        (1, 2048, 16, 2048, torch.float32),
    ]:
        x, a, b = torch.randn(1, m, k, dtype=dtype), torch.randn(k, r, dtype=dtype), torch.randn(r, n, dtype=dtype)
        name = f"fused_lora/1x{m}x{k} r{r} {str(dtype).removeprefix('torch.')}"
        with torch.no_grad():
            row(name, lambda: (x @ a) @ b * 2.0)
        if dtype == torch.float32 and m > 1:
            row(name + " with backward", with_backward([x, a, b], lambda: (x @ a) @ b * 2.0))

    x, weight = torch.randn(TOKENS, HIDDEN), torch.randn(HIDDEN)
    gate, up = torch.randn(TOKENS, WIDE), torch.randn(TOKENS, WIDE)
    q = torch.randn(1, HEADS, TOKENS, DIM)
    k, v = torch.randn(1, KV_HEADS, TOKENS, DIM), torch.randn(1, KV_HEADS, TOKENS, DIM)
    w, head = torch.randn(WIDE, HIDDEN), torch.randn(VOCAB, HIDDEN)
    few, targets = torch.randn(TOKENS // 8, HIDDEN), torch.arange(TOKENS // 8)

    def attention():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def loss():
        return F.cross_entropy(few @ head.T, targets, reduction="sum")

    rows = [
        ("rms_norm", [x], lambda: F.rms_norm(x, (HIDDEN,), weight, 1e-5)),
        ("swiglu", [gate, up], lambda: F.silu(gate) * up),
        ("attention", [q, k, v], attention),
        ("linear", [x], lambda: x @ w.T),
        ("cross_entropy", [few], loss),
    ]
    for name, inputs, forward in rows:
        with torch.no_grad():
            row(f"{name}/forward", forward)
        row(f"{name}/forward and backward", with_backward(inputs, forward))


if __name__ == "__main__":
    main()
