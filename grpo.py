"""Stage 2, Reasoning Reinforcement: Con-GRPO, Eqs. (2), (7) and (8).

For each question the policy samples a group of G completions. Each is scored for format, accuracy
and consistency (rewards.py, judge.py). A completion's advantage is its reward minus its group's
mean. Then follow mu optimiser steps on Eq. (8), held to the SFT policy by a KL penalty. The loop at
the end of this file reads in that order: rollout, rewards, advantages, update.

With --ratio old and one update per rollout (the tiny preset) the ratio of Eq. (8) is 1 and the clip
never acts: the step is then REINFORCE with the group's mean as baseline and a KL term. With --ratio
sft, as the paper prints it (the paper preset), a token is pushed no further once its probability is
more than eps from pi_SFT's.

    torchrun grpo.py                                        # the phantoms: out/sft to out/grpo
    torchrun --nproc_per_node=8 grpo.py --model out/sft --data medad38k/medad38k.jsonl
    python grpo.py --model out/tiny-base --out out/rl-only  # Table 2's RL-only (Med-R1's way)
    python grpo.py --weights 0 1 0                          # Table 2's Acc-only; 0 0 1: Con-only

Left out on purpose: a value network (the group's mean is the baseline), a replay buffer, sampling
ahead of the update, other clip ranges above than below.
"""
import contextlib
import copy
import json
import math
import os
import threading
import time
from collections import Counter

import torch
from tqdm import tqdm

import data
import eval as evaluation
import model as M
import rewards
import sft
from data import DataError, expect
from judge import daemon_threads, failures, make_judge, parse_spec
from sft import SHARED, Knob

GOLD_ASKED = 32     # gold thoughts that F, if it is a model, is asked about before the first step
JUDGE_WINDOW = 256  # thoughts, or some more, over which the share of F's failures is taken
SHOWN = 4           # groups per rollout that are written to completions.jsonl

# Knob(type, default of the `tiny` preset, of `paper`, meaning): `paper` has the figures of the
# paper's section 4.1, where it gives them. F is a rule in both; --judge names a model.
KNOBS = dict(
    model=Knob(str, None, None, "folder of pi_SFT, policy and reference alike (default: ROOT/sft)",
               may_change=True),
    out=Knob(str, None, None, "folder of this run (default: ROOT/grpo)", may_change=True),
    epochs=Knob(float, 1.0, 1.0, "passes over the training questions (paper: 1)", positive=True),
    batch=Knob(int, 128, 64, "completions per optimiser step over all processes "
               "(paper: global batch 64)", positive=True),
    G=Knob(int, 8, 8, "completions per question: the group (paper: G = 8)", positive=True),
    drop_no_spread=Knob(bool, True, False, "leave groups whose rewards are all alike out of "
                        "reference and update (see group_spread)"),
    oversample=Knob(float, 1.0, 1.0, "questions sampled for each that is trained on, where "
                    "groups may be dropped"),
    max_new_tokens=Knob(int, 80, 512, "tokens at which a completion is cut off", positive=True),
    temperature=Knob(float, 1.0, 1.0, "of the sampling; log-probabilities are those of the same "
                     "distribution", positive=True),
    top_p=Knob(float, 1.0, 1.0, "sample from the most likely tokens that hold this much "
               "probability; under 1 biases the ratio", positive=True),
    lr=Knob(float, 1e-3, 1e-6, "peak learning rate of AdamW (paper: 1e-6)", positive=True),
    schedule=Knob(str, "linear", "constant", "the learning rate after the warm-up: constant, or "
                  "falling to 0", choices=("constant", "linear")),
    warmup=Knob(int, 10, 10, "optimiser steps in which the learning rate rises"),
    ratio=Knob(str, "old", "sft", "denominator of Eq. (8)'s ratio: pi_SFT as printed, or the "
               "policy that sampled", choices=("sft", "old")),
    eps=Knob(float, 0.2, 0.2, "clip range of the ratio, epsilon of Eq. (8)"),
    beta=Knob(float, 0.01, 0.04, "weight of the KL penalty, beta of Eq. (8) (paper: 0.04)"),
    kl=Knob(str, "k3", "k3", "estimator of the KL divergence on the sampled tokens",
            choices=("k1", "k2", "k3")),
    scale=Knob(str, "none", "none", "divide the advantages by the group's standard deviation "
               "(Shao et al.) or not (Eq. 7)", choices=("none", "std")),
    loss_norm=Knob(str, "sum", "sum", "over a completion's tokens: Eq. (8)'s sum, or another "
                   "normalisation", choices=("sum", "sequence", "token", "constant")),
    mu=Knob(int, 1, 1, "optimiser steps on the same completions (inner epochs)", positive=True),
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
    judge_failures=Knob(float, 0.5, 0.5, f"share of the last {JUDGE_WINDOW} thoughts on "
                        "which F failed, past which the run saves and stops",
                        may_change=True),
    micro_tokens=Knob(int, 8192, 8192, "tokens per forward pass on one device: whole groups, each "
                      "a prompt and its G completions", positive=True),
    lora=Knob(int, 16, 64, "rank of LoRA on the language model; 0 trains every parameter against "
              "a frozen copy"),
    save_every=Knob(int, 0, 50, "optimiser steps between checkpoints, 0 = at the end alone",
                    may_change=True),
    show_every=Knob(int, 10, 10, "rollouts between samples of completions in completions.jsonl, "
                    "for eyes, 0 = never", may_change=True),
    **SHARED)

# ---- the equations -------------------------------------------------------------------------------

def group_advantages(rewards, scale="none"):
    """Eq. (7): A(Y_i) = R(Y_i) - 1/G sum_j R(Y_j). rewards (N, G) float -> advantages (N, G).

    scale "std" divides by the group's standard deviation (over G - 1) plus 1e-4, as Shao et al.
    2024 do; Eq. (7) does not."""
    R = rewards                                                          # (N, G)
    A = R - R.mean(1, keepdim=True)                                      # (N, G)
    if scale == "std":
        A = A / (R.std(1, keepdim=True) + 1e-4)
    return A


def group_spread(rewards):
    """rewards (N, G) -> (N,) bool: whether a group's rewards differ.

    Where they don't, every advantage of Eq. (7) is 0, and of the group's part of Eq. (8) only the
    KL penalty is left. --drop_no_spread leaves that out too: Eq. (8)'s mean is then over the groups
    with spread, and neither the reference nor the update has to read the others."""
    return rewards.max(1).values - rewards.min(1).values > 1e-6          # (N,)


def kl_divergence(logp, ref_logp, kind="k3"):
    """D_KL(pi_theta || pi_SFT) of Eq. (8), estimated at the sampled tokens (Schulman):
    (B, T) and (B, T) -> (B, T).

    k1 = log(pi/ref), k2 = k1^2 / 2, k3 = ref/pi - 1 + log(pi/ref). k1 and k3 are unbiased as
    values. As a term of the loss only k2's gradient is the reverse KL's; k3's is the forward KL's
    (to first order the same); k1's has mean zero."""
    log_ratio = logp - ref_logp                                          # (B, T)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio**2 / 2
    return torch.exp(-log_ratio) - 1 + log_ratio


def policy_loss(logp, old_logp, ref_logp, advantages, mask, *, eps, beta, loss_norm="sum", kl="k3",
                max_tokens=None, total=None):
    """Minus Eq. (8), to be minimised -> (loss, metrics).

    L(theta) = E[ sum_t ( min(r_t A, clip(r_t, 1-eps, 1+eps) A) - beta D_KL(pi_theta || pi_SFT) ) ]

    logp, old_logp, ref_logp (B, T) float32; mask (B, T) bool; advantages (B,). The ratio r_t is
    pi_theta / pi_SFT where old_logp is ref_logp (the paper), and pi_theta / pi_old where it is the
    sampling policy's. The KL is estimated at each token, hence our brackets; the paper has none.

    loss_norm: "sum" mean over B of the sum over t (Eq. 8); "sequence" mean over t, then over B
    (Shao et al.); "token" mean over all tokens; "constant" sum over t divided by max_tokens, then
    mean over B (Dr. GRPO). total: the global batch's B (for "token": its tokens) where this is a
    micro-batch of it, so that the losses of micro-batches and ranks add up. metrics: means over
    the tokens."""
    # where, not a product, and before exp: at padding r may be inf, and 0 * inf is nan, also in
    # the backward pass
    log_r = torch.where(mask, logp - old_logp, 0.0)                      # (B, T)
    r = torch.exp(log_r)                                                 # (B, T)
    A = advantages[:, None]                                              # (B, 1)
    surrogate = torch.min(r * A, r.clamp(1 - eps, 1 + eps) * A)          # (B, T)
    logp, ref_logp = torch.where(mask, logp, 0.0), torch.where(mask, ref_logp, 0.0)
    D_KL = kl_divergence(logp, ref_logp, kl)                             # (B, T)
    objective = torch.where(mask, surrogate - beta * D_KL, 0.0)          # (B, T)
    per_sequence = objective.sum(1)                                      # (B,)
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
                       clip_low=(((r < 1 - eps) & (A < 0) & mask).sum() / tokens).item(),
                       clip_high=(((r > 1 + eps) & (A > 0) & mask).sum() / tokens).item(),
                       ratio=(torch.where(mask, r, 0.0).sum() / tokens).item())
    return loss, metrics

# ---- the reference -------------------------------------------------------------------------------

def frozen_copy(model):
    """The reference of a fully fine-tuned policy. Under LoRA `reference_of` needs no copy."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    for matrix in M.matrices_of(frozen) if model.device.type == "cuda" else []:
        matrix.to(torch.bfloat16)
    return frozen


adapter_switch = threading.Lock()  # --judge hf:reference reads in a thread: one at a time


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

# ---- the parts of a step -------------------------------------------------------------------------

def dealt(records, rank, world):
    """A process's part of a step's questions, of all lengths: from the shortest to the longest they
    are dealt back and forth."""
    places = sorted(range(len(records)), key=lambda i: len(rewards.question_text(records[i])))
    rounds = [places[i:i + world] for i in range(0, len(places), world)]
    for full in [some for some in rounds if len(some) == world][1::2]:
        full.reverse()
    return [records[i] for i in sorted(some[rank] for some in rounds if rank < len(some))]


def rollout(policy, processor, records, generator, args):
    """Eq. (2): G completions for each of N questions, from the current policy -> the questions'
    batch (model.tensors), tokens (N, G, T), mask (N, G, T) bool, texts (N * G)."""
    batch = M.encode(processor, records, generator.device)
    if args.lora:  # the vision tower is frozen: it serves sampling, reference and update at once
        batch = M.with_image_features(policy, batch)
    tokens, mask = M.sample(policy, batch, group_size=args.G, max_new_tokens=args.max_new_tokens,
                            temperature=args.temperature, top_p=args.top_p, generator=generator)
    return batch, tokens, mask, sum(M.decode(processor, tokens, mask), [])


def score(texts, items, judge):
    """Eqs. (4) to (6) for n texts and the record of each -> (3, n) float32: fmt, acc, con; con is
    nan where F failed, and where no thought is asked for."""
    rows = rewards.score(texts, items, judge)
    return torch.tensor([[row[part] for row in rows] for part in ("fmt", "acc", "con")])


def without_failures(con):
    """R_con (N, G) with nan where F failed -> the same with the group's mean there. Such a sample's
    part of the advantage is 0, and the others' (--scale none) is what it would be in a group
    without it: a failure of F is not a reward of 0."""
    mean = torch.nan_to_num(con.nanmean(1, keepdim=True))                # (N, 1)
    return torch.where(con.isnan(), mean, con)                           # (N, G)


def micro_batches(batch, tokens, mask, args):
    """The N questions, as many whole groups at a time as --micro_tokens allows -> [(slice of the
    rows, batch, tokens, mask of those)]."""
    N, G, T = tokens.shape
    size = max(1, args.micro_tokens // (batch["input_ids"].shape[1] + G * T))
    for i in range(0, N, size):
        rows = slice(i, i + size)
        yield rows, M.rows_of(batch, rows), tokens[rows], mask[rows]


@torch.no_grad()
def reference_logprobs(policy, sft_copy, batch, tokens, mask, args):
    """log pi_SFT of the sampled tokens -> (N, G, T)."""
    logp = torch.zeros(tokens.shape, device=tokens.device)
    with reference_of(policy, sft_copy) as pi_sft:
        for rows, *part in micro_batches(batch, tokens, mask, args):
            logp[rows] = M.token_logprobs(pi_sft, *part, temperature=args.temperature)
    return logp


def update(policy, parameters, run, batch, tokens, mask, A, ref_logp, old_logp, args):
    """One optimiser step of Eq. (8). A (N, G), ref_logp and old_logp (N, G, T); old_logp None: the
    policy's own before this step -> log pi_theta (N, G, T), gradient norm, sums: the loss, and
    policy_loss's metrics as sums over this process's tokens, which can be added up, and 1 if the
    step was skipped (see sft.Run.step), else 0."""
    total = M.sum_over_ranks(int(mask.sum()) if args.loss_norm == "token" else A.numel())
    logps = torch.zeros(tokens.shape, device=tokens.device)
    sums = Counter(loss=0.0, kl=0.0, ratio=0.0, clip_low=0.0, clip_high=0.0)  # on every rank alike
    for rows, *part in micro_batches(batch, tokens, mask, args):
        logp = M.token_logprobs(policy, *part, temperature=args.temperature)  # (n, G, T)
        logps[rows] = logp.detach()
        old = logp.detach() if old_logp is None else old_logp[rows]      # None: the ratio is 1
        loss, metrics = policy_loss(
            logp.flatten(0, 1), old.flatten(0, 1), ref_logp[rows].flatten(0, 1),
            A[rows].flatten(), mask[rows].flatten(0, 1), eps=args.eps, beta=args.beta,
            loss_norm=args.loss_norm, kl=args.kl, max_tokens=args.max_new_tokens, total=total)
        loss.backward()
        sums["loss"] += loss.item()
        for name, mean in metrics.items():
            sums[name] += mean * int(mask[rows].sum())
    M.sum_gradients(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip).item()
    skipped = 0
    if total:  # else no group of any process has spread: there is nothing to learn from
        skipped = run.step(M.sum_over_ranks(sums["loss"]), norm)
    run.optimizer.zero_grad()
    return logps, norm, sums, skipped


def learning_rate(step, steps, args):
    """A linear rise over --warmup steps; constant after that, or falling to 0."""
    rise = (step + 1) / max(1, args.warmup)
    fall = 1 - step / steps if args.schedule == "linear" else 1
    return args.lr * min(rise, fall)

# ---- before the first step -----------------------------------------------------------------------

def questions(args, world):
    """The questions to train on; DataError where no run of `world` processes can be made of what
    was asked for."""
    parse_spec(args.judge)  # before a model is loaded
    expect(args.G >= 2, f"--G {args.G}: a group of one has no advantage over its own mean; "
                        "expected at least 2")
    expect(os.path.realpath(args.model) != os.path.realpath(args.out),
           f"--out {args.out} is the folder of the SFT policy itself; name another")
    expect(args.thinking != "none" or any(args.weights[:2]),
           "--thinking none --weights 0 0 1: without a thought there is no consistency to reward")
    expect(args.oversample >= 1, f"--oversample {args.oversample}: expected at least 1")
    expect(args.drop_no_spread or args.oversample == 1,
           "--oversample is for --drop_no_spread: without it every question sampled is trained on")
    records = data.read_records(args.data, "train", args.only, args.thinking)
    per_step = min(args.batch // args.G, len(records))
    expect(args.batch % args.G == 0 and per_step >= world,
           f"--batch {args.batch}: expected a multiple of --G {args.G}, and at least one question "
           f"for each of the {world} processes ({len(records)} questions in all)")
    return records


def check_gold(records, judge, lexical=True):
    """The gold answers must score 1 by the code that will score the policy's; else the reward, not
    the policy, is wrong. The lexical F is asked about all of them. A model may differ on some, and
    each costs a call: it is asked about GOLD_ASKED, and must not fail on all, nor on something
    new that no kept reply of a server answers."""
    thoughts = [f"It is {time.time()}. So it is {r['options'][0]}." for r in records[:2]]
    expect(lexical or not all(map(rewards.failed, judge(thoughts, records[:2]))),
           f"--judge: F failed: {failures(judge.usage)}")
    records = [r for r in records if r["thought"] is not None]
    if not lexical:
        records = evaluation.subset(records, GOLD_ASKED)
    if not records:
        return
    scores = score([rewards.answer_text(r) for r in records], records, judge)  # (3, n)
    con = scores[2]
    if not lexical and records[0].get("thinking") != "none":
        expect(not con.isnan().all(), f"--judge: F failed on all of {len(con)} gold thoughts: "
                                      f"{failures(judge.usage)}")
        print(f"F agrees with {int(con.nansum())} of {len(con)} gold thoughts and failed on "
              f"{int(con.isnan().sum())}")
        scores = scores[:2]
    for name, part in zip(("format", "accuracy", "consistency"), scores, strict=False):
        bad = (part < 1).nonzero()[:, 0].tolist()  # nan, where no thought is asked for, isn't
        if bad:
            raise DataError(f"record {records[bad[0]]['id']!r}: its gold answer has {name} reward "
                            f"{part[bad[0]]:g}, expected 1 (so for {len(bad)} of {len(records)} "
                            "records)")

# ---- what a person looks at ----------------------------------------------------------------------

class Clock:
    """Seconds and peak memory of the parts of a step."""

    def __init__(self, device):
        self.device, self.figures = device, {}
        M.peak_memory(device)  # from here on
        self.last = time.perf_counter()

    def tick(self, part):
        """Book what has passed since the last tick on `part`, when the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.figures[f"seconds_{part}"] = now - self.last
        self.figures[f"peak_mb_{part}"] = round(M.peak_memory(self.device))
        self.last = now


MEANS = dict(  # the figures of a step, by what they are means over
    completions=("format", "accuracy", "length", "truncated", "thoughts_cut"),
    judged=("consistency",), rewarded=("reward",),  # those without a verdict of F are left out
    groups=("no_spread",), thoughts=("judge_failed",),
    tokens=("kl", "ratio", "clip_low", "clip_high", "sampled_nll"))  # those trained on


def figures_of(texts, ended, scores, R, mask, trained_mask, logp, sums, args):
    """A step's figures, over all processes. mask, trained_mask: of the completions that were
    sampled, and of those that were trained on. sampled_nll is minus the mean log-probability of the
    latter's tokens (logp is 0 outside the mask), an estimate of the policy's entropy per token."""
    fmt, acc, con = scores
    thoughts = [rewards.parse_completion(text, args.thinking)[0] for text in texts]
    thoughts = [thought for thought in thoughts if thought is not None]
    failed = con.isnan().sum() if args.thinking != "none" else 0
    judged = ~con.isnan()                                                # (N, G)
    rewarded = judged | (args.thinking == "none" or not args.weights[2])
    local = dict(
        sums, completions=R.numel(), groups=len(R), thoughts=len(thoughts), judged=judged.sum(),
        rewarded=rewarded.sum(), tokens=trained_mask.sum(), trained_on=len(trained_mask),
        reward=R[rewarded].sum(), format=fmt.sum(), accuracy=acc.sum(),
        consistency=con.nansum(), length=mask.sum(),
        truncated=(~ended).sum(), no_spread=(~group_spread(R)).sum(), judge_failed=failed,
        thoughts_cut=sum(rewards.visible_thought(t)[1] for t in thoughts), sampled_nll=-logp.sum())
    numbers = torch.tensor([float(x) for x in local.values()], dtype=torch.float64)
    total = dict(zip(local, M.sum_over_ranks(numbers).tolist(), strict=True))
    figures = {name: total[name] for name in ("loss", "trained_on", "thoughts")}
    for what, names in MEANS.items():
        for name in names:
            figures[name] = total[name] / max(1, total[what])
            if what in ("judged", "rewarded") and not total[what]:
                figures[name] = math.nan
    return figures


def failed_share(asked):
    """The share of the last JUDGE_WINDOW thoughts, or some more, on which F failed; 0 as long as
    there were fewer. asked: the thoughts of each rollout, and the share of failures among them."""
    thoughts = failed = 0
    for n, share in reversed(asked):
        thoughts, failed = thoughts + n, failed + n * share
        if thoughts >= JUDGE_WINDOW:
            return failed / thoughts
    return 0.0


def failing(judge, asked, limit):
    """Why the run should stop where F failed on more than a share of `limit` -> DataError, or
    None."""
    share = failed_share(asked)
    if share > limit:
        return DataError(f"--judge: F failed on {100 * share:.0f} % of the last thoughts "
                         f"({failures(judge.usage)})")
    return None


def show(folder, step, records, texts, rewards):
    """Append some groups to completions.jsonl, for eyes. rewards (N, G, 4): fmt, acc, con, R."""
    N, G, _ = rewards.shape
    path = os.path.join(folder, "completions.jsonl")
    with data.naming(path), open(path, "a") as f:
        for n in range(min(N, SHOWN)):
            completions = []
            for text, scores in zip(texts[n * G:], rewards[n].tolist(), strict=False):
                scores = [None if math.isnan(x) else x for x in scores]  # JSON has no nan
                named = dict(zip(("fmt", "acc", "con", "reward"), scores, strict=True))
                completions.append(dict(text=text, **named))
            line = {k: records[n][k] for k in ("id", "answer", "options")}
            f.write(json.dumps(dict(step=step, **line, completions=completions)) + "\n")


def passes(step, mu, every):
    """Whether one of the mu optimiser steps after `step` is a multiple of `every` (0: never)."""
    return every > 0 and (step + mu) // every > step // every

# ---- the loop ------------------------------------------------------------------------------------

def main(argv=None):
    with sft.Run(keep_adapter=True) as run:
        train(run, argv)


def train(run, argv):
    args = sft.knobs(KNOBS, __doc__, argv)
    args.out = args.out or os.path.join(args.root, "grpo")
    args.model = args.model or os.path.join(args.root, "sft")
    args.data = args.data or [os.path.join(args.root, "phantoms", "phantoms.jsonl")]
    rank, world, device = M.setup_devices()
    args.fixed["nproc_per_node (processes in all)"] = world  # each samples with its own numbers
    records, held_out = questions(args, world), sft.held_out_questions(args)[rank::world]
    if rank == 0:
        data.check_images(records)

    # The policy starts as pi_SFT, and pi_SFT is the reference.
    dtype = torch.bfloat16 if args.lora and device.type == "cuda" else torch.float32
    policy, processor = M.load(args.model, dtype=dtype, device=device, max_pixels=args.max_pixels)
    sft_copy = None if args.lora else frozen_copy(policy)
    M.check_texts(processor, records, rewards.question_text)
    policy, parameters, optimizer = sft.trainable(policy, args)
    judge = make_judge(args.judge, args.judge_sees, concurrency=args.judge_concurrency,
                       timeout=args.judge_timeout, cache=os.path.join(args.root, "replies.jsonl"),
                       reference=(lambda: reference_of(policy, sft_copy), processor.tokenizer))
    if rank == 0:
        check_gold(records, judge, args.judge == "lexical")

    wanted = args.batch // args.G                  # questions to train on, over all processes
    sampled = round(wanted * args.oversample)      # questions to sample for them
    epoch_rollouts = max(1, len(records) // sampled)
    steps = max(1, round(args.epochs * epoch_rollouts)) * args.mu
    start = run.open(args, policy, processor, optimizer, records, rank)
    end = math.ceil(min(steps, args.max_steps or steps) / args.mu) * args.mu  # whole rollouts
    generator = torch.Generator(device)
    reader = daemon_threads(1)              # the thread in which F reads
    asked = []                              # each rollout's thoughts and share of F's failures

    bar = tqdm(range(start, end, args.mu), initial=start // args.mu, total=end // args.mu,
               desc="grpo", unit="rollout", disable=rank > 0)
    for step in bar:  # one rollout, then mu optimiser steps on it
        clock = Clock(device)

        # This process's share of the questions. A resumed run has the same, and the same samples.
        epoch, place = divmod(step // args.mu, epoch_rollouts)
        order = sft.epoch_order(len(records), epoch, args.seed)[place * sampled:][:sampled]
        mine = dealt([records[i] for i in order], rank, world)
        generator.manual_seed((args.seed * 1_000_003 + step) * 1_009 + rank)

        # Eq. (2): G completions for each.
        batch, tokens, mask, texts = rollout(policy, processor, mine, generator, args)
        ended = M.finished(batch, tokens, mask)                                  # (N, G)
        sampled_mask = mask
        clock.tick("rollout")

        # Eqs. (3) to (6): the rewards. Eq. (7): the advantages.
        items = [record for record in mine for _ in range(args.G)]
        pending = reader.apply_async(score, (texts, items, judge))
        if not args.drop_no_spread:  # while F reads
            ref_logp = reference_logprobs(policy, sft_copy, batch, tokens, mask, args)
            clock.tick("reference")
        fmt, acc, con = scores = pending.get().view(3, len(mine), args.G)       # (3, N, G)
        R = rewards.total_reward(fmt, acc, without_failures(con), args.weights)  # (N, G)
        A = group_advantages(R, args.scale)                                      # (N, G)
        clock.tick("judge")

        # The groups to train on: all, or those with spread.
        if args.drop_no_spread:
            most = len(range(rank, wanted, world))  # this process's part of them
            rows = group_spread(R).nonzero()[:most, 0].tolist()
            batch, tokens, mask, A = M.rows_of(batch, rows), tokens[rows], mask[rows], A[rows]
            ref_logp = reference_logprobs(policy, sft_copy, batch, tokens, mask, args)
            clock.tick("reference")

        waiting = M.meet()  # s
        clock.tick("waiting")

        # Eq. (8): mu optimiser steps. pi_old is the policy before the first of them.
        old_logp = ref_logp if args.ratio == "sft" else None
        skipped = 0
        for inner in range(args.mu):
            optimizer.param_groups[0]["lr"] = learning_rate(step + inner, steps, args)
            logp, norm, sums, lost = update(policy, parameters, run, batch, tokens, mask,
                                            A.to(device), ref_logp, old_logp, args)
            skipped += lost
            if old_logp is None:
                old_logp = logp
        done = run.done = step + args.mu
        clock.tick("update")

        figures = figures_of(texts, ended, scores, R, sampled_mask, mask, logp, sums, args)
        asked.append((figures["thoughts"], figures["judge_failed"]))
        seconds = sum(x for name, x in clock.figures.items() if name.startswith("seconds"))
        if passes(step, args.mu, args.eval_every):
            figures["held_out_accuracy"] = sft.held_out_accuracy(policy, processor, held_out, judge,
                                                                 args.max_new_tokens)
        bar.set_postfix({k: f"{figures[k]:.3f}" for k in ("reward", "accuracy", "kl")})
        if rank == 0:
            sft.log(args.out, step=done, **figures, grad_norm=norm, skipped=skipped,
                    lr=optimizer.param_groups[0]["lr"],
                    **clock.figures | dict(seconds_waiting=waiting),
                    tokens_per_second=figures["length"] * sampled * args.G / seconds)
            if args.show_every and step // args.mu % args.show_every == 0:
                show(args.out, done, mine, texts, torch.stack([*scores, R], -1))
        due = passes(step, args.mu, args.save_every)
        run.after(end, due, failing(judge, asked, args.judge_failures))
    M.close_devices()


if __name__ == "__main__":
    M.run(main)
