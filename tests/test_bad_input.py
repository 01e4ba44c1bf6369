"""Bad input at each program's door: one sentence that names what is wrong, exit code 2, no traceback, nothing lost."""
import json
import os
import resource
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
        return ["--ckpt", model or world.folder, "--data", jsonl, "--out", out]
    return ["--model", model or world.folder, "--data", jsonl, "--out", out, "--batch", 4, "--max_steps", 1,
            *(["--G", 2, "--max_new_tokens", 2] if program == "grpo" else [])]


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
    done = subprocess.run([sys.executable, ROOT / "sft.py", *map(str, flags_for("sft", world, jsonl, tmp_path / "out"))],
                          preexec_fn=limit, capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | dict(OMP_NUM_THREADS="1"))
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
