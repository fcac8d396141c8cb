"""A deployment on the edge: the loop that serves and decides, and what it shows and tells."""
