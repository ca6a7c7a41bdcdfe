"""Train a small dual encoder with the fused InfoNCE loss and search with it: ``python examples/search.py [FOLDER]``."""

import sys

from fastxattn.search import run

if __name__ == "__main__":
    print(run(sys.argv[1] if len(sys.argv) > 1 else "search-output"))
