"""Arms compared on the same conditions: what is run and counted, as plain numbers."""
