"""The questions: record format, readers, phantoms (images drawn here, with questions and chains of thought), and MedAD-38K,
built from the 17 public sources of the paper's section 3.1.

A record is one JSON line: {"id", "image", "modality", "anatomy", "task", "question", "options": [..], "answer": "B",
"thought": str | null, "source", "group", "split"}. `image` is relative to the file's folder and may not leave it; `group`
(patient, volume, lesion) is never split between train and test. Phantoms and real data take the same path: files on disk, then
read_records. Left out on purpose: dataset classes, augmentation, resizing (model.py's image processor does it), download.

    python data.py phantoms --out out/phantoms --n 2000 --seed 0 --show sheet.png     # draw them, and a sheet to look at
    python data.py build --out medad38k busi=DIR br35h=DIR chestxray14=DIR            # MedAD-38K, of any of its sources
    python data.py check out/phantoms/phantoms.jsonl                                  # validate, count by task, split, letter

In order: records and their readers; phantoms (words, drawing, questions); MedAD-38K (SOURCES: how each lies on disk; from image
and mask to facts; from facts to questions; build).
"""
import argparse
import csv
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import sys
import warnings
import zlib
from collections import Counter, defaultdict
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps
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

class DataError(ValueError):
    """Input that cannot be used; the message is one sentence for the user."""

def expect(ok, sentence):
    if not ok:
        raise DataError(sentence)

class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are DataErrors: one sentence, as for any bad input."""

    def error(self, message):
        raise DataError(message)

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

def read_records(files, split=None, only=(), thinking="before"):
    """Validated records of one file or several, each with "path" added. split keeps one; only, texts like "modality=CT", keeps
    those with one of the values given for each key. thinking (of rewards.INSTRUCTIONS) goes with them into prompt and target.

    DataError names file, line and what was expected. Others' questions (`foreign_record`), not ours to mend, are left out where
    they can't be used, counted and told on stderr. Whether the images exist is load_image's business."""
    records, seen, wanted = [], {}, defaultdict(set)
    for key, _, value in (x.partition("=") for x in only):
        expect(key in KEYS and value, f"--only {key}={value}: expected KEY=VALUE, the key one of {', '.join(KEYS)}")
        wanted[key].add(value.casefold())
    for file in [files] if isinstance(files, (str, os.PathLike)) else files:
        whole, folder, left_out = str(file).endswith(".json"), Path(file).absolute().parent, Counter()
        folder = folder.parents[1] if folder.parent.name == "QA_information" else folder  # OmniMedVQA's paths start at its root
        form, unit = ("a JSON list of questions", "question") if whole else ("one JSON object a line", "line")
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
            items = json.loads(text or "[]") if whole else text.split("\n")
        except (OSError, ValueError, RecursionError) as e:
            raise DataError(f"{file}: {getattr(e, 'strerror', None) or e}, expected UTF-8 text with {form}") from None
        expect(isinstance(items, list) and items and text.strip(), f"{file} holds no records, expected {form}")
        for k, item in enumerate(items, 1):
            if not whole and not item.strip():
                continue
            foreign = whole
            try:
                item = item if whole else json.loads(item)
                if foreign := whole or isinstance(item, dict) and bool(FOREIGN & item.keys()):
                    item = foreign_record(item, Path(file).stem, k)
                record = check_record(item, folder)
                expect(record["id"] not in seen, f"id {record['id']!r} was already used in {seen.get(record['id'])}")
                seen[record["id"]] = f"{file}, {unit} {k}"
                records.append(record)
            except (ValueError, RecursionError) as e:
                why = f"broken JSON, {e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
                expect(foreign, f"{file}, line {k}: {why}")
                left_out[re.sub(r"'.*'|\".*\"|\[.*\]", "..", why)] += 1
        if left_out:
            reasons = "; ".join(f"{n} x {why}" for why, n in left_out.most_common())
            print(f"{file}: {left_out.total()} of {len(items)} questions left out: {reasons}", file=sys.stderr)
    kept = [r | ({} if thinking == "before" else {"thinking": thinking}) for r in records
            if split in (None, r["split"]) and all(str(r[key]).casefold() in values for key, values in wanted.items())]
    which = "".join([f" of split {split!r}"] * bool(split) + [f" with {x}" for x in only])
    expect(kept, f"no usable record{which} in {files}")
    return kept

FOREIGN = {"gt_answer", "problem", "conversations"}  # a key of another's record: OmniMedVQA, Med-R1, VLM-R1

def foreign_record(item, stem, k):
    """Record of question k of file `stem` in one of three forms; DataError with half a sentence if it is none of them.

    OmniMedVQA: "question", "option_A".., "gt_answer" (an option's text; case, punctuation and spaces forgiven), "image_path".
    Med-R1: "image", "problem": "Q? A)x, B)y", "solution": "<answer> B </answer>". VLM-R1: the two said in "conversations"."""
    expect(isinstance(item, dict), "expected an object")
    words, split = re.findall(r"[a-z]+", stem.lower()), "train"
    if "gt_answer" in item:
        def fold(text):
            return re.sub(r"[\W_]+", "", str(text)).casefold()
        options = [item[f"option_{x}"] for x in LETTERS if item.get(f"option_{x}")]
        right = [x for x, o in zip(LETTERS, options, strict=False) if str(o).strip() == str(item["gt_answer"]).strip()]
        right = right or [x for x, o in zip(LETTERS, options, strict=False) if fold(o) == fold(item["gt_answer"]) != ""]
        expect(len(right) == 1, f"gt_answer fits {len(right)} options, expected one")
        image, question, answer, source = item.get("image_path"), item.get("question"), right[0], item.get("dataset", stem)
        name, modality = item.get("question_id"), item.get("modality_type", item.get("modality"))
        task = str(item.get("question_type")).lower()
        split = "test" if zlib.crc32(str(image).encode()) % 100 >= 100 * TRAIN_SHARE else split  # theirs has none
    else:
        talk = item.get("conversations")
        if isinstance(talk, list) and len(talk) > 1 and all(isinstance(x, dict) for x in talk):
            said, reply = (str(x.get("value")) for x in talk[:2])
            reply = reply if "<answer>" in reply else f"<answer>{reply}</answer>"
            item = {"problem": said.replace("<image>", ""), "solution": reply} | item
        expect(all(isinstance(item.get(x), str) for x in ("image", "problem", "solution")),
               "expected an object with the texts image, problem and solution")
        parts = [item["problem"]]
        for n, letter in enumerate(LETTERS, 1):  # a marker is the next letter, after a space or comma: "(H&E)" is no option E
            if len(parts) == n:
                parts += re.split(rf"(?<=[\s,;:?.]){letter}\)", parts.pop(), maxsplit=1)
        image, (question, *options) = item["image"], (p.strip(" ,;\n") for p in parts)
        answer = (re.findall(r"<answer>\s*([A-F])\s*</answer>", item["solution"]) or ["none"])[0]
        task = next((t for t, rule in MED_R1_TASKS.items() if re.search(rule, question.lower())), "disease diagnosis")
        modality = next((m for m in MODALITIES if m.lower().replace("-", "") in words), stem)
        name, source, split = f"{stem}-{k}", "Med-R1", "test" if "test" in words else split
    return {"id": name, "image": image, "modality": modality, "anatomy": "unknown", "task": task, "question": question,
            "options": options, "answer": answer, "thought": None, "source": source, "group": image, "split": split}

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

def write_text(path, text):
    """Write beside, then rename into place: a crash leaves no half file."""
    with open(f"{path}.writing", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(f"{path}.writing", path)

def move_aside(path):
    """Rename what is there to the first free path.1, path.2, .. -> that, so that nothing is overwritten."""
    aside = next(x for k in itertools.count(1) if not os.path.exists(x := f"{path}.{k}"))
    os.rename(path, aside)
    return aside

def digest(content):
    return hashlib.blake2b(content, digest_size=12).hexdigest()

def load_image(record, grey=False):
    """The record's image as PIL RGB (with grey an L stays L), upright by its EXIF tag; 16 bits and floats go from min to max.

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
        if grey and image.mode == "L":
            return image
        return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")
    except Exception as e:  # Pillow's decoders raise anything (SyntaxError, struct.error, IndexError) on a damaged file
        why = {FileNotFoundError: "is missing", Image.UnidentifiedImageError: "is not an image, or has no pixels",
               Image.DecompressionBombError: f"has more than {MAX_PIXELS} pixels"}.get(type(e), f"is truncated or broken ({e})")
        raise DataError(f"record {record['id']!r}: image {record['path']} {why}") from None

# ---- phantoms: knobs and words ----------------------------------------------------------------------------------------------
SIZE = 112                # px, side of the square image
LESION_RATE = 0.67        # share of images with a lesion
LESION_RADIUS = (9, 13)   # px, smallest and largest
LESION_CONTRAST = 0.38    # fraction of the grey range by which a lesion is brighter or darker than what lies under it
SHOWN = 20                # images or volumes on a source's contact sheet
SLICES = 4                # of a volume with the lesion, and as many without
TRAIN_SHARE = 0.7         # of a source's pictures; the rest is the test split
PHANTOM_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # val is what a run may look at while it trains
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
STATES = ("Normal", "Abnormal", "Artifact", "Uncertain")  # the last two are never true
FILLERS = ("foreign body", "surgical implant")  # beside the kinds of a real source with fewer than four
# never offered against each other: both could be right
ALIKE = ({"MRI", "CE-MRI"}, {"Lung", "Chest"}, {"tumor", "glioma"}, {"melanocytic nevus", "common nevus"}, {"nodule", "mass"},
         {"melanocytic nevus", "atypical nevus"}, {"pneumonia", "consolidation"}, {"pneumonia", "infiltration"},
         {"consolidation", "infiltration"})
# what + of a lesion adds to RGB in a coloured image: darker on pale tissue
TINT = {"Dermoscopy": (-.8, -1, -.9), "Microscopy": (-1, -1.2, -.5), "Fundus": (.9, 1.2, .5), "Endoscopy": (1, 1, 1)}
ASKED = {"anatomy": "organ", "anomaly": "state of the image", "location": "place of the lesion", "modality": "kind of image",
         "pathology": "kind of lesion"}
PHRASES = ("What is the {}?", "What is the {} here?", "What is the {} shown?", "Which is the {}?", "Say what the {} is.",
           "Name the {}.", "Name the {} shown here.", "Please name the {}.", "Look and name the {}.", "Can you name the {}?")

# ---- phantoms: drawing ---------------------------------------------------------------------------
# Greys and colours 0..1. u, v (SIZE, SIZE): where pixels lie, -1..1 from the left and from the top,
# so lengths are fractions of the half-side; abs(u) draws on both sides. Painters in colour also get
# smooth spots and a side, -1 or 1. New picture: a function like these, its row in PAINTERS.
def clamp(x):
    return np.clip(x, 0, 1)


def disc(u, v, x, y, a, b, soft=.1):  # 1 inside an ellipse, half-axes a, b
    return clamp((1 - np.hypot((u - x) / a, (v - y) / b)) / soft + .5)


def layers(depth, rows):  # rows of depth, grey
    return np.interp(depth, *np.transpose(rows))


def paint(picture, mask, colour):
    return picture + mask[..., None] * (np.float32(colour) - picture)


def cloud(rng, rows, cols=None):  # smooth noise
    grid = Image.fromarray(rng.standard_normal((rows, cols or rows), dtype=np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def vessels(rng, roots, length=1., bend=.5, kids=2, width=1):
    """Mask of random walks from roots of x, y, angle, and of their branches."""
    image, roots = Image.new("L", (SIZE, SIZE)), np.array(roots)  # (R, 3)
    pen = ImageDraw.Draw(image)
    for far, n in ((length, kids), (.55 * length, 0)):
        drift = rng.normal(0, bend / 3, (len(roots), 1))
        turn = roots[:, 2:] + np.cumsum(rng.normal(drift, bend / 4, (len(roots), 8)), 1)
        steps = np.stack([np.cos(turn), np.sin(turn)], 2)
        path = roots[:, None, :2] + np.cumsum(steps, 1) * far / 8  # (R, 8, 2)
        for line in (path + 1) * SIZE / 2:
            pen.line(line.ravel().tolist(), fill=255, width=width)
        fork = path.swapaxes(0, 1)[2:2 + 2 * n:2]  # (n, R, 2)
        aside = turn[:, 3] + rng.choice((-.8, .8), (n, len(roots)))
        roots = np.c_[fork.reshape(-1, 2), aside.ravel()]
    return np.asarray(image.filter(ImageFilter.GaussianBlur(.6)), dtype=np.float32) / 255


def draw_brain(rng, u, v, *_):
    head = ((0, .54), (.6, .52), (.79, .42),  # white matter, cortex
            (.82, .15), (.86, .12), (.89, .06),  # fluid, skull
            (.91, .8), (.97, .7), (1, 0))  # scalp, air
    ventricles = disc(abs(u), v, .13, -.04, .07, .25)
    falx = disc(u, v, 0, 0, .02, .8)
    d = np.hypot(u / .9, v / .97) + .02 * cloud(rng, 5)
    folds = .16 * clamp(np.sin(8 * cloud(rng, 9))) * clamp(5 * d - 2.5)
    g = layers(d, head) - folds * (d < .82)
    return g - .38 * np.maximum(ventricles, .6 * falx) * (d < .82)


def draw_trunk(rng, u, v, modality, anatomy):
    greys = {"CT": (.22, .45, .97, .68, .1), "CE-MRI": (.85, .3, .12, .98, .34)}
    fat, muscle, bone, aorta, veins = greys[modality]
    wall = (.84, .5), (.86, muscle), (.89, muscle), (.91, fat), (.98, fat), (1, 0)
    spine = disc(u, v, 0, .74, .15, .13)
    d = np.hypot(u / .99, v / .93)
    g = layers(d, wall) + .02 * cloud(rng, 9) * (d < 1)
    if anatomy == "Lung":
        heart = disc(u, v, .08, -.5, .24, .26)
        lungs = disc(abs(u), v, .43, 0, .4, .7, .05) * (1 - heart)
        roots = [(x, .05, t + a) for x, t in ((-.1, np.pi), (.1, 0)) for a in (-1, 0, .9)]
        air = .16 - g + .3 * vessels(rng, roots, .6, kids=3) + .04 * cloud(rng, 14)
        g += (d < .84) * .14 + lungs * air
    else:
        stomach = disc(u, v, .74, .02, .12, .22)
        fissure = disc(u, v, .25, -.62, .02, .2, .4)
        roots = (.1, .3, -2.6), (.1, .3, -1.2), (0, .4, 2.7)
        g += veins * vessels(rng, roots, width=2) * (d < .8)
        g += (aorta - g) * disc(u, v, .05, .5, .07, .07, .2)
        g -= .4 * stomach + .22 * fissure
    ribs = np.cos(11 * np.arctan2(v, u) + rng.uniform(0, 6)) > .3
    return g + (bone - g) * np.maximum(ribs * (abs(d - .875) < .025), spine)


def draw_oct(rng, u, v, *_):
    retina = ((-.02, .03), (0, .75), (.12, .7),  # vitreous, nerve fibres
              (.15, .5), (.33, .5), (.36, .35), (.44, .35),  # inner plexiform, nuclear
              (.47, .55), (.54, .5), (.57, .32), (.8, .32),  # outer plexiform, nuclear
              (.82, .6), (.87, .6), (.9, .4),  # photoreceptors
              (.94, .9), (1, .9), (1.03, .55), (1.6, .38))  # pigment epithelium, choroid
    pit = .22 * np.exp(-((u - rng.uniform(-.2, .2)) / .3)**2)
    top = -.78 + pit + rng.uniform(-.06, .06) * u
    bottom = .22 + .05 * u * rng.uniform(-1, 1)
    t = (v - top) / (bottom - top) + .015 * cloud(rng, 8)
    grain = .07 * cloud(rng, 40, 12) + .08 * (t > 1.03) * cloud(rng, 12)
    return layers(t, retina) + grain * (t > 0)


def draw_ultrasound(rng, u, v, _, anatomy):
    w = v + .12 * cloud(rng, 3, 4)
    if anatomy == "Thyroid":
        d = np.hypot(u / 1.15, v / .78)
        capsule = .95 * (abs(d - .98) < .03)
        muscle = .2 + .3 * (np.sin(38 * w) > .75)
        g = .5 * (d < .96) + capsule + (d > 1) * muscle
    else:
        breast = ((-.86, .75), (-.82, .3), (-.5, .33), (-.3, .5), (.35, .5),  # skin, fat, gland
                  (.5, .35), (.66, .35), (.7, .85), (.74, .25))  # muscle, chest wall
        streaks = .25 * clamp(cloud(rng, 26, 5)) * (w > -.82) * (w < .66)
        g = layers(w, breast) + streaks
    speckle = .5 + .42 * np.hypot(cloud(rng, 75), cloud(rng, 75))
    far, fan = np.hypot(u, v + 2.1), abs(np.arctan2(u, v + 2.1)) < .5
    return g * speckle * fan * (far > 1.15) * (far < 3.03)


def draw_chest(rng, u, v, *_):
    x, hila = abs(u), ((-.15, 0, 2.4), (-.15, 0, 3.6), (.15, 0, .5), (.15, 0, -.6))
    body, heart = disc(u, v, 0, .3, 1.1, 1.6, .3), disc(u, v, .15, .4, .34, .4, .15)
    lungs, ribcage = disc(x, v, .47, -.05, .4, .82, .12), disc(x, v, .5, 0, .46, .95)
    ribs = clamp(3 * np.sin(24 * (v + .5 * (x - .4)**2 - .25 * x)) - 1)
    clavicles = (abs(v + .82 + .2 * x) < .05) * (x > .1)
    diaphragm = clamp(8 * (v - .8 + (x - .45)**2))
    g = .62 * body - lungs * (.34 - .04 * cloud(rng, 9))
    g += .12 * ribs * ribcage
    g += .15 * clavicles + .12 * (x < .09)  # spine
    g += .1 * vessels(rng, hila, .6)
    g += .25 * heart * lungs
    return g + (.75 - g) * diaphragm


def draw_skin(rng, u, v, spots, *_):
    skin, hair = (.87, .67, .58), (.25, .15, .1)
    c = skin + .05 * spots * (.6, 1, 1) + .02 * cloud(rng, 50)[..., None]
    hairs = vessels(rng, rng.uniform((-1, -1, -.4), (.3, 1, 1.2), (7, 3)), 1.3, .15, kids=0)
    lens = disc(u, v, 0, 0, 1.2, 1.2, .06)[..., None]
    return paint(c, .75 * hairs, hair) * lens


def draw_gut(rng, u, v, *_):
    wall, blood, wet = (.86, .45, .38), (.6, .12, .12), (1, 1, .95)
    lumen = rng.integers(4) * np.pi / 2 + rng.uniform(-.1, .1)  # at an edge, away from lesions
    far = np.hypot(u - .88 * np.cos(lumen), v - .88 * np.sin(lumen)) + .06 * cloud(rng, 5)
    folds = .14 * clamp(3 * np.cos(11 * far) - 2) * clamp(1.8 - far)
    light = np.clip(.3 + 1.1 * far, .1, 1) - folds
    c = light[..., None] * wall + .03 * cloud(rng, 12)[..., None]
    veins = vessels(rng, rng.uniform((-1, -1, 0), (1, 1, 6), (4, 3)), .7)
    c = paint(c, .35 * veins, blood)
    c = paint(c, clamp(3 * cloud(rng, 22) - 6.2), wet)
    frame = (np.maximum(abs(u), abs(v)) < .97) & (abs(u) + abs(v) < 1.62)
    return c * frame[..., None]


def draw_fundus(rng, u, v, spots, side, *_):
    retina, dark, blood, pale = (.8, .4, .16), (.4, .12, .05), (.45, .05, .04), (.98, .86, .5)
    macula = disc(u, v, -side * .1, 0, .2, .2, 1)
    optic_disc = disc(u, v, side * .74, 0, .15, .17, .3)
    c = (1.05 - .35 * np.hypot(u, v))[..., None] * retina + .03 * spots
    c = paint(c, .35 * macula, dark)
    turns = np.pi / 2 * (1 + side) + side * np.array((-1.9, -1.1, -.55, .55, 1.1, 1.9))
    arcs = vessels(rng, [(side * .72, 0, turn) for turn in turns], 1.5, kids=3)
    eye = disc(u, v, 0, 0, 1, 1, .03)[..., None]
    return eye * paint(paint(c, .75 * arcs, blood), optic_disc, pale)


def draw_microscopy(rng, u, v, spots, side, _, anatomy):
    if anatomy == "Lymph Node":
        pulp, nucleus = (.88, .72, .85), (.3, .15, .5)
        nuclei = clamp(2.4 * cloud(rng, 38) - .3)
        return paint(pulp + .06 * spots * (.3, 1, .5), .75 * nuclei, nucleus)
    tissue, nucleus = (.93, .68, .79), (.4, .18, .5)
    fibres = np.sin(14 * v + 5 * cloud(rng, 3) + 3 * cloud(rng, 6))[..., None]
    nuclei = clamp(3 * cloud(rng, 38) - 3.3)
    for x, y, r in rng.uniform((-.95, -.95, .08), (.95, .95, .12), (7, 3)):
        gland = clamp(2 - abs(np.hypot(u - x, v - y) / r - .75) / .15)
        nuclei = np.maximum(nuclei, gland)
    return paint(tissue + .06 * fibres * (.4, 1, .7), .8 * nuclei, nucleus)


PAINTERS = {"MRI": draw_brain, "CE-MRI": draw_trunk, "CT": draw_trunk, "OCT": draw_oct,
            "Ultrasound": draw_ultrasound, "Dermoscopy": draw_skin, "Endoscopy": draw_gut,
            "Fundus": draw_fundus, "X-ray": draw_chest, "Microscopy": draw_microscopy}


def lesion_mask(rng, style, location):
    """(SIZE, SIZE) in -1..1: + bright, - dark (TINT turns that round)."""
    x, y = (np.array(CENTERS[location]) + rng.uniform(-.03, .03, 2)) * SIZE
    radius, stretch = rng.uniform(*LESION_RADIUS), rng.uniform(.88, 1.14)
    turn = rng.uniform(0, np.pi)
    cos, sin = np.cos(turn), np.sin(turn)
    pixel = np.arange(SIZE, dtype=np.float32) + .5
    p, q = np.meshgrid((pixel - x) / radius, (pixel - y) / radius)
    p, q = (p * cos + q * sin) / stretch, (q * cos - p * sin) * stretch
    d = np.hypot(p, q)  # from the centre, in radii
    if style == "solid":
        return clamp((1.25 - d) / .6)
    if style == "cystic":
        return -clamp((1.05 - d) / .1)
    if style == "ring":
        return clamp(1.6 - abs(d - .9) / .13) - clamp((.73 - d) / .1)
    sector = np.arctan2(q, p) % (np.pi / 3) - np.pi / 6  # six dots at .8, one in the middle
    dot = np.sqrt(d**2 + .65 - 1.6 * d * np.cos(sector))
    return clamp(1.7 - np.minimum(d, dot) / .17)


def draw_phantom(rng, modality, anatomy, lesion=None):
    """One phantom: (SIZE, SIZE, 3) uint8, and its facts {"modality", "anatomy", "lesion": kind or
    None, "style", "location"}.

    lesion is None or (style, location); the healthy part is the same with and without."""
    style, location = lesion or (None, None)
    kind = KINDS[anatomy][list(STYLES).index(style)] if lesion else None
    facts = dict(modality=modality, anatomy=anatomy, lesion=kind, style=style, location=location)
    grid = np.linspace(-1, 1, SIZE, dtype=np.float32)
    axes = [grid * rng.uniform(.97, 1.04) + rng.uniform(-.03, .03) for _ in range(2)]
    u, v = np.meshgrid(*axes)
    more = [cloud(rng, 5)[..., None], rng.choice((-1, 1))] if modality in TINT else []
    image = PAINTERS[modality](rng, u, v, *more, modality, anatomy).reshape(SIZE, SIZE, -1)
    gain = rng.uniform(.92, 1.08)
    noise = .025 * rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    if lesion:
        m = lesion_mask(rng, style, location)
        hit = m != 0
        m, tissue = m[hit][:, None], image[hit]  # (n, 1), (n, 1 or 3)
        mean = (tissue * abs(m)).sum(0) / abs(m).sum()
        even = tissue + abs(m) * .5 * (mean - tissue)  # less texture
        image[hit] = even + m * LESION_CONTRAST * np.array(TINT.get(modality, 1))
    pixels = (clamp(image * gain + noise) * 255).astype(np.uint8)
    return np.repeat(pixels, 3 // pixels.shape[2], 2), facts


# ---- questions with their options -------------------------------------------------------------------------------------------
def ask(image, task, truth, others, rng, decks):
    """The record of a question; `image` has the keys that its questions share. The true answer stands among three of the others
    at the letter that is next in decks[task, split]: A to D are equally frequent in every task and split."""
    deck = decks[task, image["split"]]
    deck += [] if deck else rng.permutation(list("ABCD")).tolist()
    answer, options = deck.pop(), rng.permutation([x for x in others if x != truth and {x, truth} not in ALIKE])[:3].tolist()
    options.insert(LETTERS.index(answer), truth)
    return {**image, "id": f"{image['id']}-{task}", "task": task, "question": str(rng.choice(PHRASES)).format(ASKED[task]),
            "options": options, "answer": answer}

# ---- phantoms: questions, thoughts, files -----------------------------------------------------------------------------------
def phantom_records(facts, rng, group, image, split="train", decks=None, report=None):
    """The records of one image: a healthy one has no true location or pathology. Every second
    image with a lesion isn't asked for its state, so that Normal and Abnormal are equally often
    the answer.

    The thoughts of an image are the same up to the last sentence, which names the right option's
    text, never a letter. They describe the lesion of `report` (facts; default: the true ones).
    decks, a defaultdict(list) kept from image to image, deals the letters and those turns.
    """
    m, a, kind, style, place = (facts[k] for k in ("modality", "anatomy", "lesion", "style", "location"))
    decks = defaultdict(list) if decks is None else decks
    asked = {"anatomy": (a, ANATOMIES, "So the organ is"), "modality": (m, MODALITIES, "So this is")}
    if kind:
        asked["location"] = place, LOCATIONS, "So the lesion lies in the"
        asked["pathology"] = kind, KINDS[a], "So the finding is"
    seen = f"{SIGNS[m]} suggest {m}. The region is {a}. {lesion_text(report or facts)} "
    turns = decks["turns", split]
    turns += [] if turns else rng.permutation(2).tolist()
    if not kind or turns.pop():
        asked["anomaly"] = "Abnormal" if kind else "Normal", STATES, "So the image is"
    common = {"id": group, "image": image, "modality": m, "anatomy": a, "source": "phantom", "group": group, "split": split}
    return [ask({**common, "thought": f"{seen}{so} {truth}."}, task, truth, names, rng, decks)
            for task, (truth, names, so) in sorted(asked.items())]

def lesion_text(facts):
    if facts["lesion"] is None:
        return "There is no lesion."
    seen = STYLES[facts["style"]]
    return f"There is {seen} in the {facts['location']}. This fits {facts['lesion']}."


def careless_report(facts, rng):
    """What a careless writer reports of an image: a lesion of another style at another place, or
    one where there is none."""
    style = rng.choice([x for x in STYLES if x != facts["style"]])
    location = rng.choice([x for x in LOCATIONS if x != facts["location"]])
    kind = KINDS[facts["anatomy"]][list(STYLES).index(style)]
    return {**facts, "lesion": kind, "style": str(style), "location": str(location)}


def made_before(out, knobs):
    there = out.exists() and not (out.is_dir() and not os.listdir(out))
    old = (out / "meta.json").read_text() if (out / "meta.json").is_file() else "no finished phantoms"
    expect(not there or old == knobs, f"{out} is there already with {old}, expected {knobs}: remove it or name another folder")
    return there

def make_phantoms(out="out/phantoms", seed=0, n_images=2000, thoughts=None, careless=0.0):
    """Draw phantoms into folder `out` (images/, phantoms.jsonl, meta.json) -> the jsonl's path.

    The first `thoughts` train images (None: all) keep their chains of thought, the others have
    "thought": null: a hospital has the answers of all its images from their reports, and few
    chains of thought. A share `careless` of the thoughts misreports the lesion. Neither changes
    the images or the questions. Reused if already there with the same knobs, DataError if with
    others. Drawn in a folder beside and renamed into place.
    """
    expect(n_images > 0 and seed >= 0,
           f"{n_images} images with seed {seed}: expected 1 or more images, a seed of 0 or more")
    expect(thoughts is None or thoughts >= 0, f"{thoughts} images with thoughts: expected 0 or more")
    expect(0 <= careless <= 1, f"a share {careless} of careless thoughts: expected 0 to 1")
    out = Path(out).absolute()
    knobs = json.dumps({
        "seed": seed, "n_images": n_images, "thoughts": thoughts, "careless": careless,
        "size": SIZE, "lesion_rate": LESION_RATE, "lesion_radius": LESION_RADIUS,
        "lesion_contrast": LESION_CONTRAST, "shares": PHANTOM_SHARES})
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    if not made_before(out, knobs):
        try:
            (part / "images").mkdir(parents=True)
            records = draw_phantoms(part, seed, n_images, thoughts, careless)
            write_records(records, part / "phantoms.jsonl")
            (part / "meta.json").write_text(knobs)
            os.rename(part, out)
        except OSError:
            if not made_before(out, knobs):  # else another process was faster
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return str(out / "phantoms.jsonl")


def draw_phantoms(folder, seed, n_images, thoughts, careless):
    """The images of make_phantoms, written to `folder` -> their records."""
    records, decks, in_train = [], defaultdict(list), 0
    shuffled = np.random.default_rng(seed).permutation(n_images)
    for i in tqdm(range(n_images), desc="phantoms", unit="image"):
        split = phantom_split(shuffled[i] / n_images)
        rng = np.random.default_rng([seed, i])
        lesion = None
        if rng.random() < LESION_RATE:
            lesion = str(rng.choice(list(STYLES))), str(rng.choice(LOCATIONS))
        pixels, facts = draw_phantom(rng, *PAIRS[i % len(PAIRS)], lesion)
        name = f"images/{i:05d}.png"
        Image.fromarray(pixels).save(folder / name, compress_level=1)

        report = facts
        other = np.random.default_rng([seed, i, 1])  # not rng: the questions must stay the same
        if other.random() < careless:
            report = careless_report(facts, other)
        group = f"phantom-{seed}-{i:05d}"
        made = phantom_records(facts, rng, group, name, split, decks, report)
        in_train += split == "train"
        if split == "train" and thoughts is not None and in_train > thoughts:
            made = [{**r, "thought": None} for r in made]
        records += made
    return records


def phantom_split(place):
    """The split of the image at `place`, 0 to 1, of a shuffled order."""
    for split, share in PHANTOM_SHARES.items():
        if place < share:
            return split
        place -= share
    return split


def sheet(cells, columns, file):  # (image, label) -> a PNG to look at
    w = 2 * SIZE
    page = Image.new("RGB", (columns * w, -(-len(cells) // columns) * (w + 14)), "white")
    for k, (image, label) in enumerate(cells):
        x, y = k % columns * w, k // columns * (w + 14)
        image.thumbnail((w, w))
        page.paste(image, (x, y + 14))
        ImageDraw.Draw(page).text((x + 4, y + 1), label, fill="black")
    page.save(file)

def phantom_sheet(file, seed):  # a row a pair: normal, then the four styles
    cells = []
    for i, pair in enumerate(PAIRS):
        for j, style in enumerate((None, *STYLES)):
            pixels, facts = draw_phantom(np.random.default_rng([seed, i, j]), *pair, style and (style, LOCATIONS[(i + j) % 5]))
            label = f"{facts['lesion']}, {facts['location']}" if style else " ".join(pair)
            cells.append((Image.fromarray(pixels).resize((2 * SIZE, 2 * SIZE)), label))
    sheet(cells, 5, file)

# ---- MedAD-38K: how the 17 sources lie on disk -------------------------------------------------------------------------------
class Source(NamedTuple):
    """A form of a source. Patterns are searched in the path below its folder; `id` (with `at`) pairs images, masks and rows."""
    key: str
    modality: str
    anatomy: str
    images: str              # pattern; may name `kind`, a key of kinds, and `group`: patient, volume or lesion (else the id)
    kinds: object = None     # the lesion (name,) of all, or {kind: (name,) or () for healthy}; None: `labels` tells
    masks: str = ""          # pattern; several masks of one id are one lesion
    labels: tuple = ()       # what files tell, each (pattern of their paths, reader: file -> {id: names of the lesions})
    groups: tuple = ()       # .. {id: group}
    outlines: tuple = ()     # .. {id: polygons, px}
    canvas: tuple = ()       # width and height the outlines refer to, px (else the image's)
    least: int = 1           # value in a volume's mask from which on it is lesion; below it is the organ
    window: tuple = ()       # HU shown as black and as white (else percentiles 1 and 99)

def by(column, say):
    """A reader of tables, their columns parted by commas or by PH2's double bars: file -> {cell of the column: say(row)}."""
    def read(file):
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        cells = [x.split("||") for x in lines if "||" in x] or [x for x in csv.reader(lines) if any(x)]
        head, *body = [[c.strip() for c in x] for x in cells] or [[]]
        return {row[column]: say(row) for row in (dict(zip(head, x, strict=False)) for x in body)}
    return read

def chest_boxes(file):
    out = defaultdict(list)
    for name, *box in list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines()))[1:]:
        x, y, w, h = map(float, box[1:5])  # after the finding
        out[name].append([(x, y), (x + w, y), (x + w, y + h), (x, y + h)])
    return out

def ddti_outlines(file):  # XML with JSON in <svg>; [] for one that can't be read
    out = defaultdict(list)
    for mark in ElementTree.parse(file).iter("mark"):
        try:
            shapes = [[(p["x"], p["y"]) for p in s["points"]] for s in json.loads(mark.findtext("svg"))]
        except (ValueError, KeyError, TypeError):
            shapes = [[]]
        out[f"{file.stem}_{mark.findtext('image')}"] += shapes
    return out

def via_outlines(file):  # the VGG annotator's JSON
    out, t = {}, np.linspace(0, 2 * np.pi, 32)
    for entry in json.loads(file.read_text()).values():
        regions, shapes = entry["regions"], []
        for s in (r["shape_attributes"] for r in (regions.values() if isinstance(regions, dict) else regions)):
            if s["name"] in ("ellipse", "circle"):
                a, b, turn = s.get("rx", s.get("r")) * np.cos(t), s.get("ry", s.get("r")) * np.sin(t), s.get("theta", 0)
                s = {"all_points_x": s["cx"] + a * np.cos(turn) - b * np.sin(turn),
                     "all_points_y": s["cy"] + a * np.sin(turn) + b * np.cos(turn)}
            shapes.append([*zip(map(float, s["all_points_x"]), map(float, s["all_points_y"]), strict=True)])
        out[Path(entry["filename"]).stem] = shapes
    return out

SKIN = {"MEL": "melanoma", "NV": "melanocytic nevus", "BCC": "basal cell carcinoma", "AKIEC": "actinic keratosis",
        "BKL": "benign keratosis", "DF": "dermatofibroma", "VASC": "vascular lesion"}
NEVI = ("common nevus", "atypical nevus", "melanoma")  # PH2's clinical diagnosis 0, 1, 2
BMAD = dict(masks=r"(?P<at>train|valid|val|test)/.*(label|mask).*/(?P<id>[^/]+)\.\w+$", images=r"(?P<at>train|valid|val|test)"
            r"/(?!.*(label|mask)).*?(?P<kind>good|Ungood)/(img/)?(?P<id>((?P<group>[^/]+)_)?[^/_]+)\.\w+$")
SOURCES = (
    Source("brats2021", "MRI", "Brain", r"BraTS2021_(?P<id>\d+)_flair\.nii", ("glioma",), r"BraTS2021_(?P<id>\d+)_seg\.nii"),
    Source("brats2021", "MRI", "Brain", **BMAD, kinds={"good": (), "ungood": ("glioma",)}),
    Source("liverct", "CT", "Liver", r"(^|/)volume-(?P<id>\d+)\.nii", ("tumor",), r"segmentation-(?P<id>\d+)\.nii", least=2,
           window=(-200, 250)),
    Source("liverct", "CT", "Liver", **BMAD, kinds={"good": (), "ungood": ("tumor",)}),
    Source("resc", "OCT", "Retina", **BMAD, kinds={"good": (), "ungood": ("edema",)}),
    Source("busi", "Ultrasound", "Breast", r"(?P<kind>benign|malignant|normal)/(?P<id>[^/]*\))\.png$",
           {"benign": ("benign tumor",), "malignant": ("malignant tumor",), "normal": ()}, r"/(?P<id>[^/]*\))_mask\w*\.png$"),
    Source("isic2018", "Dermoscopy", "Skin", r"_Input/(?P<id>ISIC_\d+)\.jpg$", masks=r"(?P<id>ISIC_\d+)_segmentation\.png$",
           labels=(r"Task3_\w+_GroundTruth\.csv$", by("image", lambda r: [v for k, v in SKIN.items() if float(r[k]) > .5])),
           groups=(r"LesionGroupings\.csv$", by("image", lambda r: r["lesion_id"]))),
    Source("mosmed", "CT", "Lung", r"(?P<kind>CT-\d)/(?P<id>study_\d+)\.nii", masks=r"(?P<id>study_\d+)_mask\.nii",
           kinds={f"ct-{k}": ("COVID-19 pneumonia",) * (k > 0) for k in range(5)}, window=(-1000, 400)),
    Source("atlas", "CE-MRI", "Liver", r"imagesTr/(?P<id>\w+?)(_0000)?\.nii", ("tumor",), r"labelsTr/(?P<id>\w+)\.", least=2),
    Source("ddti", "Ultrasound", "Thyroid", r"(^|/)(?P<id>(?P<group>\d+)_\d+)\.jpg$", ("nodule",),
           outlines=(r"\.xml$", ddti_outlines)),
    Source("ddti", "Ultrasound", "Thyroid", r"1_or_data/image/(?P<id>\d+)\.png$", ("nodule",), r"1_or_data/mask/(?P<id>\d+)\."),
    Source("kvasirseg", "Endoscopy", "Alimentary", r"images/(?P<id>[^/]+)\.jpg$", ("polyp",), r"masks/(?P<id>[^/]+)\.jpg$"),
    Source("cvcclinicdb", "Endoscopy", "Alimentary", r"Original/(?P<id>(?P<group>\d*?)\d{1,2})\.(tif|png)$", ("polyp",),
           r"Ground Truth/(?P<id>\d+)\.(tif|png)$",  # without the table a hundred frames are a group: neighbours are alike
           groups=(r"metadata\.csv$", by("frame_id", lambda r: r["sequence_id"]))),
    Source("ph2", "Dermoscopy", "Skin", r"_Dermoscopic_Image/(?P<id>IMD\d+)\.bmp$", masks=r"(?P<id>IMD\d+)_lesion\.bmp$",
           labels=(r"PH2_dataset\.txt$", by("Name", lambda r: [NEVI[int(r["Clinical Diagnosis"])]]))),
    Source("idrid", "Fundus", "Retina", r"images/(.*/)?(?P<id>IDRiD_\d\d)\.jpg$", ("diabetic retinopathy",),
           r"(?P<id>IDRiD_\d\d)_(MA|HE|EX|SE)\.\w+$"),
    Source("idrid", "Fundus", "Retina", r"(?P<at>Training|Testing) Set/(?P<id>IDRiD_\d{3})\.jpg$",
           labels=(r"Grading_(?P<at>Training|Testing) Labels\.csv$",
                   by("Image name", lambda r: ["diabetic retinopathy"] * (int(r["Retinopathy grade"]) > 0)))),
    Source("pedidemi", "MRI", "Brain", r"^(?P<id>.+)/(?![^/]*(mask|seg|lesion|label|roi))[^/]*flair[^/]*\.nii",
           ("demyelination",), r"^(?P<id>.+)/[^/]*(mask|seg|lesion|label|roi)[^/]*\.nii"),
    Source("br35h", "MRI", "Brain", r"(^|/)(?P<kind>yes|no)/(?P<id>[^/]+)\.jpe?g$", {"yes": ("tumor",), "no": ()},
           outlines=(r"annotations_\w+\.json$", via_outlines)),
    Source("chestxray14", "X-ray", "Chest", r"images[^/]*/(?P<id>(?P<group>\d{8})_\d{3}\.png)$", canvas=(1024, 1024),
           outlines=(r"BBox_List_2017\w*\.csv$", chest_boxes), labels=(r"Data_Entry_2017\w*\.csv$", by("Image Index",
               lambda r: [x.replace("_", " ").lower() for x in r["Finding Labels"].split("|") if x != "No Finding"]))),
    Source("malignantlymphoma", "Microscopy", "Lymph Node", r"(?P<kind>CLL|FL|MCL)/(?P<id>(?P<group>sj-\d+-\d+)[^/]*)\.tiff?$",
           {"cll": ("chronic lymphocytic leukemia",), "fl": ("follicular lymphoma",), "mcl": ("mantle cell lymphoma",)}),
    Source("bach", "Microscopy", "Breast", r"(?P<kind>Normal|Benign|InSitu|Invasive)/(?P<id>[^/]+)\.tiff?$",
           {"normal": (), "benign": ("benign lesion",), "insitu": ("in situ carcinoma",), "invasive": ("invasive carcinoma",)}))

def find(key, folder):
    """The images and volumes of a source -> jobs for `examine`, by path. Of several files with one id the first is taken."""
    folder, jobs = Path(folder), {}
    expect(folder.is_dir(), f"{key}={folder}: expected a folder")
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    def matches(pattern):  # -> path, id, kind, group
        for f in files if pattern else ():
            if m := re.search(pattern, f, re.I):
                g = {"at": "", "id": "", "kind": "", "group": None} | m.groupdict()
                yield f, g["at"].lower() + g["id"], g["kind"].lower(), g["group"]
    def told(pattern="", read=None):  # what such files tell, {id: ..}
        out = {}
        for f, at, *_ in matches(pattern):
            try:
                out |= {at + k: v for k, v in read(folder / f).items()}
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, ElementTree.ParseError) as e:
                raise DataError(f"{folder / f} isn't as expected: {type(e).__name__} {e}") from None
        return out
    for form, s in enumerate(SOURCES):
        if s.key == key:
            labels, groups, outlines, masks = told(*s.labels), told(*s.groups), told(*s.outlines), defaultdict(list)
            for f, name, *_ in matches(s.masks):
                masks[name].append(str(folder / f))
            for f, name, kind, group in matches(s.images):
                kinds = s.kinds.get(kind) if isinstance(s.kinds, dict) else s.kinds or labels.get(name)
                group = groups.get(name, name if group is None else group)
                job = dict(form=form, file=f, path=str(folder / f), masks=masks[name], outlines=outlines.get(name, []),
                           kinds=kinds, group=f"{key} {group}")
                old = jobs.setdefault((form, name), job)
                same = Path(old["file"]).stem == Path(f).stem and old["kinds"] == kinds
                expect(same, f"{key}={folder}: {old['file']} and {f} can't be told apart, expected one image of {name!r}")
    patterns = " or ".join(s.images for s in SOURCES if s.key == key)
    expect(jobs, f"{key}={folder}: no image of it, expected paths with {patterns}, found {', '.join(files[:3]) or 'no file'}")
    shown = {*np.linspace(0, len(jobs) - 1, SHOWN).astype(int)}
    return [dict(job, n=n, show=n in shown) for n, job in enumerate(jobs.values())]

# ---- MedAD-38K: from image and mask to facts ---------------------------------------------------------------------------------
def location_of(mask):
    """The one of Fig. 4's regions in which a lesion lies; mask (H, W) bool. Center Region is the middle third of both axes, the
    others are the quarters around it. It is the centroid's, if two of three pixels lie there too; else the lesion spreads,
    or there are several, and more than one region would be right: None."""
    def region(y, x):  # fractions -> index into LOCATIONS
        return np.where((abs(x - .5) < 1 / 6) & (abs(y - .5) < 1 / 6), 4, (x >= .5) + 2 * (y >= .5))
    y, x = ((p + .5) / n for p, n in zip(mask.nonzero(), mask.shape, strict=True))
    home = region(y.mean(), x.mean())
    return LOCATIONS[int(home)] if (region(y, x) == home).mean() > 2 / 3 else None

def lesion_of(job, size):
    """The mask (H, W) bool of an image's lesion, None without mask file or outline. In a JPEG it counts from 128 on, elsewhere
    from 1 on: masks are 0 and 1, 0 and 255, red, or grey through a colour map."""
    mask = Image.new("L", size := SOURCES[job["form"]].canvas or size)
    for path in job["masks"]:
        one = load_image({"id": job["file"], "path": path}, grey=True)
        bands = (one if one.size == size else one.resize(size, Image.Resampling.NEAREST)).split()
        levels = [255 * (v >= (128 if path.lower().endswith(("jpg", "jpeg")) else 1)) for v in range(256)]
        mask = ImageChops.lighter(mask, reduce(ImageChops.lighter, bands).point(levels))
    for polygon in job["outlines"]:
        if len(polygon) < 3:  # one that can't be read: the lesion isn't known
            return None
        ImageDraw.Draw(mask).polygon(polygon, fill=255)
    return np.asarray(mask) > 0 if job["masks"] or job["outlines"] else None

def slices(job):
    """NIfTI volume -> (image, mask, suffix) of up to SLICES slices with the lesion and as many without, evenly spaced, shown as
    radiologists do (the patient's right is on the left). Those without: of the middle half, or with the organ if marked."""
    try:
        import nibabel
    except ImportError:
        raise DataError("volumes (.nii, .nii.gz) need nibabel: pip install nibabel") from None
    s = SOURCES[job["form"]]
    try:
        files = (job["path"], *job["masks"][:1])
        volume, *masks = (np.asarray(nibabel.as_closest_canonical(nibabel.load(f)).dataobj) for f in files)
        mask = masks[0] if masks else np.zeros(volume.shape, np.uint8)
        area, organ = (mask >= s.least).mean((0, 1)), (mask > 0).mean((0, 1)) > .02  # (Z,)
        middle = abs(np.arange(len(area)) / len(area) - .5) < .25
        sick, well = (area > .001).nonzero()[0], ((area == 0) & (organ if s.least > 1 else middle)).nonzero()[0]
        well = middle.nonzero()[0] if not masks else well
        for z in sorted(x[i] for x in (sick, well) if len(x) for i in {*np.linspace(0, len(x) - 1, SLICES).astype(int)}):
            a = volume[::-1, ::-1, z].T.astype(np.float32)
            low, high = s.window or np.percentile(a, (1, 99))
            yield (Image.fromarray((np.clip((a - low) / max(high - low, 1e-9), 0, 1) * 255).astype(np.uint8)),
                   (mask[::-1, ::-1, z] >= s.least).T if masks else None, f"-{z:03d}")
    except Exception as e:  # nibabel and damaged files raise anything
        raise DataError(f"{job['file']} can't be read as a volume with its mask ({e})") from None

def fit_as_it_is(path, max_side):
    """Whether a file can be kept: an unbroken PNG or JPEG, grey or RGB, 8 bits, upright, at most max_side px -> bool, size."""
    try:
        with Image.open(path) as f:
            fit = f.format in ("PNG", "JPEG") and f.mode in ("L", "RGB") and "exif" not in f.info and max(f.size) <= max_side
            if fit:
                f.verify() if f.format == "PNG" else f.load()  # check sums tell a broken PNG, faster than decoding it
            return fit, f.size
    except Exception:  # load_image will say what is wrong
        return False, None

def examine(job, folder, max_side):
    """One image or volume -> facts, a dict for each picture. The pictures are written into `folder`, at most max_side px a side
    (a file that is fit as it is, as it is). "kinds": lesions, () if healthy, None if not told or if the mask says otherwise."""
    s, facts, volume = SOURCES[job["form"]], [], ".nii" in job["file"]
    try:
        fit, size = (False, None) if volume else fit_as_it_is(job["path"], max_side)
        whole = None if volume or fit else load_image({"id": job["file"], "path": job["path"]})
        for image, mask, suffix in slices(job) if volume else [(whole, lesion_of(job, size or whole.size), "")]:
            drawn = mask is not None and bool(mask.any())
            kinds = job["kinds"] if not volume or drawn else () if mask is not None or not job["kinds"] else None
            agree = mask is None or kinds is None or drawn == bool(kinds)
            name = f"{job['n']:06d}-{re.sub('[^A-Za-z0-9]+', '-', Path(job['file']).stem)}{suffix}"
            file = f"images/{s.key}/{name}{Path(job['file']).suffix.lower() if fit else '.png'}"
            if not fit:
                image.thumbnail((max_side, max_side))
                image.save(png := io.BytesIO(), "PNG", compress_level=1)
            content = Path(job["path"]).read_bytes() if fit else png.getvalue()
            (folder / file).write_bytes(content)
            dots = np.argwhere(mask)[::max(1, int(mask.sum()) // 99)] / mask.shape if drawn and job["show"] else []
            facts.append({"source": s.key, "image": file, "modality": s.modality, "anatomy": s.anatomy, "group": job["group"],
                          "kinds": kinds if agree else None, "drawn": drawn, "agree": agree, "digest": digest(content),
                          "location": location_of(mask) if drawn and agree else None,
                          "show": job["show"], "dots": np.round(dots, 3).tolist()})
    except DataError as e:
        return [{"source": s.key, "why": str(e)}]
    return facts or [{"source": s.key, "why": f"{job['file']}: no slice of which it is known whether it shows a lesion"}]

# ---- MedAD-38K: from facts to questions --------------------------------------------------------------------------------------
def split_by_group(facts, seed):
    """Sets "group" and "split": groups that share a picture are one, 70 % of a source's pictures are for training."""
    parent, first, members = {}, {}, defaultdict(lambda: defaultdict(list))
    def root(g):
        while parent.setdefault(g, g) != g:
            g = parent[g]
        return g
    for f in facts:
        a, b = sorted((root(f["group"]), root(first.setdefault(f["digest"], f["group"]))))
        parent[b] = a
    for f in facts:
        f["group"] = root(f["group"])
        members[f["group"].split()[0]][f["group"]].append(f)
    for source, groups in members.items():
        rng, n, total = np.random.default_rng([seed, *source.encode()]), 0, sum(map(len, groups.values()))
        for g in rng.permutation(sorted(groups)):
            for f in groups[g]:  # a group that straddles the border goes to the side of its larger part
                f["split"] = "train" if n + len(groups[g]) / 2 <= TRAIN_SHARE * total else "test"
            n += len(groups[g])

def true_answer(f, task):
    """What is true of a picture -> (answer, None), or (None, why the task can't be asked of it)."""
    if task == "location" and len(f["kinds"] or ()) > 1:  # an outline may be of one of them
        return None, "several kinds of lesion"
    if task in ("anatomy", "modality", "location") and f[task]:
        return f[task], None
    if f["kinds"] is not None and not f["kinds"]:
        return ("Normal", None) if task == "anomaly" else (None, "healthy")
    if not f["agree"]:
        return None, "label and mask disagree"
    if task == "location":
        return None, "in several regions" if f["drawn"] else "no mask or outline"
    if f["kinds"] is None:
        return None, "no label"
    if task == "anomaly":
        return "Abnormal", None
    return (f["kinds"][0], None) if len(f["kinds"]) == 1 else (None, "several kinds of lesion")

def deals(pool, rng):
    """{answer: pictures} -> (picture, answer, answers to choose from), so that who knows these alone knows nothing: each set of
    (up to four) answers is dealt once with each of them being the right one. Ends when an answer to set beside is lacking."""
    pool, size = {k: [v[i] for i in rng.permutation(len(v))] for k, v in sorted(pool.items())}, 0
    while True:
        hand = []
        for k in sorted(pool, key=lambda k: -len(pool[k])):
            if pool[k] and len(hand) < 4 and not any({k, h} in ALIKE for h in hand):
                hand.append(k)
        size = size or max(2, len(hand))
        if len(hand) < size:
            return
        yield from ((pool[k].pop(), k, hand) for k in hand)

def medad_records(facts, seed, left_out):
    """The records of pictures that have a split. Counts in left_out[source, reason] what isn't asked."""
    rng, decks, pools = np.random.default_rng(seed), defaultdict(list), defaultdict(lambda: defaultdict(list))
    def record(f, task, truth, others):
        image = {k: f[k] for k in ("image", "modality", "anatomy", "source", "group", "split")}
        return ask({"id": f"{f['source']}-{Path(f['image']).stem}", **image, "thought": None}, task, truth, others, rng, decks)
    for f in facts:
        for task in TASKS:
            truth, why = true_answer(f, task)
            if why:
                left_out[f["source"], f"{task}: {why}"] += 1
            elif task in ("anatomy", "modality"):
                yield record(f, task, truth, ANATOMIES if task == "anatomy" else MODALITIES)
            else:
                pools[task, f["split"], *(() if task == "location" else (f["modality"], f["anatomy"]))][truth].append(f)
    for (task, *_), pool in sorted(pools.items()):
        fill = {"anomaly": STATES, "pathology": FILLERS, "location": LOCATIONS}[task]
        rest = Counter(f["source"] for v in pool.values() for f in v)
        for f, truth, hand in deals(pool, rng):
            rest[f["source"]] -= 1
            yield record(f, task, truth, [*hand, *(x for x in fill if x not in hand)][:4])
        for source, n in rest.items():
            left_out[source, f"{task}: no picture with another answer to balance it"] += n

def build(sources, out="medad38k", max_side=512, seed=0, workers=None):
    """{key: folder} -> `out`: medad38k.jsonl, images/, dataset.md, a contact sheet a source. A killed run is taken up again."""
    out = Path(out).absolute()
    part = out.with_name(f"{out.name}.part")
    expect(not out.exists(), f"{out} is there already: remove it, or name another --out")
    fine = max_side > 0 and seed >= 0 and (workers is None or workers > 0)
    expect(fine, f"max_side {max_side}, seed {seed}, workers {workers}: expected 1 or more px, a seed of 0 or more, 1 or more")
    known = {s.key for s in SOURCES}
    for key in sources:
        expect(key in known, f"{key}: no such source, expected some of {', '.join(sorted(known))}")
    jobs = [job for key, folder in sorted(sources.items()) for job in find(key, folder)]
    knobs = json.dumps([max_side, seed, digest(repr(jobs).encode())]) + "\n"
    for key in sources:
        (part / "images" / key).mkdir(parents=True, exist_ok=True)
    log = part / "facts.jsonl"
    lines = [x for x in log.read_text().splitlines(True) if x.endswith("\n")] if log.exists() else []  # without a torn last one
    expect(not lines or lines[0] == knobs, f"{part} is the start of another build, of other files or knobs: remove it")
    log.write_text("".join(lines or [knobs]))
    with open(log, "a", buffering=1) as f, multiprocessing.Pool(workers) as pool:
        todo = pool.imap(partial(examine, folder=part, max_side=max_side), jobs[max(0, len(lines) - 1):], chunksize=4)
        for facts in tqdm(todo, desc="build", unit="file", initial=max(0, len(lines) - 1), total=len(jobs)):
            f.write(json.dumps(facts) + "\n")
    with open(log) as f:
        facts = [x for line in itertools.islice(f, 1, None) for x in json.loads(line)]
    left_out, counts = Counter((f["source"], f["why"]) for f in facts if "why" in f), Counter()
    facts = [f for f in facts if "why" not in f]
    split_by_group(facts, seed)
    def counted():
        for r in medad_records(facts, seed, left_out):
            counts.update((k, r[k]) for k in ("source", "modality", "anatomy", "task", "answer", "split"))
            yield r
    write_records(counted(), part / "medad38k.jsonl")
    (part / "dataset.md").write_text(about(facts, counts, left_out, f"--max_side {max_side} --seed {seed}"))
    for key in sources:
        if cells := [with_lesion(part, f) for f in facts if f["source"] == key and f["show"]]:
            sheet(cells, 5, part / f"{key}.png")
    log.unlink()
    os.rename(part, out)
    return str(out / "medad38k.jsonl")

def with_lesion(folder, f):  # a picture of a source's contact sheet: the five regions, some of the lesion's pixels, what it is
    image = Image.open(folder / f["image"]).convert("RGB")
    image.thumbnail((2 * SIZE, 2 * SIZE))
    draw, (w, h) = ImageDraw.Draw(image), image.size
    for box in ((w / 2, -1, w, h / 2), (-1, h / 2, w / 2, h), (w / 3, h / 3, 2 * w / 3, 2 * h / 3)):
        draw.rectangle(box, outline="gray")
    for y, x in f["dots"]:
        draw.ellipse((x * w - 1, y * h - 1, x * w + 1, y * h + 1), fill="cyan")
    said = "not told" if f["kinds"] is None else ", ".join(f["kinds"]) or "healthy"
    return image, f"{said}, {f['location']}" if f["location"] else said

def about(facts, counts, left_out, knobs):
    """dataset.md: what was built, what was left out and why."""
    pictures, groups = Counter((f["source"], f["split"]) for f in facts), {(f["source"], f["group"]) for f in facts}
    text = f"# MedAD-38K, built from public sources\n\n`python data.py build {knobs}`: {len(facts)} pictures.\n\n" \
           "| source | pictures | groups | train | test | questions |\n|---|---|---|---|---|---|\n"
    for s in sorted({f["source"] for f in facts}):
        n, m = pictures[s, "train"], pictures[s, "test"]
        text += f"| {s} | {n + m} | {sum(g[0] == s for g in groups)} | {n} | {m} | {counts['source', s]} |\n"
    for key in ("modality", "anatomy", "task", "answer", "split"):
        text += f"\nQuestions by {key}: " + ", ".join(f"{x} {n}" for (k, x), n in sorted(counts.items()) if k == key) + ".\n"
    return text + "\nLeft out:\n\n" + "".join(f"- {s}, {why}: {n}\n" for (s, why), n in sorted(left_out.items()) if n)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p = commands.add_parser("phantoms", help="draw phantoms", **shown)
    p.add_argument("--out", default="out/phantoms", help="folder")
    p.add_argument("--n", type=int, default=2000, help="images")
    p.add_argument("--seed", type=int, default=0, help="of everything drawn")
    p.add_argument("--thoughts", type=int,
                   help="train images that keep their chains of thought (default: all)")
    p.add_argument("--careless", type=float, default=0.0,
                   help="share of the images whose thoughts misreport the lesion")
    p.add_argument("--show", metavar="PNG", help="draw a contact sheet too")
    p = commands.add_parser("build", help="make MedAD-38K of public sources", **shown)
    p.add_argument("sources", nargs="+", metavar="KEY=DIR", help=", ".join(sorted({s.key for s in SOURCES})))
    p.add_argument("--out", default="medad38k", help="folder")
    p.add_argument("--max_side", type=int, default=512, help="px above which a picture is shrunk")
    p.add_argument("--seed", type=int, default=0, help="of split, options and wording")
    p.add_argument("--workers", type=int, help="processes (default: a core each)")
    commands.add_parser("check", help="validate and count questions").add_argument("files", nargs="+")
    args = parser.parse_args()
    if args.command == "phantoms":
        print(make_phantoms(args.out, args.seed, args.n, args.thoughts, args.careless))
        return args.show and phantom_sheet(args.show, args.seed)
    if args.command == "build":
        named = {}
        for key, _, folder in (x.partition("=") for x in args.sources):
            name = re.sub(r"[^a-z0-9]", "", key.lower())
            expect(folder and name not in named, f"{key}={folder}: expected KEY=DIR, each key once")
            named[name] = folder
        return print(build(named, args.out, args.max_side, args.seed, args.workers))
    records = read_records(args.files)
    images = {r["path"] for r in records}
    print(f"{len(records)} questions on {len(images)} images, {sum(not os.path.isfile(x) for x in images)} of them missing")
    for key in ("task", "split", "answer", "modality"):
        print(f"{key}: " + ", ".join(f"{k} {n}" for k, n in sorted(Counter(r[key] for r in records).items())))

if __name__ == "__main__":
    cli(main)
