"""`python -m tah_cli`"""

from .app import main

main()
