"""The engine writes what transformers' generate() writes, token for token in fp32, whatever is written beside it.

On a CPU it takes torch's products instead of its kernels (tests/kernels holds those against the same), and no graph.
"""

import contextlib
import functools
import itertools
import random
import threading
import weakref
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import ROOT, make_pages, make_qwen3_5_base, make_qwen3_vl_base
from PIL import Image

import use_model_from_hub as use
from training import evaluation
from training.errors import StoppedError
from training.evaluation import tell_once, write_held_out
from writing import engine as room
from writing import writer as writers
from writing.endings import Endings, Watch
from writing.engine import Engine

RECIPE = use.Recipe(prompt="write", max_html_tokens=24, max_pixels=140 * 140)
OTHERS = {"qwen3_vl": make_qwen3_vl_base, "qwen3_5": make_qwen3_5_base}
WAYS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.3},
    "drawn": {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.1},
}


def load(base):
    """Random weights so large that each picture has an answer of its own; as they are made, all say the same."""
    model, processor = use.load_model(str(base), RECIPE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model, processor


@pytest.fixture(scope="module")
def loaded(tiny_base):
    return load(tiny_base)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A function that gives a model and processor of another family, by its model_type."""
    return functools.cache(lambda name: load(OTHERS[name](tmp_path_factory.mktemp(name))))


@pytest.fixture(scope="module")
def shots():
    rng = random.Random(5)
    sizes = [(rng.randint(30, 260), rng.randint(30, 260)) for _ in range(14)]
    return [Image.effect_noise(size, 90).convert("RGB") for size in sizes]


def requests_of(shots, places, samples=None):
    """Requests whose `place` is the index in `shots`."""
    samples = samples or [0] * len(places)
    return [use.Request(place, partial(shots.__getitem__, place), sample) for place, sample in zip(places, samples)]


def tokens_of(engine, requests):
    """The ids of each answer, the end token included, by (place, sample)."""
    found, extend = {}, engine.extend

    def kept(slot, tokens):
        done = extend(slot, tokens)
        if done:
            found[slot.question.request.place, slot.question.request.sample] = (slot.ids, done)
        return done

    engine.extend = kept
    list(engine.write(requests))
    return found


@pytest.fixture(scope="module")
def alone(loaded, shots):
    return written_alone(*loaded, shots)


def written_alone(model, processor, shots):
    """Of each way and page what generate() writes of it alone, 24 tokens, and their ids."""
    rows, written, ids = {}, use.written, {}

    def kept(processor, row, stops, *ending):
        page = written(processor, row, stops, *ending)
        ids[id(page)] = row[: page.tokens]
        return page

    use.written = kept
    for name, asked in WAYS.items():
        recipe = replace(RECIPE, **asked)
        for place, shot in enumerate(shots):
            for sample in (0, 1) if name == "drawn" else (0,):
                (page,) = use.write_pages(model, processor, [shot], recipe, samples=[sample])
                rows[name, place, sample] = page
    use.written = written
    assert len({page.raw for page in rows.values()}) > 0.9 * len(rows), "these answers would show nothing"
    return rows, {key: ids[id(page)] for key, page in rows.items()}


def try_batches(count, model, processor, shots, alone, monkeypatch):
    """Any number of slots and order, limits of tokens, penalties, drawing, drafts or none, refills, ends in between,
    and once in a while memory that runs out or a step that warms up; returns in how many there were drafts."""
    pages, tokens = alone
    rng, drafted, run = random.Random(7), 0, room.Step.run
    for number in range(count):
        name = rng.choice([*WAYS, "greedy"])
        monkeypatch.setattr(room, "BLOCK", rng.choice([1, 3, 5]))
        recipe = replace(RECIPE, max_html_tokens=rng.randint(1, 24), **WAYS[name])
        places = rng.choices(range(len(shots)), k=rng.randint(1, 7))
        samples = [rng.randint(0, 1) if name == "drawn" else 0 for _ in places]
        drafts = rng.random() < 0.5
        engine = Engine(model, processor, recipe, wanted=rng.choice([1, 2, 4, 8]), drafts=drafts)
        engine.read_patches = rng.choice([1, 200, 10_000])
        known = [token for key in zip([name] * len(places), places, samples) for token in tokens[key]]
        engine.stops |= {*rng.sample(known, min(3, len(known)))} if rng.random() < 0.5 else set()
        drafted += engine.drafted()
        warms = rng.random() < 0.2
        tight = iter(range(rng.randint(1, 9))) if engine.count > 1 and rng.random() < 0.2 else itertools.count()

        def tight_run(self, steps, tight=tight, warms=warms):
            if next(tight, None) is None and self.slots > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            if warms:
                self.warm()
            run(self, steps)

        monkeypatch.setattr(room.Step, "run", tight_run)
        found = tokens_of(engine, requests_of(shots, places, samples))
        assert {*found} == {*zip(places, samples)}
        for (place, sample), (ids, page) in found.items():
            whole, wanted = pages[name, place, sample], tokens[name, place, sample][: recipe.max_html_tokens]
            cut = whole.cut_off or whole.tokens >= recipe.max_html_tokens
            if (end := next((at for at, token in enumerate(wanted) if token in engine.stops), None)) is not None:
                wanted, cut = wanted[:end], False
            assert ids == wanted and page.cut_off == cut, (number, name, place, sample)
    return drafted


@pytest.mark.slow
def test_two_hundred_random_batches_are_what_generate_writes_of_each_page_alone(loaded, shots, alone, monkeypatch):
    assert try_batches(200, *loaded, shots, alone, monkeypatch) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_random_batches_of_other_families_are_what_generate_writes(others, shots, monkeypatch, name):
    few = shots[:6]
    model, processor = others(name)
    assert writers.unknown_parts(model) == ""
    drafted = try_batches(30, model, processor, few, written_alone(model, processor, few), monkeypatch)
    # What has gone into a state of Qwen3.5 is not taken back.
    assert (drafted > 3) == (name != "qwen3_5")


@pytest.mark.parametrize("name", ["qwen2_5_vl", *OTHERS])
def test_all_that_a_slot_takes_is_counted(loaded, others, name):
    model, processor = loaded if name == "qwen2_5_vl" else others(name)
    engine = Engine(model, processor, replace(RECIPE, temperature=1.0), wanted=2)
    vocabulary, kept = model.config.get_text_config().vocab_size, [*engine.state.parts(), *sum(engine.cache.states, ())]
    # But for the four numbers of each slot, and with its logits.
    counted = room.bytes_of_slot(engine.captured.layers, vocabulary, engine.capacity, torch.float32, 24)
    assert 2 * (counted - 3 * 4 * vocabulary) == sum(part.nbytes for part in kept if part.dim() > 1)


@pytest.mark.parametrize("name", ["qwen2_5_vl", *OTHERS])
def test_what_is_read_again_is_what_was_kept_step_by_step(loaded, others, shots, name):
    """As after memory has run out; an answer may hold the token of a picture, too, which is none there."""
    model, processor = loaded if name == "qwen2_5_vl" else others(name)
    engine = Engine(model, processor, RECIPE, wanted=2, drafts=False)
    written = [7, model.config.image_token_id, 9, 11, 12, 8, 10]
    whole, begun = (room.question_of(processor, RECIPE, request) for request in requests_of(shots, [1, 1]))
    whole.written = written
    (shift,) = engine.reader.read([begun], engine.cache, [1])
    engine.state.fill(1, begun.ids, len(begun.ids), shift, None)
    for number, token in enumerate(written):
        engine.step(2).run(1)
        engine.state.history[1, len(begun.ids) + number] = token
    assert engine.state.places[1] == len(begun.ids + written) - 1
    assert engine.reader.read([whole], engine.cache, [0]) == [shift]
    for parts in engine.cache.states:
        for part in parts:
            assert part[0].any() and torch.allclose(part[0], part[1], rtol=1e-3, atol=1e-3 * part[0].abs().max())


def test_an_answer_ends_at_its_end_token_wherever_that_falls_in_a_block(loaded, shots, alone):
    model, processor = loaded
    engine = Engine(model, processor, RECIPE, wanted=4)
    whole = {place: ids for (place, _), (ids, _) in tokens_of(engine, requests_of(shots, range(6))).items()}
    ends = {ids[place] for place, ids in enumerate(whole.values())}
    engine = Engine(model, processor, RECIPE, wanted=2)
    engine.stops = ends
    for (place, _), (ids, page) in tokens_of(engine, requests_of(shots, range(6))).items():
        length = next(number for number, token in enumerate(whole[place]) if token in ends)
        assert ids == whole[place][:length] and page.tokens == length and not page.cut_off


def test_one_long_page_holds_nobody(loaded, shots, monkeypatch):
    """Of two slots one is filled four times while the other writes on."""
    model, processor = loaded
    monkeypatch.setattr(room, "BLOCK", 1)
    engine = Engine(model, processor, RECIPE, wanted=2, drafts=False)
    begun, begin = [], engine.begin

    def noted(number, question, shift):
        begun.append((number, question.request.place))
        begin(number, question, shift)
        if question.request.place:  # all but the first are nearly written already
            engine.slots[number].ids = [0] * 20

    engine.begin = noted
    order = [it.place for it, _ in engine.write(requests_of(shots, range(5)))]
    assert begun == [(0, 0), (1, 1), (1, 2), (1, 3), (1, 4)] and order == [1, 2, 3, 4, 0]


def test_the_next_block_begins_before_endings_are_looked_for_also_behind_a_slot_that_was_filled(
    loaded, shots, monkeypatch
):
    model, processor = loaded
    monkeypatch.setattr(room, "BLOCK", 9)
    engine = Engine(model, processor, RECIPE, wanted=1, drafts=False)
    order, run, fill, look = [], room.Step.run, engine.fill, engine.look
    monkeypatch.setattr(room.Step, "run", lambda self, steps: (order.append("run"), run(self, steps)))
    engine.fill = lambda waiting: (order.append("fill"), fill(waiting))
    engine.look = lambda *given: (order.append("look"), look(*given))[1]
    assert len(list(engine.write(requests_of(shots, [0, 1])))) == 2
    # 24 tokens in three blocks; the last one is known to end the answer before it is looked at.
    assert order == [*["fill", "run", "run", "look", "run", "look", "look"] * 2, "fill"]


def test_the_next_block_begins_before_an_answer_ends_whose_slot_nobody_waits_for(loaded, shots, alone, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(room, "BLOCK", 4)
    engine = Engine(model, processor, RECIPE, wanted=2, drafts=False)
    long, short = (alone[1]["greedy", place, 0] for place in (1, 0))
    engine.stops = {short[5]}
    assert short[5] not in [*short[:5], *long]
    order, run, look = [], room.Step.run, engine.look
    monkeypatch.setattr(room.Step, "run", lambda self, steps: (order.append(self.slots), run(self, steps)))
    engine.look = lambda *given: (order.append("look"), look(*given))[1]
    found = tokens_of(engine, requests_of(shots, [0, 1]))
    assert [found[place, 0][0] for place in (0, 1)] == [short[:5], long]
    # The answer that goes on is in the second slot, and is moved behind the block that runs.
    assert order == [2, 2, "look", 2, "look", 1, "look", 1, "look", 1, "look", "look"]


def test_memory_that_runs_out_loses_nothing_that_was_written(loaded, shots, alone, monkeypatch, capsys):
    """While reading, and in the middle of writing: half the slots go on, and what was written is read again."""
    model, processor = loaded
    monkeypatch.setattr(room, "BLOCK", 4)
    recipe = replace(RECIPE, **WAYS["penalty"])
    engine = Engine(model, processor, recipe, wanted=4)
    read, run, runs = engine.reader.read, room.Step.run, []

    def tight_read(questions, *rest):
        if len(questions) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(questions, *rest)

    def tight_run(self, steps):
        runs.append(self.slots)
        if len(runs) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(self, steps)

    monkeypatch.setattr(engine.reader, "read", tight_read)
    monkeypatch.setattr(room.Step, "run", tight_run)
    answers = {it.place: page.raw for it, page in engine.write(requests_of(shots, range(6)))}
    assert answers == {place: alone[0]["penalty", place, 0].raw for place in range(6)}
    assert engine.count == 1 and "memory ran out, going on with 2 pages at once" in capsys.readouterr().err


def test_memory_for_not_even_one_page_ends_the_writing(loaded, shots, monkeypatch):
    model, processor = loaded
    engine = Engine(model, processor, RECIPE, wanted=2)
    monkeypatch.setattr(engine.reader, "read", lambda *unused: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError, match="not even one page"):
        list(engine.write(requests_of(shots, range(2))))


def test_what_ran_out_of_memory_is_let_go_before_less_of_it_is_asked_for(loaded, shots, monkeypatch):
    """An error's frames hold the old cache, by the step that raised it; and what was shown is not shown again."""
    model, processor = loaded
    monkeypatch.setattr(room, "BLOCK", 4)
    engine = Engine(model, processor, RECIPE, wanted=2, drafts=False)
    old, runs, left, pieces = weakref.ref(engine.cache.states[0][0]), [], [], []
    run, allocate = room.Step.run, engine.allocate

    def tight_run(self, steps):
        runs.append(steps)
        if len(runs) == 3:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        run(self, steps)

    monkeypatch.setattr(room.Step, "run", tight_run)
    monkeypatch.setattr(engine, "allocate", lambda count: (left.append(old()), allocate(count)))
    ((_, page),) = engine.write(requests_of(shots, [3]), lambda request, text: pieces.append(text))
    assert left == [None] and "".join(pieces) == page.raw and len(pieces) > 2


def test_slots_that_do_not_fit_after_all_are_fewer(loaded, monkeypatch):
    model, processor = loaded
    made = []

    class Tight(room.State):
        def __init__(self, slots, *rest):
            made.append(slots)
            if slots > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(slots, *rest)

    monkeypatch.setattr(room, "State", Tight)
    assert Engine(model, processor, RECIPE, wanted=4).count == 1 and made == [4, 2, 1]


def test_a_question_that_is_not_begun_for_want_of_memory_is_not_lost(loaded, shots, monkeypatch):
    model, processor = loaded
    engine = Engine(model, processor, RECIPE, wanted=4)
    begin, begun = engine.begin, []

    def tight(*place):
        begun.append(place)
        if len(begun) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        begin(*place)

    monkeypatch.setattr(engine, "begin", tight)
    assert sorted(it.place for it, _ in engine.write(requests_of(shots, range(4)))) == [0, 1, 2, 3]


def test_a_question_that_is_too_long_is_refused_before_it_is_read(loaded, shots, monkeypatch):
    """A GPU that writes behind the end of a slot does nothing any more, not even say why."""
    model, processor = loaded
    engine = Engine(model, processor, RECIPE, wanted=2)
    monkeypatch.setattr(engine, "capacity", 160)
    monkeypatch.setattr(engine.reader, "read", lambda *unused: pytest.fail("was read"))
    with pytest.raises(use.UseError, match="too many for --max_pixels"):
        list(engine.write(requests_of(shots, [0])))


def test_writing_that_is_closed_early_leaves_nothing_to_the_next(loaded, shots, alone, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(room, "BLOCK", 4)
    engine = Engine(model, processor, RECIPE, wanted=2)
    opened = []

    def requests(places):
        for request in requests_of(shots, places):
            opened.append(request.place)
            yield request

    with contextlib.closing(engine.write(requests(range(14)))) as answers:
        next(answers)
        with pytest.raises(RuntimeError, match="is writing already"):
            next(engine.write(requests_of(shots, [0])))
    assert len(opened) < 14
    answers = {it.place: page.raw for it, page in engine.write(requests_of(shots, [12]))}
    assert answers == {12: alone[0]["greedy", 12, 0].raw}
    with contextlib.closing(engine.write(requests_of(shots, [0, 1]))) as answers:
        assert len([next(answers), next(answers)]) == 2 and not any(engine.slots)  # ended, yet not at its end
        with pytest.raises(RuntimeError, match="is writing already"):
            next(engine.write(requests_of(shots, [0])))


@pytest.mark.parametrize("name", WAYS)
def test_a_step_that_warms_up_changes_nothing(loaded, shots, alone, monkeypatch, name):
    """As each one does before it is captured; its token, left in the history, would be punished as one that came."""
    model, processor = loaded
    run = room.Step.run

    def warmed(self, steps):
        self.warm()
        run(self, steps)

    monkeypatch.setattr(room.Step, "run", warmed)
    monkeypatch.setattr(room, "BLOCK", 1)
    engine = Engine(model, processor, replace(RECIPE, **WAYS[name]), wanted=2)
    answers = {it.place: page.raw for it, page in engine.write(requests_of(shots, range(4)))}
    assert answers == {place: alone[0][name, place, 0].raw for place in range(4)}


@pytest.mark.parametrize("name", ["penalty", "drawn", "greedy"])
def test_kernels_of_fewer_slots_are_compiled_beside_the_writing(loaded, shots, alone, monkeypatch, name):
    """By a step over slots of its own, which changes nothing; one that fails there has not failed yet."""
    model, processor = loaded
    steps, compile_step = [], room.compile_step

    def compiled(model, captured, slots, *more):
        assert more[-1] == (slots == 4)  # at once what is waited for, one by one beside the writing
        steps.append((slots, threading.current_thread()))
        if name == "greedy":
            raise RuntimeError("no memory for that now")
        compile_step(model, captured, slots, *more)

    monkeypatch.setattr(room, "BLOCK", 1)
    monkeypatch.setattr(room, "SETTLED", 2)
    monkeypatch.setattr(room, "compile_step", compiled)
    engine = Engine(model, processor, replace(RECIPE, **WAYS[name]), wanted=3)
    engine.compiles = True
    answers = {it.place: page.raw for it, page in engine.write(requests_of(shots, range(5)))}
    assert answers == {place: alone[0][name, place, 0].raw for place in range(5)}
    assert [slots for slots, _ in steps] == [4, 2, 1] and threading.main_thread() not in {thread for _, thread in steps}
    assert all(bool(future.exception()) == (name == "greedy") for future in engine.compiling.values())


def test_the_parts_of_a_step_are_compiled_side_by_side_once_the_first_is():
    """Each waits for all others here: one after another none would go on. What one of them raises is not lost."""
    from writing.step import side_by_side

    together, ended, modes = threading.Barrier(3, timeout=20), [], []

    def part(number):
        modes.append(torch.is_inference_mode_enabled())
        if number:
            assert ended[0] == 0
            together.wait()
        ended.append(number)

    side_by_side([partial(part, number) for number in range(4)], torch.device("cpu"))
    assert ended[0] == 0 and sorted(ended) == [0, 1, 2, 3] and modes == [True] * 4

    def fails():
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        side_by_side([list, fails, list], torch.device("cpu"))


def test_threads_find_the_tokenizer_as_they_need_it(loaded, shots):
    """One that changes its padding while another one uses it would raise."""
    model, processor = loaded
    processor.tokenizer("x")
    Engine(model, processor, RECIPE, wanted=2)
    backend = processor.tokenizer.backend_tokenizer
    before = backend.padding
    room.question_of(processor, RECIPE, requests_of(shots, [0])[0])
    assert before and backend.padding == before


def test_linear_layers_are_torchs_own_where_deepspeed_has_put_another(loaded, shots, monkeypatch):
    """training.zero3.plain_linear gives it back while pages are written, whenever these modules were imported."""
    model, processor = loaded
    counted, own = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: counted.append(1) or own(*given))
    engine = Engine(model, processor, RECIPE, wanted=1)
    (question,) = [room.question_of(processor, RECIPE, it) for it in requests_of(shots, [0])]
    engine.reader.read([question], engine.cache, [0])
    assert len(counted) > 2 * len(engine.captured.layers)


def test_a_screenshot_that_cannot_be_opened_is_raised_where_answers_are_taken(loaded, shots):
    model, processor = loaded
    bad = use.Request(9, partial(use.open_screenshot, b"no picture"))
    with pytest.raises(use.PictureError):
        list(Engine(model, processor, RECIPE, wanted=2).write([*requests_of(shots, [0]), bad]))


@pytest.mark.parametrize("good", [[0, 2, 3], []])
def test_a_screenshot_whose_owner_says_why_it_cannot_be_opened_is_named_and_the_rest_goes_on(loaded, shots, good):
    def missing():
        raise use.UseError("no such file")

    model, processor = loaded
    bad = [use.Request(place, missing) for place in (7, 8, 9)]
    order = [*requests_of(shots, good[:1]), *bad, *requests_of(shots, good[1:])]
    found = {it.place: page for it, page in Engine(model, processor, RECIPE, wanted=2).write(order)}
    assert {*found} == {*good, 7, 8, 9}
    assert {str(found[place].error) for place in (7, 8, 9)} == {"no such file"}
    assert all(isinstance(found[place], use.Written) for place in good)


def test_what_is_shown_in_pieces_is_the_answer(loaded, shots, alone):
    model, processor = loaded
    pieces = []
    engine = Engine(model, processor, RECIPE, wanted=1, drafts=False)
    ((_, page),) = engine.write(requests_of(shots, [3]), lambda request, text: pieces.append(text))
    assert "".join(pieces) == page.raw == alone[0]["greedy", 3, 0].raw and len(pieces) > 1


def test_the_model_stays_as_it_was(loaded, shots, alone):
    """Its weights become views of the engine's, and its own forward gives what it gave."""
    model, processor = loaded
    Engine(model, processor, RECIPE, wanted=1)
    assert use.write_pages(model, processor, [shots[2]], RECIPE) == [alone[0]["greedy", 2, 0]]


def test_documents_are_closed_as_by_generate():
    """On the demo's trained model, whose pages are longer than these limits."""
    recipe = use.load_recipe(str(ROOT / "demo" / "tiny_holo1"))
    model, processor = use.load_model(str(ROOT / "demo" / "tiny_holo1"), recipe)
    pages = sorted((ROOT / "demo" / "pages").rglob("*.webp"))[:3]
    pictures = [use.open_screenshot(page.read_bytes()) for page in pages]
    closed = 0
    for limit in (40, 75):
        short = replace(recipe, max_html_tokens=limit)
        engine = Engine(model, processor, short, wanted=2, watch=partial(Watch, processor.tokenizer, limit))
        found = {it.place: page for it, page in engine.write(requests_of(pictures, range(3)))}
        wanted = use.write_pages(model, processor, pictures, short, endings=Endings)
        assert [found[place] for place in range(3)] == wanted
        closed += sum(page.closing_tokens > 0 for page in wanted)
    assert closed > 0


def test_what_the_engine_cannot_do_is_told_and_done_by_generate(loaded, monkeypatch):
    model, processor = loaded
    told = []
    assert isinstance(writers.writer(model, processor, RECIPE, 2, tell=told.append), use.Generating)
    assert told == ["pages are written by generate(), not by the engine: there is no GPU"]
    assert writers.unknown_parts(model) == ""
    sharded = next(model.parameters())
    sharded.ds_id = 0
    assert writers.unknown_parts(model) == "the weights are sharded"
    del sharded.ds_id
    projection = model.model.language_model.layers[1].self_attn
    kept, projection.q_proj = projection.q_proj, torch.nn.Bilinear(1, 1, 1)
    assert writers.unknown_parts(model) == "it does not know layers of torch.nn.modules.linear.Bilinear"
    # An adapter's, by peft's name, whose own weights the engine would pass over.
    projection.q_proj = type("Linear", (torch.nn.Linear,), {})(1, 1)
    assert writers.unknown_parts(model).endswith(".Linear")
    projection.q_proj = kept
    down = model.model.language_model.layers[0].mlp.down_proj
    down.bias = torch.nn.Parameter(torch.zeros(1))
    assert writers.unknown_parts(model) == "it does not know a bias of model.language_model.layers.0.mlp.down_proj"
    down.bias = None
    for family in ("smolvlm", "qwen3_vl"):
        monkeypatch.setattr(model.config, "model_type", family)
        assert writers.unknown_parts(model).startswith("it does not know the a")
    monkeypatch.undo()
    monkeypatch.setattr(model.config.get_text_config(), "hidden_act", "gelu")
    assert "it does not know the activations gelu and silu" in writers.unknown_parts(model)


def test_kernels_are_for_the_current_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    there, here = (SimpleNamespace(device=torch.device("cuda", number), dtype=torch.float32) for number in (1, 0))
    assert "cuda:1 is not the current GPU" in writers.obstacle(there)
    assert "weights are torch.float32" in writers.obstacle(here)


def test_without_memory_for_one_slot_generate_writes_and_the_engine_says_how_many_it_writes(loaded, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(writers, "obstacle", lambda model: "")
    told = []
    assert writers.writer(model, processor, RECIPE, 3, 2, told.append).count == 2
    assert told == ["pages are written by the engine, 2 at once"]

    def full(*unused):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(room, "Cache", full)
    assert isinstance(writers.writer(model, processor, RECIPE, 3, 2, told.append), use.Generating)
    assert told[1:] == ["pages are written by generate(), not by the engine: no memory for one slot of 24 tokens"]


@pytest.mark.parametrize("by_engine", [True, False])
def test_evaluation_stops_within_a_block_of_steps(loaded, tmp_path, monkeypatch, by_engine):
    """A signal was seen only once a page had ended."""
    model, processor = loaded
    folder, steps, asked = make_pages(tmp_path / "pages", 5), [], SimpleNamespace(wanted=False)

    def step(*unused):
        steps.append(unused)
        asked.wanted = len(steps) == 2

    run = room.Step.run
    monkeypatch.setattr(room, "BLOCK", 2)
    monkeypatch.setattr(room.Step, "run", lambda self, count: (step(), run(self, count)))
    monkeypatch.setattr(writers, "obstacle", lambda model: "" if by_engine else "none is wanted")
    monkeypatch.setattr(evaluation, "stop", asked)
    hook = model.register_forward_pre_hook(step)
    pages = [{"screenshot": path.read_bytes(), "html": "<p>"} for path in folder.glob("*.png")]
    with pytest.raises(StoppedError):
        write_held_out(model, processor, datasets.Dataset.from_list(pages), RECIPE, batch=1)
    hook.remove()
    assert len(steps) == 2


def test_evaluation_writes_by_the_engine_what_it_writes_by_generate(loaded, tmp_path, monkeypatch):
    model, processor = loaded
    folder = make_pages(tmp_path / "pages", 5)
    pages = [{"screenshot": path.read_bytes(), "html": "x" * place} for place, path in enumerate(folder.glob("*.png"))]
    pages = datasets.Dataset.from_list(pages)
    tell_once.cache_clear()
    plain = write_held_out(model, processor, pages, RECIPE, batch=2)
    monkeypatch.setattr(writers, "obstacle", lambda model: "")
    fast = write_held_out(model, processor, pages, RECIPE, batch=2)
    assert [{**row, "seconds": 0} for row in fast] == [{**row, "seconds": 0} for row in plain] and len(plain) == 5


@pytest.mark.parametrize(("share", "slots"), [(1.0, 64), (0.3, 8), (0.1, 1)])
def test_slots_are_as_many_as_fit_the_share_that_torch_may_use(share, slots, monkeypatch):
    """A GPU of 80 GiB is played, of which 1 GiB a slot is asked for, beside what reading takes, 4, and the model, 8."""
    gib = 2**30
    said = {"mem_get_info": (71 * gib, 80 * gib), "get_per_process_memory_fraction": share}
    for name, answer in (said | {"memory_reserved": 8 * gib, "memory_allocated": 8 * gib}).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    monkeypatch.setattr(room, "bytes_of_slot", lambda *kept: gib)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=8))
    model = SimpleNamespace(device=torch.device("cuda"), config=config, dtype=torch.bfloat16)
    known = {"captured": SimpleNamespace(layers=[]), "capacity": 64, "chances": 0}
    assert room.Engine.slots_that_fit(SimpleNamespace(model=model, **known)) == slots
