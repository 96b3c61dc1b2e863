"""Packages from PyPI that use torch.nn's recurrent layers inside, trained with them and under `rnnkit.patch()`.

    python examples/packages.py

makes a virtual environment of its own (--venv), installs torch, rnnkit from this repository and the packages, and
trains each package on synthetic data, with its own trainer where it has one: by turns with torch.nn and with rnnkit in
its place, each time in a process of its own, with the same seed. It prints which of rnnkit's layers the package built,
the losses that the package reports and the seconds of both. It exits with 1 if losses differ by more than 1e-5, if no
layer of rnnkit was built, or if a package could not be installed or run. Nothing but packages is downloaded.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.metadata
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The packages, and torch, are imported in the inner runs only: the environment around needs none of them.
if TYPE_CHECKING:
    from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch.nn", "rnnkit")
LAYERS = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
TOLERANCE = 1e-5
SEED = 1


@dataclass(frozen=True)
class Training:
    """What the trainer of a package is told.

    Attributes:
        steps: how many losses it is to report.
        folder: an empty one, for what it writes.
    """

    steps: int
    folder: Path


@dataclass(frozen=True)
class Result:
    """What one run of a package gave.

    Attributes:
        losses: one a step, as the package reports them.
        layers: how many recurrent layers and cells its model has, by library and class.
        weights: a digest of the parameters before the first step.
        seconds: from the optimizer's first step to its last.
        versions: of Python, torch, rnnkit with its backend, and the package.
    """

    losses: list[float]
    layers: dict[str, int]
    weights: str
    seconds: float
    versions: dict[str, str]


def recurrent_ppo(training: Training) -> tuple[list[float], nn.Module]:
    """sb3-contrib: an agent says what it saw three steps before. Each loss is the last of an update."""
    import gymnasium
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.logger import configure

    class Recall(gymnasium.Env):
        """Shows one of four symbols at a time; the reward is 1 for naming the one three steps before."""

        observation_space = gymnasium.spaces.Discrete(4)
        action_space = gymnasium.spaces.Discrete(4)

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
            super().reset(seed=seed)
            self.shown = [int(self.np_random.integers(4))]
            return self.shown[-1], {}

        def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
            right = len(self.shown) > 3 and int(action) == self.shown[-4]
            self.shown.append(int(self.np_random.integers(4)))
            return self.shown[-1], float(right), len(self.shown) > 24, False, {}

    environments, steps_between_updates = 4, 32
    model = RecurrentPPO(
        "MlpLstmPolicy",
        make_vec_env(Recall, environments, seed=SEED),
        n_steps=steps_between_updates,
        batch_size=environments * steps_between_updates,
        n_epochs=2,
        policy_kwargs={"lstm_hidden_size": 64},
        seed=SEED,
        device="cpu",
    )
    model.set_logger(configure(str(training.folder), ["csv"]))
    model.learn(training.steps * environments * steps_between_updates)
    model.logger.dump(model.num_timesteps)  # what the last update gave
    return column(training.folder / "progress.csv", "train/loss"), model.policy


def deep_ar(training: Training) -> tuple[list[float], nn.Module]:
    """pytorch-forecasting: DeepAR on noisy waves, trained by Lightning. Histories of unlike lengths are packed."""
    import lightning
    import numpy
    import pandas
    from lightning.pytorch.loggers import CSVLogger
    from pytorch_forecasting import DeepAR, TimeSeriesDataSet

    lightning.seed_everything(SEED, verbose=False)
    generator = numpy.random.default_rng(SEED)
    series, length = 12, 80
    times = numpy.tile(numpy.arange(length), series)
    names = numpy.repeat(numpy.arange(series), length)
    values = 2 + numpy.sin(times / 4 + names) + 0.1 * generator.standard_normal(series * length)
    dataset = TimeSeriesDataSet(
        pandas.DataFrame({"time": times, "series": names.astype(str), "value": values}),
        time_idx="time",
        target="value",
        group_ids=["series"],
        static_categoricals=["series"],
        time_varying_unknown_reals=["value"],
        min_encoder_length=8,
        max_encoder_length=24,
        max_prediction_length=8,
        randomize_length=True,
    )
    model = DeepAR.from_dataset(dataset, hidden_size=32, rnn_layers=2, dropout=0.1)
    logger = CSVLogger(training.folder, name="", version="")
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=training.steps,
        gradient_clip_val=0.1,
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, dataset.to_dataloader(train=True, batch_size=32))
    return column(training.folder / "metrics.csv", "train_loss_step"), model


def message_passing(training: Training) -> tuple[list[float], nn.Module]:
    """torch-geometric: counts a graph's triangles, with GatedGraphConv's GRUCell and Set2Set's LSTM."""
    import torch
    from torch import nn
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GatedGraphConv, Set2Set
    from torch_geometric.utils import dense_to_sparse

    class GraphModel(nn.Module):
        """As of Gilmer et al. 2017, "Neural message passing for quantum chemistry"."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.passing = GatedGraphConv(size, num_layers=4)
            self.reading = Set2Set(size, processing_steps=4)
            self.output = nn.Linear(2 * size, 1)

        def forward(self, graphs: Data) -> Tensor:
            nodes = self.passing(graphs.x, graphs.edge_index)  # [nodes, size]
            return self.output(self.reading(nodes, graphs.batch)).squeeze(1)  # [graphs]

    def graph() -> Data:
        nodes = int(torch.randint(6, 16, ()))
        upper = (torch.rand(nodes, nodes) < 0.4).float().triu(1)
        adjacency = upper + upper.t()  # [nodes, nodes]
        triangles = adjacency.matrix_power(3).trace() / 6
        return Data(
            x=adjacency.sum(1, keepdim=True) / nodes,
            edge_index=dense_to_sparse(adjacency)[0],
            y=triangles.log1p().view(1),
        )

    batches = DataLoader([graph() for _ in range(128)], batch_size=32, shuffle=True)
    model = GraphModel(32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses: list[float] = []
    for graphs in islice(chain.from_iterable(repeat(batches)), training.steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(graphs), graphs.y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def tagger(training: Training) -> tuple[list[float], nn.Module]:
    """stanza: its part-of-speech tagger, over words and their characters, on a made-up language."""
    from stanza.models import tagger

    text = made_up_sentences(200)
    for name in ("train", "evaluation"):
        (training.folder / f"{name}.conllu").write_text(text)
    reported = Messages()
    logging.getLogger("stanza").addHandler(reported)
    # It has to evaluate once, which is after the last step.
    options = {
        "train_file": training.folder / "train.conllu",
        "eval_file": training.folder / "evaluation.conllu",
        "save_dir": training.folder,
        "save_name": "tagger.pt",
        "shorthand": "xx_synthetic",
        "max_steps": training.steps,
        "eval_interval": training.steps,
        "log_step": 1,
        "batch_size": 100,
        "hidden_dim": 64,
        "deep_biaff_hidden_dim": 64,
        "char_hidden_dim": 64,
        "seed": SEED,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    trainer, _ = tagger.main([*arguments, "--no_pretrain", "--fix_eval_interval", "--cpu"])
    # Each loss is told to six places.
    steps = [re.match(r"Finished STEP .* loss = (\S+)", text) for text in reported.texts]
    return [float(step[1]) for step in steps if step], trainer.model


class Messages(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def made_up_sentences(count: int) -> str:
    """In CoNLL-U: nouns end in -o, verbs in -as; a sentence has one to three clauses."""
    chance = random.Random(SEED)

    def stem() -> str:
        return "".join(chance.choice("bdgklmnprst") + chance.choice("aeiou") for _ in range(2))

    words = {
        "NOUN": [f"{stem()}no" for _ in range(30)],
        "VERB": [f"{stem()}tas" for _ in range(20)],
        "ADJ": [f"{stem()}na" for _ in range(20)],
        "DET": ["la", "ke"],
    }
    lines: list[str] = []
    for _ in range(count):
        clauses = chance.randint(1, 3)
        tags = [*["DET", "ADJ", "NOUN", "VERB"][chance.randint(0, 1) :]] * clauses
        for index, tag in enumerate(tags, 1):
            word = chance.choice(words[tag])
            head, relation = (0, "root") if index == 1 else (1, "dep")
            lines.append(f"{index}\t{word}\t{word}\t{tag}\t_\t_\t{head}\t{relation}\t_\t_")
        lines.append("")
    return "\n".join(lines) + "\n"


def column(file: Path, name: str) -> list[float]:
    """A column of numbers of a CSV file, without the rows that have none there."""
    with file.open(newline="") as rows:
        return [float(row[name]) for row in csv.DictReader(rows) if row.get(name)]


#: By their names on PyPI.
PACKAGES: dict[str, Callable[[Training], tuple[list[float], nn.Module]]] = {
    "sb3-contrib": recurrent_ppo,
    "pytorch-forecasting": deep_ar,
    "torch-geometric": message_passing,
    "stanza": tagger,
}


def count_layers(model: nn.Module) -> dict[str, int]:
    """The recurrent layers and cells in a model; a package's subclass counts as what it is a subclass of."""
    found: Counter[str] = Counter()
    for module in model.modules():
        for cls in type(module).__mro__:
            library = {"torch": "torch.nn", "rnnkit": "rnnkit"}.get(cls.__module__.split(".")[0])
            if library and cls.__name__ in LAYERS:
                found[f"{library}.{cls.__name__}"] += 1
                break
    return dict(found)


def run(name: str, library: str, steps: int, threads: int) -> Result:
    """Trains a package in this process, which nothing has imported it in yet."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    versions = {"Python": sys.version.split()[0], "torch": torch.__version__}
    if library == "rnnkit":
        import rnnkit
        from rnnkit import backends

        rnnkit.patch()
        serving = backends.serving(torch.device("cpu"))
        versions["rnnkit"] = f"{rnnkit.__version__} ({serving})"
    versions[name] = importlib.metadata.version(name)
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    times: list[float] = []
    weights = hashlib.sha256()

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Before a step of an optimizer, whoever made it."""
        if not times:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    weights.update(parameter.detach().numpy().tobytes())
        times.append(time.perf_counter())

    register_optimizer_step_pre_hook(note)
    with tempfile.TemporaryDirectory() as folder:
        losses, model = PACKAGES[name](Training(steps, Path(folder)))
    seconds = times[-1] - times[0]
    return Result(losses, count_layers(model), weights.hexdigest(), seconds, versions)


class Failure(Exception):
    """Why a package, or all of them, cannot be compared."""


def call(command: Sequence[str | Path], **environment: str) -> str:
    """What a command printed to stdout.

    Raises:
        Failure: it ended with another status than 0; tells the last of what it printed.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-15:]
        raise Failure("\n".join([f"status {done.returncode}", *(f"    {line}" for line in last)]))
    return done.stdout


def install(python: Path, torch_version: str, what: str, *arguments: str | Path) -> None:
    """Lets pip install into the environment of `python`, whose torch stays what it is."""
    print(f"installing {what}", file=sys.stderr, flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        # All runs are on the CPU, so that the CUDA kernels are not built.
        call([*pip, f"torch=={torch_version}", *arguments], RNNKIT_CUDA="0")
    except Failure as failure:
        raise Failure(f"pip could not install {what}: {failure}") from None


def make_environment(folder: Path, python: Path, torch_version: str) -> None:
    """Makes a virtual environment with torch and this repository's rnnkit, or brings it up to date."""
    if not python.exists():
        print(f"making {folder}", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
    install(python, torch_version, f"torch {torch_version}", "setuptools>=77")
    install(python, torch_version, "rnnkit", "--no-build-isolation", REPOSITORY)


def compare(python: Path, name: str, options: argparse.Namespace) -> dict[str, list[Result]]:
    """Runs a package by turns with both libraries."""
    results: dict[str, list[Result]] = {library: [] for library in LIBRARIES}
    for turn in range(options.rounds):
        for library in LIBRARIES if turn % 2 == 0 else reversed(LIBRARIES):
            print(f"running {name} with {library}", file=sys.stderr, flush=True)
            numbers = ["--steps", str(options.steps), "--threads", str(options.threads)]
            command = [python, Path(__file__).resolve(), "--run", name, "--library", library]
            try:
                printed = call([*command, *numbers], OMP_NUM_THREADS=str(options.threads))
            except Failure as failure:
                raise Failure(f"{name} failed with {library}: {failure}") from None
            results[library].append(Result(**json.loads(printed.splitlines()[-1])))
    return results


def greatest_difference(results: dict[str, list[Result]]) -> float:
    """Of the losses at any step, of any two runs of different libraries; NaN where one is NaN."""
    theirs, ours = (results[library] for library in LIBRARIES)
    differences = [
        abs(a - b)
        for one in theirs
        for other in ours
        for a, b in zip(one.losses, other.losses, strict=True)
    ]
    return max(differences, key=lambda difference: (difference != difference, difference))


def problems(results: dict[str, list[Result]], steps: int) -> list[str]:
    """What contradicts that rnnkit took torch.nn's place and computed the same."""
    everything = [result for library in LIBRARIES for result in results[library]]
    found: list[str] = []
    for result in everything:
        if len(result.losses) != steps:
            return [f"expected {steps} losses, got {len(result.losses)}"]
    if len({result.weights for result in everything}) > 1:
        found.append("the initial weights differ")
    if not (difference := greatest_difference(results)) <= TOLERANCE:
        found.append(f"losses differ by up to {difference:.1e}, more than {TOLERANCE:.0e}")
    built = results["rnnkit"][0].layers
    if not any(layer.startswith("rnnkit.") for layer in built):
        found.append("no layer of rnnkit was built")
    found += [f"{layer} was built" for layer in built if layer.startswith("torch.nn.")]
    return found


def row(name: str, results: dict[str, list[Result]]) -> list[str]:
    """A package's line of the table."""
    theirs, ours = (results[library] for library in LIBRARIES)
    losses = [f"{runs[0].losses[0]:8.5f} {runs[0].losses[-1]:8.5f}" for runs in (theirs, ours)]
    seconds = [f"{min(result.seconds for result in runs):.2f}" for runs in (theirs, ours)]
    built = ", ".join(f"{count} {layer}" for layer, count in ours[0].layers.items()) or "none"
    difference = f"{greatest_difference(results):.1e}"
    return [f"{name} {ours[0].versions[name]}", built, *losses, difference, *seconds]


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need be; the first two are texts."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for cells in rows:
        texts = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
        print("  ".join(texts + numbers))


HEAD = (
    ("", "", "torch.nn's loss  ", "rnnkit's loss  ", "greatest", "seconds", ""),
    ("package", "built inside", *["first     last"] * 2, "difference", "torch.nn", "rnnkit"),
)


def outer(python: Path, options: argparse.Namespace) -> int:
    """Installs, compares and prints; 1 if anything failed."""
    rows: list[list[str]] = []
    wrong: list[str] = []
    versions: dict[str, str] = {}
    try:
        if not options.installed:
            make_environment(options.venv, python, options.torch)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    for name in options.only or PACKAGES:
        try:
            if not options.installed:
                install(python, options.torch, name, name)
            results = compare(python, name, options)
        except Failure as failure:
            wrong.append(str(failure))
            continue
        contradictions = problems(results, options.steps)
        wrong += [f"{name}: {contradiction}" for contradiction in contradictions]
        if all(len(run.losses) == options.steps for runs in results.values() for run in runs):
            rows.append(row(name, results))
        versions |= results["rnnkit"][0].versions
    if rows:
        general = ", ".join(f"{what} {versions[what]}" for what in ("Python", "torch", "rnnkit"))
        print(f"{general}, threads: {options.threads}, steps: {options.steps}")
        print_table([*HEAD, *rows])
        print(
            "Seconds are from the optimizer's first step to its last, "
            f"of the fastest of {options.rounds} runs."
        )
    for text in wrong:
        print(text, file=sys.stderr)
    return int(bool(wrong))


def running_torch() -> str | None:
    """The public version of the torch that this Python has, if any."""
    try:
        return importlib.metadata.version("torch").split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def positive(text: str) -> int:
    """An argument that is a whole number from 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def main(argv: list[str] | None = None) -> int:
    """Compare all packages, or be one of the runs for that."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", type=Path, default=REPOSITORY / "build" / "packages")
    parser.add_argument("--torch", default=running_torch(), help="version; default: this Python's")
    parser.add_argument("--installed", action="store_true", help="take --venv as it is")
    parser.add_argument("--only", action="append", choices=PACKAGES, help="may be given again")
    parser.add_argument("--steps", type=positive, default=30, help="losses of each run")
    parser.add_argument("--rounds", type=positive, default=2, help="the fastest run is told")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--run", choices=PACKAGES, help="train here and now, print JSON")
    parser.add_argument("--library", choices=LIBRARIES, default="rnnkit", help="for --run")
    options = parser.parse_args(argv)
    if options.run:
        result = run(options.run, options.library, options.steps, options.threads)
        print(json.dumps(vars(result)))
        return 0
    python = options.venv.resolve() / "bin" / "python"
    if options.installed and not python.exists():
        parser.error(f"expected --venv to be a virtual environment, there is no {python}")
    if not (options.torch or options.installed):
        parser.error("this Python has no torch, so --torch has to tell its version")
    return outer(python, options)


if __name__ == "__main__":
    raise SystemExit(main())
