"""Run the `tah` command: `python -m tah`."""

from tah_cli.app import main

main()
