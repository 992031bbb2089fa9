"""How alike two pages are besides their texts, by CLIP (Radford et al., 2021); scored where its weights are at hand.

    clip, why_not = find_clip()
    clip and clip(reference, prediction)                                     # 0 to 1

Torch and transformers are loaded only when a `Clip` is made: pages are scored without them, too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from scoring.blocks import Page

CLIP_MODEL = "openai/clip-vit-base-patch32"  # ViT-B/32, as in Design2Code


class ClipMissing(RuntimeError):
    """CLIP cannot be scored here; the message says what is missing."""


class Clip:
    """Cosine of CLIP's features of two pictures, their texts painted over (Telea 2004), squeezed into a square.

    `name` is a folder, or a Hub repository that is in the cache; nothing is fetched. Raises `ClipMissing` where weights
    or packages are missing. Runs on the CPU, about 0.3 s for a pair.
    """

    def __init__(self, name: str = CLIP_MODEL):
        import huggingface_hub as hub

        def place(file: str) -> Path | None:
            found = Path(name, file) if Path(name).is_dir() else hub.try_to_load_from_cache(name, file)
            return Path(found) if isinstance(found, str | Path) and Path(found).is_file() else None

        config, processor = place("config.json"), place("preprocessor_config.json")
        weights = place("model.safetensors") or place("pytorch_model.bin")
        if not (config and processor and weights):
            raise ClipMissing(f"the weights of {name} are not at hand: hf download {name}")
        try:
            import cv2
            import torch
            from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
        except ImportError as error:
            raise ClipMissing(f"{error.name} is not installed: pip install -r requirements.txt") from None
        self.torch, self.cv2, self.name = torch, cv2, name
        self.processor = CLIPImageProcessor.from_json_file(processor)
        # Not by from_pretrained, which would deal the weights out to all ranks of a ZeRO-3 training.
        self.model = CLIPModel(CLIPConfig.from_json_file(config)).eval()
        if weights.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        lost = self.model.load_state_dict(state, strict=False).missing_keys
        if any(not key.endswith("position_ids") for key in lost):
            raise ClipMissing(f"{name} lacks {', '.join(lost[:3])}: another kind of checkpoint?")

    def __call__(self, one: Page, two: Page) -> float:
        """0 to 1; both pages must have been rendered."""
        pictures = [self.without_texts(page) for page in (one, two)]
        inputs = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        with self.torch.no_grad():
            pooled = self.model.vision_model(pixel_values=inputs).pooler_output
            features = self.model.visual_projection(pooled)
        return max(0.0, float(self.torch.nn.functional.cosine_similarity(features[0], features[1], dim=0)))

    def without_texts(self, page: Page) -> Image.Image:
        """A square picture, as long as the shorter side."""
        height, width = page.image.shape[:2]
        mask = np.zeros((height, width), np.uint8)
        for block in page.blocks:
            left, top = int(block.x * width), int(block.y * height)
            mask[top : top + int(block.height * height), left : left + int(block.width * width)] = 255
        picture = self.cv2.inpaint(page.image, mask, 3, self.cv2.INPAINT_TELEA) if page.blocks else page.image
        return Image.fromarray(picture).resize((min(width, height),) * 2, Image.Resampling.LANCZOS)


def find_clip(name: str = CLIP_MODEL) -> tuple[Clip | None, str]:
    """CLIP, or why there is none; for those who can do without."""
    try:
        return Clip(name), ""
    except ClipMissing as error:
        return None, str(error)
