"""Writes a base folder in the exact shapes of Holo1, without weights: for measuring, with --random_weights.

    python benchmarks/make_shapes.py --shape 3b --tokenizer TOKENIZER_FOLDER --out holo1_3b_shapes
    python holo1_dom_finetune.py --base_model ./holo1_3b_shapes --random_weights --plan

The tokenizer folder is a Qwen2.5-VL tokenizer, with or without a chat template; sizes are those of the public
configurations of Qwen2.5-VL-3B and 7B, on which Holo1-3B (3.75 B parameters) and Holo1-7B (8.29 B) are built.
"""

import argparse
from pathlib import Path

TEXT = {
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}
KEY_VALUE_HEADS = {"3b": 2, "7b": 4}
ROWS = {"3b": 151_936, "7b": 152_064}  # of the embedding; the vocabulary is smaller
TIED = {"3b": True, "7b": False}
VISION = {
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
    from transformers import Qwen2_5_VLConfig

    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    text = {
        **TEXT[shape],
        "num_key_value_heads": KEY_VALUE_HEADS[shape],
        "vocab_size": ROWS[shape],
        "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": TIED[shape],
    }
    vision = {**VISION, "out_hidden_size": TEXT[shape]["hidden_size"]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=TIED[shape], **ids)
    config.dtype = "bfloat16"
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(TEXT), default="3b")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a Qwen2.5-VL tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    from transformers import (
        AutoTokenizer,
        GenerationConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    end, pad = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>"))
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 3_136, "longest_edge": 1_003_520}),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(args.out)
    make_config(args.shape, tokenizer).save_pretrained(args.out)
    GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad).save_pretrained(args.out)
    print(f"{args.out}: the shapes of Holo1-{args.shape.upper()}, no weights")


if __name__ == "__main__":
    main()
