"""MLflow: runs, node metrics and models. No other package imports it."""
