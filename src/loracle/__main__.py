"""``python -m loracle`` is ``loracle``."""

from loracle.cli.main import main

main()
