"""How close a split inference comes to its floor, beside what one would use instead.

`python -m executor.bench` runs this executor and its peers in turns, request by request, over the
same three processes' worth of stages: `cases` says what is run, `hosts` starts the processes,
`measure` takes the turns, `report` makes of it tables, JSON and a figure. The systems that are
compared stand in `systems`.
"""
