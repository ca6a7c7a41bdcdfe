"""``python -m fastxattn`` is the command line."""

from fastxattn.cli import main

main()
