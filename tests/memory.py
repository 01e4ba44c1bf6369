"""How much memory a device needs: for a command line, beside what a process measured, and README's table of cards.

    python tests/memory.py grpo.py --model NAME [knobs]   # (or sft.py) GB, part by part, and the peak with one knob changed
    python tests/memory.py                   # the tiny network's text model on this CPU, each setting in a process of its own
    python tests/memory.py --table CONFIG    # Qwen2.5-VL-3B's config.json: 3B, 7B and 72B on cards of 24, 40, 80 and 141 GB
"""
import argparse
import copy
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

import data
import grpo
import model as M
import sft

TEXT_TOKENS, TARGET_TOKENS = 200, 256  # of a prompt and a target
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


def without_weights(config):
    """A network of sizes alone, which takes no memory."""
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(config)


def memory(net, *, cuda, world, lora, checkpointing, sampled, micro, G, image, prompt, T):
    """Bytes that a device needs, for `without_weights`' network: the parts, and "peak".

    world processes; `sampled` questions of G completions each are sampled at once on this one (0:
    sft.py, which has no reference either), `micro` are in a forward pass of the update; prompt and
    T: tokens of each. Allocator and CUDA itself, a GB or two, come on top."""
    text, vision = net.config.get_text_config(), net.model.visual.blocks
    L, D, I = text.num_hidden_layers, text.hidden_size, text.intermediate_size
    shared = text.num_attention_heads // text.num_key_value_heads
    K = net.model.language_model.layers[0].self_attn.k_proj.out_features  # a token's keys
    D_vision = vision[0].norm1.weight.numel()
    fp = 2 if cuda else 4  # bytes of a number in a matrix product

    policy = net
    if lora:
        with torch.device("meta"):  # 72B's adapter alone has a billion numbers
            policy = M.add_lora(copy.deepcopy(net), lora)
    sizes = [p.numel() for p in policy.parameters() if p.requires_grad]
    trained = sum(sizes)
    out = dict(weights=sum(p.numel() * (4 if p.requires_grad else fp) for p in policy.parameters()),
               reference=0, rounded_weights=0, gradients=4 * trained,
               moments=8 * max(trained // world, max(sizes)))  # AdamW's, shared out
    if sampled and not lora:
        matrices = sum(m.weight.numel() for m in M.matrices_of(net))
        out["reference"] = 4 * (trained - matrices) + fp * matrices
    if cuda and not lora:
        out["rounded_weights"] = 2 * trained  # autocast's

    # What a layer of a pass over t tokens keeps for the backward pass.
    t = micro * (prompt + G * T)
    layer = t * D * (2 if lora else 4) * 4  # norms, in fp32
    layer += t * (5 * D + 4 * I + 7 * lora) * fp  # inputs of products, SwiGLU
    layer += 2 * K * micro * (prompt + G * (prompt + T)) * fp  # keys, values
    layer += shared * micro * (prompt**2 + G * T * (prompt + T)) * fp  # masks
    patches = 0 if lora else 4 * image * micro  # 2 x 2 become a token; a frozen tower keeps none
    block = patches * D_vision * (16 + 18 * fp)
    kept, again = L * layer + len(vision) * block, 0
    if checkpointing:  # a layer's input alone
        kept = L * t * D * (fp if lora else 4) + len(vision) * patches * D_vision * 4
        again = max(layer, block)
    logits = 4 * 4 * min(micro * G * T * text.vocab_size, M.LOGIT_FLOATS)
    backward = again + t * (3 * I + 2 * D) * fp  # and a layer's gradients
    out["activations"] = kept + max(logits, backward)

    rows = sampled * G
    out["cache"] = 2 * (L + 1) * K * rows * (prompt + T) * fp  # one layer is copied
    out["sampling"] = 6 * 4 * rows * text.vocab_size  # logits and probabilities
    always = sum(out[part] for part in ("weights", "reference", "rounded_weights", "moments"))
    update = out["gradients"] + out["activations"]
    return dict(out, peak=always + max(update, out["cache"] + out["sampling"]))


def memory_gb(net, args, world, **changed):
    """What a device needs with these knobs, some of them changed, in GB (`paper`: on CUDA)."""
    k, vision = argparse.Namespace(**vars(args) | changed), net.config.vision_config
    image = k.max_pixels // (vision.patch_size * vision.spatial_merge_size)**2  # tokens
    prompt = image + TEXT_TOKENS
    if "G" in k:
        G, T, sampled = k.G, k.max_new_tokens, k.batch / k.G / world
        micro = k.micro_tokens // (prompt + G * T)
    else:
        G, T, sampled, micro = 1, TARGET_TOKENS, 0, k.micro_batch
    micro = max(1, min(micro, k.batch // G // world))
    needs = memory(net, cuda=k.preset == "paper", world=world, lora=k.lora, G=G, T=T, checkpointing=k.checkpointing,
                   sampled=sampled, micro=micro, image=image, prompt=prompt)
    return {part: round(n / 1e9, 1) for part, n in needs.items()}


def memory_of(module, flags):
    """The GB a device needs with a stage's flags, and the peak with one knob changed. The config alone is read."""
    args = sft.knobs(module.KNOBS, module.__doc__, flags)
    data.expect(args.model, "--model is missing: name a folder, or a model of the hub")
    net, world = without_weights(M.config_of(args.model)), int(os.environ.get("WORLD_SIZE", 1))
    pass_size = "micro_tokens" if "G" in args else "micro_batch"
    changes = {"checkpointing": True, "lora": 64, "max_pixels": args.max_pixels // 2, pass_size: 1}
    peaks = {}
    for name, value in changes.items():
        peaks[f"--{name} {value}"] = memory_gb(net, args, world, **{name: value})["peak"]
    peaks["twice the processes"] = memory_gb(net, args, 2 * world)["peak"]
    return dict(memory_gb=memory_gb(net, args, world), peak_gb_with=peaks)


def peaks(stage, lora, checkpointing, N, G, T, size, vocabulary):
    """-> dict: bytes over what the process held before, measured and said, of the update and (grpo) of sampling."""
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
    said = memory(without_weights(M.network(policy).config), cuda=False, world=1, lora=lora, checkpointing=bool(checkpointing),
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
    """For each model, stage and card: the smallest number of cards (1, 2, 4 or 8) on which the paper preset fits."""
    print("| model | stage | " + " | ".join(f"{card} GB" for card in CARDS) + " | GB on one card, on eight |\n|---|---|" + "---|" * (len(CARDS) + 1))
    for size, shape in SHAPES.items():
        config = json.loads(Path(path).read_text()) | shape
        config["vision_config"]["out_hidden_size"] = config["hidden_size"]
        config.pop("transformers_version")
        net = without_weights(transformers.AutoConfig.for_model(**config))
        for lora in (64, 0):
            for stage, module in (("sft.py", sft), ("grpo.py", grpo)):
                knobs = argparse.Namespace(**{k: v.paper for k, v in module.KNOBS.items()} | dict(preset="paper", lora=lora))
                cells = []
                for card in CARDS:
                    cells.append("-")
                    for least, changed in (("", {}), (" *", dict(micro_tokens=1, micro_batch=1, max_pixels=knobs.max_pixels // 2))):
                        worlds = [w for w in (1, 2, 4, 8) if memory_gb(net, knobs, world=w, **changed)["peak"] + ROOM <= card]
                        if worlds:
                            cells[-1] = f"{worlds[0]}{least}"
                            break
                one, eight = (memory_gb(net, knobs, world=w)["peak"] for w in (1, 8))
                print(f"| {size} {'LoRA' if lora else 'full'} | {stage} | {' | '.join(cells)} | {one:.0f}, {eight:.0f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(peaks(sys.argv[2], *map(int, sys.argv[3:]))))
    elif sys.argv[1:2] == ["--table"]:
        table(sys.argv[2])
    elif sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
    elif sys.argv[1:]:
        stage, *flags = sys.argv[1:]
        if stage not in ("sft.py", "grpo.py"):
            raise SystemExit(f"error: {stage}: expected sft.py or grpo.py, then its flags")
        data.cli(lambda: print(json.dumps(memory_of({"sft.py": sft, "grpo.py": grpo}[stage], flags), indent=2)))
    else:
        compare()
