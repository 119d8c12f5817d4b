"""Files that strangers wrote, read so that they can neither run code nor exhaust the machine."""
