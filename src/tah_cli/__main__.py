"""Run the `tah` command by `python -m tah_cli`."""

from .app import main

main()
