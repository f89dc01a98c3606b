"""One file a model family: how its configuration, clips, blocks and tokens are read."""
