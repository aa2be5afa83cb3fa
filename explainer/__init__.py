"""What a model looked at: heatmaps, and how faithful they are."""
