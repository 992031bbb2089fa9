"""What fits: one decision for --plan and for training, and a restart only where nobody typed a batch size."""

import contextlib
import io
import json
import math
import os
import sys
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import conftest
import datasets
import pytest
import torch
from conftest import ROOT, make_processor

import holo1_dom_finetune as pipeline
from families import family_of
from training import memory_fit, zero3
from training.checkpoints import RESTARTED
from training.errors import SettingsError
from training.memory_plan import MEMORY_SHARE, Hardware, Load, MemoryPlan, Way
from training.prompt_and_mask import PageEncoder
from training.settings import PageSettings, resolve


@pytest.fixture(scope="module")
def shapes_of_3b():
    return conftest.shapes_of_3b()


@pytest.fixture(scope="module")
def base(shapes_of_3b, tmp_path_factory):
    """A folder with the configuration of 3B, which is all that --plan reads."""
    folder = tmp_path_factory.mktemp("shapes_of_3b")
    shapes_of_3b.save_pretrained(folder)
    return folder


ZERO_3 = ["--deepspeed", str(ROOT / "ds_z3.json")]


@cache
def plan_of(base, *flags: str) -> str:
    """What --plan prints; asked for once, since each answer takes half a second."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        pipeline.run(["--plan", "--base_model", str(base), *flags])
    return printed.getvalue()


def rows_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line.strip()[:1].isdigit() and "does not fit" not in line]


def test_the_layers_of_each_tower_are_treated_as_the_plan_has_it():
    """Told apart by where they stand. Of Qwen3.5's two kinds of attention those recomputed come as they stand, so that
    neither is spared."""
    from transformers import Qwen3_5ForConditionalGeneration

    config = conftest.make_qwen3_5_config(conftest.make_tokenizer())
    config.text_config.layer_types = [*["linear_attention"] * 3, "full_attention"] * 2
    config.text_config.num_hidden_layers = 8
    model = Qwen3_5ForConditionalGeneration(config)
    blocks, layers = model.model.visual.blocks, model.model.language_model.layers
    for share, share_of_vision in ((0.5, 1.0), (1.0, 0.0), (0.25, 0.5)):
        memory_fit.treat_layers(model, Way(recomputed=share, recomputed_vision=share_of_vision))
        assert [layer.gradient_checkpointing for layer in layers] == [n < 8 * share for n in range(8)]
        assert sum(block.gradient_checkpointing for block in blocks) == int(len(blocks) * share_of_vision)


@pytest.mark.parametrize("learns", [True, False])
def test_a_tower_that_learns_nothing_has_no_backward_pass(learns):
    """With activation checkpointing transformers would give it one, which kept what adapters were not planned for."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration(conftest.make_config(conftest.make_tokenizer()))
    model.model.visual.requires_grad_(learns)
    if not learns:
        model = pipeline.add_adapters(model, PageSettings(lora=True), seed=0)
    model.activation_checkpointing_enable()
    memory_fit.treat_layers(model, Way())
    patches = next(part for name, part in model.named_modules() if name.endswith("visual.patch_embed"))
    embedded = model.get_input_embeddings()(torch.tensor([1]))
    assert embedded.requires_grad and patches(torch.randn(4, patches.proj.weight[0].numel())).requires_grad == learns


@pytest.mark.slow
def test_the_plan_obeys_a_typed_batch_size(base):
    assert {row[2] for row in rows_of(plan_of(base, *ZERO_3))} != {"2"}
    typed = [rows_of(plan_of(base, *ZERO_3, *flags)) for flags in (["--micro_batch", "2"], ["--micro_batch=2"])]
    assert typed[0] == typed[1]
    assert {row[2] for row in typed[0]} == {"2"}
    older = rows_of(plan_of(base, *ZERO_3, "--per_device_train_batch_size", "2"))
    assert {row[2] for row in older} == {"2"}


def test_the_plan_obeys_a_typed_share_of_recomputed_layers(base):
    assert len({row[3] for row in rows_of(plan_of(base, *ZERO_3))}) > 1
    typed = rows_of(plan_of(base, *ZERO_3, "--checkpoint_share", "0.5"))
    assert {(row[3], row[4]) for row in typed} == {("50%", "50%")}


def test_the_plan_says_that_the_plain_path_is_not_planned(base):
    fast, plain = plan_of(base, *ZERO_3), plan_of(base, *ZERO_3, "--fast", "False")
    assert "the plain path (--fast False) is not planned: it takes 1 page at once" in plain
    assert "100% of the layers recomputed" in plain
    assert "activations  head" in fast and "activations  head" not in plain
    weights = {(row[0], row[7]) for row in rows_of(fast)}
    assert {(row[0], row[1]) for row in rows_of(plain)} == weights, "what no page changes is the same on both paths"


@pytest.mark.parametrize(("family", "tokens"), [("qwen2_5_vl", "1,280"), ("qwen3_vl", "980")])
def test_the_plan_counts_the_image_tokens_of_the_models_own_family(family, tokens, base, tmp_path):
    """And it plans pages, as every family with a fast path is planned."""
    if family == "qwen3_vl":
        from transformers import Qwen3VLConfig

        base = tmp_path / "base"
        text = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024}
        Qwen3VLConfig(text_config=text, vision_config={"depth": 2, "deepstack_visual_indexes": [1]}).save_pretrained(
            base
        )
    text = plan_of(base, *ZERO_3)
    assert f"most {tokens} image tokens" in " ".join(text.split())
    assert "activations  head" in text


def test_the_plan_says_which_model_has_no_fast_path(base, monkeypatch):
    monkeypatch.setattr(memory_fit, "trains_fast", lambda config, settings: False)
    assert "the plain path (this model has no fast path) is not planned" in plan_of(base, *ZERO_3, "--seed", "7")


def test_the_plan_says_what_there_is_without_deepspeed_and_what_it_does_not_know(base):
    """There is no GPU here, but the plan is of one: training would have 4 bits there."""
    text = " ".join(plan_of(base, "--optim", "lion_8bit").split())
    assert "GiB on each GPU without DeepSpeed, the base in 4 bits:" in text
    assert "--optim lion_8bit is not planned" in text


# -----------------------------------------------------------------------------
# Training decides as the plan does


def on_gpus(monkeypatch, gib: float, processes: int, name: str = "NVIDIA H100", share: float = 1.0) -> None:
    """No GPU here, so what torch says of one is given; the decision is real."""
    cuda = {"get_device_properties": SimpleNamespace(total_memory=gib * 2**30), "get_device_name": name}
    for function, answer in (cuda | {"get_per_process_memory_fraction": share}).items():
        monkeypatch.setattr(torch.cuda, function, lambda device, answer=answer: answer)
    monkeypatch.setattr(memory_fit, "world_size", lambda: processes)
    monkeypatch.setattr(memory_fit, "link_rate", lambda device: memory_fit.LINK_GB_S)
    monkeypatch.setattr(memory_fit, "pinnable_gib", lambda: math.inf)


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("gib", [40, 80])
@pytest.mark.parametrize("flags", [[], ["--micro_batch", "4"], ["--checkpoint_share", "0.5"], ["--freeze_vision"]])
def test_training_chooses_what_the_plan_prints(flags, gib, processes, shapes_of_3b, monkeypatch, capsys):
    """The pages of the training are at the limits that the plan is made for, so both must come to the same."""
    family, encoder = family_of(shapes_of_3b), PageEncoder(make_processor(), "Write the page.", family_of(shapes_of_3b))
    resolved = resolve(["--plan", *ZERO_3, *flags])
    settings, image = resolved.settings, family.most_image_tokens(shapes_of_3b, resolved.settings.max_pixels)
    html = settings.max_html_tokens
    # a question of as many tokens as the plan assumes
    missing = memory_fit.QUESTION_TOKENS - encoder.question_tokens
    encoder.question_tokens += missing
    pages = datasets.Dataset.from_dict({"html_tokens": [html] * 9, "image_tokens": [image] * 9})
    on_gpus(monkeypatch, gib, processes)
    config = SimpleNamespace(config=resolved.deepspeed)
    named = ("per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "deepspeed")
    args = SimpleNamespace(**{name: resolved.training[name] for name in (*named, "optim", "bf16")})
    args.device, args.hf_deepspeed_config = torch.device("cuda"), config
    scope = memory_fit.scope_of(settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    page = memory_fit.longest_page(family, shapes_of_3b, image, html + 1)
    hardware = Hardware(MEMORY_SHARE * gib, link_gb_s=memory_fit.LINK_GB_S)
    planned = memory_fit.decide(scope, page.times, page, processes, hardware)
    chosen = memory_fit.choose_micro_batch(args, settings, shapes_of_3b, pages, encoder)
    assert chosen == (planned.chosen or planned.smallest)
    assert ("trying all the same" in capsys.readouterr().out) == (planned.chosen is None)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8


@pytest.mark.parametrize("file", ["ds_z3.json", "ds_z3_offload.json"])
def test_a_typed_share_is_offloaded_as_the_link_bears_it_or_refused(file, shapes_of_3b, monkeypatch):
    resolved = resolve(["--plan", "--offload_share", "0.5", "--deepspeed", str(ROOT / file)])
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    on_gpus(monkeypatch, 80, 1)
    hardware = memory_fit.hardware_of(torch.device("cuda"), scope)
    assert hardware.link_gb_s == memory_fit.LINK_GB_S
    plan = MemoryPlan(scope.way, {}, pinned_gib=40.0)
    told = memory_fit.link_words(plan, plan, replace(hardware, pinned_gib=30.0))
    assert "40.0 GiB" in told and "no more than 30.0 should be" in told

    def fails(device: torch.device) -> float:
        raise RuntimeError("no memory can be pinned")

    monkeypatch.setattr(memory_fit, "link_rate", fails)
    with pytest.raises(SettingsError, match=r"--offload_share 0\.5: none of the CPU's memory can be pinned"):
        memory_fit.hardware_of(torch.device("cuda"), scope)


def test_candidates_are_ordered_and_the_first_that_fits_is_chosen(shapes_of_3b):
    resolved = resolve(["--plan", *ZERO_3])
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    assert scope.sizes == (1, 2, 4, 8)
    load = Load(3_000, 5_000, 1_500)
    roomy = memory_fit.decide(scope, load.times, load, 2, Hardware(math.inf))
    assert roomy.chosen.way is roomy.candidates[0]
    tight = memory_fit.decide(scope, load.times, load, 2, Hardware(roomy.smallest.total_gib))
    assert tight.chosen.total_gib == roomy.smallest.total_gib
    assert memory_fit.decide(scope, load.times, load, 2, Hardware(1.0)).chosen is None


@pytest.mark.parametrize(
    ("share", "threshold", "whole"), [(1.0, "auto", True), (1.0, 100_000, False), (0.3, "auto", False)]
)
def test_weights_are_gathered_once_per_step_where_they_fit(share, threshold, whole, shapes_of_3b, monkeypatch):
    """Two H200s of which torch may use a share. No GPU here, so what torch says of one is given; the plan is real."""
    on_gpus(monkeypatch, 140, 2, "NVIDIA H200", share)
    zero = {"stage": 3, zero3.THRESHOLD: threshold}
    args = SimpleNamespace(
        device=torch.device("cuda"),
        deepspeed="ds_z3.json",
        hf_deepspeed_config=SimpleNamespace(config={"zero_optimization": zero}),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        activation_checkpointing=True,
    )
    pages = datasets.Dataset.from_dict({"html_tokens": [2_000] * 20, "image_tokens": [1_200] * 20})
    encoder = PageEncoder(make_processor(), "Write the page.", family_of("qwen2_5_vl"))
    plan = memory_fit.choose_micro_batch(args, PageSettings(), shapes_of_3b, pages, encoder)
    assert plan.way.whole == whole
    assert zero[zero3.THRESHOLD] == (10**11 if whole else threshold)
    assert plan.total_gib <= MEMORY_SHARE * share * 140
    assert plan.parts_gib["gathered"] == pytest.approx(7.0 if whole else 1.86, rel=0.02)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 8


@pytest.mark.parametrize(("pinned", "words"), [(math.inf, "carries 50 GB/s"), (1.0, "no more than 1.0 GiB")])
def test_the_console_says_whether_the_link_or_the_cpus_memory_binds(pinned, words, shapes_of_3b):
    resolved = resolve(["--plan", *ZERO_3])
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    load = Load(3_500, 5_000, 1_500)
    hardware = Hardware(75, link_gb_s=50, pinned_gib=pinned)
    plans = [memory_fit.decide(scope, load.times, load, 1, Hardware(75, None, 50, most)) for most in (pinned, math.inf)]
    assert words in memory_fit.link_words(plans[0].chosen, plans[1].chosen, hardware)


# -----------------------------------------------------------------------------
# Restart


def fit_of(*argv: str, size: int = 4, **shares: float) -> memory_fit.Fit:
    """As resolve() leaves the settings; --plan keeps it from taking `auto` away where there is no GPU."""
    return memory_fit.Fit(MemoryPlan(Way(micro_batch=size, **shares), {}), None, resolve(["--plan", *argv]).settings)


@pytest.mark.parametrize(
    "argv", [["--micro_batch", "4"], ["--micro_batch=4"], ["--per_device_train_batch_size=4"], ["--demo"]], ids=" ".join
)
def test_a_typed_batch_size_that_does_not_fit_ends_the_run(argv, monkeypatch):
    monkeypatch.setattr("os.execv", lambda *command: pytest.fail(f"restarted: {command}"))
    full = torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(torch.OutOfMemoryError) as raised:
        fit_of(*argv).restart(8, full)
    assert raised.value is full


def restarted(monkeypatch, argv: list[str], size: int, pages: int, **shares: float) -> list[str]:
    """The command line that takes over; the test's process stays what it is."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", *argv])
    monkeypatch.setattr(os, "environ", {**os.environ})  # what it leaves there goes when the test ends
    started = []
    monkeypatch.setattr("os.execv", lambda program, command: started.append(command[1:]))
    fit_of(*argv, size=size, **shares).restart(pages, None)
    ((script, *again),) = started
    assert script == "train.py" and again[: len(argv)] == argv and os.environ[RESTARTED] == "1"
    return again


def test_a_batch_that_auto_chose_is_halved_whatever_the_command_line_looks_like(monkeypatch):
    """`--micro_batch auto` is typed, too, and is no number."""
    again = restarted(monkeypatch, ["--micro_batch", "auto"], size=4, pages=8)
    assert again == ["--micro_batch", "auto", "--micro_batch", "2", "--checkpoint_share", "1", "--offload_share", "0"]
    with pytest.raises(torch.OutOfMemoryError, match="on another GPU"):
        memory_fit.Fit(MemoryPlan(Way(micro_batch=1), {}), None, PageSettings()).restart(8, None)


@pytest.mark.parametrize(
    ("typed", "size", "shares", "then"),
    [
        ([], 4, {"recomputed": 0.5}, "2"),
        ([], 1, {"recomputed_vision": 0.0}, None),
        (["--micro_batch", "4"], 4, {"recomputed": 0.5}, None),
    ],
)
def test_a_plan_that_kept_some_layers_is_first_tried_with_all_recomputed(typed, size, shares, then, monkeypatch):
    """The same pages; then, unless their number was typed by the user or is one, half as many."""
    again = restarted(monkeypatch, typed, size, 8, **shares)
    shares = ["--checkpoint_share", "1", "--offload_share", "0"]
    assert again == [*typed, "--micro_batch", str(size), *shares]
    if then is None:
        with pytest.raises(torch.OutOfMemoryError, match="on another GPU"):
            fit_of(*again, size=size).restart(8, None)
    else:
        assert restarted(monkeypatch, again, size, 8)[len(again) :] == ["--micro_batch", then]


def test_a_restart_is_importing_to_the_wrapper_and_not_silent(monkeypatch, tmp_path):
    monkeypatch.setenv("HOLO1_STATUS_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "beat-0").write_text("{}")
    restarted(monkeypatch, [], size=4, pages=8)
    assert not (tmp_path / "beat-0").exists()


@pytest.mark.parametrize(("pages", "size", "smaller"), [(8, 8, 4), (9, 9, 3), (9, 3, 1), (6, 3, 1), (15, 15, 5)])
def test_a_restart_takes_a_size_that_its_settings_accept(pages, size, smaller, monkeypatch):
    argv = ["--gradient_accumulation_steps", str(pages)]
    resolved = resolve(restarted(monkeypatch, argv, size, pages))
    assert resolved.problems == []
    assert resolved.training["per_device_train_batch_size"] == smaller
    assert resolved.training["gradient_accumulation_steps"] == pages // smaller


@pytest.mark.parametrize(
    ("typed", "share"),
    [([], 1.0), (["--checkpoint_share", "0.5"], 0.5), (["--activation_checkpointing", "False"], 0.0)],
    ids=["nothing typed", "share", "none of them"],
)
def test_a_restart_recomputes_all_layers_unless_a_share_was_typed(typed, share, shapes_of_3b, monkeypatch):
    resolved = resolve(["--plan", *restarted(monkeypatch, typed, 8, 8)])
    assert resolved.settings.checkpoint_share == share
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, shapes_of_3b)
    assert (scope.sizes, scope.recomputed) == ((4,), share), (
        "nothing is left to choose, so a second failure ends the run"
    )


@pytest.mark.parametrize(
    ("at_once", "accumulated", "checkpoint", "wanted"),
    [
        (4, 2, "checkpoint-3", {"micro_batch": 2, "resume": True}),
        (6, 1, "checkpoint-best", {"micro_batch": 3, "resume": False}),
        (1, 8, "checkpoint-3", None),
    ],
)
def test_full_memory_leaves_what_a_smaller_start_should_ask_for(
    at_once, accumulated, checkpoint, wanted, tmp_path, monkeypatch
):
    """The next smaller number that divides the pages of a step; nothing where a single page was too much."""
    (tmp_path / "output" / checkpoint).mkdir(parents=True)
    monkeypatch.setenv("HOLO1_STATUS_DIR", str(tmp_path))
    pages = {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": accumulated}
    memory_fit.note_smaller(SimpleNamespace(**pages, output_dir=str(tmp_path / "output")))
    found = tmp_path / "smaller"
    assert (json.loads(found.read_text()) if found.exists() else None) == wanted
