"""GGUF files as llama.cpp's converter writes them, and the metadata of small tokenizers."""

import json

import gguf
import numpy as np
import tokenizers

CORPUS = """\
In 1969 two men walked on the moon for 2 hours and 31 minutes; the third stayed in orbit, alone.
    def area(self):  # indented by four blanks
        return self.width * self.height  ==== "it's", "they'll" and "we'd"
The moon's light is the sun's light. Nobody's shadow falls upward, not even yours: 12345 times no!
"""


def gguf_name(name, is_gemma3):
    if not name.startswith("model.layers."):
        return {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }[name]
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    part, kind = part.rsplit(".", 1)
    part = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "post_attention_layernorm": "post_attention_norm" if is_gemma3 else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }[part]
    return f"blk.{layer}.{part}.{kind}"


def interleave(array, num_heads):
    """llama.cpp's `permute`: row i and i + H/2 of every head become neighbours."""
    heads = array.reshape(num_heads, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(array.shape)


def write_gguf(path, hf, metadata, *, part=(0, 1), quantization=None):
    """A GGUF file as llama.cpp's converter would write it, float32 by default, or a part of it."""
    config = hf.config
    is_gemma3 = config.model_type == "gemma3_text"
    architecture = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    rope = config.rope_parameters["full_attention"] if is_gemma3 else config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    number, count = part
    if count > 1:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
    if is_gemma3 and rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type in ("mistral", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    for name, value in metadata.items():
        if name == "rope_scale_linear":  # before November 2023
            writer.add_float32(f"{hf.config.model_type}.rope.scale_linear", value)
        else:
            getattr(writer, f"add_{name}")(value)
    if rope["rope_type"] == "llama3":
        divisors = 1 / (
            hf.model.rotary_emb.inv_freq.numpy()
            * rope["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        )
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    for i, (name, tensor) in enumerate(hf.state_dict().items()):
        array = tensor.numpy()
        if i % count != number:
            continue
        if architecture == "llama" and ".q_proj." in name:
            array = interleave(array, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            array = interleave(array, config.num_key_value_heads)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if is_gemma3 and name.endswith("norm.weight"):
            array = array + np.float32(1)
        if quantization is not None and array.ndim == 2:
            array = gguf.quants.quantize(array, quantization)
            writer.add_tensor(gguf_name(name, is_gemma3), array, raw_dtype=quantization)
        else:
            writer.add_tensor(gguf_name(name, is_gemma3), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_tokenizer(pre):
    """Metadata of a small tokenizer of llama.cpp's kind `gpt2`: two control tokens, then bytes."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=control,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<think>"]
    kind = gguf.TokenType
    types = [kind.CONTROL] * 3 + [kind.NORMAL] * (len(tokens) - 4) + [kind.USER_DEFINED]
    return {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": pre,
        "token_list": tokens,
        "token_types": types,
        "token_merges": [" ".join(pair) for pair in model["merges"]],
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def sentencepiece_tokenizer():
    """Metadata of a small tokenizer of llama.cpp's kind `llama`: pieces with scores, no merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(split=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=160, show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merged = ["".join(pair) for pair in model["merges"]]
    assert any(piece.startswith("▁▁▁▁") for piece in merged)
    letters = [piece for piece in model["vocab"] if len(piece) == 1]
    kind = gguf.TokenType
    types = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL] + [kind.BYTE] * 256
    types += [kind.NORMAL] * len(merged + letters)
    return {
        "tokenizer_model": "llama",
        "token_list": [
            *["<unk>", "<s>", "</s>"],
            *(f"<0x{byte:02X}>" for byte in range(256)),
            *merged,
            *letters,
        ],
        "token_scores": [0.0] * 259 + [-float(i) for i in range(len(merged + letters))],
        "token_types": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
    }
