"""Training on several processes, GPUs or machines: a word-level language model under DDP or FSDP2.

    python examples/train_ddp.py                                          one process
    torchrun --nproc-per-node 2 examples/train_ddp.py                     two, on GPUs where there are as many
    torchrun --nproc-per-node 2 examples/train_ddp.py --parallel fsdp     weights and optimizer sharded
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/train_ddp.py

prints the loss of each step (cross entropy in nats). A step's batch is the same for any number of processes, and so,
up to rounding, is its loss. With --checkpoint FOLDER the state is saved every few steps, and the next run, of as many
processes or of another number, goes on from the newest. Nothing here is rnnkit's own but the layer of the model: it is
what PyTorch's documentation tells to do with any model.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from word_language_model import LanguageModel, read_tokens

import rnnkit


class Objective(nn.Module):
    """The model and its loss: what is made parallel is called once for a batch and returns one number."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model, self.cross_entropy = model, nn.CrossEntropyLoss()

    def forward(self, windows: Tensor) -> Tensor:
        """Windows [N, T + 1] -> the mean over their words."""
        tokens = windows.t()
        scores, _ = self.model(tokens[:-1], None)
        return self.cross_entropy(scores, tokens[1:].flatten())


class Windows(Dataset[Tensor]):
    """Item i: the i-th stretch of the text, and the word that follows it, [T + 1]."""

    def __init__(self, tokens: Tensor, steps: int) -> None:
        self.tokens, self.steps = tokens, steps

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.steps

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.steps
        return self.tokens[start : start + self.steps + 1]


def start() -> torch.device:
    """Joins the processes that torchrun started, or makes a group of this one alone; the device to train on."""
    gpu = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    )
    if gpu:
        torch.cuda.set_device(device)
    launched = {"RANK", "WORLD_SIZE"} <= os.environ.keys()  # by torchrun, or another launcher
    alone = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None, **alone)
    return device


def distributed(model: nn.Module, parallel: str, device: torch.device) -> nn.Module:
    """Every process has the whole model (ddp), or a part of each weight (fsdp)."""
    if parallel == "fsdp":
        mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
        for layers in (m for m in model.modules() if isinstance(m, nn.RNNBase)):
            fully_shard(layers, mesh=mesh)  # gathered only while they run
        return fully_shard(model, mesh=mesh)
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def synchronizing(model: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Gradients are exchanged in the last backward pass before an optimizer's step, and only there."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return nullcontext()
    return nullcontext() if last else model.no_sync()


class State:
    """What a run goes on with: weights, the optimizer's state, and how many steps are done."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.done = model, optimizer, 0

    def state_dict(self) -> dict[str, object]:
        """As `torch.distributed.checkpoint` saves it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "done": self.done}

    def load_state_dict(self, state: dict) -> None:
        """As it was saved."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.done = state["done"]


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step; one whose writing was cut off has no metadata yet."""
    whole = [path.parent for path in folder.glob("step_*/.metadata")]
    return max(whole, key=lambda path: int(path.name.removeprefix("step_")), default=None)


def batches(
    loader: DataLoader[Tensor], sampler: DistributedSampler[Tensor], parts: int, done: int
) -> Iterator[Tensor]:
    """This process's batches, `parts` for each step, without end, after the first `done` steps; [N, T + 1]."""
    steps = len(loader) // parts  # of an epoch
    epoch, done = divmod(done, steps)
    while True:
        sampler.set_epoch(epoch)  # another order each time
        yield from islice(loader, done * parts, steps * parts)
        epoch, done = epoch + 1, 0


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Takes steps until there are `args.steps` of them, with those of earlier runs."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    share, rest = divmod(args.batch, processes * args.accumulate)
    if rest or not share:
        raise SystemExit(
            f"expected --batch to be a multiple of processes x --accumulate = {processes} x {args.accumulate}, "
            f"got {args.batch}"
        )
    tokens, words = read_tokens(args.text, args.words)
    texts = Windows(tokens, args.bptt)
    sampler: DistributedSampler[Tensor] = DistributedSampler(texts, seed=args.seed, drop_last=True)
    loader = DataLoader(
        texts,
        share,
        sampler=sampler,
        num_workers=args.workers,
        drop_last=True,
        generator=torch.Generator(),  # so that to begin reading changes no dropout
    )
    if len(loader) < args.accumulate:
        raise SystemExit(f"expected a text of {args.batch} windows or more, got {len(texts)}")

    torch.manual_seed(args.seed)  # the same weights in every process
    model = LanguageModel(rnnkit, args.model, words, args.size, args.layers, args.dropout)
    model = distributed(Objective(model).to(device), args.parallel, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    state = State(model, optimizer)
    if args.checkpoint and (found := newest(args.checkpoint)):
        dcp.load({"training": state}, checkpoint_id=found)
        if rank == 0:
            print(f"goes on after step {state.done}", flush=True)

    parts = batches(loader, sampler, args.accumulate, state.done)
    while state.done < args.steps:
        # A dropout of this process's own, the same whether a run went on from a checkpoint or not.
        torch.manual_seed((args.seed * 1_000_003 + state.done) * 1000 + rank)
        total = torch.zeros((), device=device)
        for part in range(args.accumulate):
            windows = next(parts).to(device)
            with synchronizing(model, last=part == args.accumulate - 1):
                loss = model(windows) / args.accumulate
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        state.done += 1
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {state.done}  loss {total.item() / processes:.7f}", flush=True)
        if args.checkpoint and (state.done % args.save_every == 0 or state.done == args.steps):
            dcp.save({"training": state}, checkpoint_id=args.checkpoint / f"step_{state.done}")


@record  # torchrun tells which process failed, and of what
def main(argv: list[str] | None = None) -> None:
    """Reads the arguments, trains, and leaves the group."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--model", choices=("LSTM", "GRU", "RNN"), default="LSTM")
    parser.add_argument("--text", type=Path, help="default: the Python standard library")
    parser.add_argument("--checkpoint", type=Path, help="a folder to save to and to go on from")
    parser.add_argument("--batch", type=int, default=32, help="windows of a step, of all processes")
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a process's batch")
    parser.add_argument("--workers", type=int, default=1, help="of the DataLoader, per process")
    parser.add_argument("--save-every", type=int, default=50, help="steps")
    sizes = {"layers": 2, "size": 128, "bptt": 35, "words": 2000, "steps": 200, "seed": 1}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    for name, number in {"lr": 0.002, "clip": 1.0, "dropout": 0.0}.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    args = parser.parse_args(argv)
    device = start()
    train(args, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
