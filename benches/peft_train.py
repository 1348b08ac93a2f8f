#!/usr/bin/env python3
"""The peers' side of `metal-candle bench train`: a training step of transformers with PEFT, the same sizes, random weights and tokens.

    pip install torch transformers peft          # on a GPU also: pip install liger-kernel
    python benches/peft_train.py --shape smollm2-135m --batch 1 --tokens 512 --rank 8 --modules qv --dtype f32 >> peers.jsonl

Prints one JSON object with the keys of `metal-candle bench train --json`. A step is loss, backward, gradient norm and AdamW (fused on a
GPU); `--grad-checkpoint` keeps each block's input only; `--liger` swaps in Liger's kernels. The first step is not counted.
"""

import argparse
import json
import resource
import statistics
import time

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

# hidden, MLP, blocks, heads, key heads, vocabulary; whether the embedding is the head too.
SHAPES = {
    "smollm2-135m": (LlamaConfig, LlamaForCausalLM, [576, 1536, 30, 9, 3, 49_152], True),
    "qwen2.5-0.5b": (Qwen2Config, Qwen2ForCausalLM, [896, 4864, 24, 14, 2, 151_936], True),
    "llama-3.2-1b": (LlamaConfig, LlamaForCausalLM, [2048, 8192, 16, 32, 8, 128_256], True),
    "llama-3.1-8b": (LlamaConfig, LlamaForCausalLM, [4096, 14_336, 32, 32, 8, 128_256], False),
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--modules", choices=["qv", "all"], default="all")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--liger", action="store_true")
    args = parser.parse_args()

    make_config, make_model, (hidden, wide, blocks, heads, kv_heads, vocab), tied = SHAPES[args.shape]
    config = make_config(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=131_072,
    )
    config._attn_implementation = "sdpa"
    if args.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen2

        (apply_liger_kernel_to_llama if make_config is LlamaConfig else apply_liger_kernel_to_qwen2)()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    with torch.device(args.device):
        model = make_model(config)
    torch.set_default_dtype(torch.float32)
    targets = ALL if args.modules == "all" else ["q_proj", "v_proj"]
    lora = peft.LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    model.train()
    model.config.use_cache = False
    if args.grad_checkpoint:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cuda = args.device == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=cuda)
    ids = torch.randint(0, vocab, (args.batch, args.tokens), device=args.device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        return loss.item()

    step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    took = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({
        "shape": args.shape, "batch": args.batch, "tokens": args.tokens, "dtype": args.dtype, "rank": args.rank,
        "modules": "all seven linears" if args.modules == "all" else "q and v",
        "checkpointing": "every block" if args.grad_checkpoint else "none",
        "machine": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
        + (", liger-kernel" if args.liger else ""),
        "tokens_per_second": args.batch * args.tokens / took, "step_ms": took * 1e3, "peak_bytes": peak,
    }))


main()
