"""Tables 1-3: accuracy by task, format and consistency rates, and a page that a person looks at.

Every question of the test split is answered once (greedy; with --temperature once per seed), then
scored by the code that gives the rewards: rewards.score, with an F of judge.py. Written are

    results.json              figures as fractions; names evaluated earlier stay in it
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
without our tags: rewards.read_leniently. How they were read is counted under the tables.

Left out on purpose: partial credit, majority votes. Rounding aside, greedy results depend neither
on --batch nor on the number of processes; those at a temperature do.
"""
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
from itertools import chain, product, zip_longest
from operator import itemgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import jinja2  # comes with torch
import numpy as np
import torch
from tqdm import tqdm

import data
import model as M
import rewards
from data import expect
from judge import SPEC, Server, data_url, failures, make_judge

KNOBS = dict(  # the flags, as argparse takes them
    ckpt=dict(nargs="+", default=["out/grpo"], help="checkpoints, folders or names on the hub, or "
              "NAME=A,B,..: one row with mean and standard deviation over A, B, .. [out/grpo]; "
              "[NAME=]openai:BASE_URL#MODEL: a chat server's, the key in OPENAI_API_KEY, replies "
              "kept in OUT/replies.jsonl, --batch requests at a time"),
    data=dict(nargs="+", default=[], help="files of records, .jsonl or Med-R1's .json (default: "
              "phantoms/phantoms.jsonl beside each checkpoint)"),
    split=dict(choices=data.SPLITS, default="test", help="which of their records [%(default)s]"),
    only=dict(nargs="+", default=[], help="KEY=VALUE they have, say modality=CT task=anatomy"),
    questions=dict(type=int, default=0, help="so many of them, the same each time, 0 = all [0]"),
    thinking=dict(choices=list(rewards.INSTRUCTIONS), help="where the thought stands, or none "
                  "(default: as the checkpoint was trained, its knobs.json tells; else before)"),
    temperature=dict(type=float, default=0.0, help="of the sampling, 0 = greedy [%(default)s]"),
    seeds=dict(nargs="+", type=int, default=[0], help="at a temperature every question is "
               "answered once for each: mean and standard deviation over them [0]"),
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
    watch=dict(nargs="+", default=[], help="folders of runs: instead, keep watch.html, their "
               "curves, up to date while they train; in --out or the first of them"),
)
LEAST = dict(questions=0, temperature=0, batch=1, max_new_tokens=0, max_pixels=1)
SHOWN = 60        # questions on the page at most
POINTS = 200      # of a curve that are drawn at most
THUMBNAIL = 224   # px, longer side of an image on the page
RENEWED = 5       # s after which the page of a run that is watched is written and loaded anew
TIMEOUT = 300.0   # s that a chat server may take for an answer
RESAMPLES = 2000  # of an interval

PAPER_OVERALL = {  # Tables 2 and 3, by the name that a row has here
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


def paper_lines():
    """Table 1 -> {name: {column: text}}."""
    lines = {}
    for line in PAPER.strip().split("\n"):
        name, params, *numbers = line.split()
        figures = map("{} ± {}".format, numbers[::2], numbers[1::2])
        columns = ("params, M", *data.TASKS, "overall")
        lines[f"{name} (paper)"] = dict(zip(columns, [params, *figures], strict=True))
    return lines

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


def scored(said, records, judge, score=rewards.score, progress=False):
    """(text, cut_off) for each record -> one dict (row) per record, in their order: what `score`
    (or rewards.score_leniently; fmt, acc and con are Eqs. 4-6) and rewards.grounding tell of it,
    path and group of the record, cut_off. progress: the bar's name."""
    said = list(tqdm(said, progress, len(records), disable=not progress))
    rows = score([text for text, _ in said], records, judge)
    for row, record, (_, cut_off) in zip(rows, records, said, strict=True):
        row |= dict(path=record["path"], group=record["group"], cut_off=cut_off)
        row |= rewards.grounding(row["thought"], record.get("shows"))
    return rows


def evaluate(policy, processor, records, judge, *, progress=False, **knobs):
    """The rows of the policy's completions; knobs are those of `completions`."""
    said = completions(policy, processor, records, **knobs)
    return scored(said, records, judge, progress=progress)


def subset(records, n):
    """The first n (0: all) of a fixed shuffled order, in the file's order: 100 are among 200."""
    order = random.Random(0).sample(range(len(records)), len(records))
    return [records[i] for i in sorted(order[:n or None])]


def grouped(rows, key, order=()):
    """Rows -> {value of `key`: its rows}: the values of `order` first, others sorted behind."""
    groups = {value: [] for value in order}
    for row in sorted(rows, key=lambda row: row[key]):
        groups.setdefault(row[key], []).append(row)
    return {value: members for value, members in groups.items() if members}


def spread(rows, key="acc"):
    """Rows of one or several runs -> a figure: "mean" of `key` over the runs (None without a
    number), "std" over them (n - 1 in the denominator; 0 for one run), "n" questions, "runs".

    A run is a checkpoint where there are several, else a seed of the sampling. nan is left out.
    """
    run = "ckpt" if len({row["ckpt"] for row in rows}) > 1 else "seed"
    values = defaultdict(list)
    for row in rows:
        if not rewards.failed(row[key]):
            values[row[run]].append(row[key])
    means = list(map(fmean, values.values()))
    mean = fmean(means) if means else None
    std = stdev(means) if len(means) > 1 else 0.0
    n = len(rows) // len({row["seed"] for row in rows})
    return {"mean": mean, "std": std, "n": n, "runs": len(means)}


def summary(rows):
    """Rows of one name -> its entry in results.json: fractions, as section 4.1 defines them.

    A task's accuracy is its right answers / its questions; overall is all right answers / all
    questions, not the mean of the tasks. A completion without a readable answer is wrong.
    judge_failed: completions on which F failed, left out of consistency.
    read_as: how many completions were read in which way, {} for a model trained here; those that
    "failed" got no reply and are left out of every mean, though not of n.
    """
    tasks = grouped(rows, "task", data.TASKS)
    modalities = grouped(rows, "modality", data.MODALITIES)
    read_as = Counter(row["read_as"] for row in rows if "read_as" in row)
    return {
        "overall": spread(rows),
        "tasks": {task: spread(members) for task, members in tasks.items()},
        "modality": {modality: spread(members) for modality, members in modalities.items()},
        "format": spread(rows, "fmt"),
        "consistency": spread(rows, "con"),
        "grounding": spread(rows, "grounding"),
        "grounding_by_task": {x: spread(members, "grounding") for x, members in tasks.items()},
        "seeds": sorted({row["seed"] for row in rows}),
        "checkpoints": list(dict.fromkeys(row["ckpt"] for row in rows)),
        "judge_failed": sum(rewards.failed(row["verdict"]) for row in rows),
        "cut_off": spread(rows, "cut_off")["mean"],
        "read_as": dict(sorted(read_as.items())),
    }


def difference(before, after):
    """Rows of two names -> {figure: after minus before, see bootstrap}; {} if they answered other
    questions. Checkpoints pair by place: of NAME=A,B and NAME=C,D, C with A. A question on which
    one of the two has no value is left out."""
    asked = itemgetter("path", "id", "seed")
    if list(map(asked, before)) != list(map(asked, after)):
        return {}
    figures = {}
    for name, key in dict(accuracy="acc", consistency="con", grounding="grounding").items():
        sets = {}  # checkpoint: group: changes
        for old, new in zip(before, after, strict=True):
            changes = sets.setdefault(new["ckpt"], {}).setdefault(new["group"], [])
            if not rewards.failed(new[key] - old[key]):
                changes.append(new[key] - old[key])
        known = [groups for groups in sets.values() if any(groups.values())]
        if known:
            figures[name] = bootstrap(known)
    return figures


def bootstrap(sets):
    """For each checkpoint {group: changes} -> their "mean", and "low" and "high" of its 95 %
    interval: about other images, not about other seeds of the training. What is drawn again is a
    group (an image; of real data a patient), since its questions are right or wrong together;
    checkpoints asked about the same groups get the same draw."""
    rng = np.random.default_rng(0)
    draws, means, drawn = {}, [], []
    for groups in sets:
        names = tuple(groups)
        if names not in draws:
            draws[names] = rng.integers(len(names), size=(RESAMPLES, len(names)))
        sums = np.array([(sum(changes), len(changes)) for changes in groups.values()])
        again = sums[draws[names]].sum(1)  # (RESAMPLES, 2)
        drawn.append(again[:, 0] / again[:, 1])
        means.append(sums[:, 0].sum() / sums[:, 1].sum())
    low, high = np.quantile(np.mean(drawn, 0), (0.025, 0.975)).tolist()
    return {"mean": float(np.mean(means)), "low": low, "high": high}

# ---- the report ----------------------------------------------------------------------------------

class Table(NamedTuple):
    """square: a map in colours, with its diagonal where a line and a column have the same name."""
    title: str
    cells: list  # [header, line, ...] of texts
    numbers: list = []  # of the lines: what each cell is compared by, or None
    square: bool = False

    def best(self):
        """The places (line, column) of each column's largest number, if any is smaller."""
        places = set()
        for j in range(len(self.cells[0])):
            column = [line[j] for line in self.numbers]
            known = {x for x in column if x is not None}
            if len(known) > 1:
                places |= {(i, j) for i, x in enumerate(column) if x == max(known)}
        return places


def percent(figure):
    """A figure in %: with its deviation if it is of several runs, with its interval if it is a
    difference; "-" for none. A text stays."""
    if isinstance(figure, str):
        return figure
    if figure is None or figure["mean"] is None:
        return "-"
    mean = 100 * figure["mean"]
    if "low" in figure:
        return f"{mean:+.1f} ({100 * figure['low']:+.1f} to {100 * figure['high']:+.1f})"
    if figure["runs"] > 1:
        return f"{mean:.1f} ± {100 * figure['std']:.1f}"
    return f"{mean:.1f}"


def grid(title, lines, square=False):
    """{name: {column: figure or text}} -> a Table."""
    columns = {}  # a dict keeps the order in which they came
    for figures in lines.values():
        columns |= figures
    cells, numbers = [["model", *columns]], []
    for name, figures in lines.items():
        figures = [figures.get(column) for column in columns]
        cells.append([name, *map(percent, figures)])
        numbers.append([None, *map(number, figures)])
    return Table(title, cells, numbers, square)


def number(figure):
    """What a figure is compared by, None for texts and differences."""
    if isinstance(figure, dict) and "runs" in figure and figure["mean"] is not None:
        return round(100 * figure["mean"], 1)
    return None


def tables(results):
    """{name: entry} -> Tables: as in Table 1, by modality, square or differences of the rows."""
    tasks = dict.fromkeys(data.TASKS)
    for entry in results.values():
        tasks |= dict.fromkeys(entry["tasks"])
    lines = {}
    for name, entry in results.items():
        params = f"{entry['params'] / 1e6:.1f}" if entry["params"] else "-"
        lines[name] = {"params, M": params} | tasks | entry["tasks"]
        for rate in ("overall", "format", "consistency", "grounding"):
            lines[name][rate] = entry[rate]
        lines[name]["n"] = str(entry["overall"]["n"])
        if entry.get("paper"):
            lines[name]["overall in the paper"] = PAPER_OVERALL.get(name, "-")
    if entry.get("paper"):
        lines |= paper_lines()

    def part(key):
        return {name: entry.get(key, {}) for name, entry in results.items()}
    found = [grid("Accuracy by task", lines), grid("Accuracy by modality", part("modality"))]
    matrix = entry.get("matrix")
    if matrix:
        found.append(square(matrix, part("tasks" if matrix == "task" else matrix)))
    elif any(part("difference").values()):
        found.append(grid("Each row minus the one before, on the same questions, in points; 95 % "
                          "intervals over images, for these checkpoints", part("difference")))
    return found


def square(key, lines):
    """Med-R1's matrix, {name: {value: figure}}: a line for each checkpoint, a column for each value
    of `key` that was asked. A column's mean is over the checkpoints named after a value."""
    def mean_of(figures):
        means = [x["mean"] for x in figures if x and x["mean"] is not None]
        return {"mean": fmean(means) if means else None, "runs": 1}

    lines = {name: figures | {"mean": mean_of(figures.values())} for name, figures in lines.items()}
    own = [figures for name, figures in lines.items() if name in figures]
    means = {column: mean_of(figures.get(column) for figures in own) for column in own[0]}
    return grid(f"Accuracy, trained on one {key} alone (line), asked about all",
                lines | {"mean": means}, square=True)


def markdown(table):
    """A Table -> title and table in Markdown, the first column on the left, a diagonal in bold."""
    header, *lines = table.cells
    text = f"{table.title}\n\n"
    for cells in (header, ["---"] + ["---:"] * (len(header) - 1), *lines):
        cells = [" ".join(cell.replace("|", "\\|").split()) for cell in cells]
        if table.square and cells[0] in header[1:-1]:
            i = header.index(cells[0])
            cells[i] = f"**{cells[i]}**"
        text += f"| {' | '.join(cells)} |\n"
    return text


def given_option(row):
    """The text of the option that a row's completion answers."""
    if rewards.failed(row["acc"]):
        return "no reply"
    if row["given"] is None:
        return "unreadable"
    return row["options"][data.LETTERS.index(row["given"])]


def commonest(answers):
    """The three answers given most, as "Normal 80 %, Abnormal 20 %"."""
    found = Counter(answers).most_common(3)
    return ", ".join(f"{x} {100 * n / len(answers):.0f} %" for x, n in found)


def remarks(results, rows):
    """Lines under the tables. By the commonest answers a collapse to one of them is seen."""
    lines = []
    for name, entry in results.items():
        told = {}
        for task, members in grouped(rows[name], "task", data.TASKS).items():
            told[f"{task}, answers given"] = commonest([given_option(row) for row in members])
        told["letters given"] = commonest([row["given"] or given_option(row) for row in rows[name]])
        ways = [f"{how} {n}" for how, n in entry["read_as"].items()]
        told["answers read as (failed: no reply, in no mean)"] = ", ".join(ways)
        told["left out of consistency, F failed"] = entry["judge_failed"]
        if entry["grounding"]["mean"] is not None:
            unread = sum(rewards.failed(row["grounding"]) for row in rows[name])
            told["left out of grounding, no statement or no truth known"] = unread
        if entry["cut_off"]:
            told["completions cut off at the limit"] = f"{entry['cut_off']:.2%}"
        lines += [f"{name}, {what}: {x}" for what, x in told.items() if x]
    return lines


# ---- the page ------------------------------------------------------------------------------------

KINDS = {  # of answers: their accuracy, or accuracy and consistency
    "right": (1,), "wrong": (0,), "consistent-but-wrong": (0, 1), "right-but-inconsistent": (1, 0)}
CURVES = dict(  # figures of metrics.jsonl, and their charts' titles
    reward="reward, Eq. (3)", format="format reward, Eq. (4)",
    accuracy="accuracy reward, Eq. (5)", consistency="consistency reward, Eq. (6)",
    held_out_accuracy="held-out accuracy", loss="loss, Eq. (1)", kl="KL divergence per token",
    sampled_nll="-log probability per sampled token", length="tokens per completion",
    no_spread="share of groups without spread", seconds="seconds per step",
    seconds_rollout="seconds of sampling", seconds_reference="seconds of the reference",
    seconds_judge="seconds of F", seconds_waiting="seconds waited for the slowest process",
    seconds_update="seconds of the update")
CHART = """\
<text x="4" y="12" font-weight="bold">{{ chart.title }}</text>
{% for x, text in chart.xs.items() %}
  <polyline class="grid" points="{{ chart.x(x) }},24 {{ chart.x(x) }},{{ chart.height - 34 }}"/>
  <text x="{{ chart.x(x) }}" y="{{ chart.height - 20 }}" text-anchor="middle">{{ text }}</text>
{% endfor %}
{% for y, text in chart.ys.items() %}
  <polyline class="grid" points="{{ chart.left }},{{ chart.y(y) }} 348,{{ chart.y(y) }}"/>
  <text x="{{ chart.left - 5 }}" y="{{ chart.y(y) + 4 }}" text-anchor="end">{{ text }}</text>
{% endfor %}
<text x="348" y="{{ chart.height - 6 }}" text-anchor="end">{{ chart.unit }}</text>
{% for name, k, strokes, dots in chart.lines %}
  <g class="of" style="--k: {{ k }}"><title>{{ name }}</title>
  {% for look, points in strokes %}
    <polyline class="{{ look }}" points="{{ chart.path(points) }}"/>
  {% endfor %}
  {% for x, y in dots %}<circle cx="{{ chart.x(x) }}" cy="{{ chart.y(y) }}" r="3"/>{% endfor %}
  </g>
{% endfor %}
"""
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src 'unsafe-inline'; script-src 'unsafe-inline'">
{% if renewed %}<meta http-equiv="refresh" content="{{ renewed }}">{% endif %}
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --light: 34% }
  @media (prefers-color-scheme: dark) { :root { --light: 68% } }
  body { font: 15px/1.45 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em;
    overflow-wrap: anywhere }
  p { margin: .3em 0 } .what { font-size: 13px; opacity: .75 }
  .yes { color: hsl(140 65% var(--light)) } .no { color: hsl(0 65% var(--light)) }
  caption, th, td { padding: 2px 9px; text-align: right; white-space: nowrap }
  caption, th:first-child { text-align: left } caption, .best { font-weight: bold }
  td[style] { background: hsl(200 70% 45% / calc(.75 * var(--share))) }
  .own { outline: 2px solid; outline-offset: -3px }
  .scroll { overflow: auto; margin: 1em 0 } th[scope=row] { font-weight: normal }
  #minutes:checked ~ .charts .step, #step:checked ~ .charts .minutes { display: none }
  .charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21em, 100%), 1fr)) }
  figure { margin: .6em; max-width: 32em; font-size: 13px }
  svg { width: 100%; overflow: visible; font-size: 11px; fill: currentColor }
  .of { color: hsl(calc(215 + 137.5 * var(--k)) 65% var(--light)) }
  polyline { fill: none; stroke: currentColor; stroke-width: 1.7 }
  .raw { opacity: .25; stroke-width: 1 } .grid { opacity: .2; stroke-width: 1 }
  select { max-width: 100% }
  section { display: flex; flex-wrap: wrap; gap: 1.2em; padding: 1em 0; border-top: 1px solid #888 }
  section div { flex: 1 14em } [hidden] { display: none !important }
  img { width: 160px; height: max-content }
  .said { white-space: pre-wrap; max-height: 18em; overflow: auto }
</style>
<h1>{{ title }}</h1>
<p>{{ what }}</p>
{% for name, folders in runs.items() if folders != [name] %}
  <p class="what">{{ name }}: {{ folders | join(", ") }}</p>
{% endfor %}

{% for table in tables %}
  <div class="scroll" tabindex="0"><table><caption>{{ table.title }}</caption>
    <tr>{% for cell in table.cells[0] %}<th scope="col">{{ cell }}</th>{% endfor %}</tr>
    {% set best = [] if table.square else table.best() %}
    {% for cells in table.cells[1:] %}{% set i = loop.index0 %}
      <tr><th scope="row">{{ cells[0] }}</th>
      {% for cell in cells[1:] %}{% set j = loop.index %}
        {% set own = table.square and table.cells[0][j] == cells[0] and not loop.last %}
        {% set x = table.numbers[i][j] if table.square else none %}
        <td class="{{ "best" if (i, j) in best }}{{ "own" if own }}"
          {%- if x is not none %} style="--share: {{ x / 100 }}"{% endif %}>{{ cell }}</td>
      {% endfor %}</tr>
    {% endfor %}
  </table></div>
{% endfor %}
{% if remarks %}
  <details class="what"><summary>Answers given, and what was left out</summary>
    {% for line in remarks %}<p>{{ line }}</p>{% endfor %}</details>
{% endif %}
<p class="what">Accuracy, with bars of one deviation. Training, of runs whose log is there: faint as
  logged, strong the mean over a twentieth of the steps before.</p>
<input type="radio" name="over" id="step" checked><label for="step">over steps</label>
<input type="radio" name="over" id="minutes"><label for="minutes">over minutes of training</label>
<div class="charts">
{% for chart in charts %}
  <figure class="{{ chart.unit }}"><svg viewBox="0 0 360 {{ chart.height }}" role="img">
    <title>{{ chart.title }}</title>
    {% include "chart" %}
  </svg><figcaption>
    {% for name, k, _, _ in chart.lines %}{% if loop.changed(name) %}
      <span class="of" style="--k: {{ k }}">&#9679; {{ name }}</span>
    {% endif %}{% endfor %}
  </figcaption></figure>
{% endfor %}
</div>

{% if shown %}
  <h2>Questions and answers</h2>
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
    <div>
      <p class="what">{{ asked.id }}, {{ asked.task }}, {{ asked.modality }}</p>
      <p><b>{{ asked.question }}</b></p>
      {% for option in asked.options %}
        {% set letter = letters[loop.index0] %}
        <p{% if letter == asked.answer %} class="yes"{% endif %}>{{ letter }}) {{ option }}</p>
      {% endfor %}
    </div>
    {% for name, row in answers.items() %}
      <div data-model="{{ name }}" class="{{ kinds_of(row) | join(" ") }}">
        <p><b>{{ name }}</b>{% if row.cut_off %}, cut off at the limit{% endif %}</p>
        <p class="said" dir="auto">{{ row.completion | truncate(4000, True,
          " .. (the rest is in completions-*.jsonl)") }}</p>
        <p class="{{ "yes" if row.acc == 1 else "no" }}">{{ given(row) }}</p>
        <p class="what">accuracy {{ row.acc }}, format {{ row.fmt }}, consistency {{ row.con }};
          F: {{ "failed" if row.verdict != row.verdict else row.verdict or "undecided" }}</p>
        {% set seen, was_cut = visible(row.thought or "") %}
        {% if was_cut %}
          <details class="what"><summary>without letters and answer statements, as F sees it
            (unless --judge_sees raw)</summary><p class="said" dir="auto">{{ seen }}</p></details>
        {% endif %}
        {% for sentence in row.false_statements %}
          <p class="no">Not so in the image: {{ sentence }}</p>
        {% endfor %}
      </div>
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
TEMPLATES = jinja2.Environment(loader=jinja2.DictLoader({"page": PAGE, "chart": CHART}),
                               autoescape=True, trim_blocks=True, lstrip_blocks=True)


class Chart(NamedTuple):
    """lines: [(name, its number, strokes, dots)], a stroke (class, [(x, y), ..]), a dot (x, y).
    xs, ys: the ticks, {place: its text}, from end to end of an axis: beyond nothing is drawn."""
    title: str
    lines: list
    xs: dict
    ys: dict
    unit: str         # of x
    left: int = 40    # px, where the texts of ys end
    height: int = 200

    def x(self, value):
        low, *_, high = self.xs
        return np.interp(value, (low, high), (self.left, 348)).round(1)

    def y(self, value):
        low, *_, high = self.ys
        return np.interp(value, (low, high), (self.height - 34, 24)).round(1)

    def path(self, points):
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)


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
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            steps.append(json.loads(line))
            seconds += sum(x for key, x in steps[-1].items() if key.startswith("seconds"))
            steps[-1]["minutes"] = seconds / 60
    return steps


def curve(points):
    """[(step, figure), ..] -> strokes and dots: faint, as logged, and strong, the mean over a
    twentieth of the steps before."""
    x, y = np.array(points, dtype=float).T                           # (n), (n)
    window = np.ones(math.ceil(len(x) / 20))
    mean = np.convolve(y, window)[:len(x)] / np.convolve(y**0, window)[:len(x)]
    some = np.linspace(0, len(x) - 1, min(len(x), POINTS)).astype(int)
    raw, mean = (np.stack([x, line], 1)[some].tolist() for line in (y, mean))
    return [("raw", raw), ("", mean)], raw if len(raw) <= 20 else []


def curves(runs):
    """{name: folders of its runs} -> Charts over steps and over minutes for each of CURVES that
    some of them logged. Of the losses SFT's is shown alone: Con-GRPO's tells little."""
    logs, charts = [], []
    for k, (name, folders) in enumerate(runs.items()):
        logs += [(name, k, steps_of(folder)) for folder in folders]
    for key, over in product(CURVES, ("step", "minutes")):
        lines, xs, ys = [], [0], []
        for name, k, steps in logs:
            points = [(x[over], x[key]) for x in steps if x.get(key) is not None]
            if points and (key != "loss" or "reward" not in steps[0]):
                lines.append((name, k, *curve(points)))
                xs += [x for x, _ in points]
                ys += [y for _, y in points]
        if lines:
            charts.append(Chart(CURVES[key], lines, ticks(xs), ticks(ys), over))
    return charts


def accuracy_chart(results):
    """{name: entry} -> Chart, in %: per task a dot for each name, and to both sides of it a bar of
    one standard deviation where the name has several runs."""
    tasks, lines = {}, []
    for entry in results.values():
        tasks |= entry["tasks"]
    tasks = ["overall", *reversed(tasks)]  # from below
    for k, (name, entry) in enumerate(results.items()):
        bars, dots = [], []
        for task, figure in {"overall": entry["overall"], **entry["tasks"]}.items():
            if figure["mean"] is not None:
                x, std = 100 * figure["mean"], 100 * figure["std"]
                y = tasks.index(task) + 0.35 - 0.7 * (k + 0.5) / len(results)
                bars.append(("", [(x - std, y), (x + std, y)]))
                dots.append((x, y))
        lines.append((name, k, bars, dots))
    ys = {-0.5: "", **dict(enumerate(tasks)), len(tasks) - 0.5: ""}
    left, height = 12 + 6 * max(map(len, tasks)), 58 + len(tasks) * (12 + 9 * len(lines))
    return Chart("Accuracy", lines, ticks([0, 100]), ys, "%", left, height)


def kinds_of(row):
    """Those of KINDS that a row is of: none without an accuracy."""
    scores = row["acc"], row["con"]
    return [kind for kind, expected in KINDS.items() if scores[:len(expected)] == expected]


def examples(rows):
    """{name: its rows} -> SHOWN questions at most, each {name: its row}: in turn one for each name,
    task and kind, so that every choice on the page has some. Of a name's several answers to a
    question the first checkpoint's and seed's is shown."""
    questions, pools = defaultdict(dict), defaultdict(list)
    for name, answers in rows.items():
        for row in answers:
            questions[row["path"], row["id"]].setdefault(name, row)
    for question in random.Random(0).sample(list(questions), len(questions)):
        for name, row in questions[question].items():
            for kind in kinds_of(row):
                pools[name, row["task"], kind].append(question)
    chosen = dict.fromkeys(chain(*zip_longest(*pools.values())))  # each once
    chosen.pop(None, None)  # which stands where a pool is empty
    return [questions[question] for question in list(chosen)[:SHOWN]]


def html(title, what, runs, charts, **parts):
    """The self-contained page -> str. Whatever a model or a file says is escaped."""
    return TEMPLATES.get_template("page").render(
        title=title, what=what, runs=runs, charts=charts + curves(runs), letters=data.LETTERS,
        kinds_of=kinds_of, given=given_option, visible=rewards.visible_thought,
        image_of=partial(data_url, side=THUMBNAIL, kind="JPEG"), **parts)


def page(results, rows, what):
    """eval.html -> str. results: {name: entry}, rows: {name: its rows}."""
    runs = {name: entry["checkpoints"] for name, entry in results.items()}
    tasks = {row["task"] for answers in rows.values() for row in answers}
    return html("Evaluation", what, runs, [accuracy_chart(results)], tables=tables(results),
                remarks=remarks(results, rows), shown=examples(rows),
                filters={"task": sorted(tasks), "answer": KINDS, "model": rows})


def watch(folders, out):
    """--watch: write OUT/watch.html, the runs' curves, every RENEWED s until Ctrl-C. As often the
    page reloads itself."""
    for folder in folders:
        expect(os.path.isdir(folder), f"--watch {folder}: no such folder, expected a run's")
    out.mkdir(parents=True, exist_ok=True)
    print(f"{out / 'watch.html'}: open it in a browser; Ctrl-C ends this")
    with suppress(KeyboardInterrupt):
        while True:
            what, runs = f"As of {time.strftime('%X')}.", {folder: [folder] for folder in folders}
            text = html(", ".join(folders), what, runs, [], renewed=RENEWED)
            data.write_text(out / "watch.html", text)
            time.sleep(RENEWED)


def write_report(out, results, rows, what):
    """report.md, which is printed too, and eval.html."""
    lines = [f"{what}\n", *map(markdown, tables(results))]
    lines += [f"- {line}" for line in remarks(results, rows)]
    text = "\n".join(lines) + "\n"
    data.write_text(out / "report.md", text)
    data.write_text(out / "eval.html", page(results, rows, what))
    print(f"\n{text}\n{out}: results.json, report.md, eval.html, completions-*.jsonl")


def json_object(path):
    """What a JSON file holds, {} if there is none; DataError if it is no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    expect(isinstance(found, dict), f"{path}: not a JSON object, expected what an earlier run "
                                    "left: remove it, or name another folder")
    return found


def without_nan(row):
    """JSON has no nan: null it is."""
    return {key: None if rewards.failed(value) else value for key, value in row.items()}

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
    expect(len(args.seeds) == 1 or args.temperature > 0,
           "--seeds needs a --temperature above 0: greedy answers are the same for each")
    fine = len(set(args.seeds)) == len(args.seeds) and all(0 <= x < 2**32 for x in args.seeds)
    expect(fine, "--seeds: expected different ones from 0 to 2^32 - 1")
    return args


def checkpoints_of(texts):
    """--ckpt's texts -> {name: its checkpoints}. "NAME=A,B" is one name of two."""
    checkpoints = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        paths = rest.split(",")
        if not equals or text.startswith("openai:") or os.path.isdir(text):
            name, paths = text, [text]
        elif rest.startswith("openai:"):  # its address and model may hold "=" and ","
            paths = [rest]
        for path in paths:
            served, known = path.startswith("openai:"), SPEC.fullmatch(path)
            expect(not served or known and ",openai:" not in path, "--ckpt openai:..: expected one "
                   "openai:BASE_URL#MODEL, the key in OPENAI_API_KEY")
        expect(name and all(paths), f"--ckpt {text}: expected a checkpoint, or NAME=A,B,..")
        expect(name not in checkpoints, f"--ckpt: {name} is there twice, expected it once")
        checkpoints[name] = paths
    return checkpoints


def folder_of(ckpt):
    """The folder in which a checkpoint lies; "out" for a name on the hub, which lies in none."""
    parent = Path(ckpt).parent
    return parent if parent.is_dir() else Path("out")


def file_names(names, out):
    """List of --ckpt's names -> {name: its file of completions}; DataError if two had the same."""
    files = {}
    for name in names:
        label = os.path.relpath(name, out) if os.path.isdir(name) else name
        label = re.sub(r"[^\w.]+", "-", label).strip("-.")
        files[name] = out / f"completions-{label}.jsonl"
    expect(len(set(files.values())) == len(files), f"--ckpt {names}: expected different names")
    return files


def thinking_of(ckpt, args):
    """--thinking, else what the checkpoint's knobs.json tells, else "before"."""
    path = Path(ckpt, "knobs.json")
    thinking = args.thinking or json_object(path).get("thinking", "before")
    expect(thinking in rewards.INSTRUCTIONS, f"{path}: thinking {thinking!r} is not known")
    return thinking


def questions_of(ckpt, args):
    """The records that a checkpoint answers: of --data, or of the phantoms beside it."""
    phantoms = folder_of(ckpt) / "phantoms" / "phantoms.jsonl"
    expect(args.data or phantoms.is_file(),
           f"{phantoms} is not there, expected the phantoms, or --data FILE")
    files, thinking = args.data or phantoms, thinking_of(ckpt, args)
    records = data.read_records(files, args.split, args.only, thinking)
    records = subset(records, args.questions)
    data.check_images(records)
    return records


def answer(ckpt, records, judge, args, cache=os.devnull):
    """A checkpoint, or a server whose replies go to `cache`, answers the records with every seed ->
    rows, parameters of the network (None: unknown). No reply is nan for fmt, acc and con."""
    rank, _, device = M.setup_devices()
    score, params = rewards.score_leniently, None
    if ckpt.startswith("openai:"):
        server = Server(ckpt, cache, args.max_new_tokens or 512, TIMEOUT, args.batch)
        ask = partial(server.answers, records, args.max_pixels)
    else:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        policy, processor = M.load_unmerged(ckpt, dtype=dtype, device=device,
                                            max_pixels=args.max_pixels)
        M.check_texts(processor, records, rewards.question_text)
        params = policy.num_parameters()
        limit = args.max_new_tokens or (80 if M.is_tiny(ckpt) else 512)
        ask = partial(completions, policy, processor, records, max_new_tokens=limit, rank=rank,
                      batch=args.batch)
        if any(Path(ckpt, file).is_file() for file in ("knobs.json", "base.json")):
            score = rewards.score
    rows = []
    for seed in args.seeds:
        said = ask(temperature=args.temperature, seed=seed)
        answers = scored(said, records, judge, score, rank == 0 and f"{ckpt}, seed {seed}")
        rows += [dict(ckpt=ckpt, seed=seed) | row for row in answers]
    if any(row.get("read_as") == "failed" for row in rows):  # a server's alone
        print(f"{ckpt}: some questions got no reply: {failures(server.usage)}")
    return rows, params


def answer_one(checkpoints, args):
    """--image, --question, --options: print what each checkpoint says, and how it is read."""
    expect(args.image and args.question, "one question needs --image, --question and --options")
    data.check_options(args.options)
    item = dict(id="--image", path=args.image, question=args.question, options=args.options)
    item |= dict.fromkeys(("task", "modality", "answer", "group"), "")
    for ckpt in chain(*checkpoints.values()):
        item["thinking"] = thinking_of(ckpt, args)
        rows, _ = answer(ckpt, [item], make_judge(), args)
        for row in rows:
            print(f"{ckpt}\n  {row['completion']}\n  read as: {given_option(row)}")


def main(argv=None):
    args = parse_args(argv)
    checkpoints = checkpoints_of(args.ckpt)
    if args.watch:
        return watch(args.watch, Path(args.out or args.watch[0]))
    if args.image or args.question or args.options:
        return answer_one(checkpoints, args)
    ckpts = list(chain(*checkpoints.values()))
    out = Path(args.out or folder_of(ckpts[0]))
    files = file_names(list(checkpoints), out)
    cache = out / "replies.jsonl"
    rank, world, _ = M.setup_devices()  # before a judge is loaded: each process has its own GPU
    judge = make_judge(args.judge, args.judge_sees, cache=cache)
    questions = {ckpt: questions_of(ckpt, args) for ckpt in ckpts}
    if args.matrix:
        values = {record[args.matrix] for ckpt in ckpts for record in questions[ckpt]}
        expect(values & checkpoints.keys(), f"--matrix {args.matrix}: expected --ckpt NAME=A.., "
                                            f"NAME one of {', '.join(sorted(values))}")
    out.mkdir(parents=True, exist_ok=True)
    expect(os.access(out, os.W_OK), f"{out}: can't be written to, expected another --out")
    path = out / "results.json"
    json_object(path)  # if it can't be read, say so now and not after an hour of sampling

    results, rows, before = {}, {}, None
    for name, paths in checkpoints.items():
        rows[name] = []
        for ckpt in paths:
            answers, params = answer(ckpt, questions[ckpt][rank::world], judge, args, cache)
            rows[name] += sorted(M.gather(answers), key=itemgetter("seed", "path", "id"))
        results[name] = summary(rows[name]) | dict(params=params, knobs=vars(args),
                                                   paper=args.paper, matrix=args.matrix)
        if before:
            results[name]["difference"] = difference(rows[before], rows[name])
        before = name
        if rank == 0:
            data.write_records(map(without_nan, rows[name]), files[name])
            text = json.dumps(json_object(path) | results, indent=1, ensure_ascii=False)
            data.write_text(path, text + "\n")

    source = ", ".join(args.data) or "the phantoms beside each checkpoint"
    way = f"temperature {args.temperature:g}, seeds {args.seeds}" if args.temperature else "greedy"
    what = f"In %; split {args.split} of {source}; {way}; F: {args.judge}, {args.judge_sees}."
    if rank == 0:
        write_report(out, results, rows, what)
    M.close_devices()


if __name__ == "__main__":
    M.run(main)
