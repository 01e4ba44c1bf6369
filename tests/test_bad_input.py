"""Bad input at each program's door: one sentence that names what is wrong, exit code 2, no traceback, nothing lost."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

import data
import eval as evaluation
import grpo
import sft

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {"sft": sft.main, "grpo": grpo.main, "eval": evaluation.main}


def run(program, *flags):
    """What the command line does: main() under data.cli; -> exit code."""
    with pytest.raises(SystemExit) as stop:
        data.cli(lambda: PROGRAMS[program]([str(f) for f in flags]))
    return stop.value.code


def flags_for(program, world, jsonl, out, model=None):
    if program == "eval":
        return ["--ckpt", str(model or world.folder), "--data", str(jsonl), "--out", str(out)]
    flags = ["--model", model or world.folder, "--data", jsonl, "--out", out, "--batch", 4, "--max_steps", 1,
             *(["--G", 2, "--max_new_tokens", 2] if program == "grpo" else [])]
    return [str(flag) for flag in flags]


def one_record(world, folder, **change):
    """A file of four train and four test records on one image, each with the change; None deletes a key."""
    folder.mkdir(exist_ok=True)
    base = world.records[0] | dict(image="image.png")
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(folder / "image.png")
    lines = []
    for i in range(8):
        record = base | dict(id=f"r{i}", split="train" if i < 4 else "test", group=f"g{i}") | change
        lines.append(json.dumps({k: v for k, v in record.items() if k != "path" and v is not ...}))
    (folder / "my.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "my.jsonl"


def check(code, capsys, *words):
    said = capsys.readouterr().err
    err = [line for line in said.splitlines() if line.startswith("error:")]
    assert code == 2 and len(err) == 1, repr(said)
    for word in words:
        assert word in err[0], (word, err[0])


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("change, words", [
    (dict(answer="E"), ("my.jsonl", "line 1", "answer")),
    (dict(options=["CT", "ct", "MRI", "OCT"]), ("line 1", "same")),
    (dict(options=["CT"], answer="A"), ("line 1", "option")),
    (dict(question=...), ("line 1", "question", "missing")),
    (dict(image="../image.png"), ("line 1", "../image.png", "folder")),
    (dict(image="/etc/passwd"), ("line 1", "/etc/passwd", "folder")),
    (dict(image="gone.png"), ("gone.png", "missing")),
    (dict(question="What is <|image_pad|>?"), ("<|image_pad|>",)),
])
def test_records(program, change, words, world, tmp_path, capsys):
    """Whatever is wrong with a record is told with its file and line, or its id, by every program alike."""
    jsonl = one_record(world, tmp_path / "d", **change)
    check(run(program, *flags_for(program, world, jsonl, tmp_path / "out")), capsys, *words)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("spoil, word", [
    (lambda f: f.write_bytes(f.read_bytes()[:60]), "truncated"),
    (lambda f: f.write_text("not an image"), "not an image"),
    (lambda f: f.write_bytes(b""), "image"),
    (lambda f: f.write_bytes(b"P5 40000 40000 255\n"), "pixels"),
    (lambda f: f.write_bytes(b"P5 0 10 255\n"), "image"),
], ids=["truncated", "text", "empty", "huge", "no pixels"])
def test_images(program, spoil, word, world, tmp_path, capsys):
    """A damaged, false, empty, or bomb-like image is one sentence with the record's id and the file."""
    jsonl = one_record(world, tmp_path / "d")
    spoil(tmp_path / "d" / "image.png")
    check(run(program, *flags_for(program, world, jsonl, tmp_path / "out")), capsys, word, "image.png", "record 'r")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("text, words", [("", ("no record",)), ('{"id": "a",\n', ("line 1", "JSON")),
                                         (None, ("No such file",))])
def test_files(program, text, words, world, tmp_path, capsys):
    """An empty file, broken JSON, no file at all."""
    jsonl = tmp_path / "my.jsonl"
    if text is not None:
        jsonl.write_text(text)
    check(run(program, *flags_for(program, world, jsonl, tmp_path / "out")), capsys, "my.jsonl", *words)


@pytest.mark.parametrize("program", PROGRAMS)
def test_checkpoints(program, world, tmp_path, capsys):
    """No such checkpoint, and one of another architecture."""
    jsonl = one_record(world, tmp_path / "d")
    check(run(program, *flags_for(program, world, jsonl, tmp_path / "out", tmp_path / "nowhere")), capsys, "nowhere")
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=10)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    check(run(program, *flags_for(program, world, jsonl, tmp_path / "out", tmp_path / "gpt2")), capsys, "gpt2", "architecture")


@pytest.mark.parametrize("program", PROGRAMS)
def test_out_cannot_be_written(program, world, tmp_path, capsys):
    """--out below a file, where no folder can be made."""
    jsonl = one_record(world, tmp_path / "d")
    (tmp_path / "file").write_text("a file")
    check(run(program, *flags_for(program, world, jsonl, tmp_path / "file" / "out")), capsys, "file")


@pytest.mark.parametrize("program, flags, word", [
    ("grpo", ["--G", 1], "--G 1"), ("grpo", ["--kl", "k4"], "k4"), ("grpo", ["--batch", 5], "--batch 5"),
    ("grpo", ["--judge", "oracle"], "oracle"), ("sft", ["--lr", "fast"], "fast"), ("sft", ["--no_such", 1], "no_such"),
    ("eval", ["--split", "all"], "all")])
def test_flags(program, flags, word, world, tmp_path, capsys):
    """An unknown flag, an unknown value, a group of one."""
    jsonl = one_record(world, tmp_path / "d")
    check(run(program, *flags_for(program, world, jsonl, tmp_path / "out"), *flags), capsys, word)


def test_a_disk_that_is_full(world, tmp_path):
    """A checkpoint that cannot be written whole (here: the system allows files of 100 kB) ends the run with one sentence; the
    folder holds no half-written weights."""
    jsonl = one_record(world, tmp_path / "d")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = subprocess.run([sys.executable, ROOT / "sft.py", *flags_for("sft", world, jsonl, tmp_path / "out")],
                          preexec_fn=limit, capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("program", ["sft", "grpo"])
def test_a_folder_that_is_no_run_is_not_written_into(program, world, tmp_path, capsys):
    """A user's own checkpoint given as --out stays as it is; a run's folder is moved aside, also one without metrics.jsonl."""
    jsonl, mine = one_record(world, tmp_path / "d"), tmp_path / "mine"
    shutil.copytree(world.folder, mine)
    before = {path: path.read_bytes() for path in mine.iterdir()}
    check(run(program, *flags_for(program, world, jsonl, mine)), capsys, "--out", "mine", "not of a run")
    assert {path: path.read_bytes() for path in mine.iterdir()} == before
    (mine / "knobs.json").write_text("{}")
    PROGRAMS[program](flags_for(program, world, jsonl, mine))
    assert (tmp_path / "mine.1" / "knobs.json").read_text() == "{}" and (mine / "metrics.jsonl").exists()
    assert {path.name for path in before} <= {path.name for path in (tmp_path / "mine.1").iterdir()}
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged" / "slurm-1.out").write_text("a log")  # harms nobody
    PROGRAMS[program](flags_for(program, world, jsonl, tmp_path / "logged"))
    assert (tmp_path / "logged" / "slurm-1.out").read_text() == "a log" and (tmp_path / "logged" / "config.json").exists()


def test_a_report_that_is_not_ours_is_not_written_over(world, tmp_path, capsys):
    """eval.py into a folder with a report or results of another origin: one sentence before anything is sampled."""
    jsonl, out = one_record(world, tmp_path / "d"), tmp_path / "notes"
    out.mkdir()
    for name, text in (("report.md", "my own notes"), ("eval.html", "mine"), ("results.json", '{"mine": 1}')):
        (out / name).write_text(text)
        check(run("eval", *flags_for("eval", world, jsonl, out)), capsys, name, "another --out")
        assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, text)]
        (out / name).unlink()


def test_a_checkpoint_without_its_tokenizers_config(world, tmp_path, capsys):
    """transformers would guess the token that ends a turn: told, and so are a config that is cut off and a folder's typo, which
    is not looked for on the hub."""
    jsonl, half = one_record(world, tmp_path / "d"), tmp_path / "half"
    shutil.copytree(world.folder, half)
    (half / "tokenizer_config.json").unlink()
    check(run("eval", *flags_for("eval", world, jsonl, tmp_path / "out", half)), capsys, "half", "tokenizer_config.json is missing")
    (half / "config.json").write_text('{"model_type": "qwen2')
    check(run("eval", *flags_for("eval", world, jsonl, tmp_path / "out", half)), capsys, "half", "a broken one")
    check(run("eval", *flags_for("eval", world, jsonl, tmp_path / "out", tmp_path / "hlaf")), capsys, "hlaf", "no such folder")


def test_own_records_in_a_json_list(world, tmp_path, capsys):
    """Records of this project in a .json file are told for what they are, and not for broken questions of another's."""
    jsonl = one_record(world, tmp_path / "d")
    lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
    jsonl.with_suffix(".json").write_text(json.dumps(lines))
    with pytest.raises(data.DataError, match="no usable record"):
        data.read_records(jsonl.with_suffix(".json"))
    assert "8 of 8 questions can't be used, as question 1: is a record as this project writes them" in capsys.readouterr().err


def test_grpo_tells_what_it_trains_on(world, tmp_path, capsys):
    """The questions and their file; and where the model was taught another way to think than it is asked for."""
    jsonl, taught = one_record(world, tmp_path / "d"), tmp_path / "taught"
    shutil.copytree(world.folder, taught)
    (taught / "knobs.json").write_text('{"thinking": "none"}')
    grpo.main(flags_for("grpo", world, jsonl, tmp_path / "out", taught))
    said = capsys.readouterr().out
    assert f"4 training questions of {jsonl}" in said and "after 1 steps" in said
    assert f"warning: {taught} was trained with --thinking none, and is asked with --thinking before here" in said
    check(run("grpo", "--model", taught, "--root", tmp_path / "no"), capsys, "no --data", "phantoms.jsonl")
    check(run("grpo", "--model", taught, "--root", tmp_path / "no", "--preset", "paper"), capsys, "no --data")


def test_what_is_likely_to_spoil_a_run_is_told(world, tmp_path, capsys):
    """Each in a line at the start: LoRA at full fine-tuning's learning rate, gold answers that would be cut off, no thoughts to
    try the lexical F on, few steps of SFT. Not where it isn't so."""
    gold, none = one_record(world, tmp_path / "gold"), one_record(world, tmp_path / "none", thought=None)
    low, long, blind, few = "warning: --lr 1e-06 moves LoRA", "4 of 4 gold answers are longer", "no question has a thought", "4 steps of"

    def told(program, jsonl, *flags):
        flags = [*flags_for(program, world, jsonl, tmp_path / "out"), *flags]
        (grpo if program == "grpo" else sft).main(flags)
        said = capsys.readouterr().out
        assert said.count("warning:") == sum(x in said for x in (low, long, blind, few)), said
        return {x for x in (low, long, blind, few) if x in said}
    assert told("grpo", gold, "--lora", "2", "--lr", "1e-6") == {low, long}
    assert told("grpo", gold, "--lora", "0", "--lr", "1e-6", "--max_new_tokens", "90") == set()
    assert told("grpo", none) == {blind}
    assert told("grpo", none, "--weights", "1", "1", "0") == told("grpo", none, "--judge", "hf:reference") == set()
    assert told("sft", gold, "--epochs", "4") == {few} and told("sft", gold, "--epochs", "100") == set()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_weights_can_be_read_by_those_who_can_read_the_rest(world, tmp_path):
    """safetensors writes them for their owner alone."""
    jsonl = one_record(world, tmp_path / "d")
    grpo.main(flags_for("grpo", world, jsonl, tmp_path / "out"))
    modes = {path.stat().st_mode for path in (tmp_path / "out").rglob("*.safetensors")}
    assert modes == {(tmp_path / "out" / "config.json").stat().st_mode}
