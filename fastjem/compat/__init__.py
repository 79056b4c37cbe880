"""Other packages' names and paths, for what is here: scripts written for them run with their imports changed."""
