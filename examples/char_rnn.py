"""Train a character-level language model with torch.nn and with rnnkit side by side.

    python examples/char_rnn.py                     on the sources of Python's standard library
    python examples/char_rnn.py --text book.txt --cell gru --layers 2
    python examples/char_rnn.py --save run.pt       until Ctrl-C; to go on with the same run:
    python examples/char_rnn.py --resume run.pt --save run.pt

The model is Embedding -> LSTM (or GRU, RNN) -> Linear, trained by truncated backpropagation
through time: the text is cut into `--batch` streams that are read side by side, `--bptt` characters
a step, and the hidden state is carried, detached, from step to step. Both implementations start
from the same weights and see the same batches; they take turns, a few steps each, so that both meet
the same machine.

Losses are cross entropies in nats per character. The exit status is 0 if the two loss curves agree
within the tolerance, 1 if they do not (or a file could not be written), 2 for a wrong argument and
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import os
import platform
import shutil
import signal
import sys
import sysconfig
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

CELLS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}  # class names, the same in both packages
IMPLEMENTATIONS = {"torch": "torch.nn", "rnnkit": "rnnkit"}
TOLERANCE = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 5e-2}  # nats per character

# Training amplifies the rounding by which the two differ. Adam, or far higher rates, part the
# curves within a few hundred steps.
LEARNING_RATES = {"lstm": 0.2, "gru": 0.2, "rnn": 0.05}
MOMENTUM = 0.9
CLIP_NORM = 1.0  # of the gradient
BLOCK_STEPS = 5  # steps an implementation takes before the other has its turn
SAVE_SECONDS = 20.0  # between two periodic checkpoints
INTERRUPTED_FILE = "char_rnn_interrupted.pt"  # where Ctrl-C saves when there is no --save
CHECKPOINT_FORMAT = "rnnkit char_rnn 1"

RARE = "\ufffd"  # stands for every character outside the vocabulary
VOCABULARY = 100
DEFAULT_TEXT_LENGTH = 4_000_000  # characters
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


class UsageError(Exception):
    """A wrong argument; the message names it."""


@dataclasses.dataclass
class Options:
    """The command line; the defaults are those of the program."""

    cell: str = "lstm"
    layers: int = 1
    hidden: int = 384
    bptt: int = 64
    batch: int = 16
    lr: float | None = None  # None: that of LEARNING_RATES
    seed: int = 0
    dtype: str = "float32"
    only: str | None = None
    steps: int = 500
    text: str | None = None
    device: str = "cpu"
    threads: int | None = None
    plot: str = "char_rnn.png"
    save: str | None = None
    resume: str | None = None


# What a checkpoint fixes. The rest, save for --save and --resume, is only its default.
FIXED = ("cell", "layers", "hidden", "bptt", "batch", "lr", "seed", "dtype", "only")


def read_text(path: str | None) -> str:
    """The text of file `path`, or of the standard library's modules, top-level ones first."""
    if path is not None:
        try:
            text = Path(path).read_text("utf-8", "replace")
        except OSError as error:
            raise UsageError(f"--text {path}: {error.strerror}") from error
        if not text:
            raise UsageError(f"--text {path}: the file is empty")
        return text
    root = Path(sysconfig.get_path("stdlib"))
    files = [file.relative_to(root) for file in root.rglob("*.py")]
    files = [file for file in files if not SKIPPED_FOLDERS.intersection(file.parts)]
    parts: list[str] = []
    length = 0
    for file in sorted(files, key=lambda file: (len(file.parts), file.parts)):
        parts.append((root / file).read_text("utf-8", "replace"))
        length += len(parts[-1])
        if length >= DEFAULT_TEXT_LENGTH:
            break
    if not parts:
        raise UsageError(f"no Python sources in {root}: give a text with --text FILE")
    return "".join(parts)[:DEFAULT_TEXT_LENGTH]


class Text:
    """A text as character codes, and the batches of it.

    symbols: the character of each code; code 0 is `RARE`.
    codes: uint8 [characters].
    """

    def __init__(self, text: str, batch: int, bptt: int, device: str):
        if len(text) < batch * bptt + 1:
            raise UsageError(
                f"--text: {len(text)} characters are too few: --batch {batch} streams of "
                f"--bptt {bptt} characters need at least {batch * bptt + 1}"
            )
        counts = Counter(text)
        known = sorted(c for c in counts if (c.isprintable() and c != RARE) or c in "\n\t")
        known = sorted(known, key=counts.__getitem__, reverse=True)[: VOCABULARY - 1]
        self.symbols = RARE + "".join(known)
        code_of = defaultdict(int, {ord(c): code for code, c in enumerate(self.symbols)})
        codes = bytearray(text.translate(code_of).encode("latin-1"))
        self.digest = hashlib.sha256(self.symbols.encode() + codes).hexdigest()
        self.codes = torch.frombuffer(codes, dtype=torch.uint8)
        self.bptt = bptt
        length = (len(codes) - 1) // batch
        self.steps_per_pass = length // bptt
        inputs, targets = self.codes[:-1], self.codes[1:]
        self.inputs = inputs[: batch * length].view(batch, length).t().to(device)  # [length, N]
        self.targets = targets[: batch * length].view(batch, length).t().to(device)

    def window(self, step: int) -> tuple[Tensor, Tensor, bool]:
        """Inputs and targets [T, N] of a step, and whether the streams begin anew with it."""
        index = step % self.steps_per_pass
        rows = slice(index * self.bptt, (index + 1) * self.bptt)
        return self.inputs[rows].long(), self.targets[rows].long(), index == 0

    def unigram_entropy(self) -> float:
        """Nats per character of the best guess that looks at no context."""
        share = torch.bincount(self.codes).double() / len(self.codes)
        return -torch.xlogy(share, share).sum().item()


class CharModel(nn.Module):
    def __init__(self, layer_class: Callable[..., nn.Module], symbols: int, options: Options):
        super().__init__()
        self.embedding = nn.Embedding(symbols, options.hidden)
        self.layer = layer_class(options.hidden, options.hidden, num_layers=options.layers)
        self.output = nn.Linear(options.hidden, symbols)

    def forward(self, codes: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """codes [T, N] and a state of the layer to logits [T, N, symbols] and the next state."""
        hidden, state = self.layer(self.embedding(codes), state)
        return self.output(hidden), state


def carried(state: Any, device: str) -> Any:
    """A copy without history of the state: a tensor, the LSTM's pair of them, or None."""
    if isinstance(state, tuple):
        return tuple(carried(part, device) for part in state)
    return None if state is None else state.detach().to(device, copy=True)


class Training:
    """One implementation's model, optimizer, hidden state, losses and time spent."""

    def __init__(
        self, name: str, layer_class: Callable[..., nn.Module], text: Text, options: Options
    ):
        self.name = name
        self.text = text
        self.device = options.device
        torch.manual_seed(options.seed)
        initial = CharModel(getattr(nn, CELLS[options.cell]), len(text.symbols), options)
        self.model = CharModel(layer_class, len(text.symbols), options)
        self.model.load_state_dict(initial.state_dict())  # the same for every implementation
        self.model.to(self.device, getattr(torch, options.dtype))
        self.weights: dict[str, Tensor] = dict(self.model.named_parameters())
        # bfloat16 is too coarse for the optimizer's small updates: it works on float32 copies.
        self.copies: list[tuple[Tensor, Tensor]] = []  # a model's parameter and its copy
        if options.dtype == "bfloat16":
            self.weights = {name: weight.detach().float() for name, weight in self.weights.items()}
            self.copies = list(zip(self.model.parameters(), self.weights.values(), strict=True))
        assert options.lr is not None
        self.optimizer = torch.optim.SGD(self.weights.values(), lr=options.lr, momentum=MOMENTUM)
        self.state: Any = None
        self.losses: list[float] = []
        self.seconds = 0.0
        self.timed_steps = 0

    def step(self, index: int) -> Tensor:
        """One step of truncated backpropagation through time; the loss before its update."""
        inputs, targets, anew = self.text.window(index)
        logits, state = self.model(inputs, None if anew else self.state)
        loss_dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).to(loss_dtype), targets.flatten())
        loss.backward()
        for parameter, copy in self.copies:
            assert parameter.grad is not None
            copy.grad = parameter.grad.float()
        nn.utils.clip_grad_norm_(self.weights.values(), CLIP_NORM)
        self.optimizer.step()
        self.refresh_model()
        self.state = carried(state, self.device)
        return loss.detach()

    @torch.no_grad()
    def refresh_model(self) -> None:
        """Bring the optimizer's copies into the model and drop the gradients."""
        for parameter, copy in self.copies:
            parameter.copy_(copy)
        self.model.zero_grad()

    def train(self, until: int, stop: StopRequest) -> None:
        """Train up to step `until`, on the clock; end early, between two steps, on `stop`."""
        losses: list[Tensor] = []
        begin = time.perf_counter()
        while (index := len(self.losses) + len(losses)) < until and not stop.asked:
            losses.append(self.step(index))
        self.losses += torch.stack(losses).tolist() if losses else []  # waits for the device
        self.seconds += time.perf_counter() - begin
        self.timed_steps += len(losses)

    def warm_up(self) -> None:
        """Run the model once off the clock: libraries load and compile at first use."""
        logits, _ = self.model(self.text.window(0)[0])
        logits.sum().backward()
        self.refresh_model()

    def characters_per_second(self) -> float:
        characters = self.timed_steps * self.text.inputs.shape[1] * self.text.bptt
        return characters / self.seconds if self.seconds else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": {name: weight.detach() for name, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "state": self.state,
            "losses": self.losses,
            "seconds": self.seconds,
            "timed_steps": self.timed_steps,
        }

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(saved["weights"][name])
        self.refresh_model()
        self.optimizer.load_state_dict(saved["optimizer"])
        self.state = carried(saved["state"], self.device)
        self.losses = list(saved["losses"])
        self.seconds = saved["seconds"]
        self.timed_steps = saved["timed_steps"]

    @torch.no_grad()
    def sample(self, length: int, seed: int, temperature: float = 0.7) -> str:
        """What the model writes after the text's first characters; the seed decides it."""
        generator = torch.Generator().manual_seed(seed)
        given = self.text.inputs[: self.text.bptt, :1].long()  # [T, 1]
        state, sampled = None, ""
        for _ in range(length):
            logits, state = self.model(given, state)
            logits = logits[-1, 0].double().cpu() / temperature
            if not logits.isfinite().all():
                return "(none: the training has diverged)"
            logits[0] = -math.inf  # no rare characters
            code = torch.multinomial(logits.softmax(0), 1, generator=generator)
            sampled += self.text.symbols[int(code)]
            given = code.to(self.device).view(1, 1)
        return sampled


class StopRequest:
    """Turns Ctrl-C into a flag, so that no step and no checkpoint is cut in half.

    Further Ctrl-C while the run stops and saves change nothing.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> StopRequest:
        self.previous = signal.signal(signal.SIGINT, self.ask)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True


class Progress:
    """Progress on stderr: a bar with the time left on a terminal, now and then a line elsewhere."""

    def __init__(self, trainings: Sequence[Training], steps: int):
        self.trainings = trainings
        self.steps = steps
        self.begin = time.monotonic()
        self.first = self.done()
        self.last_line = (-math.inf, -math.inf)  # share done and time
        self.terminal = sys.stderr.isatty()

    def done(self) -> float:
        """The share of all steps that is done."""
        return sum(len(t.losses) for t in self.trainings) / (self.steps * len(self.trainings))

    def show(self) -> None:
        done = self.done()
        left = (time.monotonic() - self.begin) * (1 - done) / max(done - self.first, 1e-9)
        minutes, seconds = divmod(round(left), 60)
        losses = [f"{IMPLEMENTATIONS[t.name]} {t.losses[-1]:.3f}" for t in self.trainings]
        line = (
            f"{done:4.0%} of {self.steps} steps, {minutes}:{seconds:02d} left, "
            f"{', '.join(losses)} nats"
        )
        if self.terminal:
            line = f"[{'#' * round(12 * done):12}]{line}"[: shutil.get_terminal_size().columns - 1]
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        elif done >= self.last_line[0] + 0.1 or time.monotonic() >= self.last_line[1] + 30:
            self.last_line = (done, time.monotonic())
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.terminal:
            print(file=sys.stderr)


def train_all(trainings: Sequence[Training], options: Options, save: Callable[[str], bool]) -> bool:
    """Train to the last step, the implementations taking turns; False if Ctrl-C stopped it."""
    with StopRequest() as stop:
        progress = Progress(trainings, options.steps)
        last_save = time.monotonic()
        first = min(len(training.losses) for training in trainings)
        for begin in range(first - first % BLOCK_STEPS, options.steps, BLOCK_STEPS):
            # Who begins alternates too: a machine that slows down slows both alike.
            order = trainings if begin // BLOCK_STEPS % 2 == 0 else trainings[::-1]
            for training in order:
                training.train(min(begin + BLOCK_STEPS, options.steps), stop)
            if stop.asked:
                break
            progress.show()
            if options.save and time.monotonic() - last_save >= SAVE_SECONDS:
                save(options.save)
                last_save = time.monotonic()
        progress.close()
        if stop.asked:
            path = options.save or INTERRUPTED_FILE
            if save(path):
                print(f"Interrupted. Go on with: --resume {path}", file=sys.stderr)
        return not stop.asked


def save_checkpoint(path: str, options: Options, trainings: Sequence[Training]) -> bool:
    """Write a checkpoint beside `path` and rename it: `path` is at all times a whole checkpoint."""
    text = options.text and os.path.abspath(options.text)
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "options": {**dataclasses.asdict(options), "text": text},
        "text_digest": trainings[0].text.digest,
        "trainings": {training.name: training.state_dict() for training in trainings},
    }
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk, say: torch.save raises either
        print(f"--save {path}: not written: {error}", file=sys.stderr)
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def load_checkpoint(path: str) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"--resume {path}: {error.strerror}") from error
    except Exception as error:  # torch.load raises many kinds for what is no checkpoint
        raise UsageError(f"--resume {path}: not a checkpoint of this program") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UsageError(f"--resume {path}: not a checkpoint of this program")
    return checkpoint


def print_curves(trainings: Sequence[Training]) -> None:
    steps = len(trainings[0].losses)
    points = sorted({round(i * (steps - 1) / 11) for i in range(12)})
    names = [IMPLEMENTATIONS[training.name] for training in trainings]
    print("\nLoss in nats per character")
    columns = [*names, "difference"] if len(names) == 2 else names
    print("    step" + "".join(f"{column:>12}" for column in columns))
    for point in points:
        losses = [training.losses[point] for training in trainings]
        difference = f"{abs(losses[0] - losses[1]):12.1e}" if len(losses) == 2 else ""
        print(f"{point + 1:8}" + "".join(f"{loss:12.4f}" for loss in losses) + difference)


def print_agreement(trainings: Sequence[Training], dtype: str) -> bool:
    """Print the greatest difference of the two curves; whether it is within the tolerance."""
    curves = torch.tensor([training.losses for training in trainings], dtype=torch.float64)
    difference, step = (curves[0] - curves[1]).abs().max(0)
    agree = difference.item() <= TOLERANCE[dtype]  # False for NaN
    print(
        f"Greatest difference over all {curves.shape[1]} steps: {difference.item():.1e} nats "
        f"(step {step.item() + 1})\n"
        f"The curves {'agree' if agree else 'DO NOT AGREE'}: "
        f"the tolerance for {dtype} is {TOLERANCE[dtype]:.0e} nats"
    )
    return agree


def machine(device: str) -> str:
    """What computes: the GPU's name, or the CPU's with the instruction sets that torch and rnnkit use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    of_torch = torch.backends.cpu.get_cpu_capability()
    try:
        from rnnkit.__main__ import info
    except ImportError:
        return f"{platform.processor() or platform.machine()}: torch.nn on {of_torch}"
    about = info()
    kernels = str(about["backends"]["cpp"])
    loaded = kernels.startswith("loaded: ")
    own = kernels.removeprefix("loaded: ") if loaded else f"its reference, C++ {kernels}"
    return f"{about['cpu']['name']}: torch.nn on {of_torch}, rnnkit on {own}"


def print_speeds(trainings: Sequence[Training], device: str) -> None:
    print(f"\nOn {machine(device)}")
    for training in trainings:
        speed = training.characters_per_second()
        milliseconds = 1e3 * training.seconds / max(training.timed_steps, 1)
        print(
            f"{IMPLEMENTATIONS[training.name]:>8}: {speed:10,.0f} characters/s in training, "
            f"{milliseconds:.1f} ms a step"
        )
    if len(trainings) == 2:
        torch_speed, rnnkit_speed = (training.characters_per_second() for training in trainings)
        print(f"Speed-up of rnnkit over torch.nn: {rnnkit_speed / torch_speed:.2f} times")


def plot(trainings: Sequence[Training], entropy: float, title: str, path: str) -> bool:
    """Draw the loss curves and the speeds into the PNG file `path`; False if that failed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"No {path}: matplotlib is not installed; to get it, pip install matplotlib")
        return True
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    figure.suptitle(title)
    curves, bars = figure.subplots(1, 2, width_ratios=[2, 1])
    names = [IMPLEMENTATIONS[training.name] for training in trainings]
    colors = ["lightskyblue", "tab:red"]
    for order, (training, name) in enumerate(zip(trainings, names, strict=True)):
        width = 1.2 if order == len(names) - 1 else 4.0  # the first shows under the second
        steps = range(1, len(training.losses) + 1)
        curves.plot(steps, training.losses, color=colors[order], linewidth=width, label=name)
    curves.axhline(entropy, color="gray", linestyle="--", label="unigram entropy of the text")
    curves.set(xlabel="training step", ylabel="loss in nats per character", title="Loss")
    curves.set_ylim(bottom=0)
    curves.legend()
    speeds = [training.characters_per_second() for training in trainings]
    drawn = bars.bar(names, speeds, width=0.6, color=colors[: len(names)])
    bars.bar_label(drawn, [f"{speed:,.0f}" for speed in speeds], padding=3)
    bars.yaxis.set_major_formatter("{x:,.0f}")
    bars.margins(x=0.2, y=0.12)
    bars.set(ylabel="characters per second", title="Training speed")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        print(f"--plot {path}: not written: {error.strerror}", file=sys.stderr)
        return False
    print(f"Plot: {path}")
    return True


def report(trainings: Sequence[Training], text: Text, options: Options, title: str) -> bool:
    """Print and draw the results; False if the curves differ or the plot could not be written."""
    print_curves(trainings)
    agree = len(trainings) < 2 or print_agreement(trainings, options.dtype)
    entropy = text.unigram_entropy()
    losses = trainings[-1].losses[-max(1, options.steps // 10) :]
    print(
        f"Unigram entropy of the text: {entropy:.3f} nats per character; "
        f"mean loss of the last {len(losses)} steps: {sum(losses) / len(losses):.3f}"
    )
    print_speeds(trainings, options.device)
    drawn = plot(trainings, entropy, title, options.plot)
    sample = trainings[-1].sample(400, options.seed)
    encoding = sys.stdout.encoding or "utf-8"
    print(f"\nText from the {IMPLEMENTATIONS[trainings[-1].name]} model:\n")
    print(sample.encode(encoding, "replace").decode(encoding))
    return agree and drawn


def positive(kind: type, or_zero: bool = False) -> Callable[[str], Any]:
    """The converter of an argument that is a positive number of this kind."""
    expected, limit = "a positive number", math.inf
    if kind is int:
        expected, limit = "a positive integer", 2**63

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (0 < value < limit or (value == 0 and or_zero)):
            raise argparse.ArgumentTypeError(
                f"expected {expected}{' or 0' if or_zero else ''}, got {text!r}"
            )
        return value

    return convert


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="char_rnn.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )

    def add(name: str, help: str, **keywords: Any) -> None:
        default = getattr(Options, name)
        help += "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", help=help, **keywords)

    count, size = positive(int), positive(float)
    rates = ", ".join(f"{cell} {rate}" for cell, rate in LEARNING_RATES.items())
    add("cell", "kind of layer", choices=CELLS)
    add("layers", "number of stacked layers", type=count, metavar="L")
    add("hidden", "hidden size, also of the embedding", type=count, metavar="H")
    add("bptt", "characters a step reads of each stream", type=count, metavar="T")
    add("batch", "streams read side by side", type=count, metavar="N")
    add("steps", "training steps in all, those before --resume included", type=count)
    add("lr", f"learning rate of SGD with momentum (default: by cell, {rates})", type=size)
    add("seed", "of the weights and of the text drawn at the end", type=positive(int, or_zero=True))
    add("dtype", "of model and state", choices=TOLERANCE)
    add("device", "torch device, such as cpu or cuda")
    add("threads", "CPU threads of torch (default: torch's own)", type=count)
    add("only", "train one implementation alone", choices=IMPLEMENTATIONS)
    add("text", "text to learn (default: Python's standard library)", metavar="FILE")
    add("plot", "PNG file to draw, if matplotlib is installed", metavar="FILE")
    add("save", "write checkpoints to this file", metavar="FILE")
    add("resume", "go on from this checkpoint", metavar="FILE")
    return parser


def read_options(argv: Sequence[str] | None) -> tuple[Options, dict[str, Any] | None]:
    """The options in force, and the checkpoint to go on from if there is one."""
    given = vars(make_parser().parse_args(argv))
    checkpoint = None
    if "resume" in given:
        path = given["resume"]
        checkpoint = load_checkpoint(path)
        saved = checkpoint["options"]
        for name in FIXED:
            if given.get(name, saved[name]) != saved[name]:
                had = "without it" if saved[name] is None else f"with {saved[name]}"
                raise UsageError(f"--{name} {given[name]}: the checkpoint {path} was made {had}")
        options = Options(**{**saved, "save": None, **given})
        done = min(len(training["losses"]) for training in checkpoint["trainings"].values())
        if "steps" in given and options.steps <= done:
            raise UsageError(
                f"--steps {options.steps}: the checkpoint {path} is at step {done} already"
            )
    else:
        options = Options(**given)
        options.lr = options.lr or LEARNING_RATES[options.cell]
    for name in ("save", "plot"):
        path = getattr(options, name)
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UsageError(f"--{name} {path}: no such folder")
        if path is not None and Path(path).is_dir():
            raise UsageError(f"--{name} {path}: this is a folder")
    return options, checkpoint


def layer_classes(options: Options) -> dict[str, Callable[..., nn.Module]]:
    """The layer's class of each implementation that is to be trained."""
    classes: dict[str, Callable[..., nn.Module]] = {}
    if options.only != "rnnkit":
        classes["torch"] = getattr(nn, CELLS[options.cell])
    if options.only != "torch":
        try:
            import rnnkit
        except ImportError as error:
            raise UsageError(
                f"rnnkit cannot be imported ({error}); install it, or train with --only torch"
            ) from error
        classes["rnnkit"] = getattr(rnnkit, CELLS[options.cell])
    return classes


def prepare(options: Options, checkpoint: dict[str, Any] | None) -> list[Training]:
    """Both trainings, ready for their next step."""
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {options.device}: {reason}") from error
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean the same in both
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    text = Text(read_text(options.text), options.batch, options.bptt, options.device)
    if checkpoint and checkpoint["text_digest"] != text.digest:
        raise UsageError(f"--resume {options.resume}: it was trained on another text; give --text")
    trainings = [
        Training(name, layer_class, text, options)
        for name, layer_class in layer_classes(options).items()
    ]
    for training in trainings:
        if checkpoint:
            training.load_state_dict(checkpoint["trainings"][training.name])
        training.warm_up()
    return trainings


def run(options: Options, checkpoint: dict[str, Any] | None) -> int:
    trainings = prepare(options, checkpoint)
    text = trainings[0].text
    title = (
        f"{CELLS[options.cell]}, layers {options.layers}, hidden {options.hidden}, "
        f"batch {options.batch}, bptt {options.bptt}, {options.dtype}, {options.device}"
    )
    print(
        f"{title}\n"
        f"torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} CPU threads\n"
        f"{len(text.codes):,} characters of {options.text or 'the standard library of Python'}, "
        f"{len(text.symbols)} symbols",
        flush=True,
    )

    def save(path: str) -> bool:
        return save_checkpoint(path, options, trainings)

    if not train_all(trainings, options, save):
        return 130
    saved = options.save is None or save(options.save)
    good = report(trainings, text, options, title)
    return 0 if saved and good else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; its exit status."""
    try:
        options, checkpoint = read_options(argv)
        return run(options, checkpoint)
    except UsageError as error:
        print(f"char_rnn.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # let Python shut down in peace
    sys.exit(status)
