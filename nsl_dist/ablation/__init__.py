"""The paper's ablation studies: their settings, execution on a cluster, and results."""
