#!/usr/bin/env python3
"""Writes the files that the targets lay beside an input, and the first inputs (corpus/). Needs nothing but Python."""

import json
import pathlib
import struct

HERE = pathlib.Path(__file__).parent
CORPUS = HERE.parent / "corpus"
FIXTURES = HERE.parent.parent / "tests/fixtures"

CONFIG = {
    "model_type": "llama", "vocab_size": 6, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu", "eos_token_id": 1,
}
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
ADAPTER_SHAPES = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, 4),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (4, 2),
    "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": (2, 6),
    "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight": (4, 2),
}
MODEL_SHAPES = {
    "model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,),
    "model.layers.0.input_layernorm.weight": (4,), "model.layers.0.post_attention_layernorm.weight": (4,),
    "model.layers.0.self_attn.q_proj.weight": (4, 4), "model.layers.0.self_attn.k_proj.weight": (2, 4),
    "model.layers.0.self_attn.v_proj.weight": (2, 4), "model.layers.0.self_attn.o_proj.weight": (4, 4),
    "model.layers.0.mlp.gate_proj.weight": (6, 4), "model.layers.0.mlp.up_proj.weight": (6, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 6),
}
TEMPLATE = """{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
# Constructs that a mutation does not find: growth, depth, recursion, the functions that are added to Jinja's.
TEMPLATES = [
    TEMPLATE,
    "{% set ns = namespace(x='ab') %}{% for i in range(9) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[]) %}{% for i in range(99) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson(indent=2) }}{{ ns.x }}",
    "{% macro f(n) %}{% if n > 0 %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(9) }}",
    "{{ 'ab' * 99 }}{{ [1] * 9 }}{{ 'a' | indent(9) }}{{ 'a'.center(9) }}{{ 'a,b'.split(',') | join('-') }}{{ 'a'.replace('', 'bb') }}",
    "{{ strftime_now('%d %B %Y %H:%M') }}{{ raise_exception('no') }}",
    "{{ tools | tojson(indent=4) }}{{ messages[1:] | list }}{{ messages | map(attribute='role') | unique | list }}",
    "{{ 10 ** 20 }}{{ 7 // 2 }}{{ -7 % 3 }}{{ '%05d %s' | format(3, 'x') }}{{ range(0, 100, 7) | batch(3) | list }}",
    "{% for m in messages recursive %}{{ loop.index }}{{ loop.cycle('a', 'b') }}{{ m.content | trim | upper }}{% endfor %}",
    "{% generation %}{{ bos_token }}{% endgeneration %}{%- if messages[0]['role'] == 'system' -%}{{ eos_token }}{%- endif -%}",
]
ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b\u00e9"}]},
    {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}], "tools": []},
    {"prompt": "row 1", "completion": " value 2"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"text": "some text \U0001f980", "extra": 1},
]


def safetensors(shapes):
    header, at, data = {}, 0, b""
    for name, shape in shapes.items():
        count = 1
        for size in shape:
            count *= size
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * count]}
        data += b"".join(struct.pack("<f", (index % 7 - 3) / 8) for index in range(count))
        at += 4 * count
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


# The numbers of GGUF's kinds of values.
U32, F32, STRING, ARRAY = 4, 6, 8, 9


def gguf_value(kind, value):
    if kind == STRING:
        return struct.pack("<Q", len(value.encode())) + value.encode()
    return struct.pack("<I" if kind == U32 else "<f", value)


def gguf():
    """A whole model: the shapes of MODEL_SHAPES, SentencePiece with a few pieces. Its tensors are f32."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"]
    lists = {
        "tokenizer.ggml.tokens": (STRING, pieces), "tokenizer.ggml.scores": (F32, [0, 0, 0, -1, -2, -0.5]),
        "tokenizer.ggml.token_type": (U32, [2, 3, 3, 1, 1, 1]),
    }
    values = {
        "general.architecture": (STRING, "llama"), "llama.block_count": (U32, 1), "llama.context_length": (U32, 16),
        "llama.embedding_length": (U32, 4), "llama.feed_forward_length": (U32, 6), "llama.attention.head_count": (U32, 2),
        "llama.attention.head_count_kv": (U32, 1), "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        "tokenizer.ggml.model": (STRING, "llama"), "tokenizer.ggml.bos_token_id": (U32, 1), "tokenizer.ggml.eos_token_id": (U32, 2),
    }
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }
    out = b"GGUF" + struct.pack("<IQQ", 3, len(MODEL_SHAPES), len(values) + len(lists))
    for key, (kind, value) in values.items():
        out += gguf_value(STRING, key) + struct.pack("<I", kind) + gguf_value(kind, value)
    for key, (kind, items) in lists.items():
        out += gguf_value(STRING, key) + struct.pack("<IIQ", ARRAY, kind, len(items))
        out += b"".join(gguf_value(kind, item) for item in items)
    data = b""
    for name, shape in MODEL_SHAPES.items():
        part = name.removesuffix(".weight")
        short = names.get(part) or "blk.0." + names[part.removeprefix("model.layers.0.")]
        out += gguf_value(STRING, f"{short}.weight") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, len(data))
        count = 1
        for size in shape:
            count *= size
        data += struct.pack(f"<{count}f", *[index % 5 / 4 for index in range(count)])
        data += b"\0" * (-len(data) % 32)
    return out + b"\0" * (-len(out) % 32) + data


def tokenizer():
    """Byte-level BPE without merges: every byte is a token."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    vocab = {"<|end|>": 0} | {letters[byte]: byte + 1 for byte in range(256)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": 0, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None, "pre_tokenizer": level,
        "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": []},
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


write(HERE / "config.json", json.dumps(CONFIG, indent=1))
write(HERE / "adapter_config.json", json.dumps(ADAPTER, indent=1))
write(HERE / "adapter_model.safetensors", safetensors(ADAPTER_SHAPES))
write(HERE / "tokenizer.json", json.dumps(tokenizer()))
write(HERE / "chat_template.jinja", TEMPLATE)
write(CORPUS / "safetensors/adapter", safetensors(ADAPTER_SHAPES))
write(CORPUS / "safetensors/model", safetensors(MODEL_SHAPES))
write(CORPUS / "adapter_config/peft", json.dumps(ADAPTER))
write(CORPUS / "adapter_config/rslora", json.dumps(ADAPTER | {"use_rslora": True, "init_lora_weights": "gaussian", "target_modules": "all-linear"}))
for index, template in enumerate(TEMPLATES):
    write(CORPUS / f"chat_template/{index}", template)
write(CORPUS / "chat_template/constructs", (FIXTURES / "templates/constructs.jinja").read_text())
for index, row in enumerate(ROWS):
    write(CORPUS / f"rows/{index}", json.dumps(row))
write(CORPUS / "rows/all", "\n".join(map(json.dumps, ROWS)))
write(CORPUS / "gguf/whole", gguf())
