"""The programs on a CUDA device. Without one, test_devices.py runs this file on a pretended one (pretend_cuda.py).

    python -m pytest tests -k cuda
"""
import copy
import json
import shutil

import faults
import pytest
import torch
from conftest import lines_of
from test_model import FAMILIES, family, with_lora

import eval as evaluation
import grpo
import model as M
import rewards
import sft

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
              pytest.mark.filterwarnings("error:sampling without a CUDA graph")]


def test_bf16_on_cuda_agrees_with_fp32_and_lora_learns_at_1e_6(world):
    """On the device: sampling and update under bf16 autocast stay within 5e-2 of fp32, and an AdamW step at the paper's 1e-6
    moves LoRA's fp32 parameters over a bf16 base."""
    net = copy.deepcopy(world.net).cuda()
    batch = M.encode(world.processor, world.mixed[:3], "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    tokens, mask = M.sample(net, batch, group_size=4, max_new_tokens=10, generator=generator)
    with torch.no_grad():
        half = M.token_logprobs(net, batch, tokens, mask)
        cpu = M.encode(world.processor, world.mixed[:3])
        whole = M.token_logprobs(world.net, cpu, tokens.cpu(), mask.cpu())
    torch.testing.assert_close(half.cpu(), whole, rtol=0, atol=5e-2)
    policy = with_lora(copy.deepcopy(world.net).to("cuda", torch.bfloat16))
    train = [p for p in policy.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in train]
    M.token_logprobs(policy, batch, tokens, mask).sum().backward()
    torch.optim.AdamW(train, lr=1e-6, weight_decay=0.0).step()
    assert all((p != b).float().mean() > 0.5 for p, b in zip(train, before, strict=True))


def test_lora_takes_its_inputs_as_they_are(world):
    """On the device peft's rounding of LoRA's inputs to fp32 is left out, and every log-probability and gradient is the same bits."""
    policy = with_lora(copy.deepcopy(world.net).to("cuda", torch.bfloat16))
    batch = M.encode(world.processor, world.mixed[:2], "cuda")
    tokens, mask = M.sample(policy, batch, group_size=2, max_new_tokens=8, generator=torch.Generator("cuda").manual_seed(0))
    layers, found = [m for m in policy.modules() if isinstance(m, M.LoraLayer)], []
    assert not any(m.cast_input_dtype_enabled for m in layers)
    for cast in (False, True):
        for m in layers:
            m.cast_input_dtype_enabled = cast
        logp = M.token_logprobs(policy, batch, tokens, mask)
        logp.sum().backward()
        found.append([logp.detach()] + [p.grad for p in policy.parameters() if p.grad is not None])
        policy.zero_grad()
    assert len(found[0]) > 2 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_masked_attention_has_finite_gradients_at_every_length():
    """On the device attention with a mask, on scores of -120 and lengths of 64 modulo 128: cuDNN's kernel gives nan there
    (pytorch issue 196678), so it is switched off."""
    M.setup_devices()
    for S in (704, 768):
        q, k, v = (torch.randn(1, 1, S, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        q, k = 0.1 * q, 0.1 * k
        q[..., 0], k[..., 0] = 1.0, -120.0 * 8
        for x in (q, k, v):
            x.requires_grad_()
        mask = M.causal_mask(torch.ones(1, S, device="cuda"))
        M.attend(q, k, v, mask, 1 / 8).sum().backward()
        assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("lora", [False, True])
def test_cuda_graphs_draw_the_policy(lora, world, monkeypatch, recwarn):
    """On the device a token's step is captured, without a word that it failed; rows leave and it is captured again; what was
    drawn has the log-probability that the update computes for it, to bf16's precision."""
    net = with_lora(copy.deepcopy(world.net).to("cuda", torch.bfloat16)) if lora else copy.deepcopy(world.net).cuda()
    batch = M.encode(world.processor, world.mixed[:4], "cuda")
    batch["stop_ids"] = torch.arange(0, world.net.config.text_config.vocab_size, 12, device="cuda")
    captures, capture, drawn, draw = [], M.Graphed.capture, [], M.draw
    monkeypatch.setattr(M, "GRAPHED", {"cuda": 4})
    monkeypatch.setattr(M.Graphed, "capture", lambda graphed: captures.append(graphed.rows) or capture(graphed))
    monkeypatch.setattr(M, "draw", lambda x, *rest: drawn.append(x.log_softmax(-1).max(-1).values) or draw(x, *rest))
    tokens, mask = M.sample(net, batch, group_size=8, max_new_tokens=40, generator=torch.Generator("cuda").manual_seed(0))
    assert not [w for w in recwarn if "cuda graph" in str(w.message).lower()]
    assert captures[0] <= 32 and len(captures) > 1 and captures == sorted(set(captures), reverse=True)
    first, before = drawn[0], len(drawn)
    greedy = M.sample(net, batch, group_size=1, max_new_tokens=40, temperature=0)
    with torch.no_grad():
        logp = M.token_logprobs(net, batch, *greedy)
    torch.testing.assert_close(logp[:, 0, 0], first[::8], rtol=0, atol=5e-2)
    best = torch.stack([x for x in drawn[before:] if len(x) == 4][:greedy[0].shape[2]], 1)  # while all four rows are there
    seen = greedy[1][:, 0, :best.shape[1]]
    torch.testing.assert_close(logp[:, 0, :best.shape[1]][seen], best[seen], rtol=0, atol=5e-2)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_draws_on_cuda_what_the_cpu_draws(name, world):
    """Images of five sizes, a graph for the steps: the tokens are those of the CPU, but for some where bf16 rounds two to the same,
    and so is their log-probability; a gradient flows."""
    net, processor = family(name, world)
    on_cuda = copy.deepcopy(net).cuda()
    batch, on_cpu = (M.encode(processor, world.mixed, device) for device in ("cuda", "cpu"))
    greedy = dict(group_size=1, max_new_tokens=6, temperature=0)
    tokens, mask = M.sample(on_cuda, batch, **greedy)
    logp = M.token_logprobs(on_cuda, batch, tokens, mask)
    logp.sum().backward()
    assert all(p.grad.isfinite().all() for p in on_cuda.parameters() if p.grad is not None)
    with torch.no_grad():
        scored = M.token_logprobs(net, on_cpu, tokens.cpu(), mask.cpu())
    torch.testing.assert_close(logp.detach().cpu(), scored, rtol=0, atol=5e-2)
    expected, _ = M.sample(net, on_cpu, **greedy)
    T = min(tokens.shape[2], expected.shape[2])
    same = tokens[..., :T].cpu() == expected[..., :T]
    assert same.float().mean() > 0.5


# ------------------------------------------------------------------------------------------------------------- the programs

def flags_of(world, out, *more):
    return ["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--lora", "2", "--max_steps", "2",
            "--out", str(out), *more]


GRPO = ["--batch", "8", "--G", "4", "--max_new_tokens", "8", "--no-drop_no_spread", "--show_every", "1", "--micro_tokens", "150",
        "--lr", "1e-6"]


def left(out):
    """What a run left: its figures, a list for each step, and the completions it shows."""
    texts = [json.loads(line)["completion"] for line in (out / "completions.jsonl").read_text(encoding="utf-8").splitlines()]
    return lines_of(out), texts


def as_many(one, other):
    """The share of completions that are the same in two runs. A GPU adds up in whatever order it likes, so not all need be."""
    assert len(one) == len(other) > 0
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


@pytest.mark.parametrize("knobs", [(), ("--lora", "0")], ids=["lora", "full"])
def test_sft_learns_on_cuda_the_same_with_checkpointing(knobs, world, tmp_path):
    """Loss and gradient of two steps, to bf16's precision; the checkpoint is one that the CPU can use."""
    every = {}
    for name, more in (("plain", ()), ("checkpointed", ("--checkpointing",))):
        sft.main(flags_of(world, tmp_path / name, *knobs, *more, "--batch", "2", "--micro_batch", "1", "--lr", "1e-4"))
        every[name] = [[line[k] for k in ("loss", "grad_norm")] for line in lines_of(tmp_path / name)]
        assert M.all_finite(M.load(str(tmp_path / name))[0].parameters())
    assert len(every["plain"]) == 2
    torch.testing.assert_close(torch.tensor(every["checkpointed"]), torch.tensor(every["plain"]), rtol=1e-2, atol=0)


def test_grpo_on_cuda_draws_the_same_with_a_graph_without_and_resumed(world, toy, monkeypatch, tmp_path):
    """Under LoRA, whose KL is 0 before the first step: two steps; the same without a CUDA graph; one step, saved, and another."""
    captured, capture = [], M.Graphed.capture
    monkeypatch.setattr(M.Graphed, "capture", lambda graphed: captured.append(graphed) or capture(graphed))
    grpo.main(flags_of(world, tmp_path / "graph", *GRPO))
    assert captured
    figures, texts = left(tmp_path / "graph")
    assert [line["step"] for line in figures] == [1, 2] and figures[0]["kl"] < 1e-6 and figures[0]["ratio"] == 1
    assert all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in figures)

    grpo.main(flags_of(world, tmp_path / "resumed", *GRPO, "--max_steps", "1"))
    grpo.main(flags_of(world, tmp_path / "resumed", *GRPO, "--resume"))
    monkeypatch.setattr(M, "GRAPHED", {})
    grpo.main(flags_of(world, tmp_path / "plain", *GRPO))
    for other in ("resumed", "plain"):
        assert as_many(texts, left(tmp_path / other)[1]) > 0.5, other


@pytest.mark.parametrize("knobs", [
    ("--lora", "0", "--ratio", "sft", "--mu", "2"),
    ("--checkpointing", "--judge", "hf:reference", "--eval_every", "2", "--eval_questions", "2"),
    ("--thinking", "none", "--weights", "1", "1", "0", "--loss_norm", "token", "--scale", "std", "--top_p", "0.9")],
    ids=["full", "reference-as-judge", "no-thought"])
def test_other_ways_through_grpo_end_on_cuda(knobs, world, toy, tmp_path, monkeypatch):
    """All parameters against a frozen copy in bf16 and the ratio to it; F on the device, evaluations and checkpointing; the rest."""
    if "hf:reference" in knobs:
        monkeypatch.setattr(rewards, "score", asks_f)
    grpo.main(flags_of(world, tmp_path / "run", *GRPO, *knobs, "--lr", "1e-4"))
    figures, _ = left(tmp_path / "run")
    assert figures[-1]["step"] == 2 and all(line["grad_norm"] > 0 and line["skipped"] == 0 for line in figures)
    assert 0 <= figures[-1]["kl"] < 0.1 and 0.5 < figures[-1]["ratio"] < 2


def asks_f(texts, items, judge):
    """A toy's rewards, but F has its word too."""
    rows = faults.toy_score(texts, items, judge)
    for row, verdict in zip(rows, judge(texts, items), strict=True):
        assert verdict in "ABCDEF"
        row["verdict"] = verdict
    return rows


def test_eval_and_a_judge_on_cuda(world, tmp_path):
    """A checkpoint of GRPO under LoRA, as it was trained; F a model on the same device; one image from the command line."""
    grpo.main(flags_of(world, tmp_path / "run", *GRPO))
    net, _ = M.load_unmerged(str(tmp_path / "run"), dtype=torch.bfloat16, device="cuda")
    assert {p.dtype for name, p in net.named_parameters() if "lora_" in name} == {torch.float32}
    evaluation.main(["--ckpt", str(tmp_path / "run"), "--data", world.jsonl, "--questions", "3", "--max_new_tokens", "8",
                     "--judge", f"hf:{world.folder}@cuda", "--out", str(tmp_path / "report")])
    results, = json.loads((tmp_path / "report" / "results.json").read_text(encoding="utf-8")).values()
    assert results["overall"]["n"] == 3
    shutil.copy(world.records[0]["path"], tmp_path / "scan.png")
    evaluation.main(["--ckpt", str(tmp_path / "run"), "--image", str(tmp_path / "scan.png"), "--question", "What is this?",
                     "--options", "CT", "MRI", "--max_new_tokens", "8"])
