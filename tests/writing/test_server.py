"""writing/server.py against a real HTTP server that fails as it is told to: every page is answered or named, and
nothing that goes wrong goes wrong in silence."""

import random
import threading
import time
import weakref

import pytest
from conftest import ROOT, make_processor, make_qwen3_vl_processor, run_script
from fake_openai import FakeOpenAI
from PIL import Image

import use_model_from_hub as use
from writing.server import Failed, Server, Showing, edge_of, lines_of, retry_after_s, shown_picture, shown_size

RECIPE = use.Recipe()
HTML = "<!DOCTYPE html>\n<html><body><p>page {}\u2028 caf\u00e9 \u4e2d\x85</p></body></html>"


def picture(number: int, size: tuple[int, int] = (56, 56)) -> Image.Image:
    return Image.new("RGB", size, (number // 256, number % 256, 7))


def number_of(shown: Image.Image) -> int:
    red, green, _ = shown.getpixel((0, 0))
    return 256 * red + green


def page(shown: Image.Image, asked: dict) -> str:
    return HTML.format(number_of(shown))


def requests(*numbers: int) -> list[use.Request]:
    return [use.Request(number, lambda number=number: picture(number)) for number in numbers]


@pytest.fixture
def fake():
    with FakeOpenAI(page, name=number_of) as server:
        yield server


def server(fake: FakeOpenAI, recipe: use.Recipe = RECIPE, **options) -> Server:
    options = {"timeout_s": 5.0, "patience_s": 5.0, "backoff_s": (0.01, 0.05)} | options
    return Server(fake.url, recipe, **options)


def outcomes(fake: FakeOpenAI, *numbers: int, **options) -> list[use.Written | Failed]:
    found = {request.place: outcome for request, outcome in server(fake, **options).write(requests(*numbers))}
    assert sorted(found) == sorted(numbers)
    return [found[number] for number in numbers]


THOUGHTLESS = {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}


def is_page(outcome: use.Written | Failed, number: int) -> bool:
    return isinstance(outcome, use.Written) and outcome.raw == outcome.html == HTML.format(number)


# -----------------------------------------------------------------------------
# What is asked


def test_the_question_is_the_one_that_is_asked_here(fake, capsys):
    (written,) = outcomes(fake, 3)
    assert written == use.Written(HTML.format(3), HTML.format(3), len(HTML.format(3)) + 1, cut_off=False)
    ((_, asked),) = fake.asked
    (message,) = asked.pop("messages")
    shown, text = message["content"]
    assert (message["role"], text) == ("user", {"type": "text", "text": RECIPE.prompt}) and shown["type"] == "image_url"
    assert asked == {
        "model": "holo1",
        "max_tokens": 4096,
        "temperature": 0.0,
        "repetition_penalty": 1.0,  # vLLM would take the 1.05 of Qwen2.5-VL's generation_config.json
        **THOUGHTLESS,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    told = capsys.readouterr().err
    assert "holo1 (vllm owns it), 16 pages at once; screenshots resized here to multiples of 28 and 3,136" in told


@pytest.mark.parametrize(
    ("owner", "wanted"),
    [
        ("vllm", {"repetition_penalty": 1.1, "top_p": 0.9, "top_k": -1, "min_p": 0.0, **THOUGHTLESS}),
        (
            "llamacpp",
            {"repeat_penalty": 1.1, "repeat_last_n": -1, "top_p": 0.9, "top_k": -1, "min_p": 0.0, **THOUGHTLESS},
        ),
        ("somebody", {"repetition_penalty": 1.1, "top_p": 0.9}),
    ],
)
def test_each_server_is_told_how_to_draw_in_its_own_words(fake, capsys, owner, wanted):
    fake.owner = owner
    recipe = use.Recipe(temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=5)
    list(server(fake, recipe).write(requests(1)))
    asked = {name: fake.asked[0][1].get(name) for name in {*wanted, "temperature"}}
    assert asked == {**wanted, "temperature": 0.7}
    assert ("whether this server heeds repetition_penalty is not known" in capsys.readouterr().err) == (
        owner == "somebody"
    )


def test_an_unknown_server_is_told_no_more_than_it_must_know(fake):
    fake.owner = "somebody"
    list(server(fake).write(requests(1)))
    list(server(fake, use.Recipe(temperature=1.0)).write(requests(1)))
    first, second = (asked.keys() for _, asked in fake.asked)
    plain = {"model", "messages", "max_tokens", "temperature", "stream", "stream_options"}
    assert first == plain and second == plain | {"seed"}


def test_seeds_follow_from_the_recipes_seed_the_screenshot_and_the_sample(fake):
    def seeds(seed: int, *asked: tuple[int, int]) -> list[int]:
        wanted = [use.Request(0, lambda number=number: picture(number), sample) for number, sample in asked]
        before = len(fake.asked)
        list(server(fake, use.Recipe(temperature=1.0, seed=seed), in_flight=1).write(wanted))
        return [asked["seed"] for _, asked in fake.asked[before:]]

    pages = [(1, 0), (1, 1), (2, 0)]
    assert seeds(5, *pages) == seeds(5, *pages[::-1])[::-1]
    assert len({*seeds(5, *pages), *seeds(6, *pages)}) == 6
    assert all(0 <= seed < 2**31 for seed in seeds(5, *pages))


# -----------------------------------------------------------------------------
# Pictures


def test_sizes_are_those_of_the_processor():
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rng = random.Random(0)
    for _ in range(3000):
        width, height, edge = rng.randint(1, 3000), rng.randint(1, 3000), rng.choice([28, 32])
        if max(width, height) >= 200 * min(width, height):
            continue
        limits = rng.choice([(3_136, 1_003_520), (3_136, 50_000), (65_536, 80_000)])
        size = shown_size(width, height, edge, *limits)
        assert size[::-1] == smart_resize(height, width, edge, *limits)
        if limits[0] <= size[0] * size[1] <= limits[1]:  # but for strips
            assert shown_size(*size, edge, *limits) == size  # the server changes nothing more


@pytest.mark.parametrize(("make", "edge"), [(make_processor, 28), (make_qwen3_vl_processor, 32)])
def test_the_model_sees_what_it_would_see_here(tmp_path, make, edge):
    recipe = use.Recipe(min_pixels=56 * 56, max_pixels=200 * 200)
    processor = make()
    processor.save_pretrained(tmp_path)
    assert edge_of(tmp_path) == edge
    use.limit_pixels(processor, recipe.min_pixels, recipe.max_pixels)
    screenshot = Image.effect_noise((333, 410), 90).convert("RGB")
    sent = shown_picture(screenshot, edge, recipe)
    here, there = (use.encode_questions(processor, [shown], recipe.prompt) for shown in (screenshot, sent))
    assert here["image_grid_thw"].tolist() == there["image_grid_thw"].tolist() and sent.size != screenshot.size
    difference = (here["pixel_values"] - there["pixel_values"]).abs()
    level = 1 / 255 / 0.26  # of 256, by the smallest standard deviation that the processor divides by
    assert difference.max() < 1.1 * level and (difference > 0).float().mean() < 0.01


def test_a_processor_that_does_not_merge_patches_gets_screenshots_as_they_are(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"size": {"longest_edge": 1536}}')
    assert edge_of(tmp_path) is None
    screenshot = picture(1, (333, 410))
    assert shown_picture(screenshot, None, RECIPE) is screenshot


def test_a_processor_that_cannot_be_read_is_refused(fake, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"merge_size": ')
    with pytest.raises(use.UseError, match="how its processor resizes pictures cannot be read") as error:
        server(fake, source=tmp_path)
    assert error.value.code == 2 and not fake.asked
    (tmp_path / "preprocessor_config.json").write_text('{"merge_size": 2, "patch_size": 16}')
    assert server(fake, source=tmp_path).edge == 32


def test_a_server_that_resizes_pictures_is_found_out(fake, capsys):
    sizes = [(56, 56), (280, 280), (280, 560)]
    wanted = [use.Request(place, lambda place=place: picture(place, sizes[place])) for place in range(3)]
    list(server(fake, in_flight=1).write(wanted))
    assert "another size" not in capsys.readouterr().err
    fake.resized = 0.5
    list(server(fake, in_flight=1).write(wanted))
    told = capsys.readouterr().err
    assert (
        told.count("another size") == 1
        and '--mm-processor-kwargs \'{"min_pixels": 3136, "max_pixels": 1003520}' in told
    )


# -----------------------------------------------------------------------------
# Faults, one by one


@pytest.mark.parametrize(
    "fault",
    "500,502,503,429 0.05,reset at once,reset,truncated,not JSON,no choices,no finish,error,whole,"
    "whole, not JSON".replace(", ", "; ").split(","),
)
def test_a_fault_is_tried_again_and_nothing_is_mixed_up(fake, capsys, fault):
    fault = fault.replace("; ", ", ")
    fake.faults = {1: [fault, fault], 2: [fault]}
    found = outcomes(fake, 0, 1, 2)
    assert [is_page(outcome, number) for number, outcome in enumerate(found)] == [True] * 3
    told = capsys.readouterr().err
    if fault != "whole":  # which is no fault: a server that does not stream
        assert fake.attempts == {0: 1, 1: 3, 2: 2} and "3 pages answered, 0 not; faults: 3 x " in told
        assert told.count("trying again") == 1  # the others are counted


@pytest.mark.parametrize("fault", ["silence", "comments"])
def test_silence_in_mid_answer_is_not_waited_for(fake, fault):
    fake.faults, start = {0: [fault]}, time.monotonic()
    (found,) = outcomes(fake, 0, timeout_s=0.5)
    assert is_page(found, 0) and fake.attempts[0] > 1
    assert time.monotonic() - start < 5


def test_a_busy_server_is_asked_again_after_as_long_as_it_wants_and_as_often_as_it_takes(fake):
    fake.faults = {0: ["429 0.5"], 1: [*["503"] * 7, "500"]}
    start = time.monotonic()
    found = outcomes(fake, 0, tries=2)
    assert time.monotonic() - start >= 0.5
    assert is_page(found[0], 0) and is_page(outcomes(fake, 1, tries=2)[0], 1)  # one fault of its own


def test_the_length_says_that_a_page_is_cut_off(fake):
    fake.faults = {1: ["length"]}
    assert [outcome.cut_off for outcome in outcomes(fake, 0, 1)] == [False, True]


@pytest.mark.parametrize(
    ("fault", "attempts", "words"),
    [
        ("500", 3, "no answer after 3 attempts, the last: status 500: told to 500"),
        ("truncated", 3, "the last: the answer breaks off: no finish_reason"),
        ("context", 1, "400: This model's maximum context length .* --max-model-len"),
        ("413", 1, "413: raise the limit"),
        ("400", 1, "400: told to 400"),
        ("refusal", 1, "longer than the context .* --max-model-len"),
    ],
)
def test_a_page_that_cannot_be_had_is_named_and_the_others_go_on(fake, fault, attempts, words):
    fake.chance = lambda name, attempt: fault if name == 1 else ""
    found = outcomes(fake, 0, 1, 2, tries=3)
    assert is_page(found[0], 0) and is_page(found[2], 2)
    assert isinstance(found[1], Failed) and found[1].attempts == attempts == fake.attempts[1]
    with pytest.raises(use.UseError, match=words):
        raise found[1].error


@pytest.mark.parametrize("kind", [use.PictureError, lambda words: use.UseError(words, 80)])
def test_a_screenshot_that_cannot_be_opened_is_named(fake, kind):
    def damaged() -> Image.Image:
        raise kind("not a readable PNG, JPEG or WebP picture")

    (first, bad), (second, good) = sorted(
        server(fake).write([use.Request(0, damaged), *requests(1)]), key=lambda pair: pair[0].place
    )
    assert (first.place, second.place) == (0, 1) and is_page(good, 1)
    assert isinstance(bad, Failed) and bad.error.code == 80 and "not a readable PNG" in str(bad.error)


@pytest.mark.parametrize(
    ("fault", "words"), [("401", "refuses access"), ("404", "has no chat with holo1"), ("field", "repetition_penalty")]
)
def test_what_no_page_would_be_spared_ends_it_at_once(fake, fault, words):
    fake.chance = lambda name, attempt: fault
    with pytest.raises(use.UseError, match=words) as error:
        list(server(fake, in_flight=2).write(requests(*range(9))))
    assert error.value.code == 2 and len(fake.asked) <= 2


def test_a_server_that_is_gone_costs_its_patience_once_and_names_every_page(fake):
    writer = server(fake, in_flight=2, patience_s=0.4, backoff_s=(0.05, 0.1))
    fake.die()
    start = time.monotonic()
    found = list(writer.write(requests(*range(20))))
    assert time.monotonic() - start < 6  # twenty times the patience would be 8
    assert sorted(request.place for request, _ in found) == list(range(20))
    assert all("no connection" in str(outcome.error) for _, outcome in found)
    fake.start()
    fake.faults = {1: ["503"]}  # another time, it is waited for again
    ((_, written),) = writer.write(requests(1))
    assert is_page(written, 1)


def test_each_time_that_a_server_is_away_has_a_patience_of_its_own(fake):
    fake.faults = {number: ["503 0.25"] for number in range(4)}
    found = list(server(fake, in_flight=1, patience_s=0.45).write(requests(*range(4))))
    assert all(is_page(outcome, request.place) for request, outcome in found)


def test_a_server_that_dies_and_comes_back_is_waited_for(fake):
    fake.pause_s = 0.02
    answers = server(fake, in_flight=4).write(requests(*range(12)))
    found = [next(answers)]
    fake.die()
    threading.Timer(0.3, fake.start).start()
    found += answers
    assert sorted(request.place for request, _ in found) == list(range(12))
    assert all(is_page(outcome, request.place) for request, outcome in found)


# -----------------------------------------------------------------------------
# The endpoint


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_is_understood_with_and_without_its_path(fake, ending):
    assert Server(fake.url + ending, RECIPE).url == f"{fake.url}/v1"


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "http://", "http://[::1", ""])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(use.UseError, match="give the server's address"):
        Server(url, RECIPE)


def test_a_server_that_is_not_there_is_refused_with_the_remedy(fake):
    fake.die()
    with pytest.raises(use.UseError, match="start it first, for example: vllm serve") as error:
        server(fake)
    assert error.value.code == 2


def test_several_models_are_refused_by_name_until_one_is_named(fake):
    fake.models = ["holo1", "other"]
    with pytest.raises(use.UseError, match="several models, name one of them: holo1, other"):
        server(fake)
    with pytest.raises(use.UseError, match="has no model third, but holo1, other"):
        server(fake, model_name="third")
    assert server(fake, model_name="other").model == "other"
    fake.models = []
    with pytest.raises(use.UseError, match="no model"):
        server(fake)
    fake.models = None  # no list at all
    assert server(fake, model_name="other").model == "other"


def test_the_key_comes_from_the_environment_and_is_never_shown(fake, monkeypatch, capsys):
    fake.key = "canary-key"
    monkeypatch.setenv("OPENAI_API_KEY", "canary-key")  # which is for another host
    with pytest.raises(use.UseError, match="its key in HOLO1_API_KEY is not set"):
        server(fake)
    monkeypatch.setenv("HOLO1_API_KEY", "canary-wrong")
    with pytest.raises(use.UseError, match="HOLO1_API_KEY was not accepted") as error:
        server(fake)
    monkeypatch.setenv("HOLO1_API_KEY", "canary-key\n")
    fake.faults = {0: ["503"]}
    assert is_page(outcomes(fake, 0)[0], 0)
    with pytest.raises(use.UseError) as in_address:
        Server("http://user:canary-pass@localhost", RECIPE)
    with pytest.raises(use.UseError, match="characters that no key has") as odd:
        server(fake, key="canary\u00e9")
    assert "canary" not in f"{capsys.readouterr()} {error.value} {in_address.value} {odd.value}"


# -----------------------------------------------------------------------------
# As it is written, and leaving


def test_text_is_shown_as_it_is_written_and_once_after_a_fault(fake):
    fake.faults = {1: ["reset", "truncated"]}
    shown: dict[int, list[str]] = {0: [], 1: []}
    answers = server(fake).write(requests(0, 1), shown=lambda request, text: shown[request.place].append(text))
    pages = {request.place: outcome for request, outcome in answers}
    assert all(len(pieces) > 4 and "".join(pieces) == pages[number].raw for number, pieces in shown.items())


def test_another_answer_after_a_fault_is_shown_from_its_start():
    shown: list[str] = []
    showing = Showing(shown.append)
    for attempt in (["<p>", "one"], ["<p>", "two", "!"]):
        showing.begin()
        for piece in attempt:
            showing.piece(piece)
    assert shown == ["<p>", "one", "\n<p>two!"]


def test_leaving_takes_no_time_and_ends_what_is_being_written(fake):
    fake.html = lambda shown, asked: "word" * (number_of(shown) and 1000)  # all but the first take half a minute
    fake.pause_s = 0.05
    answers = server(fake, in_flight=4).write(requests(*range(1000)))
    request, _ = next(answers)
    start = time.monotonic()
    answers.close()
    assert request.place == 0 and time.monotonic() - start < 2
    while any(thread.name.startswith("page ") for thread in threading.enumerate()):  # to the server's next word
        assert time.monotonic() - start < 5
        time.sleep(0.01)
    assert len(fake.asked) <= 5


def test_lines_end_with_line_feeds_alone():
    assert list(lines_of([b"a\xe2\x80", b"\xa8b\n\nc", b"\r\nd"])) == [b"a\xe2\x80\xa8b", b"", b"c\r", b"d"]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, 0), ("7", 7), ("1e9", 600), ("-3", 0), ("nan", 0), ("soon", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(value, seconds):
    assert retry_after_s(value) == seconds


# -----------------------------------------------------------------------------
# A thousand pages


@pytest.mark.slow
def test_a_thousand_pages_are_answered_or_named_whatever_goes_wrong(fake):
    """Every third attempt fails in one way or another, the server dies twice, and some pages cannot be had at all."""
    rng, pages = random.Random(0), 1000
    kinds = "500,502,503,429 0.02,reset at once,reset,truncated,not JSON,no choices,no finish,error,silence".split(",")
    lost = {
        number: rng.choice(["500", "context", "413", "truncated", "damaged"]) for number in rng.sample(range(pages), 30)
    }
    plan = {number: [rng.choice(kinds) for _ in range(rng.choice([0, 0, 0, 1, 2]))] for number in range(pages)}
    fake.faults = {number: faults for number, faults in plan.items() if number not in lost}
    fake.chance = lambda name, attempt: lost[name]
    fake.piece = 24
    taken, opened, most = [], set(), [0, 0]

    def opener(number: int) -> Image.Image:
        if lost.get(number) == "damaged":
            raise use.PictureError("damaged")
        shown = picture(number)
        opened.add(number)
        weakref.finalize(shown, opened.discard, number)
        most[1] = max(most[1], len(opened))
        return shown

    def wanted():
        for number in range(pages):
            taken.append(number)
            most[0] = max(most[0], len(taken) - len(found))
            yield use.Request(number, lambda number=number: opener(number))

    found: dict[int, use.Written | Failed] = {}
    for request, outcome in server(fake, timeout_s=1.0, patience_s=60.0, tries=8).write(wanted()):
        assert request.place not in found  # none twice
        found[request.place] = outcome
        if len(found) in (300, 700):
            fake.die()
            threading.Timer(0.3, fake.start).start()
    assert sorted(found) == list(range(pages))
    assert {number for number, outcome in found.items() if isinstance(outcome, Failed)} == set(lost)
    assert all(is_page(found[number], number) for number in found.keys() - lost)
    assert most[0] <= 16 and most[1] <= 4  # requests under way, pictures in memory
    assert len(fake.asked) > 1.3 * pages


@pytest.mark.slow
def test_ctrl_c_leaves_although_the_server_is_silent(fake, tmp_path):
    """In a process of its own: threads that wait for the server must not keep it from ending."""
    fake.chance = lambda name, attempt: "silence"
    start = time.monotonic()
    ended = run_script(str(ROOT / "tests/programs/writes_until_interrupted.py"), fake.url, cwd=tmp_path, timeout=20)
    assert ended.returncode == 130 and "interrupted" in ended.stdout, ended.stderr
    assert time.monotonic() - start < 10


# -----------------------------------------------------------------------------
# From the command line


def test_a_folder_of_screenshots_is_written_by_a_server_and_goes_on_where_it_was(fake, tmp_path, monkeypatch, capsys):
    """Through use_model_from_hub.py: what failed is named, the rest is written, and asked for no second time."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / use.RECIPE_FILE).write_text('{"max_html_tokens": 64}')
    (tmp_path / "shots").mkdir()
    for number in range(5):
        picture(number).save(tmp_path / "shots" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    fake.faults = {2: ["context"], 3: ["500", "reset"]}
    asked = ["--image", "shots", "--output", "pages", "--model", "./model", "--server", fake.url]
    monkeypatch.setattr(use, "load_model", lambda *unused: pytest.fail("a model was loaded, though a server writes"))
    assert use.main(asked) == 80
    assert "shots/2.png: " in (told := capsys.readouterr().err) and "4 new, 1 failed" in told
    for number in (0, 1, 3, 4):
        assert (tmp_path / "pages" / f"{number}.html").read_text(encoding="utf-8") == HTML.format(number) + "\n"
    assert not (tmp_path / "pages" / "2.html").exists()
    came = len(fake.asked)
    assert use.main(asked) == 0 and len(fake.asked) == came + 1
    assert "4 of 5 pages were there, 1 new, 0 failed" in capsys.readouterr().err
