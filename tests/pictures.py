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
import math
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import eval as evaluation

WIDTH, HEIGHT = 760, 380                    # px, of a chart
LEFT, TOP, BOTTOM = 48, 40, 58              # px, its margins; the right one holds the names
FONT, CHARACTER = 15, 9                     # px, height of the letters and their mean width
STEPS = (0.5, 1, 2, 5, 10, 20, 50, 100)     # between ticks
COLOURS = ("#1f5fc4", "#b8500a", "#2a7d3f", "#8e2f86", "#5a5a5a")
TASKS = ("location", "pathology", "anomaly", "modality")
PICTURE, COLUMN, LINE = 150, 330, 17        # px: a phantom, a checkpoint's column, a line of text

# ---- charts --------------------------------------------------------------------------------------

class Line(NamedTuple):
    name: str
    points: list  # of (x, y), the line itself
    pale: list    # of lists of points: lines behind it, one per seed
    bars: list    # of lists of two points: error bars, one per point, or none


def step_for(extent):
    """The distance between ticks that makes at most seven parts."""
    return next(step for step in STEPS if extent / step <= 7 or step == STEPS[-1])


def chart(file, lines, ticks, x_title, y_title):
    """Lines -> an SVG with axes. ticks: {x: its text}, x goes at least from the first to the last.
    The names stand on the right, at the height of their lines' ends."""
    xs, ys = list(ticks), []
    for line in lines:
        for points in (line.points, *line.pale, *line.bars):
            xs += [x for x, _ in points]
            ys += [y for _, y in points]
    step = step_for(max(ys) - min(ys))
    low, high = math.floor(min(ys) / step) * step, math.ceil(max(ys) / step) * step
    right = WIDTH - 24 - CHARACTER * max(len(line.name) for line in lines)
    bottom = HEIGHT - BOTTOM
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
           f'font-family="sans-serif" font-size="{FONT}">',
           '<rect width="100%" height="100%" fill="white"/>']

    def across(x):
        return LEFT + (x - min(xs)) / (max(xs) - min(xs) or 1) * (right - LEFT)

    def down(y):
        return bottom - (y - low) / (high - low or 1) * (bottom - TOP)

    def draw(points, look):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        svg.append(f'<polyline points="{path}" fill="none" {look}/>')

    def write(x, y, text, look):
        svg.append(f'<text x="{x:.1f}" y="{y:.1f}" {look}>{html.escape(text)}</text>')

    for y in np.arange(low, high + step / 2, step):
        draw([(min(xs), y), (max(xs), y)], 'stroke="#ddd"')
        write(LEFT - 10, down(y) + 5, f"{y:g}", 'text-anchor="end"')
    for x, text in ticks.items():
        write(across(x), bottom + 22, text, 'text-anchor="middle"')
    write((LEFT + right) / 2, HEIGHT - 12, x_title, 'text-anchor="middle"')
    write(8, 20, y_title, 'text-anchor="start"')

    ends = []
    for line, colour in zip(lines, itertools.cycle(COLOURS), strict=False):
        for points in line.pale:
            draw(points, f'stroke="{colour}" stroke-opacity="0.3"')
        for points in line.bars:
            draw(points, f'stroke="{colour}" stroke-width="1.5"')
        draw(line.points, f'stroke="{colour}" stroke-width="2.5" stroke-linejoin="round"')
        if line.bars:
            for x, y in line.points:
                circle = f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="4"'
                svg.append(f'{circle} fill="{colour}"/>')
        ends.append((down(line.points[-1][1]), line.name, colour))
    place = 0
    for height, name, colour in sorted(ends):
        place = max(height + 5, place + FONT + 4)  # below the name above
        write(right + 14, place, name, f'fill="{colour}"')
    Path(file).write_text("\n".join([*svg, "</svg>\n"]))


def points_of(folders):
    """[(minutes of training, held-out accuracy in %)] of runs that follow each other."""
    points, before = [], 0.0
    for folder in folders:
        steps = evaluation.steps_of(folder)
        for figures in steps:
            if "held_out_accuracy" in figures:
                minutes = before + figures["minutes"]
                points.append((minutes, 100 * figures["held_out_accuracy"]))
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
    lines, most = [], 0
    for argument in arguments:
        name, _, runs = argument.rpartition("=")
        seeds = [points_of(run.split("+")) for run in runs.split(",")]
        most = max(most, *(points[-1][0] for points in seeds))
        lines.append(Line(name, mean_line(seeds), seeds if len(seeds) > 1 else [], []))
    ticks = {x: f"{x:g}" for x in np.arange(0, most, max(1, step_for(most)))}
    chart(file, lines, ticks, "minutes of training, one thread", "held-out accuracy, %")


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
    lines = []
    for k, (name, values) in enumerate(figures.items()):
        beside = 0.02 * (k - (len(figures) - 1) / 2)  # so that error bars don't hide each other
        line = Line(name, [], [], [])
        for x in sorted(values, key=texts.index):
            place, (y, deviation) = texts.index(x) + beside, values[x]
            line.points.append((place, y))
            line.bars.append([(place, y - deviation), (place, y + deviation)])
        lines.append(line)
    ticks = {-0.3: "", **dict(enumerate(texts)), len(texts) - 0.7: ""}  # a margin on both sides
    chart(file, lines, ticks, x_title, "accuracy, %")

# ---- examples ------------------------------------------------------------------------------------

def phantom_images(folder):
    """The folder of phantoms.jsonl -> {id: file of the image}."""
    records = map(json.loads, (folder / "phantoms.jsonl").read_text().splitlines())
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
        rows = map(json.loads, Path(path).read_text().splitlines())
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
