"""The `tah` command. It is a package of its own, since importing `tah` imports torch, which takes seconds."""
