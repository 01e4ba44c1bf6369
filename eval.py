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
    python eval.py --ckpt out/grpo --image scan.png --question "What is this?" --options MRI CT

The columns are named by task. Those of the paper's Table 1 are anatomy ("Anatomy ID." there),
anomaly ("Anomaly Det."), location ("Lesion Loc."), modality ("Modality Class.") and pathology
("Pathology Char."); other tasks, say Med-R1's, follow.

Left out on purpose: partial credit, majority votes, significance tests, several processes. Greedy
results do not depend on --batch except for rounding; those at a temperature do, since a batch
draws from one stream of random numbers.
"""
import argparse
import json
import math
import os
import random
import re
from collections import Counter
from statistics import fmean, stdev

import torch
from tqdm import tqdm

import data
import model as M
import rewards
from data import expect
from judge import data_url, make_judge

KNOBS = dict(  # the flags, as argparse takes them
    ckpt=dict(nargs="+", default=["out/grpo"], help="checkpoints, folders or names on the hub, or "
              "NAME=A,B,..: one row with mean and standard deviation over A, B, .. [out/grpo]"),
    data=dict(nargs="+", default=[], help="files of records, .jsonl or Med-R1's .json (default: "
              "phantoms/phantoms.jsonl beside each checkpoint)"),
    split=dict(choices=data.SPLITS, default="test", help="which of their records [%(default)s]"),
    only=dict(nargs="+", default=[], help="KEY=VALUE they have, say modality=CT task=anatomy"),
    questions=dict(type=int, default=0, help="so many of them, the same each time, 0 = all [0]"),
    thinking=dict(choices=list(rewards.INSTRUCTIONS), default="before",
                  help="where the thought stands, or none [%(default)s]"),
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
    out=dict(help="folder of the results (default: that in which the first checkpoint lies)"),
    image=dict(help="answer one question about this image file instead"),
    question=dict(help="that question"),
    options=dict(nargs="+", default=[], help="its options, 2 to 6 texts"),
)
LEAST = dict(questions=0, temperature=0, batch=1, max_new_tokens=0, max_pixels=1)
SHOWN = 20       # on the page, questions answered wrong at most, and as many answered right
THUMBNAIL = 224  # px, longer side of an image on the page

# ---- the measurement -----------------------------------------------------------------------------

def evaluate(policy, processor, records, judge, *, max_new_tokens, temperature=0.0, seed=0,
             batch=64, progress="eval"):
    """Answer each record's question once -> one dict (row) per record, in their order.

    A row: what rewards.score tells of it (fmt, acc and con are Eqs. 4-6); the record's path; seed;
    cut_off (the completion reached max_new_tokens). progress: the bar's name, or False. DataError
    for an image that can't be read.
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
        scored = rewards.score(texts, items, judge)
        for item, row, end in zip(items, scored, ended, strict=True):
            rows.append(row | dict(path=item["path"], seed=seed, cut_off=not end))
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
    number), "std" over them (n - 1 in the denominator; 0 for one run), "n" questions.

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
    return {"mean": mean, "std": std, "n": len(rows) // len({row["seed"] for row in rows})}


def summary(rows):
    """Rows of one name -> its entry in results.json: fractions, as section 4.1 defines them.

    A task's accuracy is its right answers / its questions; overall is all right answers / all
    questions, not the mean of the tasks. A completion without a readable answer is wrong.
    judge_failed: completions on which F failed, left out of consistency (None if it failed on all).
    """
    tasks = grouped(rows, "task", data.TASKS)
    modalities = grouped(rows, "modality", data.MODALITIES)
    return {
        "overall": spread(rows),
        "tasks": {task: spread(members) for task, members in tasks.items()},
        "modality": {modality: spread(members) for modality, members in modalities.items()},
        "format": spread(rows, "fmt"),
        "consistency": spread(rows, "con"),
        "seeds": sorted({row["seed"] for row in rows}),
        "checkpoints": list(dict.fromkeys(row["ckpt"] for row in rows)),
        "judge_failed": sum(rewards.failed(row["verdict"]) for row in rows),
        "cut_off": spread(rows, "cut_off")["mean"],
    }

# ---- the report ----------------------------------------------------------------------------------

def percent(figure, several):
    """A figure -> a cell of a table, with its deviation if it is of several runs; "-" for none."""
    if figure is None or figure["mean"] is None:
        return "-"
    mean, std = 100 * figure["mean"], 100 * figure["std"]
    return f"{mean:.1f} ± {std:.1f}" if several else f"{mean:.1f}"


def tables(results):
    """{name: entry} -> Table 1 and accuracy by modality, [header, line, ...] of texts, in %."""
    tasks = dict.fromkeys(data.TASKS)  # a dict keeps the order in which they came
    modalities = {}
    for entry in results.values():
        tasks |= entry["tasks"]
        modalities |= entry["modality"]
    by_task = [["model", "params, M", *tasks, "overall", "format", "consistency", "n"]]
    by_modality = [["model", *modalities]]
    for name, entry in results.items():
        several = len(entry["checkpoints"]) > 1 or len(entry["seeds"]) > 1
        figures = [entry["tasks"].get(task) for task in tasks]
        figures += [entry["overall"], entry["format"], entry["consistency"]]
        cells = [percent(figure, several) for figure in figures]
        params, n = f"{entry['params'] / 1e6:.1f}", str(entry["overall"]["n"])
        by_task.append([name, params, *cells, n])
        cells = [percent(entry["modality"].get(modality), several) for modality in modalities]
        by_modality.append([name, *cells])
    return by_task, by_modality


def markdown(table):
    """[header, line, ...] -> the table in Markdown, the first column on the left."""
    rule = ["---"] + ["---:"] * (len(table[0]) - 1)
    text = ""
    for cells in (table[0], rule, *table[1:]):
        cells = [" ".join(cell.replace("|", "\\|").split()) for cell in cells]
        text += "| " + " | ".join(cells) + " |\n"
    return text


def given_option(row):
    """The text of the option that a row's completion answers."""
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
        letters = commonest([row["given"] or "unreadable" for row in rows[name]])
        lines.append(f"{name}, letters given: {letters}")
        if entry["judge_failed"]:
            lines.append(f"{name}, left out of consistency, F failed: {entry['judge_failed']}")
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
  <table>
    <tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
    {% for cells in table[1:] %}
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
        first[name] = {(row["path"], row["id"]): row for row in reversed(answers)}
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


def earlier_results(path):
    """What results.json holds already, {} if there is none; DataError for anything else."""
    try:
        with open(path, encoding="utf-8") as f:
            results = json.load(f)
    except FileNotFoundError:
        return {}
    except ValueError:
        results = None
    expect(isinstance(results, dict), f"{path}: not a JSON object, expected earlier results: "
                                      "remove it, or name another --out")
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
    expect(0 <= min(args.seeds) and max(args.seeds) < 2**32, "--seeds: expected 0 to 2^32 - 1")
    return args


def checkpoints_of(texts):
    """--ckpt's texts -> {name: its checkpoints}. "NAME=A,B" is one name of two."""
    checkpoints = {}
    for text in texts:
        name, equals, several = text.partition("=")
        paths = several.split(",")
        if not equals or os.path.isdir(text):
            name, paths = text, [text]
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


def questions_of(ckpt, args):
    """The records that a checkpoint answers: of --data, or of the phantoms beside it."""
    phantoms = os.path.join(folder_of(ckpt), "phantoms", "phantoms.jsonl")
    expect(args.data or os.path.isfile(phantoms),
           f"{phantoms} is not there, expected the phantoms, or --data FILE")
    records = data.read_records(args.data or phantoms, args.split, args.only, args.thinking)
    records = subset(records, args.questions)
    data.check_images(records)
    return records


def answer(ckpt, records, judge, args):
    """A checkpoint answers the records, with every seed -> rows, parameters of the network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy, processor = M.load_unmerged(ckpt, dtype=dtype, device=device,
                                        max_pixels=args.max_pixels)
    limit = args.max_new_tokens or (80 if M.is_tiny(ckpt) else 512)
    rows = []
    for seed in args.seeds:
        answers = evaluate(policy, processor, records, judge, max_new_tokens=limit,
                           temperature=args.temperature, seed=seed, batch=args.batch,
                           progress=f"{ckpt}, seed {seed}")
        rows += [dict(ckpt=ckpt) | row for row in answers]
    return rows, policy.num_parameters()


def answer_one(checkpoints, args):
    """--image, --question, --options: print each checkpoint's thought and answer."""
    expect(args.image and args.question and 2 <= len(args.options) <= len(data.LETTERS),
           f"one question needs --image, --question and 2 to {len(data.LETTERS)} --options")
    data.check_options(args.options)
    item = vars(args) | dict(id="--image", path=args.image, task="", modality="", answer="")
    for ckpt in sum(checkpoints.values(), []):
        rows, _ = answer(ckpt, [item], make_judge(), args)
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
    judge = make_judge(args.judge, args.judge_sees, cache=os.path.join(out, "replies.jsonl"))
    questions = {ckpt: questions_of(ckpt, args) for ckpt in ckpts}
    os.makedirs(out, exist_ok=True)
    expect(os.access(out, os.W_OK), f"{out}: can't be written to, expected another --out")
    path = os.path.join(out, "results.json")
    earlier_results(path)  # if it can't be read, say so now and not after an hour of sampling

    results, rows = {}, {}
    for name, paths in checkpoints.items():
        rows[name] = []
        for ckpt in paths:
            answers, params = answer(ckpt, questions[ckpt], judge, args)
            rows[name] += answers
        results[name] = summary(rows[name]) | dict(params=params, knobs=vars(args))
        data.write_records(map(without_nan, rows[name]), files[name])
        text = json.dumps(earlier_results(path) | results, indent=1, ensure_ascii=False)
        data.write_text(path, text + "\n")

    source = ", ".join(args.data) or "the phantoms beside each checkpoint"
    way = f"temperature {args.temperature:g}, seeds {args.seeds}" if args.temperature else "greedy"
    what = f"In %; split {args.split} of {source}; {way}; F: {args.judge}, {args.judge_sees}."
    write_report(out, results, rows, what)


if __name__ == "__main__":
    data.cli(main)
