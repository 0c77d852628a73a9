"""`tokenry bench`: how fast a model is offline, behind a server, and as its prompts grow."""
