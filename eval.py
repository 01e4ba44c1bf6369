"""Tables 1-3: accuracy by task, format and consistency rates, and a page that a person looks at.

Every question of the test split is answered once (greedy; with --temperature once per seed), then
scored by the code that gives the rewards: rewards.score, with an F of judge.py. Written beside the
checkpoints are:

    results.json              figures as fractions; checkpoints evaluated earlier stay in it
    report.md, eval.html      the tables; on the page also some questions with image and answers
    completions-NAME.jsonl    every completion with its scores

    python eval.py --ckpt out/tiny-base out/sft out/grpo         # on out/phantoms
    python eval.py --ckpt out/grpo --temperature 1 --seeds 0 1 2 # mean and deviation over seeds
    python eval.py --ckpt SFT=out/sft,out1/sft GRPO=out/grpo,out1/grpo    # over checkpoints
    python eval.py --ckpt GLM=openai:http://localhost:8000/v1#MODEL --data my.jsonl
    python eval.py --ckpt CT=out/ct MRI=out/mri --matrix modality      # Med-R1's square
    torchrun --nproc_per_node=8 eval.py --ckpt out/grpo          # the questions are shared out
    python eval.py --ckpt out/grpo --image scan.png --question "What is this?" --options MRI CT

The columns are named by task. Those of the paper's Table 1 are anatomy ("Anatomy ID." there),
anomaly ("Anomaly Det."), location ("Lesion Loc."), modality ("Modality Class.") and pathology
("Pathology Char."); other tasks, say Med-R1's, follow.

Models that were not trained here (openai:, and folders without knobs.json or base.json) may answer
without our tags: rewards.read_leniently. How they were read is counted under the tables.

Left out on purpose: partial credit, majority votes. Greedy results do not depend on --batch or the
number of processes except for rounding; those at a temperature do, since a batch draws from one
stream of random numbers.
"""
import argparse
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import data
import model as M
import rewards
from data import expect
from judge import SPEC, Replies, Server, data_url, failures, make_judge

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
               "openai:BASE_URL#MODEL, whose replies are kept in OUT/replies.jsonl [%(default)s]"),
    judge_sees=dict(choices=["cut", "raw"], default="cut", help="the thought with letters and "
                    "answer statements cut, or raw as printed [%(default)s]"),
    matrix=dict(choices=["modality", "task"], help="the checkpoints, --ckpt NAME=A.., were each "
                "trained on the NAME of these alone: show the square of accuracies"),
    paper=dict(action="store_true", help="show the paper's own figures beside"),
    out=dict(help="folder of the results (default: that in which the first checkpoint lies)"),
    image=dict(help="answer one question about this image file instead"),
    question=dict(help="that question"),
    options=dict(nargs="+", default=[], help="its options, 2 to 6 texts"),
)
LEAST = dict(questions=0, temperature=0, batch=1, max_new_tokens=0, max_pixels=1)
SHOWN = 20       # on the page, questions answered wrong at most, and as many answered right
THUMBNAIL = 224  # px, longer side of an image on the page
TIMEOUT = 300.0  # s that a chat server may take for an answer
RESAMPLES = 2000
DIFFERENCES = {"accuracy": "acc", "consistency": "con", "grounding": "grounding"}  # keys of a row

# ---- the paper's own figures ---------------------------------------------------------------------

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


def paper_rows(header):
    """Table 1's rows as texts under our header."""
    rows = []
    for line in PAPER.strip().split("\n"):
        name, params, *numbers = line.split()
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        figures = [f"{mean} ± {std}" for mean, std in pairs]
        known = dict(zip((*data.TASKS, "overall"), figures, strict=True))
        rows.append([f"{name} (paper)", params, *[known.get(x, "-") for x in header[2:]]])
    return rows

# ---- the measurement -----------------------------------------------------------------------------

def evaluate(policy, processor, records, judge, *, max_new_tokens, temperature=0.0, seed=0,
             batch=64, progress="eval", score=rewards.score):
    """Answer each record's question once -> one dict (row) per record, in their order.

    A row: what rewards.score (fmt, acc and con are Eqs. 4-6) and rewards.grounding tell of it; the
    record's path and group; seed; cut_off (the completion reached max_new_tokens). progress: the
    bar's name, or False. score: or rewards.score_leniently. DataError for an image that can't be
    read.
    """
    device = next(policy.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    rows = []
    starts = range(0, len(records), batch)
    for start in tqdm(starts, desc=progress, unit="batch", disable=not progress):
        items = records[start:start + batch]
        inputs = M.encode(processor, items, device)
        tokens, mask = M.sample(policy, inputs, group_size=1, max_new_tokens=max_new_tokens,
                                temperature=temperature, generator=generator)  # (n, 1, T)
        texts = [group[0] for group in M.decode(processor, tokens, mask)]
        ended = M.finished(inputs, tokens, mask)[:, 0].tolist()                # n
        scored = score(texts, items, judge)
        for item, row, end in zip(items, scored, ended, strict=True):
            row |= rewards.grounding(row["thought"], item.get("shows"))
            rows.append(row | dict(path=item["path"], group=item["group"], seed=seed,
                                   cut_off=not end))
    return rows


def ask_server(spec, records, judge, args, replies):
    """As `evaluate`, the questions answered by a chat server, with every seed -> rows. A question
    that got no reply has nan for fmt, acc and con."""
    server = Server(spec, replies, args.max_new_tokens or 512, TIMEOUT, args.batch)
    rows = []
    for seed in args.seeds:
        said = server.answers(records, args.max_pixels, temperature=args.temperature, seed=seed)
        said = list(tqdm(said, f"{spec}, seed {seed}", len(records)))
        scored = rewards.score_leniently([text for text, _ in said], records, judge)
        for item, row, (_, cut_off) in zip(records, scored, said, strict=True):
            row |= rewards.grounding(row["thought"], item.get("shows"))
            rows.append(row | dict(path=item["path"], group=item["group"], seed=seed,
                                   cut_off=cut_off))
    if any(row["read_as"] == "failed" for row in rows):
        print(f"{spec}: some questions got no reply: {failures(server.usage)}")
    return rows


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

    A run is a checkpoint where there are several, else a seed of the sampling. A checkpoint that
    was sampled with several seeds is one run: the mean over its answers. nan is left out.
    """
    several = len({row["ckpt"] for row in rows}) > 1
    means = []
    for members in grouped(rows, "ckpt" if several else "seed").values():
        values = [row[key] for row in members if not rewards.failed(row[key])]
        if values:
            means.append(fmean(values))
    mean = fmean(means) if means else None
    std = stdev(means) if len(means) > 1 else 0.0
    n = len(rows) // len({row["seed"] for row in rows})
    return {"mean": mean, "std": std, "n": n, "runs": len(means)}


def summary(rows):
    """Rows of one name -> its entry in results.json: fractions, as section 4.1 defines them.

    A task's accuracy is its right answers / its questions; overall is all right answers / all
    questions, not the mean of the tasks. A completion without a readable answer is wrong.
    judge_failed: completions on which F failed, left out of consistency (None if it failed on all).
    read_as: how many completions were read in which way, {} for a model trained here; those that
    "failed" got no reply and are left out of every mean, though not of n.
    grounding, not the paper's: is the thought true of its picture? None where nobody knows.
    """
    tasks = grouped(rows, "task", data.TASKS)
    modalities = grouped(rows, "modality", data.MODALITIES)
    lenient = [row for row in rows if "read_as" in row]
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
        "read_as": {how: len(members) for how, members in grouped(lenient, "read_as").items()},
    }


def difference(before, after):
    """Rows of two names -> figures (see bootstrap) of after minus before; {} if they answered other
    questions. Checkpoints pair by place: of NAME=A,B and NAME=C,D, C with A. A question on which
    one of the two has no value is left out."""
    def asked(rows):
        return [(row["path"], row["id"], row["seed"]) for row in rows]
    if asked(before) != asked(after):
        return {}
    figures = {}
    for name, key in DIFFERENCES.items():
        sets = defaultdict(lambda: defaultdict(lambda: np.zeros(2)))  # checkpoint: group: sums
        for old, new in zip(before, after, strict=True):
            change = new[key] - old[key]
            sets[new["ckpt"]][new["group"]] += (0, 0) if rewards.failed(change) else (change, 1)
        known = [groups for groups in sets.values() if sum(groups.values())[1] > 0]
        if known:
            figures[name] = bootstrap(known)
    return figures


def bootstrap(sets):
    """For each checkpoint {group: (sum of differences, their number)} -> "mean", and "low" and
    "high" of its 95 % interval. What is drawn again is a group (an image; of real data a patient),
    since the questions of one image are right or wrong together; checkpoints that were asked about
    the same groups get the same draw. The checkpoints stay: the interval is about other images,
    not about other seeds of the training.
    """
    rng = np.random.default_rng(0)
    draws, means, drawn = {}, [], []
    for groups in sets:
        names, sums = tuple(groups), np.array(list(groups.values()))  # (groups, 2)
        if names not in draws:
            draws[names] = rng.integers(len(names), size=(RESAMPLES, len(names)))
        again = sums[draws[names]].sum(1)                             # (RESAMPLES, 2)
        drawn.append(again[:, 0] / again[:, 1])
        means.append(sums[:, 0].sum() / sums[:, 1].sum())
    low, high = np.quantile(np.mean(drawn, 0), (0.025, 0.975)).tolist()
    return {"mean": float(np.mean(means)), "low": low, "high": high}

# ---- the report ----------------------------------------------------------------------------------

class Table(NamedTuple):
    """heat: a map, with its diagonal where the name of a line is that of a column."""
    title: str
    cells: list  # [header, line, ...] of texts
    heat: bool = False


def percent(figure):
    """A figure -> a cell of a table: with its deviation if it is of several runs, with its interval
    if it is a difference; "-" for none."""
    if figure is None or figure["mean"] is None:
        return "-"
    points = {key: 100 * x for key, x in figure.items() if key in ("mean", "std", "low", "high")}
    if "low" in points:
        return "{mean:+.1f} ({low:+.1f} to {high:+.1f})".format(**points)
    return ("{mean:.1f} ± {std:.1f}" if figure["runs"] > 1 else "{mean:.1f}").format(**points)


def grid(title, lines, heat=False):
    """{name: {column: figure}} -> a Table of them, in %."""
    columns = {}  # a dict keeps the order in which they came
    for figures in lines.values():
        columns |= figures
    cells = [["model", *columns]]
    for name, figures in lines.items():
        cells.append([name, *[percent(figures.get(column)) for column in columns]])
    return Table(title, cells, heat)


def tables(results):
    """{name: entry} -> Tables: as in Table 1, by modality, square or differences of the rows."""
    entries, tasks = results.values(), dict.fromkeys(data.TASKS)
    for entry in entries:
        tasks |= entry["tasks"]
    rates = ("overall", "format", "consistency", "grounding")
    cells = [["model", "params, M", *tasks, *rates, "n"]]
    for name, entry in results.items():
        figures = [entry["tasks"].get(task) for task in tasks] + [entry[rate] for rate in rates]
        params = f"{entry['params'] / 1e6:.1f}" if entry["params"] else "-"
        n = str(entry["overall"]["n"])
        cells.append([name, params, *map(percent, figures), n])
    if any(entry.get("paper") for entry in entries):
        cells[0].append("overall in the paper")
        for line in cells[1:]:
            line.append(PAPER_OVERALL.get(line[0], "-"))
        cells += paper_rows(cells[0])

    def part(key):
        return {name: entry.get(key, {}) for name, entry in results.items()}
    found = [Table("Accuracy by task", cells), grid("Accuracy by modality", part("modality"))]
    matrix = list(entries)[-1].get("matrix")
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
        return {"mean": fmean(figure["mean"] for figure in figures if figure), "runs": 1}

    lines = {name: figures | {"mean": mean_of(figures.values())} for name, figures in lines.items()}
    own = [figures for name, figures in lines.items() if name in figures]
    columns = own[0]
    means = {column: mean_of(figures.get(column) for figures in own) for column in columns}
    return grid(f"Accuracy, trained on one {key} alone (line), asked about all",
                lines | {"mean": means}, heat=True)


def markdown(table):
    """A Table -> title and table in Markdown, the first column on the left, a diagonal in bold."""
    header, *lines = table.cells
    text = f"{table.title}\n\n"
    for cells in (header, ["---"] + ["---:"] * (len(header) - 1), *lines):
        cells = [" ".join(cell.replace("|", "\\|").split()) for cell in cells]
        if table.heat and cells[0] in header[1:-1]:
            i = header.index(cells[0])
            cells[i] = f"**{cells[i]}**"
        text += "| " + " | ".join(cells) + " |\n"
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
    shares = [f"{x} {100 * n / len(answers):.0f} %" for x, n in Counter(answers).most_common(3)]
    return ", ".join(shares)


def remarks(results, rows):
    """Lines under the tables. By the commonest answers a collapse to one of them is seen."""
    lines = []
    for name, entry in results.items():
        for task, members in grouped(rows[name], "task", data.TASKS).items():
            said = commonest([given_option(row) for row in members])
            lines.append(f"{name}, {task}, answers given: {said}")
        letters = commonest([row["given"] or given_option(row) for row in rows[name]])
        lines.append(f"{name}, letters given: {letters}")
        if entry["read_as"]:
            ways = ", ".join(f"{how} {n}" for how, n in entry["read_as"].items())
            missing = " (no reply: in no mean)" if "failed" in entry["read_as"] else ""
            lines.append(f"{name}, answers read as: {ways}{missing}")
        if entry["judge_failed"]:
            lines.append(f"{name}, left out of consistency, F failed: {entry['judge_failed']}")
        unread = sum(rewards.failed(row["grounding"]) for row in rows[name])
        if unread and entry["grounding"]["mean"] is not None:
            lines.append(f"{name}, left out of grounding, no statement or no truth known: {unread}")
        if entry["cut_off"]:
            lines.append(f"{name}, completions cut off at the limit: {entry['cut_off']:.2%}")
    return lines


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Evaluation</title>
<style>
  body { font: 15px/1.45 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
  p { margin: .3em 0; overflow-wrap: anywhere }
  table { margin: 1em 0 }
  th, td { padding: 2px 9px; text-align: right }
  th:first-child, td:first-child { min-width: 8em; text-align: left; overflow-wrap: anywhere }
  section { display: flex; gap: 1.2em; border-top: 1px solid #ccc; padding: 1em 0 }
  section div { flex: 1; min-width: 0 }
  img { width: 160px; height: max-content }
  .yes { color: #176b2c }
  .no { color: #b3261e }
  .what { color: #666; font-size: 13px }
  .raw { white-space: pre-wrap }
</style>

<h1>Evaluation</h1>
<p>{{ what }}</p>
{% for table in tables %}
  <p>{{ table.title }}</p>
  <table>
    <tr>{% for cell in table.cells[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
    {% for cells in table.cells[1:] %}
      <tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
    {% endfor %}
  </table>
{% endfor %}
{% for line in remarks %}<p class="what">{{ line }}</p>{% endfor %}

<h2>Questions that the last checkpoint answers wrong, then some that it answers right</h2>
{% for image, asked, answers in shown %}
  <section>
    <img src="{{ image }}" alt="">
    <div>
      <p class="what">{{ asked.id }}, {{ asked.task }}, {{ asked.modality }}</p>
      <p><b>{{ asked.question }}</b></p>
      {% for option in asked.options %}
        {% set letter = letters[loop.index0] %}
        <p{% if letter == asked.answer %} class="yes"{% endif %}>{{ letter }}) {{ option }}</p>
      {% endfor %}
    </div>
    {% for name, row in answers %}
      <div>
        <p class="what">{{ name }}</p>
        <p class="raw">{{ row.completion }}</p>
        <p class="{{ "yes" if row.acc else "no" }}">accuracy {{ row.acc }}</p>
        <p class="what">format {{ row.fmt }}, consistency {{ row.con }}, F: {{ row.verdict }}</p>
      </div>
    {% endfor %}
  </section>
{% endfor %}
</html>
"""


def page(results, rows, what):
    """The self-contained HTML page -> str. results: {name: entry}, rows: {name: its rows}. Shown
    are questions that the last name answers wrong, then right, beside all names' answers to them,
    by the first checkpoint and seed of each. Whatever a model or a file says is escaped."""
    import jinja2  # comes with torch

    first = {}
    for name, answers in rows.items():  # backwards: the first of several answers is the one kept
        came = [row for row in reversed(answers) if not rewards.failed(row["acc"])]
        first[name] = {(row["path"], row["id"]): row for row in came}
    last = list(first.values())[-1]
    shuffled = random.Random(0).sample(list(last), len(last))
    wrong = [question for question in shuffled if not last[question]["acc"]]
    right = [question for question in shuffled if last[question]["acc"]]
    shown = []
    for question in wrong[:SHOWN] + right[:SHOWN]:
        answers = [(name, first[name][question]) for name in first if question in first[name]]
        shown.append((data_url(last[question], THUMBNAIL), last[question], answers))
    template = jinja2.Template(PAGE, autoescape=True, undefined=jinja2.StrictUndefined)
    return template.render(what=what, tables=tables(results), shown=shown,
                           remarks=remarks(results, rows), letters=data.LETTERS)


def write_report(out, results, rows, what):
    """report.md, which is printed too, and eval.html."""
    lines = [f"{what}\n", *map(markdown, tables(results))]
    lines += [f"- {line}" for line in remarks(results, rows)]
    text = "\n".join(lines) + "\n"
    data.write_text(os.path.join(out, "report.md"), text)
    data.write_text(os.path.join(out, "eval.html"), page(results, rows, what))
    print(f"\n{text}\n{out}: results.json, report.md, eval.html, completions-*.jsonl")


def json_object(path):
    """What a JSON file holds, {} if there is none; DataError if it is no object."""
    try:
        with open(path, encoding="utf-8") as f:
            results = json.load(f)
    except FileNotFoundError:
        return {}
    except ValueError:
        results = None
    expect(isinstance(results, dict), f"{path}: not a JSON object, expected what an earlier run "
                                      "left: remove it, or name another folder")
    return results


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
    expect(len(set(args.seeds)) == len(args.seeds), "--seeds: expected different ones")
    return args


def checkpoints_of(texts):
    """--ckpt's texts -> {name: its checkpoints}. "NAME=A,B" is one name of two."""
    checkpoints = {}
    for text in texts:
        name, equals, several = text.partition("=")
        paths = several.split(",")
        if not equals or os.path.isdir(text):
            name, paths = text, [text]
        server = re.fullmatch("(?:([^=]+)=)?(openai:.*)", text)
        if server:  # its address and model may hold "=" and ","
            name, paths = server[1] or text, [server[2]]
            expect(SPEC.fullmatch(server[2]) and ",openai:" not in server[2],
                   "--ckpt openai:..: expected one openai:BASE_URL#MODEL, as in "
                   "openai:http://localhost:8000/v1#qwen, the key in OPENAI_API_KEY")
        expect(name and all(paths), f"--ckpt {text}: expected a checkpoint, or NAME=A,B,..")
        expect(name not in checkpoints, f"--ckpt: {name} is there twice, expected it once")
        checkpoints[name] = paths
    return checkpoints


def folder_of(ckpt):
    """The folder in which a checkpoint lies; "out" for a name on the hub, which lies in none."""
    parent = os.path.dirname(os.path.normpath(ckpt)) or "."
    return parent if os.path.isdir(parent) else "out"


def file_names(names, out):
    """List of --ckpt's names -> {name: its file of completions}; DataError if two had the same."""
    files = {}
    for name in names:
        label = os.path.relpath(name, out) if os.path.isdir(name) else name
        label = re.sub(r"[^\w.]+", "-", label).strip("-.")
        files[name] = os.path.join(out, f"completions-{label}.jsonl")
    expect(len(set(files.values())) == len(files), f"--ckpt {names}: expected different names")
    return files


def thinking_of(ckpt, args):
    """--thinking, else what the checkpoint's knobs.json tells, else "before"."""
    path = os.path.join(ckpt, "knobs.json")
    thinking = args.thinking or json_object(path).get("thinking", "before")
    expect(thinking in rewards.INSTRUCTIONS, f"{path}: thinking {thinking!r} is not known")
    return thinking


def questions_of(ckpt, args):
    """The records that a checkpoint answers: of --data, or of the phantoms beside it."""
    phantoms = os.path.join(folder_of(ckpt), "phantoms", "phantoms.jsonl")
    expect(args.data or os.path.isfile(phantoms),
           f"{phantoms} is not there, expected the phantoms, or --data FILE")
    records = data.read_records(args.data or phantoms, args.split, args.only,
                                thinking_of(ckpt, args))
    records = subset(records, args.questions)
    for record in records:
        expect(os.path.isfile(record["path"]),
               f"record {record['id']!r}: image {record['path']} is missing")
    return records


def answer(ckpt, records, judge, args, replies):
    """A checkpoint answers the records, with every seed -> rows, parameters of the network (None:
    unknown). replies: those kept of chat servers."""
    if ckpt.startswith("openai:"):
        rows = ask_server(ckpt, records, judge, args, replies)
        return [dict(ckpt=ckpt) | row for row in rows], None
    rank, _, device = M.setup_devices()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy, processor = M.load_unmerged(ckpt, dtype=dtype, device=device,
                                        max_pixels=args.max_pixels)
    limit = args.max_new_tokens or (80 if M.is_tiny(ckpt) else 512)
    ours = any(os.path.isfile(os.path.join(ckpt, x)) for x in ("knobs.json", "base.json"))
    rows = []
    for seed in args.seeds:
        answers = evaluate(policy, processor, records, judge, max_new_tokens=limit,
                           temperature=args.temperature, seed=seed + 1_000_003 * rank,
                           batch=args.batch, progress=rank == 0 and f"{ckpt}, seed {seed}",
                           score=rewards.score if ours else rewards.score_leniently)
        rows += [dict(ckpt=ckpt) | row | dict(seed=seed) for row in answers]
    return rows, policy.num_parameters()


def answer_one(checkpoints, args):
    """--image, --question, --options: print each checkpoint's thought and answer."""
    expect(args.image and args.question and 2 <= len(args.options) <= len(data.LETTERS),
           f"one question needs --image, --question and 2 to {len(data.LETTERS)} --options")
    item = vars(args) | dict(id="--image", path=args.image, task="", modality="", answer="",
                             group="")
    for ckpt in sum(checkpoints.values(), []):
        item["thinking"] = thinking_of(ckpt, args)
        rows, _ = answer(ckpt, [item], make_judge(), args, Replies())
        for row in rows:
            print(f"{ckpt}\n  {row['completion']}\n  read as: {given_option(row)}")


def main(argv=None):
    args = parse_args(argv)
    checkpoints = checkpoints_of(args.ckpt)
    if args.image or args.question or args.options:
        return answer_one(checkpoints, args)
    ckpts = sum(checkpoints.values(), [])
    out = args.out or folder_of(ckpts[0])
    files = file_names(list(checkpoints), out)
    replies = Replies(os.path.join(out, "replies.jsonl"))
    judge = make_judge(args.judge, args.judge_sees, cache=replies.file)
    questions = {ckpt: questions_of(ckpt, args) for ckpt in ckpts}
    if args.matrix:
        values = {record[args.matrix] for ckpt in ckpts for record in questions[ckpt]}
        expect(values & checkpoints.keys(), f"--matrix {args.matrix}: expected --ckpt NAME=A.., "
                                            f"NAME one of {', '.join(sorted(values))}")
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "results.json")
    json_object(path)  # if it can't be read, say so now and not after an hour of sampling

    rank, world, _ = M.setup_devices()
    results, rows, before = {}, {}, None
    for name, paths in checkpoints.items():
        rows[name] = []
        for ckpt in paths:
            answers, params = answer(ckpt, questions[ckpt][rank::world], judge, args, replies)
            rows[name] += sorted(M.gather(answers),
                                 key=lambda row: (row["seed"], row["path"], row["id"]))
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
    data.cli(main)
