"""`python -m benchmarks`: the command line of run.py, held to an ISA before any library is loaded."""

import sys

from benchmarks import isa


def main() -> int:
    try:
        isa.from_command_line(sys.argv[1:])
    except isa.IsaError as error:
        print(error, file=sys.stderr)
        return 2
    from benchmarks import run  # imports torch

    return run.main()


if __name__ == "__main__":
    sys.exit(main())
