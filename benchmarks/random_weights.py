"""Writes random weights into a base folder that has none: bf16, by the architecture's own initialisation.

    python benchmarks/random_weights.py ./holo1_3b_shapes

With weights in files, all that is compared starts from the very same ones. They are made on the GPU where there is one
(3.75 B parameters on two cores take minutes), from a seed; configuration and processor in the folder stay untouched.
"""

import argparse
import tempfile
from pathlib import Path


def write_weights(folder: Path, seed: int) -> int:
    """Writes *.safetensors under the keys of a published checkpoint and returns the number of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    if found := sorted(folder.glob("*.safetensors")):
        raise SystemExit(f"{folder} has weights ({found[0].name}); nothing was written")
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    # Beside the folder and then moved: save_pretrained would also write over configuration and end tokens.
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        model.save_pretrained(partial)
        for file in sorted(Path(partial).glob("*.safetensors*")):
            file.rename(folder / file.name)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{args.folder}: {write_weights(args.folder, args.seed):,} random parameters")


if __name__ == "__main__":
    main()
