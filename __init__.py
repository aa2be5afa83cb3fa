"""Token labeling: dense teacher labels, from photos to a trained image model."""

__version__ = "0.1.0"
