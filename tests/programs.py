"""Scripts of the repository, loaded as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def load(program: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(program.stem, program)
    assert spec is not None and spec.loader is not None
    module = sys.modules[program.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
