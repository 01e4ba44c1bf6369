"""Stage 2, Reasoning Reinforcement: Con-GRPO, Eqs. (2), (7) and (8).

For each question the policy samples a group of G completions; each is scored for format, accuracy and consistency
(rewards.py, judge.py); a completion's advantage is its reward minus its group's mean; one clipped step follows, held to the SFT
policy by a KL penalty. The loop at the end of this file reads in that order.

    torchrun grpo.py                                              # the phantoms: from out/sft to out/grpo
    torchrun --nproc_per_node=8 grpo.py --model out/sft --data medad38k/medad38k.jsonl
    python grpo.py --model out/tiny-base --out out/rl-only        # Table 2's first row: no SFT (Med-R1's way)
    python grpo.py --weights 0 1 0                                # Table 2's Acc-only; 0 0 1 is Con-only, 0.8 0.1 0.1 Table 3's

Left out on purpose: a value network (the group's mean is the baseline), a replay buffer, sampling ahead of the update.
"""
import contextlib
import copy
import json
import os
import threading
import time
from collections import deque
from multiprocessing.pool import ThreadPool

import torch
from tqdm import tqdm

import data
import eval as evaluation
import model as M
import rewards
from data import DataError
from judge import failures, make_judge, parse_spec
from rewards import parse_completion, total_reward, visible_thought
from sft import (
    Knob,
    epoch_order,
    held_out_questions,
    knobs,
    load_state,
    log,
    open_run,
    save_state,
    trainable,
)

# The values of `paper` are those of the paper's section 4.1, where it gives them.
KNOBS = dict(
    model=Knob(str, None, None, "folder of pi_SFT, policy and reference alike (default: ROOT/sft)",
               may_change=True),
    data=Knob(str, (), (), "files of records, .jsonl or Med-R1's .json (default: ROOT/phantoms)",
              may_change=True),
    only=Knob(str, (), (), "train on records with KEY=VALUE, say modality=CT task=anatomy"),
    thinking=Knob(str, "before", "before", "where the thought is, before or after the answer, "
                  "or none (Med-R1)", choices=tuple(rewards.INSTRUCTIONS)),
    root=Knob(str, "out", "out", "folder under which everything is written", may_change=True),
    out=Knob(str, None, None, "folder of this run (default: ROOT/grpo)", may_change=True),
    seed=Knob(int, 0, 0, "seed of the sampling, of LoRA and of the order of the questions"),
    epochs=Knob(float, 1.0, 1.0, "passes over the training questions (paper: 1)", positive=True),
    batch=Knob(int, 128, 64, "completions per optimiser step over all processes "
               "(paper: global batch 64)", positive=True),
    drop_no_spread=Knob(bool, False, False, "leave groups whose rewards are all alike out of "
                        "reference and update (see group_spread)"),
    oversample=Knob(float, 1.0, 1.0, "questions sampled for each that is trained on, where "
                    "groups may be dropped"),
    G=Knob(int, 8, 8, "completions per question: the group (paper: G = 8)", positive=True),
    max_new_tokens=Knob(int, 80, 512, "tokens at which a completion is cut off", positive=True),
    temperature=Knob(float, 1.0, 1.0, "of the sampling; log-probabilities are those of the same "
                     "distribution", positive=True),
    top_p=Knob(float, 1.0, 1.0, "sample from the most likely tokens that hold this much "
               "probability; under 1 biases the ratio", positive=True),
    lr=Knob(float, 1e-3, 1e-6, "peak learning rate of AdamW (paper: 1e-6)", positive=True),
    schedule=Knob(str, "linear", "constant", "the learning rate after the warm-up: constant, or "
                  "falling to 0", choices=("constant", "linear")),
    warmup=Knob(int, 10, 10, "optimiser steps in which the learning rate rises"),
    weight_decay=Knob(float, 0.0, 0.0, "AdamW's decoupled weight decay"),
    clip=Knob(float, 1.0, 1.0, "gradient norm above which the gradient is scaled down"),
    ratio=Knob(str, "old", "sft", "denominator of Eq. (8)'s ratio: pi_SFT as printed, or the "
               "policy that sampled", choices=("sft", "old")),
    eps=Knob(float, 0.2, 0.2, "clip range of the ratio, epsilon of Eq. (8)"),
    eps_high=Knob(float, 0.0, 0.0, "upper clip range if another (clip-higher), 0 = eps"),
    beta=Knob(float, 0.01, 0.04, "weight of the KL penalty, beta of Eq. (8) (paper: 0.04)"),
    kl=Knob(str, "k3", "k3", "estimator of the KL divergence on the sampled tokens",
            choices=("k1", "k2", "k3")),
    scale=Knob(str, "none", "none", "divide the advantages by the group's standard deviation "
               "(Shao et al.) or not (Eq. 7)", choices=("none", "std")),
    loss_norm=Knob(str, "sum", "sum", "over a completion's tokens: Eq. (8)'s sum, or another "
                   "normalisation", choices=("sum", "sequence", "token", "constant")),
    mu=Knob(int, 1, 1, "optimiser steps on the same completions (inner epochs)", positive=True),
    mask_truncated=Knob(bool, False, False, "leave completions that were cut off out of the loss"),
    weights=Knob(float, rewards.WEIGHTS, rewards.WEIGHTS,
                 "lambda of format, accuracy, consistency in Eq. (3)"),
    judge=Knob(str, "lexical", "lexical", "the evaluator F of Eq. (6): lexical, hf:NAME_OR_PATH, "
               "hf:reference or openai:BASE_URL#MODEL"),
    judge_sees=Knob(str, "cut", "cut", "the thought with letters and answer statements cut, or "
                    "raw as printed", choices=("cut", "raw")),
    judge_concurrency=Knob(int, 32, 32, "requests to an openai: judge at a time, per process",
                           positive=True, may_change=True),
    judge_timeout=Knob(float, 60.0, 60.0, "seconds a request to it may take; replies are kept in "
                       "ROOT/replies.jsonl", positive=True, may_change=True),
    judge_failures=Knob(float, 0.5, 0.5, "share of thoughts on which F failed past which the run "
                        "saves and stops, over judge_window", may_change=True),
    judge_window=Knob(int, 20, 20, "rollouts over which that share is taken", positive=True,
                      may_change=True),
    micro_tokens=Knob(int, 8192, 8192, "tokens per forward pass on one device: whole groups, each "
                      "a prompt and its G completions", positive=True),
    checkpointing=Knob(bool, False, True, "compute layers again in the backward pass, for memory; "
                       "slower"),
    lora=Knob(int, 16, 64, "rank of LoRA on the language model; 0 trains every parameter against "
              "a frozen copy"),
    max_pixels=Knob(int, M.MAX_PIXELS, M.MAX_PIXELS, "pixels above which an image is shrunk",
                    positive=True),
    max_steps=Knob(int, 0, 0, "stop after so many optimiser steps of the whole run's schedule, "
                   "0 = at its end", may_change=True),
    eval_every=Knob(int, 0, 0, "optimiser steps between evaluations on held-out questions, "
                    "0 = never; nothing is selected by them", may_change=True),
    eval_questions=Knob(int, 200, 200, "held-out questions per evaluation", may_change=True),
    show_every=Knob(int, 10, 10, "optimiser steps between samples of completions in "
                    "completions.jsonl, for eyes", may_change=True),
    save_every=Knob(int, 0, 50, "optimiser steps between checkpoints, 0 = at the end alone",
                    may_change=True),
    resume=Knob(bool, False, False, "continue the run in --out from its last checkpoint",
                may_change=True),
)

GOLD_ASKED = 32  # gold thoughts that F, if it is a model, is asked about before the first step

# --------------------------------------------------------------------------------------------------------------- the equations

def group_advantages(rewards, scale="none"):
    """Eq. (7): A(Y_i) = R(Y_i) - 1/G sum_j R(Y_j). rewards (N, G) float -> advantages (N, G).

    scale "std" divides by the group's standard deviation (over G - 1) plus 1e-4, as Shao et al. 2024; Eq. (7) does not.
    """
    R = rewards                                                    # (N, G)
    A = R - R.mean(1, keepdim=True)                                # (N, G)
    if scale == "std":
        A = A / (R.std(1, keepdim=True) + 1e-4)
    return A

def group_spread(rewards):
    """rewards (N, G) -> (N,) bool: whether a group's rewards differ. Where they don't, every
    advantage of Eq. (7) is 0 and of the group's part of Eq. (8) the KL penalty alone is left.
    --drop_no_spread leaves that out too: the mean of Eq. (8) is then over the groups with spread,
    and neither the reference nor the update has to read the others.
    """
    return rewards.max(1).values - rewards.min(1).values > 1e-6


def kl_divergence(logp, ref_logp, kind="k3"):
    """D_KL(pi_theta || pi_SFT) of Eq. (8), estimated at the sampled tokens (Schulman): (B, T) and (B, T) -> (B, T).

    k1 = log(pi/ref) and k2 = k1^2 / 2 and k3 = ref/pi - 1 + log(pi/ref). k1 and k3 are unbiased as values; as a term of the
    loss only k2's gradient is the reverse KL's (k3's is the forward KL's, to first order the same; k1's has mean zero).
    """
    log_ratio = logp - ref_logp                                    # (B, T)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    return torch.exp(-log_ratio) - 1 + log_ratio

def policy_loss(logp, old_logp, ref_logp, advantages, mask, *, eps, beta, loss_norm="sum", eps_high=None, kl="k3",
                max_tokens=None, total=None):
    """Minus Eq. (8), to be minimised -> (loss, metrics).

        L(theta) = E[ sum_t min(r_t A, clip(r_t, 1 - eps, 1 + eps) A) - beta D_KL(pi_theta || pi_SFT) ]

    logp, old_logp, ref_logp (B, T) float32; mask (B, T) bool; advantages (B,). r_t = pi_theta / pi_SFT where old_logp is
    ref_logp (the paper), pi_theta / pi_old where it is the sampling policy's. The KL stands inside the sum over t.
    loss_norm: "sum" mean over B of the sum over t (Eq. 8); "sequence" mean over t, then over B (Shao et al.); "token"
    all tokens alike; "constant" divided by B * max_tokens (Dr. GRPO). total: the global batch's B
    (for "token": its tokens) where this is a micro-batch of it, so that the losses of micro-batches and ranks add up.
    """
    # where, not a product, and before exp: at padding r may be inf, and 0 * inf is nan, in backward too
    log_r = torch.where(mask, logp - old_logp, 0.0)                # (B, T)
    r = torch.exp(log_r)                                           # (B, T)
    A = advantages[:, None]                                        # (B, 1)
    low, high = 1 - eps, 1 + (eps if eps_high is None else eps_high)
    surrogate = torch.min(r * A, r.clamp(low, high) * A)           # (B, T)
    D_KL = kl_divergence(torch.where(mask, logp, 0.0), torch.where(mask, ref_logp, 0.0), kl)  # (B, T)
    objective = torch.where(mask, surrogate - beta * D_KL, 0.0)    # (B, T)
    per_sequence = objective.sum(1)                                # (B,)
    lengths = mask.sum(1).clamp(min=1)                             # (B,)
    count = total if total is not None else (mask.sum() if loss_norm == "token" else len(mask))
    if loss_norm == "sequence":
        per_sequence = per_sequence / lengths
    if loss_norm == "constant":
        per_sequence = per_sequence / max_tokens
    loss = -per_sequence.sum() / max(1, count)
    tokens = mask.sum().clamp(min=1)
    with torch.no_grad():
        metrics = dict(kl=(torch.where(mask, D_KL, 0.0).sum() / tokens).item(),
                       clip_low=(((r < low) & (A < 0) & mask).sum() / tokens).item(),
                       clip_high=(((r > high) & (A > 0) & mask).sum() / tokens).item(),
                       ratio=(torch.where(mask, r, 0.0).sum() / tokens).item())
    return loss, metrics

# ------------------------------------------------------------------------------------------------------------------ the pieces

def frozen_copy(model):
    """The reference of a fully fine-tuned policy: a copy without gradients. Under LoRA `reference_of` needs none."""
    return copy.deepcopy(model).requires_grad_(False).eval()

one_at_a_time = threading.Lock()  # hf:reference reads in a thread of its own: who has the adapter off must be alone

@contextlib.contextmanager
def reference_of(policy, copy_of_sft=None):
    """Inside, the value is pi_SFT: the frozen copy, or under LoRA the policy with its adapter off. That is pi_SFT because
    stage 1's adapter was merged into the weights before stage 2's was added; otherwise it would be the base model."""
    with one_at_a_time, contextlib.nullcontext() if copy_of_sft is not None else policy.disable_adapter():
        yield policy if copy_of_sft is None else copy_of_sft

def micro_batches(batch, tokens, args):
    """The slices of a batch's questions that a forward pass takes at a time."""
    (N, G, T), P = tokens.shape, batch["input_ids"].shape[1]
    size = max(1, args.micro_tokens // (P + G * T))
    return [slice(i, i + size) for i in range(0, N, size)]

@torch.no_grad()
def reference_logprobs(policy, sft_copy, batch, tokens, mask, args):
    """log pi_SFT of sampled tokens (N, G, T) -> (N*G, T)."""
    logp = [torch.zeros(0, *tokens.shape[1:], device=tokens.device)]
    with reference_of(policy, sft_copy) as pi_sft:
        for rows in micro_batches(batch, tokens, args):
            logp.append(M.token_logprobs(pi_sft, M.rows_of(batch, rows), tokens[rows], mask[rows],
                                         temperature=args.temperature))
    return torch.cat(logp).flatten(0, 1)

def score(texts, items, judge):
    """Eqs. (4), (5), (6) for n texts and their records -> fmt, acc, con, each (n,) float32; con is nan where F failed."""
    rows = rewards.score(texts, items, judge)
    return tuple(torch.tensor([row[part] for row in rows]) for part in ("fmt", "acc", "con"))

def without_failures(con):
    """R_con (N, G) with nan where F failed -> the same with the group's mean there: such a sample's part of the advantage is 0
    and the others' is what it would be in a group without it. A failure of F is not a reward of 0."""
    mean = torch.nan_to_num(con.nanmean(1, keepdim=True))
    return torch.where(con.isnan(), mean, con)

def questions(args, world):
    """The questions to train on and, with --eval_every, some held-out ones; DataError where no run of `world` processes can be
    made of what was asked for."""
    parse_spec(args.judge)  # before a model is loaded
    if args.G < 2:
        raise DataError(f"--G {args.G}: a group of one has no advantage over its own mean; expected at least 2")
    records = data.read_records(args.data, "train", args.only, args.thinking)
    if args.batch % args.G or min(args.batch // args.G, len(records)) < world:
        raise DataError(f"--batch {args.batch}: expected a multiple of --G {args.G}, and at least one question for each of "
                        f"the {world} processes ({len(records)} questions in all)")
    if os.path.realpath(args.model) == os.path.realpath(args.out):
        raise DataError(f"--out {args.out} is the folder of the SFT policy itself; name another")
    return records, held_out_questions(args)

def check_gold(records, judge, lexical=True):
    """The gold answers must score 1 by the code that will score the policy's; else the reward, not the policy, is wrong.
    F is asked about all of them if it is the lexical judge. A model may differ on some, and each costs: it is asked about
    GOLD_ASKED, and must not fail on all."""
    records = [r for r in records if r["thought"] is not None]
    asked = [] if lexical else evaluation.subset([r for r in records if r.get("thinking") != "none"], GOLD_ASKED)
    if asked:
        con = score([rewards.answer_text(r) for r in asked], asked, judge)[2]
        data.expect(not con.isnan().all(),
                    f"--judge: F failed on all of {len(asked)} gold thoughts: {failures(judge.usage)}")
        print(f"F agrees with {int(con.nansum())} of {len(asked)} gold thoughts and failed on {int(con.isnan().sum())}")
    if records:
        names = ("format", "accuracy", "consistency")  # nan, where no thought is asked for, is not under 1
        trusted = judge if lexical else lambda thoughts, items: [r["answer"] for r in items]
        for name, part in zip(names, score([rewards.answer_text(r) for r in records], records, trusted), strict=True):
            bad = (part < 1).nonzero()
            if len(bad):
                raise DataError(f"record {records[bad[0]]['id']!r}: its gold answer has {name} reward {part[bad[0]].item():g}, "
                                f"expected 1 (so for {len(bad)} of {len(records)} records)")

def average(sums):
    """{name: (sum, count)} of this process -> {name: mean over all processes}."""
    table = M.sum_over_ranks(torch.tensor(list(sums.values()), dtype=torch.float64))
    return {name: (row[0] / row[1].clamp(min=1e-9)).item() for name, row in zip(sums, table, strict=True)}

def tick(clock, device):
    """Note the time, when the device has done what it was asked, and the peak of memory since the last tick."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock.append((time.perf_counter(), M.peak_memory(device)))

def phases(clock):
    """The ticks of a step -> each phase's seconds and peak memory, for the log."""
    out = {}
    names = ("rollout", "reference", "judge", "reference", "update")
    for name, before, after in zip(names, clock[:-1], clock[1:], strict=True):
        out[f"seconds_{name}"] = out.get(f"seconds_{name}", 0.0) + after[0] - before[0]
        out[f"peak_mb_{name}"] = max(out.get(f"peak_mb_{name}", 0), round(after[1]))
    return out

def show(folder, step, records, texts, rewards):
    """Append some groups to completions.jsonl, for eyes."""
    with open(os.path.join(folder, "completions.jsonl"), "a") as f:
        for record, group, scores in zip(records, texts, rewards.tolist(), strict=True):
            f.write(json.dumps(dict(step=step, id=record["id"], answer=record["answer"], options=record["options"],
                                    completions=[dict(text=t, fmt=s[0], acc=s[1], con=s[2] if s[2] == s[2] else None,  # no nan
                                                      reward=s[3]) for t, s in zip(group, scores, strict=True)])) + "\n")

# -------------------------------------------------------------------------------------------------------------------- the loop

def main(argv=None):
    args = knobs(KNOBS, __doc__, argv)
    args.out, args.model = args.out or os.path.join(args.root, "grpo"), args.model or os.path.join(args.root, "sft")
    args.data = args.data or [os.path.join(args.root, "phantoms", "phantoms.jsonl")]
    rank, world, device = M.setup_devices()
    records, held_out = questions(args, world)
    # The policy starts as pi_SFT. The reference is pi_SFT: the adapter switched off, or a frozen copy.
    dtype = torch.bfloat16 if args.lora and device.type == "cuda" else torch.float32
    policy, processor = M.load(args.model, dtype=dtype, device=device, max_pixels=args.max_pixels)
    sft_copy = None if args.lora else frozen_copy(policy)
    policy, parameters, optimizer = trainable(policy, args)
    judge = make_judge(args.judge, args.judge_sees, concurrency=args.judge_concurrency, timeout=args.judge_timeout,
                       cache=os.path.join(args.root, "replies.jsonl"),
                       reference=(lambda: reference_of(policy, sft_copy), processor.tokenizer))
    if rank == 0:
        check_gold(records, judge, args.judge == "lexical")
    open_run(args.out, args, rank)
    generator = torch.Generator(device)
    questions_a_step = args.batch // args.G
    questions_sampled = round(questions_a_step * args.oversample)
    most = questions_a_step // world  # groups that a process trains on
    epoch_rollouts = max(1, len(records) // questions_sampled)
    steps = max(1, round(args.epochs * epoch_rollouts)) * args.mu
    start = load_state(args, policy, optimizer, rank) if args.resume else 0
    end = -(-min(steps, args.max_steps or steps) // args.mu) * args.mu  # whole rollouts
    likelihood = dict(temperature=args.temperature)  # of the distribution that is sampled
    weights = tuple(args.weights)
    recent = deque(maxlen=args.judge_window)  # the share of thoughts on which F failed
    threads = ThreadPool(questions_sampled)  # in which F is asked; daemons: Ctrl-C does not wait for a slow server

    bar = tqdm(range(start, end, args.mu), initial=start // args.mu, total=end // args.mu, desc="grpo", unit="rollout",
               disable=rank > 0)
    for step in bar:  # one rollout; mu optimiser steps on it
        clock = []
        tick(clock, device)

        # Eq. (2): questions from D, this process's share of them, and G completions for each from the current policy.
        rollout = step // args.mu
        order = epoch_order(len(records), rollout // epoch_rollouts, args.seed)
        first = rollout % epoch_rollouts * questions_sampled
        mine = [records[i] for i in order[first:first + questions_sampled]][rank::world]
        batch = M.encode(processor, mine, device)
        if args.lora:  # the vision tower is frozen: policy and reference see the same, once
            batch = M.see(policy, batch)
        generator.manual_seed((args.seed * 1_000_003 + step) * 1_009 + rank)  # a resumed run draws what it would have drawn
        asked = {}  # F, if it is a server, is asked about each group as it ends, while others are still sampled

        def ask(n, y, m):
            group = M.decode(processor, y, m)[0], [mine[n]] * args.G, judge  # noqa: B023 (of this step)
            asked[n] = threads.apply_async(score, group)  # noqa: B023
        tokens, mask = M.sample(policy, batch, group_size=args.G, max_new_tokens=args.max_new_tokens, top_p=args.top_p,
                                generator=generator, when_done=ask if judge.early else None, **likelihood)   # (N, G, T)
        texts = M.decode(processor, tokens, mask)                                          # N lists of G
        ended = M.finished(batch, tokens, mask)                                            # (N, G)
        tick(clock, device)

        # Eqs. (3)-(6): the rewards. F reads while the reference pass runs.
        items = [record for record in mine for _ in range(args.G)]
        flat = [text for group in texts for text in group]
        if not judge.early:
            asked[0] = threads.apply_async(score, (flat, items, judge))
        ref_logp = None
        if not args.drop_no_spread:
            ref_logp = reference_logprobs(policy, sft_copy, batch, tokens, mask, args)     # (N*G, T)
        tick(clock, device)

        # The wait for what is left of F's work. Eq. (7): the advantages.
        parts = zip(*(asked[n].get() for n in sorted(asked)), strict=True)
        fmt, acc, con = (torch.cat(part).view(len(mine), args.G) for part in parts)        # (N, G)
        R = total_reward(fmt, acc, without_failures(con), weights)                         # (N, G)
        A = group_advantages(R, args.scale)                                                # (N, G)
        tick(clock, device)

        # The groups to train on: all, or those with spread. log pi_SFT of their tokens: for the KL
        # penalty, and for the ratio as the paper prints it.
        used, y, m = batch, tokens, mask
        counted = mask & ended[..., None] if args.mask_truncated else mask                 # (N, G, T)
        if args.drop_no_spread:
            rows = group_spread(R).nonzero()[:most, 0].tolist()
            used, A = M.rows_of(batch, rows), A[rows]
            y, m, counted = tokens[rows], mask[rows], counted[rows]
            ref_logp = reference_logprobs(policy, sft_copy, used, y, m, args)              # (n*G, T)
        old_logp = ref_logp if args.ratio == "sft" else None  # None: the policy's own, taken as it comes in the first epoch
        total = M.sum_over_ranks(int(counted.sum()) if args.loss_norm == "token" else A.numel())
        A = A.flatten().to(device)                                                         # (n*G,)
        tick(clock, device)

        # Eq. (8): mu optimiser steps.
        for inner in range(args.mu):
            loss_sum = 0.0
            sums, logps = dict.fromkeys(("kl", "clip_low", "clip_high", "ratio"), (0, 0)), [A.new_zeros(0, y.shape[2])]
            for rows in micro_batches(used, y, args):
                groups = slice(rows.start * args.G, rows.stop * args.G)
                logp = M.token_logprobs(policy, M.rows_of(used, rows), y[rows], m[rows], **likelihood).flatten(0, 1)
                logps.append(logp.detach())
                loss, metrics = policy_loss(logp, logps[-1] if old_logp is None else old_logp[groups], ref_logp[groups],
                                            A[groups], counted.flatten(0, 1)[groups], eps=args.eps, beta=args.beta,
                                            loss_norm=args.loss_norm, eps_high=args.eps_high or None, kl=args.kl,
                                            max_tokens=args.max_new_tokens, total=total)
                loss.backward()
                n = int(counted[rows].sum())
                for name, value in metrics.items():
                    sums[name] = tuple(a + b for a, b in zip(sums.get(name, (0, 0)), (value * n, n), strict=True))
                loss_sum += loss.item()
            old_logp = torch.cat(logps) if old_logp is None else old_logp
            M.sum_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
            left = 1 - (step + inner) / steps if args.schedule == "linear" else 1
            optimizer.param_groups[0]["lr"] = args.lr * min(left, (step + inner + 1) / max(1, args.warmup))
            if total:  # else no group of any process has spread: nothing to learn from
                optimizer.step()
            optimizer.zero_grad()
        tick(clock, device)

        # What a person looks at: the reward's parts, groups without spread (no gradient), KL, clipping, entropy, lengths.
        n, length = len(flat), int(mask.sum())
        told = [visible_thought(t)[1] for text in flat if (t := parse_completion(text, args.thinking)[0])]
        failed = 0 if args.thinking == "none" else int(con.isnan().sum())
        figures = average(sums | dict(
            loss=(loss_sum, 1 / world), trained_on=(y.shape[0], 1 / world),
            reward=(R.sum().item(), n), format=(fmt.sum().item(), n), accuracy=(acc.sum().item(), n),
            consistency=(without_failures(con).sum().item(), n), judge_failed=(failed, len(told)), thoughts_cut=(sum(told), n),
            no_spread=((~group_spread(R)).sum().item(), len(mine)),
            entropy=(-torch.cat(logps).sum().item(), int(m.sum())), length=(length, n), truncated=((~ended).sum().item(), n)))
        done = step + args.mu
        recent.append(figures["judge_failed"])
        lost = len(recent) == args.judge_window and sum(recent) / len(recent) > args.judge_failures
        if args.eval_every and done // args.eval_every > step // args.eval_every:
            rows = evaluation.evaluate(policy, processor, held_out[rank::world], judge, max_new_tokens=args.max_new_tokens,
                                       progress=False)
            figures |= average(dict(held_out_accuracy=(sum(row["acc"] for row in rows), len(rows))))
        bar.set_postfix(reward=f"{figures['reward']:.3f}", accuracy=f"{figures['accuracy']:.2f}", kl=f"{figures['kl']:.3f}")
        if rank == 0:
            log(args.out, step=done, **figures, grad_norm=norm, lr=optimizer.param_groups[0]["lr"],
                tokens_per_second=figures["length"] * questions_sampled * args.G / (clock[-1][0] - clock[0][0]),
                **phases(clock))
            if rollout % args.show_every == 0:
                show(args.out, done, mine[:4], texts[:4], torch.stack([fmt, acc, con, R], -1)[:4])
            if done >= end or lost or args.save_every and done // args.save_every > step // args.save_every:
                M.save(policy, processor, args.out, keep_adapter=True)
                save_state(args, policy, optimizer, done)
        if lost:
            M.sum_over_ranks(0)  # the others wait until it is saved
            raise DataError(f"--judge: F failed on {100 * sum(recent) / len(recent):.0f} % of the thoughts of the last "
                            f"{len(recent)} rollouts ({failures(judge.usage)}); saved after step {done}, --resume goes on")
    M.close_devices()

if __name__ == "__main__":
    data.cli(main)
