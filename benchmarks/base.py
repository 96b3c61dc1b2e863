"""Another revision of rnnkit, built in a git worktree under build/, to be timed beside this one."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def git(*arguments: str) -> str:
    """What git says about this checkout.

    Raises:
        OSError, subprocess.CalledProcessError: there is no git, or it refuses.
    """
    run = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()


def built(revision: str) -> Path:
    """The folder from which rnnkit at `revision` is imported; builds it where that is not done yet.

    Raises:
        subprocess.CalledProcessError: there is no such revision, or it does not build.
    """
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    folder = ROOT / "build" / "base" / commit[:12]
    if not folder.exists():
        git("worktree", "add", "--force", "--detach", str(folder), commit)
    if not list(folder.glob("rnnkit/_C.*")):
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        environment = {**os.environ, "RNNKIT_CPU": "1"}
        subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr, env=environment)
    return folder
