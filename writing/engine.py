"""Screenshots in, HTML out, at the speed of the GPU's memory: slots that are filled again as soon as a page ends.

    engine = Engine(model, processor, recipe, wanted=len(requests))
    for request, written in engine.write(requests):
        ...

What is written equals what transformers' generate() writes, token for token in fp32 and within rounding in bf16, and
never depends on what is written beside it. Ends are looked at every `BLOCK` steps, since each look makes the GPU wait.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import use_model_from_hub as use
from families import family_of
from kernels.loading import threads_may_load
from scoring.machine import free_gpu_bytes
from writing.reading import Question, Reader, question_of
from writing.slots import Cache, State, bytes_of_slot
from writing.step import Chooser, Step, compile_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from writing.endings import Watch

BLOCK = 16  # steps between two looks at what was written
WIDTHS = (1, 2, 4, 8, 16, 32, 64)  # numbers of slots for which a step is captured
ROWS = 16  # of a step that costs what one row costs: those of one tile of a tensor core
SETTLED = 16  # blocks, a second: what is written for so long will go on, in fewer slots in the end
MOST_NEW = 8  # tokens of a page in one step, drafts included
READ_PATCHES = 45_000  # that are read together, some eight screenshots of a million pixels
SPARE_BYTES = 4 * 2**30  # for reading them
READERS = 4  # threads that open and resize screenshots
# Seconds, a tenth of Python's own: who starts a GPU's work lets go of the interpreter at each call, and a thread that
# opens screenshots or compiles would keep it for so long each time.
TURN = 0.0005


@dataclass
class Slot:
    """A question that is being answered, its answer's tokens so far, and what may end it: a `Watch` of
    writing/endings.py."""

    question: Question
    ids: list[int]
    watch: Watch | None = None


class Engine:
    """Writes with the weights of `model`, whose linear weights become views of larger ones (slot_layers.py)."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        recipe: use.Recipe,
        wanted: int | None = None,
        watch: Callable[[], Watch] | None = None,
        drafts: bool = True,
        meanwhile: Callable[[], None] = lambda: None,
    ):
        """`wanted` answers at most are asked for together; `watch` makes what may end an answer early; `drafts` are
        guessed where they cost nothing; `meanwhile` is called before each block of steps, and what it raises ends the
        writing. Raises torch.OutOfMemoryError where not even one slot fits."""
        self.meanwhile = meanwhile
        self.model, self.processor, self.recipe, self.watch, self.drafts = model, processor, recipe, watch, drafts
        self.stops = set(use.end_tokens(model, processor))
        self.captured = family_of(model.config).captured(model)
        self.reader = Reader(model, self.captured)
        self.compiles = model.device.type == "cuda" and threads_may_load()
        self.compiling: dict[int, Future[None]] = {}  # by the number of slots
        self.chooser = Chooser(use.logits_processors(recipe), drawn=recipe.temperature > 0)
        self.chances = recipe.max_html_tokens if self.chooser.drawn else 0  # numbers that are drawn, of each answer
        vision = model.config.vision_config
        picture = recipe.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
        # Padded as questions are: threads that change the tokenizer's padding while others use it break them.
        asked = processor.tokenizer([use.ask(processor, recipe.prompt)], padding=True, padding_side="left")
        question = len(asked["input_ids"][0])
        self.capacity = -(-(picture + question + recipe.max_html_tokens + BLOCK * MOST_NEW) // 64) * 64
        self.read_patches, self.writing = READ_PATCHES, False
        # No more than one of WIDTHS that holds all who want one, and no more than fit.
        enough = next((width for width in WIDTHS if width >= (wanted or WIDTHS[-1])), WIDTHS[-1])
        self.allocate(min(enough, self.slots_that_fit()))

    def slots_that_fit(self) -> int:
        """As many as the free memory holds: one of WIDTHS."""
        if self.model.device.type != "cuda":
            return WIDTHS[-1]
        free = free_gpu_bytes(self.model.device)
        free += torch.cuda.memory_reserved(self.model.device) - torch.cuda.memory_allocated(self.model.device)
        vocabulary = self.model.config.get_text_config().vocab_size
        kept = (self.captured.layers, vocabulary, self.capacity, self.model.dtype, self.chances)
        fit = (free - SPARE_BYTES) // bytes_of_slot(*kept)
        return max(width for width in WIDTHS if width <= max(1, fit))

    def allocate(self, count: int) -> None:
        """Cache and state of `count` slots, one of WIDTHS, or of half as many for as long as they do not fit."""
        model = self.model
        while True:
            try:
                self.cache = Cache(self.captured.layers, count, self.capacity, model.dtype, model.device)
                self.state = State(count, self.capacity, model.device, self.chances)
                break
            except torch.OutOfMemoryError:
                self.cache = None
                if count == 1:
                    raise
            count //= 2
        self.count = count
        self.slots: list[Slot | None] = [None] * self.count
        self.steps: dict[int, Step] = {}
        # Where each slot's last token stood when it was looked at.
        self.seen = torch.zeros(self.count, dtype=torch.long, device=model.device)

    def write(
        self, requests: Iterable[use.Request], shown: Callable[[use.Request, str], None] | None = None
    ) -> Iterator[tuple[use.Request, use.Written | use.Failed]]:
        """Answers as they end, in any order. Screenshots are opened when their turn is near, in threads; what opening
        raises is raised here, but for a `UseError`, which is that request's answer. `shown` gets each answer's text in
        pieces as it is written. One at a time: raises RuntimeError where another is under way; one that is closed early
        leaves nothing behind."""
        if self.writing:
            raise RuntimeError("this engine is writing already: end or close that first, or make another one")
        # Those that were closed early would move on, out of their slots.
        self.state.stop(slice(None))
        with short_turns(), ThreadPoolExecutor(READERS) as pool, ThreadPoolExecutor(1) as compiler:
            make = functools.partial(question_of, self.processor, self.recipe, dtype=self.model.dtype)
            waiting, under_way, ended = Waiting(requests, pool, make), False, []
            self.compile(compiler, [self.count], at_once=True)  # while screenshots are read
            self.writing = True  # also where all slots are free, between an answer that has ended and the next question
            try:
                for block in itertools.count():
                    self.meanwhile()
                    if block == SETTLED:
                        self.compile(compiler, [width for width in reversed(WIDTHS) if width < self.count])
                    try:
                        wanted = waiting.any()
                        if not under_way:
                            self.fill(waiting)
                            ended = []  # those slots are filled, so the next block need not wait for them
                            yield from waiting.failures()
                            width = ran = self.width()
                            if not width:
                                return
                            self.step(width).run(BLOCK)
                        elif ended and not wanted:  # moved, and a step warmed up, behind the block that is under way
                            width = self.width() or width
                            self.step(width)
                        found = self.fetch(ran)
                        # Slots that an ending has left free are filled first; else the GPU goes on meanwhile.
                        under_way = not (ended and wanted) and self.goes_on(found, wanted)
                        if under_way:
                            self.step(width).run(BLOCK)
                            ran = width
                        ended = list(self.look(found, shown))
                    except Exception as error:
                        if not ran_out(error):
                            raise
                        under_way, ended = False, None
                    if ended is None:  # out of the except block, which keeps alive what the error's frames hold
                        self.shrink(waiting)
                    else:
                        yield from ended
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                compiler.shutdown(wait=False, cancel_futures=True)
                self.slots, self.writing = [None] * self.count, False

    # -- slots

    def fill(self, waiting: Waiting) -> None:
        """Read questions into the slots that are free, several together."""
        free = [number for number, slot in enumerate(self.slots) if slot is None]
        while free:
            questions = waiting.take(len(free), self.read_patches)
            if not questions:
                break
            taken, free = free[: len(questions)], free[len(questions) :]
            # Before a GPU writes behind the end of a slot, after which it does nothing any more.
            for question in questions:
                self.check_length(question)
            try:
                for place in zip(taken, questions, self.reader.read(questions, self.cache, taken)):
                    self.begin(*place)
            except Exception as error:
                if ran_out(error):
                    waiting.put_back([it for number, it in zip(taken, questions) if self.slots[number] is None])
                raise

    def check_length(self, question: Question) -> None:
        """Raises `UseError` where no whole answer fits in behind a question."""
        if len(question.ids) + self.recipe.max_html_tokens > self.capacity - BLOCK * MOST_NEW:
            raise use.UseError(
                f"the question of page {question.request.place} has {len(question.ids)} tokens, too many for "
                f"--max_pixels {self.recipe.max_pixels}: the processor makes larger pictures than it was told"
            )

    def begin(self, number: int, question: Question, shift: int) -> None:
        """Slot `number` goes on with what was read into it."""
        ids = question.ids + question.written
        self.state.fill(number, ids, len(question.ids), shift, question.chances)
        self.seen[number] = len(ids) - 1
        slot = Slot(question, list(question.written), watch=self.watch() if self.watch else None)
        if slot.watch and slot.ids:
            slot.watch.feed(slot.ids)
        self.slots[number] = slot

    def width(self) -> int:
        """The smallest of WIDTHS that holds all answers, which are moved together where that saves rows; 0 for none."""
        busy = [number for number, slot in enumerate(self.slots) if slot]
        if not busy:
            return 0
        width = next(width for width in WIDTHS if width >= len(busy))
        for number in [number for number in busy if number >= width]:
            self.move(number, self.slots.index(None))
        return width

    def move(self, source: int, target: int) -> None:
        """An answer from one slot to a free one."""
        self.cache.move(source, target)
        for part in (*self.state.parts(), self.seen):
            part[target] = part[source]
        self.state.stop(source)
        self.slots[target], self.slots[source] = self.slots[source], None

    def step(self, width: int) -> Step:
        """The step over the first `width` slots, captured when it is first needed."""
        if width not in self.steps:
            if width in self.compiling:
                with contextlib.suppress(Exception):  # what is raised there is raised again here
                    self.compiling[width].result()
            step = Step(self.model, self.captured, self.cache, self.state, width, self.new(width), self.chooser)
            if self.model.device.type == "cuda":
                step.capture(next((other.graph for other in self.steps.values()), None))
            self.steps[width] = step
        return self.steps[width]

    def new(self, width: int) -> int:
        """Tokens of a slot in one step over `width` slots, drafts included."""
        return max(1, min(MOST_NEW, ROWS // width)) if self.drafted() else 1

    def compile(self, compiler: Executor, widths: Iterable[int], at_once: bool = False) -> None:
        """Kernels of the steps over so many slots, one step after the other: each takes a second the first time, in
        which a GPU that waited for it would be idle. Those of a step `at_once` where somebody waits for them; in many
        threads they would keep the interpreter from who starts the GPU's work meanwhile."""
        for width in widths if self.compiles else ():
            if width not in self.compiling or self.compiling[width].cancelled():
                kinds = (self.captured, width, self.new(width), self.chooser, self.chances)
                self.compiling[width] = compiler.submit(compile_step, self.model, *kinds, at_once)

    def drafted(self) -> bool:
        """Whether there are drafts. Not where a layer keeps a state instead of keys and values: a wrong draft has gone
        into it, and one for each draft would have to be kept to go back to."""
        takes_back = all(layer.mixer.takes_back for layer in self.captured.layers)
        return self.drafts and self.chooser.plain and takes_back

    # -- what was written

    def fetch(self, width: int) -> list[list[int]]:
        """What the last block has written of each of the first `width` slots: how many tokens, and the tokens."""
        most = BLOCK * self.steps[width].new
        places = self.state.places[:width]
        index = self.seen[:width, None] + 1 + torch.arange(most, device=places.device)
        fresh = self.state.history[:width].gather(1, index.clamp(max=self.capacity - 1))
        # One copy for all: this is where Python waits for the GPU.
        found = torch.cat([(places - self.seen[:width])[:, None], fresh], dim=1).tolist()
        self.seen[:width] = places
        return found

    def goes_on(self, found: list[list[int]], wanted: bool) -> bool:
        """Whether the next block may begin before what was `found` is looked at: an answer goes on, none has left a
        slot that is `wanted`, and none is at its limit, behind which there is room for one block. What watches endings
        may still find one."""
        most = self.recipe.max_html_tokens
        busy = [(slot, tokens[:count]) for slot, (count, *tokens) in zip(self.slots, found) if slot]
        ends = [not self.stops.isdisjoint(tokens) for _, tokens in busy]
        full = any(len(slot.ids) + len(tokens) >= most for slot, tokens in busy)
        return not (full or all(ends) or (wanted and any(ends)))

    def look(
        self, found: list[list[int]], shown: Callable[[use.Request, str], None] | None
    ) -> Iterator[tuple[use.Request, use.Written]]:
        """Take what was `found` of each slot, and end what has ended; a block that the GPU is at meanwhile is lost."""
        for number, (count, *tokens) in enumerate(found):
            slot = self.slots[number]
            if slot is None:
                continue
            ended = self.extend(slot, tokens[:count])
            if shown:
                self.show(slot, ended, shown)
            if ended:
                self.slots[number] = None
                self.state.stop(number)
                yield slot.question.request, ended

    def extend(self, slot: Slot, tokens: list[int]) -> use.Written | None:
        """What was written of an answer besides; the whole of it where it has ended."""
        tokens = tokens[: self.recipe.max_html_tokens - len(slot.ids)]
        stop = next((place for place, token in enumerate(tokens) if token in self.stops), None)
        body = tokens if stop is None else tokens[:stop]
        slot.ids += body
        ending = slot.watch.feed(body) if slot.watch else None
        if slot.watch and stop is not None:
            ending = slot.watch.ended()
        if ending is None and stop is None and len(slot.ids) < self.recipe.max_html_tokens:
            return None
        return use.written(self.processor, slot.ids + tokens[len(body) :][:1], self.stops, ending)

    def show(self, slot: Slot, ended: use.Written | None, shown: Callable[[use.Request, str], None]) -> None:
        """The text that was added since the last time; what ends within a character waits for the rest of it."""
        if ended:
            text = ended.raw
        else:
            text = self.processor.tokenizer.decode(
                slot.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            text = text.rstrip("\ufffd")
        question = slot.question
        if text.startswith(question.shown) and text != question.shown:
            shown(question.request, text[len(question.shown) :])
            question.shown = text

    # -- memory

    def shrink(self, waiting: Waiting) -> None:
        """Go on with half: of what is read together, then of the slots. What was written is kept and read again.

        Raises torch.OutOfMemoryError where one page alone does not fit."""
        alone = self.count == 1 and self.read_patches < READ_PATCHES // 64
        if alone:
            raise torch.OutOfMemoryError("not even one page can be written in the memory that is free")
        questions = []
        for slot in filter(None, self.slots):
            slot.question.written = slot.ids
            questions.append(slot.question)
        waiting.put_back(questions)
        self.read_patches //= 2
        most = max(1, self.count // 2)
        del self.cache, self.state, self.steps
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.allocate(most)
        use.say(f"writing: memory ran out, going on with {self.count} pages at once")


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Threads of Python take turns of `TURN` inside."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def ran_out(error: BaseException) -> bool:
    """Whether a GPU's memory ran out, also where CUDA, cuBLAS or Triton say so, or a capture that it broke off."""
    while error is not None:
        if isinstance(error, RuntimeError) and (use.is_out_of_memory(error) or "ALLOC_FAILED" in str(error)):
            return True
        error = error.__context__
    return False


class Waiting:
    """Questions in the order of their requests, made by threads a little ahead of their turn."""

    def __init__(
        self, requests: Iterable[use.Request], pool: ThreadPoolExecutor, make: Callable[[use.Request], Question]
    ):
        self.requests, self.pool, self.make = iter(requests), pool, make
        self.coming: deque[tuple[use.Request, Future[Question]]] = deque()
        self.back: deque[Question] = deque()
        self.failed: list[tuple[use.Request, use.Failed]] = []

    def look_ahead(self, count: int) -> None:
        for request in itertools.islice(self.requests, max(0, count - len(self.coming))):
            self.coming.append((request, self.pool.submit(self.make, request)))

    def take(self, most: int, patches: int) -> list[Question]:
        """The next questions, `most` at most and as many as have `patches` together, at least one; [] at the end."""
        taken: list[Question] = []
        self.look_ahead(most + READERS)
        while len(taken) < most and (self.back or self.coming):
            try:
                question = self.back[0] if self.back else self.coming[0][1].result()
            except use.UseError as error:
                self.failed.append((self.coming.popleft()[0], use.Failed(error)))
                self.look_ahead(most + READERS - len(taken))
                continue
            patches -= len(question.patches)
            if taken and patches < 0:
                break
            (self.back or self.coming).popleft()
            taken.append(question)
            self.look_ahead(most + READERS - len(taken))
        return taken

    def any(self) -> bool:
        """Whether there is one more."""
        self.look_ahead(1)
        return bool(self.back or self.coming)

    def failures(self) -> Iterator[tuple[use.Request, use.Failed]]:
        """The requests whose turn has come, but whose screenshots could not be opened."""
        while self.failed:
            yield self.failed.pop(0)

    def put_back(self, questions: list[Question]) -> None:
        self.back.extendleft(reversed(questions))
