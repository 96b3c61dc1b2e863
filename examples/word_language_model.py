"""A word-level language model in the manner of PyTorch's own example, with one import exchanged.

    python examples/word_language_model.py --model LSTM --steps 200

trains the same model twice, once with torch.nn's recurrent layers and once with rnnkit's: same initial weights,
same batches. It prints both losses (cross entropy in nats) and their greatest difference. The text is this
machine's Python standard library, or --text FILE.
"""

import argparse
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import rnnkit


class LanguageModel(nn.Module):
    """Embedding, recurrent layers, and a linear layer to the vocabulary."""

    def __init__(
        self, library: ModuleType, model: str, words: int, size: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(words, size)
        self.rnn = getattr(library, model)(size, size, layers, dropout=dropout)
        self.decoder = nn.Linear(size, words)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(
        self, tokens: Tensor, hidden: Tensor | tuple[Tensor, ...] | None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, ...]]:
        """tokens [T, N] -> scores [T * N, words], hidden."""
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        return self.decoder(self.drop(output)).flatten(0, 1), hidden


def detach(hidden: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """The hidden state without its history."""
    if isinstance(hidden, Tensor):
        return hidden.detach()
    return tuple(h.detach() for h in hidden)


def read_tokens(path: Path | None, most_words: int) -> tuple[Tensor, int]:
    """The text as word numbers, and how many words there are; rare words share number 0."""
    files = [path] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = " ".join(file.read_text(errors="replace") for file in files)
    words = re.findall(r"\w+|[^\w\s]", text)
    common = [word for word, _ in Counter(words).most_common(most_words - 1)]
    number = {word: index + 1 for index, word in enumerate(common)}
    return torch.tensor([number.get(word, 0) for word in words]), len(common) + 1


def batches(tokens: Tensor, bptt: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(input [T, N], target [T * N]) for consecutive stretches of `batch` columns of text."""
    columns = tokens[: len(tokens) // batch * batch].view(batch, -1).t()
    for start in range(0, columns.size(0) - 1, bptt):
        stop = min(start + bptt, columns.size(0) - 1)
        yield columns[start:stop], columns[start + 1 : stop + 1].flatten()


def train(library: ModuleType, args: argparse.Namespace, tokens: Tensor, words: int) -> list[float]:
    """The loss of each step."""
    torch.manual_seed(args.seed)
    model = LanguageModel(library, args.model, words, args.size, args.layers, args.dropout)
    loss_of = nn.CrossEntropyLoss()
    losses: list[float] = []
    while len(losses) < args.steps:
        hidden = None
        for input, target in batches(tokens, args.bptt, args.batch):
            hidden = None if hidden is None else detach(hidden)
            model.zero_grad()
            scores, hidden = model(input, hidden)
            loss = loss_of(scores, target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(parameter.grad, alpha=-args.lr)
            losses.append(loss.item())
            if len(losses) == args.steps:
                break
    return losses


def main(argv: list[str] | None = None) -> int:
    """Train both, print both curves; 1 if they differ by more than 1e-4."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("LSTM", "GRU", "RNN"), default="LSTM")
    parser.add_argument("--text", type=Path, help="default: the Python standard library")
    sizes = {"layers": 2, "size": 128, "bptt": 35, "batch": 20, "words": 2000}
    for name, whole in {**sizes, "steps": 200, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=whole)
    for name, number in {"lr": 2.0, "clip": 0.25, "dropout": 0.0}.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    args = parser.parse_args(argv)

    tokens, words = read_tokens(args.text, args.words)
    torch_losses, losses = (train(library, args, tokens, words) for library in (nn, rnnkit))
    print("  step  torch.nn   rnnkit   (loss in nats)")
    for step in sorted({*range(0, args.steps, max(1, args.steps // 10)), args.steps - 1}):
        print(f"{step + 1:6}  {torch_losses[step]:8.5f}  {losses[step]:8.5f}")
    difference = max(abs(a - b) for a, b in zip(torch_losses, losses, strict=True))
    print(f"greatest difference over {args.steps} steps: {difference:.1e} nats")
    return int(difference > 1e-4 and args.dropout == 0)


if __name__ == "__main__":
    raise SystemExit(main())
