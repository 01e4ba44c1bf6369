"""The questions: record format, readers, phantoms (images drawn here, with questions and chains of
thought), and MedAD-38K, built from the 17 public sources of the paper's section 3.1.

A record is one JSON line: {"id", "image", "modality", "anatomy", "task", "question", "options":
[..], "answer": "B", "thought": str | null, "source", "group", "split"}. `image` is relative to the
file's folder and may not leave it; `group` (patient, volume, lesion) is never split between train
and test. A phantom's record also has "shows", what was drawn, which eval.py holds thoughts against.

    python data.py phantoms --out out/phantoms --n 2000 --seed 0
    python data.py build --out medad38k busi=DIR br35h=DIR chestxray14=DIR
    python data.py check out/phantoms/phantoms.jsonl

Left out on purpose: dataset classes, augmentation, download, resizing for the network (model.py's
processor does it).
"""
import argparse
import base64
import csv
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import warnings
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

LETTERS = "ABCDEF"
TASKS = ("anatomy", "anomaly", "location", "modality", "pathology")  # section 3.1's five
MED_R1_TASKS = (  # of OmniMedVQA too
    "anatomy identification", "disease diagnosis", "lesion grading", "modality recognition",
    "other biological attributes", "unknown")
KEYS = ("id", "image", "modality", "anatomy", "task", "question", "options", "answer", "thought",
        "source", "group", "split")
SHOWS = ("modality", "anatomy", "lesion", "style", "location")  # optional, in a key "shows"
SPLITS = ("train", "val", "test")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # of a completion: no thought may hold one
MOST_PIXELS = 2**26  # of an image; more is refused undecoded (above model.MAX_PIXELS: shrunk)
MAX_ASPECT = 200    # longer side / shorter side: beyond it Qwen's processor refuses an image
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow refuses twice as many, and warns from here on
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class DataError(ValueError):
    """Input that cannot be used; the message is one sentence for the user."""


def expect(ok, sentence):
    if not ok:
        raise DataError(sentence)


class Parser(argparse.ArgumentParser):  # a mistake on the command line is bad input like any
    def error(self, message):
        raise DataError(message)


def cli(main):
    """Run main(); bad input, a full or read-only disk and Ctrl-C end it with one sentence on stderr
    and exit code 2."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see the first lines of the programs
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may not know every letter
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (DataError, OSError, KeyboardInterrupt) as e:
        sentence = str(e) or "stopped by Ctrl-C"
        if isinstance(e, OSError) and e.strerror:
            sentence = f"{e.filename or 'system'}: {e.strerror}"  # see `naming`
        tqdm.write(f"error: {sentence}", file=sys.stderr)  # below a bar that is being drawn
        sys.exit(2)


# ---- records -------------------------------------------------------------------------------------
def is_text(x):
    return isinstance(x, str) and x.strip() != ""


def right_option(record):
    """The text of the right option."""
    return record["options"][LETTERS.index(record["answer"])]


def fold(text):
    """Case, runs of whitespace and trailing punctuation forgiven; nothing else."""
    return " ".join(text.casefold().split()).rstrip(" .,;:!?")


def check_options(options):
    are_texts = isinstance(options, list) and all(map(is_text, options))
    names = {x.strip().casefold() for x in options} if are_texts else ()
    expect(2 <= len(names) == len(options) <= len(LETTERS),
           f"'options' is {options!r:.200}, expected a list of 2 to {len(LETTERS)} non-empty"
           " strings, no two the same")
    letters = [x.casefold() for x in LETTERS[:len(options)]]
    for letter, option in zip(letters, options, strict=True):
        # Else which of two would the answer "B" mean?
        expect(fold(option) == letter or fold(option) not in letters,
               f"option {letter.upper()} is {option!r}, the letter of another option: expected"
               " more, as 'grade A'")


def check_record(record, folder):
    """The record with "path" added; ValueError, half a sentence, if anything is wrong."""
    expect(isinstance(record, dict), f"expected a JSON object, got {record!r:.60}")
    for key in KEYS:
        expect(key in record, f"key {key!r} is missing, expected {', '.join(KEYS)}")
        no_thought = key == "thought" and record[key] is None
        expect(no_thought or key == "options" or is_text(record[key]),
               f"{key!r} is {record[key]!r:.60}, expected a non-empty string")
    found = [tag for tag in TAGS if tag in (record["thought"] or "")]
    expect(not found or record["split"] != "train",  # val's and test's thoughts are not learned
           f"'thought' holds {', '.join(found)}, expected none of the tags")
    task = record["task"]
    expect(task in TASKS or task.strip().casefold() not in TASKS,
           f"'task' is {task!r}, expected {task.strip().casefold()!r}")
    check_options(record["options"])
    letters = tuple(LETTERS[:len(record["options"])])
    for key, allowed in (("answer", letters), ("split", SPLITS)):
        expect(record[key] in allowed,
               f"{key!r} is {record[key]!r:.60}, expected one of {', '.join(allowed)}")
    shows = record.get("shows") or dict.fromkeys(SHOWS)
    fine = isinstance(shows, dict) and {*shows} == {*SHOWS} and shows["style"] in (None, *STYLES)
    expect(fine and all(x is None or is_text(x) for x in shows.values()),
           f"'shows' is {shows!r:.200}, expected texts or null for {', '.join(SHOWS)}, the style"
           f" one of {', '.join(STYLES)}")
    json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair raises ValueError

    image, root = record["image"], os.path.realpath(folder)
    path = os.path.realpath(os.path.join(root, image))  # follows links and ".."
    elsewhere = re.search(r"^[/~]|^\w:|\\", image)  # read otherwise by other systems or programs
    expect(Path(path).is_relative_to(root) and not elsewhere,
           f"image {image!r} leaves the data folder, by its name or through a link: expected a path"
           " relative to the file, with / between folders")
    return {**record, "path": path}


def read_records(files, split=None, only=(), thinking="before"):
    """Validated records of one file or several, each with "path" added; DataError names file, line
    and what was expected. Images are not looked at.

    split: the one to keep. only: texts like "modality=CT"; kept are records that for each key given
    have one of its values. thinking (see rewards.INSTRUCTIONS) decides on prompt and target."""
    wanted = defaultdict(set)
    for text in only:
        key, _, value = text.partition("=")
        expect(key in KEYS and value,
               f"--only {text}: expected KEY=VALUE, the key one of {', '.join(KEYS)}")
        wanted[key].add(value.casefold())

    kept, used = [], {}
    for file in [files] if isinstance(files, (str, os.PathLike)) else files:
        for r in read_file(Path(file), used):
            fits = all(str(r[key]).casefold() in values for key, values in wanted.items())
            if fits and split in (None, r["split"]):
                kept.append(r if thinking == "before" else {**r, "thinking": thinking})
    which = f" of split {split!r}" if split else ""
    which += "".join(f" with {text}" for text in only)
    expect(kept, f"no usable record{which} in {files}")
    return kept


def read_file(file, used):
    """Yields the records of a file: JSONL, or a JSON list of others' questions (.json), of which
    those that can't be used are left out and counted on stderr. used, {id: its line}, is added
    to."""
    foreign, folder = file.suffix == ".json", file.absolute().parent
    if foreign:  # image paths start beside QA_information (OmniMedVQA's) or Splits (Med-R1's)
        roots = [p.parent for p in folder.parents if p.name in ("QA_information", "Splits")]
        folder = roots[0] if roots else folder
    try:
        text = file.read_text(encoding="utf-8-sig")
        items = json.loads(text) if foreign else text.split("\n")
        expect(isinstance(items, list) and items and text.strip(), "holds no records")
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{file}: {getattr(e, 'strerror', e)}, expected UTF-8 text with one JSON"
                        " object per line, or in a .json file a list of questions") from None

    bad, what = [], "question" if foreign else "line"
    for k, item in enumerate(items, 1):
        if not foreign and item.strip() == "":
            continue
        try:
            item = foreign_record(item, file.stem, k) if foreign else json.loads(item)
            record = check_record(item, folder)
            name = record["id"]
            expect(name not in used, f"id {name!r} was already used in {used.get(name)}")
        except (ValueError, RecursionError) as e:
            why = str(e)
            if isinstance(e, json.JSONDecodeError):
                why = f"broken JSON, {e.msg} at column {e.colno}"
            bad.append(f"{what} {k}: {why}")
        else:
            used[name] = f"{file}, {what} {k}"
            yield record
    if bad and not foreign:
        more = f"; {len(bad)} lines can't be used" if len(bad) > 1 else ""
        raise DataError(f"{file}, {bad[0]}{more}")
    if bad:
        print(f"warning: {file}: {len(bad)} of {len(items)} questions can't be used, as {bad[0]}",
              file=sys.stderr)


def foreign_record(item, stem, k):
    """The record of question k of OmniMedVQA's or Med-R1's file `stem`."""
    expect(isinstance(item, dict), "expected an object")
    expect(not {*KEYS} <= {*item}, "is a record as this project writes them, expected in a file "
                                   "that ends in .jsonl, one on each line")
    record = omnimedvqa(item, stem) if "gt_answer" in item else med_r1(item, stem, k)
    return {**record, "anatomy": "unknown", "thought": None, "group": record["image"]}


def omnimedvqa(item, stem):
    """Of "question", "option_A".., "gt_answer" (an option's text), "image_path"."""
    def plain(text):
        return re.sub(r"[\W_]+", "", str(text)).casefold()

    options = [item[f"option_{x}"] for x in LETTERS if item.get(f"option_{x}")]
    truth, image = item["gt_answer"], item.get("image_path")
    right = [str(x).strip() == str(truth).strip() for x in options]
    if not any(right):  # then letters and digits alone count
        right = [plain(x) == plain(truth) != "" for x in options]
    expect(sum(right) == 1, f"gt_answer fits {sum(right)} options, expected one")
    in_train = zlib.crc32(str(image).encode()) % 100 < 100 * TRAIN_SHARE  # theirs has no split
    return {"id": item.get("question_id"), "image": image, "question": item.get("question"),
            "options": options, "answer": LETTERS[right.index(True)],
            "source": item.get("dataset", stem),
            "task": str(item.get("question_type") or "unknown").lower(),
            "modality": item.get("modality_type", item.get("modality")),
            "split": "train" if in_train else "test"}


def med_r1(item, stem, k):
    """Of "image", "problem": "Q? A)x, B)y", "solution": "<answer> B </answer>". The file's name
    tells question type or modality, the image's path may tell the modality."""
    expect(all(isinstance(item.get(x), str) for x in ("image", "problem", "solution")),
           "expected an object with the texts image, problem and solution")
    parts = [item["problem"]]  # the question, then the options
    for letter in LETTERS:  # a marker stands after a space or comma: "(H&E)" is no option E
        found = re.split(rf"(?<=[\s,;:?.]){letter}\)", parts[-1], maxsplit=1)
        if len(found) == 1:
            break
        parts[-1:] = found
    question, *options = [x.strip(" ,;\n") for x in parts]
    answer = re.search(r"<answer>\s*([A-F])\s*</answer>", item["solution"])

    name = re.sub("[_ ](train|test)$", "", stem, flags=re.I).replace("_", " ")
    task = name.lower() if name.lower() in MED_R1_TASKS else "unknown"
    other = name if task == "unknown" else "unknown"  # the name, as "Infrared Reflectance Imaging"
    return {"id": f"{stem}-{k}", "image": item["image"], "question": question, "options": options,
            "answer": answer[1] if answer else "none", "source": "Med-R1", "task": task,
            "modality": named_modality(name) or named_modality(item["image"]) or other,
            "split": "test" if "test" in re.findall("[a-z]+", stem.lower()) else "train"}


def named_modality(text):
    """The one of MODALITIES that a file's name or path names, else None."""
    words = re.findall("[a-z]+", re.sub("x[-_ ]ray", "xray", text.lower()))
    spelt = {"mr": "MRI", "xray": "X-ray", **{x.lower(): x for x in MODALITIES}}
    named = {spelt[x] for x in words if x in spelt}
    return named.pop() if len(named) == 1 else None


# ---- files: written whole, by one run at a time --------------------------------------------------
@contextmanager
def naming(path):
    """If an OSError from inside has no file name (disk full, say), it gets `path`."""
    try:
        yield
    except OSError as e:
        e.filename = e.filename or str(path)
        raise


def onto_disk(file):
    """Wait until the disk holds what the system still has in memory of a file: else a machine that
    loses power soon after a rename may come back with an empty file under the new name."""
    with open(file, "r+b") as f:
        try:
            os.fsync(f.fileno())
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems can't
                raise


@contextmanager
def written_beside(path):
    """Yields a path to make a file or a folder at, which is then renamed to `path`: nothing half
    made is ever seen there, and an error leaves nothing."""
    beside = Path(f"{path}.writing")
    try:
        with naming(path):
            yield beside
            if beside.is_file():
                onto_disk(beside)
            os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # leaves a file
        beside.unlink(missing_ok=True)


def write_text(path, text):
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_records(records, file):
    """Write JSONL, without "path"."""
    lines = []
    for r in records:
        r = {k: v for k, v in r.items() if k != "path"}
        lines.append(json.dumps(r, ensure_ascii=False) + "\n")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(lines))


def move_aside(path):
    """Rename what is there to the first free path.1, path.2, .. -> that name."""
    k = 1
    while os.path.exists(f"{path}.{k}"):
        k += 1
    return Path(path).rename(f"{path}.{k}")


@contextmanager
def locked(path):
    """One run at a time gets past here with a path, DataError in the others. The file beside it,
    .NAME.lock, is unlocked by the system however a process ends (lockf: flock would live on in the
    worker processes of a killed one)."""
    path = Path(path).absolute()
    file = path.with_name(f".{path.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as lock:
        try:
            import fcntl
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = os.fstat(lock.fileno()).st_nlink > 0  # 0: another run has just removed it
        except (ImportError, OSError) as e:  # Windows and some file systems know no such locks
            alone = not isinstance(e, (BlockingIOError, PermissionError))
        expect(alone, f"{path}: another run is at work there")
        try:
            yield
        finally:
            with suppress(OSError):
                file.unlink()


@contextmanager
def new_folder(out):
    """Yields a folder to fill, which then becomes `out`; DataError if that holds anything yet."""
    with locked(out), written_beside(out) as beside:
        expect(not out.exists() or not os.listdir(out),
               f"{out} is there already: remove it or name another folder")
        shutil.rmtree(beside, ignore_errors=True)  # a killed run's
        beside.mkdir()
        yield beside


def digest(content):
    return hashlib.blake2b(content, digest_size=12).hexdigest()


# ---- images --------------------------------------------------------------------------------------
def check_images(records, rank=0, world=1):
    """DataError for the first record whose image can't be used; of several processes each looks at
    its share. Each is decoded: one that is cut off would end a run hours later, and every attempt
    to resume it."""
    images = list({r["path"]: r for r in records}.values())[rank::world]
    threads = max(1, 8 // world)  # more could need too much memory for large images
    with ThreadPool(threads) as pool:
        whole = pool.imap(lambda record: load_image(record).size, images)
        for _ in tqdm(whole, desc="checking images", total=len(images), unit="image", leave=False,
                      disable=rank > 0):
            pass


def load_image(record):
    """The record's image as PIL RGB; DataError names record and file, see open_image."""
    try:
        return open_image(record["path"]).convert("RGB")
    except DataError as e:
        raise DataError(f"record {record['id']!r}: image {record['path']} {e}") from None


def open_image(path, window=None):
    """An image, of several the first, as PIL RGB or L, upright by its EXIF tag; transparency is
    ignored, greys of 16 bits and floats go through eight_bits(.., window), and nothing else of the
    file is kept: a comment may name a patient. DataError, half a sentence, when it is missing,
    truncated, not an image, has 0 or more than MOST_PIXELS pixels or a side more than MAX_ASPECT
    times the other."""
    try:
        # Opened by us: a TIFF that Pillow opens by name it maps into memory, and turns wrong.
        with open(path, "rb") as raw, Image.open(raw) as file:
            expect(max(file.size) <= MAX_ASPECT * min(file.size),
                   f"has a side more than {MAX_ASPECT} times as long as the other")
            white_is_0 = getattr(file, "tag_v2", {}).get(262) == 0  # of a TIFF, as of many X-rays
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(eight_bits(np.asarray(image), window))
            if white_is_0:  # Pillow heeds it up to 8 bits
                image = ImageOps.invert(image)
        if "transparency" in image.info:  # of a palette: Pillow warns of going to RGB at once
            image = image.convert("RGBA")
        image = image if image.mode == "L" else image.convert("RGB")
        image.info.clear()
        return image
    except Exception as e:  # on a damaged file Pillow's decoders raise anything
        known = {DataError: str(e), FileNotFoundError: "is missing",
                 Image.UnidentifiedImageError: "is not an image, or has no pixels",
                 Image.DecompressionBombError: f"has more than {MOST_PIXELS} pixels"}
        raise DataError(known.get(type(e), f"is truncated or broken ({e})")) from None


def eight_bits(greys, window=None):
    """Greys of any depth (H, W) -> uint8. window: the values that become black and white, else the
    1st and 99th percentile, so that a marker or a dead pixel does not darken all others; where
    these are alike, the extremes."""
    greys = np.nan_to_num(greys)
    low, high = map(float, window or np.percentile(greys, (1, 99)))
    if low == high:
        low, high = float(greys.min()), float(greys.max())
    out = np.empty(greys.shape, np.uint8)
    for k in range(0, len(greys), 64):  # rows: floats of all at once would need several GB
        out[k:k + 64] = np.clip((greys[k:k + 64] - low) * 255 / (high - low or 1), 0, 255)
    return out


def data_url(record, side=math.inf, max_pixels=math.inf, kind="PNG"):
    """The record's image as a PNG or JPEG in a data: URL, its longer side at most `side` px."""
    image, file = load_image(record), io.BytesIO()
    scale = min(1, math.sqrt(max_pixels / math.prod(image.size)))
    image.thumbnail([max(1, min(side, scale * length)) for length in image.size])
    image.save(file, kind, quality=85)  # of JPEG; PNG ignores it
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


# ---- phantoms: knobs and words -------------------------------------------------------------------
SIZE = 112                # px, side of the square image
LESION_RATE = 0.67        # share of images with a lesion: 2/3, see phantom_records
LESION_RADIUS = (9, 13)   # px, smallest and largest
LESION_CONTRAST = 0.38    # of the grey range: how much brighter or darker a lesion is
PHANTOM_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}  # val: looked at during training
SIGNS = {  # what tells a modality, for the thoughts
    "MRI": "Soft tissue and dark bone", "CT": "Grey tissue and white bone",
    "OCT": "Thin bright layers", "Ultrasound": "Speckle and a fan",
    "Dermoscopy": "Hair and a pink surface", "CE-MRI": "Bright vessels and soft tissue",
    "Endoscopy": "Shiny pink folds", "Fundus": "Red vessels and a bright disc",
    "X-ray": "White ribs and dark air", "Microscopy": "Pink fibres and purple nuclei"}
STYLES = {  # what a lesion looks like
    "solid": "a smooth blob", "cystic": "an empty disc", "ring": "a thick rim",
    "clustered": "a group of dots"}
KINDS = {  # what a lesion of each style is called in each region
    "Brain": ("glioma", "cyst", "abscess", "plaques"),
    "Liver": ("tumor", "cyst", "abscess", "metastases"),
    "Retina": ("exudate", "edema", "hole", "drusen"),
    "Breast": ("tumor", "cyst", "abscess", "calcifications"),
    "Skin": ("melanoma", "cyst", "ringworm", "warts"),
    "Lung": ("nodule", "bulla", "cavity", "infiltrates"),
    "Thyroid": ("nodule", "cyst", "adenoma", "calcifications"),
    "Chest": ("nodule", "bulla", "cavity", "infiltrates"),
    "Alimentary": ("polyp", "ulcer", "diverticulum", "erosions"),
    "Lymph Node": ("lymphoma", "necrosis", "granuloma", "metastases")}
CENTERS = {  # x, y as fractions of the side; left is the image's left
    "Left Upper": (.28, .28), "Right Upper": (.72, .28), "Left Lower": (.28, .72),
    "Right Lower": (.72, .72), "Center Region": (.5, .5)}
MODALITIES, ANATOMIES, LOCATIONS = tuple(SIGNS), tuple(KINDS), tuple(CENTERS)  # section 3.1, Fig. 4
PAIRS = (  # as in the paper's sources
    ("MRI", "Brain"), ("CE-MRI", "Liver"), ("CT", "Liver"), ("CT", "Lung"), ("OCT", "Retina"),
    ("Ultrasound", "Breast"), ("Ultrasound", "Thyroid"), ("Dermoscopy", "Skin"),
    ("Endoscopy", "Alimentary"), ("Fundus", "Retina"), ("X-ray", "Chest"),
    ("Microscopy", "Lymph Node"), ("Microscopy", "Breast"))
STATES = ("Normal", "Abnormal", "Artifact", "Uncertain")  # the last two are never true
ALIKE = (  # never offered against each other: both could be right
    {"MRI", "CE-MRI"}, {"Lung", "Chest"}, {"tumor", "glioma"}, {"nodule", "mass"},
    {"melanocytic nevus", "common nevus"}, {"melanocytic nevus", "atypical nevus"},
    {"pneumonia", "consolidation"}, {"pneumonia", "infiltration"},
    {"consolidation", "infiltration"})
TINT = {  # what a bright lesion adds to R, G, B of a coloured image: on pale tissue it is darker
    "Dermoscopy": (-.8, -1, -.9), "Microscopy": (-1, -1.2, -.5),
    "Fundus": (.9, 1.2, .5), "Endoscopy": (1, 1, 1)}
ASKED = {
    "anatomy": "organ", "anomaly": "state of the image", "location": "place of the lesion",
    "modality": "kind of image", "pathology": "kind of lesion"}
PHRASES = (
    "What is the {}?", "What is the {} here?", "What is the {} shown?", "Which is the {}?",
    "Say what the {} is.", "Name the {}.", "Name the {} shown here.", "Please name the {}.",
    "Look and name the {}.", "Can you name the {}?")


# ---- phantoms: drawing ---------------------------------------------------------------------------
# To read on without it: phantom_records.
# Pictures are (SIZE, SIZE, 1) in grey, (SIZE, SIZE, 3) in colour, 0..1; masks (SIZE, SIZE, 1), but
# a lesion's (SIZE, SIZE).
# u, v: where pixels lie, -1..1 from the left and from the top; abs(u) draws on both sides.
# Painters in colour also get smooth spots and a side, -1 or 1.
def clamp(x):
    return np.clip(x, 0, 1)


def disc(u, v, x, y, a, b, soft=.1):  # 1 inside an ellipse, half-axes a, b
    return clamp((1 - np.hypot((u - x) / a, (v - y) / b)) / soft + .5)


def layers(depth, rows):  # rows of depth, grey
    return np.interp(depth, *np.transpose(rows))


def paint(picture, mask, colour):
    return picture + mask * (np.float32(colour) - picture)


def cloud(rng, rows, cols=None):  # smooth noise
    grid = Image.fromarray(rng.standard_normal((rows, cols or rows), dtype=np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC))[..., None]


def vessels(rng, roots, length=1., bend=.5, kids=2, width=1):
    """Mask of random walks from roots of x, y, angle, and of their branches."""
    image, roots = Image.new("L", (SIZE, SIZE)), np.array(roots)  # (R, 3)
    pen = ImageDraw.Draw(image)
    for far, n in ((length, kids), (.55 * length, 0)):  # the roots' walks, then their n branches'
        drift = rng.normal(0, bend / 3, (len(roots), 1))
        turn = roots[:, 2:] + np.cumsum(rng.normal(drift, bend / 4, (len(roots), 8)), 1)
        steps = np.stack([np.cos(turn), np.sin(turn)], 2)
        path = roots[:, None, :2] + np.cumsum(steps, 1) * far / 8  # (R, 8, 2)
        for line in (path + 1) * SIZE / 2:
            pen.line(line.ravel().tolist(), fill=255, width=width)
        fork = path.swapaxes(0, 1)[2:2 + 2 * n:2]  # (n, R, 2): each walk's steps 2, 4, .. branch
        aside = turn[:, 3] + rng.choice((-.8, .8), (n, len(roots)))
        roots = np.c_[fork.reshape(-1, 2), aside.ravel()]
    return np.float32(image.filter(ImageFilter.GaussianBlur(.6)))[..., None] / 255


def draw_brain(rng, u, v, **_):
    head = ((0, .54), (.6, .52), (.79, .42),  # white matter, cortex
            (.82, .15), (.86, .12), (.89, .06),  # fluid, skull
            (.91, .8), (.97, .7), (1, 0))  # scalp, air
    ventricles = disc(abs(u), v, .13, -.04, .07, .25)
    falx = disc(u, v, 0, 0, .02, .8)
    d = np.hypot(u / .9, v / .97) + .02 * cloud(rng, 5)
    folds = .16 * clamp(np.sin(8 * cloud(rng, 9))) * clamp(5 * d - 2.5)
    g = layers(d, head) - folds * (d < .82)
    return g - .38 * np.maximum(ventricles, .6 * falx) * (d < .82)


def draw_trunk(rng, u, v, modality, anatomy, **_):
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


def draw_oct(rng, u, v, **_):
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


def draw_ultrasound(rng, u, v, anatomy, **_):
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


def draw_chest(rng, u, v, **_):
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


def draw_skin(rng, u, v, spots, **_):
    skin, hair = (.87, .67, .58), (.25, .15, .1)
    c = skin + .05 * spots * (.6, 1, 1) + .02 * cloud(rng, 50)
    hairs = vessels(rng, rng.uniform((-1, -1, -.4), (.3, 1, 1.2), (7, 3)), 1.3, .15, kids=0)
    lens = disc(u, v, 0, 0, 1.2, 1.2, .06)
    return paint(c, .75 * hairs, hair) * lens


def draw_gut(rng, u, v, **_):
    wall, blood, wet = (.86, .45, .38), (.6, .12, .12), (1, 1, .95)
    lumen = rng.integers(4) * np.pi / 2 + rng.uniform(-.1, .1)  # at an edge, away from lesions
    far = np.hypot(u - .88 * np.cos(lumen), v - .88 * np.sin(lumen)) + .06 * cloud(rng, 5)
    folds = .14 * clamp(3 * np.cos(11 * far) - 2) * clamp(1.8 - far)
    light = np.clip(.3 + 1.1 * far, .1, 1) - folds
    c = light * wall + .03 * cloud(rng, 12)
    veins = vessels(rng, rng.uniform((-1, -1, 0), (1, 1, 6), (4, 3)), .7)
    c = paint(c, .35 * veins, blood)
    c = paint(c, clamp(3 * cloud(rng, 22) - 6.2), wet)
    frame = (np.maximum(abs(u), abs(v)) < .97) & (abs(u) + abs(v) < 1.62)
    return c * frame


def draw_fundus(rng, u, v, spots, side, **_):
    retina, dark, blood, pale = (.8, .4, .16), (.4, .12, .05), (.45, .05, .04), (.98, .86, .5)
    macula = disc(u, v, -side * .1, 0, .2, .2, 1)
    optic_disc = disc(u, v, side * .74, 0, .15, .17, .3)
    c = (1.05 - .35 * np.hypot(u, v)) * retina + .03 * spots
    c = paint(c, .35 * macula, dark)
    turns = np.pi / 2 * (1 + side) + side * np.array((-1.9, -1.1, -.55, .55, 1.1, 1.9))
    arcs = vessels(rng, [(side * .72, 0, turn) for turn in turns], 1.5, kids=3)
    eye = disc(u, v, 0, 0, 1, 1, .03)
    return eye * paint(paint(c, .75 * arcs, blood), optic_disc, pale)


def draw_microscopy(rng, u, v, spots, anatomy, **_):
    if anatomy == "Lymph Node":
        pulp, nucleus = (.88, .72, .85), (.3, .15, .5)
        nuclei = clamp(2.4 * cloud(rng, 38) - .3)
        return paint(pulp + .06 * spots * (.3, 1, .5), .75 * nuclei, nucleus)
    tissue, nucleus = (.93, .68, .79), (.4, .18, .5)
    fibres = np.sin(14 * v + 5 * cloud(rng, 3) + 3 * cloud(rng, 6))
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


def facts_of(modality, anatomy, lesion):
    """What a phantom shows; lesion is None or (style, location)."""
    style, location = lesion or (None, None)
    kind = KINDS[anatomy][list(STYLES).index(style)] if lesion else None
    return dict(modality=modality, anatomy=anatomy, lesion=kind, style=style, location=location)


def draw_phantom(rng, modality, anatomy, lesion=None):
    """One phantom: (SIZE, SIZE, 3) uint8, and its facts. The healthy part is the same with a lesion
    and without."""
    grid = np.linspace(-1, 1, SIZE, dtype=np.float32)
    axes = [grid * rng.uniform(.97, 1.04) + rng.uniform(-.03, .03) for _ in range(2)]
    u, v = np.stack(np.meshgrid(*axes))[..., None]
    more = dict(modality=modality, anatomy=anatomy)
    if modality in TINT:
        more.update(spots=cloud(rng, 5), side=rng.choice((-1, 1)))
    image = PAINTERS[modality](rng, u, v, **more)
    gain = rng.uniform(.92, 1.08)
    noise = .025 * rng.standard_normal((SIZE, SIZE, 1), dtype=np.float32)
    if lesion:
        mask = lesion_mask(rng, *lesion)
        hit = mask != 0
        m, tissue = mask[hit][:, None], image[hit]  # (n, 1), (n, 1 or 3)
        mean = (tissue * abs(m)).sum(0) / abs(m).sum()
        even = tissue + abs(m) * .5 * (mean - tissue)  # less texture
        image[hit] = even + m * LESION_CONTRAST * np.array(TINT.get(modality, 1))
    pixels = (clamp(image * gain + noise) * 255).astype(np.uint8)
    return np.repeat(pixels, 3 // pixels.shape[2], 2), facts_of(modality, anatomy, lesion)


def phantom_of_turn(rng, i, lesion_rate=LESION_RATE):
    """The i-th phantom of many: modalities and organs by turns, a lesion as the dice fall."""
    lesion = None
    if rng.random() < lesion_rate:
        lesion = str(rng.choice(list(STYLES))), str(rng.choice(LOCATIONS))
    return draw_phantom(rng, *PAIRS[i % len(PAIRS)], lesion)


# ---- questions with their options ----------------------------------------------------------------
def alike(name, others):
    return any({name, other} in ALIKE for other in others)


def ask(image, task, truth, others, rng, rounds):
    """The record of a question: the true answer among three of the others. `image` has the keys
    that its questions share. The letter comes from rounds[task, split], a shuffled A to D that is
    refilled when used up: all are equally frequent in every task and split."""
    letters = rounds[task, image["split"]]
    if not letters:
        letters += rng.permutation(list("ABCD")).tolist()
    answer = letters.pop()
    wrong = [x for x in others if x != truth and not alike(x, [truth])]
    options = rng.permutation(wrong)[:3].tolist()
    options.insert(LETTERS.index(answer), truth)
    question = str(rng.choice(PHRASES)).format(ASKED[task])
    return {**image, "id": f"{image['id']}-{task}", "task": task, "question": question,
            "options": options, "answer": answer}


# ---- phantoms: questions, thoughts, files --------------------------------------------------------
def phantom_records(facts, rng, group, image, rounds, split="train", report=None):
    """The records of one image. Location and pathology are asked only of images with a lesion, the
    state of all healthy ones and of every second with a lesion: Normal is right half the time.

    An image's thoughts differ only in the last sentence, which gives the right option's text, never
    its letter. They describe the lesion of `report` (facts; default: the true ones).
    rounds, a defaultdict(list) kept from image to image, holds letters and turns yet to be used.
    """
    modality, anatomy, kind = facts["modality"], facts["anatomy"], facts["lesion"]
    turns, state = rounds["state asked", split], "Normal"
    if not turns:
        turns += rng.permutation(2).tolist()
    if kind:
        state = "Abnormal" if turns.pop() else None
    asked = (  # task, true answer (None: not asked), answers, last sentence
        ("anatomy", anatomy, ANATOMIES, "So the organ is"),
        ("anomaly", state, STATES, "So the image is"),
        ("location", facts["location"], LOCATIONS, "So the lesion lies in the"),
        ("modality", modality, MODALITIES, "So this is"),
        ("pathology", kind, KINDS[anatomy], "So the finding is"))

    report = report or facts
    finding = "There is no lesion."
    if report["lesion"]:
        finding = f"There is {STYLES[report['style']]} in the {report['location']}."
        finding += f" This fits {report['lesion']}."
    seen = f"{SIGNS[modality]} suggest {modality}. The region is {anatomy}. {finding}"
    shared = {"id": group, "image": image, "modality": modality, "anatomy": anatomy,
              "source": "phantom", "group": group, "split": split}
    return [ask({**shared, "thought": f"{seen} {so} {truth}."}, task, truth, names, rng, rounds)
            for task, truth, names, so in asked if truth]


def careless_report(facts, rng):
    """The facts with a false lesion: of another style and place, or in a healthy image any."""
    style = str(rng.choice([x for x in STYLES if x != facts["style"]]))
    location = str(rng.choice([x for x in LOCATIONS if x != facts["location"]]))
    return facts_of(facts["modality"], facts["anatomy"], (style, location))


def make_phantoms(out, seed, n_images, thoughts=None, careless=0.0):
    """Draw phantoms into folder `out` (images/, phantoms.jsonl, meta.json) -> the jsonl's path.
    Reused if already there with the same knobs, DataError if with others.

    The first `thoughts` train images (None: all) keep their chains of thought; those of a share
    `careless` of all images misreport the lesion. Neither changes images or questions.
    """
    expect(n_images > 0 and seed >= 0 and (thoughts or 0) >= 0 and 0 <= careless <= 1,
           f"{n_images} images, seed {seed}, thoughts {thoughts}, careless {careless}: expected"
           " 1 or more, 0 or more, 0 or more, 0 to 1")
    out = Path(out).absolute()
    jsonl, meta = out / "phantoms.jsonl", out / "meta.json"
    knobs = json.dumps({
        "seed": seed, "n_images": n_images, "thoughts": thoughts, "careless": careless,
        "size": SIZE, "lesion_rate": LESION_RATE, "lesion_radius": LESION_RADIUS,
        "lesion_contrast": LESION_CONTRAST, "shares": PHANTOM_SHARES})
    if meta.is_file():
        old = meta.read_text(encoding="utf-8")
        expect(old == knobs, f"{out} is there already with {old}, expected {knobs}:"
                             " remove it or name another folder")
        return str(jsonl)

    records, rounds, in_train = [], defaultdict(list), 0
    shuffled = np.random.default_rng(seed).permutation(n_images)
    ends = np.cumsum(list(PHANTOM_SHARES.values()))
    with new_folder(out) as part:
        (part / "images").mkdir()
        for i in tqdm(range(n_images), desc="phantoms", unit="image"):
            split = SPLITS[np.searchsorted(ends, shuffled[i] / n_images, side="right")]
            in_train += split == "train"
            rng = np.random.default_rng([seed, i])
            pixels, facts = phantom_of_turn(rng, i)
            name = f"images/{i:05d}.png"
            Image.fromarray(pixels).save(part / name, compress_level=1)

            other = np.random.default_rng([seed, i, 1])  # not rng: the questions stay the same
            report = careless_report(facts, other) if other.random() < careless else facts
            group = f"phantom-{seed}-{i:05d}"
            for r in phantom_records(facts, rng, group, name, rounds, split, report):
                if split == "train" and thoughts is not None and in_train > thoughts:
                    r["thought"] = None
                records.append({**r, "shows": facts})
        write_records(records, part / jsonl.name)
        write_text(part / meta.name, knobs)
    return str(jsonl)


# ---- MedAD-38K: how the 17 sources lie on disk ---------------------------------------------------
SKIN = {"MEL": "melanoma", "NV": "melanocytic nevus", "BCC": "basal cell carcinoma",
        "AKIEC": "actinic keratosis", "BKL": "benign keratosis", "DF": "dermatofibroma",
        "VASC": "vascular lesion"}
NEVI = ("common nevus", "atypical nevus", "melanoma")  # PH2's clinical diagnosis 0, 1, 2


def table(column, value):
    """-> a function that reads a table (its cells parted by commas, tabs or PH2's double bars):
    file -> [(row[column], value(row)), ..]."""
    def read(file):
        lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        by = "\t" if "\t" in lines[0] else ","
        rows = [x.split("||") for x in lines if "||" in x] or csv.reader(lines, delimiter=by)
        head, *body = [[cell.strip() for cell in row] for row in rows if any(row)]
        rows = [dict(zip(head, row, strict=False)) for row in body]
        return [(row[column], value(row)) for row in rows]
    return read


def chest_box(row):  # the comma of the head "Bbox [x,y,w,h]" parts columns
    x, y, w, h = (float(row[k]) for k in ("Bbox [x", "y", "w", "h]"))
    return [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]


def ddti_outlines(file):
    """XML with JSON in <svg>; an outline that can't be read is []."""
    for mark in ElementTree.parse(file).iter("mark"):
        name = f"{file.stem}_{mark.findtext('image')}"
        try:
            for shape in json.loads(mark.findtext("svg")):
                yield name, [(float(p["x"]), float(p["y"])) for p in shape["points"]]
        except (ValueError, KeyError, TypeError):
            yield name, []


def via_outlines(file):
    """The VGG annotator's JSON: polygons, circles and ellipses."""
    t = np.linspace(0, 2 * np.pi, 32)
    for entry in json.loads(file.read_text(encoding="utf-8")).values():
        regions = entry["regions"]
        for region in regions.values() if isinstance(regions, dict) else regions:
            s = region["shape_attributes"]
            if "cx" in s:
                a, b = s.get("rx", s.get("r")), s.get("ry", s.get("r"))
                turned = (a * np.cos(t) + 1j * b * np.sin(t)) * np.exp(1j * s.get("theta", 0))
                x, y = s["cx"] + turned.real, s["cy"] + turned.imag
            else:
                x, y = s["all_points_x"], s["all_points_y"]
            yield Path(entry["filename"]).stem, [*zip(map(float, x), map(float, y), strict=True)]


TRAIN_SHARE = 0.7  # of a source's pictures; the rest is the test split
LOOK = 64          # px, side of the small grey picture by which pictures are compared
CORRELATION = .99  # two pictures show the same if they correlate above this ..
DIFFERENCE = 4     # .. and their greys (of 255) differ by less than this in the mean
BLANK = 4          # standard deviation of the greys below which a picture shows nothing
FEW = 5            # images that can't be used are named by `check`
FAR = .2           # above chance: a look-up that answers so much more is warned of
SIMILAR = .5       # of the area of a lesion's largest part: so large, another counts as well
SLICES = 4         # of a volume with the lesion, and as many without
SHEET = 20         # pictures on a source's contact sheet
DEALT = {           # tasks that `balanced` deals: options that fill up to four
    "anomaly": STATES, "location": LOCATIONS, "pathology": ("foreign body", "surgical implant")}


class Source(NamedTuple):
    """A form of a source: one way its files are laid out. Patterns match the end of a path, see
    `matches`; image, masks and table rows of equal `at` and `id` belong together. `kind` is a key
    of findings, `group` the part of the id that names patient, volume or lesion (else all)."""
    key: str
    modality: str
    anatomy: str
    images: str           # pattern
    masks: str = "(?!)"   # pattern, by default of nothing; several masks of one id are one lesion
    findings: dict = {}   # {`kind` in lower case, "" if not in the path: lesion, "" if healthy}
    tells: list = []      # ("finding", "group" or "outlines", pattern, file -> [(id, value), ..])
    canvas: tuple = ()    # px, width and height the outlines refer to (else the image's)
    least: int = 1        # value in a volume's mask from which on it is lesion; below is the organ
    window: tuple = ()    # HU shown as black and as white (else percentiles 1 and 99)


BMAD = dict(
    images="{at=train|valid|val|test}/(?!**(label|mask))**{kind=good|ungood}/(img/)?"
           "{id=({group}_)?[^/_]+?}.*",
    masks="{at=train|valid|val|test}/**(label|mask)**/{id}.*")
SOURCES = (  # {group}##?: of pictures with running numbers a hundred, 4200 to 4299, are one group
    Source("brats2021", "MRI", "Brain", "BraTS2021_{id}_flair.nii*", "BraTS2021_{id}_seg.nii*",
           {"": "glioma"}),
    Source("brats2021", "MRI", "Brain", findings={"good": "", "ungood": "glioma"}, **BMAD),
    Source("liverct", "CT", "Liver", "volume-{id}.nii*", "segmentation-{id}.nii*", {"": "tumor"},
           least=2, window=(-200, 250)),
    Source("liverct", "CT", "Liver", findings={"good": "", "ungood": "tumor"}, **BMAD),
    Source("resc", "OCT", "Retina", findings={"good": "", "ungood": "edema"}, **BMAD),
    Source("busi", "Ultrasound", "Breast", "{kind=benign|malignant|normal}/{id=*[)]}.png",
           "{id=*[)]}_mask*.png",
           {"benign": "benign tumor", "malignant": "malignant tumor", "normal": ""}),
    Source("isic2018", "Dermoscopy", "Skin", "*_Input/{id}.jpg", "{id}_segmentation.png", tells=[
        ("finding", "*Task3_*_GroundTruth.csv", table("image", lambda row: (
            "|".join(SKIN[k] for k in SKIN if float(row[k]) > .5)))),
        ("group", "*LesionGroupings.csv", table("image", lambda row: row["lesion_id"]))]),
    Source("mosmed", "CT", "Lung", "{kind=CT-#}/{id=study_####}.nii*", "{id}_mask.nii*",
           {"ct-0": "", **{f"ct-{k}": "COVID-19 pneumonia" for k in "1234"}}, window=(-1000, 400)),
    Source("atlas", "CE-MRI", "Liver", "imagesTr/{id}(_0000)?.nii*", "labelsTr/{id}.nii*",
           {"": "tumor"}, least=2),
    Source("ddti", "Ultrasound", "Thyroid", "{id={group=#+}_#*}.jpg", findings={"": "nodule"},
           tells=[("outlines", "*.xml", ddti_outlines)]),
    Source("ddti", "Ultrasound", "Thyroid", "1_or_data/image/{id={group}##?}.png",
           "1_or_data/mask/{id}.*", {"": "nodule"}),
    Source("kvasirseg", "Endoscopy", "Alimentary", "images/{id}.jpg", "masks/{id}.jpg",
           {"": "polyp"}),
    Source("cvcclinicdb", "Endoscopy", "Alimentary", "Original/{id={group}##?}.(tif|png)",
           "Ground Truth/{id}.(tif|png)", {"": "polyp"},
           [("group", "metadata.csv", table("frame_id", lambda row: row["sequence_id"]))]),
    Source("ph2", "Dermoscopy", "Skin", "*_Dermoscopic_Image/{id}.bmp", "{id}_lesion.bmp",
           tells=[("finding", "PH2_dataset.txt", table("Name", lambda row: (
               NEVI[int(row["Clinical Diagnosis"])])))]),
    Source("idrid", "Fundus", "Retina", "*images/(**/)?{id=IDRiD_##}.jpg",
           "{id=IDRiD_##}_(MA|HE|EX|SE).*", {"": "diabetic retinopathy"}),
    Source("idrid", "Fundus", "Retina", "*{at=Training|Testing} Set/{id=IDRiD_###}.jpg", tells=[
        ("finding", "*Grading_{at=Training|Testing} Labels.csv", table("Image name", lambda row: (
            "diabetic retinopathy" if int(row["Retinopathy grade"]) else "")))]),
    Source("pedidemi", "MRI", "Brain", "{id=**}/(?!*(mask|seg|lesion|label|roi))*flair*.nii*",
           "{id=**}/*(mask|seg|lesion|label|roi)*.nii*", {"": "demyelination"}),
    Source("br35h", "MRI", "Brain", "{kind=yes|no}/{id}.jpe?g", findings={"yes": "tumor", "no": ""},
           tells=[("outlines", "annotations_*.json", via_outlines)]),
    Source("chestxray14", "X-ray", "Chest", "images*/{id={group=########}_###.png}", tells=[
        ("finding", "Data_Entry_2017*.csv", table("Image Index", lambda row: (
            row["Finding Labels"].lower().replace("_", " ").replace("no finding", "")))),
        ("outlines", "BBox_List_2017*.csv", table("Image Index", chest_box))], canvas=(1024, 1024)),
    Source("malignantlymphoma", "Microscopy", "Lymph Node",
           "{kind=CLL|FL|MCL}/{id=({group=sj-#+-#+})?*}.tiff?", findings={
               "cll": "chronic lymphocytic leukemia", "fl": "follicular lymphoma",
               "mcl": "mantle cell lymphoma"}),
    Source("bach", "Microscopy", "Breast", "{kind=Normal|Benign|InSitu|Invasive}/{id}.tiff?",
           findings={"normal": "", "benign": "benign lesion", "insitu": "in situ carcinoma",
                     "invasive": "invasive carcinoma"}))


def matches(pattern, files):
    """(file, what `at` and `id` found, {group: text}) of each file whose path ends as the pattern,
    a regular expression in which {x=..} is a group named x, {x} is short for {x=*}, * is any text
    in one name, ** any text, # a digit, and . only a dot."""
    means = {"*": "[^/]*?", "**": ".*?", "#": r"\d", ".": r"\.", "}": ")"}
    text = re.sub(r"\{(\w+)\}", r"{\1=*}", pattern)
    text = re.sub(r"\*\*|[*#.}]", lambda m: means[m[0]], text)
    text = re.sub(r"\{(\w+)=", r"(?P<\1>", text)
    for file in files:
        m = re.search(f"(^|/){text}$", file, re.I)
        if m:
            named = m.groupdict()
            yield file, named.get("at", "").lower() + named.get("id", ""), named


def told_by(s, folder, files):
    """What masks and tables tell of the images of a form, {id: {"masks": paths, "outlines":
    [[(x, y), ..] px, ..], "finding": what each table says, "group": the same}}."""
    told = defaultdict(lambda: defaultdict(list))
    for file, name, _ in matches(s.masks, files):
        told[name]["masks"].append(str(folder / file))
    for what, pattern, reader in s.tells:
        tables = list(matches(pattern, files))
        if what == "finding" and not tables:
            lack = f"no file {pattern}, which tells what the pictures show"
            tqdm.write(f"warning: {s.key}={folder}: {lack}", file=sys.stderr)
        for file, at, _ in tables:
            try:
                for name, value in reader(folder / file):
                    told[at + name][what].append(value)
            except Exception as e:  # on files of another form readers raise anything
                why = f"lacks {e}" if isinstance(e, KeyError) else f"isn't as expected: {e}"
                raise DataError(f"{folder / file} {why}") from None
    return told


def find(key, folder):
    """The images and volumes of a source -> jobs for `examine`. Of files with one id, name and
    kind the first is taken."""
    forms, folder, jobs = [s for s in SOURCES if s.key == key], Path(folder), {}
    known = ", ".join(sorted({s.key for s in SOURCES}))
    expect(forms, f"{key}: no such source, expected some of {known}")
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for s in forms:
        images = list(matches(s.images, files))
        told = told_by(s, folder, files) if images else {}
        for file, name, named in images:
            own, kind, group = told[name], named.get("kind", "").lower(), named.get("group")
            groups = own["group"] or [name if group is None else group]
            findings = own["finding"] or [s.findings.get(kind)]
            jobs.setdefault((s.images, name, Path(file).stem, kind), {
                "source": key, "modality": s.modality, "anatomy": s.anatomy, "n": len(jobs),
                "file": file, "path": str(folder / file), "group": f"{key} {groups[-1]}",
                "finding": findings[-1], "masks": own["masks"], "outlines": own["outlines"],
                "canvas": s.canvas, "least": s.least, "window": s.window})
    expected = " or ".join(s.images for s in forms)
    found = ", ".join(files[:3]) or "no file"
    expect(jobs, f"{key}={folder}: expected a folder with {expected}, found {found}")
    return list(jobs.values())


# ---- MedAD-38K: from files to pictures -----------------------------------------------------------
def parts_of(mask):
    """The connected parts of a mask (H, W) bool, on a grid of 32 cells along its longer side ->
    areas, centroids' x and y, px, each (P,)."""
    side, grown = math.ceil(max(mask.shape) / 32), mask.copy()
    grown[1:] |= mask[:-1]  # what touches at a corner touches at an edge now, as floodfill needs it
    y, x = grown.nonzero()
    cells = np.zeros((32, 32), np.int32)  # 0 outside, -1 inside, then the number of the part
    cells[y // side, x // side] = -1
    image, parts = Image.fromarray(cells), 0
    for y, x in np.argwhere(cells).tolist():
        if image.getpixel((x, y)) < 0:
            parts += 1
            ImageDraw.floodfill(image, (x, y), parts)
    y, x = mask.nonzero()
    part = np.asarray(image)[y // side, x // side] - 1
    area = np.bincount(part)
    return area, np.bincount(part, x + .5) / area, np.bincount(part, y + .5) / area


def location_of(mask):
    """Where a lesion lies; mask (H, W) bool -> the one of Fig. 4's regions, or None; why None; the
    centroid's x and y as fractions.

    Center Region is the middle third of both axes, the others are the quarters around it. The
    centroid of the largest part decides, unless one of at least SIMILAR times its area lies in
    another region, or all cover more than half of the picture.
    """
    area, x, y = parts_of(mask)
    x, y = x / mask.shape[1], y / mask.shape[0]
    central = (abs(x - .5) < 1 / 6) & (abs(y - .5) < 1 / 6)
    region = np.where(central, 4, (x >= .5) + 2 * (y >= .5))  # (P,), places in LOCATIONS
    first = area.argmax()  # the largest part
    why = None
    if mask.mean() > .5:
        why = "over half of the picture"
    elif (region[area >= SIMILAR * area[first]] != region[first]).any():
        why = "in several regions"
    return None if why else LOCATIONS[region[first]], why, (x[first], y[first])


def photo(job):
    """An image file -> [(image, lesion (H, W) bool or None if not known, "")], as `slices`."""
    image = open_image(job["path"])
    outlines, masks = job["outlines"], job["masks"]
    unread = any(len(polygon) < 3 for polygon in outlines)
    if unread or not (outlines or masks):
        return [(image, None, "")]
    size = job["canvas"] or image.size  # W, H
    drawn = Image.new("1", size)
    for polygon in outlines:
        ImageDraw.Draw(drawn).polygon(polygon, fill=1)
    lesion = np.array(drawn)
    for path in masks:
        try:
            mask = open_image(path, window=(0, 1))  # what isn't 0 becomes white
        except DataError as e:
            raise DataError(f"has a mask that {e}") from None
        skew = abs(mask.width * size[1] - mask.height * size[0])  # 0: the same W / H
        expect(skew <= max(size), "has a mask of another shape")
        # Masks are 0 and 1, 0 and 255, red, or grey through a colour map; JPEGs blur their edges.
        least = 128 if path.lower().endswith(("jpg", "jpeg")) else 1
        for band in mask.resize(size, Image.Resampling.NEAREST).split():  # grey, or R, G and B
            lesion |= np.asarray(band) >= least
    return [(image, lesion, "")]


def evenly(items, n):
    """Up to n of the items, evenly spaced."""
    return [items[k] for k in np.linspace(0, len(items) - 1, min(n, len(items))).astype(int)]


def slices(job):
    """NIfTI volume -> [(image, lesion or None, suffix)] of up to SLICES slices with the lesion and
    as many without (with the organ if it is marked, else of the middle half), evenly spaced, shown
    as radiologists do, the patient's right on the left."""
    try:
        import nibabel
    except ImportError:
        raise DataError("volumes (.nii, .nii.gz) need nibabel: pip install nibabel") from None
    try:
        files = [nibabel.load(path) for path in (job["path"], *job["masks"][:1])]
        arrays = [np.asarray(nibabel.as_closest_canonical(x).dataobj) for x in files]  # (X, Y, Z)
        volume, *masks = [a[::-1, ::-1].T for a in arrays]  # (Z, Y, X)
        without = abs(np.arange(len(volume)) / len(volume) - .5) < .25  # (Z,): the middle half
        lesion = [None] * len(volume)  # of each slice; None: not known
        sick, shown = [], []
        for mask in masks:  # one or none
            expect(mask.shape == volume.shape, "another shape")
            lesion = mask >= job["least"]
            area = lesion.mean((1, 2))  # (Z,)
            if job["least"] > 1:
                without = (mask > 0).mean((1, 2)) > .02  # with the organ
            without = without & (area == 0)
            sick = np.flatnonzero(area > .001)
        for z in sorted(evenly(sick, SLICES) + evenly(np.flatnonzero(without), SLICES)):
            greys = Image.fromarray(eight_bits(volume[z], job["window"]))
            shown.append((greys, lesion[z], f"-{z:03d}"))
    except Exception as e:  # nibabel and damaged files raise anything
        raise DataError(f"can't be read as a volume with its mask ({e})") from None
    expect(shown, "no slice of which it is known whether it shows a lesion")
    return shown


def examine(job, folder, max_side):
    """An image or volume -> its pictures, written into `folder` with at most max_side px per side:
    the job with more keys. What can't be used has none of these but "why".

    "finding": the lesion, "" if healthy, "A|B" if several, None if not told or if the mask says
    otherwise ("agree" is False); "box": the lesion's, if known, as fractions: left, top, right,
    bottom; "place": what location_of says.
    """
    pictures = []
    try:
        shown = slices(job) if ".nii" in job["file"] else photo(job)
    except DataError as e:
        return [{**job, "why": re.sub(r" \(.*\)$", "", str(e))}]
    for image, lesion, suffix in shown:
        image.thumbnail((max_side, max_side))
        look = look_of(image)
        if look is None:
            pictures.append({**job, "why": "shows nothing"})
            continue
        finding, box, place = job["finding"], None, (None, "no mask or outline", None)
        drawn = lesion is not None and bool(lesion.any())
        if drawn:
            h, w = lesion.shape
            box = np.divide(Image.fromarray(lesion).getbbox(), (w, h, w, h))
            place = location_of(lesion)
        elif suffix and finding:  # a slice beside the lesion, if there is a mask to tell
            finding = None if lesion is None else ""
        agree = lesion is None or finding is None or drawn == bool(finding)
        stem = re.sub("[^A-Za-z0-9]+", "-", Path(job["file"]).stem)
        file = f"images/{job['source']}/{job['n']:06d}-{stem}{suffix}.png"
        image.save(folder / file, compress_level=1)
        pictures.append({**job, "image": file, "look": look, "finding": finding if agree else None,
                         "agree": agree, "box": box, "place": place})
    return pictures


def examine_all(key, jobs, folder, max_side, workers):
    """The pictures of a source. Warns of what can't be used; DataError if that is all."""
    (folder / "images" / key).mkdir(parents=True)
    work = partial(examine, folder=folder, max_side=max_side)
    with multiprocessing.Pool(workers) as pool:
        done = tqdm(pool.imap(work, jobs, chunksize=4), desc=key, unit="file", total=len(jobs))
        pictures = [f for made in done for f in made]
    lost = [f"{f['file']}: {f['why']}" for f in pictures if "why" in f]
    if lost:
        sentence = f"{key}: {len(lost)} of {len(pictures)} can't be used, as {lost[0]}"
        expect(len(lost) < len(pictures), sentence)
        tqdm.write(f"warning: {sentence}", file=sys.stderr)
    return pictures


# ---- MedAD-38K: from pictures to questions -------------------------------------------------------
def without_copies(pictures, folder):
    """The pictures but for copies of earlier ones, which get a "why" and lose their file. Groups
    with pictures that look the same become one."""
    names, numbers = np.unique([f["group"] for f in pictures], return_inverse=True)
    looks = np.array([f.pop("look") for f in pictures])
    joined = join_alike(looks, numbers)
    grown, seen = set(joined[joined != numbers]), set()
    for f, n, mark in zip(pictures, joined, map(digest, looks), strict=True):
        f["group"], f["joined"] = str(names[n]), n in grown
        if mark in seen:
            f["why"] = "the same picture as another"
            (folder / f["image"]).unlink()
        seen.add(mark)
    return [f for f in pictures if "why" not in f]


def split_by_group(pictures, seed):
    """Sets "split": TRAIN_SHARE of a source's pictures are for training; a group stays whole, also
    where looks joined it to one of another source."""
    sizes, train = Counter(f["group"] for f in pictures), set()
    for source in {group.split()[0] for group in sizes}:
        rng = np.random.default_rng([seed, *source.encode()])
        groups = rng.permutation(sorted(x for x in sizes if x.split()[0] == source))
        size = np.array([sizes[x] for x in groups])
        middle = size.cumsum() - size / 2  # a group is on the side on which its middle is
        train.update(groups[middle <= TRAIN_SHARE * size.sum()])
    for f in pictures:
        f["split"] = "train" if f["group"] in train else "test"


def true_answer(f, task):
    """The answer to a DEALT task -> (answer, None), or (None, why it can't be asked)."""
    finding = f["finding"]
    if not f["agree"]:
        return None, "label and mask disagree"
    if finding is None and task != "location":
        return None, "no label"
    if task == "anomaly":
        return "Abnormal" if finding else "Normal", None
    if finding == "":
        return None, "healthy"
    if finding and "|" in finding:  # an outline may be of one of them
        return None, "several kinds of lesion"
    return (finding, None) if task == "pathology" else f["place"][:2]


def balanced(pool, rng):
    """{answer: pictures} -> (picture, its answer, the answers offered), in rounds: one picture of
    each of the (up to four) answers with most pictures left, offered together, so that what is
    offered tells nothing. A round of fewer answers than the first ends it; the rest isn't asked."""
    for answer, pictures in sorted(pool.items()):
        pool[answer] = [pictures[i] for i in rng.permutation(len(pictures))]
    size = 0
    while True:
        offered = []
        for answer in sorted(pool, key=lambda x: (-len(pool[x]), x)):
            if pool[answer] and len(offered) < 4 and not alike(answer, offered):
                offered.append(answer)
        size = size or max(2, len(offered))
        if len(offered) < size:
            return
        for answer in offered:
            yield pool[answer].pop(), answer, offered


def apart(names, truth, rng):
    """The names in a random order, of two that are ALIKE only one: where both are offered, neither
    would be right."""
    kept = [truth]
    for name in rng.permutation(names).tolist():
        if name != truth and not alike(name, kept):
            kept.append(name)
    return kept


def medad_records(pictures, seed):
    """The records of pictures that have a split: anatomy and modality of all, the rest dealt."""
    rng, rounds, records = np.random.default_rng(seed), defaultdict(list), []

    def add(f, task, truth, others):
        image = {k: f[k] for k in ("image", "modality", "anatomy", "source", "group", "split")}
        image |= {"id": f"{f['source']}-{Path(f['image']).stem}", "thought": None}
        records.append(ask(image, task, truth, others, rng, rounds))

    pools = defaultdict(lambda: defaultdict(list))  # {what is asked together: {answer: pictures}}
    for f in pictures:
        for task, names in (("anatomy", ANATOMIES), ("modality", MODALITIES)):
            add(f, task, f[task], apart(names, f[task], rng))
        for task in DEALT:
            truth, _ = true_answer(f, task)
            where = () if task == "location" else (f["modality"], f["anatomy"])
            if truth:
                pools[task, f["split"], *where][truth].append(f)
    for (task, *_), pool in sorted(pools.items()):
        for f, truth, offered in balanced(pool, rng):
            others = offered + [x for x in DEALT[task] if x not in offered]
            add(f, task, truth, others[:4])
    return records


# ---- pictures that look the same -----------------------------------------------------------------
def look_of(image):
    """What pictures are compared by: (LOOK, LOOK) uint8 greys; None if they show nothing."""
    grey = image.convert("L").resize((LOOK, LOOK), Image.Resampling.BILINEAR)
    return np.array(grey) if np.std(grey) >= BLANK else None


def normed(looks):
    """(N, H, W), each brought to mean 0 and length 1: their products are correlations."""
    a = looks - looks.mean((1, 2), dtype=np.float32, keepdims=True)
    return a / np.linalg.norm(a, axis=(1, 2), keepdims=True)


def coarse(looks):
    """(N, LOOK, LOOK) -> (N, 16, 16) float32: normed, then means of 4 x 4 px, times 4. That is a
    projection: distances shrink or stay."""
    parts = map(normed, np.array_split(looks, len(looks) // 1024 + 1))  # bounds memory
    return np.concatenate([x.reshape(-1, 16, 4, 16, 4).mean((2, 4)) * 4 for x in parts])


def same(looks, others):
    """(N,) bool: whether two looks show the same (CORRELATION, DIFFERENCE), as they are or one
    mirrored."""
    out = False
    for c in (others, others[..., ::-1]):
        correlation = (normed(looks) * normed(c)).sum((1, 2))
        difference = abs(np.float32(looks) - c).mean((1, 2))
        out |= (correlation > CORRELATION) & (difference < DIFFERENCE)
    return out


def join_alike(looks, groups):
    """Groups (N,) int of looks (N, LOOK, LOOK) -> the same, those that share looks which are `same`
    joined under their smallest number. Compared in full are pairs of which the mean greys are near,
    and the coarse looks, as they are or one mirrored: no pair is missed, since these distances are
    shorter than those of whole looks."""
    groups, a = np.array(groups), coarse(looks)  # (N,), (N, 16, 16)
    mirrored = a[..., ::-1].reshape(-1, 256)
    a = a.reshape(-1, 256)
    half, levels = (a**2).sum(1) / 2, looks.mean((1, 2), dtype=np.float32)  # (N,) each
    for k in range(0, len(a), 128):
        rows = a[k:k + 128]
        # |x - y|**2 / 2 = |x|**2 / 2 + |y|**2 / 2 - x y; of whole looks it is 1 - the correlation.
        products = np.maximum(rows @ a[k:].T, rows @ mirrored[k:].T)
        near = half[k:k + 128, None] + half[k:] - products < 1 - CORRELATION
        near &= abs(levels[k:k + 128, None] - levels[k:]) < DIFFERENCE
        pairs = k + np.argwhere(near)  # (P, 2)
        pairs = pairs[groups[pairs[:, 0]] != groups[pairs[:, 1]]]
        for some in np.array_split(pairs, len(pairs) // 1024 + 1):  # bounds memory
            for x, y in some[same(looks[some[:, 0]], looks[some[:, 1]])]:
                low, high = sorted((groups[x], groups[y]))
                groups[groups == high] = low
    return groups


# ---- what answers are found by without understanding ---------------------------------------------
def look_at(path):
    """A picture's file -> its look, None if it shows nothing, and why it can't be used, or None."""
    try:
        return look_of(open_image(path)), None
    except DataError as e:
        return None, f"{path} {e}"


def look_up(task, records, points):
    """Prints how many of a task's test questions look-ups answer: by the option that in train was
    right most often when offered; the same among train questions of the very same words, where
    there are any; by the answer of the nearest picture in train whose answer is offered. points:
    {path: coarse look, (256,)}."""
    train = [r for r in records if r["split"] == "train"]
    test = [r for r in records if r["split"] == "test"]
    if not train or not test:
        print(f"{task}: no look-up without questions of both train and test")
        return
    right, offered = Counter(), Counter()  # of (question or None, option); None: of all questions
    for r in train:
        for question in (None, r["question"]):
            right[question, r["right"]] += 1
            offered.update((question, option) for option in r["options"])
    asked = {r["question"] for r in train}
    seen = [r for r in train if r["path"] in points]
    known = np.array([points[r["path"]] for r in seen])  # (N, 256)
    number = {answer: k for k, answer in enumerate({r["right"] for r in train})}
    answers = np.array([number[r["right"]] for r in seen])  # (N,)
    half = (known**2).sum(-1) / 2

    def commonest(r, question):
        def share(option):
            return right[question, option] / max(offered[question, option], 1)
        return max(r["options"], key=share) == r["right"]

    found = defaultdict(list)
    for r in test:
        found["chance"].append(1 / len(r["options"]))
        same_words = r["question"] if r["question"] in asked else None
        for name, question in (("commonest answer", None), ("question's commonest", same_words)):
            found[name].append(commonest(r, question))
        choices = [number[x] for x in r["options"] if x in number]
        offers = np.isin(answers, choices)  # (N,)
        if seen and r["path"] in points:
            near = np.where(offers, known @ points[r["path"]] - half, -np.inf)  # largest: nearest
            hit = offers.any() and seen[near.argmax()]["right"] == r["right"]
            found["nearest picture's"].append(hit)
    found = {name: np.mean(hits) for name, hits in found.items()}
    told = ", ".join(f"{name} {share:.1%}" for name, share in found.items())
    print(f"{task}, {len(test)} test questions: {told}")
    if max(found.values()) > found["chance"] + FAR:
        print(f"warning: {task} is answered far above chance by a look-up")


def check(records):
    """Prints what the questions are, what train shares with other splits, what look-ups answer;
    DataError at the end where images can't be used."""
    paths = sorted({r["path"] for r in records})
    with multiprocessing.Pool() as pool:
        found = list(tqdm(pool.imap(look_at, paths, chunksize=16), desc="check", total=len(paths)))
    seen = {path: look for path, (look, _) in zip(paths, found, strict=True) if look is not None}
    bad = [why for _, why in found if why]
    blank = [path for path, (look, why) in zip(paths, found, strict=True) if look is why is None]
    print(f"{len(records)} questions on {len(paths)} images, {len(bad)} of them can't be used")
    if blank:
        print(f"warning: {len(blank)} images show nothing, as {blank[0]}")
    for key in ("task", "split", "answer", "modality"):
        print(f"{key}: {counted(records, key)}")

    points, like = {}, {}
    if seen:
        looks = np.array(list(seen.values()))
        points = dict(zip(seen, coarse(looks).reshape(-1, 256), strict=True))
        like = dict(zip(seen, join_alike(looks, np.arange(len(seen))), strict=True))
    for r in records:
        r["right"] = right_option(r)
        r["look"] = like.get(r["path"], r["path"])
    for key, shared in (("group", "are of a group (patient)"), ("look", "look like a picture")):
        train = {r[key]: r["path"] for r in records if r["split"] == "train"}
        both = [r for r in records if r["split"] != "train" and r[key] in train]
        if both:
            print(f"warning: {len({r['path'] for r in both})} pictures of test or val {shared} that"
                  f" is in train, as {both[0]['path']} and {train[both[0][key]]}")
    answers = defaultdict(set)
    for r in records:
        answers[r["path"], r["question"], *sorted(r["options"])].add(r["right"])
    unclear = [asked for asked, right in answers.items() if len(right) > 1]
    if unclear:
        print(f"warning: {len(unclear)} questions have several answers, as {unclear[0][1]!r} about"
              f" {unclear[0][0]}")
    for task in sorted({r["task"] for r in records}):
        look_up(task, [r for r in records if r["task"] == task], points)
    more = f"; and {len(bad) - FEW} more" if len(bad) > FEW else ""
    expect(not bad, f"{'; '.join(bad[:FEW])}{more}: training would stop there")


# ---- MedAD-38K: build ----------------------------------------------------------------------------
def build(sources, out, max_side=512, seed=0, workers=None):
    """{key: folder} -> `out`: medad38k.jsonl, images/, dataset.md, a contact sheet per source."""
    out = Path(out).absolute()
    expect(max_side > 0 and seed >= 0,
           f"max_side {max_side}, seed {seed}: expected 1 or more px, a seed of 0 or more")
    jobs = {key: find(key, folder) for key, folder in sorted(sources.items())}
    pictures = []
    with new_folder(out) as part:
        for key in jobs:
            pictures += examine_all(key, jobs[key], part, max_side, workers)
        kept = without_copies([f for f in pictures if "why" not in f], part)
        split_by_group(kept, seed)
        records = medad_records(kept, seed)
        write_records(records, part / "medad38k.jsonl")
        given = " ".join(f"{key}=DIR" for key in sorted(sources))
        command = f"python data.py build --max_side {max_side} --seed {seed} {given}"
        write_text(part / "dataset.md", about(command, pictures, records))
        for key in sources:
            source_sheet(part, key, [f for f in kept if f["source"] == key])
    return str(out / "medad38k.jsonl")


def contact_sheet(cells, file):
    """A picture file of cells, [(image of at most 2 * SIZE px per side, label)], five in a row."""
    side, height = 2 * SIZE, 2 * SIZE + 14
    page = Image.new("RGB", (5 * side, math.ceil(len(cells) / 5) * height), "white")
    for k, (image, label) in enumerate(cells):
        x, y = k % 5 * side, k // 5 * height
        page.paste(image, (x, y + 14))
        ImageDraw.Draw(page).text((x + 4, y + 1), label, fill="black")
    page.save(file)


def source_sheet(folder, key, pictures):
    """SHEET pictures of a source: the five regions, a box around the lesion, a dot on its centroid,
    what it is and where."""
    cells = []
    for f in evenly(pictures, SHEET):
        image = Image.open(folder / f["image"]).convert("RGB")
        image.thumbnail((2 * SIZE, 2 * SIZE))
        pen, (w, h) = ImageDraw.Draw(image), image.size
        pen.line((w / 2, 0, w / 2, h), fill="gray")
        pen.line((0, h / 2, w, h / 2), fill="gray")
        pen.rectangle((w / 3, h / 3, 2 * w / 3, 2 * h / 3), outline="gray")
        if f["box"] is not None:
            pen.rectangle(tuple(f["box"] * (w, h, w, h)), outline="cyan")
            x, y = f["place"][2]
            pen.ellipse((x * w - 3, y * h - 3, x * w + 3, y * h + 3), fill="cyan", outline="black")
        what = "not told" if f["finding"] is None else f["finding"].replace("|", ", ") or "healthy"
        where = f", {f['place'][0]}" if f["place"][0] else ""
        cells.append((image, what + where))
    if cells:
        contact_sheet(cells, folder / f"{key}.png")


def about(command, pictures, records):
    """dataset.md: what was built, what was left out and why."""
    kept = [f for f in pictures if "why" not in f]
    text = f"# MedAD-38K, built from public sources\n\n`{command}`: {len(kept)} pictures.\n\n"
    text += "| source | pictures | groups | look-alikes | train | test | questions |\n"
    text += "|---|---|---|---|---|---|---|\n"
    questions = Counter(r["source"] for r in records)
    for source in sorted({f["source"] for f in kept}):
        own = [f for f in kept if f["source"] == source]
        groups, split = {f["group"] for f in own}, Counter(f["split"] for f in own)
        row = (source, len(own), len(groups), sum(f["joined"] for f in own), split["train"],
               split["test"], questions[source])
        text += f"| {' | '.join(map(str, row))} |\n"
    text += "\nLook-alikes: pictures of groups that were joined because pictures look the same.\n"
    for key in ("modality", "anatomy", "task", "answer", "split"):
        text += f"\nQuestions by {key}: {counted(records, key)}.\n"

    right = defaultdict(set)  # the answers that are ever right, of those that are offered together
    for r in records:
        if r["task"] in DEALT:
            where = "" if r["task"] == "location" else f" of {r['modality']}, {r['anatomy']}"
            right[f"{r['task']}{where}, {r['split']}"].add(right_option(r))
    text += "\nWhere fewer than four answers are ever right, chance is more than 25 %:\n\n"
    for what, answers in sorted(right.items()):
        if len(answers) < 4:
            text += f"- {what}: {100 / len(answers):.0f} % ({', '.join(sorted(answers))})\n"
    left_out = Counter((f["source"], f["why"]) for f in pictures if "why" in f)
    asked = {(r["image"], r["task"]) for r in records}
    for f in kept:
        for task in DEALT:
            if (f["image"], task) not in asked:
                why = true_answer(f, task)[1] or "no picture with another answer to balance it"
                left_out[f["source"], f"{task}: {why}"] += 1
    text += "\nLeft out:\n\n"
    for (source, why), n in sorted(left_out.items()):
        text += f"- {source}, {why}: {n}\n"
    return text


def counted(records, key):
    """How many records have each value of a key, as text."""
    return ", ".join(f"{x} {n}" for x, n in sorted(Counter(r[key] for r in records).items()))


# ---- command line --------------------------------------------------------------------------------
def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("phantoms", help="draw phantoms")
    p.add_argument("--out", default="out/phantoms", help="folder [%(default)s]")
    p.add_argument("--n", type=int, default=2000, help="images [%(default)s]")
    p.add_argument("--seed", type=int, default=0, help="of everything drawn [%(default)s]")
    p.add_argument("--thoughts", type=int,
                   help="train images that keep their chains of thought [all]")
    p.add_argument("--careless", type=float, default=0.0,
                   help="share of the images whose thoughts misreport the lesion [%(default)s]")
    p = commands.add_parser("build", help="make MedAD-38K of public sources")
    p.add_argument("sources", nargs="+", metavar="KEY=DIR",
                   help=", ".join(sorted({s.key for s in SOURCES})))
    p.add_argument("--out", default="medad38k", help="folder [%(default)s]")
    p.add_argument("--max_side", type=int, default=512,
                   help="px above which a picture is shrunk [%(default)s]")
    p.add_argument("--seed", type=int, default=0, help="of split, options, wording [%(default)s]")
    p = commands.add_parser("check", help="validate and count questions, look for leaks")
    p.add_argument("files", nargs="+")

    args = parser.parse_args()
    if args.command == "phantoms":
        print(make_phantoms(args.out, args.seed, args.n, args.thoughts, args.careless))
    elif args.command == "build":
        sources = {}
        for text in args.sources:
            key, _, folder = text.partition("=")
            expect(folder and key not in sources, f"{text}: expected KEY=DIR, each key once")
            sources[key] = folder
        print(build(sources, args.out, args.max_side, args.seed))
    else:
        check(read_records(args.files))


if __name__ == "__main__":
    cli(main)
