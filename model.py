"""The network, and everything that turns records into its tensors and its outputs into log-probabilities.

Loading Qwen2-VL, Qwen2.5-VL or Qwen3-VL through transformers, without torchvision; a tiny Qwen2.5-VL for a laptop; LoRA through
peft; the hand-written sampling loop; the log-probabilities of sampled tokens; saving as a plain Hugging Face folder; devices.

One group, one image: the G completions of a question share its prompt. `sample` computes image and prompt once and repeats
their key/value cache for the G rows; `token_logprobs` puts the group in one row, [image, prompt | completion 1 | ... |
completion G], with an attention mask in which each completion sees the prompt and itself.

Left out on purpose: videos, several images a question, beam search, penalties, any default of a checkpoint's
generation_config (the policy that is sampled must be the policy that is trained).
"""
import contextlib
import copy
import functools
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import DataError, expect, load_image
from rewards import question_text

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing.*")  # new names, not yet in 5.17

FAMILIES = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
ADAPTER = "adapter"         # folder inside a checkpoint of GRPO under LoRA: the adapter by itself
MAX_PIXELS = 512 * 28 * 28  # pixels: a larger image is shrunk to at most 512 image tokens
LOGIT_FLOATS = 2**26        # floats: log-probabilities are taken in chunks of tokens whose logits hold at most this many
PIXEL_CACHE = 2**29         # bytes of prepared image patches kept in memory (all of the phantoms; a slice of a large set)
GRAPHED = {"cuda"}          # devices on which a token's step is captured as one graph
LOOK_EVERY = 16             # tokens between looks at how many rows are left, on those
STAY = 0.8                  # share of the rows that are left at which the finished ones leave the batch
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # the language model's matrices; the vision tower is frozen

# The tiny Qwen2.5-VL: 1.1 M parameters, the real architecture in small.
TINY_TEXT = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=4096, rms_norm_eps=1e-6, initializer_range=0.05,
                 rope_parameters=dict(rope_type="default", rope_theta=1000000.0, mrope_section=[4, 6, 6]))
TINY_VISION = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, patch_size=14, spatial_merge_size=2,
                   temporal_patch_size=2, window_size=112, out_hidden_size=128, fullatt_block_indexes=[1],
                   initializer_range=0.05)
TINY_VOCABULARY = 1000      # tokens at most, the special ones included: every word of the phantoms is one
SPECIAL_TOKENS = [f"<|{x}|>" for x in
                  "endoftext im_start im_end vision_start vision_end vision_pad image_pad video_pad".split()]
TAG_TOKENS = ["<think>", "</think>", "<answer>", "</answer>"]  # one token each, as in Qwen3's tokenizer
CHAT_TEMPLATE = (  # Qwen2.5-VL's turns, for one image and text
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

class Processor(NamedTuple):
    """What turns a question into ids and an image into patches. The stock AutoProcessor needs torchvision; this doesn't."""
    tokenizer: object
    image_processor: object
    name: str  # of the stock class, for AutoProcessor

# ----------------------------------------------------------------------------------------------------------------- the network

def load(name, *, dtype=torch.float32, device="cpu", max_pixels=MAX_PIXELS):
    """A checkpoint (folder or hub name) -> (model in eval mode, Processor). DataError where it is not one of FAMILIES."""
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise DataError(f"{name}: no such checkpoint: neither a folder with a config.json nor a name on the hub that could be "
                        f"reached ({type(e).__name__})") from e
    expect(config.model_type in FAMILIES,
           f"{name}: a checkpoint of another architecture ({config.model_type}); expected one of {', '.join(FAMILIES)}")
    try:
        net, info = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, attn_implementation="sdpa",
                                                                output_loading_info=True, use_safetensors=True,
                                                                trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(name)  # AutoImageProcessor may ask for torchvision
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise DataError(f"{name}: the checkpoint can't be read: {str(e).splitlines()[0].split('. ')[0]}") from e
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    expect(not wrong, f"{name}: the checkpoint is incomplete: {len(wrong)} tensors are missing or of another shape, the first "
                      f"is {(*wrong, '')[0]}")
    expect(tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id,
           f"{name}: the checkpoint's tokenizer does not fit it or is missing: no <|image_pad|> of id {config.image_token_id}")
    longest = min(max_pixels, image_processor.size["longest_edge"])
    image_processor.size = {"shortest_edge": min(image_processor.size["shortest_edge"], longest), "longest_edge": longest}
    tokenizer.padding_side = "left"
    return net.to(device).eval(), Processor(tokenizer, image_processor, FAMILIES[config.model_type])

def is_tiny(name):
    """Whether a checkpoint folder holds a network as small as build_tiny's."""
    there = os.path.exists(os.path.join(name, "config.json"))
    return there and AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config().hidden_size <= 256

def build_tiny(texts, names=(), *, image_size, seed=0):
    """A tiny Qwen2.5-VL with random weights, and a byte-level BPE tokenizer trained on `texts` -> (model, Processor).

    `names` are one token each, where Qwen's own tokenizer cuts between words: a network this small finds a name by its first
    token, and does not always learn to tell "Left Upper" from "Left Lower" by the second."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    names = [rf" ?{re.escape(x)}(?!\w)" for x in sorted(names, key=len, reverse=True)]
    words = [*names, r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r"\s+(?!\S)", r"\s+"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("|".join(words)), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY - len(SPECIAL_TOKENS + TAG_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    tokenizer.add_tokens(TAG_TOKENS)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    text = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    vision = {f"{x}_token_id": tokenizer.convert_tokens_to_ids(f"<|{y}|>") for x, y in dict(
        image="image_pad", video="video_pad", vision_start="vision_start", vision_end="vision_end").items()}
    config = Qwen2_5_VLConfig(text_config=dict(TINY_TEXT, vocab_size=len(tokenizer), **text), vision_config=dict(TINY_VISION),
                              **vision, tie_word_embeddings=True)
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    net = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=image_size**2)
    return net, Processor(tokenizer, images, "Qwen2_5_VLProcessor")

def add_lora(net, rank, seed=0):
    """LoRA of `rank` on the language model's matrices, its parameters in fp32 whatever the base is in: at lr 1e-6 an update
    is smaller than bf16's spacing and would be lost."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LORA_TARGETS)
    return get_peft_model(net, config, autocast_adapter_dtype=True).eval()

@contextlib.contextmanager
def merged(model):
    """Inside, LoRA is part of an fp32 network's weights: a matrix costs one product a token and not three. After, the weights
    are put back, not subtracted from: not a bit of them changes. In bf16 a small update would be rounded away, so not there."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and not m.disable_adapters
              and m.base_layer.weight.dtype == torch.float32]
    weights = [m.base_layer.weight.data for m in layers]
    try:
        for m in layers:
            m.base_layer.weight.data = m.base_layer.weight.data + m.get_delta_weight(m.active_adapters[0])
        with model.disable_adapter() if layers else contextlib.nullcontext():
            yield
    finally:
        for m, weight in zip(layers, weights, strict=True):
            m.base_layer.weight.data = weight

def keep_less(policy):
    """Keep only each layer's input for the backward pass and compute the rest again: a third slower, several times less
    memory. transformers does so in train mode, which changes nothing else here: no dropout is above 0."""
    policy.gradient_checkpointing_enable(dict(use_reentrant=False))
    policy.train()

def network(model):
    """The transformers model under an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model

def autocast(model):
    """bf16 arithmetic on CUDA over whatever the weights are kept in (fp32 master weights); plain fp32 on the CPU."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()

# ---------------------------------------------------------------------------------------------------------- records -> tensors

_patches = {}  # (processor, image path) -> (patches, grid): an image is decoded and cut once a run while it fits in PIXEL_CACHE

def image_patches(processor, record):
    """One record's image -> (patches (p, 3*2*14*14) float32, grid (1, 3) = time, rows, columns of patches)."""
    ip = processor.image_processor
    key = (record["path"], ip.patch_size, ip.merge_size, ip.size["shortest_edge"], ip.size["longest_edge"])
    if key not in _patches:
        out = ip(images=[load_image(record)], return_tensors="pt")
        entry = out["pixel_values"], out["image_grid_thw"]
        if entry[0].nbytes * (len(_patches) + 1) > PIXEL_CACHE:
            return entry
        _patches[key] = entry
    return _patches[key]

def tensors(processor, texts, images, device="cpu", openings=None):
    """User messages, their image patches (or None each) and what the answers open with, if anything -> the batch that `sample`
    and `token_logprobs` take:
    input_ids, attention_mask (N, P) left-padded, pixel_values (all patches, d), image_grid_thw (images, 3), stop_ids, pad_id.
    """
    tok, merge = processor.tokenizer, processor.image_processor.merge_size
    prompts = []
    for text, image, opening in zip(texts, images, openings or [""] * len(texts), strict=True):
        content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": text}]
        prompt = tok.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        if image is not None:  # one placeholder for each merged patch
            prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * int(image[1].prod() // merge**2), 1)
        prompts.append(prompt + opening)
    ids = tok(prompts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False)
    batch = dict(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"],
                 stop_ids=torch.tensor(sorted({tok.eos_token_id, tok.pad_token_id})))
    seen = [image for image in images if image is not None]
    if seen:
        batch |= dict(pixel_values=torch.cat([p for p, _ in seen]), image_grid_thw=torch.cat([g for _, g in seen]))
    return {k: v.to(device) for k, v in batch.items()} | {"pad_id": tok.pad_token_id}

def check_texts(processor, records, text_of):
    """DataError for a record whose text holds one of the tokenizer's special tokens: it would be read as an image or a turn."""
    special = [str(t) for t in processor.tokenizer.added_tokens_decoder.values() if t.special]
    for r in records:
        found = [t for t in special if t in text_of(r)]
        expect(not found, f"record {r['id']!r}: its text holds the special token {found}, which only the program may set")

def encode(processor, records, device="cpu"):
    """Records -> batch (see `tensors`): each record's question, options and instruction behind its image."""
    check_texts(processor, records, question_text)
    return tensors(processor, [question_text(r) for r in records], [image_patches(processor, r) for r in records], device)

def encode_completions(processor, texts, device="cpu"):
    """N target texts -> tokens, mask (N, 1, T), right-padded, each closed by the end-of-turn token: groups of one for SFT."""
    tok = processor.tokenizer
    rows = [torch.tensor(ids + [tok.eos_token_id]) for ids in tok(list(texts), add_special_tokens=False)["input_ids"]]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tok.pad_token_id)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
    return tokens[:, None].to(device), mask[:, None].to(device)

def prompt_positions(net, batch):
    """mRoPE positions of the prompt (3, N, P), and the position of each completion's first token (N,). An image takes as many
    positions as its longer side has merged patches, so a completion does not go on from the prompt's length. A batch may ask
    for positions left free between the two ("skip", (N,)): the tiny base's warm-up does."""
    kinds = (batch["input_ids"] == net.config.image_token_id).int()
    positions, _ = net.model.get_rope_index(batch["input_ids"], mm_token_type_ids=kinds, attention_mask=batch["attention_mask"],
                                            image_grid_thw=batch.get("image_grid_thw"))
    positions = positions.masked_fill(batch["attention_mask"][None] == 0, 0)
    return positions, positions.amax(dim=(0, 2)) + 1 + batch.get("skip", 0)

def never_drawn(net):
    """Ids a completion may not hold: an image token without an image breaks the next forward pass."""
    c = net.config
    return ids_on(c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id, device=net.device)

@functools.cache
def ids_on(*ids, device):
    """Ids as a tensor that is made once: a copy to the device at every token would wait for it."""
    return torch.tensor(ids, device=device)

def next_token_logits(net, hidden, temperature):
    """Hidden states (..., d) -> the logits of the distribution that is sampled (..., V), float32."""
    logits = net.lm_head(hidden).float().index_fill_(-1, never_drawn(net), -torch.inf)
    return logits if temperature == 1 else logits / temperature

# ------------------------------------------------------------------------------------- one pass of the network, one row a group

def see(model, batch):
    """The batch with what the vision tower makes of its images in place of their pixels: "features" (image tokens, d), and
    Qwen3-VL's "deepstack" of them. Where the tower is frozen one call serves sampling, reference and update."""
    if "pixel_values" not in batch:
        return batch
    tower = network(model).model.visual
    learns = torch.is_grad_enabled() and any(p.requires_grad for p in tower.parameters())
    with torch.set_grad_enabled(learns), autocast(model):
        seen = network(model).model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    whole = lambda x: x if torch.is_tensor(x) else torch.cat(list(x))  # noqa: E731  (a tensor an image, or all in one)
    rest = {k: v for k, v in batch.items() if k != "pixel_values"}
    return rest | dict(features=whole(seen.pooler_output),
                       deepstack=[whole(x) for x in getattr(seen, "deepstack_features", None) or ()])

def rows_of(batch, rows):
    """Questions `rows` (a slice or a list of indices) of a batch, with their images."""
    rows = list(range(len(batch["input_ids"])))[rows] if isinstance(rows, slice) else rows
    out = dict(batch, input_ids=batch["input_ids"][rows], attention_mask=batch["attention_mask"][rows])
    if "image_grid_thw" in batch:
        patches = batch["image_grid_thw"].prod(1)                                          # (N,)

        def part(x):  # patches, or what the tower merges them into: the same share of x for each image
            sizes = (patches * len(x) // patches.sum()).tolist()
            pieces = x.split(sizes)
            return torch.cat([x[:0], *(pieces[i] for i in rows)])
        out |= {k: part(batch[k]) for k in ("pixel_values", "features") if k in batch}
        if "deepstack" in batch:
            out["deepstack"] = [part(x) for x in batch["deepstack"]]
        out["image_grid_thw"] = batch["image_grid_thw"][rows]
    return out

def hidden_states(net, ids, mask, positions, batch=None, cache=None):
    """Token ids (n, S), a mask (n, 1, S, keys) or group_mask's, positions (3, n, S) -> last hidden states (n, S, d). `batch`
    holds the images of the ids, if any (see `see`)."""
    language = net.model.language_model
    language.config._attn_implementation = GROUPED
    x, more = language.embed_tokens(ids), {}
    if batch and "features" in batch:
        places = ids == net.config.image_token_id                                          # (n, S)
        x = x.masked_scatter(places[..., None], batch["features"].to(x.dtype))
        if batch["deepstack"]:
            more = dict(visual_pos_masks=places, deepstack_visual_embeds=batch["deepstack"])
    return language(inputs_embeds=x, attention_mask=mask, position_ids=positions, past_key_values=cache,
                    use_cache=cache is not None, **more).last_hidden_state

def group_mask(prompt_mask, T):
    """What the tokens of a completion see in their row [prompt | completion 1 | ... | completion G]: the prompt and the
    completion's own earlier tokens, never another completion. prompt_mask (N, P) -> (N, 1, T, P+T) bool, True = attends."""
    N, P = prompt_mask.shape
    own = torch.ones(T, T, dtype=torch.bool, device=prompt_mask.device).tril()
    return torch.cat([prompt_mask.bool()[:, None].expand(N, T, P), own.expand(N, T, T)], 2)[:, None]

def causal_mask(prompt_mask):
    """(N, P) -> (N, 1, P, P) bool. Every place sees itself, the padding too: a row of nothing but False has no softmax."""
    square = prompt_mask.new_ones(prompt_mask.shape[1], prompt_mask.shape[1], dtype=torch.bool)
    return (square.tril() & prompt_mask.bool()[:, None] | square.tril() & square.triu())[:, None]

def grouped_attention(module, q, k, v, attention_mask, scaling=None, **kwargs):
    """Attention for transformers' layers: q (N, H, S, d), k, v (N, h, S or more, d) -> (N, S, H, d), None.

    With group_mask's mask the row is a group's. Its completions need no scores against each other, so it is cut: the prompt
    by itself, then the G completions as G rows over [prompt, own]: G*T*(P+T) scores for them and not (P+G*T)^2.
    """
    if attention_mask is None:  # a stock forward pass of the same network
        return sdpa_attention_forward(module, q, k, v, None, scaling=scaling, **kwargs)
    (N, _, S, _), (T, keys) = q.shape, attention_mask.shape[-2:]
    if T == S:
        return attend(q, k, v, attention_mask, scaling).transpose(1, 2).contiguous(), None
    P, G = keys - T, (S - keys + T) // T
    prompt = attend(*(x[:, :, :P] for x in (q, k, v)), causal_mask(attention_mask[:, 0, 0, :P]), scaling)  # (N, H, P, d)
    rows = [x[:, :, P:].unflatten(2, (G, T)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]              # (N*G, ., T, d)
    over = [torch.cat([x[:, :, :P].repeat_interleave(G, 0), own], 2) for x, own in zip((k, v), rows[1:], strict=True)]
    out = attend(rows[0], *over, attention_mask.repeat_interleave(G, 0), scaling)          # (N*G, H, T, d)
    out = out.unflatten(0, (N, G)).transpose(1, 2).flatten(2, 3)                           # (N, H, G*T, d)
    return torch.cat([prompt, out], 2).transpose(1, 2).contiguous(), None

def attend(q, k, v, mask, scaling):
    """softmax(q k^T * scaling) v. The H/h heads that share keys and values are taken as more queries of one head, which spares
    copying keys and values for each: in decoding, where they are most of what is read, H/h times."""
    (N, H, T, d), h = q.shape, k.shape[1]
    q = q.reshape(N, h, H // h * T, d)
    if T == 1 and q.device.type == "cpu":  # over one token the kernel of torch for CPUs takes twice as long as this
        out = (scaling * q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    else:
        out = scaled_dot_product_attention(q, k, v, mask if T == 1 else mask.repeat(1, 1, H // h, 1), scale=scaling)
    return out.reshape(N, H, T, d)  # the kernels of CUDA differ in the layout they answer in

GROUPED = "one_row_a_group"  # the name under which transformers' layers find it
transformers.AttentionInterface.register(GROUPED, grouped_attention)
transformers.AttentionMaskInterface.register(GROUPED, sdpa_mask)  # in a stock forward pass

# ----------------------------------------------------------------------------------------------------------- the sampling loop

class KVCache:
    """The keys and values of the rows that are sampled, in buffers of their final length: each token is written where it
    belongs. transformers' DynamicCache copies all of them at every token, which was 43 % of a rollout's time on the CPU."""

    def __init__(self, G, room):
        self.G, self.room, self.k, self.v, self.at, self.end = G, room, [], [], None, None

    def update(self, k, v, layer, *_, **__):
        """A layer's keys and values -> those to attend to. First the prompt's (N, h, P, d), kept for each of G rows; then a
        token's (rows, h, 1, d), which go to place `at` and are answered with all places before `end`."""
        if layer == len(self.k):  # under autocast rotary positions leave k in fp32 and v in bf16: both are kept in v's
            for buffers, x in ((self.k, k.to(v.dtype)), (self.v, v)):
                buffers.append(x.new_zeros(len(x) * self.G, x.shape[1], x.shape[2] + self.room, x.shape[3]))
                buffers[-1][:, :, :x.shape[2]] = x.repeat_interleave(self.G, 0)
            return k, v
        self.k[layer].index_copy_(2, self.at, k.to(v.dtype))
        self.v[layer].index_copy_(2, self.at, v)
        return self.k[layer][:, :, :self.end], self.v[layer][:, :, :self.end]

    def keep(self, rows):
        for buffers in (self.k, self.v):
            for i, x in enumerate(buffers):  # one at a time: old and new are both there for one layer alone
                buffers[i] = x[rows]

@torch.no_grad()
def sample(model, batch, *, group_size, max_new_tokens, temperature=1.0, top_p=1.0, generator=None, when_done=None):
    """G completions for each of the batch's N questions -> tokens (N, G, T) int64, mask (N, G, T) bool.

    The mask holds every token up to and with the first stop token; T is the longest completion's length. temperature 0 is
    greedy. The prompt is run once a question and its cache repeated; rows that have finished leave the batch. when_done(n,
    tokens, mask), if given, is called for each question once its group (1, G, ..) has ended, while others are still sampled.

    On CUDA a token's step is captured as one CUDA graph, because launching its thousand small kernels one by one takes longer
    than running them; shapes in a graph are fixed, so it reads the cache to its end, and is captured again when rows leave.
    Nothing asks the device for a value but a look every LOOK_EVERY tokens at how many rows are left.
    """
    net, training = network(model), model.training
    model.eval()  # dropout off, and no gradient checkpointing, which would silently switch the cache off
    (N, P), G = batch["input_ids"].shape, group_size
    device, pad, stop = batch["input_ids"].device, batch["pad_id"], batch["stop_ids"]
    graphed, cache = device.type in GRAPHED, KVCache(G, max_new_tokens)
    positions, following = prompt_positions(net, batch)
    tokens = torch.full((N * G, max_new_tokens), pad, device=device)
    mask = torch.zeros((N * G, max_new_tokens), dtype=torch.bool, device=device)
    rows = torch.arange(N * G, device=device)   # which of the N*G completions the batch's rows still are
    alive = torch.ones(N * G, dtype=torch.bool, device=device)
    position = following.repeat_interleave(G)[:, None]                                     # (rows, 1)
    seen = torch.cat([batch["attention_mask"].bool().repeat_interleave(G, 0), torch.zeros_like(mask)], 1)  # (rows, P+max)
    cache.at = torch.tensor([P], device=device)
    cache.end, waiting = P + max_new_tokens, set(range(N)) if when_done else set()

    def tell(unfinished):
        for n in sorted(waiting - unfinished):
            when_done(n, tokens[None, n * G:n * G + G], mask[None, n * G:n * G + G])
        waiting.intersection_update(unfinished)

    def step(y):  # a token of each row (rows,) -> the next one's logits (rows, V)
        seen.index_fill_(1, cache.at, True)
        h = hidden_states(net, y[:, None], seen[:, None, None, :cache.end], position.expand(3, -1, -1), cache=cache)
        position.add_(1)
        cache.at.add_(1)
        return next_token_logits(net, h[:, -1], temperature or 1.0)

    with merged(model), autocast(model):
        h = hidden_states(net, batch["input_ids"], causal_mask(batch["attention_mask"]), positions, see(model, batch), cache)
        logits = next_token_logits(net, h[:, -1], temperature or 1.0).repeat_interleave(G, 0)              # (rows, V)
        run = None  # the captured step: none for the first token after rows have left, which a capture needs run as it is
        for t in range(max_new_tokens):
            y = torch.where(alive, draw(logits, temperature, top_p, generator), pad)       # (rows,)
            tokens[rows, t], mask[rows, t] = y, alive
            alive = alive & ~torch.isin(y, stop)
            if t + 1 == max_new_tokens:
                break
            if not graphed or t % LOOK_EVERY == 0:
                left = int(alive.sum())
                if waiting:
                    tell(set((rows[alive] // G).tolist()))
                if left == 0:
                    break
                if left <= STAY * len(rows):  # copying the cache costs something too: not at every row that finishes
                    stay = alive.nonzero()[:, 0]
                    cache.keep(stay)
                    rows, alive, y, seen, position = rows[stay], alive[stay], y[stay], seen[stay], position[stay]
                    run = None
            if not graphed:
                cache.end = P + t + 1
            logits = (run or step)(y)
            if graphed and not run:
                run = captured(step, y)
                graphed = run is not step  # else not again in this call
    tell(set())
    model.train(training)
    T = int(mask.any(0).sum())
    return tokens[:, :T].view(N, G, T), mask[:, :T].view(N, G, T)

def captured(step, y):
    """`step` as one CUDA graph -> a function like it, or `step` itself where it can't be captured, which is said."""
    try:
        graph, given, stream = torch.cuda.CUDAGraph(), y.clone(), torch.cuda.current_stream(y.device)
        with torch.cuda.device(y.device), torch.cuda.graph(graph, stream=torch.cuda.Stream(y.device),
                                                           capture_error_mode="thread_local"):  # other threads may go on
            logits = step(given)
    except (RuntimeError, ValueError) as e:  # ValueError: not a CUDA device
        warnings.warn(f"sampling without a CUDA graph, so more slowly: {str(e).splitlines()[0]}", stacklevel=2)
        if y.is_cuda:
            torch.cuda.set_stream(stream)
        return step
    def replay(y):
        given.copy_(y)
        graph.replay()
        return logits
    return replay

def draw(logits, temperature, top_p, generator):
    """Logits (rows, V) -> one token each (rows,). top_p < 1 keeps the smallest set of tokens that holds that much probability;
    the ratio of Eq. (8) is then biased, since log-probabilities stay those of the whole vocabulary."""
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = logits.softmax(-1), None
    if top_p < 1:
        probs, order = probs.sort(-1, descending=True)
        probs[probs.cumsum(-1) - probs >= top_p] = 0
    if probs.is_cuda:
        y = torch.multinomial(probs, 1, generator=generator)                               # (rows, 1)
    else:  # multinomial draws a number for each of the V words, which takes a CPU a tenth of a rollout; here one for each row
        c = probs.double().cumsum(-1)
        u = torch.rand(len(c), 1, dtype=c.dtype, generator=generator)
        y = torch.searchsorted(c, u * c[:, -1:], right=True)
    return (y if order is None else order.gather(-1, y))[:, 0]

def decode(processor, tokens, mask):
    """tokens, mask (N, G, T) -> N lists of G texts, without the stop token."""
    return [processor.tokenizer.batch_decode([y[m] for y, m in zip(ys, ms, strict=True)], skip_special_tokens=True)
            for ys, ms in zip(tokens.cpu(), mask.cpu(), strict=True)]

def finished(batch, tokens, mask):
    """(N, G) bool: the completion ended by itself, rather than at the limit."""
    return (torch.isin(tokens, batch["stop_ids"]) & mask).any(-1)

# ----------------------------------------------------------------------------------------------------------- log-probabilities

def token_logprobs(model, batch, tokens, mask, *, temperature=1.0):
    """log pi(y_t | I, Q, y_<t) of given completions -> (N, G, T) float32, 0 outside `mask`; with gradient if grad is enabled.

    The distribution is the one `sample` draws from (logits / temperature, vision ids excluded). Image and prompt run once a
    group. Logits exist for LOGIT_FLOATS numbers at a time; with gradients each chunk is computed again in backward.
    """
    net, (N, G, T), P = network(model), tokens.shape, batch["input_ids"].shape[1]
    prompt, following = prompt_positions(net, batch)
    after = (following[:, None] + torch.arange(T, device=tokens.device)).repeat(1, G)      # (N, G*T)
    with autocast(model):
        hidden = hidden_states(net, torch.cat([batch["input_ids"], tokens.reshape(N, G * T)], 1),
                               group_mask(batch["attention_mask"], T), torch.cat([prompt, after.expand(3, -1, -1)], 2),
                               see(model, batch))                                          # (N, P+G*T, d)
        # A token is predicted one place earlier: a completion's first token by the prompt's last place.
        first = hidden[:, None, P - 1:P].expand(-1, G, -1, -1)
        h = torch.cat([first, hidden[:, P:].view(N, G, T, -1)[:, :, :-1]], 2)[mask]        # (tokens that count, d)
        logp = chosen_logprobs(net, h, tokens[mask], temperature)
    return torch.zeros(N, G, T, device=tokens.device).masked_scatter(mask, logp)

def chosen_logprobs(net, h, y, temperature):
    """Hidden states (M, d) and the tokens they predict (M,) -> log-probabilities (M,), never with all (M, V) logits at once."""
    def chunk(h, y):
        logits = next_token_logits(net, h, temperature)
        return logits.gather(-1, y[:, None])[:, 0] - logits.logsumexp(-1)
    size = max(1, LOGIT_FLOATS // net.lm_head.out_features)
    again = h.requires_grad and len(y) > size
    return torch.cat([checkpoint(chunk, a, b, use_reentrant=False) if again else chunk(a, b)
                      for a, b in zip(h.split(size), y.split(size), strict=True)])

# ------------------------------------------------------------------------------------------------------------ save and devices

def save(model, processor, folder, keep_adapter=False):
    """Write a Hugging Face folder that stock AutoProcessor and AutoModelForImageTextToText load. An adapter is merged into a
    copy first; with keep_adapter that is in fp32, and the adapter is there by itself too, for eval.load_unmerged. Files are
    written beside and renamed into place, so a crash never leaves half a file."""
    net, keep_adapter = model, keep_adapter and isinstance(model, PeftModel)
    if isinstance(model, PeftModel):
        net = copy.deepcopy(model).cpu()
        net = (net.float() if keep_adapter else net).merge_and_unload()
    beside = os.path.join(folder, ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    os.makedirs(beside)
    try:
        net.save_pretrained(beside)
        if keep_adapter:
            model.save_pretrained(os.path.join(beside, ADAPTER), save_embedding_layers=False)
    except SafetensorError as e:  # an OSError in disguise
        raise DataError(f"{beside}: the weights can't be written: {e}") from e
    processor.image_processor.save_pretrained(beside)
    processor.tokenizer.save_pretrained(beside)
    stock = {"processor_class": processor.name}  # what AutoProcessor should build of them: stock names, not the PIL variant's
    for name, more in {"preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"},
                       "tokenizer_config.json": {}}.items():
        path = Path(beside, name)
        path.write_text(json.dumps(json.loads(path.read_text()) | stock | more, indent=2))
    shutil.rmtree(os.path.join(folder, ADAPTER), ignore_errors=True)  # a folder can't be renamed over
    for name in os.listdir(beside):
        os.replace(os.path.join(beside, name), os.path.join(folder, name))
    os.rmdir(beside)

def setup_devices():
    """One process, or those that torchrun started -> (rank, world size, device). nccl on CUDA, gloo on the CPU."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device

def sum_over_ranks(x):
    """Sum a tensor or a number over the processes, on all of them alike."""
    if not dist.is_initialized():
        return x
    t = torch.as_tensor(x, dtype=None if torch.is_tensor(x) else torch.float64)
    t = t.to("cuda") if dist.get_backend() == "nccl" else t
    dist.all_reduce(t)
    return t if torch.is_tensor(x) else t.item()

def sum_gradients(parameters):
    """Add up the processes' gradients once an optimiser step. Each rank's loss is already divided by global counts."""
    if dist.is_initialized():
        for p in parameters:
            if p.grad is None:  # a rank whose share did not touch this parameter must still take part
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)

def peak_memory(device):
    """MB: the most that was in use since the last call. On CUDA what tensors took, else the process's memory (Linux)."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most / 2**20
    try:
        most = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
        return int(most.split()[1]) / 2**10
    except OSError:
        return 0.0

def close_devices():
    if dist.is_initialized():
        dist.destroy_process_group()
