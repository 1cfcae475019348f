"""Everything that stands between a person and a stream: the command line, later engine and server.

cli.py              the program's door: signals and exit codes, before anything slow is imported
app.py arguments.py     the commands and their options
stream_command.py   `stream`: pipeline -> sinks.py (files and pipes, encoders.py), live_view.py, report.py
stream_options.py   what `stream` refuses before it loads anything
evaluation/         `eval sprites`: what a model shows, judged from the pixels; `eval compare`: several of them
bench/              `bench`: time per block beside the bare products and attention of the same shapes
doctor.py machine.py    `doctor`: what this machine has and what to do about what it lacks
interrupts.py errors.py    Ctrl-C at any moment; failures that are nobody's mistake
"""
