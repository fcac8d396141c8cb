"""What results look like: one self-contained HTML page, and a table on the terminal."""
