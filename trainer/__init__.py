"""Dataset shards → checkpoint → numbers."""
