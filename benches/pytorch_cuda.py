"""The rows of benches/cuda.rs in PyTorch: eager, torch.compile and, for small shapes, a CUDA graph.

    python3 benches/pytorch_cuda.py | tee pytorch.txt

Prints `work <tab> way <tab> warm µs <tab> cold µs` as the Rust program does; scripts/cuda-report takes both. Times are the median of
several rounds of calls in a loop with one synchronisation at the end; cold goes round buffers larger than the L2 cache.
"""

import statistics
import time

import torch

S = 1.75
ROUND_BYTES = 256 << 20


def inputs(m, k, r, n, dtype):
    def random(*shape, scale=1.0):
        return torch.randn(*shape, device="cuda").mul_(scale).to(dtype)

    tensors = dict(x=random(m, k), w=random(n, k, scale=0.02), a=random(k, r, scale=0.02), b=random(r, n, scale=0.02))
    for tensor in (tensors["x"], tensors["a"], tensors["b"]):
        tensor.requires_grad_(True)
    return tensors, random(m, n)


def delta(t):
    return (t["x"] @ t["a"] @ t["b"]) * S


def base(t):
    return t["x"] @ t["w"].t()


def linear(t):
    return torch.nn.functional.linear(t["x"], t["w"]) + (t["x"] @ t["a"] @ t["b"]) * S


def forward(function):
    def call(t, g):
        with torch.no_grad():
            return function(t)

    return call


def backward(function, names):
    def call(t, g):
        return torch.autograd.grad(function(t), [t[name] for name in names], g)

    return call


def run(work, size, dtype, calls, ways):
    m, k, r, n = size
    count = min(64, max(3, ROUND_BYTES // ((m * (k + n) + k * n) * torch.finfo(dtype).bits // 8)))
    sets = [inputs(m, k, r, n, dtype) for _ in range(count)]
    for way, call in ways:
        times = []
        for number in (1, count):
            rounds = []
            for round in range(8):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for i in range(calls):
                    call(*sets[i % number])
                torch.cuda.synchronize()
                if round > 0:
                    rounds.append((time.perf_counter() - start) / calls * 1e6)
            times.append(statistics.median(rounds))
        print(f"{work}\t{way}\t{times[0]:.2f}\t{times[1]:.2f}", flush=True)


def graphed(size, dtype):
    """The delta as a CUDA graph of one call, on one set of inputs."""
    t, g = inputs(*size, dtype)
    call = forward(delta)
    for _ in range(3):
        call(t, g)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(t, g)
    return lambda *_: graph.replay()


def ways(function, names):
    call = forward(function) if names is None else backward(function, names)
    compiled = torch.compile(function)
    return [
        ("PyTorch eager", call),
        ("torch.compile", forward(compiled) if names is None else backward(compiled, names)),
    ]


def main():
    print(f"# PyTorch {torch.__version__} on {torch.cuda.get_device_name()}")
    trained = ["x", "a", "b"]
    for work, size, dtype in [
        ("delta (128, 512, 512) r 8 f32", (128, 512, 8, 512), torch.float32),
        ("delta (128, 2048, 2048) r 8 bf16", (128, 2048, 8, 2048), torch.bfloat16),
    ]:
        run(work, size, dtype, 1000, [*ways(delta, None), ("PyTorch CUDA graph", graphed(size, dtype))])
    for n in (4096, 14336):
        size, shape = (8192, 4096, 16, n), f"(8192, 4096, {n})"
        run(f"delta {shape} r 16 bf16", size, torch.bfloat16, 20, ways(delta, None))
        run(f"linear forward {shape} r 16 bf16", size, torch.bfloat16, 20, [("PyTorch base alone", forward(base)), *ways(linear, None)])
        if n == 4096:
            run(f"delta forward+backward {shape} r 16 bf16", size, torch.bfloat16, 20, ways(delta, trained))
            bases = [("PyTorch base alone", backward(base, ["x"]))]
            run(f"linear forward+backward {shape} r 16 bf16", size, torch.bfloat16, 20, [*bases, *ways(linear, trained)])


if __name__ == "__main__":
    main()
