"""Twenty kills of real runs, each resumed: the same bits as a run that nothing happened to.

    python tests/faults.py             # sft.py and grpo.py, one process and two; about ten minutes on two cores
    python tests/faults.py sft 1       # those of one process of sft.py alone

A run of five steps is killed in its third, or while it saves behind it: SIGKILL (as when memory runs out or a machine goes),
SIGTERM (Slurm) or SIGINT (Ctrl-C). With two processes it is the second that is killed in a step, and the first while it saves.
Then `--resume`. Compared are weights, AdamW's moments, metrics but for the clock, and completions."""
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import safetensors.torch
import torch

import data
import grpo
import model as M
import rewards
import sft

STAGES = dict(sft=sft, grpo=grpo)
FLAGS = dict(
    sft=("--batch", "2", "--micro_batch", "1"),
    grpo=("--batch", "8", "--G", "4", "--max_new_tokens", "6", "--lora", "2", "--no-drop_no_spread", "--show_every", "1"))
STEPS = ("--max_steps", "5", "--save_every", "1")
KILLS = [  # where, at the how-manieth call, signal
    ("forward", 3, signal.SIGKILL), ("update", 3, signal.SIGKILL), ("state", 3, signal.SIGKILL),
    ("checkpoint", 2 + 2 * 8 + 4, signal.SIGKILL), ("forward", 3, signal.SIGTERM), ("update", 3, signal.SIGINT)]
KILLS_OF = dict(sft=KILLS[:4] + KILLS[5:], grpo=KILLS[:3] + KILLS[4:])  # five each


def toy_score(texts, items, judge):
    """Rewards that differ even for a random model, from the text alone; gold answers score 1."""
    rows = []
    for text, item in zip(texts, items, strict=True):
        gold = text.startswith(("<think>", "<answer>"))
        acc, con = gold or len(text) % 2, gold or sum(map(ord, text)) % 3 == 0
        rows.append(dict(id=item["id"], options=item["options"], completion=text, thought=text, verdict=item["answer"],
                         fmt=float(gold), acc=float(acc), con=float(con)))
    return rows


def plan(stage, place, at, number):
    """Have this process send itself the signal when it comes to a place for the at-th time: into a forward pass or a rollout,
    between gradient and step, when half of state.pt is written, between two files of the checkpoint. -> a function that takes
    it back."""
    forward = "sample" if stage == "grpo" else "token_logprobs"
    owner, name = {"forward": (M, forward), "update": (M, "sum_gradients"),
                   "state": (torch, "save"), "checkpoint": (os, "replace")}[place]
    if place == "forward" and stage == "sft" and "WORLD_SIZE" not in os.environ:
        at = 2 * at - 1  # one process has two micro-batches a step
    real, calls = getattr(owner, name), []

    def hooked(*args, **kwargs):
        if place == "state" and not hasattr(args[1], "name"):  # no file: a tensor is pickled, to be sent to another process
            return real(*args, **kwargs)
        calls.append(args)
        if len(calls) == at:
            if place == "state":
                args[1].write(b"half" * 1000)
                args[1].flush()
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)
    setattr(owner, name, hooked)
    return lambda: setattr(owner, name, real)


def make_world(root):
    """Phantoms and a tiny random base -> the flags that name them."""
    jsonl = data.make_phantoms(str(root / "phantoms"), 0, 40)
    records = data.read_records(jsonl)
    texts = [f"{rewards.question_text(r)} {rewards.answer_text(r)}" for r in records]
    net, processor = sft.build_tiny(texts, {x for r in records for x in r["options"]}, image_size=data.SIZE)
    M.save(net, processor, root / "tiny")
    return "--preset", "tiny", "--model", str(root / "tiny"), "--data", jsonl


def launch(processes, stage, *flags, kill=None):
    """A run by itself, as a user starts it -> exit code, what it said."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", FAULT=json.dumps(kill))
    done = subprocess.run([*start, __file__, "worker", stage, *flags], env=env, text=True, capture_output=True)
    return done.returncode, done.stderr


def worker(stage, *flags):
    """The run in its process: the stage's main with toy rewards, and the kill that is planned for this rank."""
    rewards.score = toy_score
    torch.set_num_threads(1)
    kill = json.loads(os.environ["FAULT"])
    saving = kill and kill[0] in ("state", "checkpoint")
    if kill and int(os.environ.get("RANK", 0)) == (0 if saving else int(os.environ.get("WORLD_SIZE", 1)) - 1):
        plan(stage, *kill)
    M.run(lambda: STAGES[stage].main(list(flags)))


def left_behind(out):
    """All that a run leaves, but for the clock and the memory: what a resumed run must have too."""
    state = torch.load(out / "state.pt", weights_only=True)
    moments = {f"{k} {name}": x for k, of in state["optimizer"]["state"].items() for name, x in of.items()}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figures = [{k: v for k, v in line.items() if "second" not in k and "peak" not in k} for line in lines]
    shown = (out / "completions.jsonl").read_text(encoding="utf-8") if (out / "completions.jsonl").exists() else ""
    return safetensors.torch.load_file(out / "model.safetensors"), state["trained"], moments, (figures, shown)


def same(a, b):
    """Whether two runs left the same bits."""
    tensors = all(x.keys() == y.keys() and all(torch.equal(v, y[k]) for k, v in x.items())
                  for x, y in zip(a[:3], b[:3], strict=True))
    return tensors and a[3] == b[3]


def main(only_stage=None, only_processes=None):
    good = n = 0
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        for stage in [only_stage] if only_stage else STAGES:
            for processes in [int(only_processes)] if only_processes else (1, 2):
                out = Path(folder, f"{stage}-{processes}")
                flags = (*world, *FLAGS[stage], *STEPS, "--out")
                code, said = launch(processes, stage, *flags, str(out))
                assert code == 0, said
                for place, at, number in KILLS_OF[stage]:
                    n, killed = n + 1, Path(folder, f"{n}")
                    code, said = launch(processes, stage, *flags, str(killed), kill=(place, at, int(number)))
                    steps = (killed / "metrics.jsonl").read_text(encoding="utf-8").count("\n")
                    again, said_again = launch(processes, stage, *flags, str(killed), "--resume")
                    whole = steps < 5 and again == 0 and same(left_behind(out), left_behind(killed))
                    good += whole
                    print(f"{n:2} {'same bits' if whole else 'DIFFERS  '}  {stage}, {processes} process(es), {number.name} in "
                          f"{place} {at}: exit {code} after {steps} steps, resumed with exit {again}", flush=True)
                    if not whole:
                        print(said[-1500:], said_again[-1500:])
    print(f"{good} of {n}")
    return good != n


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        sys.exit(main(*sys.argv[1:]))
