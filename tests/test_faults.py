"""What goes wrong while a run is at work, or before: nothing that was saved is lost or spoilt, a killed run resumes to the same
bits, and whatever can't be used is told in one sentence with exit code 2. (faults.py does 20 kills of real command lines.)"""
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import safetensors.torch
import torch
import transformers
from conftest import lines_of
from PIL import Image

import data
import eval as evaluation
import grpo
import judge as J
import model as M
import rewards
import sft

ROOT = Path(__file__).resolve().parent.parent


def flags_of(world, out, *more, stage="sft"):
    """A run of three steps, each saved; later flags win."""
    return ["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, *faults.FLAGS[stage],
            "--max_steps", "3", "--save_every", "1", "--out", str(out), *more]


def run(flags, capsys, stage=sft):
    """A program's main under data.cli -> exit code, its lines on stderr that are neither bars nor empty."""
    capsys.readouterr()
    code = 0
    try:
        data.cli(lambda: stage.main([str(x) for x in flags]))
    except SystemExit as e:
        code = e.code
    said = [line.split("\r")[-1].strip() for line in capsys.readouterr().err.splitlines()]
    return code, [line for line in said if line.startswith(("error:", "saved")) or "--resume" in line]


def refused(said, *words):
    """One sentence, with all of the words."""
    code, lines = said
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), said
    assert all(word in lines[0] for word in words), (words, lines[0])


def state_of(out):
    return torch.load(out / "state.pt", weights_only=True)


def copy_of(folder, to):
    shutil.copytree(folder, to)
    return to


# ---------------------------------------------------------------------------------------------------------------------- kills

def in_child(stage, flags, kill=None, **env):
    """The run in a forked process, which sends itself the signal -> a function that waits for its exit code."""
    pid = os.fork()
    if pid:
        return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    try:
        os.environ.update(env)
        if kill:
            faults.plan(stage, *kill)
        data.cli(lambda: faults.STAGES[stage].main(flags))
        code = 0
    except SystemExit as e:
        code = e.code or 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("stage, kill, code", [
    ("sft", ("state", 2, signal.SIGKILL), -9), ("sft", ("update", 2, signal.SIGINT), 2),
    ("grpo", ("checkpoint", 1 + 8 + 4, signal.SIGKILL), -9), ("grpo", ("forward", 2, signal.SIGTERM), 0)])
def test_a_killed_run_resumes_to_the_same_bits(stage, kill, code, world, toy, tmp_path):
    """SIGKILL while it saves, Ctrl-C and SIGTERM in a step, which is then the last. SIGTERM is no failure: exit code 0."""
    main = faults.STAGES[stage].main
    main(flags_of(world, tmp_path / "whole", stage=stage))
    flags = flags_of(world, tmp_path / "killed", stage=stage)
    assert in_child(stage, flags, kill)() == code and len(lines_of(tmp_path / "killed")) == 2
    main([*flags, "--resume"])
    assert faults.same(faults.left_behind(tmp_path / "whole"), faults.left_behind(tmp_path / "killed"))
    assert sorted(x.name for x in tmp_path.iterdir()) in (["killed", "whole"], [".killed.lock", "killed", "whole"])


@pytest.mark.parametrize("stage, given", [("sft", []), ("grpo", ["--weights", *map(str, rewards.WEIGHTS)])])
def test_a_last_checkpoint_that_was_cut_off_is_written_on_resume(stage, given, world, toy, monkeypatch, tmp_path):
    """The state comes first, then the checkpoint: where the run ends between the two there is no step left to do on --resume. A
    default that is given by its numbers is no other knob."""
    main = faults.STAGES[stage].main
    main(flags_of(world, tmp_path / "whole", stage=stage))
    flags = flags_of(world, tmp_path / "cut", "--save_every", "0", stage=stage)
    with monkeypatch.context() as disk:
        disk.setattr(M, "save", lambda *_, **__: data.expect(False, "the disk is full"))
        with pytest.raises(data.DataError, match="the disk is full"):
            main(flags)
    assert state_of(tmp_path / "cut")["step"] == 3 and not (tmp_path / "cut" / "model.safetensors").exists()
    main([*flags, *given, "--resume"])
    assert faults.same(faults.left_behind(tmp_path / "whole"), faults.left_behind(tmp_path / "cut"))


def test_two_processes_stop_at_the_same_step(world, toy, tmp_path):
    """SIGTERM to the second of two: both end with 0 behind the step, the first has saved it, and the resumed run is the whole."""
    def two(out, *more, kill=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        flags = flags_of(world, out, *more, stage="grpo")
        waits = [in_child("grpo", flags, kill if rank else None, RANK=str(rank), **env) for rank in (0, 1)]
        return [wait() for wait in waits]
    assert two(tmp_path / "whole") == [0, 0]
    assert two(tmp_path / "killed", "--save_every", "0", kill=("forward", 2, signal.SIGTERM)) == [0, 0]
    assert state_of(tmp_path / "killed")["step"] == len(lines_of(tmp_path / "killed")) == 2
    with pytest.raises(data.DataError, match=r"nproc_per_node \(processes in all\) 2, not 1"):
        grpo.main([*flags_of(world, tmp_path / "killed", stage="grpo"), "--resume"])
    assert two(tmp_path / "killed", "--resume") == [0, 0]
    assert faults.same(faults.left_behind(tmp_path / "whole"), faults.left_behind(tmp_path / "killed"))


def test_a_second_ctrl_c_ends_the_run_at_once(world, monkeypatch, tmp_path, capsys):
    """In the middle of a step; what was done before it is saved."""
    encode, calls, before = M.encode, [], signal.getsignal(signal.SIGINT)

    def pressed(*args):
        calls.append(args)
        for _ in range(2 * (len(calls) == 4)):  # the start, then two micro-batches a step: the second step's first
            os.kill(os.getpid(), signal.SIGINT)
        return encode(*args)
    monkeypatch.setattr(M, "encode", pressed)
    code, said = run(flags_of(world, tmp_path / "x", "--save_every", "0"), capsys)
    assert code == 2 and said == [f"{tmp_path}/x: saved after step 1, --resume goes on", "error: stopped by Ctrl-C"]
    assert len(calls) == 4 and state_of(tmp_path / "x")["step"] == 1
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------------------------------------------------- the early end

@pytest.mark.parametrize("stage", [sft, grpo])
def test_a_late_error_loses_no_step(stage, world, toy, tmp_path, capsys, monkeypatch):
    """With --save_every 0 an image that breaks during the run (here: before it, unseen) ends it in the step that needs it: the
    steps before are saved, and when the image is mended --resume ends as if nothing had happened."""
    monkeypatch.setattr(data, "check_images", lambda *_: None)
    name = "sft" if stage is sft else "grpo"
    jsonl = copy_of(Path(world.jsonl).parent, tmp_path / "d") / "phantoms.jsonl"
    flags = [*flags_of(world, tmp_path / "x", "--save_every", "0", stage=name), "--data", str(jsonl), "--max_steps", "4"]
    stage.main([*flags, "--out", str(tmp_path / "whole")])
    records = data.read_records(jsonl, "train")
    order, per_step = sft.epoch_order(len(records), 0, 0), 2
    early = {records[i]["path"] for i in order[:2 * per_step]}
    late = next(r for r in (records[i] for i in order[2 * per_step:4 * per_step]) if r["path"] not in early)
    whole = Path(late["path"]).read_bytes()
    Path(late["path"]).write_bytes(whole[:len(whole) // 2])
    code, (told, error) = run(flags, capsys, stage)
    done = state_of(tmp_path / "x")["step"]
    assert code == 2 and done in (2, 3) and told == f"{tmp_path}/x: saved after step {done}, --resume goes on"
    assert "truncated or broken" in error and late["path"] in error
    Path(late["path"]).write_bytes(whole)
    stage.main([*flags, "--resume"])
    assert faults.same(faults.left_behind(tmp_path / "whole"), faults.left_behind(tmp_path / "x"))


@pytest.mark.parametrize("stage", [sft, grpo])
def test_images_are_looked_at_before_the_first_step(stage, world, tmp_path, capsys):
    """A missing image, one that is cut off or none, and one that the processor would refuse, of any question, end the run before
    the network is loaded."""
    jsonl = copy_of(Path(world.jsonl).parent, tmp_path / "d") / "phantoms.jsonl"
    path = Path(data.read_records(jsonl, "train")[-1]["path"])
    flags = [*flags_of(world, tmp_path / "x", stage="sft" if stage is sft else "grpo"), "--data", jsonl, "--model", "none"]
    cut = path.read_bytes()[:-200]
    for spoil, word in ((path.unlink, "is missing"), (lambda: path.write_bytes(cut), "truncated"), (lambda: path.write_text("x"), "not an image"),
                        (lambda: Image.new("L", (402, 2)).save(path), "200 times")):
        spoil()
        refused(run(flags, capsys, stage), path.name, word)
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------- what is not finite

def spoil_steps(monkeypatch, which):
    """Make the gradients of these steps, counted from 1, not finite."""
    summed, calls = M.sum_gradients, []

    def spoilt(parameters):
        summed(parameters)
        calls.append(1)
        if len(calls) in which:
            parameters[0].grad.view(-1)[0] = math.nan
    monkeypatch.setattr(M, "sum_gradients", spoilt)


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_step_that_is_not_finite_is_skipped(stage, world, toy, monkeypatch, tmp_path):
    """One bad gradient moves neither weights nor moments, is counted, and the run goes on to a finite end."""
    main = faults.STAGES[stage].main
    spoil_steps(monkeypatch, {2})
    kept, save = {}, sft.Run.save
    monkeypatch.setattr(sft.Run, "save", lambda run: save(run) or kept.update({run.saved: state_of(tmp_path / "x")}))
    main(flags_of(world, tmp_path / "x", "--max_steps", "4", stage=stage))
    assert [line["skipped"] for line in lines_of(tmp_path / "x")] == [0, 1, 0, 0]
    assert "NaN" not in (tmp_path / "x" / "metrics.jsonl").read_text()
    assert [*kept] == [1, 3, 4]  # behind a skipped step the last checkpoint stays
    assert M.all_finite(kept[4]["trained"].values())
    assert int(next(iter(kept[4]["optimizer"]["state"].values()))["step"]) == 3


@pytest.mark.parametrize("save_every, saved", [("1", 1), ("0", 4)])
def test_some_such_steps_in_a_row_end_the_run_and_the_last_good_checkpoint_stays(save_every, saved, world, monkeypatch, tmp_path, capsys):
    """SKIPPED of them, here 3, of steps 2 to 4: what was saved before them stays; where nothing was, the weights, which are
    still finite, are saved now."""
    monkeypatch.setattr(sft, "SKIPPED", 3)
    spoil_steps(monkeypatch, range(2, 99))
    code, (told, error) = run(flags_of(world, tmp_path / "x", "--max_steps", "30", "--save_every", save_every), capsys)
    assert code == 2 and "3 steps in a row" in error and f"saved after step {saved}" in told
    state = state_of(tmp_path / "x")
    assert state["step"] == saved and M.all_finite(state["trained"].values()) and len(lines_of(tmp_path / "x")) == 4


def test_an_absurd_learning_rate_leaves_finite_weights(world, tmp_path, capsys):
    """--lr 1e6: the first step's loss is finite, no later one's gradient is. Exit code 2, and no tensor that is saved has a nan."""
    code, said = run(flags_of(world, tmp_path / "x", "--lr", "1e6", "--warmup", "0", "--max_steps", "30"), capsys)
    assert code == 2 and "10 steps in a row" in said[-1], said
    assert M.all_finite(state_of(tmp_path / "x")["trained"].values())
    assert M.all_finite(safetensors.torch.load_file(tmp_path / "x" / "model.safetensors").values())


def test_weights_that_overflow_are_not_saved(world, monkeypatch, tmp_path, capsys):
    """A step with a finite gradient after which a weight isn't finite: the checkpoint of the step before stays."""
    real, calls = torch.optim.AdamW.step, []

    def overflowing(self, *args):
        real(self, *args)
        calls.append(1)
        if len(calls) == 3:
            self.param_groups[0]["params"][0].data.view(-1)[0] = math.inf
    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)
    code, (told, error) = run(flags_of(world, tmp_path / "x"), capsys)
    assert code == 2 and "no longer finite" in error and "saved after step 2" in told and state_of(tmp_path / "x")["step"] == 2


def test_a_policy_that_cannot_be_sampled_ends_the_run(world, toy, monkeypatch, tmp_path, capsys):
    """Weights that are finite but give no finite logits: one sentence where the draw would fail."""
    real, calls = torch.optim.AdamW.step, []

    def exploding(self, *args):
        real(self, *args)
        calls.append(1)
        if len(calls) == 2:
            self.param_groups[0]["params"][0].data.fill_(3e38)
    monkeypatch.setattr(torch.optim.AdamW, "step", exploding)
    flags = flags_of(world, tmp_path / "x", "--save_every", "0", stage="grpo")
    code, said = run([*flags, "--lora", "0"], capsys, grpo)
    assert code == 2 and "not finite" in said[-1], said
    assert not torch.isnan(torch.cat([x.flatten() for x in state_of(tmp_path / "x")["trained"].values()])).any()


@pytest.mark.parametrize("program", [sft, grpo, evaluation])
def test_weights_that_are_not_finite_are_refused(program, world, tmp_path, capsys):
    """One nan in the checkpoint, and no program starts with it."""
    folder = copy_of(world.folder, tmp_path / "spoilt")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = math.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    flags = ["--ckpt", folder, "--data", world.jsonl, "--out", tmp_path / "e"]
    if program is not evaluation:
        flags = [*flags_of(world, tmp_path / "x", stage="sft" if program is sft else "grpo"), "--model", folder]
    refused(run(flags, capsys, program), "spoilt", "not finite")


# -------------------------------------------------------------------------------------------------- one folder, one run

def test_two_runs_in_one_folder(world, tmp_path, capsys):
    """The second is refused, fresh or resumed, and moves nothing; a run that was killed holds nothing."""
    out = tmp_path / "x"
    sft.main(flags_of(world, out))
    before = sorted(p.name for p in out.iterdir())
    holder = subprocess.Popen([sys.executable, "-c", "import sys, time; sys.path.insert(0, sys.argv[2]); import data\n"
                               "with data.locked(sys.argv[1]): print('held', flush=True); time.sleep(99)", out, ROOT],
                              stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    for more in ([], ["--resume", "--max_steps", "4"]):
        refused(run(flags_of(world, out, *more), capsys), str(out), "another run is at work")
    assert sorted(p.name for p in out.iterdir()) == before and not (tmp_path / "x.1").exists()
    holder.kill()
    holder.wait()
    holder.stdout.close()
    sft.main(flags_of(world, out, "--resume", "--max_steps", "4"))
    assert len(lines_of(out)) == 4 and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_resumed_run_has_the_model_and_the_data_it_had(world, tmp_path, capsys):
    """Another pi_SFT or other records are refused, whatever they are called; the same ones elsewhere are taken."""
    out, other = tmp_path / "x", copy_of(world.folder, tmp_path / "other")
    sft.main(flags_of(world, out))
    more = ["--resume", "--max_steps", "4"]
    weights = safetensors.torch.load_file(other / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    safetensors.torch.save_file(weights, other / "model.safetensors", {"format": "pt"})
    refused(run([*flags_of(world, out), *more, "--model", other], capsys), "--model (digest of its weights)")
    jsonl = copy_of(Path(world.jsonl).parent, tmp_path / "d") / "phantoms.jsonl"
    records = data.read_records(jsonl, "train")
    data.write_records([records[0] | dict(question="What?"), *records[1:]], jsonl.with_name("changed.jsonl"))
    refused(run([*flags_of(world, out), *more, "--data", jsonl.with_name("changed.jsonl")], capsys), "--data (digest")
    moved = copy_of(world.folder, tmp_path / "moved")
    assert run([*flags_of(world, out), *more, "--data", jsonl, "--model", moved], capsys) == (0, [])
    assert len(lines_of(out)) == 4


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "x"
    sft.main(flags_of(world, out))
    return out


@pytest.mark.parametrize("spoil, words", [
    (lambda out: (out / "state.pt").write_bytes(b""), ("state.pt",)),
    (lambda out: (out / "state.pt").write_bytes((out / "state.pt").read_bytes()[:5000]), ("state.pt",)),
    (lambda out: torch.save([1, 2], out / "state.pt"), ("state.pt",)),
    (lambda out: torch.save(dict(step=3, knobs={}), out / "state.pt"), ("state.pt",)),
    (lambda out: torch.save(state_of(out) | dict(trained={"a": torch.zeros(1)}), out / "state.pt"), ("another network",)),
    (lambda out: torch.save(state_of(out) | dict(optimizer={"state": {}, "param_groups": []}), out / "state.pt"), ("state.pt",)),
    (lambda out: (out / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n'), ("metrics.jsonl, line 2",)),
    (lambda out: (out / "metrics.jsonl").write_text('[1]\n'), ("metrics.jsonl, line 1",)),
], ids=["empty", "cut", "a list", "no weights", "other weights", "other optimizer", "broken line", "no step"])
def test_a_damaged_run_is_one_sentence(spoil, words, finished, world, tmp_path, capsys):
    """--resume on what no run has written."""
    copy_of(finished, tmp_path / "x")
    spoil(tmp_path / "x")
    refused(run(flags_of(world, tmp_path / "x", "--resume", "--max_steps", "4"), capsys), *words)


# ------------------------------------------------------------------------------------------------------------- bad checkpoints

def config(change):
    """A function that changes a checkpoint folder's config.json."""
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return spoil


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


@pytest.mark.parametrize("spoil", [
    config(lambda c: None), config(lambda c: []), config(lambda c: {}), config(lambda c: c | dict(text_config=3)),
    config(lambda c: c | dict(model_type="bert")), config(lambda c: c | dict(model_type="nobody_s")),
    lambda f: (f / "config.json").write_text("{"),
    lambda f: (f / "preprocessor_config.json").write_text("[1]"),
    lambda f: (f / "chat_template.jinja").unlink(), template("{% for"), template("{{ nothing.at.all }}"),
    template("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"),
    template("<|image_pad|>"),
], ids=["null", "list", "empty", "text_config", "bert", "unknown", "broken", "preprocessor list",
        "no template", "broken template", "failing template", "no image", "no question"])
def test_a_folder_that_is_no_checkpoint_is_one_sentence(spoil, world, tmp_path, capsys):
    """Whatever is wrong with configuration, preprocessor or chat template. A template that leaves out the image, by which the
    policy would run blind, or the question is refused too."""
    folder = copy_of(world.folder, tmp_path / "folder")
    spoil(folder)
    flags = ["--model", folder, "--data", world.jsonl, "--out", tmp_path / "x", "--batch", "2", "--max_steps", "1"]
    refused(run(flags, capsys), str(folder))


# ------------------------------------------------------------------------------------------------------ bad records and flags

@pytest.mark.parametrize("program", [sft, grpo, evaluation])
@pytest.mark.parametrize("change, words", [
    (dict(question="half \ud800"), ("line 1", "surrogate")), (dict(id="\udfff"), ("line 1", "surrogate")),
    (dict(question="what " * 20_000), ("tokens", "4096"))], ids=["question", "id", "long"])
def test_records(program, change, words, world, tmp_path, capsys):
    """Half a character, which no result could be written with, and a question that would ask for 32 GB."""
    jsonl = copy_of(Path(world.jsonl).parent, tmp_path / "d") / "my.jsonl"
    record = world.records[0] | change | dict(split="test" if program is evaluation else "train")
    jsonl.write_text(json.dumps({k: v for k, v in record.items() if k != "path"}) + "\n")
    flags = ["--ckpt", world.folder, "--data", jsonl, "--out", tmp_path / "e"]
    if program is not evaluation:
        flags = ["--model", world.folder, "--data", jsonl, "--out", tmp_path / "x"]
        flags += ["--batch", "1"] if program is sft else ["--batch", "2", "--G", "2"]
    refused(run(flags, capsys, program), *words)


def test_thoughts_that_hold_tags_are_not_learned(world, tmp_path, capsys):
    """sft.py would teach a target that its own parser can't read."""
    records = data.read_records(world.jsonl)
    file = Path(world.jsonl).with_name("tags.jsonl")
    data.write_records([r | dict(thought=f"{r['thought']} <answer>B</answer>") for r in records], file)
    refused(run(flags_of(world, tmp_path / "x", "--data", file), capsys), "tags.jsonl, line 1: 'thought' holds <answer>, </answer>")


@pytest.mark.parametrize("program, flags, word", [
    (sft, ["--model", ""], "--model"), (grpo, ["--model", ""], "--model"), (grpo, ["--weights", "inf", "1", "1"], "--weights"),
    (sft, ["--seed", 10**13], "--seed"), (grpo, ["--seed", 10**13], "--seed"),
    (grpo, ["--thinking", "none", "--weights", 0, 0, 1], "--weights 0 0 1"),
    (evaluation, ["--seeds", 2**70, "--temperature", 1], "--seeds"),
    (evaluation, ["--image", "x.png", "--question", "What?", "--options", "CT", "ct"], "same"),
    (evaluation, ["--image", "x.png", "--question", "What?", "--options", "CT", ""], "non-empty")])
def test_flags(program, flags, word, world, tmp_path, capsys):
    """Values that were taken for something else, or came to a traceback."""
    before = flags_of(world, tmp_path / "x", stage="sft" if program is sft else "grpo")
    refused(run([*before, *flags] if program is not evaluation else flags, capsys, program), word)


def test_no_completions_are_shown_with_show_every_0(world, toy, tmp_path):
    grpo.main(flags_of(world, tmp_path / "x", "--show_every", "0", "--max_steps", "1", stage="grpo"))
    assert not (tmp_path / "x" / "completions.jsonl").exists()


def test_an_out_that_cannot_be_written_is_told_before_evaluating(world, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write anywhere
    monkeypatch.setattr(evaluation, "answer", lambda *args: pytest.fail("evaluated"))
    with pytest.raises(data.DataError, match="can't be written"):
        evaluation.main(["--ckpt", world.folder, "--data", world.jsonl, "--out", str(tmp_path / "e")])


def test_a_full_disk_is_told_with_its_path(world, tmp_path, capsys):
    """/dev/full is a disk that is always full: of a log, and of a file that is written beside."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "text.writing").symlink_to("/dev/full")
    for write, name in ((lambda: sft.log(str(tmp_path), step=1), "metrics.jsonl"),
                        (lambda: data.write_text(tmp_path / "text", "x"), "text")):
        with pytest.raises(SystemExit):
            data.cli(write)
        assert capsys.readouterr().err.strip() == f"error: {tmp_path}/{name}: No space left on device"


def test_the_last_checkpoint_survives_a_full_disk(world, monkeypatch, tmp_path, capsys):
    """No room for the third state: the second stays, whole, and the run can go on from it."""
    real, calls = torch.save, []

    def full(state, f):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(state, f)
    monkeypatch.setattr(torch, "save", full)
    code, (told, error) = run(flags_of(world, tmp_path / "x"), capsys)
    assert code == 2 and "saved after step 2" in told and error == f"error: {tmp_path}/x/state.pt: No space left on device"
    state, net = state_of(tmp_path / "x"), M.load(str(tmp_path / "x"))[0]
    assert state["step"] == 2 and all(torch.equal(p, state["trained"][name]) for name, p in net.named_parameters())
    assert not (tmp_path / "x" / "state.pt.writing").exists()


@pytest.mark.parametrize("part", [M.PeftModel, transformers.PreTrainedModel], ids=["adapter", "weights"])
def test_weights_that_find_no_room_are_one_sentence(part, world, monkeypatch, tmp_path):
    """What safetensors raises is no OSError."""
    def full(*args, **knobs):
        raise safetensors.SafetensorError("I/O error: No space left on device")
    monkeypatch.setattr(part, "save_pretrained", full)
    policy = M.add_lora(M.load(world.folder)[0], 2)
    with pytest.raises(data.DataError, match="x/.writing: the weights can't be written: I/O error: No space left"):
        M.save(policy, world.processor, tmp_path / "x", keep_adapter=True)


@pytest.mark.parametrize("program", ["sft", "grpo", "eval", "judge"])
def test_ctrl_c_while_a_program_is_imported_prints_no_traceback(program, tmp_path):
    """Seconds pass until torch is imported. In its place stands a module in which Ctrl-C is pressed."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run([sys.executable, ROOT / f"{program}.py"], env=os.environ | dict(PYTHONPATH=str(tmp_path)),
                          capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stderr == done.stdout == ""


# -------------------------------------------------------------------------------------------------------------- F and its log

def test_what_has_no_verdict_is_left_out_of_the_log(world):
    """Two groups of two; F failed on all of the second and half of the first: consistency is over the one verdict there is, and
    so is the reward; without any verdict there is none to log. The advantages' rewards are as they were."""
    nan, args = math.nan, sft.knobs(grpo.KNOBS, "", ["--preset", "tiny"])
    fmt, acc = torch.ones(2, 2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    con = torch.tensor([[1.0, nan], [nan, nan]])
    mask = torch.ones(2, 2, 3, dtype=torch.bool)

    def figures(con, **change):
        vars(args).update(change)
        R = rewards.total_reward(fmt, acc, grpo.without_failures(con), args.weights)
        parts = zip(fmt.flatten().tolist(), acc.flatten().tolist(), con.flatten().tolist(), strict=True)
        rows = [dict(thought="t", options=["x", "y"], fmt=f, acc=a, con=c, verdict=c) for f, a, c in parts]
        return grpo.figures_of(rows, R, mask[..., 0], mask, args)
    some = figures(con)
    assert some["consistency"] == 1 and some["reward"] == pytest.approx(1) and some["judge_failed"] == 0.75
    assert some["accuracy"] == 0.75
    none = figures(torch.full((2, 2), nan))
    assert math.isnan(none["consistency"]) and math.isnan(none["reward"]) and none["judge_failed"] == 1
    without = figures(con, weights=(0.5, 0.5, 0))
    assert without["reward"] == pytest.approx(0.875)
    silent = figures(torch.full((2, 2), nan), thinking="none", weights=(0.5, 0.5, 1))
    assert silent["reward"] == pytest.approx(0.875) and silent["judge_failed"] == 0


def test_a_server_that_hangs_is_soon_given_up(monkeypatch):
    """Of 200 thoughts only the first are asked until GIVE_UP failed in a row, each at most for two timeouts; the others have no
    verdict, and it is told why. The next rollout asks again."""
    monkeypatch.setattr(J, "WAITS", (0, 1e-3, 1e-3))
    monkeypatch.setattr(J, "GIVE_UP", 8)
    asked = []

    def hangs(self, body):
        asked.append(body)
        time.sleep(self.timeout)
        raise TimeoutError
    monkeypatch.setattr(J.Server, "post", hangs)
    judge = J.make_judge("openai:http://127.0.0.1:1/v1#m", concurrency=4, timeout=0.1)
    item = dict(question="What?", options=["cyst", "glioma"])
    verdicts = judge([f"thought {i}: cyst" for i in range(200)], [item] * 200)
    assert all(map(math.isnan, verdicts)) and 16 <= len(asked) <= 2 * (8 + 4)
    assert judge.usage.count("TimeoutError") == len(asked) and "not asked after 8 failures in a row" in judge.usage
    n = len(asked)
    judge(["thought: cyst"], [item])
    assert len(asked) == n + 2


def test_a_judge_that_died_is_noticed_before_a_resumed_run_goes_on(world, monkeypatch, tmp_path):
    """All gold verdicts are kept from the first start; F is asked something that isn't."""
    alive = [True]

    def reply(self, body):
        return (200 if alive[0] else 401), 0.0, json.dumps(dict(choices=[dict(message=dict(content="A"))])).encode()
    monkeypatch.setattr(J.Server, "post", reply)
    spec = ("--judge", "openai:http://127.0.0.1:1/v1#m", "--root", str(tmp_path), "--no-drop_no_spread", "--lora", "2")
    flags = flags_of(world, tmp_path / "x", *spec, stage="grpo")
    grpo.main([*flags, "--max_steps", "1"])
    alive[0] = False
    with pytest.raises(data.DataError, match="F failed: HTTP 401"):
        grpo.main([*flags, "--max_steps", "2", "--resume"])
    assert len(lines_of(tmp_path / "x")) == 1
