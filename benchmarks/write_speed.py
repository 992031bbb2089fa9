"""How fast pages are written: transformers' generate() and our engine beside each other, on the true shapes.

    python benchmarks/write_speed.py --base_model ./holo1_3b_shapes --out benchmarks/results/h100_3b_write.json
    python benchmarks/write_speed.py --base_model ./holo1_3b_shapes --tune             # tiles are tried before
    python benchmarks/write_speed.py --base_model ./holo1_3b_shapes --tune 8,32,64 --batches '' --check_pages 0
    python benchmarks/write_speed.py --base_model ./holo1_3b_shapes --batches '' --check_pages 0 --endings 8,64

Random weights, so nothing ends, and drafts would come true as they never do in a page: they are left out of the
figures. Screenshots of 1,280 x 784 pixels, 1,280 tokens each (980 of Qwen3-VL and Qwen3.5), are noise. The limit is
what a step has to move, all weights of the language model once, the keys and values of every slot and recurrent states
in and out, over `--memory_tb_s`. Needs a GPU.

`--endings` writes with what has documents end and without, in turns. What watches is fed pages that are like real ones
in place of what random weights write, and ends none of them.

Sections: Model, Writing, Endings, Truth, Tuning, Main.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from writing.endings import Watch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZE = (1_280, 784)  # pixels of a screenshot
BLOCKS = 8  # of steps that are measured
WARM_S = 1.0  # of steps before: a graph's first 16 are 0.9 to 2.1 % slower than later ones

# -----------------------------------------------------------------------------
# Model


def make_model(folder: Path, dtype: str = "bfloat16"):
    """(model, processor) of the shapes in `folder`, with random weights made on the GPU, from a seed."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

    import use_model_from_hub as use

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("cuda"):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, dtype))
    # Frequencies made on a GPU differ in the last bit from those of every user, who makes them on a CPU.
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config)
            module.inv_freq = fresh.inv_freq.to("cuda")
    model.generation_config = GenerationConfig.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    use.limit_pixels(processor, use.Recipe.min_pixels, use.Recipe.max_pixels)
    return model.eval(), processor


def noise(number: int):
    """A screenshot that differs from the others."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(SIZE, Image.Resampling.NEAREST)


def seconds(work: Callable[[], object]) -> float:
    """Of `work`, the GPU's included."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


# -----------------------------------------------------------------------------
# Writing


def by_generate(model, processor, recipe, shots, tokens: int) -> dict:
    """Seconds of reading, up to the first token's logits, and of a step: the middle one of `tokens` tokens."""
    import torch

    import use_model_from_hub as use

    stamps, made = [], use.logits_processors

    def stamp(ids, scores):
        torch.cuda.synchronize()
        stamps.append(time.perf_counter())
        return scores

    def write(count: int) -> float:
        stamps.clear()
        start = time.perf_counter()
        use.write_pages(model, processor, shots, replace(recipe, max_html_tokens=count))
        return stamps[0] - start

    use.logits_processors = lambda asked: [*made(asked), stamp]
    try:
        write(2)
        reading = write(tokens)
    finally:
        use.logits_processors = made
    step = statistics.median(after - before for before, after in itertools.pairwise(stamps))
    return {"read_s": reading, "step_ms": 1_000 * step, "tokens_per_second": len(shots) / step}


def by_engine(model, processor, recipe, shots, limit_tb_s: float) -> dict:
    """The same by the engine, its parts apart: start, reading on the CPU and on the GPU, a step."""
    import torch

    import use_model_from_hub as use
    from writing import engine as room

    result, count = {}, len(shots)
    requests = [use.Request(place, lambda shot=shot: shot) for place, shot in enumerate(shots)]
    engine = None

    def start() -> None:
        nonlocal engine
        engine = room.Engine(model, processor, recipe, wanted=count, drafts=False)
        with ThreadPoolExecutor(1) as compiler:  # as `Engine.write` begins
            engine.compile(compiler, [engine.count], at_once=True)
            engine.step(engine.count)

    result["start_s"] = seconds(start)
    begin = time.perf_counter()
    questions = [room.question_of(processor, recipe, request, model.dtype) for request in requests]
    result["prepare_s_a_page_on_one_core"] = (time.perf_counter() - begin) / count
    packs = [questions[place : place + 8] for place in range(0, count, 8)]

    def read() -> None:
        for number, pack in enumerate(packs):
            slots = range(8 * number, 8 * number + len(pack))
            for slot, question, shift in zip(slots, pack, engine.reader.read(pack, engine.cache, slots)):
                engine.begin(slot, question, shift)

    result["first_read_s"] = seconds(read)
    result["read_s"] = seconds(read)
    patches = [question.patches for question in packs[0]]
    grids = torch.stack([question.grid for question in packs[0]])
    result["see_s_a_page"] = seconds(lambda: engine.captured.see(patches, grids)) / len(packs[0])
    result["read_kernels_us"] = kernels_of(lambda: engine.reader.read(packs[0], engine.cache, range(len(packs[0]))), 1)
    result["screenshots_per_second"] = count / result["read_s"]
    step, places = engine.step(engine.width()), engine.state.places.clone()
    engine.state.live.fill_(1)

    def blocks(number: int) -> None:
        """From the question's end on each time, where `generate()` is measured, too."""
        for _ in range(number):
            engine.state.places.copy_(places)
            step.run(room.BLOCK)

    result["first_step_ms"] = 1_000 * seconds(lambda: blocks(1)) / room.BLOCK
    begin = time.perf_counter()
    while time.perf_counter() - begin < WARM_S:
        seconds(lambda: blocks(1))
    took = seconds(lambda: blocks(BLOCKS)) / (BLOCKS * room.BLOCK)
    result |= {"step_ms": 1_000 * took, "tokens_per_second": count / took}
    read_bytes = bytes_of_step(model, engine)
    result["kernels_us"] = kernels_of(lambda: step.run(4), 4)
    result["limit_ms"] = 1_000 * read_bytes / (limit_tb_s * 1e12)
    result["share_of_limit"] = result["limit_ms"] / result["step_ms"]
    return result


def kernels_of(work: Callable[[], object], times: int) -> dict[str, float]:
    """Microseconds of one of the `times` turns of `work` by the names of its kernels, the longest first, their sum, and
    how many kernels there are."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        seconds(work)
    found: dict[str, float] = {}
    events = [event for event in watched.events() if event.device_time > 0]
    for event in events:
        found[event.name[:70]] = found.get(event.name[:70], 0.0) + event.device_time / times
    longest = dict(sorted(found.items(), key=lambda item: -item[1])[:14])
    return {**longest, "sum": sum(found.values()), "launches": len(events) / times}


def bytes_of_step(model, engine) -> float:
    """What a step moves at least: the language model's weights once, keys and values of what stands in the slots, and
    of a recurrent layer the state of each slot, in and out."""
    weights = sum(part.nbytes for part in model.model.language_model.layers.parameters()) + model.lm_head.weight.nbytes
    places, slots = float(engine.state.places.sum()), engine.width()
    moved = 0.0
    for layer, parts in zip(engine.captured.layers, engine.cache.states):
        for part in parts:
            if layer.mixer.takes_back:  # (S, heads, places, D), of which what stands there is read
                moved += part[0, :, 0].nbytes * places
            else:
                moved += 2 * part[0].nbytes * slots
    return weights + moved


# -----------------------------------------------------------------------------
# Endings


class Fed:
    """A `Watch` in the engine, of a page's own tokens in place of those that are written, begun again where the page
    ends. It ends no answer, but tells `ended` what it would have ended."""

    def __init__(self, make: Callable[[], Watch], ids: list[int], ended: list[object]):
        self.make, self.ids, self.told, self.watch, self.place = make, ids, ended, make(), 0

    def feed(self, ids: list[int]) -> None:
        if self.place + len(ids) > len(self.ids):
            self.watch, self.place = self.make(), 0
        if ending := self.watch.feed(self.ids[self.place : self.place + len(ids)]):
            self.told.append(ending)
        self.place += len(ids)

    def ended(self) -> None:
        pass


def with_endings(model, processor, recipe, shots, pages: list[list[int]]) -> dict:
    """Tokens a second of answers to `shots`, all written at once, with a `Fed` each and without, in turns; reading and
    the first block apart. `pages` are what is watched, as token ids."""
    import use_model_from_hub as use
    from writing import engine as room
    from writing.endings import Watch

    engine = room.Engine(model, processor, recipe, wanted=len(shots), drafts=False)
    engine.stops = set()  # so that all answers are as long
    look, looks, ended = engine.look, [], []

    def timed(*given):
        answers = list(look(*given))
        looks.append(time.perf_counter())
        return answers

    engine.look = timed
    ids, found = itertools.cycle(pages), {"without": [], "with": []}
    make = functools.partial(Watch, processor.tokenizer, 4_096)
    for name in ("without", "with") * 3:
        engine.watch = (lambda: Fed(make, next(ids), ended)) if name == "with" else None
        looks.clear()
        list(engine.write(use.Request(place, lambda shot=shot: shot) for place, shot in enumerate(shots)))
        found[name].append(len(shots) * room.BLOCK * (len(looks) - 1) / (looks[-1] - looks[0]))
    del engine.look  # which holds the engine, and that its memory
    share = max(found["with"]) / max(found["without"])
    return {"tokens_per_second": found, "with_over_without": share, "would_have_ended": len(ended)}


def with_drafts(model, processor, recipe, shots, pages: list[list[int]]) -> dict:
    """Decoding while the pages in `pages`, as token ids, are dictated (dictation.py): tokens a second and a step until
    the first one ends, with drafts and without."""
    from dictation import dictating

    import use_model_from_hub as use
    from writing import engine as room

    found = {}
    for drafts in (False, True):
        kind = dictating(room.Engine, lambda request: pages[request.place % len(pages)])
        engine = kind(model, processor, recipe, wanted=len(shots), drafts=drafts)
        look, times, counts = engine.look, [], []

        def timed(*given, look=look, times=times, counts=counts, engine=engine):
            answers = list(look(*given))
            times.append(time.perf_counter())
            counts.append(sum(len(slot.ids) for slot in engine.slots if slot))
            return answers

        engine.look = timed
        writes = engine.write(use.Request(place, lambda shot=shot: shot) for place, shot in enumerate(shots))
        next(writes)  # the first one has ended, in the last look, which counts it no more
        writes.close()
        tokens, seconds = counts[-2] - counts[0], times[-2] - times[0]
        a_step = tokens / len(shots) / (room.BLOCK * (len(counts) - 2))
        found["drafts" if drafts else "plain"] = {"tokens_per_second": tokens / seconds, "tokens_per_step": a_step}
        del engine.look
    return found


def pages_like_real(tokenizer, count: int, tokens: int) -> list[list[int]]:
    """The token ids of invented pages of so many tokens."""
    import random

    import make_pages_like_real as pages

    def ids(html: str) -> list[int]:
        return tokenizer(html)["input_ids"]

    return [ids(pages.make_html(random.Random(seed), tokens, lambda html: len(ids(html)))) for seed in range(count)]


def real_pages(tokenizer, folder: Path, least: int = 512) -> list[list[int]]:
    """The token ids of the HTML files below `folder` that have `least` to 4,096, in an order by chance, of a seed."""
    import random

    texts = [file.read_text(encoding="utf-8", errors="replace") for file in sorted(folder.rglob("*.html"))]
    random.Random(0).shuffle(texts)
    return [ids for text in texts if least <= len(ids := tokenizer(text)["input_ids"]) <= 4_096]


# -----------------------------------------------------------------------------
# Truth


def hold_against_plain(model, processor, recipe, pages: int, tokens: int, drafts: bool) -> dict:
    """Teacher-forced: each token that the engine chose, against the logits of the plain model over the same answer, as
    the recipe's stock processors leave them.

    `behind` is by how much the plain model prefers another token, in units of the rounding of its logits' precision.
    """
    import torch

    import use_model_from_hub as use

    shots = [noise(1_000 + number).resize((SIZE[0] - 56 * number % 800, SIZE[1])) for number in range(pages)]
    short = replace(recipe, max_html_tokens=tokens)
    same = total = 0
    behind = []
    answers = tokens_of(model, processor, short, shots, drafts)
    # Beside the GPU, which takes a page as fast as a core can resize it.
    every = ThreadPoolExecutor(4).map(lambda shot: use.encode_questions(processor, [shot], recipe.prompt), shots)
    for asked, ids in zip(every, answers):
        length, asked = asked["input_ids"].shape[1], answered(asked, ids, model)
        more = asked["input_ids"][:, length:]
        with torch.inference_mode():
            # The head alone takes 0.9 GB for 1,500 tokens; of the question's it would be as much again.
            logits = model(**asked, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
            logits = processed(logits, asked["input_ids"][0], length, short)
        best, chosen = logits.max(-1).values, logits.gather(1, more[0, :, None])[:, 0]
        same += int((best == chosen).sum())
        total += len(ids)
        behind += ((best - chosen) / (best.abs() * torch.finfo(model.dtype).eps)).tolist()
    return {"pages": pages, "tokens": total, "argmax": same / total, "most_behind_in_roundings": max(behind)}


def checks(model, processor, recipe, pages: int, tokens: int, keep: Callable[[str, object], None]) -> None:
    """Hands to `keep`, by name, what holds the engine's tokens and logits against the plain model's, over `pages`."""
    import torch

    check = functools.partial(hold_against_plain, model, processor)
    punished = replace(recipe, repetition_penalty=1.1)
    for name, asked in (("check", recipe), ("check_with_penalty", punished)):
        start = time.perf_counter()
        found = check(asked, pages, tokens, drafts=False)
        keep(name, found | {"seconds": time.perf_counter() - start})
    keep("check_with_drafts", check(recipe, 2, 200, drafts=True))
    keep("both_to_fp32", hold_against_fp32(model, processor, recipe, min(pages, 16), tokens))
    torch.cuda.empty_cache()  # of the copy in fp32


def answered(asked, ids: list[int], model):
    """What the processor made of one question, the answer `ids` after it, where `model` is and in its precision."""
    import torch

    asked = asked.to(model.device)
    asked["pixel_values"] = asked["pixel_values"].to(model.dtype)
    more = torch.tensor([ids], device=model.device)
    asked["input_ids"] = torch.cat([asked["input_ids"], more], dim=1)
    for name in ("attention_mask", "mm_token_type_ids"):
        filler = torch.full_like(more, 1 if name == "attention_mask" else 0)
        asked[name] = torch.cat([asked[name], filler], dim=1)
    return asked


class Dictated:
    """In place of a `Chooser`: chooses what stands in `answers` (S, T), and keeps all logits, (S, V) a step."""

    plain = True

    def __init__(self, answers):
        self.answers, self.kept = answers, []

    def take(self, logits, state, slots: int) -> None:
        number = (state.places - state.starts + 1)[:slots].clamp(0, self.answers.shape[1] - 1)
        self.kept.append(logits[:slots])
        chosen = self.answers[:slots].gather(1, number[:, None])
        state.history[:slots].scatter_(1, state.places[:slots, None] + 1, chosen)
        state.places[:slots] += state.live[:slots]


def dictated_logits(model, processor, recipe, shots, answers: list[list[int]]) -> list:
    """The engine's logits (T, V) before each token of `answers` to `shots`, one of which is read and written beside the
    others, step by step, outside of a CUDA graph."""
    import torch

    import use_model_from_hub as use
    from writing import engine as room
    from writing.step import Step

    engine, found = room.Engine(model, processor, recipe, wanted=min(len(shots), 16), drafts=False), []
    for first in range(0, len(shots), engine.count):
        some, group = shots[first : first + engine.count], answers[first : first + engine.count]
        questions = [
            room.question_of(processor, recipe, use.Request(place, lambda shot=shot: shot), model.dtype)
            for place, shot in enumerate(some)
        ]
        for slot, shift in enumerate(engine.reader.read(questions, engine.cache, range(len(some)))):
            engine.begin(slot, questions[slot], shift)
        length = max(map(len, group))
        rows = [ids + [0] * (length - len(ids)) for ids in group] + [[0] * length] * (engine.count - len(group))
        chooser = Dictated(torch.tensor(rows, device=model.device))
        Step(model, engine.captured, engine.cache, engine.state, engine.count, 1, chooser).run(length)
        logits = torch.stack(chooser.kept, dim=1)
        found += [logits[slot, : len(ids)] for slot, ids in enumerate(group)]
        engine.state.stop(slice(None))
    return found


def hold_against_fp32(model, processor, recipe, pages: int, tokens: int) -> dict:
    """How far the engine's logits and the plain model's are from those of the same weights in fp32, over the engine's
    own answers: the root mean square of what differs over that of the logits, and the share of tokens of which the
    likeliest is the same. What rounds one way as well as the other does is no fault of either.

    {"skipped": why} where a copy in fp32 finds no room on the GPU.
    """
    import torch

    import use_model_from_hub as use

    torch.cuda.empty_cache()  # of engines before
    wide_bytes = 4 * sum(part.numel() for part in model.parameters())
    if model.device.type == "cuda" and torch.cuda.mem_get_info()[0] < wide_bytes + 16 * 2**30:
        return {"skipped": f"no room for {wide_bytes / 1e9:.0f} GB of weights in fp32"}
    shots = [noise(1_000 + number).resize((SIZE[0] - 56 * number % 800, SIZE[1])) for number in range(pages)]
    short = replace(recipe, max_html_tokens=tokens)
    answers = tokens_of(model, processor, short, shots, drafts=False)
    by_engine = dictated_logits(model, processor, short, shots, answers)
    wide = copy.deepcopy(model).float()
    torch.backends.cudnn.allow_tf32 = False  # or convolutions of fp32 would round like bf16, nearly
    ways = {"engine": [0.0, 0], "plain": [0.0, 0]}
    size = total = between = 0
    for shot, ids, mine in zip(shots, answers, by_engine):
        logits = {}
        for name, judge in (("plain", model), ("fp32", wide)):
            asked = answered(use.encode_questions(processor, [shot], recipe.prompt), ids, model)
            asked["pixel_values"] = asked["pixel_values"].to(judge.dtype)  # rounded alike for all
            with torch.inference_mode():
                logits[name] = judge(**asked, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
        truth, logits["engine"] = logits.pop("fp32"), mine.float()
        for name, sums in ways.items():
            sums[0] += (logits[name] - truth).square().sum().item()
            sums[1] += int((logits[name].argmax(-1) == truth.argmax(-1)).sum())
        between += (logits["engine"] - logits["plain"]).square().sum().item()
        size, total = size + truth.square().sum().item(), total + len(ids)
    found = {"pages": pages, "tokens": total}
    for name, (apart, same) in ways.items():
        found |= {f"{name}_to_fp32": (apart / size) ** 0.5, f"{name}_argmax_of_fp32": same / total}
    return found | {"engine_to_plain": (between / size) ** 0.5}


def tokens_of(model, processor, recipe, shots, drafts: bool) -> list[list[int]]:
    """What the engine writes of each of `shots`, without the end token, and up to a picture's token: the plain model
    takes that for a picture wherever it stands, and random weights may write it."""
    import use_model_from_hub as use
    from writing import engine as room

    engine, answers = room.Engine(model, processor, recipe, wanted=min(len(shots), 16), drafts=drafts), {}
    extend, picture = engine.extend, model.config.image_token_id

    def keep(slot, fresh):
        if done := extend(slot, fresh):
            ids = slot.ids
            answers[slot.question.request.place] = ids[: ids.index(picture)] if picture in ids else list(ids)
        return done

    engine.extend = keep
    list(engine.write(use.Request(place, lambda shot=shot: shot) for place, shot in enumerate(shots)))
    del engine.extend  # which holds the engine, and that its memory
    return [answers[place] for place in range(len(shots))]


def processed(logits, ids, length: int, recipe):
    """Logits (T, V) of the answer in `ids` (`length` + T,) as the recipe's stock processors make them, a few hundred
    rows a call: to each row its own ids so far, filled up with the first one, which a penalty meets already."""
    import torch

    import use_model_from_hub as use

    for process in use.logits_processors(recipe):
        for start in range(0, len(logits), 256):
            rows = torch.arange(start, min(start + 256, len(logits)), device=ids.device)
            seen = torch.arange(len(ids), device=ids.device)[None] < length + rows[:, None]
            logits[rows] = process(torch.where(seen, ids, ids[0]), logits[rows])
    return logits


# -----------------------------------------------------------------------------
# Tuning

LENGTH = 1_330  # tokens of each slot, and on average where they differ
# (columns of a tile, depth of a block, warps, stages, programs that share a tile's depth, pieces of a block), which are
# tried for up to 16 rows where that is asked for: each takes seconds to compile.
NARROW = [
    (16, 256, 1, 5, 1, 1),
    (16, 256, 1, 8, 1, 1),
    (16, 256, 2, 4, 1, 1),
    (16, 256, 2, 4, 1, 2),
    (16, 256, 2, 6, 1, 2),
    (16, 256, 2, 8, 1, 2),
    (16, 2048, 8, 1, 1, 8),
    (16, 256, 4, 4, 1, 4),
    (16, 512, 2, 3, 1, 2),
    (16, 512, 4, 3, 1, 4),
    (16, 256, 1, 5, 3, 1),
    (16, 256, 1, 7, 3, 1),
    (16, 256, 2, 4, 2, 2),
    (32, 256, 2, 3, 1, 1),
    (32, 256, 4, 3, 1, 2),
    (32, 128, 2, 5, 1, 1),
    (64, 128, 4, 3, 1, 1),
]
# (columns, depth of a block, warps, stages, sharers) of kernels.broad_products.Broad, by the product's kind, for up to
# 16 rows, 32 and 64; each takes half a second to compile. Two programs of up to 112 KB of blocks find room on a
# multiprocessor: of one kernel, or one of the next that begins early beside one that ends.
BROAD: dict[str, dict[int, list[tuple[int, int, int, int, int]]]] = {
    "qkv": {
        16: [(64, 128, 4, 5, 4), (64, 256, 4, 3, 4), (64, 512, 4, 1, 4)],
        32: [(64, 128, 4, 4, 3), (64, 128, 4, 3, 6), (64, 512, 4, 1, 4), (128, 128, 8, 3, 8)],
        64: [(64, 128, 4, 4, 3), (64, 128, 4, 3, 6), (64, 512, 4, 1, 4), (128, 512, 8, 1, 4), (128, 128, 8, 3, 8)],
    },
    "out": {
        16: [(64, 128, 4, 5, 4), (64, 512, 4, 1, 4), (64, 256, 4, 3, 4)],
        32: [(64, 128, 4, 4, 4), (64, 512, 4, 1, 4), (64, 128, 4, 4, 8)],
        64: [(64, 128, 4, 3, 4), (64, 128, 4, 4, 4), (64, 512, 4, 1, 4), (64, 256, 4, 1, 8), (128, 128, 8, 3, 8)],
    },
    "gated": {
        16: [(64, 128, 4, 2, 1), (64, 128, 4, 3, 1), (64, 64, 4, 4, 1)],
        32: [(64, 64, 4, 4, 1), (64, 128, 4, 2, 1), (64, 128, 4, 3, 1)],
        64: [(64, 64, 4, 4, 1), (64, 64, 4, 3, 1), (128, 64, 8, 4, 1), (64, 128, 4, 2, 1), (64, 128, 8, 2, 1)],
    },
    "down": {
        16: [(64, 128, 4, 6, 4), (64, 256, 4, 3, 4), (64, 256, 4, 4, 4)],
        32: [(64, 128, 4, 6, 4), (64, 256, 4, 3, 4), (64, 256, 4, 4, 4)],
        64: [(64, 128, 4, 3, 4), (64, 128, 4, 5, 4), (64, 256, 4, 3, 4), (128, 128, 8, 4, 8)],
    },
    "head": {
        16: [(64, 128, 4, 6, 1)],
        32: [(128, 128, 8, 3, 1), (64, 128, 4, 4, 1)],
        64: [(128, 64, 8, 4, 1), (128, 128, 8, 3, 1), (64, 128, 4, 3, 1)],
    },
}
# Keys that are looked at together, warps and stages of kernels.slot_attention.SHAPES, by the parts of a slot's keys.
WHOLE_SHAPES = [(64, 8, 4), (64, 4, 5), (64, 8, 5), (128, 8, 3), (128, 16, 3)]
PART_SHAPES = [(64, 4, 3), (64, 4, 4), (64, 8, 3), (32, 4, 4), (64, 2, 4)]


def replayed_us(work: Callable[[], object], times: int) -> float:
    """Microseconds of one of the `times` launches that `work` makes, inside a CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    return 1e6 * min(seconds(graph.replay) for _ in range(5)) / times


def step_ms(engine, slots: int, spread: float = 0.0) -> float:
    """Milliseconds of a step of `slots` slots, captured anew, which hold LENGTH tokens each, or up to a share of
    `spread` more or fewer."""
    import torch

    from writing import engine as room

    engine.steps.clear()
    lengths = torch.linspace(1 - spread, 1 + spread, slots, device="cuda") * LENGTH
    times = []
    for _ in range(4):
        engine.state.places[:slots] = lengths.to(engine.state.places)
        engine.state.live.fill_(1)
        step = engine.step(slots)
        times.append(1_000 * seconds(lambda step=step: step.run(room.BLOCK)) / room.BLOCK)
    return min(times[1:])


def prove(asked: tuple) -> str:
    """In a process of its own: what it compiles the others find on the disk."""
    from kernels import skinny_products as skinny

    return skinny.way_of(*asked)


def compile_beside(model, every: list[int]) -> dict[str, str]:
    """Compiles and proves the broad tiles that are tried for steps of so many slots, in processes side by side: a
    kernel that reads what is not there ends its own process alone. Tiles that do not prove right are tried no more;
    returns how each is launched, or why it is not."""
    from families import family_of
    from kernels import skinny_products as skinny

    def drop(kind: str, rows: int, tile: tuple) -> None:
        BROAD[kind][max(rows, 16)] = [other for other in BROAD[kind][max(rows, 16)] if other != tile]

    captured, asked, found = family_of(model.config).captured(model), [], {}
    layer = captured.layers[0]
    weights = {"qkv": layer.mixer.taken, "out": layer.mixer.out, "gated": layer.gated, "down": layer.down}
    for kind, weight in (weights | {"head": model.lm_head.weight}).items():
        columns, adds = len(weight) // (2 if kind == "gated" else 1), kind in ("out", "down")
        for rows in sorted(set(map(skinny.tile_rows, every))):
            like = weight.new_empty(rows, weight.shape[1])
            # The first layer's rows are none of a product.
            parts = {skinny.parts_of(kind, like)} | ({1} if kind == "qkv" else set())
            for tile in BROAD[kind][max(rows, 16)]:
                broad = skinny.Broad(*tile).shared(columns)
                if skinny.fitted(broad, like.shape[1], columns) != broad:
                    drop(kind, rows, tile)
                    found[f"{kind} of {rows} rows by {tile}"] = "for another depth, or fewer columns"
                    continue
                # What is added is scaled for the norm that follows where the next product has a broad tile, too.
                for scales in ([True, False] if rows < 32 else [True]) if adds else [False]:
                    norms = weight.dtype if adds and not scales else layer.norms[0][0].dtype
                    biased = kind == "qkv" and layer.mixer.taken_bias is not None
                    shape = (*like.shape, weight.dtype, weight.device, norms, scales)
                    asked += [(tile, (kind, broad, *shape, count, biased)) for count in parts]
    with ProcessPoolExecutor(min(12, os.cpu_count()), multiprocessing.get_context("spawn")) as pool:
        for (tile, given), done in [(each, pool.submit(prove, each[1])) for each in asked]:
            kind, _, rows, *_, scales, parts, _ = given
            try:
                way = done.result()
            except Exception as error:  # of a process that a kernel has broken
                way = f"fails: {str(error)[:200]}"
            name = f"{kind} of {rows} rows by {tile}, squares in {parts}{', scaled' if scales else ''}"
            found[name] = way or "wrong or too large"
            if way not in ("early", "plain"):
                drop(kind, rows, tile)
                if skinny.TILES[kind][rows] == tile:
                    skinny.TILES[kind][rows] = None
    return found


def words_of(error: Exception) -> str:
    """Why a way could not be tried, as it stands in the results."""
    return f"{type(error).__name__}: {str(error)[:200]}"


def tune(engine, slots: int, narrow: bool) -> dict:
    """Milliseconds of a step of `slots` slots by each tile of each product in turn, None for torch, and of how much
    less than torch that is in a layer, in microseconds; under "failed" why others could not. The fastest is what the
    engine uses from here on: beside the kernels before and after it, of which it begins before the one ends, a product
    takes another time than alone."""
    from kernels import skinny_products as skinny

    real, rows, found, layers = skinny.tile_of, skinny.tile_rows(slots), {}, len(engine.captured.layers)

    def taken(name: str, *given, **more) -> tuple:
        done = real(name, *given, **more)
        if name == kind and tiles[rows] and done[0] is None:  # else torch's time would stand under the tile's name
            raise ValueError("torch does it instead: a shape of no whole tiles, or a proof that failed")
        return done

    skinny.tile_of = taken
    try:
        for kind, tiles in skinny.TILES.items():
            before, times, failed = tiles[rows], {}, {}
            tried = [skinny.Broad(*tile) for tile in BROAD[kind][max(rows, 16)]]
            tried += NARROW if narrow and rows < 32 else []
            for tile in dict.fromkeys([before, None, *tried]):
                if kind == "gated" and tile and tile[4] > 1:  # its two sums are not shared
                    continue
                tiles[rows] = tile
                try:
                    times[tile] = step_ms(engine, slots)
                except Exception as error:  # too much shared memory, say: that tile is out of the question
                    if tile is None:  # torch's own product: it is the step that fails, not a tile
                        raise
                    failed[json.dumps(tile)] = words_of(error)
            tiles[rows] = min(times, key=times.get)
            found[kind] = {
                json.dumps(tile): {"step_ms": took, "us_a_layer_under_torch": 1_000 * (times[None] - took) / layers}
                for tile, took in sorted(times.items(), key=lambda item: item[1])
            } | {"failed": failed}
            print(slots, kind, json.dumps(found[kind]), flush=True)
    finally:
        skinny.tile_of = real
    return found


def tune_attention(engine, slots: int) -> dict:
    """Milliseconds of a step of `slots` slots by the parts that the keys of a slot are cut into and the shape of a
    program, where all slots are as long and where some have three times as much as others; under "failed" why others
    could not. The fastest of the former is used from here on."""
    from kernels import slot_attention as room

    mixers = [layer.mixer for layer in engine.captured.layers if layer.mixer.takes_back]
    pairs, before = slots * mixers[0].fewer, (room.PROGRAMS, dict(room.SHAPES))
    usual = max(1, min(room.MOST_PARTS, room.PROGRAMS // pairs))
    tried = [(usual, shape) for shape in (PART_SHAPES if usual > 1 else WHOLE_SHAPES)]
    if usual < room.MOST_PARTS:
        tried += [(2 * usual, room.shape_of(2 * usual, 128))]
    if usual > 1:
        tried += [(usual // 2, shape) for shape in (PART_SHAPES[2:3] if usual > 2 else WHOLE_SHAPES[:1])]
    found, failed, best = {}, {}, None
    for parts, shape in tried:
        room.PROGRAMS, room.SHAPES[room.most_of(parts)] = parts * pairs, shape
        room.way_of.cache_clear()  # which proves by the shape of the day
        try:
            took = step_ms(engine, slots), step_ms(engine, slots, spread=0.5)
        except Exception as error:
            failed[f"{parts} parts, {shape}"] = words_of(error)
        else:
            found[f"{parts} parts, {shape}"] = {"step_ms": took[0], "spread_step_ms": took[1]}
            if best is None or took[0] < best[0]:
                best = took[0], room.PROGRAMS, dict(room.SHAPES)
        room.SHAPES.update(before[1])
    room.PROGRAMS = best[1] if best else before[0]
    room.SHAPES.update(best[2] if best else before[1])
    room.way_of.cache_clear()
    return dict(sorted(found.items(), key=lambda item: item[1]["step_ms"])) | {"failed": failed}


def tune_all(model, processor, recipe, slots: int, narrow: bool, keep: Callable[[str, object], None]) -> None:
    """Hands to `keep`, by name, what a step of `slots` slots takes as it is, by torch's products, by each tile and each
    shape of attention, and by the fastest of them together, kernel by kernel."""
    from kernels import skinny_products as skinny
    from kernels import slot_attention
    from writing import engine as room

    engine = room.Engine(model, processor, recipe, wanted=slots, drafts=False)
    attention = slot_attention.PROGRAMS, dict(slot_attention.SHAPES)
    rows, start = skinny.tile_rows(slots), time.perf_counter()
    given = {kind: tiles[rows] for kind, tiles in skinny.TILES.items()}
    keep(f"{slots} slots as they are, ms", step_ms(engine, slots))
    for tiles in skinny.TILES.values():
        tiles[rows] = None
    keep(f"{slots} slots by torch's products, ms", step_ms(engine, slots))
    for kind, tile in given.items():
        skinny.TILES[kind][rows] = tile
    keep(f"{slots} slots by tiles", tune(engine, slots, narrow))
    keep(f"{slots} slots by shapes of attention", tune_attention(engine, slots))
    tuned = {"step_ms": step_ms(engine, slots), "tiles": {kind: tiles[rows] for kind, tiles in skinny.TILES.items()}}
    tuned |= {
        "PROGRAMS": slot_attention.PROGRAMS,
        "SHAPES": {str(key): value for key, value in slot_attention.SHAPES.items()},
    }
    tuned |= {"kernels_us": kernels_of(lambda: engine.step(slots).run(4), 4)}
    keep(f"{slots} slots tuned", tuned | {"seconds": time.perf_counter() - start})
    # Those hold for all slots alike: what is best for these is no start for others.
    slot_attention.PROGRAMS = attention[0]
    slot_attention.SHAPES.update(attention[1])
    slot_attention.way_of.cache_clear()


def tune_delta(model, slots: int) -> dict:
    """A step of the gated delta rule for `slots` slots, by the programs that share a head's state and their warps; {}
    without such layers."""
    import torch

    from families import family_of
    from kernels import delta_step as room
    from kernels.early import early
    from writing.slots import Cache

    layers = [layer for layer in family_of(model.config).captured(model).layers if not layer.mixer.takes_back]
    if not layers:
        return {}
    cache = Cache(layers, slots, 64, model.dtype, "cuda")
    wide = torch.randn(slots, len(layers[0].mixer.taken), device="cuda", dtype=model.dtype)
    places, live = torch.full((2, slots), 9, device="cuda")
    found = {"limit": 2 * cache.states[0][1].nbytes / 3.35e6}
    for shape in ((1, 8), (1, 16), (2, 4), (2, 8), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4)):

        def run(shape=shape):
            for layer, kept in zip(layers, cache.states):
                room.step_by_kernel(wide, layer.mixer.mixing, *kept, places, live, early(wide.device), *shape)

        found["{} programs, {} warps".format(*shape)] = replayed_us(run, len(layers))
    print("delta rule", slots, json.dumps(found), flush=True)
    return found


# -----------------------------------------------------------------------------
# Main


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", type=Path, required=True, help="folder made by make_shapes.py")
    parser.add_argument("--batches", default="1,8,32,64", help="pages at once; '' measures none")
    parser.add_argument("--endings", default="", help="pages at once, as 8,64: with what has documents end and without")
    parser.add_argument("--generate_tokens", type=int, default=16, help="that generate() writes; 0 leaves it out")
    parser.add_argument("--check_pages", type=int, default=64, help="that are held against the plain model; 0: none")
    parser.add_argument("--check_tokens", type=int, default=100, help="of each of these pages")
    parser.add_argument(
        "--dictate", default="", help="batches for which real text is dictated, with drafts and without"
    )
    parser.add_argument("--pages", type=Path, help="folder of HTML files that are dictated (default: invented pages)")
    parser.add_argument("--memory_tb_s", type=float, default=3.35, help="of the GPU's datasheet: H100 3.35, H200 4.8")
    parser.add_argument(
        "--tune", nargs="?", const="8,16,32,64", default="", help="slots: try tiles one by one before, use the fastest"
    )
    parser.add_argument("--narrow", action="store_true", help="try narrow tiles, too, for up to 16 rows: minutes more")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def main() -> None:
    args = arguments()

    import torch

    import use_model_from_hub as use

    model, processor = make_model(args.base_model)
    recipe = use.Recipe(max_html_tokens=1_500)
    packages = {name: version(name) for name in ("torch", "transformers", "triton")}
    result = {"gpu": torch.cuda.get_device_name(), **packages, "memory_tb_s": args.memory_tb_s}

    def keep(name: str, value: object) -> None:
        result[name] = value
        print(name, json.dumps(value), flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    tuned = [int(slots) for slots in args.tune.split(",") if slots]
    if tuned:
        start = time.perf_counter()
        keep("broad tiles", compile_beside(model, tuned) | {"seconds": time.perf_counter() - start})
    for slots in tuned:
        tune_all(model, processor, recipe, slots, args.narrow, keep)
        keep(f"delta rule of {slots} slots, us", tune_delta(model, slots))
    if args.check_pages:
        checks(model, processor, recipe, args.check_pages, args.check_tokens, keep)
    for batch in filter(None, args.dictate.split(",")):
        shots = [noise(number) for number in range(int(batch))]
        pages = real_pages(processor.tokenizer, args.pages) if args.pages else None
        pages = pages or pages_like_real(processor.tokenizer, 16, 1_500)
        keep(f"dictated {batch}", with_drafts(model, processor, recipe, shots, pages))
    for batch in filter(None, args.endings.split(",")):
        shots = [noise(number) for number in range(int(batch))]
        pages = pages_like_real(processor.tokenizer, min(len(shots), 16), 1_500)
        keep(f"endings {batch}", with_endings(model, processor, replace(recipe, max_html_tokens=512), shots, pages))
    for batch in map(int, filter(None, args.batches.split(","))):
        shots = [noise(number) for number in range(batch)]
        keep(f"engine {batch}", by_engine(model, processor, recipe, shots, args.memory_tb_s))
        if args.generate_tokens:
            keep(f"generate {batch}", by_generate(model, processor, recipe, shots, args.generate_tokens))


if __name__ == "__main__":
    main()
