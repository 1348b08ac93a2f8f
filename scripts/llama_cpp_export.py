#!/usr/bin/env python3
"""Files of `fuse --export-gguf` in llama.cpp. Run by check-llama-cpp.sh.

llama_cpp_export.py make FAMILY FOLDER ADAPTER      a random model for FOLDER/tokenizer.json, and a PEFT adapter for it
llama_cpp_export.py compare TYPE FILE BARE OURS TEXTS TOKENS
                                                    llama.cpp's logits and tokens of FILE against ours; BARE is without the adapter
llama_cpp_export.py chat FILE QUESTION ANSWER       llama.cpp's greedy answer through FILE's chat template against ours
"""

import json
import pathlib
import sys

import numpy as np

F32 = 0
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS = 256, 512, 2, 8, 4
VARIANTS = {
    "llama": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 64}, "tie_word_embeddings": False},
    "llama_linear": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
                     "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "mistral": {"sliding_window": 64, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": False},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 64},
}


def write_safetensors(path, tensors):
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensor.tobytes() for tensor in tensors.values()))


def make(family, folder, adapter):
    folder, adapter = pathlib.Path(folder), pathlib.Path(adapter)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    # More rows than tokens, as many models have.
    vocab = len(tokenizer["model"]["vocab"]) + 5
    config = {"model_type": family, "vocab_size": vocab, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
              "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
              "rope_theta": 10000.0, **VARIANTS[family]}
    (folder / "config.json").write_text(json.dumps(config))
    special = [token["content"] for token in tokenizer["added_tokens"] if token["special"]]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[-1], "bos_token": special[0]}))
    head_dim = config.get("head_dim", HIDDEN // HEADS)
    queries, keys = HEADS * head_dim, KV_HEADS * head_dim
    linears = {"self_attn.q_proj": (queries, HIDDEN), "self_attn.k_proj": (keys, HIDDEN), "self_attn.v_proj": (keys, HIDDEN),
               "self_attn.o_proj": (HIDDEN, queries), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
               "mlp.down_proj": (HIDDEN, INNER)}
    random = np.random.default_rng(3)

    def drawn(shape, size):
        return (random.standard_normal(shape) * size).astype(np.float32)

    biased = ["q_proj", "k_proj", "v_proj"] if family == "qwen2" else []
    if config.get("attention_bias"):
        biased = ["proj"]
    model, lora = {"model.embed_tokens.weight": drawn((vocab, HIDDEN), 1.0)}, {}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        norms = ["input_layernorm", "post_attention_layernorm"]
        for name in norms:
            model[f"{prefix}.{name}.weight"] = 1 + drawn((HIDDEN,), 0.1)
        if family == "qwen3":
            for name in ["q_norm", "k_norm"]:
                model[f"{prefix}.self_attn.{name}.weight"] = 1 + drawn((head_dim,), 0.1)
        for name, (n, k) in linears.items():
            model[f"{prefix}.{name}.weight"] = drawn((n, k), k**-0.5)
            if any(name.endswith(end) for end in biased):
                model[f"{prefix}.{name}.bias"] = drawn((n,), 0.1)
            lora[f"base_model.model.{prefix}.{name}.lora_A.weight"] = drawn((4, k), k**-0.5)
            lora[f"base_model.model.{prefix}.{name}.lora_B.weight"] = drawn((n, 4), 0.2)
    model["model.norm.weight"] = 1 + drawn((HIDDEN,), 0.1)
    if not config["tie_word_embeddings"]:
        model["lm_head.weight"] = drawn((vocab, HIDDEN), HIDDEN**-0.5)
    write_safetensors(folder / "model.safetensors", model)
    adapter.mkdir()
    write_safetensors(adapter / "adapter_model.safetensors", lora)
    targets = [name.split(".")[1] for name in linears]
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets}))


def llama(path, **options):
    import llama_cpp

    return llama_cpp.Llama(path, n_ctx=256, n_batch=256, type_k=F32, type_v=F32, verbose=False, **options)


def logits(path, tokens):
    model = llama(path, logits_all=True)
    model.eval(tokens)
    return model, np.array(model.scores[: len(tokens)], np.float64)


# llama.cpp rounds the input of a product to the weights' type, or to 8 bits for codes; ours stays f32.
LIMITS = {"f16": 2e-3, "bf16": 2e-2, "q8_0": 5e-2, "q4_k": 5e-2}


def compare(kind, path, bare, ours, texts, tokens):
    ours = json.loads(pathlib.Path(ours).read_text())
    model, theirs = logits(path, ours["tokens"])
    _, bare = logits(bare, ours["tokens"])
    largest = np.abs(theirs).max()
    error = np.abs(np.array(ours["logits"]) - theirs).max() / largest
    effect = np.abs(bare - theirs).max() / largest
    texts, tokens = (json.loads(pathlib.Path(path).read_text()) for path in (texts, tokens))
    wrong = [text for text, want in zip(texts, tokens) if model.tokenize(text.encode(), add_bos=True, special=True) != want]
    print(f"{path} {kind}: {error:.1e} from llama.cpp; the adapter changes {effect:.1e}; {len(texts) - len(wrong)} of {len(texts)} texts")
    if wrong:
        sys.exit(f"llama.cpp has other tokens of {wrong}")
    if not (error < LIMITS[kind] and 5 * error < effect):
        sys.exit("the exported model is not the same in llama.cpp")


def chat(path, question, answer):
    model = llama(path)
    ours = pathlib.Path(answer).read_text().strip()
    messages = [{"role": "user", "content": question}]
    told = model.create_chat_completion(messages, max_tokens=48, temperature=0.0, repeat_penalty=1.0)
    theirs = told["choices"][0]["message"]["content"].strip()
    ids = [model.tokenize(text.encode(), add_bos=False) for text in (ours, theirs)]
    same = next((i for i, (one, other) in enumerate(zip(*ids)) if one != other), min(map(len, ids)))
    print(f"{path}: {same} of {len(ids[0])} tokens as llama.cpp's: {theirs!r}")
    if same < min(20, len(ids[0])):
        sys.exit(f"ours was {ours!r}")


{"make": make, "compare": compare, "chat": chat}[sys.argv[1]](*sys.argv[2:])
