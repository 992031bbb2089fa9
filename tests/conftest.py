"""Real things in small, made in the process: a tokenizer, a Qwen2.5-VL of the true architecture, pages with pictures.

`tiny_base` is a loadable base checkpoint two layers deep with random weights; `pages_folder` an imagefolder of pages
whose pictures PIL has drawn. Both are made once for the whole session.
"""

import contextlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
# Threads that wait for work spin, and these models have next to none for a second thread: beside other work, a core's
# worth of tests took five times as long with two. Before torch is loaded, or it would be too late.
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORDS = "river stone amber cloud maple ember lake north garden silver piano coral meadow lantern".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def page_html(rng: random.Random) -> str:
    words = " ".join(rng.choices(WORDS, k=rng.randint(4, 12)))
    return f"<!DOCTYPE html>\n<html><head><title>{rng.choice(WORDS)}</title></head><body><p>{words}</p></body></html>"


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([page_html(random.Random(seed)) for seed in range(200)], trainer)
    return Qwen2TokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=special,
        chat_template=CHAT_TEMPLATE,
    )


def make_processor():
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 280 * 280}),
        tokenizer=make_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer, hidden: int = 32, tie: bool = True):
    from transformers import Qwen2_5_VLConfig

    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")
    }
    for name in ("image", "video"):
        ids[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>")
    text = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, hidden // 8 - 2]},
        "tie_word_embeddings": tie,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 60,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "fullatt_block_indexes": [1],
        "window_size": 112,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie, **ids)
    config.dtype = "bfloat16"
    return config


def make_qwen3_vl_processor():
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    size = {"shortest_edge": 56 * 56, "longest_edge": 280 * 280}  # as small_run asks for them
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, patch_size=16),
        tokenizer=make_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )


def make_qwen3_vl_config(tokenizer, hidden: int = 32):
    """Heads wider than their share of the hidden width, a vision MLP without a gate, one DeepStack layer."""
    from transformers import Qwen3VLConfig

    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    for name in ("vision_start", "vision_end"):
        ids[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{name}|>")
    text = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 60,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    config.dtype = "bfloat16"
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    return config


# What Qwen3.5's own template does beside Qwen2.5-VL's: it trims texts, and an answer begins with thoughts, which are
# empty with thinking off. Members of 4B and larger think unless told not to, as here.
THINKING_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text|trim }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}"
    "{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)


def make_qwen3_5_processor():
    """Qwen3-VL's, with a template that thinks."""
    from transformers import Qwen3VLProcessor

    parts = make_qwen3_vl_processor()
    parts.tokenizer.chat_template = THINKING_TEMPLATE
    images, videos = parts.image_processor, parts.video_processor
    return Qwen3VLProcessor(images, parts.tokenizer, videos, chat_template=THINKING_TEMPLATE)


def make_qwen3_5_config(tokenizer, hidden: int = 32):
    """Both kinds of layers, fewer heads of keys than of values in both, positions in half of each head."""
    from transformers import Qwen3_5Config

    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    for name in ("vision_start", "vision_end"):
        ids[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|{name}|>")
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "rope_parameters": {**rope, "partial_rotary_factor": 0.5},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 60,
        "num_heads": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 64,
    }
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    config.dtype = "bfloat16"
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    return config


# A tiny model of each family by its model_type: what makes its processor, and its configuration from a tokenizer.
TINY = {
    "qwen2_5_vl": (make_processor, make_config),
    "qwen3_vl": (make_qwen3_vl_processor, make_qwen3_vl_config),
    "qwen3_5": (make_qwen3_5_processor, make_qwen3_5_config),
}


class Tiny:
    """A tiny model of the true architecture of a family, in fp32, and pages for it."""

    def __init__(self, name: str):
        processor, config = TINY[name]
        self.name, self.processor = name, processor()
        self.config = config(self.processor.tokenizer)

    def model(self):
        """With norms and biases that are not the ones and zeros as which they begin."""
        import torch
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(self.config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
                if name.endswith("dt_bias"):  # else a state of linear attention would last a token
                    parameter -= 5
        return model

    def pages(self, count: int, seed: int = 0) -> list[dict]:
        from PIL import Image

        rng, made = random.Random(seed), []
        for number in range(count):
            file = io.BytesIO()
            noise = rng.randbytes(3)
            Image.new("RGB", (rng.randint(30, 300), rng.randint(30, 300)), tuple(noise)).save(file, "PNG")
            made.append({"name": str(number), "screenshot": file.getvalue(), "html": page_html(rng)})
        return made

    def collate(self, made: list[dict], packed: bool = False) -> dict:
        import holo1_dom_finetune as pipeline
        from families import family_of
        from training.prompt_and_mask import PageEncoder

        encoder = PageEncoder(self.processor, "write this page", family_of(self.name))
        batch = pipeline.PageCollator(self.processor, encoder, made, 4, config=self.config, packed=packed)(made)
        assert batch.pop("flops") > 0 and batch.pop("pages")
        return batch


def make_qwen3_vl_base(folder: Path, dtype=None) -> Path:
    import torch
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

    processor = make_qwen3_vl_processor()
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(make_qwen3_vl_config(processor.tokenizer)).to(dtype or torch.bfloat16)
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    return folder


def make_qwen3_5_base(folder: Path, dtype=None) -> Path:
    """With what transformers leaves out of Qwen3.5's checkpoints: layers that draft tokens ahead (mtp)."""
    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, Qwen3_5ForConditionalGeneration

    processor = make_qwen3_5_processor()
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    kind = dtype or torch.bfloat16
    model = Qwen3_5ForConditionalGeneration(make_qwen3_5_config(processor.tokenizer)).to(kind)
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)
    drafting = {"mtp.fc.weight": torch.randn(32, 64, dtype=kind), "mtp.norm.weight": torch.randn(32, dtype=kind)}
    save_file({**weights(folder), **drafting}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shapes_of_3b():
    """The configuration of Holo1-3B, of which nothing is ever loaded."""
    from transformers import Qwen2_5_VLConfig

    text = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 2, "vocab_size": 151_936}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    vision |= {"fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


def make_base(
    folder: Path, tie: bool = True, weights: bool = True, dtype=None, damage: float | None = None, hidden: int = 32
) -> Path:
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    processor = make_processor()
    processor.save_pretrained(folder)
    config = make_config(processor.tokenizer, hidden, tie)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    if weights:
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).to(dtype or torch.bfloat16)
        if damage is not None:
            model.lm_head.weight.data[0] = damage
        model.generation_config = GenerationConfig(**ends)
        model.save_pretrained(folder)
    else:
        config.save_pretrained(folder)
        GenerationConfig(**ends).save_pretrained(folder)
    return folder


def make_transformers_4_base(folder: Path) -> Path:
    """A tiny base as the repositories of Qwen2.5-VL-3B and Holo1-3B lay theirs out, which no transformers 5 writes:
    flat text fields, `rope_scaling` of type mrope, shards, the chat template beside the tokenizer."""
    from transformers import AutoTokenizer

    make_base(folder)
    # Qwen's own normalisation and splits, which transformers 5.23 takes whatever the file says.
    AutoTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    text, vision = config.pop("text_config"), config.pop("vision_config")
    rope = text.pop("rope_parameters")
    flat = {name: value for name, value in text.items() if name not in ("layer_types", "model_type", "dtype")}
    config = {**flat, **config, "torch_dtype": config.pop("dtype"), "transformers_version": "4.41.2"}
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope"}}
    config["rope_scaling"]["mrope_section"] = rope["mrope_section"]
    vision = {name: value for name, value in vision.items() if name not in ("rope_parameters", "model_type", "dtype")}
    config["vision_config"] = {**vision, "model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": 14}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    parts = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    kept = ("image_mean", "image_std", "merge_size", "patch_size", "temporal_patch_size")
    image = {"min_pixels": 3136, "max_pixels": 12_845_056, **{name: parts[name] for name in kept}}
    image |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    tokenizer |= {"chat_template": CHAT_TEMPLATE, "add_prefix_space": False, "split_special_tokens": False}
    tokenizer.pop("backend")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}, indent=2) + "\n")
    for name in ("processor_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    whole = weights(folder)
    (folder / "model.safetensors").unlink()
    shard(whole, folder)
    return folder


def shard(tensors: dict, folder: Path) -> None:
    """Two files of weights and their index, as the Hub's larger repositories hold them."""
    from safetensors.torch import save_file

    keys, weight_map = list(tensors), {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def make_pages(folder: Path, count: int, seed: int = 0) -> Path:
    """An imagefolder of `count` different pages with pictures of different sizes."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(seed), []
    for number in range(count):
        html = page_html(rng)
        size = (28 * rng.randint(3, 8), 28 * rng.randint(3, 8))
        picture = Image.new("RGB", size, rng.choice(["white", "gold", "pink"]))
        ImageDraw.Draw(picture).text((4, 4), html.split("<p>")[1][:20], fill="black")
        picture.save(folder / f"{number:03d}.png")
        rows.append({"file_name": f"{number:03d}.png", "text": html})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.hookimpl(trylast=True)  # once what -m and -k leave out is gone
def pytest_collection_modifyitems(items):
    """Each of pytest-xdist's workers, which get equal shares in this order, begins with its part of what takes a minute
    or more: begun last, that would leave the other cores with nothing."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("first")]
    others, ordered = iter([item for item in items if not item.get_closest_marker("first")]), []
    for number in range(workers):
        share = (len(items) - len(ordered)) // (workers - number)
        begun = long[number::workers]
        ordered += [*begun, *itertools.islice(others, max(share - len(begun), 0))]
    items[:] = [*ordered, *others]


@pytest.fixture(scope="session", autouse=True)
def environment_at_the_beginning():
    """Once every module of tests has been imported, and before the first test changes anything."""
    # A shell that starts the tests in the background has Ctrl-C ignored, and so would all that they start: what a test
    # interrupts would go on to its end.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    warm.beginning.update(warm.usual_environment())


@pytest.fixture(autouse=True)
def environment_as_it_was():
    """A main that ran in this process has set variables for torch and the launchers; the next test's processes would
    inherit them, and no warm one could be forked for it any more."""
    kept = dict(os.environ)
    yield
    for name in os.environ.keys() - kept.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in kept.items() if name != "PYTEST_CURRENT_TEST"})


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tiny_qwen3_vl(tmp_path_factory) -> Path:
    return make_qwen3_vl_base(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture(scope="session")
def tiny_qwen3_5(tmp_path_factory) -> Path:
    return make_qwen3_5_base(tmp_path_factory.mktemp("qwen3_5"))


@pytest.fixture
def base_of(request):
    """A function from words that name a family, or none, to its tiny base."""
    fixtures = {"Qwen3-VL": "tiny_qwen3_vl", "Qwen3.5": "tiny_qwen3_5"}
    return lambda words: request.getfixturevalue(
        next((fixture for name, fixture in fixtures.items() if name in words), "tiny_base")
    )


@pytest.fixture(scope="session")
def exact_base(tmp_path_factory) -> Path:
    """A base in fp32, so that saving rounds nothing away."""
    import torch

    return make_base(tmp_path_factory.mktemp("exact"), dtype=torch.float32)


@pytest.fixture(scope="session")
def pages_folder(tmp_path_factory) -> Path:
    return make_pages(tmp_path_factory.mktemp("pages"), 24)


def run_script(*command: str, cwd: Path, timeout: int = 300, env: dict | None = None) -> subprocess.CompletedProcess:
    """A script of this project in a process of its own, as a user starts it."""
    environment = warm.usual_environment() | (env or {})
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )


def tracked_files(pattern: str = "*") -> list[str]:
    """Files that a clone has: known to git, or staged for the next commit; by git's pattern. What merely lies about, a
    log or somebody's own script, is none of them: a new file comes to be noticed once it is added."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", pattern]
    try:
        listed = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def loaded_for_help(script: str, cwd: Path) -> tuple[str, set[str], float]:
    """What a script says when it is asked for help, every module that it has loaded for that, and its seconds."""
    start = time.monotonic()
    done = run_script("-X", "importtime", script, "--help", cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return done.stdout, {line.rpartition("|")[2].strip() for line in lines}, time.monotonic() - start


# -----------------------------------------------------------------------------
# What may be missing

# Nobody can install these. All else .ci/run installs, or torch brings it along: where CI is set, any other skip is a
# failure, since a green run means that everything ran. No test needs a GPU.
MAY_BE_MISSING = ("shared/pages", "shared/qwen_tokenizer")


def need_shared(name: str) -> Path:
    """A folder of `shared`, beside the checkout; the test is skipped where there is none."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"shared/{name} does not lie beside the repository")
    return folder


def fail_in_ci(report) -> None:
    """Turn a skip into a failure, where CI is set and the skip is not for what may be missing."""
    if not (os.environ.get("CI") and report.skipped) or hasattr(report, "wasxfail"):
        return
    *_, reason = report.longrepr  # (file, line, reason)
    reason = reason.removeprefix("Skipped: ")
    if not reason.startswith(MAY_BE_MISSING):
        report.outcome = "failed"
        report.longrepr = f"CI skips nothing that it should have installed: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    fail_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    fail_in_ci(report)
    return report


# -----------------------------------------------------------------------------
# The real main, in the ways in which users start it

MAIN = str(ROOT / "holo1_dom_finetune.py")
PROGRAMS = ROOT / "tests" / "programs"  # what some tests run in a process of its own
PLAIN_JSON = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 8,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "offload_param": {"device": "none"},
        "overlap_comm": True,
        "contiguous_gradients": True,
    },
}
# What --micro_batch auto chooses on GPUs that are large enough: weights are gathered once per step, on one GPU never.
WHOLE = {"stage3_param_persistence_threshold": 10**11, "stage3_max_live_parameters": 10**11}
GATHERED = {**PLAIN_JSON, "zero_optimization": {**PLAIN_JSON["zero_optimization"], **WHOLE}}


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def small_run(base: Path, pages: Path, **settings) -> list[str]:
    """Flags of a run that takes seconds: 8 training pages, 2 held-out ones, one step."""
    defaults = {
        "base_model": base,
        "dataset": pages,
        "num_samples": 8,
        "eval_pages": 2,
        "max_html_tokens": 120,
        "max_pixels": 280 * 280,
        "save_strategy": "no",
        "report_to": "none",
    }
    flags = []
    for name, value in {**defaults, **settings}.items():
        for one in value if isinstance(value, list) else [value]:
            flags += [f"--{name}"] if one is True else [f"--{name}", str(one)]
    return flags


# Nowhere is a browser found then. It takes more of the CPU than the training of a tiny model, so only tests of what it
# renders have one.
UNRENDERED = {"PATH": str(Path(sys.executable).parent), "PLAYWRIGHT_BROWSERS_PATH": "/nowhere"}


def start_plain(
    flags: list[str],
    cwd: Path,
    script: str = MAIN,
    cold: bool = False,
    timeout: int = 300,
    env: dict | None = None,
    ours: bool = True,
    renders: bool = False,
) -> subprocess.CompletedProcess:
    """`python script *flags`: the script as `__main__` in a forked process (tests/warm.py); cold, in a fresh one. Not
    `ours`: in one that has loaded transformers and no module of this project. Pages are rendered if `renders`."""
    env = ({} if renders else UNRENDERED) | (env or {})
    environment = warm.usual_environment() | env
    done = None if cold else warm.run(script, flags, cwd, environment, timeout, ours=ours)
    return done or run_script(script, *flags, cwd=cwd, timeout=timeout, env=env)


def start_torchrun(
    flags: list[str],
    cwd: Path,
    processes: int = 2,
    script: str = MAIN,
    cold: bool = False,
    timeout: int = 300,
    env: dict | None = None,
    renders: bool = False,
) -> subprocess.CompletedProcess:
    """The script as `__main__` of so many forked processes, with the environment, the store and the ends that torchrun
    gives them (tests/warm.py); cold, by torchrun itself. Pages are rendered where that is asked."""
    env = ({} if renders else UNRENDERED) | (env or {})
    environment = warm.usual_environment() | env
    done = None if cold else warm.run(script, flags, cwd, environment, timeout, processes)
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    return done or run_script(*launcher, script, *flags, cwd=cwd, timeout=timeout, env=env)


class Running:
    """A training in the background, in one process; both its streams go into one file."""

    def __init__(self, process: warm.Forked | subprocess.Popen, log: Path):
        self.process, self.log = process, log
        self.pid, self.send_signal, self.poll, self.wait = process.pid, process.send_signal, process.poll, process.wait

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for_line(self, start: str, seconds: float) -> None:
        """Until it has said a line that starts so; it must not end before, nor take longer."""
        until = time.monotonic() + seconds
        while not any(line.startswith(start) for line in self.said().splitlines()):
            assert self.poll() is None and time.monotonic() < until, self.said()
            time.sleep(0.02)


@contextlib.contextmanager
def in_background(
    flags: list[str],
    cwd: Path,
    script: str = MAIN,
    cold: bool = False,
    env: dict | None = None,
    log: str = "said.log",
):
    """`start_plain` without waiting: a `Running` that is over when the block is; it speaks into the file `log`."""
    environment = warm.usual_environment() | (env or {})
    log = cwd / log
    with log.open("wb") as stream:
        pipes = {"stdout": stream.fileno(), "stderr": stream.fileno()}
        process = None if cold else warm.fork(script, flags, cwd, environment, **pipes)
        if process is None:
            command = [sys.executable, script, *flags]
            process = subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)
    try:
        yield Running(process, log)
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def call_in_processes(
    function: Callable, arguments: list[list], folder: Path, timeout: float = 120, env: dict | None = None
) -> None:
    """A function of a test file in as many processes at once as there are lists of arguments (paths arrive as text);
    each must end with 0. What is in `env` is there when they begin, cold."""
    file, calls = sys.modules[function.__module__].__file__, str(PROGRAMS / "calls.py")
    with contextlib.ExitStack() as block:
        processes = []
        for number, own in enumerate(arguments):
            flags = [file, function.__name__, json.dumps(own, default=str)]
            run = in_background(flags, folder, script=calls, cold=bool(env), env=env, log=f"said-{number}.log")
            processes.append(block.enter_context(run))
        codes = [process.wait(timeout) for process in processes]
        assert codes == [0] * len(codes), [process.said()[-3000:] for process in processes]


def start_deepspeed(flags: list[str], cwd: Path, processes: int = 1, config=None, script: str = MAIN, **options):
    launcher = ["-m", "deepspeed.launcher.runner", f"--num_gpus={processes}", f"--master_port={free_port()}"]
    environment = ON_CPU | options.pop("env", {})
    command = [*launcher, script, *zero_3(cwd, config), *flags]
    done = run_script(*command, cwd=cwd, env=environment, **options)
    left = list(Path("/dev/shm").glob(f"deepspeed*{launcher[-1].rpartition('=')[2]}*"))
    assert not left, f"{left}: shared memory that nobody frees"
    return done


def start_zero_3(flags: list[str], cwd: Path, processes: int = 1, config=None, **options):
    """The same training as `start_torchrun` starts it: DeepSpeed's launcher takes two processes and 9 s of CPU more."""
    environment = ON_CPU | options.pop("env", {})
    return start_torchrun([*zero_3(cwd, config), *flags], cwd, processes, env=environment, **options)


ON_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def zero_3(cwd: Path, config: dict | None) -> list[str]:
    path = cwd / "ds.json"
    path.write_text(json.dumps(PLAIN_JSON if config is None else config))
    return ["--deepspeed", str(path)]


def weights(folder: Path) -> dict:
    """Every tensor of a checkpoint, by the names in its files."""
    from safetensors.torch import load_file

    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def output(done: subprocess.CompletedProcess) -> str:
    return f"exit code {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"


# -----------------------------------------------------------------------------
# A browser, and what renders


def need_browser() -> str | None:
    """The browser that the project itself finds. Without one a test is skipped, which says how to get one."""
    from scoring.renders import BrowserMissing, find_chromium

    try:
        return find_chromium()
    except BrowserMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def renderer():
    need_browser()
    from scoring.renders import Renderer

    with Renderer() as renderer:
        yield renderer


class Recorded:
    """Renders each job once and remembers it: what tests plant is in the scorer, not in the browser."""

    def __init__(self, renderer):
        self.renderer, self.known = renderer, {}

    def map(self, jobs):
        for job in jobs:
            if job not in self.known:
                self.known[job] = self.renderer.render(job)
            yield self.known[job]


@pytest.fixture(scope="session")
def recorded(renderer):
    return Recorded(renderer)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> str:
    """CLIP's true architecture with random weights: the real ones are 600 MB and on the Hub."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=small, vision_config=small, projection_dim=16)).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return str(folder)
