"""Models on disk: found, loaded, described, converted, saved in part."""
