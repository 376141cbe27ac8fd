"""The training step, the loop around it on Ray Train, its checkpoints and the run as a whole."""
