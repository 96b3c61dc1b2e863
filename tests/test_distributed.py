"""Training on several processes: PyTorch's own engines, and accelerate and Lightning, with rnnkit's layers."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import rnnkit
from rnnkit import backends

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

PROGRAM = Path(__file__).parents[1] / "examples" / "train_ddp.py"
PROCESSES = 2
BACKENDS = [name for name in ("cpp", "reference") if not backends.unavailable(name)]


# Gradients of two processes are those of one


class Model(nn.Module):
    """Layers of every kind, with options, cells and a readout."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm = rnnkit.LSTM(5, 7, num_layers=2, bidirectional=True, proj_size=3, **options)
        self.gru = rnnkit.GRU(6, 9, batch_first=True, recompute=True, **options)
        self.rnn = rnnkit.RNN(5, 3, nonlinearity="relu", bias=False, **options)
        self.cell = rnnkit.LSTMCell(5, 4)
        self.writing = rnnkit.GRU(9, 4, update_gate="writes", batch_first=True, **options)
        self.writing_cell = rnnkit.GRUCell(5, 4, update_gate="writes")
        self.readout = rnnkit.Readout(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, 5] -> the batch's mean of sums of squares, and the readout's loss."""
        first = self.lstm(x.transpose(0, 1))[0]
        second = self.gru(first.transpose(0, 1))[0]
        last = self.writing(second)[0]
        results = (
            first,
            second,
            last,
            self.rnn(x.transpose(0, 1))[1],
            self.cell(x[:, -1], (x[:, 0, :4], x[:, 1, :4]))[0],
            self.writing_cell(x[:, -1], x[:, 0, :4]),
        )
        squares = sum(result.square().sum() for result in results) / len(x)
        return squares + self.readout.loss(last, x[..., :3].argmax(-1))


def in_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def in_fsdp2(model: nn.Module) -> nn.Module:
    for layer in model.children():
        fully_shard(layer)
    register_fsdp_forward_method(model.readout, "loss")
    return fully_shard(model)


def gradients(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Of the batches' mean, whole, under the names of the model without a wrapper."""
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        elif isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        (model(batch) / len(batches)).backward()
    found = {}
    for name, weight in model.named_parameters():
        grad = weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
        found[name.removeprefix("module.")] = grad
    return found


def mean_gradients(model: nn.Module, batches: Tensor) -> dict[str, Tensor]:
    """The mean of the gradients that each batch has alone: of the whole one's, a rule would clip others."""
    each = []
    for batch in batches:
        model.zero_grad()
        each.append(gradients(model, [batch]))
    return {name: torch.stack([grads[name] for grads in each]).mean(0) for name in each[0]}


def gradients_are_those_of_one_process(rank: int) -> None:
    rule = {"grad_clip": 0.1, "grad_cut": 4}
    for backend, wrap, (options, accumulated) in product(
        BACKENDS, (in_ddp, in_fsdp2), (({}, 1), ({}, 3), (rule, 1))
    ):
        with rnnkit.backend(backend):
            torch.manual_seed(0)
            alone, shared = Model(**options), Model(**options)
            shared.load_state_dict(alone.state_dict())
            batch = torch.randn(accumulated, PROCESSES, 4, 6, 5)
            found = gradients(wrap(shared), list(batch[:, rank]))
            whole = gradients(alone, list(batch.flatten(1, 2)))
            expected = mean_gradients(alone, batch[0]) if options else whole
            same = all(torch.allclose(expected[name], whole[name]) for name in whole)
            assert same == (options == {}), "the rule has to matter in this test"
        where = f"{backend}, {wrap.__name__}, {options}, {accumulated} batches"
        torch.testing.assert_close(
            found, expected, rtol=0, atol=1e-6, msg=lambda m, w=where: f"{w}: {m}"
        )
        assert all(grad.abs().max() > 5e-4 for grad in found.values()), where


def gradient_flow_is_of_the_own_batch(rank: int) -> None:
    """In DDP, whose gradients of parameters are of all batches."""
    torch.manual_seed(0)
    alone, shared = Model(grad_clip=0.1), Model(grad_clip=0.1)
    shared.load_state_dict(alone.state_dict())
    batch = torch.randn(PROCESSES, 4, 6, 5)
    expected = mean_gradients(alone, batch)
    wrapped = in_ddp(shared)
    with rnnkit.gradient_flow(wrapped) as flow:
        found = gradients(wrapped, [batch[rank]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    with rnnkit.gradient_flow(alone) as of_one:
        alone(batch[rank]).backward()
    assert list(flow) == [f"module.{name}" for name in of_one] and len(list(of_one)) == 6
    for name in of_one:
        torch.testing.assert_close(flow[f"module.{name}"].h, of_one[name].h)


def shards_are_converted_whole(rank: int) -> None:
    """Of FSDP2: by `convert_update_gate`, and from and to other libraries."""
    x = torch.randn(4, 2, 3)
    for kind in ("GRU", "GRUCell"):
        torch.manual_seed(0)
        plain, other, sharded = (
            getattr(rnnkit, kind)(3, 5, update_gate="writes") for _ in range(3)
        )
        sharded.load_state_dict(plain.state_dict())
        fully_shard(sharded)
        given = x[0] if kind == "GRUCell" else x
        assert sharded.convert_update_gate("keeps").update_gate == "keeps"
        torch.testing.assert_close(sharded(given), plain(given))
        sharded.reshard()
        for library in ("keras", "haste"):
            write, load = getattr(rnnkit, f"to_{library}"), getattr(rnnkit, f"from_{library}")
            torch.testing.assert_close(write(sharded), write(plain))
            load(sharded, write(other))
            torch.testing.assert_close(sharded(given), other(given))
            sharded.reshard()
            load(sharded, write(plain))
    readout = fully_shard(rnnkit.Readout(3, 5))
    for call in (readout.predict, lambda h: readout.loss(h, torch.zeros(4, 2, dtype=torch.int64))):
        with pytest.raises(RuntimeError, match=r"got a shard: .*register_fsdp_forward_method"):
            call(x)


#: In one pair of processes, since to start them takes longest.
CHECKS = (
    gradients_are_those_of_one_process,
    gradient_flow_is_of_the_own_batch,
    shards_are_converted_whole,
)


def run_checks(rank: int, place: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=PROCESSES)
    try:
        for check in CHECKS:
            check(rank)
    finally:
        dist.destroy_process_group()
    # fully_shard keeps the group's threads alive until the process ends. A Python that shuts down while one of them
    # frees the last collective's tensors aborts (pytorch/pytorch#179291), so this process ends without shutting down.
    os._exit(0)


def test_ddp_and_fsdp2(tmp_path: Path) -> None:
    multiprocessing.spawn(run_checks, (str(tmp_path / "store"),), PROCESSES)


# examples/train_ddp.py


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{n * n % 31} {n * n % 7}" for n in range(900)))
    return path


def command(text: Path, *arguments: object, processes: int = PROCESSES) -> list[str]:
    """train_ddp.py of a small model; alone, or under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    sizes = "--size 12 --layers 1 --bptt 5 --batch 8 --words 40 --save-every 3 --workers 1"
    return [
        sys.executable,
        *(launcher if processes > 1 else []),
        *(str(PROGRAM), "--text", str(text), *sizes.split(), *map(str, arguments)),
    ]


def losses(output: str) -> dict[int, float]:
    """Of each step that was printed."""
    return {int(n): float(x) for n, x in re.findall(r"step (\d+)  loss (\S+)", output)}


def trained(text: Path, *arguments: object, processes: int = PROCESSES) -> dict[int, float]:
    given = command(text, *arguments, processes=processes)
    done = subprocess.run(given, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    return losses(done.stdout)


def environment() -> dict[str, str]:
    """One thread each, and none of a group that this process may be in."""
    own = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("TORCHELASTIC", "PYTEST", "MASTER_"))
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        own.pop(name, None)
    return {**own, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_as_many_processes_as_there_are(text: Path, tmp_path: Path) -> None:
    """One, or two that share weights and optimizer, have the same losses, and go on from each other's checkpoint."""
    alone = trained(text, "--steps", 7, processes=1)
    assert list(alone) == list(range(1, 8))
    assert alone[7] < alone[1]
    shared = ["--parallel", "fsdp", "--accumulate", 2, "--checkpoint", tmp_path / "checkpoints"]
    first = trained(text, "--steps", 4, *shared)
    rest = trained(text, "--steps", 7, *shared[2:], processes=1)
    assert (list(first), list(rest)) == ([1, 2, 3, 4], [5, 6, 7])
    assert {**first, **rest} == pytest.approx(alone, rel=1e-6, abs=1e-5)


def workers_of(launcher: int) -> list[int]:
    """The processes of train_ddp.py that a torchrun started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher:
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in Linux's /proc")
def test_a_killed_worker_is_a_clear_failure_and_the_next_run_goes_on(
    text: Path, tmp_path: Path
) -> None:
    """With dropout, which is the same in a run that went on."""
    dropout = ["--dropout", 0.3]
    given = command(text, "--steps", 2000, *dropout, "--checkpoint", tmp_path / "cut off")
    workers: list[int] = []
    with (
        open(tmp_path / "errors", "w+") as errors,
        subprocess.Popen(
            given, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment()
        ) as run,
    ):
        try:
            assert run.stdout is not None
            for line in run.stdout:
                if "step 5 " in line:
                    workers = workers_of(run.pid)
                    os.kill(workers[-1], signal.SIGKILL)
                    break
            run.communicate(timeout=120)
        finally:
            for process in (run.pid, *workers):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        errors.seek(0)
        error = errors.read()
    assert run.returncode != 0
    assert "Signal 9 (SIGKILL)" in error and "rank" in error
    # The other one may have come to the next checkpoint in the meantime.
    saved = max(int(p.parent.name[5:]) for p in (tmp_path / "cut off").glob("step_*/.metadata"))
    assert saved >= 3
    rest = trained(
        text, "--steps", max(10, saved + 4), *dropout, "--checkpoint", tmp_path / "cut off"
    )
    assert next(iter(rest)) == saved + 1
    expected = trained(text, "--steps", max(rest), *dropout)
    assert rest == {step: expected[step] for step in rest}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--batch", "9", "--accumulate", "2"],
            "multiple of processes x --accumulate = 1 x 2, got 9",
        ),
        (["--batch", "4000"], "expected a text of 4000 windows or more"),
    ],
)
def test_wrong_arguments(text: Path, arguments: list[str], message: str) -> None:
    given = command(text, *arguments, processes=1)
    done = subprocess.run(given, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode != 0
    assert message in done.stderr


# Other people's engines


def tagger(package: Any) -> nn.Module:
    torch.manual_seed(0)

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = package.GRU(4, 6, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0])

    return Tagger()


def data() -> DataLoader:
    """Eight of [2, 5, 4] and their tags [2, 5]."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(16, 5, 4, generator=random)
    return DataLoader(TensorDataset(x, (x.sum(-1) > 0).long()), batch_size=2)


def loss_of(scores: Tensor, tags: Tensor) -> Tensor:
    return nn.functional.cross_entropy(scores.flatten(0, 1).float(), tags.flatten())


def assert_same_losses(train: Callable[[Any], list[float]], tolerance: float) -> None:
    ours, theirs = train(rnnkit), train(nn)
    assert len(ours) == 8
    assert ours == pytest.approx(theirs, abs=tolerance)


@pytest.fixture
def no_group() -> Iterator[None]:
    """accelerate keeps its state for the process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.usefixtures("no_group")
def test_accelerate(precision: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

    def train(package: Any) -> list[float]:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        engine = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        model = tagger(package)
        model, optimizer, loader = engine.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=0.01), data()
        )
        found = []
        for x, tags in loader:
            with engine.accumulate(model):
                loss = loss_of(model(x), tags)
                engine.backward(loss)
                engine.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        engine.save_state(str(tmp_path))
        saved = {name: weight.clone() for name, weight in model.state_dict().items()}
        torch.nn.init.zeros_(engine.unwrap_model(model).layer.weight_hh_l0)
        engine.load_state(str(tmp_path))
        torch.testing.assert_close(dict(model.state_dict()), saved, rtol=0, atol=0)
        return found

    assert_same_losses(train, 1e-5 if precision == "no" else 1e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.filterwarnings("ignore")
def test_lightning(precision: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Training(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            loss = loss_of(self.model(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train(package: Any) -> list[float]:
        engine = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            precision=precision,
            accumulate_grad_batches=2,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=True,
            default_root_dir=tmp_path,
        )
        training = Training(tagger(package))
        engine.fit(training, data())
        path = tmp_path / "model.ckpt"
        engine.save_checkpoint(path)
        loaded = Training.load_from_checkpoint(path, model=tagger(package), weights_only=True)
        for weight, expected in zip(loaded.parameters(), training.parameters(), strict=True):
            assert torch.equal(weight, expected)
        return training.losses

    assert_same_losses(train, 1e-5 if precision == "32-true" else 1e-2)
