"""A cell's functions compiled by the machine's C++ compiler, and the folder that keeps them for later processes.

Nothing here has to succeed: where a cell cannot be compiled, the interpreter runs it (interpreted.py).
"""

import ctypes
import fcntl
import hashlib
import importlib
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import rnnkit
from rnnkit import backends
from rnnkit.graph import cpp
from rnnkit.graph.derive import Derived

#: The addresses of the functions of csrc/cpu/pointwise.h, in their order, for each of `_C.register_cell`'s arguments; 0
#: for one that the cell does not need.
Functions = dict[str, list[int]]

#: The names of libraries in the cache, see `_key`.
_NAME = re.compile(r"[0-9a-f]{32}\.so")

#: The seconds that a compiler may take.
TIME_LIMIT = 120.0

#: What csrc/cpu/compiled_cell.h includes; setup.py copies it here.
INCLUDE = Path(rnnkit.__file__).with_name("include")

_OWN_FOLDER = "set RNNKIT_CACHE to a folder of your own"
_INSTALL = "install g++ 11 or clang 19, or later, or set CXX to one"

_failed = False  # a cell could not be compiled in this process, which then compiles no other
_warned = False


class _Trouble(Exception):
    """Why a cell cannot be compiled, and what to do."""


def wanted() -> bool:
    """Whether cells are to be compiled: not with RNNKIT_COMPILE=0."""
    return os.environ.get("RNNKIT_COMPILE") != "0"


def source(derived: Derived) -> str:
    """The text of a C++ file with the functions of csrc/cpu/pointwise.h, named cell_forward_f32 and so on."""
    macro = "RNNKIT_COMPILED_CELL" + "_THAT_PROJECTS" * derived.projects
    macro += "_WITH_LATE_GATES" * (derived.graph.late > 0)
    return f"""#include "cpu/compiled_cell.h"

namespace rnnkit::RNNKIT_CAPABILITY {{
namespace {{
{cpp.struct(derived, "Cell")}}}  // namespace
}}  // namespace rnnkit::RNNKIT_CAPABILITY

using rnnkit::RNNKIT_CAPABILITY::Cell;
{macro}(Cell, cell)
"""


def load(derived: Derived) -> Functions | None:
    """A cell's functions, from the cache or compiled now; None: neither can be. The first time a warning says why."""
    global _warned
    try:
        return _addresses(_library(derived), derived)
    except _Trouble as error:
        trouble = str(error)
    except OSError as error:
        trouble = f"{error}: {_OWN_FOLDER}, with room to write"
    if not _warned:
        _warned = True
        backends.warn(
            f"rnnkit interprets cells of one's own, which takes longer than compiled code: {trouble}; "
            "RNNKIT_COMPILE=0 interprets them without this warning"
        )
    return None


def _addresses(library: ctypes.CDLL, derived: Derived) -> Functions:
    late = derived.graph.late > 0
    there = {"forward": True, "backward": True, "grad_states": True, "output": derived.projects}
    there |= {"operand": late, "late_grads": late}

    def address(name: str) -> int:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0

    def of(dtype: str) -> list[int]:
        return [
            address(f"cell_{name}_{dtype}") if is_there else 0 for name, is_there in there.items()
        ]

    return {"f32": of("f32"), "f64": of("f64")}


def _library(derived: Derived) -> ctypes.CDLL:
    """The library with a cell's functions.

    Raises:
        _Trouble, OSError: there is none.
    """
    global _failed
    flags, text = _flags(), source(derived)
    path = checked_folder() / f"{_key(text, flags)}.so"
    if library := _opened(path):
        return library
    if _failed:
        raise _Trouble("compiling failed before")
    try:
        with _locked(path.parent):
            if library := _opened(path):  # another process has compiled it meanwhile
                return library
            return _compile(text, flags, path)
    except (OSError, _Trouble):
        _failed = True
        raise


def folder() -> Path:
    """The folder of compiled cells: $RNNKIT_CACHE, else rnnkit in $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("RNNKIT_CACHE"):
        return Path(given).absolute()
    given = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(given).absolute() / "rnnkit"


def cells() -> list[Path]:
    """The files of compiled cells in the folder."""
    return sorted(path for path in folder().glob("*.so") if _NAME.fullmatch(path.name))


def clear() -> int:
    """Empties the folder. Returns how many cells were in it."""
    if not folder().is_dir():
        return 0
    with _locked(folder()):  # not while another process compiles
        found = cells()
        for path in found:
            path.unlink(missing_ok=True)
        for unfinished in folder().glob(f"{_UNFINISHED}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
    return len(found)


def checked_folder() -> Path:
    """The folder, made if it is not there. Code is loaded from it, so that nobody else may write to it.

    Raises:
        _Trouble: somebody else may.
        OSError: it cannot be made.
    """
    made = folder()
    made.parent.mkdir(parents=True, exist_ok=True)
    made.mkdir(mode=0o700, exist_ok=True)
    _check_owner(made)
    return made


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise _Trouble(
            f"{path} belongs to another user, from whom no code is loaded: {_OWN_FOLDER}"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _Trouble(f"other users can write to {path}: `chmod go-w {path}`, or {_OWN_FOLDER}")


def _opened(path: Path) -> ctypes.CDLL | None:
    """A library of the cache; None if it is not there, or cannot be loaded."""
    if not path.exists():
        return None
    _check_owner(path)
    with suppress(OSError):
        return ctypes.CDLL(str(path))
    return None


def _key(text: str, flags: list[str]) -> str:
    headers = [path.read_bytes() for path in sorted(INCLUDE.rglob("*.h"))]
    parts = [text, *flags, version(compiler()), rnnkit.__version__]
    return hashlib.sha256(b"\0".join([*headers, *map(str.encode, parts)])).hexdigest()[:32]


def _flags() -> list[str]:
    """The compiler's flags, which name the ISA in use."""
    flags_of: dict[str, list[str]] = importlib.import_module("rnnkit._build").CELL_FLAGS
    assert backends.EXTENSION is not None
    isa = backends.EXTENSION.capability()
    return [*flags_of[isa], f"-DRNNKIT_CAPABILITY={isa}", "-fPIC", "-shared"]


def compiler() -> tuple[str, ...]:
    """The C++ compiler's command: $CXX, or one on the path.

    Raises:
        _Trouble: there is none.
    """
    if given := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(given[0]) is None:
            raise _Trouble(f"CXX is {given[0]}, which is not there: {_INSTALL}")
        return tuple(given)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return (found,)
    raise _Trouble(f"there is no C++ compiler: {_INSTALL}")


def compiler_told() -> str:
    """The compiler's version, or why no cell is compiled."""
    if not wanted():
        return "not used: RNNKIT_COMPILE=0"
    try:
        return version(compiler())
    except (OSError, _Trouble) as error:
        return f"none: {error}"


@lru_cache
def version(command: tuple[str, ...]) -> str:
    """The first line of what a compiler says of its version.

    Raises:
        _Trouble: it says nothing.
    """
    lines = _run([*command, "--version"]).splitlines()
    if not lines:
        raise _Trouble(f"`{shlex.join(command)} --version` says nothing: {_INSTALL}")
    return lines[0]


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Holds the folder's lock, so that one of several processes compiles a cell and the others load it.

    Not longer than a compiler may take, and not on a file system without locks: then both compile it.
    """
    until = time.monotonic() + TIME_LIMIT
    with (place / "lock").open("w") as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        try:
            yield
        finally:  # closing it leaves the lock to a process that was forked meanwhile
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)


#: How the names of folders begin in which a compiler works.
_UNFINISHED = "unfinished-"


def _compile(text: str, flags: list[str], target: Path) -> ctypes.CDLL:
    """Compiles a file to the library `target`, which appears whole and once it could be loaded, or not at all."""
    with tempfile.TemporaryDirectory(
        prefix=_UNFINISHED, dir=target.parent, ignore_cleanup_errors=True
    ) as name:
        place, made = Path(name), Path(name, "cell.so")
        (place / "cell.cpp").write_text(text, encoding="utf-8")
        _run([*compiler(), *flags, f"-I{INCLUDE}", "cell.cpp", "-o", made.name], place)
        library = ctypes.CDLL(str(made))
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.chmod(0o700)  # a linker lets as many write to it as the umask does
        made.replace(target)
        return library


def _run(command: list[str], place: Path | None = None) -> str:
    """Runs a compiler in a folder, which also has its temporary files, and returns what it prints.

    Raises:
        _Trouble: it failed, or took too long.
    """
    process = subprocess.Popen(
        command,
        cwd=place,
        env={**os.environ, "LC_ALL": "C", **({"TMPDIR": str(place)} if place else {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        raise _Trouble(
            f"`{command[0]}` took longer than {TIME_LIMIT:g} s: set CXX to another compiler"
        ) from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
            process.communicate()
    if process.returncode:
        lines = printed.splitlines()
        told = next((line for line in lines if "error" in line), lines[-1] if lines else "")
        status = f"`{command[0]}` failed ({process.returncode})"
        what_to_do = _OWN_FOLDER if "No space left" in printed else _INSTALL
        raise _Trouble(f"{status}{f': {told.strip()}' if told else ''}: {what_to_do}")
    return printed
