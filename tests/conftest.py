"""What the tests share: the repository on sys.path, no network, and one tiny world: phantoms, a random model, its folder."""
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Programs that a test starts run where files and output are not UTF-8 unless a program says so, as on Windows.
os.environ |= dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")

import faults
import numpy as np
import pytest
import torch
from PIL import Image

import data
import model as M
import rewards
import sft

torch.set_num_threads(1)  # a model this small gains nothing from a second thread, and beside a busy process loses fivefold

SIZES = ((56, 112), (112, 112), (84, 56), (168, 84), (57, 91))  # px, width and height of the images of `mixed`


class World(NamedTuple):
    """Made once, never changed: a test that trains or breaks something takes a copy."""
    jsonl: str       # 40 phantoms
    records: list    # all of them, both splits
    net: object      # tiny Qwen2.5-VL, random weights
    processor: M.Processor
    folder: str      # the same, saved
    mixed: list      # 5 records with images of five sizes and questions of several lengths


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    jsonl = data.make_phantoms(str(root / "phantoms"), 0, 40)
    records = data.read_records(jsonl)
    net, processor = sft.build_tiny([rewards.question_text(r) + " " + rewards.answer_text(r) for r in records],
                                  {x for r in records for x in r["options"]}, image_size=data.SIZE)
    folder = root / "tiny"
    folder.mkdir()
    M.save(net, processor, str(folder))
    rng, mixed = np.random.default_rng(0), []
    for i, (w, h) in enumerate(SIZES):
        path = root / f"{w}x{h}.png"
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)
        mixed.append(records[i] | dict(path=str(path), id=path.stem, question=records[i]["question"] + " Look well." * i))
    return World(jsonl, records, net, processor, str(folder), mixed)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def toy(monkeypatch):
    """Rewards that a random model has a spread of."""
    monkeypatch.setattr(rewards, "score", faults.toy_score)


def lines_of(out):
    """A run's metrics.jsonl."""
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def images_of(batch):
    """What a stock forward pass takes of a batch beside ids and mask."""
    if "pixel_values" not in batch:
        return {}
    return dict(pixel_values=torch.cat(batch["pixel_values"]), image_grid_thw=batch["image_grid_thw"])
