"""``python -m loracle`` is ``loracle``."""

from loracle.cli import main

main()
