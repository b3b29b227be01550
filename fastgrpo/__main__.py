"""``python -m fastgrpo COMMAND``, which is ``fastgrpo COMMAND``; ``torchrun -m fastgrpo train`` starts its ranks."""

import sys

from fastgrpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
