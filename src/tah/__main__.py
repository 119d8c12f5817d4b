"""`python -m tah`"""

from .cli import main

main()
