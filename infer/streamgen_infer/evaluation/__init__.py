"""`streamgen eval`: judge a model from its pixels, and compare what was found.

app.py       the commands and their options
options.py   what is asked, and what is refused before anything is loaded
command.py   `eval sprites`: load, measure, report, print, write
measure.py   makes the videos and judges them while they are made
report.py    measurements -> the fields of the JSON file
show.py      the JSON's fields -> tables on a terminal
pictures.py  drift curves, sheets of fixed captions, sheets of switches
compare.py   `eval compare`: several JSON files -> one table
"""
