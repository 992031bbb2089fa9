"""Writes the demo's base before training: a small Qwen2.5-VL configuration with a processor, and no weights.

    python demo/make_tiny_model.py --out demo/tiny_holo1

The architecture is the true one, window attention and mRoPE included; only the sizes are small. The tokenizer is
trained here, on base-family pages of make_demo_pages.py and on a list of HTML and CSS names, so that every word of
those pages is one token and any other page can still be written, byte by byte. The demo family is not among what it
learns from.

Sections: Tokenizer, Processor, Configuration, Layout, Command line.
"""

import argparse
import itertools
import json
from pathlib import Path

import make_demo_pages

# -----------------------------------------------------------------------------
# Tokenizer

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
NAMES = (
    "html head body title meta link style script div span section article header footer main nav aside form label "
    "input button select option textarea table thead tbody tr th td ul ol li dl dt dd h1 h2 h3 h4 h5 h6 p a b i em "
    "strong img figure figcaption blockquote cite code pre hr br small width height margin padding border color "
    "background font display flex grid block inline none float left right top bottom center position absolute "
    "relative text-align font-size font-weight font-family line-height bold solid rgba class charset viewport content "
    "name value type href src alt placeholder the and for with from this that your our about home more contact"
).split()
VOCABULARY = 1_280  # at most; the pages hold fewer pairs worth a token
PAGES_READ = 4_000
CHAT_TEMPLATE = (  # no system message: what Holo1 is asked here is always the same question
    "{%- for message in messages -%}<|im_start|>{{ message.role }}"
    "{%- if message.content is string -%}{{ '\n' + message.content }}{%- else -%}{{ '\n' }}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|im_end|>{{ '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"
)


def make_tokenizer():
    """A byte-level BPE with Qwen2.5-VL's special tokens; every word of the demo's list is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    pages = (html for html, _ in itertools.islice(make_demo_pages.generate("base", seed=0), PAGES_READ))
    names = (word for word in (*NAMES, *make_demo_pages.WORDS) for _ in range(50))
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(itertools.chain(pages, names), trainer)
    return Qwen2TokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=SPECIAL,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2_048,
    )


# -----------------------------------------------------------------------------
# Processor


def make_processor(tokenizer):
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


# -----------------------------------------------------------------------------
# Configuration


def make_config(tokenizer):
    from transformers import Qwen2_5_VLConfig

    def token(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(name)

    text = {
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2_048,
        # Seven rows and eight columns of image tokens: at Qwen's theta of 1e6 their angles would hardly differ.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 6, 8]},
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_heads": 4,
        "out_hidden_size": 256,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    config.dtype = "bfloat16"
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


# -----------------------------------------------------------------------------
# Layout


def lay_out_for_transformers_4(folder: Path) -> None:
    """The files of `folder`, which transformers 5 has written, as 4 writes them: 5 reads those as well, 4 not its own.

    `rope_scaling` and `rope_theta` instead of `rope_parameters`, an image processor in a file of its own, special
    tokens as a list by their older name, and how text is split: 5.23 splits as Qwen does whatever the file says.
    """
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype"] = config.pop("dtype")
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config["vision_config"].pop("rope_parameters", None)
    write_json(folder / "config.json", config)

    parts = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    (folder / "processor_config.json").unlink()
    both = {"processor_class": parts["processor_class"]}
    image = parts["image_processor"] | both
    image |= {"min_pixels": image["size"]["shortest_edge"], "max_pixels": image["size"]["longest_edge"]}
    write_json(folder / "preprocessor_config.json", image)
    video = parts["video_processor"] | both
    write_json(folder / "video_preprocessor_config.json", video)

    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    tokenizer |= {"add_prefix_space": False, "clean_up_tokenization_spaces": False}
    tokenizer.pop("backend", None)
    write_json(folder / "tokenizer_config.json", tokenizer)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -----------------------------------------------------------------------------
# Command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for configuration and processor")
    out = parser.parse_args().out

    import torch
    from transformers import AutoModelForImageTextToText, GenerationConfig

    tokenizer = make_tokenizer()
    config = make_config(tokenizer)
    make_processor(tokenizer).save_pretrained(out)
    config.save_pretrained(out)
    ends = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(out)
    lay_out_for_transformers_4(out)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {count / 1e6:.2f} M parameters, {2 * count / 1e6:.1f} MB in bf16, {len(tokenizer):,} tokens")


if __name__ == "__main__":
    main()
