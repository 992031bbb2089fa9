"""Load each folder argv[2:] with nothing but transformers, whichever version, and write tokens for the picture argv[1].

A line of JSON each: the version, what loading found wrong, the tokens of the question and of an odd text, the patches
of the picture, some logits behind the question, and the tokens of the answer. In fp32 on a CPU, greedily, so that two
versions differ by nothing but a fault.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

for folder in sys.argv[2:]:
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = AutoModelForImageTextToText.from_pretrained(folder, **options)
    processor = AutoProcessor.from_pretrained(folder)
    prompt = json.loads((Path(folder) / "dom_recipe.json").read_text())["prompt"]
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open(sys.argv[1]).convert("RGB")], return_tensors="pt")
    end = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    config = GenerationConfig(do_sample=False, max_new_tokens=24, **end)
    with torch.inference_mode():
        logits = model.eval()(**inputs).logits[0, -1, :50]
        answer = model.generate(**inputs, generation_config=config)[0, inputs["input_ids"].shape[1] :]
    said = {
        "version": transformers.__version__,
        "wrong": {name: sorted(map(str, found)) for name, found in info.items() if found},
        "question": inputs["input_ids"][0].tolist(),
        "odd": processor.tokenizer("<p>\n  the page's\tHTML: {e\u0301, 12}</p><|im_end|>")["input_ids"],
        "patches": inputs["image_grid_thw"][0].tolist(),
        "logits": logits.tolist(),
        "answer": answer.tolist(),
    }
    print(json.dumps(said), flush=True)
