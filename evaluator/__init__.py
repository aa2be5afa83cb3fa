"""How good a checkpoint is: predictions, metrics, comparisons, reports."""
