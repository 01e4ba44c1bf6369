"""grpo.py: the equations by hand, by finite differences and by exact sums; whole runs, resumed runs, two processes."""
import copy
import inspect
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import lines_of
from faults import toy_score

import data
import grpo
import model as M
import rewards
import sft
from judge import make_judge
from rewards import total_reward

ROOT = Path(__file__).resolve().parent.parent
NORMS = ("sum", "sequence", "token", "constant")


# ---------------------------------------------------------------------------------------------------------------------- Eq. (7)

def test_group_advantages_by_hand():
    """Eq. (7): reward minus the group's mean, each group for itself, and no division."""
    R = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.75, -0.25, -0.25, -0.25], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(grpo.group_advantages(R), expected)


def test_group_advantages_properties():
    """Mean zero in every group; adding a constant to a group's rewards changes nothing; "std" divides by the deviation over
    G - 1 (numpy's default is over G: 7 % off at G = 8), and a group without spread stays at 0."""
    R = torch.rand(5, 8)
    for scale in ("none", "std"):
        A = grpo.group_advantages(R, scale)
        torch.testing.assert_close(A.mean(1), torch.zeros(5), rtol=0, atol=1e-6)
        torch.testing.assert_close(grpo.group_advantages(R + torch.arange(5.)[:, None], scale), A, rtol=1e-4, atol=1e-5)
        for G in range(2, 17):  # exactly: where no group has spread AdamW would make whole steps of what rounding leaves
            assert not grpo.group_advantages(torch.tensor([[1 / 3], [2 / 3], [0.2]]).expand(3, G), scale).any()
    r = R.double().numpy()
    expected = (r - r.mean(1, keepdims=True)) / (r.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(grpo.group_advantages(R, "std").numpy(), expected, rtol=1e-4)


def test_a_failed_judge_is_no_reward_of_zero():
    """A sample whose judge failed has no consistency advantage, and the others' is what it would be in a group without it. A
    group in which F always failed learns from format and accuracy alone."""
    nan = math.nan
    con = torch.tensor([[1.0, nan, 0.0, 0.0], [nan, nan, nan, nan], [1.0, 0.0, 1.0, 0.0]])
    zero = torch.zeros_like(con)
    A = grpo.group_advantages(total_reward(zero, zero, grpo.without_failures(con), (0, 0, 1.0)))
    expected = torch.tensor([[2 / 3, 0.0, -1 / 3, -1 / 3], [0.0, 0.0, 0.0, 0.0], [0.5, -0.5, 0.5, -0.5]])
    torch.testing.assert_close(A, expected, rtol=0, atol=1e-6)
    acc = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).expand(3, -1)
    both = grpo.group_advantages(total_reward(zero, acc, grpo.without_failures(con)))
    torch.testing.assert_close(both, (expected + grpo.group_advantages(acc)) / 3, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------- Eq. (8)

# Two completions, of 3 and 1 tokens; ratios 1.5, 0.5, 1 | 0.5; eps 0.2. Surrogates by hand:
#   A = +2: min(3, 2.4) = 2.4 clipped;  min(1, 1.6) = 1 not clipped;  2
#   A = -1: min(-0.5, -0.8) = -0.8 clipped
RATIO = torch.tensor([[1.5, 0.5, 1.0], [0.5, 9.0, 9.0]])
ADVANTAGES = torch.tensor([2.0, -1.0])
MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize("loss_norm, expected", [
    ("sum", -(5.4 - 0.8) / 2), ("sequence", -(5.4 / 3 - 0.8) / 2), ("token", -(5.4 - 0.8) / 4),
    ("constant", -(5.4 - 0.8) / (2 * 10))])
def test_policy_loss_by_hand(loss_norm, expected):
    """The clipped surrogate under the four normalisations, with either sign of A; the metrics beside it."""
    loss, metrics = grpo.policy_loss(RATIO.log(), torch.zeros(2, 3), RATIO.log(), ADVANTAGES, MASK, eps=0.2, beta=0.1,
                                     loss_norm=loss_norm, max_tokens=10)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert metrics == pytest.approx(dict(kl=0.0, clip_low=1 / 4, clip_high=1 / 4, ratio=3.5 / 4), abs=1e-6)


def test_the_minimum_is_pessimistic():
    """A ratio on the wrong side of the clip (r > 1 + eps with A < 0) is not clipped."""
    zero = torch.zeros(2, 3)
    loss, metrics = grpo.policy_loss(RATIO.log(), zero, zero, -ADVANTAGES, MASK, eps=0.2, beta=0.0)
    assert loss.item() == pytest.approx(-(-3.0 - 1.6 - 2 + 0.5) / 2, abs=1e-6)  # r A: 1.5 * -2; clip: 0.8 * -2; 1 * -2; 0.5 * 1
    assert metrics["clip_low"] == 1 / 4 and metrics["clip_high"] == 0  # the 0.5 with A = -2


@pytest.mark.parametrize("kl, value", [("k1", math.log(2)), ("k2", math.log(2)**2 / 2), ("k3", 0.5 - 1 + math.log(2))])
def test_kl_term_by_hand(kl, value):
    """pi twice as likely as the reference, ratio 1: every token costs beta times the estimator, inside the sum over t."""
    logp = torch.full((2, 3), math.log(0.5))
    loss, metrics = grpo.policy_loss(logp, logp, logp - math.log(2), torch.zeros(2), MASK, eps=0.2, beta=0.1, kl=kl)
    assert loss.item() == pytest.approx(0.1 * value * 4 / 2, rel=1e-5)
    assert metrics["kl"] == pytest.approx(value, rel=1e-5)


def random_case(dtype=torch.float64, seed=0):
    """Ragged random completions with ratios on both sides of both clips -> logp, old, ref, A, mask."""
    torch.manual_seed(seed)
    logp = -torch.rand(4, 6, dtype=dtype) * 3
    old, ref = logp + 0.3 * torch.randn(4, 6, dtype=dtype), logp + 0.3 * torch.randn(4, 6, dtype=dtype)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 4])[:, None]
    return logp, old, ref, torch.tensor([1.0, -0.5, 0.7, -1.2], dtype=dtype), mask


def gradient(logp, *args, **kwargs):
    logp = logp.clone().requires_grad_()
    grpo.policy_loss(logp, *args, **kwargs)[0].backward()
    return logp.grad


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("loss_norm", NORMS)
def test_gradient_by_finite_differences(loss_norm, kl):
    """Autograd's gradient of the loss is the loss's slope at every token, clipped or not, and zero in the padding."""
    logp, old, ref, A, mask = random_case()
    knobs = dict(eps=0.2, beta=0.3, loss_norm=loss_norm, kl=kl, max_tokens=8)
    got, h = gradient(logp, old, ref, A, mask, **knobs), 1e-6
    for i, t in np.ndindex(4, 6):
        step = torch.zeros_like(logp)
        step[i, t] = h
        up, down = (grpo.policy_loss(logp + s, old, ref, A, mask, **knobs)[0] for s in (step, -step))
        assert got[i, t].item() == pytest.approx((up - down).item() / (2 * h), abs=1e-7)
    assert (got[~mask] == 0).all() and (got[mask] != 0).any()


def test_at_ratio_one_the_gradient_is_reinforce():
    """On policy, Eq. (8)'s gradient is -A grad log pi of every token, whatever eps: the loss's value says nothing there."""
    logp, _, ref, A, mask = random_case()
    expected = torch.where(mask, -A[:, None], 0.0) / 4
    torch.testing.assert_close(gradient(logp, logp, ref, A, mask, eps=0.2, beta=0.0), expected)


@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e30])
def test_padding_is_nothing(garbage):
    """Whatever stands outside the mask, inf and nan too, reaches neither loss, nor metrics, nor any gradient."""
    logp, old, ref, A, mask = random_case()
    knobs, clean = dict(eps=0.2, beta=0.3), dict(logp=logp, old_logp=old, ref_logp=ref)
    expected, told = grpo.policy_loss(**clean, advantages=A, mask=mask, **knobs)
    slope = gradient(logp, old, ref, A, mask, **knobs)
    for which in (("logp",), ("old_logp",), ("ref_logp",), tuple(clean)):
        dirty = {k: torch.where(mask, v, garbage) if k in which else v for k, v in clean.items()}
        loss, metrics = grpo.policy_loss(**dirty, advantages=A, mask=mask, **knobs)
        assert loss == expected and metrics == told, which
        assert torch.equal(gradient(dirty["logp"], dirty["old_logp"], dirty["ref_logp"], A, mask, **knobs), slope), which


@pytest.mark.parametrize("loss_norm", NORMS)
def test_more_padding_changes_nothing(loss_norm):
    """A batch padded further to the right has the same loss ("constant" divides by the limit, not by the width)."""
    *parts, A, mask = random_case()
    wide = [torch.cat([x, torch.zeros(4, 3, dtype=x.dtype)], 1) for x in (*parts, mask)]
    knobs = dict(eps=0.2, beta=0.3, loss_norm=loss_norm, max_tokens=8)
    a, b = grpo.policy_loss(*parts, A, mask, **knobs)[0], grpo.policy_loss(*wide[:3], A, wide[3], **knobs)[0]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss_norm", NORMS)
def test_micro_batches_add_up_to_the_whole(loss_norm):
    """With total= the global count, losses and gradients of unequal micro-batches (or ranks) sum to the whole batch's. A token
    mean taken per micro-batch would not."""
    *parts, A, mask = random_case()
    knobs = dict(eps=0.2, beta=0.3, loss_norm=loss_norm, max_tokens=8)
    whole, grad = grpo.policy_loss(*parts, A, mask, **knobs)[0], gradient(*parts, A, mask, **knobs)
    total = int(mask.sum()) if loss_norm == "token" else 4
    rows = [slice(0, 1), slice(1, 4)]
    losses = [grpo.policy_loss(*(x[r] for x in parts), A[r], mask[r], total=total, **knobs)[0] for r in rows]
    torch.testing.assert_close(sum(losses), whole)
    torch.testing.assert_close(torch.cat([gradient(*(x[r] for x in parts), A[r], mask[r], total=total, **knobs) for r in rows]),
                               grad)


def test_nothing_counted_is_a_loss_of_zero():
    """Where no group has spread no token is left: the loss is 0 with a zero gradient, under every normalisation."""
    *parts, A, mask = random_case()
    for loss_norm in NORMS:
        for total in (None, 0 if loss_norm == "token" else 4):
            knobs = dict(eps=0.2, beta=0.3, loss_norm=loss_norm, max_tokens=8, total=total)
            loss, metrics = grpo.policy_loss(*parts, A, torch.zeros_like(mask), **knobs)
            assert loss == 0 and set(metrics.values()) == {0.0}, (loss_norm, total)
            assert (gradient(*parts, A, torch.zeros_like(mask), **knobs) == 0).all()


# ------------------------------------------------------------------------------------------------------------ the KL estimators

def two_policies():
    """Logits of two categorical distributions over 7 outcomes -> (logits with gradient, log p, log q)."""
    logits = torch.randn(7, dtype=torch.float64).requires_grad_()
    return logits, logits.log_softmax(0), torch.randn(7, dtype=torch.float64).log_softmax(0)


def test_kl_estimators_have_the_exact_expectation():
    """Summed exactly over all outcomes, E_p[k1] = E_p[k3] = KL(p || q); k3 is never negative, k1 is, k2 is biased."""
    _, logp, logq = (x.detach() for x in two_policies())
    exact = (logp.exp() * (logp - logq)).sum()
    each = {kind: grpo.kl_divergence(logp[None], logq[None], kind)[0] for kind in ("k1", "k2", "k3")}
    mean = {kind: (logp.exp() * value).sum() for kind, value in each.items()}
    torch.testing.assert_close(mean["k1"], exact)
    torch.testing.assert_close(mean["k3"], exact)
    assert abs(mean["k2"] - exact) > 1e-3
    assert (each["k3"] >= 0).all() and (each["k1"] < 0).any()
    assert (grpo.kl_divergence(logp, logp, "k3") == 0).all()


def test_only_k2_has_the_reverse_kls_gradient():
    """As a term of the loss, on samples held fixed: E_p[grad k2] is the exact gradient of KL(p || q), that of k1 is 0, and that
    of k3 is the gradient of the forward KL(q || p)."""
    logits, logp, logq = two_policies()

    def grad(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]
    p, q = logp.exp().detach(), logq.exp()
    reverse = grad((logp.exp() * (logp - logq)).sum())
    forward = grad((q * (logq - logp)).sum())
    expected = {"k1": torch.zeros(7, dtype=torch.float64), "k2": reverse, "k3": forward}
    for kind, value in expected.items():
        torch.testing.assert_close(grad((p * grpo.kl_divergence(logp[None], logq[None], kind)[0]).sum()), value)
    assert (reverse - forward).norm() > 0.1 * reverse.norm()


# --------------------------------------------------------------------------------------------------------------------- learning

@pytest.mark.parametrize("ratio", ["old", "sft"])
@pytest.mark.parametrize("loss_norm", NORMS)
def test_a_bandit_learns(loss_norm, ratio):
    """The signs are right: 30 steps of sampling, group_advantages and policy_loss raise the expected reward of a tabular policy
    over three tokens of five letters, whose reward is the share of letters that are the question's own. (With the ratio's
    denominator at pi_SFT, as printed, it stops where the clip begins.)"""
    logits = torch.zeros(4, 3, 5, requires_grad=True)                         # question, place, letter
    good = torch.arange(4)[:, None].expand(4, 3)                              # question n wants letter n everywhere
    optimizer, ref = torch.optim.Adam([logits], lr=0.1), logits.detach().clone().log_softmax(-1)

    def expected_reward():
        return logits.softmax(-1).gather(2, good[..., None]).mean().item()
    assert expected_reward() == pytest.approx(0.2)
    for _ in range(30):
        tokens = torch.distributions.Categorical(logits=logits.detach()).sample((16,)).transpose(0, 1)   # (N, G, T)
        R = (tokens == good[:, None]).float().mean(2)                                                    # (N, G)
        A = grpo.group_advantages(R).flatten()

        def chosen(table, y=tokens):
            return table[:, None].expand(-1, 16, -1, -1).gather(3, y[..., None])[..., 0].flatten(0, 1)   # (N*G, T)
        logp, ref_logp = chosen(logits.log_softmax(-1)), chosen(ref)
        loss, _ = grpo.policy_loss(logp, logp.detach() if ratio == "old" else ref_logp, ref_logp, A, torch.ones_like(logp) > 0,
                                   eps=0.2, beta=0.01, loss_norm=loss_norm, max_tokens=3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert expected_reward() > (0.6 if ratio == "old" else 0.22)


# ------------------------------------------------------------------------------------------------------------- the gold answers

def test_gold_answers_pass_and_a_planted_wrong_one_is_named(world, capsys):
    """Before step 0 the gold answers go through the reward code: all phantoms score 1; a record whose thought supports another
    option, or names none, or would break the format, stops the run with its id."""
    judge = make_judge("lexical")
    grpo.check_gold(world.records, judge)
    for mode in rewards.INSTRUCTIONS:
        grpo.check_gold([r | dict(thinking=mode) for r in world.records], judge)
    grpo.check_gold([r | dict(thinking="none") for r in world.records], judge, lexical=False)
    assert capsys.readouterr().out == ""  # F is asked about no thought
    grpo.check_gold([world.records[0] | dict(thought=None)], judge)  # Med-R1's questions have no thoughts: nothing to check
    k, good = next((k, r) for k, r in enumerate(world.records) if r["task"] == "modality")
    other = next(o for o in good["options"] if o != good["options"]["ABCD".index(good["answer"])])
    for thought in (f"So this is {other}.", "I cannot tell.", "<answer>A</answer> So I said."):
        planted = list(world.records)
        planted[k] = good | dict(thought=thought, id="planted")
        with pytest.raises(data.DataError, match="planted"):
            grpo.check_gold(planted, judge)


# ------------------------------------------------------------------------------------------------------------------- whole runs

def train(world, monkeypatch, out, *flags, stage=grpo):
    """A short run of a stage on the tiny random model -> (weights, lines of metrics.jsonl, trained parameters)."""
    if stage is grpo:
        monkeypatch.setattr(rewards, "score", toy_score)
        flags = ("--batch", "8", "--G", "4", "--max_new_tokens", "6", "--micro_tokens", "1", *flags)
    else:
        flags = ("--batch", "4", "--micro_batch", "3", *flags)
    stage.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(out), *flags])
    return weights(out), lines_of(out), torch.load(out / "state.pt", weights_only=True)["trained"]


def weights(folder):
    return safetensors.torch.load_file(Path(folder) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def without_clock(lines):
    return [{k: v for k, v in line.items() if "second" not in k and "peak" not in k} for line in lines]


@pytest.mark.parametrize("lora", ["0", "4"])
def test_computing_layers_again_changes_no_gradient(lora, world, monkeypatch, tmp_path):
    """--checkpointing saves memory: the trained weights are those of a run that keeps everything, and sampling keeps its cache
    (in train mode transformers would switch it off and the completions would be others)."""
    flags = ("--max_steps", "2", "--lora", lora, "--micro_tokens", "9999")
    plain, less = (train(world, monkeypatch, tmp_path / name, *flags, *more)[0]
                   for name, more in (("plain", []), ("less", ["--checkpointing"])))
    assert not same(plain, weights(world.folder))
    for name in plain:
        torch.testing.assert_close(less[name], plain[name], rtol=0, atol=1e-6)


def test_a_run_logs_everything_and_moves_the_weights(world, monkeypatch, tmp_path):
    """Two steps: a line a step with every figure a person needs, all finite; completions with their scores; weights moved."""
    after, lines, _ = train(world, monkeypatch, tmp_path / "run", "--max_steps", "2", "--show_every", "1")
    wanted = {"step", "reward", "format", "accuracy", "consistency", "judge_failed", "no_spread", "kl", "clip_low", "clip_high",
              "sampled_nll", "length", "truncated", "grad_norm", "seconds_rollout", "seconds_judge", "seconds_update",
              "tokens_per_second", "loss", "lr", "peak_mb_rollout", "peak_mb_reference", "peak_mb_update"}
    assert [line["step"] for line in lines] == [1, 2] and all(wanted <= line.keys() for line in lines)
    assert all(math.isfinite(v) for line in lines for v in line.values())
    first = lines[0]
    assert first["grad_norm"] > 0 and 0 < first["accuracy"] < 1 and first["length"] <= 6 and first["truncated"] > 0.5
    assert first["sampled_nll"] > 3 and abs(first["kl"]) < 1e-6 and first["clip_low"] == first["clip_high"] == 0
    assert first["reward"] == pytest.approx((first["format"] + first["accuracy"] + first["consistency"]) / 3, abs=1e-5)
    assert not same(after, weights(world.folder))
    shown = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in shown] == [1] * 8 + [2] * 8  # two groups of four per rollout
    assert all({"id", "completion", "fmt", "acc", "con", "reward"} <= line.keys() for line in shown)


def test_the_wait_for_other_processes_is_not_booked_on_f(world, monkeypatch, tmp_path):
    """Between a rollout and the meeting before the update nothing waits for the other processes: seconds_waiting tells of it."""
    calls = []
    for name, real, answer in (("sample", M.sample, None), ("gather", M.gather, None), ("wait_for_all", M.wait_for_all, 7.0)):
        def told(*args, name=name, real=real, answer=answer, **knobs):
            calls.append(name)
            return answer or real(*args, **knobs)
        monkeypatch.setattr(M, name, told)
    _, lines, _ = train(world, monkeypatch, tmp_path / "x", "--max_steps", "1")
    assert calls[calls.index("sample") + 1] == "wait_for_all" and lines[0]["seconds_waiting"] == 7


@pytest.mark.parametrize("flags", [("--mu", "2", "--ratio", "old"), ("--mu", "2", "--ratio", "sft"), ("--scale", "std"),
                                   ("--loss_norm", "token"), ("--loss_norm", "constant", "--kl", "k2"),
                                   ("--loss_norm", "sequence", "--kl", "k1"), ("--weights", "0", "1", "0"), ("--top_p", "0.9"),
                                   ("--beta", "0"), ("--lora", "2", "--judge_sees", "raw"),
                                   ("--drop_no_spread",),
                                   ("--thinking", "none", "--only", "task=anatomy"), ("--thinking", "after")], ids=" ".join)
def test_every_knob_runs(flags, world, monkeypatch, tmp_path):
    """Each of the named variants goes through a whole step and saves a loadable, finite model."""
    after, lines, _ = train(world, monkeypatch, tmp_path / "run", "--max_steps", "2" if "--mu" in flags else "1", *flags)
    assert len(lines) == 1 and all(math.isfinite(v) for v in lines[0].values())
    assert all(torch.isfinite(v).all() for v in after.values())
    used = json.loads((tmp_path / "run" / "knobs.json").read_text())
    if "--weights" in flags:
        assert used["weights"] == [0, 1, 0] and lines[0]["reward"] == lines[0]["accuracy"]
    if "--beta" in flags:
        assert used["beta"] == 0
    if "--only" in flags:
        assert used["only"] == ["task=anatomy"] and lines[0]["judge_failed"] == 0


def test_groups_without_spread_change_nothing_but_the_kl(world, monkeypatch, tmp_path):
    """--drop_no_spread without a KL penalty: the gradient of the whole batch, where the others have
    advantage 0, but for the denominator, which is the number of groups with spread."""
    seen = {}

    def half(texts, items, judge):  # every second question's group is all right, so without spread
        rows = toy_score(texts, items, judge)
        for row, item in zip(rows, items, strict=True):
            acc = 1.0 if int(item["group"][-1]) % 2 == 0 else float(len(row["completion"]) % 2)
            row.update(fmt=1.0, acc=acc, con=1.0)
        return rows
    for name, flags in (("all", ["--no-drop_no_spread"]), ("some", [])):
        gradients = []
        monkeypatch.setattr(M, "sum_gradients", lambda ps, into=gradients: into.append(
            torch.cat([p.grad.flatten() for p in ps if p.grad is not None])))
        out = tmp_path / name
        flags = ("--batch", "24", "--G", "4", "--max_new_tokens", "6", "--max_steps", "1", "--beta", "0", *flags)
        monkeypatch.setattr(grpo, "check_gold", lambda *_: None)
        monkeypatch.setattr(rewards, "score", half)
        grpo.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(out), *flags])
        seen[name] = gradients[0], lines_of(out)[0]
    (whole, line), (some, line_too) = seen["all"], seen["some"]
    assert 0.1 < line["no_spread"] < 0.9 and line["no_spread"] == line_too["no_spread"]
    assert line["trained_on"] == 6 and line_too["trained_on"] == round(6 * (1 - line["no_spread"]))
    torch.testing.assert_close(some * line_too["trained_on"] / 6, whole, rtol=1e-4, atol=1e-6)


def test_a_step_in_which_no_group_has_spread_moves_nothing(world, monkeypatch, tmp_path):
    """With --drop_no_spread there is then nothing to learn from, no nan in the weights, and null in the log for what would be a
    mean over nothing."""
    monkeypatch.setattr(grpo, "check_gold", lambda *_: None)
    monkeypatch.setattr(rewards, "score", lambda *args: [row | dict(fmt=1.0, acc=1.0, con=1.0) for row in toy_score(*args)])
    grpo.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(tmp_path / "x"),
               "--batch", "8", "--G", "4", "--max_new_tokens", "6", "--max_steps", "2", "--drop_no_spread", "--lora", "0"])
    assert same(weights(tmp_path / "x"), weights(world.folder))
    lines = lines_of(tmp_path / "x")
    nothing = {"kl", "ratio", "clip_low", "clip_high", "sampled_nll"}
    assert len(lines) == 2 and all({k for k, v in line.items() if v is None} == nothing for line in lines)
    assert lines[0]["no_spread"] == 1 and lines[0]["trained_on"] == 0


def test_a_held_out_slice_is_looked_at(world, monkeypatch, tmp_path):
    """--eval_every k: every k-th line of the log has a figure on held-out questions, the others have not, and the training is
    what it is without."""
    plain, _, _ = train(world, monkeypatch, tmp_path / "a", "--max_steps", "2")
    looked, lines, _ = train(world, monkeypatch, tmp_path / "b", "--max_steps", "2",
                             "--eval_every", "2", "--eval_questions", "3")
    first, second = ({k for k in line if "eval" in k or "held" in k} for line in lines)
    assert second and not {k for k in first if "second" not in k}
    assert same(plain, looked)


def test_both_ratios_have_the_same_first_gradient(world, monkeypatch, tmp_path):
    """pi_theta = pi_old = pi_SFT at step 0: the ratio is 1 by either definition, and so the gradients agree; at later steps
    they don't."""
    seen = {}
    for ratio in ("sft", "old"):
        seen[ratio] = []
        monkeypatch.setattr(M, "sum_gradients", lambda ps, into=seen[ratio]: into.append(
            torch.cat([p.grad.flatten() for p in ps if p.grad is not None])))
        train(world, monkeypatch, tmp_path / ratio, "--max_steps", "2", "--ratio", ratio, "--lr", "1e-3", "--warmup", "1")
    (a, later), (b, later_too) = seen["sft"], seen["old"]
    assert a.norm() > 1e-3 and (a - b).norm() < 1e-4 * a.norm()
    assert (later - later_too).norm() > 1e-2 * later.norm()


@pytest.mark.parametrize("lora", ["0", "2"])
@pytest.mark.parametrize("stage", [sft, grpo], ids=["sft", "grpo"])
def test_a_resumed_run_equals_an_uninterrupted_one(stage, lora, world, monkeypatch, tmp_path):
    """Two steps and two more after --resume give the weights, the optimiser's state and the log of four in one go, bit for
    bit; a line logged after the checkpoint is written anew, not twice."""
    flags = ("--lora", lora, "--lr", "1e-3") + (("--show_every", "1") if stage is grpo else ())
    straight = train(world, monkeypatch, tmp_path / "straight", "--max_steps", "4", *flags, stage=stage)
    out = tmp_path / "halves"
    halfway = train(world, monkeypatch, out, "--max_steps", "2", *flags, stage=stage)
    sft.log(str(out), step=3, loss=0.0)
    resumed = train(world, monkeypatch, out, "--max_steps", "4", "--resume", *flags, stage=stage)
    assert same(straight[0], resumed[0]) and same(straight[2], resumed[2]) and not same(halfway[0], resumed[0])
    assert without_clock(straight[1]) == without_clock(resumed[1])
    a, b = (torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("straight", "halves"))
    assert a["step"] == b["step"] == 4 and a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    assert all(same(x, b["optimizer"]["state"][k]) for k, x in a["optimizer"]["state"].items())


def test_an_interrupted_run_goes_on_behind_its_last_step(world, monkeypatch, tmp_path):
    """--save_every 2, interrupted after the third step while it writes the fourth's line: the run goes on behind the third and
    ends as if nothing had happened, log and completions too."""
    flags = ("--max_steps", "4", "--show_every", "1", "--save_every", "2")
    straight = train(world, monkeypatch, tmp_path / "straight", *flags)
    encode, calls = M.encode, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            with open(tmp_path / "killed" / "metrics.jsonl", "a") as f:
                f.write('{"step": 4, "lo')
            raise KeyboardInterrupt
        return encode(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(M, "encode", killed)
        train(world, patch, tmp_path / "killed", *flags)
    resumed = train(world, monkeypatch, tmp_path / "killed", *flags, "--resume")
    assert same(straight[0], resumed[0]) and without_clock(straight[1]) == without_clock(resumed[1])
    a, b = ((tmp_path / run / "completions.jsonl").read_text() for run in ("straight", "killed"))
    assert a == b


def test_nothing_to_resume_is_one_sentence(world, tmp_path):
    """--resume in an empty folder says so."""
    for stage in (sft, grpo):
        with pytest.raises(data.DataError, match="resume"):
            stage.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--resume",
                        "--out", str(tmp_path / "x")])


@pytest.mark.parametrize("flags, word", [
    ("--G 1", "--G"), ("--G 0", "--G"), ("--G x", "G"), ("--batch 10", "--batch"), ("--batch 0", "--batch"), ("--mu 0", "--mu"),
    ("--temperature 0", "--temperature"), ("--temperature -1", "--temperature"), ("--top_p 0", "--top_p"),
    ("--top_p 1.5", "--top_p"), ("--max_steps -1", "--max_steps"), ("--lora -1", "--lora"), ("--eps -1", "--eps"),
    ("--lr 0", "--lr"), ("--lr nan", "--lr"), ("--weights 1 1", "--weights"), ("--weights 1 a 1", "weights"),
    ("--weights 0 0 0", "--weights"), ("--ratio pi", "ratio"), ("--kl k4", "kl"), ("--judge oracle", "oracle"),
    ("--nonsense", "nonsense"), ("--data /nowhere.jsonl", "nowhere"), ("--model /nowhere", "nowhere")])
def test_flags_that_make_no_sense_are_one_sentence(flags, word, world, tmp_path):
    """Bad values are refused with a sentence that names the flag, before anything is written or an older run moved aside."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(data.DataError) as caught:
        grpo.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(out), "--batch", "8",
                   "--G", "4", "--max_new_tokens", "4", "--max_steps", "1", *flags.split()])
    assert word in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["metrics.jsonl"]


# ---------------------------------------------------------------------------------------------------------------- two processes

WORKER = """
folder, jsonl, broken, out = sys.argv[1:5]
rank, world, device = M.setup_devices()
closing, M.close_devices = M.close_devices, lambda: None

# 1. Given completions, with different numbers of tokens on the ranks: the gradient that every rank holds after the sum.
given = torch.load(out + "/given.pt", weights_only=False)
net, processor = M.load(folder)
net.requires_grad_(True)
for loss_norm in ("sum", "token"):
    net.zero_grad()
    tokens, mask, A, old = (given[k][rank::world] for k in ("tokens", "mask", "A", "old"))
    total = M.sum_over_ranks(int(mask.sum()) if loss_norm == "token" else mask.shape[0] * mask.shape[1])
    logp = M.token_logprobs(net, M.encode(processor, given["records"][rank::world]), tokens, mask).flatten(0, 1)
    loss, _ = grpo.policy_loss(logp, old.flatten(0, 1), old.flatten(0, 1), A.flatten(), mask.flatten(0, 1), eps=0.2, beta=0.1,
                               loss_norm=loss_norm, total=total)
    loss.backward()
    M.sum_gradients(list(net.parameters()))
    torch.save(torch.cat([p.grad.flatten() for p in net.parameters()]), f"{out}/{loss_norm}-{rank}.pt")

# 2. Whole runs. What policy_loss gave on this rank is kept; of two steps on the same completions the second is logged.
kept, policy_loss = [], grpo.policy_loss
def watched(*args, **kwargs):
    loss, metrics = policy_loss(*args, **kwargs)
    kept.append((loss.item(), kwargs["total"]))
    return loss, metrics
rewards.score, grpo.policy_loss = toy_score, watched
common = ["--preset", "tiny", "--model", folder]
sft.main([*common, "--data", jsonl, "--out", out + "/sft", "--batch", "6", "--micro_batch", "2", "--max_steps", "2"])
grpo.main([*common, "--data", jsonl, "--out", out + "/grpo", "--batch", "12", "--G", "4", "--micro_tokens", "1",
           "--max_new_tokens", "5", "--mu", "2", "--max_steps", "2", "--lr", "0.01", "--warmup", "1", "--beta", "1",
           "--no-drop_no_spread"])
torch.save(kept[len(kept) // 2:], f"{out}/loss-{rank}.pt")

# 3. A run in which the second rank finds its image cut behind the header, while the first waits for its gradients.
print("now dying", flush=True)
data.cli(lambda: sft.main([*common, "--data", broken, "--out", out + "/dying", "--batch", "4"]))
"""


@pytest.fixture(scope="module")
def two(world, tmp_path_factory):
    """What WORKER left behind, run by two gloo processes: one launch for all, since imports cost more than what is tested."""
    out = tmp_path_factory.mktemp("two")
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (4, 3, 6))
    mask = torch.arange(6) < torch.randint(1, 7, (4, 3))[..., None]
    with torch.no_grad():
        logp = M.token_logprobs(world.net, M.encode(world.processor, world.mixed[:4]), tokens, mask)
    given = dict(records=world.mixed[:4], tokens=tokens, mask=mask, A=torch.randn(4, 3), old=logp + 0.2 * torch.randn(4, 3, 6))
    torch.save(given, out / "given.pt")
    (out / "worker.py").write_text("import sys\nimport torch\nimport data, grpo, rewards, sft\nimport model as M\n"
                                   f"torch.set_num_threads(1)\n{inspect.getsource(toy_score)}{WORKER}")
    records = data.read_records(world.jsonl, "train")
    broken, second = Path(world.jsonl).with_name("broken.jsonl"), records[sft.epoch_order(len(records), 0, 0)[1]]
    whole = Path(second["path"]).read_bytes()
    (broken.parent / "images" / "torn.png").write_bytes(whole[:len(whole) // 2])
    second["image"] = "images/torn.png"  # step 0's second question is rank 1's
    data.write_records(records, broken)
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           out / "worker.py", world.folder, world.jsonl, broken, out],
                          cwd=ROOT, text=True, capture_output=True, timeout=120,
                          env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES=""))
    assert "now dying" in done.stdout, done.stderr
    return dict(out=out, given=given, died=(done.returncode, time.monotonic() - began, done.stderr))


def test_two_processes_have_one_process_s_gradient(two, world):
    """Eq. (8) on given completions, divided over two gloo processes: each ends up with the whole batch's gradient, although
    the ranks have different numbers of tokens."""
    g = two["given"]
    for loss_norm in ("sum", "token"):
        net = copy.deepcopy(world.net).requires_grad_(True)
        logp = M.token_logprobs(net, M.encode(world.processor, g["records"]), g["tokens"], g["mask"]).flatten(0, 1)
        old = g["old"].flatten(0, 1)
        grpo.policy_loss(logp, old, old, g["A"].flatten(), g["mask"].flatten(0, 1), eps=0.2, beta=0.1,
                         loss_norm=loss_norm)[0].backward()
        expected = torch.cat([p.grad.flatten() for p in net.parameters()])
        ranks = [torch.load(two["out"] / f"{loss_norm}-{rank}.pt") for rank in (0, 1)]
        assert torch.equal(*ranks) and expected.norm() > 0.1
        torch.testing.assert_close(ranks[0], expected, rtol=1e-5, atol=1e-5)


def test_two_processes_train_as_one_does(two, world, tmp_path):
    """sft.py over two processes takes the questions and makes the steps of one: AdamW's first moments (sums of both steps'
    gradients) and the log agree to 1e-5, the weights' movement to 1 in 1000 (AdamW divides small gradients by themselves)."""
    sft.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(tmp_path / "one"),
              "--batch", "6", "--micro_batch", "2", "--max_steps", "2"])
    one, both = (torch.load(f / "state.pt", weights_only=True) for f in (tmp_path / "one", two["out"] / "sft"))
    for a, b in zip(one["optimizer"]["state"].values(), both["optimizer"]["state"].values(), strict=True):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-5, atol=1e-5)
    base = {name: p.detach() for name, p in world.net.named_parameters()}

    def apart(state):
        return torch.cat([(one["trained"][k] - state[k]).flatten() for k in base]).norm()
    assert apart(base) > 0.1 and apart(both["trained"]) < 1e-3 * apart(base)
    for a, b in zip(lines_of(tmp_path / "one"), lines_of(two["out"] / "sft"), strict=True):
        assert without_clock([b])[0] == pytest.approx(without_clock([a])[0], rel=1e-5, abs=2e-6)


def test_the_log_of_two_processes_is_that_of_the_whole_batch(two):
    """grpo's log over two processes, of which one has 2 and the other 1 of the 3 questions: means over all 12 completions and
    all 3 groups; every part of the loss was divided by the global 12, and the loss is the sum of the parts."""
    line, = lines_of(two["out"] / "grpo")
    assert line["reward"] == pytest.approx((line["format"] + line["accuracy"] + line["consistency"]) / 3, abs=1e-5)
    for name, count in (("accuracy", 12), ("truncated", 12), ("length", 12), ("no_spread", 3)):
        assert line[name] * count == pytest.approx(round(line[name] * count), abs=1e-4), name
    assert line["length"] <= 5 and line["kl"] > 1e-3
    first, second = (torch.load(two["out"] / f"loss-{rank}.pt") for rank in (0, 1))
    assert len(first) == 2 and len(second) == 1 and all(total == 12 for _, total in first + second)
    assert line["loss"] == pytest.approx(sum(loss for loss, _ in first + second), abs=1e-5) and abs(second[0][0]) > 1e-3


def test_a_dying_rank_ends_the_others(two):
    """Rank 1 meets a broken image while rank 0 waits for it: the launch ends with an error that names the record, no rank
    hangs."""
    code, seconds, said = two["died"]
    assert code != 0 and seconds < 60 and "images/torn.png is truncated" in said
