"""The pictures of README, made from runs and an evaluation that are already there.

    python tests/pictures.py curve OUT.svg "SFT goes on"=out0/sft-long,out1/sft-long \\
        "SFT, then Con-GRPO"=out0/sft+out0/grpo,out1/sft+out1/grpo
    python tests/pictures.py lines OUT.svg "images with thoughts" \\
        "SFT=30:61.0±4.1,60:72.3±5.8" "Con-GRPO=30:70.2±3.9,60:78.9±3.6"
    python tests/pictures.py phantoms OUT.jpg
    python tests/pictures.py examples OUT.png out/completions-sft.jsonl out/completions-grpo.jsonl

curve: held-out accuracy over wall time, from the metrics.jsonl of runs with --eval_every. A "+"
joins runs that follow each other, a "," separates seeds: each seed is a pale line, their mean a
strong one, as far as all seeds go. The time is that of training, without the evaluations.
lines: accuracy in % with its deviation (or without: "30:61.0") at a few x, numbers or texts. They
stand at equal distances, numbers in their order, texts in that of the command.
phantoms: one of each modality and region without a lesion, and with each style of lesion.
examples: phantoms that the last file's checkpoint answers right and the first one's wrong, one per
task, with question, thoughts and answers. The phantoms lie beside the completions.
"""
import html
import itertools
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation

CHARACTER = 5.4                             # px, width of a name's letter
STYLE = """
  svg { font: 9px sans-serif }
  .of { color: hsl(calc(215 + 137.5 * var(--k)) 70% 36%) } .of text { fill: currentColor }
  polyline { fill: none; stroke: currentColor; stroke-width: 1.4; stroke-linejoin: round }
  .raw { opacity: .3; stroke-width: .7 } .grid { stroke: #ddd; stroke-width: .5 }
  .dot { stroke-width: 6; stroke-linecap: round }
"""
TASKS = ("location", "pathology", "anomaly", "modality")
PICTURE, COLUMN, LINE = 150, 330, 17        # px: a phantom, a checkpoint's column, a line of text

# ---- charts --------------------------------------------------------------------------------------

def draw(file, chart):
    """A chart of eval.py -> an SVG. The names stand on the right, at the height of their lines'
    ends: a line is the last of its name's strokes."""
    width = 360 + CHARACTER * max(map(len, chart["lines"]))
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 200">',
           f'<style>{STYLE}</style><rect width="100%" height="100%" fill="white"/>',
           evaluation.TEMPLATES.get_template("chart").render(chart=chart)]
    place, ends = 0, []
    for k, (name, strokes) in enumerate(chart["lines"].items()):
        _, line = strokes[-1]
        ends.append((evaluation.place(line[-1][1], chart["ys"], 166, 24), name, k))
    for height, name, k in sorted(ends):
        place = max(height + 3, place + 12)  # below the name above
        svg.append(f'<g class="of" style="--k: {k}"><text x="356" y="{place}">'
                   f'{html.escape(name)}</text></g>')
    Path(file).write_text("\n".join([*svg, "</svg>\n"]))


def points_of(folders):
    """[(minutes of training, held-out accuracy in %)] of runs that follow each other."""
    points, before = [], 0.0
    for folder in folders:
        steps = evaluation.steps_of(folder)
        for x in steps:
            if "held_out_accuracy" in x:
                points.append((before + x["minutes"], 100 * x["held_out_accuracy"]))
        before += steps[-1]["minutes"]
    return points


def mean_line(seeds):
    """Lists of points, one per seed -> the points of their mean, where all seeds have a value: at
    each x of any of them, the others' y taken from the straight line between their points."""
    first = max(points[0][0] for points in seeds)
    last = min(points[-1][0] for points in seeds)
    grid = sorted({x for points in seeds for x, _ in points if first <= x <= last})
    heights = [np.interp(grid, *zip(*points, strict=True)) for points in seeds]
    return list(zip(grid, np.mean(heights, 0).tolist(), strict=True))


def curve(file, arguments):
    """["NAME=A+B,C+D"] -> an SVG."""
    lines = {}
    for argument in arguments:
        name, _, runs = argument.rpartition("=")
        seeds = [points_of(run.split("+")) for run in runs.split(",")]
        pale = [("raw", points) for points in seeds if len(seeds) > 1]
        lines[name] = [*pale, ("", mean_line(seeds))]
    draw(file, evaluation.chart("held-out accuracy, %", lines, "minutes of training, one thread"))


def lines_with_bars(file, x_title, arguments):
    """["NAME=x1:y1±s1,x2:y2±s2"] -> an SVG."""
    figures = {}  # {name: {text of x: (y, deviation)}}
    for argument in arguments:
        name, _, points = argument.rpartition("=")
        figures[name] = {}
        for point in points.split(","):
            x, _, figure = point.rpartition(":")
            y, _, deviation = figure.partition("±")
            figures[name][x] = float(y), float(deviation or 0)
    texts = list(dict.fromkeys(itertools.chain(*figures.values())))
    if all(re.fullmatch(r"[\d.]+", text) for text in texts):
        texts.sort(key=float)
    lines = {}
    for k, (name, values) in enumerate(figures.items()):
        beside = 0.02 * (k - (len(figures) - 1) / 2)  # so that error bars don't hide each other
        line, lines[name] = [], []
        for x in sorted(values, key=texts.index):
            place, (y, deviation) = texts.index(x) + beside, values[x]
            line.append((place, y))
            lines[name] += [("", [(place, y - deviation), (place, y + deviation)]),
                            ("dot", [(place, y), (place, y)])]
        lines[name].append(("", line))
    chart = evaluation.chart("accuracy, %", lines, x_title)
    chart["xs"] = {-0.3: "", **dict(enumerate(texts)), len(texts) - 0.7: ""}  # with margins
    draw(file, chart)

# ---- examples ------------------------------------------------------------------------------------

def phantom_images(folder):
    """The folder of phantoms.jsonl -> {id: file of the image}."""
    records = map(json.loads, (folder / "phantoms.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["id"]: folder / record["image"] for record in records}


def turned_right(before, after):
    """{id: row} of two checkpoints -> for each of TASKS an id that only the second got right."""
    chosen = []
    for task in TASKS:
        turned = [i for i, row in after.items() if row["task"] == task and row["acc"] and row["con"]
                  and not before[i]["acc"]]
        chosen += turned[:1]
    return chosen


def phantoms(file):
    """A row for each pair of data.PAIRS: without a lesion, then with the four styles."""
    cells = []
    for i, pair in enumerate(data.PAIRS):
        for j, style in enumerate((None, *data.STYLES)):
            place = data.LOCATIONS[(i + j) % len(data.LOCATIONS)]
            lesion = (style, place) if style else None
            pixels, facts = data.draw_phantom(np.random.default_rng([0, i, j]), *pair, lesion)
            label = f"{facts['lesion']}, {place}" if style else " ".join(pair)
            side = 2 * data.SIZE
            cells.append((Image.fromarray(pixels).resize((side, side)), label))
    data.contact_sheet(cells, file)


def examples(file, completions):
    """One question of each of TASKS -> a PNG: image, question and options, a column per file."""
    names = [Path(path).stem.removeprefix("completions-") for path in completions]
    answers = []  # per file {id: row}
    for path in completions:
        rows = map(json.loads, Path(path).read_text(encoding="utf-8").splitlines())
        answers.append({row["id"]: row for row in rows})
    images = phantom_images(Path(completions[0]).parent / "phantoms")
    chosen = turned_right(answers[0], answers[-1])

    width, height = PICTURE + 20 + COLUMN * (1 + len(answers)), PICTURE + 20
    page = Image.new("RGB", (width, height * len(chosen)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for k, i in enumerate(chosen):
        top = k * height + 10
        page.paste(Image.open(images[i]).resize((PICTURE, PICTURE)), (10, top))
        asked = answers[-1][i]
        options = zip("ABCDEF", asked["options"], strict=False)
        lines = [asked["question"], *(f"{letter}) {option}" for letter, option in options)]
        columns = [("\n".join(lines), "black")]
        for name, rows in zip(names, answers, strict=True):
            row = rows[i]
            verdict, colour = ("right", "#176b2c") if row["acc"] else ("wrong", "#b3261e")
            said = textwrap.fill(row["thought"] or row["completion"], 46)
            columns.append((f"{name}: {row['given']}, {verdict}\n{said}", colour))
        for j, (text, colour) in enumerate(columns):
            left = PICTURE + 25 + j * COLUMN
            pen.multiline_text((left, top), text, fill=colour, font=font, spacing=LINE - 13)
    page.save(file)


if __name__ == "__main__":
    kind, target, *rest = sys.argv[1:]
    if kind == "curve":
        curve(target, rest)
    elif kind == "lines":
        lines_with_bars(target, rest[0], rest[1:])
    elif kind == "phantoms":
        phantoms(target)
    else:
        examples(target, rest)
