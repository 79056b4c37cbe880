"""The commands of `fastjem`, a module each: its options as a dataclass, what it does as a function, and `main`.

`main` takes the options, prints, and returns the exit code; the function that it calls returns what it found and prints
nothing, so that a program can call it. `fastjem.cli.COMMANDS` lists the commands, and imports the module of the one
that is called.
"""
