"""Embeddings of many images on the disk: rows that outlive a kill, the files that they become, who is near to whom."""
