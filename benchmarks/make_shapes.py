"""Writes a base folder in the exact shapes of a model, without weights: for measuring, with --random_weights.

    python benchmarks/make_shapes.py --shape 3b --tokenizer TOKENIZER_FOLDER --out holo1_3b_shapes
    python benchmarks/make_shapes.py --shape qwen3.5-4b --tokenizer TOKENIZER_FOLDER --out qwen3_5_4b_shapes
    python holo1_dom_finetune.py --base_model ./holo1_3b_shapes --random_weights --plan

The tokenizer folder is a Qwen2.5-VL tokenizer, with or without a chat template; sizes are those of the public
configurations of Qwen2.5-VL-3B and 7B, on which Holo1-3B (3.75 B parameters) and Holo1-7B (8.29 B) are built, of
Qwen3-VL-4B (4.44 B) and of Qwen3.5-4B (4.54 B). Larger vocabularies have rows that this tokenizer never names.
"""

import argparse
from pathlib import Path

ROPE = {
    "qwen2_5_vl": {"rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
    "qwen3_vl": {"rope_theta": 5_000_000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    "qwen3_5": {
        "rope_theta": 10_000_000.0,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    },
}
WINDOWED = {
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
LEARNED = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
}


def text(hidden: int, inner: int, layers: int, heads: int, keys: int, rows: int, **more: int) -> dict:
    """A language model by its widths; `rows` are those of the embedding, of which the vocabulary may be smaller."""
    named = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": rows}
    return named | {"num_attention_heads": heads, "num_key_value_heads": keys, **more}


# By name: model_type, language model, vision tower, and whether the head is the embedding.
SHAPES = {
    "3b": ("qwen2_5_vl", text(2048, 11008, 36, 16, 2, 151_936), WINDOWED, True),
    "7b": ("qwen2_5_vl", text(3584, 18944, 28, 28, 4, 152_064), WINDOWED, False),
    "qwen3-vl-4b": (
        "qwen3_vl",
        text(2560, 9728, 36, 32, 8, 151_936, head_dim=128),
        LEARNED | {"deepstack_visual_indexes": [5, 11, 17]},
        True,
    ),
    # Its linear attention has the widths that transformers gives it by itself.
    "qwen3.5-4b": ("qwen3_5", text(2560, 9216, 32, 16, 4, 248_320, head_dim=256), LEARNED, True),
}
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message.role != 'system' -%}"
    "<|im_start|>system{{ '\n' }}You are a helpful assistant.<|im_end|>{{ '\n' }}{%- endif -%}"
    "<|im_start|>{{ message.role }}{{ '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}{%- else -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|im_end|>{{ '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"
)


def make_config(shape: str, tokenizer):
    """The configuration of one of SHAPES, with the ids of `tokenizer`."""
    from transformers import AutoConfig

    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    family, language, vision, tied = SHAPES[shape]
    language = {
        **language,
        "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", **ROPE[family]},
        "tie_word_embeddings": tied,
    }
    vision = {**vision, "out_hidden_size": language["hidden_size"]}
    config = AutoConfig.for_model(family, text_config=language, vision_config=vision, tie_word_embeddings=tied, **ids)
    config.dtype = "bfloat16"
    names = {"qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_5": "Qwen3_5"}
    config.architectures = [f"{names[family]}ForConditionalGeneration"]
    return config


def make_processor(shape: str, tokenizer):
    """The family's own processor, as limited as a default run."""
    from transformers import (
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    limits = {"shortest_edge": 3_136, "longest_edge": 1_003_520}
    if SHAPES[shape][0] == "qwen2_5_vl":
        kind, images, videos = Qwen2_5_VLProcessor, Qwen2VLImageProcessor(size=limits), Qwen2VLVideoProcessor()
    else:
        middle = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        images = Qwen2VLImageProcessor(size=limits, patch_size=16, **middle)
        kind, videos = Qwen3VLProcessor, Qwen3VLVideoProcessor()
    return kind(image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=CHAT_TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="3b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Qwen2.5-VL tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    end, pad = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>"))
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    make_processor(args.shape, tokenizer).save_pretrained(args.out)
    make_config(args.shape, tokenizer).save_pretrained(args.out)
    GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad).save_pretrained(args.out)
    print(f"{args.out}: the shapes of {args.shape}, no weights")


if __name__ == "__main__":
    main()
