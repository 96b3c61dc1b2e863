"""Everything that docs/compatibility.md says rnnkit does: the page's own probes."""

import pytest
import torch
from programs import ROOT, load

import rnnkit

PROGRAM = ROOT / "docs" / "compatibility.py"
compatibility = load(PROGRAM)

#: What rnnkit does not do, see "What is not there yet" in docs/guide.md.
MISSING = {
    "dynamic quantization",
    "`isinstance(layer, torch.nn.LSTM)`, by which Opacus, thop and `apply(init)` may go",
    "`torch.fx.symbolic_trace` traces through a subclass's own forward",
    "`gradient_flow` under `torch.compile`",
    "`gradient_flow` under FSDP2: `fully_shard`",
    "the textbook model: `torch.jit.trace`",
}
#: What rnnkit says then.
REASONS = "left as it was|no subclass|cannot trace|no backward pass of '' was seen|set it to None"

NEEDED = {"onnx": "onnxscript", "safetensors": "safetensors"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("feature", [feature for _, feature in compatibility.PROBES])
def test_feature(feature: str, device: str) -> None:
    for part, package in NEEDED.items():
        if part in feature:
            pytest.importorskip(package, reason=f"{package} is not installed")
    run = next(run for (_, name), run in compatibility.PROBES.items() if name == feature)
    torch.compiler.reset()
    if feature in MISSING:
        with pytest.raises(Exception, match=REASONS):
            run(rnnkit, device)
    else:
        run(rnnkit, device)


def test_the_page_has_every_feature() -> None:
    page = PROGRAM.with_suffix(".md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    answers = {row[0].removeprefix("| "): row[2] for row in rows if len(row) == 5}
    for _, feature in compatibility.PROBES:
        expected = "no: " if feature in MISSING else "yes"
        assert answers[feature].startswith(expected), feature
