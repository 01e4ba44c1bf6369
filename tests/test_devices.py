"""Memory, several processes on several machines, and what of CUDA's arithmetic can be shown on a CPU."""
import copy
import json
import os
import socket
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import bench
import memory
import pretend_cuda
import pytest
import torch
from conftest import lines_of
from torch.utils._python_dispatch import TorchDispatchMode

import data
import grpo
import model as M
import rewards
import sft

ROOT = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------------------------------------------------- memory

def needs(net, **knobs):
    usual = dict(cuda=True, world=1, lora=0, checkpointing=False, sampled=4, micro=2, G=8, image=16, prompt=80, T=32)
    return memory.memory(memory.without_weights(net.config), **usual | knobs)


def test_weights_and_moments_are_counted_to_the_byte(world):
    """Counted without weights: as many bytes as the loaded network, its adapter and AdamW's moments really have."""
    for lora in (0, 4):
        policy, optimizer = sft.trainable(copy.deepcopy(world.net), sft.argparse.Namespace(
            lora=lora, seed=0, checkpointing=False, lr=1e-3, weight_decay=0.0, fixed={}))
        parameters = optimizer.param_groups[0]["params"]
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moments = sum(x.nbytes for state in optimizer.state.values() for k, x in state.items() if k != "step")
        said = needs(world.net, cuda=False, lora=lora)
        assert said["weights"] == sum(p.nbytes for p in policy.parameters())
        assert said["gradients"] == sum(p.nbytes for p in parameters) and said["moments"] == moments
        assert (said["reference"] == 0) == bool(lora)


def test_what_is_said_to_lessen_memory_does(world):
    """Each knob that is named lowers the peak of a network whose activations dominate, and the parts add up to no less."""
    most = needs(world.net, micro=64, prompt=400, image=320)
    for less in (dict(micro=1), dict(checkpointing=True), dict(world=8), dict(prompt=240, image=160), dict(lora=8)):
        assert needs(world.net, **dict(micro=64, prompt=400, image=320) | less)["peak"] < most["peak"], less
    parts = sum(v for k, v in most.items() if k != "peak")
    assert max(v for k, v in most.items() if k != "peak") < most["peak"] <= parts
    moments = needs(world.net, world=64)["moments"]
    assert moments == 8 * max(p.numel() for p in world.net.parameters()), "the embedding is one process's"


def test_memory_is_what_a_process_measures():
    """Peak of an update and of a rollout by the kernel's count, in a process of its own: within 15 % of the formula."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "memory.py", "--one", *"grpo 0 0 8 8 64 112 1000".split()],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part, (measured, said) in json.loads(done.stdout.splitlines()[-1]).items():
        assert measured > 1.5e7 and abs(said / measured - 1) < 0.15, (part, measured, said)


@pytest.mark.parametrize("stage", [sft, grpo])
def test_a_command_line_s_memory(stage, world):
    """Of a stage's flags with --model: the parts and the peak in GB, and the peak with each knob that changes it."""
    knobs = ["--preset", "paper", "--micro_batch" if stage is sft else "--micro_tokens", "90000"]
    said = memory.memory_of(stage, ["--model", world.folder, *knobs])
    assert said["memory_gb"]["peak"] > 0 and len(said["peak_gb_with"]) == 5
    with pytest.raises(data.DataError, match="no such checkpoint"):
        memory.memory_of(stage, ["--model", "/nowhere", *knobs])
    with pytest.raises(data.DataError, match="--model" if stage is sft else "nowhere/sft: there is no such folder"):  # grpo's default
        memory.memory_of(stage, ["--root", "/nowhere", *knobs])


# --------------------------------------------------------------------------------------------------------- CUDA's arithmetic

def test_a_reference_in_bf16_is_the_reference(world, monkeypatch):
    """Under bf16 autocast (the CPU's here) a frozen copy whose matrices are in bf16 has the same log-probabilities, bit for bit:
    the KL penalty and the ratio of --ratio sft still start from the policy itself. The embedding stays in fp32."""
    monkeypatch.setattr(M, "autocast", lambda model: torch.autocast("cpu", torch.bfloat16))
    half = copy.deepcopy(world.net)
    for matrix in M.matrices_of(half):
        matrix.to(torch.bfloat16)
    dtypes = {p.dtype for p in half.parameters()}
    assert dtypes == {torch.float32, torch.bfloat16} and half.get_input_embeddings().weight.dtype == torch.float32
    batch = M.encode(world.processor, world.mixed[:2])
    tokens = torch.randint(0, 256, (2, 3, 7))
    with torch.no_grad():
        logps = [M.token_logprobs(net, batch, tokens, torch.ones_like(tokens, dtype=torch.bool)) for net in (world.net, half)]
    assert torch.equal(*logps)


class Watch(TorchDispatchMode):
    """Notes the names of the operations in `seen`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("half", [False, True])
def test_a_token_s_step_asks_the_device_nothing(half, world, monkeypatch):
    """What a CUDA graph records must not wait for a value: a sampling step, at fixed shapes, reads none back and makes no tensor
    from numbers of the host. So too in CUDA's types: bf16 autocast (the CPU's here), LoRA in fp32 over a base in bf16; what is
    drawn greedily is then the likeliest by the update's log-probabilities, to bf16's precision."""
    watch = Watch()
    batch = M.encode(world.processor, world.mixed[:2])

    def watched(self, y):
        if self.rows == len(y):  # not the first step of a shape, which is not recorded
            with watch:
                return self.step(y)
        self.rows = len(y)
        return self.step(y)
    monkeypatch.setattr(M, "GRAPHED", {"cpu": 16})
    monkeypatch.setattr(M.Graphed, "__call__", watched)
    lora = M.add_lora(copy.deepcopy(world.net), 2)
    if half:
        monkeypatch.setattr(M, "autocast", lambda model: torch.autocast("cpu", torch.bfloat16))
        lora = M.add_lora(copy.deepcopy(world.net).to(torch.bfloat16), 2)
    for policy in (world.net, lora):
        tokens, mask = M.sample(policy, batch, group_size=1, max_new_tokens=6, temperature=0)
        with torch.no_grad():
            taken = M.token_logprobs(policy, batch, tokens, mask)[..., 0]
            never = M.never_drawn(world.net).tolist()
            every = torch.tensor([i for i in range(len(world.processor.tokenizer)) if i not in never]).expand(2, -1)[..., None]
            others = M.token_logprobs(policy, batch, every, torch.ones_like(every, dtype=torch.bool))[..., 0]
        assert (taken[:, 0] > others.max(1).values - (0.05 if half else 1e-4)).all()
    assert len(watch.seen) > 100 and not {*watch.seen} & {*pretend_cuda.WAITS, "lift_fresh"}


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on CUDA."""
    is_cuda = True


def test_cuda_s_draw_asks_the_device_nothing_and_follows_the_softmax():
    """The lines for CUDA: no call that waits for the device, and none of multinomial, whose checks wait in some versions; tokens as
    often as the softmax says, of top_p's set alone; never one without probability."""
    watch, probs = Watch(), torch.tensor([0, 0.05, 0.4, 0.1, 0.3, 0.15, 0])
    logits = probs.log().expand(20000, -1).as_subclass(OnCuda)
    for top_p, expected in ((1.0, probs), (0.8, torch.tensor([0, 0, 0.4, 0, 0.3, 0.15, 0]) / 0.85)):
        with watch:
            drawn = M.draw(logits, 1.0, top_p, torch.Generator().manual_seed(0)).as_subclass(torch.Tensor)
        counts = torch.bincount(drawn, minlength=7)
        assert (counts[expected == 0] == 0).all() and (counts / 20000 - expected).abs().max() < 0.015
    assert "exponential_" in watch.seen and not {*watch.seen} & {"multinomial", *pretend_cuda.WAITS}


# ---------------------------------------------------------------------------------------------------------------- the benchmark

def test_the_benchmark_s_two_tables_can_be_made(tmp_path, capsys, monkeypatch):
    """With so little work that the figures say nothing: a step of grpo.py in a process of its own, and the update as it grows."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # the tests' own number stays
    file, little = str(tmp_path / "bench.json"), ["--questions", "1", "--tokens", "4", "--rounds", "1", "--threads", "1"]
    bench.main([*little, "--G", "2", "--steps", "1", "--warmup", "1", "--json", file])
    assert "| ours | " in capsys.readouterr().out and json.loads(Path(file).read_text())["ours"]["seconds"] > 0
    bench.main(["--grow", *little, "--json", file])
    assert capsys.readouterr().out.count("\n| ") == 8 and len(json.loads(Path(file).read_text())) == 8


# ------------------------------------------------------------------------------------------------------------- a pretended GPU

@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """What a process preloads to pretend that it has a CUDA device."""
    if torch.cuda.is_available() or torch.version.cuda or sys.platform != "linux":
        pytest.skip("only torch's CPU build on Linux can pretend to have CUDA")
    try:
        return str(pretend_cuda.compiled(tmp_path_factory.mktemp("library")))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a g++ that compiles torch's headers")


def on_pretended_cuda(library, *start, cwd):
    """A command of Python's that runs on it -> what it printed."""
    env = pretend_cuda.preloading(library) | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(cwd))
    done = subprocess.run([sys.executable, *map(str, start)], env=env, cwd=cwd, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_what_needs_cuda_passes_on_a_pretended_device(library):
    """test_cuda.py: no operation mixes devices, none in a CUDA graph waits for a value, and a replayed graph draws what the step
    itself draws, where it comes from operations on tensors alone."""
    def run(which):
        return on_pretended_cuda(library, "tests/pretend_cuda.py", "pytest", "tests/test_cuda.py", "-q", "-p", "no:cacheprovider",
                                 "-k", which, cwd=ROOT)
    with ThreadPool(2) as pool:  # in two halves, for two cores
        for said in pool.map(run, ["grpo or graphs", "not (grpo or graphs)"]):
            assert " passed" in said and "skipped" not in said, said


ON_TWO_DEVICES = """
import faults
import grpo
import model as M
import rewards
import sft

def main(knobs):
    rewards.score = faults.toy_score
    close, M.close_devices = M.close_devices, lambda: None  # not between runs
    sft.main([*knobs, "--out", "sft", "--batch", "2", "--micro_batch", "1", "--max_steps", "2"])
    group = [*knobs, "--batch", "8", "--G", "4", "--max_new_tokens", "6", "--no-drop_no_spread", "--show_every", "1"]
    grpo.main([*group, "--out", "whole", "--max_steps", "2"])
    grpo.main([*group, "--out", "again", "--max_steps", "1"])
    grpo.main([*group, "--out", "again", "--max_steps", "2", "--resume"])
    close()
"""


def test_two_pretended_devices_train_as_one_cpu_does(library, world, tmp_path):
    """sft.py's losses on two devices are those of one CPU, to bf16's precision; gradients, the moments that are shared out and
    what is saved of them lie on the right devices: grpo.py goes on from its first step to the same completions."""
    knobs = ["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--lora", "2"]
    (tmp_path / "two_devices.py").write_text(ON_TWO_DEVICES)
    on_pretended_cuda(library, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                      ROOT / "tests" / "pretend_cuda.py", "two_devices", *knobs, cwd=tmp_path)
    sft.main([*knobs, "--out", str(tmp_path / "one"), "--batch", "2", "--max_steps", "2"])
    one, two = ([line["loss"] for line in lines_of(tmp_path / name)] for name in ("one", "sft"))
    assert len(one) == 2 and one == pytest.approx(two, rel=5e-3) and one != two, "bf16 differs from fp32"
    whole, again = ((tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "again"))
    assert whole == again and whole.count("\n") == 8


# ----------------------------------------------------------------------------------------------------------- several processes

def test_questions_are_dealt_evenly(world):
    """Every question of a step goes to one process, in the order of the step; all have as many as every world-th would give them, and
    about as much text; one process has the list of sft.epoch_order."""
    records, args = world.records[:30], sft.argparse.Namespace(mu=1, seed=3)

    def part(step, n, rank, processes):
        return grpo.questions_of(records, step, n, args, rank, processes)
    order = sft.epoch_order(30, 0, 3)
    assert part(0, 12, 0, 1) == [records[i] for i in order[:12]] and part(1, 12, 0, 1) == [records[i] for i in order[12:24]]
    for n, processes in ((30, 4), (7, 3), (16, 2)):
        parts = [part(0, n, rank, processes) for rank in range(processes)]
        assert [len(p) for p in parts] == [len(range(rank, n, processes)) for rank in range(processes)]
        places = [[order.index(next(i for i, r in enumerate(records) if r is x)) for x in p] for p in parts]
        assert sorted(sum(places, [])) == list(range(n)) and all(p == sorted(p) for p in places)
    lengths = [sum(len(rewards.question_text(r)) for r in part(0, 28, rank, 4)) for rank in range(4)]
    longest = max(len(rewards.question_text(r)) for r in records)
    assert max(lengths) - min(lengths) < longest


@pytest.mark.parametrize("error", [data.DataError("x.png is missing"), torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB.")])
def test_an_error_names_its_process(error, monkeypatch, capsys):
    """One sentence and exit code 2, for bad input and a full device, with the process that met it."""
    def main():
        raise error
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(M.os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        M.run(main)
    assert ended.value.code == 2 and capsys.readouterr().err == f"error: process 3: {error}\n"


@pytest.mark.parametrize("ends, code, says", [
    ("lambda: print('done')", 0, ""), ("lambda: sys.exit(0)", 0, ""),
    ("lambda: M.expect(False, 'no such file')", 2, "error: process 0: no such file\n")])
def test_one_of_several_processes_leaves_without_the_interpreters_end(ends, code, says):
    """There a thread of gloo's may abort it, and torchrun then reports a finished run as failed: exit codes are the program's."""
    program = f"import atexit, os, sys; import model as M; atexit.register(os.abort); M.run({ends})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True, env=os.environ | dict(RANK="0"))
    assert (done.returncode, done.stderr) == (code, says) and done.stdout == ("done\n" if "print" in ends else "")


@pytest.mark.parametrize("call", [lambda: M.sum_gradients([torch.nn.Parameter(torch.zeros(1))]), lambda: M.gather([1])],
                         ids=["sum_gradients", "gather"])
def test_a_call_that_fails_says_that_another_process_has_ended(call, monkeypatch):
    """What gloo and NCCL raise when another process dies is a sentence; a full device is not mistaken for it."""
    def fails(*args):
        raise error
    monkeypatch.setattr(M.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(M.dist, "get_world_size", lambda: 2)
    for name in ("all_reduce", "all_gather_object"):
        monkeypatch.setattr(M.dist, name, fails)
    error = RuntimeError("Connection closed by peer [127.0.0.1]\nat pair.cc")
    with pytest.raises(data.DataError, match=r"another process has ended.*: Connection closed by peer \[127.0.0.1\]$"):
        call()
    error = RuntimeError("NCCL error in: NCCLUtils.cpp:94\nncclSystemError\nLast error:\nNo space left on device")
    with pytest.raises(data.DataError, match="Last error: No space left on device$"):
        call()
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        call()


def test_processes_that_cannot_meet_are_told_which_settings_name_the_network(monkeypatch):
    """As where a host's name leads to an address that the other machines don't reach."""
    def fails(*args, **kwargs):
        raise RuntimeError("Gloo connectFullMesh failed\nat gloo.cc")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(M.dist, "init_process_group", fails)
    with pytest.raises(data.DataError, match="GLOO_SOCKET_IFNAME.*: Gloo connectFullMesh failed$"):
        M.setup_devices()


WORKER = """
import os, sys
import torch
import torch.distributed as dist
import model as M, sft
torch.set_num_threads(1)
folder, jsonl, out = sys.argv[1:4]
rank, world, device = M.setup_devices()
M.close_devices = lambda: None  # not between runs

# Gradients in pieces, of which a parameter may fill several; the second rank had no micro-batch.
M.PIECE_FLOATS = 10
torch.manual_seed(rank)
parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 25, 1, 9)]
if rank == 0:
    for p in parameters:
        p.grad = torch.randn_like(p)
M.sum_gradients(parameters)
torch.save([p.grad for p in parameters], f"{out}/pieces-{rank}.pt")

run = ["--preset", "tiny", "--model", folder, "--data", jsonl, "--batch", "6", "--micro_batch", "2", "--epochs", "2"]
sft.main([*run, "--out", out + "/whole", "--max_steps", "3"])
sft.main([*run, "--out", out + "/again", "--max_steps", "2"])
sft.main([*run, "--out", out + "/again", "--max_steps", "3", "--resume"])
# Machines that share no folder: each has an --out of its own, and only the first machine's has the checkpoint.
sft.main([*run, "--out", f"{out}/machine-{rank}", "--max_steps", "1"])
M.run(lambda: sft.main([*run, "--out", f"{out}/machine-{rank}", "--max_steps", "2", "--resume"]))
"""


@pytest.fixture(scope="module")
def machines(world, tmp_path_factory):
    """WORKER on two machines, a process on each: two agents of torchrun that find each other at a port -> its folder, and each
    agent's exit code and words."""
    out = tmp_path_factory.mktemp("machines")
    (out / "worker.py").write_text(WORKER)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d",
               "--rdzv_id", "test", "--rdzv_endpoint", f"localhost:{port}", out / "worker.py", world.folder, world.jsonl, out]
    agents = [subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES=""))
              for _ in range(2)]
    try:
        said = [agent.communicate(timeout=150)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert (out / "again" / "state.pt").exists(), said
    return dict(out=out, codes=[agent.returncode for agent in agents], said="".join(said))


def test_gradients_in_pieces_are_whole(machines):
    """Whatever the pieces, each parameter has the sum, also on a process that had nothing to add."""
    first, second = (torch.load(machines["out"] / f"pieces-{rank}.pt") for rank in (0, 1))
    torch.manual_seed(0)
    for a, b, n in zip(first, second, (3, 4, 25, 1, 9), strict=True):
        assert torch.equal(a, b) and torch.equal(a, torch.randn(n))


def test_a_resumed_run_of_two_machines_has_the_same_bits(machines):
    """Two steps and a third after --resume are three steps: weights and moments, collected from both processes."""
    whole, again = (torch.load(machines["out"] / name / "state.pt", weights_only=True) for name in ("whole", "again"))
    for name, weight in whole["trained"].items():
        assert torch.equal(weight, again["trained"][name]), name
    for a, b in zip(whole["optimizer"]["state"].values(), again["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in ("exp_avg", "exp_avg_sq", "step"))


def test_two_machines_train_as_one_process_does(machines, world, tmp_path):
    """Three steps of sft.py over two machines, AdamW's state shared out, make one process's weights to 1e-5, and its state.pt
    is one that one process can go on from."""
    knobs = ["--preset", "tiny", "--model", world.folder, "--data", world.jsonl, "--batch", "6", "--micro_batch", "2", "--epochs", "2"]
    sft.main([*knobs, "--out", str(tmp_path / "one"), "--max_steps", "3"])
    one, two = (torch.load(f / "state.pt", weights_only=True) for f in (tmp_path / "one", machines["out"] / "whole"))
    start = dict(world.net.named_parameters())

    def flat(tensors):
        return torch.cat([tensors[k].detach().flatten() for k in start])
    moved = flat(one["trained"]) - flat(start)
    assert (flat(one["trained"]) - flat(two["trained"])).norm() < 1e-5 * flat(start).norm() < 1e-2 * moved.norm()
    assert list(one["optimizer"]["state"]) == list(two["optimizer"]["state"])
    for a, b in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        torch.testing.assert_close(a["exp_avg"], b["exp_avg"], rtol=1e-5, atol=1e-5)
    sft.main([*knobs, "--out", str(machines["out"] / "whole"), "--max_steps", "4", "--resume"])
    assert torch.load(machines["out"] / "whole" / "state.pt", weights_only=True)["step"] == 4


def test_machines_without_a_shared_folder_are_told(machines):
    """A run needs no shared --out, of which the first process alone writes. To resume one, each machine must have the checkpoint:
    one that hasn't ends with a sentence that says which and what, and ends the other."""
    assert (machines["out"] / "machine-0" / "state.pt").exists() and not (machines["out"] / "machine-1" / "state.pt").exists()
    assert all(machines["codes"]) and "process 1: " in machines["said"]
    assert "machine-1/state.pt: missing" in machines["said"] and "another process has ended" in machines["said"]
