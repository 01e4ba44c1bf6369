"""Tables 1-3: accuracy by task, format and consistency rates, and a page that a person looks at.

Every question of the test split is answered once (greedy; with --temperature once per seed), then
scored by the code that gives the rewards: rewards.score, with an F of judge.py. It writes

    results.json              figures as fractions; only this file keeps names evaluated earlier
    report.md, eval.html      the tables; on the page also charts and questions with their answers
    completions-NAME.jsonl    every completion with its scores

    python eval.py --ckpt out/tiny-base out/sft out/grpo         # on out/phantoms
    python eval.py --ckpt out/grpo --temperature 1 --seeds 0 1 2 # mean and deviation over seeds
    python eval.py --ckpt SFT=out/sft,out1/sft GRPO=out/grpo,out1/grpo    # over checkpoints
    python eval.py --ckpt GLM=openai:http://localhost:8000/v1#MODEL --data my.jsonl
    python eval.py --ckpt CT=out/ct MRI=out/mri --matrix modality      # Med-R1's square
    torchrun --nproc_per_node=8 eval.py --ckpt out/grpo          # the questions are shared out
    python eval.py --ckpt out/grpo --image scan.png --question "What is this?" --options MRI CT
    python eval.py --watch out/grpo      # while it trains: its curves, in out/grpo/watch.html

Models that were not trained here (openai:, and folders without knobs.json or base.json) may answer
without our tags: rewards.read_leniently. Left out on purpose: partial credit, majority votes.
Rounding aside, greedy results depend neither on --batch nor on the number of processes.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import argparse
import json
import math
import os
import random
import re
import time
from collections import Counter, defaultdict
from contextlib import suppress
from functools import partial
from itertools import chain, product
from operator import itemgetter
from pathlib import Path
from statistics import fmean, stdev

import jinja2  # comes with torch
import numpy as np
import torch
from tqdm import tqdm

import data
import model as M
import rewards
from data import data_url, expect
from judge import SPEC, Server, failures, make_judge

KNOBS = dict(  # the flags, as argparse takes them
    ckpt=dict(nargs="+", default=["out/grpo"], help="checkpoints: folders, names on the hub, or "
              "openai:BASE_URL#MODEL, a chat server's (key in OPENAI_API_KEY, replies kept in "
              "OUT/replies.jsonl, --batch requests at a time). NAME=A,B,..: one row, mean and "
              "deviation over A, B, .. [out/grpo]"),
    data=dict(nargs="+", default=[], help="files of records, .jsonl, or others' .json (default: "
              "phantoms/phantoms.jsonl beside each checkpoint)"),
    split=dict(choices=data.SPLITS, default="test", help="which of their records [%(default)s]"),
    only=dict(nargs="+", default=[], help="KEY=VALUE they have, say modality=CT task=anatomy"),
    questions=dict(type=int, default=0, help="how many of them, the same each time, 0 = all [0]"),
    thinking=dict(choices=list(rewards.INSTRUCTIONS), help="where the thought stands, or none "
                  "(default: as the checkpoint was trained, by its knobs.json; else before)"),
    temperature=dict(type=float, default=0.0, help="of the sampling, 0 = greedy [%(default)s]"),
    seeds=dict(nargs="+", type=int, default=[0], help="of the sampling: every question is answered "
               "once for each; mean and deviation over them [0]"),
    batch=dict(type=int, default=64, help="questions sampled at a time [%(default)s]"),
    max_new_tokens=dict(type=int, default=0, help="tokens at which a completion is cut off, "
                        "0 = 80 for a tiny checkpoint, else 512 [%(default)s]"),
    max_pixels=dict(type=int, default=M.MAX_PIXELS,
                    help="pixels above which an image is shrunk [%(default)s]"),
    judge=dict(default="lexical", help="the evaluator F of Eq. (6): lexical, hf:NAME_OR_PATH or "
               "openai:BASE_URL#MODEL [%(default)s]"),
    judge_sees=dict(choices=["cut", "raw"], default="cut", help="the thought with letters and "
                    "answer statements cut, or raw as printed [%(default)s]"),
    matrix=dict(choices=["modality", "task"], help="the checkpoints, --ckpt NAME=A.., were each "
                "trained on the NAME of these alone: show the square of accuracies"),
    paper=dict(action="store_true", help="show the paper's own figures beside"),
    out=dict(help="folder of the results (default: that in which the first checkpoint lies)"),
    image=dict(help="answer one question about this image file instead"),
    question=dict(help="that question"),
    options=dict(nargs="+", default=[], help="its options, 2 to 6 texts"),
    watch=dict(nargs="+", default=[], help="folders of runs: instead, keep their curves up to date "
               "while they train, in watch.html of --out or of the first"),
)
LEAST = dict(questions=0, temperature=0, batch=1, max_new_tokens=0, max_pixels=1)
# An entry's figures, and a difference's -> the key of a row that they are the mean of.
RATES = dict(overall="acc", format="fmt", consistency="con", grounding="grounding")
CHANGES = dict(accuracy="acc", consistency="con", grounding="grounding")
TIMEOUT = 300.0   # s that a chat server may take for an answer
RESAMPLES = 2000  # of an interval
FEWEST = 20       # groups below which none is shown; of 20 it covers 92 % (simulated, normal
                  # changes), and less where few answers change
SHOWN = 60        # questions on the page at most
THUMBNAIL = 224   # px, longer side of an image there
POINTS = 200      # of a curve at most
RENEWED = 5       # s after which the page of a run that is watched is written and loaded anew

# ---- the measurement -----------------------------------------------------------------------------

def completions(policy, processor, records, *, max_new_tokens, temperature=0.0, seed=0, rank=0,
                batch=64):
    """Yields (text, whether it was cut off at max_new_tokens) for each record's question. DataError
    for an image that can't be read."""
    device = next(policy.parameters()).device
    generator = torch.Generator(device).manual_seed(seed + 1_000_003 * rank)  # each its own stream
    for start in range(0, len(records), batch):
        inputs = M.encode(processor, records[start:start + batch], device)
        tokens, mask = M.sample(policy, inputs, group_size=1, max_new_tokens=max_new_tokens,
                                temperature=temperature, generator=generator)  # (n, 1, T)
        texts = [group[0] for group in M.decode(processor, tokens, mask)]
        ended = M.finished(inputs, tokens, mask)[:, 0]                         # (n)
        yield from zip(texts, (~ended).tolist(), strict=True)


def scored(said, records, judge, score=rewards.score):
    """(text, cut_off) for each record -> a row (dict) for each, in their order: that of `score`
    (rewards.score or score_leniently; fmt, acc and con are Eqs. 4-6), with the record's path and
    group, cut_off, and what rewards.grounding says of the thought."""
    said = list(said)
    rows = score([text for text, _ in said], records, judge)
    for row, record, (_, cut_off) in zip(rows, records, said, strict=True):
        if cut_off is True and row.get("read_as") in ("last line", "option text"):
            # It had not ended. A consistency of nan stays one: not asked for, or F failed.
            row |= dict(given=None, acc=0.0, con=0.0 * row["con"], read_as="unreadable")
        row |= dict(path=record["path"], group=record["group"], cut_off=cut_off)
        row |= rewards.grounding(row["thought"], record.get("shows"))
    return rows


def evaluate(policy, processor, records, judge, **knobs):
    """The rows of the policy's completions; knobs are those of `completions`."""
    return scored(completions(policy, processor, records, **knobs), records, judge)


def subset(records, n):
    """The first n (0: all) of a fixed shuffled order, in the file's order: 100 are among 200."""
    order = random.Random(0).sample(range(len(records)), len(records))
    return [records[i] for i in sorted(order[:n or None])]


def grouped(rows, key, order=()):
    """Rows -> {value of `key`: its rows}: the values of `order` first, others sorted behind."""
    groups = {value: [] for value in order}
    for row in sorted(rows, key=itemgetter(key)):
        groups.setdefault(row[key], []).append(row)
    return {value: members for value, members in groups.items() if members}


def mean_and_std(rows, key="acc"):
    """Rows of one or several runs -> a figure: "mean" of `key` over the runs (None without a
    number), "std" over them (n - 1 in the denominator; 0 for one run), "n" answers (of one seed, of
    all checkpoints), "runs". A run is a checkpoint where there are several, else a seed of the
    sampling. nan is left out, also of n."""
    run = "ckpt" if len({row["ckpt"] for row in rows}) > 1 else "seed"
    known = [row for row in rows if not rewards.failed(row[key])]
    means = [fmean(row[key] for row in of_run) for of_run in grouped(known, run).values()]
    return {"mean": fmean(means) if means else None,
            "std": stdev(means) if len(means) > 1 else 0.0,
            "n": len(known) // len({row["seed"] for row in rows}),
            "runs": len(means)}


def summary(rows):
    """Rows of one name -> its entry in results.json: fractions, as section 4.1 defines them.

    Accuracy is right answers / questions, of a task or of all (not the mean of the tasks); an
    unreadable answer is wrong. judge_failed: completions left out of consistency. read_as: how
    many were read in which way, {} for a model trained here; those that "failed" got no reply and
    are left out of every figure. anomaly: its accuracy by the right option's text."""
    tasks = grouped(rows, "task", data.TASKS)
    modalities = grouped(rows, "modality", data.MODALITIES)
    anomaly = [row | dict(right=data.right_option(row)) for row in tasks.get("anomaly", [])]
    ways = Counter(row["read_as"] for row in rows if "read_as" in row)
    return {rate: mean_and_std(rows, key) for rate, key in RATES.items()} | dict(
        tasks={x: mean_and_std(members) for x, members in tasks.items()},
        modality={x: mean_and_std(members) for x, members in modalities.items()},
        anomaly={x: mean_and_std(members) for x, members in grouped(anomaly, "right").items()},
        seeds=sorted({row["seed"] for row in rows}),
        checkpoints=list(dict.fromkeys(row["ckpt"] for row in rows)),
        judge_failed=sum(rewards.failed(row["verdict"]) for row in rows),
        cut_off=mean_and_std(rows, "cut_off")["mean"],
        read_as=dict(sorted(ways.items())))


def difference(before, after):
    """Rows of two names -> {figure: after minus before, see bootstrap}; {} if they answered other
    questions. Checkpoints pair in order: of X=A,B and Y=C,D it is C - A and D - B. A question on
    which one of the two has no value is left out."""
    asked = itemgetter("path", "id", "seed")
    if list(map(asked, before)) != list(map(asked, after)):
        return {}
    figures = {}
    for name, key in CHANGES.items():
        sets = {}  # {checkpoint: {group: [new minus old, ..]}}
        for old, new in zip(before, after, strict=True):
            changes = sets.setdefault(new["ckpt"], {}).setdefault(new["group"], [])
            if not rewards.failed(new[key] - old[key]):
                changes.append(new[key] - old[key])
        known = [groups for groups in sets.values() if any(groups.values())]
        if known:
            figures[name] = bootstrap(known)
    return figures


def bootstrap(sets):
    """[{group: its changes}, of each checkpoint] -> their "mean", and "low" and "high" of its 95 %
    interval, which allows for other images, not for other seeds of the training: for those, "std"
    is the deviation over the checkpoints ("runs", n - 1). Groups are drawn again (an image; of real
    data a patient), since their questions are right or wrong together; checkpoints asked about the
    same groups get the same draw."""
    rng = np.random.default_rng(0)
    draws, means, resampled = {}, [], []  # draws: {n names: (RESAMPLES, n) of their places}
    for groups in sets:
        names = tuple(groups)
        if names not in draws:
            draws[names] = rng.integers(len(names), size=(RESAMPLES, len(names)))
        sums = np.array([(sum(x), len(x)) for x in groups.values()])  # (n, 2)
        again = np.array([sums[draw].sum(0) for draw in draws[names]])  # (RESAMPLES, 2)
        with np.errstate(invalid="ignore"):  # 0 / 0 where no drawn group has a value
            resampled.append(again[:, 0] / again[:, 1])
        means.append(sums[:, 0].sum() / sums[:, 1].sum())
    low, high = np.nanquantile(np.mean(resampled, 0), (0.025, 0.975)).tolist()
    return {"mean": float(np.mean(means)), "low": low, "high": high, "runs": len(means),
            "std": stdev(means) if len(means) > 1 else 0.0,
            "groups": min(sum(len(x) > 0 for x in of.values()) for of in sets)}  # with a value

# ---- the tables ----------------------------------------------------------------------------------

# Tables 2 and 3 of the paper: overall accuracy, by the name that a row has here
PAPER_OVERALL = {
    "RL-only": "73.22 ± 2.58", "SFT": "75.41 ± 1.19", "Acc-only": "78.85 ± 1.08",
    "Con-only": "81.73 ± 1.12", "Con-GRPO": "85.15 ± 0.95", "Format-focused": "77.13 ± 1.35",
    "Accuracy-focused": "82.54 ± 1.02", "Consistency-focused": "84.21 ± 0.98",
    "Balanced": "85.15 ± 0.95"}
# Table 1: parameters in M; mean and deviation over three runs, of data.TASKS and overall
PAPER = """
Qwen2.5-VL-3B      3000  93.20 0.34  51.27 0.74  24.57 6.82  91.78 0.39  65.30 1.94  71.41 1.19
Qwen2.5-VL-7B      7000  83.98 3.46  55.71 3.35  35.62 1.88  88.45 2.39  48.90 6.78  70.48 1.23
MiMo-VL-RL         7000  88.43 0.43  57.35 0.54  32.98 1.62  90.40 2.88  50.37 8.88  72.44 0.88
InternVL3.5-8B     8000  94.02 3.88  59.27 2.05  27.84 2.42  92.19 3.88  58.58 5.29  74.46 3.13
MiniCPM-V-4.5      9000  91.16 1.70  56.43 1.18  16.31 2.28  92.95 2.47  54.60 2.85  71.48 1.22
GLM-4.1V-Thinking  9000  94.87 1.55  52.05 2.24  27.60 1.45  96.59 1.99  58.78 3.28  74.02 3.96
Llama-3.2-Vision  11000  92.38 1.16  47.29 1.74  22.22 2.38  95.21 1.91  50.33 2.15  70.59 1.14
ERNIE-4.5-VL      28000  90.49 1.95  48.66 1.38  24.19 1.27  91.68 2.45  52.13 2.07  69.73 0.60
Qwen3VL           32000  94.68 0.58  56.67 3.19  32.80 0.61  95.29 0.62  54.60 1.07  75.44 0.62
InternVL3.5-38B   38000  93.39 2.68  58.30 4.46  31.57 1.02  94.25 2.56  71.52 1.76  75.16 2.45
Qwen2.5VL-72B     72000  93.75 1.16  59.24 1.52  37.46 2.41  94.32 1.43  53.43 1.39  76.25 1.45
Grok4-Fast            -  93.47 0.61  59.94 1.56  24.90 1.27  92.09 2.38  39.49 1.05  77.00 1.00
HuatuoGPT-Vision* 7000  95.65 0.36  55.78 1.38  33.79 4.23  95.08 0.16  59.58 1.76  75.56 0.51
Lingshu*           7000  96.18 0.37  59.57 0.82  31.75 2.45  76.00 4.65  32.09 6.24  70.91 1.60
LLaVA-Med*         7000  86.45 7.52  45.82 4.36  20.81 4.36  81.63 10.74 39.55 9.78  64.36 3.53
MedVLM*            2000  91.17 0.59  48.13 1.17  30.37 6.09  93.45 0.34  74.63 2.24  71.23 0.53
MedAD-R1           3000  98.87 0.35  78.24 0.84  55.90 1.02  97.14 0.76  79.49 1.20  85.15 0.95
"""


def tables(results, paper=False, matrix=None):
    """{name: entry} -> tables, see `table`: as Table 1, by modality, and Med-R1's square or the
    differences between rows."""
    tasks = dict.fromkeys(chain(data.TASKS, *(entry["tasks"] for entry in results.values())))
    lines = {}
    for name, entry in results.items():
        params = f"{entry['params'] / 1e6:.1f}" if entry["params"] else "-"
        lines[name] = {"params, M": params} | tasks | entry["tasks"]  # `tasks` sets the order
        lines[name] |= {rate: entry[rate] for rate in RATES} | {"n": str(entry["overall"]["n"])}
    if paper:
        for name in results:
            lines[name]["overall in the paper"] = PAPER_OVERALL.get(name, "-")
        for line in PAPER.strip().split("\n"):
            name, params, *numbers = line.split()  # mean, deviation, mean, ..
            figures = {"params, M": params}
            for k, column in enumerate((*data.TASKS, "overall")):
                figures[column] = f"{numbers[2 * k]} ± {numbers[2 * k + 1]}"
            lines[f"{name} (paper)"] = figures

    def part(key):
        return {name: entry.get(key, {}) for name, entry in results.items()}
    found = [table("Accuracy by task; overall is over the questions, not the tasks", lines),
             table("Accuracy by modality", part("modality"))]
    if any(part("anomaly").values()):
        found.append(table("Accuracy on anomaly, by what is right: Abnormal, sensitivity; Normal, "
                           "specificity", part("anomaly")))
    if matrix:
        found.append(square(matrix, part("tasks" if matrix == "task" else matrix)))
    elif any(part("difference").values()):
        title = ("Each row minus the one before, on the same questions, in points; 95 % intervals "
                 "over groups\n(images, patients), from "
                 f"{FEWEST} on: for these checkpoints, not for other trainings")
        found.append(table(title, part("difference")))
    return found


def square(key, lines):
    """Med-R1's matrix, {name: {value: figure}}: a row for each checkpoint, a column for each value
    of `key` that was asked. A column's mean is over the checkpoints named after a value."""
    def mean(figures):
        means = [x["mean"] for x in figures if x and x["mean"] is not None]
        return {"mean": fmean(means) if means else None, "std": 0.0, "runs": 1}

    lines = {name: figures | {"mean": mean(figures.values())} for name, figures in lines.items()}
    own = [figures for name, figures in lines.items() if name in figures]
    lines["mean"] = {column: mean(figures.get(column) for figures in own) for column in own[0]}
    return table(f"Accuracy, trained on one {key} alone (line), asked about all", lines)


def table(title, lines):
    """{name: {column: figure or text}} -> (title, columns, {name: [(text, mean, std, look), ..]}),
    see `percent`. look, a CSS class: "own" if row and column have the same name, "best" in its
    column, or ""."""
    columns = list(dict.fromkeys(chain(*lines.values())))  # in the order in which they came
    rows = {name: [] for name in lines}
    for column in columns:
        cells = {name: percent(figures.get(column)) for name, figures in lines.items()}
        means = {mean for _, mean, _ in cells.values()} - {None}
        for name, (text, mean, std) in cells.items():
            look = "best" if len(means) > 1 and mean == max(means) else ""
            if name == column != "mean":
                look = "own"
            rows[name].append((text, mean, std, look))
    return title, columns, rows


def percent(figure):
    """A figure -> (text, mean, deviation), all in %. Mean and deviation, of which the page draws a
    bar, are None for a text, a difference (its text has the interval) and a missing figure, the
    deviation also of one run."""
    if isinstance(figure, str):
        return figure, None, None
    if not figure or figure["mean"] is None:
        return "-", None, None
    mean, std = 100 * figure["mean"], 100 * figure["std"]
    deviation = f" ± {std:.1f}" if figure["runs"] > 1 else ""
    if "low" in figure:
        text = f"{mean:+.1f}{deviation}"
        if figure["groups"] >= FEWEST:
            text += f" ({100 * figure['low']:+.1f} to {100 * figure['high']:+.1f})"
        return text, None, None
    return f"{mean:.1f}{deviation}", round(mean, 1), round(std, 1) if deviation else None


def markdown(title, columns, rows):
    """A table in Markdown, the first column left-aligned, "own" cells in bold."""
    lines = [["model", *columns], ["---"] + ["---:"] * len(columns)]
    for name, cells in rows.items():
        texts = [f"**{text}**" if look == "own" else text for text, _, _, look in cells]
        lines.append([name, *texts])
    text = f"{title}\n\n"
    for line in lines:
        line = [" ".join(cell.replace("|", "\\|").split()) for cell in line]
        text += f"| {' | '.join(line)} |\n"
    return text


def given_option(row):
    """The text of the option that a row's completion answers."""
    if row["given"] is None:
        return "no reply" if rewards.failed(row["acc"]) else "unreadable"
    return row["options"][data.LETTERS.index(row["given"])]


def answers_given(results, rows):
    """{name: entry}, {name: its rows} -> a table. The commonest answers show a model that always
    gives the same one."""
    def commonest(answers):
        found = Counter(answers).most_common(3)
        return ",\n".join(f"{x} {100 * n / len(answers):.0f} %" for x, n in found)

    asked = grouped(chain(*rows.values()), "task", data.TASKS)
    lines = {name: dict.fromkeys(asked, "-") for name in results}  # which sets the order
    leniently = any(entry["read_as"] for entry in results.values())
    for name, answers in rows.items():
        for task, members in grouped(answers, "task", data.TASKS).items():
            lines[name][task] = commonest([given_option(row) for row in members])
        ways = [f"{how} {n}" for how, n in results[name]["read_as"].items()]
        silent = sum(rewards.failed(row["grounding"]) for row in answers)
        undecided = [row["verdict"] is None for row in answers if row["thought"] is not None]
        lines[name]["letter"] = commonest([row["given"] or given_option(row) for row in answers])
        if leniently:
            lines[name]["read as\n(failed: no reply)"] = ",\n".join(ways) or "-"
        lines[name] |= {
            "F\nfailed": str(results[name]["judge_failed"]),
            "F\nundecided": str(sum(undecided)),
            "nothing\nto ground": str(silent),
            "cut off": f"{results[name]['cut_off'] or 0:.2%}"}
    return table("The commonest answers, and how completions were read", lines)

# ---- the charts ----------------------------------------------------------------------------------

CURVES = dict(  # figures of metrics.jsonl, and their charts' titles
    reward="reward, Eq. (3)", format="format reward, Eq. (4)",
    accuracy="accuracy reward, Eq. (5)", consistency="consistency reward, Eq. (6)",
    held_out_accuracy="held-out accuracy", loss="loss, Eq. (1)", kl="KL divergence per token",
    sampled_nll="-log probability per sampled token", length="tokens per completion",
    no_spread="share of groups without spread", undecided="share of thoughts F can't decide on",
    accuracy_no_spread="share of groups without spread of accuracy", seconds="seconds per step",
    seconds_rollout="seconds of sampling", seconds_reference="seconds of the reference",
    seconds_judge="seconds of F", seconds_waiting="seconds waited for the slowest process",
    seconds_update="seconds of the update")


def chart(title, lines, unit):
    """{name: [(look, [(x, y), ..]), ..]} -> what CHART draws, with the ticks of both axes. look:
    "", "raw" (faint), or "dot" from a point to itself. unit: of x."""
    points = [xy for strokes in lines.values() for _, stroke in strokes for xy in stroke]
    xs, ys = ticks([0, *(x for x, _ in points)]), ticks([y for _, y in points])
    return dict(title=title, lines=lines, unit=unit, xs=xs, ys=ys)


def place(value, axis, start, end):
    """px of a value between the first tick of an axis and the last."""
    low, *_, high = axis
    return np.interp(value, (low, high), (start, end)).round(1)


def ticks(values):
    """Round numbers, 1, 2 or 5 times a power of ten apart, that enclose the values -> {x: text}."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = min(low, 0), max(high, 0) or 1
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(times for times in (1, 2, 5, 10) if high - low <= 5 * times * step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return {k * step: f"{k * step:.10g}" for k in range(first, last + 1)}


def steps_of(folder):
    """A run's metrics.jsonl -> its lines, [{figure: number, or None for nan}], with the "minutes"
    of training until then; none without the file. One that is half written is passed over."""
    path, steps, seconds = Path(folder, "metrics.jsonl"), [], 0.0
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            steps.append(json.loads(line))
            seconds += sum(x for key, x in steps[-1].items() if key.startswith("seconds"))
            steps[-1]["minutes"] = seconds / 60
    return steps


def curve(points):
    """[(step, figure), ..] -> strokes: as logged, a moving mean (each point and those before it, a
    twentieth of all), and dots if the points are few."""
    x, y = np.array(points, dtype=float).T                           # (n), (n)
    sums, end = np.append(0, y.cumsum()), np.arange(len(x)) + 1
    start = np.maximum(end - math.ceil(len(x) / 20), 0)
    mean = (sums[end] - sums[start]) / (end - start)
    some = data.evenly(range(len(x)), POINTS)
    raw, mean = (np.stack([x, line], 1)[some].tolist() for line in (y, mean))
    dots = [("dot", [point, point]) for point in raw] if len(raw) <= 20 else []
    return [("raw", raw), ("", mean), *dots]


def curves(runs):
    """{name: folders of its runs} -> charts over steps and over minutes of each of CURVES that some
    of them logged. The loss is shown of SFT runs only: Con-GRPO's tells little."""
    logs = {name: list(map(steps_of, folders)) for name, folders in runs.items()}
    charts = []
    for key, over in product(CURVES, ("step", "minutes")):
        lines = {name: [] for name in runs}
        for name in runs:
            for steps in logs[name]:
                points = [(x[over], x[key]) for x in steps if x.get(key) is not None]
                if points and (key != "loss" or "reward" not in steps[0]):
                    lines[name] += curve(points)
        if any(lines.values()):
            charts.append(chart(CURVES[key], lines, over))
    return charts

# ---- the page ------------------------------------------------------------------------------------

CHART = """\
<text x="4" y="12" font-weight="bold">{{ chart.title }}</text>
{% for value, text in chart.xs.items() %}{% set x = place(value, chart.xs, 40, 348) %}
  <polyline class="grid" points="{{ x }},24 {{ x }},166"/>
  <text x="{{ x }}" y="180" text-anchor="middle">{{ text }}</text>
{% endfor %}
{% for value, text in chart.ys.items() %}{% set y = place(value, chart.ys, 166, 24) %}
  <polyline class="grid" points="40,{{ y }} 348,{{ y }}"/>
  <text x="35" y="{{ y + 4 }}" text-anchor="end">{{ text }}</text>
{% endfor %}
<text x="348" y="194" text-anchor="end">{{ chart.unit }}</text>
{% for name, strokes in chart.lines.items() %}
  <g class="of" style="--k: {{ loop.index0 }}"><title>{{ name }}</title>
  {% for look, points in strokes %}
    <polyline class="{{ look }}" points="{% for x, y in points %}
      {{- place(x, chart.xs, 40, 348) }},{{ place(y, chart.ys, 166, 24) }} {% endfor %}"/>
  {% endfor %}
  </g>
{% endfor %}
"""
PAGE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
{% if renewed %}<meta http-equiv="refresh" content="{{ renewed }}">{% endif %}
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --light: 34% }
  @media (prefers-color-scheme: dark) { :root { --light: 68% } }
  body { font: 15px/1.45 sans-serif; max-width: 90em; margin: 2em auto; padding: 0 1em;
    overflow-wrap: anywhere }
  .scroll { overflow: auto; margin: 1em 0 }
  caption, th, td { padding: 2px 7px; text-align: right; white-space: pre }
  caption, th:first-child { text-align: left }
  caption, .best { font-weight: bold } th[scope=row] { font-weight: normal }
  td { --std: -1px } /* of one run: no bar */
  td[style] { background: linear-gradient(90deg, transparent calc(var(--mean) - var(--std) - 1px),
    currentColor 0 calc(var(--mean) + var(--std) + 1px), transparent 0) bottom / 100% 3px no-repeat,
    hsl(200 70% 45% / calc(.6 * var(--mean))) }
  .own { outline: 2px solid; outline-offset: -3px }
  #minutes:checked ~ .charts .step, #step:checked ~ .charts .minutes { display: none }
  .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21em, 100%), 1fr)) }
  .of { color: hsl(calc(215 + 137.5 * var(--k)) 65% var(--light)); margin: .3em }
  svg { margin: .6em; font-size: 11px; fill: currentColor }
  polyline { fill: none; stroke: currentColor; stroke-width: 1.7 }
  .raw { opacity: .25; stroke-width: 1 } .grid { opacity: .2; stroke-width: 1 }
  .dot { stroke-width: 6; stroke-linecap: round }
  section { display: flex; flex-wrap: wrap; gap: 1.2em; border-top: 1px solid }
  section p { flex: 1 14em; max-height: 28em; overflow: auto; white-space: pre-wrap;
    unicode-bidi: plaintext; padding-left: .6em; border-left: 4px solid transparent }
  .right { border-color: hsl(140 65% var(--light)) } .wrong { border-color: hsl(0 65% 50%) }
  img { width: 160px; height: max-content; margin: 1em 0 } [hidden] { display: none }
</style>
<h1>{{ title }}</h1>
<p>{{ what }}</p>

{% for title, columns, rows in tables %}
  <div class="scroll" tabindex="0"><table><caption>{{ title }}</caption>
    <tr>{% for x in ["model"] + columns %}<th scope="col">{{ x }}</th>{% endfor %}</tr>
    {% for name, cells in rows.items() %}
      <tr><th scope="row">{{ name }}</th>
      {% for text, mean, std, look in cells %}
        <td class="{{ look }}"{% if mean is not none %} style="--mean: {{ mean }}%
          {%- if std is not none %}; --std: {{ std }}%{% endif %}"{% endif %}>{{ text }}</td>
      {% endfor %}</tr>
    {% endfor %}
  </table></div>
{% endfor %}
{% if tables %}
  <p>A bar, of several runs: the mean, one deviation to both sides, between 0 and 100 %.</p>
{% endif %}

<h2>Training, of runs whose log is there</h2>
<p>Faint as logged, strong the mean over a twentieth of the steps before.</p>
{% for name, folders in runs.items() %}
  <p class="of" style="--k: {{ loop.index0 }}">&#9679; {{ name }}
    {%- if folders != [name] %}: {{ folders | join(", ") }}{% endif %}</p>
{% endfor %}
<input type="radio" name="over" id="step" checked><label for="step">over steps</label>
<input type="radio" name="over" id="minutes"><label for="minutes">over minutes of training</label>
<div class="charts">
{% for chart in charts %}
  <svg class="{{ chart.unit }}" viewBox="-10 0 370 200" role="img"><title>{{ chart.title }}</title>
    {% include "chart" %}
  </svg>
{% endfor %}
</div>

{% if shown %}
<h2>Questions and answers</h2>
<p>Chosen so that every kind is there; how often each is, stands in the tables.</p>
<form>
  {% for key, choices in filters.items() %}
    <label>{{ key }} <select name="{{ key }}"><option value="">any</option>
      {% for x in choices %}<option value="{{ x }}">{{ x }}</option>{% endfor %}</select></label>
  {% endfor %}
  <output name="count"></output> of {{ shown | length }} shown
</form>
{% for answers in shown %}
  {% set asked = answers.values() | first %}
  <section data-task="{{ asked.task }}">
    <img src="{{ image_of(asked) }}" alt="{{ asked.modality }}, the image of {{ asked.id }}">
    <p>{{ asked.id }}, {{ asked.task }}, {{ asked.modality }}

<b>{{ asked.question }}</b>
{{ options_text(asked.options) }}right: {{ asked.answer }}</p>
    {% for name, row in answers.items() %}
      <p data-model="{{ name }}" class="{{ kinds_of(row) | join(" ") }}"><b>{{ name }}</b>
{{ row.completion | truncate(4000, True, " .. (the rest is in completions-*.jsonl)") }}

{% if row.cut_off is true %}cut off at the limit{{ "\n" }}{% endif %}
read as: {{ given_option(row) }}
accuracy {{ row.acc }}, format {{ row.fmt }}, consistency {{ row.con }}
F: {{ "failed" if row.verdict != row.verdict else row.verdict or "undecided" }}
{% set seen, was_cut = visible_thought(row.thought or "", row.options) %}
{% if was_cut %}F saw (unless --judge_sees raw): {{ seen }}{{ "\n" }}{% endif %}
{% for x in row.false_statements %}not so in the image: {{ x }}{{ "\n" }}{% endfor %}</p>
    {% endfor %}
  </section>
{% endfor %}
<script>
const form = document.forms[0];
form.onchange = () => {
  const {task, answer, model} = Object.fromEntries(new FormData(form));
  let wanted = model ? `[data-model="${CSS.escape(model)}"]` : "[data-model]";
  if (answer) wanted += "." + answer;
  let count = 0;
  for (const section of document.querySelectorAll("section")) {
    section.hidden = task && task != section.dataset.task || !section.querySelector(wanted);
    count += !section.hidden;
  }
  form.elements.count.value = count;
};
form.onchange();  // a browser may have kept what was chosen
</script>
{% endif %}
</html>
"""


OUTCOMES = {  # kinds of answers -> their (acc,) or (acc, con)
    "right": (1,), "wrong": (0,), "consistent-but-wrong": (0, 1), "right-but-inconsistent": (1, 0)}


def kinds_of(row):
    """The OUTCOMES that fit a row; none if its acc is nan (no reply)."""
    scores = row["acc"], row["con"]
    return [kind for kind, expected in OUTCOMES.items() if scores[:len(expected)] == expected]


def examples(rows):
    """{name: its rows} -> SHOWN questions at most, each {name: its row}, in a fixed random order,
    but first those that are the first of some name, task and kind, so that every choice on the page
    finds one, then the second ones, .. Of a name's several answers the first is shown."""
    questions = defaultdict(dict)
    for name, answers in rows.items():
        for row in answers:
            questions[row["path"], row["id"]].setdefault(name, row)
    seen, found = Counter(), []
    for question in random.Random(0).sample(list(questions.values()), len(questions)):
        kinds = [(name, row["task"], x) for name, row in question.items() for x in kinds_of(row)]
        if kinds:
            found.append((min(seen[kind] for kind in kinds), question))
        seen.update(kinds)
    found.sort(key=itemgetter(0))
    return [question for _, question in found[:SHOWN]]


# the pages are self-contained, and whatever a model or a file says is escaped in them
TEMPLATES = jinja2.Environment(loader=jinja2.DictLoader({"page": PAGE, "chart": CHART}),
                               autoescape=True, trim_blocks=True, lstrip_blocks=True)
TEMPLATES.globals |= dict(
    place=place, given_option=given_option, visible_thought=rewards.visible_thought,
    options_text=rewards.options_text, kinds_of=kinds_of,
    image_of=partial(data_url, side=THUMBNAIL, kind="JPEG"))
page = TEMPLATES.get_template("page").render


def write_report(out, results, rows, what, paper=False, matrix=None):
    """report.md, which is printed too, and eval.html."""
    found = [*tables(results, paper, matrix), answers_given(results, rows)]
    text = "\n".join([f"{what}\n", *(markdown(*table) for table in found)])
    data.write_text(out / "report.md", text)
    runs = {name: entry["checkpoints"] for name, entry in results.items()}
    tasks = sorted({row["task"] for answers in rows.values() for row in answers})
    data.write_text(out / "eval.html", page(
        title="Evaluation", what=what, tables=found, runs=runs, charts=curves(runs),
        shown=examples(rows), filters=dict(task=tasks, answer=OUTCOMES, model=rows)))
    print(f"\n{text}\n{out}: results.json, report.md, eval.html, completions-*.jsonl")


def watch(folders, out):
    """--watch: write OUT/watch.html, the runs' curves, every RENEWED s until Ctrl-C. As often the
    page reloads itself."""
    for folder in folders:
        expect(os.path.isdir(folder), f"--watch {folder}: no such folder, expected a run's")
        if not Path(folder, "metrics.jsonl").exists():
            print(f"{folder}: no metrics.jsonl yet")
    out.mkdir(parents=True, exist_ok=True)
    print(f"{out / 'watch.html'}: open it in a browser; Ctrl-C ends this")
    runs = {folder: [folder] for folder in folders}
    with suppress(KeyboardInterrupt):
        while True:
            data.write_text(out / "watch.html", page(
                title=", ".join(folders), what=f"As of {time.strftime('%X')}.", runs=runs,
                charts=curves(runs), renewed=RENEWED))
            time.sleep(RENEWED)

# ---- the command line ----------------------------------------------------------------------------

def parse_args(argv):
    """The command line -> Namespace; DataError for an unknown or impossible value."""
    parser = data.Parser(description=__doc__,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, knob in KNOBS.items():
        parser.add_argument(f"--{name}", **knob)
    args = parser.parse_args(argv)
    for name, least in LEAST.items():
        value = getattr(args, name)
        expect(least <= value < math.inf, f"--{name} {value}: expected at least {least}")
    seeds = set(args.seeds)
    expect(len(seeds) == len(args.seeds) and min(seeds) >= 0 and max(seeds) < 2**32,
           "--seeds: expected different ones from 0 to 2^32 - 1")
    expect(len(seeds) == 1 or args.temperature > 0,
           "--seeds needs a --temperature above 0: greedy answers are the same for each")
    return args


def checkpoints_of(texts):
    """--ckpt's texts -> {name: its checkpoints}. "NAME=A,B" is one name of two."""
    checkpoints = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not equals or text.startswith("openai:") or os.path.isdir(text):
            name = rest = text
        whole = rest == name or rest.startswith("openai:")  # these may hold a ","
        paths = [rest] if whole else rest.split(",")
        served = [path for path in paths if path.startswith("openai:")]
        expect(all(SPEC.fullmatch(x) and ",openai:" not in x for x in served), "--ckpt openai:..: "
               "expected one openai:BASE_URL#MODEL, the key in OPENAI_API_KEY")
        expect(name and all(paths) and name not in checkpoints,
               f"--ckpt {text}: expected a checkpoint, or NAME=A,B,.., and each name once")
        checkpoints[name] = paths
    return checkpoints


def folder_of(ckpt):
    """The folder in which a checkpoint lies; "out" for a name on the hub, which lies in none."""
    parent = Path(ckpt).parent
    return parent if parent.is_dir() else Path("out")


def file_names(names, out):
    """--ckpt's names -> {name: its file of completions}; DataError if two had the same."""
    files = {}
    for name in names:
        label = os.path.relpath(name, out) if os.path.isdir(name) else name
        label = re.sub(r"[^\w.]+", "-", label).strip("-.")
        files[name] = out / f"completions-{label}.jsonl"
    expect(len(set(files.values())) == len(files), f"--ckpt {[*names]}: expected different names")
    return files


def json_object(path):
    """What a JSON file holds, {} if there is none; DataError if it is no object."""
    try:
        return {**json.loads(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        raise data.DataError(f"{path}: not a JSON object, expected what an earlier run left: "
                             "remove it, or name another folder") from None


def without_nan(row):
    """JSON has no nan: null it is."""
    return {key: None if rewards.failed(value) else value for key, value in row.items()}


def taught_thinking(ckpt, otherwise):
    """The --thinking that a checkpoint was trained with, or `otherwise` if that isn't known."""
    return json_object(Path(ckpt, "knobs.json")).get("thinking", otherwise)


def questions_of(ckpt, args):
    """The records that a checkpoint answers: of --data, of the phantoms beside it, or --image."""
    thinking = args.thinking or taught_thinking(ckpt, "before")
    expect(thinking in rewards.INSTRUCTIONS,
           f"{Path(ckpt, 'knobs.json')}: thinking {thinking!r} is not known")
    if args.image:
        item = dict.fromkeys(("task", "modality", "answer", "group"), "")
        return [item | dict(id="--image", path=args.image, question=args.question,
                            options=args.options, thinking=thinking)]
    phantoms = folder_of(ckpt) / "phantoms" / "phantoms.jsonl"
    expect(args.data or phantoms.is_file(),
           f"{phantoms} is not there, expected the phantoms, or --data FILE")
    records = data.read_records(args.data or phantoms, args.split, args.only, thinking)
    taken = {r["task"] for r in records} & {*RATES, "n", "params, M", "letter", "cut off", "mean"}
    expect(not taken, f"task {', '.join(sorted(taken))}: the tables have such a column already; "
                      "give the task another name")
    return subset(records, args.questions)


def answer(ckpt, records, judge, args, cache=os.devnull):
    """A checkpoint, or a server whose replies go to `cache`, answers the records with every seed ->
    rows, number of parameters (None: unknown). Where no reply came fmt, acc and con are nan."""
    rank, _, device = M.setup_devices()
    score, params = rewards.score_leniently, None
    limit = args.max_new_tokens or M.MAX_NEW_TOKENS["tiny" if M.is_tiny(ckpt) else "paper"]
    if ckpt.startswith("openai:"):
        server = Server(ckpt, cache, limit, TIMEOUT, args.batch)
        ask = partial(server.answers, records, args.max_pixels)
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        policy, processor = M.load_unmerged(ckpt, dtype=dtype, device=device,
                                            max_pixels=args.max_pixels)
        M.check_texts(processor, records, rewards.question_text)
        params = policy.num_parameters()
        ask = partial(completions, policy, processor, records, max_new_tokens=limit, rank=rank,
                      batch=args.batch)
        if any(Path(ckpt, file).is_file() for file in ("knobs.json", "base.json")):
            score = rewards.score
    rows = []
    for seed in args.seeds:
        said = tqdm(ask(temperature=args.temperature, seed=seed), f"{ckpt}, seed {seed}",
                    len(records), disable=rank > 0)
        answers = scored(said, records, judge, score)
        rows += [dict(ckpt=ckpt, seed=seed) | row for row in answers]
    if any(row.get("read_as") == "failed" for row in rows):  # a server's alone
        print(f"{ckpt}: some questions got no reply: {failures(server.usage)}")
    return rows, params


def answer_one(ckpts, args):
    """--image: print what each checkpoint answers to --question."""
    expect(args.image and args.question and args.options,
           "one question needs --image, --question and --options")
    data.check_options(args.options)
    for ckpt in ckpts:
        records = questions_of(ckpt, args)
        data.check_images(records)
        rows, _ = answer(ckpt, records, make_judge(), args)
        for row in rows:
            print(f"{ckpt}\n  {row['completion']}\n  read as: {given_option(row)}")


def main(argv=None):
    args = parse_args(argv)
    if args.watch:
        return watch(args.watch, Path(args.out or args.watch[0]))
    checkpoints = checkpoints_of(args.ckpt)
    ckpts = list(chain(*checkpoints.values()))
    if args.image or args.question or args.options:
        return answer_one(ckpts, args)

    out = Path(args.out or folder_of(ckpts[0]))
    files = file_names(checkpoints, out)
    cache = out / "replies.jsonl"
    rank, world, _ = M.setup_devices()  # before a judge is loaded: each process has its own GPU
    judge = make_judge(args.judge, args.judge_sees, cache=cache)
    questions = {ckpt: questions_of(ckpt, args) for ckpt in ckpts}
    data.check_images(chain(*questions.values()), rank, world)
    if args.matrix:
        values = {record[args.matrix] for ckpt in ckpts for record in questions[ckpt]}
        expect(values & checkpoints.keys(), f"--matrix {args.matrix}: expected --ckpt NAME=A.., "
                                            f"NAME one of {', '.join(sorted(values))}")
    out.mkdir(parents=True, exist_ok=True)
    expect(os.access(out, os.W_OK), f"{out}: can't be written to, expected another --out")
    path = out / "results.json"
    earlier = json_object(path)  # if it can't be read, say so now and not after hours of sampling
    expect(all(isinstance(x, dict) and "overall" in x for x in earlier.values()),
           f"{path}: not what eval.py writes: name another --out")
    for name in ("report.md", "eval.html"):
        expect(earlier or not (out / name).exists(),
               f"{out / name}: there without a results.json beside it: name another --out")

    results, rows, before = {}, {}, []
    for name, paths in checkpoints.items():
        rows[name] = []
        for ckpt in paths:
            answers, params = answer(ckpt, questions[ckpt][rank::world], judge, args, cache)
            rows[name] += sorted(M.gather(answers), key=itemgetter("seed", "path", "id"))
        results[name] = summary(rows[name]) | dict(
            params=params, knobs=vars(args), difference=difference(before, rows[name]))
        before = rows[name]
        if rank == 0:
            data.write_records(map(without_nan, rows[name]), files[name])
            found = json_object(path)  # again: another eval.py may have added to it since
            text = json.dumps(found | results, indent=1, ensure_ascii=False)
            data.write_text(path, text + "\n")

    source = ", ".join(args.data) or "the phantoms beside each checkpoint"
    way = f"temperature {args.temperature:g}, seeds {args.seeds}" if args.temperature else "greedy"
    what = (f"In %, ± the deviation over a row's checkpoints (of one, over --seeds); split "
            f"{args.split} of {source}; {way}; F: {args.judge}, {args.judge_sees}.")
    if args.paper:
        what += " Rows (paper): the paper's figures, on its own questions."
    if rank == 0:
        write_report(out, results, rows, what, args.paper, args.matrix)
    M.close_devices()


if __name__ == "__main__":
    M.run(main)
