"""sft.py: Eq. (1) by hand and against the stock loss, the schedule, the questions' order, the command line, a run's folder."""
import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import images_of

import data
import grpo
import model as M
import rewards
import sft
from judge import make_judge

ROOT = Path(__file__).resolve().parent.parent


# --------------------------------------------------------------------------------------------------------------------- Eq. (1)

def test_sft_loss_by_hand():
    """Eq. (1): minus the sum of the targets' log-probabilities, over the global batch's tokens; the masked bear no loss."""
    logp = torch.tensor([[[-1.0, -2.0, -3.0]], [[-4.0, -50.0, -50.0]]])
    mask = torch.tensor([[[True, True, True]], [[True, False, False]]])
    assert sft.sft_loss(logp, mask, 4).item() == pytest.approx(2.5)
    halves = [sft.sft_loss(logp[i:i + 1], mask[i:i + 1], 4).item() for i in (0, 1)]
    assert sum(halves) == pytest.approx(2.5)  # unequal micro-batches add up to the whole


def test_sft_loss_is_the_stock_loss_on_the_answer_alone(world):
    """What the loop computes equals transformers' own cross-entropy with labels on think and answer (and the stop token) and
    -100 on question, options, image and padding; gradients too. So the question bears no loss."""
    records = world.mixed[:3]
    net = M.load(world.folder)[0].requires_grad_(True)
    banned = M.never_drawn(net)  # out of our softmax, in the stock one's: made too unlikely to count
    hook = net.lm_head.register_forward_hook(lambda module, inputs, out: out.index_fill(-1, banned, -1e4))
    batch = M.encode(world.processor, records)
    tokens, mask = M.encode_completions(world.processor, [rewards.answer_text(r) for r in records])
    loss = sft.sft_loss(M.token_logprobs(net, batch, tokens, mask), mask, int(mask.sum()))
    loss.backward()
    ours = torch.cat([p.grad.flatten() for p in net.parameters()])
    net.zero_grad()

    ids = torch.cat([batch["input_ids"], tokens[:, 0]], 1)
    seen = torch.cat([batch["attention_mask"], mask[:, 0].long()], 1)
    labels = torch.full_like(ids, -100)
    labels[:, batch["input_ids"].shape[1]:][mask[:, 0]] = tokens[:, 0][mask[:, 0]]
    stock = net(input_ids=ids, attention_mask=seen, labels=labels, **images_of(batch),
                mm_token_type_ids=(ids == net.config.image_token_id).int()).loss
    stock.backward()
    hook.remove()
    theirs = torch.cat([p.grad.flatten() for p in net.parameters()])
    assert loss.item() == pytest.approx(stock.item(), rel=1e-5)
    assert theirs.norm() > 0.1 and (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("mode", ["none", "after"])
def test_thinking_modes_change_prompt_and_target(mode, world, tmp_path):
    """--thinking goes with the questions: another instruction, another target, fewer tokens without a thought, and then no
    record needs one. --only keeps what it says."""
    records = data.read_records(world.jsonl, "train", ["task=anatomy", "modality=CT", "modality=mri"], mode)
    assert {r["task"] for r in records} == {"anatomy"} and {r["modality"] for r in records} == {"CT", "MRI"}
    assert rewards.question_text(records[0]).endswith(rewards.INSTRUCTIONS[mode])
    silent = rewards.answer_text(records[0] | {"thinking": "none", "thought": None})
    assert rewards.answer_text(records[0]).startswith(silent) and silent == f"<answer>{records[0]['answer']}</answer>"
    sft.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(tmp_path / "run"),
              "--batch", "4", "--thinking", mode, "--only", "task=anatomy", "--max_steps", "1"])
    tokens = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["tokens"]
    assert tokens < 4 * 12 if mode == "none" else tokens > 4 * 20


def test_targets_are_think_then_answer(world):
    """Y* is the thought, then the letter, then the end of the turn, and nothing else."""
    record = world.records[0]
    tokens, mask = M.encode_completions(world.processor, [rewards.answer_text(record)])
    assert world.processor.tokenizer.decode(tokens[mask]) == (
        f"<think>{record['thought']}</think><answer>{record['answer']}</answer><|im_end|>")


# ---------------------------------------------------------------------------------------------------------- schedule and order

def test_learning_rate_rises_then_falls_to_nothing():
    """Linear over the first 3 % of 1000 steps, the peak at its end, a cosine to 0: half the peak half-way."""
    rates = [sft.learning_rate(step, 1000, 1e-3, 0.03) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-3 / 30) and rates[14] == pytest.approx(0.5e-3) and rates[29] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3) and rates[30] == pytest.approx(1e-3) and rates[30 + 485] == pytest.approx(0.5e-3)
    assert rates[30 + 970 // 4] == pytest.approx(0.5e-3 * (1 + math.cos(math.pi * 242 / 970)))
    assert all(a < b for a, b in zip(rates[:29], rates[1:30], strict=True))
    assert all(a > b for a, b in zip(rates[30:], rates[31:], strict=False)) and 0 < rates[-1] < 1e-8
    assert sft.learning_rate(0, 1, 1e-3, 0.03) == pytest.approx(1e-3)  # a run of one step trains at all


def test_epoch_order_is_a_permutation_of_the_seed_alone():
    """Every question once per epoch; another order for each epoch and seed; the same at every call, whatever was drawn between."""
    a = sft.epoch_order(100, 0, 0)
    torch.rand(7)
    assert sorted(a) == list(range(100)) and a == sft.epoch_order(100, 0, 0)
    assert len({tuple(sft.epoch_order(100, epoch, seed)) for epoch in range(3) for seed in range(3)}) == 9


# ------------------------------------------------------------------------------------------------------------ the command line

PAPER = {  # section 4.1's figures, and design.md's where the paper gives none
    sft: dict(batch=64, epochs=2.0, lr=1e-4, lora=64),
    grpo: dict(batch=64, epochs=1.0, lr=1e-6, G=8, beta=0.04, lora=64, ratio="sft", scale="none", loss_norm="sum", kl="k3",
               eps=0.2, max_new_tokens=512, temperature=1.0, top_p=1.0, mu=1)}


def used(table, *argv):
    return sft.knobs(table, "", argv)


@pytest.mark.parametrize("stage", [sft, grpo], ids=["sft", "grpo"])
def test_the_model_chooses_the_preset(stage, world):
    """No model, or a tiny one: `tiny`. Any other: `paper`, with section 4.1's figures. --preset has the last word."""
    table, name = stage.KNOBS, "Qwen/Qwen2.5-VL-3B-Instruct"
    tiny_lora = {sft: 0, grpo: 16}[stage]
    assert used(table).preset == "tiny" and used(table).lora == tiny_lora
    assert used(table, "--model", world.folder).preset == "tiny"
    real = used(table, "--model", name)
    assert real.preset == "paper" and {k: getattr(real, k) for k in PAPER[stage]} == PAPER[stage]
    assert used(table, "--model", name, "--preset", "tiny").lora == tiny_lora
    assert used(table, "--preset", "paper").lr == PAPER[stage]["lr"]


def test_the_default_model_chooses_the_preset_too(world, tmp_path):
    """grpo.py's model is ROOT/sft where none is named: a large one there is not trained with the tiny one's learning rate."""
    assert used(grpo.KNOBS, "--root", str(tmp_path)).preset == "tiny"  # nothing is there yet
    folder = shutil.copytree(world.folder, tmp_path / "sft")
    args = used(grpo.KNOBS, "--root", str(tmp_path))
    assert (args.preset, args.model, args.out) == ("tiny", str(folder), str(tmp_path / "grpo"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = 2048
    (folder / "config.json").write_text(json.dumps(config))
    assert used(grpo.KNOBS, "--root", str(tmp_path)).preset == "paper"
    assert used(sft.KNOBS, "--root", str(tmp_path)).preset == "tiny"  # it makes its own


@pytest.mark.parametrize("table", [sft.KNOBS, grpo.KNOBS], ids=["sft", "grpo"])
def test_what_is_given_is_used(table):
    """A value on the command line replaces the preset's, also when it is 0: --lora 0 is full fine-tuning, not rank 64."""
    args = used(table, "--preset", "paper", "--lora", "0", "--weight_decay", "0.1", "--warmup", "0", "--save_every", "0",
                "--data", "a.jsonl", "b.jsonl", "--seed", "3")
    assert (args.lora, args.weight_decay, args.warmup, args.save_every, args.seed) == (0, 0.1, 0, 0, 3)
    assert list(args.data) == ["a.jsonl", "b.jsonl"] and args.lr == table["lr"].paper and args.resume is False
    if "beta" in table:
        args = used(table, "--preset", "paper", "--beta", "0", "--weights", "0.8", "0.1", "0.1", "--drop_no_spread")
        assert args.beta == 0 and tuple(args.weights) == (0.8, 0.1, 0.1) and args.drop_no_spread is True
        assert tuple(used(table).weights) == pytest.approx((1 / 3, 1 / 3, 1 / 3)) and used(table).drop_no_spread is True


@pytest.mark.parametrize("table", [sft.KNOBS, grpo.KNOBS], ids=["sft", "grpo"])
def test_a_flag_that_a_preset_has_on_can_be_switched_off(table):
    """--checkpointing is on in the `paper` preset, off in `tiny`; either can be had in both."""
    assert used(table, "--preset", "paper").checkpointing is True
    assert used(table, "--preset", "paper", "--no-checkpointing").checkpointing is False
    assert used(table, "--preset", "tiny", "--checkpointing").checkpointing is True


@pytest.mark.parametrize("stage", [sft, grpo], ids=["sft", "grpo"])
def test_print_shows_every_knob_and_runs_nothing(stage, capsys, tmp_path, monkeypatch):
    """--print writes the knobs as JSON and ends with exit code 0, leaving no file; --help names each with its meaning."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        stage.main(["--print", "--preset", "paper", "--lr", "0.5"])
    shown = json.loads(capsys.readouterr().out)
    assert not caught.value.code and shown["lr"] == 0.5 and shown["preset"] == "paper" and set(stage.KNOBS) <= shown.keys()
    with pytest.raises(SystemExit) as caught:
        stage.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not caught.value.code and all(f"--{name}" in text for name in stage.KNOBS) and "paper 64" in text
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flags, word", [
    ("--lora x", "--lora"), ("--nonsense 1", "nonsense"), ("--preset huge", "huge"), ("--batch 0", "--batch"),
    ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--lora -1", "--lora"), ("--micro_batch -2", "--micro_batch"),
    ("--epochs 0", "--epochs"), ("--max_steps -1", "--max_steps"), ("--data /nowhere.jsonl", "nowhere"),
    ("--model /nowhere", "nowhere")])
def test_flags_that_make_no_sense_are_one_sentence(flags, word, world, tmp_path):
    """Bad values are refused with a sentence that names the flag, before anything is written or an older run moved aside."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(data.DataError) as caught:
        sft.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(out), "--batch", "2",
                  "--max_steps", "1", *flags.split()])
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["metrics.jsonl"]


def test_records_without_thoughts_are_counted_and_left_out(world, tmp_path, monkeypatch, capsys):
    """SFT learns from the records that have a thought, says how many have none, and refuses data in
    which none has one before the first step. Without thoughts asked for, all records serve."""
    records = data.read_records(world.jsonl, "train")
    file = Path(world.jsonl).with_name("thoughtless.jsonl")
    flags = ["--preset", "tiny", "--model", world.folder, "--data", str(file), "--batch", "4",
             "--max_steps", "2"]
    learned, encode = [], M.encode

    def watched(processor, records, device="cpu"):
        learned.extend(r["id"] for r in records)
        return encode(processor, records, device)
    monkeypatch.setattr(M, "encode", watched)

    data.write_records([r | dict(thought=r["thought"] if i < 5 else None)
                        for i, r in enumerate(records)], file)
    sft.main([*flags, "--out", str(tmp_path / "x")])
    assert set(learned) <= {r["id"] for r in records[:5]} and len(learned) == 1 + 8  # the first: its prompt's digest
    told = f"5 training questions have a thought; {len(records) - 5} have none"
    assert told in capsys.readouterr().out

    data.write_records([r | dict(thought=None) for r in records], file)
    with pytest.raises(data.DataError, match=f"none of the {len(records)} training questions"):
        sft.main([*flags, "--out", str(tmp_path / "y")])
    assert not (tmp_path / "y").exists()
    learned.clear()
    sft.main([*flags, "--out", str(tmp_path / "z"), "--thinking", "none"])
    assert len(learned) == 1 + 8 and "have none" not in capsys.readouterr().out


def test_the_base_is_made_of_phantoms_of_its_own():
    """None of its images is one of those drawn to train or test on, and it needs no thoughts of theirs."""
    sft_images, facts, records = sft.base_phantoms(0)
    assert len(sft_images) == len(facts) == sft.BASE_IMAGES
    assert {r["task"] for r in records} == set(data.TASKS) and all(r["thought"] for r in records)
    for i in (0, 1, 2):
        rng = np.random.default_rng([0, i])
        drawn = data.phantom_of_turn(rng, i)[0]
        assert not any(np.array_equal(drawn, x) for x in sft_images[i::len(data.PAIRS)])


def test_a_base_of_another_seed_or_recipe_is_refused(monkeypatch, tmp_path):
    """A base is made once; one that was made otherwise than it would be now is not taken."""
    made = []

    def make(folder, seed):
        made.append(seed)
        os.makedirs(folder)
    monkeypatch.setattr(sft, "make_base", make)
    monkeypatch.setattr(data, "make_phantoms", lambda *args: None)
    args = argparse.Namespace(root=str(tmp_path), seed=3, images=10, thoughts=1, data=[])
    assert sft.prepare_tiny(args, 0)[0] == sft.prepare_tiny(args, 0)[0] and made == [3]
    file = tmp_path / "tiny-base" / "base.json"
    earlier = json.loads(file.read_text())
    del earlier["words"]  # one of before they were compared
    file.write_text(json.dumps(earlier))
    sft.prepare_tiny(args, 0)
    file.write_text("{}")
    with pytest.raises(data.DataError, match="another seed, recipe or prompt"):
        sft.prepare_tiny(args, 0)
    file.write_text(json.dumps(earlier))
    args.seed = 4
    with pytest.raises(data.DataError, match="another seed, recipe or prompt"):
        sft.prepare_tiny(args, 0)
    args.seed = 3
    monkeypatch.setattr(sft, "LETTER_STAGES", sft.LETTER_STAGES[:-1])
    with pytest.raises(data.DataError, match="another seed, recipe or prompt"):
        sft.prepare_tiny(args, 0)


def test_held_out_questions_are_those_of_val_where_there_are_any(world):
    """A run that looks at its progress leaves the test split to eval.py."""
    files = [str(world.jsonl)]
    args = argparse.Namespace(eval_every=1, eval_questions=0, data=files, only=(), thinking="before")
    assert {r["split"] for r in sft.held_out_questions(args, 0, 1)} == {"val"}
    args.data = [str(Path(world.jsonl).with_name("no-val.jsonl"))]
    data.write_records([r for r in world.records if r["split"] != "val"], args.data[0])
    assert {r["split"] for r in sft.held_out_questions(args, 0, 1)} == {"test"}
    args.eval_every = 0
    assert sft.held_out_questions(args, 0, 1) == []


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    """The program itself, from a shell: one line on stderr that starts with "error:", no traceback, exit code 2."""
    done = subprocess.run([sys.executable, ROOT / "sft.py", "--ratio", "sft"], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "--ratio" in done.stderr


# -------------------------------------------------------------------------------------------------------------- a run's folder

def test_an_older_run_is_moved_aside_never_deleted(world, tmp_path, capsys):
    """A second and a third run into the same folder keep the first two, whole, beside it, and say where."""
    out = tmp_path / "sft"
    flags = ["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(out), "--batch", "2",
             "--max_steps", "1"]
    for seed in "012":
        sft.main([*flags, "--seed", seed])
        (out / "notes.txt").write_text(seed)
    runs = sorted(tmp_path.iterdir())
    assert [r.name for r in runs] == ["sft", "sft.1", "sft.2"]
    assert [json.loads((r / "knobs.json").read_text())["seed"] for r in runs] == [2, 0, 1]
    assert [(r / "notes.txt").read_text() for r in runs] == ["2", "0", "1"]
    assert all((r / "model.safetensors").exists() and (r / "state.pt").exists() for r in runs)
    said = capsys.readouterr().out
    assert "sft.1" in said and "sft.2" in said


def test_training_on_from_the_folder_itself(world, tmp_path):
    """--model and --out the same folder: the model is read before its run is moved aside, or the user is told in a sentence
    that fits; either way nothing is lost."""
    out = tmp_path / "sft"
    flags = ["--preset", "tiny", "--data", world.jsonl, "--out", str(out), "--batch", "2", "--max_steps", "1"]
    sft.main(["--model", world.folder, *flags])
    weights = (out / "model.safetensors").read_bytes()
    try:
        sft.main(["--model", str(out), *flags])
    except data.DataError as e:
        assert "no such" not in str(e)
        assert (out / "model.safetensors").read_bytes() == weights
    else:
        assert (tmp_path / "sft.1" / "model.safetensors").read_bytes() == weights


def test_a_resumed_run_may_go_on_longer_but_not_otherwise(world, tmp_path):
    """What the weights depend on is as it was, or the run is refused; how long it goes on, and
    when it saves and is looked at, may change, and how much memory it takes: it may have run out."""
    flags = ["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--batch", "2",
             "--out", str(tmp_path / "run")]
    sft.main([*flags, "--max_steps", "1"])
    for change in (["--lr", "0.5"], ["--seed", "1"], ["--clip", "0.5"], ["--only", "task=anomaly"]):
        name = change[0].removeprefix("--")
        with pytest.raises(data.DataError, match=f"the run to resume had --{name}"):
            sft.main([*flags, "--max_steps", "2", "--resume", *change])
    where = tmp_path / "run" / "state.pt"
    state = torch.load(where, weights_only=True)
    state["knobs"]["micro_batch"] = 32  # a run of a version in which it could not change is no other run
    torch.save(state, where)
    sft.main([*flags, "--max_steps", "1", "--resume"])
    sft.main([*flags, "--max_steps", "2", "--resume", "--save_every", "1", "--eval_every", "2", "--micro_batch", "1",
              "--checkpointing"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert "held_out_accuracy" in json.loads(lines[1])


def test_a_run_is_not_resumed_with_other_words(world, tmp_path, monkeypatch):
    """Another prompt, template or target is another run: what the policy was taught would be asked for in other words. A state
    of before prompts were compared is resumed."""
    flags = ["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--batch", "2", "--out", str(tmp_path / "run")]
    sft.main([*flags, "--max_steps", "1"])
    for part, words in ((rewards.INSTRUCTIONS, "Answer."), (rewards.FORMS, "<think>{thought}</think>.<answer>{answer}</answer>")):
        with monkeypatch.context() as patch:
            patch.setitem(part, "before", words)
            with pytest.raises(data.DataError, match="the run to resume had --prompt"):
                sft.main([*flags, "--max_steps", "2", "--resume"])
    where = tmp_path / "run" / "state.pt"
    state = torch.load(where, weights_only=True)
    state["knobs"].pop("prompt (digest of its words, template and tags)")
    torch.save(state, where)
    sft.main([*flags, "--max_steps", "2", "--resume"])


def test_every_group_of_an_optimiser_is_treated_alike(world, tmp_path, monkeypatch):
    """One that has two, as for a learning rate or weight decay of its own: both are clipped together and have the step's lr."""
    trainable = sft.trainable

    def two(policy, args):
        policy, optimizer = trainable(policy, args)
        trained = [p for p in policy.parameters() if p.requires_grad]
        one, other = trained[::2], trained[1::2]
        optimizers.append(sft.AdamW([dict(params=one), dict(params=other, lr=9.0)], lr=args.lr))
        return policy, optimizers[-1]
    optimizers, flags = [], ["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--batch", "2", "--max_steps", "2"]
    sft.main([*flags, "--out", str(tmp_path / "one")])
    monkeypatch.setattr(sft, "trainable", two)
    monkeypatch.setattr(sft.Run, "after", lambda *_: None)  # what is saved has one group
    sft.main([*flags, "--out", str(tmp_path / "two")])
    lines = [[json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two")]
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    for group in optimizers[0].param_groups:
        assert group["lr"] == pytest.approx(lines[1][-1]["lr"], rel=1e-4)


def test_a_step_learns_and_micro_batches_change_nothing(world, tmp_path):
    """Ten steps lower the loss; the micro-batch's size changes it by rounding alone, although the targets' lengths differ."""
    losses = []
    for micro in ("8", "3"):
        sft.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(tmp_path / micro),
                  "--batch", "8", "--micro_batch", micro, "--max_steps", "10"])
        losses.append([json.loads(x)["loss"] for x in (tmp_path / micro / "metrics.jsonl").read_text().splitlines()])
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][0] == pytest.approx(losses[1][0], abs=2e-6)


# --------------------------------------------------------------------------------------------------------------- the tiny base

def options_of(prompt):
    """A prompt's text -> {letter: option}, read off its lines "A) ..."."""
    return dict(line.split(") ", 1) for line in prompt.replace("<|im_end|>", "").splitlines() if line[1:3] == ") ")


@pytest.mark.parametrize("full", [False, True])
def test_a_lesson_of_letters_asks_for_the_right_letter_and_nothing_else(full, world):
    """Each of a prompt's four completions names another of its options and ends with that option's letter, the only token the
    loss sees; in full prompts, they go on with a record's thought where it concludes."""
    names = np.array(sorted({x for r in world.records for x in r["options"]}))
    rng = np.random.default_rng(0)
    batch, tokens, _, letters = sft.letter_batch(world.processor, names, 5, world.records, full, rng, 12)
    assert tokens.shape[:2] == (12, 4) and letters.sum(-1).eq(1).all() and batch["skip"].max() <= 5
    read = world.processor.tokenizer.decode
    for prompt, mask, group, marked in zip(batch["input_ids"], batch["attention_mask"], tokens, letters, strict=True):
        prompt = read(prompt[mask.bool()])
        options = options_of(prompt)
        assert list(options) == [*"ABCD"] and len(set(options.values())) == 4 and ("<think>" in prompt) == full
        for letter, y, m in zip("ABCD", group, marked, strict=True):
            said = read(y[:int(m.nonzero()) + 1])
            assert read(y[m]) == letter and said.startswith(" " + options[letter])
            assert said.endswith(f"</think><answer>{letter}") or not full


def test_half_of_the_lessons_have_the_options_of_a_record(world):
    """From LETTER_OWN names on; before that, none: a record's options would bring names that are not yet asked."""
    names = np.array(sorted({x for r in world.records for x in r["options"]}))
    rng, asked = np.random.default_rng(0), {tuple(r["options"]) for r in world.records}

    def share(names):
        ids = sft.letter_batch(world.processor, names, 0, world.records, False, rng, 200)[0]["input_ids"]
        texts = world.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return sum(tuple(options_of(text).values()) in asked for text in texts) / 200
    assert share(names[:sft.LETTER_OWN - 1]) < 0.05
    assert 0.4 < share(names) < 0.6


def test_lessons_of_wording_conclude_on_every_option_behind_another_image(world):
    """Four gold completions a record, one for each option, well formed and consistent, so that no image tells the answer."""
    images = [M.image_patches(world.processor, r) for r in world.mixed[:2]]
    batch, tokens, mask, letters = sft.wording_batch(world.processor, world.records, images, np.random.default_rng(0), 6)
    texts = M.decode(world.processor, tokens, mask)
    read = world.processor.tokenizer.decode
    judge = make_judge("lexical")
    for prompt, group, y, m in zip(batch["input_ids"], texts, tokens, letters, strict=True):
        options = [*options_of(read(prompt)).values()]
        parsed = [rewards.parse_completion(text) for text in group]
        assert [answer for _, answer in parsed] == [read(a[b]) for a, b in zip(y, m, strict=True)] == [*"ABCD"]
        assert judge([thought for thought, _ in parsed], [dict(question="", options=options)] * 4) == [*"ABCD"]
