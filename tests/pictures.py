"""The pictures of README, made from runs and an evaluation that are already there.

    python tests/pictures.py curve OUT.svg "SFT goes on"=out/sft-long "Con-GRPO"=out/sft,out/grpo
    python tests/pictures.py examples OUT.png out/completions-sft.jsonl out/completions-grpo.jsonl

curve: held-out accuracy over wall time, from the metrics.jsonl of runs with --eval_every; the runs of
a line (A,B) follow each other. The time is that of training, without the evaluations.
examples: phantoms that the last file's checkpoint answers right and the first one's wrong, one per
task, with question, thoughts and answers. The phantoms lie beside the completions.
"""
import json
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 300, 60, 45     # px
COLOURS = ("#8a5a00", "#1f6feb", "#2a7d3f", "#a03070")
TASKS = ("location", "pathology", "anomaly", "modality")
PICTURE, COLUMN, LINE = 150, 330, 17               # px: a phantom, a checkpoint's column, a line of text


def seconds_of(line):
    """Seconds of a step: sft.py logs them whole, grpo.py by part."""
    if "seconds" in line:
        return line["seconds"]
    return sum(v for k, v in line.items() if k.startswith("seconds_"))


def points_of(folders):
    """[(minutes of training, held-out accuracy in %)] of runs that follow each other."""
    points, seconds = [], 0.0
    for folder in folders:
        for line in Path(folder, "metrics.jsonl").read_text().splitlines():
            figures = json.loads(line)
            seconds += seconds_of(figures)
            if "held_out_accuracy" in figures:
                points.append((seconds / 60, 100 * figures["held_out_accuracy"]))
    return points


def curve(file, lines):
    """lines {name: folders} -> an SVG with axes."""
    points = {name: points_of(folders) for name, folders in lines.items()}
    every = [p for ps in points.values() for p in ps]
    most = max(x for x, _ in every)
    low = min(y for _, y in every) // 10 * 10
    high = -(-max(y for _, y in every) // 10) * 10

    def place(x, y):
        across = LEFT + x / most * (WIDTH - LEFT - 20)
        up = (y - low) / (high - low) * (HEIGHT - BOTTOM - 20)
        return f"{across:.1f},{HEIGHT - BOTTOM - up:.1f}"
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
           'font-size="13" role="img"><rect width="100%" height="100%" fill="white"/>']
    for y in range(int(low), int(high) + 1, 10):
        x0, y0 = place(0, y).split(",")
        x1, _ = place(most, y).split(",")
        out.append(f'<path d="M{x0} {y0}H{x1}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{float(y0) + 4}" text-anchor="end">{y} %</text>')
    for x in range(int(most) + 1):
        x0, y0 = place(x, low).split(",")
        out.append(f'<text x="{x0}" y="{float(y0) + 18}" text-anchor="middle">{x}</text>')
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">minutes of training, '
               'one thread</text>')
    for k, (name, ps) in enumerate(points.items()):
        path = " ".join(place(*p) for p in ps)
        out.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[k]}" stroke-width="2.5"/>')
        x, y = place(*ps[-1]).split(",")
        out.append(f'<text x="{x}" y="{float(y) - 8}" text-anchor="end" fill="{COLOURS[k]}">{name}</text>')
    Path(file).write_text("\n".join([*out, "</svg>\n"]))


def examples(file, completions):
    """One question of each of TASKS -> a PNG: image, question and options, and a column per file."""
    answers = []
    for path in completions:
        rows = (json.loads(line) for line in Path(path).read_text().splitlines())
        answers.append({r["id"]: r for r in rows})
    folder = Path(completions[0]).parent / "phantoms"
    images = {}
    for line in (folder / "phantoms.jsonl").read_text().splitlines():
        record = json.loads(line)
        images[record["id"]] = folder / record["image"]
    before, after = answers[0], answers[-1]
    chosen = []
    for task in TASKS:
        turned = [i for i, r in after.items() if r["task"] == task and r["acc"] and r["con"]
                  and not before[i]["acc"]]
        chosen += turned[:1]
    height = PICTURE + 20
    page = Image.new("RGB", (PICTURE + 20 + COLUMN * (1 + len(answers)), height * len(chosen)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for k, i in enumerate(chosen):
        picture = Image.open(images[i]).resize((PICTURE, PICTURE))
        page.paste(picture, (10, k * height + 10))
        r = after[i]
        options = [f"{letter}) {x}" for letter, x in zip("ABCDEF", r["options"], strict=False)]
        columns = [("\n".join([r["question"], *options]), "black")]
        for path, rows in zip(completions, answers, strict=True):
            name = Path(path).stem.removeprefix("completions-")
            said = textwrap.fill(rows[i]["thought"] or rows[i]["completion"], 46)
            right = "right" if rows[i]["acc"] else "wrong"
            columns.append((f"{name}: {rows[i]['given']}, {right}\n{said}",
                            "#176b2c" if rows[i]["acc"] else "#b3261e"))
        for j, (text, colour) in enumerate(columns):
            at = PICTURE + 25 + j * COLUMN, k * height + 10
            pen.multiline_text(at, text, fill=colour, font=font, spacing=LINE - 13)
    page.save(file)


if __name__ == "__main__":
    kind, target, *rest = sys.argv[1:]
    if kind == "curve":
        curve(target, {x.partition("=")[0]: x.partition("=")[2].split(",") for x in rest})
    else:
        examples(target, rest)
