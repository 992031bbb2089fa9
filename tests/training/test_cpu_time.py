"""How long a large model would take on a CPU, and the question before it."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MAIN, ROOT

import run_deepspeed_training as wrapper
from training import cpu_time
from training.errors import SettingsError, agreed
from training.settings import Machine, resolve

DEMO = ROOT / "demo"


@pytest.fixture
def large_base(tmp_path):
    """3.1 B weights by its config.json, beside which there is nothing: who fetches weights or reads them fails."""
    config = json.loads((DEMO / "tiny_holo1" / "config.json").read_text())
    text = config.get("text_config", config)
    text |= {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 2, "layer_types": ["full_attention"] * 36, "max_window_layers": 36}
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def words(*flags: str) -> str:
    resolved = resolve(list(map(str, flags)), Machine())
    return cpu_time.slow_words(vars(resolved.settings), resolved.training)


def test_a_large_model_is_told_in_one_line_of_arithmetic(large_base, monkeypatch):
    monkeypatch.setattr(cpu_time, "flops_per_second", lambda: 1e11)
    said = words("--base_model", large_base, "--num_samples", "500", "--num_train_epochs", "2")
    assert said.startswith(f"on a CPU: {large_base} has 2.8 B weights and there is no GPU: 1,000 pages x "), said
    per_page = float(said.split("pages x ")[1].split()[0])
    assert said.endswith(f"/ 0.10 TFLOP/s (measured now) = {per_page * 1e15 / 1e11 / 86400:.0f} days at that rate"), (
        said
    )
    assert ": 16 pages x " in words("--base_model", large_base, "--max_steps", "2")


def test_small_models_plans_and_what_cannot_be_known_are_not_told(large_base, tmp_path):
    assert words("--demo") == words("--base_model", DEMO / "tiny_holo1") == ""
    assert words("--base_model", large_base, "--plan") == words("--base_model", large_base, "--show_supervision") == ""
    assert words("--base_model", tmp_path) == ""


def test_the_rate_is_measured_and_times_are_told_in_their_unit():
    assert 1e8 < cpu_time.flops_per_second() < 1e14
    seconds = (300, 3 * 3600, 5 * 86400, 1e9)
    assert [cpu_time.duration(one) for one in seconds] == ["5 minutes", "3 hours", "5 days", "32 years"]


@pytest.fixture
def typed(monkeypatch):
    """Opens a terminal for stdin and stderr, on which the given line has been typed."""

    def type_in(line: str) -> None:
        ours, theirs = os.openpty()
        os.write(ours, line.encode())
        monkeypatch.setattr(sys, "stdin", open(theirs))  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", open(theirs, "w"))  # noqa: SIM115

    return type_in


@pytest.mark.parametrize(("line", "sure"), [("y\n", True), ("YES\n", True), ("\n", False), ("x\n", False)])
def test_only_a_yes_is_a_yes(typed, line, sure):
    typed(line)
    assert agreed() == sure
    typed(line)
    passed_on: list[str] = []
    problems = wrapper.slow_problems(passed_on, dry_run=False)
    assert (not problems, passed_on) == (sure, ["--yes"] if sure else [])


def test_nobody_is_asked_who_said_yes_or_sits_at_no_terminal(typed, monkeypatch):
    typed("n\n")
    cpu_time.sure(yes=True)
    monkeypatch.setenv("RANK", "0")
    cpu_time.sure(yes=False)  # a launcher's rank
    monkeypatch.delenv("RANK")
    with pytest.raises(SettingsError, match=r"not started: .*--yes"):
        cpu_time.sure(yes=False)
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
    cpu_time.sure(yes=False)
    monkeypatch.setattr(sys, "stdin", None)  # closed by who started it
    cpu_time.sure(yes=False)
    passed_on: list[str] = []
    assert wrapper.slow_problems(passed_on, dry_run=False) == [] and passed_on == ["--yes"]


def at_a_terminal(command: list[str], answer: bytes, cwd: Path) -> tuple[int, str]:
    """The exit code and all that stood on the terminal at which a command was started and answered."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    said, answered = b"", False
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux' word for a terminal that nobody has open any more
            break
        said += part
        if not answered and b"[y/N]" in said:
            answered = True
            os.write(ours, answer)
    os.close(ours)
    return process.wait(60), said.decode()


@pytest.mark.slow
@pytest.mark.parametrize("script", [MAIN, str(ROOT / "run_deepspeed_training.py")])
def test_a_no_ends_it_with_2_before_anything_is_fetched(script, large_base, tmp_path):
    flags = ["--base_model", str(large_base), "--dataset", str(DEMO / "pages")]
    code, said = at_a_terminal([sys.executable, script, *flags], b"n\n", tmp_path)
    assert code == 2, said
    assert said.count("on a CPU: ") == said.count("train all the same? [y/N]") == 1, said
    assert "not started: " in said and "Traceback" not in said and "no .safetensors" not in said


@pytest.mark.slow
def test_without_a_terminal_it_is_warned_of_once_and_goes_on(large_base, tmp_path):
    """As far as the base, which has no weights: that is refused after the warning."""
    flags = [sys.executable, MAIN, "--base_model", str(large_base), "--dataset", str(DEMO / "pages")]
    done = subprocess.run(flags, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("on a CPU: ") == 1, done.stderr
    assert "[y/N]" not in done.stderr and "not started" not in done.stderr
