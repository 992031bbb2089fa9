"""Moments in 8 bits: what bitsandbytes itself makes of a step, of a checkpoint, and of a run that goes on."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, make_base, output, small_run, start_plain, start_zero_3, weights

from training import eight_bit, zero3
from training.base_model import BaseTensor
from training.disk_space import checkpoint_bytes, moment_bytes
from training.errors import SettingsError
from training.resuming import converted
from training.settings import Machine, find_problems, resolve

CPU = torch.device("cpu")
OUT, FINAL = "holo1_dom_finetune_output", "holo1_dom_finetune_final"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optim adamw_8bit", None),
        ("--optim adamw_bnb_8bit --deepspeed ds_z3.json", None),
        ("--optim adamw_8bit --deepspeed ds_z3_offload.json", "where 8 bits save nothing .* give ds_z3.json"),
        ("--optim paged_adamw_8bit", "--optim paged_adamw_8bit: .* unpaged .*; give adamw_8bit"),
        ("--optim paged_adamw_32bit", "--optim paged_adamw_32bit: .* unpaged .*; give adamw_torch_fused"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(argv, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = [problem for problem in find_problems(resolve(argv.split(), Machine())) if "--optim" in problem]
    assert bool(found) == bool(message)
    if message:
        with pytest.raises(SettingsError, match=message):
            raise SettingsError(found[0])


def test_norms_and_biases_keep_fp32_moments_and_matrices_do_not(capsys):
    """Two flat tensors as ZeRO makes them, and one that is short."""
    import bitsandbytes

    weights = [torch.nn.Parameter(torch.ones(count)) for count in (8192, 8192, 4095)]
    norms, matrix = [torch.ones(4096), torch.ones(4096)], [torch.ones(2, 4096)]
    eight_bit.begin("adamw_8bit", CPU, [(norms, weights[0]), (matrix, weights[1]), (matrix, weights[2])])
    assert "moments in 8 bits for 8,192 of 20,479 numbers in each process" in capsys.readouterr().out
    optimizer = bitsandbytes.optim.AdamW(weights, optim_bits=8)
    for tensor in weights:
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    moments = [(optimizer.state[tensor]["state1"], optimizer.state[tensor]["state2"]) for tensor in weights]
    assert [{moment.dtype for moment in both} for both in moments] == [{torch.float32}, {torch.uint8}, {torch.float32}]
    whole = sum(value.nbytes for name, value in optimizer.state[weights[1]].items() if name[:5] in ("state", "absma"))
    assert whole == 8192 * 2 * eight_bit.MOMENT_BYTES


def test_a_device_without_its_library_and_a_tensor_too_long_are_refused(monkeypatch):
    import bitsandbytes

    def broken(*arguments, **options):
        raise RuntimeError("played: no library")

    too_long = torch.empty(2**31, device="meta")
    with pytest.raises(SettingsError, match=r"one tensor has 2,147,483,648 .* sub_group_size of at most 1e9"):
        eight_bit.begin("adamw_8bit", CPU, [([too_long], too_long)])
    monkeypatch.setattr(bitsandbytes.optim, "AdamW", broken)
    with pytest.raises(SettingsError, match=r"cannot take a step in 8 bits on cpu \(RuntimeError: played: no library"):
        eight_bit.begin("adamw_8bit", CPU, [([too_long], too_long)])
    eight_bit.begin("adamw_torch_fused", CPU, [([too_long], too_long)])  # is nobody's business here


def test_a_kernel_that_is_wrong_or_fails_leaves_the_steps_to_bitsandbytes_and_says_so(monkeypatch, capsys):
    from bitsandbytes import functional

    kernel = pytest.importorskip("kernels.adamw_8bit_kernel", reason="triton is not installed")
    theirs, gpu = functional.optimizer_update_8bit_blockwise, torch.device("cuda")
    monkeypatch.setattr(functional, "optimizer_update_8bit_blockwise", theirs)
    asked, verdict = [], [""]

    def proof(of, device):
        asked.append((of, device))
        return 1 / 0 if verdict[0] is None else verdict[0]

    monkeypatch.setattr(kernel, "why_not", proof)
    for name, device in (("adamw_8bit", CPU), ("lion_8bit", gpu)):
        eight_bit.quicken(name, device)
    assert not asked and not capsys.readouterr().out
    eight_bit.quicken("adamw_8bit", gpu)
    assert functional.optimizer_update_8bit_blockwise.theirs is theirs
    assert "by a kernel of our own, which has taken bitsandbytes' own steps" in capsys.readouterr().out
    for verdict[0], told in (("is wrong", "is wrong; bitsandbytes takes"), (None, "fails: ZeroDivisionError")):
        eight_bit.quicken("adamw_bnb_8bit", gpu)
        assert functional.optimizer_update_8bit_blockwise is theirs
        assert f"rank 0: optimizer: our kernel of AdamW's step in 8 bits {told}" in capsys.readouterr().out
    assert asked == [(theirs, gpu)] * 3

    def full(of, device):
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    monkeypatch.setattr(kernel, "why_not", full)
    with pytest.raises(torch.OutOfMemoryError):
        eight_bit.quicken("adamw_8bit", gpu)


def test_a_checkpoint_takes_6_bytes_less_for_each_number():
    billions = {"optim": "adamw_8bit", "tensors": {}, "trained": 10**9, "whole": False}
    moments = moment_bytes(**billions)
    assert moments == 2.03125 and moment_bytes(**(billions | {"optim": "adamw_torch"})) == 8
    assert checkpoint_bytes(10**9, 10**9, 2, True, False, moments) == 10**9 * (2 + 4 + 2.03125)
    embeddings = BaseTensor("model.embed_tokens.weight", (250_000, 1000), "BF16", None)
    whole = moment_bytes("adamw_8bit", {embeddings.name: embeddings}, 10**9, whole=True)
    assert whole == 8 / 4 + 2.03125 * 3 / 4
    assert moment_bytes(**(billions | {"optim": "lion_8bit"}), moments=1) == 2.03125 / 2


def test_no_other_number_of_processes_can_go_on(tmp_path):
    """DeepSpeed looks for exp_avg in fp32: it would end by a KeyError once the checkpoint has been read."""
    record = {"processes": 2, "fixed": {"optim": "adamw_bnb_8bit"}}
    with pytest.raises(SettingsError, match=r"--optim adamw_bnb_8bit.* fp32 moments only; go on with 2 processes"):
        converted(tmp_path, {"record": record, "files": {}}, SimpleNamespace(output_dir=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("start", [start_plain, start_zero_3], ids=["plain", "ZeRO-3"])
def test_a_run_that_goes_on_learns_what_an_unbroken_one_does(start, pages_folder, tmp_path):
    """To the bit: the moments come back as they were, each in as many bits."""
    base = make_base(tmp_path / "base", dtype=torch.float32, hidden=64)
    options = {} if start is start_plain else {"processes": 2}
    flags = {"max_steps": 4, "gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 2}
    flags |= {"learning_rate": 1e-2, "warmup_steps": 0, "optim": "adamw_8bit", "eval_pages": 1}
    done = start(small_run(base, pages_folder, **flags), tmp_path, **options)
    assert done.returncode == 0, output(done)
    final = weights(tmp_path / FINAL)
    shutil.rmtree(tmp_path / OUT / "checkpoint-4")
    pattern = "optimizer.pt" if start is start_plain else "*/*optim_states.pt"
    moments = [found for file in (tmp_path / OUT / "checkpoint-2").glob(pattern) for found in moments_in(file)]
    assert {moment.dtype for moment in moments} == {torch.uint8, torch.float32}
    narrow = sum(moment.numel() for moment in moments if moment.dtype == torch.uint8)
    assert narrow > (0.5 if start is start_plain else 0.9) * sum(moment.numel() for moment in moments)
    done = start(["--resume"], tmp_path, **options)
    assert done.returncode == 0, output(done)
    assert f"going on from {OUT}/checkpoint-2" in done.stdout and "optimizer: moments in 8 bits for" in done.stdout
    assert json.loads((tmp_path / FINAL / "dom_recipe.json").read_text())["optimizer"] == "adamw_8bit"
    again, before = weights(tmp_path / FINAL), weights(base)
    assert all(torch.equal(final[name], again[name]) for name in final)
    assert not all(torch.equal(final[name], before[name]) for name in final)


def moments_in(file) -> list[torch.Tensor]:
    """Both moments of every tensor in a file of an optimizer's state, read without running any pickle."""
    zero3.trust_own_classes()
    state = torch.load(file, weights_only=True)
    state = state.get("optimizer_state_dict", state)
    state = state.get("optimizer_state_dict", state)["state"]
    wrapped = [of_one.get("__bnb_optimizer_quant_state__", of_one) for of_one in state.values()]
    return [of_one[name] for of_one in wrapped for name in ("state1", "state2")]


def test_a_proof_that_fails_in_any_way_leaves_the_step_to_bitsandbytes():
    """But for a full memory, which says nothing of a kernel."""

    def failing(error):
        raise error

    assert eight_bit.reason_of(lambda: "differs") == "differs"
    assert eight_bit.reason_of(lambda: failing(RuntimeError("PassManager::run failed"))) == (
        "fails: RuntimeError: PassManager::run failed"
    )
    for error in (torch.OutOfMemoryError("CUDA"), RuntimeError("Triton Error [CUDA]: out of memory")):
        with pytest.raises(torch.OutOfMemoryError):
            eight_bit.reason_of(lambda error=error: failing(error))
