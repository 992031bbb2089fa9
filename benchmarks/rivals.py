"""Other ways to train the same pages: what step_speed.py compares this project with. Nothing of ours is imported here.

    torchrun --nproc_per_node 1 benchmarks/rivals.py JOB.json     # step_speed.py writes the job and starts this

`plain` is what one writes with the HF Trainer and DeepSpeed in an afternoon. `trl` is TRL's SFTTrainer as its own
documentation and its examples/scripts/sft_vlm.py train a vision-language model: max_length=None, a dataset with
`image`, `prompt` and `completion`, its own collator, gradient checkpointing as TRL switches it on. Both take one page
per micro-batch. `llamafactory` is LLaMA-Factory's own training with `neat_packing`: rows of several pages, of which
none sees another. All take ZERO3, the learning rate of ours, and the pages in the order that the job lists.

One line a step on stdout: `STEP {"step": 1, "loss": …}`.

Sections: Job, Pages, Measuring, Plain, TRL, LLaMA-Factory, Main.
"""

import importlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# What every DeepSpeed tutorial has for ZeRO-3; "auto" lets the Trainer fill in its own values.
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "steps_per_print": 1_000_000,
}

# -----------------------------------------------------------------------------
# Job


@dataclass
class Job:
    way: str  # plain, trl or llamafactory
    checkpointing: bool
    liger: bool  # Liger's kernels, where the way has a switch for them
    base_model: str
    arrow: str  # pages with `screenshot` and `html`, as ours has read and cleaned them
    order: list[int]  # rows of `arrow`, step by step
    tokens: list[int]  # of each page of `order`: question, picture and HTML
    pages_per_step: int  # over all processes
    rows_per_step: int  # over all processes, where pages are packed
    prompt: str
    min_pixels: int
    max_pixels: int
    training: dict  # TrainingArguments that ours has, too: learning rate, schedule, …
    output_dir: str


def trainer_arguments(job: Job) -> dict:
    """(all ranks) TrainingArguments for both; the process group begins here on a machine without a GPU."""
    import torch

    gpu = torch.cuda.is_available()
    options = {
        **job.training,
        "output_dir": job.output_dir,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": job.pages_per_step // int(os.environ["WORLD_SIZE"]),
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "bf16": gpu,
        "gradient_checkpointing": job.checkpointing,
        "deepspeed": ZERO3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
    }
    if not gpu:  # accelerate 1.15 gives DeepSpeed no backend on a CPU
        from accelerate import PartialState

        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
        options["accelerator_config"] = {"use_configured_state": True}
    return options


def load_model(job: Job):
    """(all ranks) After the TrainingArguments, so that ZeRO-3 shards while loading; its own attention is SDPA."""
    import torch
    from transformers import AutoModelForImageTextToText

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(job.base_model, dtype=dtype, attn_implementation="sdpa")
    model.config.get_text_config().use_cache = False
    return model


def load_processor(job: Job):
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(job.base_model)
    processor.image_processor.size = {"shortest_edge": job.min_pixels, "longest_edge": job.max_pixels}
    return processor


# -----------------------------------------------------------------------------
# Pages


def load_pages(job: Job):
    import datasets

    return datasets.Dataset.from_file(job.arrow).select(job.order)


# -----------------------------------------------------------------------------
# Measuring


class Measured:
    """One line a step, for any Trainer; the figures are read when the Trainer itself waits for the loss anyway."""

    waited, start = 0.0, 0.0
    weighted = tokens = 0.0  # loss x supervised tokens, where the trainer takes the mean of each page

    def get_batch_samples(self, *arguments):
        start = time.monotonic()
        self.start = self.start or start
        batches = super().get_batch_samples(*arguments)
        self.waited += time.monotonic() - start
        return batches

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        supervised = inputs["labels"][..., 1:].ne(-100).sum()
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            self.weighted = self.weighted + (result[0] if return_outputs else result).detach() * supervised
        self.tokens = self.tokens + supervised
        return result

    def log(self, logs, start_time=None):
        if "loss" in logs:
            import torch
            import torch.distributed as dist

            seconds = time.monotonic() - self.start
            sums = torch.tensor([float(self.weighted), float(self.tokens)], device=self.args.device)
            worst = torch.tensor([peak_gib(), self.waited / seconds], device=self.args.device)
            dist.all_reduce(sums)
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
            weighted, tokens = sums.tolist()
            peak, waited = worst.tolist()
            line = {
                "step": self.state.global_step,
                "loss": weighted / tokens if weighted else logs["loss"],  # over tokens, as ours
                "logged_loss": logs["loss"],
                "supervised_tokens": tokens,
                "seconds": seconds,
                "data_wait_share": waited,
                "peak_gib": peak,
            }
            if dist.get_rank() == 0:
                print("STEP " + json.dumps(line), flush=True)
            self.start, self.waited, self.weighted, self.tokens = time.monotonic(), 0.0, 0.0, 0.0
        super().log(logs, start_time)


def measured(trainer_class: type) -> type:
    """`trainer_class` with `Measured` before it; made here, because each rival's own class is imported when it runs."""
    return type("Measured" + trainer_class.__name__, (Measured, trainer_class), {})


def peak_gib() -> float:
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


# -----------------------------------------------------------------------------
# Plain


def train_plain(job: Job) -> None:
    from PIL import Image
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(**trainer_arguments(job), remove_unused_columns=False)
    processor, model = load_processor(job), load_model(job)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": job.prompt}]}]
    # Where the template knows thoughts, none are wanted; the others take no notice.
    words = {"add_generation_prompt": True, "enable_thinking": False, "thinking": False}
    question = processor.apply_chat_template(question, tokenize=False, **words)
    processor.tokenizer.padding_side = "right"

    def collate(pages: list[dict]) -> dict:
        """The processor's batch, and labels on the answer only: the HTML and the token that ends the turn."""
        answers = [page["html"] + "<|im_end|>" for page in pages]
        pictures = [Image.open(io.BytesIO(page["screenshot"])).convert("RGB") for page in pages]
        texts = [question + answer for answer in answers]
        batch = processor(text=texts, images=pictures, padding=True, return_tensors="pt", return_mm_token_type_ids=True)
        labels = batch["input_ids"].clone()
        for row, (mask, answer) in enumerate(zip(batch["attention_mask"], answers)):
            end = int(mask.sum())
            labels[row, end:] = -100
            labels[row, : end - len(processor.tokenizer(answer)["input_ids"])] = -100
        return {**batch, "labels": labels}

    trainer = measured(Trainer)(model=model, args=args, data_collator=collate, train_dataset=load_pages(job))
    # Qwen2.5-VL declares False, and the loss would be a mean of page means; its forward does take num_items_in_batch.
    trainer.model_accepts_loss_kwargs = True
    trainer.train()


# -----------------------------------------------------------------------------
# TRL


def train_trl(job: Job) -> None:
    from datasets import Dataset, Features, Image, Value

    trl = importlib.import_module("trl")  # by name: no requirement of this project
    args = trl.SFTConfig(**trainer_arguments(job), max_length=None)
    processor, model = load_processor(job), load_model(job)
    turn = [{"role": Value("string"), "content": Value("string")}]
    rows = [
        {
            "image": {"bytes": page["screenshot"], "path": None},
            "prompt": [{"role": "user", "content": job.prompt}],
            "completion": [{"role": "assistant", "content": page["html"]}],
        }
        for page in load_pages(job)
    ]
    pages = Dataset.from_list(rows, features=Features({"image": Image(), "prompt": turn, "completion": turn}))
    trainer = measured(trl.SFTTrainer)(model=model, args=args, train_dataset=pages, processing_class=processor)
    trainer.train()


# -----------------------------------------------------------------------------
# LLaMA-Factory

# What stands for a picture in its conversations. Its own words, <image>, <video> and <audio>, are tags of HTML.
PLACEHOLDERS = {f"{kind}_PLACEHOLDER": f"<|a {kind} is here|>" for kind in ("IMAGE", "VIDEO", "AUDIO")}
END = 2  # tokens after the HTML: the end of the turn, and the newline that its template puts there
WORKERS = 4
NO_LIMIT_PIXELS = 10**9  # pictures are scaled once, by the model's own processor, as in the other ways


def train_llamafactory(job: Job) -> None:
    os.environ.update(PLACEHOLDERS)  # read when it is imported
    os.environ["HF_DATASETS_CACHE"] = f"{job.output_dir}/cache"
    workflow = importlib.import_module("llamafactory.train.sft.workflow")  # by name: no requirement of this project
    packing = importlib.import_module("llamafactory.data.processor.processor_utils")
    tuner = importlib.import_module("llamafactory.train.tuner")
    row_tokens, packed_pages = row_size(job, packing.greedy_knapsack)
    load_tokenizer, get_dataset = workflow.load_tokenizer, workflow.get_dataset

    def load_tokenizer_and_processor(*arguments, **options) -> dict:
        loaded = load_tokenizer(*arguments, **options)
        loaded["processor"].image_processor.size = {"shortest_edge": job.min_pixels, "longest_edge": job.max_pixels}
        return loaded

    def get_checked_dataset(*arguments, **options) -> dict:
        found = get_dataset(*arguments, **options)
        check_rows(job, found["train_dataset"], data_workers(row_tokens))
        return found

    workflow.load_tokenizer, workflow.get_dataset = load_tokenizer_and_processor, get_checked_dataset
    workflow.CustomSeq2SeqTrainer = measured(workflow.CustomSeq2SeqTrainer)
    tuner.run_exp(llamafactory_arguments(job, row_tokens, packed_pages))


def llamafactory_arguments(job: Job, row_tokens: int, packed_pages: int) -> dict:
    """(all ranks) What stands in its YAML. No row has pages of two steps, so that each has the pages that ours has."""
    from transformers.utils import is_flash_attn_2_available

    options = trainer_arguments(job)
    for name in ("train_sampling_strategy", "gradient_checkpointing"):  # it has words of its own for both
        del options[name]
    return options | {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job.base_model,
        "finetuning_type": "full",
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "flash_attn": "fa2" if is_flash_attn_2_available() else "sdpa",
        "disable_gradient_checkpointing": not job.checkpointing,
        "enable_liger_kernel": job.liger,
        "dataset": "pages",
        "dataset_dir": write_conversations(job),
        "template": "qwen2_vl",
        "default_system": system_turn(job),
        "image_max_pixels": NO_LIMIT_PIXELS,
        "image_min_pixels": 1,
        "packing": True,
        "neat_packing": True,
        "cutoff_len": row_tokens,
        "preprocessing_batch_size": packed_pages,
        "disable_shuffling": True,
        "gradient_accumulation_steps": job.rows_per_step // int(os.environ["WORLD_SIZE"]),
        "dataloader_num_workers": data_workers(row_tokens),
    }


def data_workers(row_tokens: int) -> int:
    """As in all of its examples; 0 where the masks that they make, a number for each pair of a row's tokens, would fill
    the memory that processes share."""
    ahead_bytes = WORKERS * 2 * row_tokens**2 * 2  # two rows for each worker, in bf16
    return WORKERS if shutil.disk_usage("/dev/shm").free > 2 * ahead_bytes else 0


def write_conversations(job: Job) -> str:
    """The folder with the pages in its own format; one for each rank, since none waits for another here."""
    folder = Path(job.output_dir) / f"conversations-{os.environ['RANK']}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for place, page in enumerate(load_pages(job)):
        picture = folder / f"{place}.picture"
        picture.write_bytes(page["screenshot"])
        question = {"role": "user", "content": PLACEHOLDERS["IMAGE_PLACEHOLDER"] + job.prompt}
        turns = [question, {"role": "assistant", "content": page["html"]}]
        rows.append({"messages": turns, "images": [str(picture)]})
    (folder / "pages.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "messages", "images": "images"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    kind = {"file_name": "pages.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"pages": kind}), encoding="utf-8")
    return str(folder)


def system_turn(job: Job) -> str:
    """What the base's own template says before the question; "" where it says nothing."""
    turns = [{"role": "user", "content": job.prompt}]
    text = load_processor(job).tokenizer.apply_chat_template(turns, tokenize=False)
    before, found, after = text.partition("<|im_start|>system\n")
    return after.split("<|im_end|>")[0] if found and not before else ""


def steps_of(job: Job) -> list[list[int]]:
    """Tokens of each page, step by step, as LLaMA-Factory counts them."""
    tokens = [count + END for count in job.tokens]
    return [tokens[start : start + job.pages_per_step] for start in range(0, len(tokens), job.pages_per_step)]


def row_size(job: Job, pack: Callable[[list[int], int], list[list[int]]]) -> tuple[int, int]:
    """(tokens of a row, pages that are packed together): the fewest tokens with which `pack` makes as many rows of each
    step's pages as the job wants; where there are none, each row gets its share of the pages, as they come. A row has
    one token of padding at least, and a multiple of 8: its collator fills others up and then finds them too long."""
    steps = steps_of(job)
    most = max(map(sum, steps))
    for tokens in range(eights(max(*map(max, steps), most // job.rows_per_step) + 1), eights(most + 1) + 1, 8):
        if all(len(pack(list(step), tokens - 1)) == job.rows_per_step for step in steps):
            return tokens, job.pages_per_step
    count = job.pages_per_step // job.rows_per_step
    if job.pages_per_step % job.rows_per_step:
        raise SystemExit(f"{job.pages_per_step} pages cannot be packed into {job.rows_per_step} rows in every step")
    return eights(max(sum(step[at : at + count]) for step in steps for at in range(0, len(step), count)) + 1), count


def eights(count: int) -> int:
    return -(-count // 8) * 8


def check_rows(job: Job, rows, workers: int) -> None:
    """Ends the run where its packed rows do not hold exactly the pages of each step."""
    masks = rows["attention_mask"]  # 1 for tokens of a row's first page, 2 for its second, …; 0 for padding
    places = range(0, len(masks), job.rows_per_step)
    found = [
        sorted(mask.count(page) for mask in masks[place : place + job.rows_per_step] for page in {*mask} - {0})
        for place in places
    ]
    wanted = [sorted(step) for step in steps_of(job)]
    if found != wanted:
        raise SystemExit(f"packed rows hold pages of {found} tokens, step by step; expected are {wanted}")
    if os.environ["RANK"] == "0":
        real = sum(map(sum, wanted)) / len(masks) / len(masks[0])
        print(
            f"rows: {len(masks)} of {len(masks[0])} tokens, {real:.1%} of them pages'; {workers} data workers",
            flush=True,
        )


# -----------------------------------------------------------------------------
# Main


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    {"plain": train_plain, "trl": train_trl, "llamafactory": train_llamafactory}[job.way](job)


if __name__ == "__main__":
    main()
