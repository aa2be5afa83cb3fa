"""LV-ViT + UperNet: data, training, evaluation, pictures."""
