"""The network: load and save, records to tensors, sampling, log-probabilities, devices.

Image and prompt are computed once for a question's G completions: `sample` repeats their keys and
values for G rows, `token_logprobs` puts a whole group into one row.

Left out on purpose: videos, several images or turns per question, a system prompt (but a chat
template's own), beam search, penalties, any default of a checkpoint's generation_config (the policy
that is sampled must be the policy that is trained).
"""
import contextlib
import copy
import datetime
import json
import os
import shutil
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import DataError, cli, digest, expect, load_image, onto_disk
from rewards import question_text

transformers.logging.set_verbosity_error()
# gradient_checkpointing_enable is deprecated in later versions, but 5.17 has nothing else for it.
warnings.filterwarnings("ignore", category=FutureWarning, message=".*gradient_checkpointing.*")

FAMILIES = "qwen2_vl", "qwen2_5_vl", "qwen3_vl"  # transformers' model types
GROUPED = "one_row_per_group"  # grouped_attention is registered under this name
ATTENTION = dict(text_config=GROUPED, vision_config="sdpa")  # of every network here
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # not the vision tower
ADAPTER = "adapter"         # folder in a checkpoint of GRPO under LoRA
MAX_PIXELS = 512 * 28 * 28  # pixels: a larger image is shrunk to at most 512 image tokens
MAX_NEW_TOKENS = dict(tiny=80, paper=512)  # at which a completion is cut off, by preset
MAX_TEXT = 4096             # tokens of a question or an answer: attention's memory is their square
PIXEL_CACHE = 2**29         # bytes of image patches that are kept
LOGIT_FLOATS = 2**26        # logits that exist at a time in token_logprobs
GRAPHED = dict(cuda=16)     # devices that sample by CUDA graph: steps between looks for ended rows
LEAVE_AT = dict(cpu=0.8, cuda=0.5)  # ended rows leave once at most this share of rows goes on
PIECE_FLOATS = 2**24        # gradients that are summed over the processes at a time
LONGEST_WAIT = datetime.timedelta(minutes=30)  # of a process for another; F may be slow


class NotFinite(DataError):
    """The weights have become useless."""


@dataclass
class Processor:
    """Questions to ids, images to patches; the stock AutoProcessor needs torchvision for it."""
    tokenizer: object
    image_processor: object
    patches: dict = field(default_factory=dict)  # path -> its image_patches


# ---- the network ---------------------------------------------------------------------------------

def load(name, *, dtype=torch.float32, device="cpu", max_pixels=MAX_PIXELS):
    """A checkpoint (folder or hub name) -> (model in eval mode, Processor). DataError where it is
    none of FAMILIES, incomplete or not finite."""
    config = config_of(name)
    try:
        complete = not Path(name).is_dir() or Path(name, "tokenizer_config.json").is_file()
        expect(complete, "tokenizer_config.json is missing")  # the stop token would be a guess
        net, info = AutoModelForImageTextToText.from_pretrained(
            name, dtype=dtype, attn_implementation=ATTENTION, output_loading_info=True,
            use_safetensors=True, trust_remote_code=False)
        missing = sorted(info["missing_keys"])  # transformers would leave them random
        expect(not missing, f"{len(missing)} tensors are missing: {', '.join(missing[:3])}")
        net = net.to(device).eval()
        expect(all_finite(net.parameters()), "some of its weights are not finite")
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        images = Qwen2VLImageProcessorPil.from_pretrained(name)  # Auto.. may ask for torchvision
        edges = "shortest_edge", "longest_edge"  # pixels, whatever they are called
        images.size = {edge: min(images.size[edge], max_pixels) for edge in edges}
        processor = Processor(tokenizer, images)
        # A trial prompt: an image of one token (its patches are not looked at), and a text.
        one_token = torch.zeros(1), torch.tensor([[1, 1, images.merge_size**2]])
        prompt = tensors(processor, ["its text"], [one_token])["input_ids"][0]
        shown = (prompt == config.image_token_id).sum() == 1 and "text" in tokenizer.decode(prompt)
        expect(shown, "its tokenizer and chat template do not show an image and a text")
    except Exception as e:  # transformers raises anything on a folder that isn't a checkpoint
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].split(". ")[0]
        raise DataError(f"{name}: the checkpoint can't be used: {reason}") from e
    return net, processor


def config_of(name):
    """A checkpoint's configuration; DataError where there is none of FAMILIES."""
    local = len(Path(name).parts) > 2  # the hub's names are owner/name
    expect(Path(name).is_dir() or not local, f"{name}: there is no such folder")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if config.model_type in FAMILIES:
            return config
        found = f"another architecture ({config.model_type})"
    except Exception as e:  # as in load
        found = f"no such checkpoint, a broken one, or one with its own code ({type(e).__name__})"
    raise DataError(f"{name}: {found}; expected a folder with a config.json, or a name on the hub, "
                    f"of {', '.join(FAMILIES)}; for others eval.py --ckpt openai:BASE_URL#MODEL "
                    "asks a chat server")


def is_tiny(name):
    """Whether a folder holds a network as small as sft.build_tiny's. The hub isn't asked."""
    here = Path(name, "config.json").exists()
    return here and config_of(name).get_text_config().hidden_size <= 256


def all_finite(tensors):
    return all(x.isfinite().all() for x in tensors)


def weights_digest(model):
    """A digest of a network's weights, from sums of their bits: exact on every device."""
    sums = []
    for name, p in model.named_parameters():
        bits = p.detach().view(torch.int16 if p.element_size() == 2 else torch.int32)
        sums.append(f"{name} {int(bits.sum(dtype=torch.int64))}")
    return digest("\n".join(sums).encode())


def load_unmerged(name, *, dtype, device="cpu", max_pixels=MAX_PIXELS):
    """As `load`, but a checkpoint of GRPO under LoRA comes as it was trained: pi_SFT in `dtype`
    under an fp32 adapter, see add_lora. pi_SFT is the folder's weights minus the adapter's part: in
    bf16 the very bits under which the adapter was trained, if that was in bf16."""
    adapter = Path(name, ADAPTER)
    if dtype == torch.float32 or not adapter.is_dir():
        return load(name, dtype=dtype, device=device, max_pixels=max_pixels)
    net, processor = load(name, max_pixels=max_pixels)
    policy = PeftModel.from_pretrained(net, adapter, torch_device="cpu").eval()  # else cuda:0
    for m in policy.modules():
        if isinstance(m, LoraLayer):
            m.base_layer.weight.data -= m.get_delta_weight("default")
    for key, p in policy.named_parameters():
        if "lora_" not in key:
            p.data = p.data.to(dtype)
    return leave_inputs(policy.to(device)), processor


def save(model, processor, folder, keep_adapter=False):
    """Write a folder that stock AutoProcessor and AutoModelForImageTextToText load; a crash never
    leaves half a file. An adapter is merged into a copy in the weights' dtype (what stage 1 saves
    so is pi_SFT) or, with keep_adapter, in fp32; then the adapter is saved too, for
    load_unmerged."""
    beside = Path(folder, ".writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    net = model
    if isinstance(model, PeftModel):
        device = network(model).device
        net = copy.deepcopy(model.cpu())  # a GPU may have no room for a second one
        model.to(device)
        if keep_adapter:
            net = net.float()
        net = net.merge_and_unload()
    try:
        net.save_pretrained(beside)
        if keep_adapter and net is not model:
            model.save_pretrained(beside / ADAPTER, save_embedding_layers=False)
    except SafetensorError as e:  # an OSError in disguise
        raise DataError(f"{beside}: the weights can't be written: {e}") from e
    processor.image_processor.save_pretrained(beside)
    processor.tokenizer.save_pretrained(beside)

    stock = type(net).__name__.replace("ForConditionalGeneration", "Processor")
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        config = json.loads((beside / name).read_text(encoding="utf-8"))
        config["processor_class"] = stock  # what AutoProcessor builds
        if "image_processor_type" in config:
            config["image_processor_type"] = "Qwen2VLImageProcessor"  # not the PIL variant
        (beside / name).write_text(json.dumps(config, indent=2), encoding="utf-8")

    shutil.rmtree(Path(folder, ADAPTER), ignore_errors=True)  # a folder can't be renamed over
    for path in beside.rglob("*"):
        if path.suffix == ".safetensors":  # written to be read by their owner alone
            shutil.copymode(beside / "config.json", path)
        if path.is_file():
            onto_disk(path)
    for path in beside.iterdir():
        path.replace(Path(folder, path.name))
    beside.rmdir()


def network(model):
    """The transformers model under an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def autocast(model):
    """bf16 arithmetic on CUDA, whatever the weights are kept in; plain fp32 on the CPU."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def matrices_of(net):
    """The linear layers, whose weights autocast rounds to bf16 at each use: they may as well be
    kept in bf16. Left out is a head that is also the embedding: a look-up does not round."""
    embedding = net.get_input_embeddings().weight
    return [m for m in net.modules()
            if isinstance(m, torch.nn.Linear) and m.weight is not embedding]


def enable_checkpointing(policy):
    """Compute each layer again in the backward pass: a third slower, several times less memory."""
    policy.gradient_checkpointing_enable(dict(use_reentrant=False))
    policy.train()  # transformers checkpoints in train mode alone; there is no dropout


# ---- LoRA ----------------------------------------------------------------------------------------

def add_lora(net, rank, seed=0):
    """LoRA of `rank` on the language model's matrices, in fp32 whatever the base is in: an update
    of lr 1e-6 is smaller than bf16's spacing."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=LORA_TARGETS)
    return leave_inputs(get_peft_model(net, config).eval())


def leave_inputs(policy):
    """Keep peft from casting the adapters' inputs to fp32 on CUDA, where autocast rounds them to
    bf16 right after: the same bits without the detour. -> the policy."""
    for m in policy.modules():
        if isinstance(m, LoraLayer):
            m.cast_input_dtype_enabled = network(policy).device.type != "cuda"
    return policy


@contextlib.contextmanager
def lora_merged(model):
    """Inside, LoRA is part of an fp32 network's weights: one matrix product per token, not three.
    Not of a bf16 network's, which would round it away."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)
              and not m.disable_adapters and m.base_layer.weight.dtype == torch.float32]
    weights = [m.base_layer.weight.data for m in layers]
    try:
        for m in layers:
            m.merge(safe_merge=True)  # into a copy of the weight
        yield
    finally:
        for m, weight in zip(layers, weights, strict=True):
            m.base_layer.weight.data = weight  # put back, not subtracted from: the same bits
            m.merged_adapters.clear()


# ---- records -> tensors --------------------------------------------------------------------------

def image_patches(processor, record):
    """One record's image -> patches (p, 3*2*s*s) float32 of s = 14 px (Qwen3-VL: 16), grid (1, 3) =
    time, rows, columns. The first ones are kept, as many as fit into PIXEL_CACHE."""
    known, path = processor.patches, record["path"]
    if path in known:
        return known[path]
    out = processor.image_processor(images=[load_image(record)], return_tensors="pt")
    patches = out["pixel_values"], out["image_grid_thw"]
    kept = sum(x.nbytes for x, _ in known.values())
    if kept + patches[0].nbytes <= PIXEL_CACHE:
        known[path] = patches
    return patches


def stop_ids(tokenizer):
    """The ids that end a completion: the end of a turn, and the padding that follows it."""
    return torch.tensor(sorted({tokenizer.eos_token_id, tokenizer.pad_token_id}))


def tensors(processor, texts, images, device="cpu", openings=None):
    """N user messages, the image_patches of each (or None), what the answers open with -> the batch
    that `sample` and `token_logprobs` take: input_ids, attention_mask (N, P), left-padded;
    pixel_values, a list of each image's patches; image_grid_thw (images, 3); stop_ids; pad_id."""
    tokenizer, prompts = processor.tokenizer, []
    for text, image, opening in zip(texts, images, openings or [""] * len(texts), strict=True):
        content, image_tokens = [dict(type="text", text=text)], 0
        if image is not None:
            content.insert(0, dict(type="image"))
            image_tokens = int(image[1].prod()) // processor.image_processor.merge_size**2
        prompt = tokenizer.apply_chat_template([dict(role="user", content=content)],
                                               tokenize=False, add_generation_prompt=True)
        prompt = prompt.replace("<|image_pad|>", "<|image_pad|>" * image_tokens, 1)
        prompts.append(prompt + opening)
    batch = dict(tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt",
                           add_special_tokens=False).to(device))
    batch["pad_id"] = tokenizer.pad_token_id
    batch["stop_ids"] = stop_ids(tokenizer).to(device)
    shown = [image for image in images if image is not None]
    if shown:
        batch["pixel_values"] = [patches.to(device) for patches, _ in shown]
        batch["image_grid_thw"] = torch.cat([grid for _, grid in shown]).to(device)
    return batch


def check_texts(processor, records, text_of):
    """DataError for a record whose text holds a special token, which would be read as an image or
    a turn, or is longer than MAX_TEXT tokens."""
    special = [str(t) for t in processor.tokenizer.added_tokens_decoder.values() if t.special]
    for r in records:
        text = text_of(r)
        found = [t for t in special if t in text]
        expect(not found, f"record {r['id']!r}: its text holds the special token {found}, "
               "which only the program may set")
        if len(text.encode()) > MAX_TEXT:  # a token has at least one byte
            n = len(processor.tokenizer(text)["input_ids"])
            expect(n <= MAX_TEXT,
                   f"record {r['id']!r}: its text has {n} tokens, expected at most {MAX_TEXT}")


def encode(processor, records, device="cpu"):
    """Records (that check_texts has seen) -> the batch of their questions, see `tensors`."""
    texts = [question_text(r) for r in records]
    return tensors(processor, texts, [image_patches(processor, r) for r in records], device)


def encode_completions(processor, texts, device="cpu"):
    """N target texts -> tokens, mask (N, 1, T), right-padded, each with its end-of-turn token."""
    tokenizer = processor.tokenizer
    ids = tokenizer([text + tokenizer.eos_token for text in texts], padding=True,
                    padding_side="right", return_tensors="pt", add_special_tokens=False).to(device)
    return ids["input_ids"][:, None], ids["attention_mask"][:, None].bool()


def rows_of(batch, rows):
    """Questions `rows` (a slice or a list) of a batch in which each has an image, or none has."""
    rows = torch.arange(len(batch["input_ids"]))[rows].tolist()
    out = dict(batch)
    for name in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "features"):
        if name in batch:
            of_each = batch[name]
            out[name] = of_each[rows] if torch.is_tensor(of_each) else [of_each[i] for i in rows]
    return out


# ---- one pass of the network ---------------------------------------------------------------------

def with_image_features(model, batch):
    """The batch with "features" in place of pixels: for each image (levels, tokens, d). Level 0 is
    the embeddings of its image tokens; the others, in Qwen3-VL alone, are its deepstack. Where the
    vision tower is frozen one call serves sampling, reference and update."""
    if "pixel_values" not in batch:
        return batch
    batch, net = dict(batch), network(model).model
    # Under checkpointing a frozen tower's features would have a gradient too.
    learns = any(p.requires_grad for p in net.visual.parameters())
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()), autocast(model):
        patches = torch.cat(batch.pop("pixel_values"))
        out = net.get_image_features(patches, batch["image_grid_thw"])
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    # A level is a tensor for each image; transformers 5.17 has Qwen3-VL's deepstack in one piece.
    levels = torch.stack([x if torch.is_tensor(x) else torch.cat(x) for x in levels])
    batch["features"] = levels.split([len(x) for x in out.pooler_output], 1)
    return batch


def prompt_positions(net, batch):
    """mRoPE positions of the prompt (3, N, P), and of a completion's first token (N,). "skip" (N,),
    which only sft.letter_batch puts into a batch, leaves positions free between the two."""
    ids = batch["input_ids"]
    positions, _ = net.model.get_rope_index(
        ids, mm_token_type_ids=(ids == net.config.image_token_id).int(),
        attention_mask=batch["attention_mask"], image_grid_thw=batch.get("image_grid_thw"))
    return positions, positions.amax(dim=(0, 2)) + 1 + batch.get("skip", 0)


def causal_mask(real):
    """real (N, S), 0 at padding -> (N, 1, S, S) bool, True where a place (row) sees another
    (column): itself and what is real before it. Padding too sees itself: the softmax of a row of
    nothing but False is nan."""
    S = real.shape[1]
    earlier = real.bool()[:, None].expand(-1, S, -1).tril()  # (N, S, S)
    return (earlier | torch.eye(S, dtype=torch.bool, device=real.device))[:, None]


def hidden_states(net, ids, mask, positions, batch=None, cache=None, prompt_length=None):
    """Token ids (n, S), positions (3, n, S) -> last hidden states (n, S, d). `batch` holds the
    features of the ids' images, if any; mask and prompt_length are grouped_attention's."""
    language = net.model.language_model
    x, deep = language.embed_tokens(ids), {}
    if batch and "features" in batch:
        embeddings, *deepstack = torch.cat(batch["features"], 1)  # of all images; (tokens, d) each
        places = ids == net.config.image_token_id  # (n, S)
        x = x.masked_scatter(places[..., None], embeddings.to(x.dtype))
        if deepstack:
            deep = dict(visual_pos_masks=places, deepstack_visual_embeds=deepstack)
    return language(
        inputs_embeds=x, attention_mask=mask, prompt_length=prompt_length, position_ids=positions,
        past_key_values=cache, use_cache=cache is not None, **deep).last_hidden_state


def grouped_attention(module, q, k, v, attention_mask, scaling=None, prompt_length=None, **kwargs):
    """Attention for transformers' layers: q (N, H, S, d), k, v (N, h, keys, d) -> (N, S, H, d), and
    None for the weights. attention_mask (N, 1, S, keys) says what each place sees.

    With prompt_length P a row is a group's, [prompt | completion 1 | ... | completion G], and
    attention_mask (N, 1, P+T, P+T) that of the prompt and any one completion. Completions don't see
    each other, so the row is cut: the prompt sees itself, each completion the prompt and itself.
    That takes G*T*(P+T) scores and not (P+G*T)^2."""
    if attention_mask is None:  # a stock forward pass of the same network
        return sdpa_attention_forward(module, q, k, v, None, scaling=scaling, **kwargs)
    if prompt_length is None:
        return attend(q, k, v, attention_mask, scaling).transpose(1, 2).contiguous(), None
    N, P, T = len(q), prompt_length, attention_mask.shape[-1] - prompt_length
    G = (q.shape[2] - P) // T

    def cut(x):  # (N, ., P+G*T, d) -> the prompt's (N, ., P, d), the completions' (N*G, ., T, d)
        return x[:, :, :P], x[:, :, P:].unflatten(2, (G, T)).transpose(1, 2).flatten(0, 1)

    def join(prompt, completions):  # -> (N*G, ., P+T, d)
        return torch.cat([prompt.repeat_interleave(G, 0), completions], 2)

    (q_p, q_c), (k_p, k_c), (v_p, v_c) = cut(q), cut(k), cut(v)  # p: prompt's, c: completions'
    mask_c = attention_mask[:, :, P:].repeat_interleave(G, 0)  # (N*G, 1, T, P+T)
    out_p = attend(q_p, k_p, v_p, attention_mask[:, :, :P, :P], scaling)  # (N, H, P, d)
    out_c = attend(q_c, join(k_p, k_c), join(v_p, v_c), mask_c, scaling)  # (N*G, H, T, d)
    out_c = out_c.unflatten(0, (N, G)).transpose(1, 2).flatten(2, 3)  # (N, H, G*T, d)
    return torch.cat([out_p, out_c], 2).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register(GROUPED, grouped_attention)
transformers.AttentionMaskInterface.register(GROUPED, sdpa_mask)  # in a stock forward pass


def attend(q, k, v, mask, scaling):
    """softmax(q k^T * scaling) v: q (N, H, T, d), k, v (N, h, keys, d), mask (N, 1, T, keys) bool
    -> (N, H, T, d). Grouped-query attention (this group is not GRPO's): the H/h query heads that
    share a key head become more queries of it, so that keys and values are not copied."""
    N, H, T, d = q.shape
    shared = H // k.shape[1]
    q = q.reshape(N, H // shared, shared * T, d)
    mask = mask.expand(-1, shared, -1, -1).reshape(N, 1, shared * T, -1)
    if T == 1 and q.device.type == "cpu":  # there torch's kernel takes twice as long
        scores = scaling * q @ k.transpose(-1, -2)
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    else:
        out = scaled_dot_product_attention(q, k, v, mask, scale=scaling)
    return out.reshape(N, H, T, d)  # the kernels of CUDA differ in the layout they answer in


def never_drawn(net):
    """Ids that a completion may not hold: an image token without an image breaks the next pass.
    The tensor is made once: copying it to the device for every token would stall a GPU."""
    if not hasattr(net, "never_drawn"):
        c = net.config
        ids = (c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id)
        net.register_buffer("never_drawn", torch.tensor(ids, device=net.device), persistent=False)
    return net.never_drawn


def next_token_logits(net, hidden, temperature):
    """Hidden states (..., d) -> logits of the distribution that is sampled (..., V), float32."""
    logits = net.lm_head(hidden).float().index_fill_(-1, never_drawn(net), -torch.inf)
    if temperature in (0, 1):  # 0: draw takes the largest
        return logits
    return logits / temperature


# ---- sampling ------------------------------------------------------------------------------------

class KVCache:
    """Keys and values of the sampled rows, G per prompt, in buffers of their final length:
    transformers' DynamicCache copies all of them at every token, which was 43 % of a rollout's time
    on the CPU.

    prompt_mask (N, P); `start` (N,), the mRoPE position of a completion's first token; `room`
    places for a completion. With `fixed` attention reads all places at every token, else those that
    have been written."""

    def __init__(self, prompt_mask, start, G, room, fixed):
        P = prompt_mask.shape[1]
        self.G, self.room, self.fixed = G, room, fixed
        self.layers = []  # keys and values of each, (2, rows, h, P+room, d)
        self.end = P + room if fixed else P  # of what attention reads
        # The last token: its place in the buffers, what it sees of them, its mRoPE position.
        self.at = torch.tensor([P - 1], device=prompt_mask.device)
        self.seen = pad(prompt_mask.bool().repeat_interleave(G, 0), (0, room))  # (rows, P+room)
        self.position = start.repeat_interleave(G)[:, None] - 1  # (rows, 1)

    def advance(self):
        """Turn to the next token -> the mask of what it sees, (rows, 1, 1, end), and its positions
        (3, rows, 1). In place: a graph goes on with these very tensors."""
        self.at.add_(1)
        self.seen.index_fill_(1, self.at, True)
        self.position.add_(1)
        if not self.fixed:
            self.end += 1
        return self.seen[:, None, None, :self.end], self.position.expand(3, -1, -1)

    def update(self, k, v, layer, *_, **__):
        """Called by transformers in every layer: new keys and values -> those to attend to. First
        come the prompt's (N, h, P, d), which are stored for G rows; then at every call one token's
        (rows, h, 1, d), which gets all up to `end`."""
        k = k.to(v.dtype)  # under autocast rotary positions leave k in fp32 and v in bf16
        if layer == len(self.layers):  # this layer's first call: the prompt's
            both = torch.stack([k, v]).repeat_interleave(self.G, 1)  # (2, rows, h, P, d)
            self.layers.append(pad(both, (0, 0, 0, self.room)))
            return k, v
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.at, k)
        values.index_copy_(2, self.at, v)
        return keys[:, :, :self.end], values[:, :, :self.end]

    def keep(self, rows):
        self.seen, self.position = self.seen[rows], self.position[rows]
        for i, buffer in enumerate(self.layers):  # one by one: only one layer is in memory twice
            self.layers[i] = buffer[:, rows]


@torch.no_grad()
def sample(model, batch, *, group_size, max_new_tokens, temperature=1.0, top_p=1.0, generator=None):
    """G completions for each of the batch's N questions -> tokens (N, G, T) int64, mask bool.

    The mask holds every token up to and with the first stop token; T is the longest completion's
    length. temperature 0 is greedy."""
    net, training = network(model), model.training
    model.eval()  # gradient checkpointing would silently switch the cache off
    N, G, device = len(batch["input_ids"]), group_size, batch["input_ids"].device
    tokens = torch.full((N * G, max_new_tokens), batch["pad_id"], device=device)
    rows = torch.arange(N * G, device=device)  # the completions still computed; ended ones leave
    graphed = device.type in GRAPHED
    look_every = GRAPHED.get(device.type, 1)  # steps; each look makes the CPU wait for the GPU
    positions, start = prompt_positions(net, batch)  # (3, N, P), (N,)
    cache = KVCache(batch["attention_mask"], start, G, max_new_tokens, fixed=graphed)

    def step(y):
        """The rows' last tokens (rows,) -> logits of their next ones (rows, V)."""
        seen, position = cache.advance()
        h = hidden_states(net, y[:, None], seen, position, cache=cache)  # (rows, 1, d)
        return next_token_logits(net, h[:, -1], temperature)

    next_logits = Graphed(step) if graphed else step
    with lora_merged(model), autocast(model):
        h = hidden_states(net, batch["input_ids"], causal_mask(batch["attention_mask"]), positions,
                          with_image_features(model, batch), cache)
        logits = next_token_logits(net, h[:, -1], temperature).repeat_interleave(G, 0)
        if not (logits < torch.inf).all():  # nan neither: the draw would fail, on CUDA for good
            raise NotFinite("the policy can't be sampled: its logits are not finite")
        y = draw(logits, temperature, top_p, generator)
        tokens[:, 0] = y
        for t in range(1, max_new_tokens):
            if (t - 1) % look_every == 0:
                ended = torch.isin(tokens[rows, :t], batch["stop_ids"]).any(1)
                going_on = (~ended).nonzero()[:, 0]
                if len(going_on) == 0:
                    break
                if len(going_on) <= LEAVE_AT[device.type] * len(rows):  # not always: it's a copy
                    cache.keep(going_on)
                    rows, y = rows[going_on], y[going_on]
            y = draw(next_logits(y), temperature, top_p, generator)
            tokens[rows, t] = y
    model.train(training)
    stops = torch.isin(tokens, batch["stop_ids"]).long()
    mask = stops.cumsum(1) == stops  # 0 == 0 before the first stop token, 1 == 1 there
    T = int(mask.any(0).sum())
    tokens = tokens.masked_fill(~mask, batch["pad_id"])
    return tokens[:, :T].view(N, G, T), mask[:, :T].view(N, G, T)


class Graphed:
    """A step as one CUDA graph: to launch its thousand small kernels takes longer than to run them.
    Shapes in it are fixed: it is captured again when rows have left. Where it can't be, the step
    itself, with a warning."""

    def __init__(self, step):
        self.step, self.rows = step, 0

    def __call__(self, y):
        if len(y) != self.rows:
            self.graph = self.logits = None  # frees the last graph
            self.rows, self.given = len(y), y.clone()
            logits = self.step(y)  # before the capture: kernels are set up when they first run
            self.capture()
            return logits
        if self.graph is None:
            return self.step(y)
        self.given.copy_(y)
        self.graph.replay()
        return self.logits

    def capture(self):
        if self.given.is_cuda:
            stream = torch.cuda.current_stream(self.given.device)
        try:
            graph = torch.cuda.CUDAGraph()
            # On torch's own stream for captures: cuBLAS keeps a workspace for each stream that it
            # has seen. Other threads may use CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.logits = self.step(self.given)  # recorded, not run
            self.graph = graph
        except (RuntimeError, ValueError) as e:  # ValueError: not a CUDA device
            reason = str(e).splitlines()[0]
            warnings.warn(f"sampling without a CUDA graph, so more slowly: {reason}", stacklevel=2)
            if self.given.is_cuda:
                torch.cuda.set_stream(stream)


def draw(logits, temperature, top_p, generator):
    """Logits (rows, V) -> one token each (rows,). top_p < 1 keeps the smallest set of tokens that
    holds that much probability; log-probabilities stay those of the whole vocabulary, which biases
    the ratio of Eq. (8)."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = logits.softmax(-1)
    if top_p < 1:
        likeliest, order = probs.sort(-1, descending=True)
        beyond = likeliest.cumsum(-1) - likeliest >= top_p  # those before it are enough
        probs = probs.scatter(-1, order, likeliest.masked_fill(beyond, 0))
    if probs.is_cuda:
        # torch.multinomial's own way: the largest p / Exp(1) is a draw from p. Its checks, which
        # in some versions wait for the device, are left out.
        return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)
    # On the CPU those V random numbers per row take a tenth of a rollout. One per row will do:
    # the token in whose piece of the cumulative distribution u falls.
    cumulative = probs.double().cumsum(-1)
    u = torch.rand(len(probs), 1, dtype=torch.float64, generator=generator)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]


def decode(processor, tokens, mask):
    """tokens, mask (N, G, T) -> N lists of G texts, without the stop token. Other special tokens
    stay: if they were left out, no reward would see them, and they would cost nothing."""
    tokens, texts = tokens.cpu(), []
    said = mask.cpu() & ~torch.isin(tokens, stop_ids(processor.tokenizer))  # (N, G, T)
    for group, kept in zip(tokens, said, strict=True):
        ids = [row[x].tolist() for row, x in zip(group, kept, strict=True)]
        texts.append(processor.tokenizer.batch_decode(ids))
    return texts


def finished(batch, tokens, mask):
    """(N, G) bool: the completion ended by itself, rather than at the limit."""
    return (torch.isin(tokens, batch["stop_ids"]) & mask).any(-1)


# ---- log-probabilities ---------------------------------------------------------------------------

def token_logprobs(model, batch, tokens, mask, *, temperature=1.0):
    """log pi(y_t | I, Q, y_<t) of given completions (N, G, T) -> (N, G, T) float32, 0 outside
    `mask`. The distribution is the one `sample` draws from. One row per group, see
    grouped_attention."""
    net = network(model)
    (N, G, T), P = tokens.shape, batch["input_ids"].shape[1]
    positions, start = prompt_positions(net, batch)  # (3, N, P), (N,)
    later = (start[:, None] + torch.arange(T, device=tokens.device)).repeat(1, G)  # (N, G*T)
    positions = torch.cat([positions, later.expand(3, -1, -1)], 2)  # (3, N, P+G*T)
    ids = torch.cat([batch["input_ids"], tokens.reshape(N, G * T)], 1)  # (N, P+G*T)
    # One mask serves all G: padding after a completion counts as real, but no token looks ahead.
    seen = causal_mask(pad(batch["attention_mask"], (0, T), value=1))  # (N, 1, P+T, P+T)
    with autocast(model):
        hidden = hidden_states(net, ids, seen, positions, with_image_features(model, batch),
                               prompt_length=P)  # (N, P+G*T, d)
        # A token is predicted one place earlier, a completion's first by the prompt's last place.
        first = hidden[:, None, P - 1:P].expand(-1, G, -1, -1)  # (N, G, 1, d)
        others = hidden[:, P:].view(N, G, T, -1)[:, :, :-1]  # (N, G, T-1, d)
        h = torch.cat([first, others], 2)[mask]  # (M, d): of the M tokens inside the mask
        logp = chosen_logprobs(net, h, tokens[mask], temperature)
    return torch.zeros(N, G, T, device=tokens.device).masked_scatter(mask, logp)


def chosen_logprobs(net, h, y, temperature):
    """Hidden states (M, d) and the tokens they predict (M,) -> log-probabilities (M,), with
    LOGIT_FLOATS logits at a time; in the backward pass each chunk is computed again."""
    def logprobs(h, y):
        logits = next_token_logits(net, h, temperature)
        return logits.gather(-1, y[:, None])[:, 0] - logits.logsumexp(-1)

    size = max(1, LOGIT_FLOATS // net.lm_head.out_features)
    if len(y) <= size:
        return logprobs(h, y)
    chunks = zip(h.split(size), y.split(size), strict=True)
    return torch.cat([checkpoint(logprobs, *chunk, use_reentrant=False) for chunk in chunks])


# ---- devices -------------------------------------------------------------------------------------

def setup_devices():
    """-> (rank, world size, device) of one process, or of those that torchrun started."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"  # numbers are summed on the CPU, gradients on CUDA
        expect(device.index < torch.cuda.device_count(), "--nproc_per_node: expected at most this "
               f"machine's number of GPUs, {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        # cuDNN's attention with a mask has nan gradients at some lengths (pytorch issue 196678),
        # and prepares anew for every length.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if world > 1 and not dist.is_initialized():
        try:
            dist.init_process_group(backend, timeout=LONGEST_WAIT)
        except RuntimeError as e:
            why = str(e).splitlines()[0]
            raise DataError("the processes can't reach each other (GLOO_SOCKET_IFNAME and "
                            f"NCCL_SOCKET_IFNAME name the network to use): {why}") from e
    return rank, world, device


def close_devices():
    if dist.is_initialized():
        dist.destroy_process_group()


def run(main):
    """Run main under data.cli. An error names the process, and a full device is one sentence. A
    process of torchrun ends here, without the interpreter's shutdown."""
    def named():
        try:
            main()
        except (DataError, torch.OutOfMemoryError) as e:
            where = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""
            raise DataError(f"{where}{e}") from e

    code = 0
    try:
        cli(named)
    except SystemExit as e:
        code = e.code or 0
    if "RANK" in os.environ:  # in the shutdown a thread of gloo's may abort a finished process
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None: it was closed
            stream.flush()
        os._exit(code)
    if code:
        sys.exit(code)


@contextlib.contextmanager
def peers():
    """Around what the processes do together: a DataError where another one has ended."""
    try:
        yield
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError) or not dist.is_initialized():
            raise
        lines = 4 if "NCCL" in str(e) else 1  # NCCL's reason stands behind its name and version
        why = " ".join(str(e).splitlines()[:lines])
        raise DataError("another process has ended, and its own sentence says why, or it can't be "
                        f"reached: {why}") from e


def gather(rows):
    """The lists of all processes as one, on all of them alike."""
    if not dist.is_initialized():
        return rows
    lists = [None] * dist.get_world_size()
    with peers():
        dist.all_gather_object(lists, rows)
    return sum(lists, [])


def sum_over_ranks(x):
    """Sum a tensor of the CPU or a number over the processes, on all of them alike."""
    return sum(gather([x]))


def wait_for_all():
    """Wait for the slowest process -> s, the mean of how long each waited here."""
    began = time.perf_counter()
    gather([None])
    waits = gather([time.perf_counter() - began])
    return sum(waits) / len(waits)


def sum_gradients(parameters):
    """Add up the processes' gradients, whose losses are already divided by global counts. In few
    large pieces: one by one took seven times as long on gloo. After all backward passes: to start
    during the last one gained nothing measurable."""
    if not dist.is_initialized():
        return
    piece, floats = [], 0
    for p in parameters:
        if p.grad is None:  # a rank whose share did not touch this parameter must take part too
            p.grad = torch.zeros_like(p)
        piece.append(p.grad)
        floats += p.numel()
        if floats >= PIECE_FLOATS or p is parameters[-1]:
            flat = parameters_to_vector(piece)
            with peers():
                dist.all_reduce(flat)
            vector_to_parameters(flat, piece)
            piece, floats = [], 0


def peak_memory(device):
    """MB: the most in use since the last call. On CUDA by tensors, else by the process (Linux)."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    except OSError:
        return 0.0
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10
