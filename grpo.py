"""Stage 2, Reasoning Reinforcement: Con-GRPO, Eqs. (2), (7) and (8).

For each question the policy samples a group of G completions. Each is scored for format, accuracy
and consistency (rewards.py, judge.py). A completion's advantage is its reward minus its group's
mean. One clipped step follows, held to the SFT policy by a KL penalty. The loop at the end of this
file reads in that order: rollout, rewards, advantages, update.

With --ratio old and one update per rollout (the tiny preset) the ratio of Eq. (8) is 1 and the clip
never acts: the step is then REINFORCE with the group's mean as baseline and a KL term. With --ratio
sft, as the paper prints it (the paper preset), the clip keeps each token's probability near pi_SFT's.

    torchrun grpo.py                                              # the phantoms: from out/sft to out/grpo
    torchrun --nproc_per_node=8 grpo.py --model out/sft --data medad38k/medad38k.jsonl
    python grpo.py --model out/tiny-base --out out/rl-only        # Table 2's first row: no SFT (Med-R1's way)
    python grpo.py --weights 0 1 0                                # Table 2's Acc-only; 0 0 1 is Con-only, 0.8 0.1 0.1 Table 3's

Left out on purpose: a value network (the group's mean is the baseline), a replay buffer, sampling ahead of the update.
"""
import contextlib
import copy
import itertools
import json
import math
import os
import threading
import time
from collections import Counter, deque
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
import eval as evaluation
import model as M
import rewards
from data import DataError
from judge import daemon_threads, failures, make_judge, parse_spec
from rewards import parse_completion, total_reward, visible_thought
from sft import (
    Knob,
    epoch_order,
    held_out_accuracy,
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
    drop_no_spread=Knob(bool, True, False, "leave groups whose rewards are all alike out of "
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
SHOWN = 4        # groups per rollout that are written to completions.jsonl


# ---- the equations -------------------------------------------------------------------------------

def group_advantages(rewards, scale="none"):
    """Eq. (7): A(Y_i) = R(Y_i) - 1/G sum_j R(Y_j). rewards (N, G) float -> advantages (N, G).

    scale "std" divides by the group's standard deviation (over G - 1) plus 1e-4, as Shao et al.
    2024 do; Eq. (7) does not.
    """
    R = rewards                                                    # (N, G)
    A = R - R.mean(1, keepdim=True)                                # (N, G)
    if scale == "std":
        A = A / (R.std(1, keepdim=True) + 1e-4)
    return A


def group_spread(rewards):
    """rewards (N, G) -> (N,) bool: whether a group's rewards differ.

    Where they don't, every advantage of Eq. (7) is 0, and of the group's part of Eq. (8) only the
    KL penalty is left. --drop_no_spread leaves that out too: Eq. (8)'s mean is then over the groups
    with spread, and neither the reference nor the update has to read the others.
    """
    return rewards.max(1).values - rewards.min(1).values > 1e-6    # (N,)


def kl_divergence(logp, ref_logp, kind="k3"):
    """D_KL(pi_theta || pi_SFT) of Eq. (8), estimated at the sampled tokens (Schulman):
    (B, T) and (B, T) -> (B, T).

    k1 = log(pi/ref), k2 = k1^2 / 2, k3 = ref/pi - 1 + log(pi/ref). k1 and k3 are unbiased as values.
    As a term of the loss only k2's gradient is the reverse KL's; k3's is the forward KL's (to first
    order the same); k1's has mean zero.
    """
    log_ratio = logp - ref_logp                                    # (B, T)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    return torch.exp(-log_ratio) - 1 + log_ratio


def policy_loss(logp, old_logp, ref_logp, advantages, mask, *, eps, beta, loss_norm="sum",
                eps_high=None, kl="k3", max_tokens=None, total=None):
    """Minus Eq. (8), to be minimised -> (loss, metrics).

        L(theta) = E[ sum_t min(r_t A, clip(r_t, 1 - eps, 1 + eps) A) - beta D_KL(pi_theta || pi_SFT) ]

    logp, old_logp, ref_logp (B, T) float32; mask (B, T) bool; advantages (B,). The ratio r_t is
    pi_theta / pi_SFT where old_logp is ref_logp (the paper), and pi_theta / pi_old where it is the
    sampling policy's. The KL stands inside the sum over t.

    loss_norm: "sum" mean over B of the sum over t (Eq. 8); "sequence" mean over t, then over B
    (Shao et al.); "token" mean over all tokens; "constant" sum over t divided by max_tokens, then
    mean over B (Dr. GRPO). total: the global batch's B (for "token": its tokens) where this is a
    micro-batch of it, so that the losses of micro-batches and ranks add up.
    """
    # where, not a product, and before exp: at padding r may be inf, and 0 * inf is nan, also in
    # the backward pass
    log_r = torch.where(mask, logp - old_logp, 0.0)                # (B, T)
    r = torch.exp(log_r)                                           # (B, T)
    A = advantages[:, None]                                        # (B, 1)
    low, high = 1 - eps, 1 + (eps if eps_high is None else eps_high)
    surrogate = torch.min(r * A, r.clamp(low, high) * A)           # (B, T)
    logp, ref_logp = torch.where(mask, logp, 0.0), torch.where(mask, ref_logp, 0.0)
    D_KL = kl_divergence(logp, ref_logp, kl)                       # (B, T)
    objective = torch.where(mask, surrogate - beta * D_KL, 0.0)    # (B, T)
    per_sequence = objective.sum(1)                                # (B,)
    if loss_norm == "sequence":
        per_sequence = per_sequence / mask.sum(1).clamp(min=1)
    if loss_norm == "constant":
        per_sequence = per_sequence / max_tokens
    if total is None:
        total = mask.sum() if loss_norm == "token" else len(mask)
    loss = -per_sequence.sum() / max(1, total)
    tokens = mask.sum().clamp(min=1)
    with torch.no_grad():
        metrics = dict(kl=(torch.where(mask, D_KL, 0.0).sum() / tokens).item(),
                       clip_low=(((r < low) & (A < 0) & mask).sum() / tokens).item(),
                       clip_high=(((r > high) & (A > 0) & mask).sum() / tokens).item(),
                       ratio=(torch.where(mask, r, 0.0).sum() / tokens).item())
    return loss, metrics


# ---- the reference -------------------------------------------------------------------------------

def frozen_copy(model):
    """The reference of a fully fine-tuned policy. Under LoRA `reference_of` needs no copy."""
    return copy.deepcopy(model).requires_grad_(False).eval()


adapter_switch = threading.Lock()  # --judge hf:reference reads in a thread of its own: one at a time


@contextlib.contextmanager
def reference_of(policy, copy_of_sft=None):
    """Inside, the value is pi_SFT: the frozen copy, or under LoRA the policy with its adapter off.
    That is pi_SFT because stage 1's adapter was merged into the weights before stage 2's was added;
    otherwise it would be the base model."""
    with adapter_switch:
        if copy_of_sft is not None:
            yield copy_of_sft
        else:
            with policy.disable_adapter():
                yield policy


# ---- the four parts of a step --------------------------------------------------------------------

class Groups(NamedTuple):
    """Questions and their groups of completions, as the reference and the update read them."""
    batch: dict              # the questions, see model.tensors
    tokens: torch.Tensor     # (N, G, T)
    mask: torch.Tensor       # (N, G, T) bool, up to and with the stop token
    counted: torch.Tensor    # (N, G, T) bool, the tokens in the loss: less than mask if cut off

    def rows(self, rows):
        """Some of the questions: a slice, or a list of indices."""
        return Groups(M.rows_of(self.batch, rows), *(x[rows] for x in self[1:]))


def rollout(policy, processor, records, scoring, generator, args):
    """Eq. (2): G completions for each of N questions, from the current policy -> Groups, texts
    (N lists of G), ended (N, G) bool: not cut off. Scoring begins while others are still sampled."""
    batch = M.encode(processor, records, generator.device)
    if args.lora:  # the vision tower is frozen: it serves sampling, reference and update at once
        batch = M.with_image_features(policy, batch)
    tokens, mask = M.sample(policy, batch, group_size=args.G, max_new_tokens=args.max_new_tokens,
                            temperature=args.temperature, top_p=args.top_p, generator=generator)
    texts = M.decode(processor, tokens, mask)
    ended = M.finished(batch, tokens, mask)                                                # (N, G)
    counted = mask & ended[..., None] if args.mask_truncated else mask                     # (N, G, T)
    return Groups(batch, tokens, mask, counted), texts, ended


class Scoring:
    """The rewards of a rollout, computed in threads: F works while the device does something else."""

    def __init__(self, judge, threads, records, processor, G):
        self.judge, self.threads, self.processor = judge, threads, processor
        self.records, self.G, self.early, self.parts = records, G, judge.early, {}

    def group_ended(self, n, tokens, mask):
        """A server is asked about question n's group (1, G, ..) as soon as it is complete."""
        texts = M.decode(self.processor, tokens, mask)[0]
        self.parts[n] = self.threads.apply_async(score, (texts, [self.records[n]] * self.G, self.judge))

    def all_ended(self, texts):
        """Any other F is asked about all groups at once."""
        if not self.early:
            items = [record for record in self.records for _ in range(self.G)]
            flat = [text for group in texts for text in group]
            self.parts[0] = self.threads.apply_async(score, (flat, items, self.judge))

    def wait(self):
        """-> fmt, acc, con, each (N, G) float32; con is nan where F failed."""
        scores = torch.cat([self.parts[n].get() for n in sorted(self.parts)], 1)           # (3, N*G)
        return scores.view(3, len(self.records), self.G)


def score(texts, items, judge):
    """Eqs. (4) to (6) for n texts and their records -> (3, n) float32: fmt, acc, con."""
    rows = rewards.score(texts, items, judge)
    return torch.tensor([[row[part] for row in rows] for part in ("fmt", "acc", "con")])


def without_failures(con):
    """R_con (N, G) with nan where F failed -> the same with the group's mean there. Such a sample's
    part of the advantage is 0, and the others' is what it would be in a group without it: a failure
    of F is not a reward of 0."""
    mean = torch.nan_to_num(con.nanmean(1, keepdim=True))
    return torch.where(con.isnan(), mean, con)


def micro_batches(groups, args):
    """The slices of N questions that a forward pass takes at a time: whole groups."""
    N, G, T = groups.tokens.shape
    tokens_per_question = groups.batch["input_ids"].shape[1] + G * T
    size = max(1, args.micro_tokens // tokens_per_question)
    return [slice(i, i + size) for i in range(0, N, size)]


@torch.no_grad()
def reference_logprobs(policy, sft_copy, groups, args):
    """log pi_SFT of the sampled tokens -> (N, G, T)."""
    logp = torch.zeros(groups.tokens.shape, device=groups.tokens.device)
    with reference_of(policy, sft_copy) as pi_sft:
        for rows in micro_batches(groups, args):
            part = groups.rows(rows)
            logp[rows] = M.token_logprobs(pi_sft, part.batch, part.tokens, part.mask,
                                          temperature=args.temperature)
    return logp


def update(policy, parameters, optimizer, groups, A, ref_logp, old_logp, args):
    """One optimiser step of Eq. (8). A (N, G), ref_logp and old_logp (N, G, T); old_logp None: the
    policy's own before this step -> log pi_theta (N, G, T), gradient norm, metrics: sums over this
    process's tokens, so that they can be added up over processes."""
    count = int(groups.counted.sum()) if args.loss_norm == "token" else A.numel()
    total = M.sum_over_ranks(count)
    logps = torch.zeros(groups.tokens.shape, device=groups.tokens.device)
    sums = Counter(loss=0.0, kl=0.0, clip_low=0.0, clip_high=0.0, ratio=0.0)
    for rows in micro_batches(groups, args):
        part = groups.rows(rows)
        logp = M.token_logprobs(policy, part.batch, part.tokens, part.mask,
                                temperature=args.temperature)                              # (n, G, T)
        logps[rows] = logp.detach()
        old = logps if old_logp is None else old_logp
        loss, metrics = policy_loss(
            logp.flatten(0, 1), old[rows].flatten(0, 1), ref_logp[rows].flatten(0, 1),
            A[rows].flatten(), part.counted.flatten(0, 1), eps=args.eps, beta=args.beta,
            loss_norm=args.loss_norm, eps_high=args.eps_high or None, kl=args.kl,
            max_tokens=args.max_new_tokens, total=total)
        loss.backward()
        sums["loss"] += loss.item()
        tokens = int(part.counted.sum())
        for name, mean in metrics.items():
            sums[name] += mean * tokens
    M.sum_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
    if total:  # else no group of any process has spread: there is nothing to learn from
        optimizer.step()
    optimizer.zero_grad()
    return logps, norm, sums


def learning_rate(step, steps, args):
    """A linear rise over --warmup steps; constant after that, or falling to 0."""
    rise = (step + 1) / max(1, args.warmup)
    fall = 1 - step / steps if args.schedule == "linear" else 1
    return args.lr * min(rise, fall)


# ---- before the first step -----------------------------------------------------------------------

def questions(args, world):
    """The questions to train on and, with --eval_every, some held-out ones; DataError where no run
    of `world` processes can be made of what was asked for."""
    parse_spec(args.judge)  # before a model is loaded
    if args.G < 2:
        raise DataError(f"--G {args.G}: a group of one has no advantage over its own mean; "
                        "expected at least 2")
    records = data.read_records(args.data, "train", args.only, args.thinking)
    if args.batch % args.G or min(args.batch // args.G, len(records)) < world:
        raise DataError(f"--batch {args.batch}: expected a multiple of --G {args.G}, and at least "
                        f"one question for each of the {world} processes ({len(records)} questions "
                        "in all)")
    if os.path.realpath(args.model) == os.path.realpath(args.out):
        raise DataError(f"--out {args.out} is the folder of the SFT policy itself; name another")
    return records, held_out_questions(args)


def check_gold(records, judge, lexical=True):
    """The gold answers must score 1 by the code that will score the policy's; else the reward, not
    the policy, is wrong. The lexical F is asked about all of them. A model may differ on some, and
    each costs a call: it is asked about GOLD_ASKED, and must not fail on all."""
    records = [r for r in records if r["thought"] is not None]
    trusted = judge
    if not lexical:
        ask_model(records, judge)

        def trusted(thoughts, items):
            return [r["answer"] for r in items]
    if not records:
        return
    scores = score([rewards.answer_text(r) for r in records], records, trusted)            # (3, n)
    for name, part in zip(("format", "accuracy", "consistency"), scores, strict=True):
        bad = (part < 1).nonzero()  # nan, where no thought is asked for, is not under 1
        if len(bad):
            raise DataError(f"record {records[bad[0]]['id']!r}: its gold answer has {name} reward "
                            f"{part[bad[0]].item():g}, expected 1 (so for {len(bad)} of "
                            f"{len(records)} records)")


def ask_model(records, judge):
    """Ask a model as F about some gold thoughts; DataError if it fails on all of them."""
    with_thought = [r for r in records if r.get("thinking") != "none"]
    asked = evaluation.subset(with_thought, GOLD_ASKED)
    if not asked:
        return
    _, _, con = score([rewards.answer_text(r) for r in asked], asked, judge)
    if con.isnan().all():
        raise DataError(f"--judge: F failed on all of {len(asked)} gold thoughts: "
                        f"{failures(judge.usage)}")
    print(f"F agrees with {int(con.nansum())} of {len(asked)} gold thoughts and failed on "
          f"{int(con.isnan().sum())}")


# ---- what a person looks at ----------------------------------------------------------------------

class Clock:
    """Seconds and peak memory of the parts of a step."""

    def __init__(self, device):
        self.device, self.figures, self.seconds = device, {}, 0.0
        self.tick("start")

    def tick(self, part):
        """Book what has passed since the last tick on `part`, when the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now, peak = time.perf_counter(), M.peak_memory(self.device)
        if part != "start":
            passed = now - self.last
            self.seconds += passed
            self.figures[f"seconds_{part}"] = self.figures.get(f"seconds_{part}", 0.0) + passed
            self.figures[f"peak_mb_{part}"] = max(self.figures.get(f"peak_mb_{part}", 0), round(peak))
        self.last = now


def figures_of(texts, ended, scores, R, sampled, trained, logp, sums, args):
    """A step's figures, over all processes. sampled, trained: the Groups that were sampled, and
    those of them that were trained on. sampled_nll is minus the mean log-probability of the tokens,
    an estimate of the policy's entropy per token."""
    fmt, acc, con = scores
    thoughts = []
    for text in itertools.chain(*texts):
        thought, _ = parse_completion(text, args.thinking)
        if thought is not None:
            thoughts.append(thought)
    local = dict(
        sums, reward=R.sum().item(), format=fmt.sum().item(), accuracy=acc.sum().item(),
        consistency=without_failures(con).sum().item(), length=sampled.mask.sum().item(),
        truncated=(~ended).sum().item(), completions=R.numel(), groups=len(R),
        no_spread=(~group_spread(R)).sum().item(), trained_on=len(trained.tokens),
        thoughts=len(thoughts), thoughts_cut=sum(visible_thought(t)[1] for t in thoughts),
        judge_failed=con.isnan().sum().item() if args.thinking != "none" else 0,
        sampled_nll=-logp.sum().item(), read=trained.mask.sum().item(),
        counted=trained.counted.sum().item())
    total = M.sum_over_ranks(torch.tensor(list(local.values()), dtype=torch.float64)).tolist()
    total = dict(zip(local, total, strict=True))
    figures = dict(loss=total["loss"], trained_on=total["trained_on"])
    for denominator, names in dict(
            completions="reward format accuracy consistency length truncated thoughts_cut",
            counted="kl clip_low clip_high ratio", read="sampled_nll", groups="no_spread",
            thoughts="judge_failed").items():
        for name in names.split():
            figures[name] = total[name] / max(1, total[denominator])
    return figures


def show(folder, step, records, texts, rewards):
    """Append some groups to completions.jsonl, for eyes. rewards (n, G, 4): fmt, acc, con, R."""
    with open(os.path.join(folder, "completions.jsonl"), "a") as f:
        for record, group, scores in zip(records, texts, rewards.tolist(), strict=False):
            completions = []
            for text, (fmt, acc, con, reward) in zip(group, scores, strict=True):
                con = None if math.isnan(con) else con  # JSON has no nan
                completions.append(dict(text=text, fmt=fmt, acc=acc, con=con, reward=reward))
            line = {k: record[k] for k in ("id", "answer", "options")}
            f.write(json.dumps(dict(step=step, **line, completions=completions)) + "\n")


def passes(step, mu, every):
    """Whether one of the mu optimiser steps after `step` is a multiple of `every` (0: never)."""
    return every > 0 and (step + mu) // every > step // every


# ---- the loop ------------------------------------------------------------------------------------

def main(argv=None):
    args = knobs(KNOBS, __doc__, argv)
    args.out = args.out or os.path.join(args.root, "grpo")
    args.model = args.model or os.path.join(args.root, "sft")
    args.data = args.data or [os.path.join(args.root, "phantoms", "phantoms.jsonl")]
    rank, world, device = M.setup_devices()
    records, held_out = questions(args, world)

    # The policy starts as pi_SFT, and pi_SFT is the reference.
    dtype = torch.bfloat16 if args.lora and device.type == "cuda" else torch.float32
    policy, processor = M.load(args.model, dtype=dtype, device=device, max_pixels=args.max_pixels)
    sft_copy = None if args.lora else frozen_copy(policy)
    policy, parameters, optimizer = trainable(policy, args)
    judge = make_judge(args.judge, args.judge_sees, concurrency=args.judge_concurrency,
                       timeout=args.judge_timeout, cache=os.path.join(args.root, "replies.jsonl"),
                       reference=(lambda: reference_of(policy, sft_copy), processor.tokenizer))
    if rank == 0:
        check_gold(records, judge, args.judge == "lexical")
    open_run(args.out, args, rank)

    trained_on = args.batch // args.G                     # questions per rollout, over all processes
    asked = round(trained_on * args.oversample)           # sampled for them
    epoch_rollouts = max(1, len(records) // asked)
    steps = max(1, round(args.epochs * epoch_rollouts)) * args.mu
    start = load_state(args, policy, optimizer, rank) if args.resume else 0
    end = math.ceil(min(steps, args.max_steps or steps) / args.mu) * args.mu  # whole rollouts
    generator = torch.Generator(device)
    threads = daemon_threads(asked)  # in which F is asked
    failed = deque(maxlen=args.judge_window)  # the share of thoughts on which F failed

    bar = tqdm(range(start, end, args.mu), initial=start // args.mu, total=end // args.mu,
               desc="grpo", unit="rollout", disable=rank > 0)
    for step in bar:  # one rollout, then mu optimiser steps on it
        clock = Clock(device)

        # Eq. (2): this process's share of the questions, and G completions for each.
        epoch, place = divmod(step // args.mu, epoch_rollouts)
        order = epoch_order(len(records), epoch, args.seed)[place * asked:][:asked]
        mine = [records[i] for i in order[rank::world]]
        generator.manual_seed((args.seed * 1_000_003 + step) * 1_009 + rank)  # a resumed run's too
        scoring = Scoring(judge, threads, mine, processor, args.G)
        groups, texts, ended = rollout(policy, processor, mine, scoring, generator, args)
        clock.tick("rollout")

        # log pi_SFT of the sampled tokens. Meanwhile F reads: Eqs. (4) to (6).
        scoring.all_ended(texts)
        if not args.drop_no_spread:
            ref_logp = reference_logprobs(policy, sft_copy, groups, args)                  # (N, G, T)
        clock.tick("reference")

        # Eq. (3): the rewards. Eq. (7): the advantages.
        fmt, acc, con = scores = scoring.wait()                                            # (N, G)
        R = total_reward(fmt, acc, without_failures(con), args.weights)                    # (N, G)
        A = group_advantages(R, args.scale)                                                # (N, G)
        clock.tick("judge")

        # The groups to train on: all, or those with spread.
        trained = groups
        if args.drop_no_spread:
            rows = group_spread(R).nonzero()[:trained_on // world, 0].tolist()
            trained, A = groups.rows(rows), A[rows]
            ref_logp = reference_logprobs(policy, sft_copy, trained, args)                 # (n, G, T)
        clock.tick("reference")

        # Eq. (8): mu optimiser steps. pi_old is the policy before the first of them.
        old_logp = ref_logp if args.ratio == "sft" else None
        for inner in range(args.mu):
            optimizer.param_groups[0]["lr"] = learning_rate(step + inner, steps, args)
            logp, norm, sums = update(policy, parameters, optimizer, trained, A.to(device), ref_logp,
                                      old_logp, args)
            if old_logp is None:
                old_logp = logp
        clock.tick("update")

        done = step + args.mu
        figures = figures_of(texts, ended, scores, R, groups, trained, logp, sums, args)
        failed.append(figures["judge_failed"])
        failure = sum(failed) / len(failed)
        stop = len(failed) == args.judge_window and failure > args.judge_failures
        if passes(step, args.mu, args.eval_every):
            figures["held_out_accuracy"] = held_out_accuracy(
                policy, processor, held_out[rank::world], judge, args.max_new_tokens)
        bar.set_postfix({k: f"{figures[k]:.3f}" for k in ("reward", "accuracy", "kl")})
        if rank == 0:
            sampled = figures["length"] * asked * args.G
            log(args.out, step=done, **figures, grad_norm=norm,
                lr=optimizer.param_groups[0]["lr"], tokens_per_second=sampled / clock.seconds,
                **clock.figures)
            if step // args.mu % args.show_every == 0:
                show(args.out, done, mine[:SHOWN], texts, torch.stack([*scores, R], -1))
            if done >= end or stop or passes(step, args.mu, args.save_every):
                M.save(policy, processor, args.out, keep_adapter=True)
                save_state(args, policy, optimizer, done)
        if stop:
            M.sum_over_ranks(0)  # the other processes wait until it is saved
            raise DataError(f"--judge: F failed on {100 * failure:.0f} % of the thoughts of the last "
                            f"{len(failed)} rollouts ({failures(judge.usage)}); saved after step "
                            f"{done}, --resume goes on")
    M.close_devices()


if __name__ == "__main__":
    data.cli(main)
