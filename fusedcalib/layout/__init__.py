"""A step as plain data: recipes, scalars, slots, buckets and their tables. Nothing here runs anything."""
