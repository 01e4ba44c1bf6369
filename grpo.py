"""Stage 2, Reasoning Reinforcement: Con-GRPO, Eqs. (2), (7) and (8).

    for each rollout:                          # `train`, at the end of this file
        Y = G completions of each question                         Eq. (2)    rollout
        R = their rewards for format, accuracy, consistency        Eqs. (3-6) rewards.py
        A = R less the mean of the question's G rewards            Eq. (7)    group_advantages
        mu times: a gradient step on min(r A, clip(r) A) - beta KL Eq. (8)    policy_loss, update

r is a token's probability under the policy, divided by that under pi_SFT (--ratio sft, as the paper
prints it, the paper preset) or by that under the policy that sampled it (--ratio old, the tiny
preset). The KL divergence is KL(policy || pi_SFT). With --ratio old and one update per rollout r is
1 and the clip never acts: the step is REINFORCE with the group's mean as baseline and a KL term.
With --ratio sft the clip is a fence around pi_SFT: an advantage above 0 stops acting on a token
once its probability is over 1 + eps times pi_SFT's, one below 0 once it is under 1 - eps times it.

    torchrun grpo.py                                        # the phantoms: out/sft to out/grpo
    torchrun --nproc_per_node=8 grpo.py --model out/sft --data medad38k/medad38k.jsonl
    python grpo.py --model out/tiny-base --out out/rl-only  # Table 2's RL-only, without SFT
    python grpo.py --weights 0 1 0 --out out/acc-only       # its Acc-only; 0 0 1: Con-only

Left out on purpose: a value network (the group's mean is the baseline), a replay buffer, sampling
ahead of the update, asymmetric clipping.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported: no traceback

import contextlib
import copy
import functools
import math
import os
import time
from statistics import fmean

import torch
from tqdm import tqdm

import data
import eval as evaluation  # eval is Python's
import model as M
import rewards
import sft
from data import DataError, expect
from judge import failures, make_judge, parse_spec
from rewards import failed
from sft import SHARED, Knob

GOLD_ASKED = 32  # gold thoughts that F, if it is a model, is asked about before the first step
SHOWN = 4        # groups of a rollout that are written to completions.jsonl
LOW_LR = 1e-5    # learning rate of LoRA below which there is a warning

# Knob(type, default of the `tiny` preset, of `paper`, meaning): `paper` has the figures of the
# paper's section 4.1, where it gives them. F is lexical in both; --judge names a model. On --resume
# knobs without may_change are compared; of model and data, digests of what they hold, not names.
KNOBS = dict(
    model=Knob(str, "ROOT/sft", "ROOT/sft", "folder of pi_SFT: where the policy starts, and the "
               "reference", may_change=True),
    out=Knob(str, "ROOT/grpo", "ROOT/grpo", "folder of this run", may_change=True),
    # the algorithm
    epochs=Knob(float, 1.0, 1.0, "passes over the training questions; in each, a last batch that "
               "isn't full is left out, unless it is the only one", positive=True),
    batch=Knob(int, 128, 64, "completions per optimiser step over all processes", positive=True),
    G=Knob(int, 8, 8, "completions per question: the group", positive=True),
    max_new_tokens=Knob(int, M.MAX_NEW_TOKENS["tiny"], M.MAX_NEW_TOKENS["paper"],
                        "tokens at which a completion is cut off", positive=True),
    temperature=Knob(float, 1.0, 1.0, "of the policy, sampled and scored", positive=True),
    top_p=Knob(float, 1.0, 1.0, "sample from the likeliest tokens that hold this much probability; "
               "under 1 biases the ratio", positive=True, most=1),
    weights=Knob(float, rewards.WEIGHTS, rewards.WEIGHTS, "of format, accuracy, consistency: "
                 "lambda of Eq. (3)"),
    scale=Knob(str, "none", "none", "what Eq. (7) is divided by: nothing, or the group's standard "
               "deviation (Shao et al.)", choices=("none", "std")),
    drop_no_spread=Knob(bool, True, False, "leave out groups without spread, see group_spread"),
    ratio=Knob(str, "old", "sft", "denominator of Eq. (8)'s ratio: pi_SFT as printed, or the "
               "policy that sampled", choices=("sft", "old")),
    eps=Knob(float, 0.2, 0.2, "clip range of the ratio, epsilon of Eq. (8)"),
    beta=Knob(float, 0.01, 0.04, "weight of the KL penalty, beta of Eq. (8)"),
    kl=Knob(str, "k3", "k3", "estimator of the KL divergence", choices=("k1", "k2", "k3")),
    loss_norm=Knob(str, "sum", "sum", "over a completion's tokens: Eq. (8)'s sum, or another "
                   "normalisation", choices=("sum", "sequence", "token", "constant")),
    mu=Knob(int, 1, 1, "optimiser steps on the same completions", positive=True),
    # what is trained, and how fast
    lora=Knob(int, 16, 64, "rank of LoRA; 0 trains every parameter against a frozen copy"),
    lr=Knob(float, 1e-3, 1e-6, "peak learning rate of AdamW", positive=True),
    warmup=Knob(int, 10, 10, "optimiser steps in which the learning rate rises"),
    schedule=Knob(str, "linear", "constant", "the learning rate: constant after the rise, or the "
                  "lower of the rise and a line from lr at the first step to 0 after the last",
                  choices=("constant", "linear")),
    # the evaluator F of Eq. (6)
    judge=Knob(str, "lexical", "lexical", "lexical, hf:NAME_OR_PATH, hf:reference or "
               "openai:BASE_URL#MODEL"),
    judge_sees=Knob(str, "cut", "cut", "the thought with letters and answer statements cut, or "
                    "raw as printed", choices=("cut", "raw")),
    judge_concurrency=Knob(int, 32, 32, "requests to a server at a time, per process",
                           positive=True, may_change=True),
    judge_timeout=Knob(float, 60.0, 60.0, "seconds per request", positive=True, may_change=True),
    judge_failures=Knob(float, 0.5, 0.5, "share of a rollout's thoughts without a verdict, past "
                        "which the run saves and stops", may_change=True),
    # the machine, and what is written
    micro_tokens=Knob(int, 8192, 8192, "tokens per forward pass on one device: whole groups, each "
                      "a prompt and its G completions", positive=True, may_change=True),
    save_every=Knob(int, 0, 50, "optimiser steps between checkpoints, 0 = one at the end",
                    may_change=True),
    show_every=Knob(int, 10, 10, "rollouts between samples in completions.jsonl, 0 = never",
                    may_change=True),
    **SHARED)

# ---- the equations -------------------------------------------------------------------------------

def group_advantages(rewards, scale="none"):
    """Eq. (7): A(Y_i) = R(Y_i) - 1/G sum_j R(Y_j). rewards (N, G) float -> advantages (N, G).

    scale "std" divides by the group's standard deviation (over G - 1) plus 1e-4, as Shao et al.
    2024 do; Eq. (7) does not."""
    R = rewards                                                          # (N, G)
    A = R - R.mean(1, keepdim=True)                                      # (N, G)
    # Where all G rewards are equal rounding may leave 1e-8, not 0; AdamW, which scales gradients,
    # would make a full step of it.
    A = A * group_spread(R)[:, None]                                     # (N, G)
    if scale == "std":
        A = A / (R.std(1, keepdim=True) + 1e-4)
    return A


def group_spread(rewards):
    """rewards (N, G) -> (N,) bool: whether a group's rewards differ.

    Where they don't, every advantage of Eq. (7) is 0, and of the group's part of Eq. (8) only the
    KL penalty is left. --drop_no_spread drops such groups with their penalty: Eq. (8)'s mean is
    then over the groups with spread, and neither reference nor update has to read the others."""
    return rewards.max(1).values - rewards.min(1).values > 1e-6          # (N,); less is rounding


def kl_divergence(logp, ref_logp, kind="k3"):
    """D_KL(pi_theta || pi_SFT) of Eq. (8), estimated at the sampled tokens (Schulman):
    (B, T) and (B, T) -> (B, T).

    k1 = log(pi/ref), k2 = k1^2 / 2, k3 = ref/pi - 1 + log(pi/ref). As values k1 and k3 are
    unbiased. What trains is their gradient, token by token. In expectation k2's is that of
    KL(pi || ref), which Eq. (8) asks for; k3's is that of KL(ref || pi), nearly the same where pi
    is near ref; k1's is zero: no penalty at all."""
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
    sampling policy's. The paper doesn't say whether the KL term stands inside the sum over t; here
    it does, as it is estimated at each token (kl_divergence).

    loss_norm: "sum" mean over B of the sum over t (Eq. 8); "sequence" mean over t, then over B
    (Shao et al.); "token" mean over all tokens; "constant" sum over t divided by max_tokens, then
    mean over B (Dr. GRPO). total: the global batch's B (for "token": its tokens) where this is a
    micro-batch of it, so that the losses of micro-batches and ranks add up. metrics: means over
    the tokens."""
    # torch.where, not a product with the mask: at padding anything may stand, and 0 * inf is nan
    logp, old_logp, ref_logp = (torch.where(mask, x, 0.0) for x in (logp, old_logp, ref_logp))
    r = torch.exp(logp - old_logp)                                       # (B, T)
    A = advantages[:, None]                                              # (B, 1)
    surrogate = torch.min(r * A, r.clamp(1 - eps, 1 + eps) * A)          # (B, T)
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
        metrics = dict(kl=(D_KL.sum() / tokens).item(),
                       ratio=(torch.where(mask, r, 0.0).sum() / tokens).item(),
                       clip_low=((mask & (r < 1 - eps) & (A < 0)).sum() / tokens).item(),
                       clip_high=((mask & (r > 1 + eps) & (A > 0)).sum() / tokens).item())
    return loss, metrics

# ---- the reference -------------------------------------------------------------------------------

def frozen_copy(policy):
    """The reference of a fully fine-tuned policy; under LoRA `reference_of` needs no copy. On CUDA
    its matrices are kept in bf16, to which autocast rounds them anyway."""
    frozen = copy.deepcopy(policy).requires_grad_(False).eval()
    if frozen.device.type == "cuda":
        for layer in M.matrices_of(frozen):
            layer.to(torch.bfloat16)
    return frozen


@contextlib.contextmanager
def reference_of(policy, sft_copy=None):
    """Inside, the value is pi_SFT: the frozen copy, or under LoRA the policy with its adapter off.
    That is pi_SFT because model.save merged stage 1's adapter into the weights, to which stage 2's
    was then added; otherwise it would be the base model."""
    if sft_copy is not None:
        yield sft_copy
    else:
        with policy.disable_adapter():
            yield policy

# ---- the parts of a step -------------------------------------------------------------------------

def questions_of(records, step, n, args, rank, world):
    """This process's part of the n questions of the rollout at optimiser step `step`. The n
    questions depend on step and seed alone, not on `world`. They are dealt out by length, so that
    no process gets all the long ones."""
    per_epoch = max(1, len(records) // n)  # rollouts, of mu steps each
    epoch, place = divmod(step // args.mu, per_epoch)
    chosen = sft.epoch_order(len(records), epoch, args.seed)[place * n:][:n]
    by_length = sorted(chosen, key=lambda i: len(rewards.question_text(records[i])))
    mine = by_length[rank::world]
    return [records[i] for i in chosen if i in mine]  # in the epoch's order, not by length


def rollout(policy, processor, records, generator, args):
    """Eq. (2): G completions for each of N questions, from the current policy -> the questions'
    batch (model.tensors; under LoRA with its images' features), tokens (N, G, T), mask (N, G, T)
    bool, True up to and including the stop token, texts (N * G)."""
    batch = M.encode(processor, records, generator.device)
    if args.lora:  # the vision tower is frozen: it serves sampling, reference and update at once
        batch = M.with_image_features(policy, batch)
    tokens, mask = M.sample(policy, batch, group_size=args.G, max_new_tokens=args.max_new_tokens,
                            temperature=args.temperature, top_p=args.top_p, generator=generator)
    texts = [text for group in M.decode(processor, tokens, mask) for text in group]
    return batch, tokens, mask, texts


def score_groups(texts, records, judge, args):
    """Eqs. (4) to (6) for the G completions of each of N records -> rows (rewards.score), N * G of
    them, and their fmt, acc, con, each (N, G) float32; con is nan where F failed, and where no
    thought is asked for."""
    items = [record for record in records for _ in range(args.G)]
    rows = rewards.score(texts, items, judge)
    scores = torch.tensor([[row[name] for row in rows] for name in ("fmt", "acc", "con")])
    fmt, acc, con = scores.view(3, len(records), args.G)
    return rows, fmt, acc, con


def without_failures(con):
    """R_con (N, G) with nan where F failed -> the same with the group's mean there (0 if F failed
    on all): a failure of F is not a reward of 0. The consistency part of that completion's
    advantage is then 0; the other completions' is what it would be in a group without it (but for
    --scale std)."""
    mean = torch.nan_to_num(con.nanmean(1, keepdim=True))                # (N, 1)
    return torch.where(con.isnan(), mean, con)                           # (N, G)


def micro_batches(batch, tokens, mask, args):
    """Cuts the N groups into parts of at most --micro_tokens tokens, but at least one group. Yields
    of each the slice of N that it is, then the inputs of M.token_logprobs: batch, tokens, mask."""
    N, G, T = tokens.shape
    size = max(1, args.micro_tokens // (batch["input_ids"].shape[1] + G * T))
    for i in range(0, N, size):
        part = slice(i, i + size)
        yield part, M.rows_of(batch, part), tokens[part], mask[part]


@torch.no_grad()
def reference_logprobs(reference, batch, tokens, mask, args):
    """log pi_SFT of the sampled tokens -> (N, G, T). reference(): see reference_of."""
    logp = torch.zeros(tokens.shape, device=tokens.device)
    with reference() as pi_sft:
        for part, *inputs in micro_batches(batch, tokens, mask, args):
            logp[part] = M.token_logprobs(pi_sft, *inputs, temperature=args.temperature)
    return logp


def update(policy, run, batch, tokens, mask, A, ref_logp, old_logp, lr, args):
    """One optimiser step of Eq. (8). A (N, G), ref_logp and old_logp (N, G, T); old_logp None: the
    policy's own before this step, so that the ratio is 1. -> log pi_theta before the step
    (N, G, T), and the step's figures over all processes."""
    total = M.sum_over_ranks(int(mask.sum()) if args.loss_norm == "token" else A.numel())
    logps, loss_sum = torch.zeros(tokens.shape, device=tokens.device), 0.0
    sums = dict.fromkeys(("kl", "ratio", "clip_low", "clip_high"), 0.0)  # over the tokens
    for part, *inputs in micro_batches(batch, tokens, mask, args):
        logp = M.token_logprobs(policy, *inputs, temperature=args.temperature)  # (n, G, T)
        logps[part] = logp.detach()
        old = logp.detach() if old_logp is None else old_logp[part]
        loss, metrics = policy_loss(  # (n, G, T) -> (B, T): B = n * G
            logp.flatten(0, 1), old.flatten(0, 1), ref_logp[part].flatten(0, 1),
            A[part].flatten(), mask[part].flatten(0, 1), eps=args.eps, beta=args.beta,
            loss_norm=args.loss_norm, kl=args.kl, max_tokens=args.max_new_tokens, total=total)
        loss.backward()
        loss_sum += loss.item()
        for name in sums:
            sums[name] += metrics[name] * int(mask[part].sum())  # from a mean to a sum
    # total is 0 where --drop_no_spread dropped every group of every process: then no step is made.
    figures = run.step(loss_sum, lr, learn=total > 0)
    sums["sampled_nll"] = -logps.sum().item()  # logps are 0 outside the mask
    figures |= token_means(sums, mask)
    return logps, figures | dict(trained_on=M.sum_over_ranks(len(A)))  # groups


def learning_rate(step, steps, args):
    """The lower of a linear rise over --warmup steps and, with --schedule linear, a linear fall to
    0 over the whole run."""
    rise = (step + 1) / max(1, args.warmup)
    fall = 1 - step / steps if args.schedule == "linear" else 1
    return args.lr * min(rise, fall)

# ---- before the first step -----------------------------------------------------------------------

def phantoms_of(args):
    """Without --data: [the file of the phantoms under ROOT], for a tiny model alone."""
    file = os.path.join(args.root, "phantoms", "phantoms.jsonl")
    expect(M.is_tiny(args.model) and os.path.exists(file),
           f"no --data: expected FILE.., or a tiny --model ({args.model}) and the phantoms "
           f"({file}), which sft.py makes")
    return [file]


def tell_what_it_trains_on(records, processor, args):
    """Print the number of questions, and warn of what is likely to spoil the run."""
    print(f"{len(records)} training questions of {', '.join(args.data)}")
    taught = evaluation.taught_thinking(args.model, args.thinking)
    if taught != args.thinking:
        print(f"warning: {args.model} was trained with --thinking {taught}, and is asked with "
              f"--thinking {args.thinking} here")
    if args.lora and args.lr < LOW_LR:
        print(f"warning: --lr {args.lr:g} moves LoRA very little: it needs about ten times the "
              "learning rate of --lora 0 (README, Other choices)")
    gold = [rewards.answer_text(r) for r in records if r["thought"] is not None]
    if args.judge == "lexical" and args.thinking != "none" and args.weights[2] and not gold:
        print("warning: no question has a thought, so that nothing shows whether the lexical F can "
              "read such thoughts: look at `undecided` in metrics.jsonl, or name a --judge")
    ids = processor.tokenizer(gold)["input_ids"] if gold else []
    long = sum(len(row) >= args.max_new_tokens for row in ids)  # the stop token is not in it
    if long:
        print(f"warning: {long} of {len(gold)} gold answers are longer than --max_new_tokens "
              f"{args.max_new_tokens}: a completion like them is cut off and gets no reward")


def questions_to_train_on(args, world):
    """The records of --data; DataError where no run of `world` processes can be made of what was
    asked for."""
    parse_spec(args.judge)  # before a model is loaded
    expect(args.G >= 2, f"--G {args.G}: a group of one has no advantage over its own mean; "
                        "expected at least 2")
    used = args.weights[:2] if args.thinking == "none" else args.weights
    given = " ".join(f"{weight:g}" for weight in args.weights)
    expect(sum(used) > 0, f"--weights {given}: expected three numbers, not all of them 0 "
                          "(--thinking none has no consistency to reward)")
    records = data.read_records(args.data, "train", args.only, args.thinking)
    per_step = min(args.batch // args.G, len(records))
    expect(args.batch % args.G == 0 and per_step >= world,
           f"--batch {args.batch}: expected a multiple of --G {args.G}, and at least one question "
           f"for each of the {world} processes ({len(records)} questions in all)")
    return records


def check_gold(records, judge, lexical=True):
    """The gold answers must score 1 by the code that will score the policy's; else the reward, not
    the policy, is wrong. The lexical F is asked about all of them. A model may disagree with some,
    and each costs a call, so it is asked about GOLD_ASKED."""
    gold, must = [r for r in records if r["thought"] is not None], ["fmt", "acc", "con"]
    if not lexical:
        # First two thoughts that no run has had: kept replies would hide that a server has died.
        new = [f"It is {time.time()}. So it is {r['options'][0]}." for r in records[:2]]
        expect(not all(map(failed, judge(new, records[:2]))),
               f"--judge: F failed: {failures(judge.usage)}")
        gold, must = evaluation.subset(gold, GOLD_ASKED), ["fmt", "acc"]
    rows = rewards.score([rewards.answer_text(r) for r in gold], gold, judge)
    asked = [row for row in rows if row["thought"]]  # none with --thinking none
    if asked and not lexical:
        print(f"F agrees with {sum(row['con'] == 1 for row in asked)} of {len(asked)} gold "
              f"thoughts and failed on {sum(failed(row['verdict']) for row in asked)}")
    for name in must:
        bad = [row["id"] for row in rows if row[name] < 1]  # not nan: there no thought is asked for
        advice = "; where the rule can't read thoughts, --judge names a model" * (name == "con")
        expect(not bad, f"record {bad[:1]}: its gold answer has no {name} reward (so for "
                        f"{len(bad)} of {len(rows)} records{advice})")

# ---- what a person looks at ----------------------------------------------------------------------

def mean(values):
    """The mean of the values that are not nan; nan where none is left."""
    known = [x for x in values if not math.isnan(x)]
    return fmean(known) if known else math.nan


def token_means(sums, mask):
    """{figure: its sum over this process's tokens}, mask of the tokens -> {figure: its mean over
    the tokens of all processes}, nan without any. sampled_nll, minus the mean log-probability of a
    token that is trained on, estimates the policy's entropy there (if --mu is 1)."""
    mine = torch.tensor([*sums.values(), int(mask.sum())]).double()
    *totals, tokens = M.sum_over_ranks(mine).tolist()
    return {name: x / tokens if tokens else math.nan for name, x in zip(sums, totals, strict=True)}


def figures_of(rows, R, ended, mask, args):
    """A rollout's figures: means over the sampled completions of all processes, each over those
    that have a value for it, not nan: where F failed there is no consistency, nor a reward that
    depends on it. rows: N * G of rewards.score; R, ended (N, G), mask (N, G, T).

    no_spread, accuracy_no_spread: the shares of groups whose rewards, or accuracies, are alike."""
    mine = []  # this process's completions
    parts = (x.flatten().tolist() for x in (R, ended, mask.sum(2)))      # N * G numbers each
    for row, reward, end, length in zip(rows, *parts, strict=True):
        f_failed = failed(row["con"]) and args.thinking != "none"
        of_thought = dict.fromkeys(("judge_failed", "undecided", "thoughts_cut"), math.nan)
        if row["thought"] is not None:
            _, was_cut = rewards.visible_thought(row["thought"], row["options"])
            of_thought = dict(judge_failed=f_failed, undecided=row["verdict"] is None,
                              thoughts_cut=was_cut)
        mine.append(of_thought | dict(
            reward=math.nan if f_failed and args.weights[2] else reward, format=row["fmt"],
            accuracy=row["acc"], consistency=row["con"], length=length, truncated=not end))
    every = M.gather(mine)
    figures = {name: mean([x[name] for x in every]) for name in every[0]}
    figures["tokens"] = sum(x["length"] for x in every)
    acc = torch.tensor([row["acc"] for row in rows]).view_as(R)          # (N, G)
    for name, x in dict(no_spread=R, accuracy_no_spread=acc).items():
        figures[name] = 1 - fmean(M.gather(group_spread(x).tolist()))
    return figures


def due(step, mu, every):
    """Whether one of the mu optimiser steps after `step` is a multiple of `every` (0: never)."""
    return every > 0 and (step + mu) // every > step // every

# ---- the loop ------------------------------------------------------------------------------------

def main(argv=None):
    with sft.Run() as run:
        train(run, argv)


def train(run, argv):
    args = sft.knobs(KNOBS, __doc__, argv)
    args.data = args.data or phantoms_of(args)
    rank, world, device = M.setup_devices()
    # Compared on --resume: each process has its own random numbers.
    args.fixed["nproc_per_node (processes in all)"] = world
    records = questions_to_train_on(args, world)
    held_out = sft.held_out_questions(args, rank, world)

    # The policy starts as pi_SFT, and pi_SFT is the reference (and F, with --judge hf:reference).
    policy, processor, optimizer = sft.policy_of(args, records, device, rank, world)
    if rank == 0:
        tell_what_it_trains_on(records, processor, args)
    sft_copy = None if args.lora else frozen_copy(policy)
    reference = functools.partial(reference_of, policy, sft_copy)
    judge = make_judge(args.judge, args.judge_sees, concurrency=args.judge_concurrency,
                       timeout=args.judge_timeout, cache=os.path.join(args.root, "replies.jsonl"),
                       reference=(reference, processor.tokenizer))
    if rank == 0:
        check_gold(records, judge, args.judge == "lexical")

    n = args.batch // args.G                       # questions per rollout, over all processes
    rollouts = max(1, round(args.epochs * max(1, len(records) // n)))
    steps = rollouts * args.mu                     # optimiser steps, over which --schedule falls
    start = run.open(args, policy, processor, optimizer, rank, keep_adapter=True)
    end = math.ceil(min(steps, args.max_steps or steps) / args.mu) * args.mu  # whole rollouts
    generator = torch.Generator(device)
    if start >= end:  # resumed at its end: a kill there may have cut the checkpoint off
        run.save()

    bar = tqdm(range(start, end, args.mu), initial=start // args.mu, total=end // args.mu,
               desc="grpo", unit="rollout", disable=rank > 0)
    for step in bar:  # one rollout, then mu optimiser steps on it
        clock = sft.Clock(device)

        # Eq. (2): G completions for each question. A resumed run draws the same: the seed
        # depends on --seed, step and rank alone, and differs where one of them does.
        mine = questions_of(records, step, n, args, rank, world)
        generator.manual_seed((args.seed * 1_000_003 + step) * 1_009 + rank)
        batch, tokens, mask, texts = rollout(policy, processor, mine, generator, args)
        ended, full_mask = M.finished(batch, tokens, mask), mask                 # (N, G), (N, G, T)
        clock.tick("rollout")

        # Eqs. (3) to (6): the rewards.
        rows, fmt, acc, con = score_groups(texts, mine, judge, args)             # (N, G) each
        R = rewards.total_reward(fmt, acc, without_failures(con), args.weights)  # (N, G)
        clock.tick("judge")

        # Eq. (7): the advantages. With --drop_no_spread N below is the number of groups kept.
        A = group_advantages(R, args.scale).to(device)                           # (N, G)
        if args.drop_no_spread:
            kept = group_spread(R).nonzero()[:, 0].tolist()
            batch, tokens, mask, A = M.rows_of(batch, kept), tokens[kept], mask[kept], A[kept]

        # Eq. (8): mu optimiser steps. The ratio's denominator is pi_SFT, or pi_old, the policy
        # before the first of them, whose log-probabilities come out of that step.
        ref_logp = reference_logprobs(reference, batch, tokens, mask, args)      # (N, G, T)
        clock.tick("reference")
        clock.wait()
        old_logp = ref_logp if args.ratio == "sft" else None
        skipped = 0
        for inner in range(args.mu):
            lr = learning_rate(step + inner, steps, args)
            logp, last = update(policy, run, batch, tokens, mask, A, ref_logp, old_logp, lr, args)
            if old_logp is None:
                old_logp = logp
            skipped += last["skipped"]
        done = run.done = step + args.mu
        clock.tick("update")

        # What a person looks at: of the whole rollout, and of the last of its mu steps.
        figures = figures_of(rows, R, ended, full_mask, args)
        figures |= last | clock.figures | dict(skipped=skipped)  # skipped: of all mu steps
        seconds = sum(x for name, x in clock.figures.items() if name.startswith("seconds"))
        figures["tokens_per_second"] = figures["tokens"] / seconds
        if due(step, args.mu, args.eval_every):
            figures["held_out_accuracy"] = sft.held_out_accuracy(policy, processor, held_out, judge,
                                                                 args.max_new_tokens)
        bar.set_postfix({k: f"{figures[k]:.3f}" for k in ("reward", "accuracy", "kl")})
        if rank == 0:
            sft.log(args.out, step=done, **figures)
            if args.show_every and step // args.mu % args.show_every == 0:
                sft.show(args.out, done, rows[:SHOWN * args.G], R)
        why = None
        if args.weights[2] and figures["judge_failed"] > args.judge_failures:
            why = DataError(f"--judge: F failed on {figures['judge_failed']:.0%} of the rollout's "
                            f"thoughts ({failures(judge.usage)})")
        run.after(end, due(step, args.mu, args.save_every), why)
    M.close_devices()


if __name__ == "__main__":
    M.run(main)
