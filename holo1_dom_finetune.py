"""Teach Holo1, or any Qwen2.5-VL, Qwen3-VL or Qwen3.5 model, to write the HTML of the web page in a screenshot.

    python holo1_dom_finetune.py --demo                                           # no GPU, no network: minutes
    python holo1_dom_finetune.py --dataset ./my_pages --show_supervision          # what the loss sees
    python holo1_dom_finetune.py                                                  # one GPU, 4-bit, LoRA
    python run_deepspeed_training.py --num_gpus 4                                 # ZeRO-3 through the wrapper
    deepspeed --num_gpus=4 holo1_dom_finetune.py --deepspeed ds_z3.json           # ZeRO-3 directly
    python holo1_dom_finetune.py --help

One page travels through this file from top to bottom: dataset, prompt and mask, batch, step, checkpoint, HTML, score,
card, Hub. Sections: Model, Collate, Training, Evaluation, Hub, Main. `run` and `fine_tune` under Main are the table of
contents: read them first. All that is not one of these five stands in the rooms of training/ and scoring/. (all ranks)
marks what every process must call together, in the same order, or the others wait for ever.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from training.settings import PageSettings, Resolved, answer, ask_before_cpu, check_settings, penalties, resolve

if __name__ == "__main__":
    answer(sys.argv[1:])  # what can be answered without torch, which takes seconds to load, and end there

# Packed rows differ in length from step to step; growing segments instead of gaps between fixed ones. Set before torch
# is there, which may read it as it is loaded; not beside the newer name of the same, which torch would then not read.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# Products fill a GPU, and what travels between several wants 24 of its processors at once: among them a layer's weights
# took 3.4 ms where they travel in some 0.4. Measured with other changes, never alone (benchmarks/README.md).
os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput

import use_model_from_hub as use
from families import Family, Picture, family_of, page_costs, trains_fast
from scoring import metrics
from training import eight_bit, fast_layers, resuming, zero3
from training.base_model import BaseTensor, base_tensors, fetch_base, fingerprint, load_config, load_processor
from training.best_weights import BestWeights
from training.checkpoints import Checkpoints
from training.disk_space import check_space
from training.errors import DataError, NotFiniteError, PipelineError, SettingsError, StoppedError, is_out_of_memory
from training.evaluation import Rendering, announce, keep_outputs, parts_of, render_and_score, write_held_out
from training.final_folder import copy_base_files, load_weights, save_final, whole_copy
from training.heartbeat import heart, on_main_alone
from training.loss import plain_loss
from training.memory_fit import Fit, choose_micro_batch, compare_with_plan, costs_of, note_smaller, print_plan
from training.metered_trainer import NOT_FINITE, MeteredTrainer
from training.model_card import describe
from training.packing import pack
from training.page_order import PageSampler, check_steps, write_page_order
from training.preparation import Pages, one_page, prepare_pages
from training.processes import (
    agree,
    all_ranks_arrive,
    cpu_group,
    emergency_group,
    here,
    is_main,
    on_each_machine,
    on_main,
    report_end,
    say,
    say_failure,
    say_from_here,
    world_size,
)
from training.progress import draw_loss, memory_is_tight, release_memory, say_batch, say_memory
from training.prompt_and_mask import IGNORED, PageEncoder, check_same_question, colour_supervision
from training.publishing import check_hub_access, push_final_folder, saved_words
from training.recipe import gather_facts, make_recipe
from training.results import Results
from training.stopping import stop

EMERGENCY_FOLDER = "holo1_dom_finetune_checkpoint"


# -----------------------------------------------------------------------------
# Model


def load_model(base: Path, settings: PageSettings, args: TrainingArguments) -> PreTrainedModel:
    """(all ranks) The model to train: whole or in 4 bits, sharded, faster, with adapters, as the settings say.

    Under ZeRO-3 every rank holds its part from the first moment, because `TrainingArguments` came before this call:
    transformers then shards while it loads. Raises `PipelineError` where that did not happen.
    """
    config = load_config(base, settings)
    family = family_of(config)
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    # Without DeepSpeed's fp32 master weights, full fine-tuning in bf16 would round small updates away: at a rate of
    # 1e-5 most are smaller than the last of bf16's 8 bits. fp32 costs twice the memory; autocast keeps the speed.
    frozen_base = settings.lora or settings.quantize == "4bit"
    options = {
        "dtype": half if args.deepspeed or frozen_base else torch.float32,
        "trust_remote_code": settings.trust_remote_code,
    }
    # bitsandbytes quantises on the GPU while it loads; without a map, accelerate would spread the model over all GPUs.
    if settings.quantize == "4bit":
        options |= {"quantization_config": quantization_config(half, family), "device_map": {"": args.device}}
    if settings.random_weights:
        # The same weights on every rank: ZeRO-3 takes rank 0's, but DDP compares nothing and would train two models.
        torch.manual_seed(args.seed)
        model = AutoModelForImageTextToText.from_config(config, **options)
    else:
        model = AutoModelForImageTextToText.from_pretrained(base, **options)
    if zero3.is_on():
        # A model that is whole on every rank would train, too, and run out of memory an hour later.
        zero3.check_sharded(model)
        zero3.forget_renamings(model)
    for part in family.vision_modules(model) if settings.freeze_vision else ():
        part.requires_grad_(False)
    # Before the adapters: peft wraps the projections, and the fast layers have to find the model's own modules.
    if trains_fast(model.config, settings):
        fast_layers.make_fast(model, settings, args, zero3.is_on())
    if frozen_base:
        model = add_adapters(model, settings, args.seed)
    # transformers 5.23 corrects the end tokens of the base's own, and then refuses to save what else stands there.
    model.generation_config = GenerationConfig()
    # Training needs no cache, and activation checkpointing would warn of it at every step.
    model.config.get_text_config().use_cache = False
    return model


def quantization_config(compute_dtype: torch.dtype, family: Family) -> BitsAndBytesConfig:
    """4-bit NF4 with quantised scales (QLoRA, Dettmers et al. 2023): the frozen base of adapters on one GPU.

    Never under DeepSpeed (settings.resolve_quantization): ZeRO-3 leaves 4-bit weights unsharded and saves none of them.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        # Reading small print is what the vision tower is for, and it is a sixth of the weights: it stays whole.
        llm_int8_skip_modules=["lm_head", *family.vision],
    )


def add_adapters(model: PreTrainedModel, settings: PageSettings, seed: int) -> PeftModel:
    """LoRA (Hu et al. 2021) on the language model's own projections, merged into whole weights on saving.

    Adapters begin at random, the same ones in every run and on every rank with this seed.
    """
    # By a pattern of whole names: by leaf name alone, the vision tower's gate, up and down would match as well.
    wanted = family_of(model.config).adapters
    config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=wanted)
    # The first layer's input has to need a gradient: else DeepSpeed, told of a layer's gradients by torch's hook on the
    # whole layer, would be told before there are any.
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    torch.manual_seed(seed)
    # Under ZeRO-3 as precise as the base, like all that learns there: their masters are fp32. peft would make them so,
    # and DeepSpeed leaves them (0.19.8, of a model that was sharded as it was loaded): each product would widen what it
    # reads and keep that, twice the bytes of a whole layer.
    model = get_peft_model(model, config, autocast_adapter_dtype=not zero3.is_on())
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._cast_input_dtype = as_adapters_read  # peft 0.21's method of that name
    return model


def as_adapters_read(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a layer reads, for its adapters of `dtype`. peft widens it to them; where autocast narrows it for their
    product again, that is two copies, of which each product of a layer would keep its own."""
    return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(dtype)


# -----------------------------------------------------------------------------
# Collate

# Screenshots decoded and processed at once. One of 20 M pixels takes 240 MB in fp32 before it is shrunk, so that 16 of
# them may need 4 GB in every data worker; machines without DeepSpeed, small ones as a rule, get by with a quarter.
CHUNK_DEEPSPEED, CHUNK_FALLBACK = 16, 4


class PageCollator:
    """Pages to a batch, tolerant of full memory and of broken pictures, never of a missing one.

    Screenshots are decoded and processed `chunk` at a time; when memory runs out the chunk is halved, down to one, and
    doubled again after success. A page that cannot be read is replaced by another of the same dataset: ZeRO-3 waits
    for ever for a rank whose batch is shorter or has no picture. Replacements are noted in `notes_file`.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        encoder: PageEncoder,
        pages: Dataset,
        chunk: int,
        notes_file: Path | None = None,
        config: PretrainedConfig | None = None,
        packed: bool = False,
        dtype: torch.dtype | None = None,
    ):
        self.processor, self.encoder, self.pages, self.notes_file = processor, encoder, pages, notes_file
        self.chunk = self.largest_chunk = chunk
        # Of the model, to count its operations; None counts nothing, as in the rehearsal.
        self.config = config
        # Into one row, without a single padded token; else padded rows, as every model takes them.
        self.packed = packed
        # Of the pixels: half precision halves what travels to the GPU. None leaves them as the processor makes them.
        self.dtype = dtype

    def __call__(self, pages: list[dict]) -> dict:
        """Pages (dicts of dataset.PAGE_FIELDS) to a batch: what the family makes of the screenshots (`pixel_values`
        (patches, dim), `image_grid_thw` (pages, 3) for Qwen), what `pad` or `pack` adds, `flops` and `pages`, names."""
        kept, pictures = [], []
        while len(kept) < len(pages):
            chunk_pages, chunk_pictures = self.process(pages[len(kept) : len(kept) + self.chunk])
            kept += chunk_pages
            pictures += chunk_pictures
        rows = [self.encoder.encode(page["html"], picture.ids) for page, picture in zip(kept, pictures)]
        batch = self.encoder.family.join(pictures)
        if self.config is not None:
            counts = (len(picture.ids) for picture in pictures)
            batch["flops"] = sum(self.flops(labels, image) for (_, labels), image in zip(rows, counts))
            batch["pages"] = [page["name"] for page in kept]
        if not self.packed:
            return batch | self.pad(rows)
        # Geometry and positions are computed here, in the data workers: on the GPU they would cost a host sync each.
        if self.dtype is not None:
            batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
        grids = batch["image_grid_thw"]
        sizes = (grids[:, 1:] // self.config.vision_config.spatial_merge_size).tolist()
        batch |= pack(rows, sizes, len(self.encoder.before), IGNORED)
        return batch | self.encoder.family.geometry(self.config)(grids)

    def flops(self, labels: list[int], image: int) -> float:
        """Operations of one page with `image` image tokens, for the MFU of the step's line."""
        shape, supervised = self.encoder.family.shape(self.config), len(labels) - labels.count(IGNORED)
        return page_costs.page_flops(shape, len(labels), supervised, image * shape.per_token)

    def pad(self, rows: list[tuple[list[int], list[int]]]) -> dict:
        """`input_ids`, `labels`, `attention_mask` and, where the family needs them, `mm_token_type_ids`, all (B, T)."""
        longest = max(len(ids) for ids, _ in rows)
        token = self.processor.tokenizer.pad_token_id
        input_ids = torch.tensor([ids + [token] * (longest - len(ids)) for ids, _ in rows])
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        batch = {
            "input_ids": input_ids,
            "labels": torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in rows]),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        }
        # Without these, positions silently become one-dimensional (transformers 5.23, Qwen's).
        if self.encoder.family.token_types:
            batch["mm_token_type_ids"] = (input_ids == self.encoder.image_token_id).long()
        return batch

    def process(self, pages: list[dict]) -> tuple[list[dict], list[Picture]]:
        """As many of `pages` as fit into memory, at least one: (pages, the `Picture` of each)."""
        replaced, wanted = 0, pages[0]
        while True:
            pages = pages[: self.chunk]
            try:
                done = self.decode_and_process(pages)
            except Exception as error:
                # Eight different pages that do not fit even alone: it is the machine that is too small, not the pages.
                if not is_out_of_memory(error) or replaced == 8:
                    raise
                if self.chunk == 1:
                    pages = [self.replacement(wanted, "out of memory even alone", replaced)]
                    replaced += 1
                    continue
                # Half of what was tried, not of what is allowed: the last chunk of a batch may be short.
                self.chunk = max(1, min(self.chunk, len(pages)) // 2)
                say_from_here(f"collate: memory ran out, going on with {self.chunk} screenshots at once")
            else:
                self.chunk = min(self.largest_chunk, self.chunk * 2)
                return done

    def decode_and_process(self, pages: list[dict]) -> tuple[list[dict], list[Picture]]:
        """All of `pages`, broken ones replaced: (pages, the `Picture` of each). `DataError` where none is whole."""
        kept, screenshots = [], []
        for wanted in pages:
            page = wanted
            # As many tries as there are pages: the replacement may be broken, too.
            for tries in range(len(self.pages) + 1):
                try:
                    screenshots.append(use.open_screenshot(page["screenshot"]))
                    break
                except ValueError as error:
                    page = self.replacement(wanted, str(error), tries)
            else:
                raise DataError("no page of the dataset can be read any more")
            kept.append(page)
        return kept, self.encoder.family.pictures(self.processor, screenshots)

    def replacement(self, page: dict, reason: str, tries: int = 0) -> dict:
        """A page that depends on the broken one's name alone, so that every run replaces alike."""
        # A random one would differ between runs and ranks, and a resumed run would train on other pages.
        digest = hashlib.sha256(page["name"].encode()).digest()
        spare = self.pages[(int.from_bytes(digest[:8], "big") + tries) % len(self.pages)]
        note = {"page": page["name"], "reason": reason, "replaced_by": spare["name"]}
        say_from_here(f"collate: {json.dumps(note)}")
        if self.notes_file:
            with self.notes_file.open("a", encoding="utf-8") as notes:
                notes.write(json.dumps(note) + "\n")
        return spare


# -----------------------------------------------------------------------------
# Training


class PageTrainer(MeteredTrainer):
    """The HF Trainer with an exact token mean, steps of equal cost, a line per step, and the base's shapes on disk.

    `costs` are the operations of each training page, `tensors` what the base checkpoint holds, `checkpoints` where and
    how a checkpoint is written, `base` the folder of the base model.
    """

    def __init__(
        self,
        costs: list[float],
        tensors: dict[str, BaseTensor],
        settings: PageSettings,
        checkpoints: Checkpoints,
        base: Path,
        **options,
    ):
        super().__init__(**options)
        self.base, self.costs, self.settings, self.checkpoints = base, costs, settings, checkpoints
        self.shapes = {tensor.name: tensor.shape for tensor in tensors.values()}

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> PageSampler:
        """The Trainer's own would deal pages out by number; ranks then wait for whoever got the long ones."""
        self.sampler = PageSampler(self.costs, self.args, self.checkpoints.record["began_on"])
        return self.sampler

    def _run_epoch(self, **state) -> None:
        """(all ranks) One epoch, or none where all steps are done: the Trainer would train one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        # The Trainer and accelerate 1.15 look for a sampler two wrappers deep; after a resume it lies three deep, and
        # would draw the first epoch's pages again.
        self.sampler.epoch = state["epoch"]
        super()._run_epoch(**state)

    def _get_output_dir(self, trial: object) -> str:
        return str(self.checkpoints.staging)

    @heart.stage("saving")
    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """(all ranks) Whole or not there: written aside, and put into its place while training goes on."""
        with self.meter.pause(), self.checkpoints.staged():
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Adapters alone are saved as they are; ranks that write nothing hold placeholders under ZeRO-3.
        if self.args.should_save and not hasattr(self.model, "peft_config"):
            whole, shapes = self.model.state_dict() if state_dict is None else state_dict, self.shapes
            state_dict = {
                name: fast_layers.narrowed(value, shapes[name]).contiguous() if name in shapes else value
                for name, value in whole.items()
            }
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            trusted = self.settings.trust_remote_code
            copy_base_files(self.base, Path(output_dir or self.args.output_dir), self.processing_class, trusted)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: PreTrainedModel | None = None) -> None:
        # The Trainer of transformers 5.23 would find none of the names it looks for, and go on with the base's weights.
        if hasattr(self.model, "peft_config"):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_weights(self.model if model is None else model, Path(resume_from_checkpoint), self.settings)


class Steps(TrainerCallback):
    """What happens before the first step and at the end of each: the fit, finite gradients, stopping, judging."""

    def __init__(self, evaluator: Evaluator, fit: Fit, save: Callable[[Path], None]):
        self.evaluator, self.fit, self.save = evaluator, fit, save
        self.stopped = False  # whether ranks have agreed to stop, since one of them was asked to
        # The Trainer takes its callbacks when it is made, so it comes after this one; `make_trainer` tells it.
        self.trainer: PageTrainer | None = None
        # Whether an evaluation is under way: a failure in it comes to all ranks, and leaves the weights as they are.
        self.judging = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: object
    ) -> None:
        """(all ranks) The proof that the longest batch fits, once DeepSpeed or DDP has taken the model."""
        trainer = self.trainer
        if state.global_step:
            resuming.honour_typed(trainer)
        eight_bit.begin(args.optim, args.device, zero3.flat_tensors(trainer.model_wrapped))
        self.fit(trainer, trainer.data_collator, trainer.train_dataset, self.evaluator.pages)
        release_memory()
        # What is there by now stays; looking through it costs Python's collector 0.3 s each time, a small model's step.
        gc.freeze()
        trainer.meter.reset()
        stop.at_the_end_of_a_step()
        heart.enter("training", state.global_step)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **unused: object,
    ) -> None:
        """(all ranks) Raises `NotFiniteError` before gradients that are no numbers reach a weight."""
        if args.deepspeed:  # which has looked itself, and has none left here; on_step_end hears of it
            return
        # DDP has averaged them, so every rank sees the same. fp16 overflows now and then; its scaler skips those.
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if not args.fp16 and not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise NotFiniteError(NOT_FINITE.format("gradients are", state.global_step + 1))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: object
    ) -> None:
        """(all ranks) Stop where any rank was asked to, judge where it is time."""
        every, trainer = self.evaluator.settings.eval_every, self.trainer
        trainer.meter.steps += 1
        heart.step_ends(state.global_step)
        if args.deepspeed and not args.fp16 and not zero3.step_was_applied(trainer.model_wrapped):
            raise NotFiniteError(NOT_FINITE.format("gradients are", state.global_step))
        if world_size() == 1 and not args.deepspeed and trainer.batches is None and memory_is_tight():
            release_memory()
        # A signal reaches ranks at different moments; one that stopped alone would leave the others in a collective.
        self.stopped = agree(stop.wanted)
        if not self.stopped and every and state.global_step % every == 0 and state.global_step < state.max_steps:
            self.judging = True
            with trainer.meter.pause(), contextlib.suppress(StoppedError):  # agreed upon again here
                control.should_training_stop |= self.evaluator.step(state.global_step, self.save)
            self.judging = False
            self.stopped = agree(stop.wanted)
        if self.stopped:
            control.should_save = control.should_training_stop = True


def make_trainer(
    args: TrainingArguments,
    model: PreTrainedModel,
    collate: PageCollator,
    pages: Dataset,
    tensors: dict[str, BaseTensor],
    steps: Steps,
    checkpoints: Checkpoints,
) -> PageTrainer:
    """(all ranks) The Trainer with its steps; the main process notes which page is trained on when."""
    costs = costs_of(model.config, pages, collate.encoder)
    steps.trainer = trainer = PageTrainer(
        costs,
        tensors,
        steps.evaluator.settings,
        checkpoints,
        steps.evaluator.base,
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=pages,
        # Saved with each checkpoint, which --base_model then takes as it is.
        processing_class=collate.processor,
        callbacks=[steps],
    )
    trainer.remove_callback(PrinterCallback)  # it prints the dictionary that say_step puts into words
    sampler = PageSampler(costs, args, checkpoints.record["began_on"])
    on_main(lambda: write_page_order(sampler, pages, Path(args.output_dir) / "page_order.jsonl"))
    return trainer


def train(trainer: PageTrainer, steps: Steps, checkpoint: Path | None) -> TrainOutput:
    """(all ranks) Train, from `checkpoint` on; when it fails, leave an emergency checkpoint wherever all ranks can take
    part.

    Raises `StoppedError` after a signal, whose step is saved, and whatever ended the training otherwise.
    """
    args = trainer.args
    emergency_group(), cpu_group()  # now, while nothing has failed: no group can be made once a rank hangs
    started = resuming.steps_before(checkpoint)
    if world_size() > 1:
        say_from_here(f"of {world_size()} on {args.device}, process {os.getpid()}")
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        heart.enter("saving")
        trainer.checkpoints.settle()
    except Exception as error:
        heart.enter("finishing")
        trainer.checkpoints.join()  # what was saved before is still put into its place, whatever can be said
        say_from_here(f"training failed: {type(error).__name__}: {error}")
        if is_out_of_memory(error) and not steps.judging:
            note_smaller(args, steps.fit)
        # Before the first step the weights are only the base's, and not worth keeping. Where memory ran out inside a
        # step, other ranks wait in its collectives, and gathering weights without them would hang.
        may_save = steps.judging or world_size() == 1 or not is_out_of_memory(error)
        if trainer.state.global_step > started and may_save and all_ranks_arrive():
            leave_emergency_checkpoint(error, steps.save, Path(trainer.settings.final_dir) / EMERGENCY_FOLDER)
        raise
    if steps.stopped:
        stop.honoured()
        raise StoppedError(
            f"stopped by {stop.name or 'a signal to another rank'} at step {trainer.state.global_step}: its state is "
            f"saved in {args.output_dir}/checkpoint-{trainer.state.global_step}; --resume goes on from there"
        )
    return result


def leave_emergency_checkpoint(error: Exception, save: Callable[[Path], None], folder: Path) -> None:
    """(all ranks) The weights as they are. Where memory ran out, what the failed step still held is let go first."""
    traceback.clear_frames(error.__traceback__)
    release_memory()
    try:
        save(folder)
    except Exception as second:  # said, and the first failure is raised again by the caller: it is what ends the run
        say_from_here(f"no emergency checkpoint: {type(second).__name__}: {second}")
    else:
        say(f"emergency checkpoint: {here(folder)} has the weights as they were; --base_model takes it")


# -----------------------------------------------------------------------------
# Evaluation


class Evaluator:
    """Judges the weights as they are now: `evaluate("after")` writes, renders, scores, keeps and says."""

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: dict[str, BaseTensor],
        base: Path,
        settings: PageSettings,
        args: TrainingArguments,
        processor: ProcessorMixin,
        held_out: Dataset,
        resumed_at: int | None,
    ):
        self.model, self.tensors, self.base, self.settings, self.args = model, tensors, base, settings, args
        self.processor, self.pages = processor, held_out
        names = {item.name for item in fields(use.Recipe)} & {item.name for item in fields(PageSettings)}
        self.decoding = use.Recipe(**{name: getattr(settings, name) for name in names})
        # The best of many evaluations is too good by chance: pages that choose the weights do not compare them, too.
        self.parts = parts_of(len(held_out), weights_are_chosen=settings.eval_every > 0)
        self.folder = Path(args.output_dir) / "evaluation"
        self.rendering = Rendering(self.folder)
        self.results = Results(self.folder, self.decoding, held_out, self.rendering)
        self.best = BestWeights(Path(args.output_dir), settings.early_stopping_patience, resumed_at)
        if self.best.step is not None:  # an earlier run, which this one resumes, has found them
            self.results.add(self.best.label, self.best.result, self.best.rows)

    def copy(self) -> PreTrainedModel:
        """(all ranks) The weights as they are now, whole, as a user would load them."""
        return whole_copy(self.model, self.tensors, self.base, self.settings, self.args.device)

    def rehearse(self, collate: PageCollator) -> float:
        """(all ranks) Two held-out pages through collate, loss and generation: what is broken shows now, not in an
        hour. Returns the loss; raises `NotFiniteError` for one that is no number."""
        pages, copy = self.pages.select(range(min(2, len(self.pages)))), self.copy()
        screenshots = [use.open_screenshot(page["screenshot"]) for page in pages]
        check_same_question(collate.encoder, self.processor, screenshots, self.decoding.prompt)
        with zero3.plain_linear():
            loss = plain_loss(copy, (collate([page]) for page in pages))
        if not loss.isfinite():
            raise NotFiniteError(
                f"the loss of {len(pages)} held-out pages is {loss.item()} before training: the base is damaged"
            )
        # 32 tokens show that writing works; whole pages would take minutes before step one.
        short = replace(self.decoding, max_html_tokens=min(32, self.decoding.max_html_tokens))
        tokens = sum(row["tokens"] for row in write_held_out(copy, self.processor, pages, short, batch=2))
        say(f"rehearsal: loss {loss.item():.4f} on {len(pages)} held-out pages, {tokens} tokens written")
        del copy
        # The copy was the first thing on the GPU; the peaks to come are training's own, and held against the plan.
        release_memory()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return loss.item()

    @heart.stage("judging")
    def evaluate(self, label: str) -> dict:
        """(all ranks) Write every held-out page with the weights as they are now; main process: render and score."""
        copy = self.copy()
        rows = self.write(copy, self.decoding, label)
        if not self.settings.compare_base:  # nobody writes with it again: it goes while the last pages are rendered
            copy = None
            release_memory()
        result = on_main_alone(lambda: self.judge(label, rows))
        self.results.add(label, result, rows)
        if self.settings.compare_base and (label in ("before", "after") or self.best.leads(result)):
            # One knob of decoding was worth +0.145 elsewhere, more than any fine-tune there: compare both under each.
            result["decoding"] = {str(self.decoding.repetition_penalty): result.get(metrics.CHOOSING, result["exact"])}
            for penalty in penalties(self.settings):
                if str(penalty) not in result["decoding"]:
                    result["decoding"][str(penalty)] = self.try_penalty(penalty, copy, label)
        if copy is not None:
            del copy
            release_memory()
        return result

    def write(self, copy: PreTrainedModel, recipe: use.Recipe, label: str) -> list[dict]:
        """(all ranks) Every held-out page, which is scored beside the writing; the rows of evaluation.py."""
        with self.rendering.beside(f"{label} {recipe.repetition_penalty}", self.pages) as done:
            return write_held_out(copy, self.processor, self.pages, recipe, self.args.per_device_eval_batch_size, *done)

    def judge(self, label: str, rows: list[dict]) -> dict:
        """(main process only) Score, say, and keep what was written."""
        result = self.score(label, rows, self.decoding)
        say(announce(label, result))
        # "after" may not be the final one: an earlier step may have been better. `Results.write` keeps what is final.
        if label != "after":
            keep_outputs(rows, self.pages, self.folder, "written_" + label.replace(" ", "_"))
        return result

    def score(self, label: str, rows: list[dict], decoding: use.Recipe) -> dict:
        """(main process only) The result of evaluation.score_held_out, rendered where there is a browser."""
        return render_and_score(self.rendering, f"{label} {decoding.repetition_penalty}", rows, self.pages, self.parts)

    def try_penalty(self, penalty: float, copy: PreTrainedModel, label: str) -> float:
        """(all ranks) What chooses, under another repetition penalty; the exact share where nothing is rendered."""
        say(f"{label}, once more with a repetition penalty of {penalty} (--penalty_grid):")
        rows = self.write(copy, decoding := replace(self.decoding, repetition_penalty=penalty), label)
        result = on_main_alone(lambda: self.score(label, rows, decoding))
        return result.get(metrics.CHOOSING, result["exact"])

    def step(self, number: int, save: Callable[[Path], None]) -> bool:
        """(all ranks) Judge during training and keep the best weights by score. True when patience has run out."""
        label = f"step {number}"
        result = self.evaluate(label)
        return self.best.consider(number, result, self.results.rows[label], save)

    def choose(self, final: Path) -> None:
        """(main process only) The better of the last weights and the best kept ones becomes the final folder."""
        last = self.results.by_label["after"]
        if self.best.beats(last):
            end = last["choosing"][metrics.CHOOSING]
            say(f"{self.best.label} scored {self.best.score:.3f}, the end {end:.3f}: the better is final")
            self.best.become_final(final)
            self.results.choose(self.best.label)
        self.best.forget()


# -----------------------------------------------------------------------------
# Hub


def publish(final: Path, settings: PageSettings, training: dict, facts: dict, recipe: dict, results: Results) -> None:
    """(main process only) Model card, upload, and a last word. Raises `UploadError`, with the command that sends it."""
    describe(final, settings, training, facts, recipe, results.by_label)
    (final / "evaluation").mkdir(exist_ok=True)
    shutil.copyfile(Path(training["output_dir"]) / "evaluation" / "results.json", final / "evaluation" / "results.json")
    results.say_difference()
    report = Path(training["output_dir"]) / "evaluation" / "report.html"
    written = report if report.is_file() else report.parent
    say(f"the pages as written: {written}; the loss: {training['output_dir']}/loss.png")
    if settings.push_to_hub:
        say(f"uploaded: {push_final_folder(final, settings.hub_repo, settings.private_repo)}")
    say(f"done: python use_model_from_hub.py --image PAGE.png --model {here(final)} --output page.html")


# -----------------------------------------------------------------------------
# Main


def make_arguments(resolved: Resolved) -> TrainingArguments:
    """(all ranks) The process group begins here, and ZeRO-3 is known before any model loads.

    Raises `SettingsError` for what transformers refuses, `PipelineError` where the Trainer counts other processes than
    the launcher has started: each would then train on all pages.
    """
    if resolved.deepspeed is not None and "RANK" not in os.environ:
        zero3.begin_alone()
    training = {**resolved.training, "deepspeed": resolved.deepspeed}
    if resolved.deepspeed is not None and not torch.cuda.is_available():
        training |= zero3.begin_on_cpu(training["ddp_timeout"])
    try:
        args = TrainingArguments(**training)
    except ValueError as error:
        raise SettingsError(f"these settings cannot work: {error}") from error
    # One process and several GPUs: the Trainer would split batches by row (DataParallel), and pictures are not rows.
    if args.n_gpu > 1:
        say(f"{args.n_gpu} GPUs are here and one is used; run_deepspeed_training.py --num_gpus {args.n_gpu} uses all")
        args._n_gpu = 1
    for note in resolved.notes:
        say(note)
    if args.world_size != world_size():
        raise PipelineError(f"the launcher started {world_size()} processes, the Trainer counts {args.world_size}")
    return args


def run(argv: list[str]) -> None:
    """(all ranks) One page's way from the dataset to the Hub."""
    resolved = resolve(argv)
    check_settings(resolved)
    settings = resolved.settings
    if settings.check_settings:
        return None
    if settings.plan:
        base = fetch_base(settings)
        parameters = sum(math.prod(tensor.shape) for tensor in base_tensors(base, settings).values())
        return print_plan(resolved, load_config(base, settings), parameters)
    args = make_arguments(resolved)
    if settings.show_supervision:
        return show_supervision(settings, args.seed)
    resuming.take_folders(resolved)
    if is_main():
        ask_before_cpu(resolved)  # here, since the config alone tells the size: the weights are not fetched yet
    heart.knows(args.output_dir, args.ddp_timeout, settings.hang_timeout)
    stop.looks_into(args.output_dir)
    checkpoint = resuming.find_checkpoint(resolved, args)
    # Before anything is read or loaded: a token that may not write is found out now, not after hours.
    if settings.push_to_hub:
        settings.hub_repo = on_main(lambda: check_hub_access(settings.hub_repo, settings.private_repo))
    # Once on each machine: ranks that download side by side would write the same files into the same cache.
    base = on_each_machine(lambda: fetch_base(settings), Path.is_dir)
    processor = load_processor(base, settings)
    encoder = PageEncoder(processor, settings.prompt, family_of(load_config(base, settings)))
    tensors = base_tensors(base, settings)  # refused before pages are read
    with heart.stage("reading pages"):
        pages = prepare_pages(settings, args, encoder, processor, (resolved.earlier or {}).get("pages"))
    fine_tune(resolved, args, base, tensors, processor, encoder, pages, checkpoint)


def show_supervision(settings: PageSettings, seed: int) -> None:
    """(all ranks) One example as the loss sees it. Takes no folder of a run, and makes none."""
    base = on_each_machine(lambda: fetch_base(settings), Path.is_dir)
    processor = load_processor(base, settings)
    encoder = PageEncoder(processor, settings.prompt, family_of(load_config(base, settings)))
    ids, labels = on_main(lambda: one_page(settings, seed, encoder, processor))
    say(colour_supervision(ids, labels, processor.tokenizer, encoder.image_token_id, sys.stdout.isatty()))


def fine_tune(
    resolved: Resolved,
    args: TrainingArguments,
    base: Path,
    tensors: dict[str, BaseTensor],
    processor: ProcessorMixin,
    encoder: PageEncoder,
    pages: Pages,
    checkpoint: Path | None,
) -> None:
    """(all ranks) From checked pages to a trained, saved, judged and published model."""
    settings, training = resolved.settings, pages.training
    # Before anything is written: old checkpoints and pages would be resumed from, deleted or scored as this run's own.
    resuming.keep_what_is_not_ours(resolved)
    checkpoints = resuming.begin_record(resolved, fingerprint(base, tensors), pages.known)
    check_space(settings, args, load_config(base, settings), tensors, len(training))
    memory_plan = choose_micro_batch(args, settings, load_config(base, settings), training, encoder)
    check_steps(len(training), args, checkpoints.record["began_on"])
    say_batch(args)
    start = time.monotonic()
    model = load_model(base, settings, args)
    millions = sum(math.prod(tensor.shape) for tensor in tensors.values()) / 1e6
    say_memory(f"{settings.base_model}: {millions:,.1f} M parameters", start)
    recipe = make_recipe(settings, facts := on_main(lambda: gather_facts(settings, args, base)))
    chunk = CHUNK_DEEPSPEED if args.deepspeed else CHUNK_FALLBACK
    notes = Path(args.output_dir) / "replaced_pages.jsonl"
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    packed = trains_fast(model.config, settings)
    # Two pages through everything that comes after training, before it: an hour later is too late to learn of a fault.
    resumed_at = resuming.steps_before(checkpoint) if resolved.earlier else None
    evaluator = Evaluator(model, tensors, base, settings, args, processor, pages.held_out, resumed_at)
    plain_loss = evaluator.rehearse(PageCollator(processor, encoder, training, chunk, notes))
    # The fast path has to give the plain path's loss on the same two pages, or training stops before step one.
    # Quantised weights give another loss, and so do those that a checkpoint will bring.
    same = packed and settings.quantize == "none" and checkpoint is None
    fit = Fit(memory_plan, plain_loss if same else None, settings)
    collate = PageCollator(processor, encoder, training, chunk, notes, model.config, packed, half)
    if settings.compare_base:
        evaluator.evaluate("before")

    @heart.stage("saving")
    def save(folder: Path) -> None:
        earlier = folder.name in (use.FINAL_FOLDER, EMERGENCY_FOLDER)
        save_final(model, tensors, base, processor, recipe, folder, keep_earlier=earlier)

    steps = Steps(evaluator, fit, save)
    trainer, start = make_trainer(args, model, collate, training, tensors, steps, checkpoints), time.monotonic()
    result = train(trainer, steps, checkpoint)
    seconds = time.monotonic() - start
    if memory_plan:
        compare_with_plan(trainer, fit.batches)
    facts |= {"train_loss": result.training_loss, "steps": trainer.state.global_step, "seconds": seconds}
    facts |= {"pages_trained": len(training), "pages_held_out": len(pages.held_out), "drops": pages.report}
    final = keep_model(save, evaluator, resolved, facts, recipe, checkpoints.newest)
    evaluator.results.losses = on_main(lambda: draw_loss(trainer.state.log_history, Path(args.output_dir) / "loss.png"))
    evaluator.evaluate("after")
    heart.enter("publishing")
    on_main(lambda: finish(final, evaluator, resolved, facts, recipe))
    if is_main():  # the others end: an upload may take longer than they may wait for it (--ddp_timeout)
        publish(final, settings, resolved.training, facts, recipe, evaluator.results)


def keep_model(
    save: Callable[[Path], None],
    evaluator: Evaluator,
    resolved: Resolved,
    facts: dict,
    recipe: dict,
    state: Path | None,
) -> Path:
    """(all ranks) The final folder, with a card before it is judged: whatever happens there, a whole model is on disk,
    and a run that is stopped from here on ends at once. `state` is the newest checkpoint."""
    final = Path(resolved.settings.final_dir) / use.FINAL_FOLDER
    save(final)
    say(f"saved: {here(final)} has the base's {len(evaluator.tensors)} tensors, same keys, shapes and dtypes")
    on_main(lambda: describe(final, resolved.settings, resolved.training, facts, recipe, evaluator.results.by_label))
    stop.at_once(StoppedError.code, saved_words(final, state, resolved.settings))
    return final


def finish(final: Path, evaluator: Evaluator, resolved: Resolved, facts: dict, recipe: dict) -> None:
    """(main process only) The better weights become final, results and report are written."""
    results = evaluator.results
    with stop.held_off():
        evaluator.choose(final)
        results.run = describe(final, resolved.settings, resolved.training, facts, recipe, results.by_label)
    shown = {"model": final.name} | {name: facts[name] for name in ("base_model", "dataset", "hardware")}
    results.write(shown | {"steps": str(facts["steps"]), "date": time.strftime("%Y-%m-%d")})


def main(argv: list[str] | None = None) -> int:
    """The exit code, which is also left where the wrapper looks for it: the launcher in between loses it."""
    with stop, heart:  # a beat tells the wrapper that signals are known here
        try:
            run(sys.argv[1:] if argv is None else argv)
            code = 0
        except SystemExit as error:  # argparse: --help, or a flag that does not exist
            code = error.code if isinstance(error.code, int) else 1
        except Exception as error:
            code = say_failure(error)
    resuming.leave_folders(code)
    report_end(code)
    return code


def leave(code: int) -> None:
    """End this process at once. Everything is written; NCCL, the compiler and data workers may take long to tidy up,
    and after a failure wait for ranks that hang."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a log on a full disk
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
