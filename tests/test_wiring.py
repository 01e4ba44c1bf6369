"""What the command line says arrives where it acts: knobs, seeds, epochs, several steps per rollout, questions, figures."""
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import lines_of
from test_eval import row, script
from test_faults import flags_of, spoil_steps
from test_grpo import same, toy_score, train, weights

import data
import eval as evaluation
import grpo
import model as M
import rewards
import sft
from judge import make_judge


def test_an_epoch_deals_every_question_once(world):
    """However many steps a rollout has: the rollouts of an epoch hold each question once, those of the next in another order."""
    records = world.records[:24]
    for mu in (1, 3):
        args = SimpleNamespace(mu=mu, seed=3)
        dealt = [[r["id"] for r in grpo.questions_of(records, step, 6, args, 0, 1)] for step in range(0, 8 * mu, mu)]
        first, second = sum(dealt[:4], []), sum(dealt[4:], [])
        assert sorted(first) == sorted(second) == sorted(r["id"] for r in records) and first != second


def test_no_two_rollouts_have_the_same_random_numbers(world, toy, monkeypatch, tmp_path):
    """Seed, step and process each change what is drawn; otherwise all processes would draw the same completions."""
    drawn, rollout = [], grpo.rollout
    monkeypatch.setattr(grpo, "rollout", lambda *args: drawn.append(args[3].initial_seed()) or rollout(*args))
    for rank, seed in ((0, "0"), (0, "1"), (1, "0")):
        monkeypatch.setattr(M, "setup_devices", lambda rank=rank: (rank, 1, torch.device("cpu")))
        grpo.main(flags_of(world, tmp_path / f"{rank}-{seed}", "--seed", seed, "--max_steps", "2", stage="grpo"))
    assert len(drawn) == len(set(drawn)) == 6


def test_the_temperature_is_that_of_sampling_reference_and_update(world, monkeypatch, tmp_path):
    """Before the first step policy and reference are one, at every temperature: no divergence. What is drawn at a low one is likely
    at it. With a tiny top_p a group's completions are all the likeliest one: no spread."""
    _, (cold,), _ = train(world, monkeypatch, tmp_path / "a", "--max_steps", "1", "--temperature", "0.1", "--ratio", "sft")
    assert abs(cold["kl"]) < 1e-6 and cold["ratio"] == pytest.approx(1, abs=1e-5) and cold["sampled_nll"] < 1
    _, (sure,), _ = train(world, monkeypatch, tmp_path / "b", "--max_steps", "1", "--top_p", "1e-6", "--no-drop_no_spread")
    assert sure["no_spread"] == 1


def test_learning_rate_by_hand():
    """A rise over 4 of 20 steps under a line that falls to 0 behind the last, or constant behind the rise; no rise with 0."""
    def rates(**knobs):
        args = SimpleNamespace(**dict(lr=2.0, warmup=4, schedule="linear") | knobs)
        return [grpo.learning_rate(step, 20, args) for step in (0, 1, 2, 3, 10, 19)]
    assert rates() == pytest.approx([0.5, 1.0, 1.5, 1.7, 1.0, 0.1])
    assert rates(schedule="constant") == pytest.approx([0.5, 1.0, 1.5, 2, 2, 2])
    assert rates(warmup=0) == pytest.approx([2, 1.9, 1.8, 1.7, 1.0, 0.1])


def test_a_run_of_two_steps_per_rollout_has_twice_the_steps(world, monkeypatch, tmp_path):
    """--mu 2, two rollouts an epoch, two epochs: 8 steps, and the learning rate falls with each, to an eighth at the last."""
    n = len(data.read_records(world.jsonl, "train", ["task=anatomy"])) // 2
    _, lines, _ = train(world, monkeypatch, tmp_path / "x", "--only", "task=anatomy", "--batch", str(4 * n), "--epochs", "2", "--mu", "2",
                        "--max_new_tokens", "2", "--warmup", "0", "--schedule", "linear", "--lr", "8e-4", "--micro_tokens", "9999")
    assert [(line["step"], line["lr"]) for line in lines] == [(2, 7e-4), (4, 5e-4), (6, 3e-4), (8, 1e-4)]


def test_what_is_due_when():
    """Of mu steps at a time, behind those among which a multiple is: of 3, by twos, behind 4, 6, 10 and 12."""
    assert [step + 2 for step in range(0, 12, 2) if grpo.due(step, 2, 3)] == [4, 6, 10, 12]
    assert [step + 1 for step in range(8) if grpo.due(step, 1, 3)] == [3, 6] and not any(grpo.due(step, 1, 0) for step in range(8))


def test_the_knobs_of_the_equations_reach_them(world, monkeypatch, tmp_path):
    """What the command line says of Eqs. (7) and (8) is what the functions are given."""
    told, scales, loss, advantages = [], [], grpo.policy_loss, grpo.group_advantages
    monkeypatch.setattr(grpo, "policy_loss", lambda *args, **knobs: told.append(knobs) or loss(*args, **knobs))
    monkeypatch.setattr(grpo, "group_advantages", lambda R, scale: scales.append(scale) or advantages(R, scale))
    train(world, monkeypatch, tmp_path / "x", "--max_steps", "1", "--scale", "std", "--eps", "0.3", "--beta", "0.7", "--kl", "k2",
          "--loss_norm", "constant", "--micro_tokens", "9999", "--no-drop_no_spread")
    assert told == [dict(eps=0.3, beta=0.7, kl="k2", loss_norm="constant", max_tokens=6, total=8)] and scales == ["std"]


@pytest.mark.parametrize("ratio", ["old", "sft"])
def test_the_denominator_of_the_ratio(ratio, world, monkeypatch, tmp_path):
    """Two rollouts of two steps each: with "sft" it is pi_SFT in all four; with "old" the policy before the rollout's first step, also
    in the second."""
    steps, loss = [], grpo.policy_loss

    def watched(*args, **knobs):
        steps.append([x.detach().clone() for x in args[:3]])  # log pi_theta, denominator, log pi_SFT
        return loss(*args, **knobs)
    monkeypatch.setattr(grpo, "policy_loss", watched)
    train(world, monkeypatch, tmp_path / "x", "--mu", "2", "--max_steps", "4", "--ratio", ratio, "--micro_tokens", "9999",
          "--lr", "0.01", "--warmup", "0", "--no-drop_no_spread")
    assert len(steps) == 4 and not torch.allclose(steps[2][0], steps[2][2])
    for (before, first, _), (moved, second, _) in (steps[:2], steps[2:]):
        assert not torch.allclose(before, moved)
        if ratio == "old":
            assert torch.equal(first, before) and torch.equal(second, before)
    assert ratio == "old" or all(torch.equal(denominator, ref) for _, denominator, ref in steps)


def test_a_step_without_spread_moves_nothing_behind_others_either(world, monkeypatch, tmp_path):
    """AdamW has momentum then: the step must be left out, not made with a gradient of 0."""
    calls, after = [], {}
    monkeypatch.setattr(grpo, "check_gold", lambda *_: None)

    def as_of_several(parameters):  # a process that had nothing to add to a gradient has one of 0
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    monkeypatch.setattr(M, "sum_gradients", as_of_several)

    def first_alone(*args):
        calls.append(args)
        return toy_score(*args) if len(calls) == 1 else [row | dict(fmt=1.0, acc=1.0, con=1.0) for row in toy_score(*args)]
    monkeypatch.setattr(rewards, "score", first_alone)
    for steps in "12":
        calls.clear()
        grpo.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(tmp_path / steps), "--lora", "0",
                   "--batch", "8", "--G", "4", "--max_new_tokens", "6", "--max_steps", steps, "--schedule", "constant"])
        after[steps] = weights(tmp_path / steps)
    assert lines_of(tmp_path / "2")[1]["trained_on"] == 0
    assert same(after["1"], after["2"]) and not same(after["1"], weights(world.folder))


def test_the_log_does_not_depend_on_the_micro_batches(world, monkeypatch, tmp_path):
    """Its means are over the tokens, however these are cut up: completions of several lengths."""
    encode, lines = M.encode, {}
    monkeypatch.setattr(M, "encode", lambda *args: encode(*args) | dict(stop_ids=torch.arange(0, 988, 6)))
    for size in ("1", "9999"):
        _, (lines[size],), _ = train(world, monkeypatch, tmp_path / size, "--mu", "2", "--max_steps", "2", "--lr", "0.01", "--warmup",
                                     "0", "--batch", "16", "--no-drop_no_spread", "--micro_tokens", size)
    for name in ("kl", "ratio", "clip_low", "clip_high", "sampled_nll", "loss"):
        assert lines["1"][name] == pytest.approx(lines["9999"][name], rel=1e-3, abs=1e-6), name
    assert lines["1"]["kl"] > 1e-3 and lines["1"]["length"] < 5.5


def test_figures_of_a_rollout_by_hand():
    """Two groups of two: F failed on one completion, whose reward and consistency have no value then; one ended with the last
    token that it might have, and was not cut off."""
    rows = [dict(thought="t", fmt=1.0, acc=1.0, con=1.0, verdict="B"),
            dict(thought="(A) t", fmt=1.0, acc=0.0, con=math.nan, verdict=math.nan),
            dict(thought=None, fmt=0.0, acc=0.0, con=0.0, verdict=None), dict(thought="t", fmt=0.0, acc=0.0, con=0.0, verdict=None)]
    rows = [row | dict(options=["x", "y"]) for row in rows]
    R, ended = torch.tensor([[1.0, 0.5], [0.0, 0.0]]), torch.tensor([[True, True], [False, True]])
    mask = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [1, 0, 0]]]).bool()
    args = SimpleNamespace(thinking="before", weights=(1, 1, 1), max_new_tokens=3)
    assert grpo.figures_of(rows, R, ended, mask, args) == pytest.approx(dict(
        reward=1 / 3, format=0.5, accuracy=0.25, consistency=1 / 3, length=9 / 4, truncated=1 / 4, judge_failed=1 / 3,
        undecided=1 / 3, thoughts_cut=1 / 3, no_spread=0.5, accuracy_no_spread=0.5, tokens=9))


def test_f_sees_what_judge_sees_says(world, toy, monkeypatch, tmp_path):
    """--judge_sees raw is Eq. (6) as printed, in training too."""
    asked, make = [], grpo.make_judge
    monkeypatch.setattr(grpo, "make_judge", lambda *args, **knobs: asked.append(args) or make(*args, **knobs))
    for sees in ("cut", "raw"):
        grpo.main(flags_of(world, tmp_path / sees, "--max_steps", "1", "--judge_sees", sees, stage="grpo"))
    assert asked == [("lexical", "cut"), ("lexical", "raw")]


def test_a_skipped_step_of_several_is_counted(world, toy, monkeypatch, tmp_path):
    """--mu 2: the first of a rollout's steps isn't finite, the second is."""
    spoil_steps(monkeypatch, {1})
    grpo.main(flags_of(world, tmp_path / "x", "--mu", "2", "--max_steps", "2", stage="grpo"))
    assert [line["skipped"] for line in lines_of(tmp_path / "x")] == [1]


def test_positions_left_free(world):
    """A batch's "skip" moves its completions that much further from the prompt, and the prompt not at all."""
    batch = M.encode(world.processor, world.mixed[:2])
    (a, first), (b, later) = (M.prompt_positions(world.net, x) for x in (batch, batch | dict(skip=torch.tensor([0, 5]))))
    assert torch.equal(a, b) and (later - first).tolist() == [0, 5]


def test_a_seed_decides_an_adapter_and_alpha_is_twice_the_rank(world):
    """Whatever was drawn before: processes must start alike. The merged weight moves by 2 B A."""
    policies = []
    for seed in (0, 0, 1):
        torch.rand(3)
        args = SimpleNamespace(lora=4, seed=seed, checkpointing=False, lr=1.0, weight_decay=0.0, fixed={})
        policies.append(sft.trainable(copy.deepcopy(world.net), args)[0])
    a, b, c = (torch.cat([p.flatten() for k, p in policy.named_parameters() if "lora_A" in k]) for policy in policies)
    assert torch.equal(a, b) and not torch.equal(a, c)
    layer = next(m for m in policies[0].modules() if isinstance(m, M.LoraLayer))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight.data.normal_()
    torch.testing.assert_close(layer.get_delta_weight("default"), 2 * B @ A)


def test_a_text_of_the_limit_is_taken_and_one_token_more_is_not(world, monkeypatch):
    """MAX_TEXT bounds attention's memory, which is its square."""
    record = world.records[0]
    n = len(world.processor.tokenizer(rewards.question_text(record))["input_ids"])
    monkeypatch.setattr(M, "MAX_TEXT", n)
    M.check_texts(world.processor, [record], rewards.question_text)
    monkeypatch.setattr(M, "MAX_TEXT", n - 1)
    with pytest.raises(data.DataError, match=f"has {n} tokens, expected at most {n - 1}"):
        M.check_texts(world.processor, [record], rewards.question_text)


@pytest.mark.parametrize("stage", [sft, grpo, evaluation])
def test_max_pixels_shrinks_images(stage, world, monkeypatch, tmp_path):
    """In all three programs: 112 x 112 px are 16 tokens, of 60 * 60 px at most 4 are left."""
    seen, encode = [], M.encode

    def watched(*args):
        seen.append(encode(*args))
        return seen[-1]
    monkeypatch.setattr(M, "encode", watched)
    for limit in ("3600", "999999"):
        flags = flags_of(world, tmp_path / limit, "--max_steps", "1", stage="grpo" if stage is grpo else "sft")
        if stage is evaluation:
            flags = ["--ckpt", world.folder, "--data", world.jsonl, "--out", str(tmp_path / limit), "--questions", "2", "--max_new_tokens", "2"]
        stage.main([*flags, "--max_pixels", limit])
    assert [int(batch["image_grid_thw"].prod(1).max()) // 4 for batch in (seen[0], seen[-1])] == [4, 16]


def test_an_epoch_learns_every_question_once_in_the_seed_s_order(world, monkeypatch, tmp_path):
    """Two epochs, the seed's orders of them; what doesn't fill a batch is left out."""
    learned, encode = [], M.encode
    monkeypatch.setattr(M, "encode", lambda processor, records, *args: learned.extend(r["id"] for r in records) or encode(processor, records, *args))
    records = data.read_records(world.jsonl, "train", ["task=location"])
    k = len(records) // 3
    sft.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(tmp_path / "x"), "--only", "task=location",
              "--seed", "5", "--batch", str(k), "--micro_batch", "2", "--epochs", "2"])
    expected = [records[i]["id"] for epoch in (0, 1) for i in sft.epoch_order(len(records), epoch, 5)[:3 * k]]
    assert learned[1:] == expected  # the first is asked for its prompt alone


def test_it_is_saved_behind_every_save_every_th_step(world, monkeypatch, tmp_path):
    """And at the end."""
    saved, save = [], sft.Run.save
    monkeypatch.setattr(sft.Run, "save", lambda run: save(run) or saved.append(run.saved))
    sft.main(flags_of(world, tmp_path / "x", "--save_every", "2", "--max_steps", "5"))
    assert saved == [2, 4, 5]


def test_half_an_epoch_is_half_the_steps(world, tmp_path):
    """--epochs may be a fraction; the schedule ends with it."""
    n = len(data.read_records(world.jsonl, "train"))
    sft.main(["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--out", str(tmp_path / "x"), "--batch", str(n // 6),
              "--epochs", "0.5", "--warmup", "0"])
    lines = lines_of(tmp_path / "x")
    assert len(lines) == 3 and lines[-1]["lr"] < lines[0]["lr"]


def test_the_gradient_is_cut_at_clip(world, tmp_path):
    """AdamW's first moment after a step is a tenth of the gradient, whose norm is --clip where it was more."""
    sft.main(flags_of(world, tmp_path / "x", "--clip", "0.01", "--max_steps", "1"))
    moments = torch.load(tmp_path / "x" / "state.pt", weights_only=True)["optimizer"]["state"].values()
    assert lines_of(tmp_path / "x")[0]["grad_norm"] > 0.02
    assert torch.cat([x["exp_avg"].flatten() for x in moments]).norm() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_weight_decay_is_decoupled(world, tmp_path):
    """A step with decay w ends lr w p beside the step without."""
    after = {}
    for decay in ("0", "0.5"):
        sft.main(flags_of(world, tmp_path / decay, "--weight_decay", decay, "--max_steps", "1"))
        after[decay] = torch.load(tmp_path / decay / "state.pt", weights_only=True)["trained"]
    lr = lines_of(tmp_path / "0")[0]["lr"]
    for name, p in world.net.named_parameters():
        torch.testing.assert_close(after["0"][name] - after["0.5"][name], lr * 0.5 * p.detach(), rtol=1e-2, atol=1e-6)


def test_held_out_questions_are_asked_as_those_that_are_learned(world):
    """Of what --only names, with --thinking's prompt, a fixed choice of all."""
    args = SimpleNamespace(eval_every=1, eval_questions=3, data=[world.jsonl], only=["task=anatomy"], thinking="none")
    held_out = sft.held_out_questions(args, 0, 1)
    assert {r["task"] for r in held_out} == {"anatomy"} and all(rewards.thinking_of(r) == "none" for r in held_out)
    val = data.read_records(world.jsonl, "val", ["task=anatomy"], "none")
    assert held_out == evaluation.subset(val, 3) and sft.held_out_questions(args, 1, 2) == held_out[1::2]


def test_held_out_accuracy_is_over_all_processes(world, monkeypatch):
    """Of 2 questions here and 3 elsewhere, of which one was right."""
    gather = M.gather
    monkeypatch.setattr(M, "gather", lambda rows: gather(rows) + [1.0, 0.0, 0.0])
    script(monkeypatch, world, [rewards.answer_text(r) for r in world.records[:2]])
    assert sft.held_out_accuracy(world.net, world.processor, world.records[:2], make_judge(), 99) == 3 / 5


def test_checkpointing_computes_layers_twice(world, tmp_path, monkeypatch):
    """With it a layer runs again in the backward pass, without it not."""
    calls, load = [], M.load

    def counted(*args, **knobs):
        net, processor = load(*args, **knobs)
        net.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        return net, processor
    monkeypatch.setattr(M, "load", counted)
    for flag, times in (("--no-checkpointing", 2), ("--checkpointing", 4)):
        calls.clear()
        sft.main(flags_of(world, tmp_path / flag, flag, "--max_steps", "1"))  # two micro-batches
        assert len(calls) == times


def test_a_run_that_saved_nothing_is_moved_aside_too(world, tmp_path):
    """A log is all that a run killed early leaves: a later run's lines don't go behind it."""
    out = tmp_path / "x"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    sft.main(flags_of(world, out, "--max_steps", "1"))
    assert (tmp_path / "x.1" / "metrics.jsonl").read_text() == '{"step": 1}\n' and len(lines_of(out)) == 1


def test_a_difference_weighs_questions_not_images():
    """Ten images with three questions that all rise, ten with one that doesn't: 30 of 40 rose, and the interval is about that."""
    groups = {f"a{i}": [1.0] * 3 for i in range(10)} | {f"b{i}": [0.0] for i in range(10)}
    found = evaluation.bootstrap([groups])
    assert found["mean"] == 0.75 and 0.5 < found["low"] < 0.75 < found["high"] < 0.9


def test_questions_of_one_id_in_two_files_are_no_pair():
    """An id is a file's own; what is compared is the same question on the same image."""
    assert evaluation.difference([row("anomaly", "CT", 0, path="a/1.png")], [row("anomaly", "CT", 1, path="b/1.png")]) == {}


def test_each_process_samples_its_own_stream(world):
    """At a temperature a second process doesn't repeat the first one's draws; greedy ones are nobody's."""
    def texts(rank, temperature):
        return [text for text, _ in evaluation.completions(world.net, world.processor, world.mixed[:2], max_new_tokens=8, rank=rank,
                                                           temperature=temperature)]
    assert texts(0, 1.0) != texts(1, 1.0) and texts(0, 0.0) == texts(1, 0.0)


def test_each_row_is_compared_with_the_one_before(world, monkeypatch, tmp_path):
    """Three checkpoints, accuracies 0, 1, 1: the third minus the second is 0."""
    right = dict(a=0, b=1, c=1)
    monkeypatch.setattr(evaluation, "questions_of", lambda *_: [])
    monkeypatch.setattr(evaluation, "answer", lambda ckpt, *_: ([row("anomaly", "CT", right[ckpt], ckpt=ckpt, path="p")], None))
    monkeypatch.setattr(evaluation, "write_report", lambda *_: None)
    evaluation.main(["--ckpt", *right, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert [results[x]["difference"].get("accuracy", {}).get("mean") for x in right] == [None, 1.0, 0.0]


@pytest.mark.parametrize("tiny, given, limit", [(True, 0, 80), (False, 0, 512), (False, 7, 7)])
def test_the_limit_of_a_completion(tiny, given, limit, world, monkeypatch):
    """80 tokens are enough for a tiny checkpoint, others get the paper's 512."""
    limits = []
    monkeypatch.setattr(M, "is_tiny", lambda name: tiny)
    monkeypatch.setattr(evaluation, "completions", lambda *args, max_new_tokens, **_: limits.append(max_new_tokens) or [("", True)])
    args = evaluation.parse_args(["--ckpt", world.folder, "--max_new_tokens", str(given)])
    evaluation.answer(world.folder, world.records[:1], make_judge(), args)
    assert limits == [limit]


def test_the_judge_that_was_asked_for_is_asked(world, monkeypatch):
    """Not the rule, which would be asked without a word."""
    monkeypatch.setattr(evaluation, "completions", lambda *_, **__: [(rewards.answer_text(world.records[0]), False)])
    args = evaluation.parse_args(["--ckpt", world.folder])
    rows, _ = evaluation.answer(world.folder, world.records[:1], lambda thoughts, items: [math.nan], args)
    assert math.isnan(rows[0]["verdict"])


def test_an_interval_draws_patients_not_images():
    """Four images of each of two patients, of whom one's answers all rise: in a quarter of the draws no answer does. Of eight
    images drawn by themselves that would be one in 256."""
    def rows(acc):
        return [row("anomaly", "CT", x, id=f"{i}", path=f"{i}.png", group=f"p{i // 4}") for i, x in enumerate(acc)]
    found = evaluation.difference(rows([0] * 8), rows([1] * 4 + [0] * 4))
    assert [found["accuracy"][x] for x in ("mean", "low", "high")] == [0.5, 0.0, 1.0]
