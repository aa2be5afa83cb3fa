"""Images + label maps → dataset shards."""
