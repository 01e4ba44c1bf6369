"""Tables 1-3: accuracy by task, format and consistency rates, and a report that a person looks at.

Every question of the test split is answered once (greedy; with --temperature once a seed), then scored by the code that gives
the rewards: rewards.score, with an F of judge.py. Beside the checkpoints are written:

    results.json              figures as fractions; checkpoints evaluated earlier stay in it
    report.md, eval.html      the tables; the page also shows some questions with image, thought and answer
    completions-NAME.jsonl    every completion with its scores

    python eval.py --ckpt out/tiny-base out/sft out/grpo                       # on out/phantoms
    python eval.py --ckpt out/grpo --temperature 1 --seeds 0 1 2               # mean and standard deviation over seeds
    python eval.py --ckpt SFT=out/sft,out1/sft GRPO=out/grpo,out1/grpo         # a row each: mean +- std over checkpoints
    python eval.py --ckpt out/grpo --image scan.png --question "What is the kind of image?" --options MRI CT

Left out on purpose: partial credit, majority votes, significance tests, several processes. Greedy results do not depend on
--batch except for rounding; those at a temperature do, since a batch draws from one stream of random numbers.
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

# name: (default, unit and meaning [, choices])
KNOBS = dict(
    ckpt=(("out/grpo",), "checkpoints to evaluate: folders, names on the hub, or NAME=A,B,..: one row, mean and "
          "standard deviation over the checkpoints A, B, .."),
    data=((), "files of records, .jsonl or Med-R1's .json (default: phantoms/phantoms.jsonl beside each checkpoint)"),
    split=("test", "which records of these files", data.SPLITS),
    only=((), "of them those with KEY=VALUE, say modality=CT task=anatomy"),
    thinking=("before", "where the completion has its thought: before the answer, after it, or none",
              tuple(rewards.INSTRUCTIONS)),
    questions=(0, "evaluate the first so many of a fixed shuffled order of the records, 0 = all"),
    batch=(64, "questions sampled at a time; greedy, memory and speed, not the result, depend on it"),
    max_new_tokens=(0, "tokens at which a completion is cut off, 0 = 80 for a tiny checkpoint, else 512"),
    max_pixels=(M.MAX_PIXELS, "pixels above which an image is shrunk"),
    temperature=(0.0, "of the sampling, 0 = greedy"),
    seeds=((0,), "answer every question once for each: mean and standard deviation over them (needs a temperature)"),
    judge=("lexical", "the evaluator F of Eq. (6): lexical, hf:NAME_OR_PATH or openai:BASE_URL#MODEL"),
    judge_sees=("cut", "the thought with letters and answer statements cut, or raw as printed", ("cut", "raw")),
    judge_concurrency=(32, "requests to an openai: judge at a time; replies are kept in OUT/replies.jsonl"),
    judge_timeout=(60.0, "seconds a request to it may take"),
    out=(None, "folder of the results (default: that in which the first checkpoint lies)"),
    image=(None, "answer one question about this image file instead, and print thought and answer"),
    question=(None, "that question"),
    options=((), "its options, 2 to 6 texts"),
)
COLUMNS = {"anatomy": "Anatomy ID.", "anomaly": "Anomaly Det.", "location": "Lesion Loc.", "modality": "Modality Class.",
           "pathology": "Pathology Char."}  # Table 1's; other tasks (Med-R1's) get columns under their own names
SHOWN = 40          # questions on the page, half of them answered wrong by the last checkpoint
THUMBNAIL = 224     # px, longer side of an image on the page
COMMON = 8          # different answers a task whose shares are told

# ---- the measurement --------------------------------------------------------------------------------------------------------

def evaluate(policy, processor, records, judge, *, max_new_tokens, temperature=0.0, seed=0, batch=64, progress=True):
    """Answer each record's question once -> one dict (row) a record, in their order.

    A row: seed, the record's id, task, modality, question, options, answer; the completion and what was read from it: thought,
    given (letter or None), verdict (F's letter, None or nan); fmt, acc, con (floats, Eqs. 4-6; con is nan where F failed);
    cut_off (it reached max_new_tokens). progress: True, False, or the bar's name. DataError for an image that can't be read.
    """
    device, name, rows = next(policy.parameters()).device, progress if isinstance(progress, str) else "eval", []
    generator = torch.Generator(device).manual_seed(seed)
    with tqdm(total=len(records), desc=name, unit="question", disable=not progress) as bar:
        for first in range(0, len(records), batch):
            items = records[first:first + batch]
            inputs = M.encode(processor, items, device)
            tokens, mask = M.sample(policy, inputs, group_size=1, max_new_tokens=max_new_tokens, temperature=temperature,
                                    generator=generator)                                   # (n, 1, T)
            scored = rewards.score([text for text, in M.decode(processor, tokens, mask)], items, judge)
            ended = M.finished(inputs, tokens, mask)[:, 0].tolist()                        # n
            rows += [row | dict(seed=seed, cut_off=not end) for row, end in zip(scored, ended, strict=True)]
            bar.update(len(items))
    return rows

def spread(rows, key="acc"):
    """Rows of one or several runs -> mean of `key` over the runs (None without a number), "std" over
    them (n - 1 in the denominator; 0 for one run), "n" questions. nan is left out.

    A run is a checkpoint where there are several, else a seed of the sampling. A checkpoint that
    was sampled with several seeds is one run: the mean over its answers.
    """
    several = len({r.get("ckpt") for r in rows}) > 1
    runs = defaultdict(list)
    for r in rows:
        runs[r.get("ckpt") if several else r["seed"]].append(r[key])
    means = []
    for values in runs.values():
        kept = [v for v in values if not math.isnan(v)]
        if kept:
            means.append(fmean(kept))
    std = stdev(means) if len(means) > 1 else 0.0
    seeds = len({r["seed"] for r in rows})
    return {"mean": fmean(means) if means else None, "std": std, "n": len(rows) // seeds}

def summary(rows):
    """Rows of one checkpoint -> its entry in results.json: fractions, as section 4.1 defines them.

    A task's accuracy is its right answers / its questions; overall is all right answers / all questions, not the mean of the
    tasks. A completion without a readable answer is wrong. judge_failed: completions on which F failed, left out of consistency
    (None if it failed on all). answers: {task: {option text: [share of the answers given, share of the right answers]}}.
    """
    def by(key, order):
        names = sorted({r[key] for r in rows}, key=lambda x: (order.index(x) if x in order else len(order), x))
        return {name: [r for r in rows if r[key] == name] for name in names}
    tasks, modalities = by("task", data.TASKS), by("modality", data.MODALITIES)
    return {"overall": spread(rows), "tasks": {k: spread(v) for k, v in tasks.items()},
            "modality": {k: spread(v) for k, v in modalities.items()},
            "format": spread(rows, "fmt")["mean"], "consistency": spread(rows, "con")["mean"],
            "seeds": sorted({r["seed"] for r in rows}), "checkpoints": list(dict.fromkeys(r.get("ckpt") for r in rows)),
            "judge_failed": sum(r["verdict"] != r["verdict"] for r in rows),
            "cut_off": spread(rows, "cut_off")["mean"],
            "answers": {k: answers_given(v) for k, v in tasks.items()} | {"letter": answers_given(rows, letters=True)}}

def answers_given(rows, letters=False):
    """{option text (or letter): [share of the answers given, share of the right answers]}, of the COMMON most given."""
    def text(row, letter):
        return "unreadable" if letter is None else letter if letters else row["options"][data.LETTERS.index(letter)]
    given, right = Counter(text(r, r["given"]) for r in rows), Counter(text(r, r["answer"]) for r in rows)
    names = sorted(given | right, key=lambda x: (-given[x], -right[x], x))
    return {x: [given[x] / len(rows), right[x] / len(rows)] for x in names[:COMMON]}

def subset(records, n):
    """The first n of a fixed shuffled order (0: all), in the file's order: the first 100 are among the first 200."""
    order = random.Random(0).sample(range(len(records)), len(records))
    return [records[i] for i in sorted(order[:n or None])]

# ---- the report -------------------------------------------------------------------------------------------------------------

def tables(results):
    """{ckpt: entry} -> Table 1 and accuracy by modality, each [header, row, ...] of texts in percent ("-": no question)."""
    def cell(value, runs):
        if not value or value["mean"] is None:
            return "-"
        std = f" ± {100 * value['std']:.2f}" if "std" in value and runs > 1 else ""
        return f"{100 * value['mean']:.2f}{std}"
    tasks = list(dict.fromkeys([*COLUMNS, *(t for e in results.values() for t in e["tasks"])]))
    modalities = list(dict.fromkeys(m for e in results.values() for m in e["modality"]))
    table = [["Model", "Params", *(COLUMNS.get(t, t) for t in tasks), "Overall", "Format", "Consistency", "n"]]
    other = [["Model", *modalities]]
    for ckpt, e in results.items():
        runs = max(len(e["seeds"]), len(e.get("checkpoints", ())))
        cells = [*(e["tasks"].get(t) for t in tasks), e["overall"], {"mean": e["format"]}, {"mean": e["consistency"]}]
        size = f"{e['params'] / 1e9:.1f}B" if e["params"] >= 1e8 else f"{e['params'] / 1e6:.1f}M"
        table.append([ckpt, size, *(cell(c, runs) for c in cells), str(e["overall"]["n"])])
        other.append([ckpt, *(cell(e["modality"].get(m), runs) for m in modalities)])
    return table, other

def markdown(table):
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in table]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *body)) + "\n"

def remarks(results):
    """Lines under the tables: the answers given, so that a collapse to the commoner one is seen; what was left out or cut."""
    lines = []
    for ckpt, e in results.items():
        for task, shares in e["answers"].items():
            said = ", ".join(f"{x} {100 * given:.0f} ({100 * right:.0f})" for x, (given, right) in shares.items())
            lines.append(f"{ckpt}, {task}, answers given in % (and right answers): {said}")
        if e["judge_failed"]:
            lines.append(f"{ckpt}: the evaluator F failed on {e['judge_failed']} completions, left out of consistency")
        if e["cut_off"]:
            lines.append(f"{ckpt}: {100 * e['cut_off']:.2f} % of the completions were cut off at the limit of tokens")
    return lines

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title>
<style>body{font:15px/1.45 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}p{margin:.3em 0}td,th{padding:2px 9px}
section{display:flex;gap:1.2em;border-top:1px solid #ccc;padding:1em 0}section div{flex:1;min-width:0;overflow-wrap:anywhere}
img{width:160px;height:max-content}.yes{color:#176b2c}.no{color:#b3261e}.what{color:#666;font-size:13px}.raw{white-space:pre-wrap}
</style><h1>Evaluation</h1><p>{{ what }}</p>
{% for table in tables %}<table>{% for row in table %}{% set tag = "th" if loop.first else "td" %}
<tr>{% for cell in row %}<{{ tag }}>{{ cell }}</{{ tag }}>{% endfor %}</tr>{% endfor %}</table>
{% endfor %}{% for line in remarks %}<p class="what">{{ line }}</p>
{% endfor %}<h2>Some questions, about half of them answered wrong by the last checkpoint</h2>
{% for image, rows in shown %}{% set q = rows[0] %}<section><img src="{{ image }}" alt=""><div>
<p class="what">{{ q.id }}, {{ q.task }}, {{ q.modality }}</p><p><b>{{ q.question }}</b></p>{% for x in q.options %}
<p{% if letters[loop.index0] == q.answer %} class="yes"{% endif %}>{{ letters[loop.index0] }}) {{ x }}</p>{% endfor %}</div>
{% for r in rows %}<div><p class="what">{{ r.ckpt }}</p><p class="raw">
{%- if r.fmt and r.given %}{{ r.thought }}</p><p><b>{{ r.given }}</b>{% else %}{{ r.completion }}{% endif %}</p>
<p class="what">{% for name, value in [("format", r.fmt), ("accuracy", r.acc), ("consistency", r.con)] %}
<span class="{{ "yes" if value == 1 else "no" }}">{{ {1: "✓", 0: "✗"}.get(value, "?") }} {{ name }}</span>{% endfor %}
F: {{ r.verdict if r.verdict is string else "-" }}</p></div>
{% endfor %}</section>{% endfor %}</html>"""

def page(results, rows, records, what):
    """The self-contained HTML page -> str. rows: {ckpt: its rows}. Whatever a model or a file says is escaped."""
    import jinja2  # comes with torch
    first = {}  # each row's first answer to a question: that of its first checkpoint and seed
    for name, answers in rows.items():
        first[name] = {r["id"]: r for r in reversed(answers)}
    records = [r for r in records if all(r["id"] in answers for answers in first.values())]
    last, mixed = first[list(first)[-1]], random.Random(0).sample(records, len(records))
    right, wrong = ([r["id"] for r in mixed if last[r["id"]]["acc"] == acc] for acc in (1, 0))
    wrong = wrong[:max(SHOWN // 2, SHOWN - len(right))]
    chosen = {*wrong, *right[:SHOWN - len(wrong)]}
    shown = []
    for r in (r for r in records if r["id"] in chosen):
        answers = [dict(x[r["id"]], ckpt=name) for name, x in first.items()]
        shown.append((data_url(r, THUMBNAIL), answers))
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE)
    return template.render(what=what, tables=tables(results), remarks=remarks(results), shown=shown, letters=data.LETTERS)

def merged(path, results):
    """What results.json holds of other checkpoints, and these; DataError where it can't be read as such."""
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f) | results
    except FileNotFoundError:
        return results
    except (ValueError, TypeError):
        raise DataError(f"{path}: not a JSON object, expected earlier results: remove it, or name another --out") from None

def without_nan(row):
    """JSON has no nan: null it is. con null says that F failed, verdict null alone that F was undecided."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}

# ---- the command line -------------------------------------------------------------------------------------------------------

def knobs(argv):
    """The command line -> Namespace; DataError for an unknown or impossible value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: (_ for _ in ()).throw(DataError(message))
    for name, (default, meaning, *choices) in KNOBS.items():
        value = next(iter(default), None) if (many := isinstance(default, tuple)) else default
        kind, shown = (str, "") if value is None else (type(value), f" [{value}]")
        parser.add_argument(f"--{name}", default=default, type=kind, nargs="+" if many else None, help=meaning + shown,
                            choices=choices[0] if choices else None)
    args = parser.parse_args(argv)
    for name, least in dict(batch=1, max_new_tokens=0, max_pixels=1, temperature=0, questions=0, judge_concurrency=1,
                            judge_timeout=0.1).items():
        expect(least <= getattr(args, name) < math.inf, f"--{name} {getattr(args, name)}: expected at least {least}")
    expect(len(args.seeds) == 1 or args.temperature > 0 and len(set(args.seeds)) == len(args.seeds),
           f"--seeds {args.seeds}: expected different ones, and a --temperature above 0: greedy answers are the same for each")
    return args

def load(name, args):
    """A checkpoint -> (policy, processor, max_new_tokens)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    policy, processor = M.load_unmerged(name, dtype=dtype, device=device, max_pixels=args.max_pixels)
    return policy, processor, args.max_new_tokens or (80 if M.is_tiny(name) else 512)

def answer_one(args):
    """--image, --question, --options: print each checkpoint's thought and answer."""
    expect(args.image and args.question and args.options, "one question needs all three of --image, --question and --options")
    expect(2 <= len(args.options) <= len(data.LETTERS), f"--options: expected 2 to {len(data.LETTERS)} of them")
    item = vars(args) | dict(id="--image", path=args.image, task="", modality="", answer="")
    for ckpt in [x for row in checkpoints_of(args.ckpt).values() for x in row]:
        policy, processor, limit = load(ckpt, args)
        row, = evaluate(policy, processor, [item], make_judge(), max_new_tokens=limit, temperature=args.temperature,
                        seed=args.seeds[0], progress=False)
        x = row["given"]
        answer = f"{x}) {args.options[data.LETTERS.index(x)]}" if x else f"none to be read in {row['completion']!r}"
        print(f"{ckpt}\n  thought: {row['thought']}\n  answer:  {answer}")

def checkpoints_of(texts):
    """--ckpt's texts -> {row of the table: its checkpoints}. "NAME=A,B" is one row of two."""
    rows = {}
    for text in texts:
        name, equals, several = text.partition("=")
        if not equals or os.path.isdir(text):
            name, paths = text, [text]
        else:
            paths = several.split(",")
        expect(name and all(paths), f"--ckpt {text}: expected a checkpoint, or NAME=A,B,..")
        expect(name not in rows, f"--ckpt: {name} is there twice, expected different checkpoints")
        rows[name] = paths
    return rows

def folder_of(ckpt):
    """The folder in which a checkpoint lies; "out" for a name on the hub, which lies in none."""
    parent = os.path.dirname(os.path.normpath(ckpt)) or "."
    return parent if os.path.isdir(parent) else "out"

def file_name(row, out):
    """A row of the table -> what its file of completions is called."""
    if os.path.isdir(row):
        row = os.path.relpath(row, out)
    return re.sub(r"[^\w.]+", "-", row).strip("-.")

def questions_of(ckpt, beside, args):
    """The files of records for a checkpoint, and the records -> files, records. Without --data that
    is the phantoms beside it, or beside the first checkpoint."""
    files = list(args.data)
    if not files:
        folders = [folder_of(ckpt), beside]
        places = [os.path.join(folder, "phantoms", "phantoms.jsonl") for folder in folders]
        files = [place for place in places if os.path.isfile(place)][:1]
        expect(files, f"{places[-1]} is not there, expected the phantoms, or --data FILE")
    return files, subset(data.read_records(files, args.split, args.only, args.thinking), args.questions)

def main(argv=None):
    args = knobs(argv)
    if args.image or args.question or args.options:
        return answer_one(args)
    ckpts = checkpoints_of(args.ckpt)
    beside = folder_of(next(iter(ckpts.values()))[0])
    out = args.out or beside
    names = {row: file_name(row, out) for row in ckpts}
    expect(len(set(names.values())) == len(names), f"--ckpt {' '.join(args.ckpt)}: expected different names")
    judge = make_judge(args.judge, args.judge_sees, concurrency=args.judge_concurrency, timeout=args.judge_timeout,
                       cache=os.path.join(out, "replies.jsonl"))
    questions = {ckpt: questions_of(ckpt, beside, args) for row in ckpts.values() for ckpt in row}
    files = sorted({file for fs, _ in questions.values() for file in fs})
    records = list({r["path"] + r["id"]: r for _, rs in questions.values() for r in rs}.values())
    gone = [r["path"] for r in records if not os.path.isfile(r["path"])]
    expect(not gone, f"the images of {len(gone)} of {len(records)} questions are missing, the first is {(*gone, '')[0]}")
    os.makedirs(out, exist_ok=True)
    path, results, rows = os.path.join(out, "results.json"), {}, {}
    merged(path, {})  # that it can't be read is better known now than after an hour
    for row, paths in ckpts.items():
        rows[row] = []
        for ckpt in paths:
            policy, processor, limit = load(ckpt, args)
            for seed in args.seeds:
                progress = f"{ckpt}, seed {seed}" if len(args.seeds) > 1 else ckpt
                answers = evaluate(policy, processor, questions[ckpt][1], judge, max_new_tokens=limit,
                                   temperature=args.temperature, seed=seed, batch=args.batch, progress=progress)
                rows[row] += [dict(ckpt=ckpt) | answer for answer in answers]
            params = policy.num_parameters()
            del policy  # before the next one is loaded
        knobs_used = vars(args) | dict(data=files, max_new_tokens=limit)
        results[row] = summary(rows[row]) | dict(params=params, knobs=knobs_used)
        data.write_records(map(without_nan, rows[row]), os.path.join(out, f"completions-{names[row]}.jsonl"))
        data.write_text(path, json.dumps(merged(path, results), indent=1, ensure_ascii=False) + "\n")
    way = f"temperature {args.temperature:g}, seeds {args.seeds}" if args.temperature else "greedy"
    what = f"{len(records)} questions, split {args.split} of {', '.join(files)}; {way}; F: {args.judge}, {args.judge_sees}."
    text = "\n".join([f"{what} In %.\n", *map(markdown, tables(results)), *(f"- {x}" for x in remarks(results))]) + "\n"
    data.write_text(os.path.join(out, "report.md"), text)
    data.write_text(os.path.join(out, "eval.html"), page(results, rows, records, what))
    print(f"\n{text}\n{out}: results.json, report.md, eval.html, completions-*.jsonl")

if __name__ == "__main__":
    data.cli(main)
