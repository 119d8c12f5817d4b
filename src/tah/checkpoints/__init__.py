"""Models on disk: found, checked, loaded, converted, and saved whole or in part. Nothing here imports the model."""
