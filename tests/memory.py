"""What model.memory says beside what a process measured, and README's table of cards.

    python tests/memory.py                   # the tiny network's text model on this CPU, each setting in a process of its own
    python tests/memory.py --table CONFIG    # Qwen2.5-VL-3B's config.json: 3B, 7B and 72B on cards of 24, 40, 80 and 141 GB
"""
import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

SETTINGS = (  # stage, LoRA, checkpointing, questions in a pass, G, tokens of a completion, px, vocabulary
    ("sft", 0, 0, 32, 1, 256, 112, 1000), ("sft", 0, 1, 64, 1, 256, 112, 1000), ("sft", 16, 0, 32, 1, 256, 112, 1000),
    ("sft", 16, 0, 2, 1, 256, 112, 100_000), ("sft", 0, 0, 32, 1, 32, 448, 1000), ("grpo", 0, 0, 8, 8, 128, 112, 1000),
    ("grpo", 16, 1, 8, 8, 128, 112, 1000), ("grpo", 0, 1, 8, 8, 128, 224, 1000))
CARDS = (24, 40, 80, 141)  # GB
ROOM = 2                   # GB of a card that CUDA and its allocator take
SHAPES = {"3B": {}, "7B": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                               intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False),
          "72B": dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
                      intermediate_size=29568, vocab_size=152064, tie_word_embeddings=False)}


def peaks(stage, lora, checkpointing, N, G, T, size, vocabulary):
    """-> dict: bytes over what the process held before, measured and said, of the update and (grpo) of sampling."""
    import torch
    import transformers

    import data
    import model as M
    import sft
    torch.set_num_threads(1)
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once, so that a peak is the tensors'
    net, processor = sft.build_tiny(["a b"], image_size=size)
    config = net.config.to_dict()
    config["text_config"] |= dict(vocab_size=vocabulary)
    net = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**config)).eval()
    net.set_attn_implementation(M.ATTENTION)
    knobs = argparse.Namespace(lora=lora, seed=0, checkpointing=bool(checkpointing), lr=1e-4, weight_decay=0.0, fixed={})
    policy, optimizer = sft.trainable(net, knobs)
    image = processor.image_processor(images=[data.Image.new("RGB", (size, size))], return_tensors="pt")
    image = image["pixel_values"], image["image_grid_thw"]
    batch = M.tensors(processor, ["a b " * 20] * N, [image] * N)
    if lora:
        batch = M.with_image_features(policy, batch)
    prompt, tokens = batch["input_ids"].shape[1], torch.randint(0, 200, (N, G, T))

    def measured(work):
        gc.collect()
        libc.malloc_trim(0)
        before = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024
        M.peak_memory(torch.device("cpu"))
        work()
        return M.peak_memory(torch.device("cpu")) * 2**20 - before
    said = M.memory(M.without_weights(M.network(policy).config), cuda=False, world=1, lora=lora, checkpointing=bool(checkpointing),
                    sampled=N if stage == "grpo" else 0, micro=N, G=G, image=size**2 // 784, prompt=prompt, T=T)

    def update(rows):
        part = tokens[rows]
        M.token_logprobs(policy, M.rows_of(batch, rows), part, torch.ones_like(part, dtype=torch.bool)).sum().backward()
    update([0])  # what is loaded or kept from the first pass on is no pass's
    optimizer.zero_grad()
    out = dict(update=(measured(lambda: update(list(range(N)))), said["gradients"] + said["activations"]))
    if stage == "grpo":
        batch["stop_ids"] = M.never_drawn(M.network(policy))[:1]
        optimizer.zero_grad()
        out["sampling"] = (measured(lambda: M.sample(policy, batch, group_size=G, max_new_tokens=T)), said["cache"] + said["sampling"])
    return out


def compare():
    print("| setting (stage, LoRA, checkpointing, questions, G, T, px, vocabulary) | part | measured, MB | said, MB | ratio |\n"
          "|---|---|---:|---:|---:|")
    for setting in SETTINGS:
        done = subprocess.run([sys.executable, __file__, "--one", *map(str, setting)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        for part, (measured, said) in json.loads(done.stdout.splitlines()[-1]).items():
            print(f"| {', '.join(map(str, setting))} | {part} | {measured / 1e6:.0f} | {said / 1e6:.0f} | {said / measured:.2f} |", flush=True)


def table(path):
    """For each model, stage and card: the smallest number of cards (powers of two to 64) on which the paper preset fits."""
    import transformers

    import grpo
    import model as M
    import sft
    print("| model | stage | " + " | ".join(f"{card} GB" for card in CARDS) + " | GB on one card, on eight |\n|---|---|" + "---|" * (len(CARDS) + 1))
    for size, shape in SHAPES.items():
        config = json.loads(Path(path).read_text()) | shape
        config["vision_config"]["out_hidden_size"] = config["hidden_size"]
        config.pop("transformers_version")
        net = M.without_weights(transformers.AutoConfig.for_model(**config))
        for lora in (64, 0):
            for stage, module in (("sft.py", sft), ("grpo.py", grpo)):
                knobs = argparse.Namespace(**{k: v.paper for k, v in module.KNOBS.items()} | dict(preset="paper", lora=lora))
                cells = []
                for card in CARDS:
                    cells.append("-")
                    for least, changed in (("", {}), (" *", dict(micro_tokens=1, micro_batch=1, max_pixels=knobs.max_pixels // 2))):
                        worlds = [w for w in (1, 2, 4, 8) if sft.memory_gb(net, knobs, world=w, **changed)["peak"] + ROOM <= card]
                        if worlds:
                            cells[-1] = f"{worlds[0]}{least}"
                            break
                one, eight = (sft.memory_gb(net, knobs, world=w)["peak"] for w in (1, 8))
                print(f"| {size} {'LoRA' if lora else 'full'} | {stage} | {' | '.join(cells)} | {one:.0f}, {eight:.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(peaks(sys.argv[2], *map(int, sys.argv[3:]))))
    elif sys.argv[1:2] == ["--table"]:
        table(sys.argv[2])
    else:
        compare()
