"""The questions: record format, readers, and phantoms (procedurally drawn images with questions and chains of thought).

A record is one JSON line: {"id", "image", "modality", "anatomy", "task", "question", "options": [..], "answer": "B",
"thought": str | null, "source", "group", "split"}. `image` is relative to the file's folder and may not leave it; `group`
(patient, volume, lesion) is never split between train and test. Phantoms and real data take the same path: files on disk, then
read_records. Left out on purpose: dataset classes, augmentation, resizing (model.py's image processor does it), download.

    python data.py phantoms --out out/phantoms --n 2000 --seed 0 --show sheet.png     # draw them, and a sheet to look at
    python data.py check out/phantoms/phantoms.jsonl                                  # validate, count by task, split, letter
"""
import argparse
import json
import os
import re
import shutil
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

LETTERS = "ABCDEF"
TASKS = ("anatomy", "anomaly", "location", "modality", "pathology")  # section 3.1's five
MED_R1_TASKS = {  # Med-R1's question types; its files don't name them: the first rule found in the question, a guess
    "modality recognition": r"modalit|imaging|technique|method|type of (image|scan)",
    "lesion grading": r"benign|malignan|cancerous|harmless|\bstage|\bgrad(e|ing)|severity",
    "other biological attributes": r"\bcell|cellular|tissue|sperm|morpholog|secretion|stain",
    "disease diagnosis": r"normal|anomal|irregular|disease|diagnos|patholog|condition|lesion|covid|cancer|malaria",
    "anatomy identification": r"organ|anatom|structure|\bpart\b|depicted|displayed|shown|visuali[sz]ed|seen|represent"}
KEYS = ("id", "image", "modality", "anatomy", "task", "question", "options", "answer", "thought", "source", "group", "split")
SPLITS = ("train", "val", "test")
MAX_PIXELS = 2**26  # pixels an image may have; looked at before anything is decoded
INSTRUCTION = "First think in <think></think>, then give the letter in <answer></answer>."

class DataError(ValueError):
    """Input that cannot be used; the message is one sentence for the user."""

def expect(ok, sentence):
    if not ok:
        raise DataError(sentence)

def cli(main):
    """Run main(); bad input, a full or read-only disk and Ctrl-C end it with one sentence on stderr and exit code 2."""
    try:
        main()
    except (DataError, OSError, KeyboardInterrupt) as e:
        known = isinstance(e, OSError) and e.strerror
        said = f"{e.filename or 'system'}: {e.strerror}" if known else str(e) or "stopped by Ctrl-C"
        tqdm.write(f"error: {said}", file=sys.stderr)  # on a line of its own, whatever bar is being drawn
        sys.exit(2)

# ---- records ---------------------------------------------------------------------------------------------------------------
def check_record(record, folder):
    """The record with "path" added; DataError with half a sentence (read_records adds file and line) if anything is wrong."""
    expect(isinstance(record, dict), f"expected a JSON object, got {record!r:.60}")
    for k in KEYS:
        expect(k in record, f"key {k!r} is missing, expected {', '.join(KEYS)}")
        fine = isinstance(record[k], str) and record[k].strip() or k == "options" or k == "thought" and record[k] is None
        expect(fine, f"{k!r} is {record[k]!r:.60}, expected a non-empty string{' or null' if k == 'thought' else ''}")
    image, options, root = record["image"], record["options"], os.path.realpath(folder)
    fine = isinstance(options, list) and all(isinstance(o, str) and o.strip() for o in options)
    expect(fine, f"'options' is {options!r:.60}, expected a list of non-empty strings")
    expect(2 <= len(options) <= len(LETTERS), f"number of options is {len(options)}, expected 2 to {len(LETTERS)}")
    expect(len({o.strip().casefold() for o in options}) == len(options), f"two options are the same in {options!r:.200}")
    for k, names in {"answer": LETTERS[:len(options)], "task": (*TASKS, *MED_R1_TASKS), "split": SPLITS}.items():
        expect(record[k] in tuple(names),
               f"{k} {record[k]!r:.60} is not among the {'options' if k == 'answer' else k + 's'} {', '.join(names)}")
    path, outside = os.path.realpath(os.path.join(root, image)), re.search(r"^[/\\~]|^\w:|(^|[/\\])\.\.($|[/\\])", image)
    expect(not outside and path.startswith(os.path.join(root, "")),  # realpath follows links
           f"image {image!r} leaves the data folder, expected a path inside it, relative to the file")
    return {**record, "path": path}

def read_records(files, split=None):
    """Validated records of one file or several, each with "path" added; split keeps one. A .json file is taken as Med-R1's.

    DataError names file, line and what was expected. Bad questions in Med-R1's files, not ours to mend, are left out, counted
    and told on stderr. Whether the images exist is load_image's business."""
    records, seen = [], {}
    for file in [files] if isinstance(files, (str, os.PathLike)) else files:
        theirs, folder, left_out = str(file).endswith(".json"), os.path.dirname(os.path.abspath(file)), Counter()
        form, unit = ("a JSON list of questions", "question") if theirs else ("one JSON object a line", "line")
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
            items = json.loads(text or "[]") if theirs else text.split("\n")
        except (OSError, ValueError, RecursionError) as e:
            raise DataError(f"{file}: {getattr(e, 'strerror', None) or e}, expected UTF-8 text with {form}") from None
        expect(isinstance(items, list) and items and text.strip(), f"{file} holds no records, expected {form}")
        for k, item in enumerate(items, 1):
            try:
                if theirs or item.strip():
                    record = check_record(med_r1_record(item, Path(file).stem, k) if theirs else json.loads(item), folder)
                    expect(record["id"] not in seen, f"id {record['id']!r} was already used in {seen.get(record['id'])}")
                    seen[record["id"]] = f"{file}, {unit} {k}"
                    records.append(record)
            except (ValueError, RecursionError) as e:
                why = f"broken JSON, {e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
                expect(theirs, f"{file}, line {k}: {why}")
                left_out[re.sub(r"'.*'|\".*\"|\[.*\]", "..", why)] += 1
        if left_out:
            reasons = "; ".join(f"{n} x {why}" for why, n in left_out.most_common())
            print(f"{file}: {left_out.total()} of {len(items)} questions left out: {reasons}", file=sys.stderr)
    kept = [r for r in records if split in (None, r["split"])]
    expect(kept, f"no usable record{f' of split {split!r}' if split else ''} in {files}")
    return kept

def med_r1_record(item, stem, k):
    """Record of Med-R1's {"image", "problem": "Q? A)x, B)y", "solution": "<answer> B </answer>"}, question k of file `stem`."""
    expect(isinstance(item, dict) and all(isinstance(item.get(x), str) for x in ("image", "problem", "solution")),
           "expected an object with the texts image, problem and solution")
    parts = [item["problem"]]
    for n, letter in enumerate(LETTERS, 1):  # a marker is the next letter, after a space or comma: "(H&E)" is no option E
        if len(parts) == n:
            parts += re.split(rf"(?<=[\s,;:?.]){letter}\)", parts.pop(), maxsplit=1)
    question, *options = (p.strip(" ,;\n") for p in parts)
    answer, words = re.search(r"<answer>\s*([A-F])\s*</answer>", item["solution"]), re.findall(r"[a-z]+", stem.lower())
    modality = next((m for m in MODALITIES if m.lower().replace("-", "") in words), stem)
    task = next((t for t, rule in MED_R1_TASKS.items() if re.search(rule, question.lower())), "disease diagnosis")
    return {"id": f"{stem}-{k}", "image": item["image"], "modality": modality, "anatomy": "unknown", "task": task,
            "question": question, "options": options, "answer": answer[1] if answer else "none", "thought": None,
            "source": "Med-R1", "group": item["image"], "split": "test" if "test" in words else "train"}

def write_records(records, file):
    """Write JSONL, without "path"; beside the file first, then renamed into place: no half-written file is ever seen."""
    part = Path(f"{file}.{os.getpid()}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "w", encoding="utf-8") as f:
            f.writelines(json.dumps({k: v for k, v in r.items() if k != "path"}, ensure_ascii=False) + "\n" for r in records)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)

def load_image(record):
    """The record's image as PIL RGB, upright by its EXIF tag; 16-bit and float images are stretched from min to max.

    DataError names record and file when it is missing, truncated, not an image, or has 0 or more than MAX_PIXELS pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is the lower one
            file = Image.open(record["path"])  # reads the header alone
        with file:
            if file.width * file.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):
            a = np.nan_to_num(np.asarray(image, dtype=np.float64))
            image = Image.fromarray(((a - a.min()) * (255 / (np.ptp(a) or 1))).astype(np.uint8))
        return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    except Exception as e:  # Pillow's decoders raise anything (SyntaxError, struct.error, IndexError) on a damaged file
        why = {FileNotFoundError: "is missing", Image.UnidentifiedImageError: "is not an image, or has no pixels",
               Image.DecompressionBombError: f"has more than {MAX_PIXELS} pixels"}.get(type(e), f"is truncated or broken ({e})")
        raise DataError(f"record {record['id']!r}: image {record['path']} {why}") from None

def question_text(record):
    """The user's message: question, options as "A) text", how to answer."""
    options = "".join(f"{letter}) {o}\n" for letter, o in zip(LETTERS, record["options"], strict=False))
    return f"{record['question']}\n{options}{INSTRUCTION}"

def answer_text(record):
    """Y* of Eq. (1): "<think>T*</think><answer>A*</answer>"; DataError if the record has no thought."""
    expect(record["thought"] is not None, f"record {record['id']!r} has no thought, which supervised fine-tuning needs")
    return f"<think>{record['thought']}</think><answer>{record['answer']}</answer>"

# ---- phantoms: knobs and words ----------------------------------------------------------------------------------------------
SIZE = 112                # px, side of the square image
LESION_RATE = 0.67        # share of images with a lesion
LESION_RADIUS = (9, 13)   # px, smallest and largest
LESION_CONTRAST = 0.50    # fraction of the grey range by which a lesion is brighter or darker than what lies under it
TRAIN_SHARE = 0.7         # of the images; the rest is the test split
SIGNS = {"MRI": "Soft tissue and dark bone", "CT": "Grey tissue and white bone", "OCT": "Thin bright layers",
         "Ultrasound": "Speckle and a fan", "Dermoscopy": "Hair and a pink surface", "CE-MRI": "Bright vessels and soft tissue",
         "Endoscopy": "Shiny pink folds", "Fundus": "Red vessels and a bright disc", "X-ray": "White ribs and dark air",
         "Microscopy": "Pink fibres and purple nuclei"}  # what tells a modality, for the thoughts
# what a lesion of each style looks like, and what it is called in each region
STYLES = {"solid": "a smooth blob", "cystic": "an empty disc", "ring": "a thick rim", "clustered": "a group of dots"}
KINDS = {"Brain": ("glioma", "cyst", "abscess", "plaques"), "Liver": ("tumor", "cyst", "abscess", "metastases"),
         "Retina": ("exudate", "edema", "hole", "drusen"), "Breast": ("tumor", "cyst", "abscess", "calcifications"),
         "Skin": ("melanoma", "cyst", "ringworm", "warts"), "Lung": ("nodule", "bulla", "cavity", "infiltrates"),
         "Thyroid": ("nodule", "cyst", "adenoma", "calcifications"), "Chest": ("nodule", "bulla", "cavity", "infiltrates"),
         "Alimentary": ("polyp", "ulcer", "diverticulum", "erosions"),
         "Lymph Node": ("lymphoma", "necrosis", "granuloma", "metastases")}
CENTERS = {"Left Upper": (.28, .28), "Right Upper": (.72, .28), "Left Lower": (.28, .72), "Right Lower": (.72, .72),
           "Center Region": (.5, .5)}  # x, y as fractions of the side; left is the image's left
MODALITIES, ANATOMIES, LOCATIONS = tuple(SIGNS), tuple(KINDS), tuple(CENTERS)  # section 3.1's ten, ten, and five of Fig. 4
PAIRS = (("MRI", "Brain"), ("CE-MRI", "Liver"), ("CT", "Liver"), ("CT", "Lung"), ("OCT", "Retina"), ("Ultrasound", "Breast"),
         ("Ultrasound", "Thyroid"), ("Dermoscopy", "Skin"), ("Endoscopy", "Alimentary"), ("Fundus", "Retina"),
         ("X-ray", "Chest"), ("Microscopy", "Lymph Node"), ("Microscopy", "Breast"))  # as in the paper's sources
ALIKE = ({"MRI", "CE-MRI"}, {"Lung", "Chest"})  # never offered against each other: both would be right
# what + of a lesion adds to RGB in a coloured image: darker on pale tissue
TINT = {"Dermoscopy": (-.8, -1, -.9), "Microscopy": (-1, -1.2, -.5), "Fundus": (.9, 1.2, .5), "Endoscopy": (1, 1, 1)}
ASKED = {"anatomy": "organ", "anomaly": "state of the image", "location": "place of the lesion", "modality": "kind of image",
         "pathology": "kind of lesion"}
PHRASES = ("What is the {}?", "What is the {} here?", "What is the {} shown?", "Which is the {}?", "Say what the {} is.",
           "Name the {}.", "Name the {} shown here.", "Please name the {}.", "Look and name the {}.", "Can you name the {}?")

# ---- phantoms: drawing. u, v: coordinates (SIZE, SIZE), about -1..1 over the image; values 0..1 ------------------------------
def disc(u, v, x, y, a, b, soft=.1):  # 1 inside an ellipse, 0 outside
    return np.clip((1 - np.hypot((u - x) / a, (v - y) / b)) / soft + .5, 0, 1)

def cloud(rng, rows, cols=None):  # smooth noise
    grid = Image.fromarray(rng.standard_normal((rows, cols or rows), dtype=np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC))

def vessels(rng, roots, length=1., bend=.5, kids=2, width=1):  # mask of smooth random walks from each (x, y, angle), branching
    image, roots = Image.new("L", (SIZE, SIZE)), np.array(roots)  # roots (R, 3)
    for far, n in ((length, kids), (.55 * length, 0)):
        turn = roots[:, 2:] + np.cumsum(rng.normal(rng.normal(0, bend / 3, (len(roots), 1)), bend / 4, (len(roots), 8)), 1)
        path = roots[:, None, :2] + np.cumsum(np.stack([np.cos(turn), np.sin(turn)], 2), 1) * far / 8  # (R, 8, 2)
        for line in (path + 1) * SIZE / 2:
            ImageDraw.Draw(image).line(line.ravel().tolist(), fill=255, width=width)
        fork = [np.c_[path[:, 2 + 2 * k], turn[:, 3] + rng.choice((-.8, .8), len(roots))] for k in range(n)]
        roots = np.concatenate([roots[:0], *fork])
    return np.asarray(image.filter(ImageFilter.GaussianBlur(.6)), dtype=np.float32) / 255

def draw_grey(rng, modality, anatomy, u, v):  # (SIZE, SIZE)
    x, dye = np.abs(u), modality == "CE-MRI"
    if anatomy == "Brain":  # tissue with folds, skull, scalp; ventricles and falx
        d = np.hypot(u / .9, v / .97) + .02 * cloud(rng, 5)
        g = np.interp(d, (0, .6, .79, .82, .86, .89, .91, .97, 1), (.54, .52, .42, .15, .12, .06, .8, .7, 0))
        g -= .16 * np.clip(np.sin(8 * cloud(rng, 9)), 0, 1) * np.clip(5 * d - 2.5, 0, 1) * (d < .82)
        return g - .38 * np.maximum(disc(x, v, .13, -.04, .07, .25), .6 * disc(u, v, 0, 0, .02, .8)) * (d < .82)
    if anatomy in ("Liver", "Lung"):  # a slice of the trunk: organ, muscle, fat; ribs and spine
        d, (fat, muscle, bone) = np.hypot(u / .99, v / .93), (.85, .3, .12) if dye else (.22, .45, .97)
        g = np.interp(d, (0, .84, .86, .89, .91, .98, 1), (.5, .5, muscle, muscle, fat, fat, 0)) + .02 * cloud(rng, 9) * (d < 1)
        if anatomy == "Lung":  # around the heart
            lungs = disc(x, v, .43, 0, .4, .7, .05) * (1 - disc(u, v, .08, -.5, .24, .26))
            roots = [(s * .1, .05, np.pi * (s < 0) + a) for s in (-1, 1) for a in (-1, 0, .9)]
            g += (d < .84) * .14 + lungs * (.16 - g + .3 * vessels(rng, roots, .6, kids=3) + .04 * cloud(rng, 14))
        else:  # its vessels, aorta, stomach, fissure
            g += (.34 if dye else .1) * vessels(rng, ((.1, .3, -2.6), (.1, .3, -1.2), (0, .4, 2.7)), width=2) * (d < .8)
            g += ((.98 if dye else .68) - g) * disc(u, v, .05, .5, .07, .07, .2)
            g -= .4 * disc(u, v, .74, .02, .12, .22) + .22 * disc(u, v, .25, -.62, .02, .2, .4)
        ribs = (np.cos(11 * np.arctan2(v, u) + rng.uniform(0, 6)) > .3) * (np.abs(d - .875) < .025)
        return g + (bone - g) * np.maximum(ribs, disc(u, v, 0, .74, .15, .13))
    if modality == "OCT":  # t: 0 at the surface with its pit, 1 below the bright line
        top = -.78 + .22 * np.exp(-((u - rng.uniform(-.2, .2)) / .3)**2) + rng.uniform(-.06, .06) * u
        t = (v - top) / (.22 + .05 * u * rng.uniform(-1, 1) - top) + .015 * cloud(rng, 8)
        g = np.interp(t, (-.02, 0, .12, .15, .33, .36, .44, .47, .54, .57, .8, .82, .87, .9, .94, 1, 1.03, 1.6),
                      (.03, .75, .7, .5, .5, .35, .35, .55, .5, .32, .32, .6, .6, .4, .9, .9, .55, .38))
        return g + (.07 * cloud(rng, 40, 12) + .08 * (t > 1.03) * cloud(rng, 12)) * (t > 0)
    if modality == "Ultrasound":
        w, d = v + .12 * cloud(rng, 3, 4), np.hypot(u / 1.15, v / .78)
        if anatomy == "Thyroid":  # even tissue in a bright capsule, muscle above and below
            g = .5 * (d < .96) + .95 * (np.abs(d - .98) < .03) + (d > 1) * (.2 + .3 * (np.sin(38 * w) > .75))
        else:  # skin, fat, streaky gland, chest wall
            g = np.interp(w, (-1, -.86, -.82, -.5, -.3, .35, .5, .66, .7, .74), (.75, .75, .3, .33, .5, .5, .35, .35, .85, .25))
            g += .25 * np.clip(cloud(rng, 26, 5), 0, 1) * (w > -.82) * (w < .66)
        far, fan = np.hypot(u, v + 2.1), np.abs(np.arctan2(u, v + 2.1)) < .5
        return g * (.5 + .42 * np.hypot(cloud(rng, 75), cloud(rng, 75))) * fan * (far > 1.15) * (far < 3.03)
    lungs = disc(x, v, .47, -.05, .4, .82, .12)  # X-ray of the chest: ribs, clavicles, spine, vessels, heart, diaphragm
    g = .62 * disc(u, v, 0, .3, 1.1, 1.6, .3) - lungs * (.34 - .04 * cloud(rng, 9))
    g += .12 * np.clip(3 * np.sin(24 * (v + .5 * (x - .4)**2 - .25 * x)) - 1, 0, 1) * disc(x, v, .5, 0, .46, .95)
    g += .15 * (np.abs(v + .82 + .2 * x) < .05) * (x > .1) + .12 * (x < .09)
    g += .1 * vessels(rng, ((-.15, 0, 2.4), (-.15, 0, 3.6), (.15, 0, .5), (.15, 0, -.6)), .6)
    g += .25 * disc(u, v, .15, .4, .34, .4, .15) * lungs
    return g + (.75 - g) * np.clip(8 * (v - .8 + (x - .45)**2), 0, 1)

def draw_colour(rng, modality, anatomy, u, v):  # (SIZE, SIZE, 3)
    def paint(c, mask, colour):
        return c + mask[..., None] * (np.float32(colour) - c)
    spots, side = cloud(rng, 5)[..., None], rng.choice((-1, 1))
    if modality == "Dermoscopy":  # hairs, a round lens
        c = (.87, .67, .58) + .05 * spots * (.6, 1, 1) + .02 * cloud(rng, 50)[..., None]
        hairs = vessels(rng, rng.uniform((-1, -1, -.4), (.3, 1, 1.2), (7, 3)), 1.3, .15, 0)
        return paint(c, .75 * hairs, (.25, .15, .1)) * disc(u, v, 0, 0, 1.2, 1.2, .06)[..., None]
    if modality == "Endoscopy":  # folds, wet highlights; the dark lumen lies at the middle of an edge, away from the lesions
        lumen = rng.integers(4) * np.pi / 2 + rng.uniform(-.1, .1)
        far = np.hypot(u - .88 * np.cos(lumen), v - .88 * np.sin(lumen)) + .06 * cloud(rng, 5)
        light = np.clip(.3 + 1.1 * far, .1, 1) - .14 * np.clip(3 * np.cos(11 * far) - 2, 0, 1) * np.clip(1.8 - far, 0, 1)
        c = light[..., None] * (.86, .45, .38) + .03 * cloud(rng, 12)[..., None]
        c = paint(c, .35 * vessels(rng, rng.uniform((-1, -1, 0), (1, 1, 6), (4, 3)), .7), (.6, .12, .12))
        c = paint(c, np.clip(3 * cloud(rng, 22) - 6.2, 0, 1), (1, 1, .95))
        return c * ((np.maximum(abs(u), abs(v)) < .97) & (abs(u) + abs(v) < 1.62))[..., None]
    if modality == "Fundus":  # macula, vessels, optic disc
        c = (1.05 - .35 * np.hypot(u, v))[..., None] * (.8, .4, .16) + .03 * spots
        c = paint(c, .35 * disc(u, v, -side * .1, 0, .2, .2, 1), (.4, .12, .05))
        roots = [(side * .72, 0, np.pi / 2 * (1 + side) + side * a) for a in (-1.9, -1.1, -.55, .55, 1.1, 1.9)]
        c = paint(c, .75 * vessels(rng, roots, 1.5, kids=3), (.45, .05, .04))
        return paint(c, disc(u, v, side * .74, 0, .15, .17, .3), (.98, .86, .5)) * disc(u, v, 0, 0, 1, 1, .03)[..., None]
    if anatomy == "Lymph Node":  # packed nuclei
        return paint((.88, .72, .85) + .06 * spots * (.3, 1, .5), .75 * np.clip(2.4 * cloud(rng, 38) - .3, 0, 1), (.3, .15, .5))
    fibres, nuclei = np.sin(14 * v + 5 * cloud(rng, 3) + 3 * cloud(rng, 6)), np.clip(3 * cloud(rng, 38) - 3.3, 0, 1)
    for x, y, r in rng.uniform((-.95, -.95, .08), (.95, .95, .12), (7, 3)):  # small glands of the breast
        nuclei = np.maximum(nuclei, np.clip(2 - np.abs(np.hypot(u - x, v - y) / r - .75) / .15, 0, 1))
    return paint((.93, .68, .79) + .06 * fibres[..., None] * (.4, 1, .7), .8 * nuclei, (.4, .18, .5))

def lesion_mask(rng, style, x, y):  # around (x, y) px; (SIZE, SIZE) in -1..1: + bright, - dark (TINT turns that round)
    radius, stretch, turn = rng.uniform(*LESION_RADIUS), rng.uniform(.88, 1.14), rng.uniform(0, np.pi)
    p, q = np.meshgrid(*((np.arange(SIZE, dtype=np.float32) + .5 - center) / radius for center in (x, y)))
    p, q = (p * np.cos(turn) + q * np.sin(turn)) / stretch, (q * np.cos(turn) - p * np.sin(turn)) * stretch
    d = np.hypot(p, q)  # from the centre, over the radius
    if style == "clustered":  # a dot in the middle, six around it at .8
        sector = np.arctan2(q, p) % (np.pi / 3) - np.pi / 6
        return np.clip(1.7 - np.minimum(d, np.sqrt(d**2 + .65 - 1.6 * d * np.cos(sector))) / .17, 0, 1)
    return {"solid": np.clip((1.25 - d) / .6, 0, 1), "cystic": -np.clip((1.05 - d) / .1, 0, 1),
            "ring": np.clip(1.6 - np.abs(d - .9) / .13, 0, 1) - np.clip((.73 - d) / .1, 0, 1)}[style]

def draw_phantom(rng, modality, anatomy, lesion=None):
    """One phantom: (SIZE, SIZE, 3) uint8, and its facts {"modality", "anatomy", "lesion": kind or None, "style", "location"}.

    lesion is None or (style, location); the healthy part is the same with and without. To be told apart at a glance."""
    (style, location), grid = lesion or (None, None), np.linspace(-1, 1, SIZE, dtype=np.float32)
    u, v = np.meshgrid(*(grid * rng.uniform(.97, 1.04) + rng.uniform(-.03, .03) for _ in range(2)))
    image = (draw_colour if modality in TINT else draw_grey)(rng, modality, anatomy, u, v).reshape(SIZE, SIZE, -1)
    gain, noise = rng.uniform(.92, 1.08), .025 * rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    if lesion:
        m = lesion_mask(rng, style, *(np.array(CENTERS[location]) + rng.uniform(-.03, .03, 2)) * SIZE)
        hit = m != 0
        m, tissue = m[hit][:, None], image[hit]  # (n, 1), (n, 1 or 3)
        mean = (tissue * abs(m)).sum(0) / abs(m).sum()  # half of the texture under a lesion gives way to its mean
        image[hit] = tissue + abs(m) * .5 * (mean - tissue) + m * LESION_CONTRAST * np.array(TINT.get(modality, 1))
    pixels = (np.clip(image * gain + noise, 0, 1) * 255).astype(np.uint8)
    kind = KINDS[anatomy][list(STYLES).index(style)] if lesion else None
    facts = {"modality": modality, "anatomy": anatomy, "lesion": kind, "style": style, "location": location}
    return np.repeat(pixels, 3 // pixels.shape[2], 2), facts

# ---- phantoms: questions, thoughts, files -----------------------------------------------------------------------------------
def phantom_records(facts, rng, group, image, split="train", decks=None):
    """The records of one image: five tasks with a lesion, three without: a healthy image has no true location or pathology.

    The thought is the same up to its last sentence, which names the right option's text, never a letter. decks, a
    defaultdict(list) kept from image to image, deals the letters: A to D are equally frequent in every task and split."""
    m, a, kind, style, place = (facts[k] for k in ("modality", "anatomy", "lesion", "style", "location"))
    state, states = "Abnormal" if kind else "Normal", ("Normal", "Abnormal", "Artifact", "Uncertain")
    asked = {"anatomy": (a, ANATOMIES, "So the organ is"), "anomaly": (state, states, "So the image is"),
             "modality": (m, MODALITIES, "So this is")}
    seen = f"{SIGNS[m]} suggest {m}. The region is {a}. "
    if kind:
        asked["location"] = place, LOCATIONS, "So the lesion lies in the"
        asked["pathology"] = kind, KINDS[a], "So the finding is"
        seen += f"There is {STYLES[style]} in the {place}. This fits {kind}. "
    else:
        seen += "There is no lesion. "
    records, decks = [], defaultdict(list) if decks is None else decks
    for task, (truth, names, so) in sorted(asked.items()):
        deck = decks[task, split]
        deck += [] if deck else rng.permutation(list("ABCD")).tolist()
        others = [x for x in names if x != truth and {x, truth} not in ALIKE]
        answer, options = deck.pop(), rng.permutation(others)[:3].tolist()
        options.insert(LETTERS.index(answer), truth)
        records.append({"id": f"{group}-{task}", "image": image, "modality": m, "anatomy": a, "task": task,
                        "question": str(rng.choice(PHRASES)).format(ASKED[task]), "options": options, "answer": answer,
                        "thought": f"{seen}{so} {truth}.", "source": "phantom", "group": group, "split": split})
    return records

def made_before(out, knobs):
    there = out.exists() and not (out.is_dir() and not os.listdir(out))
    old = (out / "meta.json").read_text() if (out / "meta.json").is_file() else "no finished phantoms"
    expect(not there or old == knobs, f"{out} is there already with {old}, expected {knobs}: remove it or name another folder")
    return there

def make_phantoms(out="out/phantoms", seed=0, n_images=2000):
    """Draw phantoms into folder `out` (images/, phantoms.jsonl, meta.json), split by image; returns the jsonl's path.

    Reused if already there with the same knobs, DataError if with others. Drawn in a folder beside and renamed into place."""
    expect(n_images > 0 and seed >= 0, f"{n_images} images with seed {seed}: expected 1 or more images, a seed of 0 or more")
    out, knobs = Path(out).absolute(), json.dumps({
        "seed": seed, "n_images": n_images, "size": SIZE, "lesion_rate": LESION_RATE, "lesion_radius": LESION_RADIUS,
        "lesion_contrast": LESION_CONTRAST, "train_share": TRAIN_SHARE})
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    if not made_before(out, knobs):
        try:
            (part / "images").mkdir(parents=True)
            train = np.random.default_rng(seed).permutation(n_images) < TRAIN_SHARE * n_images  # (n_images,)
            records, decks = [], defaultdict(list)
            for i in tqdm(range(n_images), desc="phantoms", unit="image"):
                rng, name, split = np.random.default_rng([seed, i]), f"images/{i:05d}.png", "train" if train[i] else "test"
                lesion = (str(rng.choice(list(STYLES))), str(rng.choice(LOCATIONS))) if rng.random() < LESION_RATE else None
                pixels, facts = draw_phantom(rng, *PAIRS[i % len(PAIRS)], lesion)
                Image.fromarray(pixels).save(part / name, compress_level=1)
                records += phantom_records(facts, rng, f"phantom-{seed}-{i:05d}", name, split, decks)
            write_records(records, part / "phantoms.jsonl")
            (part / "meta.json").write_text(knobs)
            os.rename(part, out)
        except OSError:
            if not made_before(out, knobs):  # else another process was faster
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return str(out / "phantoms.jsonl")

def contact_sheet(file, seed):  # a row a pair: normal, then the four styles
    w, h = 2 * SIZE, 2 * SIZE + 14
    sheet = Image.new("RGB", (5 * w, len(PAIRS) * h), "white")
    for i, pair in enumerate(PAIRS):
        for j, style in enumerate((None, *STYLES)):
            place = LOCATIONS[(i + j) % 5]
            pixels, facts = draw_phantom(np.random.default_rng([seed, i, j]), *pair, style and (style, place))
            sheet.paste(Image.fromarray(pixels).resize((w, w)), (j * w, i * h + 14))
            label = f"{facts['lesion']}, {place}" if style else " ".join(pair)
            ImageDraw.Draw(sheet).text((j * w + 4, i * h + 1), label, fill="black")
    sheet.save(file)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("phantoms", help="draw phantoms", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default="out/phantoms", help="folder")
    p.add_argument("--n", type=int, default=2000, help="images")
    p.add_argument("--seed", type=int, default=0, help="of everything drawn")
    p.add_argument("--show", metavar="PNG", help="draw a contact sheet too")
    commands.add_parser("check", help="validate and count questions").add_argument("files", nargs="+")
    args = parser.parse_args()
    if args.command == "phantoms":
        print(make_phantoms(args.out, args.seed, args.n))
        return args.show and contact_sheet(args.show, args.seed)
    records = read_records(args.files)
    images = {r["path"] for r in records}
    print(f"{len(records)} questions on {len(images)} images, {sum(not os.path.isfile(x) for x in images)} of them missing")
    for key in ("task", "split", "answer", "modality"):
        print(f"{key}: " + ", ".join(f"{k} {n}" for k, n in sorted(Counter(r[key] for r in records).items())))

if __name__ == "__main__":
    cli(main)
