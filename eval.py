"""Tables 1-3: accuracy by task, format and consistency rates, and a report that a person looks at.

Every question of the test split is answered once (greedy; with --temperature once per seed), then
scored by the code that gives the rewards: rewards.score, with an F of judge.py. Written beside the
checkpoints are:

    results.json              figures as fractions; checkpoints evaluated earlier stay in it
    report.md, eval.html      the tables; the page also shows some questions with image, thought
                              and answer
    completions-NAME.jsonl    every completion with its scores

    python eval.py --ckpt out/tiny-base out/sft out/grpo         # on out/phantoms
    python eval.py --ckpt out/grpo --temperature 1 --seeds 0 1 2 # mean and deviation over seeds
    python eval.py --ckpt SFT=out/sft,out1/sft GRPO=out/grpo,out1/grpo    # over checkpoints
    python eval.py --ckpt out/grpo --image scan.png --question "What is this?" --options MRI CT

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
from collections import Counter, defaultdict
from statistics import fmean, stdev

import torch
from tqdm import tqdm

import data
import model as M
import rewards
from data import DataError, expect
from judge import data_url, make_judge

# What argparse takes for each, and `least`: the smallest number that makes sense.
KNOBS = dict(
    ckpt=dict(nargs="+", default=["out/grpo"],
              help="checkpoints to evaluate: folders, names on the hub, or NAME=A,B,..: one line "
              "of the tables, mean and standard deviation over A, B, .. [out/grpo]"),
    data=dict(nargs="+", default=[], help="files of records, .jsonl or Med-R1's .json (default: "
              "phantoms/phantoms.jsonl beside each checkpoint)"),
    split=dict(choices=data.SPLITS, default="test",
               help="which records of these files [%(default)s]"),
    only=dict(nargs="+", default=[],
              help="of them those with KEY=VALUE, say modality=CT task=anatomy"),
    thinking=dict(choices=list(rewards.INSTRUCTIONS), default="before", help="where the "
                  "completion has its thought: before the answer, after it, or none [%(default)s]"),
    questions=dict(type=int, least=0, default=0, help="evaluate the first so many of a fixed "
                   "shuffled order of the records, 0 = all [%(default)s]"),
    batch=dict(type=int, least=1, default=64, help="questions sampled at a time; greedy, memory "
               "and speed, not the result, depend on it [%(default)s]"),
    max_new_tokens=dict(type=int, least=0, default=0, help="tokens at which a completion is cut "
                        "off, 0 = 80 for a tiny checkpoint, else 512 [%(default)s]"),
    max_pixels=dict(type=int, least=1, default=M.MAX_PIXELS,
                    help="pixels above which an image is shrunk [%(default)s]"),
    temperature=dict(type=float, least=0, default=0.0,
                     help="of the sampling, 0 = greedy [%(default)s]"),
    seeds=dict(nargs="+", type=int, default=[0], help="answer every question once for each: mean "
               "and standard deviation over them (needs a temperature) [0]"),
    judge=dict(default="lexical", help="the evaluator F of Eq. (6): lexical, hf:NAME_OR_PATH or "
               "openai:BASE_URL#MODEL [%(default)s]"),
    judge_sees=dict(choices=["cut", "raw"], default="cut", help="the thought with letters and "
                    "answer statements cut, or raw as printed [%(default)s]"),
    judge_concurrency=dict(type=int, least=1, default=32, help="requests to an openai: judge at a "
                           "time; replies are kept in OUT/replies.jsonl [%(default)s]"),
    judge_timeout=dict(type=float, least=0.1, default=60.0,
                       help="seconds a request to it may take [%(default)s]"),
    out=dict(help="folder of the results (default: that in which the first checkpoint lies)"),
    image=dict(help="answer one question about this image file instead: print thought and answer"),
    question=dict(help="that question"),
    options=dict(nargs="+", default=[], help="its options, 2 to 6 texts"),
)
# Table 1's columns. Other tasks (Med-R1's) get columns under their own names.
COLUMNS = dict(anatomy="Anatomy ID.", anomaly="Anomaly Det.", location="Lesion Loc.",
               modality="Modality Class.", pathology="Pathology Char.")
PAGE_QUESTIONS = 40  # on the page, half of them answered wrong by the last checkpoint
THUMBNAIL = 224      # px, longer side of an image on the page
COMMON = 8           # different answers per task whose shares are told


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
    with tqdm(total=len(records), desc=progress, unit="question", disable=not progress) as bar:
        for first in range(0, len(records), batch):
            items = records[first:first + batch]
            inputs = M.encode(processor, items, device)
            tokens, mask = M.sample(
                policy, inputs, group_size=1, max_new_tokens=max_new_tokens,
                temperature=temperature, generator=generator)       # (n, 1, T)
            texts = [group[0] for group in M.decode(processor, tokens, mask)]
            ended = M.finished(inputs, tokens, mask)[:, 0].tolist()  # n
            scored = rewards.score(texts, items, judge)
            for item, row, end in zip(items, scored, ended, strict=True):
                rows.append(row | dict(path=item["path"], seed=seed, cut_off=not end))
            bar.update(len(items))
    return rows


def is_nan(value):
    """Whether it is the number that stands for a failure of F."""
    return isinstance(value, float) and math.isnan(value)


def spread(rows, key="acc"):
    """Rows of one or several runs -> mean of `key` over the runs (None without a number), "std"
    over them (n - 1 in the denominator; 0 for one run), "n" questions. nan is left out.

    A run is a checkpoint where there are several, else a seed of the sampling. A checkpoint that
    was sampled with several seeds is one run: the mean over its answers.
    """
    several = len({row.get("ckpt") for row in rows}) > 1
    runs = defaultdict(list)
    for row in rows:
        runs[row.get("ckpt") if several else row["seed"]].append(row[key])
    means = []
    for values in runs.values():
        kept = [v for v in values if not math.isnan(v)]
        if kept:
            means.append(fmean(kept))
    mean = fmean(means) if means else None
    std = stdev(means) if len(means) > 1 else 0.0
    seeds = len({row["seed"] for row in rows})
    return {"mean": mean, "std": std, "n": len(rows) // seeds}


def grouped(rows, key, order):
    """Rows -> {value of `key`: its rows}: the values of `order` first, others sorted behind."""
    groups = {name: [] for name in order}
    for row in sorted(rows, key=lambda row: row[key]):
        groups.setdefault(row[key], []).append(row)
    return {name: members for name, members in groups.items() if members}


def summary(rows):
    """Rows of one checkpoint -> its entry in results.json: fractions, as section 4.1 defines them.

    A task's accuracy is its right answers / its questions; overall is all right answers / all
    questions, not the mean of the tasks. A completion without a readable answer is wrong.
    judge_failed: completions on which F failed, left out of consistency (None if it failed on
    all). answers: `answers_given` of each task's options, and of the letters.
    """
    tasks = grouped(rows, "task", data.TASKS)
    modalities = grouped(rows, "modality", data.MODALITIES)
    fmt, con = spread(rows, "fmt"), spread(rows, "con")
    answers = {task: answers_given(members) for task, members in tasks.items()}
    answers["letter"] = answers_given([row | {"options": data.LETTERS} for row in rows])
    return {
        "overall": spread(rows),
        "tasks": {task: spread(members) for task, members in tasks.items()},
        "modality": {modality: spread(members) for modality, members in modalities.items()},
        "format": fmt["mean"],
        "format_std": fmt["std"],
        "consistency": con["mean"],
        "consistency_std": con["std"],
        "seeds": sorted({row["seed"] for row in rows}),
        "checkpoints": list(dict.fromkeys(row.get("ckpt") for row in rows)),
        "judge_failed": sum(is_nan(row["verdict"]) for row in rows),
        "cut_off": spread(rows, "cut_off")["mean"],
        "answers": answers,
    }


def answers_given(rows):
    """Rows -> {option: [share of the answers given, share of the right answers]}, of the COMMON
    most given."""
    given, right = Counter(), Counter()
    for row in rows:
        texts = dict(zip(data.LETTERS, row["options"], strict=False))
        given[texts.get(row["given"], "unreadable")] += 1
        right[texts[row["answer"]]] += 1
    common = sorted(given | right, key=lambda x: (-given[x], -right[x], x))[:COMMON]
    return {x: [given[x] / len(rows), right[x] / len(rows)] for x in common}


def subset(records, n):
    """The first n of a fixed shuffled order (0: all), in the file's order: the first 100 are among
    the first 200."""
    order = random.Random(0).sample(range(len(records)), len(records))
    return [records[i] for i in sorted(order[:n or None])]


# ---- the report ----------------------------------------------------------------------------------


def percent(figure, runs):
    """{"mean", "std"} as a cell of a table, "-" where there is no number."""
    if figure is None or figure["mean"] is None:
        return "-"
    deviation = f" ± {100 * figure['std']:.2f}" if runs > 1 else ""
    return f"{100 * figure['mean']:.2f}{deviation}"


def tables(results):
    """{name: entry} -> Table 1 and accuracy by modality, each [header, line, ...] of texts, in
    percent."""
    tasks = dict.fromkeys(COLUMNS)  # a dict keeps the order in which they came
    modalities = {}
    for entry in results.values():
        tasks |= entry["tasks"]
        modalities |= entry["modality"]
    titles = [COLUMNS.get(task, task) for task in tasks]
    by_task = [["Model", "Params", *titles, "Overall", "Format", "Consistency", "n"]]
    by_modality = [["Model", *modalities]]
    for name, entry in results.items():
        runs = max(len(entry["seeds"]), len(entry["checkpoints"]))
        figures = [entry["tasks"].get(task) for task in tasks] + [entry["overall"]]
        for key in ("format", "consistency"):
            figures.append({"mean": entry[key], "std": entry[f"{key}_std"]})
        cells = [percent(figure, runs) for figure in figures]
        params = f"{entry['params'] / 1e6:.1f}M"
        if entry["params"] >= 1e8:
            params = f"{entry['params'] / 1e9:.1f}B"
        by_task.append([name, params, *cells, str(entry["overall"]["n"])])
        cells = [percent(entry["modality"].get(modality), runs) for modality in modalities]
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


def remarks(results):
    """Lines under the tables: the answers given, so that a collapse to the commoner one is seen;
    what was left out or cut."""
    lines = []
    for name, entry in results.items():
        for task, shares in entry["answers"].items():
            said = [f"{answer} {100 * given:.0f} ({100 * right:.0f})"
                    for answer, (given, right) in shares.items()]
            lines.append(f"{name}, {task}, answers given in % (and right answers): "
                         + ", ".join(said))
        if entry["judge_failed"]:
            lines.append(f"{name}: the evaluator F failed on {entry['judge_failed']} completions, "
                         "left out of consistency")
        if entry["cut_off"]:
            lines.append(f"{name}: {100 * entry['cut_off']:.2f} % of the completions were cut off "
                         "at the limit of tokens")
    return lines


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Evaluation</title>
<style>
  body { font: 15px/1.45 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
  p { margin: .3em 0 }
  table { margin: 1em 0 }
  th, td { padding: 2px 9px; text-align: right }
  th:first-child, td:first-child { min-width: 8em; text-align: left; overflow-wrap: anywhere }
  section { display: flex; gap: 1.2em; border-top: 1px solid #ccc; padding: 1em 0 }
  section div { flex: 1; min-width: 0; overflow-wrap: anywhere }
  img { width: 160px; height: max-content }
  .yes { color: #176b2c }
  .no { color: #b3261e }
  .what { color: #666; font-size: 13px; overflow-wrap: anywhere }
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
{% for line in remarks %}
  <p class="what">{{ line }}</p>
{% endfor %}

<h2>Some questions, about half of them answered wrong by the last checkpoint</h2>
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
        {% if row.fmt and row.given %}
          <p class="raw">{{ row.thought }}</p>
          <p><b>{{ row.given }}</b></p>
        {% else %}
          <p class="raw">{{ row.completion }}</p>
        {% endif %}
        <p class="what">
          {% for reward, key in [("format", "fmt"), ("accuracy", "acc"), ("consistency", "con")] %}
            {% set mark = {1: "✓", 0: "✗"}.get(row[key], "?") %}
            <span class="{{ "yes" if row[key] == 1 else "no" }}">{{ mark }} {{ reward }}</span>
          {% endfor %}
          F: {{ row.verdict if row.verdict is string else "-" }}
        </p>
      </div>
    {% endfor %}
  </section>
{% endfor %}
</html>
"""


def by_question(items):
    """Rows or records -> {(path, id): the first of them}; two files may have the same ids."""
    first = {}
    for item in items:
        first.setdefault((item["path"], item["id"]), item)
    return first


def some_of(answers):
    """{question: row} -> PAGE_QUESTIONS of the questions in their order, half of them answered
    wrong where there are enough of both."""
    right, wrong = [], []
    for question in random.Random(0).sample(list(answers), len(answers)):
        side = right if answers[question]["acc"] else wrong
        side.append(question)
    wrong = wrong[:max(PAGE_QUESTIONS // 2, PAGE_QUESTIONS - len(right))]
    chosen = {*wrong, *right[:PAGE_QUESTIONS - len(wrong)]}
    return [question for question in answers if question in chosen]


def page(results, rows, what):
    """The self-contained HTML page -> str. rows: {name: its rows}. The questions shown are some of
    the last name's; beside each other stand the answers of all names that were asked the same, each
    by its first checkpoint and seed. Whatever a model or a file says is escaped."""
    import jinja2  # comes with torch

    first = {name: by_question(answers) for name, answers in rows.items()}
    last = list(first.values())[-1]
    shown = []
    for question in some_of(last):
        image = data_url(last[question], THUMBNAIL)
        answers = [(name, first[name][question]) for name in first if question in first[name]]
        shown.append((image, last[question], answers))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        what=what, tables=tables(results), remarks=remarks(results), shown=shown,
        letters=data.LETTERS)


def earlier_results(path):
    """What results.json holds already, {} if there is none; DataError for anything else."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f) | {}
    except (ValueError, TypeError):
        raise DataError(f"{path}: not a JSON object, expected earlier results: remove it, or name "
                        "another --out") from None


def without_nan(row):
    """JSON has no nan: null it is. con null says that F failed, verdict null alone that F was
    undecided."""
    return {key: None if is_nan(value) else value for key, value in row.items()}


# ---- the command line ----------------------------------------------------------------------------


def parse_args(argv):
    """The command line -> Namespace; DataError for an unknown or impossible value."""
    parser = data.Parser(description=__doc__,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, knob in KNOBS.items():
        options = {key: value for key, value in knob.items() if key != "least"}
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args(argv)
    for name, knob in KNOBS.items():
        if "least" in knob:
            value, least = getattr(args, name), knob["least"]
            expect(least <= value < math.inf, f"--{name} {value}: expected at least {least}")
    expect(len(set(args.seeds)) == len(args.seeds),
           f"--seeds {args.seeds}: expected different ones")
    expect(len(args.seeds) == 1 or args.temperature > 0,
           "--seeds needs a --temperature above 0: greedy answers are the same for each")
    return args

def load(ckpt, args):
    """A checkpoint -> (policy, processor, max_new_tokens)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy, processor = M.load_unmerged(ckpt, dtype=dtype, device=device,
                                              max_pixels=args.max_pixels)
    limit = args.max_new_tokens or (80 if M.is_tiny(ckpt) else 512)
    return policy, processor, limit


def answer_one(args):
    """--image, --question, --options: print each checkpoint's thought and answer."""
    expect(args.image and args.question and args.options,
           "one question needs all three of --image, --question and --options")
    expect(2 <= len(args.options) <= len(data.LETTERS),
           f"--options: expected 2 to {len(data.LETTERS)} of them")
    item = vars(args) | dict(id="--image", path=args.image, task="", modality="", answer="")
    for paths in checkpoints_of(args.ckpt).values():
        for ckpt in paths:
            policy, processor, limit = load(ckpt, args)
            [row] = evaluate(policy, processor, [item], make_judge(), max_new_tokens=limit,
                             temperature=args.temperature, seed=args.seeds[0], progress=False)
            answer = f"none to be read in {row['completion']!r}"
            if row["given"]:
                answer = f"{row['given']}) {args.options[data.LETTERS.index(row['given'])]}"
            print(f"{ckpt}\n  thought: {row['thought']}\n  answer:  {answer}")


def checkpoints_of(texts):
    """--ckpt's texts -> {name: its checkpoints}. "NAME=A,B" is one name of two."""
    checkpoints = {}
    for text in texts:
        name, equals, several = text.partition("=")
        if not equals or os.path.isdir(text):
            name, paths = text, [text]
        else:
            paths = several.split(",")
        expect(name and all(paths), f"--ckpt {text}: expected a checkpoint, or NAME=A,B,..")
        expect(name not in checkpoints,
               f"--ckpt: {name} is there twice, expected different checkpoints")
        checkpoints[name] = paths
    return checkpoints


def folder_of(ckpt):
    """The folder in which a checkpoint lies; "out" for a name on the hub, which lies in none."""
    parent = os.path.dirname(os.path.normpath(ckpt)) or "."
    return parent if os.path.isdir(parent) else "out"


def file_names(names, out):
    """Names of --ckpt -> {name: its file of completions}; DataError if two had the same."""
    files = {}
    for name in names:
        label = os.path.relpath(name, out) if os.path.isdir(name) else name
        label = re.sub(r"[^\w.]+", "-", label).strip("-.")
        files[name] = os.path.join(out, f"completions-{label}.jsonl")
    expect(len(set(files.values())) == len(files),
           f"--ckpt {' '.join(files)}: expected different names")
    return files


def questions_of(ckpt, beside, args):
    """The files of records for a checkpoint, and the records -> files, records. Without --data that
    is the phantoms beside it, or in the folder `beside`."""
    files = args.data
    if not files:
        folders = [folder_of(ckpt), beside]
        places = [os.path.join(folder, "phantoms", "phantoms.jsonl") for folder in folders]
        files = [place for place in places if os.path.isfile(place)][:1]
        expect(files, f"{places[-1]} is not there, expected the phantoms, or --data FILE")
    records = data.read_records(files, args.split, args.only, args.thinking)
    return files, subset(records, args.questions)


def all_questions(checkpoints, beside, args):
    """{name: its checkpoints} -> {checkpoint: its records}, the files they are from, the number of
    different questions; DataError if an image is missing."""
    questions, files, different = {}, set(), {}
    for paths in checkpoints.values():
        for ckpt in paths:
            sources, questions[ckpt] = questions_of(ckpt, beside, args)
            files.update(sources)
            different |= by_question(questions[ckpt])
    gone = [path for path, _ in different if not os.path.isfile(path)]
    if gone:
        raise DataError(f"the images of {len(gone)} of {len(different)} questions are missing, the "
                        f"first is {gone[0]}")
    return questions, sorted(files), len(different)


def answer_all(paths, questions, judge, args):
    """The checkpoints of one name answer their questions, with every seed -> rows, parameters of
    the network, max_new_tokens."""
    rows = []
    for ckpt in paths:
        policy, processor, limit = load(ckpt, args)
        for seed in args.seeds:
            progress = f"{ckpt}, seed {seed}" if len(args.seeds) > 1 else ckpt
            answers = evaluate(policy, processor, questions[ckpt], judge, max_new_tokens=limit,
                               temperature=args.temperature, seed=seed, batch=args.batch,
                               progress=progress)
            rows += [dict(ckpt=ckpt) | row for row in answers]
        params = policy.num_parameters()
        del policy  # before the next one is loaded
    return rows, params, limit


def write_report(out, results, rows, what):
    """report.md, which is printed too, and eval.html."""
    lines = [f"{what} In %.\n"]
    lines += [markdown(table) for table in tables(results)]
    lines += [f"- {line}" for line in remarks(results)]
    text = "\n".join(lines) + "\n"
    data.write_text(os.path.join(out, "report.md"), text)
    data.write_text(os.path.join(out, "eval.html"), page(results, rows, what))
    print(f"\n{text}\n{out}: results.json, report.md, eval.html, completions-*.jsonl")


def main(argv=None):
    args = parse_args(argv)
    if args.image or args.question or args.options:
        return answer_one(args)
    checkpoints = checkpoints_of(args.ckpt)
    beside = folder_of(next(iter(checkpoints.values()))[0])
    out = args.out or beside
    completions = file_names(checkpoints, out)
    judge = make_judge(args.judge, args.judge_sees, concurrency=args.judge_concurrency,
                       timeout=args.judge_timeout, cache=os.path.join(out, "replies.jsonl"))
    questions, files, n = all_questions(checkpoints, beside, args)
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "results.json")
    earlier_results(path)  # if it can't be read, say so now and not after an hour of sampling

    results, rows = {}, {}
    for name, paths in checkpoints.items():
        rows[name], params, limit = answer_all(paths, questions, judge, args)
        used = vars(args) | dict(data=files, max_new_tokens=limit)
        results[name] = summary(rows[name]) | dict(params=params, knobs=used)
        data.write_records(map(without_nan, rows[name]), completions[name])
        text = json.dumps(earlier_results(path) | results, indent=1, ensure_ascii=False)
        data.write_text(path, text + "\n")

    way = f"temperature {args.temperature:g}, seeds {args.seeds}" if args.temperature else "greedy"
    what = (f"{n} questions, split {args.split} of {', '.join(files)}; {way}; "
            f"F: {args.judge}, {args.judge_sees}.")
    write_report(out, results, rows, what)


if __name__ == "__main__":
    data.cli(main)
