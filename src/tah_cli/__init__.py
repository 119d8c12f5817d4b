"""The `tah` command. It is a separate package, because an import of `tah` imports torch, which takes seconds."""
