"""MLflow: runs, metrics of nodes, models. Nothing else speaks to it."""
