"""How long two processes of grpo.py wait for each other, by the way in which a rollout's questions are dealt.

    python tests/waiting.py    # three minutes on two cores

Phantoms' questions, half of them made longer by 5, 20 or 60 sentences; a random tiny network and a toy's rewards; three runs of
24 steps with each way, by turns. "by length" is grpo.questions_of, "every second" gives a process every second question."""
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import faults
import torch

import data
import grpo
import rewards

FLAGS = "--batch 64 --G 8 --max_new_tokens 32 --no-drop_no_spread --max_steps 24".split()


by_length = grpo.questions_of


def every_second(records, step, n, args, rank, world):
    """Of the same questions, without regard to length."""
    return by_length(records, step, n, args, 0, 1)[rank::world]


WAYS = {"every second": every_second, "by length": by_length}


def worker(way, *flags):
    torch.set_num_threads(1)
    rewards.score, grpo.questions_of = faults.toy_score, WAYS[way]
    grpo.main([*flags])


def waiting_share(out):
    """seconds_waiting as a share of all seconds, both means over the steps after the first two."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][2:]
    seconds = [sum(x for name, x in line.items() if name.startswith("seconds")) for line in lines]
    return fmean(line["seconds_waiting"] for line in lines) / fmean(seconds)


def main():
    shares, rng = {way: [] for way in WAYS}, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        *model, _, jsonl = faults.make_world(Path(folder))
        records = data.read_records(jsonl)
        for record in records:
            record["question"] += " Look at it well." * rng.choice([0, 0, 0, 5, 20, 60])
            del record["path"]
        longer = str(Path(jsonl).with_name("longer.jsonl"))
        data.write_records(records, longer)
        for turn in range(3):
            for way in WAYS:
                out = Path(folder, f"{way}-{turn}")
                subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__,
                                way, *model, "--data", longer, *FLAGS, "--out", out],
                               env=os.environ | dict(OMP_NUM_THREADS="1"), stderr=subprocess.DEVNULL, check=True)
                shares[way].append(waiting_share(out))
    for way, of in shares.items():
        print(f"{way:12}: {median(of):.1%} of a step is waiting ({', '.join(f'{x:.1%}' for x in of)})")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        worker(*sys.argv[1:])
    else:
        main()
