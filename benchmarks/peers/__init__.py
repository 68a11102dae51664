"""hpctrain's train step side by side with what one would run instead: `python -m benchmarks.peers --help`.

Each contender is a program of its own that trains a network on made-up images and prints one line of JSON. `plan` says
who runs against whom and what is to be reached, `runner` lets them take turns, `page` writes what came out.
"""
