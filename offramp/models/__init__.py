"""Reference models with exits, their data, losses, training and checkpoints; import the module you need."""
