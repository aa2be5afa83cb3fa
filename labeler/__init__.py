"""Images → label maps. Owns the map format and all geometry."""
