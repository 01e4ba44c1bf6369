"""Stage 1, Cognitive Injection: supervised fine-tuning on think-then-answer targets, Eq. (1).

Without --model it starts from nothing: it draws the phantoms (data.py), trains a tiny base model
on other phantoms (`make_base`, kept in ROOT/tiny-base) and fine-tunes that.

    python sft.py                                  # out/phantoms, out/tiny-base, out/sft
    python sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data medad38k/medad38k.jsonl
    torchrun --nproc_per_node=4 sft.py --model ... # the same global batch on four devices
    python sft.py --print                          # every knob as it would be used

Left out on purpose: early stopping, packing of several questions into one row.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import argparse
import contextlib
import functools
import json
import math
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import data
import eval as evaluation
import model as M
import rewards
from judge import make_judge

SKIPPED = 10  # steps in a row without a finite loss and gradient, after which a run ends
FEW_STEPS = 100  # of SFT, below which there is a warning: the default on phantoms makes 280
# 0.98, not 0.999, since runs here have some hundred steps. foreach=True, the default on CUDA, needs
# as much memory again as the weights; the CPU's is False.
AdamW = functools.partial(torch.optim.AdamW, betas=(0.9, 0.98), weight_decay=0.0, foreach=False)


class Knob(NamedTuple):
    """A flag of the command line."""
    type: type  # bool: --no-.. switches it off
    tiny: object  # its default in the tiny preset; a tuple for a flag of several values
    paper: object  # and in the paper preset
    meaning: str  # and unit
    choices: tuple = None
    positive: bool = False  # a number above 0, else of at least 0
    most: float = 10**12
    may_change: bool = False  # whether a resumed run may have another value


# The knobs of both stages. `paper`: the values of the paper's section 4.1, where it gives them.
SHARED = dict(
    data=Knob(str, (), (), "files of records (default: ROOT/phantoms, for the tiny model)",
              may_change=True),
    only=Knob(str, (), (), "use records with KEY=VALUE alone, say modality=CT task=anatomy"),
    thinking=Knob(str, "before", "before", "a thought before or after the answer, or none (Med-R1)",
                  tuple(rewards.INSTRUCTIONS)),
    root=Knob(str, "out", "out", "folder under which everything is written", may_change=True),
    seed=Knob(int, 0, 0, "of phantoms, base, LoRA, order and sampling", most=2**32 - 1),
    weight_decay=Knob(float, 0.0, 0.0, "AdamW's decoupled weight decay"),
    clip=Knob(float, 1.0, 1.0, "gradient norm above which the gradient is scaled down"),
    checkpointing=Knob(bool, False, True, "less memory, more time: layers are computed twice",
                       may_change=True),
    max_pixels=Knob(int, M.MAX_PIXELS, M.MAX_PIXELS, "pixels above which an image is shrunk; "
                    "a checkpoint keeps the lowest it was trained with", positive=True),
    max_steps=Knob(int, 0, 0, "optimiser step to stop at, 0 = the last; the learning rate is that "
                   "of the whole run", may_change=True),
    eval_every=Knob(int, 0, 0, "optimiser steps between evaluations on held-out questions, "
                    "0 = none; nothing is selected by them", may_change=True),
    eval_questions=Knob(int, 200, 200, "held-out questions per evaluation, 0 = all",
                        may_change=True),
    resume=Knob(bool, False, False, "go on from the last checkpoint in --out", may_change=True))
KNOBS = dict(
    model=Knob(str, None, None, "folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL "
               "(default: ROOT/tiny-base, made here)", may_change=True),
    out=Knob(str, "ROOT/sft", "ROOT/sft", "folder of this run", may_change=True),
    images=Knob(int, 2000, 2000, "phantoms to draw, 70 %% of them to train on"),
    thoughts=Knob(int, 60, 60, "train images that have chains of thought, others answers alone"),
    epochs=Knob(float, 40.0, 2.0, "passes over the questions that have a thought; in each, a last "
                "batch that isn't full is left out, unless it is the only one", positive=True),
    batch=Knob(int, 32, 64, "questions per optimiser step over all processes", positive=True),
    micro_batch=Knob(int, 32, 8, "questions per forward pass: for memory alone", positive=True,
                     may_change=True),
    lr=Knob(float, 1e-3, 1e-4, "peak learning rate of AdamW", positive=True),
    warmup=Knob(float, 0.03, 0.03, "share of the steps in which lr rises; a cosine to 0 follows",
                most=1),
    lora=Knob(int, 0, 64, "rank of LoRA on the language model; 0 trains every parameter"),
    save_every=Knob(int, 0, 200, "steps between checkpoints, 0: one at the end", may_change=True),
    **SHARED)


def knobs(table, doc, argv=None):
    """The command line of a stage -> Namespace: each knob's value, the preset, and `fixed`, the
    values that must be the same when the run is resumed. DataError for bad values."""
    parser = data.Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, knob in table.items():
        kind = dict(type=knob.type, choices=knob.choices)
        if knob.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(knob.tiny, tuple):
            kind["nargs"] = len(knob.tiny) or "+"  # as many as the default has; (): one or more
        default = "none" if knob.tiny in ((), None) else knob.tiny
        if knob.tiny != knob.paper:
            default = f"tiny {knob.tiny}, paper {knob.paper}"
        parser.add_argument(f"--{name}", help=f"{knob.meaning} [{default}]", **kind)
    parser.add_argument("--preset", choices=["tiny", "paper"],
                        help="which defaults (tiny for a tiny model or without one, else paper)")
    parser.add_argument("--print", action="store_true",
                        help="print the knobs and stop (tests/memory.py: the memory they need)")
    args = parser.parse_args(argv)
    given = args.model
    root = table["root"].tiny if args.root is None else args.root
    for name in ("model", "out"):  # ROOT/sft is a folder under it
        if getattr(args, name) is None and table[name].tiny:
            setattr(args, name, table[name].tiny.replace("ROOT", root, 1))
    if args.preset is None:
        none_yet = given is None and not os.path.exists(args.model or "")
        args.preset = "tiny" if none_yet or M.is_tiny(args.model) else "paper"
    for name, knob in table.items():
        if getattr(args, name) is None:
            setattr(args, name, getattr(knob, args.preset))
        value = getattr(args, name)
        values = value if isinstance(value, list | tuple) else [value]
        for x in values:
            if knob.type is str:
                data.expect(x != "", f"--{name} '': expected a name, or leave the flag out")
            else:
                least = "above" if knob.positive else "of at least"
                data.expect(0 <= x <= knob.most and (x > 0 or not knob.positive),
                            f"--{name} {x}: expected a number {least} 0, at most {knob.most}")
    if args.print:
        print(json.dumps(vars(args), indent=2))
        raise SystemExit(0)
    args.fixed = {name: getattr(args, name) for name in table if not table[name].may_change}
    return args

# ---- a run in its folder, for both stages --------------------------------------------------------

RUN_FILES = "knobs.json", "metrics.jsonl"  # by one of which a run's folder is known
CHECKPOINT_FILES = "config.json", "*.safetensors", "state.pt"


def holds(folder, patterns):
    return any(any(Path(folder).glob(pattern)) for pattern in patterns)


class Run(contextlib.ExitStack):
    """A run in its folder, --out, locked while the run is at work: opened or resumed, and saved now
    and then, at its end, and where it ends early by an error, Ctrl-C or SIGTERM."""
    skipped = 0  # steps in a row that were not finite
    told = None  # the signal that asked this process to stop
    agreed = False  # whether all processes end early at the same step

    def open(self, args, policy, processor, optimizer, rank, keep_adapter=False):
        """Resume, or move an earlier run aside; heed signals -> the number of steps done."""
        self.args, self.policy, self.processor, self.optimizer = args, policy, processor, optimizer
        self.rank, self.keep_adapter, self.out = rank, keep_adapter, Path(args.out)
        self.trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        if rank == 0:
            self.enter_context(data.locked(self.out))
        # Optimiser steps that the policy has had, None while one or a save is under way; and those
        # that the last checkpoint has.
        self.done = self.saved = 0
        logs = self.resume() if args.resume else {}
        seen = M.gather([(self.done, args.fixed)])
        data.expect(seen.count(seen[0]) == len(seen),
                    f"{self.out}: the processes see different models, questions or checkpoints")
        if rank == 0:
            if not args.resume and holds(self.out, RUN_FILES):
                print(f"{self.out} held an earlier run: moved to {data.move_aside(self.out)}")
            self.out.mkdir(parents=True, exist_ok=True)
            for path, text in logs.items():
                data.write_text(path, text)
            data.write_text(self.out / "knobs.json", json.dumps(vars(args), indent=2))
        for number in (signal.SIGINT, signal.SIGTERM):
            earlier = signal.signal(number, self.stop)
            self.callback(signal.signal, number, earlier)  # put back when the run is over
        self.push(self.end)  # called first then, with the error that ends the run, or None
        return self.done

    def resume(self):
        """Put back what --out's state.pt holds -> {log file: its lines up to that step}. This run
        writes the later ones again, and a kill may have cut the last one short."""
        where, logs = self.out / "state.pt", {}  # where: what is being read, for the error
        try:
            state = torch.load(where, weights_only=True, map_location="cpu", mmap=True)
            for name, value in state["knobs"].items():
                given = self.args.fixed.get(name, getattr(self.args, name, None))
                data.expect(json.dumps(given) == json.dumps(value),  # tuples are lists there
                            f"{self.out}: the run to resume had --{name} {value}, not {given}")
            data.expect(state["trained"].keys() == self.trained.keys(),
                        f"{where}: the state of another network")
            self.policy.load_state_dict(state["trained"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            if dist.is_initialized():
                self.optimizer.state.clear()  # a second copy, which nothing reads
            self.done = self.saved = int(state["step"])
            for path in (self.out / "metrics.jsonl", self.out / "completions.jsonl"):
                if self.rank > 0 or not path.exists():
                    continue  # the first process alone writes them
                kept, text = [], path.read_text(encoding="utf-8", errors="replace")
                for k, line in enumerate(text.split("\n")[:-1], 1):
                    where = f"{path}, line {k}"
                    if json.loads(line)["step"] <= self.done:
                        kept.append(f"{line}\n")
                logs[path] = "".join(kept)
        except data.DataError:
            raise
        except Exception as e:  # torch raises anything on what it hasn't written
            raise data.DataError(f"{where}: missing, or not of a run that can be resumed "
                                 f"({type(e).__name__})") from e
        return logs

    def stop(self, number, frame):
        """What a signal does: the run stops after its step. Another Ctrl-C stops it at once."""
        self.told = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.write(2, b"\nstopping when this step is done; Ctrl-C: at once\n")  # print may be at work

    def step(self, loss, lr, learn=True):
        """An optimiser step on the sums of all processes' gradients and losses, unless these are
        not finite (`skipped`) or there is nothing to learn from -> its figures."""
        parameters = list(self.trained.values())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = M.sum_over_ranks(loss)  # first: by gloo, which tells at once if a process has ended
        M.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.clip).item()
        finite = math.isfinite(loss + norm)
        if not finite:
            self.skipped += 1
        elif learn:
            self.skipped, self.done = 0, None
            with M.peers():  # the sharded optimiser sends parameters round
                self.optimizer.step()
        self.optimizer.zero_grad()
        return dict(loss=loss, lr=lr, grad_norm=norm, skipped=int(not finite))

    def after(self, end, due, why=None):
        """After every step: save at the end or if it is due; then end early for `why`, or if a
        process was told to stop. After a skipped step no save is due: the weights may be what made
        it not finite."""
        ended = self.done >= end
        if ended or (due and not self.skipped):
            self.save()
        told = M.gather([self.told])
        if self.skipped >= SKIPPED:
            why = M.NotFinite(f"loss or gradient was not finite in {self.skipped} steps in a row")
        elif signal.SIGINT in told:
            why = KeyboardInterrupt()
        elif signal.SIGTERM in told:
            why = SystemExit(0)
        if why and not ended:
            self.agreed = True
            raise why

    def save(self):
        """Write state and checkpoint, called by all processes; NotFinite where a weight isn't
        finite. There is no random state: order and sampling are functions of seed and step."""
        done, self.done = self.done, None  # if this fails, `end` does not try it again
        if not M.all_finite(self.trained.values()):
            raise M.NotFinite("the weights are no longer finite")
        moments = whole_state(self.optimizer)
        if self.rank == 0:
            state = dict(trained=self.trained, optimizer=moments, step=done, knobs=self.args.fixed)
            path = self.out / "state.pt"
            try:  # given a name, torch hides that the disk is full
                with data.written_beside(path) as beside, open(beside, "wb") as f:
                    torch.save(state, f)
            except RuntimeError as e:  # torch's own; the OSError in its context says why
                raise data.DataError(f"{path} can't be written: {e.__context__ or e}") from e
            with data.naming(self.out):
                M.save(self.policy, self.processor, self.out, keep_adapter=self.keep_adapter)
        self.done = self.saved = done

    def end(self, kind, error, trace):
        """Where the run ends early, save what is done. But weights that are not finite replace no
        others, and a process that fails alone can't save: of the optimiser's state it has only its
        share."""
        if error is None:
            if self.rank == 0:
                print(f"{self.out}: the checkpoint after {self.saved} steps")
            return
        spoilt = self.saved and isinstance(error, M.NotFinite)
        alone = dist.is_initialized() and not self.agreed
        if not spoilt and not alone and self.done not in (None, self.saved):
            self.save()
        if self.saved and self.rank == 0:
            tqdm.write(f"{self.out}: saved after step {self.saved}, --resume goes on",
                       file=sys.stderr)
        if self.agreed:
            M.wait_for_all()  # the other processes wait until it is saved
            M.close_devices()


def whole_state(optimizer):
    """The optimiser's state_dict(), of several processes on the first alone. (The sharded one's own
    consolidate_state_dict, 13 MB per second, takes an hour for a 7B model.)"""
    if not dist.is_initialized():
        return optimizer.state_dict()
    own = tree_map_only(torch.Tensor, torch.Tensor.cpu, optimizer.optim.state_dict())
    shards = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    with M.peers():
        dist.gather_object(own, shards)
    if not shards:
        return None
    optimizer._all_state_dicts = shards
    whole = optimizer.state_dict()
    optimizer._all_state_dicts = []  # not kept in memory until the next time
    return whole


def log(folder, **figures):
    """Append one line to metrics.jsonl."""
    for name, value in figures.items():
        if isinstance(value, float):  # digits, not places: lr may be 1e-7. JSON has no nan
            figures[name] = float(f"{value:.6g}") if math.isfinite(value) else None
    path = os.path.join(folder, "metrics.jsonl")
    with data.naming(path), open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(figures) + "\n")


def show(folder, step, rows, R):
    """Append completions to completions.jsonl, for eyes: a line for each, its row (rewards.score)
    and its reward. R (N, G)."""
    path = os.path.join(folder, "completions.jsonl")
    with data.naming(path), open(path, "a", encoding="utf-8") as f:
        for row, reward in zip(rows, R.flatten().tolist(), strict=False):
            line = evaluation.without_nan(dict(step=step, **row, reward=reward))
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


class Clock:
    """Seconds and peak memory of the parts of a step."""

    def __init__(self, device):
        self.device, self.figures, self.last = device, {}, time.perf_counter()
        M.peak_memory(device)  # from here on

    def tick(self, part):
        """Charge the time since the last tick to `part`, when the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.figures[f"seconds_{part}"] = time.perf_counter() - self.last
        self.figures[f"peak_mb_{part}"] = round(M.peak_memory(self.device))
        self.last = time.perf_counter()

    def wait(self):
        """Wait for the slowest process, and record the mean of all processes' waits."""
        self.figures["seconds_waiting"] = M.wait_for_all()
        self.last = time.perf_counter()


def policy_of(args, records, device, rank, world):
    """--model, ready to be trained -> policy, processor, AdamW. Checks the records' images and
    questions, and puts digests of records, prompt and weights into args.fixed, to compare on
    --resume."""
    data.expect(os.path.realpath(args.model) != os.path.realpath(args.out),
                f"--out {args.out} is the folder of the model itself; name another")
    data.expect(holds(args.out, RUN_FILES) or not holds(args.out, CHECKPOINT_FILES),
                f"--out {args.out}: holds a checkpoint that is not of a run; name another folder")
    content = [{k: v for k, v in r.items() if k != "path"} for r in records]  # wherever it lies
    args.fixed["data (digest of its records)"] = data.digest(json.dumps(content).encode())
    data.check_images(records, rank, world)
    if rank == 0 and args.preset == "paper" and device.type == "cpu":
        print("warning: no CUDA device is seen, so the CPU computes (an old driver is one reason)")
    dtype = torch.bfloat16 if args.lora and device.type == "cuda" else torch.float32
    policy, processor = M.load(args.model, dtype=dtype, device=device, max_pixels=args.max_pixels)
    M.check_texts(processor, records, rewards.question_text)
    prompt = M.encode(processor, records[:1])["input_ids"].tolist()
    asked = json.dumps([prompt, rewards.FORMS[args.thinking]])
    args.fixed["prompt (digest of its words, template and tags)"] = data.digest(asked.encode())
    policy, optimizer = trainable(policy, args)
    return policy, processor, optimizer


def trainable(policy, args):
    """LoRA of rank --lora, or every parameter, is trained -> policy, AdamW on those, kept in fp32.
    Of several processes each has the moments of its share of the parameters, updates these and
    sends them to the others (ZeRO, stage 1; README, Devices, says why not FSDP)."""
    args.fixed["model (digest of its weights)"] = M.weights_digest(policy)
    if args.lora:
        policy = M.add_lora(policy, args.lora, args.seed)
    else:
        policy.requires_grad_(True)
    if args.checkpointing:
        M.enable_checkpointing(policy)
    adamw = AdamW
    if dist.is_initialized():
        from torch.distributed.optim import ZeroRedundancyOptimizer  # a second to import
        adamw = functools.partial(ZeroRedundancyOptimizer, optimizer_class=AdamW)
    trained = [p for p in policy.parameters() if p.requires_grad]
    return policy, adamw(trained, lr=args.lr, weight_decay=args.weight_decay)


def held_out_questions(args, rank, world):
    """With --eval_every, this process's share of --eval_questions records of split "val" or,
    without any, "test"."""
    if not args.eval_every:
        return []
    records = data.read_records(args.data, None, args.only, args.thinking)
    held_out = [r for r in records if r["split"] == "val"]
    if not held_out:
        held_out = [r for r in records if r["split"] == "test"]
        data.expect(held_out, f"--eval_every: no held-out questions in {args.data}")
        if rank == 0:
            print("warning: no question of split val, so --eval_every asks test's: choose nothing "
                  "by what it shows", file=sys.stderr)
    chosen = evaluation.subset(held_out, args.eval_questions)
    data.check_images(chosen, rank, world)
    return chosen[rank::world]


def held_out_accuracy(policy, processor, records, judge, max_new_tokens):
    """Greedy accuracy on this process's share of the held-out questions, over all processes."""
    rows = evaluation.evaluate(policy, processor, records, judge, max_new_tokens=max_new_tokens)
    right = M.gather([row["acc"] for row in rows])
    return sum(right) / len(right)

# ---- the tiny base -------------------------------------------------------------------------------

# From think-then-answer targets alone a random network learns neither to name an option by its
# letter nor to see: the few tokens that matter drown among the others. Real base models can do
# both; the tiny one, a Qwen2.5-VL of 1.1 M parameters, is taught letters, then some seeing.

LETTER_STAGES = (  # (names to choose from, 100: all; most positions left free before the answers);
    # the last stage asks whole questions, behind the end of a thought
    (4, 0), (8, 0), (16, 0), (32, 0), (100, 0), (100, 8), (100, 16), (100, 32), (100, 64), (100, 0))
LETTER_OWN = 16  # with so many names or more, half of the prompts have a record's own options
LETTER_SOLVED, LETTER_FULL = 0.75, 0.95  # mean p(right letter) that ends a stage, and the last
LETTER_STEPS = 3000  # at most, of all stages
WORDING_EVERY = 4  # steps of letters between batches of how thoughts are worded
EYE_STEPS = 300
READ_STEPS = 400  # the more, the better the base sees
BASE_IMAGES = 1500  # phantoms to learn from
BASE_LR = 1e-3
LIKENESS = 1.5  # factor on the first keys and queries, see make_base


def lesson_batch(processor, lessons, images, place):
    """n lessons (prompt, what its answers open with, four answers), each with an image or None ->
    batch, tokens, mask, mask of the letters alone, (n, 4, T) each. In an answer the letter is the
    `place`-th token from the end. A prompt's four answers don't see each other, so that none is
    guessed by elimination."""
    prompts, openings, answers = zip(*lessons, strict=True)
    flat = [answer for four in answers for answer in four]
    targets = M.encode_completions(processor, flat)  # (4n, 1, T) each
    tokens, mask = (x.view(len(lessons), 4, -1) for x in targets)
    where = mask.sum(-1, keepdim=True) - place  # (n, 4, 1): a letter's index in its answer
    letters = torch.zeros_like(mask).scatter(-1, where, True)
    return M.tensors(processor, prompts, images, openings=openings), tokens, mask, letters


def unfinished(record):
    """A phantom's thought up to the answer in its last words."""
    return record["thought"].removesuffix(f"{data.right_option(record)}.")


def letter_batch(processor, names, skip, records, full, rng, n=16):
    """A lesson_batch whose answers are an option's name, then its letter: "cystB", a shortcut that
    is found more easily, or "cyst.</think><answer>B". Options are four of `names` or, where those
    are many, half of the time a record's own. Up to `skip` positions before the answers stay free:
    the distance must not matter. `full`: after a question and the last sentences of a thought."""
    lessons = []
    for _ in range(n):
        record = rng.choice(records)
        own = len(names) >= LETTER_OWN and rng.random() < 0.5
        options = record["options"] if own else rng.choice(names, 4, replace=False).tolist()
        prompt, opening = rewards.options_text(options).rstrip(), ""
        between = rng.choice(["", ".</think><answer>"])
        if full:
            prompt = rewards.question_text(dict(record, options=options))
            sentences = unfinished(record).rstrip().split(". ")
            opening = "<think>" + ". ".join(sentences[rng.integers(len(sentences)):])
            between = ".</think><answer>"
        answers = [f" {x}{between}{letter}" for x, letter in zip(options, "ABCD", strict=True)]
        lessons.append((prompt, opening, answers))
    batch, *rest = lesson_batch(processor, lessons, [None] * n, place=2)  # letter, stop token
    batch["skip"] = torch.from_numpy(rng.integers(0, skip + 1, n))
    return batch, *rest


def wording_batch(processor, records, images, rng, n=8):
    """A lesson_batch of questions, each with a random one of `images` and a gold completion for
    every option: it teaches how thoughts are worded and which letter follows, nothing of images."""
    lessons = []
    for i in rng.choice(len(records), n):
        record, answers = records[i], []
        for option, letter in zip(record["options"], "ABCD", strict=True):
            thought = f"{unfinished(record)}{option}."
            answers.append(rewards.answer_text(dict(record, thought=thought, answer=letter)))
        lessons.append((rewards.question_text(record), "", answers))
    others = [images[i] for i in rng.integers(0, len(images), n)]
    return lesson_batch(processor, lessons, others, place=3)  # letter, </answer>, stop token


def base_phantoms(seed):
    """Phantoms that are in none of the splits -> images, uint8 (112, 112, 3), their facts (see
    data.draw_phantom), and the records of all."""
    images, facts, records = [], [], []
    rng, rounds = np.random.default_rng([seed, 1, 1]), defaultdict(list)
    for i in tqdm(range(BASE_IMAGES), desc="base: images", unit="image"):
        pixels, truth = data.phantom_of_turn(rng, i, lesion_rate=2 / 3)
        images.append(pixels)
        facts.append(truth)
        records += data.phantom_records(truth, rng, f"base-{i}", "none.png", rounds=rounds)
    return images, facts, records


def descend(optimizer, loss, k, lr=BASE_LR):
    """Optimiser step number k, the learning rate rising over the first 50."""
    optimizer.param_groups[0]["lr"] = lr * min(1, (k + 1) / 50)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def learn_letters(net, processor, names, records, rng):
    """Name an option by its letter, one of LETTER_STAGES after the other; now and then also how
    thoughts are worded."""
    optimizer = AdamW(net.parameters())
    stage, right = 0, 0.25
    bar = tqdm(range(LETTER_STEPS), desc="base: letters", unit="step")
    for k in bar:
        n, skip = LETTER_STAGES[stage]
        full = stage == len(LETTER_STAGES) - 1
        batch, tokens, _, letters = letter_batch(processor, names[:n], skip, records, full, rng)
        logp = M.token_logprobs(net, batch, tokens, letters)[letters]
        loss = -logp.mean()
        if k % WORDING_EVERY == 0:
            batch, tokens, mask, _ = wording_batch(processor, records, [None], rng)
            loss = loss - M.token_logprobs(net, batch, tokens, mask)[mask].mean()
        descend(optimizer, loss, k)
        right += 0.1 * (logp.detach().exp().mean().item() - right)  # a running mean
        bar.set_postfix(stage=f"{stage + 1}/{len(LETTER_STAGES)}", right=f"{right:.2f}")
        if full and right > LETTER_FULL:
            break
        if not full and right > LETTER_SOLVED:
            stage, right = stage + 1, 0.25


def open_eyes(net, images, facts, rng):
    """Train the vision tower alone, under linear heads that are thrown away: its mean token tells
    modality and organ, each token the style of the lesion it shows, if any."""
    vision = net.config.vision_config
    side = data.SIZE // (vision.patch_size * vision.spatial_merge_size)  # tokens
    places = (torch.arange(side) + 0.5) / side  # as fractions of the side
    styles = torch.zeros(len(facts), side, side, dtype=torch.long)  # 0: no lesion
    for shown, f in zip(styles, facts, strict=True):
        if f["lesion"]:
            x, y = data.CENTERS[f["location"]]
            rows, columns = (places - y).abs() < 0.25, (places - x).abs() < 0.25  # about it
            shown[rows[:, None] & columns] = 1 + list(data.STYLES).index(f["style"])
    pairs = torch.tensor([data.PAIRS.index((f["modality"], f["anatomy"])) for f in facts])
    pair_head = torch.nn.Linear(vision.out_hidden_size, len(data.PAIRS))
    style_head = torch.nn.Linear(vision.out_hidden_size, 1 + len(data.STYLES))
    trained = torch.nn.ModuleList([net.model.visual, pair_head, style_head])
    optimizer = AdamW(trained.parameters())
    for k in tqdm(range(EYE_STEPS), desc="base: eyes", unit="step"):
        chosen = rng.integers(0, len(images), 48)
        patches, grids = zip(*[images[i] for i in chosen], strict=True)
        seen = net.model.get_image_features(torch.cat(patches), torch.cat(grids)).pooler_output
        seen = torch.stack(list(seen))  # (n, side * side, d)
        pair_loss = cross_entropy(pair_head(seen.mean(1)), pairs[chosen])
        style_loss = cross_entropy(style_head(seen).flatten(0, 1), styles[chosen].flatten())
        descend(optimizer, pair_loss + 4 * style_loss, k, 2 * BASE_LR)


def learn_to_read(net, processor, records, images, facts, rng):
    """Say in three words what the eyes see; every other step also wording and letters."""
    optimizer = AdamW(net.parameters())
    captions = {i: f" {data.STYLES[f['style']].split()[-1]} {f['location']}"
                for i, f in enumerate(facts) if f["lesion"]}  # say " blob Left Upper"
    for k in tqdm(range(READ_STEPS), desc="base: reading", unit="step"):
        chosen = rng.choice(list(captions), 32, replace=False)
        tokens, mask = M.encode_completions(processor, [captions[i] for i in chosen])
        batch = M.tensors(processor, ["See."] * len(chosen), [images[i] for i in chosen])
        loss = -3 * M.token_logprobs(net, batch, tokens, mask)[mask].mean()
        if k % 2 == 1:
            batch, tokens, mask, letters = wording_batch(processor, records, images, rng)
            logp = M.token_logprobs(net, batch, tokens, mask)
            loss = loss - logp[letters].mean() - logp[mask].mean()
        descend(optimizer, loss, k)


TINY_TEXT = dict(
    hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-6, initializer_range=0.05,
    rope_parameters=dict(rope_type="default", rope_theta=1000000.0, mrope_section=[4, 6, 6]))
TINY_VISION = dict(
    depth=2, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=128,
    fullatt_block_indexes=[1], initializer_range=0.05)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                  "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
TAG_TOKENS = ["<think>", "</think>", "<answer>", "</answer>"]  # one token each, as in Qwen3
CHAT_TEMPLATE = (  # Qwen2.5-VL's turns, for one image and text
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tiny(texts, names=(), *, image_size, seed=0):
    """A tiny Qwen2.5-VL with random weights, and a byte-level BPE tokenizer trained on `texts` ->
    (model, Processor)."""
    # Each of `names` is one token, where Qwen's own cuts between words: a network this small finds
    # a name by its first token, and does not always learn to tell "Left Upper" from "Left Lower".
    longest_first = sorted(names, key=len, reverse=True)
    pieces = [rf" ?{re.escape(name)}(?!\w)" for name in longest_first]
    pieces += [r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)", r"\s+"]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("|".join(pieces)), "isolated"), to_bytes])
    bpe.decoder = decoders.ByteLevel()
    # With 703 tokens or more every word of the phantoms is one.
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=988, initial_alphabet=to_bytes.alphabet(), show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        padding_side="left", chat_template=CHAT_TEMPLATE)
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    tokenizer.add_tokens(TAG_TOKENS)

    token = tokenizer.convert_tokens_to_ids
    text = dict(TINY_TEXT, vocab_size=len(tokenizer), bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=TINY_VISION, tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"))
    torch.manual_seed(seed)
    net = transformers.Qwen2_5_VLForConditionalGeneration(config).float().eval()
    net.set_attn_implementation(M.ATTENTION)
    images = M.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=image_size**2)
    return net, M.Processor(tokenizer, images)


def make_base(folder, seed):
    """The tiny base of the phantoms, written to `folder`: letters, then eyes, then reading."""
    pixels, facts, records = base_phantoms(seed)
    texts = [f"{rewards.question_text(r)} {rewards.answer_text(r)}" for r in records]
    names = sorted({option for r in records for option in r["options"]})
    net, processor = build_tiny(texts, names, image_size=data.SIZE, seed=seed)
    out = processor.image_processor(images=pixels, return_tensors="pt")
    patches, grids = (out[x].chunk(len(pixels)) for x in ("pixel_values", "image_grid_thw"))
    images = list(zip(patches, grids, strict=True))

    # Queries start equal to the keys, and both larger: a token then attends to earlier tokens like
    # itself, half of finding an option's name. From the usual start some seeds need three times the
    # steps or never get there (compare Trockman and Kolter 2023, Mimetic Initialization).
    for layer in net.model.language_model.layers:
        attention = layer.self_attn
        k = attention.k_proj.weight.data.mul_(LIKENESS)  # (h * d, D)
        k = k.unflatten(0, (-1, attention.head_dim))
        q = k.repeat_interleave(attention.num_key_value_groups, 0)  # (H, d, D)
        attention.q_proj.weight.data.copy_(q.flatten(0, 1))

    rng = np.random.default_rng([seed, 2])
    learn_letters(net, processor, rng.permutation(names), records, rng)
    open_eyes(net, images, facts, rng)
    learn_to_read(net, processor, records, images, facts, rng)
    M.save(net, processor, folder)


def prepare_tiny(args, rank):
    """The base under ROOT and, without --data, the phantoms, made once -> base folder, file of
    phantoms."""
    phantoms, base = Path(args.root, "phantoms"), Path(args.root, "tiny-base")
    made = base / "base.json"  # written last: what the base depends on
    recipe = dict(
        seed=args.seed, likeness=LIKENESS,
        letters=[LETTER_STAGES, LETTER_OWN, LETTER_SOLVED, LETTER_FULL, LETTER_STEPS],
        wording=WORDING_EVERY, eyes=EYE_STEPS, reading=READ_STEPS, images=BASE_IMAGES,
        words=[rewards.INSTRUCTIONS, rewards.FORMS, CHAT_TEMPLATE])
    if rank == 0:
        if not args.data:
            data.make_phantoms(phantoms, args.seed, args.images, args.thoughts)
        with data.locked(base):
            if not made.exists():
                make_base(base, args.seed)
                data.write_text(made, json.dumps(recipe))
        found = {"words": recipe["words"]} | evaluation.json_object(made)  # earlier ones had none
        data.expect(json.dumps(found, sort_keys=True) == json.dumps(recipe, sort_keys=True),
                    f"{base} was made with another seed, recipe or prompt: remove it, or name "
                    "another --root")
    M.wait_for_all()  # the other processes wait here
    return str(base), str(phantoms / "phantoms.jsonl")

# ---- Eq. (1) and the loop ------------------------------------------------------------------------

def sft_loss(logp, mask, tokens_in_batch):
    """Eq. (1): L_SFT = - sum over (I, Q, Y*) of log pi_theta(Y* | I, Q), Y* = (T*, A*).

    logp, mask (N, 1, T): log-probabilities of the target's tokens. Divided by the global batch's
    tokens, so that lr does not depend on the batch."""
    return -torch.where(mask, logp, 0.0).sum() / tokens_in_batch


def learning_rate(step, steps, peak, warmup):
    """Linear rise over warmup * steps, then a cosine to 0. `step` counts from 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def epoch_order(n, epoch, seed):
    """The order of n questions in an epoch, a function of these numbers alone."""
    generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def questions(args, rank, world):
    """The questions that have a thought, which are trained on."""
    every = data.read_records(args.data, "train", args.only, args.thinking)
    records = [r for r in every if r["thought"] is not None or args.thinking == "none"]
    data.expect(records, f"none of the {len(every)} training questions has a thought to learn from "
                         "(judge.py annotate writes them)")
    if rank == 0 and len(records) < len(every):
        print(f"{len(records)} training questions have a thought; {len(every) - len(records)} "
              "have none and are left to grpo.py")
    data.expect(min(args.batch, len(records)) >= world, f"--batch {args.batch}, {len(records)} "
                f"questions: expected at least one for each of the {world} processes")
    return records


def main(argv=None):
    with Run() as run:
        train(run, argv)


def train(run, argv):
    args = knobs(KNOBS, __doc__, argv)
    rank, world, device = M.setup_devices()
    if args.model is None:
        args.model, phantoms = prepare_tiny(args, rank)
        args.data = args.data or [phantoms]
    data.expect(args.data, "--model was given without --data: name the files of records")
    records, held_out = questions(args, rank, world), held_out_questions(args, rank, world)

    policy, processor, optimizer = policy_of(args, records, device, rank, world)
    M.check_texts(processor, records, rewards.answer_text)
    epoch_steps = max(1, len(records) // args.batch)
    steps = math.ceil(args.epochs * epoch_steps)
    if rank == 0 and steps < FEW_STEPS:
        print(f"warning: {args.epochs:g} passes over {len(records)} questions are {steps} steps of "
              f"--batch {args.batch}, which teach little: raise --epochs, or lower --batch")
    start = run.open(args, policy, processor, optimizer, rank)
    end = min(steps, args.max_steps or steps)
    if start >= end:  # resumed at its end: a kill there may have cut the checkpoint off
        run.save()

    bar = tqdm(range(start, end), initial=start, total=end, desc="sft", unit="step",
               disable=rank > 0)
    for step in bar:
        began = time.perf_counter()

        # The step's questions, whatever the number of processes: each takes every world-th.
        epoch, place = divmod(step, epoch_steps)
        order = epoch_order(len(records), epoch, args.seed)[place * args.batch:][:args.batch]
        mine = [records[i] for i in order[rank::world]]
        targets = [rewards.answer_text(r) for r in mine]
        tokens, mask = M.encode_completions(processor, targets, device)  # (n, 1, T)
        total = M.sum_over_ranks(int(mask.sum()))

        # Eq. (1), and one optimiser step: gradients summed over the processes, clipped, AdamW.
        loss_sum = 0.0
        for i in range(0, len(mine), args.micro_batch):
            rows = slice(i, i + args.micro_batch)
            batch = M.encode(processor, mine[rows], device)
            logp = M.token_logprobs(policy, batch, tokens[rows], mask[rows])  # (n, 1, T)
            loss = sft_loss(logp, mask[rows], total)
            loss.backward()
            loss_sum += loss.item()
        figures = run.step(loss_sum, learning_rate(step, steps, args.lr, args.warmup))
        figures |= dict(tokens=total, seconds=time.perf_counter() - began)
        done = run.done = step + 1

        if args.eval_every and done % args.eval_every == 0:
            limit = M.MAX_NEW_TOKENS[args.preset]
            figures["held_out_accuracy"] = held_out_accuracy(policy, processor, held_out,
                                                             make_judge(), limit)
        bar.set_postfix(loss=f"{figures['loss']:.3f}")
        if rank == 0:
            log(args.out, step=done, **figures)
        run.after(end, args.save_every and done % args.save_every == 0)
    M.close_devices()


if __name__ == "__main__":
    M.run(main)
