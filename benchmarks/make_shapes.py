"""Writes a base folder in the exact shapes of a published model, without weights: for measuring, with --random_weights.

    python benchmarks/make_shapes.py --shape 3b --tokenizer TOKENIZER_FOLDER --out holo1_3b_shapes
    python benchmarks/make_shapes.py --shape qwen3.5-4b --tokenizer TOKENIZER_FOLDER --out qwen3_5_4b_shapes
    python holo1_dom_finetune.py --base_model ./holo1_3b_shapes --random_weights --plan
    python benchmarks/make_shapes.py --shape qwen3-vl-4b --tiny --tokenizer demo/tiny_holo1 --out tiny_qwen3_vl

The tokenizer folder is a Qwen2.5-VL tokenizer, with or without a chat template, for every family: a page then has the
same tokens for all, and rows of Qwen3.5's embedding that it cannot reach cost what they cost. Sizes are those of the
public config.json of Qwen/Qwen2.5-VL-3B-Instruct and 7B, on which Holo1-3B (3.75 B parameters) and Holo1-7B (8.29 B)
are built, of Qwen/Qwen3-VL-4B-Instruct (4.44 B), whose sibling Holo2-4B is built on, and of Qwen/Qwen3.5-4B (4.54 B),
which Holo-3.1-4B is built on. `--tiny` is the same architecture in small, to be trained without a GPU.
"""

import argparse
from pathlib import Path

HOLO1_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
QWEN3_VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2_304,
}
HOLO1_TEXT = {
    "max_position_embeddings": 128_000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
}
INTERLEAVED = {"rope_type": "default", "mrope_interleaved": True}

# Of each shape: the family, text and vision. The rows of the embedding are more than the vocabulary has words.
SHAPES = {
    "3b": {
        "family": "qwen2_5_vl",
        "text": HOLO1_TEXT
        | {"hidden_size": 2_048, "intermediate_size": 11_008, "num_hidden_layers": 36, "vocab_size": 151_936}
        | {"num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "vision": HOLO1_VISION,
    },
    "7b": {
        "family": "qwen2_5_vl",
        "text": HOLO1_TEXT
        | {"hidden_size": 3_584, "intermediate_size": 18_944, "num_hidden_layers": 28, "vocab_size": 152_064}
        | {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
        "vision": HOLO1_VISION,
    },
    "qwen3-vl-4b": {
        "family": "qwen3_vl",
        "text": {"hidden_size": 2_560, "intermediate_size": 9_728, "num_hidden_layers": 36, "vocab_size": 151_936}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
        | {"max_position_embeddings": 262_144}
        | {"rope_parameters": {**INTERLEAVED, "rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20]}},
        "vision": {**QWEN3_VISION, "deepstack_visual_indexes": [5, 11, 17]},
    },
    "qwen3.5-4b": {
        "family": "qwen3_5",
        "text": {"hidden_size": 2_560, "intermediate_size": 9_216, "num_hidden_layers": 32, "vocab_size": 248_320}
        | {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
        | {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_conv_kernel_dim": 4}
        | {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "max_position_embeddings": 262_144}
        | {"layer_types": [*["linear_attention"] * 3, "full_attention"] * 8}
        | {
            "rope_parameters": {**INTERLEAVED, "rope_theta": 10_000_000.0, "mrope_section": [11, 11, 10]}
            | {"partial_rotary_factor": 0.25}
        },
        "vision": QWEN3_VISION,
    },
}
# What --tiny has instead, where a shape has it: every part of the architecture, and nothing of its size.
TINY_TEXT = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64}
TINY_TEXT |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
TINY_TEXT |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64}
TINY_TEXT |= {"layer_types": [*["linear_attention"] * 3, "full_attention"]}
TINY_VISION = {"depth": 4, "hidden_size": 128, "intermediate_size": 344, "num_heads": 4, "fullatt_block_indexes": [3]}
TINY_VISION |= {"num_position_embeddings": 576, "deepstack_visual_indexes": [0, 1]}
TINY_SECTIONS = {"qwen2_5_vl": [8, 12, 12], "qwen3_vl": [12, 10, 10], "qwen3_5": [3, 3, 2]}  # of half a turned head

DEFAULT_SYSTEM = (
    "{%- if loop.first and message.role != 'system' -%}"
    "<|im_start|>system{{ '\n' }}You are a helpful assistant.<|im_end|>{{ '\n' }}{%- endif -%}"
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}" + DEFAULT_SYSTEM + "<|im_start|>{{ message.role }}{{ '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|im_end|>{{ '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"
)
# Qwen3's have no system turn of their own; Qwen3.5's begins each answer with thoughts, which are empty if not wanted.
WITHOUT_SYSTEM = CHAT_TEMPLATE.replace(DEFAULT_SYSTEM, "")
NO_THOUGHTS = "{{ '<think>\n\n</think>\n\n' }}"
TURN, ASKED = "<|im_start|>{{ message.role }}{{ '\n' }}", "<|im_start|>assistant{{ '\n' }}"
THINKING = WITHOUT_SYSTEM.replace(TURN, TURN + "{%- if message.role == 'assistant' -%}" + NO_THOUGHTS + "{%- endif -%}")
IF_NONE = "{%- if enable_thinking is defined and enable_thinking is false -%}"
THINKING = THINKING.replace(ASKED, ASKED + IF_NONE + NO_THOUGHTS + "{%- else -%}{{ '<think>\n' }}{%- endif -%}")
CHAT_TEMPLATES = {"qwen2_5_vl": CHAT_TEMPLATE, "qwen3_vl": WITHOUT_SYSTEM, "qwen3_5": THINKING}


def in_small(parts: dict, tiny: dict) -> dict:
    """`parts` with the sizes of `tiny`, where they have them."""
    return {name: tiny.get(name, value) for name, value in parts.items()}


def make_config(shape: str, tokenizer, tiny: bool = False):
    """The configuration of a shape, with the ids of `tokenizer`."""
    import transformers

    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    family, text, vision = (SHAPES[shape][name] for name in ("family", "text", "vision"))
    if tiny:
        text, vision = in_small(text, TINY_TEXT), in_small(vision, TINY_VISION)
        text["vocab_size"] = len(tokenizer)
        text["rope_parameters"] = {**text["rope_parameters"], "mrope_section": TINY_SECTIONS[family]}
    vision = {**vision, "out_hidden_size": text["hidden_size"]}
    name = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_5": "Qwen3_5"}[family]
    kind = getattr(transformers, f"{name}Config")
    config = kind(text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"], **ids)
    config.dtype = "bfloat16"
    config.architectures = [f"{name}ForConditionalGeneration"]
    return config


def make_processor(family: str, tokenizer):
    """The family's own processor; its limits of pixels are set by the training."""
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer.chat_template = template = CHAT_TEMPLATES[family]
    size = {"shortest_edge": 3_136, "longest_edge": 1_003_520}
    if family == "qwen2_5_vl":
        images = Qwen2VLImageProcessor(size=size)
        return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template)
    middle = [0.5, 0.5, 0.5]
    images = Qwen2VLImageProcessor(size=size, patch_size=16, image_mean=middle, image_std=middle)
    return Qwen3VLProcessor(images, tokenizer, Qwen3VLVideoProcessor(), chat_template=template)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="3b")
    parser.add_argument("--tiny", action="store_true", help="the same architecture in small")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Qwen2.5-VL tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    end, pad = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>"))
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    make_processor(SHAPES[args.shape]["family"], tokenizer).save_pretrained(args.out)
    make_config(args.shape, tokenizer, args.tiny).save_pretrained(args.out)
    GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad).save_pretrained(args.out)
    print(f"{args.out}: the shapes of {args.shape}{' in small' * args.tiny}, no weights")


if __name__ == "__main__":
    main()
