"""Stage 1, Cognitive Injection: supervised fine-tuning on think-then-answer targets, Eq. (1).

With no model named it starts from nothing: it draws the phantoms (data.py), makes a tiny base model that knows letters and half
sees (`make_base`, kept in ROOT/tiny-base), and fine-tunes that. With --model and --data it is the real thing.

    python sft.py                                                                    # out/phantoms, out/tiny-base, out/sft
    python sft.py --model Qwen/Qwen2.5-VL-3B-Instruct --data medad38k/medad38k.jsonl
    torchrun --nproc_per_node=4 sft.py --model ...                                   # the same global batch on four devices
    python sft.py --print                                                            # every knob as it would be used

Left out on purpose: evaluation in the loop (eval.py does it), early stopping, packing of several questions into one row.
"""
import argparse
import json
import math
import os
import re
import time
from collections import defaultdict

import numpy as np
import torch
import transformers
from tqdm import tqdm

import data
import eval as evaluation
import model as M
import rewards
from data import DataError
from judge import make_judge

# name: (tiny preset, paper preset, unit and meaning [, choices]). The paper's figures are those of its section 4.1.
KNOBS = dict(
    model=(None, None, "folder or hub name of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL (default: ROOT/tiny-base, made here)"),
    data=((), (), "files of records, .jsonl or Med-R1's .json (default: ROOT/phantoms, drawn here)"),
    only=((), (), "train on those of their records with KEY=VALUE, say modality=CT task=anatomy"),
    thinking=("before", "before", "where the thought is, before or after the answer, or none (Med-R1)",
              [*rewards.INSTRUCTIONS]),
    root=("out", "out", "folder under which everything is written"),
    out=(None, None, "folder of this run (default: ROOT/sft)"),
    seed=(0, 0, "seed of phantoms, base, LoRA and the order of the questions"),
    images=(1400, 1400, "phantoms to draw, 70 %% of them to train on"),
    thoughts=(60, 60, "train images of them with chains of thought; the others have answers alone"),
    epochs=(18.0, 2.0, "passes over the training questions that have a thought (paper: 2)"),
    batch=(32, 64, "questions an optimiser step over all processes (paper: global batch 64)"),
    micro_batch=(32, 8, "questions a forward pass on one device; memory, not the result, depends on it"),
    checkpointing=(False, True, "compute layers again in the backward pass rather than keep what they made: memory for time"),
    lr=(1e-3, 1e-4, "peak learning rate of AdamW (paper: 1e-4)"),
    warmup=(0.03, 0.03, "share of the steps in which the learning rate rises; a cosine to 0 follows"),
    weight_decay=(0.0, 0.0, "AdamW's decoupled weight decay"),
    clip=(1.0, 1.0, "gradient norm above which the gradient is scaled down"),
    lora=(0, 64, "rank of LoRA on the language model; 0 trains every parameter"),
    max_pixels=(M.MAX_PIXELS, M.MAX_PIXELS, "pixels above which an image is shrunk"),
    max_steps=(0, 0, "stop after so many optimiser steps, 0 = as many as epochs say (the schedule is that of the whole run)"),
    eval_every=(0, 0, "optimiser steps between evaluations on held-out questions, 0 = never; nothing is selected by them"),
    eval_questions=(200, 200, "held-out questions of such an evaluation"),
    save_every=(0, 200, "optimiser steps between checkpoints, 0 = at the end alone"),
    resume=(False, False, "continue the run in --out from its last checkpoint"),
)
POSITIVE = ("batch", "micro_batch", "micro_tokens", "lr", "epochs", "G", "max_new_tokens", "mu", "temperature", "top_p",
            "max_pixels", "judge_concurrency", "judge_timeout", "judge_window")
BETAS = (0.9, 0.98)  # of AdamW in every stage
FREE = ("resume", "max_steps", "save_every", "show_every", "eval_every", "eval_questions", "print", "out", "root", "model",
        "data", "judge_concurrency", "judge_timeout", "judge_failures", "judge_window")  # knobs that a resumed run may change

# --------------------------------------------------------------------------------------------- knobs and runs, for both stages

def knobs(table, doc, argv=None):
    """The command line of a stage -> Namespace. Preset `tiny` where no model is named, or one as small as make_base's."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: (_ for _ in ()).throw(DataError(message))
    for name, (tiny, paper, meaning, *choices) in table.items():
        default = f"[{tiny}]" if tiny == paper else f"[tiny {tiny}, paper {paper}]"
        kind = dict(type=str if tiny is None else type(tiny), choices=next(iter(choices), None))
        kind = dict(action="store_true") if tiny is False else kind
        if isinstance(tiny, tuple):
            kind = dict(nargs="+", type=type(tiny[0]) if tiny else str)
        parser.add_argument(f"--{name}", default=None, help=f"{meaning} {default}", **kind)
    parser.add_argument("--preset", choices=["tiny", "paper"], help="which defaults to take (chosen by the model if not given)")
    parser.add_argument("--print", action="store_true", help="print the knobs as they would be used, and stop")
    given = parser.parse_args(argv)
    given.preset = given.preset or ("tiny" if given.model is None or M.is_tiny(given.model) else "paper")
    for name, values in table.items():
        if getattr(given, name) is None:
            setattr(given, name, values[("tiny", "paper").index(given.preset)])
    for name in vars(given):
        value = getattr(given, name)
        if isinstance(value, float | int) and not 0 <= value < math.inf or value == 0 and name in POSITIVE:
            raise DataError(f"--{name} {value}: expected a number {'more than' if name in POSITIVE else 'of at least'} 0")
    data.expect(0 < getattr(given, "top_p", 1) <= 1, "--top_p: expected more than 0, at most 1")
    weights = getattr(given, "weights", (1, 1, 1))
    data.expect(len(weights) == 3 and sum(weights) > 0 and min(weights) >= 0,
                f"--weights {' '.join(map(str, weights))}: expected three numbers of at least 0, not all of them 0")
    if given.print:
        print(json.dumps(vars(given), indent=2))
        raise SystemExit(0)
    return given

def open_run(folder, args, rank):
    """Prepare a run's folder on rank 0. What an earlier run left there is moved aside, never overwritten."""
    if rank:
        return
    if os.path.exists(os.path.join(folder, "metrics.jsonl")) and not args.resume:
        print(f"{folder} held an earlier run: moved to {data.move_aside(folder)}")
    os.makedirs(folder, exist_ok=True)
    data.write_text(os.path.join(folder, "knobs.json"), json.dumps(vars(args), indent=2))

def log(folder, **figures):
    """Append one line to metrics.jsonl."""
    with open(os.path.join(folder, "metrics.jsonl"), "a") as f:
        f.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()}) + "\n")

def save_state(args, policy, optimizer, step):
    """What a resumed run needs and the folder's weights may not hold. The order of the questions and the sampling are functions
    of seed and step, so there is no other random state."""
    path, knobs = os.path.join(args.out, "state.pt"), {k: v for k, v in vars(args).items() if k not in FREE}
    try:
        torch.save(dict(trained=trained(policy), optimizer=optimizer.state_dict(), step=step, knobs=knobs), path + ".writing")
    except RuntimeError as e:  # an OSError in disguise
        raise DataError(f"{path}.writing can't be written: {str(e).splitlines()[0]}") from e
    os.replace(path + ".writing", path)

def load_state(args, policy, optimizer, rank):
    """Put a checkpoint's weights and optimiser state back, and drop the lines of metrics.jsonl and completions.jsonl that will
    be written again -> the step the checkpoint was taken after."""
    path = os.path.join(args.out, "state.pt")
    data.expect(os.path.exists(path), f"{args.out}: nothing to resume: there is no state.pt")
    state = torch.load(path, weights_only=True)
    for k, v in state["knobs"].items():
        data.expect(getattr(args, k) == v, f"{args.out}: the run to resume had --{k} {v}, not {getattr(args, k)}")
    policy.load_state_dict(state["trained"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    for path in (os.path.join(args.out, name) for name in ("metrics.jsonl", "completions.jsonl")):
        if rank == 0 and os.path.exists(path):
            with open(path) as f:
                kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= state["step"]]
            data.write_text(path, "".join(kept))
    return state["step"]

def trained(policy):
    """The parameters that are trained, by name: what a checkpoint must hold to go on bit for bit."""
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}

def trainable(policy, args):
    """LoRA of rank --lora, or every parameter, to be trained -> policy, its trained parameters, their optimiser."""
    policy = M.add_lora(policy, args.lora, args.seed) if args.lora else policy.requires_grad_(True)
    if args.checkpointing:
        M.enable_checkpointing(policy)
    parameters = list(trained(policy).values())
    return policy, parameters, torch.optim.AdamW(parameters, lr=args.lr, betas=BETAS, weight_decay=args.weight_decay)

def learning_rate(step, steps, peak, warmup):
    """Linear rise over warmup * steps, then a cosine to 0. `step` counts from 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

def epoch_order(n, epoch, seed):
    """The order of n questions in an epoch, a function of the seed alone: a resumed run needs no state for it."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 100_003 + epoch)).tolist()

def held_out_questions(args):
    """--eval_questions of the records of split "val", or of "test" where there is no "val", to look
    at while a run goes on. Nothing is selected by them."""
    if not args.eval_every:
        return []
    records = data.read_records(args.data, None, args.only, args.thinking)
    held_out = [r for r in records if r["split"] == "val"]
    held_out = held_out or [r for r in records if r["split"] == "test"]
    data.expect(held_out, f"--eval_every: no held-out questions in {args.data}")
    return evaluation.subset(held_out, args.eval_questions)

# --------------------------------------------------------------------------------------------------------------------- Eq. (1)

def sft_loss(logp, mask, tokens_in_batch):
    """Eq. (1): L_SFT = - sum over (I, Q, Y*) of log pi_theta(Y* | I, Q), Y* = (T*, A*).

    logp (N, 1, T) float32 log-probabilities of the target's tokens, mask (N, 1, T). The sum is divided by the global batch's
    tokens, so that lr does not depend on the batch; the question, the image and the padding bear no loss.
    """
    return -(logp * mask).sum() / tokens_in_batch

# --------------------------------------------------------------------------------------------------------------- the tiny base

# A random network does not learn to name an option by its letter, nor to see, from think-then-answer targets alone: the few
# tokens that matter drown among the many that don't. Real base models bring both along; this makes a tiny one that does, half.
LETTER_STAGES = (*((n, 0) for n in (4, 8, 16, 32, 100)), *((100, s) for s in (8, 16, 32, 64)), (100, 0))  # (names, skip)
LIKENESS = 1.5           # factor on the keys and queries of the random network, see attend_to_the_same
LETTER_OWN = 16          # names from which on half of the prompts have the options of a record
LETTER_SOLVED = 0.75     # mean probability of the right letter at which the next stage begins
LETTER_FULL = 0.95       # that of the last stage, in full prompts
LETTER_BATCH = 16        # prompts a step; as many steps are needed with 24
LETTER_STEPS = 3000      # at most this many steps of letters alone
EYE_STEPS = 300          # steps of the vision tower under a linear head
WORDING_EVERY = 4        # steps of letters between batches of how thoughts are worded
READ_STEPS = 400         # steps of captions, of wording and of letters: how many sets how much the base can see
BASE_IMAGES = 1500       # phantoms for both, from a seed of their own: none is in train or test
EYE_BATCH = 48           # images a step
BASE_LR = 1e-3

def groups_of_four(processor, completions, from_end):
    """4n texts -> tokens, mask (n, 4, T), and the mask of one token of each, `from_end` places from its end: the letter."""
    tokens, mask = (x.view(len(completions) // 4, 4, -1) for x in M.encode_completions(processor, completions))
    return tokens, mask, torch.zeros_like(mask).scatter(-1, mask.sum(-1, keepdim=True) - from_end, True)

def letter_batch(processor, names, skip, records, full, rng, n):
    """n text-only prompts of four options, each with a group of four completions, one for each option: its name, then its
    letter: "cystB" or "cyst.</think><answer>B", by turns, for the way from name to letter is easier to find the shorter it is.
    The four share their prompt and don't see each other, so no letter can be guessed by elimination; up to `skip` positions
    between prompt and completion are left free, so that the distance doesn't matter. The options are four of `names`, or by
    turns, from LETTER_OWN names on, a record's own. `full`: the prompt is that record's question with these options, and its
    thought, all of it or the end, up to the conclusion.
    -> batch, tokens (n, 4, T), mask of the letters alone.
    """
    prompts, openings, completions = [], [], []
    for _ in range(n):
        r = rng.choice(records)
        own = len(names) >= LETTER_OWN and rng.random() < 0.5
        options = r["options"] if own else rng.choice(names, 4, replace=False).tolist()
        prompt, opening, between = "\n".join(map("{}) {}".format, "ABCD", options)), "", rng.choice(["", ".</think><answer>"])
        if full:
            sentences = r["thought"].removesuffix(f" {rewards.right_option(r)}.").split(". ")
            opening, between = "<think>" + ". ".join(sentences[rng.integers(len(sentences)):]), ".</think><answer>"
            prompt = rewards.question_text(dict(r, options=options))
        prompts.append(prompt)
        openings.append(opening)
        completions += [f" {x}{between}{letter}" for letter, x in zip("ABCD", options, strict=True)]
    tokens, _, letters = groups_of_four(processor, completions, 2)                         # the letter, then the stop token
    batch = M.tensors(processor, prompts, [None] * n, openings=openings)
    batch["skip"] = torch.from_numpy(rng.integers(0, skip + 1, n))
    return batch, tokens, letters

def blind_batch(processor, records, images, rng, n):
    """n records behind an image that isn't theirs (or none), each with four gold completions: one that concludes on each of its
    options. How thoughts are worded and how letters follow can be learned here, but nothing about images.
    -> batch, tokens (n, 4, T), mask, mask of the letters alone."""
    chosen, completions = [records[i] for i in rng.choice(len(records), n)], []
    for r in chosen:
        opening = r["thought"].removesuffix(f"{rewards.right_option(r)}.")
        completions += [rewards.answer_text(dict(r, thought=f"{opening}{x}.", answer=letter))
                        for letter, x in zip("ABCD", r["options"], strict=True)]
    tokens, mask, letters = groups_of_four(processor, completions, 3)              # the letter, then </answer> and stop
    others = [images[i] for i in rng.integers(0, len(images), n)] if images else [None] * n
    batch = M.tensors(processor, [rewards.question_text(r) for r in chosen], others)
    return batch, tokens, mask, letters

def base_phantoms(seed):
    """Phantoms of a seed of their own, none of them in train or test -> images (n) of uint8
    (112, 112, 3), labels (n, 3) of pair, style (0: none) and location (-100: none), captions of
    the lesions as short as can be ("" where there is none), and the records of all images."""
    images, labels, captions, records = [], [], [], []
    rng, decks = np.random.default_rng([seed, 1, 1]), defaultdict(list)
    for i in tqdm(range(BASE_IMAGES), desc="base: images", unit="image"):
        pair, lesion, label, caption = i % len(data.PAIRS), None, (0, -100), ""
        if rng.random() < 2 / 3:
            style, place = rng.integers(len(data.STYLES)), rng.integers(len(data.LOCATIONS))
            lesion = list(data.STYLES)[style], data.LOCATIONS[place]
            label = 1 + style, place
            caption = f" {data.STYLES[lesion[0]].split()[-1]} {lesion[1]}"
        pixels, facts = data.draw_phantom(rng, *data.PAIRS[pair], lesion)
        images.append(pixels)
        labels.append((pair, *label))
        captions.append(caption)
        records += data.phantom_records(facts, rng, f"base-{i}", "none.png", decks=decks)
    return images, torch.tensor(labels), captions, records

def open_eyes(net, images, labels, rng):
    """Train the vision tower alone: the mean of its tokens tells the pair, and each token the style of the lesion it shows, if
    any, under linear heads that are thrown away. One head for all places: a lesion looks alike wherever it lies."""
    rows, columns = (int(x) // net.config.vision_config.spatial_merge_size for x in images[0][1][0, 1:])
    y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    covers = torch.stack([((y[:, None] - b).abs().maximum((x - a).abs()) < 0.25).flatten()
                          for a, b in data.CENTERS.values()])                  # (locations, tokens)
    width = net.config.vision_config.out_hidden_size
    heads = torch.nn.ModuleList([torch.nn.Linear(width, len(data.PAIRS)), torch.nn.Linear(width, 1 + len(data.STYLES))])
    optimizer = torch.optim.AdamW([*net.model.visual.parameters(), *heads.parameters()], betas=BETAS, weight_decay=0.0)
    for k in (bar := tqdm(range(EYE_STEPS), desc="base: eyes", unit="step")):
        chosen = rng.integers(0, len(images), EYE_BATCH)
        pair, style, place = labels[chosen].T                                              # (n,) each
        seen = net.model.get_image_features(*(torch.cat([images[i][j] for i in chosen]) for j in (0, 1)))
        seen = torch.stack(list(seen.pooler_output))                                       # (n, tokens, d)
        shown = torch.where(covers[place.clamp(min=0)] & (place >= 0)[:, None], style[:, None], 0)   # (n, tokens)
        loss = (torch.nn.functional.cross_entropy(heads[0](seen.mean(1)), pair)
                + 4 * torch.nn.functional.cross_entropy(heads[1](seen).flatten(0, 1), shown.flatten()))
        descend(optimizer, loss, k, 2 * BASE_LR)
        bar.set_postfix(loss=f"{loss.item():.2f}")

def learn_letters(net, processor, names, records, rng):
    """Name an option by its letter: LETTER_STAGES, each until LETTER_SOLVED. Meanwhile also how thoughts are worded."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=BASE_LR, betas=BETAS, weight_decay=0.0)
    stage, right = 0, 0.25
    for k in (bar := tqdm(range(LETTER_STEPS), desc="base: letters", unit="step")):
        n, skip = LETTER_STAGES[stage]
        full = stage + 1 == len(LETTER_STAGES)
        batch, tokens, letters = letter_batch(processor, names[:n], skip, records, full, rng, LETTER_BATCH)
        logp = M.token_logprobs(net, batch, tokens, letters)[letters]
        loss = -logp.mean()
        if k % WORDING_EVERY == 0:
            words, tokens, mask, _ = blind_batch(processor, records, None, rng, 8)
            wording = -M.token_logprobs(net, words, tokens, mask)[mask].mean()
            loss = loss + wording
        descend(optimizer, loss, k)
        right += 0.1 * (logp.detach().exp().mean().item() - right)
        bar.set_postfix(stage=f"{stage + 1}/{len(LETTER_STAGES)}", right=f"{right:.2f}", wording=f"{wording.item():.2f}")
        if right > (LETTER_FULL if full else LETTER_SOLVED):
            stage, right = stage + 1, 0.25
        if stage == len(LETTER_STAGES):
            return bar.close()

def learn_to_read(net, processor, records, images, captions, rng):
    """Say in three words what the eyes see, where every token counts; every other step also wording and letters, blind."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=BASE_LR, betas=BETAS, weight_decay=0.0)
    lesions = [i for i, caption in enumerate(captions) if caption]
    for k in (bar := tqdm(range(READ_STEPS), desc="base: reading", unit="step")):
        chosen = rng.choice(lesions, 32, replace=False)
        tokens, mask = M.encode_completions(processor, [captions[i] for i in chosen])
        seen = M.token_logprobs(net, M.tensors(processor, ["See."] * 32, [images[i] for i in chosen]), tokens, mask)[mask]
        loss = -seen.mean() * 3
        if k % 2:
            batch, tokens, mask, letters = blind_batch(processor, records, images, rng, 8)
            blind = M.token_logprobs(net, batch, tokens, mask)
            loss = loss - blind[letters].mean() - blind[mask].mean()
            bar.set_postfix(letters=f"{blind[letters].exp().mean().item():.2f}", wording=f"{-blind[mask].mean().item():.2f}",
                            seen=f"{-seen.mean().item():.2f}")
        descend(optimizer, loss, k)

def descend(optimizer, loss, k, lr=BASE_LR):
    """One optimiser step, the learning rate rising over the first 50."""
    optimizer.param_groups[0]["lr"] = lr * min(1, (k + 1) / 50)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()

def attend_to_the_same(net):
    """Start the language model's queries equal to its keys, and both larger: a token then attends to
    earlier tokens like itself, which is half of finding an option's name among the options. From
    the usual start some seeds need three times the steps or never get there (compare Trockman and
    Kolter 2023, Mimetic Initialization of Self-Attention Layers)."""
    for layer in net.model.language_model.layers:
        attention = layer.self_attn
        heads_per_key = attention.num_key_value_groups
        with torch.no_grad():
            k = attention.k_proj.weight.mul_(LIKENESS)                                   # (h*d, D)
            k = k.view(-1, attention.head_dim, k.shape[1])                               # (h, d, D)
            attention.q_proj.weight.copy_(k.repeat_interleave(heads_per_key, 0).flatten(0, 1))

# The tiny Qwen2.5-VL: 1.1 M parameters, the real architecture in small.
TINY_TEXT = dict(
    hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, rms_norm_eps=1e-6, initializer_range=0.05,
    rope_parameters=dict(rope_type="default", rope_theta=1000000.0, mrope_section=[4, 6, 6]))
TINY_VISION = dict(
    depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=14,
    spatial_merge_size=2, temporal_patch_size=2, window_size=112, out_hidden_size=128,
    fullatt_block_indexes=[1], initializer_range=0.05)
TINY_VOCABULARY = 1000  # tokens at most, special ones included: every word of the phantoms is one
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                  "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
TAG_TOKENS = ["<think>", "</think>", "<answer>", "</answer>"]  # one token each, as in Qwen3
CHAT_TEMPLATE = (  # Qwen2.5-VL's turns, for one image and text
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def tiny_tokenizer(texts, names):
    """A byte-level BPE tokenizer trained on `texts`. Each of `names` is one token, where Qwen's own
    tokenizer cuts between words: a network this small finds a name by its first token, and does not
    always learn to tell "Left Upper" from "Left Lower" by the second."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    longest_first = sorted(names, key=len, reverse=True)
    pieces = [rf" ?{re.escape(name)}(?!\w)" for name in longest_first]
    pieces += [r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)", r"\s+"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("|".join(pieces)), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    learned = TINY_VOCABULARY - len(SPECIAL_TOKENS + TAG_TOKENS)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=learned, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        padding_side="left")
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    tokenizer.add_tokens(TAG_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_tiny(texts, names=(), *, image_size, seed=0):
    """A tiny Qwen2.5-VL with random weights and its tokenizer -> (model, Processor)."""
    tokenizer = tiny_tokenizer(texts, names)
    text = dict(TINY_TEXT, vocab_size=len(tokenizer), bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=dict(TINY_VISION), tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"))
    torch.manual_seed(seed)
    net = transformers.Qwen2_5_VLForConditionalGeneration(config).float().eval()
    net.set_attn_implementation(M.ATTENTION)
    images = M.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=image_size**2)
    return net, M.Processor(tokenizer, images, "Qwen2_5_VLProcessor")


def make_base(folder, seed):
    """The tiny base of the phantoms, written to `folder`: letters, then eyes, then reading."""
    pixels, labels, captions, records = base_phantoms(seed)
    texts = [f"{rewards.question_text(r)} {rewards.answer_text(r)}" for r in records]
    names = sorted({o for r in records for o in r["options"]})
    net, processor = build_tiny(texts, names, image_size=data.SIZE, seed=seed)
    images = []
    for x in pixels:
        out = processor.image_processor(images=[x], return_tensors="pt")
        images.append((out["pixel_values"], out["image_grid_thw"]))
    attend_to_the_same(net)
    rng = np.random.default_rng([seed, 2])
    learn_letters(net, processor, rng.permutation(names), records, rng)
    open_eyes(net, images, labels, rng)
    learn_to_read(net, processor, records, images, captions, rng)
    M.save(net, processor, folder)
    data.write_text(os.path.join(folder, "base.json"), json.dumps(base_recipe(seed)))

def base_recipe(seed):
    stages = [list(stage) for stage in LETTER_STAGES]
    return dict(seed=seed, likeness=LIKENESS,
                letters=[stages, LETTER_OWN, LETTER_SOLVED, LETTER_FULL, LETTER_STEPS],
                wording=WORDING_EVERY, eyes=EYE_STEPS, reading=READ_STEPS, images=BASE_IMAGES)

def prepare_tiny(args, rank):
    """Phantoms and base under ROOT, made once -> (base folder, [data file])."""
    base = os.path.join(args.root, "tiny-base")
    recipe = os.path.join(base, "base.json")
    if rank == 0:
        phantoms = os.path.join(args.root, "phantoms")
        data.make_phantoms(phantoms, args.seed, args.images, args.thoughts)
    if rank == 0 and os.path.exists(recipe):
        with open(recipe) as f:
            data.expect(json.load(f) == base_recipe(args.seed),
                        f"{base} was made with another seed or recipe: remove it, or name another --root")
    elif rank == 0:
        make_base(base, args.seed)
    M.sum_over_ranks(0)  # the other processes wait here
    return base, [os.path.join(args.root, "phantoms", "phantoms.jsonl")]

# -------------------------------------------------------------------------------------------------------------------- the loop

def held_out_accuracy(policy, processor, records, args):
    """Greedy accuracy of the policy on this process's share of the held-out questions, over all
    processes."""
    limit = 80 if args.preset == "tiny" else 512  # tokens
    rows = evaluation.evaluate(policy, processor, records, make_judge(), max_new_tokens=limit,
                               progress=False)
    right = M.sum_over_ranks(sum(row["acc"] for row in rows))
    return right / M.sum_over_ranks(len(rows))

def with_thoughts(records, rank):
    """The records that supervised fine-tuning can learn from: those with a chain of thought, or
    all where no thought is asked for. How many are left out is told."""
    usable = [r for r in records if r["thought"] is not None or r.get("thinking") == "none"]
    data.expect(usable, f"none of the {len(records)} training questions has a thought, which "
                        "supervised fine-tuning needs (judge.py annotate writes them)")
    if rank == 0 and len(usable) < len(records):
        print(f"{len(usable)} training questions have a thought; {len(records) - len(usable)} "
              "have none and are left to grpo.py")
    return usable

def main(argv=None):
    args = knobs(KNOBS, __doc__, argv)
    args.out = args.out or os.path.join(args.root, "sft")
    rank, world, device = M.setup_devices()
    if args.model is None:
        args.model, made = prepare_tiny(args, rank)
        args.data = args.data or made
    if not args.data:
        raise DataError("--model was given without --data: name the files of records to train on")
    records = with_thoughts(data.read_records(args.data, "train", args.only, args.thinking), rank)
    data.expect(min(args.batch, len(records)) >= world, f"--batch {args.batch}: expected at least one question for each of the "
                                                        f"{world} processes ({len(records)} questions in all)")

    dtype = torch.bfloat16 if args.lora and device.type == "cuda" else torch.float32  # what is trained is kept in fp32
    held_out = held_out_questions(args)
    policy, processor = M.load(args.model, dtype=dtype, device=device, max_pixels=args.max_pixels)
    M.check_texts(processor, records, rewards.answer_text)
    open_run(args.out, args, rank)
    policy, parameters, optimizer = trainable(policy, args)
    steps = math.ceil(args.epochs * (epoch_steps := max(1, len(records) // args.batch)))
    start = load_state(args, policy, optimizer, rank) if args.resume else 0
    end = min(steps, args.max_steps or steps)

    bar = tqdm(range(start, end), initial=start, total=end, desc="sft", unit="step", disable=rank > 0)
    for step in bar:
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args.lr, args.warmup)

        # This step's questions: the same global batch whatever the number of processes, of which each takes every world-th.
        order = epoch_order(len(records), step // epoch_steps, args.seed)
        mine = [records[i] for i in order[step % epoch_steps * args.batch:][:args.batch]][rank::world]
        tokens, mask = M.encode_completions(processor, [rewards.answer_text(r) for r in mine], device)   # (n, 1, T)
        total = M.sum_over_ranks(int(mask.sum()))

        loss_sum = 0.0
        for i in range(0, len(mine), args.micro_batch):
            rows = slice(i, i + args.micro_batch)
            batch = M.encode(processor, mine[rows], device)
            logp = M.token_logprobs(policy, batch, tokens[rows], mask[rows])                         # (n, 1, T)
            loss = sft_loss(logp, mask[rows], total)                                                 # Eq. (1)
            loss.backward()
            loss_sum += loss.item()
        M.sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
        optimizer.step()
        optimizer.zero_grad()

        loss_sum, seconds, more = M.sum_over_ranks(loss_sum), time.perf_counter() - began, {}
        if args.eval_every and (step + 1) % args.eval_every == 0:
            more = dict(held_out_accuracy=held_out_accuracy(policy, processor, held_out[rank::world], args))
        bar.set_postfix(loss=f"{loss_sum:.3f}")
        if rank == 0:
            log(args.out, step=step + 1, loss=loss_sum, lr=optimizer.param_groups[0]["lr"], grad_norm=norm, tokens=int(total),
                seconds=seconds, **more)
            if step + 1 == end or args.save_every and (step + 1) % args.save_every == 0:
                M.save(policy, processor, args.out)
                save_state(args, policy, optimizer, step + 1)
    M.close_devices()

if __name__ == "__main__":
    data.cli(main)
