"""model.py against slow and plain references: the stock forward pass, transformers' generate, arithmetic by hand."""
import copy
import importlib
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import images_of, lines_of
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import grpo
import model as M
import rewards
import sft

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # files that no clone holds; a test that needs them is skipped
PROCESSORS = dict(qwen2_vl="Qwen2VLProcessor", qwen2_5_vl="Qwen2_5_VLProcessor", qwen3_vl="Qwen3VLProcessor")
FAMILIES = tuple(PROCESSORS)


# ------------------------------------------------------------------------------------------------------- models and references

def family(name, world):
    """A random model of one of the three families, small, with two layers -> (net, Processor). The tokenizer is shared."""
    c, patch = world.net.config, 16 if name == "qwen3_vl" else 14
    special = {k: getattr(c, k) for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=c.text_config.vocab_size, max_position_embeddings=2048, initializer_range=0.1, bos_token_id=None,
                eos_token_id=c.text_config.eos_token_id, pad_token_id=c.text_config.pad_token_id,
                rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3]))
    vision = dict(depth=2, num_heads=4, patch_size=patch, spatial_merge_size=2, temporal_patch_size=2, initializer_range=0.1)
    if name == "qwen2_vl":
        stem, vision = "Qwen2VL", vision | dict(embed_dim=32, hidden_size=64, mlp_ratio=2)
    elif name == "qwen2_5_vl":
        stem, vision = "Qwen2_5_VL", vision | dict(hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=56,
                                                   fullatt_block_indexes=[1])
    else:
        stem, vision = "Qwen3VL", vision | dict(hidden_size=32, intermediate_size=48, out_hidden_size=64,
                                                num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
        text |= dict(head_dim=16, rope_parameters=text["rope_parameters"] | dict(mrope_interleaved=True))
    config = getattr(transformers, f"{stem}Config")(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)
    torch.manual_seed(1)
    net = getattr(transformers, f"{stem}ForConditionalGeneration")(config).eval()
    net.set_attn_implementation(M.ATTENTION)
    images = Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=4 * patch**2, max_pixels=112 * 112)
    return net, M.Processor(world.processor.tokenizer, images)


def completions(n, g, length, seed=0):
    """Random tokens and a ragged mask, (n, g, length), with at least one token each."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (n, g, length), generator=rng)  # plain text: the special ids come last
    lengths = torch.randint(1, length + 1, (n, g), generator=rng)
    lengths[0, 0] = length
    return tokens, torch.arange(length) < lengths[..., None]


def plain_logprobs(net, batch, tokens, mask, temperature=1.0):
    """What token_logprobs should give, the slow way: every completion is a row of its own behind its own prompt and image, no
    padding, and transformers finds the positions. Nothing is shared, chunked or masked by hand."""
    out = torch.zeros(tokens.shape)
    for n, g in np.ndindex(*tokens.shape[:2]):
        prompt = batch["input_ids"][n][batch["attention_mask"][n].bool()]
        y = tokens[n, g][mask[n, g]]
        ids = torch.cat([prompt, y])[None]
        logits = net(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=batch["pixel_values"][n],
                     image_grid_thw=batch["image_grid_thw"][n:n + 1],
                     mm_token_type_ids=(ids == net.config.image_token_id).int()).logits[0, len(prompt) - 1:-1]
        banned = torch.zeros(logits.shape[-1], dtype=torch.bool)
        banned[M.never_drawn(net)] = True
        logp = (logits.masked_fill(banned, -torch.inf) / temperature).log_softmax(-1)
        out = out.index_put((torch.tensor(n), torch.tensor(g), mask[n, g].nonzero()[:, 0]), logp.gather(1, y[:, None])[:, 0])
    return out


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def recorded_sample(monkeypatch, net, batch, **kwargs):
    """M.sample -> tokens, mask, the log-probability of every token as it was drawn (N, G, T), and whether rows left the batch
    on the way (they are followed through the cache's own selections)."""
    steps, everyone = [], len(batch["input_ids"]) * kwargs["group_size"]
    rows = torch.arange(everyone)
    draw, select = M.draw, M.KVCache.keep

    def watched_draw(logits, *rest):
        y = draw(logits, *rest)
        steps.append(torch.zeros(everyone).index_copy(0, rows, logits.log_softmax(-1).gather(1, y[:, None])[:, 0]))
        return y

    def watched_select(cache, keep):
        nonlocal rows
        rows = rows[keep]
        return select(cache, keep)

    with monkeypatch.context() as patch:
        patch.setattr(M, "draw", watched_draw)
        patch.setattr(M.KVCache, "keep", watched_select)
        tokens, mask = M.sample(net, batch, **kwargs)
    return tokens, mask, torch.stack(steps, 1)[:, :tokens.shape[2]].view(tokens.shape) * mask, len(rows) < everyone


def stopping_at(batch, net, every=12):
    """The batch with every 12th token of the vocabulary taken for a stop token, so that completions end at many lengths."""
    return batch | dict(stop_ids=torch.arange(0, net.config.text_config.vocab_size, every))


def p_value(counts, probs):
    """Chi-square test of counts against probabilities; bins that expect fewer than 5 are merged."""
    expected = counts.sum() * probs.double()
    small = expected < 5
    o = torch.cat([counts[~small], counts[small].sum()[None]]).double()
    e = torch.cat([expected[~small], expected[small].sum()[None]])
    chi2 = ((o - e)**2 / e.clamp(min=1e-9)).sum()
    return torch.special.gammaincc(torch.tensor((len(o) - 1) / 2, dtype=torch.float64), chi2 / 2).item()


def first_token_probs(net, batch, temperature):
    """The distribution of one prompt's first completion token (V,), by the stock forward pass."""
    logits = stock_logits(net, batch)[0, -1]
    logits[M.never_drawn(net)] = -torch.inf
    return (logits / temperature).softmax(-1)


def stock_logits(net, batch):
    with torch.no_grad():
        return net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **images_of(batch),
                   mm_token_type_ids=(batch["input_ids"] == net.config.image_token_id).int()).logits


def make(folder):
    os.makedirs(folder)
    return str(folder)


# --------------------------------------------------------------------------------------------------------------- token_logprobs

@pytest.mark.parametrize("name", FAMILIES)
def test_token_logprobs_equal_the_stock_forward_pass(name, world):
    """The row shared by a group (mask, mRoPE positions, deepstack, image features) changes neither log-probabilities nor
    gradients: prompts of several lengths under left padding, images of several sizes, completions of several lengths."""
    net, processor = family(name, world)
    batch = M.encode(processor, world.mixed[:4])
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1 and len(batch["image_grid_thw"].unique(dim=0)) > 1
    tokens, mask = completions(4, 3, 7)
    fast, slow = (f(net, batch, tokens, mask, temperature=0.7) for f in (M.token_logprobs, plain_logprobs))
    assert fast.dtype == torch.float32 and fast.shape == tokens.shape
    assert (fast[~mask] == 0).all() and (fast[mask] < 0).all()
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    weight = torch.randn(tokens.shape)
    got, expected = gradients(net, (fast * weight).sum()), gradients(net, (slow * weight).sum())
    assert got.keys() == expected.keys()
    for part in ("visual", "language_model"):
        a, b = (torch.cat([grads[k].flatten() for k in got if part in k]) for grads in (got, expected))
        assert b.norm() > 0.1 and (a - b).norm() < 1e-4 * b.norm(), part


def test_no_completion_sees_another(world):
    """Another completion of the group, and what stands after a completion's end, leave its log-probabilities alone."""
    batch = M.encode(world.processor, world.mixed[:2])
    tokens, mask = completions(2, 3, 6)
    other = tokens.clone()
    other[:, 1] = 255 - other[:, 1]
    other[~mask] = 7
    with torch.no_grad():
        a, b = (M.token_logprobs(world.net, batch, y, mask) for y in (tokens, other))
    torch.testing.assert_close(a[:, [0, 2]], b[:, [0, 2]], rtol=0, atol=1e-6)
    assert ((a[:, 1] - b[:, 1]).abs() > 1e-3)[mask[:, 1]].all()


def test_mask_by_hand():
    """Two questions, the first with one place of padding: what each place sees."""
    got = M.causal_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert got.shape == (2, 1, 3, 3) and got.dtype == torch.bool
    assert got[:, 0].int().tolist() == [[[1, 0, 0], [0, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]]


@pytest.mark.parametrize("G", [1, 3])
def test_grouped_attention_equals_one_row_under_a_dense_mask(G):
    """Cutting the row into the prompt and G rows leaves out only scores that the dense (S, S) mask forbids anyway: values and
    gradients are those of the whole square, heads that share keys and padding included."""
    N, H, h, P, T, d = 2, 4, 2, 5, 3, 8
    S, generator = P + G * T, torch.Generator().manual_seed(G)
    q, k, v = (torch.randn(N, heads, S, d, generator=generator).requires_grad_() for heads in (H, h, h))
    real = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    dense = torch.zeros(N, S, S, dtype=torch.bool)
    dense[:, :P, :P] = torch.ones(P, P).bool().tril() & real.bool()[:, None] | torch.eye(P).bool()
    for g in range(G):
        own = slice(P + g * T, P + g * T + T)
        dense[:, own, :P] = real.bool()[:, None]
        dense[:, own, own] = torch.ones(T, T).bool().tril()
    mask = M.causal_mask(torch.cat([real, torch.ones(N, T)], 1))
    fast, _ = M.grouped_attention(None, q, k, v, mask, scaling=0.3, prompt_length=P)
    scores = (q @ k.repeat_interleave(H // h, 1).transpose(2, 3) * 0.3).masked_fill(~dense[:, None], -torch.inf)
    slow = (scores.softmax(-1) @ v.repeat_interleave(H // h, 1)).transpose(1, 2)
    weight = torch.randn(fast.shape)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_image_features_shared_by_the_passes_change_nothing(name, world):
    """`with_image_features` once for all passes (the tower is frozen) gives what each pass makes of the pixels itself."""
    net, processor = family(name, world)
    batch = M.encode(processor, world.mixed[:3])
    tokens, mask = completions(3, 2, 4)
    with torch.no_grad():
        seen = M.with_image_features(net, batch)
        assert "features" in seen and "pixel_values" not in seen
        own, shared = (M.token_logprobs(net, b, tokens, mask) for b in (batch, seen))
        a, b = (M.sample(net, b, group_size=2, max_new_tokens=5, temperature=0)[0] for b in (batch, seen))
    assert torch.equal(own, shared) and torch.equal(a, b)


def test_chunked_logits_equal_whole_ones_and_are_never_all_there(world, monkeypatch):
    """Out of memory by the logits is the commonest complaint: chunks give the same values and gradients, and neither forward
    nor backward ever makes more rows of logits than LOGIT_FLOATS allows."""
    net = copy.deepcopy(world.net)
    vocabulary, rows, results = net.lm_head.out_features, [], []
    net.lm_head.register_forward_hook(lambda module, inputs, out: rows.append(inputs[0].numel() // inputs[0].shape[-1]))
    y = torch.randint(0, 256, (11,))
    for limit in (2**26, 3 * vocabulary + 5, 1):
        monkeypatch.setattr(M, "LOGIT_FLOATS", limit)
        h = torch.randn(11, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
        net.zero_grad()
        rows.clear()
        logp = M.chosen_logprobs(net, h, y, 0.9)
        (logp * torch.arange(11)).sum().backward()
        results.append((logp.detach(), h.grad, net.lm_head.weight.grad.clone()))
        assert max(rows) <= max(1, limit // vocabulary) and sum(rows) >= 11
        with torch.no_grad():
            assert torch.equal(M.chosen_logprobs(net, h, y, 0.9), logp)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    monkeypatch.setattr(M, "LOGIT_FLOATS", 3 * vocabulary)
    rows.clear()
    batch = M.encode(world.processor, world.mixed[:2])
    M.token_logprobs(net, batch, *completions(2, 3, 6)).sum().backward()
    assert rows and max(rows) <= 3
    rows.clear()
    M.sample(net, batch, group_size=2, max_new_tokens=3)
    assert rows and max(rows) <= 4  # the last place of each of the N * G = 4 rows, not the prompt's


def test_rows_of_takes_each_question_with_its_own_pixels(world):
    """A micro-batch holds the right images although they have different numbers of patches."""
    batch = M.encode(world.processor, world.mixed)
    assert len(set(batch["image_grid_thw"].prod(1).tolist())) >= 3
    tokens, mask = completions(5, 2, 4)
    with torch.no_grad():
        whole = M.token_logprobs(world.net, batch, tokens, mask)
    for rows in (slice(0, 2), slice(1, 3), slice(3, 9), slice(0, 5), [4, 1], [2]):
        part = M.rows_of(batch, rows)
        chosen = world.mixed[rows] if isinstance(rows, slice) else [world.mixed[i] for i in rows]
        alone = M.encode(world.processor, chosen)
        assert all(torch.equal(a, b) for a, b in zip(part["pixel_values"], alone["pixel_values"], strict=True))
        assert torch.equal(part["image_grid_thw"], alone["image_grid_thw"])
        with torch.no_grad():
            logp = M.token_logprobs(world.net, part, tokens[rows], mask[rows])
        torch.testing.assert_close(logp, whole[rows], rtol=0, atol=1e-5)


def test_an_image_is_cut_once_within_the_limit(world, monkeypatch):
    """Patches are remembered by path, for each processor by itself, up to PIXEL_CACHE bytes."""
    for limit in (112 * 112, 64 * 64):
        images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=limit)
        processor = M.Processor(None, images)
        got, grid = M.image_patches(processor, world.mixed[1])
        expected = images(images=[data.load_image(world.mixed[1])], return_tensors="pt")
        assert torch.equal(grid, expected["image_grid_thw"]) and torch.equal(got, expected["pixel_values"])
        assert M.image_patches(processor, world.mixed[1])[0] is got
    big = M.image_patches(processor, world.mixed[1])[0].nbytes
    for room in (big, 2 * big):  # with images of several sizes, too
        monkeypatch.setattr(M, "PIXEL_CACHE", room)
        processor.patches.clear()
        M.encode(M.Processor(world.processor.tokenizer, images, processor.patches), world.mixed)
        assert 0 < sum(x.nbytes for x, _ in processor.patches.values()) <= room
    processor.patches.clear()
    monkeypatch.setattr(M, "PIXEL_CACHE", 0)
    assert M.image_patches(processor, world.mixed[0])[0] is not M.image_patches(processor, world.mixed[0])[0]


# ----------------------------------------------------------------------------------------------------------------------- sample

@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_drawn_has_the_log_probabilities_it_was_drawn_with(name, world, monkeypatch):
    """Sampling with the repeated cache and the update's shared row are the same policy, step by step, to 1e-4; padded in a
    batch and alone; images of several sizes; rows leaving on the way. Otherwise Eq. (8)'s ratio is not 1 where it should be."""
    net, processor = family(name, world)
    batch = stopping_at(M.encode(processor, world.mixed[:3]), net)
    tokens, mask, drawn, left = recorded_sample(monkeypatch, net, batch, group_size=4, max_new_tokens=12, temperature=0.7,
                                                generator=torch.Generator().manual_seed(3))
    assert left and tokens.shape == mask.shape and mask.any(-1).all() and len(set(mask.sum(-1).flatten().tolist())) > 2
    with torch.no_grad():
        padded = M.token_logprobs(net, batch, tokens, mask, temperature=0.7)
        alone = torch.cat([M.token_logprobs(net, M.encode(processor, [r]), tokens[i:i + 1], mask[i:i + 1], temperature=0.7)
                           for i, r in enumerate(world.mixed[:3])])
    torch.testing.assert_close(padded, drawn, rtol=0, atol=1e-4)
    torch.testing.assert_close(alone, drawn, rtol=0, atol=1e-4)


def test_first_stop_is_kept_and_nothing_after_it(world):
    """The mask holds the first stop token (it must be learned) and no place behind it; at the limit there may be none."""
    batch = stopping_at(M.encode(world.processor, world.mixed[:3]), world.net)
    tokens, mask = M.sample(world.net, batch, group_size=6, max_new_tokens=10)
    ended, stops = M.finished(batch, tokens, mask), torch.isin(tokens, batch["stop_ids"]) & mask
    assert ended.any() and not ended.all() and mask[..., 0].all()
    last = mask.sum(-1) - 1
    assert torch.equal(stops.sum(-1), ended.long())                             # one stop at most
    assert stops.gather(-1, last[..., None])[..., 0][ended].all()               # and it is the last masked place
    assert torch.equal(mask, torch.arange(mask.shape[-1]) <= last[..., None])   # no holes
    assert mask.shape[-1] == 10 and (last[~ended] == 9).all()                   # the unfinished run to the limit
    assert (tokens[~mask] == batch["pad_id"]).all()
    assert [len(group) for group in M.decode(world.processor, tokens, mask)] == [6, 6, 6]


def test_sampling_with_lora_merged_draws_the_policy_and_puts_every_bit_back(world):
    """Merged for sampling, the policy draws what it draws through its adapter; after, weights and adapter are as they were, and
    a reference (adapter off) is still sampled as the reference."""
    policy = with_lora(copy.deepcopy(world.net))
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    batch = M.encode(world.processor, world.mixed[:3])
    knobs = dict(group_size=1, max_new_tokens=8, temperature=0)
    through_merge = M.sample(policy, batch, **knobs)
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())
    with torch.no_grad():
        logp = M.token_logprobs(policy, batch, *through_merge)
        with policy.disable_adapter():
            reference, base = (M.sample(x, batch, **knobs)[0] for x in (policy, world.net))
    assert torch.equal(reference, base) and not torch.equal(reference, through_merge[0])
    for g, (y, m) in enumerate(zip(*through_merge, strict=True)):  # greedy: no other token is likelier
        for t in range(int(m.sum())):
            other = y.clone()
            for z in torch.randint(0, 256, (5,), generator=torch.Generator().manual_seed(t)):
                other[0, t] = z
                with torch.no_grad():
                    alone = M.token_logprobs(policy, M.rows_of(batch, slice(g, g + 1)), other[None], m[None])
                assert alone[0, 0, t] <= logp[g, 0, t] + 1e-5


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_fixed_shapes_draw_what_growing_ones_draw(temperature, world, monkeypatch):
    """CUDA's way (the whole cache read at each token, rows looked at now and then) gives the CPU's completions; where a step
    can't be captured as a graph, as here, that is said and sampling goes on without."""
    batch = M.encode(world.processor, world.mixed[:3])
    monkeypatch.setitem(M.LEAVE_AT, "cpu", 0.0)  # no row leaves: the same draws for the same rows

    def draw():
        return M.sample(world.net, batch, group_size=3, max_new_tokens=12, temperature=temperature,
                        generator=torch.Generator().manual_seed(0))
    free, _ = draw()
    batch["stop_ids"] = free[torch.arange(2), 0, torch.tensor([1, 6])]  # completions end at several lengths
    expected = draw()
    monkeypatch.setattr(M, "GRAPHED", {"cpu": 4})
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        fallen_back = draw()

    def emulated(graphed):
        """As if captured: a replay runs the step on the graph's own buffers."""
        graphed.logits = torch.empty(graphed.rows, world.net.lm_head.out_features)
        graphed.graph = SimpleNamespace(replay=lambda: graphed.logits.copy_(graphed.step(graphed.given)))
    monkeypatch.setattr(M.Graphed, "capture", emulated)
    replayed = draw()
    for got in (fallen_back, replayed):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert len(expected[1].sum(-1).unique()) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_generate(name, world):
    """temperature 0 gives transformers' generate token by token: image features, mRoPE after the prompt, the cache, left
    padding and the leaving of finished rows are all right, or this breaks."""
    net, processor = family(name, world)
    batch = M.encode(processor, world.mixed[:4])
    free, _ = M.sample(net, batch | dict(stop_ids=torch.tensor([-1])), group_size=1, max_new_tokens=14, temperature=0)
    batch["stop_ids"] = torch.stack([free[0, 0, 3], free[1, 0, 6]])  # some rows end early
    tokens, mask = M.sample(net, batch, group_size=1, max_new_tokens=14, temperature=0)
    stock = net.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **images_of(batch),
                         mm_token_type_ids=(batch["input_ids"] == net.config.image_token_id).int(), do_sample=False,
                         max_new_tokens=14, suppress_tokens=M.never_drawn(net).tolist(), pad_token_id=batch["pad_id"],
                         eos_token_id=batch["stop_ids"].tolist())[:, batch["input_ids"].shape[1]:]
    assert mask.sum(-1).min() < mask.sum(-1).max()
    assert torch.equal(torch.where(mask, tokens, batch["pad_id"])[:, 0], stock)


def test_leaving_rows_do_not_change_the_others(world):
    """Completions that end early and leave the batch take nothing from those that go on."""
    batch = M.encode(world.processor, world.mixed)
    free, _ = M.sample(world.net, batch | dict(stop_ids=torch.tensor([-1])), group_size=1, max_new_tokens=16, temperature=0)
    stops = free[torch.arange(3), 0, torch.tensor([1, 4, 9])]
    tokens, mask = M.sample(world.net, batch | dict(stop_ids=stops), group_size=1, max_new_tokens=16, temperature=0)
    assert len(set(mask.sum(-1).flatten().tolist())) > 1
    assert torch.equal(tokens[mask], free[..., :tokens.shape[-1]][mask])


def test_frequencies_follow_the_softmax_at_temperature(world):
    """20,000 first tokens against softmax(logits / 0.7) by chi-square; against temperature 1 the same test must fail."""
    batch = M.tensors(world.processor, ["Name it."], [M.image_patches(world.processor, world.mixed[2])])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([M.sample(world.net, batch, group_size=4000, max_new_tokens=1, temperature=0.7,
                                generator=generator)[0].flatten() for _ in range(5)])
    cold, warm = (first_token_probs(world.net, batch, t) for t in (0.7, 1.0))
    assert abs(cold.sum() - 1) < 1e-4 and (cold[M.never_drawn(world.net)] == 0).all()
    counts = torch.bincount(drawn, minlength=len(cold))
    assert p_value(counts, cold) > 1e-3
    assert p_value(counts, warm) < 1e-6


def test_top_p_keeps_the_smallest_set_that_holds_p(world):
    """top_p 0.8: nothing outside the most likely tokens that hold 0.8, and inside it the softmax, renormalised."""
    probs = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])  # 0.4 and 0.3, then 0.15 crosses 0.8
    logits = probs.log().expand(20000, -1)
    counts = torch.bincount(M.draw(logits, 1.0, 0.8, torch.Generator().manual_seed(0)), minlength=5)
    assert (counts > 0).tolist() == [False, True, False, True, True]
    assert p_value(counts, torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85) > 1e-3
    assert set(M.draw(logits, 1.0, 0.39, None).tolist()) == {1}  # at least one token is always kept

    batch = M.tensors(world.processor, ["Name it."], [M.image_patches(world.processor, world.mixed[2])])
    drawn = M.sample(world.net, batch, group_size=4000, max_new_tokens=1, temperature=0.7, top_p=0.8)[0].flatten()
    p = first_token_probs(world.net, batch, 0.7)
    ordered, ids = p.sort(descending=True)
    kept = ids[:int((ordered.cumsum(0) < 0.8).sum()) + 1]
    assert set(drawn.tolist()) <= set(kept.tolist()) and len(kept) < len(p)
    q = torch.zeros_like(p).index_copy(0, kept, p[kept] / p[kept].sum())
    assert p_value(torch.bincount(drawn, minlength=len(p)), q) > 1e-3


def test_what_has_no_probability_is_never_drawn():
    """Words of probability 0 at both ends and between, and one of 1e-12: drawn by where a number falls on the cumulative."""
    logits = torch.tensor([0, 0.6, 0, 0.4, 1e-12, 0]).log().expand(200_000, -1)
    assert set(M.draw(logits, 1.0, 1.0, torch.Generator().manual_seed(0)).tolist()) == {1, 3}


@pytest.mark.parametrize("heads", [2, 6])
def test_attention_over_one_token_is_the_plain_one(heads):
    """The few lines for decoding on a CPU against torch's kernel with keys and values copied to every head, 1e-5."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, h, t, 8, generator=g) for h, t in ((heads, 1), (2, 11), (2, 11)))
    mask = torch.rand(3, 1, 1, 11, generator=g) < 0.7
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, *(x.repeat_interleave(heads // 2, 1) for x in (k, v)), attn_mask=mask, scale=0.3)
    assert (M.attend(q, k, v, mask, 0.3) - plain).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_vision_ids_are_never_drawn(temperature, world):
    """A sampled image token has no image and breaks the next forward pass: such ids are out of the distribution, in sampling
    and in the log-probabilities alike, however likely the network finds them."""
    net, banned = copy.deepcopy(world.net), M.never_drawn(world.net)
    assert len(set(banned.tolist())) == 4
    net.lm_head.register_forward_hook(lambda module, inputs, out: out.index_fill(-1, banned, 50.0))
    batch = M.encode(world.processor, world.mixed[:2])
    tokens, mask = M.sample(net, batch, group_size=8, max_new_tokens=8, temperature=temperature)
    assert not torch.isin(tokens, banned).any()
    with torch.no_grad():
        boosted, plain = (M.token_logprobs(x, batch, tokens, mask) for x in (net, world.net))
    torch.testing.assert_close(boosted, plain, rtol=0, atol=1e-5)


def test_generation_config_is_not_inherited(world, tmp_path):
    """A checkpoint's generation_config.json (Qwen2.5's brings temperature and repetition penalty) changes nothing."""
    batch = M.encode(world.processor, world.mixed[:2])

    def sampled(net, temperature):
        return M.sample(net, batch, group_size=4, max_new_tokens=6, temperature=temperature,
                        generator=torch.Generator().manual_seed(0))[0]
    expected = [sampled(world.net, t) for t in (0, 1.0)]
    folder = make(tmp_path / "spoiled")
    M.save(world.net, world.processor, folder)
    Path(folder, "generation_config.json").write_text(json.dumps(dict(do_sample=True, temperature=0.01, top_k=1, top_p=0.1,
                                                                      repetition_penalty=9.0, eos_token_id=[5, 6, 7])))
    net, processor = M.load(folder)
    assert net.generation_config.repetition_penalty == 9.0
    assert all(torch.equal(sampled(net, t), y) for t, y in zip((0, 1.0), expected, strict=True))
    assert torch.equal(M.encode(processor, world.mixed[:2])["stop_ids"], batch["stop_ids"])


def test_sampling_repeats_under_a_seed_and_restores_the_mode(world):
    """The same generator state draws the same tokens; a model that was training is training again afterwards."""
    net = copy.deepcopy(world.net).train()
    batch = M.encode(world.processor, world.mixed[:2])
    a, b = (M.sample(net, batch, group_size=3, max_new_tokens=5, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and net.training
    assert a[0].dtype == torch.int64 and a[1].dtype == torch.bool


# ------------------------------------------------------------------------------------------------------------- LoRA and copies

def with_lora(net, seed=0):
    """A LoRA policy as after some training: B is no longer zero."""
    policy = M.add_lora(copy.deepcopy(net), 4, seed)
    torch.manual_seed(seed + 1)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return policy


def test_adapter_off_is_the_merged_sft_model_exactly(world, tmp_path):
    """The reference pi_SFT of stage 2 costs no second copy: stage 1's adapter was merged, so stage 2's switched off is pi_SFT
    bit for bit, not the base. (disable_adapter() on an unmerged SFT adapter would give the base, the classic mistake.)"""
    batch = M.encode(world.processor, world.mixed[:2])
    tokens, mask = completions(2, 3, 6)

    def logp(net):
        with torch.no_grad():
            return M.token_logprobs(net, batch, tokens, mask)
    stage1 = with_lora(world.net)
    M.save(stage1, world.processor, make(tmp_path / "sft"))
    merged, _ = M.load(str(tmp_path / "sft"))
    torch.testing.assert_close(logp(merged), logp(stage1), rtol=0, atol=1e-4)
    assert (logp(merged) - logp(world.net)).abs().max() > 1e-2
    policy = with_lora(M.load(str(tmp_path / "sft"))[0], seed=5)
    with grpo.reference_of(policy) as pi_sft:
        assert torch.equal(logp(pi_sft), logp(merged))
    assert (logp(policy) - logp(merged)).abs().max() > 1e-2  # and outside the adapter is on again
    fresh = M.add_lora(M.load(str(tmp_path / "sft"))[0], 4)
    assert torch.equal(logp(fresh), logp(merged))            # B = 0: the policy starts as pi_SFT


def test_saving_a_lora_policy_leaves_it_as_it_was(world, tmp_path):
    """The merge into the saved folder happens in a copy: training goes on with the adapter."""
    policy = with_lora(world.net)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    M.save(policy, world.processor, make(tmp_path / "a"))
    after = policy.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())


def test_an_update_too_small_for_bf16_survives_in_the_adapter(world, tmp_path, monkeypatch):
    """Steps of lr 1e-6 are smaller than bf16's spacing: merged into bf16 weights they are gone. model.load_unmerged gives the
    policy that was trained, bit for bit: pi_SFT in bf16 under the adapter; stock loaders find the merged weights, in fp32."""
    batch, (tokens, mask) = M.encode(world.processor, world.mixed[:2]), completions(2, 3, 6)

    def logp(net):
        with torch.no_grad():
            return M.token_logprobs(net, batch, tokens, mask)
    sft_folder, out = make(tmp_path / "sft"), make(tmp_path / "grpo")
    M.save(copy.deepcopy(world.net).to(torch.bfloat16), world.processor, sft_folder)
    pi_sft, _ = M.load(sft_folder, dtype=torch.bfloat16)
    policy = M.add_lora(M.load(sft_folder, dtype=torch.bfloat16)[0], 4)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=2e-5)
    for _ in range(2):  # a second checkpoint takes the place of the first
        M.save(policy, world.processor, out, keep_adapter=True)
    merged, _ = M.load(out, dtype=torch.bfloat16)
    moved = sum((p != q).sum().item() for p, q in zip(merged.parameters(), pi_sft.parameters(), strict=True))
    assert moved < 0.1 * pi_sft.num_parameters()                       # nearly all of the update is rounded away in bf16
    with monkeypatch.context() as patch:  # where there is CUDA, peft would load the adapter onto the first GPU
        patch.setattr("peft.peft_model.infer_device", lambda: "cuda")
        again, _ = M.load_unmerged(out, dtype=torch.bfloat16)
    assert torch.equal(logp(again), logp(policy)) and not torch.equal(logp(again), logp(pi_sft))
    with grpo.reference_of(again) as reference:
        assert torch.equal(logp(reference), logp(pi_sft))
    stock = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    stock.set_attn_implementation(M.ATTENTION)
    lifted = M.add_lora(M.load(sft_folder, dtype=torch.float32)[0], 4)
    lifted.load_state_dict({k: v for k, v in policy.state_dict().items() if "lora_" in k}, strict=False)
    torch.testing.assert_close(logp(stock), logp(lifted), rtol=0, atol=1e-5)


def test_lora_is_on_the_language_model_alone_and_in_fp32(world):
    """What is trained is LoRA on all seven matrices of every text layer, in fp32 over a bf16 base (at lr 1e-6 a bf16 update is
    lost); base and vision tower are frozen."""
    policy = M.add_lora(copy.deepcopy(world.net).to(torch.bfloat16), 4)
    train = {k: p for k, p in policy.named_parameters() if p.requires_grad}
    assert len(train) == 2 * 7 * sft.TINY_TEXT["num_hidden_layers"]
    assert all("lora_" in k and "language_model" in k and p.dtype == torch.float32 for k, p in train.items())
    assert all(p.dtype == torch.bfloat16 for k, p in policy.named_parameters() if k not in train)
    batch = M.encode(world.processor, world.mixed[:2])
    M.token_logprobs(policy, batch, *completions(2, 2, 4)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in train.values())
    assert all(p.grad.norm() > 0 for k, p in train.items() if "lora_B" in k)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_finds_every_family(name, world):
    """The pattern that names LoRA's matrices fits the three families' module names, and none of their vision towers'."""
    policy = M.add_lora(family(name, world)[0], 2)
    train = [k for k, p in policy.named_parameters() if p.requires_grad]
    assert len(train) == 2 * 7 * 2 and not any("visual" in k for k in train)


def test_frozen_copy_stays(world):
    """The reference of full fine-tuning does not move with the policy, and takes no gradient."""
    policy = copy.deepcopy(world.net).requires_grad_(True)
    frozen = grpo.frozen_copy(policy)
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    batch = M.encode(world.processor, world.mixed[:2])
    tokens, mask = completions(2, 2, 4)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    M.token_logprobs(policy, batch, tokens, mask).sum().backward()
    optimizer.step()
    assert all(torch.equal(v, frozen.state_dict()[k]) for k, v in before.items())
    assert not torch.equal(policy.lm_head.weight, frozen.lm_head.weight)
    with grpo.reference_of(policy, frozen) as pi_sft:
        assert not M.token_logprobs(pi_sft, batch, tokens, mask).requires_grad


# ---------------------------------------------------------------------------------------------------------------- save and load

def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(world, tmp_path, monkeypatch):
    """Weights, adapter and texts: a machine that loses power after the rename has them whole."""
    written = set()
    monkeypatch.setattr(os, "fsync", lambda number: written.add(os.fstat(number).st_ino))
    net, processor = M.load(world.folder)
    M.save(M.add_lora(net, 4), processor, tmp_path, keep_adapter=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6 and {path.stat().st_ino for path in files} == written


def test_saved_folder_is_a_plain_hugging_face_folder(world):
    """Our checkpoints load with stock transformers: the same weights to the bit, safetensors alone, stock class names in the
    JSON files (what AutoProcessor goes by), the chat template, ids that round-trip. Logits agree to 1e-5 and not to the bit:
    a stock network attends with transformers' own function, ours with grouped_attention, which adds up in another order."""
    files = set(os.listdir(world.folder))
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pth", ".pkl", ".writing"))]
    batch = M.encode(world.processor, world.mixed[:3])
    expected = stock_logits(world.net, batch)
    ours, processor = M.load(world.folder)
    for net in (ours, AutoModelForImageTextToText.from_pretrained(world.folder)):
        weights = net.state_dict()
        assert not net.training and all(torch.equal(weights[k], v) for k, v in world.net.state_dict().items())
        torch.testing.assert_close(stock_logits(net, batch), expected, rtol=0, atol=1e-5)

    again = M.encode(processor, world.mixed[:3])
    assert all(torch.equal(again[k], v) for k, v in batch.items() if torch.is_tensor(v)) and again["pad_id"] == batch["pad_id"]
    assert all(torch.equal(a, b) for a, b in zip(again["pixel_values"], batch["pixel_values"], strict=True))
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        config = json.loads(Path(world.folder, name).read_text())
        assert config["processor_class"] == "Qwen2_5_VLProcessor"
    assert config["image_processor_type"] == "Qwen2VLImageProcessor"
    tokenizer = AutoTokenizer.from_pretrained(world.folder)
    assert tokenizer.chat_template == world.processor.tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    for record in world.records:
        text = rewards.answer_text(record)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and ids == world.processor.tokenizer(text)["input_ids"]
    try:
        images = AutoImageProcessor.from_pretrained(world.folder, backend="pil")
    except ImportError:
        pytest.skip("all but the stock image processor was seen: this transformers wants torchvision for it")
    pixels = images(images=[data.load_image(world.mixed[0])], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, M.image_patches(world.processor, world.mixed[0])[0])


def test_the_tiny_tokenizer_keeps_names_whole_and_everything_else_too(world, tmp_path):
    """Each option's name is one token in a sentence, before and after a checkpoint: the tiny network tells names by their first
    token. A longer word that begins with a name isn't cut, and any text comes back as it was."""
    reloaded = M.load(world.folder)[1].tokenizer
    for tokenizer in (world.processor.tokenizer, reloaded):
        for name in {x for r in world.records for x in r["options"]}:
            assert tokenizer.tokenize(f"So it is {name}.")[-2].replace("\u0120", " ") == f" {name}"
        assert "\u0120Left\u0120Upper" not in tokenizer.tokenize("in the Left Uppermost")
        for text in ("It's 3.5 cm,  two X-rays:\n\n na\u00efve\tLeft Upper", "", " ", "<think>CT</think>"):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_saved_and_loaded(name, world, tmp_path):
    """Weights survive to the bit, and the folder names the family's own stock processor."""
    net, processor = family(name, world)
    batch, folder = M.encode(processor, world.mixed[:3]), make(tmp_path / name)
    M.save(net, processor, folder)
    again, loaded = M.load(folder)
    assert torch.equal(stock_logits(again, batch), stock_logits(net, batch))
    assert torch.equal(*(torch.cat(b["pixel_values"]) for b in (M.encode(loaded, world.mixed[:3]), batch)))
    assert json.loads(Path(folder, "preprocessor_config.json").read_text())["processor_class"] == PROCESSORS[name]


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="stock AutoProcessor needs torchvision")
@pytest.mark.parametrize("name", FAMILIES)
def test_stock_auto_processor_loads_the_folder(name, world, tmp_path):
    """The whole stock processor, where it can be built: its ids and patches of a prompt are ours."""
    net, processor = family(name, world)
    M.save(net, processor, make(tmp_path / name))
    stock = transformers.AutoProcessor.from_pretrained(tmp_path / name)
    assert type(stock).__name__ == PROCESSORS[name]
    record = world.mixed[1] if name != "qwen3_vl" else world.mixed[1] | dict(path=world.records[0]["path"])
    content = [{"type": "image"}, {"type": "text", "text": rewards.question_text(record)}]
    text = stock.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    theirs, ours = stock(text=[text], images=[data.load_image(record)], return_tensors="pt"), M.encode(processor, [record])
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    assert torch.equal(theirs["image_grid_thw"], ours["image_grid_thw"])
    torch.testing.assert_close(theirs["pixel_values"], ours["pixel_values"][0], rtol=0, atol=0.03)  # two grey levels if resized


def test_saving_again_replaces(world, tmp_path):
    """A second save into the same folder leaves the second model, and nothing half written."""
    folder = make(tmp_path / "twice")
    M.save(world.net, world.processor, folder)
    files = sorted(os.listdir(folder))
    net = copy.deepcopy(world.net)
    torch.nn.init.normal_(net.lm_head.weight)
    M.save(net, world.processor, folder)
    assert sorted(os.listdir(folder)) == files
    assert torch.equal(M.load(folder)[0].lm_head.weight, net.lm_head.weight)


def test_completions_are_encoded_closed_and_padded(world):
    """SFT targets end in the end-of-turn token, inside the mask; padding is outside; decoding gives the text back."""
    texts = [rewards.answer_text(r) for r in world.records[:3]] + ["B"]
    tokens, mask = M.encode_completions(world.processor, texts)
    assert tokens.shape == mask.shape and tokens.shape[:2] == (4, 1)
    last = tokens.gather(2, mask.sum(2, keepdim=True) - 1)
    assert (last == world.processor.tokenizer.eos_token_id).all()
    assert M.decode(world.processor, tokens, mask) == [[t] for t in texts]


@pytest.mark.parametrize("extra", ["<|im_start|>", "<|vision_pad|>"])
def test_special_tokens_are_not_free_to_say(world, extra):
    """One that a policy samples beside the blocks is seen by the format reward; the stop token and padding are not."""
    gold = rewards.answer_text(world.records[0])
    tokens, mask = M.encode_completions(world.processor, [gold, extra + gold, gold.replace("<answer>", f"{extra}<answer>")])
    texts = [text for (text,) in M.decode(world.processor, tokens, mask)]
    assert texts[0] == gold and texts[1] == extra + gold
    assert [rewards.format_reward(text) for text in texts] == [1, 0, 0]


def spoil(folder, how):
    """Break a saved checkpoint in the way `how` names."""
    weights = folder / "model.safetensors"
    if how == "an empty folder":
        for file in folder.iterdir():
            file.unlink()
    elif how == "BERT":
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder)
    elif how == "GPT-2":
        GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(folder)
    elif how == "config of no JSON":
        (folder / "config.json").write_text("{")
    elif how == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "weights of noise":
        weights.write_bytes(np.random.default_rng(0).bytes(5000))
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif how == "no image processor":
        (folder / "preprocessor_config.json").unlink()
    elif how == "no weights":
        weights.unlink()
    else:
        kept = safetensors.torch.load_file(weights)
        name = next(k for k in sorted(kept) if "mlp" in k)
        if how == "a tensor missing":
            del kept[name]
        else:
            kept[name] = torch.zeros(3, 3)
        safetensors.torch.save_file(kept, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("how", ["no such folder", "an empty folder", "BERT", "GPT-2", "config of no JSON", "weights cut short",
                                 "weights of noise", "no weights", "a tensor missing", "a tensor of another shape",
                                 "no tokenizer", "no image processor"])
def test_a_checkpoint_that_cannot_be_used_is_one_sentence(how, world, tmp_path):
    """Every such folder is a DataError of one line that names it: no traceback out of transformers, and never a model whose
    missing weights are silently random."""
    folder = tmp_path / how.replace(" ", "-")
    if how != "no such folder":
        M.save(world.net, world.processor, make(folder))
        spoil(folder, how)
    with pytest.raises(data.DataError) as caught:
        M.load(str(folder))
    sentence = str(caught.value)
    assert folder.name in sentence and "\n" not in sentence and len(sentence.replace(str(folder), "")) < 250
    if how in ("BERT", "GPT-2"):
        assert "architecture" in sentence and "qwen2_5_vl" in sentence


# --------------------------------------------------------------------------------------------------- the real model's own shape

def real_shape(folder):
    """A checkpoint folder with Qwen2.5-VL's own vocabulary, tokenizer and image processor, two layers, random weights."""
    source = SHARED / "qwen2_5_vl"
    config = json.loads((source / "config.json").read_text())
    config |= dict(hidden_size=384, intermediate_size=512, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)
    config["vision_config"] |= dict(hidden_size=128, intermediate_size=256, depth=2, num_heads=4, out_hidden_size=384,
                                    fullatt_block_indexes=[1])
    config.pop("transformers_version")
    Path(make(folder), "config.json").write_text(json.dumps(config))
    net = AutoModelForImageTextToText.from_config(transformers.AutoConfig.from_pretrained(folder))
    assert net.lm_head.out_features == 151_936
    net.save_pretrained(folder)
    for name in ("chat_template.jinja", "merges.txt", "vocab.json", "tokenizer_config.json", "preprocessor_config.json"):
        Path(folder, name).write_bytes((source / name).read_bytes())
    return str(folder)


@pytest.mark.skipif(not (SHARED / "qwen2_5_vl").is_dir() or not (SHARED / "idrid").is_dir(), reason="needs ../shared/data")
def test_the_real_vocabulary_and_processor_run_through_all_three_programs(tmp_path):
    """sft, grpo and eval, `paper` preset with LoRA, on a Qwen2.5-VL of the real vocabulary, tokenizer and image processor, and
    on fundus photographs of 4288 x 2848: the same code takes the real thing, through folders that stock classes load."""
    photographs = sorted((SHARED / "idrid" / "images").glob("*.jpg"))
    records = []
    for i, path in enumerate(photographs):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        records.append(dict(id=path.stem, image=path.name, modality="Fundus", anatomy="Retina", task="anomaly", source="IDRiD",
                            question="Is the retina normal?", options=["Normal", "Abnormal"], answer="B", group=path.stem,
                            thought="Bright spots lie around the macula. So the image is Abnormal.",
                            split="train" if i < 4 else "test"))
    data.write_records(records, tmp_path / "idrid.jsonl")
    base, out = real_shape(tmp_path / "base"), str(tmp_path / "out")
    files = ["--data", str(tmp_path / "idrid.jsonl"), "--max_pixels", "50176"]
    knobs = [*files, "--root", out, "--lora", "4", "--max_steps", "2"]
    sft.main(["--model", base, "--batch", "2", "--micro_batch", "1", *knobs])
    grpo.main(["--model", f"{out}/sft", "--batch", "4", "--G", "2", "--max_new_tokens", "6", *knobs])
    for stage in ("sft", "grpo"):
        used = json.loads(Path(out, stage, "knobs.json").read_text())
        lines = lines_of(Path(out, stage))
        assert used["preset"] == "paper" and used["lora"] == 4 and [x["step"] for x in lines] == [1, 2]
        figures = [(k, v) for line in lines for k, v in line.items()]
        assert all(np.isfinite(v) for k, v in figures if k not in ("judge_failed", "undecided", "thoughts_cut"))  # null: no thought in six tokens
    assert AutoTokenizer.from_pretrained(f"{out}/grpo")("<|im_end|>")["input_ids"] == [151_645]
    importlib.import_module("eval").main(["--ckpt", f"{out}/grpo", "--max_new_tokens", "6", *files])
    results, = json.loads(Path(out, "results.json").read_text()).values()
    assert results["overall"]["n"] == 1 and 0 <= results["overall"]["mean"] <= 1
