"""`streamgen plan`: what a schedule does, and how many viewers a machine holds, before anything is bought.

app.py       the command and its options; `streamgen plan simulate` hooks in there
card.py      which visibility a schedule runs under, and whether the model was trained for it
show.py      `--show`: the timeline of a schedule with its figures; JSON
chart.py     a timeline as text and as a PNG
capacity.py  viewers by compute and by memory, for every schedule that the model may be streamed with
measure.py   the cost curve of this machine, and cost files
answer.py    the command without --show
"""
