"""How long a Con-GRPO step takes and how much memory it needs, beside TRL's GRPOTrainer on the same work, as ratios.

    python tests/bench.py                                 # a step of 8 questions x 8 completions of 64 tokens, the tiny network
    pip install trl==1.16.0 datasets accelerate           # the peer, optional
    python tests/bench.py --peer trl                      # the same beside TRL: processes by turns, medians over --rounds
    python tests/bench.py --grow                          # the update for groups of 2..32 and images of 112..448 px
    python tests/bench.py --shape 3b --peer trl           # Qwen2.5-VL-3B's shape with random weights, LoRA 64: needs a GPU

Both sides start from the same saved folder and do all of a step: images read, completions of exactly --tokens tokens sampled
at temperature 1, two rewards or more, the reference's log-probabilities, one AdamW step on every completion. Ours is grpo.main
as it stands, timed from the end of a step to the end of the next. Memory is the most the process (on CUDA: its tensors) held in
a step. The rollout, images and prompts included, is held against the copy bandwidth measured here, in bytes that a token step
must read once (weights, keys and values); the update against the measured rate of matrix products, in the arithmetic it needs
(what is computed again does not count).
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

TEXT_3B = dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
               vocab_size=151936, max_position_embeddings=128000, rms_norm_eps=1e-6,
               rope_parameters=dict(rope_type="default", rope_theta=1000000.0, mrope_section=[16, 24, 24]))
VISION_3B = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, spatial_merge_size=2,
                 temporal_patch_size=2, window_size=112, out_hidden_size=2048, fullatt_block_indexes=[7, 15, 23, 31])
SHAPES = dict(  # defaults of the other knobs
    tiny=dict(layers=4, size=112, tokens=64, lora=0),
    **{"3b": dict(layers=36, size=392, tokens=256, lora=64)})

def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=list(SHAPES), default="tiny", help="of the network")
    p.add_argument("--peer", choices=["trl"], help="run this beside, by turns")
    p.add_argument("--grow", action="store_true", help="how the update's time grows with G and the image, and nothing else")
    p.add_argument("--questions", type=int, default=8, help="a step")
    p.add_argument("--G", type=int, default=8, help="completions a question")
    p.add_argument("--tokens", type=int, help="tokens per completion, exactly [tiny 64, 3b 256]")
    p.add_argument("--size", type=int, help="px, side of the image [tiny 112, 3b 392]")
    p.add_argument("--layers", type=int, help="of the language model [tiny 4, 3b 36]; fewer to try the script out")
    p.add_argument("--lora", type=int, help="rank on the language model, 0 = every parameter is trained [tiny 0, 3b 64]")
    p.add_argument("--threads", type=int, default=2, help="of the CPU, on both sides")
    p.add_argument("--steps", type=int, default=5, help="measured, of each process")
    p.add_argument("--warmup", type=int, default=2, help="steps before them")
    p.add_argument("--rounds", type=int, default=5, help="processes of each side")
    p.add_argument("--micro_tokens", type=int, default=8192, help="grpo.py's")
    p.add_argument("--checkpointing", action="store_true", help="on both sides")
    p.add_argument("--json", default="bench.json", help="where the figures go")
    p.add_argument("--side", choices=["ours", "trl"], help=argparse.SUPPRESS)  # this is a process of that side
    p.add_argument("--folder", help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    for name, value in SHAPES[a.shape].items():
        setattr(a, name, value if getattr(a, name) is None else getattr(a, name))
    return a

def make_work(a, folder):
    """The network with random weights, its processor, and --questions records for each step: the same for both sides."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    import data
    import model as M
    import rewards
    import sft
    rng, records = np.random.default_rng(0), []
    for i in range(a.questions * (a.steps + a.warmup)):
        image, facts = data.draw_phantom(rng, *data.PAIRS[0])
        Image.fromarray(image).resize((a.size, a.size)).save(Path(folder, f"{i}.png"))
        records.append(dict(id=str(i), image=f"{i}.png", modality="CT", anatomy="Liver", task="anomaly", source="bench",
                            question="Is there anything in this picture that a healthy organ would not show?",
                            options=["Normal", "Abnormal", "Artifact", "Uncertain"], answer="AB"[i % 2], thought=None,
                            group=str(i), split="train"))
    data.write_records(records, Path(folder, "records.jsonl"))
    net, processor = sft.build_tiny([rewards.question_text(r) for r in records[:50]], image_size=a.size)
    config = net.config.to_dict()
    if a.shape == "3b":
        config["text_config"] |= TEXT_3B
        config["vision_config"] |= VISION_3B
    config["text_config"] |= dict(num_hidden_layers=a.layers, layer_types=["full_attention"] * a.layers)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if a.shape == "3b" else torch.float32)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        net = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    torch.set_default_dtype(torch.float32)
    net.generation_config.eos_token_id = net.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    M.save(net, processor, folder)
    del net
    torch.cuda.empty_cache()  # this process has no more use for it, those that are measured have
    Path(folder, "chat_template.jinja").write_text(sft.CHAT_TEMPLATE)

# --------------------------------------------------------------------------------------------------- a process of either side

def ours(a):
    """grpo.main, its completions kept from stopping early -> seconds per step, and the last lines of its metrics."""
    import torch

    import grpo
    import model as M
    import sft
    torch.set_num_threads(a.threads)
    encode, log, ends = M.encode, sft.log, []
    M.encode = lambda *args: encode(*args) | dict(stop_ids=M.never_drawn(network)[:1])  # a token that can't come
    load = M.load

    def loading(*args, **kwargs):
        nonlocal network
        network, processor = load(*args, **kwargs)
        return network, processor

    def logging(out, **figures):
        ends.append((time.perf_counter(), figures))
        log(out, **figures)
    network, M.load, sft.log = None, loading, logging
    sft.Run.save = lambda run: None
    grpo.main(["--model", a.folder, "--data", f"{a.folder}/records.jsonl", "--out", f"{a.folder}/run-{os.getpid()}", "--preset",
               "tiny", "--no-drop_no_spread",
               "--batch", str(a.questions * a.G), "--G", str(a.G), "--max_new_tokens", str(a.tokens), "--beta", "0.04",
               "--lora", str(a.lora), "--lr", "1e-5", "--epochs", "1", "--micro_tokens", str(a.micro_tokens),
               "--show_every", "100", *["--checkpointing"] * a.checkpointing])
    kept = [figures for _, figures in ends][a.warmup:]
    assert all(f["length"] == a.tokens for f in kept), "a completion stopped early"
    median = lambda key: statistics.median(f[key] for f in kept)  # noqa: E731
    out = dict(seconds=[y - x for (x, _), (y, _) in zip(ends[a.warmup - 1:], ends[a.warmup:], strict=False)],
               split={k: median(f"seconds_{k}") for k in ("rollout", "reference", "judge", "update")},
               peak_mb=max(v for f in kept for k, v in f.items() if k.startswith("peak_mb")),
               peaks={k: max(f[f"peak_mb_{k}"] for f in kept) for k in ("rollout", "reference", "update")})
    return out | roofline(a, network, out["split"])

def roofline(a, net, split):
    """What decoding and the update reach of what this machine measured here does: bytes and operations per second."""
    import torch
    device, n = net.device, 2**28 if net.device.type == "cuda" else 2**25
    dtype, k = (torch.bfloat16, 8192) if net.device.type == "cuda" else (torch.float32, 1024)

    def rate(f, work):
        best = 0.0
        for _ in range(5):
            began = time.perf_counter()
            f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, work / (time.perf_counter() - began))
        return best
    x, y, m = torch.ones(n, device=device), torch.empty(n, device=device), torch.randn(k, k, device=device, dtype=dtype)
    copied, multiplied = rate(lambda: y.copy_(x), 2 * x.nbytes), rate(lambda: m @ m, 2 * k**3)
    text = net.config.get_text_config()
    language = sum(p.numel() for p in net.model.language_model.parameters())  # the embedding, too, which is the head as well
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    prompt = 70 + (a.size // 28)**2                           # tokens, about
    a_place = 2 * text.num_hidden_layers * text.num_key_value_heads * head * net.dtype.itemsize
    read = language * net.dtype.itemsize + a.questions * a.G * (prompt + a.tokens / 2) * a_place
    passes = 2 * (2 if a.lora else 3)                         # forward, and backward for activations (and weights)
    needed = passes * language * a.questions * (prompt + a.G * a.tokens)
    return dict(copy_gb_s=copied / 1e9, matrix_tflop_s=multiplied / 1e12,
                decode_share_of_copy=read * a.tokens / split["rollout"] / copied,
                update_share_of_matrix=needed / split["update"] / multiplied)

def trl(a):
    """TRL's GRPOTrainer on the same records -> seconds per step and peak memory."""
    import contextlib
    import io

    import torch
    from PIL import Image
    from transformers import Qwen2_5_VLProcessor, TrainerCallback
    from transformers.processing_utils import ProcessorMixin

    import data
    import model as M
    import sft
    from rewards import question_text
    try:
        import trl as peer
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as e:
        raise SystemExit(f"--peer trl needs `pip install trl==1.16.0 datasets accelerate` ({e})") from None

    class Processor(Qwen2_5_VLProcessor):
        """The stock one without its video part, which needs torchvision: parts are read off the names of __init__."""
        def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **_):
            self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    torch.set_num_threads(a.threads)
    cuda, rows = torch.cuda.is_available(), a.questions * a.G
    while cuda and rows > max(1, a.micro_tokens // (70 + (a.size // 28)**2 + a.tokens)):  # as many tokens a pass as ours
        rows //= 2
    _, parts = M.load(a.folder)
    processor = Processor(parts.image_processor, parts.tokenizer, chat_template=sft.CHAT_TEMPLATE)
    records = data.read_records([f"{a.folder}/records.jsonl"], "train")
    examples = [dict(prompt=[dict(role="user", content=question_text(r))], image=Image.open(r["path"]),
                     answer=r["answer"])
                for r in records]
    text = lambda completion: completion[0]["content"]  # noqa: E731

    def format_reward(completions, **_):
        return [float(text(c).startswith("<think>")) for c in completions]

    def accuracy_reward(completions, answer, **_):
        return [float(f"<answer>{x}" in text(c)) for c, x in zip(completions, answer, strict=True)]

    ends, peaks = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            if cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            peaks.append(M.peak_memory(torch.device("cuda" if cuda else "cpu")))
    peft = {}
    if a.lora:
        from peft import LoraConfig
        peft = dict(peft_config=LoraConfig(r=a.lora, lora_alpha=2 * a.lora, target_modules=M.LORA_TARGETS))
    config = GRPOConfig(
        output_dir=f"{a.folder}/trl", per_device_train_batch_size=rows, num_generations=a.G,
        gradient_accumulation_steps=a.questions * a.G // rows, max_completion_length=a.tokens,
        generation_kwargs=dict(min_new_tokens=a.tokens), temperature=1.0, beta=0.04, epsilon=0.2, loss_type="grpo",
        learning_rate=1e-5, lr_scheduler_type="constant", max_grad_norm=1.0, max_steps=a.steps + a.warmup, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=not cuda, bf16=cuda, gradient_checkpointing=a.checkpointing, seed=0,
        disable_tqdm=True, model_init_kwargs=dict(dtype="bfloat16" if cuda and a.lora else "float32"))
    trainer = GRPOTrainer(model=a.folder, processing_class=processor, args=config, train_dataset=Dataset.from_list(examples),
                          reward_funcs=[format_reward, accuracy_reward], callbacks=[Clock()], **peft)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its log
        trainer.train()
    lengths = [x["completions/mean_length"] for x in trainer.state.log_history if "completions/mean_length" in x]
    assert lengths and all(x == a.tokens for x in lengths), f"a completion stopped early: {lengths}"
    return dict(seconds=[y - x for x, y in zip(ends[a.warmup - 1:], ends[a.warmup:], strict=False)],
                peak_mb=max(peaks[a.warmup:]), version=peer.__version__)

# --------------------------------------------------------------------------------------------------------------- the two tables

def compare(a, argv):
    """Processes of both sides by turns -> the figures, printed as a table."""
    sides = ["ours"] + [a.peer] * bool(a.peer)
    runs = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        make_work(a, folder)
        for k in range(a.rounds):
            for side in sides if k % 2 == 0 else sides[::-1]:
                command = [sys.executable, __file__, *argv, "--side", side, "--folder", folder]
                environment = dict(os.environ, OMP_NUM_THREADS=str(a.threads))
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
                runs[side].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"round {k + 1}, {side}: {statistics.median(runs[side][-1]['seconds']):.3f} s per step", file=sys.stderr)
    out = dict(knobs=vars(a), runs=runs)
    for side in sides:
        steps = [statistics.median(r["seconds"]) for r in runs[side]]
        out[side] = dict(seconds=statistics.median(steps), least=min(steps), most=max(steps),
                         peak_mb=statistics.median(r["peak_mb"] for r in runs[side]))
        out[side]["tokens_per_second"] = a.questions * a.G * a.tokens / out[side]["seconds"]
    print("| | seconds per step (median of rounds; least, most) | completion tokens per second | peak memory, MB |\n|---|---|---|---|")
    for side in sides:
        s = out[side]
        version = f" {runs[side][0]['version']}" if "version" in runs[side][0] else ""
        print(f"| {side}{version} | {s['seconds']:.3f} ({s['least']:.3f}, {s['most']:.3f}) | {s['tokens_per_second']:.0f} | "
              f"{s['peak_mb']:.0f} |")
    if a.peer:
        x, y = out["ours"], out[a.peer]
        out["ratio"] = dict(speed=y["seconds"] / x["seconds"], memory=x["peak_mb"] / y["peak_mb"])
        print(f"\n{out['ratio']['speed']:.2f} times the peer's steps per second, {out['ratio']['memory']:.2f} of its memory")
    mid = lambda *keys: statistics.median(r[keys[0]][keys[1]] if len(keys) > 1 else r[keys[0]] for r in runs["ours"])  # noqa: E731
    print("ours: " + ", ".join(f"{k} {mid('split', k):.3f} s" for k in runs["ours"][0]["split"])
          + "; peak MB " + ", ".join(f"{k} {mid('peaks', k):.0f}" for k in runs["ours"][0]["peaks"]))
    print(f"decoding reads {100 * mid('decode_share_of_copy'):.1f} % of the copy bandwidth ({mid('copy_gb_s'):.0f} GB/s)\n"
          f"the update computes {100 * mid('update_share_of_matrix'):.1f} % of the matrix rate "
          f"({mid('matrix_tflop_s'):.3f} TFLOP/s)")
    Path(a.json).write_text(json.dumps(out, indent=1))

def grow(a):
    """The update's seconds (forward and backward) for groups and images that grow: one row per group beside one per completion."""
    import torch

    import data
    import model as M
    torch.set_num_threads(a.threads)
    out, (*_, device) = [], M.setup_devices()
    print("| G | image, px | prompt, tokens | one row per group, s | one row per completion, s | ratio of times | of tokens |\n"
          "|---|---|---|---|---|---|---|")
    for G, size in [(G, 112) for G in (2, 4, 8, 16, 32)] + [(8, size) for size in (224, 336, 448)]:
        with tempfile.TemporaryDirectory() as folder:
            make_work(argparse.Namespace(**vars(a) | dict(size=size, steps=1, warmup=0)), folder)
            net, processor = M.load(folder, device=device)
            batch = M.encode(processor, data.read_records([f"{folder}/records.jsonl"], "train"), device)
        P, generator = batch["input_ids"].shape[1], torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 256, (a.questions, G, a.tokens), generator=generator).to(device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        single = [(M.rows_of(batch, slice(i, i + 1)), tokens[i:i + 1, g:g + 1]) for i in range(a.questions) for g in range(G)]
        alone = M.rows_of(batch, slice(0, 1))
        repeated = dict(alone, input_ids=torch.cat([b["input_ids"] for b, _ in single]),
                        attention_mask=torch.cat([b["attention_mask"] for b, _ in single]),
                        pixel_values=[b["pixel_values"][0] for b, _ in single],
                        image_grid_thw=torch.cat([b["image_grid_thw"] for b, _ in single]))
        flat, whole = tokens.flatten(0, 1)[:, None], mask.flatten(0, 1)[:, None]

        def update(batch, tokens, mask, net=net):
            began = time.perf_counter()
            M.token_logprobs(net, batch, tokens, mask).sum().backward()
            net.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began
        times = [(update(batch, tokens, mask), update(repeated, flat, whole)) for _ in range(a.rounds + 1)][1:]
        group, each = (statistics.median(x) for x in zip(*times, strict=True))
        out.append(dict(G=G, size=size, prompt=P, group=group, each=each,
                        tokens=(P + G * a.tokens) / (G * (P + a.tokens))))
        print(f"| {G} | {size} | {P} | {group:.3f} | {each:.3f} | {group / each:.2f} | {out[-1]['tokens']:.2f} |", flush=True)
    Path(a.json).write_text(json.dumps(out, indent=1))

def main(argv):
    a = parse(argv)
    if a.side:
        print(json.dumps({"ours": ours, "trl": trl}[a.side](a)))
    elif a.grow:
        grow(a)
    else:
        compare(a, argv)

if __name__ == "__main__":
    main(sys.argv[1:])
