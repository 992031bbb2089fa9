"""The README tells the truth: every command, default, key, code, file and link in it is held against the code.

Commands are parsed by the real parsers, in a folder that has what the README tells its reader to bring.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, shapes_of_3b, tracked_files

import holo1_dom_finetune as training
import make_pages
import page_scores
import run_deepspeed_training as wrapper
import use_model_from_hub as use
from families import family_of
from training import memory_fit
from training import settings as training_settings
from training.checkpoints import MANIFEST
from training.dataset import KNOWN_DATASETS
from training.evaluation import score_held_out
from training.mixture import one_or_all
from training.run_record import BEGINNING, DEEPSPEED_FILE, write_record

README = ROOT / "README_DeepSpeed.md"
NAMES = (README.name, "README.md", "SETTINGS.md", "CONTRIBUTING.md")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
TEXT = "\n".join(PAGES.values())
ENVIRONMENT_FOLDER = ".venv"
PLACEHOLDERS = ("PAGE.png", "my_pages", "my_model", "site", "reference.html", "prediction.html")  # the reader brings
ENVIRONMENT = ("CUDA_LAUNCH_BLOCKING", "CUDA_VISIBLE_DEVICES", "DS_BUILD_OPS", "NCCL_DEBUG", "NCCL_P2P_DISABLE")
ENVIRONMENT += ("PYTORCH_CUDA_ALLOC_CONF", "TORCH_DISTRIBUTED_DEBUG")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Every command of the ```bash blocks; a line may hold several, joined by &&."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines if line and not line.startswith("#") for part in line.split("&&")]


def rows(heading: str) -> dict[str, list[str]]:
    """The cells of the tables under a heading, by their first cell without its backticks; of the settings those of the
    page that has them all."""
    page = PAGES["SETTINGS.md"] if f"# {heading}\n" in PAGES["SETTINGS.md"] else PAGES[README.name]
    section = page.split(f"# {heading}\n", 1)[1]
    section = re.split(r"^#+ ", re.sub(r"^```.*?^```$", "", section, flags=re.M | re.S), maxsplit=1, flags=re.M)[0]
    lines = re.findall(r"^\| (.*) \|$", section, re.MULTILINE)
    cells = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    names = [row[0].strip("`") for row in cells]
    assert len(names) - names.count("Setting") == len({*names} - {"Setting"}), "a row stands there twice"
    return {name: row[1:] for name, row in zip(names, cells, strict=True)}


def shown(value: object) -> str:
    """A default as the tables write it."""
    words = {None: "not set", False: "off", True: "on"}
    if value is None or isinstance(value, bool):
        return words[value]
    return f"`{value}`" if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else str(value)


# -----------------------------------------------------------------------------
# Commands


@pytest.fixture
def at_the_readers(tmp_path, monkeypatch) -> Path:
    """The repository with what the reader brings and what earlier commands have left there; the folder we are in. Every
    port of that reader's is free, whatever runs here."""
    for name in {name.split("/")[0] for name in tracked_files()}:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(wrapper, "port_trouble", lambda port: "")
    for name in ("my_model", use.FINAL_FOLDER, training.EMERGENCY_FOLDER):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    checkpoint = tmp_path / training_settings.TRAINING_DEFAULTS["output_dir"] / "checkpoint-8"
    checkpoint.mkdir(parents=True)
    write_record(checkpoint.parent, training_settings.resolve(["--deepspeed", str(ROOT / "ds_z3.json")]).record)
    for name in (
        "my_pages",
        "references",
        "predictions",
        "site",
        "screenshots",
        "holo1_dom_finetune_output/evaluation",
    ):
        (tmp_path / name).mkdir()
    for name in ("PAGE.png", "reference.html", "prediction.html"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(command: str) -> None:
    """Raises (also SystemExit, by the parsers) when the command could not work as it stands."""
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z0-9_]+=\S*", words[0]):
        assert words[0].split("=")[0] in ENVIRONMENT, f"{words[0]}: a variable that nobody reads?"
        words = words[1:]
    program, *flags = words
    if program == "python" and flags[0] not in ("-m", "-c"):
        check_script(flags[0], flags[1:])
    elif program in CHECKS:
        CHECKS[program](flags)
    else:
        raise AssertionError(f"{program}: no check knows this program")


def check_script(script: str, flags: list[str]) -> None:
    assert Path(script).is_file(), f"{script}: no such script"
    if {"--help", "--help_training"} & {*flags}:
        with pytest.raises(SystemExit) as end:
            check_flags(script, flags)
        assert end.value.code == 0
    else:
        check_flags(script, flags)


def check_flags(script: str, flags: list[str]) -> None:
    if script == "run_deepspeed_training.py":
        args, passed_on = wrapper.read_command_line(flags)
        assert not (problems := wrapper.find_problems(args, [], passed_on)), problems
        check_flags(Path(args.script).name, ["--deepspeed", args.config, *passed_on])
    elif script == "holo1_dom_finetune.py":
        training_settings.check_settings(training_settings.resolve(flags))
    elif script == "use_model_from_hub.py":
        args = use.parse(flags)
        assert not (gone := [image for image in args.image if not Path(image).exists()]), f"{gone[0]}: where from?"
        assert args.model is None or use.resolve_model(args.model)
        assert args.output is None or Path(args.output).absolute().parent.is_dir()
    elif script == "page_scores.py":
        page_scores.parse(flags)
    elif script == "make_pages.py":
        make_pages.parse_arguments(flags)
    else:
        raise AssertionError(f"{script}: no check knows this script")


def check_deepspeed(flags: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    args = parse_args(flags)
    check_script(args.user_script, args.user_args)


def check_torchrun(flags: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(flags)
    check_script(args.training_script, args.training_script_args)


def check_python(flags: list[str]) -> None:
    if flags[0] == "-c":
        return check_imports(flags[1])
    assert flags[:2] == ["-m", "pytest"], f"python {shlex.join(flags)}: no check knows it"
    expression = re.sub(r"\b(not|or|and)\b|[()]", "", expression_of(flags))
    markers = re.findall(
        r'"(\w+):', re.search(r"markers = \[(.*?)\n?\]", (ROOT / "pyproject.toml").read_text(), re.S)[1]
    )
    assert {*expression.split()} <= {*markers}, f"{expression}: unknown markers, there are {markers}"
    assert not {*flags[2:]} - {"-m", "-n", "3", "--dist", "worksteal", expression_of(flags)}


def expression_of(flags: list[str]) -> str:
    return flags[flags.index("-m", 1) + 1] if "-m" in flags[1:] else ""


def check_pip(flags: list[str]) -> None:
    assert flags[0] == "install"
    if flags[1] == "-r":
        assert len(flags) == 3 and Path(flags[2]).is_file()
    else:
        assert {*flags[1:]} <= {line.split("#")[0].strip() for line in (ROOT / "requirements.txt").open()}


def installed(program: str) -> str:
    """Where a package's command lies: beside the interpreter, in an environment that nobody activated."""
    found = shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    assert found, f"{program} is not installed"
    return found


@cache
def hf_help(subcommand: tuple[str, ...]) -> str:
    command = [installed("hf"), *subcommand, "--help"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "COLUMNS": "200"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_hf(flags: list[str]) -> None:
    text = hf_help(tuple(flag for flag in flags if not flag.startswith("-")))
    assert not [flag for flag in flags if flag.startswith("-") and flag.split("=")[0] not in text], text


def check_tensorboard(flags: list[str]) -> None:
    from tensorboard import program

    board = program.TensorBoard()
    board.configure(["tensorboard", *flags])
    assert Path(board.flags.logdir).is_dir()


def check_ds_report(flags: list[str]) -> None:
    assert not flags and installed("ds_report")


def check_environment(flags: list[str]) -> None:
    """A virtual environment is made, or entered as one that was made so."""
    assert flags in (["-m", "venv", ENVIRONMENT_FOLDER], [f"{ENVIRONMENT_FOLDER}/bin/activate"])
    assert importlib.util.find_spec("venv")


def check_ci(flags: list[str]) -> None:
    assert not flags and os.access(ROOT / ".ci" / "run", os.X_OK)


CHECKS = {"python": check_python, "python3": check_environment, "source": check_environment, ".ci/run": check_ci}
CHECKS |= {"pip": check_pip, "hf": check_hf, "tensorboard": check_tensorboard}
CHECKS |= {"deepspeed": check_deepspeed, "torchrun": check_torchrun, "ds_report": check_ds_report}


@pytest.mark.parametrize("command", sorted({command for text in PAGES.values() for command in commands(text)}))
def test_every_command_is_accepted_by_what_it_starts(at_the_readers, command):
    check(command)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("python run_deepspeed_training.py --num_gpus two", "invalid int value: 'two'"),
        (
            "python run_deepspeed_training.py --learning_rat 1e-5",
            "--learning_rat: no such flag; did you mean --learning_rate?",
        ),
        ("python run_deepspeed_training.py --config gone.json", "--config gone.json: no such file"),
        ("python run_deepspeed_training.py --dataset ./gone", "--dataset ./gone: no such folder"),
        ("deepspeed --num_cards=4 holo1_dom_finetune.py --deepspeed ds_z3.json", "--num_cards=4"),
        ("deepspeed --num_gpus=4 holo1_dom_finetune.py --deepspeed gone.json", "--deepspeed gone.json: No such file"),
        ("torchrun --nproc_per_node 2 gone.py", "gone.py: no such script"),
        ("torchrun --per_node 2 holo1_dom_finetune.py", "unrecognized arguments: --per_node"),
        ("python holo1_dom_finetune.py --quantize 5bit", "--quantize 5bit: did you mean 4bit?"),
        ("python holo1_dom_finetune.py --max_bad_share 7", "--max_bad_share 7"),
        ("python use_model_from_hub.py --picture PAGE.png", "required: --image"),
        ("python use_model_from_hub.py --image gone.png", "gone.png: where from?"),
        ("python use_model_from_hub.py --image PAGE.png --model ./gone", "--model ./gone: no such folder"),
        ("python gone.py", "gone.py: no such script"),
        ("python training/dataset.py", "no check knows this script"),
        ("python -m unittest", "no check knows it"),
        ('python -m pytest -m "quick"', "quick: unknown markers"),
        ('python -c "import deepspeed_gone"', "No module named 'deepspeed_gone'"),
        ("pip install -r gone.txt", "gone.txt"),
        ("pip install deepspeed==0.1", "deepspeed==0.1"),
        ("hf auth enter", "No such command 'enter'"),
        ("hf auth login --gone", "--gone"),
        ("tensorboard --logdir gone", "gone"),
        ("CUDA_LAUNCH_BLOKING=1 python holo1_dom_finetune.py", "a variable that nobody reads"),
        ("git push", "git: no check knows this program"),
    ],
)
def test_a_command_that_could_not_work_is_noticed(at_the_readers, command, reason, capsys):
    with pytest.raises((Exception, SystemExit)) as refusal:
        check(command)
    assert reason in f"{refusal.value}{capsys.readouterr()}"


def test_both_pages_begin_with_the_demo():
    assert commands(PAGES["README.md"])[:4] == commands(PAGES["README_DeepSpeed.md"])[:4]
    assert commands(PAGES["README.md"])[3] == "python run_deepspeed_training.py --demo"


def test_only_placeholders_and_defaults_are_files_that_are_not_shipped():
    words = {word for text in PAGES.values() for command in commands(text) for word in shlex.split(command)}
    words = {re.sub(r":[\d.]+%?$", "", word) for word in words}  # a share of the pages
    files = {word.removeprefix("./") for word in words if word.startswith("./") or re.search(r"\.[a-z]{2,4}$", word)}
    outputs = {use.FINAL_FOLDER, training.EMERGENCY_FOLDER, "page.html", "report.html", "scores.json"}
    outputs |= {ENVIRONMENT_FOLDER, ".ci/run"}
    assert not [name for name in files - outputs if name not in PLACEHOLDERS and not (ROOT / name).is_file()]


# -----------------------------------------------------------------------------
# Python


def check_imports(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert not [name.name for name in node.names if not hasattr(module, name.name)]


@pytest.mark.parametrize("code", blocks(PAGES[README.name], "python"))
def test_every_snippet_runs_on_a_final_folder(code, tiny_base, tmp_path, monkeypatch):
    from PIL import Image

    final = tmp_path / use.FINAL_FOLDER
    final.mkdir()
    for file in tiny_base.iterdir():
        (final / file.name).symlink_to(file)
    (final / use.RECIPE_FILE).write_text(json.dumps({"max_html_tokens": 4, "max_pixels": 12_544}))
    Image.new("RGB", (112, 112), "white").save(tmp_path / "PAGE.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README", "exec"), {})


# -----------------------------------------------------------------------------
# Tables


def test_the_settings_tables_have_every_setting_with_the_codes_default():
    told = {name: row[0] for name, row in rows("Settings").items() if name.startswith("--")}
    settings = {f"--{k}": shown(one_or_all(v)) for k, v in vars(training_settings.PageSettings()).items()}
    other = {f"--{name}": shown(value) for name, value in training_settings.TRAINING_DEFAULTS.items()}
    assert told == settings | other


def test_the_wrappers_table_has_every_flag_with_its_default():
    told = {name.removeprefix("--"): row[0] for name, row in rows("The wrapper").items() if name.startswith("--")}
    args = vars(wrapper.read_command_line([])[0])
    settings = training_settings.PageSettings()
    own = {"master_port": wrapper.DEFAULT_PORT, "hub_repo": settings.hub_repo, "num_samples": settings.num_samples}
    plain = {name: value if name in ("master_port", "num_samples") else shown(value) for name, value in own.items()}
    assert told == {name: str(plain.get(name, shown(value))) for name, value in args.items()}


def test_the_memory_table_is_what_plan_prints():
    config, asked = shapes_of_3b(), ["--plan", "--deepspeed", str(ROOT / "ds_z3.json")]
    resolved, family = training_settings.resolve(asked), family_of(config)
    scope = memory_fit.scope_of(resolved.settings, resolved.training, resolved.deepspeed, config)
    image = family.most_image_tokens(config, resolved.settings.max_pixels)
    page = memory_fit.longest_page(family, config, image, resolved.settings.max_html_tokens + 1)
    printed = [line.split() for line in memory_fit.fast_table(scope, page).splitlines()]
    table = PAGES[README.name].split("| GPUs | of GiB |")[1].split("\n\n")[0]
    shown = [re.split(r" \| |, ", row) for row in re.findall(r"^\| (\d.*) \|$", table, re.MULTILINE)]
    assert len(shown) > 3 and [row for row in shown if row not in printed] == []


def test_no_cell_of_a_table_is_empty():
    tables = re.findall(r"^\|.*\|$", TEXT, re.MULTILINE)
    assert tables and not [line for line in tables if re.search(r"\|\s*\|", line)]


def leaves(config: dict, prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        flat |= leaves(value, f"{prefix}{key}.") if nested else {prefix + key: f"`{json.dumps(value)}`"}
    return flat


def test_every_key_of_the_deepspeed_files_is_explained_with_its_value():
    told = rows("ds_z3.json, value by value")
    told.pop("Key"), told.pop("---", None)
    for column, name in enumerate(("ds_z3.json", "ds_z3_offload.json")):
        values = {key: row[column] for key, row in told.items() if row[column] != "not set"}
        assert values == leaves(json.loads((ROOT / name).read_text()))


def test_every_exit_code_is_there_with_its_meaning():
    told = {int(code): row[0] for code, row in rows("Exit codes").items() if code.isdigit()}
    assert told == wrapper.MEANINGS


def test_every_known_dataset_is_there_with_its_licence_and_whether_it_is_refused():
    told = {name: (row[0], "refused" in row[1]) for name, row in rows("Data sets").items() if "/" in name}
    assert told == {name: (it.licence, bool(it.refused)) for name, it in KNOWN_DATASETS.items()}


def test_every_measure_is_one_that_the_evaluation_writes(tiny_base):
    told = {word for name in rows("Evaluation") for word in name.replace("`", "").split(", ")} - {"Measure", "---"}
    page = {"name": "a", "html": "<p>a</p>", "html_tokens": 1}
    row = {"html": "<p>a</p>", "raw": "<p>a</p>", "cut_off": False, "tokens": 1, "seconds": 1.0}
    assert told <= score_held_out([row], [page]).keys()


def test_every_output_is_named_as_the_code_names_it():
    folders = {name.split("/")[0] for name in rows("Outputs") if "/" in name}
    output_dir = training_settings.TRAINING_DEFAULTS["output_dir"]
    assert folders == {use.FINAL_FOLDER, output_dir, training.EMERGENCY_FOLDER, training_settings.PAGES_FOLDER}
    source = "".join(
        (ROOT / name).read_text()
        for name in ("holo1_dom_finetune.py", "training/collecting.py", "training/run_record.py")
    )
    files = {name.split("/")[-1] for name in rows("Outputs") if re.search(r"\.\w+$", name)} - {use.RECIPE_FILE}
    assert not [name for name in files if name not in source]


# -----------------------------------------------------------------------------
# Files and links


def test_the_file_tree_lists_exactly_the_top_level_files():
    """Of what git knows: a log that a run has left is no matter; a new file is noticed once it is added."""
    tree = blocks(PAGES["CONTRIBUTING.md"].split("## What stands where")[1], "text")[0]
    here, folder = set(), ""
    for line in tree.splitlines():
        name, what_for = re.fullmatch(r"(\s*\S+)\s{2,}(\S.*)", line).groups()
        assert what_for
        if name.startswith(" "):
            assert (ROOT / folder / name.strip()).exists(), f"{folder}{name.strip()} is in the tree, not in the folder"
        else:
            here.add(name)
            folder = name
    assert here == {name.split("/")[0] + "/" * ("/" in name) for name in tracked_files()}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    text = re.sub(r"^```.*?^```$", "", PAGES[name], flags=re.MULTILINE | re.DOTALL)
    assert (links := re.findall(r"\]\(([^)]*)\)", text))
    assert not [link for link in links if not link.startswith("http") and not leads_somewhere(link, ROOT / name)]


def leads_somewhere(link: str, page: Path) -> bool:
    file, _, anchor = link.partition("#")
    page = ROOT / file if file else page
    if not page.exists() or not anchor:
        return page.exists()
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return anchor in {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles
    }  # as GitHub makes them


def test_every_file_named_in_the_text_exists():
    text = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([\w./-]+\.(?:py|json|md|txt|toml))`", text))
    written = {"__init__.py", "metadata.jsonl", "results.json", use.RECIPE_FILE, MANIFEST, BEGINNING, DEEPSPEED_FILE}
    assert not [name for name in named - written if not (ROOT / name).exists() and "finetune_" not in name]


def test_every_flag_named_in_the_text_exists(at_the_readers):
    text = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    known = {
        *training_settings.parse([])[0],
        *vars(wrapper.read_command_line([])[0]),
        "deepspeed",
        "help",
        "help_training",
    }
    known |= {*vars(use.parse(["--image", "PAGE.png"])), *vars(make_pages.parse_arguments(["site", "--out", "x"]))}
    known |= {*vars(page_scores.parse(["reference.html", "prediction.html"]))}
    assert not [flag for flag in re.findall(r"`--(\w+)", text) if flag not in known]


def test_the_text_names_no_folder_of_one_machine():
    assert not re.findall(r"(?<![\w.:/*])/(?:work|home|root|tmp|mnt|Users)\b\S*", "".join(PAGES.values()))


def test_nothing_is_left_to_be_filled_in():
    assert not [line for text in PAGES.values() for line in text.splitlines() if re.search("TODO|FIXME|XXX", line)]


# -----------------------------------------------------------------------------
# CI


def test_ci_runs_the_readmes_own_test_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    cut = next(line for line in script.read_text().splitlines() if line.startswith("sed -n"))
    command = cut.split(" >")[0]
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    marked = re.findall(r"^<!-- the test command -->\n```bash\n(.*?)^```$", PAGES[README.name], re.M | re.S)
    assert [done.stdout] == marked and "slow or not slow" in done.stdout


def test_every_import_is_a_requirement_or_comes_with_one():
    """Names as packages call them; the few that other requirements bring along are named here."""
    brought = "fsspec pyarrow safetensors tokenizers yaml numpy scipy markupsafe httpx httpx2".split()
    names = {re.split(r"[<>=\s]", line)[0] for line in (ROOT / "requirements.txt").open() if line[0] not in "#\n"}
    packages = {
        {"pillow": "PIL", "scikit-image": "skimage", "opencv-python-headless": "cv2"}.get(name, name) for name in names
    } | {*brought}
    files = [ROOT / name for name in tracked_files() if name.endswith(".py")]
    ours = {path.stem for path in files} | {path.parent.name for path in files}
    imported = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    # Used where they are installed; torch brings triton on Linux, and the last two are only measured.
    optional = {"flash_attn", "fla", "triton", "jax", "dew_flash_attn"}
    assert not imported - packages - ours - optional - {*sys.stdlib_module_names}
    # Used without an import of ours: transformers' processors, quantisation and reports, and the tools.
    unused = packages - {*brought} - imported
    assert unused <= {
        "torchvision",
        "bitsandbytes",
        "tensorboard",
        "ruff",
        "oxlint",
        "playwright",
        "accelerate",
        "pytest-xdist",
    }
